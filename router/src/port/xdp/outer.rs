//! Outer headers: Ethernet, perhaps a VLAN tag, IPv4 or IPv6, UDP. What the host's kernel does for the UDP underlay is done here.
//!
//! *Out.* Where a node is reached ([`NextHop`]) is told by whoever follows the kernel's routes and neighbours. The UDP checksum is
//! always on (RFC 7348 allows zero, but a receiver never merges packets without one); it is left partial for the kernel or the
//! device to complete, and is summed here only if they cannot. The source port follows from the inner flow. Nothing is
//! ever fragmented.
//!
//! *In.* The device's program has chosen the packets, but what it saw is checked again: a frame may have been changed since, and the
//! program neither sums nor looks at lengths. A partial checksum is one of a peer on the same machine.

use std::net::IpAddr;

use arrayvec::ArrayVec;
use weft_encap::checksum::{Sum, pseudo_v4, pseudo_v6, verify, verify_ipv4_header};
use weft_encap::eth::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_QINQ, ETHERTYPE_VLAN, EthHeader};
use weft_encap::ip::UDP;
use weft_encap::ipv4::{FRAGMENT_OFFSET, IPV4_LEN, Ipv4Header, MORE_FRAGMENTS};
use weft_encap::ipv6::Ipv6Header;
use weft_encap::mac::Mac;
use weft_encap::offload::Partial;
use weft_encap::udp::{CHECKSUM_OFFSET, UDP_LEN, UdpHeader};
use weft_encap::vxlan::VXLAN_LEN;
use zerocopy::{FromBytes, IntoBytes};

use super::programs::Tunnel;
use super::too_big::{self, FLOW_LABEL};
use crate::drop_reason::DropReason;
use crate::frame::{Frame, Outer};

/// Where frames for a node go: the node itself if it is on the link, the router on the way otherwise.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// The uplink's MAC.
    pub source: Mac,
    /// The next hop's.
    pub target: Mac,
    /// The VLAN tag's number, if the node is reached through one.
    pub vlan: Option<u16>,
    /// The longest IP packet that the way carries.
    pub mtu: u32,
}

/// Outer headers of one frame: Ethernet and a tag, IPv6, UDP at most.
pub type Prefix = ArrayVec<u8, 66>;

const IPV6_LEN: usize = size_of::<Ipv6Header>();
const TTL: u8 = 64;
/// The number of a tag; the other bits are its priority.
const VLAN_ID: u16 = 0x0fff;
/// Source ports are dynamic ones (RFC 7348 section 5, RFC 6335).
const FIRST_PORT: u16 = 0xc000;

/// Writes the headers for `len` bytes behind them, with a checksum that is still partial: where, is said too.
pub fn write(
    hop: &NextHop,
    from: IpAddr,
    outer: &Outer,
    tunnel: &Tunnel,
    len: usize,
) -> Result<(Prefix, Partial), DropReason> {
    let src_port = FIRST_PORT | outer.entropy & !FIRST_PORT;
    let cookie = too_big::cookie(tunnel, outer.peer, src_port);
    let udp_len = u16::try_from(UDP_LEN + len).map_err(|_| DropReason::UnderlayMtu)?;
    let mut prefix = Prefix::new();
    let mut put = |bytes: &[u8]| prefix.try_extend_from_slice(bytes).expect("it has room for all of them");
    put(hop.target.as_bytes());
    put(hop.source.as_bytes());
    if let Some(vlan) = hop.vlan {
        put(&ETHERTYPE_VLAN.to_be_bytes());
        put(&vlan.to_be_bytes());
    }
    let (pseudo, ip_len) = match (from, outer.peer) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut header = Ipv4Header::new(from, to, UDP, TTL, udp_len);
            header.tos = outer.tos;
            header.id = (cookie as u16).into();
            header.checksum = weft_encap::checksum::ipv4_header(header.as_bytes()).into();
            put(&ETHERTYPE_IPV4.to_be_bytes());
            put(header.as_bytes());
            (pseudo_v4(from, to, UDP, udp_len.into()), IPV4_LEN)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let mut header = Ipv6Header::new(from, to, UDP, TTL, udp_len);
            header.version_class_flow = (0x6000_0000 | u32::from(outer.tos) << 20 | cookie & FLOW_LABEL).into();
            put(&ETHERTYPE_IPV6.to_be_bytes());
            put(header.as_bytes());
            (pseudo_v6(from, to, UDP, udp_len.into()), IPV6_LEN)
        }
        _ => return Err(DropReason::UnderlayUnreachable),
    };
    if ip_len + usize::from(udp_len) > hop.mtu as usize {
        return Err(DropReason::UnderlayMtu);
    }
    let udp = UdpHeader {
        src_port: src_port.into(),
        dst_port: tunnel.port.into(),
        len: udp_len.into(),
        checksum: pseudo.fold().into(),
    };
    put(udp.as_bytes());
    let start = (prefix.len() - UDP_LEN) as u16;
    Ok((prefix, Partial { start, offset: CHECKSUM_OFFSET as u16 }))
}

