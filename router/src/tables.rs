//! What the control plane wrote: one immutable snapshot, with an epoch.
//!
//! The daemon compiles its desired state into [`Tables`] and hands them over as one `Arc`; each worker loads it once per
//! batch. What pods have no part in is shared with the snapshot before, so that a pod that comes or goes costs a copy of what concerns
//! this node's pods, however large the cluster is. Nothing in here changes while frames pass. What frames themselves teach (learned MACs,
//! flows) is the workers' and lives in [`crate::bridge`] and [`crate::conntrack`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use foldhash::fast::RandomState;
use hashbrown::HashMap;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use prefix_trie::PrefixMap;
use weft_encap::format::Format;
use weft_encap::mac::Mac;
use weft_encap::vxlan::Vni;

use crate::pace::Limits;
use crate::port::PortId;

mod masquerade;
mod next_hops;

pub use masquerade::{Masquerade, WayOut, came_back, came_by};
pub use next_hops::{GroupId, MOST_HOPS, NextHop, NextHops, Ways};

/// No path by IPv6 carries less (RFC 8200, section 5), so packets of this length must pass whatever is below.
pub const LEAST_V6: u32 = 1280;
/// Linux believes in no narrower path by IPv4, and from then on sends packets of this length that may be fragmented:
/// <https://elixir.bootlin.com/linux/v6.18/A/ident/DEFAULT_MIN_PMTU>.
pub const LEAST_V4: u32 = 552;

/// Number of a node in [`Tables::nodes`]. Stable for a peer as long as the daemon runs, so that counters stay with it.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u16);

impl NodeId {
    /// For indexing.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// How pods of different nodes see each other.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Each node has its own pod ranges; nodes exchange IP packets between them.
    #[default]
    Routed,
    /// One L2 segment over all nodes.
    Bridged,
}

/// The router itself, as pods see it.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// Its MAC, the same on every node; it never crosses the tunnel.
    pub mac: Mac,
    /// Its IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
}

impl Gateway {
    /// Whether `address` is one of its addresses, the link-local one included.
    pub fn owns(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.ipv4 == Some(address),
            IpAddr::V6(address) => self.ipv6 == Some(address) || address == self.mac.link_local(),
        }
    }
}

/// What a port may say of DHCP.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub enum Dhcp {
    /// It may ask; to answer is for servers.
    #[default]
    Client,
    /// It is trusted to answer.
    Server,
    /// It asks for its address, and may say nothing else before it has one.
    Asking,
}

/// A pod's attachment: what its port may send as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its MAC.
    pub mac: Mac,
    /// Its IPv4 addresses.
    pub ipv4: Vec<Ipv4Addr>,
    /// Its IPv6 addresses, without the link-local one.
    pub ipv6: Vec<Ipv6Addr>,
    /// MTU of its interface in bytes, L2 header not included.
    pub mtu: u32,
    /// What it may send and receive.
    pub limits: Limits,
    /// What it may say of DHCP.
    pub dhcp: Dhcp,
}

impl Pod {
    /// All addresses at which it is a neighbour, the link-local one included.
    pub fn neighbours(&self) -> impl Iterator<Item = IpAddr> {
        let v4 = self.ipv4.iter().copied().map(IpAddr::V4);
        v4.chain(self.ipv6.iter().copied().chain([self.mac.link_local()]).map(IpAddr::V6))
    }
}

/// Who is behind a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// A pod.
    Pod(Pod),
    /// This node itself, by its host port: like a pod, but it also passes on what others sent.
    Host(Pod),
    /// The other nodes.
    Underlay,
    /// A network beside the cluster's, to which frames leave without a tunnel; none come from there.
    Uplink,
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its underlay address.
    pub underlay: IpAddr,
    /// Other addresses of the node itself, which its kernel may answer pods from.
    pub addresses: Vec<IpAddr>,
    /// The inner destination MAC for routed packets to it.
    pub vtep_mac: Mac,
    /// The ranges whose addresses live there: inner sources that it may use, and routes to it.
    pub ranges: Vec<IpNet>,
    /// What packets to it are wrapped in, where they are. It may send by any other.
    pub encap: Format,
    /// How long a packet to it may be, inside the tunnel, if nothing on the way allows less.
    pub mtu: u32,
    /// How long one may be that gets there whole. Senders are never asked for less than a floor: what is longer goes in fragments.
    pub carries: u32,
}

impl Node {
    /// A node to which packets go by VXLAN.
    pub fn new(underlay: IpAddr, vtep_mac: Mac, ranges: Vec<IpNet>) -> Node {
        Node {
            underlay,
            addresses: Vec::new(),
            vtep_mac,
            ranges,
            encap: Format::Vxlan,
            mtu: u32::MAX,
            carries: u32::MAX,
        }
    }

