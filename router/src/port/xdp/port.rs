//! A veth whose host end leads to an AF_XDP socket: the port for small packets.
//!
//! [`XdpDevice`] is socket and program, opened by whoever attaches the pod; [`XdpPort`] is the device as a port of the worker whose
//! chunks it shares. Frames are received into the worker's own chunks and sent from them. The pod's end has lost its
//! segmentation to XDP, so nothing longer than the MTU comes from it; superframes from elsewhere are cut on the way out. Checksums
//! are handed on unfinished in both directions where the kernel takes them so (Linux 6.8), and filled in otherwise.
//!
//! One queue, so one worker: the kernel gives a queue to one memory only. The pair has to be made with one queue.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::io::Errno;
use weft_encap::offload::Offload;

use super::endpoint::Endpoint;
use super::programs::{self, Tunnel};
use super::{Verdict, partial};
use crate::drop_reason::DropReason;
use crate::frame::Frame;
use crate::pool::{CHUNK, Pool};
use crate::port::software::{self, Cut};
use crate::port::sys::arena::Chunk;
use crate::port::sys::bpf::{BpfError, Instruction, Link, Map, MapKind, Mode, Program};
#[cfg(test)]
use crate::port::sys::xsk::Rings;
use crate::port::sys::xsk::{Binding, METADATA_LEN, Socket, Umem, Wakeup, checksum_metadata};
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
/// The longest frame that AF_XDP receives into a chunk, behind XDP's own headroom of 256 bytes.
pub const LONGEST: usize = CHUNK - 256;

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
    attachment: Attachment,
    socket: Socket,
}

impl XdpDevice {
    /// A socket, and what leads frames to it.
    pub fn new(attachment: Attachment, socket: Socket) -> XdpDevice {
        XdpDevice { attachment, socket }
    }

    /// Opens the host end of a pod's veth, by its number in the calling thread's namespace. Takes the kernel milliseconds.
    ///
    /// # Errors
    /// Those of [`Socket::open`] and of [`Attachment::pod`], which say what to do.
    pub fn open(interface: u32, umem: &Umem) -> io::Result<XdpDevice> {
        let socket = Socket::open(umem, Binding { interface, queue: 0, ring: RING, zero_copy: false })?;
        let attachment = Attachment::pod(interface, &socket, Mode::Native).map_err(io::Error::other)?;
        Ok(XdpDevice { attachment, socket })
    }
}

