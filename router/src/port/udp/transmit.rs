//! From frames to datagrams, as few calls as possible.
//!
//! A vector of frames is sent socket by socket (the order within a flow stays, as a flow has one socket). For each socket the
//! frames, superframes cut, are laid out as datagrams one after the other in a [`Round`], which packs consecutive
//! datagrams of the same length to the same node into one message for the kernel to cut (`UDP_SEGMENT`), and sends all messages with
//! one call. Where the kernel refuses such a message, its datagrams are sent one by one; where it does so though each of them was
//! fine, the socket never sends such messages again.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::slice::ChunksExactMut;

use arrayvec::ArrayVec;
use rustix::io::Errno;
use weft_encap::eth::ETH_LEN;
use weft_encap::format::Format;
use weft_encap::ip;

use super::TUNNEL_HEADER;
use crate::drop_reason::DropReason;
use crate::frame::{Frame, Outer};
use crate::port::software::{self, Cut, HEADERS};
use crate::port::sys::message::{self, MESSAGES, Message};
use crate::port::{BATCH, PortId, Queue, is_broken};
use crate::stats::Stats;

/// Most datagrams in one message; kernels before 6.9 refuse more.
const SEGMENTS: usize = 64;

/// Most bytes in one message. The kernel takes 14 more, but cuts such a message in software.
const MESSAGE_BYTES: usize = 65_493;

/// Slices of one round.
const SLICES: usize = 1024;

/// Datagrams of one round.
const DATAGRAMS: usize = 512;

/// Cut segments in one round: two superframes at the usual MTU, with some to spare.
const CUTS: usize = 128;

/// Distance of their headers: an odd number of cache lines, so that they do not share a few sets of the L1 cache.
const CUT_STRIDE: usize = 320;

const _: () = assert!(CUT_STRIDE >= TUNNEL_HEADER + HEADERS && CUT_STRIDE / 64 % 2 == 1);

struct Socket {
    fd: OwnedFd,
    /// Whether the kernel cuts messages into datagrams for it.
    segments: bool,
}

/// The sending half of the port.
pub(in crate::port) struct Sender {
    id: PortId,
    peer_port: u16,
    sockets: Vec<Socket>,
    headers: Box<[u8]>,
}

/// Frames that are sent together.
type Batch = ArrayVec<Frame, BATCH>;

/// What became of the datagrams of a frame.
#[derive(Copy, Clone)]
struct Parts {
    sent: u64,
    failed: u64,
    reason: DropReason,
}

impl Parts {
    fn fail(&mut self, reason: DropReason) {
        self.failed += 1;
        self.reason = reason;
    }
}

type Outcomes = [Parts; BATCH];

impl Sender {
    pub(in crate::port) fn new(id: PortId, peer_port: u16, sockets: Vec<OwnedFd>) -> Sender {
        let sockets = sockets.into_iter().map(|fd| Socket { fd, segments: true }).collect();
        Sender { id, peer_port, sockets, headers: vec![0; CUTS * CUT_STRIDE].into_boxed_slice() }
    }

    /// By one socket, for which the kernel cuts nothing.
    pub(super) fn single(id: PortId, peer_port: u16, fd: OwnedFd) -> Sender {
        let mut sender = Sender::new(id, peer_port, vec![fd]);
        sender.sockets[0].segments = false;
        sender
    }

    /// By sockets that send IP packets, of one protocol each.
    pub(in crate::port) fn raw(id: PortId, sockets: Vec<OwnedFd>) -> Sender {
        // Such a socket's port is the protocol, which it has already.
        let mut sender = Sender::new(id, 0, sockets);
        sender.sockets.iter_mut().for_each(|socket| socket.segments = false);
        sender
    }

    #[cfg(test)]
    pub(super) fn peer_port(&self) -> u16 {
        self.peer_port
    }

    #[cfg(test)]
    pub(super) fn without_checksums(&self) {
        self.sockets.iter().for_each(|socket| message::disable_checksums(&socket.fd).unwrap());
    }

    /// Whether all sockets have the kernel cut messages.
    pub(super) fn segments(&self) -> bool {
        self.sockets.iter().all(|socket| socket.segments)
    }

