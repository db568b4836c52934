//! The kernel's routes, and an interface's addresses without the routes that the kernel would make of them.

use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType, RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::io::Errno;

use super::{BUFFER, Netlink, RTNLGRP_LINK, family};

pub use crate::control::config::routes::PROTOCOL;

/// <https://elixir.bootlin.com/linux/v6.18/A/ident/RTNLGRP_IPV4_IFADDR>.
const RTNLGRP_IPV4_IFADDR: u32 = 5;
const RTNLGRP_IPV4_ROUTE: u32 = 7;
const RTNLGRP_IPV6_IFADDR: u32 = 9;
const RTNLGRP_IPV6_ROUTE: u32 = 11;

/// A route of the main table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct KernelRoute {
    /// Where it leads.
    pub destination: IpNet,
    /// By whom; directly if by nobody.
    pub gateway: Option<IpAddr>,
    /// The interface's number; a route may have none (blackhole), or several.
    pub device: Option<u32>,
    /// The source address of what this machine sends that way by itself.
    pub source: Option<IpAddr>,
    /// Who made it: `rtm_protocol`.
    pub protocol: u8,
    /// Of several routes to one destination the one with the least holds; 0 is what the kernel takes where none is given.
    pub metric: u32,
    /// Whether it leads nowhere: packets are answered as unreachable.
    pub unreachable: bool,
}

/// What the kernel takes for routes by IPv6: <https://elixir.bootlin.com/linux/v6.18/A/ident/IP6_RT_PRIO_USER>.
const USUAL_METRIC_V6: u32 = 1024;

/// What has changed in this namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// The interface of this number, or one of its addresses.
    Interface(u32),
    /// A route to this destination.
    Route(IpNet),
    /// More than the socket could hold: anything.
    Much,
}

impl Netlink {
    /// Makes a route. One to the same destination that is there already is not touched: `EEXIST`.
    pub fn add_main_route(&mut self, route: &KernelRoute) -> io::Result<()> {
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        self.ask(RouteNetlinkMessage::NewRoute(message_of(route)), flags).map(drop)
    }

    /// Takes a route away; one that is gone already is no error.
    pub fn delete_route(&mut self, route: &KernelRoute) -> io::Result<()> {
        match self.ask(RouteNetlinkMessage::DelRoute(message_of(route)), NLM_F_ACK) {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::SRCH) => Ok(()),
            result => result.map(drop),
        }
    }

    /// All routes of the main table.
    pub fn main_routes(&mut self) -> io::Result<Vec<KernelRoute>> {
        let mut all = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let answers = self.ask(RouteNetlinkMessage::GetRoute(message), NLM_F_DUMP)?;
            all.extend(answers.into_iter().filter_map(|answer| match answer {
                RouteNetlinkMessage::NewRoute(message) => route_of(&message),
                _ => None,
            }));
        }
        Ok(all)
    }

    /// Gives an interface an address, at once and without a route to its prefix.
    pub fn add_bare_address(&mut self, index: u32, address: IpNet) -> io::Result<()> {
        let mut message = address_message(index, address);
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad | AddressFlags::Noprefixroute));
        self.ask(RouteNetlinkMessage::NewAddress(message), NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL).map(drop)
    }

    /// Takes an address away from an interface; one that is gone already is no error.
    pub fn delete_address(&mut self, index: u32, address: IpNet) -> io::Result<()> {
        match self.ask(RouteNetlinkMessage::DelAddress(address_message(index, address)), NLM_F_ACK) {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::ADDRNOTAVAIL) => Ok(()),
            result => result.map(drop),
        }
    }

    /// A socket that is told of changes to interfaces, addresses and routes.
    pub fn follow_all() -> io::Result<Netlink> {
        let netlink = Netlink::open()?;
        for group in [RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_ROUTE] {
            // A kernel without IPv6 has no such groups; the others are there.
            match netlink.socket.add_membership(group) {
                Err(error) if [RTNLGRP_IPV6_IFADDR, RTNLGRP_IPV6_ROUTE].contains(&group) => {
                    tracing::debug!(group, %error, "no notifications");
                }
                result => result?,
            }
        }
        Ok(netlink)
    }

    /// Waits for the next change. For this the socket has to be [`Netlink::follow_all`]'s.
    pub fn await_change(&mut self) -> io::Result<Change> {
        loop {
            let mut buffer = Vec::with_capacity(BUFFER);
            match self.socket.recv(&mut buffer, 0) {
                Ok(_) => {}
                Err(error) if Errno::from_io_error(&error) == Some(Errno::NOBUFS) => return Ok(Change::Much),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            // One message comes in each datagram.
            let Ok(told) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&buffer) else { continue };
            if let NetlinkPayload::InnerMessage(told) = told.payload
                && let Some(change) = change_of(&told)
            {
                return Ok(change);
            }
        }
    }
}

