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
        let base = if frame.outer.is_some() { TUNNEL_HEADER } else { 0 };
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
        let mut bytes = 0;
        while !self.broken {
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
        Err(Errno::BADFD.into())
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
