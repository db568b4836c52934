//! Ports without a device, for tests, benches and fuzzing: what goes in and comes out are queues in memory.
//!
//! A [`MemoryPort`] behaves to the letter as a device port does: it counts, it segments and sums what its capabilities
//! exclude, and it can refuse frames, be busy, or break. Nothing depends on time or chance.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::rc::Rc;

use rustix::io::Errno;
use weft_encap::offload::Offload;

use crate::drop_reason::DropReason;
use crate::frame::{Frame, Outer};
use crate::pool::Pool;
use crate::port::software::{self, Cut, HEADERS};
use crate::port::udp::TUNNEL_HEADER;
use crate::port::{BATCH_BYTES, Batch, Capabilities, Port, PortId, Queue, Received};
use crate::stats::Stats;

/// A frame outside of the router.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packet {
    /// All its bytes.
    pub bytes: Vec<u8>,
    /// What is still to be done to it.
    pub offload: Offload,
    /// Where it comes from or goes to, if it is on the underlay.
    pub outer: Option<Outer>,
}

/// Frames on their way between ports, or between a port and a test.
pub type Wire = Rc<RefCell<VecDeque<Packet>>>;

/// A port in memory. See the module's essay.
pub struct MemoryPort {
    id: PortId,
    capabilities: Capabilities,
    inbox: Wire,
    outbox: Wire,
    refuse_each: usize,
    tried: usize,
    room: usize,
    broken: bool,
}

impl MemoryPort {
    /// A port that takes everything.
    pub fn new(id: PortId) -> MemoryPort {
        MemoryPort {
            id,
            capabilities: Capabilities { partial_checksum: true, tcp4: true, tcp6: true, udp: true },
            inbox: Wire::default(),
            outbox: Wire::default(),
            refuse_each: usize::MAX,
            tried: 0,
            room: usize::MAX,
            broken: false,
        }
    }

    /// One that has less done for it on the way out.
    pub fn with_capabilities(mut self, capabilities: Capabilities) -> MemoryPort {
        self.capabilities = capabilities;
        self
    }

    /// One that refuses each `nth` frame or segment it should send.
    pub fn refusing_each(mut self, nth: usize) -> MemoryPort {
        self.refuse_each = nth.max(1);
        self
    }

    /// One that is busy while `room` frames wait in its outbox.
    pub fn with_room(mut self, room: usize) -> MemoryPort {
        self.room = room;
        self
    }

    /// What it will receive. Frames are pushed to the back.
    pub fn inbox(&self) -> Wire {
        Rc::clone(&self.inbox)
    }

    /// What it has sent, oldest first.
    pub fn outbox(&self) -> Wire {
        Rc::clone(&self.outbox)
    }

    /// Lets all further calls fail, as if the device had gone.
    pub fn break_down(&mut self) {
        self.broken = true;
    }

    fn send(&mut self, bytes: Vec<u8>, frame: &Frame, offload: Offload) -> bool {
        self.tried += 1;
        let taken = !self.tried.is_multiple_of(self.refuse_each);
        if taken {
            self.outbox.borrow_mut().push_back(Packet { bytes, offload, outer: frame.outer });
        }
        taken
    }

    fn send_segments(&mut self, frame: &Frame, base: usize) -> Result<(u64, u64), DropReason> {
        let cut = Cut::new(frame, base)?;
        let mut sent = 0;
        for index in 0..cut.count() {
            let mut header = [0; TUNNEL_HEADER + HEADERS];
            let len = cut.write(index, &mut header);
            let mut bytes = header[..len].to_vec();
            cut.payload(index).for_each(|slice| bytes.extend_from_slice(slice));
            sent += u64::from(self.send(bytes, frame, Offload::default()));
        }
        Ok((sent, cut.count() as u64 - sent))
    }

    fn send_frame(&mut self, frame: &mut Frame) -> Result<(u64, u64), DropReason> {
        let base = frame.base();
        if !self.capabilities.take(&frame.offload) {
            if frame.offload.gso.is_some() {
                return self.send_segments(frame, base);
            }
            software::fill_checksum(frame, base)?;
        }
        let sent = u64::from(self.send(frame.to_vec(), frame, frame.offload));
        Ok((sent, 1 - sent))
    }
}

/// Two ports of which each receives what the other one sends.
pub fn pair(first: PortId, second: PortId) -> (MemoryPort, MemoryPort) {
    let first = MemoryPort::new(first);
    let second = MemoryPort { inbox: first.outbox(), outbox: first.inbox(), ..MemoryPort::new(second) };
    (first, second)
}

impl Port for MemoryPort {
    fn receive(&mut self, pool: &Pool, batch: &mut Batch, stats: &mut Stats) -> io::Result<Received> {
        if self.broken {
            return Err(Errno::BADFD.into());
        }
        let mut bytes = 0;
        loop {
            if batch.is_full() || bytes >= BATCH_BYTES {
                return Ok(Received::More);
            }
            let Some(packet) = self.inbox.borrow_mut().pop_front() else { return Ok(Received::Drained) };
            bytes += packet.bytes.len();
            match Frame::from_bytes(&packet.bytes, self.id, pool) {
                Some(mut frame) => {
                    frame.offload = packet.offload;
                    frame.outer = packet.outer;
                    stats.received(&frame);
                    batch.push(frame);
                }
                None => stats.lost(self.id, DropReason::NoBuffer),
            }
        }
    }

    fn transmit(&mut self, queue: &mut Queue, stats: &mut Stats) -> io::Result<()> {
        if self.broken {
            return Err(Errno::BADFD.into());
        }
        while self.outbox.borrow().len() < self.room {
            let Some(mut frame) = queue.pop_front() else { break };
            match self.send_frame(&mut frame) {
                Ok((sent, failed)) => stats.sent_in_part(frame, self.id, sent, failed, DropReason::DeviceRefused),
                Err(reason) => stats.drop(frame, reason),
            }
        }
        Ok(())
    }

