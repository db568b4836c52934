//! A device as a worker has it: socket, rings, chunks and program in one, frames in and out.
//!
//! What the frames are is for others to know: [`XdpPort`](super::XdpPort) for pods, [`XdpUnderlay`](super::XdpUnderlay) for other nodes.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use rustix::io::Errno;
use weft_encap::offload::Partial;

use super::Verdict;
use super::endpoint::Endpoint;
use super::pod_program::{PodLead, PodProgram};
use super::programs::{self, Tunnel};
use crate::drop_reason::DropReason;
use crate::frame::{Body, Frame, prefetch};
use crate::pool::{CHUNK, Pool};
use crate::port::sys::arena::Chunk;
use crate::port::sys::bpf::{BpfError, Instruction, Link, Map, MapKind, Mode, Program};
#[cfg(test)]
use crate::port::sys::xsk::Rings;
use crate::port::sys::xsk::{
    Abilities, Binding, Descriptor, METADATA_LEN, PIECES, Socket, Umem, Wakeup, checksum_metadata,
};
use crate::port::{BATCH, Batch, PortId, Queue, Received, is_broken};
use crate::stats::Stats;

/// Where a frame begins in a chunk that is written to be sent: behind room for metadata, on a cache line.
const START: usize = 64;
/// How long an uplink may still have the program of a weftd that has ended.
const BUSY_FOR: Duration = Duration::from_secs(1);
/// Entries of each ring.
const RING: u32 = 2048;
/// The name of an uplink's program, as `bpftool prog` shows it.
pub const UPLINK_PROGRAM: &str = "weft_uplink";
/// Receiving asks for the kernel's count of losses each so many times.
const COUNTED: u32 = 1024;
/// The longest frame that is received into one chunk, behind XDP's own headroom of 256 bytes. Longer ones take several, if the kernel
/// can do that.
pub const IN_ONE: usize = CHUNK - 256;
/// What of a frame fits a chunk that is written to be sent.
pub const ROOM: usize = CHUNK - START;

/// A program attached to a device, and the map by which it finds sockets.
#[derive(Debug)]
pub struct Attachment {
    // Detached when it is dropped, before the map.
    _link: Link,
    sockets: Map,
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
        Attachment::with(interface, sockets, mode, UPLINK_PROGRAM, program)
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
        Ok(Attachment { _link: program.attach(interface, mode)?, sockets: map })
    }
}

/// The program on an uplink, which sockets on its queues join and leave. Packets of a queue without socket go to the kernel.
#[derive(Debug)]
pub struct Steering(Attachment);

impl Steering {
    /// Attaches the program, for so many queues.
    ///
    /// # Errors
    /// As for [`Attachment::pod`].
    pub fn attach(interface: u32, queues: u32, tunnel: &Tunnel, mode: Mode) -> Result<Steering, BpfError> {
        let sockets = Map::create(MapKind::Xsk, "weft_sockets", 4, 4, queues)?;
        let program = Program::load(UPLINK_PROGRAM, &programs::uplink(&sockets, tunnel, Verdict::Pass))?;
        // That of a weftd which was just killed goes with its last descriptor, a moment later.
        let deadline = Instant::now() + BUSY_FOR;
        loop {
            match program.attach(interface, mode) {
                Err(error) if error.io().kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                    thread::sleep(BUSY_FOR / 100);
                }
                link => return Ok(Steering(Attachment { _link: link?, sockets })),
            }
        }
    }

    fn join(&self, queue: u32, socket: &impl AsFd) -> io::Result<()> {
        let fd = socket.as_fd().as_raw_fd();
        self.0.sockets.update(&queue.to_ne_bytes(), &fd.to_ne_bytes()).map_err(io::Error::other)
    }

    fn leave(&self, queue: u32) {
        // One that has been closed has left already.
        let _ = self.0.sockets.remove(&queue.to_ne_bytes());
    }
}

/// What leads frames to a socket.
#[derive(Debug)]
enum Lead {
    /// Nothing: another worker receives.
    None,
    /// A program for it alone.
    Own { _attachment: Attachment },
    /// That of many pods.
    Pod { _lead: PodLead },
    /// The program of an uplink, for this queue.
    Shared(Arc<Steering>, u32),
}

/// A device with socket and program, not yet anyone's port. It may be sent to its worker.
#[derive(Debug)]
pub struct XdpDevice {
    lead: Lead,
    socket: Socket,
}

