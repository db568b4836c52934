//! Telling the container runtime of the network: one file, written once weftd is ready.
//!
//! A runtime takes the first network in its folder, and none means that the node is not ready for pods. So the file comes when an ADD
//! would be served, and then it stays, over restarts and upgrades, for its absence would make the node NotReady; only
//! uninstalling removes it. It is written as a whole or not at all, and only if it is not there or differs.
//!
//! A file of that name that weftd did not write is somebody's own, and left as it is. A weftd in a network namespace of its own, as
//! a laboratory's, tells nobody, unless it is told to or where to.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use weft_api::folders::{CONTAINERD, Folders};

use crate::control::config::Config;

/// Comes before the files of others, which have larger numbers.
const FILE: &str = "05-weft.conflist";

/// By this key weftd knows what it wrote itself.
const MARK: &str = "writtenBy";

/// What the shim assumes, so that it need not be said.
const STATE_DIR: &str = "/var/lib/weft";

/// Writes the file if it is due, and logs what came of it.
pub fn tell_runtime(config: &Config) {
    let folders = Folders::of(Path::new(CONTAINERD));
    let folder = config.cni.conf_dir.clone().unwrap_or(folders.networks);
    let plugins = config.cni.bin_dir.clone().unwrap_or(folders.plugins);
    if !config.cni.write.unwrap_or_else(|| config.cni.conf_dir.is_some() || is_on_the_node()) {
        return;
    }
    if !plugins.join("weft-cni").is_file() {
        tracing::warn!(folder = %plugins.display(), "weft-cni is not among the runtime's plugins: `weft install-cni` puts it there");
    }
    let content = content(config, &plugins);
    match place(&folder.join(FILE), &content) {
        Ok(Placed::New) => tracing::info!(file = %folder.join(FILE).display(), "told the runtime of the network"),
        Ok(Placed::Same) => {}
        Ok(Placed::Foreign) => tracing::warn!(
            file = %folder.join(FILE).display(),
            "left as it is, for weftd did not write it; remove it, or set cni.write = false"
        ),
        Err(error) => tracing::error!(
            file = %folder.join(FILE).display(), %error,
            "cannot tell the runtime of the network; make the folder writable for weftd, or set cni.conf_dir or cni.write = false"
        ),
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Placed {
    New,
    Same,
    Foreign,
}

/// Whether weftd is in the node's own network namespace, which is that of process 1. Who may not look at that one sees at least whether
/// it is in one that was made by `ip netns`, as a laboratory's.
fn is_on_the_node() -> bool {
    let of = |path: &Path| fs::metadata(path).map(|found| (found.dev(), found.ino()));
    let Ok(own) = of(Path::new("/proc/self/ns/net")) else { return false };
    of(Path::new("/proc/1/ns/net")).map_or_else(
        |_| {
            let named = fs::read_dir("/run/netns").into_iter().flatten().filter_map(Result::ok);
            !named.map(|entry| entry.path()).any(|path| of(&path).is_ok_and(|named| named == own))
        },
        |first| first == own,
    )
}

fn content(config: &Config, plugins: &Path) -> Value {
    let capabilities = json!({ "ips": true, "ipRanges": true, "mac": true });
    let mut ours = json!({ "type": "weft-cni", "capabilities": capabilities });
    if config.socket != Path::new(weft_api::SOCKET) {
        ours["socket"] = config.socket.display().to_string().into();
    }
    if config.state_dir != Path::new(STATE_DIR) {
        ours["stateDir"] = config.state_dir.display().to_string().into();
    }
    let mut all = vec![ours];
    if plugins.join("portmap").is_file() {
        all.push(json!({ "type": "portmap", "capabilities": { "portMappings": true } }));
    }
    // Runtimes of some years reject results of 1.1.0; newer ones choose it among cniVersions.
    json!({
        "cniVersion": "1.0.0", "cniVersions": ["0.4.0", "1.0.0", "1.1.0"],
        "name": config.cni.network, MARK: "weftd", "plugins": all
    })
}

fn place(path: &Path, content: &Value) -> io::Result<Placed> {
    match fs::read(path) {
        Ok(there) => match serde_json::from_slice::<Value>(&there) {
            Ok(there) if there == *content => return Ok(Placed::Same),
            Ok(there) if there[MARK] == "weftd" => {}
            // A file that a crash left empty is nobody's.
            _ if there.is_empty() => {}
            _ => return Ok(Placed::Foreign),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder)?;
    // Runtimes read what ends in .conf, .conflist and .json.
    let unfinished: PathBuf = folder.join(format!(".{FILE}.{}.new", std::process::id()));
    let written = write(&unfinished, content).and_then(|()| fs::rename(&unfinished, path));
    if written.is_err() {
        let _ = fs::remove_file(&unfinished);
    }
    written?;
    File::open(folder)?.sync_all()?;
    Ok(Placed::New)
}

fn write(path: &Path, content: &Value) -> io::Result<()> {
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o644).open(path)?;
    let mut text = serde_json::to_string_pretty(content)?;
    text.push('\n');
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::host::Host;

    fn config(more: &str) -> Config {
        let text = format!(
            "node = \"n1\"\nmode = \"routed\"\nmtu = 1450\nranges = [\"10.244.1.0/24\"]\n{more}\n[underlay]\naddress = \"10.200.0.1\""
        );
        Config::read(&text, &Host::default()).unwrap().config
    }

    #[test]
    fn the_file_says_what_the_runtime_and_the_shim_need() {
        let folder = tempfile::tempdir().unwrap();
        let plain = content(&config(""), folder.path());
        assert_eq!((&plain["name"], plain["plugins"].as_array().unwrap().len()), (&json!("weft"), 1));
        assert_eq!(plain["plugins"][0].get("socket"), None);
        fs::write(folder.path().join("portmap"), "").unwrap();
        let other = content(&config("socket = \"/s\"\nstate_dir = \"/d\"\n[cni]\nnetwork = \"pods\""), folder.path());
        assert_eq!((&other["name"], &other["plugins"][1]["type"]), (&json!("pods"), &json!("portmap")));
        assert_eq!((&other["plugins"][0]["socket"], &other["plugins"][0]["stateDir"]), (&json!("/s"), &json!("/d")));
    }

    #[test]
    fn only_a_file_of_its_own_is_changed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("net.d").join(FILE);
        let content = content(&config(""), folder.path());
        assert_eq!(place(&path, &content).unwrap(), Placed::New);
        assert_eq!(place(&path, &content).unwrap(), Placed::Same);
        assert_eq!(serde_json::from_slice::<Value>(&fs::read(&path).unwrap()).unwrap(), content);
        fs::write(&path, json!({ MARK: "weftd", "name": "old" }).to_string()).unwrap();
        assert_eq!(place(&path, &content).unwrap(), Placed::New);
        for foreign in ["{\"name\":\"mine\"}", "not json"] {
            fs::write(&path, foreign).unwrap();
            assert_eq!(place(&path, &content).unwrap(), Placed::Foreign);
            assert_eq!(fs::read_to_string(&path).unwrap(), foreign);
        }
        fs::write(&path, "").unwrap();
        assert_eq!(place(&path, &content).unwrap(), Placed::New);
        let left: Vec<_> =
            fs::read_dir(path.parent().unwrap()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, [FILE]);
    }

    #[test]
    fn folders_and_names_are_checked() {
        for bad in ["network = \"a/b\"", "conf_dir = \"x\"", "write = \"yes\"", "other = 1"] {
            let text = format!(
                "node = \"n1\"\nmode = \"routed\"\nmtu = 1450\nranges = [\"10.244.1.0/24\"]\n[cni]\n{bad}\n[underlay]\naddress = \"10.200.0.1\""
            );
            let invalid = Config::read(&text, &Host::default()).unwrap_err();
            assert!(invalid.to_string().contains("line 6: cni."), "{bad}: {invalid}");
        }
    }
}
