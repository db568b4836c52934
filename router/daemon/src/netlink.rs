//! Route netlink, synchronous: one request, its answers, done.
//!
//! A socket belongs to the namespace of the thread that opens it, for good. So [`Netlink::open`] is called on the thread that
//! is in the right one, and there is no runtime in between that could move the work elsewhere.

pub mod follower;
pub mod paths;

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use ipnet::IpNet;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo,
    LinkMessage,
};
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope,
    RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rustix::io::Errno;
use weft_encap::mac::Mac;

use crate::control::host::{Host, Interface};

pub mod routes;
pub mod table;

/// A netlink message of one dump is at most this long; the kernel sizes its own by what the reader offers, up to 32 KiB.
const BUFFER: usize = 32 * 1024;
/// So often a list is asked for that changes while it is read. Then it is taken as it is: whoever follows changes hears of these, too.
const LISTS: usize = 5;

/// <https://elixir.bootlin.com/linux/v6.18/A/ident/RTNLGRP_LINK>.
const RTNLGRP_LINK: u32 = 1;

/// A netlink socket of the thread's network namespace.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

/// An interface as the kernel shows it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MAC, if it has one of six octets.
    pub mac: Option<Mac>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it was set up.
    pub up: bool,
    /// Whether it has carrier.
    pub carrier: bool,
    /// Segments that a superframe which leaves by it may stand for.
    pub gso_max_segments: u32,
}

/// What to change of an interface; `None` and `false` leave it as it is.
#[derive(Debug, Clone, Copy, Default)]
pub struct LinkChange<'a> {
    /// A new name.
    pub name: Option<&'a str>,
    /// A new MAC.
    pub mac: Option<Mac>,
    /// A new MTU in bytes.
    pub mtu: Option<u32>,
    /// Frames that its transmit queue holds.
    pub queue: Option<u32>,
    /// Segments that a superframe may stand for.
    pub gso_max_segments: Option<u32>,
    /// The namespace to move it to.
    pub namespace: Option<BorrowedFd<'a>>,
    /// Set it up.
    pub up: bool,
    /// Set it down.
    pub down: bool,
}

/// A veth to be made: its host end here, its other end in a pod. Neither end speaks by itself.
#[derive(Debug, Clone, Copy)]
pub struct VethPair<'a> {
    /// The name of the host end.
    pub name: &'a str,
    /// Its number; the kernel's choice if it is zero.
    pub index: u32,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is up at once. Then the namespace has to see to it that it stays silent.
    pub up: bool,
    /// What the other end is: its namespace, here if there is none, and name, MAC, MTU and queue.
    pub pod: LinkChange<'a>,
    /// How many queues the host end sends by, each of which is received by one of the pod's end.
    pub queues: u32,
}

/// A route by an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Where to.
    pub destination: IpNet,
    /// By whom; `None` if the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// The gateway is reached directly although no address of ours is in its prefix.
    pub on_link: bool,
    /// MTU along it, in bytes.
    pub mtu: Option<u32>,
    /// The largest segment that TCP announces along it, in bytes.
    pub advmss: Option<u32>,
    /// Its metric.
    pub priority: Option<u32>,
    /// The number of its table.
    pub table: u32,
    /// Its scope; `None`: what fits the gateway.
    pub scope: Option<u8>,
}

impl Route {
    /// A route of the main table without a gateway.
    pub fn new(destination: IpNet) -> Route {
        let table = RouteHeader::RT_TABLE_MAIN.into();
        let (gateway, on_link) = (None, false);
        Route { destination, gateway, on_link, mtu: None, advmss: None, priority: None, table, scope: None }
    }
}

