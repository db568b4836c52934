//! `weft uninstall`: leaves a node as it was before Weft came.
//!
//! What a running weftd has in the kernel (devices, routes, programs) goes with its process, but for the routes that answer for pods meanwhile,
//! which `weftd --forget` takes away. What is left then are files: the network that the runtime was told of, the plugin, and weftd's own. The network goes first, so that the runtime asks nobody who is about to
//! go, and the state last, when nobody writes it any more. What Weft did not write stays. Repeating it is harmless.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use weft_api::folders::{CONTAINERD, Folders};
use weft_api::{Client, Request, Status};

use crate::output;

const PATIENCE: Duration = Duration::from_secs(5);
/// The network as the repository has it, for those who copied it by hand.
const NETWORK: &str = include_str!("../../../deploy/05-weft.conflist");
const NETWORK_FILE: &str = "05-weft.conflist";
/// What weftd writes into its own.
const MARK: &str = "writtenBy";
const CONFIG: &str = "etc/weft/weftd.toml";
const STATE_DIR: &str = "/var/lib/weft";
const UNIT: &str = "etc/systemd/system/weftd.service";

/// What `weft uninstall` takes.
#[derive(Debug, Default, Args)]
pub struct Uninstall {
    /// Go on although pods are attached, which lose their network.
    #[arg(long)]
    force: bool,
    /// Keep the configuration and the leases, for another installation.
    #[arg(long)]
    keep: bool,
    /// Wait for a signal afterwards, for what a DaemonSet runs shall not end.
    #[arg(long)]
    wait: bool,
    /// The root folder of the node, when it is not `/`: in a container.
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    /// With another root folder: the network is the node's own all the same, and weftd's routes there are to go.
    #[arg(long)]
    routes: bool,
    /// The runtime's folder of networks; without it, what containerd's configuration says, or else /etc/cni/net.d.
    #[arg(long, value_name = "FOLDER")]
    conf_dir: Option<PathBuf>,
    /// The runtime's folder of plugins; without it, what containerd's configuration says, or else /opt/cni/bin.
    #[arg(long, value_name = "FOLDER")]
    bin_dir: Option<PathBuf>,
    /// weftd's folder of leases; without it, what its configuration says, or else /var/lib/weft.
    #[arg(long, value_name = "FOLDER")]
    state_dir: Option<PathBuf>,
}

/// Takes Weft off the node whose weftd has that socket.
pub fn uninstall(args: &Uninstall, socket: &Path) -> Result<()> {
    let root = Root(&args.root);
    let config = fs::read_to_string(root.join(CONFIG)).unwrap_or_default();
    let config = config.parse::<toml::Table>().unwrap_or_default();
    let configured = |key: &str| config.get(key).and_then(toml::Value::as_str).map(PathBuf::from);
    let state_dir = args.state_dir.clone().or_else(|| configured("state_dir")).unwrap_or(STATE_DIR.into());
    let usual = configured("socket").filter(|_| socket == Path::new(weft_api::SOCKET));
    let socket = usual.as_deref().unwrap_or(socket);
    let attached = status(&root.of(socket)).map_or(0, |status| status.pods);
    if attached > 0 && !args.force {
        bail!("{attached} pods are attached and would lose their network: drain the node first, or use --force");
    }
    let found = Folders::of(&root.of(Path::new(CONTAINERD)));
    let networks = root.of(args.conf_dir.as_deref().unwrap_or(&found.networks));
    let plugins = root.of(args.bin_dir.as_deref().unwrap_or(&found.plugins));
    leave_network(&networks)?;
    stop_service(root)?;
    if let Ok(status) = status(&root.of(socket)) {
        bail!(
            "the runtime was told, but weftd still runs (process {}): stop it (in Kubernetes by `kubectl -n weft delete daemonset weft`), and run this again",
            status.pid
        );
    }
    if args.routes || args.root == Path::new("/") {
        forget_routes()?;
    }
    leave_plugin(&plugins)?;
    for file in ["usr/local/bin/weftd", "usr/local/bin/weft"] {
        remove(&root.join(file))?;
    }
    if !args.keep {
        remove(&root.join(CONFIG))?;
        remove_folder(&root.of(&state_dir))?;
    }
    remove(&root.of(socket))?;
    // Those that are not empty are not Weft's alone; of /run/weft/lab `weft lab down` sees to the rest.
    for folder in ["run/weft/lab", "run/weft", "etc/weft"] {
        remove_if_empty(&root.join(folder));
    }
    // The runtime watches its folder of networks, and may not notice that another one takes its place.
    remove_if_empty(&plugins);
    plugins.parent().into_iter().for_each(remove_if_empty);
    output::progress("Weft is gone from this node");
    if args.wait {
        loop {
            std::thread::park();
        }
    }
    Ok(())
}

/// Where the node's files are.
#[derive(Clone, Copy)]
struct Root<'a>(&'a Path);

impl Root<'_> {
    fn join(self, path: &str) -> PathBuf {
        self.0.join(path)
    }

    /// An absolute path of the node.
    fn of(self, path: &Path) -> PathBuf {
        self.0.join(path.strip_prefix("/").unwrap_or(path))
    }
}

fn status(socket: &Path) -> Result<Status> {
    Ok(Client::connect(socket, PATIENCE)?.call(&Request::Status)?)
}

