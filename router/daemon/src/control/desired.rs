//! What should be: the configuration and the pods that are attached, with the numbers they go by.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;

use weft_encap::format::Format;
use weft_router::PortId;
use weft_router::tables::{NodeId, Pod, WayOut};

use super::config::{Config, Peer};
use crate::egress::Leads;

/// The underlay's port.
pub const UNDERLAY: PortId = PortId(0);
/// The host port.
pub const HOST: PortId = PortId(1);
/// The ports of interfaces that frames leave by without a tunnel.
pub const OUTLETS: std::ops::RangeInclusive<u16> = 5..=15;
/// The first one of a pod.
pub const FIRST_POD: PortId = PortId(16);
/// Geneve's.
const GENEVE: PortId = PortId(2);
/// GRE's, with either payload.
const GRE: PortId = PortId(3);
/// That of IP in IP.
const IPIP: PortId = PortId(4);

/// The port by which a format's packets enter and leave.
pub fn tunnel_port(format: Format) -> PortId {
    match format {
        Format::Vxlan => UNDERLAY,
        Format::Geneve => GENEVE,
        Format::Gre | Format::Gretap => GRE,
        Format::Ipip => IPIP,
    }
}

/// Whether a port leads to other nodes.
pub fn is_underlay(port: PortId) -> bool {
    Format::ALL.into_iter().any(|format| tunnel_port(format) == port)
}

/// Everything that the data plane's tables are made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredState {
    /// The configuration in force.
    pub config: Arc<Config>,
    /// Numbers of the configuration's peers.
    pub nodes: NodeNumbers,
    /// This node's own interface in the pod network, while there is one.
    pub host: Option<Pod>,
    /// Who is behind each pod port.
    pub pods: BTreeMap<PortId, Pod>,
    /// How long packets to an underlay address may be, where routers on the way said so; in bytes, with the outer IP header.
    pub path_mtus: BTreeMap<IpAddr, u32>,
    /// The same as was measured, of all that answer.
    pub measured: BTreeMap<IpAddr, u32>,
    /// What leaves without a tunnel, and where.
    pub leads: Leads,
    /// The interfaces that pods' packets leave by in the node's name: those whose answers come back.
    pub ways_out: Vec<WayOut>,
}

impl DesiredState {
    /// A node without pods.
    pub fn new(config: Arc<Config>) -> DesiredState {
        let mut nodes = NodeNumbers::default();
        nodes.follow(&config.peers);
        DesiredState {
            config,
            nodes,
            host: None,
            pods: BTreeMap::new(),
            path_mtus: BTreeMap::new(),
            measured: BTreeMap::new(),
            leads: Leads::default(),
            ways_out: Vec::new(),
        }
    }

    /// The same pods and interface under another configuration.
    pub fn reconfigured(&self, config: Arc<Config>) -> DesiredState {
        let mut nodes = self.nodes.clone();
        nodes.follow(&config.peers);
        DesiredState {
            config,
            nodes,
            host: self.host.clone(),
            pods: self.pods.clone(),
            path_mtus: self.path_mtus.clone(),
            measured: self.measured.clone(),
            leads: self.leads.clone(),
            ways_out: self.ways_out.clone(),
        }
    }
}

/// Ports are indexes of arrays in the data plane: this bounds them.
const MAX_PORT: u16 = 4095;

/// The port numbers that no pod has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PortNumbers {
    /// So many pods have ever had a number at once.
    used: u16,
    /// Those of them that were given back.
    free: BTreeSet<PortId>,
}

impl PortNumbers {
    /// Takes the lowest one; `None` when all are in use.
    pub fn take(&mut self) -> Option<PortId> {
        if let Some(port) = self.free.pop_first() {
            return Some(port);
        }
        let port = PortId(FIRST_POD.0 + self.used);
        (port.0 <= MAX_PORT).then(|| {
            self.used += 1;
            port
        })
    }

    /// Gives one back that was taken.
    pub fn give_back(&mut self, port: PortId) {
        self.free.insert(port);
    }
}

