//! From datagrams to frames: trains parted into runs, runs made superframes.
//!
//! The payload stays in the super buffer that the datagram was received into; each frame gets a head of its own with a
//! copy of the headers. A frame that fits a chunk, merged or not, is copied whole, so that the super buffer is free again
//! at once.
//!
//! A peer that is a kernel's VXLAN device behind a veth hands over what its own stack gave it: checksums still partial, and superframes
//! as one datagram. Such a datagram is recognised by its inner IP length, which fills it.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use weft_encap::coalesce::{self, Run};
use weft_encap::eth::{ETH_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6};
use weft_encap::format::Format;
use weft_encap::geneve::GeneveHeader;
use weft_encap::offload::{Gso, GsoKind, Offload, Partial};
use weft_encap::{ip, tcp, udp};

use super::TUNNEL_HEADER;
use crate::drop_reason::DropReason;
use crate::frame::{Body, Frame, Outer};
use crate::pool::{CHUNK, Pool};
use crate::port::sys::arena::Super;
use crate::port::sys::message::{self, Datagram};
use crate::port::{BATCH, BATCH_BYTES, Batch, PortId, Received, is_broken};
use crate::stats::Stats;

/// How many bytes of a frame that does not fit a chunk go to its head: all headers that anyone reads. Geneve's has up to 252 bytes of
/// options.
const HEAD: usize = TUNNEL_HEADER + 252 + 256;

/// The receiving half of the port.
pub(super) struct Receiver {
    id: PortId,
    format: Format,
    pub(super) tunnel_mtu: u32,
    /// A buffer that no frame refers to.
    spare: Option<Super>,
    /// A train of which not all frames fitted the last batch.
    train: Option<Train>,
    overruns: u32,
}

/// Received bytes that still are to become frames.
struct Train {
    buffer: Super,
    len: usize,
    /// Where the next frame begins.
    at: usize,
    /// Distance of the frames.
    stride: usize,
    /// It is a single superframe, to be cut like this.
    whole: bool,
    outer: Outer,
}

impl Receiver {
    pub(super) fn new(id: PortId, format: Format, tunnel_mtu: u32) -> Receiver {
        Receiver { id, format, tunnel_mtu, spare: None, train: None, overruns: 0 }
    }

    pub(super) fn receive(
        &mut self,
        socket: &OwnedFd,
        pool: &Pool,
        batch: &mut Batch,
        stats: &mut Stats,
    ) -> io::Result<Received> {
        let (mut bytes, mut errors) = (0, 0);
        // Datagrams that end here count against the batch as well, so that they cannot keep us here.
        for _ in 0..BATCH {
            if self.train.is_none() {
                match self.take(socket, pool, stats) {
                    Ok(len) => bytes += len,
                    Err(Errno::INTR) => {}
                    Err(error) if is_broken(error) => return Err(error.into()),
                    // An error of the network's is reported once and tells nothing about the socket; one that stays must not
                    // keep us awake.
                    Err(error) if error != Errno::AGAIN && errors == 0 => errors += 1,
                    Err(_) => return Ok(Received::Drained),
                }
            }
            self.part(pool, batch, stats);
            if batch.is_full() || bytes >= BATCH_BYTES {
                break;
            }
        }
        Ok(Received::More)
    }

    #[cfg(test)]
    pub(super) fn forget(&mut self) {
        (self.spare, self.train) = (None, None);
    }

    /// Receives one datagram, or one train, and returns its length. Without a buffer it is counted and gone.
    fn take(&mut self, socket: &OwnedFd, pool: &Pool, stats: &mut Stats) -> Result<usize, Errno> {
        let Some(mut buffer) = self.spare.take().or_else(|| pool.large()) else {
            let datagram = receive(socket, &mut [])?;
            self.note_overruns(&datagram, stats);
            self.lose(datagram.len, datagram.stride, DropReason::NoBuffer, stats);
            return Ok(datagram.len);
        };
        let bytes = buffer.bytes_mut().expect("a buffer just taken has one owner");
        let received = receive(socket, bytes);
        let datagram = match received {
            Ok(datagram) if !datagram.truncated && datagram.len > 0 => datagram,
            other => {
                self.spare = Some(buffer);
                let datagram = other?;
                self.note_overruns(&datagram, stats);
                let reason = if datagram.truncated { DropReason::Truncated } else { DropReason::TooShort };
                self.lose(datagram.len, datagram.stride, reason, stats);
                return Ok(datagram.len);
            }
        };
        self.note_overruns(&datagram, stats);
        let stride = datagram.stride.map_or(datagram.len, usize::from);
        let whole = stride < datagram.len && is_superframe(&bytes[..datagram.len], stride, self.base_of(bytes));
        let outer = Outer { tos: datagram.tos, format: self.format, ..Outer::vxlan(datagram.from) };
        self.train = Some(Train { buffer, len: datagram.len, at: 0, stride, whole, outer });
        Ok(datagram.len)
    }