    /// Whether an address is the node's own, not one of its ranges'.
    pub fn is_itself(&self, address: IpAddr) -> bool {
        address == self.underlay || self.addresses.contains(&address)
    }
}

/// Where a route leads.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Via {
    /// The destination is a neighbour in this node's own range: look it up there.
    Local,
    /// Another node.
    Node(NodeId),
    /// A router or another node, without a tunnel.
    Uplink(GroupId),
}

/// Where a neighbour is.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Its MAC.
    pub mac: Mac,
    /// Its port.
    pub port: PortId,
}

/// A map by exact match.
pub type ExactMap<K, V> = HashMap<K, V, RandomState>;

/// The snapshot.
#[derive(Clone, Debug)]
pub struct Tables {
    /// Grows with each change; a flow decided under another epoch is decided anew.
    pub epoch: u64,
    /// How nodes see each other.
    pub mode: Mode,
    /// VXLAN network identifier.
    pub vni: Vni,
    /// The router as pods see it.
    pub gateway: Gateway,
    /// Inner MAC of this node for routed packets between nodes.
    pub vtep_mac: Mac,
    /// The port to the other nodes; absent on a node that has none.
    pub underlay: Option<PortId>,
    /// This node's underlay address, from which it asks other nodes about the way to them; without it, it does not.
    pub address: Option<IpAddr>,
    /// The ports by which each format leaves, indexed by [`Format`]; VXLAN's is the one above.
    pub tunnels: [Option<PortId>; Format::ALL.len()],
    /// This node itself, to whom goes what has no route; absent without a host port.
    pub host: Option<Neighbour>,
    /// MTU of packets inside the tunnel in bytes, for all nodes: the pods' own.
    pub tunnel_mtu: u32,
    /// The same towards nodes that less can be sent to at once, as a route or a router on the way says.
    pub path_mtus: Arc<ExactMap<NodeId, u32>>,
    /// Who is behind each port, indexed by [`PortId`].
    pub ports: Vec<Option<Arc<Role>>>,
    /// The other nodes, indexed by [`NodeId`]; a hole is a node that left.
    pub nodes: Arc<Vec<Option<Node>>>,
    /// Underlay address to node.
    pub members: Arc<ExactMap<IpAddr, NodeId>>,
    /// IPv4 routes.
    pub routes4: Arc<PrefixMap<Ipv4Net, Via>>,
    /// IPv6 routes.
    pub routes6: Arc<PrefixMap<Ipv6Net, Via>>,
    /// Ways that need no tunnel, indexed by [`GroupId`].
    pub next_hops: Arc<Vec<NextHops>>,
    /// Where the kernel's main table leads. Nothing is routed by it that [`Tables::routes4`] and [`Tables::routes6`] do not know: what is to
    /// leave the pod network has its source translated first.
    pub outside: Ways,
    /// As whom packets of pods go there; none: they go to this node's kernel as they are.
    pub masquerade: Option<Arc<Masquerade>>,
    /// Local pods and this node itself by address, link-local addresses included.
    pub neighbours: ExactMap<IpAddr, Neighbour>,
    /// Local pods and this node itself by MAC; these never move.
    pub macs: ExactMap<Mac, PortId>,
    /// Ports that take part in floods, in ascending order: those of local pods and of this node itself.
    pub flood: Vec<PortId>,
    /// How often an address or a MAC was entered that another port had already. The later one has it.
    pub overlaps: usize,
}

impl Tables {
    /// Tables of a node without pods and peers; nothing is forwarded.
    pub fn empty(gateway: Gateway) -> Tables {
        Tables {
            epoch: 0,
            mode: Mode::default(),
            vni: Vni::new(1).expect("1 fits 24 bits"),
            gateway,
            vtep_mac: Mac::ZERO,
            underlay: None,
            address: None,
            tunnels: [None; Format::ALL.len()],
            host: None,
            tunnel_mtu: 1450,
            path_mtus: Arc::default(),
            ports: Vec::new(),
            nodes: Arc::default(),
            members: Arc::default(),
            routes4: Arc::default(),
            routes6: Arc::default(),
            next_hops: Arc::default(),
            outside: Ways::default(),
            masquerade: None,
            neighbours: ExactMap::default(),
            macs: ExactMap::default(),
            flood: Vec::new(),
            overlaps: 0,
        }
    }

    /// Enters a pod: its port, its addresses, its MAC.
    pub fn add_pod(&mut self, port: PortId, pod: Pod) {
        self.add_neighbour(port, &pod);
        self.set_port(port, Role::Pod(pod));
    }