impl XdpDevice {
    /// A socket, and what leads frames to it.
    pub fn new(attachment: Attachment, socket: Socket) -> XdpDevice {
        XdpDevice { lead: Lead::Own { _attachment: attachment }, socket }
    }

    /// Opens a queue of an uplink. Its socket joins the program when it is put to use.
    ///
    /// # Errors
    /// Those of [`Socket::open`]; `EINVAL` if there is no such queue.
    pub fn open_uplink(
        interface: u32,
        queue: u32,
        umem: &Umem,
        zero_copy: bool,
        steering: &Arc<Steering>,
    ) -> io::Result<XdpDevice> {
        let socket = Socket::open(umem, Binding { interface, queue, ring: RING, zero_copy })?;
        Ok(XdpDevice { lead: Lead::Shared(Arc::clone(steering), queue), socket })
    }

    /// What the kernel can do with its frames.
    pub fn abilities(&self) -> Abilities {
        self.socket.abilities()
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

    /// The same with a program that other devices of this namespace have as well, which takes the kernel far less time.
    ///
    /// # Errors
    /// As for [`XdpDevice::open`].
    pub fn open_with(interface: u32, umem: &Umem, program: &Arc<PodProgram>) -> io::Result<XdpDevice> {
        let socket = Socket::open(umem, Binding { interface, queue: 0, ring: RING, zero_copy: false })?;
        let lead = match program.lead(interface, &socket).map_err(io::Error::other)? {
            Some(lead) => Lead::Pod { _lead: lead },
            None => {
                let attachment = Attachment::pod(interface, &socket, Mode::Native).map_err(io::Error::other)?;
                Lead::Own { _attachment: attachment }
            }
        };
        Ok(XdpDevice { lead, socket })
    }

    /// Opens it for a worker that only sends. `queue` is not 0, and not another such worker's.
    ///
    /// # Errors
    /// Those of [`Socket::open`]: `EINVAL` if the device has too few transmit queues.
    pub fn open_sender(interface: u32, queue: u32, umem: &Umem) -> io::Result<XdpDevice> {
        let socket = Socket::open(umem, Binding { interface, queue, ring: RING, zero_copy: false })?;
        Ok(XdpDevice { lead: Lead::None, socket })
    }
}

/// An [`XdpDevice`] in use. See the module's essay.
pub struct Channel {
    id: PortId,
    endpoint: Endpoint,
    lead: Lead,
    wakeup: Wakeup,
    abilities: Abilities,
    calls: u32,
    /// What the kernel had dropped when it was asked last.
    overruns: u64,
}

impl Channel {
    /// Puts a device to use, for frames of that port.
    ///
    /// # Errors
    /// `InvalidInput` if the device was opened for another worker's pool, `OutOfMemory` if the pool is empty.
    pub fn new(device: XdpDevice, pool: &Pool, id: PortId) -> io::Result<Channel> {
        let XdpDevice { lead, socket } = device;
        if !socket.umem().is_of(pool.arena()) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the AF_XDP socket was opened for another pool"));
        }
        let abilities = socket.abilities();
        let (wakeup, rings) = socket.into_parts();
        let endpoint = Endpoint::new(rings, pool.arena(), !matches!(lead, Lead::None));
        if endpoint.is_starved() {
            return Err(io::Error::new(io::ErrorKind::OutOfMemory, "no buffers are left for another AF_XDP device"));
        }
        let channel = Channel { id, endpoint, lead, wakeup, abilities, calls: 0, overruns: 0 };
        if let Lead::Shared(steering, queue) = &channel.lead {
            steering.join(*queue, &channel.wakeup)?;
        }
        Ok(channel)
    }

    /// Over any rings and any socket.
    #[cfg(test)]
    pub fn over(rings: Rings, fd: OwnedFd, abilities: Abilities, pool: &Pool, id: PortId) -> Channel {
        let endpoint = Endpoint::new(rings, pool.arena(), true);
        Channel { id, endpoint, lead: Lead::None, wakeup: Wakeup::of(fd), abilities, calls: 0, overruns: 0 }
    }

    /// What the kernel can do with its frames.
    pub fn abilities(&self) -> Abilities {
        self.abilities
    }

    /// How many chunks the kernel has, to receive into and to send.
    pub fn lent(&self) -> (u32, u32) {
        self.endpoint.lent()
    }

