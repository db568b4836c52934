//! A frame whose headers were checked once; its offsets are known.
//!
//! [`Packet::parse`] reads the Ethernet, IP and transport headers, refuses what contradicts itself, cuts padding off, and checks that the
//! offload metadata fits the headers. After it, code may index the frame by a packet's offsets without looking
//! again. What a packet *means* (whether its source may say so, where it goes) is not decided here.
//!
//! RFC 791, RFC 8200, RFC 826, RFC 4861; for the offload metadata, virtio 1.2 section 5.1.6.

use std::net::{IpAddr, Ipv6Addr};

use weft_encap::arp::Arp;
use weft_encap::eth::{
    ETH_LEN, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_QINQ, ETHERTYPE_VLAN, EthHeader,
};
use weft_encap::icmp::{self, IcmpHeader};
use weft_encap::ipv4::{IPV4_LEN, Ipv4Header};
use weft_encap::ipv6::{self, IPV6_LEN, Ipv6Header, WalkError};
use weft_encap::mac::Mac;
use weft_encap::ndp::{NdpError, Neighbor};
use weft_encap::offload::{Gso, GsoKind, Offload, Partial};
use weft_encap::tcp::{self, TCP_LEN, TcpHeader};
use weft_encap::udp::{self, UDP_LEN, UdpHeader};
use weft_encap::zerocopy::FromBytes;
use weft_encap::{checksum, ip};

use crate::drop_reason::DropReason;
use crate::frame::Frame;
use crate::path::Sender;

/// Offset of the network header: pod ports are untagged.
pub const L3: usize = ETH_LEN;

/// The checked headers of a frame.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Who sent it.
    pub sender: Sender,
    /// Destination MAC.
    pub dst: Mac,
    /// Source MAC.
    pub src: Mac,
    /// What it carries.
    pub network: Network,
}

/// What an Ethernet frame carries.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// ARP for IPv4 over Ethernet.
    Arp(Arp),
    /// IPv4 or IPv6.
    Ip(Ip),
    /// Something else; it can only be bridged.
    Other,
}

/// An IP packet's headers.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Ip {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Upper-layer protocol, behind extension headers.
    pub protocol: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Whether a router may not fragment it; always so for IPv6.
    pub dont_fragment: bool,
    /// Whether it is a fragment, and if so the first or a later one.
    pub fragment: Option<Fragment>,
    /// Offset of the upper layer in the frame. Whatever it holds may be cut short in a fragment.
    pub l4: u16,
    /// Source and destination port of TCP and UDP; `None` for fragments and other protocols.
    pub ports: Option<(u16, u16)>,
    /// The destination port that the transport header names, also if that is in a first fragment.
    pub dst_port: Option<u16>,
    /// The same with the source port before it, or twice the identifier of a ping.
    pub named: Option<(u16, u16)>,
    /// Which datagram a fragment is of, and whether it is its last.
    pub piece: Option<(u32, bool)>,
    /// Type and code of ICMP and ICMPv6, unless it is a later fragment.
    pub icmp: Option<(u8, u8)>,
    /// Identifier of a ping or its answer, if it is whole.
    pub echo: Option<u16>,
    /// The packet that an ICMP error is about.
    pub quote: Option<Quote>,
    /// Whether it opens or answers the opening of a TCP connection: the SYN bit.
    pub syn: bool,
    /// TCP's flags.
    pub flags: u8,
    /// The neighbour discovery message, if it is one.
    pub neighbour: Option<Discovery>,
    /// Largest L3 packet that this stands for, in bytes: itself, or one segment if it is a superframe.
    pub size: u32,
}

/// What an ICMP error quotes of the packet that it is about.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Quote {
    /// Its source address.
    pub src: IpAddr,
    /// Its destination address.
    pub dst: IpAddr,
    /// Its upper-layer protocol.
    pub protocol: u8,
    /// Its ports, or twice the identifier of a ping; `None` for fragments and other protocols.
    pub ports: Option<(u16, u16)>,
}

/// Which piece of a datagram.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Fragment {
    /// The piece with the upper-layer header.
    First,
    /// Any other.
    Later,
}

/// A valid neighbour solicitation or advertisement (RFC 4861, sections 7.1.1 and 7.1.2).
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Discovery {
    /// Solicitation, or advertisement.
    pub solicitation: bool,
    /// The address asked for or told about.
    pub target: Ipv6Addr,
    /// The link-layer address option that belongs to it.
    pub mac: Option<Mac>,
}