/// Has the weftd beside this program take away what it left in the kernel.
fn forget_routes() -> Result<()> {
    let weftd = std::env::current_exe().context("cannot tell where this program is")?.with_file_name("weftd");
    match Command::new(&weftd).arg("--forget").stdin(Stdio::null()).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => bail!("`{} --forget` failed: {status}", weftd.display()),
        // Somebody has taken it away before, by hand or by the first half of this.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            output::progress(
                "there is no weftd to take its routes away: if there are any, ip route flush proto 87, and ip -6",
            );
            Ok(())
        }
        Err(error) => Err(error).with_context(|| format!("cannot execute {}", weftd.display())),
    }
}

fn leave_network(folder: &Path) -> Result<()> {
    let path = folder.join(NETWORK_FILE);
    let text = match fs::read_to_string(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        text => text.with_context(|| format!("cannot read {}", path.display()))?,
    };
    let is_marked = serde_json::from_str::<serde_json::Value>(&text).is_ok_and(|network| network.get(MARK).is_some());
    if is_marked || text == NETWORK {
        return remove(&path);
    }
    output::progress(&format!("left {}, which somebody else wrote or changed", path.display()));
    Ok(())
}

fn leave_plugin(folder: &Path) -> Result<()> {
    let (plugin, loopback) = (folder.join("weft-cni"), folder.join("loopback"));
    // It may have been installed under loopback's name, too, where that was missing.
    if let (Ok(ours), Ok(other)) = (fs::read(&plugin), fs::read(&loopback))
        && ours == other
    {
        remove(&loopback)?;
    }
    remove(&plugin)
}

/// Stops weftd where systemd runs it, and takes the unit away.
fn stop_service(root: Root<'_>) -> Result<()> {
    let unit = root.join(UNIT);
    if !unit.exists() {
        return Ok(());
    }
    let is_here = root.0 == Path::new("/") && Path::new("/run/systemd/system").is_dir();
    let systemctl = |args: &[&str]| {
        let done = Command::new("systemctl").args(args).stdin(Stdio::null()).status();
        match done {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => bail!("`systemctl {}` failed: {status}", args.join(" ")),
            Err(error) => bail!("cannot execute systemctl: {error}"),
        }
    };
    if is_here {
        systemctl(&["disable", "--quiet", "--now", "weftd.service"])?;
    }
    remove(&unit)?;
    if is_here { systemctl(&["daemon-reload"]) } else { Ok(()) }
}

/// Removes a file, if it is there.
fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => output::progress(&format!("removed {}", path.display())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("cannot remove {}", path.display())),
    }
    Ok(())
}

/// Removes a folder of Weft's with what is in it.
fn remove_folder(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Ok(()) => output::progress(&format!("removed {}", path.display())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("cannot remove {}", path.display())),
    }
    Ok(())
}

fn remove_if_empty(path: &Path) {
    // That it holds something is the usual case, and no error.
    let _ = fs::remove_dir(path);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(root: &Path) -> Uninstall {
        Uninstall { root: root.to_owned(), ..Uninstall::default() }
    }

    fn write(root: &Path, path: &str, content: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn files(root: &Path) -> Vec<String> {
        let mut found = Vec::new();
        let mut folders = vec![root.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() { folders.push(path) } else { found.push(path) }
            }
        }
        found.sort();
        found.iter().map(|path| path.strip_prefix(root).unwrap().display().to_string()).collect()
    }

    #[test]
    fn a_node_is_left_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let of_others =
            ["etc/containerd/config.toml", "etc/cni/net.d/10-other.conf", "usr/lib/cni/bridge", "usr/lib/cni/loopback"];
        write(
            root,
            of_others[0],
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"/usr/lib/cni\"",
        );
        of_others[1..].iter().for_each(|path| write(root, path, "theirs"));
        let before = files(root);
        write(root, "etc/cni/net.d/05-weft.conflist", r#"{"name":"weft","writtenBy":"weftd"}"#);
        write(root, "usr/lib/cni/weft-cni", "ours");
        for path in ["usr/local/bin/weftd", "usr/local/bin/weft", UNIT, "etc/weft/weftd.toml", "var/lib/weft/leases"] {
            write(root, path, "ours");
        }
        let socket = Path::new(weft_api::SOCKET);
        uninstall(&Uninstall { keep: true, ..args(root) }, socket).unwrap();
        let kept = files(root).into_iter().filter(|file| !before.contains(file)).collect::<Vec<_>>();
        assert_eq!(kept, ["etc/weft/weftd.toml", "var/lib/weft/leases"]);
        uninstall(&args(root), socket).unwrap();
        assert_eq!(files(root), before);
        uninstall(&args(root), socket).unwrap();
        assert!(!root.join("etc/weft").exists() && !root.join("var/lib/weft").exists());
    }

    #[test]
    fn a_network_that_somebody_changed_stays_and_our_own_loopback_goes() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        write(root, "etc/cni/net.d/05-weft.conflist", r#"{"name":"mine"}"#);
        write(root, "opt/cni/bin/weft-cni", "ours");
        write(root, "opt/cni/bin/loopback", "ours");
        uninstall(&args(root), Path::new(weft_api::SOCKET)).unwrap();
        assert_eq!(files(root), ["etc/cni/net.d/05-weft.conflist"]);
        write(root, "etc/cni/net.d/05-weft.conflist", NETWORK);
        uninstall(&args(root), Path::new(weft_api::SOCKET)).unwrap();
        assert!(files(root).is_empty() && !root.join("opt/cni").exists());
        assert!(root.join("etc/cni/net.d").exists(), "the runtime goes on looking there");
    }
}
