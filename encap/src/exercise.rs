//! One function per way in from the wire: feed it any bytes, and it panics if a promise of this crate is broken.
//!
//! Fuzz targets are one call to one of these; the tests run them on random bytes and on damaged frames. Where a
//! function needs numbers besides the bytes, it takes them from the first few.

use zerocopy::{FromBytes, IntoBytes};

use crate::arp::Arp;
use crate::checksum::{self, Sum};
use crate::coalesce::{self, MAX_FRAMES, Run};
use crate::eth::{ETH_LEN, EthHeader, VlanTag};
use crate::geneve::{GENEVE_LEN, GeneveHeader};
use crate::gre::{self, GreHeader};
use crate::icmp::{self, IcmpHeader};
use crate::ip;
use crate::ipip::Inner;
use crate::ipv4::{IPV4_LEN, Ipv4Header};
use crate::ipv6::{self, FragmentHeader, IPV6_LEN, Ipv6Header};
use crate::ndp::{self, Neighbor};
use crate::offload::{Gso, GsoKind};
use crate::segment::{MAX_SEGMENTS, Segments};
use crate::tcp::{self, TcpHeader};
use crate::udp::{self, UdpHeader};
use crate::virtio;
use crate::vxlan::{VXLAN_LEN, VxlanHeader};

/// Every header and every method on it: none panics, and what was read is written again.
pub fn headers(bytes: &[u8]) {
    if let Ok((header, _)) = EthHeader::ref_from_prefix(bytes) {
        assert_eq!(EthHeader::new(header.dst, header.src, header.ethertype.get()), *header);
    }
    if let Ok((tag, _)) = VlanTag::ref_from_prefix(bytes) {
        assert!(tag.id() < 4096);
    }
    if let Ok((arp, _)) = Arp::ref_from_prefix(bytes) {
        let again = Arp::new(arp.op.get(), arp.sha, arp.sender(), arp.tha, arp.target());
        assert!(!arp.is_ethernet_ipv4() || again == *arp);
        assert!(arp.reply(arp.tha).is_ethernet_ipv4());
        assert!(!arp.is_probe() || arp.sender().is_unspecified());
    }
    if let Ok((header, _)) = Ipv4Header::ref_from_prefix(bytes) {
        assert!(header.version() < 16 && header.ihl() <= 60 && header.ecn() < 4);
        let pieces = header.more_fragments() || header.fragment_offset() > 0;
        assert_eq!(header.is_fragment(), pieces);
        let made = Ipv4Header::new(header.src(), header.dst(), header.protocol, header.ttl, header.total_len.get());
        assert!(made.dont_fragment() && checksum::verify_ipv4_header(made.as_bytes()));
    }
    if let Ok((header, _)) = Ipv6Header::ref_from_prefix(bytes) {
        let word = u32::from(header.version()) << 28 | u32::from(header.traffic_class()) << 20 | header.flow_label();
        assert_eq!(header.version_class_flow.get(), word);
    }
    if let Ok((header, _)) = TcpHeader::ref_from_prefix(bytes) {
        assert!(header.header_len() <= 60);
    }
    if let Ok((header, _)) = IcmpHeader::ref_from_prefix(bytes) {
        let (id, sequence) = header.echo();
        assert_eq!([id.to_be_bytes(), sequence.to_be_bytes()].concat(), header.rest);
        let _ = (icmp::v4::is_error(header.kind), icmp::v6::is_error(header.kind));
    }
    let _ = (UdpHeader::ref_from_prefix(bytes), FragmentHeader::ref_from_prefix(bytes));
}

/// The walk over IPv6 extension headers: `bytes[0]` is the next header, `bytes[1]` the limit.
pub fn extension_headers(bytes: &[u8]) {
    let [next, limit, ref rest @ ..] = *bytes else { return };
    if let Ok(upper) = ipv6::walk(next, rest, usize::from(limit)) {
        assert!(upper.offset <= rest.len());
        assert!(upper.offset % 4 == 0 && upper.offset >= 8 * usize::from(upper.fragment.is_some()));
        assert!(limit > 0 || upper.offset == 0);
    }
}

/// Neighbour solicitations and advertisements.
pub fn neighbor(bytes: &[u8]) {
    if let Ok((neighbor, mac)) = Neighbor::parse(bytes) {
        assert!(!neighbor.target().is_multicast());
        assert!(ndp::solicited_node(neighbor.target()).is_multicast());
        assert!(mac.is_none() || bytes.len() >= size_of::<ndp::NeighborMessage>());
    }
    // Each option but a last, broken one takes at least eight bytes.
    assert!(ndp::options(bytes).count() <= bytes.len() / 8 + 1);
}

/// The VXLAN header: what is accepted is what is sent.
pub fn vxlan(bytes: &[u8]) {
    if let Ok(vni) = VxlanHeader::parse(bytes) {
        assert_eq!(VxlanHeader::new(vni).as_bytes(), &bytes[..VXLAN_LEN]);
    }
}