impl Packet {
    /// Checks a frame's headers. The frame is cut to the length that its IP header gives, and its offload metadata
    /// gets the true header length; otherwise it is unchanged.
    ///
    /// # Errors
    /// The reason for which the frame ends here.
    pub fn parse(frame: &mut Frame, sender: Sender) -> Result<Packet, DropReason> {
        let (eth, _) = EthHeader::ref_from_prefix(frame.head()).map_err(|_| DropReason::TooShort)?;
        let (dst, src, ethertype) = (eth.dst, eth.src, eth.ethertype.get());
        let network = match ethertype {
            ETHERTYPE_IPV4 => Network::Ip(parse_v4(frame)?),
            ETHERTYPE_IPV6 => Network::Ip(parse_v6(frame)?),
            ETHERTYPE_ARP => Network::Arp(parse_arp(frame)?),
            ETHERTYPE_VLAN | ETHERTYPE_QINQ => return Err(DropReason::VlanTag),
            _ => Network::Other,
        };
        check_offload(frame, &network)?;
        Ok(Packet { sender, dst, src, network })
    }

    /// The IP headers, if it is IP.
    pub fn ip(&self) -> Option<&Ip> {
        match &self.network {
            Network::Ip(ip) => Some(ip),
            Network::Arp(_) | Network::Other => None,
        }
    }
}

fn parse_arp(frame: &Frame) -> Result<Arp, DropReason> {
    let (arp, _) = Arp::read_from_prefix(&frame.head()[L3..]).map_err(|_| DropReason::TooShort)?;
    if arp.is_ethernet_ipv4() { Ok(arp) } else { Err(DropReason::Malformed) }
}

fn parse_v4(frame: &mut Frame) -> Result<Ip, DropReason> {
    let bytes = &frame.head()[L3..];
    let (header, _) = Ipv4Header::ref_from_prefix(bytes).map_err(|_| DropReason::TooShort)?;
    let (header_len, total) = (header.ihl(), usize::from(header.total_len.get()));
    // RFC 791: the Internet header length is at least 5 words; the total length includes it.
    if header.version() != 4 || header_len < IPV4_LEN || total < header_len {
        return Err(DropReason::Malformed);
    }
    if total > frame.len() - L3 || header_len > bytes.len() {
        return Err(DropReason::TooShort);
    }
    // RFC 1812, section 5.2.2: "The IP checksum must be correct."
    if !checksum::verify_ipv4_header(&bytes[..header_len]) {
        return Err(DropReason::BadIpv4Checksum);
    }
    let fragment = match (header.is_fragment(), header.fragment_offset()) {
        (false, _) => None,
        (true, 0) => Some(Fragment::First),
        (true, _) => Some(Fragment::Later),
    };
    let mut ip = Ip {
        src: header.src().into(),
        dst: header.dst().into(),
        protocol: header.protocol,
        ttl: header.ttl,
        dont_fragment: header.dont_fragment(),
        fragment,
        l4: (L3 + header_len) as u16,
        ports: None,
        dst_port: None,
        named: None,
        piece: fragment.map(|_| (header.id.get().into(), !header.more_fragments())),
        icmp: None,
        echo: None,
        quote: None,
        syn: false,
        flags: 0,
        neighbour: None,
        size: total as u32,
    };
    frame.truncate(L3 + total);
    parse_upper(frame, &mut ip)?;
    Ok(ip)
}

