//! Tombstones: what weft-cni leaves when a DEL or a GC finds no daemon.
//!
//! Each is a file `<state_dir>/tombstones/*.json` that holds an [`AttachmentKey`], or `{"gc":…}` with a [`Gc`]. After the socket is
//! bound and before the first request is accepted, [`honour_all`] does what they say. So do housekeeping and, before it
//! begins, each ADD: a shim may have given up on a daemon that was merely slow or stopped. A file goes only when
//! its releases are durable. Names that begin with a dot are still being written; what cannot be read is logged and left for people.
//!
//! A tombstone must not touch what is younger than itself. None does: whatever is attached after it was written was begun
//! after it was honoured, since only one thread at a time reads and honours them, and an ADD waits for that.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::Deserialize;
use weft_api::{AttachmentKey, Gc};

use crate::node::Node;

/// The folder below the state folder.
pub const FOLDER: &str = "tombstones";
/// That of a DEL is three short names, that of a GC lists what one node runs; what is larger is something else.
const MAX_BYTES: u64 = 8 << 20;

/// Held from reading tombstones until they are gone.
static HONOURING: Mutex<()> = Mutex::new(());

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
enum Tombstone {
    Gc { gc: Valid },
    Del(AttachmentKey),
}

/// What stays of a network. Tells it as [`Gc`] does.
#[derive(Debug, PartialEq, Eq, Deserialize)]
struct Valid {
    network: String,
    valid: Vec<(String, String)>,
}

/// Frees everything that has a tombstone. Not to be called in an attachment's turn.
pub fn honour_all(node: &Node) {
    let folder = node.state().desired.config.state_dir.join(FOLDER);
    let _honouring = HONOURING.lock().unwrap_or_else(PoisonError::into_inner);
    for (path, tombstone) in all(&folder) {
        match tombstone {
            Tombstone::Del(key) => super::del(node, &key),
            Tombstone::Gc { gc: Valid { network, valid } } => {
                super::collect(node, &Gc { network, valid });
            }
        }
        remove(node, &path);
    }
}

fn remove(node: &Node, path: &Path) {
    if node.store.pending() > 0 {
        tracing::warn!(path = %path.display(), "the tombstone stays: its release could not be written to the lease store");
        return;
    }
    match fs::remove_file(path) {
        Ok(()) => tracing::info!(path = %path.display(), "done as its tombstone said"),
        // The shim takes its own back when weftd answered after all.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => tracing::warn!(path = %path.display(), %error, "cannot remove a tombstone; remove it by hand"),
    }
}

fn all(folder: &Path) -> Vec<(PathBuf, Tombstone)> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.filter_map(Result::ok).map(|entry| entry.path());
    let finished = paths.filter(|path| {
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        name.ends_with(b".json") && !name.starts_with(b".")
    });
    finished.filter_map(|path| read(&path).map(|tombstone| (path, tombstone))).collect()
}

fn read(path: &Path) -> Option<Tombstone> {
    let read = || -> std::io::Result<Tombstone> {
        // A FIFO would hold us up for ever.
        if !fs::symlink_metadata(path)?.is_file() {
            return Err(std::io::Error::other("it is not a regular file"));
        }
        let mut bytes = Vec::new();
        File::open(path)?.take(MAX_BYTES).read_to_end(&mut bytes)?;
        Ok(serde_json::from_slice(&bytes)?)
    };
    match read() {
        Ok(tombstone) => Some(tombstone),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "cannot read a tombstone; remove it by hand");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_finished_readable_tombstones_count() {
        let folder = tempfile::tempdir().unwrap();
        let key = AttachmentKey { network: "pods".into(), container: "c1".into(), ifname: "eth0".into() };
        let text = serde_json::to_string(&key).unwrap();
        for (name, text) in [("a.json", text.as_str()), (".b.json", &text), ("c.tmp", &text), ("d.json", "{")] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        fs::create_dir(folder.path().join("e.json")).unwrap();
        assert_eq!(all(folder.path()), [(folder.path().join("a.json"), Tombstone::Del(key))]);
        assert_eq!(all(Path::new("/nowhere")), []);
    }

    #[test]
    fn a_gcs_tombstone_says_what_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gc.json");
        let gc = Gc { network: "pods".into(), valid: vec![("c1".into(), "eth0".into())] };
        fs::write(&path, serde_json::json!({ "gc": gc }).to_string()).unwrap();
        let valid = Valid { network: gc.network, valid: gc.valid };
        assert_eq!(read(&path), Some(Tombstone::Gc { gc: valid }));
        fs::write(&path, "{\"gc\":{\"network\":\"pods\"}}").unwrap();
        assert_eq!(read(&path), None, "a list that is missing is not an empty one");
    }
}
