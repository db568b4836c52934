//! A quick look at a frame: enough to recognise a flow that is known.
//!
//! Almost every frame is a plain TCP or UDP packet of a flow that was decided before. [`glimpse`] reads its headers once, in
//! place, and makes the same checks of the single packet that [`Packet::parse`](crate::packet::Packet::parse) makes: lengths, the IPv4
//! checksum, offload metadata. What it cannot read at a glance (options, extension headers, fragments, other
//! protocols) and whatever is wrong it leaves to the thorough way, which also finds the name for it: `None` is never the
//! end of a frame.

use weft_encap::eth::{ETH_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6};
use weft_encap::ip;
use weft_encap::ipv4::IPV4_LEN;
use weft_encap::ipv6::IPV6_LEN;
use weft_encap::offload::{GsoKind, Offload};
use weft_encap::tcp::{self, TCP_LEN};
use weft_encap::udp::{self, UDP_LEN};

use crate::flow::{Seed, Signature};
use crate::frame::Meta;
use crate::path::Sender;

/// What a glimpse of a frame shows.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Glimpse {
    /// What its path depends on.
    pub signature: Signature,
    /// The signature's hash.
    pub hash: u64,
    /// Bytes from the Ethernet header to the end of the IP packet; what follows is padding.
    pub len: u32,
    /// Bytes of the largest L3 packet that goes on a wire for it.
    pub wire_size: u32,
    /// Where its Ethernet header is: behind the tunnel header, if it came by one.
    pub start: u16,
    /// Bytes of all headers.
    pub header_len: u16,
    /// TTL or hop limit.
    pub ttl: u8,
    /// It is IPv4, with a header checksum.
    pub v4: bool,
}

impl Glimpse {
    /// Where its transport header is, from its Ethernet header on.
    #[inline(always)]
    pub fn l4(&self) -> usize {
        ETH_LEN + if self.v4 { IPV4_LEN } else { IPV6_LEN }
    }
}

/// Up to which byte of an IPv4 and of an IPv6 packet with UDP there are headers. TCP's are longer.
const V4: usize = ETH_LEN + IPV4_LEN + UDP_LEN;
const V6: usize = ETH_LEN + IPV6_LEN + UDP_LEN;

/// Looks at the frame whose Ethernet header is at `start` of its head, and writes what it sees to `seen`. `None`: it is
/// something else, and `seen` is worth nothing.
#[inline(always)]
pub fn glimpse(frame: &Meta, head: &[u8], start: usize, sender: Sender, seed: &Seed, seen: &mut Glimpse) -> Option<()> {
    let bytes = head.get(start..)?;
    let headers = bytes.first_chunk::<V4>()?;
    let room = frame.len() - start;
    match u16::from_be_bytes(at(headers, 12)) {
        ETHERTYPE_IPV4 => {
            let l4 = ETH_LEN + IPV4_LEN;
            let (total, protocol) = (u16::from_be_bytes(at(headers, 16)), headers[23]);
            let datagram = u16::from_be_bytes(at(headers, l4 + 4)).into();
            let len = ETH_LEN + usize::from(total);
            let header_len = header_len(bytes, l4, len, protocol, datagram)?;
            if !is_plain_v4(headers) || len > room {
                return None;
            }
            seen.wire_size = wire_size(&frame.offload, (l4, protocol, true), (bytes.len(), header_len, len))?;
            let eth = headers.first_chunk().expect("there are more bytes than that");
            seen.signature = Signature::v4(sender, eth, at(headers, 26), protocol, Some(at(headers, l4)));
            (seen.len, seen.header_len, seen.ttl, seen.v4) = (len as u32, header_len as u16, headers[22], true);
        }
        ETHERTYPE_IPV6 => {
            let headers = bytes.first_chunk::<V6>()?;
            let l4 = ETH_LEN + IPV6_LEN;
            let (payload, protocol) = (u16::from_be_bytes(at(headers, 18)), headers[20]);
            let datagram = u16::from_be_bytes(at(headers, l4 + 4)).into();
            let len = l4 + usize::from(payload);
            let header_len = header_len(bytes, l4, len, protocol, datagram)?;
            if headers[14] >> 4 != 6 || len > room {
                return None;
            }
            seen.wire_size = wire_size(&frame.offload, (l4, protocol, false), (bytes.len(), header_len, len))?;
            let eth = headers.first_chunk().expect("there are more bytes than that");
            seen.signature = Signature::v6(sender, eth, &at(headers, 22), protocol, Some(at(headers, l4)));
            (seen.len, seen.header_len, seen.ttl, seen.v4) = (len as u32, header_len as u16, headers[21], false);
        }
        _ => return None,
    }
    seen.start = start as u16;
    seen.hash = seen.signature.hash(seed);
    Some(())
}

