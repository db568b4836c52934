//! The way back of what came by the host port: see [`crate::returns`].

use std::net::IpAddr;

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
        if ip.is_icmp_error() || !strays(ip.src, host, tables) {
            return Entrance::Unknown;
        }
        Entrance::Host { opening, first: ip.syn || ip.protocol == ip::UDP }
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

/// Whether replies to this source would not come to the host port by themselves.
fn strays(source: IpAddr, host: Neighbour, tables: &Tables) -> bool {
    match tables.neighbours.get(&source) {
        Some(neighbour) => neighbour.port != host.port,
        None => matches!(route::find(source, &tables.routes4, &tables.routes6), Ok(Via::Node(_))),
    }
}

/// The path to this node's kernel.
pub(super) fn to_host(host: Neighbour, tables: &Tables) -> Path {
    let macs = Macs { dst: host.mac, src: tables.gateway.mac };
    let rewrite = Rewrite::routed(macs, port_mtu(host.port, tables));
    Path { hop: Hop::Port(host.port), rewrite, entropy: 0 }
}