fn parse_v6(frame: &mut Frame) -> Result<Ip, DropReason> {
    let bytes = &frame.head()[L3..];
    let (header, rest) = Ipv6Header::ref_from_prefix(bytes).map_err(|_| DropReason::TooShort)?;
    let total = IPV6_LEN + usize::from(header.payload_len.get());
    if header.version() != 6 {
        return Err(DropReason::Malformed);
    }
    if total > frame.len() - L3 {
        return Err(DropReason::TooShort);
    }
    // RFC 4291, section 2.5.5.2: these stand for IPv4 nodes inside of programs, and do not occur on a wire.
    if header.src().to_ipv4_mapped().or(header.dst().to_ipv4_mapped()).is_some() {
        return Err(DropReason::Malformed);
    }
    let rest = &rest[..rest.len().min(total - IPV6_LEN)];
    let upper = ipv6::walk(header.next_header, rest, ipv6::MAX_EXTENSION_HEADERS).map_err(|error| match error {
        WalkError::TooMany => DropReason::TooManyHeaders,
        // Cut off by the end of the packet, or by the end of what a chunk holds of it.
        WalkError::Truncated if total - IPV6_LEN > rest.len() => DropReason::TooManyHeaders,
        WalkError::Truncated => DropReason::TooShort,
        WalkError::HopByHopMisplaced | WalkError::FragmentTwice => DropReason::Malformed,
    })?;
    // An atomic fragment (RFC 6946) is a whole datagram.
    let fragment = upper.fragment.filter(|piece| piece.more || piece.offset != 0);
    let fragment = fragment.map(|piece| if piece.offset == 0 { Fragment::First } else { Fragment::Later });
    let mut ip = Ip {
        src: header.src().into(),
        dst: header.dst().into(),
        protocol: upper.protocol,
        ttl: header.hop_limit,
        dont_fragment: true,
        fragment,
        l4: (L3 + IPV6_LEN + upper.offset) as u16,
        ports: None,
        dst_port: None,
        named: None,
        piece: upper.fragment.filter(|_| fragment.is_some()).map(|piece| (piece.id, !piece.more)),
        icmp: None,
        echo: None,
        quote: None,
        syn: false,
        flags: 0,
        neighbour: None,
        size: total as u32,
    };
    frame.truncate(L3 + total);
    parse_upper(frame, &mut ip)?;
    // RFC 6980, section 5: neighbour discovery with a Fragment header, even an atomic one, is ignored.
    let is_discovery = ip.icmp.is_some_and(|(kind, _)| DISCOVERY.contains(&kind));
    if upper.fragment.is_some() && is_discovery { Err(DropReason::Malformed) } else { Ok(ip) }
}

/// Neighbour discovery's message types, router solicitation to redirect.
const DISCOVERY: std::ops::RangeInclusive<u8> = icmp::v6::ROUTER_SOLICITATION..=icmp::v6::REDIRECT;

/// Reads the transport header, which must be there as a whole, also in a first fragment: RFC 7112, and RFC 1858 for what may be
/// hidden otherwise.
fn parse_upper(frame: &Frame, ip: &mut Ip) -> Result<(), DropReason> {
    if ip.fragment == Some(Fragment::Later) {
        return Ok(());
    }
    let l4 = usize::from(ip.l4);
    let rest = frame.head().get(l4..).ok_or(DropReason::TooShort)?;
    let whole = ip.fragment.is_none();
    let len = frame.len() - l4;
    match ip.protocol {
        ip::TCP => {
            let Ok((header, _)) = TcpHeader::ref_from_prefix(rest) else {
                // An IPv4 fragment may be as short as 8 bytes (RFC 791, section 3.2).
                return if whole || ip.src.is_ipv6() { Err(DropReason::TooShort) } else { Ok(()) };
            };
            if whole && (header.header_len() < TCP_LEN || header.header_len() > len) {
                return Err(DropReason::Malformed);
            }
            ip.dst_port = Some(header.dst_port.get());
            ip.named = Some((header.src_port.get(), header.dst_port.get()));
            ip.ports = ip.named.filter(|_| whole);
            (ip.syn, ip.flags) = (header.flags & tcp::SYN != 0, header.flags);
        }
        ip::UDP => {
            let (header, _) = UdpHeader::ref_from_prefix(rest).map_err(|_| DropReason::TooShort)?;
            let datagram = usize::from(header.len.get());
            if whole && (datagram < UDP_LEN || datagram > len) {
                return Err(DropReason::Malformed);
            }
            ip.dst_port = Some(header.dst_port.get());
            ip.named = Some((header.src_port.get(), header.dst_port.get()));
            ip.ports = ip.named.filter(|_| whole);
        }
        ip::ICMP if ip.src.is_ipv4() => {
            let (header, quoted) = IcmpHeader::ref_from_prefix(rest).map_err(|_| DropReason::TooShort)?;
            read_message(ip, header, quoted, whole);
        }
        ip::ICMPV6 if ip.src.is_ipv6() => {
            let (header, quoted) = IcmpHeader::ref_from_prefix(rest).map_err(|_| DropReason::TooShort)?;
            read_message(ip, header, quoted, whole);
            if whole {
                ip.neighbour = parse_discovery(frame, ip, header.kind)?;
            }
        }
        _ => {}
    }
    Ok(())
}

