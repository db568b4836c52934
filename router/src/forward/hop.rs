//! Where a packet goes next: by MAC within its segment, by longest prefix if it is addressed to the router.

use weft_encap::mac::Mac;

use super::{AddressedTo, Forwarder, returning};
use crate::drop_reason::DropReason;
use crate::packet::{Ip, Packet};
use crate::path::{Hop, Learned, Macs, Path, Rewrite, Sender};
use crate::port::PortId;
use crate::route;
use crate::tables::{GroupId, Mode, Neighbour, Role, Tables, Via};
use crate::time::Instant;

/// A hop, what is rewritten on the way there, and the learned MAC that it rests on.
pub(super) type Way = (Hop, Rewrite, Option<Learned>);

impl Forwarder {
    pub(super) fn find_hop(
        &self,
        packet: &Packet,
        to: &AddressedTo,
        tables: &Tables,
        hash: u64,
        now: Instant,
    ) -> Result<Way, DropReason> {
        match (to, packet.ip()) {
            (AddressedTo::Neighbour(mac), _) => self.bridge_to(*mac, packet, tables, now),
            (AddressedTo::Router, Some(ip)) => route_to(ip, packet, tables, hash),
            (AddressedTo::Router | AddressedTo::Group, _) => Err(DropReason::NotIp),
        }
    }

    /// By MAC: a local pod's stands in the tables, others are learned; an unknown one may be anywhere among the other nodes.
    fn bridge_to(&self, mac: Mac, packet: &Packet, tables: &Tables, now: Instant) -> Result<Way, DropReason> {
        let bridged = Rewrite::bridged;
        if let Some(&port) = tables.macs.get(&mac) {
            if packet.sender == Sender::Port(port) {
                return Err(DropReason::Hairpin);
            }
            return Ok((Hop::Port(port), bridged(port_mtu(port, tables)), None));
        }
        match (packet.sender, tables.mode) {
            // Never from tunnel to tunnel: nodes reach each other without us.
            (Sender::Node(_), _) => Err(DropReason::NotForUs),
            (Sender::Port(_), Mode::Routed) => Err(DropReason::UnknownMac),
            (Sender::Port(_), Mode::Bridged) => match self.fdb.find(mac, now) {
                Some(learned) if tables.node(learned.node).is_some() => Ok((
                    Hop::Node(learned.node),
                    bridged(tables.mtu_to(learned.node, packet.ip().is_some_and(|ip| ip.dst.is_ipv6()))),
                    Some(learned),
                )),
                _ if tables.members.is_empty() => Err(DropReason::UnknownMac),
                _ => Ok((Hop::Flood { ports: false, nodes: true }, bridged(tables.tunnel_mtu), None)),
            },
        }
    }
}

/// By longest prefix, then by neighbour if the prefix is here.
fn route_to(ip: &Ip, packet: &Packet, tables: &Tables, hash: u64) -> Result<Way, DropReason> {
    let routed = |dst, src, mtu| Rewrite::routed(Macs { dst, src }, mtu);
    match route::find(ip.dst, &tables.routes4, &tables.routes6) {
        // What leads out of the pod network is this node's to route.
        Err(DropReason::NoRoute) if let Some(host) = host_for(packet, tables) => {
            let Path { hop, rewrite, .. } = returning::to_host(host, tables);
            Ok((hop, rewrite, None))
        }
        Err(reason) => Err(reason),
        Ok(Via::Local) => {
            let neighbour = tables.neighbours.get(&ip.dst).ok_or(DropReason::UnknownNeighbour)?;
            let rewrite = routed(neighbour.mac, tables.gateway.mac, port_mtu(neighbour.port, tables));
            Ok((Hop::Port(neighbour.port), rewrite, None))
        }
        Ok(Via::Node(_) | Via::Uplink(_)) if matches!(packet.sender, Sender::Node(_)) => Err(DropReason::NotForUs),
        Ok(Via::Uplink(group)) => by_uplink(group, packet, tables, hash),
        Ok(Via::Node(id)) => {
            let node = tables.node(id).ok_or(DropReason::NoRoute)?;
            Ok((Hop::Node(id), routed(node.vtep_mac, tables.vtep_mac, tables.mtu_to(id, ip.dst.is_ipv6())), None))
        }
    }
}

/// To the next hop that a flow with this hash has in a group. While none is known the node's kernel routes the packet, and looks for one.
pub(super) fn by_uplink(group: GroupId, packet: &Packet, tables: &Tables, hash: u64) -> Result<Way, DropReason> {
    if let Some(next) = tables.group(group).choose(hash) {
        return Ok((Hop::Port(next.port), Rewrite::routed(next.macs, next.mtu), None));
    }
    let host = host_for(packet, tables).ok_or(DropReason::NoNextHop)?;
    let Path { hop, rewrite, .. } = returning::to_host(host, tables);
    Ok((hop, rewrite, None))
}

/// The host port, for packets of this node's pods: what it sent itself it has no use for, and other nodes have their own.
fn host_for(packet: &Packet, tables: &Tables) -> Option<Neighbour> {
    tables.host.filter(|host| matches!(packet.sender, Sender::Port(port) if port != host.port))
}

/// How long packets of a conversation may be: this one's on its way, and those that go back to the node that it came from.
pub(super) fn mtu_both_ways(path: &Path, packet: &Packet, tables: &Tables) -> u32 {
    match packet.sender {
        Sender::Node(id) => path.rewrite.mtu.min(tables.mtu_to(id, packet.ip().is_some_and(|ip| ip.src.is_ipv6()))),
        Sender::Port(_) => path.rewrite.mtu,
    }
}

/// How long a packet may be that leaves by a port.
pub(super) fn port_mtu(port: PortId, tables: &Tables) -> u32 {
    match tables.role(port) {
        Some(Role::Pod(pod) | Role::Host(pod)) => pod.mtu,
        Some(Role::Underlay | Role::Uplink) | None => 0,
    }
}
