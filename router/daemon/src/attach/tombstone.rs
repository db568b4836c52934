//! Tombstones: what weft-cni leaves when a DEL finds no daemon.
//!
//! Each is a file `<state_dir>/tombstones/*.json` that holds an [`AttachmentKey`]. After the socket is bound and
//! before the first request is accepted, [`honour_all`] frees what they name, and housekeeping does so again; an ADD looks for its
//! own key: a shim may have given up on a daemon that was merely slow or stopped. A file goes only when its release is durable. Names that begin with
//! a dot are still being written; what cannot be read is logged and left for people.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use weft_api::AttachmentKey;

use crate::node::Node;

/// The folder below the state folder.
pub const FOLDER: &str = "tombstones";
/// A tombstone is three short names; what is larger is something else.
const MAX_BYTES: u64 = 64 * 1024;

/// Frees everything that has a tombstone.
pub fn honour_all(node: &Node) {
    for (path, key) in all(&folder(node)) {
        let _turn = node.turns.take(&key);
        // Until it was our turn an ADD may have honoured it and attached the pod anew.
        if read(&path).as_ref() == Some(&key) {
            honour_one(node, &path, &key);
        }
    }
}

/// Frees `key` if it has a tombstone. To be called in the attachment's turn.
pub fn honour(node: &Node, key: &AttachmentKey) {
    for (path, found) in all(&folder(node)) {
        if found == *key {
            honour_one(node, &path, key);
        }
    }
}

fn honour_one(node: &Node, path: &Path, key: &AttachmentKey) {
    super::free(node, key);
    if node.store.pending() > 0 {
        tracing::warn!(path = %path.display(), "the tombstone stays: its release could not be written to the lease store");
        return;
    }
    match fs::remove_file(path) {
        Ok(()) => tracing::info!(container = key.container, ifname = key.ifname, "freed by its tombstone"),
        Err(error) => tracing::warn!(path = %path.display(), %error, "cannot remove a tombstone; remove it by hand"),
    }
}

fn folder(node: &Node) -> PathBuf {
    node.state().desired.config.state_dir.join(FOLDER)
}

fn all(folder: &Path) -> Vec<(PathBuf, AttachmentKey)> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.filter_map(Result::ok).map(|entry| entry.path());
    let finished = paths.filter(|path| {
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        name.ends_with(b".json") && !name.starts_with(b".")
    });
    finished.filter_map(|path| read(&path).map(|key| (path, key))).collect()
}

fn read(path: &Path) -> Option<AttachmentKey> {
    let read = || -> std::io::Result<AttachmentKey> {
        // A FIFO would hold us up for ever.
        if !fs::symlink_metadata(path)?.is_file() {
            return Err(std::io::Error::other("it is not a regular file"));
        }
        let mut bytes = Vec::new();
        File::open(path)?.take(MAX_BYTES).read_to_end(&mut bytes)?;
        Ok(serde_json::from_slice(&bytes)?)
    };
    match read() {
        Ok(key) => Some(key),
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
        assert_eq!(all(folder.path()), [(folder.path().join("a.json"), key)]);
        assert_eq!(all(Path::new("/nowhere")), []);
    }
}
