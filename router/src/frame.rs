//! Bytes in a buffer, with headroom and offload metadata; move-only.
//!
//! A frame is a contiguous *head* in a chunk of its own, which holds at least all headers, and optionally a *body*:
//! payload in a super buffer that may be shared with other frames and is only ever read. The body is a run of pieces at a fixed
//! stride, so that the segments of one `UDP_GRO` datagram form a superframe without being copied. A frame
//! that came from a TAP has a body of one piece.
//!
//! Dropping a frame gives its buffers back; that it was counted is the business of [`crate::stats::Stats`].

use std::net::IpAddr;
use std::ops::{Deref, DerefMut, Range};

use weft_encap::format::Format;
use weft_encap::offload::Offload;
use weft_encap::vxlan::VXLAN_LEN;

use crate::pool::{CHUNK, Pool};
use crate::port::PortId;
use crate::port::sys::arena::Chunk;

pub use crate::port::sys::arena::Super;

pub use crate::port::sys::lazy::Lazy;
pub use crate::port::sys::prefetch::prefetch;

/// What a frame from or for the underlay carries beside its bytes, which start at the tunnel header.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Outer {
    /// The node's underlay address: who sent it, or to whom it goes.
    pub peer: IpAddr,
    /// A hash of the inner flow; the outer source port follows from it.
    pub entropy: u16,
    /// Outer TOS or traffic class.
    pub tos: u8,
    /// How it is wrapped.
    pub format: Format,
    /// Length of the tunnel header, behind which the inner Ethernet header is; more than 0.
    pub base: u16,
    /// It is longer than the way to that node carries, and goes in fragments.
    pub in_fragments: bool,
}

impl Outer {
    /// For a frame that begins with a VXLAN header.
    pub fn vxlan(peer: IpAddr) -> Outer {
        Outer { peer, entropy: 0, tos: 0, format: Format::Vxlan, base: VXLAN_LEN as u16, in_fragments: false }
    }
}

/// Payload of a frame: `count` pieces of `piece` bytes (the last of `last`) at `start`, `start + stride`, … of a super buffer.
pub struct Body {
    buffer: Super,
    start: u32,
    stride: u32,
    piece: u32,
    count: u32,
    last: u32,
}

impl Body {
    /// One piece.
    pub fn one(buffer: Super, start: usize, len: usize) -> Body {
        Body::strided(buffer, start, len, len, 1, len)
    }

    /// `count` pieces of `piece` bytes at a distance of `stride`; the last has `last` bytes, and no more than the others.
    /// All must lie in the buffer.
    pub fn strided(buffer: Super, start: usize, stride: usize, piece: usize, count: usize, last: usize) -> Body {
        assert!(count >= 1 && last <= piece && (count == 1 || piece <= stride));
        assert!(start + (count - 1) * stride + last <= buffer.len());
        Body {
            buffer,
            start: start as u32,
            stride: stride as u32,
            piece: piece as u32,
            count: count as u32,
            last: last as u32,
        }
    }

    /// Bytes of all pieces.
    pub fn len(&self) -> usize {
        (self.count as usize - 1) * self.piece as usize + self.last as usize
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The pieces, in order.
    pub fn pieces(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        (0..self.count).map(|index| {
            let start = (self.start + index * self.stride) as usize;
            let len = if index + 1 == self.count { self.last } else { self.piece } as usize;
            &self.buffer[start..start + len]
        })
    }

    /// Bytes `range` of all pieces as contiguous slices, in order; what lies past the end is left out.
    fn slices(&self, range: Range<usize>) -> impl Iterator<Item = &[u8]> {
        let (mut at, end) = (range.start as u32, range.end.min(self.len()) as u32);
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let index = (at / self.piece.max(1)).min(self.count - 1);
            let within = at - index * self.piece;
            let piece = if index + 1 == self.count { self.last } else { self.piece };
            let take = (piece - within).min(end - at);
            let start = (self.start + index * self.stride + within) as usize;
            at += take;
            Some(&self.buffer[start..start + take as usize])
        })
    }

    fn share(&self) -> Body {
        Body { buffer: self.buffer.share(), ..*self }
    }
}

