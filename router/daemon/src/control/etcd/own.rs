//! What this node keeps on disk about itself in etcd: who it is, and what it holds there, so that a restart finds both again.
//!
//! `<state_dir>/identity` is a random number, made once: the node's name can be given to another machine, its address too.
//! `<state_dir>/etcd` are the leases and the slot. Losing the second costs nothing but new leases; losing the first makes this another
//! machine.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::control::saved::write_durably;

const IDENTITY: &str = "identity";
const HELD: &str = "etcd";

/// What this node holds in etcd.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The cluster in which it holds it.
    pub cluster_id: u64,
    /// Its short and its long lease; 0 if there is none.
    pub leases: [i64; 2],
    /// Its slot.
    pub slot: Option<u32>,
}

/// The node's identity, made if there is none.
pub fn identity(folder: &Path) -> Result<String> {
    let path = folder.join(IDENTITY);
    match fs::read_to_string(&path) {
        Ok(text) => {
            let text = text.trim();
            let good = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            ensure!(good, "{} holds no identity: remove it, and this node becomes another one", path.display());
            Ok(text.to_owned())
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let mut bytes = [0; 16];
            let filled = rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty());
            ensure!(filled.context("the kernel gives no random numbers")? == 16, "too few random numbers");
            let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            write_durably(folder, IDENTITY, text.as_bytes())
                .with_context(|| format!("cannot write {}", path.display()))?;
            Ok(text)
        }
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// What this node held when it wrote so last; nothing if that cannot be read, which costs new leases.
pub fn load(folder: &Path) -> Held {
    fs::read(folder.join(HELD)).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

/// Keeps what this node holds.
pub fn save(folder: &Path, held: &Held) -> Result<()> {
    let path = folder.join(HELD);
    write_durably(folder, HELD, &serde_json::to_vec(held)?).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_made_once() {
        let folder = tempfile::tempdir().unwrap();
        let first = identity(folder.path()).unwrap();
        assert_eq!(identity(folder.path()).unwrap(), first);
        assert_ne!(identity(tempfile::tempdir().unwrap().path()).unwrap(), first);
        fs::write(folder.path().join(IDENTITY), "mine").unwrap();
        identity(folder.path()).unwrap_err();
    }

    #[test]
    fn what_is_held_comes_back_and_damage_is_as_nothing() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(load(folder.path()), Held::default());
        let held = Held { cluster_id: 7, leases: [1, 2], slot: Some(3) };
        save(folder.path(), &held).unwrap();
        assert_eq!(load(folder.path()), held);
        fs::write(folder.path().join(HELD), "{").unwrap();
        assert_eq!(load(folder.path()), Held::default());
    }
}
