//! The largest segment that TCP's ends announce to each other, kept to what the way between them carries.
//!
//! Pods are told of packets that are too long, and TCP follows. But whoever filters ICMP inside of a pod hears nothing, and the first
//! long packets are lost in any case; so the announcement in a SYN is lowered (RFC 9293, section 3.7.1; RFC 6691) to what fits. It is
//! never raised, and a SYN without one is left as it is: its end then sends what fits everywhere.

use weft_encap::checksum;
use weft_encap::tcp::{CHECKSUM_OFFSET, TCP_LEN};

use crate::frame::Frame;
use crate::packet::Packet;

/// RFC 9293, section 3.2: the end of the options, padding, and the option in question with its length.
const END: u8 = 0;
const PADDING: u8 = 1;
const MSS: u8 = 2;
const MSS_LEN: usize = 4;

/// Headers that the announcement does not count (RFC 6691, section 2).
const HEADERS_V4: u32 = 40;
const HEADERS_V6: u32 = 60;

/// Lowers what a SYN announces, so that packets of `mtu` bytes are enough for it.
pub fn clamp(frame: &mut Frame, packet: &Packet, mtu: u32) {
    let Some(ip) = packet.ip().filter(|ip| ip.syn && ip.ports.is_some()) else { return };
    let headers = if ip.src.is_ipv4() { HEADERS_V4 } else { HEADERS_V6 };
    let Ok(most) = u16::try_from(mtu.saturating_sub(headers)) else { return };
    let l4 = usize::from(ip.l4);
    let is_partial = frame.offload.partial.is_some();
    let Some(segment) = frame.head_mut().get_mut(l4..) else { return };
    let Some(at) = find(segment) else { return };
    let old = u16::from_be_bytes([segment[at], segment[at + 1]]);
    if old <= most {
        return;
    }
    segment[at..at + 2].copy_from_slice(&most.to_be_bytes());
    // A partial checksum is that of the pseudo-header alone: what was changed is summed by whoever completes it.
    if !is_partial {
        let sum = u16::from_be_bytes([segment[CHECKSUM_OFFSET], segment[CHECKSUM_OFFSET + 1]]);
        // RFC 1071, section 2 (B): bytes at an odd place count for the other half of a word.
        let word = |value: u16| if at.is_multiple_of(2) { value } else { value.swap_bytes() };
        let adjusted = checksum::adjust(sum, word(old), word(most));
        segment[CHECKSUM_OFFSET..CHECKSUM_OFFSET + 2].copy_from_slice(&adjusted.to_be_bytes());
    }
}

