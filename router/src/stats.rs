//! Counters: what came in by each port, and what became of it.
//!
//! The invariant, exactly, per ingress port and whenever no frame is in flight:
//! `received + created = sent + dropped + merged`. A frame is counted under the port by which it (or the
//! frame that caused it) came in, wherever it ends.

use crate::drop_reason::DropReason;
use crate::frame::Frame;
use crate::port::PortId;
use crate::tables::NodeId;
use crate::time::Instant;

/// What entered by one port, and what became of it; and what was written out by it.
#[derive(Copy, Clone, Debug)]
pub struct PortStats {
    /// Frames that came in by this port.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Frames made here because of frames of this port: flood copies.
    pub copies: u64,
    /// Replies, ICMP errors, and questions to other nodes made here.
    pub replies: u64,
    /// Segments that software segmentation made beyond the one that came in.
    pub splits: u64,
    /// Frames of this port that left by any port.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Frames of this port that became part of a superframe.
    pub merged: u64,
    /// Ends, indexed by [`DropReason`].
    pub dropped: [u64; DropReason::COUNT],
    /// Frames written out by this port, whoever sent them.
    pub out: u64,
    /// Their bytes.
    pub out_bytes: u64,
    /// Frames that the kernel dropped before we read them, because its receive buffer was full. They were never received, so they
    /// are no part of the invariant.
    pub overruns: u64,
    /// Frames that left by this port and that the kernel then dropped, as far as it says so: the device was down or its queue full. They
    /// count as sent.
    pub undelivered: u64,
}

impl Default for PortStats {
    fn default() -> Self {
        PortStats {
            received: 0,
            received_bytes: 0,
            copies: 0,
            replies: 0,
            splits: 0,
            sent: 0,
            sent_bytes: 0,
            merged: 0,
            dropped: [0; DropReason::COUNT],
            out: 0,
            out_bytes: 0,
            overruns: 0,
            undelivered: 0,
        }
    }
}

impl PortStats {
    /// Copies, replies, errors and splits.
    pub fn created(&self) -> u64 {
        self.copies + self.replies + self.splits
    }

    /// All ends.
    pub fn dropped_total(&self) -> u64 {
        self.dropped.iter().sum()
    }

    /// Frames that are still on their way: zero when nothing is in flight. Negative if a frame was counted twice.
    pub fn in_flight(&self) -> i64 {
        (self.received + self.created()) as i64 - (self.sent + self.dropped_total() + self.merged) as i64
    }
}

impl std::ops::AddAssign<&PortStats> for PortStats {
    fn add_assign(&mut self, more: &PortStats) {
        // Taken apart, so that a counter that is added there is not forgotten here.
        let PortStats {
            received,
            received_bytes,
            copies,
            replies,
            splits,
            sent,
            sent_bytes,
            merged,
            dropped,
            out,
            out_bytes,
            overruns,
            undelivered,
        } = more;
        self.received += received;
        self.received_bytes += received_bytes;
        self.copies += copies;
        self.replies += replies;
        self.splits += splits;
        self.sent += sent;
        self.sent_bytes += sent_bytes;
        self.merged += merged;
        self.dropped.iter_mut().zip(dropped).for_each(|(sum, more)| *sum += more);
        self.out += out;
        self.out_bytes += out_bytes;
        self.overruns += overruns;
        self.undelivered += undelivered;
    }
}

/// Traffic with one node.
#[derive(Copy, Clone, Debug, Default)]
pub struct NodeStats {
    /// Frames sent to it.
    pub sent: u64,
    /// Frames received from it and accepted.
    pub received: u64,
    /// Probes among these.
    pub probes: u64,
    /// When the last one was received.
    pub last_seen: Option<Instant>,
}

impl NodeStats {
    /// A frame came from it and was accepted.
    pub fn heard(&mut self, now: Instant) {
        self.received += 1;
        self.last_seen = Some(now);
    }
}

/// Frames from one port that leave by another, one after the other: counted together, since a vector comes from one port.
#[derive(Copy, Clone, Debug, Default)]
pub struct Tally {
    from: PortId,
    frames: u64,
    bytes: u64,
}

