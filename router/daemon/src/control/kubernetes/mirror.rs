//! All objects of one kind, as the API server had them last: listed page by page, then followed by a stream of changes.
//!
//! A [`Mirror`] is level-triggered, as all here: who listens is told *that* something changed, and looks at what is. It is generic
//! over the [`Kind`], so that a further one costs what is to be remembered of it, and no more. An object that cannot be
//! understood is there all the same, with the reason: it denies itself, and the others go on.
//!
//! What can go wrong ends a session, and the next one begins where the last left off: at the version up to which all is known. A server
//! that does not know that version any more (410) is asked to list everything again; what was known stays until the new list is
//! complete. A stream that is silent for longer than a server ever is has lost its other end, and is opened anew. Servers are
//! tried in turn, after pauses that grow and differ from node to node.
//!
//! <https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes>

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::{Method, StatusCode};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

use super::access::fingerprint;
use super::client::{Client, Doing, Failure};
use crate::control::config::kubernetes::KubernetesConfig;
use crate::control::source::Backoff;

/// Objects of one answer.
const PAGE: usize = 500;
/// A stream is ended by the server after so many seconds, and opened again.
const STREAM: Duration = Duration::from_secs(600);
/// One object is never longer: etcd, where they are kept, takes 1.5 MiB.
const MAX_LINE: usize = 8 << 20;
/// A session that lasted so long was a success, whatever ended it.
const LASTED: Duration = Duration::from_secs(2);
/// Objects that are kept: more than the largest cluster has of any kind that is followed.
const MAX_OBJECTS: usize = 200_000;
/// Streams that a server has ended, as when it stops, are opened again within this time.
const REOPENED: Duration = Duration::from_millis(500);
/// So often a server may refuse to go on from a version before everything is listed again.
const MAX_REFUSALS: u32 = 3;
/// Whoever is not let in tries it again after a while that grows up to this, or as soon as the files that say who we are were renewed.
const MAX_REFUSED: Duration = Duration::from_secs(15);
/// How often those are looked at meanwhile.
const LOOKING: Duration = Duration::from_millis(500);
/// Nodes of one cluster do not list everything again at the same moment; and if a server wants it again and again, ever later.
const SCATTERED: Duration = Duration::from_secs(1);
const MAX_SCATTERED: Duration = Duration::from_secs(30);

/// A kind of object, and what is remembered of each.
pub trait Kind: PartialEq + Send + Sized + 'static {
    /// The API's word for several of them.
    const WHAT: &'static str;
    /// Where they are.
    const PATH: &'static str;
    /// Reads an object.
    ///
    /// # Errors
    /// What is wrong with it.
    fn read(json: &str) -> Result<(Metadata, Self), String>;
}

/// What is known.
#[derive(Debug)]
pub struct Known<K> {
    /// The objects by name, or namespace and name; those that were not understood with the reason.
    pub objects: BTreeMap<String, Result<K, String>>,
    /// Whether all were listed once.
    pub is_complete: bool,
    /// Why it is not in step.
    pub trouble: Option<String>,
    /// An object that is known from elsewhere than the stream, and its version: until then the stream tells old news of it.
    learned: Option<(String, u64)>,
}

/// All objects of a kind.
pub struct Mirror<K> {
    known: Mutex<Known<K>>,
    changed: Arc<Notify>,
}

/// The part of an object that all kinds have in common.
#[derive(Deserialize)]
struct Any {
    metadata: Metadata,
}

/// The part of an object's metadata that all kinds have in common, and is used.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Metadata {
    /// Its name.
    #[serde(default)]
    pub name: String,
    /// Its namespace, if its kind has any.
    #[serde(default)]
    pub namespace: String,
    /// Its version.
    #[serde(default)]
    pub resource_version: String,
}

#[derive(Deserialize)]
struct List<'a> {
    metadata: ListMetadata,
    #[serde(borrow, default)]
    items: Option<Vec<&'a RawValue>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListMetadata {
    #[serde(default)]
    resource_version: String,
    #[serde(default, rename = "continue")]
    next: String,
}

#[derive(Deserialize)]
struct Event<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(borrow)]
    object: &'a RawValue,
}

#[derive(Deserialize)]
struct Refusal {
    #[serde(default)]
    code: u16,
    #[serde(default)]
    message: String,
}

impl<K: Kind> Mirror<K> {
    /// Without knowledge; `changed` is told when there is news.
    pub fn new(changed: Arc<Notify>) -> Mirror<K> {
        Mirror {
            known: Mutex::new(Known { objects: BTreeMap::new(), is_complete: false, trouble: None, learned: None }),
            changed,
        }
    }

    /// What is known.
    pub fn known(&self) -> MutexGuard<'_, Known<K>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An object as the server answered with it to a request of ours.
    pub fn learn(&self, json: &str) {
        if let Ok((name, version, object)) = read::<K>(json) {
            let mut known = self.known();
            known.learned = version.parse().ok().map(|version| (name.clone(), version));
            known.objects.insert(name, object);
        }
    }

