//! A veth whose host end leads to an AF_XDP socket: the port for small packets.
//!
//! [`XdpDevice`] is socket and program, opened by whoever attaches the pod; [`XdpPort`] is the device as a port of the worker whose
//! chunks it shares. Frames are received into the worker's own chunks and sent from them. The pod's end has lost its
//! segmentation to XDP, so nothing longer than the MTU comes from it; superframes from elsewhere are cut on the way out. Checksums
//! are handed on unfinished in both directions where the kernel takes them so (Linux 6.8), and filled in otherwise.
//!
//! The kernel gives a queue to one memory only. So the pod's end is made with one transmit queue, and what it sends is received
//! by one worker, whose socket is on queue 0. The host end has a transmit queue for each worker, where the others have sockets that
//! only send.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use arrayvec::ArrayVec;
use rustix::io::Errno;
use weft_encap::offload::Partial;

use super::endpoint::Endpoint;
use super::programs::{self, Tunnel};
use super::{Verdict, partial};
use crate::drop_reason::DropReason;
use crate::frame::{Body, Frame};
use crate::pool::{CHUNK, Pool};
use crate::port::software::{self, Cut, HEADERS};
use crate::port::sys::arena::Chunk;
use crate::port::sys::bpf::{BpfError, Instruction, Link, Map, MapKind, Mode, Program};
#[cfg(test)]
use crate::port::sys::xsk::Rings;
use crate::port::sys::xsk::{
    Abilities, Binding, Descriptor, METADATA_LEN, PIECES, Socket, Umem, Wakeup, checksum_metadata,
};
use crate::port::{BATCH, Batch, Capabilities, Port, PortId, Queue, Received, is_broken};
use crate::stats::Stats;

/// Where a frame begins in a chunk that is written to be sent: behind room for metadata, on a cache line.
const START: usize = 64;
/// Entries of each ring.
const RING: u32 = 2048;
/// Calls that send, one after the other, while each makes the ring shorter.
const WAKEUPS: usize = 8;
/// Receiving asks for the kernel's count of losses each so many times.
const COUNTED: u32 = 1024;
/// The longest frame that is received into one chunk, behind XDP's own headroom of 256 bytes. Longer ones take several, if the kernel
/// can do that.
pub const IN_ONE: usize = CHUNK - 256;
/// What of a frame fits a chunk on the way out.
const ROOM: usize = CHUNK - START;

/// A program attached to a device, and the map by which it finds sockets.
#[derive(Debug)]
pub struct Attachment {
    // Detached when it is dropped, before the map.
    _link: Link,
    _sockets: Map,
}

impl Attachment {
    /// Has every frame of a pod's device go to `socket`, which is bound to its queue 0.
    ///
    /// # Errors
    /// `EBUSY` if another program is attached; `EOPNOTSUPP`, `EINVAL` or `ERANGE` if the driver cannot, for example with an MTU near a
    /// page's size; see [`BpfError`].
    pub fn pod(interface: u32, socket: &Socket, mode: Mode) -> Result<Attachment, BpfError> {
        Attachment::with(interface, &[socket], mode, "weft_pod", programs::pod)
    }

    /// Has our tunnel's packets to our address go to `sockets`, one for each queue of an uplink from 0 on, and leaves everything
    /// else to the kernel.
    ///
    /// # Errors
    /// As for [`Attachment::pod`].
    pub fn uplink(interface: u32, sockets: &[&Socket], tunnel: &Tunnel, mode: Mode) -> Result<Attachment, BpfError> {
        let program = |map: &Map| programs::uplink(map, tunnel, Verdict::Pass);
        Attachment::with(interface, sockets, mode, "weft_uplink", program)
    }

    fn with(
        interface: u32,
        sockets: &[&Socket],
        mode: Mode,
        name: &str,
        program: impl FnOnce(&Map) -> Vec<Instruction>,
    ) -> Result<Attachment, BpfError> {
        let map = Map::create(MapKind::Xsk, "weft_sockets", 4, 4, sockets.len() as u32)?;
        for (queue, socket) in (0_u32..).zip(sockets) {
            map.update(&queue.to_ne_bytes(), &socket.as_fd().as_raw_fd().to_ne_bytes())?;
        }
        let program = Program::load(name, &program(&map))?;
        Ok(Attachment { _link: program.attach(interface, mode)?, _sockets: map })
    }
}

/// A device with socket and program, not yet anyone's port. It may be sent to its worker.
#[derive(Debug)]
pub struct XdpDevice {
    /// None if another worker receives.
    attachment: Option<Attachment>,
    socket: Socket,
}

