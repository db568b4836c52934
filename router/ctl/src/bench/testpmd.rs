//! DPDK's `testpmd` between the two pods of a node: a yardstick, not a network.
//!
//! Its forwarder `io` moves every frame from one AF_XDP socket to the other without looking at it, so what it carries is what
//! the sockets carry, less nothing. Whoever looks at frames, finds out whose they are and counts them cannot be expected to do
//! more than that; how much less they do is what looking costs.
//!
//! It knows one pair of devices: there is no second node. It polls and never sleeps, so whoever measures
//! something else stops it meanwhile.

use std::fs::{self, File};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::ovs;
use crate::lab::command::Run;
use crate::lab::plan::{self, Plan};
use crate::lab::process::Process;
use crate::lab::record::{self, Cluster, Kind, Record};
use crate::lab::{daemon, net, up};

const PROGRAM: &str = "dpdk-testpmd";
const INSTALL: &str = "`apt-get install dpdk-dev`";
/// Where a distribution puts the driver; without it, testpmd starts and knows no such device.
const DRIVERS: &str = "/usr/lib/*-linux-gnu/dpdk/pmds-*/librte_net_af_xdp.so";
/// How long it may take until it forwards.
const FORWARDS_WITHIN: Duration = Duration::from_secs(8);
/// Buffers: what two sockets hold, and what is on the way.
const BUFFERS: u32 = 32_768;

/// What this machine lacks for it, and what to do about that.
pub fn missing() -> Option<String> {
    if !super::is_installed(PROGRAM) {
        return Some(format!("{PROGRAM} is missing: {INSTALL}"));
    }
    let found = Run::new("sh").args(["-c", &format!("ls {DRIVERS}")]).succeed();
    found.is_err().then(|| format!("DPDK's driver for AF_XDP is missing: {INSTALL}"))
}

/// Builds it, on the first node; returns the program. If that fails, nothing of it is left.
pub fn build(plan: &Plan) -> Result<Process> {
    let mut record = up::reserve(plan, Kind::Testpmd)?;
    lay_out(plan, &mut record).map_err(|error| up::undo(&record, error, false))
}

fn lay_out(plan: &Plan, record: &mut Record) -> Result<Process> {
    net::make_namespaces(plan)?;
    for pod in [1, 2] {
        ovs::pod_lines(plan, 1, pod).iter().try_for_each(|line| ovs::run(plan, line))?;
    }
    let folder = record::folder(&plan.lab);
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let log = folder.join("testpmd.log");
    let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let run = Run::inside(&plan.node_netns(1), PROGRAM).building(&plan.lab).env("RUNTIME_DIRECTORY", &folder);
    let child = run.args(arguments()).spawn_detached(Stdio::from(file))?;
    let process = Process::identify(child.id(), "testpmd")
        .with_context(|| format!("testpmd did not start{}", daemon::log_tail(&log)))?;
    record.processes.push(process.clone());
    record.save()?;
    await_traffic(plan, &process).with_context(|| format!("testpmd does not forward{}", daemon::log_tail(&log)))?;
    record.cluster = Some(Cluster::default());
    record.save()?;
    Ok(process)
}

/// One thread forwards, on the first CPU, as OVS's does; the other one waits for signals on the last, where the generator is.
fn arguments() -> Vec<String> {
    let last = thread::available_parallelism().map_or(0, |count| count.get() - 1);
    let memory = format!("--lcores=0@{last},1@0 --no-huge -m 256 --no-pci --no-shconf --no-telemetry");
    let devices = "--vdev=net_af_xdp0,iface=p1 --vdev=net_af_xdp1,iface=p2";
    let forward =
        format!("--forward-mode=io --auto-start --nb-cores=1 --total-num-mbufs={BUFFERS} --stats-period=3600");
    format!("{memory} {devices} -- {forward}").split(' ').map(str::to_owned).collect()
}

fn await_traffic(plan: &Plan, process: &Process) -> Result<()> {
    let deadline = Instant::now() + FORWARDS_WITHIN;
    let to = ovs::pod_address(1, 2).to_string();
    while process.is_alive() {
        crate::interrupt::check()?;
        let ping = Run::inside(&plan.pod_netns(1, 1), "ping").building(&plan.lab);
        if ping.args(["-n", "-q", "-c", "1", "-W", "1", &to]).succeed().is_ok() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!("no ping from {} is answered", plan::pod_name(1, 1));
        }
        thread::sleep(Duration::from_millis(50));
    }
    bail!("it ended at once")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_forwarder_has_the_first_cpu() {
        let arguments = arguments();
        assert!(arguments[0].starts_with("--lcores=0@") && arguments[0].ends_with(",1@0"), "{arguments:?}");
        assert!(arguments.iter().any(|word| word == "--forward-mode=io"));
    }
}
