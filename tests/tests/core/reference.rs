//! A small router to compare with: what each frame must cause, worked out from the scenario and not from its bytes.
//!
//! It has no cache, no buffers and no parser. It knows pods, nodes and a map of learned MACs, and says for each message who receives
//! what. Where the real router is fast, this one is plain.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use weft_encap::mac::Mac;
use weft_router::tables::Mode;
use weft_tests::memory::{GATEWAY, GATEWAY4, GATEWAY6, NODES, PODS, VTEP, node_vtep, pod_mac, pod4, pod6};

/// MTU of pods and of the tunnel.
pub const MTU: usize = 1450;

/// Who sends.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// The pod at this port.
    Pod(u16),
    /// The node of this number.
    Node(u16),
    /// Somebody in the underlay who is no node.
    Stranger,
}

/// What is sent.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// ARP.
    Arp { request: bool, sha: Mac, spa: Ipv4Addr, tpa: Ipv4Addr },
    /// A UDP datagram whose IP packet is `size` bytes long.
    Udp { src: IpAddr, dst: IpAddr, ttl: u8, size: usize },
    /// A ping.
    Ping { src: IpAddr, dst: IpAddr, ttl: u8 },
    /// A neighbour solicitation with the sender's link-layer address, unless its source is unspecified.
    Solicit { src: Ipv6Addr, dst: Ipv6Addr, target: Ipv6Addr, option: Mac },
    /// A neighbour advertisement.
    Advertise { src: Ipv6Addr, dst: Ipv6Addr, target: Ipv6Addr, option: Mac },
    /// An Ethernet type that nobody knows.
    Other,
}

/// A frame, described.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who sends it.
    pub from: Place,
    /// Source MAC.
    pub src: Mac,
    /// Destination MAC.
    pub dst: Mac,
    /// The rest.
    pub content: Content,
}

/// What somebody receives.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum What {
    /// The message itself, with this TTL if it is IP.
    Same(Option<u8>),
    /// ARP: the target is at this MAC.
    ArpReply(Mac),
    /// A neighbour advertisement: the target is at this MAC.
    Advertisement(Mac),
    /// An ICMP or ICMPv6 error.
    Error(u8, u8),
    /// The answer to a ping.
    EchoReply,
}

/// A frame that somebody receives: who, destination MAC, source MAC, what.
pub type Delivery = (Place, Mac, Mac, What);

/// The reference.
pub struct Reference {
    mode: Mode,
    learned: BTreeMap<Mac, u16>,
}

impl Message {
    fn ip(&self) -> Option<(IpAddr, IpAddr, u8, usize)> {
        match self.content {
            Content::Udp { src, dst, ttl, size } => Some((src, dst, ttl, size)),
            Content::Ping { src, dst, ttl } => Some((src, dst, ttl, 84)),
            Content::Solicit { src, dst, .. } | Content::Advertise { src, dst, .. } => {
                Some((src.into(), dst.into(), 255, 72))
            }
            Content::Arp { .. } | Content::Other => None,
        }
    }

    fn same(&self) -> What {
        What::Same(self.ip().map(|(_, _, ttl, _)| ttl))
    }

    fn is_udp_or_ping(&self) -> bool {
        matches!(self.content, Content::Udp { .. } | Content::Ping { .. })
    }
}

impl Reference {
    /// One that has seen nothing.
    pub fn new(mode: Mode) -> Reference {
        Reference { mode, learned: BTreeMap::new() }
    }

    /// Who receives what.
    pub fn expect(&mut self, message: &Message) -> BTreeSet<Delivery> {
        match message.from {
            Place::Stranger => BTreeSet::new(),
            Place::Pod(pod) => self.pod_sends(pod, message),
            Place::Node(node) if self.mode == Mode::Routed => routed_from_node(node, message),
            Place::Node(node) => self.node_sends(node, message),
        }
    }

