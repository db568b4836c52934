//! The double's HTTP: requests in, pages, streams and refusals out, spoilt as the test wants it.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::channel::{Channel, Sender};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER};
use hyper::{Method, Request, Response};
use serde_json::{Value, json};
use tokio::time::sleep;

use super::store::{Refused, Selector, not_found};
use super::{Asked, Shared};

type Body = BoxBody<Bytes, Infallible>;

/// What a request is for.
struct Target {
    resource: String,
    name: Option<String>,
    sub: String,
}

impl Target {
    fn of(path: &str) -> Option<Target> {
        let mut parts = path.strip_prefix("/api/v1/")?.split('/').map(str::to_owned);
        let mut resource = parts.next()?;
        let mut name = parts.next();
        let mut sub = parts.next().unwrap_or_default();
        if resource == "namespaces" {
            resource = sub;
            let within = parts.next();
            sub = parts.next().unwrap_or_default();
            name = within.map(|within| format!("{}/{within}", name.unwrap_or_default()));
        }
        ["nodes", "pods"].contains(&resource.as_str()).then_some(Target { resource, name, sub })
    }
}

/// The query of a request, with its escapes undone.
struct Query(Vec<(String, String)>);

impl Query {
    fn of(text: &str) -> Query {
        let pairs = text.split('&').filter_map(|pair| pair.split_once('='));
        Query(pairs.map(|(key, value)| (key.to_owned(), unescaped(value))).collect())
    }

    fn text(&self, key: &str) -> &str {
        self.0.iter().find(|(name, _)| name == key).map_or("", |(_, value)| value)
    }
}

