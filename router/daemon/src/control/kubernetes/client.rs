//! Requests to an API server: each with a deadline, with a token that is read again when it may have changed, and with an answer that
//! says what was refused, and what to do.

use std::fmt;
use std::time::Duration;

use anyhow::anyhow;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER, USER_AGENT};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client as Hyper;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::access::{Access, Token};
use crate::control::config::kubernetes::KubernetesConfig;

/// How long a connection may take.
const CONNECTING: Duration = Duration::from_secs(3);
/// How much later each further server is tried.
const HEAD_START: Duration = Duration::from_millis(200);
/// A connection on which nothing was heard for so long is asked whether it is alive, again and again.
const ASKING: Duration = Duration::from_secs(5);
const ASKING_AGAIN: Duration = Duration::from_secs(1);
/// For so long something may be on its way without the other end's word that it has come: its kernel says that, however busy the server is.
const UNHEARD: Duration = Duration::from_secs(5);
/// A server that has not answered for so long is asked whether it answers anybody; it has as long for that, and is soon asked again.
const SILENCE: Duration = Duration::from_secs(2);
const BETWEEN: Duration = Duration::from_millis(500);
/// What it is asked.
const ALIVE: &str = "/readyz";
/// How long an answer may take to begin, and between its pieces.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest answer to one request: a page of the largest objects.
const MAX_ANSWER: usize = 256 << 20;
/// What is read of a refusal.
const MAX_REFUSAL: usize = 64 << 10;
/// What is shown of it.
const MAX_SHOWN: usize = 300;
/// Servers may ask to be left alone for so long, at most.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// Why a request failed.
#[derive(Debug)]
pub struct Failure {
    /// HTTP's status, if the server refused.
    pub status: Option<StatusCode>,
    /// What happened, and what to do.
    pub why: String,
    /// For how long the server wants to be left alone.
    pub retry_after: Option<Duration>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

impl Failure {
    /// One that is not a refusal.
    pub fn new(why: impl fmt::Display) -> Failure {
        Failure { status: None, why: why.to_string(), retry_after: None }
    }
}

/// What is asked for, in words: `list nodes`.
#[derive(Debug, Clone, Copy)]
pub struct Doing {
    /// The API's verb.
    pub verb: &'static str,
    /// The API's resource.
    pub what: &'static str,
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.verb, self.what)
    }
}

/// What is sent with a patch.
pub struct Patch<'a> {
    /// Its kind of patch.
    pub media: &'static str,
    /// The patch itself.
    pub body: &'a serde_json::Value,
}

/// A client of one server.
pub struct Client {
    hyper: Hyper<HttpsConnector<HttpConnector>, Full<Bytes>>,
    server: String,
    token: Option<Token>,
    patience: Duration,
}