/// Length of the packet's headers before what is tunnelled to this node: IP and UDP.
pub fn packet_headers(node: IpAddr) -> usize {
    UDP_LEN + if node.is_ipv4() { IPV4_LEN } else { IPV6_LEN }
}

/// Completes the checksum of headers that precede these bytes.
pub fn complete<'a>(prefix: &mut Prefix, partial: Partial, slices: impl Iterator<Item = &'a [u8]>) {
    let start = usize::from(partial.start);
    let mut sum = Sum::new();
    sum.add(&prefix[start..]);
    for slice in slices {
        sum.add(slice);
    }
    let field = start + usize::from(partial.offset);
    prefix[field..field + 2].copy_from_slice(&sum.finish_nonzero().to_be_bytes());
}

/// Checks the headers of a received frame, and takes them off: it then begins with the tunnel header.
pub fn read(frame: &mut Frame, tunnel: &Tunnel) -> Result<(), DropReason> {
    let head = frame.head();
    let ip = Ip::read(head)?;
    if ip.tag.is_some_and(|tag| tunnel.vlan.is_some_and(|ours| tag != ours)) {
        return Err(DropReason::NotForUs);
    }
    let udp = UdpHeader::read_from_prefix(head.get(ip.udp..).unwrap_or_default());
    let (udp, _) = udp.map_err(|_| DropReason::TooShort)?;
    let end = ip.udp + usize::from(udp.len.get());
    if !tunnel.addresses.contains(&ip.to) || udp.dst_port.get() != tunnel.port {
        return Err(DropReason::NotForUs);
    }
    if usize::from(udp.len.get()) < UDP_LEN || end > ip.end || ip.end > frame.len() {
        return Err(DropReason::TooShort);
    }
    let len = u32::from(udp.len.get());
    let pseudo = match (ip.from, ip.to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => pseudo_v4(from, to, UDP, len),
        (IpAddr::V6(from), IpAddr::V6(to)) => pseudo_v6(from, to, UDP, len),
        _ => return Err(DropReason::Malformed),
    };
    match udp.checksum.get() {
        // "An all zero transmitted checksum value means that the transmitter generated no checksum" (RFC 768); not over IPv6 (RFC
        // 8200 section 8.1).
        0 if ip.to.is_ipv4() => {}
        0 => return Err(DropReason::Malformed),
        partial if partial == pseudo.fold() => {}
        _ if is_valid(pseudo, frame, ip.udp, end) => {}
        _ if is_valid_once_inner_is_complete(pseudo, head, ip.udp) => {}
        _ => return Err(DropReason::Malformed),
    }
    frame.truncate(end);
    frame.pull(ip.udp + UDP_LEN).ok_or(DropReason::TooShort)?;
    frame.outer = Some(Outer { tos: ip.tos, ..Outer::vxlan(ip.from) });
    Ok(())
}

fn is_valid(pseudo: Sum, frame: &Frame, start: usize, end: usize) -> bool {
    if frame.body().is_none() {
        return frame.head().get(start..end).is_some_and(|bytes| verify(pseudo, bytes));
    }
    let mut sum = pseudo;
    for slice in frame.slices(start..end) {
        sum.add(slice);
    }
    sum.is_valid()
}

