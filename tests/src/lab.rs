//! A cluster of real daemons, made by `weft lab up` and ended whatever happens.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::Command;
use std::time::Duration;

use serde::Deserialize;

use crate::command::{Said, run_with};
use crate::container::first_process;
use crate::daemon::Daemon;
use crate::machine::{binaries, binary, port, underlay_kind, unique};
use crate::netns::Netns;
use crate::wire::Wire;

const PATIENCE: Duration = Duration::from_secs(90);

/// What `weft lab up --json` prints.
#[derive(Clone, Debug, Deserialize)]
struct Printed {
    nodes: Vec<Node>,
}

/// A node of a lab.
#[derive(Clone, Debug, Deserialize)]
pub struct Node {
    /// `n1`.
    pub name: String,
    /// Its namespace.
    pub netns: String,
    /// Its underlay address.
    pub underlay: IpAddr,
    /// weftd's socket.
    pub socket: std::path::PathBuf,
    /// The process id that the lab knows weftd by.
    pid: u32,
    /// Its pods.
    pub pods: Vec<Pod>,
}

/// A pod of a lab.
#[derive(Clone, Debug, Deserialize)]
pub struct Pod {
    /// `n1-p1`.
    pub name: String,
    /// Its namespace.
    pub netns: String,
    /// Its interface.
    pub ifname: String,
    /// Its MAC.
    pub mac: String,
    /// Its IPv4 address.
    pub ipv4: Ipv4Addr,
    /// Its IPv6 address.
    pub ipv6: Ipv6Addr,
    /// The gateway's IPv4 address.
    pub gateway4: Ipv4Addr,
}

impl Node {
    /// Its namespace.
    pub fn netns(&self) -> Netns {
        Netns(self.netns.clone())
    }

    /// Its daemon.
    pub fn daemon(&self) -> Daemon {
        Daemon { socket: self.socket.clone(), pid: first_process(self.pid) }
    }
}

impl Pod {
    /// Its namespace.
    pub fn netns(&self) -> Netns {
        Netns(self.netns.clone())
    }

    /// Its MAC.
    pub fn mac(&self) -> weft_encap::mac::Mac {
        self.mac.parse().expect("the lab prints MACs")
    }

    /// The gateway's IPv6 address, as the pod's routes have it.
    #[track_caller]
    pub fn gateway6(&self) -> Ipv6Addr {
        let routes = self.netns().ip("-6 route show default");
        let gateway = routes.split_whitespace().skip_while(|word| *word != "via").nth(1);
        gateway.unwrap_or_else(|| panic!("no default route: {routes}")).parse().expect("an address")
    }
}

/// A running lab; it is taken down when this goes.
pub struct Lab {
    /// Its name.
    pub name: String,
    /// Its nodes.
    pub nodes: Vec<Node>,
}

impl Lab {
    /// Builds a lab. `suffix` tells the labs of one process apart; `rest` are further arguments.
    #[track_caller]
    pub fn up(suffix: &str, nodes: usize, pods: usize, mode: &str, rest: &[&str]) -> Lab {
        let name = unique(suffix);
        let mut lab = Lab { name, nodes: Vec::new() };
        let (nodes, pods) = (nodes.to_string(), pods.to_string());
        let port = port().filter(|_| !rest.contains(&"--port"));
        let port: Vec<&str> = port.iter().flat_map(|port| ["--port", port]).collect();
        let underlay = underlay_kind().filter(|_| !rest.contains(&"--underlay"));
        let underlay: Vec<&str> = underlay.iter().flat_map(|underlay| ["--underlay", underlay]).collect();
        let said = lab.weft(
            &[
                &["lab", "up", "--nodes", &nodes, "--pods", &pods, "--mode", mode, "--json", "--name", &lab.name],
                rest,
                &port,
                &underlay,
            ]
            .concat(),
        );
        let printed: Printed = serde_json::from_str(&said.must()).expect("weft lab up --json prints the cluster");
        lab.nodes = printed.nodes;
        lab
    }

    /// Runs `weft` with these arguments.
    #[track_caller]
    pub fn weft(&self, args: &[&str]) -> Said {
        let mut command = Command::new(binary("weft"));
        command.args(args).env("WEFT_BIN_DIR", binaries());
        run_with(command, &[], PATIENCE)
    }

    /// All pods.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.nodes.iter().flat_map(|node| &node.pods)
    }

    /// A pod; both count from 1.
    pub fn pod(&self, node: usize, pod: usize) -> &Pod {
        &self.nodes[node - 1].pods[pod - 1]
    }

    /// The daemon of a node, counted from 1.
    pub fn daemon(&self, node: usize) -> Daemon {
        self.nodes[node - 1].daemon()
    }

    /// What passes a node's uplink, seen from its other end: whatever the node's kernel is told of it.
    #[track_caller]
    pub fn wire(&self, node: usize) -> Wire {
        Wire::open(&Netns(format!("weft-{}-underlay", self.name)), &self.nodes[node - 1].name)
    }

    /// Checks on all nodes that frames were conserved.
    #[track_caller]
    pub fn assert_conserved(&self) {
        self.nodes.iter().for_each(|node| node.daemon().assert_conserved());
    }

    /// Takes it down and fails if that fails.
    #[track_caller]
    pub fn down(&self) {
        self.weft(&["lab", "down", "--name", &self.name]).must();
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let command = Command::new(binary("weft")).args(["lab", "down", "--name", &self.name]).output();
        let failed = command.map_or_else(
            |error| Some(error.to_string()),
            |output| (!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).into_owned()),
        );
        if let Some(why) = failed {
            eprintln!("the lab {} is not gone: {why}", self.name);
        }
    }
}
