//! Who may send what: source checks.
//!
//! A pod speaks for its own MAC and addresses and for nobody else's, in Ethernet, IP, ARP and neighbour discovery; it is not a
//! router, and not a DHCP server unless its port is trusted to be one. A pod that waits for its address asks for it, and says nothing
//! else. A node speaks for the addresses that live on it, and as itself. This node's own kernel is a router, which passes
//! on what others sent: what comes by the host port may have any source. Link-local traffic
//! (`fe80::`, `::` and `0.0.0.0`) passes where the protocols that configure a link need it: towards link-local
//! destinations, and not in another's name.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use weft_encap::icmp;
use weft_encap::ip;
use weft_encap::mac::Mac;

use crate::drop_reason::DropReason;
use crate::packet::{Discovery, Ip, Network, Packet};
use crate::port::PortId;
use crate::tables::{Dhcp, ExactMap, Gateway, Mode, Neighbour, Node, Pod};

/// To this port only servers and relays send, from whichever port (RFC 2131, section 4.1; RFC 8415, section 7.2).
const DHCP_CLIENT: u16 = 68;
const DHCP_SERVER: u16 = 67;
const DHCPV6_CLIENT: u16 = 546;

/// Who is known on this node: what nobody else may claim.
#[derive(Copy, Clone)]
pub struct Known<'a> {
    /// The router itself.
    pub gateway: &'a Gateway,
    /// Local pods by address.
    pub neighbours: &'a ExactMap<IpAddr, Neighbour>,
    /// Local pods by MAC.
    pub macs: &'a ExactMap<Mac, PortId>,
    /// This node's own MAC between nodes.
    pub vtep_mac: Mac,
}

impl Known<'_> {
    fn is_taken(&self, address: IpAddr) -> bool {
        self.gateway.owns(address) || self.neighbours.contains_key(&address)
    }

    fn is_taken_mac(&self, mac: Mac) -> bool {
        mac == self.gateway.mac || mac == self.vtep_mac || self.macs.contains_key(&mac)
    }
}

/// Checks what a pod sent against its attachment.
///
/// # Errors
/// What it must not claim.
pub fn check_pod(pod: &Pod, packet: &Packet, known: Known<'_>) -> Result<(), DropReason> {
    if packet.src != pod.mac {
        return Err(DropReason::SourceMac);
    }
    if pod.dhcp == Dhcp::Asking && !packet.ip().is_some_and(asks_for_address) {
        return Err(DropReason::AddressPending);
    }
    match &packet.network {
        Network::Arp(arp) => {
            let (sender, is_probe) = (arp.sender(), arp.is_probe());
            let own = arp.sha == pod.mac && (is_probe || pod.ipv4.contains(&sender));
            if own { Ok(()) } else { Err(DropReason::ArpSpoof) }
        }
        Network::Ip(ip) => {
            check_pod_address(pod, ip, known)?;
            check_pod_message(pod, ip, known)
        }
        Network::Other => Ok(()),
    }
}

/// Checks what this node's own kernel sent by the host port. It routes, and translates addresses in both directions, so a packet may be
/// from anybody, also from a pod; but it speaks with its own MAC, and of neighbours it claims no one else's name.
///
/// # Errors
/// What it must not claim.
pub fn check_host(host: &Pod, packet: &Packet, known: Known<'_>) -> Result<(), DropReason> {
    if packet.src != host.mac {
        return Err(DropReason::SourceMac);
    }
    match &packet.network {
        Network::Arp(arp) => {
            // It asks in the name of any of its addresses (arp_announce), which are not all known here.
            let sender = arp.sender();
            let honest = host.ipv4.contains(&sender) || !known.is_taken(sender.into());
            if arp.sha == host.mac && honest { Ok(()) } else { Err(DropReason::ArpSpoof) }
        }
        Network::Ip(ip) if is_router_message(ip) => Err(DropReason::RouterMessage),
        Network::Ip(ip) => match &ip.neighbour {
            Some(message) => check_discovery(host, message, ip.src.is_unspecified(), known),
            None => Ok(()),
        },
        Network::Other => Ok(()),
    }
}

fn check_pod_address(pod: &Pod, ip: &Ip, known: Known<'_>) -> Result<(), DropReason> {
    let allowed = match (ip.src, ip.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            pod.ipv4.contains(&src) || (src.is_unspecified() && (dst.is_broadcast() || is_link_multicast(dst)))
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let own = pod.ipv6.contains(&src) || src == pod.mac.link_local();
            let link = src.is_unicast_link_local() && is_on_link(dst) && !known.is_taken(src.into());
            own || link || (src.is_unspecified() && dst.is_multicast() && is_on_link(dst))
        }
        _ => false,
    };
    if allowed { Ok(()) } else { Err(DropReason::SourceIp) }
}