/// What kind of ICMP message it is, and to which conversation it belongs.
fn read_message(ip: &mut Ip, header: &IcmpHeader, quoted: &[u8], whole: bool) {
    ip.icmp = Some((header.kind, header.code));
    if ip.is_icmp_error() {
        ip.quote = quote(quoted);
    } else if is_echo(ip.src.is_ipv4(), header.kind) {
        let identifier = header.echo().0;
        ip.named = Some((identifier, identifier));
        ip.echo = whole.then_some(identifier);
    }
}

fn is_echo(v4: bool, kind: u8) -> bool {
    let kinds = if v4 {
        [icmp::v4::ECHO_REQUEST, icmp::v4::ECHO_REPLY]
    } else {
        [icmp::v6::ECHO_REQUEST, icmp::v6::ECHO_REPLY]
    };
    kinds.contains(&kind)
}

/// Reads the packet that an error quotes, as far as it is there. Nothing of it has been checked by anyone.
fn quote(bytes: &[u8]) -> Option<Quote> {
    let (src, dst, protocol, upper, whole): (IpAddr, IpAddr, u8, &[u8], bool) = match bytes.first()? >> 4 {
        4 => {
            let (header, _) = Ipv4Header::ref_from_prefix(bytes).ok()?;
            let upper = bytes.get(header.ihl().max(IPV4_LEN)..)?;
            (header.src().into(), header.dst().into(), header.protocol, upper, !header.is_fragment())
        }
        6 => {
            let (header, rest) = Ipv6Header::ref_from_prefix(bytes).ok()?;
            let upper = ipv6::walk(header.next_header, rest, ipv6::MAX_EXTENSION_HEADERS).ok()?;
            let whole = upper.fragment.is_none_or(|piece| !piece.more && piece.offset == 0);
            (header.src().into(), header.dst().into(), upper.protocol, rest.get(upper.offset..)?, whole)
        }
        _ => return None,
    };
    let word = |at: usize| upper.get(at..at + 2).map(|word| u16::from_be_bytes([word[0], word[1]]));
    let ports = match protocol {
        _ if !whole => None,
        ip::TCP | ip::UDP => word(0).zip(word(2)),
        ip::ICMP | ip::ICMPV6 => {
            upper.first().filter(|kind| is_echo(src.is_ipv4(), **kind)).and(word(4)).map(|id| (id, id))
        }
        _ => None,
    };
    Some(Quote { src, dst, protocol, ports })
}

/// RFC 4861, sections 7.1.1 and 7.1.2: what makes a solicitation or advertisement valid.
fn parse_discovery(frame: &Frame, ip: &Ip, kind: u8) -> Result<Option<Discovery>, DropReason> {
    use icmp::v6::{NEIGHBOR_ADVERTISEMENT, NEIGHBOR_SOLICITATION};
    if kind != NEIGHBOR_SOLICITATION && kind != NEIGHBOR_ADVERTISEMENT {
        return Ok(None);
    }
    let message = &frame.head()[usize::from(ip.l4)..];
    // "The IP Hop Limit field has a value of 255, i.e., the packet could not possibly have been forwarded by a router."
    if ip.ttl != 255 || frame.body().is_some() {
        return Err(DropReason::Malformed);
    }
    let (IpAddr::V6(src), IpAddr::V6(dst)) = (ip.src, ip.dst) else { return Err(DropReason::Malformed) };
    let pseudo = checksum::pseudo_v6(src, dst, ip::ICMPV6, message.len() as u32);
    if frame.offload.partial.is_none() && !checksum::verify(pseudo, message) {
        return Err(DropReason::Malformed);
    }
    let (neighbour, mac) = Neighbor::parse(message).map_err(|error| match error {
        NdpError::Short => DropReason::TooShort,
        _ => DropReason::Malformed,
    })?;
    Ok(Some(Discovery { solicitation: kind == NEIGHBOR_SOLICITATION, target: neighbour.target(), mac }))
}

