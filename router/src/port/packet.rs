//! An uplink: frames leave by one of the node's own interfaces, beside the kernel, which keeps it.
//!
//! [`Outlet`] is a packet socket of protocol 0 on the interface, and [`PacketPort`] is that socket as a port of a worker; all workers share it.
//! It only sends: what comes in by that interface is the kernel's. A frame carries virtio's header, so that superframes and
//! checksums that are still partial are handed on, and the kernel does for the interface what that cannot do itself. A superframe that the kernel
//! refuses as such is cut here.
//!
//! Frames take the interface's queueing discipline, as the kernel's own do, but no netfilter hook but those of the device (`netdev` egress).

use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use arrayvec::ArrayVec;
use rustix::io::Errno;
use weft_encap::virtio;

use crate::drop_reason::DropReason;
use crate::frame::{Body, Frame};
use crate::pool::Pool;
use crate::port::software::{self, Cut, HEADERS};
use crate::port::sys::packet::{self, FRAMES};
use crate::port::{Batch, Capabilities, Port, PortId, Queue, Received, is_broken};
use crate::stats::Stats;

/// An interface of the node's, to be sent by. See the module's essay.
#[derive(Debug)]
pub struct Outlet {
    fd: OwnedFd,
    header: usize,
    capabilities: Capabilities,
}

impl Outlet {
    /// Opens the interface of this number in the calling thread's network namespace. Nothing on it changes.
    ///
    /// # Errors
    /// The kernel's: `EPERM` without CAP_NET_RAW, `ENODEV` if there is no such interface.
    pub fn open(interface: u32) -> io::Result<Outlet> {
        let (fd, header) = packet::open(interface)?;
        let udp = header == virtio::LEN;
        Ok(Outlet { fd, header, capabilities: Capabilities { partial_checksum: true, tcp4: true, tcp6: true, udp } })
    }

    /// How much of virtio's header stands before each frame.
    pub(in crate::port) fn header(&self) -> usize {
        self.header
    }

    /// Sends frames from the front of `frames`; how many were sent.
    pub(in crate::port) fn send(&self, frames: &[Range<usize>], slices: &[IoSlice<'_>]) -> Result<usize, Errno> {
        loop {
            match packet::send(&self.fd, frames, slices) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO)),
            }
        }
    }
}

/// An [`Outlet`] as a port.
pub struct PacketPort {
    outlet: Arc<Outlet>,
    id: PortId,
}

/// Slices of one call: heads and pieces of bodies.
const SLICES: usize = 512;

impl PacketPort {
    /// A port of that number.
    pub fn new(outlet: Arc<Outlet>, id: PortId) -> PacketPort {
        PacketPort { outlet, id }
    }

    /// Makes a frame one that can be sent as it is, with virtio's header in the room before it.
    fn prepare(&self, frame: &mut Frame) -> Result<(), DropReason> {
        if frame.offload.gso.is_none() && !self.outlet.capabilities.partial_checksum {
            software::fill_checksum(frame, 0)?;
        }
        let offload = frame.offload;
        let mut header = [0; virtio::LEN];
        virtio::write(&offload, &mut header);
        let room = frame.head_with_room(self.outlet.header).ok_or(DropReason::DeviceRefused)?;
        room[..self.outlet.header].copy_from_slice(&header[..self.outlet.header]);
        Ok(())
    }

    /// Sends what can be sent whole from the front of the queue, in one call. Returns how many frames that were.
    fn send_whole(&self, queue: &mut Queue) -> Result<usize, Errno> {
        let whole = |frame: &Frame| self.outlet.capabilities.take(&frame.offload);
        let mut count = 0;
        for frame in queue.iter_mut().take(FRAMES) {
            if !whole(frame) || self.prepare(frame).is_err() {
                break;
            }
            count += 1;
        }
        let mut slices = ArrayVec::<IoSlice<'_>, SLICES>::new();
        let mut frames = ArrayVec::<Range<usize>, FRAMES>::new();
        for frame in queue.iter().take(count) {
            let first = slices.len();
            if !self.append(frame, &mut slices) {
                slices.truncate(first);
                break;
            }
            frames.push(first..slices.len());
        }
        if frames.is_empty() { Err(Errno::INVAL) } else { self.outlet.send(&frames, &slices) }
    }