    pub(in crate::port) fn transmit(&mut self, queue: &mut Queue, stats: &mut Stats) -> io::Result<()> {
        while !queue.is_empty() {
            let count = queue.len().min(BATCH);
            let mut batch: Batch = queue.drain(..count).collect();
            let mut outcomes = [Parts { sent: 0, failed: 0, reason: DropReason::UnderlayUnreachable }; BATCH];
            let result = self.send_batch(&mut batch, &mut outcomes);
            for (frame, mut parts) in batch.into_iter().zip(outcomes) {
                if parts.sent + parts.failed == 0 {
                    parts.fail(DropReason::PortDown);
                }
                stats.sent_in_part(frame, self.id, parts.sent, parts.failed, parts.reason);
            }
            result?;
        }
        Ok(())
    }

    fn send_batch(&mut self, batch: &mut Batch, outcomes: &mut Outcomes) -> Result<(), Errno> {
        let mut waiting = 0u64;
        for (index, frame) in batch.iter_mut().enumerate() {
            match prepare(frame) {
                Ok(()) => waiting |= 1 << index,
                Err(reason) => outcomes[index].fail(reason),
            }
        }
        while waiting != 0 {
            let socket = self.socket_of(&batch[waiting.trailing_zeros() as usize]);
            let of_socket = batch.iter().enumerate().filter(|(_, frame)| self.socket_of(frame) == socket);
            let chosen = of_socket.fold(0u64, |chosen, (index, _)| chosen | 1 << index) & waiting;
            waiting &= !chosen;
            self.send_by(socket, batch, chosen, outcomes)?;
        }
        Ok(())
    }

    fn socket_of(&self, frame: &Frame) -> usize {
        let way = match frame.outer {
            Some(Outer { format: Format::Ipip, .. }) => usize::from(frame.head().first() != Some(&ip::IPIP)),
            Some(outer) => usize::from(outer.entropy),
            None => 0,
        };
        way % self.sockets.len()
    }

    /// Sends the chosen frames by one socket, in rounds.
    fn send_by(&mut self, socket: usize, batch: &Batch, chosen: u64, outcomes: &mut Outcomes) -> Result<(), Errno> {
        let mut cursor = Cursor { waiting: chosen, segment: 0 };
        while cursor.waiting != 0 {
            let socket = &mut self.sockets[socket];
            let mut round = Round::new(&mut self.headers, self.peer_port, socket.segments);
            round.fill(batch, &mut cursor, outcomes);
            round.send(socket, outcomes)?;
        }
        Ok(())
    }
}

/// Sums what is to be sent as it is. Superframes are summed as they are cut.
fn prepare(frame: &mut Frame) -> Result<(), DropReason> {
    let Some(outer) = frame.outer else { return Err(DropReason::DeviceRefused) };
    let base = usize::from(outer.base);
    if outer.format == Format::Gre && frame.head().len() >= base + ETH_LEN {
        // What is left of the Ethernet header is the type, with which GRE's header ends.
        frame.head_mut().copy_within(..base, ETH_LEN);
    }
    if frame.offload.gso.is_some() { Ok(()) } else { software::fill_checksum(frame, base) }
}

/// How many bytes at the front of a frame are not sent: what has no Ethernet header on the wire has one here.
fn unsent(outer: Option<Outer>) -> usize {
    match outer {
        Some(Outer { format: Format::Gre, .. }) => ETH_LEN,
        Some(Outer { format: Format::Ipip, base, .. }) => usize::from(base) + ETH_LEN,
        _ => 0,
    }
}

/// How far the frames of a socket have been laid out: the first of `waiting` up to its segment `segment`.
struct Cursor {
    waiting: u64,
    segment: usize,
}

/// Datagrams laid out for one call.
struct Round<'a> {
    peer_port: u16,
    segments: bool,
    headers: ChunksExactMut<'a, u8>,
    slices: ArrayVec<IoSlice<'a>, SLICES>,
    messages: ArrayVec<Message, MESSAGES>,
    /// Which frame of the batch each datagram belongs to.
    owners: ArrayVec<u8, DATAGRAMS>,
    /// How full each message is.
    fill: ArrayVec<Fill, MESSAGES>,
}