    fn readable(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn kind(&self) -> &'static str {
        "memory"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::sample;

    fn transmit(port: &mut MemoryPort, packet: &Packet, stats: &mut Stats, pool: &Pool) {
        let mut frame = Frame::from_bytes(&packet.bytes, PortId(9), pool).unwrap();
        frame.offload = packet.offload;
        frame.outer = packet.outer;
        stats.received(&frame);
        port.transmit(&mut Queue::from([frame]), stats).unwrap();
        assert_eq!(stats.of(PortId(9)).in_flight(), 0);
    }

    #[test]
    fn a_superframe_is_cut_and_summed_for_a_port_that_takes_none() {
        let pool = Pool::new(8, 8).unwrap();
        for (packet, payload) in [sample::tcp4(10_000, 1448), sample::tcp6(10_000, 1440), sample::udp4(10_000, 1472)] {
            let mut stats = Stats::default();
            let mut port = MemoryPort::new(PortId(1)).with_capabilities(Capabilities::default());
            transmit(&mut port, &packet, &mut stats, &pool);
            let sent = port.outbox().take();
            assert_eq!(sent.len(), 7);
            let bytes: Vec<u8> = sent.iter().flat_map(|packet| sample::verified_payload(&packet.bytes)).collect();
            assert_eq!(bytes, payload);
            let counted = stats.of(PortId(9));
            assert_eq!((counted.splits, counted.sent, stats.of(PortId(1)).out), (6, 7, 7));
        }
    }

    #[test]
    fn behind_a_tunnel_header_the_same_holds() {
        let pool = Pool::new(8, 8).unwrap();
        let (inner, payload) = sample::tcp4(10_000, 1398);
        let packet = sample::tunnelled(&inner);
        let mut port = MemoryPort::new(PortId(1)).with_capabilities(Capabilities::default());
        transmit(&mut port, &packet, &mut Stats::default(), &pool);
        let sent = port.outbox().take();
        assert!(sent.iter().all(|segment| segment.bytes[..TUNNEL_HEADER] == packet.bytes[..TUNNEL_HEADER]));
        let inner = |segment: &Packet| sample::verified_payload(&segment.bytes[TUNNEL_HEADER..]);
        assert_eq!(sent.iter().flat_map(inner).collect::<Vec<u8>>(), payload);
    }

    #[test]
    fn a_partial_checksum_is_filled_in_over_head_and_body() {
        let pool = Pool::new(8, 8).unwrap();
        let checksum_only = Capabilities { partial_checksum: true, ..Capabilities::default() };
        for len in [0, 1, 999, 1_700, 1_701, 1_703, 60_001] {
            let (packet, payload) = sample::udp4(len, 0);
            let mut port = MemoryPort::new(PortId(1)).with_capabilities(Capabilities::default());
            transmit(&mut port, &packet, &mut Stats::default(), &pool);
            assert_eq!(sample::verified_payload(&port.outbox().take()[0].bytes), payload);
            let mut port = MemoryPort::new(PortId(1)).with_capabilities(checksum_only);
            transmit(&mut port, &packet, &mut Stats::default(), &pool);
            assert_eq!(port.outbox().take()[0], packet);
        }
    }

    #[test]
    fn segments_that_are_refused_are_counted_one_by_one() {
        let pool = Pool::new(8, 8).unwrap();
        let mut stats = Stats::default();
        let mut port = MemoryPort::new(PortId(1)).with_capabilities(Capabilities::default()).refusing_each(3);
        transmit(&mut port, &sample::tcp4(10_000, 1448).0, &mut stats, &pool);
        let counted = stats.of(PortId(9));
        assert_eq!((counted.splits, counted.sent), (6, 5));
        assert_eq!(counted.dropped[DropReason::DeviceRefused as usize], 2);
    }

    #[test]
    fn an_offload_that_does_not_fit_the_frame_ends_it_by_name() {
        let pool = Pool::new(8, 8).unwrap();
        let (mut packet, _) = sample::tcp4(100, 10);
        for header_len in [0, 20, 53, 200, u16::MAX] {
            packet.offload.gso.as_mut().unwrap().header_len = header_len;
            let mut stats = Stats::default();
            let mut port = MemoryPort::new(PortId(1)).with_capabilities(Capabilities::default());
            transmit(&mut port, &packet, &mut stats, &pool);
            assert_eq!(stats.of(PortId(9)).dropped[DropReason::Unsegmentable as usize], 1, "{header_len}");
        }
        packet.offload.gso = None;
        packet.offload.partial.as_mut().unwrap().start = 3_000;
        let mut stats = Stats::default();
        let mut port = MemoryPort::new(PortId(1)).with_capabilities(Capabilities::default());
        transmit(&mut port, &packet, &mut stats, &pool);
        assert_eq!(stats.of(PortId(9)).dropped[DropReason::BadOffload as usize], 1);
    }

    #[test]
    fn what_one_of_a_pair_sends_the_other_receives() {
        let pool = Pool::new(8, 8).unwrap();
        let (mut first, mut second) = pair(PortId(1), PortId(2));
        let mut stats = Stats::default();
        let (packet, _) = sample::tcp4(10_000, 1448);
        transmit(&mut first, &packet, &mut stats, &pool);
        let mut batch = Batch::new();
        assert_eq!(second.receive(&pool, &mut batch, &mut stats).unwrap(), Received::Drained);
        assert_eq!(batch[0].to_vec(), packet.bytes);
        assert_eq!(batch[0].offload, packet.offload);
        assert_eq!(batch[0].ingress(), PortId(2));
    }
}