    /// Appends a frame's bytes; `false` if there is no room for them.
    fn append<'a>(&self, frame: &'a Frame, slices: &mut ArrayVec<IoSlice<'a>, SLICES>) -> bool {
        let head = frame.room_and_head(self.outlet.header).expect("the header was written there");
        let pieces = frame.body().into_iter().flat_map(Body::pieces);
        [head].into_iter().chain(pieces).all(|piece| slices.try_push(IoSlice::new(piece)).is_ok())
    }

    /// Sends a frame that cannot go as it is: as segments, if it is a superframe.
    fn send_segments(&self, frame: &Frame) -> Result<Parts, Errno> {
        let mut parts = Parts { sent: 0, failed: 0, reason: DropReason::DeviceRefused };
        let cut = match Cut::new(frame, 0) {
            Ok(cut) => cut,
            Err(reason) => return Ok(Parts { failed: 1, reason, ..parts }),
        };
        // A virtio header of zeros: nothing is left to be done.
        let (mut bytes, before) = ([0; virtio::LEN + HEADERS], self.outlet.header);
        for index in 0..cut.count() {
            let len = before + cut.write(index, &mut bytes[before..]);
            let mut slices = ArrayVec::<IoSlice<'_>, SLICES>::new();
            slices.push(IoSlice::new(&bytes[..len]));
            let fits = cut.payload(index).all(|piece| slices.try_push(IoSlice::new(piece)).is_ok());
            let whole = 0..slices.len();
            match if fits { self.outlet.send(std::slice::from_ref(&whole), &slices) } else { Err(Errno::MSGSIZE) } {
                Ok(_) => parts.sent += 1,
                Err(error) if is_broken(error) || (error == Errno::AGAIN && index == 0) => return Err(error),
                Err(error) => {
                    parts.failed += 1;
                    parts.reason = refusal(error);
                }
            }
        }
        Ok(parts)
    }

    /// The frame at the front was refused with this error: sends it in another way, if there is one.
    fn send_otherwise(&self, queue: &mut Queue, error: Errno, stats: &mut Stats) -> Result<(), Errno> {
        let Some(frame) = queue.front() else { return Ok(()) };
        // What a pod says of its superframe may be what the kernel does not like; segments are made of what was checked.
        let is_cut = frame.offload.gso.is_some() && matches!(error, Errno::INVAL | Errno::OPNOTSUPP | Errno::MSGSIZE);
        let parts = match is_cut {
            true => self.send_segments(frame)?,
            false => Parts { sent: 0, failed: 1, reason: refusal(error) },
        };
        let frame = queue.pop_front().expect("it was at the front");
        stats.sent_in_part(frame, self.id, parts.sent, parts.failed, parts.reason);
        Ok(())
    }
}

/// What became of the segments of a frame.
struct Parts {
    sent: u64,
    failed: u64,
    reason: DropReason,
}

impl Port for PacketPort {
    fn receive(&mut self, _pool: &Pool, _batch: &mut Batch, _stats: &mut Stats) -> io::Result<Received> {
        Ok(Received::Drained)
    }

    fn transmit(&mut self, queue: &mut Queue, stats: &mut Stats) -> io::Result<()> {
        while !queue.is_empty() {
            let sent = match self.send_whole(queue) {
                Ok(sent) => sent,
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) if is_broken(error) => return Err(error.into()),
                Err(error) => match self.send_otherwise(queue, error, stats) {
                    Ok(()) => 0,
                    Err(Errno::AGAIN) => return Ok(()),
                    Err(error) => return Err(error.into()),
                },
            };
            for frame in queue.drain(..sent) {
                stats.sent(frame, self.id, 1);
            }
        }
        Ok(())
    }

    fn readable(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn capabilities(&self) -> Capabilities {
        self.outlet.capabilities
    }

    fn kind(&self) -> &'static str {
        "packet"
    }
}

