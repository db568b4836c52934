//! Serving metrics and probes over HTTP, for Prometheus and the kubelet.
//!
//! | path | answer |
//! |---|---|
//! | `/metrics` | all metrics ([`super::exposition`]) |
//! | `/healthz` | 200 while the data plane answers, else 503: liveness |
//! | `/readyz` | 200 if pods can be attached, else 503 and the reason: readiness |
//!
//! Before this node's ranges are known there is no data plane yet, and nothing wrong with that: restarting weftd would not help.
//!
//! Whoever can reach the address may ask, so there are limits: so many clients at once, a deadline for each, and no request body is read.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::Context;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::api::{show, status};
use crate::node::Node;

/// Clients at once; more wait in the kernel's queue.
const CLIENTS: usize = 16;
/// How long a client may take to ask.
const HEADERS: Duration = Duration::from_secs(5);
/// How long a client may stay connected.
const CONNECTED: Duration = Duration::from_secs(60);
/// How long the node may take to answer.
const ANSWER: Duration = Duration::from_secs(5);

/// Whom it is about: the node, as soon as there is one.
#[derive(Default)]
pub struct Subject {
    node: OnceLock<Arc<Node>>,
    why: Mutex<String>,
}

impl Subject {
    /// There is a node.
    pub fn is(&self, node: &Arc<Node>) {
        drop(self.node.set(Arc::clone(node)));
    }

    /// There is none yet, and why.
    pub fn waits(&self, why: &str) {
        why.clone_into(&mut self.why.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn answer_early(&self, path: &str) -> Response<Full<Bytes>> {
        if path == "/healthz" {
            return plain(StatusCode::OK, "ok\n".into());
        }
        let why = self.why.lock().unwrap_or_else(PoisonError::into_inner).clone();
        plain(StatusCode::SERVICE_UNAVAILABLE, format!("this node does not know its ranges yet: {why}\n"))
    }
}

/// Serves on `address` from then on.
///
/// # Errors
/// The address cannot be had.
pub async fn start(subject: &Arc<Subject>, address: SocketAddr) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}: change the key metrics.listen"))?;
    tracing::info!(%address, "serving /metrics, /healthz and /readyz");
    tokio::spawn(serve(listener, Arc::clone(subject)));
    Ok(())
}

async fn serve(listener: TcpListener, subject: Arc<Subject>) {
    let slots = Arc::new(Semaphore::new(CLIENTS));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "cannot accept a client of the metrics");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let subject = Arc::clone(&subject);
        tokio::spawn(async move {
            converse(stream, subject).await;
            drop(slot);
        });
    }
}

async fn converse(stream: TcpStream, subject: Arc<Subject>) {
    let answer = service_fn(move |request: Request<Incoming>| {
        let subject = Arc::clone(&subject);
        async move { Ok::<_, Infallible>(answer(request.method(), request.uri().path(), &subject).await) }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADERS);
    let connection = http.serve_connection(TokioIo::new(stream), answer);
    // A client that goes away, or stays too long, is its own affair.
    let _ = timeout(CONNECTED, connection).await;
}

async fn answer(method: &Method, path: &str, subject: &Subject) -> Response<Full<Bytes>> {
    if ![Method::GET, Method::HEAD].contains(method) {
        return plain(StatusCode::METHOD_NOT_ALLOWED, "only GET is served here\n".into());
    }
    let ask = match path {
        "/metrics" => metrics,
        "/healthz" => healthy,
        "/readyz" => ready,
        _ => return plain(StatusCode::NOT_FOUND, "there are /metrics, /healthz and /readyz\n".into()),
    };
    let Some(node) = subject.node.get().cloned() else { return subject.answer_early(path) };
    match timeout(ANSWER, spawn_blocking(move || ask(&node))).await {
        Ok(Ok(response)) => response,
        Ok(Err(_)) => plain(StatusCode::INTERNAL_SERVER_ERROR, "weftd panicked over this request\n".into()),
        Err(_) => plain(StatusCode::SERVICE_UNAVAILABLE, format!("weftd did not answer within {ANSWER:?}\n")),
    }
}

fn metrics(node: &Node) -> Response<Full<Bytes>> {
    match super::exposition(node) {
        Ok(text) => respond(StatusCode::OK, super::CONTENT_TYPE, text),
        Err(failure) => plain(StatusCode::SERVICE_UNAVAILABLE, format!("{failure}\n")),
    }
}

fn healthy(node: &Node) -> Response<Full<Bytes>> {
    told(show::snapshot(node, false).map(drop))
}

fn ready(node: &Node) -> Response<Full<Bytes>> {
    told(status::ready(node))
}

fn told(result: Result<(), weft_api::Failure>) -> Response<Full<Bytes>> {
    match result {
        Ok(()) => plain(StatusCode::OK, "ok\n".into()),
        Err(failure) => plain(StatusCode::SERVICE_UNAVAILABLE, format!("{failure}\n")),
    }
}

fn plain(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    respond(status, "text/plain; charset=utf-8", text)
}

fn respond(status: StatusCode, kind: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