/// Some bytes of the headers; where they are is known when this is compiled, and so is that they are there.
#[inline(always)]
fn at<const N: usize>(headers: &[u8], at: usize) -> [u8; N] {
    *headers[at..].first_chunk().expect("the headers are longer than that")
}

/// Whether an IPv4 header has no options, is correct, and is no fragment's.
#[inline(always)]
fn is_plain_v4(headers: &[u8; V4]) -> bool {
    let (first, second) = (u64::from_ne_bytes(at(headers, 14)), u64::from_ne_bytes(at(headers, 22)));
    let third = u64::from(u32::from_ne_bytes(at(headers, 30)));
    // RFC 1071: the ones' complement sum of a header with a correct checksum is all ones, in either byte order, and carries
    // go round. What follows folds 64 bits to 16.
    let (sum, carry) = first.overflowing_add(second);
    let (sum, again) = sum.overflowing_add(third + u64::from(carry));
    let sum = (sum >> 32) + (sum & 0xffff_ffff) + u64::from(again);
    let sum = (sum >> 32) + (sum >> 16 & 0xffff) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    // More fragments, and the offset (RFC 791).
    let fragment = u16::from_be_bytes(at(headers, 20)) & 0x3fff;
    headers[14] == 0x45 && fragment == 0 && sum == 0xffff
}

/// Length of all headers, if the transport header fits the packet, whose end is at `len`. `datagram` is what UDP's own
/// length field says.
#[inline(always)]
fn header_len(bytes: &[u8], l4: usize, len: usize, protocol: u8, datagram: usize) -> Option<usize> {
    match protocol {
        ip::UDP => (datagram >= UDP_LEN && l4 + datagram <= len).then_some(l4 + UDP_LEN),
        ip::TCP => {
            let fixed = bytes.get(l4..l4 + TCP_LEN)?;
            let header = usize::from(fixed[12] >> 4) * 4;
            // A connection that begins is decided anew: who it belongs to may have changed since its ports were used last.
            (fixed[13] & tcp::SYN == 0 && header >= TCP_LEN && l4 + header <= len).then_some(l4 + header)
        }
        _ => None,
    }
}

