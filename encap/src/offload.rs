//! What is still to be done to a frame before it is fit for a wire: a checksum to fill in, segments to cut.
//!
//! This is the virtio network header's view (VIRTIO 1.2 section 5.1.6) without its encoding, see [`crate::virtio`].
//! Nothing in it can be trusted to fit the frame's own headers: a pod wrote it.

use core::fmt;

use crate::checksum::Sum;
use crate::udp;

/// What is still to be done to a frame.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Default)]
pub struct Offload {
    /// A checksum is still to be filled in.
    pub partial: Option<Partial>,
    /// The frame stands for many segments.
    pub gso: Option<Gso>,
    /// Somebody has verified the transport checksum.
    pub verified: bool,
}

/// A checksum field that holds the folded, *uncomplemented* sum of the pseudo-header. It is completed by summing from
/// `start` to the end of the frame and writing the complement to `start + offset`.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Partial {
    /// Where the sum begins, in bytes from the start of the frame (its Ethernet header).
    pub start: u16,
    /// Where the field is, in bytes from `start`.
    pub offset: u16,
}

/// What kind of segments.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum GsoKind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP over either, one datagram per segment (`UDP_SEGMENT`, virtio's `UDP_L4`).
    Udp,
}

/// How to cut a superframe.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Gso {
    /// What kind of segments.
    pub kind: GsoKind,
    /// TCP's CWR is set: it belongs to the first segment alone.
    pub ecn: bool,
    /// Bytes of payload in each segment but the last.
    pub size: u16,
    /// Length of the Ethernet, IP and transport header together, in bytes. From virtio it is but a hint.
    pub header_len: u16,
}

/// The checksum field lies outside of the bytes at hand.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct OutsideFrame;

impl fmt::Display for OutsideFrame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a partial checksum lies outside of the frame's headers")
    }
}

impl std::error::Error for OutsideFrame {}

impl Partial {
    /// Fills in the checksum of a frame that consists of `head` (which holds the field) and `pieces` of payload, none
    /// of which is changed.
    pub fn fill<'a>(self, head: &mut [u8], pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<(), OutsideFrame> {
        let start = usize::from(self.start);
        let field = start + usize::from(self.offset);
        if field + 2 > head.len() {
            return Err(OutsideFrame);
        }
        let mut sum = Sum::new();
        sum.add(&head[start..]);
        for piece in pieces {
            sum.add(piece);
        }
        // RFC 768: "If the computed checksum is zero, it is transmitted as all ones". Elsewhere zero is a number.
        let is_udp = usize::from(self.offset) == udp::CHECKSUM_OFFSET;
        let checksum = if is_udp { sum.finish_nonzero() } else { sum.finish() };
        head[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum;

    /// A UDP header with a partial checksum (its pseudo-header's sum is 0x1234) and a payload of seven bytes.
    const DATAGRAM: [u8; 15] = [0, 7, 0, 9, 0, 15, 0x12, 0x34, 1, 2, 3, 4, 5, 6, 7];
    const PARTIAL: Partial = Partial { start: 2, offset: udp::CHECKSUM_OFFSET as u16 };

    #[test]
    fn a_checksum_is_the_same_in_however_many_pieces_the_payload_lies() {
        let sum = checksum::sum(&DATAGRAM);
        for (a, b) in [(0, 0), (0, 7), (1, 2), (3, 3), (3, 6), (7, 7)] {
            let mut head = [&[0xa5; 2], &DATAGRAM[..8]].concat();
            let payload = &DATAGRAM[8..];
            PARTIAL.fill(&mut head, [&payload[..a], &payload[a..b], &payload[b..]]).unwrap();
            assert_eq!(head[8..10], (!sum).to_be_bytes(), "{a} {b}");
            assert_eq!(head[..8], [&[0xa5; 2], &DATAGRAM[..6]].concat());
        }
    }

    #[test]
    fn if_the_computed_checksum_is_zero_it_is_transmitted_as_all_ones() {
        let mut head = [0xff, 0xff, 0, 0, 0, 0, 0, 0];
        Partial { start: 0, offset: 6 }.fill(&mut head, []).unwrap();
        assert_eq!(head[6..], [0xff, 0xff]);
        let mut head = [0xff, 0xff, 0, 0, 0, 0, 0, 0];
        Partial { start: 0, offset: 2 }.fill(&mut head, []).unwrap();
        assert_eq!(head[2..4], [0, 0], "only UDP has a meaning for zero");
    }

    #[test]
    fn the_field_lies_within_the_head() {
        let mut head = [0xa5; 9];
        assert_eq!(PARTIAL.fill(&mut head, [&[0; 100][..]]), Err(OutsideFrame));
        let far = Partial { start: u16::MAX, offset: u16::MAX };
        assert_eq!(far.fill(&mut head, []), Err(OutsideFrame));
        assert_eq!(head, [0xa5; 9]);
    }
}