impl Client {
    /// For the server of this number. Connects with the first request.
    pub fn new(config: &KubernetesConfig, number: usize) -> Result<Client, Failure> {
        let Access { server, token, tls } =
            Access::of(config, number).map_err(|why| Failure::new(format!("{why:#}")))?;
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(CONNECTING));
        tcp.set_nodelay(true);
        tcp.set_keepalive(Some(ASKING));
        tcp.set_keepalive_interval(Some(ASKING_AGAIN));
        tcp.set_tcp_user_timeout(Some(UNHEARD));
        let connector =
            HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().wrap_connector(tcp);
        let mut builder = Hyper::builder(TokioExecutor::new());
        builder.pool_max_idle_per_host(1);
        let patience = PATIENCE.min(Duration::from_secs(config.idle));
        Ok(Client { hyper: builder.build(connector), server, token, patience })
    }

    /// For whichever of several servers takes a connection: the one of this number if it does so soon. If none does, for that one.
    pub async fn of_first(config: &KubernetesConfig, number: usize) -> Result<Client, Failure> {
        let count = config.servers.len();
        let number = number.checked_rem(count).unwrap_or(0);
        let mut attempts = JoinSet::new();
        for later in 0..if count > 1 { count } else { 0 } {
            let each = number + later;
            let server = config.servers[each % count].parse::<Uri>().ok();
            let delay = HEAD_START * u32::try_from(later).unwrap_or(u32::MAX);
            attempts.spawn(async move {
                sleep(delay).await;
                let server = server?;
                let port = server.port_u16().unwrap_or(443);
                let host = server.host()?.trim_matches(['[', ']']);
                let tried = timeout(CONNECTING, TcpStream::connect((host, port))).await;
                tried.is_ok_and(|tried| tried.is_ok()).then_some(each)
            });
        }
        let mut first = number;
        while let Some(attempt) = attempts.join_next().await {
            if let Ok(Some(found)) = attempt {
                first = found;
                break;
            }
        }
        Client::new(config, first)
    }

    /// Where it leads.
    pub fn server(&self) -> &str {
        &self.server
    }

    /// Sends a request; the answer's body is still to be read. It may be sent twice.
    pub async fn send(
        &self,
        doing: Doing,
        method: Method,
        path: &str,
        patch: Option<Patch<'_>>,
    ) -> Result<Response<Incoming>, Failure> {
        let answered = async {
            let request = self.request(method.clone(), path, patch.as_ref())?;
            tokio::select! {
                answer = self.hyper.request(request) => return Ok(answer),
                () = self.has_come_back() => {}
            }
            Ok(self.hyper.request(self.request(method, path, patch.as_ref())?).await)
        };
        let answer = timeout(self.patience, answered).await.map_err(|_| self.silent(doing))??;
        let answer = answer.map_err(|why| self.unreachable(&anyhow!(why)))?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        Err(self.refused(doing, answer).await)
    }

    fn request(&self, method: Method, path: &str, patch: Option<&Patch<'_>>) -> Result<Request<Full<Bytes>>, Failure> {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.server));
        request =
            request.header(ACCEPT, "application/json").header(USER_AGENT, concat!("weftd/", env!("CARGO_PKG_VERSION")));
        if let Some(token) = &self.token {
            let token = token.read().map_err(|why| Failure::new(format!("{why:#}")))?;
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        let body = match patch {
            None => Bytes::new(),
            Some(patch) => {
                request = request.header(CONTENT_TYPE, patch.media);
                patch.body.to_string().into()
            }
        };
        request.body(Full::new(body)).map_err(|why| Failure::new(format!("{}: {why}", self.server)))
    }

    /// Ends when a server that was silent altogether speaks again: what it was asked before, it may have forgotten. One that answers this
    /// question all the while is only slow, and is waited for.
    async fn has_come_back(&self) {
        let mut was_silent = false;
        sleep(SILENCE).await;
        loop {
            let question = Request::builder().uri(format!("{}{ALIVE}", self.server)).body(Full::default());
            let Ok(question) = question else { return std::future::pending().await };
            // Whatever it says, a refusal as well, it speaks.
            let speaks = timeout(SILENCE, self.hyper.request(question)).await.is_ok_and(|answer| answer.is_ok());
            match (speaks, was_silent) {
                (true, true) => return,
                (true, false) => return std::future::pending().await,
                (false, _) => was_silent = true,
            }
            sleep(BETWEEN).await;
        }
    }

    /// The next piece of an answer; `None` at its end.
    pub async fn piece(&self, doing: Doing, body: &mut Incoming, patience: Duration) -> Result<Option<Bytes>, Failure> {
        loop {
            let frame = timeout(patience, body.frame()).await.map_err(|_| self.silent(doing))?;
            match frame {
                None => return Ok(None),
                Some(Err(why)) => return Err(self.unreachable(&anyhow!(why))),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }

    /// All of an answer.
    pub async fn whole(&self, doing: Doing, answer: Response<Incoming>) -> Result<Vec<u8>, Failure> {
        let mut body = answer.into_body();
        let mut bytes = Vec::new();
        while let Some(piece) = self.piece(doing, &mut body, self.patience).await? {
            if bytes.len() + piece.len() > MAX_ANSWER {
                return Err(Failure::new(format!("{} has no end of answer to: {doing}", self.server)));
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }

    fn silent(&self, doing: Doing) -> Failure {
        Failure::new(format!("{} does not answer, asked to {doing}", self.server))
    }

    fn unreachable(&self, why: &anyhow::Error) -> Failure {
        let why = format!("{why:#}");
        let advice = if why.contains("certificate") {
            ": is the CA the one that signed the server's certificate, and is the server's address in that certificate?"
        } else if why.contains("Connect") {
            ": is that its address, and does it run?"
        } else {
            ""
        };
        Failure::new(format!("cannot reach {}: {why}{advice}", self.server))
    }

    async fn refused(&self, doing: Doing, answer: Response<Incoming>) -> Failure {
        let status = answer.status();
        let retry_after = answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        let retry_after = retry_after.map(|seconds| Duration::from_secs(seconds).min(MAX_RETRY_AFTER));
        let said = self.said(doing, answer).await;
        let advice = match status {
            StatusCode::UNAUTHORIZED => match &self.token {
                Some(Token::File(file)) => format!(": the token in {} is not valid there, or no more", file.display()),
                _ => ": our token or certificate is not valid there, or no more".into(),
            },
            StatusCode::FORBIDDEN => {
                ": grant that with the ClusterRole that comes with Weft (deploy/kubernetes)".into()
            }
            _ => String::new(),
        };
        let why = format!("{} refused to {doing} ({}{said}){advice}", self.server, status.as_u16());
        Failure { status: Some(status), why, retry_after }
    }

    /// What the server says about a refusal, fit for a terminal.
    async fn said(&self, doing: Doing, answer: Response<Incoming>) -> String {
        let mut body = answer.into_body();
        let mut bytes = Vec::new();
        while let Ok(Some(piece)) = self.piece(doing, &mut body, Duration::from_secs(2)).await {
            bytes.extend_from_slice(&piece);
            if bytes.len() > MAX_REFUSAL {
                break;
            }
        }
        let message = serde_json::from_slice(&bytes).map(|said: Said| said.message).unwrap_or_default();
        let message: String = message.chars().filter(|c| !c.is_control()).take(MAX_SHOWN).collect();
        if message.is_empty() { message } else { format!(", {message}") }
    }
}

/// Of the API's `Status`, what is used here.
#[derive(Deserialize)]
struct Said {
    #[serde(default)]
    message: String,
}