/// The offload metadata must fit the headers: the kernel on the other side trusts it, and so does our segmenter.
fn check_offload(frame: &mut Frame, network: &Network) -> Result<(), DropReason> {
    let Offload { partial, gso, .. } = frame.offload;
    let head = frame.head().len();
    if let Some(partial) = partial {
        let field = usize::from(partial.start) + usize::from(partial.offset);
        if field + 2 > head || !is_checksum(&partial, network) {
            return Err(DropReason::BadOffload);
        }
    }
    let Some(gso) = gso else { return Ok(()) };
    let Network::Ip(ip) = network else { return Err(DropReason::BadOffload) };
    let header_len = superframe_header(frame, ip, &gso).ok_or(DropReason::BadOffload)?;
    frame.offload.gso = Some(Gso { header_len, ..gso });
    Ok(())
}

/// Whether the place that is to be filled in is a checksum, rather than something that was read and checked already: the packet's
/// own, or, behind the header of a tunnel that the pod itself made, that of the packet inside.
fn is_checksum(partial: &Partial, network: &Network) -> bool {
    let Network::Ip(ip) = network else { return false };
    let (start, offset) = (usize::from(partial.start), usize::from(partial.offset));
    let (field, tunnel) = match ip.protocol {
        ip::TCP => (Some(tcp::CHECKSUM_OFFSET), None),
        ip::UDP => (Some(udp::CHECKSUM_OFFSET), Some(UDP_LEN)),
        ip::ICMP | ip::ICMPV6 => (Some(icmp::CHECKSUM_OFFSET), None),
        ip::GRE | ip::IPIP | ip::IPV6 => (None, Some(0)),
        _ => (None, None),
    };
    let l4 = usize::from(ip.l4);
    let own = start == l4 && field == Some(offset);
    ip.fragment.is_none() && (own || tunnel.is_some_and(|header| start >= l4 + header + IPV4_LEN))
}

/// Length of a superframe's headers, L2 to L4; `None` if kind, protocol, checksum and lengths do not agree.
fn superframe_header(frame: &Frame, ip: &Ip, gso: &Gso) -> Option<u16> {
    let l4 = usize::from(ip.l4);
    let fits = match gso.kind {
        GsoKind::Tcp4 => ip.protocol == ip::TCP && ip.src.is_ipv4(),
        GsoKind::Tcp6 => ip.protocol == ip::TCP && ip.src.is_ipv6(),
        GsoKind::Udp => ip.protocol == ip::UDP,
    };
    let (header, offset) = match gso.kind {
        GsoKind::Tcp4 | GsoKind::Tcp6 => {
            let (tcp, _) = TcpHeader::ref_from_prefix(frame.head().get(l4..)?).ok()?;
            (tcp.header_len(), tcp::CHECKSUM_OFFSET)
        }
        GsoKind::Udp => (UDP_LEN, udp::CHECKSUM_OFFSET),
    };
    let partial = frame.offload.partial?;
    let summed = usize::from(partial.start) == l4 && usize::from(partial.offset) == offset;
    let len = l4 + header;
    let usable =
        fits && summed && ip.fragment.is_none() && gso.size > 0 && len <= frame.head().len() && len < frame.len();
    usable.then_some(len as u16)
}

impl Ip {
    /// Bytes of the largest L3 packet that goes on a wire for this frame.
    pub fn wire_size(&self, offload: &Offload) -> u32 {
        match offload.gso {
            Some(gso) => self.size.min(u32::from(gso.header_len) - L3 as u32 + u32::from(gso.size)),
            None => self.size,
        }
    }

    /// Whether it is a ping, or a piece of one.
    pub fn is_ping(&self) -> bool {
        let (protocol, request) = match self.src {
            IpAddr::V4(_) => (ip::ICMP, icmp::v4::ECHO_REQUEST),
            IpAddr::V6(_) => (ip::ICMPV6, icmp::v6::ECHO_REQUEST),
        };
        let is_request = self.icmp.is_none_or(|(kind, _)| kind == request);
        self.protocol == protocol && is_request
    }

    /// Whether it is an ICMP or ICMPv6 error message, about which no error may be sent (RFC 1122, section 3.2.2).
    pub fn is_icmp_error(&self) -> bool {
        match (self.icmp, self.src) {
            (Some((kind, _)), IpAddr::V4(_)) => icmp::v4::is_error(kind),
            (Some((kind, _)), IpAddr::V6(_)) => icmp::v6::is_error(kind),
            (None, _) => false,
        }
    }
}
