//! A running weftd, asked over its socket and looked at through `/proc`.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use weft_api::{Client, ClientError, DropInfo, FdbInfo, LeaseInfo, PortInfo, Request, Status};

use crate::command::eventually;
pub use crate::sys::BpfObject;

const PATIENCE: Duration = Duration::from_secs(10);

/// A running weftd.
#[derive(Clone, Debug)]
pub struct Daemon {
    /// Its socket.
    pub socket: PathBuf,
    /// Its process id.
    pub pid: u32,
}

impl Daemon {
    /// Asks; the error is the daemon's.
    pub fn try_ask<T: DeserializeOwned>(&self, request: &Request) -> Result<T, ClientError> {
        Client::connect(&self.socket, PATIENCE)?.call(request)
    }

    /// Asks what must be answered.
    #[track_caller]
    pub fn ask<T: DeserializeOwned>(&self, request: &Request) -> T {
        self.try_ask(request).unwrap_or_else(|error| panic!("weftd at {}: {error}", self.socket.display()))
    }

    /// Its state.
    #[track_caller]
    pub fn status(&self) -> Status {
        self.ask(&Request::Status)
    }

    /// Its ports.
    #[track_caller]
    pub fn ports(&self) -> Vec<PortInfo> {
        self.ask(&Request::Ports)
    }

    /// Its leases.
    #[track_caller]
    pub fn leases(&self) -> Vec<LeaseInfo> {
        self.ask(&Request::Leases)
    }

    /// Its learned and static MACs.
    #[track_caller]
    pub fn fdb(&self) -> Vec<FdbInfo> {
        self.ask(&Request::Fdb)
    }

    /// The port of a pod, by one of its addresses.
    #[track_caller]
    pub fn port_of(&self, address: std::net::IpAddr) -> PortInfo {
        let ports = self.ports();
        let found = ports.iter().find(|port| port.addresses.contains(&address));
        found.unwrap_or_else(|| panic!("no port has {address}: {ports:?}")).clone()
    }

    /// The underlay's port.
    #[track_caller]
    pub fn underlay(&self) -> PortInfo {
        self.ports().into_iter().find(|port| port.role == "underlay").expect("a node has an underlay port")
    }

    /// How often frames ended for this reason, over all ports.
    #[track_caller]
    pub fn drops(&self, reason: &str) -> u64 {
        let drops: Vec<DropInfo> = self.ask(&Request::Drops);
        drops.iter().filter(|drop| drop.reason == reason).map(|drop| drop.count).sum()
    }

    /// Of what entered or left by a port, how much ended for that reason.
    #[track_caller]
    pub fn lost_at(&self, port: u32, reason: &str) -> u64 {
        let drops: Vec<DropInfo> = self.ask(&Request::Drops);
        drops.iter().filter(|drop| drop.port == port && drop.reason == reason).map(|drop| drop.count).sum()
    }

    /// All drop counters by name, over all ports.
    #[track_caller]
    pub fn all_drops(&self) -> BTreeMap<String, u64> {
        let drops: Vec<DropInfo> = self.ask(&Request::Drops);
        let mut sums = BTreeMap::new();
        for drop in drops {
            *sums.entry(drop.reason).or_default() += drop.count;
        }
        sums
    }

    /// Waits until the counters stand still, and checks that no frame was lost or made out of nothing, on any port.
    #[track_caller]
    pub fn assert_conserved(&self) {
        let mut last = None;
        eventually("every frame is accounted for", PATIENCE, || {
            std::thread::sleep(Duration::from_millis(20));
            let ports = self.ports();
            let balanced = ports.iter().all(|port| {
                let c = &port.counters;
                let named: u64 = port.drops.values().sum();
                c.received + c.created == c.sent + c.dropped + c.merged && named == c.dropped
            });
            let still = last.as_ref() == Some(&ports);
            if !balanced && still {
                panic!("frames are not conserved: {ports:#?}");
            }
            last = Some(ports);
            balanced && still
        });
    }

    /// CPU time that it has used so far.
    #[track_caller]
    pub fn cpu_time(&self) -> Duration {
        let stat = self.proc("stat");
        let fields: Vec<&str> =
            stat.rsplit(')').next().expect("the name is in parentheses").split_whitespace().collect();
        // Fields 14 and 15 of proc_pid_stat(5), in clock ticks of 10 ms.
        let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().expect("a number")).sum();
        Duration::from_millis(ticks * 10)
    }

    /// Its resident memory in KiB.
    #[track_caller]
    pub fn resident_kib(&self) -> u64 {
        let status = self.proc("status");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("a process has memory");
        line.split_whitespace().nth(1).expect("a number").parse().expect("a number")
    }

    /// How many descriptors it has open.
    #[track_caller]
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(Path::new("/proc").join(self.pid.to_string()).join("fd")).expect("it runs").count()
    }

    /// The limit on its descriptors (RLIMIT_NOFILE) below which so many numbers are free. The limit is on numbers, and those in use may
    /// have gaps.
    #[track_caller]
    pub fn limit_with_room(&self, room: u64) -> u64 {
        let folder = Path::new("/proc").join(self.pid.to_string()).join("fd");
        let entries = std::fs::read_dir(folder).expect("it runs").flatten();
        let open: BTreeSet<u64> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        let mut free = (0..).filter(|number| !open.contains(number));
        free.nth(room as usize).expect("numbers do not end")
    }

    /// The XDP programs and maps that it keeps.
    #[track_caller]
    pub fn bpf_objects(&self) -> Vec<BpfObject> {
        let folder = Path::new("/proc").join(self.pid.to_string()).join("fdinfo");
        let infos = std::fs::read_dir(folder).expect("it runs").flatten();
        // A descriptor may be closed meanwhile.
        let texts = infos.map(|info| std::fs::read_to_string(info.path()).unwrap_or_default());
        let object = |line: &str| {
            let (key, number) = line.split_once(':')?;
            let number = number.trim().parse().ok()?;
            match key {
                "prog_id" => Some(BpfObject::Program(number)),
                "map_id" => Some(BpfObject::Map(number)),
                _ => None,
            }
        };
        let mut objects: Vec<_> = texts.flat_map(|text| text.lines().filter_map(object).collect::<Vec<_>>()).collect();
        objects.sort_unstable();
        objects.dedup();
        objects
    }

    /// Whether it runs.
    pub fn is_alive(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next()).is_some_and(|state| state != "Z")
    }

    fn proc(&self, file: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.pid))
            .unwrap_or_else(|error| panic!("weftd {}: {error}", self.pid))
    }

    /// Sends it a signal. Its process id came from whoever started it.
    #[track_caller]
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.pid as i32).expect("a process id is not zero");
        rustix::process::kill_process(pid, signal).expect("it runs");
    }
}
