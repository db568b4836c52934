//! The underlay by AF_XDP: tunnel packets to and from an uplink's queue, around the kernel.
//!
//! [`XdpUnderlay`] is an uplink's channel and, beside it, the UDP underlay: that one gets what the uplink's program passes to the
//! kernel (fragments, for example), and takes what goes to a node of which no next hop is known. Sending it that way has the kernel
//! look for the neighbour, and whoever follows the kernel's tables ([`Hops`]) then tells it here. So there is no time at which a node
//! cannot be reached, and nothing here asks for neighbours.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use arc_swap::ArcSwap;
use hashbrown::HashMap;
use rustix::event::epoll;

use super::channel::{Channel, Parts, ROOM, XdpDevice};
use super::outer::{self, NextHop, Prefix};
use super::partial;
use super::programs::Tunnel;
use crate::drop_reason::DropReason;
use crate::frame::{Frame, Outer};
use crate::pool::Pool;
use crate::port::software::{self, Cut, HEADERS};
use crate::port::udp::TUNNEL_HEADER;
use crate::port::{BATCH, Batch, Capabilities, Port, PortId, Queue, Received};
use crate::stats::Stats;

/// The next hops of all nodes that are known, by underlay address.
pub type Hops = HashMap<IpAddr, NextHop, foldhash::quality::RandomState>;

/// An uplink as a port. See the module's essay.
pub struct XdpUnderlay {
    channel: Channel,
    sender: Sender,
    hops: Arc<ArcSwap<Hops>>,
    kernel: Box<dyn Port>,
    /// Frames for the kernel's way.
    aside: Queue,
    /// Readable if one of the two is.
    readable: OwnedFd,
}

/// What frames are sent as.
struct Sender {
    tunnel: Tunnel,
}

impl XdpUnderlay {
    /// The port of that number. `device` has the uplink's program for the same `tunnel`, `kernel` is the UDP underlay with the same
    /// number.
    ///
    /// # Errors
    /// `InvalidInput` if the device was opened for another worker's pool, `OutOfMemory` if the pool is empty; the kernel's, for want of descriptors.
    pub fn new(
        device: XdpDevice,
        tunnel: Tunnel,
        hops: Arc<ArcSwap<Hops>>,
        kernel: Box<dyn Port>,
        pool: &Pool,
        id: PortId,
    ) -> io::Result<XdpUnderlay> {
        XdpUnderlay::over(Channel::new(device, pool, id)?, tunnel, hops, kernel)
    }

    pub(super) fn over(
        channel: Channel,
        tunnel: Tunnel,
        hops: Arc<ArcSwap<Hops>>,
        kernel: Box<dyn Port>,
    ) -> io::Result<XdpUnderlay> {
        let readable = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for fd in [Some(channel.as_fd()), kernel.readable()].into_iter().flatten() {
            epoll::add(&readable, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        }
        Ok(XdpUnderlay { channel, sender: Sender { tunnel }, hops, kernel, aside: Queue::new(), readable })
    }
}

impl Port for XdpUnderlay {
    fn receive(&mut self, pool: &Pool, batch: &mut Batch, stats: &mut Stats) -> io::Result<Received> {
        let tunnel = &self.sender.tunnel;
        let received = self.channel.receive(pool, batch, stats, |frame| {
            outer::read(frame, tunnel)?;
            frame.offload.partial = frame.head().get(TUNNEL_HEADER..).and_then(partial::recognise);
            Ok(())
        })?;
        if batch.len() == BATCH {
            return Ok(Received::More);
        }
        let by_kernel = self.kernel.receive(pool, batch, stats)?;
        Ok(if received == Received::More { received } else { by_kernel })
    }

    fn transmit(&mut self, queue: &mut Queue, stats: &mut Stats) -> io::Result<()> {
        let (sender, hops) = (&self.sender, self.hops.load());
        if queue.iter().any(|frame| hop_of(frame, &hops).is_none()) {
            for _ in 0..queue.len() {
                let frame = queue.pop_front().expect("it is as long as that");
                let way = if hop_of(&frame, &hops).is_some() { &mut *queue } else { &mut self.aside };
                way.push_back(frame);
            }
            let result = self.kernel.transmit(&mut self.aside, stats);
            queue.extend(self.aside.drain(..));
            result?;
        }
        self.channel.transmit(queue, stats, |channel, frame| match hop_of(frame, &hops) {
            Some((hop, outer)) => sender.put(channel, frame, hop, &outer),
            // Busy with this one: it waits for the kernel's way again.
            None => None,
        })
    }

    fn readable(&self) -> Option<BorrowedFd<'_>> {
        Some(self.readable.as_fd())
    }