impl Netlink {
    /// A socket of the namespace that the calling thread is in.
    pub fn open() -> io::Result<Netlink> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Netlink { socket, sequence: 0 })
    }

    /// The interface with this name; `None` if there is none.
    pub fn link(&mut self, name: &str) -> io::Result<Option<Link>> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        match self.ask(RouteNetlinkMessage::GetLink(message), NLM_F_ACK) {
            Ok(answers) => Ok(answers.into_iter().find_map(link_of)),
            Err(error) if error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All interfaces.
    pub fn links(&mut self) -> io::Result<Vec<Link>> {
        let answers = self.ask(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP)?;
        Ok(answers.into_iter().filter_map(link_of).collect())
    }

    /// Changes an interface.
    pub fn change_link(&mut self, index: u32, change: LinkChange<'_>) -> io::Result<()> {
        let message = link_message(index, change);
        self.ask(RouteNetlinkMessage::SetLink(message), NLM_F_ACK).map(drop)
    }

    /// The same for an interface that is down, and has it make its link-local address of its MAC when it comes up. Where the interface has
    /// no IPv6 there is nothing to be made.
    ///
    /// This could be asked of `/proc/sys` as well, but while anybody else changes interfaces that answers by spinning.
    pub fn change_new_link(&mut self, index: u32, change: LinkChange<'_>) -> io::Result<()> {
        let mut message = link_message(index, change);
        message.attributes.push(address_generation(In6AddrGenMode::Eui64));
        match self.ask(RouteNetlinkMessage::SetLink(message), NLM_F_ACK) {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::AFNOSUPPORT) => self.change_link(index, change),
            result => result.map(drop),
        }
    }

    /// Makes a veth.
    pub fn add_veth(&mut self, pair: VethPair<'_>) -> io::Result<()> {
        let mut peer = LinkMessage::default();
        peer.attributes.extend(attributes(pair.pod));
        peer.attributes.extend([LinkAttribute::NumTxQueues(1), LinkAttribute::NumRxQueues(pair.queues)]);
        let host = LinkChange { name: Some(pair.name), mtu: Some(pair.mtu), up: pair.up, ..LinkChange::default() };
        let mut message = link_message(pair.index, host);
        message.attributes.extend([LinkAttribute::NumTxQueues(pair.queues), LinkAttribute::NumRxQueues(1)]);
        let data = InfoData::Veth(InfoVeth::Peer(peer));
        message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth), LinkInfo::Data(data)]));
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        self.ask(RouteNetlinkMessage::NewLink(message), flags).map(drop)
    }

    /// Sets an interface up without giving it an IPv6 address of its own, so that the kernel says nothing by it.
    pub fn set_up_silently(&mut self, index: u32) -> io::Result<()> {
        let mut message = link_message(index, LinkChange::default());
        message.attributes.push(address_generation(In6AddrGenMode::None));
        match self.ask(RouteNetlinkMessage::SetLink(message), NLM_F_ACK) {
            // A kernel without IPv6 is silent anyway.
            Err(error) if error.raw_os_error() == Some(Errno::AFNOSUPPORT.raw_os_error()) => {}
            result => drop(result?),
        }
        self.change_link(index, LinkChange { up: true, ..LinkChange::default() })
    }

    /// Waits until an interface of this namespace has gone, and returns its number; `None` if the kernel had more to say than the socket could
    /// hold, for then any may have gone. For this the socket has to be [`Netlink::follow_links`]'s.
    ///
    /// # Errors
    /// The kernel's.
    pub fn await_removal(&mut self) -> io::Result<Option<u32>> {
        loop {
            let mut buffer = Vec::with_capacity(BUFFER);
            match self.socket.recv(&mut buffer, 0) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(Errno::NOBUFS.raw_os_error()) => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            let Ok(told) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&buffer) else { continue };
            if let NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link)) = told.payload {
                return Ok(Some(link.header.index));
            }
        }
    }

    /// A socket that is told of changes to interfaces.
    pub fn follow_links() -> io::Result<Netlink> {
        let netlink = Netlink::open()?;
        netlink.socket.add_membership(RTNLGRP_LINK)?;
        Ok(netlink)
    }

    /// Removes an interface; one that is gone already is no error.
    pub fn delete_link(&mut self, index: u32) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        match self.ask(RouteNetlinkMessage::DelLink(message), NLM_F_ACK) {
            Err(error) if error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => Ok(()),
            result => result.map(drop),
        }
    }

    /// Gives an interface an address, without duplicate address detection: leases are unique, and a pod cannot wait.
    pub fn add_address(&mut self, index: u32, address: IpNet) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = family(address.addr());
        message.header.prefix_len = address.prefix_len();
        message.header.index = index;
        message.attributes.push(AddressAttribute::Local(address.addr()));
        message.attributes.push(AddressAttribute::Address(address.addr()));
        match address {
            IpNet::V4(v4) => message.attributes.push(AddressAttribute::Broadcast(v4.broadcast())),
            IpNet::V6(_) => message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad)),
        }
        self.ask(RouteNetlinkMessage::NewAddress(message), NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL).map(drop)
    }

    /// All addresses with the number of their interface.
    pub fn addresses(&mut self) -> io::Result<Vec<(u32, IpNet)>> {
        let answers = self.ask(RouteNetlinkMessage::GetAddress(AddressMessage::default()), NLM_F_DUMP)?;
        Ok(answers.into_iter().filter_map(address_of).collect())
    }

    /// Makes a route by this interface; one that is there already is an error of the kernel's.
    pub fn add_route(&mut self, index: u32, route: &Route) -> io::Result<()> {
        let message = route_message(index, route);
        self.ask(RouteNetlinkMessage::NewRoute(message), NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL).map(drop)
    }

    /// Makes it in place of the one that is there.
    pub fn replace_route(&mut self, index: u32, route: &Route) -> io::Result<()> {
        let message = route_message(index, route);
        self.ask(RouteNetlinkMessage::NewRoute(message), NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE).map(drop)
    }

    /// The routes of all tables that have an interface, with its number.
    pub fn routes(&mut self) -> io::Result<Vec<(u32, Route)>> {
        let mut all = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let answers = self.ask(RouteNetlinkMessage::GetRoute(message), NLM_F_DUMP)?;
            all.extend(answers.into_iter().filter_map(route_of));
        }
        Ok(all)
    }

    /// The numbers of the interfaces that default routes of the main table lead to, the preferred one first.
    pub fn default_devices(&mut self) -> io::Result<Vec<u32>> {
        let mut all = self.routes()?;
        let main = u32::from(RouteHeader::RT_TABLE_MAIN);
        all.retain(|(_, route)| route.destination.prefix_len() == 0 && route.table == main);
        all.sort_by_key(|(_, route)| route.priority.unwrap_or(0));
        Ok(all.into_iter().map(|(index, _)| index).collect())
    }

    /// The interfaces and addresses of this namespace, but not where default routes lead.
    pub fn host(&mut self) -> io::Result<Host> {
        let addresses = self.addresses()?;
        let interface = |link: Link| Interface {
            index: link.index,
            name: link.name,
            mtu: link.mtu,
            up: link.up && link.carrier,
            addresses: addresses.iter().filter(|(at, _)| *at == link.index).map(|(_, net)| net.addr()).collect(),
        };
        let interfaces = self.links()?.into_iter().map(interface).collect();
        let subnets = addresses.iter().map(|(_, net)| *net).collect();
        Ok(Host { interfaces, subnets, ..Host::default() })
    }

    /// Gives a namespace a number here.
    ///
    /// # Errors
    /// `EEXIST`: it has one, or another one has this one.
    pub fn number_namespace(&mut self, namespace: BorrowedFd<'_>, number: i32) -> io::Result<()> {
        let mut message = namespace_message(namespace);
        message.attributes.push(NsidAttribute::Id(number));
        self.ask(RouteNetlinkMessage::NewNsId(message), NLM_F_ACK).map(drop)
    }

    /// The number that a namespace has here, if it has one.
    pub fn namespace_number(&mut self, namespace: BorrowedFd<'_>) -> io::Result<Option<i32>> {
        let answers = self.ask(RouteNetlinkMessage::GetNsId(namespace_message(namespace)), NLM_F_ACK)?;
        Ok(answers.into_iter().find_map(namespace_number_of))
    }

    /// Whether a living namespace has this number here. Of one number: a list of all would lack some while namespaces come and go.
    pub fn has_namespace(&mut self, number: i32) -> io::Result<bool> {
        let mut message = NsidMessage::default();
        message.attributes.push(NsidAttribute::Id(number));
        match self.ask(RouteNetlinkMessage::GetNsId(message), NLM_F_ACK) {
            Ok(answers) => Ok(answers.into_iter().find_map(namespace_number_of) == Some(number)),
            Err(error) if Errno::from_io_error(&error) == Some(Errno::NOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Sends one request and collects what comes back until the kernel says that it is all. Of a list that changed while it was read,
    /// another one is asked for.
    fn ask(&mut self, request: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
        for _ in 1..LISTS {
            let (answers, is_torn) = self.ask_once(request.clone(), flags)?;
            if !is_torn {
                return Ok(answers);
            }
        }
        Ok(self.ask_once(request, flags)?.0)
    }

    /// What the kernel answers, and whether that is a list that changed meanwhile.
    fn ask_once(&mut self, request: RouteNetlinkMessage, flags: u16) -> io::Result<(Vec<RouteNetlinkMessage>, bool)> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut message = NetlinkMessage::from(request);
        message.header.flags = NLM_F_REQUEST | flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let (mut answers, mut is_torn) = (Vec::new(), false);
        loop {
            let mut buffer = Vec::with_capacity(BUFFER);
            self.socket.recv(&mut buffer, 0)?;
            let mut rest = buffer.as_slice();
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
                // Messages are padded to four bytes, except that the last one of a datagram need not be.
                let length = (answer.header.length as usize).next_multiple_of(4).clamp(16, rest.len().max(16));
                rest = rest.get(length..).unwrap_or_default();
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                is_torn |= answer.header.flags & NLM_F_DUMP_INTR != 0;
                match answer.payload {
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    NetlinkPayload::Error(_) => return Ok((answers, false)),
                    NetlinkPayload::Done(_) => return Ok((answers, is_torn)),
                    _ => {}
                }
            }
        }
    }
}