/// A kernel VXLAN device on the same machine leaves the inner checksum to its device, which is none, and sums the outer one as if that
/// were done. A complete inner checksum has what it covers sum to the complement of its pseudo-header's sum, which is what the field
/// holds until then.
fn is_valid_once_inner_is_complete(pseudo: Sum, head: &[u8], udp: usize) -> bool {
    let inner = udp + UDP_LEN + VXLAN_LEN;
    let Some(partial) = head.get(inner..).and_then(super::partial::recognise) else { return false };
    let start = inner + usize::from(partial.start);
    let (Some(before), Some(field)) =
        (head.get(udp..start), head.get(start + usize::from(partial.offset)..).and_then(<[u8]>::first_chunk))
    else {
        return false;
    };
    let mut sum = pseudo;
    sum.add(before);
    sum.add_word(!u16::from_be_bytes(*field));
    sum.is_valid()
}

/// What an IP header in front of UDP says.
struct Ip {
    /// The VLAN, if one is named: 0 only says that there is a priority.
    tag: Option<u16>,
    from: IpAddr,
    to: IpAddr,
    tos: u8,
    /// Where UDP begins.
    udp: usize,
    /// Where the packet ends.
    end: usize,
}

impl Ip {
    fn read(head: &[u8]) -> Result<Ip, DropReason> {
        let (_, mut rest) = EthHeader::read_from_prefix(head).map_err(|_| DropReason::TooShort)?;
        let mut ethertype = u16::from_be_bytes([head[12], head[13]]);
        let mut outermost = None;
        for _ in 0..2 {
            if matches!(ethertype, ETHERTYPE_VLAN | ETHERTYPE_QINQ) {
                let (tag, behind) = rest.split_first_chunk::<4>().ok_or(DropReason::TooShort)?;
                outermost = outermost.or(Some(u16::from_be_bytes([tag[0], tag[1]]) & VLAN_ID));
                (ethertype, rest) = (u16::from_be_bytes([tag[2], tag[3]]), behind);
            }
        }
        let at = head.len() - rest.len();
        let ip = match ethertype {
            ETHERTYPE_IPV4 => Ip::v4(rest, at),
            ETHERTYPE_IPV6 => Ip::v6(rest, at),
            _ => Err(DropReason::NotForUs),
        };
        ip.map(|ip| Ip { tag: outermost.filter(|tag| *tag != 0), ..ip })
    }

    fn v4(bytes: &[u8], at: usize) -> Result<Ip, DropReason> {
        let (header, _) = Ipv4Header::read_from_prefix(bytes).map_err(|_| DropReason::TooShort)?;
        let fragment = header.flags_fragment.get() & (MORE_FRAGMENTS | FRAGMENT_OFFSET) != 0;
        if header.version_ihl != 0x45 || fragment || header.protocol != UDP {
            return Err(DropReason::NotForUs);
        }
        if !verify_ipv4_header(&bytes[..IPV4_LEN]) {
            return Err(DropReason::BadIpv4Checksum);
        }
        let end = at + usize::from(header.total_len.get());
        Ok(Ip { tag: None, from: header.src.into(), to: header.dst.into(), tos: header.tos, udp: at + IPV4_LEN, end })
    }

    fn v6(bytes: &[u8], at: usize) -> Result<Ip, DropReason> {
        let (header, _) = Ipv6Header::read_from_prefix(bytes).map_err(|_| DropReason::TooShort)?;
        if header.version() != 6 || header.next_header != UDP {
            return Err(DropReason::NotForUs);
        }
        let tos = (header.version_class_flow.get() >> 20) as u8;
        let end = at + IPV6_LEN + usize::from(header.payload_len.get());
        Ok(Ip { tag: None, from: header.src.into(), to: header.dst.into(), tos, udp: at + IPV6_LEN, end })
    }
}

#[cfg(test)]
mod tests {
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::pool::Pool;
    use crate::port::{PortId, sample};

    const HERE: [&str; 2] = ["10.200.0.1", "fd00::1"];
    const THERE: [&str; 2] = ["10.200.0.2", "fd00::2"];
    const PORT: u16 = 8472;

