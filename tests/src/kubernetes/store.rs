//! The objects of the double, with versions and a history, as etcd and the watch cache keep them behind a real API server.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use hyper::body::Bytes;
use serde_json::{Value, json};

use super::patch;

/// Changes that are remembered for streams that begin in the past.
const HISTORY: usize = 100_000;
/// Lists that are being read page by page.
const MAX_LISTS: usize = 64;

/// A change.
#[derive(Debug)]
pub struct Change {
    /// The version that it made.
    pub version: u64,
    /// `nodes` or `pods`.
    pub resource: String,
    /// The object, as it is then; of a deleted one, as it was.
    object: Arc<Value>,
    /// As a stream has it.
    pub line: Bytes,
}

/// Why a request is refused, as the API words it.
#[derive(Debug)]
pub struct Refused {
    /// HTTP's status.
    pub status: u16,
    /// `NotFound`, `Conflict`, …
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

/// A page of a list.
pub struct Page {
    /// Its objects, as JSON.
    pub items: Vec<Arc<str>>,
    /// The version of the list.
    pub version: u64,
    /// Where the next page begins; empty after the last.
    pub next: String,
}

/// All objects.
#[derive(Debug, Default)]
pub struct Store {
    version: u64,
    /// Streams cannot begin before this.
    oldest: u64,
    objects: BTreeMap<(String, String), (Arc<Value>, Arc<str>)>,
    history: VecDeque<Arc<Change>>,
    lists: BTreeMap<u64, (u64, Vec<Arc<str>>)>,
    next_list: u64,
    next_uid: u64,
}

/// The objects that a field selector chooses.
#[derive(Debug, Clone, Default)]
pub struct Selector(Vec<(String, String)>);

impl Selector {
    /// Reads one such as `spec.nodeName=n1`.
    ///
    /// # Errors
    /// It has a field that the API does not select by.
    pub fn read(text: &str) -> Result<Selector, Refused> {
        let mut fields = Vec::new();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            match part.split_once('=') {
                Some((field @ ("metadata.name" | "metadata.namespace" | "spec.nodeName"), value)) => {
                    fields.push((field.replace('.', "/"), value.trim_start_matches('=').to_owned()));
                }
                _ => {
                    let message = format!("field label not supported: {part}");
                    return Err(Refused { status: 400, reason: "BadRequest", message });
                }
            }
        }
        Ok(Selector(fields))
    }

    /// Whether it chooses this object.
    pub fn fits(&self, object: &Value) -> bool {
        self.0.iter().all(|(field, value)| object.pointer(&format!("/{field}")).and_then(Value::as_str) == Some(value))
    }
}

fn key(resource: &str, object: &Value) -> (String, String) {
    let part = |name: &str| object["metadata"][name].as_str().unwrap_or_default();
    let name = match part("namespace") {
        "" => part("name").to_owned(),
        namespace => format!("{namespace}/{}", part("name")),
    };
    (resource.to_owned(), name)
}

impl Store {
    /// The newest version.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// An object by name, or namespace and name.
    pub fn get(&self, resource: &str, name: &str) -> Option<&Value> {
        self.objects.get(&(resource.to_owned(), name.to_owned())).map(|(object, _)| &**object)
    }

    /// Makes or replaces an object. A new one gets a UID and the time of its making, unless it has them.
    pub fn put(&mut self, resource: &str, mut object: Value) -> Value {
        let key = key(resource, &object);
        let before = self.objects.get(&key);
        let kind = if before.is_some() { "MODIFIED" } else { "ADDED" };
        if before.is_none() && object["metadata"]["uid"].as_str().is_none_or(str::is_empty) {
            self.next_uid += 1;
            object["metadata"]["uid"] = json!(format!("00000000-0000-4000-8000-{:012}", self.next_uid));
        }
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let shared = Arc::new(object.clone());
        let text: Arc<str> = object.to_string().into();
        self.remember(resource, kind, Arc::clone(&shared), &text);
        self.objects.insert(key, (shared, text));
        object
    }

    /// Removes an object; whether it was there.
    pub fn delete(&mut self, resource: &str, name: &str) -> bool {
        let Some((object, _)) = self.objects.remove(&(resource.to_owned(), name.to_owned())) else { return false };
        let mut object = Arc::unwrap_or_clone(object);
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let text = object.to_string();
        self.remember(resource, "DELETED", Arc::new(object), &text);
        true
    }

    fn remember(&mut self, resource: &str, kind: &'static str, object: Arc<Value>, text: &str) {
        let line = format!("{{\"type\":\"{kind}\",\"object\":{text}}}\n").into();
        self.history.push_back(Arc::new(Change { version: self.version, resource: resource.to_owned(), object, line }));
        if self.history.len() > HISTORY {
            self.oldest = self.history.pop_front().map_or(self.version, |change| change.version);
        }
    }