/// Numbers of peers. A peer keeps its number over reloads, also when it left and came back, so that its counters stay
/// with it; the number of the one that left first is given away when no fresh one is left.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeNumbers {
    current: BTreeMap<String, NodeId>,
    left: VecDeque<(String, NodeId)>,
    next: u16,
}

impl NodeNumbers {
    /// The number of a peer of the configuration.
    pub fn of(&self, name: &str) -> Option<NodeId> {
        self.current.get(name).copied()
    }

    /// The peer with this number.
    pub fn name(&self, id: NodeId) -> Option<&str> {
        self.current.iter().find(|(_, other)| **other == id).map(|(name, _)| name.as_str())
    }

    fn follow(&mut self, peers: &[Peer]) {
        let names: BTreeSet<&str> = peers.iter().map(|peer| peer.name.as_str()).collect();
        let gone: Vec<String> = self.current.keys().filter(|name| !names.contains(name.as_str())).cloned().collect();
        for name in gone {
            if let Some(id) = self.current.remove(&name) {
                self.left.push_back((name, id));
            }
        }
        let mut back: BTreeMap<String, NodeId> = BTreeMap::new();
        self.left.retain(|(name, id)| {
            let returns = names.contains(name.as_str());
            if returns {
                back.insert(name.clone(), *id);
            }
            !returns
        });
        self.current.extend(back);
        for name in names {
            if !self.current.contains_key(name) {
                let Some(id) = self.fresh() else { continue };
                self.current.insert(name.to_owned(), id);
            }
        }
    }

    fn fresh(&mut self) -> Option<NodeId> {
        if self.next < u16::MAX {
            self.next += 1;
            return Some(NodeId(self.next - 1));
        }
        self.left.pop_front().map(|(_, id)| id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peers(names: &[&str]) -> Vec<Peer> {
        let peer = |name: &&str| Peer {
            name: (*name).to_owned(),
            underlay: "192.0.2.1".parse().unwrap(),
            ranges: Vec::new(),
            addresses: Vec::new(),
            vtep_mac: weft_encap::mac::Mac::ZERO,
            encapsulation: None,
            accepts: None,
        };
        names.iter().map(peer).collect()
    }

    #[test]
    fn the_lowest_free_port_is_given_until_all_are_in_use() {
        let mut numbers = PortNumbers::default();
        let all: Vec<PortId> = std::iter::from_fn(|| numbers.take()).collect();
        assert_eq!((all.first(), all.last()), (Some(&FIRST_POD), Some(&PortId(MAX_PORT))));
        assert_eq!(all.len(), usize::from(MAX_PORT - FIRST_POD.0) + 1);
        [700, 19, 4095].into_iter().for_each(|port| numbers.give_back(PortId(port)));
        let again: Vec<u16> = std::iter::from_fn(|| numbers.take()).map(|port| port.0).collect();
        assert_eq!(again, [19, 700, 4095]);
    }

    #[test]
    fn a_peer_keeps_its_number_over_reloads_and_absence() {
        let mut numbers = NodeNumbers::default();
        numbers.follow(&peers(&["b", "c"]));
        assert_eq!((numbers.of("b"), numbers.of("c")), (Some(NodeId(0)), Some(NodeId(1))));
        numbers.follow(&peers(&["a", "c"]));
        assert_eq!((numbers.of("a"), numbers.of("b"), numbers.of("c")), (Some(NodeId(2)), None, Some(NodeId(1))));
        numbers.follow(&peers(&["b", "c"]));
        assert_eq!((numbers.of("b"), numbers.of("c")), (Some(NodeId(0)), Some(NodeId(1))));
        assert_eq!(numbers.name(NodeId(1)), Some("c"));
    }

    #[test]
    fn numbers_are_reused_only_when_no_fresh_one_is_left() {
        let mut numbers = NodeNumbers { next: u16::MAX - 1, ..NodeNumbers::default() };
        numbers.follow(&peers(&["a"]));
        assert_eq!(numbers.of("a"), Some(NodeId(u16::MAX - 1)));
        numbers.follow(&peers(&["b"]));
        assert_eq!(numbers.of("b"), Some(NodeId(u16::MAX - 1)));
        assert_eq!(numbers.of("a"), None);
    }
}
