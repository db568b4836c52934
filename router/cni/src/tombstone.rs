//! Tombstones: a DEL or a GC that weftd will do when it is back.
//!
//! A runtime repeats a failed DEL for ever, and the pod stays Terminating as long: so a DEL succeeds without the
//! daemon. It leaves a file `<stateDir>/tombstones/<32 hex digits>.json` that holds the attachment as the protocol
//! writes it ([`AttachmentKey`]), for example
//!
//! ```json
//! {"network":"pods","container":"4f1c…","ifname":"eth0"}
//! ```
//!
//! That of a GC is `gc-<32 hex digits>.json` and holds `{"gc":{"network":"pods","valid":[["4f1c…","eth0"]]}}`; a later one of the
//! same network takes its place.
//!
//! What the daemon must do: bind its socket first, then read every `*.json` here, do what it says as if it were
//! asked, make that durable, remove the file, and only then accept. In that order no tombstone is overlooked: one
//! that is written after the daemon has read the folder is followed by a second try to reach the daemon, which
//! succeeds then, and the file is removed here. A name that begins with a dot is a file that is still being
//! written. What cannot be read is to be logged and left. What was attached later than a
//! tombstone was written is not its business.
//!
//! The file's name is a hash of the attachment, so that a repeated DEL leaves one file, and so that nothing the
//! runtime says becomes part of a path. Writing is: new file, fsync, rename, fsync of the folder.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde_json::json;
use weft_api::{AttachmentKey, Gc};

/// The folder below the state folder.
const FOLDER: &str = "tombstones";

/// Leaves a tombstone for the attachment; returns its path.
pub fn write(state_dir: &Path, key: &AttachmentKey) -> io::Result<PathBuf> {
    let name = format!("{:032x}", hash([&key.network, &key.container, &key.ifname]));
    leave(state_dir, &name, &serde_json::to_vec(key)?)
}

/// Leaves one for a GC.
pub fn write_gc(state_dir: &Path, gc: &Gc) -> io::Result<PathBuf> {
    let name = format!("gc-{:032x}", hash([&gc.network]));
    leave(state_dir, &name, &serde_json::to_vec(&json!({ "gc": gc }))?)
}

fn leave(state_dir: &Path, name: &str, content: &[u8]) -> io::Result<PathBuf> {
    let folder = state_dir.join(FOLDER);
    DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
    let path = folder.join(format!("{name}.json"));
    let unfinished = folder.join(format!(".{name}.{}", std::process::id()));
    // A file of an earlier process of that number, which died while it wrote.
    match fs::remove_file(&unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished)?;
    let written = file.write_all(content).and_then(|()| file.sync_all());
    if let Err(error) = written.and_then(|()| fs::rename(&unfinished, &path)) {
        let _ = fs::remove_file(&unfinished);
        return Err(error);
    }
    File::open(&folder)?.sync_all()?;
    Ok(path)
}

/// Removes a tombstone whose DEL was done after all. That it is gone already is as good.
pub fn remove(path: &Path) {
    let _ = fs::remove_file(path);
}

/// FNV-1a with 128 bits over some names, each with its end marked. Runtimes choose container ids at random, so
/// it need not withstand anyone.
fn hash<'n>(names: impl IntoIterator<Item = &'n String>) -> u128 {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let bytes = names.into_iter().flat_map(|name| name.bytes().chain([0]));
    bytes.fold(OFFSET, |hash, byte| (hash ^ u128::from(byte)).wrapping_mul(PRIME))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(network: &str, container: &str, ifname: &str) -> AttachmentKey {
        AttachmentKey { network: network.into(), container: container.into(), ifname: ifname.into() }
    }

    #[test]
    fn a_repeated_tombstone_is_one_file_that_reads_back_as_the_attachment() {
        let state = std::env::temp_dir().join(format!("weft-t{}-tombstone/state", std::process::id()));
        let key = key("pods", "c1", "eth0");
        let path = write(&state, &key).unwrap();
        assert_eq!(write(&state, &key).unwrap(), path);
        let files: Vec<_> =
            fs::read_dir(state.join("tombstones")).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(files, std::slice::from_ref(&path));
        let read: AttachmentKey = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(read, key);
        remove(&path);
        remove(&path);
        assert_eq!(fs::read_dir(state.join("tombstones")).unwrap().count(), 0);
        fs::remove_dir_all(state.parent().unwrap()).unwrap();
    }

    #[test]
    fn attachments_that_differ_only_in_where_a_name_ends_have_different_hashes() {
        let all = [key("ab", "c", "d"), key("a", "bc", "d"), key("a", "b", "cd"), key("abc", "d", "")];
        let hashes: std::collections::HashSet<u128> =
            all.iter().map(|key| hash([&key.network, &key.container, &key.ifname])).collect();
        assert_eq!(hashes.len(), all.len());
    }

    #[test]
    fn the_hash_is_fnv_1a() {
        // FNV-1a of the one byte 0 is its offset times its prime.
        let offset: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
        let prime: u128 = (1 << 88) + 0x13b;
        let three = (0..3).fold(offset, |hash: u128, _| hash.wrapping_mul(prime));
        assert_eq!(hash([&String::new(), &String::new(), &String::new()]), three);
    }
}