    /// Enters the host port: this node's own interface, its addresses, its MAC.
    pub fn add_host(&mut self, port: PortId, interface: Pod) {
        self.host = Some(self.add_neighbour(port, &interface));
        self.set_port(port, Role::Host(interface));
    }

    fn add_neighbour(&mut self, port: PortId, pod: &Pod) -> Neighbour {
        let neighbour = Neighbour { mac: pod.mac, port };
        for address in pod.neighbours() {
            self.overlaps += usize::from(self.neighbours.insert(address, neighbour).is_some());
        }
        self.overlaps += usize::from(self.macs.insert(pod.mac, port).is_some());
        let at = self.flood.partition_point(|other| *other < port);
        self.flood.insert(at, port);
        neighbour
    }

    /// Takes a pod out again. To be used without overlaps only, for who had its addresses before is not known. Routes stay.
    pub fn remove_pod(&mut self, port: PortId) {
        let Some(role) = self.ports.get_mut(port.index()).and_then(Option::take) else { return };
        let Role::Pod(pod) = &*role else {
            self.ports[port.index()] = Some(role);
            return;
        };
        for address in pod.neighbours() {
            self.neighbours.remove(&address);
        }
        self.macs.remove(&pod.mac);
        self.flood.retain(|other| *other != port);
        let used = self.ports.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        self.ports.truncate(used);
    }

    /// Enters the port to the other nodes.
    pub fn add_underlay(&mut self, port: PortId) {
        self.underlay = Some(port);
        self.add_tunnel(port, Format::Vxlan);
    }

    /// Enters a port to the other nodes for what is wrapped like this.
    pub fn add_tunnel(&mut self, port: PortId, format: Format) {
        self.tunnels[format as usize] = Some(port);
        self.set_port(port, Role::Underlay);
    }

    /// Enters a port by which frames leave without a tunnel.
    pub fn add_uplink(&mut self, port: PortId) {
        self.set_port(port, Role::Uplink);
    }

    /// Enters a node and routes to its ranges.
    pub fn add_node(&mut self, id: NodeId, node: Node) {
        for range in &node.ranges {
            self.add_route(*range, Via::Node(id));
        }
        Arc::make_mut(&mut self.members).insert(node.underlay, id);
        let nodes = Arc::make_mut(&mut self.nodes);
        if nodes.len() <= id.index() {
            nodes.resize_with(id.index() + 1, || None);
        }
        nodes[id.index()] = Some(node);
    }

    /// Enters a route.
    pub fn add_route(&mut self, destination: IpNet, via: Via) {
        match destination {
            IpNet::V4(to) => drop(Arc::make_mut(&mut self.routes4).insert(to.trunc(), via)),
            IpNet::V6(to) => drop(Arc::make_mut(&mut self.routes6).insert(to.trunc(), via)),
        }
    }

    /// Who is behind a port.
    pub fn role(&self, port: PortId) -> Option<&Role> {
        self.ports.get(port.index()).and_then(Option::as_deref)
    }

    /// How long a packet to a node may be, inside the tunnel. Nobody is asked for less than senders know of: the underlay then
    /// sends fragments.
    pub fn mtu_to(&self, id: NodeId, is_v6: bool) -> u32 {
        let least = if is_v6 { LEAST_V6 } else { LEAST_V4 };
        let usual = self.node(id).map_or(self.tunnel_mtu, |node| self.tunnel_mtu.min(node.mtu.max(least)));
        self.path_mtus.get(&id).map_or(usual, |mtu| usual.min((*mtu).max(least)))
    }

    /// What whoever is behind a port may send and receive.
    pub fn limits(&self, port: PortId) -> Option<&Limits> {
        match self.role(port)? {
            Role::Pod(pod) | Role::Host(pod) => Some(&pod.limits),
            Role::Underlay | Role::Uplink => None,
        }
    }

    /// The next hops of a group; none if there is no such group.
    pub fn group(&self, id: GroupId) -> &NextHops {
        const NONE: &NextHops = &NextHops::none();
        self.next_hops.get(usize::from(id.0)).unwrap_or(NONE)
    }

    /// Where the kernel's main table leads for an address.
    pub fn outside(&self, address: IpAddr) -> Option<GroupId> {
        self.outside.find(IpNet::from(address))
    }

    /// A node by number.
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(id.index()).and_then(Option::as_ref)
    }

    pub(crate) fn set_port(&mut self, port: PortId, role: Role) {
        if self.ports.len() <= port.index() {
            self.ports.resize_with(port.index() + 1, || None);
        }
        self.ports[port.index()] = Some(Arc::new(role));
    }
}
