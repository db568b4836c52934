//! ICMP errors: what the sender of a refused packet is told.
//!
//! RFC 792 and RFC 4443 say which message; RFC 1122 section 3.2.2 and RFC 4443 section 2.4 (e) say about what none may be sent:
//! other errors, later fragments, and anything sent to or from more than one. The error quotes the packet as
//! it came, and a superframe as its first segment would look on the wire, checksums filled in, so that
//! the sender's kernel finds the connection. How many errors a port causes is limited by the caller.

use std::net::{IpAddr, Ipv4Addr};

use weft_encap::checksum::{self, Sum};
use weft_encap::eth::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, EthHeader};
use weft_encap::icmp::{ICMP_LEN, IcmpHeader, v4, v6};
use weft_encap::ip;
use weft_encap::ipv4::{IPV4_LEN, Ipv4Header};
use weft_encap::ipv6::{IPV6_LEN, Ipv6Header};
use weft_encap::segment::Segments;
use weft_encap::zerocopy::IntoBytes;
use weft_encap::zerocopy::byteorder::network_endian::U16;

use crate::drop_reason::DropReason;
use crate::frame::{Body, Frame};
use crate::packet::{Fragment, Ip, L3, Packet};
use crate::path::Macs;
use crate::pool::Pool;
use crate::port::PortId;
use crate::tables::Gateway;

/// RFC 1812, section 4.3.2.3: an IPv4 error holds as much of the packet as fits 576 bytes.
const LIMIT_V4: usize = 576;
/// RFC 4443, section 2.4 (c): as much as fits the minimum IPv6 MTU.
const LIMIT_V6: usize = 1280;
const TTL: u8 = 64;

/// Whether the sender of this packet is told that it ended for this reason.
pub fn is_due(reason: DropReason, packet: &Packet) -> bool {
    let Some(ip) = packet.ip() else { return false };
    let about = matches!(
        reason,
        DropReason::TtlExceeded | DropReason::MtuExceeded | DropReason::NoRoute | DropReason::UnknownNeighbour
    );
    let to_many = ip.dst.is_multicast() || ip.dst == IpAddr::V4(Ipv4Addr::BROADCAST);
    let single = packet.dst.is_unicast() && !ip.src.is_unspecified() && !ip.src.is_multicast() && !to_many;
    about && single && !ip.is_icmp_error() && ip.fragment != Some(Fragment::Later)
}

/// Makes the error about a frame, from the gateway to the frame's sender, as an Ethernet frame with these MACs. `mtu` is what would have
/// fitted. `None` if the gateway has no address of that family or no buffer is free.
pub fn error(
    reason: DropReason,
    packet: &Packet,
    frame: &Frame,
    mtu: u32,
    gateway: &Gateway,
    macs: Macs,
    pool: &Pool,
) -> Option<Frame> {
    let ip = packet.ip()?;
    let (mut chunk, start) = pool.chunk()?;
    let (header, limit) = if ip.src.is_ipv4() { (IPV4_LEN, LIMIT_V4) } else { (IPV6_LEN, LIMIT_V6) };
    let message = L3 + header;
    let quote = message + ICMP_LEN;
    let bytes = &mut chunk[start..start + L3 + limit];
    let end = quote + quote_packet(frame, ip, &mut bytes[quote..])?;
    let icmp = message_for(reason, ip, mtu)?;
    bytes[message..quote].copy_from_slice(icmp.as_bytes());
    match (ip.src, gateway.ipv4, gateway.ipv6) {
        (IpAddr::V4(to), Some(from), _) => {
            let payload = (end - message) as u16;
            let header = Ipv4Header::new(from, to, ip::ICMP, TTL, payload);
            write_ethernet(bytes, macs, ETHERTYPE_IPV4);
            bytes[L3..message].copy_from_slice(header.as_bytes());
            seal(&mut bytes[message..end], Sum::new());
        }
        (IpAddr::V6(to), _, Some(from)) => {
            let payload = (end - message) as u16;
            let header = Ipv6Header::new(from, to, ip::ICMPV6, TTL, payload);
            write_ethernet(bytes, macs, ETHERTYPE_IPV6);
            bytes[L3..message].copy_from_slice(header.as_bytes());
            seal(&mut bytes[message..end], checksum::pseudo_v6(from, to, ip::ICMPV6, u32::from(payload)));
        }
        _ => return None,
    }
    Some(Frame::new(chunk, start, end, frame.ingress()))
}

