//! What is running, on disk, so that `down` ends exactly that.
//!
//! The record of a lab is `/run/weft/lab/<name>/lab.json`. The folder is made first, and making it is what reserves
//! the name. The record names every namespace before the first of them is made, and is written again as soon as a
//! process runs; so after a crash at any point it covers all there is, except perhaps a process that lives in one of
//! the namespaces, and those are ended with them, and a program that was just being run to make one of them. That one
//! is known by the record's creator.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::plan::{self, Mode, Plan};
use super::process::{self, Process};

/// Where labs keep their files.
pub const ROOT: &str = "/run/weft/lab";

const FILE: &str = "lab.json";

/// What carries the pods' traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// weftd.
    Weft,
    /// The kernel: the twin to compare with.
    Kernel,
    /// Open vSwitch's userspace datapath: another to compare with.
    Ovs,
    /// DPDK's testpmd: a yardstick.
    Testpmd,
}

impl Kind {
    /// As a list of labs has it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Weft => "weft",
            Kind::Kernel => "kernel",
            Kind::Ovs => "ovs",
            Kind::Testpmd => "testpmd",
        }
    }
}

/// What a lab consists of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The lab's name.
    pub lab: String,
    /// What it runs on.
    pub kind: Kind,
    /// Layout.
    pub mode: Mode,
    /// MTU of the underlay.
    pub mtu: u32,
    /// The boot that `processes` belong to.
    pub boot_id: String,
    /// The process that builds it, or has built it.
    #[serde(default)]
    pub creator: Option<Process>,
    /// Whether the creator means to end it as well.
    #[serde(default)]
    pub is_passing: bool,
    /// Namespaces, made or about to be.
    pub netns: Vec<String>,
    /// Processes that were started.
    pub processes: Vec<Process>,
    /// The cluster, once every pod reaches every other.
    pub cluster: Option<Cluster>,
}

/// The cluster as `weft lab up --json` prints it. The names of these fields are an interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// Its nodes.
    pub nodes: Vec<Node>,
}

/// A node of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// `n1`.
    pub name: String,
    /// Name of its namespace.
    pub netns: String,
    /// Address on the underlay.
    pub underlay: String,
    /// weftd's socket.
    pub socket: PathBuf,
    /// weftd's process id.
    pub pid: u32,
    /// Its pods.
    pub pods: Vec<Pod>,
}

/// A pod of the cluster. Addresses are bare, without prefix length.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// `n1-p1`.
    pub name: String,
    /// Name of its namespace.
    pub netns: String,
    /// Its interface.
    pub ifname: String,
    /// That interface's MAC.
    pub mac: String,
    /// Its IPv4 address.
    pub ipv4: std::net::Ipv4Addr,
    /// Its IPv6 address.
    pub ipv6: std::net::Ipv6Addr,
    /// The gateway's IPv4 address.
    pub gateway4: std::net::Ipv4Addr,
}

impl Cluster {
    /// All pods of all nodes.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.nodes.iter().flat_map(|node| &node.pods)
    }
}

impl Record {
    /// Reserves the plan's name and writes down what will be made.
    pub fn create(plan: &Plan, kind: Kind) -> Result<Record> {
        make_folder(&plan.lab)?;
        let record = Record {
            lab: plan.lab.clone(),
            kind,
            mode: plan.mode,
            mtu: plan.mtu,
            boot_id: process::boot_id()?,
            creator: Some(process::own()?),
            is_passing: plan.is_passing,
            netns: plan.all_netns(),
            processes: Vec::new(),
            cluster: None,
        };
        record.save()?;
        Ok(record)
    }

    /// Writes the record, replacing the one before as a whole.
    pub fn save(&self) -> Result<()> {
        let path = folder(&self.lab).join(FILE);
        let partial = path.with_extension("json.partial");
        let write = || -> Result<()> {
            let mut file = fs::File::create(&partial)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            fs::rename(&partial, &path)?;
            Ok(())
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    /// The record of a lab, if there is such a lab.
    pub fn load(lab: &str) -> Result<Stored> {
        let folder = folder(lab);
        let path = folder.join(FILE);
        match fs::read(&path) {
            Ok(bytes) => Record::parse(lab, &bytes).with_context(|| format!("{} cannot be used", path.display())),
            // Nothing is made before the record is written: the folder is all there is.
            Err(error) if error.kind() == ErrorKind::NotFound && folder.is_dir() => Ok(Stored::Empty),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Stored::Absent),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    fn parse(lab: &str, bytes: &[u8]) -> Result<Stored> {
        let record: Record = serde_json::from_slice(bytes)?;
        if record.lab != lab {
            bail!("it is of the lab {:?}", record.lab);
        }
        if let Some(foreign) = record.netns.iter().find(|netns| !plan::is_netns_of(lab, netns)) {
            bail!("it names the namespace {foreign:?}, which is not a lab's");
        }
        Ok(Stored::Present(Box::new(record)))
    }

    /// Whether its processes belong to the boot we are in.
    pub fn is_of_this_boot(&self) -> bool {
        process::boot_id().is_ok_and(|boot_id| boot_id == self.boot_id)
    }

    /// Whether its creator meant to end it and cannot any more.
    pub fn is_abandoned(&self) -> bool {
        let lives = |creator: &Process| self.is_of_this_boot() && creator.is_alive();
        self.is_passing && !self.creator.as_ref().is_some_and(lives)
    }
}

/// What is on disk of a lab.
#[derive(Debug, PartialEq, Eq)]
pub enum Stored {
    /// Nothing.
    Absent,
    /// A folder without a record: `up` was ended at its very beginning.
    Empty,
    /// A record.
    Present(Box<Record>),
}

/// The folder of a lab.
pub fn folder(lab: &str) -> PathBuf {
    Path::new(ROOT).join(lab)
}

/// Makes the folder of a lab that does not exist yet.
fn make_folder(lab: &str) -> Result<()> {
    let folder = folder(lab);
    // Another lab that ends at this moment may take the parents away in between.
    for _ in 0..100 {
        fs::create_dir_all(ROOT).with_context(|| format!("cannot make {ROOT}"))?;
        match fs::create_dir(&folder) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                bail!("the lab {lab} exists already; end it with `{}`", down_command(lab))
            }
            Err(error) => return Err(error).with_context(|| format!("cannot make {}", folder.display())),
        }
    }
    bail!("cannot make {}: something keeps removing {ROOT}", folder.display())
}

/// The names of all labs.
pub fn all() -> Result<Vec<String>> {
    let entries = match fs::read_dir(ROOT) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {ROOT}")),
    };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| plan::check_name(name).is_ok()).collect();
    names.sort();
    Ok(names)
}

