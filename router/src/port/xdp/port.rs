//! A pod's veth whose host end leads to an AF_XDP socket: the port for small packets.
//!
//! Frames are received into the worker's own chunks and sent from them. The pod's end has lost its segmentation to XDP, so nothing
//! longer than the MTU comes from it; superframes from elsewhere are cut on the way out. Checksums are handed on unfinished in both
//! directions where the kernel takes them so (Linux 6.8), and filled in otherwise.
//!
//! The kernel gives a queue to one memory only. So the pod's end is made with one transmit queue, and what it sends is received
//! by one worker, whose socket is on queue 0. The host end has a transmit queue for each worker, where the others have sockets that
//! only send.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use super::channel::{Channel, Parts, ROOM, XdpDevice};
use super::partial;
use crate::drop_reason::DropReason;
use crate::frame::Frame;
use crate::pool::Pool;
use crate::port::software::{self, Cut, HEADERS};
use crate::port::{Batch, Capabilities, Port, PortId, Queue, Received};
use crate::stats::Stats;

/// An [`XdpDevice`] as a pod's port. See the module's essay.
pub struct XdpPort {
    channel: Channel,
}

impl XdpPort {
    /// A port of that number.
    ///
    /// # Errors
    /// `InvalidInput` if the device was opened for another worker's pool, `OutOfMemory` if the pool is empty.
    pub fn new(device: XdpDevice, pool: &Pool, id: PortId) -> io::Result<XdpPort> {
        Ok(XdpPort { channel: Channel::new(device, pool, id)? })
    }

    #[cfg(test)]
    pub(super) fn over(channel: Channel) -> XdpPort {
        XdpPort { channel }
    }

    /// How many chunks the kernel has, to receive into and to send.
    pub fn lent(&self) -> (u32, u32) {
        self.channel.lent()
    }
}

impl Port for XdpPort {
    fn receive(&mut self, pool: &Pool, batch: &mut Batch, stats: &mut Stats) -> io::Result<Received> {
        self.channel.receive(pool, batch, stats, |frame| {
            frame.offload.partial = partial::recognise(frame.head());
            Ok(())
        })
    }

    fn transmit(&mut self, queue: &mut Queue, stats: &mut Stats) -> io::Result<()> {
        self.channel.transmit(queue, stats, put)
    }

    fn readable(&self) -> Option<BorrowedFd<'_>> {
        Some(self.channel.as_fd())
    }

    fn peek(&mut self) -> Option<bool> {
        Some(self.channel.is_waiting())
    }

    fn count(&mut self, stats: &mut Stats) {
        self.channel.count(stats);
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { partial_checksum: self.channel.abilities().checksum, ..Capabilities::default() }
    }

    fn kind(&self) -> &'static str {
        "xdp"
    }
}

/// Gives a frame to the ring. `None`: there is no room now.
fn put(channel: &mut Channel, frame: &mut Frame) -> Option<Parts> {
    if frame.offload.gso.is_some() {
        return put_segments(channel, frame);
    }
    if !channel.abilities().checksum
        && let Err(reason) = software::fill_checksum(frame, 0)
    {
        return Some(Parts::failed(reason));
    }
    let pieces = frame.len().div_ceil(ROOM);
    if pieces > channel.most_pieces() {
        return Some(Parts::failed(DropReason::DeviceRefused));
    }
    match channel.has_room(pieces) {
        Ok(true) => {}
        Ok(false) => return None,
        Err(reason) => return Some(Parts::failed(reason)),
    }
    let partial = frame.offload.partial;
    Some(channel.send(frame, partial).map_or_else(Parts::failed, |()| Parts::SENT))
}

/// Cuts a superframe.
fn put_segments(channel: &mut Channel, frame: &Frame) -> Option<Parts> {
    let cut = match Cut::new(frame, 0) {
        Ok(cut) => cut,
        Err(reason) => return Some(Parts::failed(reason)),
    };
    match channel.has_room((0..cut.count()).map(|index| cut.len(index).div_ceil(ROOM)).sum()) {
        Ok(true) => {}
        Ok(false) => return None,
        Err(reason) => return Some(Parts::failed(reason)),
    }
    let mut parts = Parts { sent: 0, failed: 0, reason: DropReason::NoBuffer };
    let mut headers = [0; HEADERS];
    for index in 0..cut.count() {
        let header = cut.write(index, &mut headers);
        let slices = std::iter::once(&headers[..header]).chain(cut.payload(index));
        match channel.copy(slices, cut.len(index), None) {
            Ok(()) => parts.sent += 1,
            Err(reason) => (parts.failed, parts.reason) = (parts.failed + 1, reason),
        }
    }
    Some(parts)
}