    fn hop(vlan: Option<u16>) -> NextHop {
        NextHop { source: Mac([2, 0, 0, 0, 0, 1]), target: Mac([2, 0, 0, 0, 0, 2]), vlan, mtu: 1500 }
    }

    /// What the second node gets of a payload that the first sends, its checksum completed.
    fn packet(family: usize, vlan: Option<u16>, payload: &[u8]) -> Vec<u8> {
        let outer = Outer { entropy: 0x1234, tos: 0xb8, ..Outer::vxlan(THERE[family].parse().unwrap()) };
        let from = HERE[family].parse().unwrap();
        let (mut prefix, partial) = write(&hop(vlan), from, &outer, &tunnel(), payload.len()).unwrap();
        complete(&mut prefix, partial, [payload].into_iter());
        [&prefix[..], payload].concat()
    }

    fn tunnel() -> Tunnel {
        Tunnel { addresses: THERE.map(|address| address.parse().unwrap()).to_vec(), port: PORT, vlan: None, secret: 7 }
    }

    fn open(bytes: &[u8]) -> Result<(Vec<u8>, Outer), DropReason> {
        let pool = Pool::new(1, 1).unwrap();
        let mut frame = Frame::from_bytes(bytes, PortId(0), &pool).unwrap();
        read(&mut frame, &tunnel())?;
        Ok((frame.to_vec(), frame.outer.unwrap()))
    }

    #[test]
    fn what_is_written_is_what_others_read() {
        for (family, vlan) in [(0, None), (0, Some(100)), (1, None), (1, Some(4094))] {
            let bytes = packet(family, vlan, b"payload");
            let parsed = SlicedPacket::from_ethernet(&bytes).unwrap();
            assert_eq!(parsed.vlan_ids().first().map(|id| id.value()), vlan);
            let Some(TransportSlice::Udp(udp)) = parsed.transport else { panic!("no UDP") };
            let (source, dscp, expected) = match parsed.net.unwrap() {
                NetSlice::Ipv4(ip) => {
                    let header = ip.header().to_header();
                    assert_eq!(header.calc_header_checksum(), header.header_checksum);
                    assert!(header.dont_fragment);
                    let expected = udp.to_header().calc_checksum_ipv4(&header, udp.payload()).unwrap();
                    (IpAddr::from(header.source), header.dscp.value(), expected)
                }
                NetSlice::Ipv6(ip) => {
                    let header = ip.header().to_header();
                    let expected = udp.to_header().calc_checksum_ipv6(&header, udp.payload()).unwrap();
                    (IpAddr::from(header.source), header.traffic_class >> 2, expected)
                }
                NetSlice::Arp(_) => panic!("no IP"),
            };
            assert_eq!((source, dscp), (HERE[family].parse().unwrap(), 0xb8 >> 2));
            assert_eq!((udp.source_port(), udp.destination_port()), (0xd234, PORT));
            assert_eq!((udp.checksum(), udp.payload()), (expected, &b"payload"[..]));
        }
    }

    #[test]
    fn what_is_written_is_read_again_also_padded_tagged_and_partial() {
        for (family, vlan) in [(0, None), (0, Some(100)), (1, None), (1, Some(4094))] {
            let mut bytes = packet(family, vlan, b"payload");
            bytes.extend([0; 9]);
            let expected = Outer { tos: 0xb8, ..Outer::vxlan(HERE[family].parse().unwrap()) };
            assert_eq!(open(&bytes).unwrap(), (b"payload".to_vec(), expected));
            let long = vec![7; 3_000];
            let outer = Outer::vxlan(THERE[family].parse().unwrap());
            let far = NextHop { mtu: 9_000, ..hop(vlan) };
            let (mut prefix, partial) = write(&far, expected.peer, &outer, &tunnel(), long.len()).unwrap();
            let raw = [&prefix[..], &long].concat();
            assert_eq!(open(&raw).unwrap().0, long, "the checksum is partial");
            complete(&mut prefix, partial, [&long[..]].into_iter());
            let mut bytes = [&prefix[..], &long].concat();
            assert_eq!(open(&bytes).unwrap().0, long, "it is complete, over more than one buffer");
            *bytes.last_mut().unwrap() ^= 1;
            assert_eq!(open(&bytes), Err(DropReason::Malformed));
        }
    }

