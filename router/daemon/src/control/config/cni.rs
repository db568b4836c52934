//! `[cni]`: what the container runtime of this node is told of its network.

use std::path::PathBuf;

use super::TEXT;
use super::reader::{At, Reader, Section};

/// The network's name unless the configuration says another.
const NETWORK: &str = "weft";

/// How the runtime hears of the network: by a file that weftd writes once it is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cni {
    /// Whether the file is written. Without a word: if weftd runs in the network namespace of process 1, or in a given folder.
    pub write: Option<bool>,
    /// The network's name.
    pub network: String,
    /// The folder of networks; the runtime's, if absent.
    pub conf_dir: Option<PathBuf>,
    /// The folder of plugins; the runtime's, if absent.
    pub bin_dir: Option<PathBuf>,
}

impl Default for Cni {
    fn default() -> Cni {
        Cni { write: None, network: NETWORK.to_owned(), conf_dir: None, bin_dir: None }
    }
}

impl Cni {
    pub(super) fn read<'t>(reader: &mut Reader<'t>, root: &mut Section<'t>) -> Cni {
        let mut cni = Cni::default();
        let Some(mut section) = reader.table(root, "cni") else { return cni };
        cni.write = reader.boolean(&mut section, "write").map(|write| write.value);
        if let Some(network) = reader.parsed::<String>(&mut section, "network", TEXT) {
            if !is_network(&network.value) {
                reader.problem(
                    &network.place,
                    "a network's name begins with a letter or digit and goes on with these, '_', '.' and '-'",
                );
            }
            cni.network = network.value;
        }
        let mut folder = |key: &'static str| {
            let path: At<PathBuf> = reader.parsed(&mut section, key, "a path")?;
            if !path.value.is_absolute() {
                reader.problem(&path.place, "must be an absolute path");
            }
            Some(path.value)
        };
        (cni.conf_dir, cni.bin_dir) = (folder("conf_dir"), folder("bin_dir"));
        reader.finish(section);
        cni
    }
}

/// As CNI has it.
fn is_network(name: &str) -> bool {
    let plain = |next: char| next.is_ascii_alphanumeric() || "_.-".contains(next);
    name.starts_with(|first: char| first.is_ascii_alphanumeric()) && name.chars().all(plain) && name.len() < 256
}