impl XdpDevice {
    /// A socket, and what leads frames to it.
    pub fn new(attachment: Attachment, socket: Socket) -> XdpDevice {
        XdpDevice { attachment: Some(attachment), socket }
    }

    /// Opens the host end of a pod's veth, by its number in the calling thread's namespace, to receive and to send. Takes the
    /// kernel milliseconds.
    ///
    /// # Errors
    /// Those of [`Socket::open`] and of [`Attachment::pod`], which say what to do.
    pub fn open(interface: u32, umem: &Umem) -> io::Result<XdpDevice> {
        let socket = Socket::open(umem, Binding { interface, queue: 0, ring: RING, zero_copy: false })?;
        let attachment = Attachment::pod(interface, &socket, Mode::Native).map_err(io::Error::other)?;
        Ok(XdpDevice::new(attachment, socket))
    }

    /// Opens it for a worker that only sends. `queue` is not 0, and not another such worker's.
    ///
    /// # Errors
    /// Those of [`Socket::open`]: `EINVAL` if the device has too few transmit queues.
    pub fn open_sender(interface: u32, queue: u32, umem: &Umem) -> io::Result<XdpDevice> {
        let socket = Socket::open(umem, Binding { interface, queue, ring: RING, zero_copy: false })?;
        Ok(XdpDevice { attachment: None, socket })
    }
}

/// An [`XdpDevice`] as a port.
pub struct XdpPort {
    id: PortId,
    endpoint: Endpoint,
    attachment: Option<Attachment>,
    wakeup: Wakeup,
    abilities: Abilities,
    calls: u32,
}

