//! One weftd for each node: its configuration, its start, and whether it is ready.
//!
//! The daemon runs inside the node's namespace, in a process group of its own, with its log in the lab's folder. Its
//! process id and start time are what `down` goes by.

use std::fs::{self, File};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use weft_api::{Client, ClientError, Empty, Request};

use super::command::Run;
use super::plan::{self, Mode, Plan, Source};
use super::process::Process;
use super::record;
use crate::interrupt;
use crate::output::plain;

/// How long a daemon may take until it answers.
const READY_WITHIN: Duration = Duration::from_secs(15);
/// How long one answer may take meanwhile.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// How many lines of a log an error shows.
const LOG_LINES: usize = 12;

/// The files of a node.
pub struct Files {
    /// Its configuration.
    pub config: PathBuf,
    /// The daemon's socket.
    pub socket: PathBuf,
    /// The daemon's state.
    pub state_dir: PathBuf,
    /// The daemon's log.
    pub log: PathBuf,
}

impl Files {
    /// Those of node `node` of a lab.
    pub fn of(lab: &str, node: u8) -> Files {
        let (folder, name) = (record::folder(lab), plan::node_name(node));
        Files {
            config: folder.join(format!("{name}.toml")),
            socket: folder.join(format!("{name}.sock")),
            state_dir: folder.join(format!("{name}.state")),
            log: folder.join(format!("{name}.log")),
        }
    }
}

#[derive(Serialize)]
struct Config {
    node: String,
    mode: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    workers: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<plan::Port>,
    vni: u32,
    mtu: u32,
    socket: PathBuf,
    state_dir: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    ranges: Option<[String; 2]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    segment: Option<[&'static str; 2]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gateway: Option<[&'static str; 2]>,
    underlay: Underlay,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    peers: Vec<Peer>,
    #[serde(skip_serializing_if = "Option::is_none")]
    etcd: Option<Etcd>,
    #[serde(skip_serializing_if = "Option::is_none")]
    masquerade: Option<Masquerade>,
}

/// The section is enough.
#[derive(Serialize)]
struct Masquerade {}

#[derive(Serialize)]
struct Etcd {
    endpoints: [String; 1],
    network: [&'static str; 2],
}

#[derive(Serialize)]
struct Underlay {
    address: IpAddr,
    port: u16,
    device: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<plan::Underlay>,
    #[serde(skip_serializing_if = "Option::is_none")]
    encapsulation: Option<plan::Encapsulation>,
}

#[derive(Serialize)]
struct Peer {
    name: String,
    underlay: IpAddr,
    ranges: [String; 2],
}

/// Writes the configuration of a node and starts its daemon. The daemon need not be ready yet.
pub fn start(plan: &Plan, node: u8, weftd: &Path) -> Result<Process> {
    let files = Files::of(&plan.lab, node);
    let name = plan::node_name(node);
    fs::create_dir_all(&files.state_dir).with_context(|| format!("cannot make {}", files.state_dir.display()))?;
    let text = config_text(plan, node, &files)?;
    fs::write(&files.config, text).with_context(|| format!("cannot write {}", files.config.display()))?;
    let log = File::create(&files.log).with_context(|| format!("cannot write {}", files.log.display()))?;
    let run = Run::inside(&plan.node_netns(node), weftd).building(&plan.lab).arg("--config").arg(&files.config);
    let child = run.spawn_detached(Stdio::from(log))?;
    Process::identify(child.id(), &format!("weftd of {name}"))
        .with_context(|| format!("weftd of {name} did not start{}", log_tail(&files.log)))
}

/// Waits until a daemon says that it can attach pods.
pub fn await_ready(plan: &Plan, node: u8, process: &Process) -> Result<()> {
    let files = Files::of(&plan.lab, node);
    let deadline = Instant::now() + READY_WITHIN;
    let mut last = None;
    while Instant::now() < deadline {
        interrupt::check()?;
        if !process.is_alive() {
            bail!("{} ended at once{}", process.what, log_tail(&files.log));
        }
        match ready(&files.socket) {
            Ok(()) => return Ok(()),
            Err(error) => last = Some(error),
        }
        thread::sleep(Duration::from_millis(10));
    }
    let reason = last.map_or("it was never asked".to_owned(), |error| error.to_string());
    bail!("{} is not ready after {READY_WITHIN:?}: {reason}{}", process.what, log_tail(&files.log))
}

/// The last lines of a log, for the end of an error; empty if there are none.
pub fn log_tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    if lines.is_empty() {
        return String::new();
    }
    let tail = &lines[lines.len().saturating_sub(LOG_LINES)..];
    let mut shown = format!("\nthe end of {}:", log.display());
    for line in tail {
        shown.push_str("\n  ");
        shown.push_str(&plain(line));
    }
    shown
}