    /// Makes frames of the train until it, or the room in the batch, is used up.
    fn part(&mut self, pool: &Pool, batch: &mut Batch, stats: &mut Stats) {
        let Some(mut train) = self.train.take() else { return };
        while train.at < train.len && !batch.is_full() {
            let rest = &train.buffer[train.at..train.len];
            let len = if train.whole { rest.len() } else { train.stride.min(rest.len()) };
            let told = train.whole.then_some(train.stride);
            let base = self.base_of(rest);
            let left = unfinished(rest[..len].get(base..).unwrap_or_default(), told, self.tunnel_mtu);
            let (made, taken, count) = if left.partial.is_some() {
                (self.single(&train, len, left, pool), len, 1)
            } else {
                let run = coalesce::run(rest, train.stride, base);
                if run.frames > 1 {
                    let taken = (run.frames * train.stride).min(rest.len());
                    (self.merged(&train, base, &run, pool), taken, run.frames)
                } else {
                    let checked = Offload { verified: run.verified, ..Offload::default() };
                    (self.single(&train, len, checked, pool), len, 1)
                }
            };
            train.at += taken;
            match made {
                Some(mut frame) => {
                    frame.outer = Some(Outer { base: base as u16, ..train.outer });
                    stats.received(&frame);
                    batch.push(frame);
                }
                None => (0..count).for_each(|_| stats.lost(self.id, DropReason::NoBuffer)),
            }
        }
        if train.at < train.len {
            self.train = Some(train);
        } else if train.buffer.bytes_mut().is_some() {
            self.spare = Some(train.buffer);
        }
    }

    /// One superframe of the run at the front of the train.
    fn merged(&self, train: &Train, base: usize, run: &Run, pool: &Pool) -> Option<Frame> {
        let head = base + run.header_len;
        let (mut chunk, start) = pool.chunk()?;
        let room = chunk.get_mut(start..start + head)?;
        room.copy_from_slice(&train.buffer[train.at..train.at + head]);
        let offload = coalesce::finish(&mut room[base..], run);
        let (first, last) = (run.first_payload, run.last_payload);
        let body = Body::strided(train.buffer.share(), train.at + head, train.stride, first, run.frames, last);
        let merged = (run.frames - 1) as u16;
        let mut frame = match chunk.get_mut(start + head..start + head + body.len()) {
            Some(room) => {
                let copied = body.pieces().fold(0, |at, piece| {
                    room[at..at + piece.len()].copy_from_slice(piece);
                    at + piece.len()
                });
                Frame::new(chunk, start, head + copied, self.id).with_merged(merged)
            }
            None => Frame::new(chunk, start, head, self.id).with_body(body, merged),
        };
        frame.offload = offload;
        Some(frame)
    }

    /// The frame of `len` bytes at the front of the train.
    fn single(&self, train: &Train, len: usize, offload: Offload, pool: &Pool) -> Option<Frame> {
        let bytes = &train.buffer[train.at..train.at + len];
        let (mut chunk, start) = pool.chunk()?;
        let head = if len <= CHUNK - start { len } else { HEAD };
        chunk[start..start + head].copy_from_slice(&bytes[..head]);
        let mut frame = Frame::new(chunk, start, head, self.id);
        if head < len {
            let body = Body::one(train.buffer.share(), train.at + head, len - head);
            frame = frame.with_body(body, 0);
        }
        frame.offload = offload;
        Some(frame)
    }

    /// Where a datagram's Ethernet header is, by what its tunnel header says.
    fn base_of(&self, datagram: &[u8]) -> usize {
        if self.format == Format::Geneve { GeneveHeader::claimed_len(datagram) } else { TUNNEL_HEADER }
    }

    fn note_overruns(&mut self, datagram: &Datagram, stats: &mut Stats) {
        if let Some(overruns) = datagram.overruns {
            stats.port(self.id).overruns += u64::from(overruns.wrapping_sub(self.overruns));
            self.overruns = overruns;
        }
    }

