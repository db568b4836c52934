//! How long a pod waits for its network: ADD and DEL, as a container runtime executes them.
//!
//! Beside `weft-cni` stands what most clusters have: the reference plugins `bridge` and `host-local`, with both address
//! families. Each pod is a new network namespace, mounted and its loopback up as runtimes make it; the plugin is
//! found, started and waited for, and that is what is measured.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Value, json};

use super::bed::Bed;
use super::contender::Kind;
use super::measure::Figures;
use super::outcome::Summary;
use crate::lab::command::{Run, quote};
use crate::lab::record::{self, Record, Stored};
use crate::lab::{net, plan};

/// Where distributions put the reference plugins.
const FOLDERS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];
/// The node whose pods they are.
const NODE: u8 = 1;

/// Where the reference plugins are.
pub fn reference() -> Option<&'static Path> {
    let has_all = |folder: &&Path| ["bridge", "host-local"].iter().all(|plugin| folder.join(plugin).is_file());
    FOLDERS.iter().map(Path::new).find(has_all)
}

/// A pod's namespace; it goes when this goes.
struct Pod(String);

impl Pod {
    fn new(name: String) -> Result<Pod> {
        Run::ip(&format!("netns add {name}")).succeed()?;
        let pod = Pod(name);
        Run::ip(&format!("-n {} link set lo up", pod.0)).succeed()?;
        Ok(pod)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if let Err(error) = net::remove_namespace(&self.0) {
            eprintln!("{error:#}");
        }
    }
}

/// A plugin, and what it is called with.
struct Plugin {
    program: PathBuf,
    config: Value,
    node: OwnedFd,
}

/// So many pods, one after the other: the medians of ADD and DEL in milliseconds.
pub fn attach(bed: &Bed, rounds: u32) -> Result<Figures> {
    let plugin = Plugin::of(bed)?;
    let (mut add, mut del) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let container = format!("bench-{}-{round}", std::process::id());
        let pod = Pod::new(format!("{}{container}", plan::prefix(&bed.plan().lab)))?;
        add.push(plugin.call("ADD", &container, &pod)?);
        del.push(plugin.call("DEL", &container, &pod)?);
    }
    Ok([add, del].map(|times| Summary::of(times).map(|summary| summary.median)).to_vec())
}

impl Plugin {
    fn of(bed: &Bed) -> Result<Plugin> {
        let node = net::path(&bed.plan().node_netns(NODE));
        let node = File::open(&node).with_context(|| format!("cannot open {}", node.display()))?.into();
        let (program, config) = match bed.contender.kind {
            Kind::Weft(_) => (bed.plugin().to_owned(), weft(&bed.plan().lab)?),
            _ => {
                let folder = reference().context("the reference plugins are missing")?;
                (folder.join("bridge"), reference_config(&record::folder(&bed.plan().lab)))
            }
        };
        Ok(Plugin { program, config, node })
    }

    /// Calls it, and returns the milliseconds that it took.
    fn call(&self, command: &str, container: &str, pod: &Pod) -> Result<f64> {
        let folder = self.program.parent().unwrap_or(Path::new("/"));
        let mut plugin = Command::new(&self.program);
        plugin.env_clear().env("CNI_COMMAND", command).env("CNI_CONTAINERID", container).env("CNI_IFNAME", "eth0");
        plugin.env("CNI_NETNS", net::path(&pod.0)).env("CNI_PATH", folder).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        plugin.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let input = self.config.to_string();
        let (took, ended) = inside(&self.node, || {
            let started = Instant::now();
            let mut child = plugin.spawn().with_context(|| format!("cannot start {}", self.program.display()))?;
            // A plugin that has ended before it was told anything says why by its exit code.
            let _ = child.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes()));
            let ended = child.wait_with_output()?;
            Ok((started.elapsed(), ended))
        })?;
        if !ended.status.success() {
            bail!("{command} by {} failed: {}", self.program.display(), quote(&[ended.stdout, ended.stderr].concat()));
        }
        Ok(took.as_secs_f64() * 1e3)
    }
}

fn weft(lab: &str) -> Result<Value> {
    let Stored::Present(record) = Record::load(lab)? else { bail!("the lab {lab} is gone") };
    let node = record.cluster.as_ref().and_then(|cluster| cluster.nodes.first());
    let socket = &node.context("the lab has no node")?.socket;
    Ok(json!({
        "cniVersion": "1.0.0", "name": "weft", "type": "weft-cni",
        "socket": socket, "stateDir": socket.with_extension("state"),
    }))
}

/// What it makes lies in the node's namespace, and in the lab's folder.
fn reference_config(folder: &Path) -> Value {
    let ranges = plan::ranges(NODE).map(|subnet| json!([{ "subnet": subnet }]));
    json!({
        "cniVersion": "1.0.0", "name": "bench", "type": "bridge", "bridge": "cni0", "isGateway": true,
        "ipam": {
            "type": "host-local", "dataDir": folder.join("host-local"), "ranges": ranges,
            "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
        },
    })
}

/// Does something in a network namespace; children belong to it as well.
fn inside<T: Send>(namespace: &OwnedFd, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                .context("cannot enter a network namespace")?;
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