/// Where the announced value lies in a TCP segment. Options that contradict themselves are read no further.
fn find(segment: &[u8]) -> Option<usize> {
    let len = usize::from(segment.get(12)? >> 4) * 4;
    let header = segment.get(..len)?;
    let mut at = TCP_LEN;
    loop {
        match *header.get(at)? {
            END => return None,
            PADDING => at += 1,
            kind => {
                let len = usize::from(*header.get(at + 1)?);
                if kind == MSS && len == MSS_LEN && at + MSS_LEN <= header.len() {
                    return Some(at + 2);
                }
                if len < 2 {
                    return None;
                }
                at += len;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::Sender;
    use crate::pool::Pool;
    use crate::port::PortId;
    use weft_encap::checksum::{pseudo_v4, pseudo_v6};
    use weft_encap::eth::{ETH_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6, EthHeader};
    use weft_encap::ip::TCP;
    use weft_encap::ipv4::Ipv4Header;
    use weft_encap::ipv6::Ipv6Header;
    use weft_encap::mac::Mac;
    use weft_encap::offload::Partial;
    use weft_encap::zerocopy::IntoBytes;

    const SYN: u8 = 2;

    fn sum(v4: bool, segment: &[u8]) -> u16 {
        let len = segment.len() as u32;
        let mut sum = if v4 {
            pseudo_v4([10, 0, 0, 1].into(), [10, 0, 0, 2].into(), TCP, len)
        } else {
            pseudo_v6("fd00::1".parse().unwrap(), "fd00::2".parse().unwrap(), TCP, len)
        };
        sum.add(segment).finish()
    }

    /// A segment with these options, as it is before and after.
    fn clamped(v4: bool, flags: u8, options: &[u8], mtu: u32, partial: bool) -> (Vec<u8>, Vec<u8>) {
        assert!(options.len().is_multiple_of(4));
        let words = 5 + options.len() as u8 / 4;
        let mut segment = vec![0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 0, words << 4, flags, 1, 0, 0, 0, 0, 0];
        segment.extend_from_slice(options);
        if !partial {
            let value = sum(v4, &segment);
            segment[16..18].copy_from_slice(&value.to_be_bytes());
        }
        let mac = Mac([2, 0, 0, 0, 0, 1]);
        let len = segment.len() as u16;
        let mut bytes = EthHeader::new(mac, mac, if v4 { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 }).as_bytes().to_vec();
        if v4 {
            let header = Ipv4Header::new([10, 0, 0, 1].into(), [10, 0, 0, 2].into(), TCP, 64, len);
            bytes.extend_from_slice(header.as_bytes());
        } else {
            let header = Ipv6Header::new("fd00::1".parse().unwrap(), "fd00::2".parse().unwrap(), TCP, 64, len);
            bytes.extend_from_slice(header.as_bytes());
        }
        let l4 = bytes.len();
        bytes.extend_from_slice(&segment);
        let pool = Pool::new(2, 1).unwrap();
        let mut frame = Frame::from_bytes(&bytes, PortId(1), &pool).unwrap();
        if partial {
            frame.offload.partial = Some(Partial { start: l4 as u16, offset: CHECKSUM_OFFSET as u16 });
        }
        let packet = Packet::parse(&mut frame, Sender::Port(PortId(1))).unwrap();
        clamp(&mut frame, &packet, mtu);
        assert_eq!(frame.to_vec()[..l4], bytes[..l4]);
        assert_eq!(l4 - ETH_LEN, if v4 { 20 } else { 40 });
        (segment, frame.to_vec()[l4..].to_vec())
    }

    #[test]
    fn what_is_announced_is_lowered_to_what_fits_and_the_checksum_stays_right() {
        for (v4, fits) in [(true, 1310_u16), (false, 1290)] {
            for (options, at) in
                [(&[2, 4, 5, 180][..], 22), (&[1, 2, 4, 0xff, 0xff, 1, 1, 0], 23), (&[3, 3, 7, 2, 4, 8, 0, 0], 25)]
            {
                let (before, after) = clamped(v4, SYN, options, 1350, false);
                assert_eq!(sum(v4, &before), 0);
                assert_eq!((sum(v4, &after), &after[at..at + 2]), (0, &fits.to_be_bytes()[..]), "{options:?}");
                let (_, partial) = clamped(v4, SYN, options, 1350, true);
                assert_eq!((&partial[16..18], &partial[at..at + 2]), (&[0, 0][..], &fits.to_be_bytes()[..]));
            }
        }
    }

    #[test]
    fn what_fits_already_and_what_is_no_syn_is_left_as_it_is() {
        let mss = [2, 4, 5, 180];
        for (flags, mtu) in [(SYN, 1500), (SYN, u32::MAX), (SYN, 70_000), (16, 1350), (24, 1350)] {
            let (before, after) = clamped(true, flags, &mss, mtu, false);
            assert_eq!(before, after, "{flags} {mtu}");
        }
    }

    #[test]
    fn options_that_contradict_themselves_are_left_as_they_are() {
        let odd: [&[u8]; 9] = [
            &[],
            &[0, 2, 4, 255],
            &[2, 3, 255, 255],
            &[2, 0, 255, 255],
            &[2, 1, 255, 255],
            &[5, 200, 2, 4, 255, 255, 0, 0],
            &[1, 1, 2, 4],
            &[1, 1, 1, 2],
            &[2, 5, 255, 255, 255, 0, 0, 0],
        ];
        for options in odd {
            let (before, after) = clamped(true, SYN, options, 1350, false);
            assert_eq!(before, after, "{options:?}");
        }
    }
}