    #[test]
    fn an_outer_checksum_that_expects_the_inner_one_to_be_completed_is_right() {
        let samples = [sample::tcp4(1_000, 0), sample::tcp6(999, 0), sample::udp4(1_001, 0)];
        for (inner, _) in samples {
            let tunnelled = sample::tunnelled(&inner).bytes;
            let mut complete = inner.bytes.clone();
            inner.offload.partial.unwrap().fill(&mut complete, []).unwrap();
            let header = tunnelled.len() - complete.len();
            for family in [0, 1] {
                let whole = packet(family, None, &[&tunnelled[..header], &complete].concat());
                let outer = whole.len() - tunnelled.len();
                let mut left = [&whole[..outer], &tunnelled].concat();
                assert_eq!(open(&left).unwrap().0, tunnelled);
                left[outer + header] ^= 1;
                assert_eq!(open(&left), Err(DropReason::Malformed), "the inner destination is covered");
            }
        }
    }

    #[test]
    fn of_a_vlan_its_own_frames_are_read_and_those_whose_tag_was_taken_off() {
        let pool = Pool::new(1, 1).unwrap();
        for family in [0, 1] {
            for (vlan, fits) in
                [(None, true), (Some(0), true), (Some(100), true), (Some(0xf064), true), (Some(101), false)]
            {
                let mut frame = Frame::from_bytes(&packet(family, vlan, b"payload"), PortId(0), &pool).unwrap();
                assert_eq!(read(&mut frame, &Tunnel { vlan: Some(100), ..tunnel() }).is_ok(), fits, "{vlan:?}");
            }
        }
    }

    #[test]
    fn whatever_is_changed_or_cut_is_refused() {
        for family in [0, 1] {
            let good = packet(family, None, b"payload");
            for at in 12..good.len() {
                let mut bytes = good.clone();
                bytes[at] ^= 0x40;
                // Traffic class, flow label and hop limit of IPv6 are covered by no checksum.
                let unprotected = family == 1 && [14, 15, 16, 17, 21].contains(&at);
                assert!(open(&bytes).is_err() || unprotected, "byte {at} of family {family}");
            }
            (0..good.len()).for_each(|len| assert!(open(&good[..len]).is_err(), "{len} bytes"));
        }
        let mut none = packet(0, None, b"payload");
        none[40..42].fill(0);
        assert!(open(&none).is_ok(), "zero means that there is no checksum");
        let mut none = packet(1, None, b"payload");
        none[60..62].fill(0);
        assert_eq!(open(&none), Err(DropReason::Malformed), "but not over IPv6");
    }

    #[test]
    fn what_is_too_long_or_of_another_family_is_not_written() {
        let outer = Outer::vxlan(THERE[0].parse().unwrap());
        let write = |from: &str, len| write(&hop(None), from.parse().unwrap(), &outer, &tunnel(), len).err();
        assert_eq!((write(HERE[0], 1_472), write(HERE[0], 1_473)), (None, Some(DropReason::UnderlayMtu)));
        assert_eq!(write(HERE[0], 70_000), Some(DropReason::UnderlayMtu));
        assert_eq!(write(HERE[1], 100), Some(DropReason::UnderlayUnreachable));
    }

    proptest! {
        /// Headers are parsed by hand here, and come from anyone on the link.
        #[test]
        fn no_bytes_are_read_beyond_their_end(start in 0..4_usize, cuts in vec(any::<(u8, u8)>(), 0..4), len in 0..120_usize) {
            let mut bytes = packet(start % 2, (start > 1).then_some(5), &[0x45; 40]);
            for (at, value) in cuts {
                let at = usize::from(at) % bytes.len();
                bytes[at] = value;
            }
            bytes.truncate(len);
            if let Ok((payload, _)) = open(&bytes) {
                prop_assert!(payload.len() + 42 <= bytes.len());
            }
            let _ = super::super::partial::recognise(&bytes);
            let _ = super::super::partial::recognise(bytes.get(14..).unwrap_or_default());
        }
    }
}
