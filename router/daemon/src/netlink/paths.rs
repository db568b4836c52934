//! How the kernel reaches an address: routes, neighbours, and being told of changes.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoData, InfoKind, InfoVlan, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteType, RouteVia};
use rustix::io::Errno;
use weft_encap::mac::Mac;

use super::{BUFFER, Link, Netlink, RTNLGRP_LINK, family, link_of};

/// Groups of notices, <https://elixir.bootlin.com/linux/v6.18/A/ident/rtnetlink_groups>: links, neighbours, addresses, routes and rules
/// of both families.
const GROUPS: [u32; 8] = [RTNLGRP_LINK, 3, 5, 7, 8, 9, 11, 19];

/// UDP, as routing rules may ask for it.
const UDP: u8 = 17;

/// A route to one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// The device by which it leaves.
    pub device: u32,
    /// The router on the way, if there is one.
    pub via: Option<IpAddr>,
    /// The longest packet, if the route says so itself.
    pub mtu: Option<u32>,
}

/// An entry of the neighbour tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Neighbour {
    /// Where it is.
    pub device: u32,
    /// Who it is.
    pub address: IpAddr,
    /// Its MAC, as long as that may be used.
    pub mac: Option<Mac>,
    /// Whether nobody has heard of it for a while.
    pub is_stale: bool,
}

/// An interface, and what it stands on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Detailed {
    /// The interface.
    pub link: Link,
    /// What the kernel calls its kind: a NIC has none.
    pub kind: Option<String>,
    /// The device under it and the tag of its frames, if it is a VLAN.
    pub vlan: Option<(u32, u16)>,
}

/// What changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// This is what is known of a neighbour from now on.
    Neighbour(Neighbour),
    /// Links, addresses, routes or rules.
    Routes,
    /// The kernel had more to tell than could be kept.
    Everything,
}

impl Netlink {
    /// A socket that is told of all that may change the way to an address.
    pub fn follow_paths() -> io::Result<Netlink> {
        let netlink = Netlink::open()?;
        for group in GROUPS {
            netlink.socket.add_membership(group)?;
        }
        netlink.socket.set_non_blocking(true)?;
        Ok(netlink)
    }

    /// Readable when there is a notice.
    pub fn readable(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// All that the kernel has told since this was asked last.
    pub fn changes(&mut self) -> io::Result<Vec<Change>> {
        let mut changes = Vec::new();
        loop {
            let mut buffer = Vec::with_capacity(BUFFER);
            match self.socket.recv(&mut buffer, 0) {
                Ok(_) => changes.extend(each(&buffer).filter_map(change_of)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(changes),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if Errno::from_io_error(&error) == Some(Errno::NOBUFS) => changes.push(Change::Everything),
                Err(error) => return Err(error),
            }
        }
    }

    /// An interface by its number.
    pub fn detailed(&mut self, index: u32) -> io::Result<Option<Detailed>> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        match self.ask(RouteNetlinkMessage::GetLink(message), NLM_F_ACK) {
            Ok(answers) => Ok(answers.into_iter().find_map(detailed_of)),
            Err(error) if Errno::from_io_error(&error) == Some(Errno::NODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// How tunnel packets from one address to another leave.
    ///
    /// # Errors
    /// The kernel's: `ENETUNREACH`, `EHOSTUNREACH` and others say that they do not.
    pub fn route(&mut self, from: IpAddr, to: IpAddr, port: u16) -> io::Result<Route> {
        let mut message = RouteMessage::default();
        let bits = if to.is_ipv4() { 32 } else { 128 };
        message.header.address_family = family(to);
        message.header.destination_prefix_length = bits;
        message.header.source_prefix_length = bits;
        message.attributes.push(RouteAttribute::Destination(route_address(to)));
        message.attributes.push(RouteAttribute::Source(route_address(from)));
        message.attributes.push(RouteAttribute::IpProto(UDP));
        message.attributes.push(RouteAttribute::Dport(port));
        let answers = self.ask(RouteNetlinkMessage::GetRoute(message), NLM_F_ACK)?;
        answers.into_iter().find_map(route_of).ok_or_else(|| Errno::HOSTUNREACH.into())
    }

    /// All neighbours.
    pub fn neighbours(&mut self) -> io::Result<Vec<Neighbour>> {
        let answers = self.ask(RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()), NLM_F_DUMP)?;
        Ok(answers.into_iter().filter_map(neighbour_of).collect())
    }

    /// Has the kernel find out whether a neighbour is there, as if something had been sent to it.
    pub fn use_neighbour(&mut self, device: u32, address: IpAddr) -> io::Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(address);
        message.header.ifindex = device;
        message.header.flags = NeighbourFlags::Use;
        message.attributes.push(NeighbourAttribute::Destination(address.into()));
        self.ask(RouteNetlinkMessage::NewNeighbour(message), NLM_F_ACK | NLM_F_CREATE).map(drop)
    }
}

fn route_address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    }
}

