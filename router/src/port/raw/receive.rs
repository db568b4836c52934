//! From IP packets to frames: several per call, each into a chunk of its own.
//!
//! A packet that does not fit its chunk, because the device merged it of many, goes on in a super buffer, which becomes the frame's body.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;

use arrayvec::ArrayVec;
use rustix::io::Errno;
use weft_encap::eth::{ETH_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6};
use weft_encap::format::Format;
use weft_encap::gre::{self, GreHeader};
use weft_encap::ip;
use weft_encap::ipip::Inner;
use weft_encap::offload::{Gso, GsoKind, Offload};
use weft_encap::tcp;

use super::Receiving;
use crate::drop_reason::DropReason;
use crate::frame::{Body, Frame, Outer};
use crate::pool::Pool;
use crate::port::sys::arena::{Chunk, Super};
use crate::port::sys::message::{self, Datagram};
use crate::port::xdp::partial;
use crate::port::{BATCH, BATCH_BYTES, Batch, PortId, Received, is_broken};
use crate::stats::Stats;

/// Packets of one call. Each has a super buffer ready, of which there are not many.
const AT_ONCE: usize = 8;

/// The receiving half of the port.
pub(super) struct Receiver {
    id: PortId,
    /// That of each socket.
    protocols: &'static [u8],
    pub(super) tunnel_mtu: u32,
    /// Buffers that no frame refers to.
    chunks: ArrayVec<(Chunk, usize), AT_ONCE>,
    supers: ArrayVec<Super, AT_ONCE>,
    /// What each socket has dropped.
    overruns: ArrayVec<u32, 2>,
}

impl Receiver {
    pub(super) fn new(id: PortId, protocols: &'static [u8], tunnel_mtu: u32) -> Receiver {
        let overruns = protocols.iter().map(|_| 0).collect();
        Receiver { id, protocols, tunnel_mtu, chunks: ArrayVec::new(), supers: ArrayVec::new(), overruns }
    }

    pub(super) fn receive(
        &mut self,
        receiving: &Receiving,
        pool: &Pool,
        batch: &mut Batch,
        stats: &mut Stats,
    ) -> io::Result<Received> {
        let mut more = false;
        for number in 0..receiving.sockets.len() {
            more |= self.receive_from(receiving, number, pool, batch, stats)? == Received::More;
        }
        if !more {
            // An idle port keeps no buffers from the others.
            self.chunks.clear();
            self.supers.clear();
        }
        Ok(if more { Received::More } else { Received::Drained })
    }

    /// Receives from one of the sockets until it is empty or the batch is full.
    fn receive_from(
        &mut self,
        receiving: &Receiving,
        number: usize,
        pool: &Pool,
        batch: &mut Batch,
        stats: &mut Stats,
    ) -> io::Result<Received> {
        let socket = &receiving.sockets[number];
        let (mut taken, mut bytes, mut errors) = (0, 0, 0);
        // Packets that end here count against the batch as well, so that they cannot keep us here.
        while taken < BATCH && bytes < BATCH_BYTES && !batch.is_full() {
            let room = batch.room().min(AT_ONCE);
            self.provide(room, pool);
            if self.chunks.is_empty() {
                match message::receive(socket, &mut []) {
                    Ok(_) => stats.lost(self.id, DropReason::NoBuffer),
                    Err(_) => return Ok(Received::Drained),
                }
                taken += 1;
                continue;
            }
            let mut datagrams = [Datagram::NONE; message::RECEIVED];
            match self.take(socket, room, &mut datagrams) {
                Ok(count) => {
                    self.make(receiving, number, &datagrams[..count], batch, stats);
                    (taken, bytes) =
                        (taken + count, bytes + datagrams.iter().map(|datagram| datagram.len).sum::<usize>());
                    if count < room {
                        return Ok(Received::Drained);
                    }
                }
                Err(Errno::INTR) => {}
                Err(error) if is_broken(error) => return Err(error.into()),
                // An error of the network's is reported once; one that stays must not keep us awake.
                Err(error) if error != Errno::AGAIN && errors == 0 => errors += 1,
                Err(_) => return Ok(Received::Drained),
            }
        }
        Ok(Received::More)
    }