    /// Follows what the selector chooses, for ever.
    pub async fn follow(&self, config: KubernetesConfig, selector: Option<String>, seed: u64) {
        let backoff = Backoff::until(seed, Backoff::SOON);
        let mut session = Session {
            mirror: self,
            config,
            selector,
            version: None,
            backoff,
            scattered: SCATTERED,
            refusals: 0,
            shown: 0,
        };
        let mut server = seed as usize;
        // Nodes that start at once, as after a power cut, do not ask at once.
        let start = session.backoff.spread(Duration::from_millis(300));
        sleep(start).await;
        loop {
            let started = Instant::now();
            let ended = session.run(server).await;
            let lasted = started.elapsed() >= LASTED;
            match ended {
                // The usual end of a stream.
                Ok(()) if lasted => {
                    sleep(session.backoff.spread(REOPENED)).await;
                    continue;
                }
                Ok(()) => sleep(session.backoff.step()).await,
                Err(failure) => session.fail(&failure).await,
            }
            server = server.wrapping_add(1);
        }
    }

    fn change(&self, change: impl FnOnce(&mut Known<K>) -> bool) {
        if change(&mut self.known()) {
            self.changed.notify_one();
        }
    }
}

/// An object by its name and version; `None` if it is gone.
type Change<K> = (String, u64, Option<Result<K, String>>);

struct Session<'m, K> {
    mirror: &'m Mirror<K>,
    config: KubernetesConfig,
    selector: Option<String>,
    /// Up to where all is known.
    version: Option<String>,
    backoff: Backoff,
    /// How long to wait before everything is listed again.
    scattered: Duration,
    /// How often in a row the server answered, and refused.
    refusals: u32,
    /// Who it was shown that we are: [`fingerprint`].
    shown: u64,
}

