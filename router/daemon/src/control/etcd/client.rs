//! A connection to one of etcd's servers: each call with a deadline, and with a token that is renewed when it ends.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use prost::Message;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_stream::StreamExt;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Status, Streaming};
use tonic_prost::ProstCodec;

use super::messages::{
    AuthenticateRequest, AuthenticateResponse, Empty, Header, KeyValue, LeaseGrantRequest, LeaseGrantResponse, LeaseId,
    LeaseKeepAliveResponse, RangeRequest, RangeResponse, TxnRequest, TxnResponse, WatchCreate, WatchRequest,
    WatchResponse, end_of,
};
use crate::control::config::source::EtcdConfig;

/// How long one call may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a connection may take.
const CONNECTING: Duration = Duration::from_secs(3);
/// How much later each further server is tried.
const HEAD_START: Duration = Duration::from_millis(200);
/// A silent connection is asked this often whether it is alive, and has so long to answer. etcd cuts off whoever asks more often than
/// every five seconds.
const ASKING: Duration = Duration::from_secs(10);
const ANSWERING: Duration = Duration::from_secs(5);
/// Keys of one answer.
const PAGE: i64 = 1000;
/// The longest answer.
const MAX_ANSWER: usize = 64 << 20;

/// A connection.
pub struct Client {
    grpc: Grpc<Channel>,
    token: Option<MetadataValue<Ascii>>,
    config: EtcdConfig,
}

impl Client {
    /// Connects to one of the servers: to `first`, or, if it does not answer soon, to whichever does.
    pub async fn connect(config: &EtcdConfig, first: usize) -> Result<Client> {
        let count = config.endpoints.len();
        let mut attempts = JoinSet::new();
        for number in 0..count {
            let server = config.endpoints[(first + number) % count].clone();
            let config = config.clone();
            attempts.spawn(async move {
                sleep(HEAD_START * u32::try_from(number).unwrap_or(u32::MAX)).await;
                Client::connect_to(&config, &server).await
            });
        }
        let mut errors = Vec::new();
        while let Some(attempt) = attempts.join_next().await {
            match attempt {
                Ok(Ok(client)) => return Ok(client),
                Ok(Err(error)) => errors.push(format!("{error:#}")),
                Err(ended) => errors.push(ended.to_string()),
            }
        }
        errors.sort();
        bail!("{}", errors.join("; "))
    }

    async fn connect_to(config: &EtcdConfig, server: &str) -> Result<Client> {
        let mut endpoint = Endpoint::from_shared(server.to_owned())
            .with_context(|| format!("{server} is no server"))?
            .connect_timeout(CONNECTING)
            .http2_keep_alive_interval(ASKING)
            .keep_alive_timeout(ANSWERING)
            .keep_alive_while_idle(true);
        if server.starts_with("https://") {
            endpoint = endpoint.tls_config(tls(config)?).context("the certificates cannot be used")?;
        }
        let channel = timeout(CONNECTING, endpoint.connect()).await;
        let channel = channel
            .map_err(|_| anyhow!("{server} does not answer"))?
            .with_context(|| format!("cannot connect to {server}"))?;
        let grpc = Grpc::new(channel).max_decoding_message_size(MAX_ANSWER);
        let mut client = Client { grpc, token: None, config: config.clone() };
        client.authenticate().await?;
        Ok(client)
    }

    /// All keys with this prefix, as they were at one revision.
    pub async fn list(&mut self, prefix: &[u8]) -> Result<(Header, Vec<KeyValue>)> {
        let mut all: Vec<KeyValue> = Vec::new();
        let mut first: Option<Header> = None;
        loop {
            let key = all.last().map_or_else(|| prefix.to_vec(), |last| [last.key.as_slice(), &[0]].concat());
            let revision = first.as_ref().map_or(0, |header| header.revision);
            let request = RangeRequest { key, range_end: end_of(prefix), limit: PAGE, revision };
            let answer: RangeResponse = self.call("/etcdserverpb.KV/Range", request).await?;
            let header = answer.header.unwrap_or_default();
            let more = answer.more && !answer.kvs.is_empty();
            all.extend(answer.kvs);
            let header = first.get_or_insert(header);
            if !more {
                return Ok((header.clone(), all));
            }
        }
    }

    /// Where etcd is, without asking for keys.
    pub async fn probe(&mut self, key: &[u8]) -> Result<Header> {
        let request = RangeRequest { key: key.to_vec(), ..RangeRequest::default() };
        let answer: RangeResponse = self.call("/etcdserverpb.KV/Range", request).await?;
        Ok(answer.header.unwrap_or_default())
    }

    /// All of it or nothing.
    pub async fn transact(&mut self, request: TxnRequest) -> Result<TxnResponse> {
        self.call("/etcdserverpb.KV/Txn", request).await
    }

    /// A lease of so many seconds.
    pub async fn grant(&mut self, seconds: u64) -> Result<i64> {
        let request = LeaseGrantRequest { ttl: i64::try_from(seconds)? };
        let answer: LeaseGrantResponse = self.call("/etcdserverpb.Lease/LeaseGrant", request).await?;
        if !answer.error.is_empty() {
            bail!("etcd gives no lease: {}", answer.error);
        }
        Ok(answer.id)
    }