    /// Whether there is something to receive, or to be asked for again.
    pub fn is_waiting(&mut self) -> bool {
        self.endpoint.has_more() || self.endpoint.is_starved()
    }

    /// Receives a batch. `open` has a look at each frame, and may end it.
    ///
    /// # Errors
    /// The device is gone.
    pub fn receive(
        &mut self,
        pool: &Pool,
        batch: &mut Batch,
        stats: &mut Stats,
        mut open: impl FnMut(&mut Frame) -> Result<(), DropReason>,
    ) -> io::Result<Received> {
        let mut count = 0;
        let first = batch.len();
        // What ends here counts against the batch as well, so that it cannot keep us here.
        while !batch.is_full() && count < BATCH {
            let Some(taken) = self.take(pool, &mut count) else { break };
            match taken {
                Err(reason) => stats.lost(self.id, reason),
                Ok(frame) => {
                    // Another CPU has written it: by the time all are taken, it has come.
                    frame.head().first().inspect(|byte| prefetch(*byte));
                    batch.push(frame);
                }
            }
        }
        let mut kept = first;
        for index in first..batch.len() {
            match open(&mut batch[index]) {
                Err(reason) => stats.lost(self.id, reason),
                Ok(()) => {
                    stats.received(&batch[index]);
                    batch.swap(kept, index);
                    kept += 1;
                }
            }
        }
        batch.truncate(kept);
        self.endpoint.received(count);
        self.look(count, stats)?;
        // Without chunks nothing is received, and so nothing would have us called again.
        let more = self.endpoint.has_more() || self.endpoint.is_starved();
        Ok(if more { Received::More } else { Received::Drained })
    }