    /// Sees to it that so many packets can be received, as far as there are buffers.
    fn provide(&mut self, count: usize, pool: &Pool) {
        while self.chunks.len() < count
            && let Some(chunk) = pool.chunk()
        {
            self.chunks.push(chunk);
        }
        while self.supers.len() < self.chunks.len()
            && let Some(buffer) = pool.large()
        {
            self.supers.push(buffer);
        }
    }

    fn take(
        &mut self,
        socket: &OwnedFd,
        count: usize,
        datagrams: &mut [Datagram; message::RECEIVED],
    ) -> Result<usize, Errno> {
        let mut supers = self.supers.iter_mut();
        let mut buffers = ArrayVec::<[IoSliceMut<'_>; 2], AT_ONCE>::new();
        for (chunk, start) in self.chunks.iter_mut().take(count) {
            let rest = supers.next().and_then(Super::bytes_mut).unwrap_or_default();
            buffers.push([IoSliceMut::new(&mut chunk[*start..]), IoSliceMut::new(rest)]);
        }
        let received = message::receive_many(socket, &mut buffers, datagrams);
        received.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }

    /// Makes frames of what was received into the first buffers.
    fn make(
        &mut self,
        receiving: &Receiving,
        number: usize,
        datagrams: &[Datagram],
        batch: &mut Batch,
        stats: &mut Stats,
    ) {
        let mut left = std::mem::take(&mut self.supers).into_iter();
        let mut unused = ArrayVec::<Super, AT_ONCE>::new();
        let chunks: ArrayVec<(Chunk, usize), AT_ONCE> = self.chunks.drain(..datagrams.len()).collect();
        for ((chunk, start), datagram) in chunks.into_iter().zip(datagrams) {
            self.note_overruns(number, datagram, stats);
            let room = chunk.len() - start;
            let mut frame = match left.next() {
                _ if datagram.truncated => {
                    stats.lost(self.id, DropReason::Truncated);
                    continue;
                }
                Some(buffer) if datagram.len > room => {
                    let body = Body::one(buffer, 0, datagram.len - room);
                    Frame::new(chunk, start, room, self.id).with_body(body, 0)
                }
                buffer => {
                    unused.extend(buffer);
                    Frame::new(chunk, start, datagram.len.min(room), self.id)
                }
            };
            match self.unwrap(&mut frame, number, datagram, receiving.outer_is_v4) {
                Ok(()) => {
                    stats.received(&frame);
                    batch.push(frame);
                }
                Err(reason) => stats.lost(self.id, reason),
            }
        }
        unused.extend(left.take(AT_ONCE - unused.len()));
        self.supers = unused;
    }

    fn note_overruns(&mut self, number: usize, datagram: &Datagram, stats: &mut Stats) {
        if let (Some(overruns), Some(known)) = (datagram.overruns, self.overruns.get_mut(number)) {
            stats.port(self.id).overruns += u64::from(overruns.wrapping_sub(*known));
            *known = overruns;
        }
    }

    /// Takes the outer IPv4 header off, which the kernel keeps of IPv6, and brings the rest into the form that all tunnels have here.
    fn unwrap(
        &self,
        frame: &mut Frame,
        number: usize,
        datagram: &Datagram,
        outer_is_v4: bool,
    ) -> Result<(), DropReason> {
        let mut tos = datagram.tos;
        if outer_is_v4 {
            let [first, second] = *frame.head().first_chunk().ok_or(DropReason::TooShort)?;
            tos = second;
            frame.pull(usize::from(first & 0x0f) * 4).ok_or(DropReason::TooShort)?;
        }
        dress(frame, self.protocols[number], self.tunnel_mtu)?;
        if let Some(outer) = &mut frame.outer {
            (outer.peer, outer.tos) = (datagram.from, tos);
        }
        Ok(())
    }
}

/// Gives a packet that lies behind an outer IP header of this protocol the form that frames from all tunnels have: a tunnel header, an
/// Ethernet header, and what is still to be done. Who sent it is for the caller to enter.
///
/// # Errors
/// `TunnelHeader` if a checksum of the tunnel's is wrong, `NoBuffer` if there is no headroom.
pub fn dress(frame: &mut Frame, protocol: u8, tunnel_mtu: u32) -> Result<(), DropReason> {
    let (format, base) = match protocol {
        ip::IPIP => (Format::Ipip, frame_ipip(frame, Inner::V4)?),
        ip::IPV6 => (Format::Ipip, frame_ipip(frame, Inner::V6)?),
        _ => (Format::Gre, frame_gre(frame)?),
    };
    let nobody = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    frame.outer = Some(Outer { peer: nobody, entropy: 0, tos: 0, format, base: base as u16, in_fragments: false });
    frame.offload = unfinished(frame, base, tunnel_mtu);
    Ok(())
}

/// The room that a made Ethernet header takes, and a tunnel header that has to move for it.
fn make_ethernet(frame: &mut Frame, base: usize, ethertype: u16) -> Result<(), DropReason> {
    frame.push(ETH_LEN).ok_or(DropReason::NoBuffer)?;
    let room = frame.head_mut();
    room.copy_within(ETH_LEN..ETH_LEN + base, 0);
    let (macs, kind) = room[base..base + ETH_LEN].split_at_mut(ETH_LEN - 2);
    macs.fill(0);
    kind.copy_from_slice(&ethertype.to_be_bytes());
    Ok(())
}

/// What is not understood stays as it is: [`crate::tunnel`] has the name for it.
fn frame_gre(frame: &mut Frame) -> Result<usize, DropReason> {
    let Ok(read) = GreHeader::parse(frame.head()) else { return Ok(gre::GRE_LEN) };
    if read.checksum && !gre::verify(frame.slices(0..frame.len())) {
        return Err(DropReason::TunnelHeader);
    }
    if matches!(read.protocol, ETHERTYPE_IPV4 | ETHERTYPE_IPV6) {
        make_ethernet(frame, read.len, read.protocol)?;
    }
    Ok(read.len)
}

fn frame_ipip(frame: &mut Frame, inner: Inner) -> Result<usize, DropReason> {
    make_ethernet(frame, 0, inner.ethertype())?;
    frame.push(1).ok_or(DropReason::NoBuffer)?[0] = inner.protocol();
    Ok(1)
}

/// What the sender, or a device on the way that merged segments, left to be done: TCP's and UDP's checksums then are partial, which shows.
fn unfinished(frame: &Frame, base: usize, tunnel_mtu: u32) -> Offload {
    let head = frame.head().get(base..).unwrap_or_default();
    let Some(partial) = partial::recognise(head) else { return Offload::default() };
    let (l4, longest) = (usize::from(partial.start), ETH_LEN + tunnel_mtu as usize);
    let is_long = usize::from(partial.offset) == tcp::CHECKSUM_OFFSET && frame.len() - base > longest;
    let gso = head.get(l4 + 12..l4 + 14).filter(|_| is_long).map(|flags| {
        let kind = if head[..ETH_LEN].ends_with(&ETHERTYPE_IPV4.to_be_bytes()) { GsoKind::Tcp4 } else { GsoKind::Tcp6 };
        let header_len = l4 + usize::from(flags[0] >> 4) * 4;
        let size = longest.saturating_sub(header_len).min(usize::from(u16::MAX)) as u16;
        Gso { kind, ecn: flags[1] & tcp::CWR != 0, size, header_len: header_len as u16 }
    });
    Offload { partial: Some(partial), gso: gso.filter(|gso| gso.size > 0), verified: false }
}
