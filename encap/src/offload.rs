//! What is still to be done to a frame before it is fit for a wire: a checksum to fill in, segments to cut.
//!
//! This is the virtio network header's view (VIRTIO 1.2 section 5.1.6) without its encoding, see [`crate::virtio`].
//! Nothing in it can be trusted to fit the frame's own headers: a pod wrote it.

use core::fmt;

use crate::checksum::Sum;

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
        // RFC 768: "If the computed checksum is zero, it is transmitted as all ones". For other protocols the two are
        // the same number, and Linux (skb_checksum_help) does not tell them apart either.
        head[field..field + 2].copy_from_slice(&sum.finish_nonzero().to_be_bytes());
        Ok(())
    }
}