/// Bytes of the largest L3 packet, if what is still to be done fits the headers. The lengths are those of the head from
/// the Ethernet header on, of the headers, and of the whole packet.
#[inline(always)]
fn wire_size(
    offload: &Offload,
    (l4, protocol, v4): (usize, u8, bool),
    (head, header_len, len): (usize, usize, usize),
) -> Option<u32> {
    let whole = (len - ETH_LEN) as u32;
    let Some(partial) = offload.partial else {
        return offload.gso.is_none().then_some(whole);
    };
    let checksum = if protocol == ip::TCP { tcp::CHECKSUM_OFFSET } else { udp::CHECKSUM_OFFSET };
    if (usize::from(partial.start), usize::from(partial.offset)) != (l4, checksum) {
        return None;
    }
    let Some(gso) = offload.gso else { return Some(whole) };
    let fits = match gso.kind {
        GsoKind::Tcp4 => protocol == ip::TCP && v4,
        GsoKind::Tcp6 => protocol == ip::TCP && !v4,
        GsoKind::Udp => protocol == ip::UDP,
    };
    let usable = fits && gso.size > 0 && header_len <= head && header_len < len;
    usable.then(|| whole.min((header_len - ETH_LEN) as u32 + u32::from(gso.size)))
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    use super::*;
    use crate::packet::Packet;
    use crate::pool::Pool;
    use crate::port::PortId;
    use weft_encap::offload::{Gso, Partial};

    use crate::frame::Frame;

    const SENDER: Sender = Sender::Port(PortId(3));

    /// A packet of one of the kinds that are recognised.
    fn packet(v6: bool, tcp: bool, payload: usize) -> Vec<u8> {
        let eth = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
        let ip = if v6 { eth.ipv6([7; 16], [9; 16], 64) } else { eth.ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64) };
        let (mut bytes, payload) = (Vec::new(), vec![0x5a; payload]);
        match tcp {
            true => ip.tcp(1000, 80, 5, 100).ack(7).write(&mut bytes, &payload).unwrap(),
            false => ip.udp(1000, 53).write(&mut bytes, &payload).unwrap(),
        }
        bytes
    }

    fn look(frame: &Frame) -> Option<Glimpse> {
        let mut seen = Glimpse::default();
        let (meta, head) = frame.parts();
        glimpse(meta, head, 0, SENDER, &Seed::new(1), &mut seen).map(|()| seen)
    }

    /// What is seen at a glance is what a thorough look finds.
    fn agrees(bytes: &[u8], offload: Offload) -> Result<bool, TestCaseError> {
        let pool = Pool::new(4, 4).unwrap();
        let mut frame = Frame::from_bytes(bytes, PortId(3), &pool).unwrap();
        frame.offload = offload;
        let Some(seen) = look(&frame) else { return Ok(false) };
        let packet = Packet::parse(&mut frame, SENDER);
        prop_assert!(packet.is_ok(), "{:?}: {bytes:?} {offload:?}", packet.err());
        let packet = packet.unwrap();
        let ip = packet.ip().unwrap();
        prop_assert_eq!(Some(seen.signature), Signature::of(&packet));
        prop_assert_eq!(seen.hash, seen.signature.hash(&Seed::new(1)));
        prop_assert_eq!((seen.len as usize, seen.ttl, seen.v4), (frame.len(), ip.ttl, ip.src.is_ipv4()));
        prop_assert_eq!(seen.wire_size, ip.wire_size(&frame.offload));
        if let Some(gso) = frame.offload.gso {
            prop_assert_eq!(seen.header_len, gso.header_len);
        }
        prop_assert!(ip.fragment.is_none());
        Ok(true)
    }

    #[test]
    fn plain_packets_are_recognised() {
        for (v6, tcp, payload) in
            [(false, false, 18), (false, true, 0), (true, false, 0), (true, true, 3000), (false, true, 60_000)]
        {
            let bytes = packet(v6, tcp, payload);
            assert!(agrees(&bytes, Offload::default()).unwrap(), "{v6} {tcp} {payload}");
            let mut padded = bytes.clone();
            padded.extend([0xa5; 9]);
            assert!(agrees(&padded, Offload::default()).unwrap(), "{v6} {tcp} {payload}, padded");
        }
    }

    #[test]
    fn superframes_are_recognised() {
        for (v6, tcp, kind) in [(false, true, GsoKind::Tcp4), (true, true, GsoKind::Tcp6), (true, false, GsoKind::Udp)]
        {
            let start = if v6 { 54 } else { 34 };
            let partial = Partial { start, offset: if tcp { 16 } else { 6 } };
            let gso = Gso { kind, ecn: false, size: 1000, header_len: 0 };
            let offload = Offload { partial: Some(partial), gso: Some(gso), verified: false };
            assert!(agrees(&packet(v6, tcp, 20_000), offload).unwrap(), "{v6} {tcp}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        #[test]
        fn what_is_recognised_is_what_a_thorough_look_finds(
            (v6, tcp, payload) in (any::<bool>(), any::<bool>(), 0usize..80),
            changes in proptest::collection::vec((0usize..80, any::<u8>()), 0..4),
            (cut, summed) in (0usize..40, any::<bool>()),
            partial in proptest::option::of((prop_oneof![Just(34u16), Just(54), any::<u16>()], prop_oneof![Just(6u16), Just(16), any::<u16>()])),
            gso in proptest::option::of((0usize..3, any::<u16>())),
        ) {
            let mut bytes = packet(v6, tcp, payload);
            for (at, value) in changes {
                let at = at % bytes.len();
                bytes[at] = value;
            }
            if summed && !v6 {
                bytes[24..26].fill(0);
                let sum = weft_encap::checksum::ipv4_header(&bytes[14..34]);
                bytes[24..26].copy_from_slice(&sum.to_be_bytes());
            }
            bytes.truncate(bytes.len().saturating_sub(cut.saturating_sub(30)));
            let kind = |index| [GsoKind::Tcp4, GsoKind::Tcp6, GsoKind::Udp][index];
            let offload = Offload {
                partial: partial.map(|(start, offset)| Partial { start, offset }),
                gso: gso.map(|(index, size)| Gso { kind: kind(index), ecn: false, size, header_len: 0 }),
                verified: false,
            };
            agrees(&bytes, offload)?;
        }
    }
}