/// How full a message is.
#[derive(Copy, Clone)]
struct Fill {
    datagrams: usize,
    bytes: usize,
    /// Length of the first datagram.
    first: usize,
    /// Whether another one may follow: no datagram but the last may be shorter than the first.
    open: bool,
}

impl<'a> Round<'a> {
    fn new(headers: &'a mut [u8], peer_port: u16, segments: bool) -> Round<'a> {
        Round {
            peer_port,
            segments,
            headers: headers.chunks_exact_mut(CUT_STRIDE),
            slices: ArrayVec::new(),
            messages: ArrayVec::new(),
            owners: ArrayVec::new(),
            fill: ArrayVec::new(),
        }
    }

    /// Lays out frames from the cursor on until there is no room left.
    fn fill(&mut self, batch: &'a Batch, cursor: &mut Cursor, outcomes: &mut Outcomes) {
        while cursor.waiting != 0 {
            let index = cursor.waiting.trailing_zeros() as usize;
            let frame = &batch[index];
            let full = match frame.offload.gso {
                None => {
                    let skip = unsent(frame.outer);
                    !self.datagram(frame, index, frame.len() - skip, frame.slices(skip..frame.len()))
                }
                Some(_) => match Cut::new(frame, frame.base()) {
                    Ok(cut) if cursor.segment == 0 && !self.has_headers(cut.count()) => return,
                    Ok(cut) => {
                        self.close_if_split(&cut);
                        !self.cut(frame, index, &cut, &mut cursor.segment)
                    }
                    Err(reason) => {
                        outcomes[index].fail(reason);
                        false
                    }
                },
            };
            if full && !self.owners.is_empty() {
                return;
            }
            if full {
                // Not even an empty round has room for it, which takes a frame of a thousand pieces.
                outcomes[index].fail(DropReason::Unsegmentable);
            }
            cursor.waiting &= cursor.waiting - 1;
            cursor.segment = 0;
        }
    }

    /// Whether so many segments fit this round. A superframe that would fit the next one as a whole waits for it: what is sent by
    /// two calls arrives as two trains, and nobody merges those again.
    fn has_headers(&self, count: usize) -> bool {
        self.owners.is_empty() || count > CUTS || count <= self.headers.len()
    }

    /// Lets no superframe begin in a message that cannot take all of it, for the same reason.
    fn close_if_split(&mut self, cut: &Cut<'_>) {
        if let Some(fill) = self.fill.last_mut() {
            let fits = fill.datagrams + cut.count() <= SEGMENTS && fill.bytes + cut.total() <= MESSAGE_BYTES;
            fill.open &= fits;
        }
    }

    /// Lays out the segments of a superframe from `next` on; `false` if there is no room for all of them.
    fn cut(&mut self, frame: &'a Frame, index: usize, cut: &Cut<'a>, next: &mut usize) -> bool {
        while *next < cut.count() {
            let Some(header) = self.headers.next() else { return false };
            let len = cut.write(*next, header);
            let skip = unsent(frame.outer);
            let header: &'a [u8] = &header[skip..len];
            let slices = std::iter::once(header).chain(cut.payload(*next));
            if !self.datagram(frame, index, cut.len(*next) - skip, slices) {
                return false;
            }
            *next += 1;
        }
        true
    }

    /// Lays out one datagram; `false`, with nothing changed, if there is no room.
    fn datagram(&mut self, frame: &Frame, index: usize, len: usize, slices: impl Iterator<Item = &'a [u8]>) -> bool {
        let Some(outer) = frame.outer else { return true };
        let to = SocketAddr::new(outer.peer, self.peer_port);
        let joins = self.joins(to, outer.tos, len);
        if self.owners.is_full() || (!joins && self.messages.is_full()) {
            return false;
        }
        let start = self.slices.len();
        for slice in slices {
            if self.slices.try_push(IoSlice::new(slice)).is_err() {
                self.slices.truncate(start);
                return false;
            }
        }
        self.owners.push(index as u8);
        let slices = start..self.slices.len();
        if let (true, Some(message), Some(fill)) = (joins, self.messages.last_mut(), self.fill.last_mut()) {
            message.segment = fill.first as u16;
            message.slices.end = slices.end;
            *fill = Fill { datagrams: fill.datagrams + 1, bytes: fill.bytes + len, open: len == fill.first, ..*fill };
        } else {
            self.messages.push(Message { to, tos: outer.tos, slices, segment: 0 });
            self.fill.push(Fill { datagrams: 1, bytes: len, first: len, open: self.segments });
        }
        true
    }

    /// Whether a datagram can be part of the last message.
    fn joins(&self, to: SocketAddr, tos: u8, len: usize) -> bool {
        let (Some(message), Some(fill)) = (self.messages.last(), self.fill.last()) else { return false };
        fill.open
            && (message.to, message.tos) == (to, tos)
            && (1..=fill.first).contains(&len)
            && fill.datagrams < SEGMENTS
            && fill.bytes + len <= MESSAGE_BYTES
    }

    /// Sends all messages and notes what became of each datagram.
    fn send(&self, socket: &mut Socket, outcomes: &mut Outcomes) -> Result<(), Errno> {
        let (mut at, mut owner) = (0, 0);
        let mut retried = false;
        while at < self.messages.len() {
            match send(socket, &self.messages[at..], &self.slices) {
                Ok(sent) => {
                    let count = self.fill[at..at + sent].iter().map(|fill| fill.datagrams).sum::<usize>();
                    let owners = &self.owners[owner..owner + count];
                    owners.iter().for_each(|index| outcomes[usize::from(*index)].sent += 1);
                    (at, owner) = (at + sent, owner + count);
                    retried = false;
                }
                // An ICMP error that came in for an earlier datagram is reported by the call after it, once.
                Err(Errno::CONNREFUSED | Errno::INTR) if !retried => retried = true,
                Err(error) if is_broken(error) => return Err(error),
                Err(error) => {
                    let message = &self.messages[at];
                    let owners = &self.owners[owner..owner + self.fill[at].datagrams];
                    if message.segment != 0 && matches!(error, Errno::MSGSIZE | Errno::INVAL | Errno::IO) {
                        let fine = self.send_singly(socket, message, owners, outcomes)?;
                        socket.segments &= !(fine && error != Errno::MSGSIZE);
                    } else {
                        owners.iter().for_each(|index| outcomes[usize::from(*index)].fail(refusal(error)));
                    }
                    (at, owner) = (at + 1, owner + owners.len());
                    retried = false;
                }
            }
        }
        Ok(())
    }

    /// Sends the datagrams of one message each by itself. Returns whether all were sent.
    fn send_singly(
        &self,
        socket: &Socket,
        message: &Message,
        owners: &[u8],
        outcomes: &mut Outcomes,
    ) -> Result<bool, Errno> {
        let mut fine = true;
        let mut start = message.slices.start;
        for owner in owners {
            let (mut end, mut len) = (start, 0);
            while end < message.slices.end && len < usize::from(message.segment) {
                len += self.slices[end].len();
                end += 1;
            }
            let single = Message { slices: start..end, segment: 0, ..*message };
            let outcome = &mut outcomes[usize::from(*owner)];
            match send(socket, &[single], &self.slices) {
                Ok(_) => outcome.sent += 1,
                Err(error) if is_broken(error) => return Err(error),
                Err(error) => {
                    outcome.fail(refusal(error));
                    fine = false;
                }
            }
            start = end;
        }
        Ok(fine)
    }
}

fn send(socket: &Socket, messages: &[Message], slices: &[IoSlice<'_>]) -> Result<usize, Errno> {
    message::send(&socket.fd, messages, slices).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

/// Why a datagram was not sent.
fn refusal(error: Errno) -> DropReason {
    match error {
        Errno::MSGSIZE => DropReason::UnderlayMtu,
        Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM => DropReason::UnderlayBusy,
        _ => DropReason::UnderlayUnreachable,
    }
}