    fn pod_sends(&self, pod: u16, message: &Message) -> BTreeSet<Delivery> {
        if !pod_may_say(pod, message) {
            return BTreeSet::new();
        }
        if let Some(answer) = answer_for_pod(pod, message) {
            return BTreeSet::from([(message.from, message.src, answer.0, answer.1)]);
        }
        if message.dst.is_multicast() {
            return self.flood(message, Some(pod));
        }
        if message.dst == GATEWAY {
            return route(message, |node| Some((Place::Node(node), node_vtep(node), VTEP)));
        }
        let deliver = |to: Place| (to, message.dst, message.src, message.same());
        let too_big = |error| tell(message, error);
        let fits = message.ip().is_none_or(|(.., size)| size <= MTU);
        if let Some(local) = local_mac(message.dst) {
            return match local == pod {
                true => BTreeSet::new(),
                false if !fits => too_big(mtu_error(message)),
                false => BTreeSet::from([deliver(Place::Pod(local))]),
            };
        }
        if self.mode == Mode::Routed {
            return BTreeSet::new();
        }
        if !fits {
            return too_big(mtu_error(message));
        }
        match self.learned.get(&message.dst) {
            Some(node) => BTreeSet::from([deliver(Place::Node(*node))]),
            None => (0..NODES).map(|node| deliver(Place::Node(node))).collect(),
        }
    }

    /// Broadcast and multicast of a pod: to everyone else in the segment.
    fn flood(&self, message: &Message, pod: Option<u16>) -> BTreeSet<Delivery> {
        let deliver = |to: Place| (to, message.dst, message.src, message.same());
        let pods = (1..=PODS).filter(|port| Some(*port) != pod).map(|port| deliver(Place::Pod(port)));
        let over_tunnel = self.mode == Mode::Bridged && pod.is_some();
        // One packet that is too large for some of its receivers goes to none.
        if over_tunnel && message.ip().is_some_and(|(.., size)| size > MTU) {
            return BTreeSet::new();
        }
        pods.chain((0..NODES).filter(|_| over_tunnel).map(|node| deliver(Place::Node(node)))).collect()
    }

    fn node_sends(&mut self, node: u16, message: &Message) -> BTreeSet<Delivery> {
        let is_ours = |mac: Mac| local_mac(mac).is_some() || [GATEWAY, VTEP].contains(&mac);
        let told = match message.content {
            Content::Arp { sha, .. } => Some(sha),
            Content::Solicit { src, .. } if src.is_unspecified() => None,
            Content::Solicit { option, .. } | Content::Advertise { option, .. } => Some(option),
            _ => None,
        };
        let stolen_mac = is_ours(message.src) || told.is_some_and(is_ours) || !message.src.is_unicast();
        let claimed: Option<IpAddr> = match message.content {
            Content::Arp { spa, .. } => Some(spa.into()),
            Content::Advertise { src, target, .. } if !is_taken(src.into()) => Some(target.into()),
            _ => message.ip().map(|(src, ..)| src),
        };
        if stolen_mac || claimed.is_some_and(is_taken) {
            return BTreeSet::new();
        }
        let mut delivered = self.bridged_delivery(message);
        // Nodes are told of no errors: they would not believe it.
        delivered.retain(|delivery| !matches!(delivery, (Place::Node(_), .., What::Error(..))));
        // A frame that was refused on its way teaches nothing.
        if !delivered.is_empty() {
            self.learned.insert(message.src, node);
        }
        delivered
    }

