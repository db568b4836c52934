//! A pod's TAP: whole superframes in and out, by virtio's network header.
//!
//! [`Tap`] is the device, made by the daemon in its own namespace and moved into the pod's afterwards: a descriptor opened
//! *inside* the pod's namespace would keep that namespace alive after its deletion. [`TapPort`] is the
//! device as a port of the worker.
//!
//! One read takes one frame: its first bytes go to a chunk, the rest, if any, to a super buffer that the port keeps
//! at hand and gives away only if it was needed. One write sends one frame. What the kernel said about a frame comes from
//! the pod, and is checked by [`virtio::parse`].

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use arrayvec::ArrayVec;
use rustix::io::{Errno, readv, writev};
use weft_encap::virtio;

use crate::drop_reason::DropReason;
use crate::frame::{Body, Frame};
use crate::pool::{CHUNK, Pool};
use crate::port::software::{self, Cut, HEADERS};
use crate::port::sys::arena::Super;
use crate::port::sys::tun;
use crate::port::{BATCH, BATCH_BYTES, Batch, Capabilities, Port, PortId, Queue, Received, is_broken};
use crate::stats::Stats;

/// A TAP with offloads negotiated. See the module's essay.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    name: String,
    capabilities: Capabilities,
}

impl Tap {
    /// Makes a TAP in the current namespace. A `%d` in the name is replaced by the kernel with a free number. It is
    /// down and has no address; it goes when it is dropped.
    ///
    /// # Errors
    /// The kernel's: `EPERM` without CAP_NET_ADMIN, `EBUSY` if the name is taken, `EINVAL` if it is none.
    pub fn create(name: &str) -> io::Result<Tap> {
        Tap::from_fd(tun::create(name)?)
    }

    /// Takes over the descriptor of a TAP with virtio headers, and makes it non-blocking.
    ///
    /// # Errors
    /// `InvalidInput` if it is something else; the kernel's, `EBADFD` if its device is gone.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Tap> {
        let name = tun::name(&fd)?;
        rustix::io::ioctl_fionbio(&fd, true)?;
        tun::set_virtio_header(&fd, virtio::LEN)?;
        let capabilities = negotiate(&fd);
        Ok(Tap { fd, name, capabilities })
    }

    /// The interface's name at the time it was made or taken over.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which superframes the pod's stack hands over, and takes.
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Asks for all offloads, then for fewer: the kernel refuses a set with a bit that it does not know.
fn negotiate(fd: &OwnedFd) -> Capabilities {
    let tcp = tun::CSUM | tun::TSO4 | tun::TSO6;
    let accepted =
        [tcp | tun::USO4 | tun::USO6, tcp, tun::CSUM].into_iter().find(|bits| tun::set_offload(fd, *bits).is_ok());
    let bits = accepted.unwrap_or(0);
    Capabilities {
        partial_checksum: bits & tun::CSUM != 0,
        tcp4: bits & tun::TSO4 != 0,
        tcp6: bits & tun::TSO6 != 0,
        udp: bits & tun::USO4 != 0,
    }
}

/// A [`Tap`] as a port.
pub struct TapPort {
    tap: Tap,
    id: PortId,
    spare: Option<Super>,
}

impl TapPort {
    /// A port of that number.
    pub fn new(tap: Tap, id: PortId) -> TapPort {
        TapPort { tap, id, spare: None }
    }

    /// Reads one frame, or learns why it could not be taken.
    fn read(&mut self, pool: &Pool) -> Result<Result<Frame, DropReason>, Errno> {
        let Some((mut chunk, start)) = pool.chunk() else { return self.discard() };
        self.spare = self.spare.take().or_else(|| pool.large());
        let spill = self.spare.as_mut().map_or(&mut [][..], |spare| {
            spare.bytes_mut().expect("the port gives the spare away before anyone can share it")
        });
        let spill_len = spill.len();
        let room = CHUNK - start + spill_len;
        let first = start - virtio::LEN;
        let read = readv(&self.tap.fd, &mut [IoSliceMut::new(&mut chunk[first..]), IoSliceMut::new(spill)])?;
        let Some(len) = read.checked_sub(virtio::LEN) else { return Ok(Err(DropReason::TooShort)) };
        if len >= room {
            // The kernel cuts a frame without a word; one that fills the buffers exactly may be one of those.
            return Ok(Err(if spill_len == 0 { DropReason::NoBuffer } else { DropReason::Truncated }));
        }
        let header = chunk[first..start].first_chunk().expect("a virtio header lies before the frame");
        let Ok(offload) = virtio::parse(header, len) else { return Ok(Err(DropReason::BadOffload)) };
        let head = len.min(CHUNK - start);
        let mut frame = Frame::new(chunk, start, head, self.id);
        if let Some(spare) = self.spare.take_if(|_| len > head) {
            frame = frame.with_body(Body::one(spare, 0, len - head), 0);
        }
        frame.offload = offload;
        Ok(Ok(frame))
    }

    /// Takes a frame for which there is no buffer, or the device would stay readable forever.
    fn discard(&self) -> Result<Result<Frame, DropReason>, Errno> {
        let mut scratch = [0; 64];
        rustix::io::read(&self.tap.fd, &mut scratch)?;
        Ok(Err(DropReason::NoBuffer))
    }

