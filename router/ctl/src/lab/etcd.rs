//! The lab's own etcd: one server, in the namespace of the underlay, with an address on its bridge.

use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::command::Run;
use super::daemon::log_tail;
use super::plan::Plan;
use super::process::Process;
use super::{net, record};
use crate::interrupt;

/// How long it may take until it answers.
const READY_WITHIN: Duration = Duration::from_secs(15);

/// Starts it and waits until it answers.
pub fn start(plan: &Plan) -> Result<Process> {
    let folder = record::folder(&plan.lab);
    let (data, log) = (folder.join("etcd"), folder.join("etcd.log"));
    fs::create_dir_all(&data).with_context(|| format!("cannot make {}", data.display()))?;
    let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let at = plan.etcd();
    let netns = plan.underlay_netns();
    net::give_bridge_address(plan, at.ip())?;
    let (client, peer) = (format!("http://{at}"), "http://127.0.0.1:2380");
    let run = Run::inside(&netns, "etcd")
        .building(&plan.lab)
        .args(["--name", "lab", "--data-dir"])
        .arg(&data)
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer])
        .args(["--initial-cluster", &format!("lab={peer}")]);
    let child = run.spawn_detached(Stdio::from(file))?;
    let failed = || format!("etcd did not start; if it is missing, `apt-get install etcd-server`{}", log_tail(&log));
    let process = Process::identify(child.id(), "etcd").with_context(failed)?;
    let deadline = Instant::now() + READY_WITHIN;
    while !serves(&log) {
        interrupt::check()?;
        if !process.is_alive() || Instant::now() > deadline {
            bail!("{}", failed());
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(process)
}

/// Whether its log says that it serves clients.
fn serves(log: &Path) -> bool {
    fs::read(log).is_ok_and(|text| String::from_utf8_lossy(&text).contains("ready to serve client requests"))
}