impl XdpPort {
    /// A port of that number.
    ///
    /// # Errors
    /// `InvalidInput` if the device was opened for another worker's pool.
    pub fn new(device: XdpDevice, pool: &Pool, id: PortId) -> io::Result<XdpPort> {
        let XdpDevice { attachment, socket } = device;
        if !socket.umem().is_of(pool.arena()) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the AF_XDP socket was opened for another pool"));
        }
        let abilities = socket.abilities();
        let (wakeup, rings) = socket.into_parts();
        let endpoint = Endpoint::new(rings, pool.arena(), attachment.is_some());
        Ok(XdpPort { id, endpoint, attachment, wakeup, abilities, calls: 0 })
    }

    /// A port over any rings and any socket.
    #[cfg(test)]
    pub(super) fn over(rings: Rings, fd: OwnedFd, abilities: Abilities, pool: &Pool, id: PortId) -> XdpPort {
        let endpoint = Endpoint::new(rings, pool.arena(), true);
        XdpPort { id, endpoint, attachment: None, wakeup: Wakeup::of(fd), abilities, calls: 0 }
    }

    /// How many chunks the kernel has, to receive into and to send.
    pub fn lent(&self) -> (u32, u32) {
        self.endpoint.lent()
    }

    /// Takes the next frame. Adds to `count` how many descriptors that took.
    fn take(&mut self, pool: &Pool, count: &mut usize) -> Option<Result<Frame, DropReason>> {
        let (first, continued) = self.endpoint.receive()?;
        *count += 1;
        let mut frame = first.map_err(|_| DropReason::BadDescriptor).map(|piece| {
            let mut frame = Frame::new(piece.chunk, piece.start, piece.len, self.id);
            frame.offload.partial = partial::recognise(frame.head());
            frame
        });
        if continued {
            let body = self.take_rest(pool, count);
            frame = frame.and_then(|frame| Ok(frame.with_body(body?, 0)));
        }
        Some(frame)
    }

    /// Takes what continues a frame, to the end of it whatever happens.
    fn take_rest(&mut self, pool: &Pool, count: &mut usize) -> Result<Body, DropReason> {
        let mut buffer = pool.large().ok_or(DropReason::NoBuffer);
        let (mut len, mut continued) = (0, true);
        // The kernel shows a frame only when all of it is there.
        while continued && let Some((piece, more)) = self.endpoint.receive() {
            *count += 1;
            continued = more;
            let end = buffer.and_then(|mut buffer| {
                let piece = piece.map_err(|_| DropReason::BadDescriptor)?;
                let bytes = &piece.chunk[piece.start..piece.start + piece.len];
                let whole = buffer.bytes_mut().expect("nobody else has it yet");
                whole.get_mut(len..len + bytes.len()).ok_or(DropReason::Truncated)?.copy_from_slice(bytes);
                Ok((buffer, len + bytes.len()))
            });
            buffer = end.map(|(buffer, end)| {
                len = end;
                buffer
            });
        }
        let buffer = if continued { Err(DropReason::BadDescriptor) } else { buffer };
        Ok(Body::one(buffer?, 0, len))
    }

    /// Learns from the kernel what the rings cannot say: that the device is gone, and what it dropped.
    fn look(&mut self, received: usize, stats: &mut Stats) -> io::Result<()> {
        self.calls = self.calls.wrapping_add(1);
        if self.calls.is_multiple_of(COUNTED)
            && let Ok(overruns) = self.wakeup.overruns()
        {
            stats.port(self.id).overruns = overruns;
        }
        if received > 0 {
            return Ok(());
        }
        // Woken for nothing: it may be for an error, which is told once.
        match self.wakeup.receive() {
            Err(error) if is_broken(error) => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Gives a frame to the transmit ring. `None`: there is no room now.
    fn put(&mut self, frame: &mut Frame) -> Option<Parts> {
        if frame.offload.gso.is_some() {
            return self.put_segments(frame);
        }
        if !self.abilities.checksum
            && let Err(reason) = software::fill_checksum(frame, 0)
        {
            return Some(Parts::failed(reason));
        }
        let needed = frame.len().div_ceil(ROOM);
        if needed > self.most_pieces() {
            return Some(Parts::failed(DropReason::DeviceRefused));
        }
        if (self.endpoint.room(needed as u32) as usize) < needed {
            return None;
        }
        if self.lend(frame) {
            return Some(Parts::SENT);
        }
        let copied = self.copy(frame.slices(0..frame.len()), frame.len(), frame.offload.partial);
        Some(copied.map_or_else(Parts::failed, |()| Parts::SENT))
    }

    /// Most chunks of one frame.
    fn most_pieces(&self) -> usize {
        if self.abilities.pieces { PIECES.min(self.endpoint.ring() as usize) } else { 1 }
    }

    /// Sends a frame from where it lies, if it can be.
    fn lend(&mut self, frame: &mut Frame) -> bool {
        // Where metadata is possible the kernel wants room for it before every frame.
        if frame.body().is_some() || self.abilities.checksum && frame.place().1 < METADATA_LEN {
            return false;
        }
        let partial = frame.offload.partial;
        if let Some(partial) = partial {
            let room =
                frame.head_with_room(METADATA_LEN).expect("a partial checksum is left only to who has checked it");
            room[..METADATA_LEN].copy_from_slice(&checksum_metadata(partial.start, partial.offset));
        }
        let (chunk, start) = frame.place();
        let describe = |plain: Descriptor| if partial.is_some() { plain.with_metadata() } else { plain };
        self.endpoint.send(chunk, start, frame.head().len(), describe)
    }

    /// Sends a copy, in as many chunks as it takes. There must be room in the ring.
    fn copy<'a>(
        &mut self,
        slices: impl Iterator<Item = &'a [u8]>,
        len: usize,
        partial: Option<Partial>,
    ) -> Result<(), DropReason> {
        let count = len.div_ceil(ROOM);
        if count > self.most_pieces() {
            return Err(DropReason::DeviceRefused);
        }
        let mut chunks = ArrayVec::<Chunk, PIECES>::new();
        for _ in 0..count {
            chunks.push(self.endpoint.chunk().ok_or(DropReason::NoBuffer)?);
        }
        let mut at = 0;
        for mut slice in slices {
            while !slice.is_empty() {
                let (index, within) = (at / ROOM, at % ROOM);
                let (now, later) = slice.split_at(slice.len().min(ROOM - within));
                chunks[index][START + within..][..now.len()].copy_from_slice(now);
                (at, slice) = (at + now.len(), later);
            }
        }
        if let Some(partial) = partial {
            let metadata = checksum_metadata(partial.start, partial.offset);
            chunks[0][START - METADATA_LEN..START].copy_from_slice(&metadata);
        }
        for (index, chunk) in chunks.iter().enumerate() {
            let describe = |plain: Descriptor| {
                let described = if partial.is_some() && index == 0 { plain.with_metadata() } else { plain };
                if index + 1 < count { described.with_more() } else { described }
            };
            if !self.endpoint.send(chunk, START, (len - index * ROOM).min(ROOM), describe) {
                return Err(DropReason::QueueFull);
            }
        }
        Ok(())
    }

    /// Cuts a superframe.
    fn put_segments(&mut self, frame: &Frame) -> Option<Parts> {
        let cut = match Cut::new(frame, 0) {
            Ok(cut) => cut,
            Err(reason) => return Some(Parts::failed(reason)),
        };
        let needed: usize = (0..cut.count()).map(|index| cut.len(index).div_ceil(ROOM)).sum();
        if needed > self.endpoint.ring() as usize {
            return Some(Parts::failed(DropReason::Unsegmentable));
        }
        if (self.endpoint.room(needed as u32) as usize) < needed {
            return None;
        }
        let mut parts = Parts { sent: 0, failed: 0, reason: DropReason::NoBuffer };
        let mut headers = [0; HEADERS];
        for index in 0..cut.count() {
            let header = cut.write(index, &mut headers);
            let slices = std::iter::once(&headers[..header]).chain(cut.payload(index));
            match self.copy(slices, cut.len(index), None) {
                Ok(()) => parts.sent += 1,
                Err(reason) => (parts.failed, parts.reason) = (parts.failed + 1, reason),
            }
        }
        Some(parts)
    }

    /// Has the kernel send. Returns whether there is room that was not there before.
    fn kick(&mut self) -> io::Result<bool> {
        let mut sent = 0;
        for _ in 0..WAKEUPS {
            if !self.endpoint.submit() || !self.endpoint.needs_wakeup() {
                break;
            }
            match self.wakeup.transmit() {
                Err(error) if is_broken(error) => return Err(error.into()),
                // The budget of one call is used up, or memory is: what came back says which.
                Err(Errno::AGAIN | Errno::BUSY | Errno::NOBUFS | Errno::INTR) | Ok(()) => {}
                // Down, for example. The frames wait in the ring.
                Err(_) => break,
            }
            let completed = self.endpoint.complete();
            if completed == 0 {
                break;
            }
            sent += completed;
        }
        Ok(sent > 0)
    }
}