/// Why one frame was refused.
fn refusal(error: Errno) -> DropReason {
    match error {
        Errno::NETDOWN => DropReason::PortDown,
        Errno::NOBUFS | Errno::AGAIN => DropReason::QueueFull,
        _ => DropReason::DeviceRefused,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::sample;
    use crate::port::tap::tests::ALL;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair, sockopt};

    /// A socket that keeps message boundaries, as one on an interface does, and its other end.
    fn stand_in(header: usize, capabilities: Capabilities) -> (PacketPort, OwnedFd) {
        let (fd, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap();
        for fd in [&fd, &other] {
            sockopt::set_socket_send_buffer_size(fd, 1 << 20).unwrap();
        }
        (PacketPort::new(Arc::new(Outlet { fd, header, capabilities }), PortId(1)), other)
    }

    /// What arrived: header and frame.
    fn take(other: &OwnedFd, header: usize) -> Option<([u8; virtio::LEN], Vec<u8>)> {
        let (mut bytes, mut first) = (vec![0; 70_000], [0; virtio::LEN]);
        let len = rustix::io::read(other, &mut bytes).ok()?;
        first[..header].copy_from_slice(&bytes[..header]);
        Some((first, bytes[header..len].to_vec()))
    }

    fn queue(packets: &[crate::port::memory::Packet], pool: &Pool, stats: &mut Stats) -> Queue {
        let frame = |packet: &crate::port::memory::Packet| {
            let mut frame = Frame::from_bytes(&packet.bytes, PortId(2), pool).unwrap();
            frame.offload = packet.offload;
            stats.received(&frame);
            frame
        };
        packets.iter().map(frame).collect()
    }

    #[test]
    fn superframes_and_partial_checksums_are_handed_on_with_either_header() {
        let pool = Pool::new(8, 8).unwrap();
        for header in [virtio::LEN, 10] {
            let (mut port, other) = stand_in(header, ALL);
            let packets = [sample::tcp4(60_000, 1448).0, sample::udp4(10, 0).0, sample::tcp6(1_700, 1428).0];
            let mut stats = Stats::default();
            port.transmit(&mut queue(&packets, &pool, &mut stats), &mut stats).unwrap();
            for packet in &packets {
                let (first, bytes) = take(&other, header).unwrap();
                assert_eq!(bytes, packet.bytes);
                assert_eq!(virtio::parse(&first, bytes.len()).unwrap(), packet.offload);
            }
            assert!(take(&other, header).is_none());
            let (from, by) = (stats.of(PortId(2)), stats.of(PortId(1)));
            assert_eq!((from.received, from.sent, from.in_flight(), by.out), (3, 3, 0, 3));
        }
        assert_eq!(pool.free(), (8, 8));
    }

    #[test]
    fn what_an_interface_cannot_take_whole_is_cut_here_in_its_order() {
        let pool = Pool::new(8, 8).unwrap();
        let (mut port, other) = stand_in(10, Capabilities { udp: false, ..ALL });
        let ((large, payload), small) = (sample::udp4(4_000, 1_000), sample::udp4(10, 0).0);
        let mut stats = Stats::default();
        port.transmit(&mut queue(&[small.clone(), large, small.clone()], &pool, &mut stats), &mut stats).unwrap();
        assert_eq!(take(&other, 10).unwrap().1, small.bytes);
        let mut seen = Vec::new();
        for _ in 0..4 {
            let (first, bytes) = take(&other, 10).unwrap();
            assert_eq!(first, [0; virtio::LEN]);
            seen.extend(sample::verified_payload(&bytes));
        }
        assert_eq!(seen, payload);
        assert_eq!(take(&other, 10).unwrap().1, small.bytes);
        let from = stats.of(PortId(2));
        assert_eq!((from.received, from.splits, from.sent, from.in_flight()), (3, 3, 6, 0));
    }

    #[test]
    fn a_busy_interface_leaves_frames_in_the_queue() {
        let pool = Pool::new(128, 64).unwrap();
        let (mut port, other) = stand_in(virtio::LEN, ALL);
        let (packets, mut stats) = (vec![sample::tcp4(60_000, 1448).0; 64], Stats::default());
        let mut queue = queue(&packets, &pool, &mut stats);
        port.transmit(&mut queue, &mut stats).unwrap();
        let waiting = queue.len();
        assert!((1..64).contains(&waiting), "{waiting}");
        assert_eq!(stats.of(PortId(2)).in_flight(), waiting as i64);
        take(&other, virtio::LEN).unwrap();
        port.transmit(&mut queue, &mut stats).unwrap();
        assert!(queue.len() < waiting);
    }
}