/// An [`XdpDevice`] as a port.
pub struct XdpPort {
    id: PortId,
    endpoint: Endpoint,
    attachment: Option<Attachment>,
    wakeup: Wakeup,
    metadata: bool,
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
        let metadata = socket.takes_metadata();
        let (wakeup, rings) = socket.into_parts();
        let endpoint = Endpoint::new(rings, pool.arena());
        Ok(XdpPort { id, endpoint, attachment: Some(attachment), wakeup, metadata, calls: 0 })
    }

    /// A port over any rings and any socket.
    #[cfg(test)]
    pub(super) fn over(rings: Rings, fd: OwnedFd, metadata: bool, pool: &Pool, id: PortId) -> XdpPort {
        let endpoint = Endpoint::new(rings, pool.arena());
        XdpPort { id, endpoint, attachment: None, wakeup: Wakeup::of(fd), metadata, calls: 0 }
    }

    /// How many chunks the kernel has, to receive into and to send.
    pub fn lent(&self) -> (u32, u32) {
        self.endpoint.lent()
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
        if self.endpoint.room(1) == 0 {
            return None;
        }
        if !self.metadata
            && let Err(reason) = software::fill_checksum(frame, 0)
        {
            return Some(Parts::failed(reason));
        }
        if self.lend(frame) {
            return Some(Parts::SENT);
        }
        let copied = self.copy(frame.slices(0..frame.len()), frame.len(), &frame.offload);
        Some(copied.map_or_else(Parts::failed, |()| Parts::SENT))
    }

    /// Sends a frame from where it lies, if it can be.
    fn lend(&mut self, frame: &mut Frame) -> bool {
        if frame.body().is_some() {
            return false;
        }
        let Some(room) = frame.offload.partial.map_or(Some(false), |partial| {
            let metadata = checksum_metadata(partial.start, partial.offset);
            frame.head_with_room(METADATA_LEN)?[..METADATA_LEN].copy_from_slice(&metadata);
            Some(true)
        }) else {
            return false;
        };
        let (chunk, start) = frame.place();
        // With metadata the kernel wants room for it before every frame.
        (!self.metadata || start >= METADATA_LEN) && self.endpoint.send(chunk, start, frame.head().len(), room)
    }

    /// Sends a copy. There must be room in the ring.
    fn copy<'a>(
        &mut self,
        slices: impl Iterator<Item = &'a [u8]>,
        len: usize,
        offload: &Offload,
    ) -> Result<(), DropReason> {
        if START + len > CHUNK {
            return Err(DropReason::DeviceRefused);
        }
        let mut chunk = self.endpoint.chunk().ok_or(DropReason::NoBuffer)?;
        let mut at = START;
        for slice in slices {
            chunk[at..at + slice.len()].copy_from_slice(slice);
            at += slice.len();
        }
        if let Some(partial) = offload.partial {
            let metadata = checksum_metadata(partial.start, partial.offset);
            chunk[START - METADATA_LEN..START].copy_from_slice(&metadata);
        }
        self.send_own(&chunk, len, offload.partial.is_some())
    }

    fn send_own(&mut self, chunk: &Chunk, len: usize, metadata: bool) -> Result<(), DropReason> {
        if self.endpoint.send(chunk, START, len, metadata) { Ok(()) } else { Err(DropReason::QueueFull) }
    }

    /// Cuts a superframe.
    fn put_segments(&mut self, frame: &Frame) -> Option<Parts> {
        let cut = match Cut::new(frame, 0) {
            Ok(cut) => cut,
            Err(reason) => return Some(Parts::failed(reason)),
        };
        let count = cut.count() as u32;
        if count > RING {
            return Some(Parts::failed(DropReason::Unsegmentable));
        }
        if self.endpoint.room(count) < count {
            return None;
        }
        let mut parts = Parts { sent: 0, failed: 0, reason: DropReason::NoBuffer };
        for index in 0..cut.count() {
            match self.put_segment(&cut, index) {
                Ok(()) => parts.sent += 1,
                Err(reason) => (parts.failed, parts.reason) = (parts.failed + 1, reason),
            }
        }
        Some(parts)
    }

    fn put_segment(&mut self, cut: &Cut<'_>, index: usize) -> Result<(), DropReason> {
        let len = cut.len(index);
        if START + len > CHUNK {
            return Err(DropReason::DeviceRefused);
        }
        let mut chunk = self.endpoint.chunk().ok_or(DropReason::NoBuffer)?;
        let mut at = START + cut.write(index, &mut chunk[START..]);
        for slice in cut.payload(index) {
            chunk[at..at + slice.len()].copy_from_slice(slice);
            at += slice.len();
        }
        self.send_own(&chunk, len, false)
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
    fn receive(&mut self, _pool: &Pool, batch: &mut Batch, stats: &mut Stats) -> io::Result<Received> {
        let mut count = 0;
        // What is not believed counts against the batch as well, so that it cannot keep us here.
        while !batch.is_full() && count < BATCH {
            let Some(received) = self.endpoint.receive() else { break };
            count += 1;
            let Ok((chunk, start, len)) = received else {
                stats.lost(self.id, DropReason::BadDescriptor);
                continue;
            };
            let mut frame = Frame::new(chunk, start, len, self.id);
            frame.offload.partial = partial::recognise(frame.head());
            stats.received(&frame);
            batch.push(frame);
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
        Capabilities { partial_checksum: self.metadata, ..Capabilities::default() }
    }

    fn kind(&self) -> &'static str {
        "xdp"
    }
}