fn route_message(index: u32, route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    let destination = route.destination;
    message.header.address_family = family(destination.addr());
    message.header.destination_prefix_length = destination.prefix_len();
    message.header.protocol = RouteProtocol::Static;
    let nearest = if route.gateway.is_some() { RouteScope::Universe } else { RouteScope::Link };
    message.header.scope = route.scope.map_or(nearest, RouteScope::from);
    message.header.kind = RouteType::Unicast;
    message.header.flags = if route.on_link { RouteFlags::Onlink } else { RouteFlags::empty() };
    let address = |address| match address {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    };
    // The header has room for the tables up to 255 only; the attribute holds for all.
    message.attributes.push(RouteAttribute::Table(route.table));
    if destination.prefix_len() > 0 {
        message.attributes.push(RouteAttribute::Destination(address(destination.network())));
    }
    message.attributes.extend(route.gateway.map(|gateway| RouteAttribute::Gateway(address(gateway))));
    message.attributes.push(RouteAttribute::Oif(index));
    message.attributes.extend(route.priority.map(RouteAttribute::Priority));
    let metrics = [route.mtu.map(RouteMetric::Mtu), route.advmss.map(RouteMetric::Advmss)];
    let metrics: Vec<RouteMetric> = metrics.into_iter().flatten().collect();
    if !metrics.is_empty() {
        message.attributes.push(RouteAttribute::Metrics(metrics));
    }
    message
}

