//! The one place where a forwarded packet's headers change.
//!
//! [`may_pass`] refuses what cannot go this way before a byte changes, so that an ICMP error can quote the packet as it
//! came. A bridged packet is not changed, but for what a TCP SYN between nodes announces ([`mss`]); a routed one gets new MACs and a TTL less by one, with the IPv4 header
//! checksum adjusted by the difference (RFC 1624), never computed anew: a wrong checksum stays wrong.

use std::net::IpAddr;

use weft_encap::checksum::{self, Delta};
use weft_encap::eth::EthHeader;
use weft_encap::icmp;
use weft_encap::ip;
use weft_encap::ipv4::{IPV4_LEN, Ipv4Header};
use weft_encap::ipv6::{self, IPV6_LEN, Ipv6Header};
use weft_encap::zerocopy::FromBytes;
use weft_encap::zerocopy::byteorder::network_endian::U16;
use weft_encap::{tcp, udp};

use crate::drop_reason::DropReason;
use crate::frame::Frame;
use crate::packet::{Fragment, L3, Packet};
use crate::path::{Macs, Rewrite, Side, Translation};

pub mod mss;

/// Whether a packet may take this way; to be asked before anything is remembered of it, and before a byte changes.
///
/// # Errors
/// `MtuExceeded` or `TtlExceeded`.
pub fn may_pass(frame: &Frame, packet: &Packet, rewrite: &Rewrite) -> Result<(), DropReason> {
    let Some(ip) = packet.ip() else { return Ok(()) };
    if ip.wire_size(&frame.offload) > rewrite.mtu {
        return Err(DropReason::MtuExceeded);
    }
    // RFC 1812, section 5.3.1: a router must not forward a packet whose TTL would become zero.
    if rewrite.routed.is_some() && ip.ttl <= 1 { Err(DropReason::TtlExceeded) } else { Ok(()) }
}

/// Rewrites a frame that may pass; its destination, too, if it turns round: it was sent to the outer port of another pod of this node.
pub fn rewrite(frame: &mut Frame, packet: &Packet, rewrite: &Rewrite, turned: Option<&Translation>) {
    let (Some(macs), Some(ip)) = (rewrite.routed, packet.ip()) else { return };
    route(frame.head_mut(), macs, ip.src.is_ipv4());
    for translation in [rewrite.translation.as_ref(), turned].into_iter().flatten() {
        let later = ip.fragment == Some(Fragment::Later);
        // A later fragment has no ports, whatever stands there.
        let protocol = if later { ip::NO_NEXT } else { ip.protocol };
        let place = Place { l3: L3, l4: ip.l4.into(), protocol };
        let partial = frame.offload.partial.is_some();
        translate(frame.head_mut(), place, translation, partial);
    }
}

/// Where a packet's headers are.
#[derive(Copy, Clone, Debug)]
pub struct Place {
    /// Of the network header.
    pub l3: usize,
    /// Of the transport header.
    pub l4: usize,
    /// Which that is; any other than TCP, UDP and ICMP for none.
    pub protocol: u8,
}

/// Gives one side of a packet another address and port. `partial` says that the transport checksum is still to be completed: then
/// its field holds the pseudo-header's sum, which covers addresses and no ports.
pub fn translate(bytes: &mut [u8], place: Place, translation: &Translation, partial: bool) {
    let Some(addresses) = readdress(bytes, place.l3, translation) else { return };
    let source = translation.side == Side::Source;
    let Place { l4, protocol, .. } = place;
    match protocol {
        ip::TCP | ip::UDP => {
            let at = if source { l4 } else { l4 + 2 };
            let Some(old) = replace(bytes, at, translation.port) else { return };
            let whole = addresses.word(old, translation.port);
            let field = l4 + if protocol == ip::TCP { tcp::CHECKSUM_OFFSET } else { udp::CHECKSUM_OFFSET };
            adjust(bytes, field, |sum| match (partial, protocol) {
                (true, _) => addresses.apply_partial(sum),
                (false, ip::TCP) => whole.apply(sum),
                (false, _) => whole.apply_udp(sum),
            });
        }
        ip::ICMP | ip::ICMPV6 => {
            // RFC 4443, section 2.3: ICMPv6's checksum covers a pseudo-header, and RFC 792's does not.
            let pseudo = if protocol == ip::ICMPV6 { addresses } else { Delta::NONE };
            let inside = translate_message(bytes, l4, protocol, translation);
            let field = l4 + icmp::CHECKSUM_OFFSET;
            adjust(bytes, field, |sum| match partial {
                true => pseudo.apply_partial(sum),
                false => pseudo.word(inside.0, inside.1).apply(sum),
            });
        }
        _ => {}
    }
}

