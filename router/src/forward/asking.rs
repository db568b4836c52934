//! What a decision asks about a packet's flow, and what is remembered of the answer.
//!
//! [`Asking`] is made before anything is asked: it has the versions of what is then asked, so that whatever changes meanwhile makes the
//! answer stale.

use super::{Forwarder, leaving, returning};
use crate::conntrack;
use crate::flow::Signature;
use crate::packet::Packet;
use crate::path::{Commit, Entrance, FlowCommit, Hop, Learned, Path, Verdict};
use crate::tables::Tables;
use crate::time::Instant;

/// A packet, its flow, and when it is asked about.
pub(super) struct Asking<'a> {
    pub(super) packet: &'a Packet,
    pub(super) tables: &'a Tables,
    pub(super) now: Instant,
    /// With its hash; none if it is not IP.
    flow: Option<(Signature, u64)>,
    /// Its sender's MAC is learned.
    teaches: bool,
    fdb_version: u64,
    returns_version: u32,
}

impl Asking<'_> {
    /// The flow's hash: it chooses among next hops, and gives the tunnel's outer source port.
    pub(super) fn hash(&self) -> u64 {
        self.flow.map_or(0, |(_, hash)| hash)
    }

    /// The flow is to be entered in the cache with this path.
    #[inline(always)]
    pub(super) fn opens(&self, path: Path, learned: Option<Learned>, entrance: Entrance) -> FlowCommit {
        let (Some((signature, hash)), Path { hop: Hop::Port(_) | Hop::Node(_), .. }) = (self.flow, path) else {
            return FlowCommit::None;
        };
        let tie = returning::tie(entrance, self.packet, self.tables);
        let Asking { teaches, fdb_version, returns_version, .. } = *self;
        let epoch = self.tables.epoch;
        FlowCommit::Open(signature, hash, Verdict { path, learned, teaches, epoch, fdb_version, tie, returns_version })
    }
}

impl Forwarder {
    #[inline(always)]
    pub(super) fn asking<'a>(&self, packet: &'a Packet, teaches: bool, tables: &'a Tables, now: Instant) -> Asking<'a> {
        let flow = Signature::of(packet).map(|signature| (signature, self.conntrack.hash(&signature)));
        let (fdb_version, returns_version) = (self.fdb.version(), self.returns.version());
        Asking { packet, tables, now, flow, teaches, fdb_version, returns_version }
    }

    /// The way of a packet that goes back: what an uplink brought to the pod whose session it is, or to the kernel; a reply to what the
    /// host port brought by that port.
    #[inline(always)]
    pub(super) fn goes_back(&self, asking: &Asking<'_>) -> Option<(Path, Commit)> {
        if leaving::came_back(asking.packet, asking.tables).is_some() {
            return Some(self.back_to_pod(asking));
        }
        let (path, opening) = self.way_back(asking.packet, asking.tables, asking.now)?;
        let entrance = Entrance::Reply(opening);
        // What has no ports is asked about each time: its flow may hold several conversations.
        let has_ports = asking.packet.ip().is_some_and(|ip| ip.ports.is_some());
        let flow = if has_ports { asking.opens(path, None, entrance) } else { FlowCommit::None };
        Some((path, Commit { entrance, flow, ..Commit::default() }))
    }

    /// The path that the flow's first packet was given, if the tables and the MAC that it rests on still hold.
    #[inline(always)]
    pub(super) fn known(&self, asking: &Asking<'_>) -> Option<(Path, FlowCommit)> {
        let (signature, hash) = asking.flow?;
        if asking.tables.host.is_some() && asking.packet.ip().is_some_and(returning::begins) {
            return None;
        }
        let slot = self.conntrack.find(&signature, hash)?;
        let holds = self.holds(slot, asking.tables, asking.now);
        holds.then(|| (self.conntrack.path(slot, hash), FlowCommit::Seen(slot)))
    }

    /// The way of a first packet: by the kernel if another node says it in its own name, out of the cluster in the node's name, else by the FDB if it is addressed to a MAC of its segment, by the
    /// routes if to the router.
    #[inline(always)]
    pub(super) fn first(
        &self,
        to: &super::AddressedTo,
        entrance: Entrance,
        asking: &Asking<'_>,
    ) -> Result<(Path, Commit), crate::drop_reason::DropReason> {
        let Asking { packet, tables, now, .. } = *asking;
        if let Some(path) = returning::by_kernel(packet, tables) {
            return Ok((path, Commit { flow: asking.opens(path, None, entrance), ..Commit::default() }));
        }
        let ((hop, rewrite, learned), masquerade) = match self.leaving(to, asking)? {
            Some(leaving) => leaving,
            None => (self.find_hop(packet, to, tables, asking.hash(), now)?, Default::default()),
        };
        let path = Path { hop, rewrite, entropy: conntrack::entropy(asking.hash()) };
        let copies = super::receivers(hop, packet, tables);
        if copies > 0 {
            self.within_budget(packet, tables, now)?;
        }
        Ok((path, Commit { copies, masquerade, flow: asking.opens(path, learned, entrance), ..Commit::default() }))
    }
}