    /// Sends a frame in one write.
    fn write_whole(&self, frame: &mut Frame) -> Result<(), Errno> {
        let offload = frame.offload;
        let header = frame.head_with_room(virtio::LEN).ok_or(Errno::MSGSIZE)?;
        virtio::write(&offload, header.first_chunk_mut().expect("the room is as long as the header"));
        let head = frame.room_and_head(virtio::LEN).expect("there was room above");
        let mut slices = ArrayVec::<IoSlice<'_>, SLICES>::new();
        slices.push(IoSlice::new(head));
        for piece in frame.body().into_iter().flat_map(Body::pieces) {
            slices.try_push(IoSlice::new(piece)).map_err(|_| Errno::MSGSIZE)?;
        }
        write(&self.tap.fd, &slices)
    }

    /// Sends a superframe as segments, for a device that does not take it whole.
    fn write_segments(&self, frame: &Frame) -> Result<Parts, Errno> {
        let cut = match Cut::new(frame, 0) {
            Ok(cut) => cut,
            Err(reason) => return Ok(Parts { sent: 0, failed: 1, reason }),
        };
        let mut parts = Parts { sent: 0, failed: 0, reason: DropReason::DeviceRefused };
        // A virtio header of zeros: nothing is left to be done.
        let mut header = [0; virtio::LEN + HEADERS];
        for index in 0..cut.count() {
            let len = virtio::LEN + cut.write(index, &mut header[virtio::LEN..]);
            let mut slices = ArrayVec::<IoSlice<'_>, SLICES>::new();
            slices.push(IoSlice::new(&header[..len]));
            let fits = cut.payload(index).all(|piece| slices.try_push(IoSlice::new(piece)).is_ok());
            match if fits { write(&self.tap.fd, &slices) } else { Err(Errno::MSGSIZE) } {
                Ok(()) => parts.sent += 1,
                Err(error) if is_broken(error) || (error == Errno::AGAIN && index == 0) => return Err(error),
                Err(error) => {
                    parts.failed += 1;
                    parts.reason = refusal(error);
                }
            }
        }
        Ok(parts)
    }

    /// Sends one frame in whatever way the device takes it.
    fn write_frame(&self, frame: &mut Frame) -> Result<Parts, Errno> {
        if !self.tap.capabilities.take(&frame.offload) {
            if frame.offload.gso.is_some() {
                return self.write_segments(frame);
            }
            if let Err(reason) = software::fill_checksum(frame, 0) {
                return Ok(Parts { sent: 0, failed: 1, reason });
            }
        }
        match self.write_whole(frame) {
            Ok(()) => Ok(Parts { sent: 1, failed: 0, reason: DropReason::DeviceRefused }),
            Err(error) if is_broken(error) || error == Errno::AGAIN => Err(error),
            Err(error) => Ok(Parts { sent: 0, failed: 1, reason: refusal(error) }),
        }
    }
}

/// Slices of one write: the head and the pieces of a body.
const SLICES: usize = 132;

/// What became of the segments of a frame.
struct Parts {
    sent: u64,
    failed: u64,
    reason: DropReason,
}

impl Port for TapPort {
    fn receive(&mut self, pool: &Pool, batch: &mut Batch, stats: &mut Stats) -> io::Result<Received> {
        let mut bytes = 0;
        // Frames that could not be taken count against the batch as well, so that they cannot keep us here.
        for _ in 0..BATCH {
            if batch.is_full() || bytes >= BATCH_BYTES {
                break;
            }
            match self.read(pool) {
                Ok(Ok(frame)) => {
                    bytes += frame.len();
                    stats.received(&frame);
                    batch.push(frame);
                }
                Ok(Err(reason)) => stats.lost(self.id, reason),
                Err(Errno::INTR) => {}
                Err(error) if is_broken(error) => return Err(error.into()),
                // EIO is a link that is down, which is the pod's own doing.
                Err(_) => return Ok(Received::Drained),
            }
        }
        Ok(Received::More)
    }

    fn transmit(&mut self, queue: &mut Queue, stats: &mut Stats) -> io::Result<()> {
        while let Some(frame) = queue.front_mut() {
            let parts = match self.write_frame(frame) {
                Ok(parts) => parts,
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            let frame = queue.pop_front().expect("it was at the front");
            stats.sent_in_part(frame, self.id, parts.sent, parts.failed, parts.reason);
        }
        Ok(())
    }

    fn readable(&self) -> Option<BorrowedFd<'_>> {
        Some(self.tap.fd.as_fd())
    }

    fn capabilities(&self) -> Capabilities {
        self.tap.capabilities
    }

    fn kind(&self) -> &'static str {
        "tap"
    }
}

fn write(fd: &OwnedFd, slices: &[IoSlice<'_>]) -> Result<(), Errno> {
    loop {
        match writev(fd, slices) {
            Err(Errno::INTR) => {}
            result => return result.map(drop),
        }
    }
}

/// Why one frame was refused. The other reasons a TAP gives follow from what the frame's own headers say.
fn refusal(error: Errno) -> DropReason {
    match error {
        Errno::IO => DropReason::PortDown,
        Errno::AGAIN => DropReason::QueueFull,
        _ => DropReason::DeviceRefused,
    }
}