fn unescaped(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, more)) = rest.split_first() {
        let code = more.get(..2).filter(|_| *first == b'%');
        let code = code.and_then(|code| u8::from_str_radix(std::str::from_utf8(code).ok()?, 16).ok());
        bytes.push(code.unwrap_or(*first));
        rest = if code.is_some() { &more[2..] } else { more };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Answers one request.
pub async fn answer(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let query = Query::of(request.uri().query().unwrap_or_default());
    let target = Target::of(request.uri().path());
    let is_watch = matches!(query.text("watch"), "true" | "1");
    let verb = match (request.method(), &target) {
        (&Method::PATCH, _) => "patch",
        (_, Some(target)) if target.name.is_some() => "get",
        _ if is_watch => "watch",
        _ => "list",
    };
    let what = target.as_ref().map_or_else(String::new, |target| match target.sub.as_str() {
        "" => target.resource.clone(),
        sub => format!("{}/{sub}", target.resource),
    });
    let said = |name| request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    let (token, media) = (said(AUTHORIZATION), said(CONTENT_TYPE));
    shared.log.lock().expect("nobody panics with it").push(Asked {
        when: Instant::now(),
        verb,
        what: what.clone(),
        manager: query.text("fieldManager").to_owned(),
    });
    let faults = shared.faults();
    if faults.hang_requests {
        std::future::pending::<()>().await;
    }
    if let Some(refused) = refused_by(&shared, verb, &what, &token) {
        return Ok(refused);
    }
    let Some(target) = target else { return Ok(refuse(&not_found("path", request.uri().path()))) };
    let answered = match (verb, &target.name) {
        ("patch", Some(name)) => {
            let body = request.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
            let body: Value = serde_json::from_slice(&body).unwrap_or_default();
            shared
                .change(|store| store.patch(&target.resource, name, &target.sub, &media, &body))
                .map(|object| whole(200, &object))
        }
        ("get", Some(name)) => {
            let store = shared.store.lock().expect("nobody panics with it");
            store
                .get(&target.resource, name)
                .map(|object| whole(200, object))
                .ok_or_else(|| not_found(&target.resource, name))
        }
        ("watch", None) => watch(Arc::clone(&shared), &target.resource, &query),
        ("list", None) => list(&shared, &target.resource, &query),
        _ => Err(not_found(&target.resource, "")),
    };
    Ok(match answered {
        Ok(response) if verb == "list" && faults.slow.is_some() => {
            slowly(response, faults.slow.unwrap_or_default()).await
        }
        Ok(response) => response,
        Err(refused) => refuse(&refused),
    })
}

/// The refusals that have nothing to do with objects.
fn refused_by(shared: &Shared, verb: &str, what: &str, token: &str) -> Option<Response<Body>> {
    let mut faults = shared.faults.lock().expect("nobody panics with it");
    if faults.token.as_ref().is_some_and(|good| token != format!("Bearer {good}")) {
        return Some(refuse(&Refused { status: 401, reason: "Unauthorized", message: "Unauthorized".into() }));
    }
    if faults.forbidden.iter().any(|(forbidden, resource)| *forbidden == verb && resource == what) {
        let message = format!(
            "{what} is forbidden: User \"system:serviceaccount:kube-system:weft\" cannot {verb} resource \"{what}\" in API group \"\" at \
             the cluster scope"
        );
        return Some(refuse(&Refused { status: 403, reason: "Forbidden", message }));
    }
    if faults.fail > 0 {
        faults.fail -= 1;
        let message = "an error on the server has prevented the request from succeeding".into();
        let mut refused = refuse(&Refused { status: faults.fail_with, reason: "InternalError", message });
        if faults.fail_with == 429 {
            refused.headers_mut().insert(RETRY_AFTER, "1".parse().expect("a number is a header's value"));
        }
        return Some(refused);
    }
    None
}

fn list(shared: &Shared, resource: &str, query: &Query) -> Result<Response<Body>, Refused> {
    let selector = Selector::read(query.text("fieldSelector"))?;
    let limit = query.text("limit").parse().unwrap_or(0);
    let page =
        shared.store.lock().expect("nobody panics with it").list(resource, &selector, limit, query.text("continue"))?;
    let kind = if resource == "nodes" { "NodeList" } else { "PodList" };
    let mut metadata = json!({"resourceVersion": page.version.to_string()});
    if !page.next.is_empty() {
        metadata["continue"] = json!(page.next);
    }
    let items = page.items.join(",");
    Ok(text(200, format!("{{\"kind\":\"{kind}\",\"apiVersion\":\"v1\",\"metadata\":{metadata},\"items\":[{items}]}}")))
}

fn watch(shared: Arc<Shared>, resource: &str, query: &Query) -> Result<Response<Body>, Refused> {
    let selector = Selector::read(query.text("fieldSelector"))?;
    let version: u64 = query.text("resourceVersion").parse().unwrap_or(0);
    let bookmarks = query.text("allowWatchBookmarks") == "true";
    let seconds: u64 = query.text("timeoutSeconds").parse().unwrap_or(1800);
    // A version of the future is refused at once, one of the past by the stream.
    if let Err(refused) = shared.store.lock().expect("nobody panics with it").changes(resource, &selector, version)
        && refused.status == 504
    {
        return Err(refused);
    }
    let (sender, body) = Channel::new(16);
    let resource = resource.to_owned();
    tokio::spawn(async move {
        let stream = stream(&shared, sender, &resource, &selector, version, bookmarks);
        let _ = tokio::time::timeout(Duration::from_secs(seconds), stream).await;
    });
    let response = Response::builder().header(CONTENT_TYPE, "application/json");
    Ok(response.body(body.boxed()).expect("a response without surprises"))
}

async fn stream(
    shared: &Shared,
    mut sender: Sender<Bytes>,
    resource: &str,
    selector: &Selector,
    mut version: u64,
    bookmarks: bool,
) {
    let mut changed = shared.changed.subscribe();
    let mut last_bookmark = Instant::now();
    loop {
        if shared.faults().hang_streams {
            // Not even its end is heard of.
            std::future::pending::<()>().await;
        }
        let (changes, newest) = {
            let store = shared.store.lock().expect("nobody panics with it");
            (store.changes(resource, selector, version), store.version())
        };
        let mut lines = Vec::new();
        let has_ended = changes.is_err();
        match changes {
            Ok(changes) => {
                changes.iter().for_each(|change| lines.extend_from_slice(&change.line));
                version = newest;
            }
            Err(refused) => {
                let event = json!({"type": "ERROR", "object": status(&refused)});
                lines.extend_from_slice(format!("{event}\n").as_bytes());
            }
        }
        let every = shared.faults().bookmark_every;
        if bookmarks && last_bookmark.elapsed() >= every {
            last_bookmark = Instant::now();
            let kind = if resource == "nodes" { "Node" } else { "Pod" };
            let object = json!({"kind": kind, "apiVersion": "v1", "metadata": {"resourceVersion": version.to_string(), "creationTimestamp": null}});
            lines.extend_from_slice(format!("{}\n", json!({"type": "BOOKMARK", "object": object})).as_bytes());
        }
        if !lines.is_empty() && !send(shared, &mut sender, lines).await || has_ended {
            return;
        }
        let until = every.saturating_sub(last_bookmark.elapsed()).max(Duration::from_millis(5));
        tokio::select! {
            told = changed.changed() => if told.is_err() { return },
            () = sleep(until) => {}
        }
    }
}

/// Whether somebody takes it.
async fn send(shared: &Shared, sender: &mut Sender<Bytes>, lines: Vec<u8>) -> bool {
    let pieces: Vec<Bytes> = match shared.faults().slow {
        None => vec![lines.into()],
        Some((size, _)) => lines.chunks(size).map(Bytes::copy_from_slice).collect(),
    };
    for piece in pieces {
        if sender.send_data(piece).await.is_err() {
            return false;
        }
        if let Some((_, pause)) = shared.faults().slow {
            sleep(pause).await;
        }
    }
    true
}

/// The same answer in small pieces.
async fn slowly(response: Response<Body>, (size, pause): (usize, Duration)) -> Response<Body> {
    let (head, body) = response.into_parts();
    let Ok(bytes) = body.collect().await.map(|body| body.to_bytes());
    let (mut sender, body) = Channel::new(1);
    tokio::spawn(async move {
        for piece in bytes.chunks(size) {
            if sender.send_data(Bytes::copy_from_slice(piece)).await.is_err() {
                return;
            }
            sleep(pause).await;
        }
    });
    Response::from_parts(head, body.boxed())
}

fn status(refused: &Refused) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": refused.message, "reason": refused.reason, "code": refused.status,
    })
}

fn refuse(refused: &Refused) -> Response<Body> {
    whole(refused.status, &status(refused))
}

fn whole(status: u16, body: &Value) -> Response<Body> {
    text(status, body.to_string())
}

fn text(status: u16, body: String) -> Response<Body> {
    let response = Response::builder().status(status).header(CONTENT_TYPE, "application/json");
    response.body(Full::new(Bytes::from(body)).boxed()).expect("a response without surprises")
}