/// A frame. See the module's essay.
///
/// What is known of it stands beside its chunk ([`Meta`]) and does not move when the frame does.
pub struct Frame {
    chunk: Chunk,
}

/// What is known of a frame beside its bytes.
#[derive(Default)]
#[repr(C, align(64))]
pub struct Meta {
    start: u16,
    head: u16,
    merged: u16,
    ingress: PortId,
    /// What is still to be done to it: checksum, segmentation. Its offsets count from the Ethernet header: the inner one, behind the
    /// tunnel header, while `outer` is set.
    pub offload: Offload,
    /// Set if it came from the underlay or goes there.
    pub outer: Option<Outer>,
    /// Whether it asks what the way to a node carries: then it is sent as it is or not at all, whatever is known of the way.
    pub is_probe: bool,
    body: Option<Body>,
}

impl Deref for Frame {
    type Target = Meta;
    #[inline]
    fn deref(&self) -> &Meta {
        self.chunk.meta()
    }
}

impl DerefMut for Frame {
    #[inline]
    fn deref_mut(&mut self) -> &mut Meta {
        self.chunk.meta_mut()
    }
}

impl Meta {
    /// The port by which it (or the frame that caused it) came in.
    pub fn ingress(&self) -> PortId {
        self.ingress
    }

    /// How many further frames were merged into it on the way in.
    pub fn merged(&self) -> u16 {
        self.merged
    }

    /// Payload behind the head.
    pub fn body(&self) -> Option<&Body> {
        self.body.as_ref()
    }

    /// Where the (inner) Ethernet header is: behind a tunnel header, if there is one.
    #[inline]
    pub fn base(&self) -> usize {
        self.outer.map_or(0, |outer| outer.base.into())
    }

    /// Bytes in all.
    #[inline]
    pub fn len(&self) -> usize {
        self.head as usize + self.body.as_ref().map_or(0, Body::len)
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where the head lies in its chunk.
    #[inline]
    fn span(&self) -> Range<usize> {
        self.start as usize..self.start as usize + self.head as usize
    }
}

impl Frame {
    /// A frame whose head is `chunk[start..start + head]`.
    pub fn new(mut chunk: Chunk, start: usize, head: usize, ingress: PortId) -> Frame {
        assert!(start + head <= chunk.len());
        let meta = chunk.meta_mut();
        (meta.start, meta.head, meta.ingress) = (start as u16, head as u16, ingress);
        Frame { chunk }
    }

    /// A frame that holds a copy of `bytes`; `None` if they do not fit a chunk or no buffer is free.
    pub fn from_bytes(bytes: &[u8], ingress: PortId, pool: &Pool) -> Option<Frame> {
        let (mut chunk, start) = pool.chunk()?;
        if bytes.len() <= chunk.len() - start {
            chunk[start..start + bytes.len()].copy_from_slice(bytes);
            return Some(Frame::new(chunk, start, bytes.len(), ingress));
        }
        let head = chunk.len() - start;
        let mut buffer = pool.large()?;
        let rest = &bytes[head..];
        buffer.bytes_mut()?.get_mut(..rest.len())?.copy_from_slice(rest);
        chunk[start..].copy_from_slice(&bytes[..head]);
        Some(Frame::new(chunk, start, head, ingress).with_body(Body::one(buffer, 0, rest.len()), 0))
    }

    /// Attaches payload; `merged` frames beyond the first became part of this one.
    pub fn with_body(mut self, body: Body, merged: u16) -> Frame {
        self.body = (!body.is_empty()).then_some(body);
        self.merged = merged;
        self
    }