/// The Geneve header: what it takes is there, and what we send is read again.
pub fn geneve(bytes: &[u8]) {
    if let Ok(read) = GeneveHeader::parse(bytes) {
        assert!((GENEVE_LEN..=bytes.len().min(260)).contains(&read.len) && read.len % 4 == 0);
        let again = GeneveHeader::parse(GeneveHeader::new(read.vni).as_bytes());
        assert!(again.is_ok_and(|again| again.vni == read.vni && again.len == GENEVE_LEN));
    }
}

/// The GRE header: what it takes is there, and what we send is read again.
pub fn gre(bytes: &[u8]) {
    if let Ok(read) = GreHeader::parse(bytes) {
        assert!((gre::GRE_LEN..=bytes.len().min(16)).contains(&read.len) && read.len % 4 == 0);
        let mut out = [0xa5; gre::GRE_KEY_LEN];
        let len = if read.key.is_some() { gre::GRE_KEY_LEN } else { gre::GRE_LEN };
        GreHeader::write(read.protocol, read.key, &mut out[..len]);
        assert_eq!(GreHeader::parse(&out[..len]), Ok(gre::Gre { checksum: false, len, ..read }));
        let _ = gre::verify(bytes.chunks(7));
    }
}

/// IP in IP: `bytes[0]` is the outer protocol.
pub fn ipip(bytes: &[u8]) {
    let [protocol, ref rest @ ..] = *bytes else { return };
    if let Ok(inner) = Inner::parse(protocol, rest) {
        assert_eq!((inner.protocol(), Inner::of(inner.ethertype())), (protocol, Some(inner)));
    }
}

/// The virtio header in the first 12 bytes; the rest is the frame.
pub fn virtio(bytes: &[u8]) {
    let Some((header, frame)) = bytes.split_first_chunk::<{ virtio::LEN }>() else { return };
    let Ok(offload) = virtio::parse(header, frame.len()) else { return };
    let mut again = [0xa5; virtio::LEN];
    virtio::write(&offload, &mut again);
    assert_eq!(virtio::parse(&again, frame.len()), Ok(offload));
    if let Some(partial) = offload.partial {
        assert!(usize::from(partial.start) + usize::from(partial.offset) + 2 <= frame.len());
    }
}

/// Sums: in two pieces split at `bytes[0]` and `bytes[1]`, and by the definition.
pub fn checksums(bytes: &[u8]) {
    let [at, more, ref rest @ ..] = *bytes else { return };
    let a = usize::from(at).min(rest.len());
    let b = (a + usize::from(more)).min(rest.len());
    let mut sum = Sum::new();
    sum.add(&rest[..a]).add(&rest[a..b]).add(&rest[b..]);
    let mut slow = 0;
    for pair in rest.chunks(2) {
        slow += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        slow = (slow & 0xffff) + (slow >> 16);
    }
    assert_eq!((u32::from(sum.fold()), u32::from(checksum::sum(rest))), (slow, slow));
}

/// Segmentation: `bytes[..8]` are the kind, where IP and transport begin, the segment size, the payload's length (both
/// in two bytes) and one of its bytes; the rest are the headers.
pub fn segmentation(bytes: &[u8]) {
    let [kind, l3, l4, s0, s1, p0, p1, fill, ref headers @ ..] = *bytes else { return };
    let (l3, l4) = (usize::from(l3), usize::from(l4));
    let payload_len = usize::from(u16::from_be_bytes([p0, p1]));
    let kind = [GsoKind::Tcp4, GsoKind::Tcp6, GsoKind::Udp][usize::from(kind % 3)];
    let gso = Gso { kind, ecn: false, size: u16::from_be_bytes([s0, s1]), header_len: 0 };
    let Ok(segments) = Segments::plan(headers, l3, l4, payload_len, &gso) else { return };
    assert!((1..=MAX_SEGMENTS).contains(&segments.count()));
    assert_eq!(segments.header_len(), headers.len());
    let mut end = 0;
    for i in 0..segments.count() {
        let payload = segments.payload(i);
        assert!(payload.start == end && !payload.is_empty() && payload.len() <= usize::from(gso.size));
        end = payload.end;
        let mut frame = vec![0xa5; headers.len() + payload.len()];
        frame[headers.len()..].fill(fill);
        let sum = checksum::sum(&frame[headers.len()..]);
        segments.write(i, headers, sum, &mut frame);
        assert_whole(&frame, l3, l4, kind);
    }
    assert_eq!(end, payload_len);
}

