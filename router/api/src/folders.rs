//! Where the container runtime of this machine looks for CNI's plugins and networks.
//!
//! That is its own choice: containerd's configuration says it, if there is one, and Debian's says something else than everybody else's.
//! Versions 1 to 3 of that file have the keys in different places.

use std::path::{Path, PathBuf};

use toml::Value;

/// Where containerd's configuration is.
pub const CONTAINERD: &str = "/etc/containerd/config.toml";

/// The folders that the specification's authors suggest.
const PLUGINS: &str = "/opt/cni/bin";
const NETWORKS: &str = "/etc/cni/net.d";

/// The two folders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folders {
    /// Plugins, by their names.
    pub plugins: PathBuf,
    /// Networks' configurations.
    pub networks: PathBuf,
}

impl Folders {
    /// As containerd's configuration at `path` has it. What it does not say, or cannot be read, is as usual.
    pub fn of(path: &Path) -> Folders {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        Folders::parse(&text)
    }

    fn parse(text: &str) -> Folders {
        let document: Value = text.parse::<toml::Table>().map_or(Value::Boolean(false), Value::Table);
        let tables = ["io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri", "cri"];
        let find = |key: &str| {
            let cni = |table: &&str| document.get("plugins")?.get(table)?.get("cni")?.get(key).cloned();
            tables.iter().find_map(cni)
        };
        let path = |value: Value| {
            let first = value.as_array().and_then(|list| list.first()).cloned().unwrap_or(value);
            first.as_str().filter(|path| path.starts_with('/')).map(PathBuf::from)
        };
        let found = |keys: &[&str]| keys.iter().find_map(|key| path(find(key)?));
        Folders {
            plugins: found(&["bin_dirs", "bin_dir"]).unwrap_or(PLUGINS.into()),
            networks: found(&["conf_dir"]).unwrap_or(NETWORKS.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> [String; 2] {
        let Folders { plugins, networks } = Folders::parse(text);
        [plugins.display().to_string(), networks.display().to_string()]
    }

    #[test]
    fn each_version_of_containerds_configuration_says_it_elsewhere() {
        let debian = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"/usr/lib/cni\"\nconf_dir = \"/etc/cni/net.d\"";
        assert_eq!(parsed(debian), ["/usr/lib/cni", "/etc/cni/net.d"]);
        let first = "[plugins.cri.cni]\nconf_dir = \"/n\"";
        assert_eq!(parsed(first), ["/opt/cni/bin", "/n"]);
        let third = "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.cni]\nbin_dirs = ['/a', '/b']\nbin_dir = ''";
        assert_eq!(parsed(third), ["/a", "/etc/cni/net.d"]);
    }

    #[test]
    fn what_says_nothing_leaves_the_usual_folders() {
        for text in ["", "not toml", "plugins = 7", "[plugins.cri.cni]\nbin_dir = 7\nconf_dir = \"relative\"\n"] {
            assert_eq!(parsed(text), ["/opt/cni/bin", "/etc/cni/net.d"], "{text}");
        }
        assert_eq!(Folders::of(Path::new("/nowhere")), Folders::parse(""));
    }
}
