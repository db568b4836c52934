//! The underlay by AF_XDP: tunnel packets to and from an uplink's queue, around the kernel.
//!
//! [`XdpUnderlay`] is a worker's channels, one for each queue of the uplink that it has, and, beside them, the UDP underlay: that one
//! gets what the uplink's program passes to the kernel (fragments, for example), and takes what goes to a node of which no next hop is
//! known. Sending it that way has the kernel look for the neighbour, and whoever follows the kernel's tables ([`Hops`]) then tells it
//! here. So there is no time at which a node cannot be reached, and nothing here asks for neighbours. When the device goes, the
//! kernel's way is left. What is longer than the path to its node leaves by the kernel as well, in fragments.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwap;
use hashbrown::HashMap;
use rustix::event::epoll;
use weft_encap::offload::Gso;

use super::channel::{Channel, Parts, ROOM, XdpDevice};
use super::outer::{self, NextHop, Prefix};
use super::partial;
use super::programs::Tunnel;
use crate::drop_reason::DropReason;
use crate::frame::{Frame, Outer};
use crate::pool::Pool;
use crate::port::software::{self, Cut, HEADERS};
use crate::port::udp::TUNNEL_HEADER;
use crate::port::{Batch, Capabilities, Port, PortId, Queue, Received};
use crate::stats::Stats;

/// The next hops of all nodes that are known, by underlay address.
pub type Hops = HashMap<IpAddr, Hop, foldhash::quality::RandomState>;

/// A next hop, and whether anything went there: for whoever keeps it fresh.
#[derive(Debug)]
pub struct Hop {
    /// Where frames go.
    pub next: NextHop,
    used: AtomicBool,
}

impl Hop {
    /// Whether it was used since this was asked last.
    pub fn take_used(&self) -> bool {
        self.used.swap(false, Ordering::Relaxed)
    }
}

impl From<NextHop> for Hop {
    fn from(next: NextHop) -> Hop {
        Hop { next, used: AtomicBool::new(false) }
    }
}

/// How often the kernel's socket is asked although the queues are never empty, in batches.
const KERNEL: u32 = 16;

/// An uplink as a port. See the module's essay.
pub struct XdpUnderlay {
    /// The first of them sends.
    channels: Vec<Channel>,
    /// Which of them is asked first.
    turn: usize,
    /// Batches since the kernel's socket was asked.
    unasked: u32,
    sender: Sender,
    hops: Arc<ArcSwap<Hops>>,
    kernel: KernelWay,
    /// Readable if one of the two is.
    readable: OwnedFd,
}

/// The kernel's way, beside the device: the UDP underlay, which also fragments.
pub struct KernelWay {
    /// Its port.
    pub port: Box<dyn Port>,
    aside: Queue,
}

impl KernelWay {
    /// Of this port.
    pub fn new(port: Box<dyn Port>) -> KernelWay {
        KernelWay { port, aside: Queue::new() }
    }

    /// Sends what is aside. What the kernel is too busy for goes back to `queue`.
    fn transmit(&mut self, queue: &mut Queue, stats: &mut Stats) -> io::Result<()> {
        let result = self.port.transmit(&mut self.aside, stats);
        queue.extend(self.aside.drain(..));
        result
    }
}

/// How a frame leaves.
#[derive(Copy, Clone, PartialEq, Eq)]
enum Way {
    Device,
    Kernel { in_fragments: bool },
}

/// What frames are sent as.
struct Sender {
    tunnel: Tunnel,
}

impl XdpUnderlay {
    /// The port of that number. `devices` are this worker's queues of an uplink that has the program for the same `tunnel`, `kernel` is
    /// the UDP underlay with the same number.
    ///
    /// # Errors
    /// `InvalidInput` if the device was opened for another worker's pool, `OutOfMemory` if the pool is empty; the kernel's, for want of descriptors.
    pub fn new(
        devices: Vec<XdpDevice>,
        tunnel: Tunnel,
        hops: Arc<ArcSwap<Hops>>,
        kernel: KernelWay,
        pool: &Pool,
        id: PortId,
    ) -> io::Result<XdpUnderlay> {
        let channels = devices.into_iter().map(|device| Channel::new(device, pool, id)).collect::<io::Result<_>>()?;
        XdpUnderlay::over(channels, tunnel, hops, kernel)
    }