/// The messages of a datagram, those that cannot be understood left out.
fn each(mut bytes: &[u8]) -> impl Iterator<Item = RouteNetlinkMessage> {
    std::iter::from_fn(move || {
        while !bytes.is_empty() {
            // The header's first field is the message's length; the next one begins at a multiple of four.
            let len = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
            let (message, rest) = (bytes.get(..len)?, bytes.get(len.next_multiple_of(4).max(16)..).unwrap_or_default());
            bytes = rest;
            if let Ok(NetlinkMessage { payload: NetlinkPayload::InnerMessage(inner), .. }) =
                NetlinkMessage::deserialize(message)
            {
                return Some(inner);
            }
        }
        None
    })
}

fn change_of(notice: RouteNetlinkMessage) -> Option<Change> {
    match notice {
        RouteNetlinkMessage::DelNeighbour(message) => {
            let gone = neighbour_of(RouteNetlinkMessage::NewNeighbour(message))?;
            Some(Change::Neighbour(Neighbour { mac: None, ..gone }))
        }
        RouteNetlinkMessage::NewNeighbour(_) => neighbour_of(notice).map(Change::Neighbour),
        _ => Some(Change::Routes),
    }
}

fn detailed_of(answer: RouteNetlinkMessage) -> Option<Detailed> {
    let RouteNetlinkMessage::NewLink(message) = &answer else { return None };
    let (mut kind, mut under, mut tag) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Link(index) => under = Some(*index),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(found) => kind = Some(found.clone()),
                        LinkInfo::Data(InfoData::Vlan(facts)) => {
                            tag = facts.iter().find_map(|fact| match fact {
                                InfoVlan::Id(id) => Some(*id),
                                _ => None,
                            });
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    let vlan = if kind == Some(InfoKind::Vlan) { under.zip(tag) } else { None };
    Some(Detailed { kind: kind.map(|kind| kind.to_string()), vlan, link: link_of(answer)? })
}

fn route_of(answer: RouteNetlinkMessage) -> Option<Route> {
    let RouteNetlinkMessage::NewRoute(message) = answer else { return None };
    let (mut device, mut via, mut mtu, mut expires) = (None, None, None, 0);
    for attribute in message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => device = Some(index),
            RouteAttribute::Gateway(RouteAddress::Inet(address)) | RouteAttribute::Via(RouteVia::Inet(address)) => {
                via = Some(address.into());
            }
            RouteAttribute::Gateway(RouteAddress::Inet6(address)) | RouteAttribute::Via(RouteVia::Inet6(address)) => {
                via = Some(address.into());
            }
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            RouteAttribute::CacheInfo(cache) => expires = cache.expires,
            _ => {}
        }
    }
    if message.header.kind != RouteType::Unicast {
        return None;
    }
    // What expires was learned from ICMP, which anyone may have sent; what was configured stays.
    Some(Route { device: device?, via, mtu: mtu.filter(|_| expires == 0) })
}

