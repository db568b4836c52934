//! Partial checksums that come without a word about it.
//!
//! A pod's stack leaves TCP and UDP checksums to its device, and a veth has none: the field then holds the sum of the
//! pseudo-header, not complemented, and an XDP program is not told. But it can be seen: a field that equals that sum is one. Should a
//! finished checksum equal it by chance, completing it gives the same value again, so nothing can go wrong.

use weft_encap::checksum::{Sum, pseudo_v4, pseudo_v6};
use weft_encap::eth::{ETH_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6};
use weft_encap::ip::{DESTINATION, HOP_BY_HOP, TCP, UDP};
use weft_encap::ipv4::{FRAGMENT_OFFSET, MORE_FRAGMENTS};
use weft_encap::offload::Partial;

/// Extension headers that are looked behind.
const EXTENSIONS: usize = 4;

/// Says where the frame's checksum has to be completed, if it has.
pub fn recognise(frame: &[u8]) -> Option<Partial> {
    let (start, protocol, pseudo) = match u16_at(frame, 12)? {
        ETHERTYPE_IPV4 => v4(frame)?,
        ETHERTYPE_IPV6 => v6(frame)?,
        _ => return None,
    };
    let offset: u16 = match protocol {
        TCP => 16,
        UDP => 6,
        _ => return None,
    };
    let field = u16_at(frame, start + usize::from(offset))?;
    // A UDP checksum of zero says that there is none, and no pseudo-header sums to zero.
    (field != 0 && field == pseudo.fold()).then_some(Partial { start: start as u16, offset })
}

fn v4(frame: &[u8]) -> Option<(usize, u8, Sum)> {
    let header = frame.get(ETH_LEN..ETH_LEN + 20)?;
    let header_len = usize::from(header[0] & 0x0f) * 4;
    let len = usize::from(u16_at(header, 2)?).checked_sub(header_len)?;
    let fragment = u16_at(header, 6)? & (MORE_FRAGMENTS | FRAGMENT_OFFSET) != 0;
    if header[0] >> 4 != 4 || header_len < 20 || fragment {
        return None;
    }
    let address = |at: usize| <[u8; 4]>::try_from(&header[at..at + 4]).expect("four bytes").into();
    Some((ETH_LEN + header_len, header[9], pseudo_v4(address(12), address(16), header[9], len as u32)))
}

fn v6(frame: &[u8]) -> Option<(usize, u8, Sum)> {
    let header = frame.get(ETH_LEN..ETH_LEN + 40)?;
    if header[0] >> 4 != 6 {
        return None;
    }
    let (mut start, mut protocol) = (ETH_LEN + 40, header[6]);
    let end = start + usize::from(u16_at(header, 4)?);
    for _ in 0..EXTENSIONS {
        if protocol != HOP_BY_HOP && protocol != DESTINATION {
            break;
        }
        let extension = frame.get(start..start + 2)?;
        (start, protocol) = (start + 8 + usize::from(extension[1]) * 8, extension[0]);
    }
    let len = end.checked_sub(start)? as u32;
    let address = |at: usize| <[u8; 16]>::try_from(&header[at..at + 16]).expect("sixteen bytes").into();
    Some((start, protocol, pseudo_v6(address(8), address(24), protocol, len)))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::sample;

    #[test]
    fn a_field_that_holds_the_pseudo_headers_sum_is_partial() {
        for (packet, _) in [sample::tcp4(100, 0), sample::tcp6(100, 0), sample::udp4(100, 0)] {
            assert_eq!(recognise(&packet.bytes), packet.offload.partial);
        }
    }

    #[test]
    fn a_finished_checksum_and_no_checksum_are_left_alone() {
        for (packet, payload) in [sample::tcp4(100, 0), sample::tcp6(100, 0), sample::udp4(100, 0)] {
            let mut bytes = packet.bytes.clone();
            packet.offload.partial.unwrap().fill(&mut bytes, []).unwrap();
            assert_eq!(sample::verified_payload(&bytes), payload);
            assert_eq!(recognise(&bytes), None);
        }
        let mut none = sample::udp4(100, 0).0.bytes;
        none[40..42].fill(0);
        assert_eq!(recognise(&none), None);
    }

    #[test]
    fn fragments_other_protocols_and_frames_cut_anywhere_are_left_alone() {
        let packet = sample::udp4(100, 0).0;
        let changed = |at: usize, value: u8| {
            let mut bytes = packet.bytes.clone();
            bytes[at] = value;
            recognise(&bytes)
        };
        assert_eq!((changed(20, 0x20), changed(21, 1), changed(23, 132), changed(12, 0x86)), (None, None, None, None));
        assert_eq!((changed(14, 0x44), changed(14, 0x55), changed(17, 0), changed(13, 0x06)), (None, None, None, None));
        for packet in [packet, sample::tcp6(1, 0).0] {
            for len in 0..packet.bytes.len() {
                assert!(recognise(&packet.bytes[..len]).is_none_or(|partial| usize::from(partial.start) + 2 <= len));
            }
        }
    }

    #[test]
    fn extension_headers_are_looked_behind() {
        let packet = sample::tcp6(40, 0).0;
        let mut bytes = packet.bytes[..54].to_vec();
        bytes[20] = HOP_BY_HOP;
        bytes.extend([TCP, 0, 1, 4, 0, 0, 0, 0]);
        bytes.extend(&packet.bytes[54..]);
        let len = u16::from_be_bytes([bytes[18], bytes[19]]) + 8;
        bytes[18..20].copy_from_slice(&len.to_be_bytes());
        assert_eq!(recognise(&bytes), Some(Partial { start: 62, offset: 16 }));
    }
}