fn message_for(reason: DropReason, ip: &Ip, mtu: u32) -> Option<IcmpHeader> {
    let (v4_kind, v6_kind, v4_rest, v6_rest) = match reason {
        DropReason::TtlExceeded => {
            ((v4::TIME_EXCEEDED, v4::TTL_EXCEEDED), (v6::TIME_EXCEEDED, v6::HOP_LIMIT_EXCEEDED), [0; 4], [0; 4])
        }
        DropReason::NoRoute => {
            ((v4::UNREACHABLE, v4::UNREACHABLE_NET), (v6::UNREACHABLE, v6::UNREACHABLE_ROUTE), [0; 4], [0; 4])
        }
        DropReason::UnknownNeighbour => {
            ((v4::UNREACHABLE, v4::UNREACHABLE_HOST), (v6::UNREACHABLE, v6::UNREACHABLE_ADDRESS), [0; 4], [0; 4])
        }
        DropReason::MtuExceeded => {
            // RFC 1191, section 4: the MTU is the low half of the second word; RFC 4443, section 3.2: all of it.
            let [high, low] = (mtu.min(0xffff) as u16).to_be_bytes();
            ((v4::UNREACHABLE, v4::FRAGMENTATION_NEEDED), (v6::PACKET_TOO_BIG, 0), [0, 0, high, low], mtu.to_be_bytes())
        }
        _ => return None,
    };
    Some(match ip.src {
        IpAddr::V4(_) => IcmpHeader::new(v4_kind.0, v4_kind.1, v4_rest),
        IpAddr::V6(_) => IcmpHeader::new(v6_kind.0, v6_kind.1, v6_rest),
    })
}

/// Makes a frame of an IP packet that has room for the Ethernet header before it; `None` if no buffer is free.
pub fn wrap(bytes: &mut [u8], macs: Macs, ingress: PortId, pool: &Pool) -> Option<Frame> {
    let ethertype = if bytes.get(L3)? >> 4 == 4 { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 };
    write_ethernet(bytes, macs, ethertype);
    Frame::from_bytes(bytes, ingress, pool)
}

fn write_ethernet(bytes: &mut [u8], macs: Macs, ethertype: u16) {
    bytes[..L3].copy_from_slice(EthHeader::new(macs.dst, macs.src, ethertype).as_bytes());
}

fn seal(message: &mut [u8], mut sum: Sum) {
    let value = sum.add(message).finish();
    message[2..4].copy_from_slice(U16::new(value).as_bytes());
}

/// Copies the L3 packet that the frame stands for, or its first segment, into `out`, as far as it fits. Returns how much it was.
fn quote_packet(frame: &Frame, ip: &Ip, out: &mut [u8]) -> Option<usize> {
    let head = frame.head();
    let Some(gso) = frame.offload.gso else {
        let len = copy_pieces(frame, L3, out);
        if let Some(partial) = frame.offload.partial {
            let field = usize::from(partial.start) + usize::from(partial.offset);
            let mut sum = Sum::new();
            sum.add(&head[usize::from(partial.start)..]);
            frame.body().into_iter().flat_map(Body::pieces).for_each(|piece| {
                sum.add(piece);
            });
            let at = field - L3;
            if at + 2 <= len {
                out[at..at + 2].copy_from_slice(&sum.finish_nonzero().to_be_bytes());
            }
        }
        return Some(len);
    };
    let header_len = usize::from(gso.header_len);
    let payload_len = frame.len() - header_len;
    let segments = Segments::plan(&head[..header_len], L3, usize::from(ip.l4), payload_len, &gso).ok()?;
    let first = segments.payload(0);
    let mut sum = Sum::new();
    let mut left = first.len();
    for piece in std::iter::once(&head[header_len..]).chain(frame.body().into_iter().flat_map(Body::pieces)) {
        let take = piece.len().min(left);
        sum.add(&piece[..take]);
        left -= take;
    }
    let mut headers = [0; MAX_HEADERS];
    let headers = headers.get_mut(..header_len)?;
    segments.write(0, &head[..header_len], sum.fold(), headers);
    let mut len = copy_pieces(frame, L3, out).min(header_len - L3 + first.len());
    let quoted = (header_len - L3).min(out.len());
    out[..quoted].copy_from_slice(&headers[L3..L3 + quoted]);
    len = len.min(out.len());
    Some(len)
}

/// Room for the headers of a superframe: Ethernet, IPv6 with extension headers as far as a head holds them, TCP with options.
const MAX_HEADERS: usize = 512;

fn copy_pieces(frame: &Frame, skip: usize, out: &mut [u8]) -> usize {
    let mut len = 0;
    for piece in std::iter::once(&frame.head()[skip..]).chain(frame.body().into_iter().flat_map(Body::pieces)) {
        let take = piece.len().min(out.len() - len);
        out[len..len + take].copy_from_slice(&piece[..take]);
        len += take;
    }
    len
}
