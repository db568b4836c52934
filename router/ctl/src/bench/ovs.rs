//! The same cluster on Open vSwitch's userspace datapath, to compare with.
//!
//! Each node has an ovsdb-server and an ovs-vswitchd of its own, with database, sockets and log in the lab's folder; the
//! machine's own Open vSwitch, if it has one, is neither needed nor touched. Pods hang on a bridge `br-int`. Between
//! nodes it uses OVS's own VXLAN, whose outer packets leave by a second bridge, `br-phy`, that has taken the uplink and
//! its address, as OVS's documentation has it. All bridges are switches: one L2 segment spans the nodes.
//!
//! Ports are AF_XDP sockets (`type=afxdp`) or AF_PACKET sockets. Neither takes a partial checksum or a superframe, so
//! the pods' devices fill in and cut by themselves. AF_XDP ports are polled by a thread that never sleeps; it gets
//! another processor on each node, and whoever measures something else stops it meanwhile.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::lab::command::Run;
use crate::lab::plan::{self, PORT, Plan, UPLINK, VNI};
use crate::lab::process::Process;
use crate::lab::record::{self, Cluster, Kind, Record};
use crate::lab::{daemon, net, up};

const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";
const INSTALL: &str = "`apt-get install openvswitch-switch`";
/// How long the database may take until it listens.
const LISTENS_WITHIN: Duration = Duration::from_secs(5);

/// How OVS's ports reach their devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ports {
    /// AF_XDP sockets.
    AfXdp,
    /// AF_PACKET sockets.
    AfPacket,
}

impl Ports {
    /// The settings of an interface, as `ovs-vsctl` takes them.
    fn settings(self) -> &'static [&'static str] {
        match self {
            Ports::AfXdp => &["type=afxdp", "options:n_rxq=1"],
            Ports::AfPacket => &["type=system"],
        }
    }
}

/// What this machine lacks for it, and what to do about that.
pub fn missing() -> Option<String> {
    for program in ["ovsdb-tool", "ovsdb-server", "ovs-vsctl", "ovs-vswitchd"] {
        if !super::is_installed(program) {
            return Some(format!("{program} is missing: {INSTALL}"));
        }
    }
    (!Path::new(SCHEMA).is_file()).then(|| format!("{SCHEMA} is missing: {INSTALL}"))
}

/// Builds it; returns the ovs-vswitchd of each node. If that fails, nothing of it is left.
pub fn build(plan: &Plan, ports: Ports) -> Result<Vec<Process>> {
    let mut record = up::reserve(plan, Kind::Ovs)?;
    lay_out(plan, ports, &mut record).map_err(|error| up::undo(&record, error, false))
}

/// The address of a pod.
pub fn pod_address(node: u8, pod: u8) -> Ipv4Addr {
    plan::range_v4(node, pod + 1)
}

fn lay_out(plan: &Plan, ports: Ports, record: &mut Record) -> Result<Vec<Process>> {
    net::make_namespaces(plan)?;
    net::make_underlay(plan)?;
    let mut switches = Vec::new();
    for node in plan.node_numbers() {
        for pod in plan.pod_numbers() {
            pod_lines(plan, node, pod).iter().try_for_each(|line| run(plan, line))?;
        }
        let daemons = Daemons::of(plan, node);
        let database = daemons.start_database()?;
        record.processes.push(database);
        record.save()?;
        daemons.await_database()?;
        let switch = daemons.start_switch()?;
        record.processes.push(switch.clone());
        record.save()?;
        switches.push(switch);
        daemons.configure(ports).with_context(|| format!("ovs-vswitchd of {}", plan::node_name(node)))?;
        uplink_lines(plan, node).iter().try_for_each(|line| run(plan, line))?;
    }
    record.cluster = Some(Cluster::default());
    record.save()?;
    Ok(switches)
}

/// Runs a line in the course of building.
pub fn run(plan: &Plan, line: &str) -> Result<()> {
    let mut words = line.split_whitespace();
    let program = words.next().unwrap_or_default();
    Run::new(program).building(&plan.lab).args(words).succeed().map(drop)
}

/// What connects a pod to a device `p1`, `p2`, … of its node. An AF_XDP socket is bound to one queue, so the devices have one.
pub fn pod_lines(plan: &Plan, node: u8, pod: u8) -> Vec<String> {
    const QUEUES: &str = "numtxqueues 1 numrxqueues 1";
    let (netns, host, mtu) = (plan.pod_netns(node, pod), plan.node_netns(node), plan.pod_mtu());
    vec![
        format!(
            "ip -n {netns} link add eth0 mtu {mtu} {QUEUES} type veth peer name p{pod} mtu {mtu} {QUEUES} netns {host}"
        ),
        format!("ip -n {netns} address add {}/16 dev eth0", pod_address(node, pod)),
        format!("ip netns exec {netns} ethtool -K eth0 tx off"),
        format!("ip -n {netns} link set eth0 up"),
        format!("ip -n {host} link set p{pod} up"),
    ]
}

fn uplink_lines(plan: &Plan, node: u8) -> Vec<String> {
    let (netns, address, mtu) = (plan.node_netns(node), plan.underlay_address(node), plan.mtu);
    vec![
        format!("ip -n {netns} address flush dev {UPLINK}"),
        format!("ip -n {netns} link set br-phy mtu {mtu} up"),
        format!("ip -n {netns} address add {address}/24 dev br-phy"),
    ]
}

/// The two programs of a node, and their files.
struct Daemons<'a> {
    plan: &'a Plan,
    node: u8,
    folder: PathBuf,
}