    /// Takes the next frame. Adds to `count` how many descriptors that took.
    fn take(&mut self, pool: &Pool, count: &mut usize) -> Option<Result<Frame, DropReason>> {
        let (first, continued) = self.endpoint.receive()?;
        *count += 1;
        let mut frame = first
            .map_err(|_| DropReason::BadDescriptor)
            .map(|piece| Frame::new(piece.chunk, piece.start, piece.len, self.id));
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

    /// Learns what the kernel has dropped since it was asked last.
    pub fn count(&mut self, stats: &mut Stats) {
        if let Ok(overruns) = self.wakeup.overruns() {
            stats.port(self.id).overruns += overruns.saturating_sub(self.overruns);
            self.overruns = overruns;
        }
    }

    /// Learns from the kernel what the rings cannot say: that the device is gone, and what it dropped.
    fn look(&mut self, received: usize, stats: &mut Stats) -> io::Result<()> {
        self.calls = self.calls.wrapping_add(1);
        if self.calls.is_multiple_of(COUNTED) {
            self.count(stats);
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

    /// Sends the frames of `queue` from its front. `put` gives one to the ring; `None` from it: there is no room now.
    ///
    /// # Errors
    /// The device is gone.
    pub fn transmit(
        &mut self,
        queue: &mut Queue,
        stats: &mut Stats,
        mut put: impl FnMut(&mut Channel, &mut Frame) -> Option<Parts>,
    ) -> io::Result<()> {
        self.endpoint.complete();
        loop {
            while let Some(frame) = queue.front_mut() {
                let Some(parts) = put(self, frame) else { break };
                let frame = queue.pop_front().expect("it was at the front");
                stats.sent_in_part(frame, self.id, parts.sent, parts.failed, parts.reason);
            }
            let progress = self.kick(stats)?;
            if queue.is_empty() || !progress {
                return Ok(());
            }
        }
    }

    /// Whether so many pieces can be given to the ring: now, later, or (an error) never.
    pub fn has_room(&mut self, pieces: usize) -> Result<bool, DropReason> {
        if pieces > self.endpoint.ring() as usize {
            return Err(DropReason::Unsegmentable);
        }
        Ok(self.endpoint.room(pieces as u32) as usize >= pieces)
    }

    /// Most chunks of one frame.
    pub fn most_pieces(&self) -> usize {
        if self.abilities.pieces { PIECES.min(self.endpoint.ring() as usize) } else { 1 }
    }

    /// Sends a frame from where it lies, if it can be; otherwise a copy. There must be room in the ring. A partial checksum, whose
    /// places count from the frame's first byte, is left to the kernel, so the kernel must be able to complete it.
    pub fn send(&mut self, frame: &mut Frame, partial: Option<Partial>) -> Result<(), DropReason> {
        if self.lend(frame, partial) {
            return Ok(());
        }
        self.copy(frame.slices(0..frame.len()), frame.len(), partial)
    }

    fn lend(&mut self, frame: &mut Frame, partial: Option<Partial>) -> bool {
        // Where metadata is possible the kernel wants room for it before every frame.
        if frame.body().is_some() || self.abilities.checksum && frame.place().1 < METADATA_LEN {
            return false;
        }
        if let Some(partial) = partial {
            let room = frame.head_with_room(METADATA_LEN).expect("there is room where metadata is possible");
            room[..METADATA_LEN].copy_from_slice(&checksum_metadata(partial.start, partial.offset));
        }
        let (chunk, start) = frame.place();
        let describe = |plain: Descriptor| if partial.is_some() { plain.with_metadata() } else { plain };
        self.endpoint.send(chunk, start, frame.head().len(), describe)
    }

    /// Sends a copy, in as many chunks as it takes. There must be room in the ring.
    pub fn copy<'a>(
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

    /// Has the kernel send. Returns whether there is room that was not there before.
    fn kick(&mut self, stats: &mut Stats) -> io::Result<bool> {
        let mut waiting = self.endpoint.submit();
        let before = waiting;
        // Each call of the kernel's ends with the first frame that its device drops.
        let mut drops = 0;
        while waiting > 0 && self.endpoint.needs_wakeup() {
            match self.wakeup.transmit() {
                Err(error) if is_broken(error) => return Err(error.into()),
                Err(Errno::BUSY) if drops < before => {
                    drops += 1;
                    stats.port(self.id).undelivered += 1;
                    self.endpoint.complete();
                    waiting = self.endpoint.submit();
                    continue;
                }
                // The budget of one call is used up, or memory is: what is left says which. Down, for example, is a reason to leave
                // frames in the ring; they go with the next.
                Err(_) | Ok(()) => {}
            }
            self.endpoint.complete();
            let left = self.endpoint.submit();
            if left == waiting {
                break;
            }
            waiting = left;
        }
        Ok(waiting < before)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wakeup.as_fd()
    }
}

/// What became of a frame.
pub struct Parts {
    /// How many pieces of it were sent.
    pub sent: u64,
    /// How many were not.
    pub failed: u64,
    /// Why.
    pub reason: DropReason,
}

impl Parts {
    /// It was sent.
    pub const SENT: Parts = Parts { sent: 1, failed: 0, reason: DropReason::DeviceRefused };

    /// It was not sent, for that reason.
    pub fn failed(reason: DropReason) -> Parts {
        Parts { sent: 0, failed: 1, reason }
    }
}

/// What takes the kernel tens of milliseconds to close.
struct Closing {
    lead: Lead,
    fd: Option<Arc<OwnedFd>>,
    released: Arc<AtomicBool>,
}

impl Drop for Closing {
    fn drop(&mut self) {
        let shared = matches!(self.lead, Lead::Shared(..));
        drop(std::mem::replace(&mut self.lead, Lead::None));
        if shared {
            // The program stays for the other queues, and the device may write to chunks until the socket is closed, at which others
            // who share its memory may be looking. Chunks of one that cannot be closed are given up.
            let is_held = || self.fd.as_ref().is_some_and(|fd| Arc::strong_count(fd) > 1);
            let deadline = Instant::now() + Duration::from_millis(100);
            while is_held() {
                if Instant::now() > deadline {
                    return;
                }
                thread::sleep(Duration::from_millis(1));
            }
            drop(self.fd.take());
        }
        // Without program nothing is received any more, and what was given to be sent was copied: the kernel has no
        // further use for the chunks, even before the socket is closed.
        self.released.store(true, Ordering::Release);
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        let released = Arc::new(AtomicBool::new(false));
        self.endpoint.abandon(Arc::clone(&released));
        let lead = std::mem::replace(&mut self.lead, Lead::None);
        if let Lead::Shared(steering, queue) = &lead {
            // From here on the kernel gets what the socket got.
            steering.leave(*queue);
        }
        let closing = Closing { lead, fd: Some(self.wakeup.fd()), released };
        // The worker has other ports to serve. If there is no thread to be had, it is done here.
        let _ = thread::Builder::new().name("weft-close".into()).stack_size(64 << 10).spawn(move || drop(closing));
    }
}