fn check_pod_message(pod: &Pod, ip: &Ip, known: Known<'_>) -> Result<(), DropReason> {
    match (ip.src, ip.protocol) {
        _ if pod.dhcp != Dhcp::Server && answers_dhcp(ip) => Err(DropReason::DhcpServer),
        _ if is_router_message(ip) => Err(DropReason::RouterMessage),
        _ => match &ip.neighbour {
            Some(message) => check_discovery(pod, message, ip.src.is_unspecified(), known),
            None => Ok(()),
        },
    }
}

/// A solicitation may ask for anything but must not lie about its sender; one without a sender tests an address and must not test
/// another's, which would make its owner give it up. An advertisement tells of own addresses only.
fn check_discovery(pod: &Pod, message: &Discovery, is_probe: bool, known: Known<'_>) -> Result<(), DropReason> {
    let own_mac = message.mac.is_none_or(|mac| mac == pod.mac);
    let own = pod.ipv6.contains(&message.target) || message.target == pod.mac.link_local();
    let taken = known.is_taken(message.target.into());
    let honest = match (message.solicitation, is_probe) {
        (true, false) => own_mac,
        (true, true) => own || !taken,
        (false, _) => own_mac && (own || (message.target.is_unicast_link_local() && !taken)),
    };
    if honest { Ok(()) } else { Err(DropReason::NdSpoof) }
}

/// Checks what another node sent: its inner source must live there or be the node itself (routed), or at least not be here (bridged).
///
/// # Errors
/// What it must not claim.
pub fn check_node(node: &Node, mode: Mode, packet: &Packet, known: Known<'_>) -> Result<(), DropReason> {
    match (mode, &packet.network) {
        (Mode::Routed, Network::Ip(ip)) => {
            let theirs = node.is_itself(ip.src) || node.ranges.iter().any(|range| range.contains(&ip.src));
            if theirs { Ok(()) } else { Err(DropReason::TunnelSource) }
        }
        (Mode::Routed, _) => Err(DropReason::UnsupportedType),
        (Mode::Bridged, network) => {
            if known.is_taken_mac(packet.src) || !packet.src.is_unicast() {
                return Err(DropReason::TunnelSource);
            }
            check_bridged(network, known)
        }
    }
}

fn check_bridged(network: &Network, known: Known<'_>) -> Result<(), DropReason> {
    let taken = match network {
        Network::Arp(arp) => known.is_taken(arp.sender().into()) || known.is_taken_mac(arp.sha),
        Network::Ip(ip) => {
            let claims = |message: &Discovery| {
                let target = !message.solicitation && known.is_taken(message.target.into());
                target || message.mac.is_some_and(|mac| known.is_taken_mac(mac))
            };
            if is_router_message(ip) {
                return Err(DropReason::RouterMessage);
            }
            known.is_taken(ip.src) || ip.neighbour.as_ref().is_some_and(claims)
        }
        Network::Other => false,
    };
    if taken { Err(DropReason::TunnelSource) } else { Ok(()) }
}

fn answers_dhcp(ip: &Ip) -> bool {
    let client = if ip.src.is_ipv4() { DHCP_CLIENT } else { DHCPV6_CLIENT };
    ip.protocol == ip::UDP && ip.dst_port == Some(client)
}

/// A client that has no address (RFC 2131, section 4.1): from 0.0.0.0, to everybody.
fn asks_for_address(ip: &Ip) -> bool {
    let ends = (ip.src, ip.dst) == (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::BROADCAST.into());
    ends && ip.protocol == ip::UDP && ip.ports == Some((DHCP_CLIENT, DHCP_SERVER))
}

fn is_router_message(ip: &Ip) -> bool {
    match (ip.src, ip.icmp) {
        (IpAddr::V4(_), Some((kind, _))) => kind == icmp::v4::REDIRECT,
        (IpAddr::V6(_), Some((kind, _))) => kind == icmp::v6::ROUTER_ADVERTISEMENT || kind == icmp::v6::REDIRECT,
        (_, None) => false,
    }
}

/// 224.0.0.0/24, RFC 5771 section 4: never forwarded.
fn is_link_multicast(address: Ipv4Addr) -> bool {
    address.octets()[..3] == [224, 0, 0]
}

/// A link-local destination, unicast or multicast (RFC 4291, sections 2.5.6 and 2.7).
fn is_on_link(address: Ipv6Addr) -> bool {
    let [first, second, ..] = address.octets();
    address.is_unicast_link_local() || (first == 0xff && second & 0x0f == 2)
}
