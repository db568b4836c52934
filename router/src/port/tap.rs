//! A pod's TAP: whole superframes in and out, by virtio's network header.
//!
//! [`Tap`] is the device, made by the daemon in the pod's namespace, which its descriptor then keeps alive, or in the daemon's own and moved
//! afterwards. [`TapPort`] is the
//! device as a port of a worker. Each worker has one and may write by it; one of them reads, since two readers would reorder
//! a flow. The device is closed by whoever lets go of it last.
//!
//! One read takes one frame: its first bytes go to a chunk, the rest, if any, to a super buffer that the port keeps
//! at hand and gives away only if it was needed. One write sends one frame. What the kernel said about a frame comes from
//! the pod, and is checked by [`virtio::parse`].

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use arrayvec::ArrayVec;
use rustix::io::{Errno, readv, writev};
use weft_encap::virtio;

use crate::drop_reason::DropReason;
use crate::frame::{Body, Frame};
use crate::pool::{CHUNK, Pool};
use crate::port::software::{self, Cut, HEADERS};
use crate::port::sys::arena::Super;
use crate::port::sys::tun;
use crate::port::{BATCH, Batch, Capabilities, Port, PortId, Queue, Received, is_broken};
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
    tap: Arc<Tap>,
    id: PortId,
    receives: bool,
    spare: Option<Super>,
}

impl TapPort {
    /// A port of that number. It sends; whether it also receives is up to the caller, who sees to it that one port of a
    /// device does.
    pub fn new(tap: Arc<Tap>, id: PortId, receives: bool) -> TapPort {
        TapPort { tap, id, receives, spare: None }
    }