impl Tally {
    /// Adds a frame that leaves by `by`; what was counted of another port's frames goes to `stats` before.
    #[inline(always)]
    pub fn add(&mut self, frame: &Frame, by: PortId, stats: &mut Stats) {
        let from = frame.ingress();
        if from != self.from {
            stats.sent_plain(std::mem::take(self), by);
            self.from = from;
        }
        self.frames += 1;
        self.bytes += frame.len() as u64;
    }
}

/// All counters of a worker.
#[derive(Debug, Default)]
pub struct Stats {
    ports: Vec<PortStats>,
    nodes: Vec<NodeStats>,
}

impl Stats {
    /// Counters of a port; made on first use, so the caller bounds port numbers.
    pub fn port(&mut self, id: PortId) -> &mut PortStats {
        let index = id.index();
        if index >= self.ports.len() {
            self.ports.resize_with(index + 1, PortStats::default);
        }
        &mut self.ports[index]
    }

    /// Counters of a port, or zeros.
    pub fn of(&self, id: PortId) -> PortStats {
        self.ports.get(id.index()).copied().unwrap_or_default()
    }

    /// Sets a port's counters back to zero, for a number that is used again. Returns what they were.
    pub fn reset(&mut self, id: PortId) -> PortStats {
        std::mem::take(self.port(id))
    }

    /// Counters of a node.
    pub fn node(&mut self, id: NodeId) -> &mut NodeStats {
        let index = id.index();
        if index >= self.nodes.len() {
            self.nodes.resize_with(index + 1, NodeStats::default);
        }
        &mut self.nodes[index]
    }

    /// All nodes' counters, indexed by [`NodeId`].
    pub fn nodes(&self) -> &[NodeStats] {
        &self.nodes
    }

    /// Counts frames taken in: `frame` may stand for several that were merged on the way in.
    pub fn received(&mut self, frame: &Frame) {
        let merged = u64::from(frame.merged());
        let bytes = frame.len() as u64;
        let port = self.port(frame.ingress());
        port.received += 1 + merged;
        port.received_bytes += bytes;
        port.merged += merged;
    }

    /// Counts frames taken in by one port of which none was merged.
    pub fn received_plain(&mut self, by: PortId, frames: u64, bytes: u64) {
        let port = self.port(by);
        port.received += frames;
        port.received_bytes += bytes;
    }

    /// Counts frames that left by `by` as they were.
    pub fn sent_plain(&mut self, tally: Tally, by: PortId) {
        let from = self.port(tally.from);
        from.sent += tally.frames;
        from.sent_bytes += tally.bytes;
        let out = self.port(by);
        out.out += tally.frames;
        out.out_bytes += tally.bytes;
    }

    /// Counts a frame that left by `by` as `pieces` frames on the wire (more than one if the port segmented it).
    pub fn sent(&mut self, frame: Frame, by: PortId, pieces: u64) {
        let bytes = frame.len() as u64;
        let from = self.port(frame.ingress());
        from.splits += pieces.saturating_sub(1);
        from.sent += pieces.max(1);
        from.sent_bytes += bytes;
        let out = self.port(by);
        out.out += pieces.max(1);
        out.out_bytes += bytes;
    }

    /// Counts a frame that was cut into `sent + failed` segments, of which `failed` could not be sent for `reason`. Bytes are
    /// counted in proportion.
    pub fn sent_in_part(&mut self, frame: Frame, by: PortId, sent: u64, failed: u64, reason: DropReason) {
        let total = sent + failed;
        let bytes = (frame.len() as u64 * sent).checked_div(total).unwrap_or(0);
        let from = self.port(frame.ingress());
        from.splits += total.saturating_sub(1);
        from.sent += sent;
        from.sent_bytes += bytes;
        from.dropped[reason as usize] += failed;
        let out = self.port(by);
        out.out += sent;
        out.out_bytes += bytes;
    }

    /// Ends a frame.
    pub fn drop(&mut self, frame: Frame, reason: DropReason) {
        self.port(frame.ingress()).dropped[reason as usize] += 1;
    }

    /// Counts an end for which no [`Frame`] is left, or whose frame lives on as something else.
    pub fn ended(&mut self, ingress: PortId, reason: DropReason) {
        self.port(ingress).dropped[reason as usize] += 1;
    }

    /// Counts the end of a frame that never became a [`Frame`], for example for want of a buffer.
    pub fn lost(&mut self, ingress: PortId, reason: DropReason) {
        let port = self.port(ingress);
        port.received += 1;
        port.dropped[reason as usize] += 1;
    }
}