fn link_message(index: u32, change: LinkChange<'_>) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    if change.up {
        message.header.flags = LinkFlags::Up;
    }
    if change.up || change.down {
        message.header.change_mask = LinkFlags::Up;
    }
    message.attributes.extend(attributes(change));
    message
}

fn attributes(change: LinkChange<'_>) -> impl Iterator<Item = LinkAttribute> {
    let attributes = [
        change.namespace.map(|namespace| LinkAttribute::NetNsFd(namespace.as_raw_fd())),
        change.name.map(|name| LinkAttribute::IfName(name.to_owned())),
        change.mac.map(|mac| LinkAttribute::Address(mac.0.to_vec())),
        change.mtu.map(LinkAttribute::Mtu),
        change.queue.map(LinkAttribute::TxQueueLen),
        change.gso_max_segments.map(LinkAttribute::GsoMaxSegs),
    ];
    attributes.into_iter().flatten()
}

fn address_generation(mode: In6AddrGenMode) -> LinkAttribute {
    LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(mode)])])
}

fn namespace_message(namespace: BorrowedFd<'_>) -> NsidMessage {
    let mut message = NsidMessage::default();
    message.attributes.push(NsidAttribute::Fd(namespace.as_raw_fd() as u32));
    message
}

fn namespace_number_of(answer: RouteNetlinkMessage) -> Option<i32> {
    let RouteNetlinkMessage::NewNsId(message) = answer else { return None };
    message.attributes.into_iter().find_map(|attribute| match attribute {
        NsidAttribute::Id(id) if id >= 0 => Some(id),
        _ => None,
    })
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn link_of(answer: RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = answer else { return None };
    let mut link = Link {
        index: message.header.index,
        up: message.header.flags.contains(LinkFlags::Up),
        carrier: message.header.flags.contains(LinkFlags::LowerUp),
        ..Link::default()
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::GsoMaxSegs(segments) => link.gso_max_segments = segments,
            LinkAttribute::Address(octets) => link.mac = <[u8; 6]>::try_from(octets).ok().map(Mac),
            _ => {}
        }
    }
    Some(link)
}