    /// Receives one batch.
    fn drain(&mut self, pool: &Pool, batch: &mut Batch, stats: &mut Stats) -> io::Result<Received> {
        let mut bytes = 0;
        // Frames that could not be taken count against the batch as well, so that they cannot keep us here.
        for _ in 0..BATCH {
            if batch.is_full() || bytes >= batch.most_bytes() {
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
        if !self.receives {
            return Ok(Received::Drained);
        }
        let received = self.drain(pool, batch, stats);
        // An idle port keeps no buffer from the others.
        self.spare = None;
        received
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
        self.receives.then(|| self.tap.as_fd())
    }

    fn receive_too(&mut self) {
        self.receives = true;
    }

    fn capabilities(&self) -> Capabilities {
        self.tap.capabilities
    }

    fn retire(self: Box<Self>) -> Option<OwnedFd> {
        // Closing it takes the device away, for which the kernel waits until no CPU looks at it any more.
        Arc::into_inner(self.tap).map(|tap| tap.fd)
    }

    fn gathers(&self) -> bool {
        true
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::pool::Pool;
    use crate::port::memory::Packet;
    use crate::port::{BATCH_BYTES, sample};
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair, sockopt};

    pub(crate) const ALL: Capabilities = Capabilities { partial_checksum: true, tcp4: true, tcp6: true, udp: true };

    /// A socket that keeps message boundaries, as a TAP does, and its other end.
    pub(crate) fn tap(capabilities: Capabilities) -> (Tap, OwnedFd) {
        let (fd, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap();
        for fd in [&fd, &other] {
            sockopt::set_socket_send_buffer_size(fd, 1 << 20).unwrap();
        }
        (Tap { fd, name: "stand-in".to_owned(), capabilities }, other)
    }

    fn stand_in(capabilities: Capabilities) -> (TapPort, OwnedFd) {
        let (tap, other) = tap(capabilities);
        (TapPort::new(Arc::new(tap), PortId(1), true), other)
    }

    pub(crate) fn give(other: &OwnedFd, packet: &Packet) {
        let mut header = [0; virtio::LEN];
        virtio::write(&packet.offload, &mut header);
        rustix::io::write(other, &[&header[..], &packet.bytes].concat()).unwrap();
    }

    pub(crate) fn take(other: &OwnedFd) -> Packet {
        let mut bytes = vec![0; 70_000];
        let len = rustix::io::read(other, &mut bytes).unwrap();
        let offload = virtio::parse(bytes.first_chunk().unwrap(), len - virtio::LEN).unwrap();
        Packet { bytes: bytes[virtio::LEN..len].to_vec(), offload, outer: None }
    }

    fn is_empty(other: &OwnedFd) -> bool {
        rustix::io::read(other, &mut [0; 1]) == Err(Errno::AGAIN)
    }

    #[test]
    fn a_superframe_passes_whole_and_a_small_frame_keeps_the_large_buffer_free() {
        let pool = Pool::new(8, 8).unwrap();
        let (mut port, other) = stand_in(ALL);
        let packets = [sample::tcp4(60_000, 1448).0, sample::udp4(10, 0).0, sample::tcp6(1_700, 1428).0];
        packets.iter().for_each(|packet| give(&other, packet));
        let (mut batch, mut stats) = (Batch::new(), Stats::default());
        assert_eq!(port.receive(&pool, &mut batch, &mut stats).unwrap(), Received::Drained);
        assert_eq!(batch.len(), 3);
        for (frame, packet) in batch.iter().zip(&packets) {
            assert_eq!((&frame.to_vec(), frame.offload), (&packet.bytes, packet.offload));
        }
        let mut queue: Queue = batch.drain(..).collect();
        port.transmit(&mut queue, &mut stats).unwrap();
        packets.iter().for_each(|packet| assert_eq!(take(&other), *packet));
        let counted = stats.of(PortId(1));
        assert_eq!((counted.received, counted.sent, counted.out, counted.in_flight()), (3, 3, 3, 0));
        drop(port);
        assert_eq!(pool.free(), (8, 8));
    }

    #[test]
    fn of_two_ports_of_a_device_one_receives_and_both_send() {
        let pool = Pool::new(8, 8).unwrap();
        let (mut first, other) = stand_in(ALL);
        let mut second = TapPort::new(Arc::clone(&first.tap), PortId(1), false);
        let (packet, mut stats) = (sample::udp4(10, 0).0, Stats::default());
        assert!(first.readable().is_some() && second.readable().is_none());
        give(&other, &packet);
        let mut batch = Batch::new();
        assert_eq!(second.receive(&pool, &mut batch, &mut stats).unwrap(), Received::Drained);
        assert!(batch.is_empty());
        first.receive(&pool, &mut batch, &mut stats).unwrap();
        second.transmit(&mut batch.drain(..).collect(), &mut stats).unwrap();
        assert_eq!(take(&other), packet);
        assert!(Box::new(first).retire().is_none(), "the device is still in use");
        second.receive_too();
        give(&other, &packet);
        second.receive(&pool, &mut batch, &mut stats).unwrap();
        assert_eq!(batch.len(), 1);
        assert!(Box::new(second).retire().is_some());
    }

    #[test]
    fn a_device_without_offloads_gets_segments() {
        let pool = Pool::new(8, 8).unwrap();
        let (mut port, other) = stand_in(Capabilities { partial_checksum: true, ..Capabilities::default() });
        let (packet, payload) = sample::tcp4(10_000, 1448);
        let mut frame = Frame::from_bytes(&packet.bytes, PortId(1), &pool).unwrap();
        frame.offload = packet.offload;
        let mut stats = Stats::default();
        stats.received(&frame);
        port.transmit(&mut Queue::from([frame]), &mut stats).unwrap();
        let segments: Vec<Packet> = (0..7).map(|_| take(&other)).collect();
        assert!(is_empty(&other));
        assert!(segments.iter().all(|segment| segment.offload == Default::default()));
        let bytes: Vec<u8> = segments.iter().flat_map(|segment| sample::verified_payload(&segment.bytes)).collect();
        assert_eq!(bytes, payload);
        assert_eq!((stats.of(PortId(1)).sent, stats.of(PortId(1)).in_flight()), (7, 0));
    }

    #[test]
    fn what_cannot_be_taken_is_counted_by_name() {
        let (mut port, other) = stand_in(ALL);
        let mut bad = sample::udp4(10, 0).0;
        bad.offload.partial.as_mut().unwrap().start = 500;
        rustix::io::write(&other, &[0; 11]).unwrap();
        give(&other, &bad);
        give(&other, &Packet { bytes: vec![0; crate::pool::SUPER + CHUNK], ..Packet::default() });
        let (mut batch, mut stats) = (Batch::new(), Stats::default());
        let pool = Pool::new(1, 1).unwrap();
        port.receive(&pool, &mut batch, &mut stats).unwrap();
        // A lone chunk, and a super buffer that is somewhere else.
        give(&other, &sample::udp4(10_000, 0).0);
        let held = (port.spare.take(), pool.large());
        port.receive(&pool, &mut batch, &mut stats).unwrap();
        give(&other, &sample::udp4(10, 0).0);
        give(&other, &sample::udp4(20, 0).0);
        port.receive(&pool, &mut batch, &mut stats).unwrap();
        drop(held);
        let counted = stats.of(PortId(1));
        let of = |reason: DropReason| counted.dropped[reason as usize];
        assert_eq!((of(DropReason::TooShort), of(DropReason::BadOffload), of(DropReason::Truncated)), (1, 1, 1));
        assert_eq!((of(DropReason::NoBuffer), batch.len(), counted.received), (2, 1, 6));
        assert_eq!(counted.in_flight(), 1);
        assert!(is_empty(&other));
    }

    #[test]
    fn a_batch_ends_at_its_limits_and_the_device_is_asked_again() {
        let pool = Pool::new(128, 32).unwrap();
        let (mut port, other) = stand_in(ALL);
        let (mut batch, mut stats) = (Batch::new(), Stats::default());
        (0..BATCH).for_each(|_| give(&other, &sample::udp4(10, 0).0));
        assert_eq!(port.receive(&pool, &mut batch, &mut stats).unwrap(), Received::More);
        assert_eq!(batch.len(), BATCH);
        batch.clear();
        let full = BATCH_BYTES.div_ceil(60_000);
        (0..full + 1).for_each(|_| give(&other, &sample::tcp4(60_000, 1448).0));
        assert_eq!(port.receive(&pool, &mut batch, &mut stats).unwrap(), Received::More);
        assert_eq!(batch.len(), full);
        batch.clear();
        assert_eq!(port.receive(&pool, &mut batch, &mut stats).unwrap(), Received::Drained);
        assert_eq!(batch.len(), 1);
    }

    #[test]
    fn a_busy_device_leaves_frames_in_the_queue() {
        let pool = Pool::new(128, 64).unwrap();
        let (mut port, other) = stand_in(ALL);
        let (packet, mut stats) = (sample::tcp4(60_000, 1448).0, Stats::default());
        let mut queue = Queue::new();
        for _ in 0..64 {
            let mut frame = Frame::from_bytes(&packet.bytes, PortId(1), &pool).unwrap();
            frame.offload = packet.offload;
            stats.received(&frame);
            queue.push_back(frame);
        }
        port.transmit(&mut queue, &mut stats).unwrap();
        let waiting = queue.len();
        assert!((1..64).contains(&waiting), "{waiting}");
        assert_eq!(stats.of(PortId(1)).in_flight(), waiting as i64);
        take(&other);
        port.transmit(&mut queue, &mut stats).unwrap();
        assert!(queue.len() < waiting);
        assert_eq!(stats.of(PortId(1)).in_flight(), queue.len() as i64);
    }
}