fn change_of(told: &RouteNetlinkMessage) -> Option<Change> {
    match told {
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => {
            Some(Change::Interface(link.header.index))
        }
        RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
            Some(Change::Interface(address.header.index))
        }
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
            route_of(route).map(|route| Change::Route(route.destination))
        }
        _ => None,
    }
}

fn address_message(index: u32, address: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.addr());
    message.header.prefix_len = address.prefix_len();
    message.header.index = index;
    message.attributes.push(AddressAttribute::Local(address.addr()));
    message.attributes.push(AddressAttribute::Address(address.addr()));
    message
}

fn message_of(route: &KernelRoute) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(route.destination.addr());
    message.header.destination_prefix_length = route.destination.prefix_len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::from(route.protocol);
    let is_far = route.gateway.is_some() || route.unreachable;
    message.header.scope = if is_far { RouteScope::Universe } else { RouteScope::Link };
    message.header.kind = if route.unreachable { RouteType::Unreachable } else { RouteType::Unicast };
    message.attributes.push(RouteAttribute::Destination(route.destination.network().into()));
    if let Some(gateway) = route.gateway {
        // No address of ours has the gateway in its prefix.
        message.header.flags = RouteFlags::Onlink;
        message.attributes.push(match (route.destination, gateway) {
            (IpNet::V4(_), IpAddr::V6(gateway)) => RouteAttribute::Via(RouteVia::Inet6(gateway)),
            _ => RouteAttribute::Gateway(gateway.into()),
        });
    }
    if route.metric > 0 {
        message.attributes.push(RouteAttribute::Priority(route.metric));
    }
    message.attributes.extend(route.source.map(|source| RouteAttribute::PrefSource(source.into())));
    message.attributes.extend(route.device.map(RouteAttribute::Oif));
    message
}

/// `None` for other tables, clones, and what is neither IPv4 nor IPv6.
fn route_of(message: &RouteMessage) -> Option<KernelRoute> {
    let unspecified: IpAddr = match message.header.address_family {
        AddressFamily::Inet => std::net::Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    let cloned = message.header.flags.contains(RouteFlags::Cloned);
    if cloned || message.header.table != RouteHeader::RT_TABLE_MAIN {
        return None;
    }
    let (mut destination, mut gateway, mut device, mut source, mut metric) = (unspecified, None, None, None, 0);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = address_of(address)?,
            RouteAttribute::Gateway(address) => gateway = address_of(address),
            RouteAttribute::Via(RouteVia::Inet6(address)) => gateway = Some((*address).into()),
            RouteAttribute::Priority(given) => metric = *given,
            RouteAttribute::PrefSource(address) => source = address_of(address),
            RouteAttribute::Oif(index) => device = Some(*index),
            _ => {}
        }
    }
    let destination = IpNet::new(destination, message.header.destination_prefix_length).ok()?;
    if metric == USUAL_METRIC_V6 && destination.addr().is_ipv6() {
        metric = 0;
    }
    let unreachable = message.header.kind == RouteType::Unreachable;
    // By IPv6 such a route leads to the loopback interface.
    let device = device.filter(|_| !unreachable);
    Some(KernelRoute {
        destination,
        gateway,
        device,
        source,
        protocol: message.header.protocol.into(),
        metric,
        unreachable,
    })
}

fn address_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_is_the_same_after_it_was_a_message() {
        for (destination, gateway, source) in [
            ("10.244.2.0/24", Some("10.244.1.1"), "10.244.1.254"),
            ("10.244.3.0/24", Some("fd00::3"), "10.244.1.254"),
            ("fd00:10:244::/48", None, "fd00:10:244:1::9"),
        ] {
            let route = KernelRoute {
                destination: destination.parse().unwrap(),
                gateway: gateway.map(|gateway: &str| gateway.parse().unwrap()),
                device: Some(7),
                source: Some(source.parse().unwrap()),
                protocol: PROTOCOL,
                metric: 0,
                unreachable: false,
            };
            assert_eq!(route_of(&message_of(&route)), Some(route));
            let nowhere =
                KernelRoute { gateway: None, device: None, source: None, metric: 77, unreachable: true, ..route };
            assert_eq!(route_of(&message_of(&nowhere)), Some(nowhere));
        }
    }
}