    /// Ends a lease. One that has ended is as good.
    pub async fn revoke(&mut self, id: i64) -> Result<()> {
        let revoked: Result<Empty> = self.call("/etcdserverpb.Lease/LeaseRevoke", LeaseId { id }).await;
        match revoked {
            Err(error) if error.downcast_ref::<Status>().is_some_and(|status| status.code() == Code::NotFound) => {
                Ok(())
            }
            result => result.map(drop),
        }
    }

    /// Keeps leases; for each of them how many seconds it has, 0 if it has ended.
    pub async fn keep_alive(&mut self, ids: &[i64]) -> Result<Vec<i64>> {
        let requests: Vec<LeaseId> = ids.iter().map(|id| LeaseId { id: *id }).collect();
        let request = self.signed(tokio_stream::iter(requests));
        let keep = async {
            self.grpc.ready().await.context("etcd's server is away")?;
            let path = PathAndQuery::from_static("/etcdserverpb.Lease/LeaseKeepAlive");
            let codec = ProstCodec::<LeaseId, LeaseKeepAliveResponse>::default();
            let mut answers = self.grpc.streaming(request, path, codec).await?.into_inner();
            let mut left = vec![0; ids.len()];
            for _ in ids {
                let Some(answer) = answers.message().await? else { break };
                for (id, left) in ids.iter().zip(&mut left) {
                    if *id == answer.id {
                        *left = answer.ttl;
                    }
                }
            }
            Ok(left)
        };
        timeout(PATIENCE, keep).await.unwrap_or_else(|_| bail!("etcd does not answer"))
    }

    /// Follows all keys with this prefix from a revision on.
    pub async fn watch(&mut self, prefix: &[u8], from: i64) -> Result<Streaming<WatchResponse>> {
        let create = WatchCreate { key: prefix.to_vec(), range_end: end_of(prefix), start_revision: from };
        // What the server is told ends with the watch: the stream of requests must stay open.
        let requests = tokio_stream::once(WatchRequest { create: Some(create) }).chain(tokio_stream::pending());
        let request = self.signed(requests);
        let open = async {
            self.grpc.ready().await.context("etcd's server is away")?;
            let path = PathAndQuery::from_static("/etcdserverpb.Watch/Watch");
            let codec = ProstCodec::<WatchRequest, WatchResponse>::default();
            Ok(self.grpc.streaming(request, path, codec).await?.into_inner())
        };
        timeout(PATIENCE, open).await.unwrap_or_else(|_| bail!("etcd does not answer"))
    }

    async fn authenticate(&mut self) -> Result<()> {
        let (Some(user), Some(file)) = (self.config.user.clone(), &self.config.password_file) else { return Ok(()) };
        let password = std::fs::read_to_string(file)
            .with_context(|| format!("cannot read the password for etcd in {}", file.display()))?;
        let request = AuthenticateRequest { name: user.clone(), password: password.trim_end_matches('\n').to_owned() };
        self.token = None;
        let answer: AuthenticateResponse = self
            .call_once("/etcdserverpb.Auth/Authenticate", &request)
            .await
            .with_context(|| format!("etcd does not let the user {user:?} in"))?;
        self.token = Some(answer.token.parse().context("etcd's token cannot be sent back")?);
        Ok(())
    }

    async fn call<Q: Message + Default + Clone + 'static, A: Message + Default + 'static>(
        &mut self,
        path: &'static str,
        request: Q,
    ) -> Result<A> {
        match self.call_once(path, &request).await {
            Err(error) if self.token.is_some() && is_token_old(&error) => {
                self.authenticate().await?;
                self.call_once(path, &request).await
            }
            result => result,
        }
    }

    async fn call_once<Q: Message + Default + Clone + 'static, A: Message + Default + 'static>(
        &mut self,
        path: &'static str,
        request: &Q,
    ) -> Result<A> {
        let request = self.signed(request.clone());
        let call = async {
            self.grpc.ready().await.context("etcd's server is away")?;
            let codec = ProstCodec::<Q, A>::default();
            Ok(self.grpc.unary(request, PathAndQuery::from_static(path), codec).await?.into_inner())
        };
        timeout(PATIENCE, call).await.unwrap_or_else(|_| bail!("etcd does not answer"))
    }

    fn signed<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(token) = &self.token {
            request.metadata_mut().insert("token", token.clone());
        }
        request
    }
}

/// A token ends after a while, and when users or their rights were changed.
fn is_token_old(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Status>().is_some_and(|status| {
        status.code() == Code::Unauthenticated || status.message().contains("revision of auth store is old")
    })
}

fn tls(config: &EtcdConfig) -> Result<ClientTlsConfig> {
    let read = |path: &std::path::Path| {
        std::fs::read(path).with_context(|| format!("cannot read {} for etcd", path.display()))
    };
    let mut tls = ClientTlsConfig::new();
    if let Some(ca) = &config.ca {
        tls = tls.ca_certificate(Certificate::from_pem(read(ca)?));
    }
    if let Some((certificate, key)) = &config.certificate {
        tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
    }
    Ok(tls)
}