/// What became of a frame.
struct Parts {
    sent: u64,
    failed: u64,
    reason: DropReason,
}

impl Parts {
    const SENT: Parts = Parts { sent: 1, failed: 0, reason: DropReason::DeviceRefused };

    fn failed(reason: DropReason) -> Parts {
        Parts { sent: 0, failed: 1, reason }
    }
}

/// What takes the kernel tens of milliseconds to close.
struct Closing {
    attachment: Option<Attachment>,
    _fd: Arc<OwnedFd>,
    released: Arc<AtomicBool>,
}

impl Drop for Closing {
    fn drop(&mut self) {
        // Without program nothing is received any more, and what was given to be sent was copied: the kernel has no
        // further use for the chunks, even before the socket is closed.
        drop(self.attachment.take());
        self.released.store(true, Ordering::Release);
    }
}

impl Drop for XdpPort {
    fn drop(&mut self) {
        let released = Arc::new(AtomicBool::new(false));
        self.endpoint.abandon(Arc::clone(&released));
        let closing = Closing { attachment: self.attachment.take(), _fd: self.wakeup.fd(), released };
        // The worker has other ports to serve. If there is no thread to be had, it is done here.
        let _ = thread::Builder::new().name("weft-close".into()).stack_size(64 << 10).spawn(move || drop(closing));
    }
}

impl Port for XdpPort {
    fn receive(&mut self, pool: &Pool, batch: &mut Batch, stats: &mut Stats) -> io::Result<Received> {
        let mut count = 0;
        // What is not believed counts against the batch as well, so that it cannot keep us here.
        while !batch.is_full() && count < BATCH {
            match self.take(pool, &mut count) {
                None => break,
                Some(Err(reason)) => stats.lost(self.id, reason),
                Some(Ok(frame)) => {
                    stats.received(&frame);
                    batch.push(frame);
                }
            }
        }
        self.endpoint.received(count);
        self.look(count, stats)?;
        Ok(if self.endpoint.has_more() { Received::More } else { Received::Drained })
    }

    fn transmit(&mut self, queue: &mut Queue, stats: &mut Stats) -> io::Result<()> {
        self.endpoint.complete();
        loop {
            while let Some(frame) = queue.front_mut() {
                let Some(parts) = self.put(frame) else { break };
                let frame = queue.pop_front().expect("it was at the front");
                stats.sent_in_part(frame, self.id, parts.sent, parts.failed, parts.reason);
            }
            let progress = self.kick()?;
            if queue.is_empty() || !progress {
                return Ok(());
            }
        }
    }

    fn readable(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wakeup.as_fd())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { partial_checksum: self.abilities.checksum, ..Capabilities::default() }
    }

    fn kind(&self) -> &'static str {
        "xdp"
    }
}
