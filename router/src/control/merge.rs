//! What several workers say about the same thing, as one.

use std::collections::BTreeMap;

use super::{PortSnapshot, Snapshot};
use crate::port::Capabilities;
use crate::stats::NodeStats;

/// All workers' states as one; `None` if there is none.
pub(super) fn snapshots(all: Vec<Snapshot>) -> Option<Snapshot> {
    let mut all = all.into_iter();
    let mut sum = all.next()?;
    let mut ports: BTreeMap<_, _> = sum.ports.drain(..).map(|port| (port.id, port)).collect();
    for more in all {
        sum.now = sum.now.max(more.now);
        sum.epoch = sum.epoch.min(more.epoch);
        sum.workers += more.workers;
        for port in more.ports {
            ports.entry(port.id).and_modify(|sum| add_port(sum, &port)).or_insert(port);
        }
        add_nodes(&mut sum.nodes, &more.nodes);
        sum.flows.extend(more.flows);
        sum.huge_pages += more.huge_pages;
        sum.free = (sum.free.0 + more.free.0, sum.free.1 + more.free.1);
    }
    sum.ports = ports.into_values().collect();
    Some(sum)
}

fn add_port(sum: &mut PortSnapshot, more: &PortSnapshot) {
    sum.up &= more.up;
    let (a, b) = (sum.capabilities, more.capabilities);
    sum.capabilities = Capabilities {
        partial_checksum: a.partial_checksum && b.partial_checksum,
        tcp4: a.tcp4 && b.tcp4,
        tcp6: a.tcp6 && b.tcp6,
        udp: a.udp && b.udp,
    };
    sum.stats += &more.stats;
}

fn add_nodes(sum: &mut Vec<NodeStats>, more: &[NodeStats]) {
    sum.resize_with(sum.len().max(more.len()), NodeStats::default);
    for (sum, NodeStats { sent, received, probes, last_seen }) in sum.iter_mut().zip(more) {
        sum.sent += sent;
        sum.received += received;
        sum.probes += probes;
        sum.last_seen = sum.last_seen.max(*last_seen);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::PortId;
    use crate::stats::PortStats;
    use crate::time::Instant;

    const ALL: Capabilities = Capabilities { partial_checksum: true, tcp4: true, tcp6: true, udp: true };

    fn port(id: u16, up: bool, received: u64) -> PortSnapshot {
        let mut stats = PortStats { received, sent: received - 1, ..PortStats::default() };
        stats.dropped[3] = 1;
        PortSnapshot { id: PortId(id), kind: "tap", up, worker: None, capabilities: ALL, stats }
    }

    fn node(sent: u64, last_seen: Option<u64>) -> NodeStats {
        NodeStats { sent, received: 1, probes: 0, last_seen: last_seen.map(Instant) }
    }

    fn snapshot(now: u64, epoch: u64, ports: Vec<PortSnapshot>, nodes: Vec<NodeStats>) -> Snapshot {
        let (fdb, flows) = (Vec::new(), Vec::new());
        Snapshot {
            now: Instant(now),
            epoch,
            workers: 1,
            ports,
            nodes,
            fdb,
            flows,
            returns: crate::returns::ReturnsUse::default(),
            huge_pages: 1,
            free: (5, 2),
        }
    }

    #[test]
    fn counters_add_up_and_the_worst_state_counts() {
        let first = snapshot(7, 4, vec![port(0, true, 10), port(2, true, 5)], vec![node(1, None)]);
        let mut second =
            snapshot(9, 3, vec![port(0, true, 20), port(2, false, 1)], vec![node(2, Some(8)), node(3, None)]);
        second.ports[0].capabilities.udp = false;
        let sum = snapshots(vec![first, second]).unwrap();
        assert_eq!((sum.now, sum.epoch, sum.workers, sum.free), (Instant(9), 3, 2, (10, 4)));
        assert_eq!(sum.huge_pages, 2);
        let of =
            |port: &PortSnapshot| (port.id.0, port.up, port.stats.received, port.stats.sent, port.stats.dropped[3]);
        assert_eq!(sum.ports.iter().map(of).collect::<Vec<_>>(), [(0, true, 30, 28, 2), (2, false, 6, 4, 2)]);
        assert!(sum.ports.iter().all(|port| port.stats.in_flight() == 0));
        assert_eq!(sum.ports[0].capabilities, Capabilities { udp: false, ..ALL });
        let of = |node: &NodeStats| (node.sent, node.received, node.last_seen.map(|seen| seen.0));
        assert_eq!(sum.nodes.iter().map(of).collect::<Vec<_>>(), [(3, 2, Some(8)), (3, 1, None)]);
        assert!(snapshots(Vec::new()).is_none());
    }
}