    /// Counts what was received but cannot become frames.
    fn lose(&self, len: usize, stride: Option<u16>, reason: DropReason, stats: &mut Stats) {
        let count = stride.map_or(1, |stride| len.div_ceil(stride.into()).max(1));
        (0..count).for_each(|_| stats.lost(self.id, reason));
    }
}

fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> Result<Datagram, Errno> {
    message::receive(socket, buffer).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

/// What the headers of a frame that was not cut or summed yet say about it.
struct Headers {
    l4: usize,
    protocol: u8,
    /// Length of the frame according to its IP header.
    len: usize,
    kind: GsoKind,
}

impl Headers {
    /// Of TCP or UDP directly over IP, not fragmented; others have no offloads.
    fn read(inner: &[u8]) -> Option<Headers> {
        let word = |at: usize| Some(u16::from_be_bytes(*inner.get(at..)?.first_chunk()?));
        let (l4, protocol, len) = match word(12)? {
            ETHERTYPE_IPV4 => {
                // More fragments, or an offset: RFC 791 section 3.1.
                let fragment = word(ETH_LEN + 6)? & 0x3fff != 0;
                let header_len = usize::from(inner[ETH_LEN] & 0x0f) * 4;
                if fragment || header_len < 20 {
                    return None;
                }
                (ETH_LEN + header_len, *inner.get(ETH_LEN + 9)?, ETH_LEN + usize::from(word(ETH_LEN + 2)?))
            }
            ETHERTYPE_IPV6 => (ETH_LEN + 40, *inner.get(ETH_LEN + 6)?, ETH_LEN + 40 + usize::from(word(ETH_LEN + 4)?)),
            _ => return None,
        };
        let kind = match (protocol, l4 == ETH_LEN + 40 && word(12)? == ETHERTYPE_IPV6) {
            (ip::TCP, false) => GsoKind::Tcp4,
            (ip::TCP, true) => GsoKind::Tcp6,
            (ip::UDP, _) => GsoKind::Udp,
            _ => return None,
        };
        Some(Headers { l4, protocol, len, kind })
    }

    fn is_partial(&self, inner: &[u8]) -> bool {
        self.len <= inner.len() && coalesce::partial_checksum(&inner[..self.len], ETH_LEN, self.l4, self.protocol)
    }
}

/// Whether a datagram for which the kernel gave a length is one superframe, cut nowhere, rather than a train. A pod that lies about its
/// IP length must not have the frames behind its own taken for its payload, hence the other two conditions: the checksum is partial, and
/// where the train's second frame would begin there is no tunnel header like the first.
fn is_superframe(datagram: &[u8], stride: usize, base: usize) -> bool {
    let Some((tunnel, inner)) = datagram.split_at_checked(base) else { return false };
    Headers::read(inner).is_some_and(|headers| headers.len == inner.len() && headers.is_partial(inner))
        && !datagram[stride..].starts_with(tunnel)
}

/// What the sender left to be done to a frame. `told` is the segment size that the kernel gave.
fn unfinished(inner: &[u8], told: Option<usize>, tunnel_mtu: u32) -> Offload {
    let Some(headers) = Headers::read(inner).filter(|headers| headers.is_partial(inner)) else {
        return Offload::default();
    };
    let l4 = headers.l4;
    let (field, transport_len, ecn) = match headers.protocol {
        ip::TCP => {
            let Some(flags) = inner.get(l4 + 12..l4 + 14) else { return Offload::default() };
            (tcp::CHECKSUM_OFFSET, usize::from(flags[0] >> 4) * 4, flags[1] & tcp::CWR != 0)
        }
        _ => (udp::CHECKSUM_OFFSET, udp::UDP_LEN, false),
    };
    let partial = Some(Partial { start: l4 as u16, offset: field as u16 });
    let header_len = l4 + transport_len;
    let longest = ETH_LEN + tunnel_mtu as usize;
    let size = told.unwrap_or(longest.saturating_sub(header_len)).min(usize::from(u16::MAX)) as u16;
    // A UDP datagram is cut only where the kernel says that it was several.
    let is_long = headers.len > longest && headers.protocol == ip::TCP;
    let gso =
        (told.is_some() || is_long).then_some(Gso { kind: headers.kind, ecn, size, header_len: header_len as u16 });
    Offload { partial, gso: gso.filter(|gso| gso.size > 0), verified: false }
}