impl<K: Kind> Session<'_, K> {
    async fn fail(&mut self, failure: &Failure) {
        if failure.status == Some(StatusCode::GONE) {
            tracing::info!("{}s changes are not kept for so long any more: listing them again", K::WHAT);
            self.version = None;
            let pause = self.backoff.spread(self.scattered);
            self.scattered = (self.scattered * 2).min(MAX_SCATTERED);
            return sleep(pause).await;
        }
        let why = failure.to_string();
        self.mirror.change(|known| {
            let is_new = known.trouble.as_ref() != Some(&why);
            known.trouble = Some(why);
            is_new
        });
        let mut pause = self.backoff.step();
        self.refusals = if failure.status.is_some() { self.refusals.saturating_add(1) } else { 0 };
        if matches!(failure.status, Some(StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)) {
            let grown = Duration::from_millis(200).saturating_mul(1 << self.refusals.min(16)).min(MAX_REFUSED);
            pause = self.backoff.spread(grown);
        } else if self.refusals >= MAX_REFUSALS {
            // It may be the version that it does not like: one of the future, if its store was set back.
            self.version = None;
        }
        let pause = failure.retry_after.map_or(pause, |asked| asked + pause);
        // Another proof of who we are may be what was missing.
        let _ = timeout(pause, self.renewed()).await;
    }

    async fn renewed(&self) {
        while fingerprint(&self.config) == self.shown {
            sleep(LOOKING).await;
        }
    }

    /// Follows one connection until it ends.
    async fn run(&mut self, server: usize) -> Result<(), Failure> {
        self.shown = fingerprint(&self.config);
        let client = Client::of_first(&self.config, server).await?;
        if self.version.is_none() {
            self.version = Some(self.list(&client).await?);
        }
        self.watch(&client).await
    }

    async fn list(&mut self, client: &Client) -> Result<String, Failure> {
        let doing = Doing { verb: "list", what: K::WHAT };
        let mut objects = BTreeMap::new();
        let (mut next, mut version) = (String::new(), String::new());
        loop {
            let limit = PAGE.to_string();
            let path = self.path(&[("limit", &limit), ("continue", &next)]);
            let answer = client.send(doing, Method::GET, &path, None).await?;
            let bytes = client.whole(doing, answer).await?;
            let strange = |why: &dyn std::fmt::Display| {
                Failure::new(format!("{} answers strangely to {doing}: {why}", client.server()))
            };
            let list: List<'_> = serde_json::from_slice(&bytes).map_err(|why| strange(&why))?;
            for item in list.items.iter().flatten() {
                let (name, _, object) = read::<K>(item.get()).map_err(|why| strange(&why))?;
                objects.insert(name, object);
            }
            if objects.len() > MAX_OBJECTS {
                return Err(Failure::new(format!(
                    "there are more than {MAX_OBJECTS} {}: more than are followed",
                    K::WHAT
                )));
            }
            if version.is_empty() {
                version.clone_from(&list.metadata.resource_version);
            }
            if version.is_empty() || (list.metadata.next == next && !next.is_empty()) {
                return Err(strange(&"the list has no version, or no end"));
            }
            if list.metadata.next.is_empty() {
                break;
            }
            next = list.metadata.next;
        }
        self.backoff.reset();
        self.mirror.change(|known| {
            let changed = !known.is_complete || known.trouble.is_some() || known.objects != objects;
            *known = Known { objects, is_complete: true, trouble: None, learned: None };
            changed
        });
        Ok(version)
    }

    async fn watch(&mut self, client: &Client) -> Result<(), Failure> {
        let doing = Doing { verb: "watch", what: K::WHAT };
        let version = self.version.clone().unwrap_or_default();
        let seconds = self.backoff.spread(STREAM).as_secs().to_string();
        let path = self.path(&[
            ("watch", "true"),
            ("allowWatchBookmarks", "true"),
            ("resourceVersion", &version),
            ("timeoutSeconds", &seconds),
        ]);
        let answer = client.send(doing, Method::GET, &path, None).await?;
        self.backoff.reset();
        self.refusals = 0;
        self.mirror.change(|known| known.trouble.take().is_some());
        let idle = Duration::from_secs(self.config.idle);
        let mut body = answer.into_body();
        let mut rest: Vec<u8> = Vec::new();
        loop {
            // Silence is no trouble yet: only if the stream cannot be opened again it is.
            let Ok(piece) = timeout(idle, client.piece(doing, &mut body, idle * 2)).await else { return Ok(()) };
            let Some(piece) = piece? else { return Ok(()) };
            let searched = rest.len();
            rest.extend_from_slice(&piece);
            let Some(end) = rest[searched..].iter().rposition(|byte| *byte == b'\n').map(|at| searched + at) else {
                if rest.len() > MAX_LINE {
                    return Err(Failure::new(format!("{} sends an object without an end", client.server())));
                }
                continue;
            };
            self.take_in(&rest[..end])?;
            rest.drain(..=end);
        }
    }

    /// Whole lines of a stream.
    fn take_in(&mut self, lines: &[u8]) -> Result<(), Failure> {
        let mut events = Vec::new();
        let mut ended = Ok(());
        for line in lines.split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty()) {
            match self.event(line) {
                Ok(event) => events.extend(event),
                Err(failure) => {
                    ended = Err(failure);
                    break;
                }
            }
        }
        self.mirror.change(|known| {
            let mut changed = false;
            for (name, version, object) in events {
                if known.learned.as_ref().is_some_and(|(of, newest)| *of == name && version < *newest) {
                    continue;
                }
                changed |= match object {
                    Some(object) if known.objects.len() < MAX_OBJECTS || known.objects.contains_key(&name) => {
                        let is_same = known.objects.get(&name) == Some(&object);
                        known.objects.insert(name, object);
                        !is_same
                    }
                    Some(_) => false,
                    None => known.objects.remove(&name).is_some(),
                };
            }
            changed
        });
        ended
    }

    /// One of them: an object by its name and version, without the object if that is gone.
    fn event(&mut self, line: &[u8]) -> Result<Option<Change<K>>, Failure> {
        let strange = |why: serde_json::Error| Failure::new(format!("the stream of {} is strange: {why}", K::WHAT));
        let event: Event<'_> = serde_json::from_slice(line).map_err(strange)?;
        if event.kind == "ERROR" {
            let refusal: Refusal = serde_json::from_str(event.object.get()).map_err(strange)?;
            let message: String = refusal.message.chars().filter(|c| !c.is_control()).take(200).collect();
            let why = format!("the stream of {} ended ({}, {message})", K::WHAT, refusal.code);
            return Err(Failure { status: StatusCode::from_u16(refusal.code).ok(), why, retry_after: None });
        }
        let (name, version, object) = read::<K>(event.object.get()).map_err(strange)?;
        // Versions are numbers, though that is said of late only: what is none is taken for the newest.
        let number = version.parse().unwrap_or(u64::MAX);
        if !version.is_empty() {
            self.version = Some(version);
            self.scattered = SCATTERED;
        }
        Ok(match event.kind {
            "ADDED" | "MODIFIED" => Some((name, number, Some(object))),
            "DELETED" => Some((name, number, None)),
            // A bookmark says how far we are, and nothing else does.
            _ => None,
        })
    }

    fn path(&self, query: &[(&str, &str)]) -> String {
        let selector = self.selector.as_ref().map(|selector| ("fieldSelector", selector.as_str()));
        let parts = query.iter().copied().chain(selector).filter(|(_, value)| !value.is_empty());
        let parts: Vec<String> = parts.map(|(key, value)| format!("{key}={}", escaped(value))).collect();
        format!("{}?{}", K::PATH, parts.join("&"))
    }
}

/// An object's name, its version and itself. Fails if it is no object at all.
fn read<K: Kind>(json: &str) -> Result<(String, String, Result<K, String>), serde_json::Error> {
    let (metadata, object) = match K::read(json) {
        Ok((metadata, object)) => (metadata, Ok(object)),
        Err(why) => (serde_json::from_str::<Any>(json)?.metadata, Err(why)),
    };
    let name =
        if metadata.namespace.is_empty() { metadata.name } else { format!("{}/{}", metadata.namespace, metadata.name) };
    Ok((name, metadata.resource_version, object))
}

/// As a part of a URL: RFC 3986, section 2.3, has the characters that need no escape.
pub fn escaped(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~');
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}