    /// Attaches payload to a frame that has none behind its head.
    pub fn attach(&mut self, body: Body) {
        debug_assert!(self.body.is_none());
        self.body = (!body.is_empty()).then_some(body);
    }

    /// Says that `merged` frames beyond the first became part of this one, which has no body.
    pub fn with_merged(mut self, merged: u16) -> Frame {
        self.merged = merged;
        self
    }

    /// Contiguous bytes from the first on; holds all headers.
    #[inline]
    pub fn head(&self) -> &[u8] {
        &self.chunk[self.span()]
    }

    /// What is known of it, and its head, for whoever asks much.
    #[inline(always)]
    pub fn parts(&self) -> (&Meta, &[u8]) {
        let meta = self.chunk.meta();
        (meta, &self.chunk[meta.span()])
    }

    /// The same, for writing.
    #[inline]
    pub fn head_mut(&mut self) -> &mut [u8] {
        let (meta, bytes) = self.chunk.parts_mut();
        &mut bytes[meta.span()]
    }

    /// The head's chunk, and where in it the head begins.
    pub(crate) fn place(&self) -> (&Chunk, usize) {
        (&self.chunk, self.start as usize)
    }

    /// Removes `count` bytes from the front of the head; `None`, with nothing changed, if it is shorter.
    #[must_use]
    pub fn pull(&mut self, count: usize) -> Option<()> {
        if count > self.head as usize {
            return None;
        }
        self.start += count as u16;
        self.head -= count as u16;
        Some(())
    }

    /// Removes `count` bytes from the front (a tunnel header; none for a frame from a pod), and what lies behind `len` bytes after that.
    /// The caller knows that the head holds the headers.
    #[inline(always)]
    pub fn strip(&mut self, count: usize, len: usize) {
        let meta = self.chunk.meta_mut();
        if count > 0 {
            meta.start += count as u16;
            meta.head = meta.head.saturating_sub(count as u16);
            meta.outer = None;
        }
        if meta.body.is_none() {
            meta.head = meta.head.min(len as u16);
        } else if len < meta.len() {
            self.truncate(len);
        }
    }

    /// Adds `count` bytes at the front, for the caller to fill; `None`, with nothing changed, if the headroom is too small.
    #[must_use]
    pub fn push(&mut self, count: usize) -> Option<&mut [u8]> {
        if count > self.start as usize {
            return None;
        }
        self.start -= count as u16;
        self.head += count as u16;
        let start = self.start as usize;
        Some(&mut self.chunk[start..start + count])
    }

    /// The head with `count` bytes of headroom before it, without making them part of the frame; for a device's own header.
    pub fn head_with_room(&mut self, count: usize) -> Option<&mut [u8]> {
        let start = (self.start as usize).checked_sub(count)?;
        let end = self.start as usize + self.head as usize;
        Some(&mut self.chunk[start..end])
    }

    /// What [`Frame::head_with_room`] gives, for reading.
    pub fn room_and_head(&self, count: usize) -> Option<&[u8]> {
        let start = (self.start as usize).checked_sub(count)?;
        Some(&self.chunk[start..self.start as usize + self.head as usize])
    }

    /// Head and body at once: the head for writing.
    pub fn parts_mut(&mut self) -> (&mut [u8], Option<&Body>) {
        let (meta, bytes) = self.chunk.parts_mut();
        (&mut bytes[meta.span()], meta.body.as_ref())
    }

    /// Bytes `range` of the frame as contiguous slices, in order; what lies past its end is left out.
    pub fn slices(&self, range: Range<usize>) -> impl Iterator<Item = &[u8]> {
        let head = self.head();
        let front = &head[range.start.min(head.len())..range.end.min(head.len())];
        let rest = range.start.saturating_sub(head.len())..range.end.saturating_sub(head.len());
        let front = (!front.is_empty()).then_some(front);
        front.into_iter().chain(self.body.iter().flat_map(move |body| body.slices(rest.clone())))
    }