fn ready(socket: &Path) -> Result<(), ClientError> {
    let Empty {} = Client::connect(socket, ANSWER_WITHIN)?.call(&Request::Ready)?;
    Ok(())
}

fn config_text(plan: &Plan, node: u8, files: &Files) -> Result<String> {
    let (bridged, is_file) = (plan.mode == Mode::Bridged, plan.source == Source::File);
    let peer =
        |node| Peer { name: plan::node_name(node), underlay: plan.underlay_address(node), ranges: plan::ranges(node) };
    let config = Config {
        node: plan::node_name(node),
        mode: plan.mode.name(),
        workers: plan.workers,
        port: plan.port,
        vni: plan::VNI,
        mtu: plan.pod_mtu(),
        socket: files.socket.clone(),
        state_dir: files.state_dir.clone(),
        ranges: is_file.then(|| plan::ranges(node)),
        segment: bridged.then_some(plan::SEGMENT),
        gateway: bridged.then_some(plan::SEGMENT_GATEWAY),
        underlay: Underlay {
            address: plan.underlay_address(node),
            port: plan::PORT,
            device: plan::UPLINK,
            kind: plan.underlay,
            encapsulation: Some(plan.encapsulation).filter(|kind| *kind != plan::Encapsulation::Vxlan),
        },
        peers: plan.node_numbers().filter(|other| is_file && *other != node).map(peer).collect(),
        etcd: (!is_file).then(|| Etcd { endpoints: [format!("http://{}", plan.etcd())], network: plan::SEGMENT }),
        masquerade: plan.masquerade.then_some(Masquerade {}),
    };
    toml::to_string(&config).context("cannot write the configuration as TOML")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(mode: Mode, nodes: u8) -> String {
        let plan = Plan::new("x", nodes, 1, mode, 1500).unwrap();
        config_text(&plan, 1, &Files::of("x", 1)).unwrap()
    }

    #[test]
    fn a_routed_node_gives_its_own_ranges_and_knows_its_peers() {
        let expected = r#"node = "n1"
mode = "routed"
vni = 1
mtu = 1450
socket = "/run/weft/lab/x/n1.sock"
state_dir = "/run/weft/lab/x/n1.state"
ranges = ["10.244.1.0/24", "fd00:10:244:1::/64"]

[underlay]
address = "10.200.0.1"
port = 8472
device = "uplink"

[[peers]]
name = "n2"
underlay = "10.200.0.2"
ranges = ["10.244.2.0/24", "fd00:10:244:2::/64"]
"#;
        assert_eq!(text(Mode::Routed, 2), expected);
    }

    #[test]
    fn a_bridged_node_has_the_segment_and_its_gateway() {
        let text = text(Mode::Bridged, 3);
        assert!(text.contains(r#"segment = ["10.244.0.0/16", "fd00:10:244::/48"]"#), "{text}");
        assert!(text.contains(r#"gateway = ["10.244.0.1", "fd00:10:244::1"]"#), "{text}");
        assert_eq!(text.matches("[[peers]]").count(), 2);
    }

    #[test]
    fn a_node_that_asks_etcd_is_told_neither_ranges_nor_peers() {
        let plan = Plan { source: Source::Etcd, ..Plan::new("x", 2, 1, Mode::Routed, 1500).unwrap() };
        let text = config_text(&plan, 1, &Files::of("x", 1)).unwrap();
        assert!(!text.contains("ranges") && !text.contains("[[peers]]"), "{text}");
        assert!(text.contains("endpoints = [\"http://10.200.0.250:2379\"]"), "{text}");
    }

    #[test]
    fn a_section_has_pods_leave_in_the_nodes_name() {
        let plan = Plan { masquerade: true, ..Plan::new("x", 2, 1, Mode::Routed, 1500).unwrap() };
        let with = config_text(&plan, 1, &Files::of("x", 1)).unwrap();
        assert!(with.contains("\n[masquerade]\n") && !text(Mode::Routed, 2).contains("masquerade"), "{with}");
    }

    #[test]
    fn a_node_alone_has_no_peers() {
        assert!(!text(Mode::Routed, 1).contains("peers"));
    }

    #[test]
    fn a_log_is_quoted_from_its_end_without_control_characters() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("n1.log");
        assert_eq!(log_tail(&log), "");
        let lines: String = (1..=20).map(|n| format!("line {n}\x1b\n")).collect();
        fs::write(&log, lines).unwrap();
        let tail = log_tail(&log);
        assert!(
            tail.contains("line 9\u{fffd}") && !tail.contains("line 8") && tail.ends_with("line 20\u{fffd}"),
            "{tail}"
        );
    }
}