fn address_of(answer: RouteNetlinkMessage) -> Option<(u32, IpNet)> {
    let RouteNetlinkMessage::NewAddress(message) = answer else { return None };
    let mut found = None;
    for attribute in message.attributes {
        match attribute {
            // On a point-to-point link `Address` is the other end.
            AddressAttribute::Local(address) => found = Some(address),
            AddressAttribute::Address(address) => found = found.or(Some(address)),
            _ => {}
        }
    }
    Some((message.header.index, IpNet::new(found?, message.header.prefix_len).ok()?))
}

fn route_of(answer: RouteNetlinkMessage) -> Option<(u32, Route)> {
    let RouteNetlinkMessage::NewRoute(message) = answer else { return None };
    let address = |address: RouteAddress| match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(address)),
        _ => None,
    };
    let any: IpAddr = match message.header.address_family {
        AddressFamily::Inet => std::net::Ipv4Addr::UNSPECIFIED.into(),
        _ => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let mut route = Route { table: message.header.table.into(), ..Route::new(IpNet::from(any)) };
    let (mut index, mut destination) = (None, any);
    for attribute in message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => destination = address(to)?,
            RouteAttribute::Gateway(by) => route.gateway = address(by),
            RouteAttribute::Oif(oif) => index = Some(oif),
            RouteAttribute::Table(table) => route.table = table,
            RouteAttribute::Priority(priority) => route.priority = Some(priority),
            _ => {}
        }
    }
    route.destination = IpNet::new(destination, message.header.destination_prefix_length).ok()?;
    Some((index?, route))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_interface_is_found_by_name_and_in_the_list() {
        let mut netlink = Netlink::open().unwrap();
        let lo = netlink.link("lo").unwrap().unwrap();
        assert_eq!((lo.index, lo.mac), (1, Some(Mac::ZERO)));
        assert!(netlink.links().unwrap().contains(&lo));
        assert_eq!(netlink.link("weft-none").unwrap(), None);
        let host = netlink.host().unwrap();
        assert_eq!(host.holder_of("127.0.0.1".parse().unwrap()).unwrap().name, "lo");
    }

    #[test]
    fn a_refusal_is_the_kernels_error() {
        let mut netlink = Netlink::open().unwrap();
        let error = netlink.change_link(u32::MAX >> 1, LinkChange::default()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::NODEV.raw_os_error()));
    }
}