    fn bridged_delivery(&self, message: &Message) -> BTreeSet<Delivery> {
        let deliver = |to: Place| (to, message.dst, message.src, message.same());
        if message.dst.is_multicast() {
            let asked = match message.content {
                Content::Arp { request: true, tpa, .. } => local_address(tpa.into()),
                Content::Solicit { target, .. } => local_address(target.into()),
                _ => None,
            };
            return match asked {
                Some(pod) => BTreeSet::from([deliver(Place::Pod(pod))]),
                None => self.flood(message, None),
            };
        }
        // The gateway is each node's own.
        if message.dst == VTEP && message.ip().is_some_and(|(_, dst, ..)| is_gateway(dst)) {
            return BTreeSet::new();
        }
        if message.dst == VTEP {
            let mut deliveries = route(message, |_| None);
            deliveries.retain(|delivery| delivery.0 != Place::Stranger);
            return deliveries;
        }
        let Some(local) = local_mac(message.dst) else { return BTreeSet::new() };
        match message.ip() {
            Some((.., size)) if size > MTU => tell(message, mtu_error(message)),
            _ => BTreeSet::from([deliver(Place::Pod(local))]),
        }
    }
}

/// In routed mode a node may send IP, from its own ranges, to our pods and to the gateway.
fn routed_from_node(node: u16, message: &Message) -> BTreeSet<Delivery> {
    let theirs = message.ip().is_some_and(|(src, ..)| node_of(src) == Some(node));
    if !theirs || message.dst.is_multicast() {
        return BTreeSet::new();
    }
    route(message, |_| None)
}

/// Routes a message; `onward` says how it goes to another node, if it may.
fn route(message: &Message, onward: impl Fn(u16) -> Option<(Place, Mac, Mac)>) -> BTreeSet<Delivery> {
    let Some((_, dst, ttl, size)) = message.ip() else { return BTreeSet::new() };
    let tell = |what| tell(message, what);
    let v4 = dst.is_ipv4();
    if is_gateway(dst) {
        return match message.content {
            Content::Ping { .. } => tell(What::EchoReply),
            Content::Udp { .. } if v4 => tell(What::Error(3, 3)),
            Content::Udp { .. } => tell(What::Error(1, 4)),
            _ => BTreeSet::new(),
        };
    }
    if !is_forwardable(dst) {
        return BTreeSet::new();
    }
    let hop = match (local_address(dst), is_local_range(dst), node_of(dst)) {
        (Some(pod), ..) => (Place::Pod(pod), pod_mac(pod), GATEWAY),
        (None, true, _) => return tell(if v4 { What::Error(3, 1) } else { What::Error(1, 3) }),
        (None, false, Some(node)) => match onward(node) {
            Some(hop) => hop,
            None => return BTreeSet::new(),
        },
        (None, false, None) => return tell(if v4 { What::Error(3, 0) } else { What::Error(1, 0) }),
    };
    if size > MTU {
        return tell(mtu_error(message));
    }
    if ttl <= 1 {
        return tell(if v4 { What::Error(11, 0) } else { What::Error(3, 0) });
    }
    BTreeSet::from([(hop.0, hop.1, hop.2, What::Same(Some(ttl - 1)))])
}

/// The router's word to the sender. RFC 1122, section 3.2.2: no error about a datagram from or to more than one; nor about one whose
/// sender has no address.
fn tell(message: &Message, what: What) -> BTreeSet<Delivery> {
    let own = if let Place::Pod(_) = message.from { GATEWAY } else { VTEP };
    let is_single = message.ip().is_some_and(|(src, dst, ..)| {
        !(src.is_unspecified() || src.is_multicast() || dst.is_multicast() || dst == IpAddr::V4(Ipv4Addr::BROADCAST))
    });
    if is_single { BTreeSet::from([(message.from, message.src, own, what)]) } else { BTreeSet::new() }
}

fn mtu_error(message: &Message) -> What {
    match message.ip() {
        Some((IpAddr::V4(_), ..)) => What::Error(3, 4),
        _ => What::Error(2, 0),
    }
}