    /// Everything is cut and summed here.
    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    fn set_tunnel_mtu(&mut self, mtu: u32) {
        self.kernel.set_tunnel_mtu(mtu);
    }

    fn kind(&self) -> &'static str {
        "xdp"
    }
}

/// How a frame's node is reached.
fn hop_of<'a>(frame: &Frame, hops: &'a Hops) -> Option<(&'a NextHop, Outer)> {
    let outer = frame.outer?;
    Some((hops.get(&outer.peer)?, outer))
}

impl Sender {
    /// Gives a frame to the ring. `None`: there is no room now.
    fn put(&self, channel: &mut Channel, frame: &mut Frame, hop: &NextHop, outer: &Outer) -> Option<Parts> {
        if frame.offload.gso.is_some() {
            return self.put_segments(channel, frame, hop, outer);
        }
        let pieces = (Prefix::new_const().capacity() + frame.len()).div_ceil(ROOM);
        if pieces > channel.most_pieces() {
            return Some(Parts::failed(DropReason::DeviceRefused));
        }
        match channel.has_room(pieces) {
            Ok(true) => {}
            Ok(false) => return None,
            Err(reason) => return Some(Parts::failed(reason)),
        }
        Some(self.put_single(channel, frame, hop, outer).map_or_else(Parts::failed, |()| Parts::SENT))
    }

    fn put_single(
        &self,
        channel: &mut Channel,
        frame: &mut Frame,
        hop: &NextHop,
        outer: &Outer,
    ) -> Result<(), DropReason> {
        // One checksum can be left to others, and that is the outer one: it covers more.
        software::fill_checksum(frame, TUNNEL_HEADER)?;
        let len = frame.len();
        let (mut prefix, partial) = outer::write(hop, self.source(outer)?, outer, self.tunnel.port, len)?;
        let partial = channel.abilities().checksum.then_some(partial).or_else(|| {
            outer::complete(&mut prefix, partial, frame.slices(0..len));
            None
        });
        let Some(room) = frame.push(prefix.len()) else {
            let slices = std::iter::once(&prefix[..]).chain(frame.slices(0..len));
            return channel.copy(slices, prefix.len() + len, partial);
        };
        room.copy_from_slice(&prefix);
        let sent = channel.send(frame, partial);
        // Counted are the bytes that were given to us.
        frame.pull(prefix.len()).expect("it was just put there");
        sent
    }

    /// Cuts a superframe.
    fn put_segments(&self, channel: &mut Channel, frame: &Frame, hop: &NextHop, outer: &Outer) -> Option<Parts> {
        let cut = match Cut::new(frame, TUNNEL_HEADER) {
            Ok(cut) => cut,
            Err(reason) => return Some(Parts::failed(reason)),
        };
        let pieces = |index| (Prefix::new_const().capacity() + cut.len(index)).div_ceil(ROOM);
        match channel.has_room((0..cut.count()).map(pieces).sum()) {
            Ok(true) => {}
            Ok(false) => return None,
            Err(reason) => return Some(Parts::failed(reason)),
        }
        let mut parts = Parts { sent: 0, failed: 0, reason: DropReason::NoBuffer };
        for index in 0..cut.count() {
            match self.put_segment(channel, &cut, index, hop, outer) {
                Ok(()) => parts.sent += 1,
                Err(reason) => (parts.failed, parts.reason) = (parts.failed + 1, reason),
            }
        }
        Some(parts)
    }

    fn put_segment(
        &self,
        channel: &mut Channel,
        cut: &Cut<'_>,
        index: usize,
        hop: &NextHop,
        outer: &Outer,
    ) -> Result<(), DropReason> {
        let mut headers = [0; TUNNEL_HEADER + HEADERS];
        let header = cut.write(index, &mut headers);
        let slices = || std::iter::once(&headers[..header]).chain(cut.payload(index));
        let (mut prefix, partial) = outer::write(hop, self.source(outer)?, outer, self.tunnel.port, cut.len(index))?;
        let partial = channel.abilities().checksum.then_some(partial).or_else(|| {
            outer::complete(&mut prefix, partial, slices());
            None
        });
        channel.copy(std::iter::once(&prefix[..]).chain(slices()), prefix.len() + cut.len(index), partial)
    }

    /// The address that frames for this node come from.
    fn source(&self, outer: &Outer) -> Result<IpAddr, DropReason> {
        let fits = |address: &&IpAddr| address.is_ipv4() == outer.peer.is_ipv4();
        self.tunnel.addresses.iter().find(fits).copied().ok_or(DropReason::UnderlayUnreachable)
    }
}