    pub(super) fn over(
        channels: Vec<Channel>,
        tunnel: Tunnel,
        hops: Arc<ArcSwap<Hops>>,
        kernel: KernelWay,
    ) -> io::Result<XdpUnderlay> {
        let readable = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for fd in channels.iter().map(|channel| Some(channel.as_fd())).chain([kernel.port.readable()]).flatten() {
            epoll::add(&readable, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        }
        Ok(XdpUnderlay { channels, turn: 0, unasked: 0, sender: Sender { tunnel }, hops, kernel, readable })
    }

    /// Receives from the queues that have something; from all if none seems to, for one may have an error to tell.
    fn receive_queues(&mut self, pool: &Pool, batch: &mut Batch, stats: &mut Stats) -> io::Result<Received> {
        let tunnel = &self.sender.tunnel;
        let is_any = self.channels.iter_mut().any(Channel::is_waiting);
        let count = self.channels.len();
        let mut more = is_any;
        for index in 0..count {
            let channel = &mut self.channels[(self.turn + index) % count];
            if batch.is_full() || is_any && !channel.is_waiting() {
                continue;
            }
            let received = channel.receive(pool, batch, stats, |frame| {
                outer::read(frame, tunnel)?;
                frame.offload.partial = frame.head().get(TUNNEL_HEADER..).and_then(partial::recognise);
                Ok(())
            })?;
            more |= received == Received::More;
        }
        self.turn = self.turn.wrapping_add(1);
        Ok(if more { Received::More } else { Received::Drained })
    }

    /// The device is gone. Its nodes are reached by the kernel, if it has another way.
    fn leave_device(&mut self) {
        for channel in self.channels.drain(..) {
            let _ = epoll::delete(&self.readable, channel.as_fd());
        }
    }

    /// Sends by the kernel what is for nodes whose next hop is not known, and what is too long for the path to its node.
    fn transmit_aside(&mut self, queue: &mut Queue, hops: &Hops, stats: &mut Stats) -> io::Result<()> {
        let has_device = !self.channels.is_empty();
        let way = |frame: &Frame| match hop_of(frame, hops) {
            Some((hop, outer)) => {
                let in_fragments = outer.in_fragments || longest(frame, &outer) > hop.mtu as usize;
                let in_fragments = in_fragments && !frame.is_probe;
                if has_device && !in_fragments { Way::Device } else { Way::Kernel { in_fragments } }
            }
            None => Way::Kernel { in_fragments: frame.outer.is_some_and(|outer| outer.in_fragments) },
        };
        if queue.iter().all(|frame| way(frame) == Way::Device) {
            return Ok(());
        }
        for _ in 0..queue.len() {
            let mut frame = queue.pop_front().expect("it is as long as that");
            match way(&frame) {
                Way::Device => queue.push_back(frame),
                Way::Kernel { in_fragments } => {
                    frame.outer = frame.outer.map(|outer| Outer { in_fragments, ..outer });
                    self.kernel.aside.push_back(frame);
                }
            }
        }
        self.kernel.transmit(queue, stats)
    }
}

impl Port for XdpUnderlay {
    fn receive(&mut self, pool: &Pool, batch: &mut Batch, stats: &mut Stats) -> io::Result<Received> {
        let by_queues = self.receive_queues(pool, batch, stats).unwrap_or_else(|_| {
            self.leave_device();
            Received::More
        });
        // Most often there is nothing, and asking is a system call: so not with each batch.
        self.unasked += 1;
        if by_queues == Received::More && self.unasked < KERNEL || batch.is_full() {
            return Ok(Received::More);
        }
        self.unasked = 0;
        let by_kernel = self.kernel.port.receive(pool, batch, stats)?;
        Ok(if by_queues == Received::More { by_queues } else { by_kernel })
    }

    fn transmit(&mut self, queue: &mut Queue, stats: &mut Stats) -> io::Result<()> {
        let hops = Arc::clone(&self.hops.load());
        self.transmit_aside(queue, &hops, stats)?;
        let (sender, Some(channel)) = (&self.sender, self.channels.first_mut()) else { return Ok(()) };
        let sent = channel.transmit(queue, stats, |channel, frame| match hop_of(frame, &hops) {
            Some((hop, outer)) => sender.put(channel, frame, hop, &outer),
            // Busy with this one: it waits for the kernel's way again.
            None => None,
        });
        if sent.is_err() {
            self.leave_device();
        }
        Ok(())
    }

    fn readable(&self) -> Option<BorrowedFd<'_>> {
        Some(self.readable.as_fd())
    }

    fn peek(&mut self) -> Option<bool> {
        Some(self.channels.iter_mut().any(Channel::is_waiting))
    }

    /// The kernel's socket stays where it is.
    fn watch(&mut self, on: bool) -> bool {
        for channel in &self.channels {
            let fd = channel.as_fd();
            // What is not told of now is found when nothing else seems to be there.
            let _ = match on {
                true => epoll::add(&self.readable, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN),
                false => epoll::delete(&self.readable, fd),
            };
        }
        true
    }

    fn count(&mut self, stats: &mut Stats) {
        self.channels.iter_mut().for_each(|channel| channel.count(stats));
    }

    /// Everything is cut and summed here.
    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    fn set_tunnel_mtu(&mut self, mtu: u32) {
        self.kernel.port.set_tunnel_mtu(mtu);
    }

    /// The node before us has its packets come one by one, unlike the kernel's trains.
    fn gathers(&self) -> bool {
        true
    }

    fn kind(&self) -> &'static str {
        if self.channels.is_empty() { self.kernel.port.kind() } else { "xdp" }
    }
}

/// How a frame's node is reached.
fn hop_of<'a>(frame: &Frame, hops: &'a Hops) -> Option<(&'a NextHop, Outer)> {
    let outer = frame.outer?;
    let hop = hops.get(&outer.peer)?;
    // Written only when it changes: other workers have it in their caches.
    if !hop.used.load(Ordering::Relaxed) {
        hop.used.store(true, Ordering::Relaxed);
    }
    Some((&hop.next, outer))
}

/// The longest packet that a frame becomes, outer headers included.
fn longest(frame: &Frame, outer: &Outer) -> usize {
    let segment = |gso: Gso| TUNNEL_HEADER + usize::from(gso.header_len) + usize::from(gso.size);
    let len = frame.offload.gso.map_or(frame.len(), |gso| frame.len().min(segment(gso)));
    len + outer::packet_headers(outer.peer)
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
        let (mut prefix, partial) = outer::write(hop, self.source(outer)?, outer, &self.tunnel, len)?;
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
        let (mut prefix, partial) = outer::write(hop, self.source(outer)?, outer, &self.tunnel, cut.len(index))?;
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
