//! Probes: questions of this node to others, and theirs to it ([`crate::probing`]).
//!
//! Questions are asked when somebody above says so. Theirs are answered here; the answers to ours wait until the worker takes them.

use arrayvec::ArrayVec;
use weft_encap::eth::ETH_LEN;

use super::{Forwarder, Round};
use crate::drop_reason::DropReason;
use crate::frame::Frame;
use crate::packet::Packet;
use crate::path::{Macs, Sender};
use crate::pool::Pool;
use crate::port::{BATCH, Outbox, PortId};
use crate::probing::{self as probe, Ends, Heard, LONGEST, Probe, Question};
use crate::tables::{Node, NodeId, Tables};
use crate::time::Instant;

/// What was heard in one vector.
pub type HeardAll = ArrayVec<Heard, BATCH>;

/// What is kept for it.
pub(super) struct Probing {
    /// Known to this process alone.
    secret: u64,
    heard: HeardAll,
    /// Where questions are written; made with the first.
    bytes: Vec<u8>,
}

impl Probing {
    pub(super) fn new(secret: u64) -> Probing {
        Probing { secret, heard: HeardAll::new(), bytes: Vec::new() }
    }
}

impl Forwarder {
    /// Asks a node a question, if it is there and has an address of our family.
    pub fn ask(&mut self, question: &Question, tables: &Tables, now: Instant, pool: &Pool, out: &mut Outbox) {
        let Some((node, port)) = way_to(question.node, tables) else { return };
        let Some(from) = tables.address else { return };
        let (ends, macs) = (Ends { from, to: node.underlay }, Macs { dst: node.vtep_mac, src: tables.vtep_mac });
        self.probing.bytes.resize(ETH_LEN + LONGEST as usize, 0);
        let Probing { secret, bytes, .. } = &mut self.probing;
        let Some(len) = probe::write(question, ends, macs, now, *secret, bytes) else { return };
        let Some(frame) = Frame::from_bytes(&bytes[..len], port, pool) else { return };
        self.stats.port(port).replies += 1;
        // Each takes another of the ways that there are for flows.
        self.send_whole(question.node, frame, question.number as u16, tables, out);
    }

    /// What was heard, for whoever takes it away.
    pub fn heard(&mut self) -> &mut HeardAll {
        &mut self.probing.heard
    }

    /// Answers a question, or keeps an answer.
    pub(super) fn probe(&mut self, mut frame: Frame, packet: &Packet, round: &Round<'_>, out: &mut Outbox) {
        let tables = round.tables;
        let (Sender::Node(id), Some(ip)) = (packet.sender, packet.ip()) else {
            return self.stats.drop(frame, DropReason::NotForUs);
        };
        self.stats.node(id).probes += 1;
        match probe::read(&frame, ip, id, self.probing.secret) {
            Ok(Probe::Answer(to, sent)) => {
                // More than a vector can bring are not kept: they are asked again.
                let _ = self.probing.heard.try_push(Heard::Answer { to, sent, at: round.now });
                self.stats.drop(frame, DropReason::Answered);
            }
            Ok(Probe::Question) => {
                let _ = self.probing.heard.try_push(Heard::Question(id));
                let ends = Ends { from: ip.dst, to: ip.src };
                let macs = Macs { dst: packet.src, src: tables.vtep_mac };
                let port = frame.ingress();
                match probe::answer(&mut frame, ip, ends, macs) {
                    Ok(()) => {
                        self.stats.ended(port, DropReason::Answered);
                        self.stats.port(port).replies += 1;
                        self.send_whole(id, frame, to_entropy(ip.ports), tables, out);
                    }
                    Err(reason) => self.stats.drop(frame, reason),
                }
            }
            Err(reason) => self.stats.drop(frame, reason),
        }
    }

    /// Sends a probe, which is no traffic.
    fn send_whole(&mut self, id: NodeId, mut frame: Frame, entropy: u16, tables: &Tables, out: &mut Outbox) {
        let Some((node, underlay)) = way_to(id, tables) else {
            return self.stats.drop(frame, DropReason::NoRoute);
        };
        match crate::tunnel::encapsulate(&mut frame, node, tables, entropy) {
            Ok(()) => {
                frame.is_probe = true;
                self.push(underlay, frame, out);
            }
            Err(reason) => self.stats.drop(frame, reason),
        }
    }
}

/// A node, and the port by which frames to it leave.
fn way_to(id: NodeId, tables: &Tables) -> Option<(&Node, PortId)> {
    let node = tables.node(id)?;
    Some((node, tables.tunnels[node.encap as usize]?))
}

/// Whether a packet of this node is a probe for us.
pub(super) fn is_for_us(packet: &Packet, node: &Node, tables: &Tables) -> bool {
    let (Some(ip), Some(to)) = (packet.ip(), tables.address) else { return false };
    probe::is_probe(ip, Ends { from: node.underlay, to })
}

/// An answer takes the way of its question, as far as that is known.
fn to_entropy(ports: Option<(u16, u16)>) -> u16 {
    ports.map_or(0, |(source, _)| source)
}
