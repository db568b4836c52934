//! The way of a frame whose flow is known: looked at, recognised, and sent after the others.
//!
//! It does for most frames what [`Forwarder::forward`]'s thorough way does, with the same result and the same counters, for a
//! fifth of the cost: a signature's entry in the flow cache answers every question but those about the single packet, and
//! [`crate::glimpse`] has asked those.

use std::net::IpAddr;
use std::time::Duration;

use super::Forwarder;
use super::leaving::tcp_flags;
use super::returning::is_tied;
use crate::bridge::Fdb;
use crate::conntrack::{self, Entry, To};
use crate::frame::Frame;
use crate::glimpse::{Glimpse, glimpse};
use crate::nat::Place;
use crate::packet::L3;
use crate::path::Sender;
use crate::port::Outbox;
use crate::tables::{NodeId, Tables};
use crate::time::Instant;
use crate::{nat, tunnel};

/// How often the FDB is told of a MAC whose flow is known: it counts ages in seconds.
const TEACH_EACH: Duration = Duration::from_secs(1);

impl Forwarder {
    /// Looks at a frame's headers, and has what the flow cache says about them fetched. What is not understood gets the length zero.
    #[inline(always)]
    pub(super) fn look(&mut self, frame: &Frame, tables: &Tables, seen: &mut Glimpse) {
        if self.read(frame, tables, seen).is_none() {
            seen.len = 0;
        }
    }

    #[inline(always)]
    fn read(&mut self, frame: &Frame, tables: &Tables, seen: &mut Glimpse) -> Option<()> {
        let (meta, head) = frame.parts();
        let (start, sender) = match &meta.outer {
            None => (0, Sender::Port(meta.ingress())),
            Some(outer) => (tunnel::plain(outer, head, tables)?, Sender::Node(self.member(&outer.peer, tables)?)),
        };
        glimpse(meta, head, start, sender, self.conntrack.seed(), seen)?;
        self.conntrack.prefetch(seen.hash);
        Some(())
    }

    /// Vectors come from few nodes: the last one is remembered.
    #[inline(always)]
    fn member(&mut self, peer: &IpAddr, tables: &Tables) -> Option<NodeId> {
        let (known, epoch, node) = &self.last_member;
        if known == peer && *epoch == tables.epoch {
            return Some(*node);
        }
        let node = tunnel::member(*peer, tables)?;
        self.last_member = (*peer, tables.epoch, node);
        Some(node)
    }

    /// Sends a frame that was looked at where its flow goes, if the cache knows and this packet may go there; otherwise gives it
    /// back as it was. Does what `nat::rewrite`, `commit` and `emit` do, for the few paths that the cache can hold.
    #[inline(always)]
    pub(super) fn follow(
        &mut self,
        mut frame: Frame,
        seen: &Glimpse,
        tables: &Tables,
        now: Instant,
        out: &mut Outbox,
    ) -> Result<(), Frame> {
        if seen.len == 0 {
            return Err(frame);
        }
        let Some(slot) = self.conntrack.find(&seen.signature, seen.hash) else { return Err(frame) };
        let entry = self.conntrack.entry_mut(slot);
        let routed = entry.is_routed();
        let fits = seen.wire_size <= entry.mtu() && (!routed || seen.ttl > 1);
        if !fits || !entry.is_of(tables.epoch) || (entry.rests() && !confirm(entry, &self.fdb, now)) {
            return Err(frame);
        }
        if entry.asks(|| self.returns.version(), now) && !is_tied(entry, &seen.signature, &self.returns, now) {
            return Err(frame);
        }
        let translation = match entry.translated() {
            None => None,
            Some((handle, side)) => {
                let (l4, protocol) = (usize::from(seen.start) + seen.l4(), entry.protocol());
                let passed = self.snat.pass(handle, side, tcp_flags(&frame, l4, protocol), now);
                if passed.is_none() {
                    return Err(frame);
                }
                passed
            }
        };
        entry.seen(seen.len as usize, now);
        let to = entry.to();
        frame.strip(seen.start.into(), seen.len as usize);
        if let Some(gso) = &mut frame.offload.gso {
            gso.header_len = seen.header_len;
        }
        if routed && let Some(macs) = entry.routed() {
            nat::route(frame.head_mut(), macs, seen.v4);
        }
        if let Some(translation) = &translation {
            let place = Place { l3: L3, l4: seen.l4(), protocol: seen.signature.protocol() };
            let partial = frame.offload.partial.is_some();
            nat::translate(frame.head_mut(), place, translation, partial);
        }
        if seen.start > 0 {
            self.hear(seen, slot, now);
        }
        match to {
            To::Port(port) => self.push(port, frame, out),
            To::Node(node) => self.send(node, frame, conntrack::entropy(seen.hash), tables, out),
        }
        Ok(())
    }

    /// Whether what is known of a flow may still be used; asks without noting the answer.
    pub(super) fn holds(&self, slot: usize, tables: &Tables, now: Instant) -> bool {
        let entry = self.conntrack.entry(slot);
        let unmoved = |learned| entry.fdb_version() == self.fdb.version() || self.fdb.holds(&learned, now);
        // What is translated is decided anew: it may have to be opened.
        entry.is_of(tables.epoch) && entry.translated().is_none() && entry.learned().is_none_or(unmoved)
    }

    /// A node sent a frame of a known flow: tells the FDB, if it may not know or is to be told again.
    fn hear(&mut self, seen: &Glimpse, slot: usize, now: Instant) {
        let Sender::Node(id) = seen.signature.sender() else { return };
        self.stats.node(id).heard(now);
        let entry = self.conntrack.entry_mut(slot);
        let Some(taught) = entry.taught() else { return };
        let version = self.fdb.version();
        if entry.fdb_version() != version || now.since(taught) >= TEACH_EACH {
            let (_, mac) = seen.signature.macs();
            self.fdb.learn(mac, id, now);
            entry.confirm(version);
            entry.teach(now);
        }
    }
}

/// Whether the learned MAC that a flow rests on is where it was; if so, that is not asked again until some MAC moves.
fn confirm(entry: &mut Entry, fdb: &Fdb, now: Instant) -> bool {
    let version = fdb.version();
    if entry.fdb_version() == version {
        return true;
    }
    let holds = entry.learned().is_some_and(|learned| fdb.holds(&learned, now));
    if holds {
        entry.confirm(version);
    }
    holds
}
