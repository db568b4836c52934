//! What a worker tells of other nodes: with whom there is traffic, and what became of probes.
//!
//! Who follows the ways to other nodes asks about those alone with which pods speak, so it has to know. Counters are compared
//! now and then while there is something to do, and a worker that sleeps tells nothing. What nobody takes in time is lost: traffic
//! goes on, and probes are asked again.

use crossbeam::channel::Sender;
use std::time::Duration;

use crate::probing::Heard;
use crate::stats::NodeStats;
use crate::tables::NodeId;
use crate::time::Instant;

/// How often counters are compared at most.
const EACH: Duration = Duration::from_millis(50);

/// What is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// Pods have exchanged frames with these nodes lately.
    Traffic(Vec<NodeId>),
    /// Something came of a probe.
    Heard(Heard),
}

/// What a worker has told.
pub(super) struct Telling {
    to: Sender<News>,
    /// Frames to and from each node.
    known: Vec<u64>,
    told: Option<Instant>,
    /// Whether frames came since.
    waits: bool,
}

impl Telling {
    pub(super) fn new(to: Sender<News>) -> Telling {
        Telling { to, known: Vec::new(), told: None, waits: false }
    }

    pub(super) fn heard(&self, all: impl Iterator<Item = Heard>) {
        all.for_each(|heard| drop(self.to.try_send(News::Heard(heard))));
    }

    /// When counters are to be compared although no more frames come.
    pub(super) fn due(&self) -> Option<Instant> {
        self.told.filter(|_| self.waits).map(|told| told + EACH)
    }

    /// Tells of the nodes whose counters have changed, if it is time for it.
    pub(super) fn traffic(&mut self, nodes: &[NodeStats], now: Instant) {
        if self.told.is_some_and(|told| now.since(told) < EACH) {
            self.waits = true;
            return;
        }
        (self.told, self.waits) = (Some(now), false);
        self.known.resize(nodes.len(), 0);
        let mut busy = Vec::new();
        for (id, (known, stats)) in (0..).map(NodeId).zip(self.known.iter_mut().zip(nodes)) {
            // Probes are no traffic: else they would cause each other for ever.
            let frames = stats.sent + stats.received - stats.probes;
            if std::mem::replace(known, frames) != frames {
                busy.push(id);
            }
        }
        if !busy.is_empty() {
            drop(self.to.try_send(News::Traffic(busy)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam::channel;

    #[test]
    fn nodes_with_traffic_are_told_of_now_and_then_and_probes_are_none() {
        let (to, told) = channel::bounded(2);
        let mut telling = Telling::new(to);
        let mut nodes = vec![NodeStats::default(); 3];
        let at = |millis: u64| Instant(1) + Duration::from_millis(millis);
        telling.traffic(&nodes, at(0));
        nodes[1].sent = 1;
        assert_eq!(telling.due(), None);
        telling.traffic(&nodes, at(49));
        assert!(told.is_empty());
        assert_eq!(telling.due(), Some(at(50)), "if nothing more comes");
        telling.traffic(&nodes, at(50));
        assert_eq!(told.try_recv(), Ok(News::Traffic(vec![NodeId(1)])));
        (nodes[2].received, nodes[2].probes) = (5, 5);
        telling.traffic(&nodes, at(100));
        assert!(told.is_empty());
        (nodes[0].sent, nodes[2].received) = (9, 6);
        telling.traffic(&nodes, at(150));
        assert_eq!(told.try_recv(), Ok(News::Traffic(vec![NodeId(0), NodeId(2)])));
    }

    #[test]
    fn a_reader_that_is_late_costs_what_is_too_much_and_holds_up_nobody() {
        let (to, told) = channel::bounded(2);
        let telling = Telling::new(to);
        telling.heard((0..5).map(|number| Heard::Question(NodeId(number))));
        assert_eq!(told.len(), 2);
    }
}
