//! Tombstones: a DEL that weftd will do when it is back.
//!
//! A runtime repeats a failed DEL for ever, and the pod stays Terminating as long: so a DEL succeeds without the
//! daemon. It leaves a file `<stateDir>/tombstones/<32 hex digits>.json` that holds the attachment as the protocol
//! writes it ([`AttachmentKey`]), for example
//!
//! ```json
//! {"network":"pods","container":"4f1c…","ifname":"eth0"}
//! ```
//!
//! What the daemon must do: bind its socket first, then read every `*.json` here, free the attachment as a DEL
//! would, make that durable, remove the file, and only then accept. In that order no tombstone is overlooked: one
//! that is written after the daemon has read the folder is followed by a second try to reach the daemon, which
//! succeeds then, and the file is removed here. A name that begins with a dot is a file that is still being
//! written. What cannot be read as an attachment is to be logged and left.
//!
//! The file's name is a hash of the attachment, so that a repeated DEL leaves one file, and so that nothing the
//! runtime says becomes part of a path. Writing is: new file, fsync, rename, fsync of the folder.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use weft_api::AttachmentKey;

/// The folder below the state folder.
const FOLDER: &str = "tombstones";

/// Leaves a tombstone for the attachment; returns its path.
pub fn write(state_dir: &Path, key: &AttachmentKey) -> io::Result<PathBuf> {
    let folder = state_dir.join(FOLDER);
    DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
    let path = folder.join(format!("{:032x}.json", hash(key)));
    let unfinished = folder.join(format!(".{:032x}.{}", hash(key), std::process::id()));
    // A file of an earlier process of that number, which died while it wrote.
    match fs::remove_file(&unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished)?;
    let written = file.write_all(&serde_json::to_vec(key)?).and_then(|()| file.sync_all());
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

/// FNV-1a with 128 bits over the three names, each with its end marked. Runtimes choose container ids at random, so
/// it need not withstand anyone.
fn hash(key: &AttachmentKey) -> u128 {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let parts = [&key.network, &key.container, &key.ifname];
    let bytes = parts.into_iter().flat_map(|part| part.bytes().chain([0]));
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
        let hashes: std::collections::HashSet<u128> = all.iter().map(hash).collect();
        assert_eq!(hashes.len(), all.len());
    }

    #[test]
    fn the_hash_is_fnv_1a() {
        // FNV-1a of the one byte 0 is its offset times its prime.
        let offset: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
        let prime: u128 = (1 << 88) + 0x13b;
        let three = (0..3).fold(offset, |hash: u128, _| hash.wrapping_mul(prime));
        assert_eq!(hash(&key("", "", "")), three);
    }
}
