//! The way back of what came by the host port: see [`crate::returns`].
//!
//! A node's own address never comes by the host port of the node that is to hear it: a pod calls a service, its node's kernel leads that to
//! another node itself (the API server, say), and *that* node answers the pod by the tunnel, as itself. The pod has never heard of it; only
//! the kernel that translated can translate back. So whatever a node says in its own name to a pod takes the way by the kernel
//! ([`by_kernel`]), and needs no memory for it: a pod's packets to nodes go by the kernel as well, or leave in this node's name, and are
//! then answered to this node.

use weft_encap::ip;

use super::Forwarder;
use super::hop::port_mtu;
use crate::conntrack::Entry;
use crate::flow::{FlowKey, Signature};
use crate::packet::{Ip, Packet};
use crate::path::{Entrance, Hop, Macs, Path, Rewrite, Sender, Tie};
use crate::returns::Returns;
use crate::route;
use crate::tables::{Neighbour, Tables, Via};
use crate::time::Instant;

impl Forwarder {
    /// The path of a packet that replies to what the host port brought, and the conversation that it belongs to.
    pub(super) fn way_back(&self, packet: &Packet, tables: &Tables, now: Instant) -> Option<(Path, FlowKey)> {
        let host = tables.host.filter(|host| packet.sender != Sender::Port(host.port))?;
        if self.returns.is_empty() {
            return None;
        }
        let ip = packet.ip()?;
        // An error quotes what its receiver has sent, which is the direction that opened the conversation.
        let opening = match (&ip.quote, ip.is_icmp_error()) {
            (Some(quote), _) => FlowKey::of_quote(quote),
            (None, true) => return None,
            (None, false) => FlowKey::of_conversation(ip).reversed(),
        };
        self.returns.holds(&opening, now).then(|| (to_host(host, tables), opening))
    }

    /// What a packet that does not go back says about where its conversation began.
    pub(super) fn entrance(&self, packet: &Packet, tables: &Tables, now: Instant) -> Entrance {
        let (Some(host), Some(ip)) = (tables.host, packet.ip()) else { return Entrance::Unknown };
        let opening = FlowKey::of_conversation(ip);
        if packet.sender != Sender::Port(host.port) {
            // In the middle of a connection the two directions may take different ways for a while; at its beginning they may not.
            let begins = begins(ip) && self.returns.holds(&opening, now);
            return if begins { Entrance::Elsewhere(opening) } else { Entrance::Unknown };
        }
        if ip.is_icmp_error() || !self.strays(ip, host, tables) {
            return Entrance::Unknown;
        }
        Entrance::Host { opening, first: ip.syn || ip.protocol == ip::UDP }
    }

    /// Whether replies to this packet would not come to the host port by themselves: they would go to a pod, to another node, or out of
    /// the cluster in this node's name. What a pod has asked for in the node's name may come by the kernel too, in pieces.
    fn strays(&self, ip: &Ip, host: Neighbour, tables: &Tables) -> bool {
        if let Some(neighbour) = tables.neighbours.get(&ip.src) {
            return neighbour.port != host.port;
        }
        match route::find(ip.src, &tables.routes4, &tables.routes6) {
            Ok(via) => matches!(via, Via::Node(_)),
            Err(_) if tables.masquerade.as_ref().is_some_and(|masquerade| masquerade.covers(ip.src)) => {
                let asked = |flow: FlowKey| self.snat.leaving(&flow.reversed()).is_some();
                ip.fragment.is_none() && FlowKey::of_named(ip).is_some_and(|flow| !asked(flow))
            }
            Err(_) => false,
        }
    }

    /// Remembers what [`Forwarder::entrance`] found.
    pub(super) fn enter(&self, entrance: Entrance, now: Instant) {
        match entrance {
            Entrance::Unknown => {}
            Entrance::Host { opening, first } => brought(&self.returns, &opening, first, now),
            Entrance::Reply(opening) => self.returns.keep(&opening, now),
            Entrance::Elsewhere(opening) => self.returns.close(&opening),
        }
    }
}

/// Whether a packet may begin a conversation whose ports were used before: the flow cache does not know of such.
pub(super) fn begins(ip: &Ip) -> bool {
    ip.syn || ip.protocol == ip::UDP
}

/// What the path of a flow has to do with the host port.
pub(super) fn tie(entrance: Entrance, packet: &Packet, tables: &Tables) -> Tie {
    let is_udp = packet.ip().is_some_and(|ip| ip.protocol == ip::UDP);
    match entrance {
        Entrance::Host { .. } => Tie::Brought,
        Entrance::Reply(_) => Tie::Returns,
        Entrance::Unknown | Entrance::Elsewhere(_) if tables.host.is_some() && is_udp => Tie::Free,
        Entrance::Unknown | Entrance::Elsewhere(_) => Tie::None,
    }
}

/// Whether a known flow still goes the way it went, with regard to the host port; tells that it is in use.
#[inline(never)]
pub(super) fn is_tied(entry: &mut Entry, signature: &Signature, returns: &Returns, now: Instant) -> bool {
    let version = returns.version();
    let flow = signature.flow();
    let holds = match entry.tie() {
        Tie::None => true,
        Tie::Brought => {
            brought(returns, &flow, false, now);
            true
        }
        Tie::Returns => {
            let opening = flow.reversed();
            returns.keep(&opening, now);
            // TCP's would have begun with a SYN if it were another one by now.
            flow.protocol() == ip::TCP || returns.holds(&opening, now)
        }
        Tie::Free => !returns.holds(&flow.reversed(), now) && !returns.holds(&flow, now),
    };
    if holds {
        entry.tied(version);
    }
    holds
}

/// A reply by UDP may be larger than what it replies to, and come in fragments, which have no ports.
fn brought(returns: &Returns, opening: &FlowKey, first: bool, now: Instant) {
    returns.open(opening, first, now);
    if opening.protocol() == ip::UDP {
        returns.open(&opening.of_fragments(), first, now);
    }
}

/// The path of what another node says in its own name to one of this node's pods.
pub(super) fn by_kernel(packet: &Packet, tables: &Tables) -> Option<Path> {
    let (Sender::Node(id), Some(host), Some(ip)) = (packet.sender, tables.host, packet.ip()) else { return None };
    let is_its_own = tables.node(id).is_some_and(|node| node.is_itself(ip.src));
    let to_pod = is_its_own && tables.neighbours.get(&ip.dst).is_some_and(|pod| pod.port != host.port);
    to_pod.then(|| to_host(host, tables))
}

/// The path to this node's kernel.
pub(super) fn to_host(host: Neighbour, tables: &Tables) -> Path {
    let macs = Macs { dst: host.mac, src: tables.gateway.mac };
    let rewrite = Rewrite::routed(macs, port_mtu(host.port, tables));
    Path { hop: Hop::Port(host.port), rewrite, entropy: 0 }
}