/// Removes a lab's folder, and the folders above it if no other lab needs them.
pub fn remove(lab: &str) -> Result<()> {
    let folder = folder(lab);
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove {}", folder.display()));
        }
        _ => {}
    }
    // These fail if they are not empty, which is as it should be.
    let _ = fs::remove_dir(ROOT);
    let _ = fs::remove_dir(Path::new(ROOT).parent().unwrap_or(Path::new(ROOT)));
    Ok(())
}

/// The command that ends a lab.
pub fn down_command(lab: &str) -> String {
    if lab == plan::DEFAULT { "weft lab down".to_owned() } else { format!("weft lab down --name {lab}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        let plan = Plan::new("x", 1, 1, Mode::Routed, 1500).unwrap();
        let pod = Pod {
            name: "n1-p1".into(),
            netns: "weft-x-n1-p1".into(),
            ifname: "eth0".into(),
            mac: "02:00:00:00:00:01".into(),
            ipv4: "10.244.1.2".parse().unwrap(),
            ipv6: "fd00:10:244:1::2".parse().unwrap(),
            gateway4: "10.244.1.1".parse().unwrap(),
        };
        let node = Node {
            name: "n1".into(),
            netns: "weft-x-n1".into(),
            underlay: "10.200.0.1".into(),
            socket: "/run/weft/lab/x/n1.sock".into(),
            pid: 42,
            pods: vec![pod],
        };
        Record {
            lab: "x".into(),
            kind: Kind::Weft,
            mode: Mode::Routed,
            mtu: 1500,
            boot_id: "b".into(),
            creator: Some(process::own().unwrap()),
            is_passing: false,
            netns: plan.all_netns(),
            processes: vec![Process { pid: 42, start_time: 7, what: "weftd of n1".into() }],
            cluster: Some(Cluster { nodes: vec![node] }),
        }
    }

    #[test]
    fn the_cluster_has_the_agreed_shape() {
        let json = serde_json::to_string(record().cluster.as_ref().unwrap()).unwrap();
        assert_eq!(
            json,
            r#"{"nodes":[{"name":"n1","netns":"weft-x-n1","underlay":"10.200.0.1","socket":"/run/weft/lab/x/n1.sock","pid":42,"#.to_owned()
                + r#""pods":[{"name":"n1-p1","netns":"weft-x-n1-p1","ifname":"eth0","mac":"02:00:00:00:00:01","#
                + r#""ipv4":"10.244.1.2","ipv6":"fd00:10:244:1::2","gateway4":"10.244.1.1"}]}]}"#
        );
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let bytes = serde_json::to_vec_pretty(&record()).unwrap();
        assert_eq!(Record::parse("x", &bytes).unwrap(), Stored::Present(Box::new(record())));
    }

    #[test]
    fn a_record_that_names_what_is_not_its_own_is_refused() {
        let bytes = serde_json::to_vec(&record()).unwrap();
        assert!(Record::parse("y", &bytes).is_err());
        let mut foreign = record();
        foreign.netns.push("weft-n1".into());
        let error = Record::parse("x", &serde_json::to_vec(&foreign).unwrap()).unwrap_err().to_string();
        assert!(error.contains("weft-n1"), "{error}");
        assert!(Record::parse("x", b"{").is_err());
    }

    #[test]
    fn a_record_of_another_boot_is_told() {
        let mut record = record();
        assert!(!record.is_of_this_boot());
        record.boot_id = process::boot_id().unwrap();
        assert!(record.is_of_this_boot());
    }

    #[test]
    fn a_lab_is_abandoned_if_its_creator_should_end_it_and_is_gone() {
        let mut record = Record { boot_id: process::boot_id().unwrap(), is_passing: true, ..record() };
        assert!(!record.is_abandoned(), "this process lives");
        record.creator.as_mut().unwrap().start_time -= 1;
        assert!(record.is_abandoned());
        record.is_passing = false;
        assert!(!record.is_abandoned(), "it is to stay");
        let before = Record { boot_id: "b".into(), is_passing: true, creator: Some(process::own().unwrap()), ..record };
        assert!(before.is_abandoned(), "its creator was of another boot");
    }

    #[test]
    fn the_command_that_ends_a_lab_names_it() {
        assert_eq!(down_command("default"), "weft lab down");
        assert_eq!(down_command("x"), "weft lab down --name x");
    }
}