/// Asserts that lengths and checksums of a segment are correct.
fn assert_whole(frame: &[u8], l3: usize, l4: usize, kind: GsoKind) {
    let (network, transport) = frame[l3..].split_at(l4 - l3);
    let protocol = if kind == GsoKind::Udp { ip::UDP } else { ip::TCP };
    let len = transport.len() as u32;
    let pseudo = if network[0] >> 4 == 4 {
        let (header, _) = Ipv4Header::ref_from_prefix(network).expect("it could be cut");
        assert_eq!(usize::from(header.total_len.get()), frame.len() - l3);
        assert!(checksum::verify_ipv4_header(network));
        checksum::pseudo_v4(header.src(), header.dst(), protocol, len)
    } else {
        let (header, _) = Ipv6Header::ref_from_prefix(network).expect("it could be cut");
        assert_eq!(usize::from(header.payload_len.get()), frame.len() - l3 - IPV6_LEN);
        checksum::pseudo_v6(header.src(), header.dst(), protocol, len)
    };
    assert!(checksum::verify(pseudo, transport));
}

/// Coalescing: `bytes[..2]` are the stride, `bytes[2]` is the tunnel header's length, the rest is the receive buffer.
/// Whatever merges can be cut again, into what arrived.
pub fn coalescing(bytes: &[u8]) {
    let [s0, s1, skip, ref buf @ ..] = *bytes else { return };
    let (stride, skip) = (usize::from(u16::from_be_bytes([s0, s1])), usize::from(skip));
    let run = coalesce::run(buf, stride, skip);
    assert!((1..=MAX_FRAMES).contains(&run.frames));
    let mut head = [0xa5; 256];
    if run.gso.is_none() {
        let before = head;
        let offload = coalesce::finish(&mut head, &run);
        assert_eq!((run.frames, offload.gso, offload.partial, offload.verified), (1, None, None, run.verified));
        assert_eq!(head, before);
        return;
    }
    assert!(run.verified && run.frames > 1 && (run.frames - 1) * stride < buf.len());
    assert_eq!(run.total_payload, (run.frames - 1) * run.first_payload + run.last_payload);
    let head = &mut head[..run.header_len];
    head.copy_from_slice(&buf[skip..][..run.header_len]);
    let offload = coalesce::finish(head, &run);
    assert_cuts_again(head, &run, buf.chunks(stride).map(|datagram| &datagram[skip..]));
    assert_eq!((offload.gso, offload.verified), (run.gso, false));
}

/// Cuts a superframe and compares each segment with the frame it came from. IPv4's id is left out, since it may have
/// been constant, and the checksums, since ones' complement has two zeros; that they are correct is asserted instead.
fn assert_cuts_again<'a>(head: &[u8], run: &Run, frames: impl Iterator<Item = &'a [u8]>) {
    let gso = run.gso.expect("only superframes are cut");
    let v4 = head[ETH_LEN] >> 4 == 4;
    let l4 = ETH_LEN + if v4 { IPV4_LEN } else { IPV6_LEN };
    let field = l4 + if gso.kind == GsoKind::Udp { udp::CHECKSUM_OFFSET } else { tcp::CHECKSUM_OFFSET };
    let protocol = if gso.kind == GsoKind::Udp { ip::UDP } else { ip::TCP };
    let mut superframe = head.to_vec();
    superframe.resize(run.header_len + run.total_payload, 0);
    assert!(coalesce::partial_checksum(&superframe, ETH_LEN, l4, protocol));
    let segments = Segments::plan(head, ETH_LEN, l4, run.total_payload, &gso).expect("what was merged can be cut");
    assert_eq!(segments.count(), run.frames);
    for (i, frame) in (0..segments.count()).zip(frames) {
        let mut made = frame[..run.header_len + segments.payload(i).len()].to_vec();
        let mut frame = made.clone();
        let sum = checksum::sum(&frame[run.header_len..]);
        segments.write(i, head, sum, &mut made);
        assert_whole(&made, ETH_LEN, l4, gso.kind);
        for bytes in [&mut made, &mut frame] {
            bytes[field..field + 2].fill(0);
            if v4 {
                bytes[ETH_LEN + 4..ETH_LEN + 6].fill(0);
                bytes[ETH_LEN + 10..ETH_LEN + 12].fill(0);
            }
        }
        assert_eq!(made, frame);
    }
}

/// Recognising partial checksums: `bytes[..3]` are where IP and transport begin and the protocol; the rest is a frame.
pub fn partial_checksum(bytes: &[u8]) {
    let [l3, l4, protocol, ref frame @ ..] = *bytes else { return };
    if coalesce::partial_checksum(frame, l3.into(), l4.into(), protocol) {
        assert!(frame.len() >= usize::from(l4) + 8);
    }
}

/// All of the above.
pub fn everything(bytes: &[u8]) {
    headers(bytes);
    extension_headers(bytes);
    neighbor(bytes);
    vxlan(bytes);
    geneve(bytes);
    gre(bytes);
    ipip(bytes);
    virtio(bytes);
    checksums(bytes);
    segmentation(bytes);
    coalescing(bytes);
    partial_checksum(bytes);
}
