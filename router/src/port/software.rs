//! What a device cannot do and we do on the way out: filling in checksums, cutting superframes.
//!
//! Both look at a frame whose Ethernet header lies at `base` in its head: 0 for a TAP, the length of the tunnel header
//! for the underlay. The payload is never copied: a segment is a header of its own and slices of the frame.

use weft_encap::checksum::Sum;
use weft_encap::eth::ETH_LEN;
use weft_encap::segment::Segments;

use crate::drop_reason::DropReason;
use crate::frame::{Body, Frame};

/// The longest headers a segment can have: Ethernet, IPv6 with some extension headers, TCP with all options.
pub const HEADERS: usize = 256;

/// Fills in a checksum that is still partial.
pub fn fill_checksum(frame: &mut Frame, base: usize) -> Result<(), DropReason> {
    let Some(partial) = frame.offload.partial.take() else { return Ok(()) };
    let (head, body) = frame.parts_mut();
    let head = head.get_mut(base..).ok_or(DropReason::BadOffload)?;
    partial.fill(head, body.into_iter().flat_map(Body::pieces)).map_err(|_| DropReason::BadOffload)
}

/// A superframe about to be cut.
pub struct Cut<'a> {
    frame: &'a Frame,
    base: usize,
    segments: Segments,
}

impl<'a> Cut<'a> {
    /// Checks the headers. The frame's `gso` must be set.
    pub fn new(frame: &'a Frame, base: usize) -> Result<Cut<'a>, DropReason> {
        let (Some(gso), Some(partial)) = (frame.offload.gso, frame.offload.partial) else {
            return Err(DropReason::Unsegmentable);
        };
        let header_len = usize::from(gso.header_len);
        let headers = frame.head().get(base..base + header_len).ok_or(DropReason::Unsegmentable)?;
        if header_len > HEADERS {
            return Err(DropReason::Unsegmentable);
        }
        let payload = frame.len() - base - header_len;
        let segments = Segments::plan(headers, ETH_LEN, partial.start.into(), payload, &gso)
            .map_err(|_| DropReason::Unsegmentable)?;
        Ok(Cut { frame, base, segments })
    }

    /// How many segments.
    pub fn count(&self) -> usize {
        self.segments.count()
    }

    /// Length of what [`Cut::write`] writes.
    pub fn header_len(&self) -> usize {
        self.base + self.segments.header_len()
    }

    /// Length of a segment in all, tunnel header included.
    pub fn len(&self, index: usize) -> usize {
        self.header_len() + self.segments.payload(index).len()
    }

    /// Length of all segments together.
    pub fn total(&self) -> usize {
        self.count() * self.header_len() + self.frame.len() - self.header_len()
    }

    /// Payload of a segment.
    pub fn payload(&self, index: usize) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let range = self.segments.payload(index);
        let start = self.header_len();
        self.frame.slices(start + range.start..start + range.end)
    }

    /// Writes what precedes a segment's payload, checksums included, to the front of `out`. Returns its length.
    pub fn write(&self, index: usize, out: &mut [u8]) -> usize {
        let (base, len) = (self.base, self.header_len());
        let mut sum = Sum::new();
        for slice in self.payload(index) {
            sum.add(slice);
        }
        let head = self.frame.head();
        out[..base].copy_from_slice(&head[..base]);
        self.segments.write(index, &head[base..len], sum.fold(), &mut out[base..len]);
        len
    }
}
