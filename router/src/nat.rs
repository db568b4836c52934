//! The one place where a forwarded packet's headers change.
//!
//! [`rewrite`] refuses what cannot go this way before it changes a byte, so that an ICMP error can quote the packet as it
//! came. A bridged packet is not changed at all; a routed one gets new MACs and a TTL less by one, with the IPv4 header
//! checksum adjusted by the difference (RFC 1624), never computed anew: a wrong checksum stays wrong.

use weft_encap::checksum;
use weft_encap::eth::EthHeader;
use weft_encap::ipv4::Ipv4Header;
use weft_encap::ipv6::Ipv6Header;
use weft_encap::zerocopy::FromBytes;
use weft_encap::zerocopy::byteorder::network_endian::U16;

use crate::drop_reason::DropReason;
use crate::frame::Frame;
use crate::packet::Packet;
use crate::path::{Macs, Path};

/// Rewrites a frame as its path says.
///
/// # Errors
/// `MtuExceeded` or `TtlExceeded`, with the frame unchanged.
pub fn rewrite(frame: &mut Frame, packet: &Packet, path: &Path) -> Result<(), DropReason> {
    if let Some(ip) = packet.ip() {
        if ip.wire_size(&frame.offload) > path.rewrite.mtu {
            return Err(DropReason::MtuExceeded);
        }
        // RFC 1812, section 5.3.1: a router must not forward a packet whose TTL would become zero.
        if path.rewrite.routed.is_some() && ip.ttl <= 1 {
            return Err(DropReason::TtlExceeded);
        }
    }
    if let Some(macs) = path.rewrite.routed
        && let Some(ip) = packet.ip()
    {
        route(frame.head_mut(), macs, ip.src.is_ipv4());
    }
    Ok(())
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