    /// Cuts the frame to `len` bytes; padding at the end of a short frame, for example. Longer than the frame is no change.
    pub fn truncate(&mut self, len: usize) {
        let head = self.head as usize;
        if len <= head {
            self.head = len as u16;
            self.body = None;
        } else if let Some(body) = &mut self.body
            && len - head < body.len()
        {
            let keep = len - head;
            let piece = body.piece.max(1) as usize;
            let full = (keep - 1) / piece;
            body.count = full as u32 + 1;
            body.last = (keep - full * piece) as u32;
        }
    }

    /// Makes the frame's bytes `len`, all in the head, for a reply that is built in place; `None` if they do not fit.
    #[must_use]
    pub fn resize_head(&mut self, len: usize) -> Option<&mut [u8]> {
        if self.start as usize + len > CHUNK {
            return None;
        }
        self.body = None;
        self.head = len as u16;
        self.offload = Offload::default();
        Some(self.head_mut())
    }

    /// A copy with a head of its own that shares the payload; `None` if no buffer is free.
    pub fn copy(&self, pool: &Pool) -> Option<Frame> {
        let (mut chunk, _) = pool.chunk()?;
        let span = self.span();
        chunk[span.clone()].copy_from_slice(&self.chunk[span.clone()]);
        let mut copy = Frame::new(chunk, span.start, span.len(), self.ingress);
        (copy.offload, copy.outer) = (self.offload, self.outer);
        copy.body = self.body.as_ref().map(Body::share);
        Some(copy)
    }

    /// All bytes in one vector, for tests and for tools; never on the way of a frame.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = self.head().to_vec();
        for piece in self.body.iter().flat_map(Body::pieces) {
            bytes.extend_from_slice(piece);
        }
        bytes
    }
}

impl std::fmt::Debug for Frame {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Frame")
            .field("len", &self.len())
            .field("head", &self.head)
            .field("ingress", &self.ingress)
            .field("offload", &self.offload)
            .field("outer", &self.outer)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_frame_keeps_its_bytes_over_head_and_body() {
        let pool = Pool::new(4, 4).unwrap();
        let bytes: Vec<u8> = (0..10_000u32).map(|i| i as u8).collect();
        let mut frame = Frame::from_bytes(&bytes, PortId(1), &pool).unwrap();
        assert_eq!(frame.len(), bytes.len());
        assert_eq!(frame.to_vec(), bytes);
        frame.push(8).unwrap().fill(0xa5);
        assert_eq!(frame.len(), bytes.len() + 8);
        frame.pull(8).unwrap();
        frame.truncate(5_000);
        assert_eq!(frame.to_vec(), bytes[..5_000]);
        let copy = frame.copy(&pool).unwrap();
        drop(frame);
        assert_eq!(copy.to_vec(), bytes[..5_000]);
        drop(copy);
        assert_eq!(pool.free(), (4, 4));
    }

    #[test]
    fn a_strided_body_is_cut_at_any_byte() {
        let pool = Pool::new(4, 4).unwrap();
        for len in 1..=26 {
            let mut buffer = pool.large().unwrap();
            for (index, byte) in buffer.bytes_mut().unwrap().iter_mut().enumerate() {
                *byte = index as u8;
            }
            let (chunk, start) = pool.chunk().unwrap();
            let body = Body::strided(buffer, 0, 20, 10, 3, 5);
            let mut frame = Frame::new(chunk, start, 1, PortId(0)).with_body(body, 2);
            let whole = frame.to_vec();
            assert_eq!(whole.len(), 26);
            frame.truncate(len);
            assert_eq!(frame.to_vec(), whole[..len]);
            for start in 0..=len {
                for end in start..=len + 3 {
                    let bytes = frame.slices(start..end).collect::<Vec<_>>().concat();
                    assert_eq!(bytes, whole[start..end.min(len)]);
                    assert!(frame.slices(start..end).all(|slice| !slice.is_empty()));
                }
            }
        }
    }
}
