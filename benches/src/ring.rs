//! Ports whose devices are queues of descriptors, as AF_XDP's rings are: frames move, their bytes stay where they are.
//!
//! [`run`] is what the worker does with ports that are ready: receive a vector, forward it, send what came of it. Whoever
//! times it counts everything from the descriptor that a device has written to the one that it will read, statistics
//! included, and neither the making of packets nor a device's own work.

use std::io;
use std::os::fd::BorrowedFd;

use weft_router::forward::Forwarder;
use weft_router::frame::Frame;
use weft_router::pool::Pool;
use weft_router::port::{BATCH, Batch, Capabilities, Outbox, Port, PortId, Queue, Received};
use weft_router::stats::{Stats, Tally};
use weft_router::{Instant, Tables};

/// A port with a ring to either side. See the module's essay.
pub struct RingPort {
    id: PortId,
    /// What was received, the latest first.
    pub rx: Vec<Frame>,
    /// What was sent.
    pub tx: Vec<Frame>,
}

impl RingPort {
    /// A port with empty rings.
    pub fn new(id: PortId) -> RingPort {
        RingPort { id, rx: Vec::with_capacity(4096), tx: Vec::with_capacity(4096) }
    }
}

impl Port for RingPort {
    fn receive(&mut self, _: &Pool, batch: &mut Batch, stats: &mut Stats) -> io::Result<Received> {
        let (mut frames, mut bytes) = (0, 0);
        for frame in std::iter::from_fn(|| self.rx.pop()).take(BATCH) {
            frames += 1;
            bytes += frame.len() as u64;
            batch.push(frame);
        }
        stats.received_plain(self.id, frames, bytes);
        Ok(if self.rx.is_empty() { Received::Drained } else { Received::More })
    }

    fn transmit(&mut self, queue: &mut Queue, stats: &mut Stats) -> io::Result<()> {
        let mut tally = Tally::default();
        while let Some(frame) = queue.pop_front() {
            tally.add(&frame, self.id, stats);
            self.tx.push(frame);
        }
        stats.sent_plain(tally, self.id);
        Ok(())
    }

    fn readable(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { partial_checksum: true, tcp4: true, tcp6: true, udp: true }
    }

    fn kind(&self) -> &'static str {
        "ring"
    }
}

/// What a worker has.
pub struct Worker {
    /// Forwards.
    pub forwarder: Forwarder,
    /// Where buffers come from.
    pub pool: Pool,
    /// What is to be sent.
    pub out: Outbox,
    /// What was received.
    pub batch: Batch,
}

/// Serves all ports until their rings are empty.
pub fn run(ports: &mut [RingPort], worker: &mut Worker, tables: &Tables, now: Instant) {
    let Worker { forwarder, pool, out, batch } = worker;
    for index in 0..ports.len() {
        loop {
            let received = ports[index].receive(pool, batch, forwarder.stats()).expect("a ring does not break");
            forwarder.forward_all(&mut batch.drain(..), tables, now, pool, out);
            while let Some(port) = out.touched() {
                ports[port.index()].transmit(out.queue(port), forwarder.stats()).expect("a ring does not break");
            }
            if received == Received::Drained {
                break;
            }
        }
    }
}
