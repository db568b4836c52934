//! The kernel's main table as a whole: all routes to each destination, with all their next hops.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteNextHop, RouteNextHopFlags,
    RouteType, RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::Netlink;

/// Where a route leads next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NextHop {
    /// The device by which it leaves.
    pub device: u32,
    /// The router there; none if the destination itself is there.
    pub via: Option<IpAddr>,
    /// Its share among others.
    pub weight: u16,
}

/// A route of the main table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableRoute {
    /// Where it leads.
    pub destination: IpNet,
    /// Of several routes to one destination the one with the least holds.
    pub metric: u32,
    /// Who made it: `rtm_protocol`.
    pub protocol: u8,
    /// Its next hops; none if it leads nowhere (`unreachable`, `blackhole`).
    pub hops: Vec<NextHop>,
    /// The longest packet, if the route says so.
    pub mtu: Option<u32>,
}

impl Netlink {
    /// All routes of the main table.
    pub fn main_table(&mut self) -> io::Result<Vec<TableRoute>> {
        let mut all = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let answers = self.ask(RouteNetlinkMessage::GetRoute(message), NLM_F_DUMP)?;
            all.extend(answers.into_iter().filter_map(|answer| match answer {
                RouteNetlinkMessage::NewRoute(message) => table_route(&message),
                _ => None,
            }));
        }
        Ok(all)
    }
}

/// `None` for other tables, clones, and what is neither IPv4 nor IPv6.
fn table_route(message: &RouteMessage) -> Option<TableRoute> {
    let header = &message.header;
    let unspecified: IpAddr = match header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    if header.flags.contains(RouteFlags::Cloned) || header.table != RouteHeader::RT_TABLE_MAIN {
        return None;
    }
    let mut route = TableRoute {
        destination: IpNet::from(unspecified),
        metric: 0,
        protocol: header.protocol.into(),
        hops: Vec::new(),
        mtu: None,
    };
    let (mut destination, mut device) = (unspecified, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = address_of(address)?,
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Oif(index) => device = Some(*index),
            RouteAttribute::MultiPath(hops) => route.hops.extend(hops.iter().filter_map(next_hop)),
            RouteAttribute::Metrics(metrics) => {
                route.mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    // RTNH_F_DEAD and RTNH_F_LINKDOWN stand in the route itself if it has one next hop.
    let dead = header.flags.bits() & u32::from((RouteNextHopFlags::Dead | RouteNextHopFlags::Linkdown).bits()) != 0;
    if let Some(device) = device.filter(|_| !dead && route.hops.is_empty()) {
        route.hops.push(NextHop { device, via: via_of(&message.attributes), weight: 1 });
    }
    if header.kind != RouteType::Unicast {
        route.hops.clear();
    }
    route.destination = IpNet::new(destination, header.destination_prefix_length).ok()?;
    Some(route)
}

/// One of several next hops; none if it is dead.
fn next_hop(hop: &RouteNextHop) -> Option<NextHop> {
    let dead = hop.flags.intersects(RouteNextHopFlags::Dead | RouteNextHopFlags::Linkdown);
    let weight = u16::from(hop.hops) + 1;
    (!dead).then(|| NextHop { device: hop.interface_index, via: via_of(&hop.attributes), weight })
}

fn via_of(attributes: &[RouteAttribute]) -> Option<IpAddr> {
    attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(address) => address_of(address),
        RouteAttribute::Via(RouteVia::Inet(address)) => Some((*address).into()),
        RouteAttribute::Via(RouteVia::Inet6(address)) => Some((*address).into()),
        _ => None,
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

    fn message() -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.kind = RouteType::Unicast;
        message.header.destination_prefix_length = 24;
        message.header.protocol = 12.into();
        message.attributes.push(RouteAttribute::Destination(RouteAddress::Inet([10, 244, 2, 0].into())));
        message.attributes.push(RouteAttribute::Priority(32));
        message
    }

    #[test]
    fn next_hops_of_several_ways_are_told_apart_and_dead_ones_left_out() {
        let mut message = message();
        let gateway = |last| RouteAttribute::Gateway(RouteAddress::Inet([10, 0, 0, last].into()));
        let hop = |device, weight: u8, attribute, flags| {
            let mut hop = RouteNextHop::default();
            (hop.interface_index, hop.hops, hop.flags) = (device, weight - 1, flags);
            hop.attributes.push(attribute);
            hop
        };
        let over_v6 = RouteAttribute::Via(RouteVia::Inet6("fe80::1".parse().unwrap()));
        message.attributes.push(RouteAttribute::MultiPath(vec![
            hop(3, 1, gateway(1), RouteNextHopFlags::empty()),
            hop(4, 3, over_v6, RouteNextHopFlags::Onlink),
            hop(5, 1, gateway(2), RouteNextHopFlags::Linkdown),
        ]));
        let route = table_route(&message).unwrap();
        let expected = [
            NextHop { device: 3, via: Some([10, 0, 0, 1].into()), weight: 1 },
            NextHop { device: 4, via: Some("fe80::1".parse().unwrap()), weight: 3 },
        ];
        assert_eq!((route.hops.as_slice(), route.metric, route.protocol), (&expected[..], 32, 12));
        assert_eq!(route.destination.to_string(), "10.244.2.0/24");
    }

    #[test]
    fn a_route_to_nowhere_has_no_next_hop_and_other_tables_have_no_routes() {
        let mut message = message();
        message.attributes.push(RouteAttribute::Oif(3));
        let direct = NextHop { device: 3, via: None, weight: 1 };
        assert_eq!(table_route(&message).unwrap().hops, [direct]);
        message.header.kind = RouteType::Unreachable;
        assert_eq!(table_route(&message).unwrap().hops, []);
        message.header.table = 100;
        assert_eq!(table_route(&message), None);
    }

    #[test]
    fn the_main_table_of_this_machine_can_be_read() {
        let table = Netlink::open().unwrap().main_table().unwrap();
        assert!(table.iter().all(|route| route.hops.iter().all(|hop| hop.device > 0)), "{table:?}");
    }
}