    /// Changes an object as a patch says. A patch that changes nothing makes no version, as behind a real server.
    ///
    /// # Errors
    /// As the API's.
    pub fn patch(
        &mut self,
        resource: &str,
        name: &str,
        sub: &str,
        media: &str,
        body: &Value,
    ) -> Result<Value, Refused> {
        let found = self.get(resource, name);
        let before = found.cloned().ok_or_else(|| not_found(resource, name))?;
        let wanted = &body["metadata"]["uid"];
        if !wanted.is_null() && *wanted != before["metadata"]["uid"] {
            let message = format!(
                "Operation cannot be fulfilled on {resource} \"{name}\": the UID in the precondition ({wanted}) does not match"
            );
            return Err(Refused { status: 409, reason: "Conflict", message });
        }
        let mut after = before.clone();
        match media {
            "application/merge-patch+json" => patch::merge(&mut after, body),
            "application/strategic-merge-patch+json" => patch::strategic(&mut after, body),
            _ => {
                let message = format!(
                    "the body of the request was in an unknown format - accepted media types do not include {media}"
                );
                return Err(Refused { status: 415, reason: "UnsupportedMediaType", message });
            }
        }
        // A subresource changes its own part, and the object all but that.
        if sub == "status" {
            let status = after["status"].take();
            after = before.clone();
            after["status"] = status;
        } else {
            after["status"] = before["status"].clone();
        }
        if after == before {
            return Ok(before);
        }
        Ok(self.put(resource, after))
    }

    /// A page of a list.
    ///
    /// # Errors
    /// The token is not known any more.
    pub fn list(&mut self, resource: &str, selector: &Selector, limit: usize, token: &str) -> Result<Page, Refused> {
        let (version, mut rest) = if token.is_empty() {
            let all = self.objects.iter().filter(|((of, _), (object, _))| of == resource && selector.fits(object));
            (self.version, all.map(|(_, (_, text))| Arc::clone(text)).collect::<Vec<_>>())
        } else {
            let kept = token.parse().ok().and_then(|number: u64| self.lists.remove(&number));
            kept.ok_or_else(|| gone("The provided continue parameter is too old to display a consistent list result."))?
        };
        let mut next = String::new();
        if limit > 0 && rest.len() > limit {
            let later = rest.split_off(limit);
            self.next_list += 1;
            self.lists.insert(self.next_list, (version, later));
            next = self.next_list.to_string();
            while self.lists.len() > MAX_LISTS {
                self.lists.pop_first();
            }
        }
        Ok(Page { items: rest, version, next })
    }

    /// What changed after `version`.
    ///
    /// # Errors
    /// That is not known any more.
    pub fn changes(&self, resource: &str, selector: &Selector, version: u64) -> Result<Vec<Arc<Change>>, Refused> {
        if version > self.version {
            let message = format!("Too large resource version: {version}, current: {}", self.version);
            return Err(Refused { status: 504, reason: "Timeout", message });
        }
        if version < self.oldest {
            return Err(gone(&format!("too old resource version: {version} ({})", self.oldest)));
        }
        let newer = self.history.partition_point(|change| change.version <= version);
        let newer =
            self.history.range(newer..).filter(|change| change.resource == resource && selector.fits(&change.object));
        Ok(newer.cloned().collect())
    }

    /// Sets everything back to how it was so many versions ago, as when etcd is restored.
    pub fn set_back(&mut self, versions: u64) {
        let target = self.version.saturating_sub(versions);
        let mut objects = BTreeMap::new();
        for change in self.history.iter().take_while(|change| change.version <= target) {
            let key = key(&change.resource, &change.object);
            let line = std::str::from_utf8(&change.line).expect("it was made of text");
            if line.starts_with("{\"type\":\"DELETED\"") {
                objects.remove(&key);
            } else {
                objects.insert(key, (Arc::clone(&change.object), change.object.to_string().into()));
            }
        }
        self.history.retain(|change| change.version <= target);
        (self.version, self.objects) = (target, objects);
        self.lists.clear();
    }

    /// Forgets the history: streams that begin in the past get 410 from then on.
    pub fn forget(&mut self) {
        self.version += 1;
        self.oldest = self.version;
        self.history.clear();
        self.lists.clear();
    }
}

/// There is no such object.
pub fn not_found(resource: &str, name: &str) -> Refused {
    Refused { status: 404, reason: "NotFound", message: format!("{resource} \"{name}\" not found") }
}

fn gone(message: &str) -> Refused {
    Refused { status: 410, reason: "Expired", message: message.to_owned() }
}