/// What the router answers to a pod itself.
fn answer_for_pod(pod: u16, message: &Message) -> Option<(Mac, What)> {
    let known = |address: IpAddr| match local_address(address) {
        _ if is_gateway(address) => Some(GATEWAY),
        Some(other) if other != pod => Some(pod_mac(other)),
        _ => None,
    };
    match message.content {
        Content::Arp { request: true, spa, tpa, .. } if !spa.is_unspecified() && spa != tpa => {
            let mac = known(tpa.into())?;
            Some((mac, What::ArpReply(mac)))
        }
        Content::Solicit { src, target, .. } if !src.is_unspecified() => {
            let mac = known(target.into())?;
            Some((mac, What::Advertisement(mac)))
        }
        _ => None,
    }
}

fn pod_may_say(pod: u16, message: &Message) -> bool {
    let (mac, four, six) = (pod_mac(pod), pod4(pod), pod6(pod));
    let own6 = |address: Ipv6Addr| address == six || address == mac.link_local();
    if message.src != mac {
        return false;
    }
    let address = match message.ip() {
        None => true,
        Some((IpAddr::V4(src), IpAddr::V4(dst), ..)) => {
            src == four || (src.is_unspecified() && (dst.is_broadcast() || dst.octets()[..3] == [224, 0, 0]))
        }
        Some((IpAddr::V6(src), IpAddr::V6(dst), ..)) => {
            let link = is_link_scope(dst);
            own6(src)
                || (link && dst.is_multicast() && src.is_unspecified())
                || (link && src.is_unicast_link_local() && !is_taken(src.into()))
        }
        Some(_) => false,
    };
    address
        && match message.content {
            Content::Arp { request, sha, spa, .. } => sha == mac && (spa == four || (request && spa.is_unspecified())),
            Content::Solicit { src, target, .. } if src.is_unspecified() => own6(target) || !is_taken(target.into()),
            Content::Solicit { option, .. } => option == mac,
            Content::Advertise { target, option, .. } => {
                option == mac && (own6(target) || (target.is_unicast_link_local() && !is_taken(target.into())))
            }
            Content::Udp { .. } | Content::Ping { .. } | Content::Other => {
                message.is_udp_or_ping() || message.ip().is_none()
            }
        }
}

fn is_link_scope(address: Ipv6Addr) -> bool {
    address.is_unicast_link_local() || (address.is_multicast() && address.segments()[0] & 0xf == 2)
}

fn is_gateway(address: IpAddr) -> bool {
    address == IpAddr::V4(GATEWAY4) || address == IpAddr::V6(GATEWAY6) || address == IpAddr::V6(GATEWAY.link_local())
}

fn is_taken(address: IpAddr) -> bool {
    is_gateway(address) || local_address(address).is_some()
}

fn local_mac(mac: Mac) -> Option<u16> {
    (1..=PODS).find(|pod| pod_mac(*pod) == mac)
}

fn local_address(address: IpAddr) -> Option<u16> {
    (1..=PODS)
        .find(|pod| [IpAddr::V4(pod4(*pod)), pod6(*pod).into(), pod_mac(*pod).link_local().into()].contains(&address))
}

fn is_local_range(address: IpAddr) -> bool {
    subnet(address) == Some(1)
}

fn node_of(address: IpAddr) -> Option<u16> {
    subnet(address)?.checked_sub(2).filter(|node| *node < NODES)
}

/// The N of 10.244.N.0/24 and fd00:10:244:N::/64.
fn subnet(address: IpAddr) -> Option<u16> {
    match address {
        IpAddr::V4(address) => match address.octets() {
            [10, 244, node, _] => Some(node.into()),
            _ => None,
        },
        IpAddr::V6(address) => match address.segments() {
            [0xfd00, 0x10, 0x244, node, ..] => Some(node),
            _ => None,
        },
    }
}

fn is_forwardable(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => {
            let first = a.octets()[0];
            first != 0 && first < 224 && first != 127 && !a.is_link_local()
        }
        IpAddr::V6(a) => !(a.is_unspecified() || a.is_loopback() || a.is_unicast_link_local() || a.is_multicast()),
    }
}