impl Daemons<'_> {
    fn of(plan: &Plan, node: u8) -> Daemons<'_> {
        let folder = record::folder(&plan.lab).join(format!("{}.ovs", plan::node_name(node)));
        Daemons { plan, node, folder }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn remote(&self) -> String {
        format!("unix:{}", self.file("db.sock").display())
    }

    fn option(&self, name: &str, file: &str) -> String {
        format!("--{name}={}", self.file(file).display())
    }

    /// A program that finds all its files in the folder and says what it has to say on stderr.
    fn run(&self, program: &str) -> Run {
        let run = Run::inside(&self.plan.node_netns(self.node), program).building(&self.plan.lab);
        let folders = ["OVS_RUNDIR", "OVS_DBDIR", "OVS_LOGDIR", "OVS_SYSCONFDIR"];
        folders.iter().fold(run, |run, name| run.env(name, &self.folder))
    }

    fn start(&self, run: Run, what: &str) -> Result<Process> {
        let log = self.file(&format!("{what}.log"));
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let run = run.arg("-vsyslog:off").arg("-vfile:off").arg("-vconsole:info").arg("--no-chdir");
        let child = run.spawn_detached(Stdio::from(file))?;
        let what = format!("{what} of {}", plan::node_name(self.node));
        Process::identify(child.id(), &what).with_context(|| format!("{what} did not start{}", daemon::log_tail(&log)))
    }

    fn start_database(&self) -> Result<Process> {
        fs::create_dir_all(&self.folder).with_context(|| format!("cannot make {}", self.folder.display()))?;
        let database = self.file("conf.db");
        self.run("ovsdb-tool").arg("create").arg(&database).arg(SCHEMA).succeed()?;
        let run = self.run("ovsdb-server").arg(&database).arg(format!("--remote=p{}", self.remote()));
        self.start(run.arg(self.option("unixctl", "ovsdb.ctl")), "ovsdb-server")
    }

    fn await_database(&self) -> Result<()> {
        let deadline = Instant::now() + LISTENS_WITHIN;
        while !self.file("db.sock").exists() {
            if Instant::now() >= deadline {
                bail!("ovsdb-server does not listen{}", daemon::log_tail(&self.file("ovsdb-server.log")));
            }
            thread::sleep(Duration::from_millis(5));
        }
        self.vsctl(&["--no-wait", "init"]).map(drop)
    }

    fn start_switch(&self) -> Result<Process> {
        let run = self.run("ovs-vswitchd").arg(self.remote()).arg(self.option("unixctl", "vswitchd.ctl"));
        self.start(run, "ovs-vswitchd")
    }

    fn vsctl(&self, args: &[&str]) -> Result<String> {
        let run = self.run("ovs-vsctl").arg(format!("--db={}", self.remote())).arg("--timeout=10").args(args);
        Ok(String::from_utf8_lossy(&run.succeed()?).trim().to_owned())
    }

    fn configure(&self, ports: Ports) -> Result<()> {
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let mask = 1_u64 << (usize::from(self.node - 1) % cpus.min(64));
        self.vsctl(&["set", "Open_vSwitch", ".", &format!("other_config:pmd-cpu-mask=0x{mask:x}")])?;
        for bridge in ["br-int", "br-phy"] {
            self.vsctl(&["add-br", bridge, "--", "set", "Bridge", bridge, "datapath_type=netdev"])?;
        }
        for pod in self.plan.pod_numbers() {
            self.add("br-int", &format!("p{pod}"), ports.settings())?;
        }
        self.add("br-phy", UPLINK, ports.settings())?;
        for peer in self.plan.node_numbers().filter(|peer| *peer != self.node) {
            let remote = format!("options:remote_ip={}", self.plan.underlay_address(peer));
            let (key, port) = (format!("options:key={VNI}"), format!("options:dst_port={PORT}"));
            self.add("br-int", &format!("vx{peer}"), &["type=vxlan", &remote, &key, &port])?;
        }
        Ok(())
    }

    /// Adds a port. OVS takes any and tells afterwards whether it can use it.
    fn add(&self, bridge: &str, port: &str, settings: &[&str]) -> Result<()> {
        self.vsctl(&[&["add-port", bridge, port, "--", "set", "Interface", port], settings].concat())?;
        let number = self.vsctl(&["get", "Interface", port, "ofport"])?;
        if number.parse::<u32>().is_err() {
            let error = self.vsctl(&["get", "Interface", port, "error"])?;
            bail!(
                "it refuses port {port} ({}): {error}{}",
                settings.join(" "),
                daemon::log_tail(&self.file("ovs-vswitchd.log"))
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::plan::Mode;

    #[test]
    fn nothing_is_made_outside_its_own_namespaces() {
        let plan = Plan::new("t", 2, 2, Mode::Bridged, 1500).unwrap();
        for node in plan.node_numbers() {
            let pods = plan.pod_numbers().flat_map(|pod| pod_lines(&plan, node, pod));
            for line in pods.chain(uplink_lines(&plan, node)) {
                assert!(plan.all_netns().iter().any(|own| line.split_whitespace().any(|word| word == own)), "{line}");
            }
        }
    }

    #[test]
    fn files_are_in_the_labs_folder_and_sockets_have_names_that_the_kernel_takes() {
        // unix(7): sun_path has 108 bytes.
        let lab = "x".repeat(20);
        let plan = Plan::new(&lab, 1, 1, Mode::Bridged, 1500).unwrap();
        let daemons = Daemons::of(&plan, 1);
        for name in ["db.sock", "vswitchd.ctl", "br-int.snoop"] {
            let path = daemons.file(name);
            assert!(path.starts_with(record::folder(&lab)));
            assert!(path.as_os_str().len() < 100, "{}", path.display());
        }
    }
}