/// The identifier of a ping, or what an error quotes. Returns the sum of what changed, before and after.
fn translate_message(bytes: &mut [u8], l4: usize, protocol: u8, translation: &Translation) -> (u16, u16) {
    let v4 = protocol == ip::ICMP;
    let Some(kind) = bytes.get(l4).copied() else { return (0, 0) };
    let is_error = if v4 { icmp::v4::is_error(kind) } else { icmp::v6::is_error(kind) };
    if !is_error {
        return replace(bytes, l4 + 4, translation.port).map_or((0, 0), |old| (old, translation.port));
    }
    let quote = l4 + icmp::ICMP_LEN;
    let Some(before) = bytes.get(quote..).map(checksum::sum) else { return (0, 0) };
    // What is quoted went the other way.
    let side = if translation.side == Side::Source { Side::Destination } else { Side::Source };
    if let Some(place) = place_of_quote(&bytes[quote..], quote) {
        translate(bytes, place, &Translation { side, ..*translation }, false);
    }
    (before, checksum::sum(&bytes[quote..]))
}

fn place_of_quote(quoted: &[u8], l3: usize) -> Option<Place> {
    // An error about an error is not sent, so what is quoted is none.
    let (protocol, offset) = match quoted.first()? >> 4 {
        4 => {
            let (header, _) = Ipv4Header::ref_from_prefix(quoted).ok()?;
            (header.protocol, header.ihl().max(IPV4_LEN))
        }
        6 => {
            let (header, rest) = Ipv6Header::ref_from_prefix(quoted).ok()?;
            let upper = ipv6::walk(header.next_header, rest, ipv6::MAX_EXTENSION_HEADERS).ok()?;
            (upper.protocol, IPV6_LEN + upper.offset)
        }
        _ => return None,
    };
    let is_message = protocol == ip::ICMP || protocol == ip::ICMPV6;
    let is_error = match quoted.get(offset) {
        Some(kind) if protocol == ip::ICMP => icmp::v4::is_error(*kind),
        Some(kind) => icmp::v6::is_error(*kind),
        None => true,
    };
    (!(is_message && is_error)).then_some(Place { l3, l4: l3 + offset, protocol })
}

/// Replaces an address, and with it IPv4's header checksum; says what that does to others.
fn readdress(bytes: &mut [u8], l3: usize, translation: &Translation) -> Option<Delta> {
    let source = translation.side == Side::Source;
    let network = bytes.get_mut(l3..)?;
    match translation.address {
        IpAddr::V4(new) => {
            let (header, _) = Ipv4Header::mut_from_prefix(network).ok()?;
            let field = if source { &mut header.src } else { &mut header.dst };
            let delta = Delta::NONE.v4((*field).into(), new);
            *field = new.octets();
            header.checksum = U16::new(delta.apply(header.checksum.get()));
            Some(delta)
        }
        IpAddr::V6(new) => {
            let (header, _) = Ipv6Header::mut_from_prefix(network).ok()?;
            let field = if source { &mut header.src } else { &mut header.dst };
            let delta = Delta::NONE.v6((*field).into(), new);
            *field = new.octets();
            Some(delta)
        }
    }
}

/// Replaces a word; gives the old one.
fn replace(bytes: &mut [u8], at: usize, new: u16) -> Option<u16> {
    let field = bytes.get_mut(at..at + 2)?;
    let old = u16::from_be_bytes([field[0], field[1]]);
    field.copy_from_slice(&new.to_be_bytes());
    Some(old)
}

/// Changes a checksum, if it is there.
fn adjust(bytes: &mut [u8], at: usize, change: impl FnOnce(u16) -> u16) {
    if let Some(field) = bytes.get_mut(at..at + 2) {
        let sum = change(u16::from_be_bytes([field[0], field[1]]));
        field.copy_from_slice(&sum.to_be_bytes());
    }
}

/// Rewrites the headers of a packet that is routed, whose TTL is known to be more than one.
#[inline]
pub fn route(bytes: &mut [u8], macs: Macs, v4: bool) {
    let (eth, network) = EthHeader::mut_from_prefix(bytes).expect("a packet has an Ethernet header");
    eth.dst = macs.dst;
    eth.src = macs.src;
    if v4 {
        let (header, _) = Ipv4Header::mut_from_prefix(network).expect("the packet was read as IPv4");
        let word = |ttl: u8| u16::from_be_bytes([ttl, header.protocol]);
        let adjusted = checksum::adjust(header.checksum.get(), word(header.ttl), word(header.ttl - 1));
        header.checksum = U16::new(adjusted);
        header.ttl -= 1;
    } else {
        let (header, _) = Ipv6Header::mut_from_prefix(network).expect("the packet was read as IPv6");
        header.hop_limit -= 1;
    }
}