fn neighbour_of(answer: RouteNetlinkMessage) -> Option<Neighbour> {
    let RouteNetlinkMessage::NewNeighbour(message) = answer else { return None };
    let (mut address, mut mac) = (None, None);
    for attribute in message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(found)) => address = Some(IpAddr::from(found)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(found)) => address = Some(found.into()),
            NeighbourAttribute::LinkLayerAddress(octets) => mac = <[u8; 6]>::try_from(octets).ok().map(Mac),
            _ => {}
        }
    }
    let state = message.header.state;
    let is_valid = matches!(
        state,
        NeighbourState::Reachable
            | NeighbourState::Stale
            | NeighbourState::Delay
            | NeighbourState::Probe
            | NeighbourState::Permanent
    );
    Some(Neighbour {
        device: message.header.ifindex,
        address: address?,
        mac: mac.filter(|_| is_valid),
        is_stale: state == NeighbourState::Stale,
    })
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::NetlinkHeader;
    use netlink_packet_route::route::RouteCacheInfo;

    use super::*;

    fn bytes(message: RouteNetlinkMessage) -> Vec<u8> {
        let mut message = NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }

    fn neighbour(state: NeighbourState) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        message.header.ifindex = 7;
        message.header.family = netlink_packet_route::AddressFamily::Inet;
        message.header.state = state;
        message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet([10, 0, 0, 2].into())));
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(vec![2, 0, 0, 0, 0, 2]));
        message
    }

    #[test]
    fn what_the_kernel_tells_in_one_datagram_is_taken_apart_and_the_unknown_left_out() {
        let known =
            |mac, is_stale| Change::Neighbour(Neighbour { device: 7, address: [10, 0, 0, 2].into(), mac, is_stale });
        let mac = Some(Mac([2, 0, 0, 0, 0, 2]));
        let all = [
            bytes(RouteNetlinkMessage::NewNeighbour(neighbour(NeighbourState::Reachable))),
            bytes(RouteNetlinkMessage::NewNeighbour(neighbour(NeighbourState::Stale))),
            bytes(RouteNetlinkMessage::NewNeighbour(neighbour(NeighbourState::Failed))),
            bytes(RouteNetlinkMessage::DelNeighbour(neighbour(NeighbourState::Reachable))),
            bytes(RouteNetlinkMessage::NewRoute(RouteMessage::default())),
        ]
        .concat();
        let changes: Vec<Change> = each(&all).filter_map(change_of).collect();
        assert_eq!(
            changes,
            [known(mac, false), known(mac, true), known(None, false), known(None, false), Change::Routes]
        );
        for len in 0..all.len() {
            let mut cut = all[..len].to_vec();
            assert!(each(&cut).count() <= 5);
            cut.iter_mut().for_each(|byte| *byte ^= 0x55);
            assert!(each(&cut).count() <= 5);
        }
    }

    #[test]
    fn a_configured_mtu_counts_and_a_learned_one_does_not() {
        let route = |expires| {
            let mut message = RouteMessage::default();
            message.header.kind = RouteType::Unicast;
            message.attributes.push(RouteAttribute::Oif(3));
            message.attributes.push(RouteAttribute::Gateway(RouteAddress::Inet([10, 0, 0, 1].into())));
            message.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(1400)]));
            let mut cache = [0; 32];
            cache[8..12].copy_from_slice(&u32::to_ne_bytes(expires));
            message.attributes.push(RouteAttribute::CacheInfo(RouteCacheInfo::parse(&cache).unwrap()));
            route_of(RouteNetlinkMessage::NewRoute(message)).unwrap()
        };
        assert_eq!(route(0), Route { device: 3, via: Some([10, 0, 0, 1].into()), mtu: Some(1400) });
        assert_eq!(route(500).mtu, None);
    }

    #[test]
    fn a_vlan_is_known_by_its_tag_and_the_device_under_it() {
        let mut message = LinkMessage::default();
        message.header.index = 9;
        message.attributes.push(LinkAttribute::IfName("eth0.100".into()));
        message.attributes.push(LinkAttribute::Link(2));
        let data = LinkInfo::Data(InfoData::Vlan(vec![InfoVlan::Id(100)]));
        message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Vlan), data]));
        let all = bytes(RouteNetlinkMessage::NewLink(message));
        let detailed = each(&all).find_map(detailed_of).unwrap();
        assert_eq!((detailed.kind.as_deref(), detailed.vlan), (Some("vlan"), Some((2, 100))));
        assert_eq!((detailed.link.index, detailed.link.name.as_str()), (9, "eth0.100"));
    }

    #[test]
    fn the_loopback_device_is_where_its_own_address_is() {
        let mut netlink = Netlink::open().unwrap();
        let detailed = netlink.detailed(1).unwrap().unwrap();
        assert_eq!((detailed.link.name.as_str(), detailed.kind, detailed.vlan), ("lo", None, None));
        assert_eq!(netlink.detailed(u32::MAX >> 1).unwrap(), None);
        // It is local, hence no way to anybody else.
        let here = "127.0.0.1".parse().unwrap();
        assert!(netlink.route(here, here, 8472).is_err());
    }
}
