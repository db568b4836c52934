//! The way of one frame, from the port it came in on to the port it leaves by.
//!
//! Read [`Forwarder::forward`] from top to bottom: who sent it, is it for us, is it for everybody, is it known, where does
//! it go. Each step is a call into the module of the same name and yields a value or a [`DropReason`]. Then the frame is
//! rewritten once, and emitted. Nothing here touches a device, a clock or the heap.
//!
//! Most frames belong to a flow that took this way before. They are recognised by a look at their headers
//! ([`crate::glimpse`]) and follow the path that the flow cache has for them; whatever is not recognised, for any
//! reason, goes the whole way.

use std::sync::Arc;

use std::net::{IpAddr, Ipv4Addr};
use std::vec::Drain;

use weft_encap::mac::Mac;

use crate::bridge::{Fdb, FdbEntry};
use crate::budget::{Budgets, Told};
use crate::conntrack::{ConnTrack, FlowEntry};
use crate::control::RouterConfig;
use crate::drop_reason::DropReason;
use crate::flow::FlowKey;
use crate::frame::Frame;
use crate::gateway::Stack;
use crate::glimpse::Glimpse;
use crate::packet::{Ip, Packet};
use crate::path::{Commit, FlowCommit, Hop, Macs, MasqueradeCommit, Path, Reply, Rewrite, Sender, Translation};
use crate::policy::Known;
use crate::pool::Pool;
use crate::port::{BATCH, Outbox, PortId};
use crate::returns::{Returns, ReturnsUse};
use crate::snat::Snat;
use crate::snat::pieces::Pieces;
use crate::stats::Stats;
use crate::tables::{Mode, NodeId, Role, Tables};
use crate::time::Instant;
use crate::{icmp, nat, neigh, policy, tunnel};

mod asking;
mod hop;
mod known;
mod leaving;
mod probing;
mod returning;

/// What frames teach, and the counters.
pub struct Forwarder {
    conntrack: ConnTrack,
    fdb: Arc<Fdb>,
    returns: Arc<Returns>,
    snat: Arc<Snat>,
    pieces: Pieces,
    gateway: Stack,
    probing: probing::Probing,
    flood_budget: Budgets,
    icmp_budget: Budgets,
    told: Told,
    stats: Stats,
    /// The node that a frame came from last, and by which tables.
    last_member: (IpAddr, u64, NodeId),
    /// The port of the frame that is on its way.
    current: PortId,
    /// What a vector's frames looked like. Empty after a panic, and then made anew.
    seen: Vec<Glimpse>,
}

/// What frames teach all workers together.
#[derive(Clone)]
pub struct Memory {
    /// Learned MACs.
    pub fdb: Arc<Fdb>,
    /// What the host port brought.
    pub returns: Arc<Returns>,
    /// Who is who outside.
    pub snat: Arc<Snat>,
}

impl Memory {
    /// Empty tables of these sizes.
    pub fn new(config: &RouterConfig) -> Memory {
        Memory {
            fdb: Arc::new(Fdb::new(config.fdb_limit, config.fdb_age, config.seed)),
            returns: Arc::new(Returns::new(config.host_flows, config.seed)),
            snat: Arc::new(Snat::new(config.masquerade, config.seed)),
        }
    }
}

/// Whom a frame is addressed to, in its segment.
enum AddressedTo {
    /// Everybody: broadcast and multicast.
    Group,
    /// The router: it is routed on.
    Router,
    /// Somebody with this MAC: it is bridged.
    Neighbour(Mac),
}

impl Forwarder {
    /// Takes one frame and leaves zero or more in `out`. Never blocks, never fails.
    pub fn forward(&mut self, frame: Frame, tables: &Tables, now: Instant, pool: &Pool, out: &mut Outbox) {
        let mut seen = Glimpse::default();
        self.look(&frame, tables, &mut seen);
        if let Err(frame) = self.follow(frame, &seen, tables, now, out) {
            self.forward_thoroughly(frame, &Round { tables, now, pool }, out);
        }
    }

    /// Takes the frames of a vector in their order, as [`Forwarder::forward`] does; all are looked at before the first one goes, so
    /// that what the cache has about them is on its way from memory. If this panics, the frame at fault is gone from
    /// `frames`, and came in by [`Forwarder::current`].
    pub fn forward_all(
        &mut self,
        frames: &mut Drain<'_, Frame>,
        tables: &Tables,
        now: Instant,
        pool: &Pool,
        out: &mut Outbox,
    ) {
        let mut seen = std::mem::take(&mut self.seen);
        seen.resize(BATCH, Glimpse::default());
        while let Some(first) = frames.as_slice().first() {
            // A vector comes from one port.
            self.current = first.ingress();
            for (frame, seen) in frames.as_slice().iter().zip(&mut seen) {
                self.look(frame, tables, seen);
            }
            for (seen, frame) in seen.iter().zip(&mut *frames) {
                if let Err(frame) = self.follow(frame, seen, tables, now, out) {
                    self.forward_thoroughly(frame, &Round { tables, now, pool }, out);
                }
            }
        }
        self.seen = seen;
    }

    /// The whole way.
    fn forward_thoroughly(&mut self, mut frame: Frame, round: &Round<'_>, out: &mut Outbox) {
        let Round { tables, now, .. } = *round;
        let packet = match open(&mut frame, tables) {
            Ok(packet) => packet,
            Err(reason) => return self.stats.drop(frame, reason),
        };
        let mut mtu = u32::MAX;
        let outcome = self.decide(&packet, tables, now).and_then(|(mut path, mut commit)| {
            mtu = path.rewrite.mtu;
            nat::may_pass(&frame, &packet, &path.rewrite)?; // TTL, MTU
            let turned = self.commit(&mut path, &mut commit, &packet, &frame, now)?; // session, flow, learned MAC, budget
            nat::rewrite(&mut frame, &packet, &path.rewrite, turned.as_ref());
            nat::mss::clamp(&mut frame, &packet, hop::mtu_both_ways(&path, &packet, tables));
            Ok(path)
        });
        match outcome {
            Ok(path) => self.emit(frame, &packet, path, round, out),
            // Nothing was rewritten, so an ICMP error can quote the frame as it came.
            Err(reason) => self.refuse(frame, &packet, reason, mtu, round, out),
        }
    }

    /// Decides the whole way of a packet. Changes nothing: what must be remembered is in the [`Commit`].
    ///
    /// # Errors
    /// The reason for which the packet ends here.
    pub fn decide(&self, packet: &Packet, tables: &Tables, now: Instant) -> Result<(Path, Commit), DropReason> {
        // 1. Who sent it? What a node sent teaches where its MACs are.
        let learn = check_source(packet, tables)?;

        // 2. Is it for us? ARP, neighbour solicitations and pings to the gateway end here.
        let addressed_to = addressed_to(packet, tables)?;
        if let Some(hop) = for_us(packet, &addressed_to, tables) {
            return Ok((Path::unchanged(hop), Commit { learn, ..Commit::default() }));
        }

        // 3. For everybody: broadcast and multicast are bridged, within the port's budget.
        if let AddressedTo::Group = addressed_to {
            let (path, copies) = self.to_everybody(packet, tables, now)?;
            return Ok((path, Commit { learn, copies, ..Commit::default() }));
        }

        // 4. Does it go back? What an uplink brought to the pod whose session it is, a reply to what the host port brought by that port,
        //    whoever it is addressed to.
        let asking = self.asking(packet, learn.is_some(), tables, now);
        if let Some((path, commit)) = self.goes_back(&asking) {
            return Ok((path, Commit { learn, ..commit }));
        }

        // 5. Known flow: take the path that its first packet was given, if the tables and the MAC still hold.
        let entrance = self.entrance(packet, tables, now);
        if let Some((path, flow)) = self.known(&asking) {
            return Ok((path, Commit { learn, entrance, flow, ..Commit::default() }));
        }

        // 6. First packet, or not IP and hence no flow: out of the cluster in the node's name, else find the hop, by the FDB if it is
        //    addressed to a MAC of its segment, by the routes if to the router.
        let (path, commit) = self.first(&addressed_to, entrance, &asking)?;
        Ok((path, Commit { learn, entrance, ..commit }))
    }

    /// Remembers what a decision rested on and what it opened. What there is no room for is refused before anything is remembered.
    fn commit(
        &mut self,
        path: &mut Path,
        commit: &mut Commit,
        packet: &Packet,
        frame: &Frame,
        now: Instant,
    ) -> Result<Option<Translation>, DropReason> {
        let turned = match (&commit.masquerade, &path.rewrite.translation) {
            (MasqueradeCommit::None, None) => None,
            _ => self.in_session(path, commit, packet, now)?,
        };
        if let Sender::Node(id) = packet.sender {
            self.stats.node(id).heard(now);
        }
        if let Some((mac, node)) = commit.learn {
            self.fdb.learn(mac, node, now);
        }
        self.enter(commit.entrance, now);
        if commit.copies > 0 {
            // A superframe costs what it stands for.
            let segments = frame.offload.gso.map_or(1, |gso| frame.len().div_ceil(gso.size.into()) as u32);
            self.flood_budget.charge(frame.ingress(), commit.copies.saturating_mul(segments), now);
        }
        match &commit.flow {
            FlowCommit::None => {}
            FlowCommit::Seen(slot) => self.conntrack.entry_mut(*slot).seen(frame.len(), now),
            FlowCommit::Open(signature, hash, verdict) => {
                self.conntrack.open(*signature, *hash, verdict, frame.len(), now);
            }
        }
        Ok(turned)
    }

    /// Puts the rewritten frame where its path ends.
    fn emit(&mut self, frame: Frame, packet: &Packet, path: Path, round: &Round<'_>, out: &mut Outbox) {
        match path.hop {
            Hop::Port(port) => self.push(port, frame, out),
            Hop::Node(node) => self.send(node, frame, path.entropy, round.tables, out),
            Hop::Flood { ports, nodes } => self.flood(frame, packet, (ports, nodes), path.entropy, round, out),
            Hop::Reply(reply) => self.reply(frame, packet, reply, out),
            Hop::Gateway => self.serve(frame, packet, round, out),
            Hop::Probe => self.probe(frame, packet, round, out),
        }
    }

    /// Ends a frame, and tells its sender if that is due.
    fn refuse(
        &mut self,
        frame: Frame,
        packet: &Packet,
        reason: DropReason,
        mtu: u32,
        round: &Round<'_>,
        out: &mut Outbox,
    ) {
        let ingress = frame.ingress();
        // In bridged mode each node has the same gateway, and believes nobody who speaks as its own: other nodes are told nothing.
        let heard = matches!(packet.sender, Sender::Port(_)) || round.tables.mode == Mode::Routed;
        let is_due = heard && icmp::is_due(reason, packet) && self.icmp_budget.allows(ingress, round.now);
        if is_due && (reason != DropReason::MtuExceeded || self.is_news(packet, mtu, round.now)) {
            let gateway = &leaving::speaker(packet, round.tables);
            let (hop, macs) = back(packet, round.tables);
            if let Some(error) = icmp::error(reason, packet, &frame, mtu, gateway, macs, round.pool) {
                self.icmp_budget.charge(ingress, 1, round.now);
                self.stats.port(ingress).replies += 1;
                self.emit(error, packet, Path::unchanged(hop), round, out);
            }
        }
        self.stats.drop(frame, reason);
    }
}

// The questions that `decide` and `refuse` ask.
impl Forwarder {
    /// Whether a flow was not told of this MTU a moment ago: one that fills the way sends many such packets before it hears of it.
    fn is_news(&mut self, packet: &Packet, mtu: u32, now: Instant) -> bool {
        let flow = packet.ip().map_or(0, |ip| FlowKey::of(ip).hash(self.conntrack.seed()));
        self.told.is_news(flow ^ u64::from(mtu), now)
    }

    fn to_everybody(&self, packet: &Packet, tables: &Tables, now: Instant) -> Result<(Path, u32), DropReason> {
        if is_link_control(packet.dst) {
            return Err(DropReason::NotForwardable);
        }
        let hop = match (tables.mode, packet.sender) {
            (Mode::Routed, Sender::Node(_)) => return Err(DropReason::UnsupportedType),
            (Mode::Bridged, Sender::Node(_)) => match neigh::asked(packet, &tables.neighbours) {
                Some(pod) => return Ok((Path::unchanged(Hop::Port(pod.port)), 0)),
                None => Hop::Flood { ports: true, nodes: false },
            },
            (Mode::Routed, Sender::Port(_)) => Hop::Flood { ports: true, nodes: false },
            (Mode::Bridged, Sender::Port(_)) => Hop::Flood { ports: true, nodes: true },
        };
        let copies = receivers(hop, packet, tables);
        if copies == 0 {
            return Err(DropReason::NoReceiver);
        }
        self.within_budget(packet, tables, now)?;
        let mtu = if let Hop::Flood { nodes: true, .. } = hop { tables.tunnel_mtu } else { u32::MAX };
        Ok((Path { hop, rewrite: Rewrite::bridged(mtu), entropy: 0 }, copies))
    }

    fn within_budget(&self, packet: &Packet, tables: &Tables, now: Instant) -> Result<(), DropReason> {
        let port = match packet.sender {
            Sender::Port(port) => port,
            Sender::Node(_) => tables.underlay.ok_or(DropReason::PortClosed)?,
        };
        if self.flood_budget.allows(port, now) { Ok(()) } else { Err(DropReason::FloodBudget) }
    }
}

// The ways by which `emit` lets a frame go.
impl Forwarder {
    #[inline(always)]
    fn push(&mut self, port: PortId, frame: Frame, out: &mut Outbox) {
        if let Err(frame) = out.push(port, frame) {
            self.stats.drop(frame, DropReason::QueueFull);
        }
    }

    fn send(&mut self, id: NodeId, mut frame: Frame, entropy: u16, tables: &Tables, out: &mut Outbox) {
        let way = tables.node(id).and_then(|node| Some((node, tables.tunnels[node.encap as usize]?)));
        let Some((node, underlay)) = way else {
            return self.stats.drop(frame, DropReason::NoRoute);
        };
        match tunnel::encapsulate(&mut frame, node, tables, entropy) {
            Ok(()) => {
                self.stats.node(id).sent += 1;
                self.push(underlay, frame, out);
            }
            Err(reason) => self.stats.drop(frame, reason),
        }
    }

    /// Copies go to all receivers but the last, which gets the frame itself.
    fn flood(
        &mut self,
        frame: Frame,
        packet: &Packet,
        to: (bool, bool),
        entropy: u16,
        round: &Round<'_>,
        out: &mut Outbox,
    ) {
        let tables = round.tables;
        let ports = tables.flood.iter().filter(|_| to.0).filter(|port| packet.sender != Sender::Port(**port));
        let nodes = (0..tables.nodes.len()).map(|index| NodeId(index as u16)).filter(|_| to.1);
        let nodes = nodes.filter(|id| tables.node(*id).is_some());
        let mut hops = ports.map(|port| Hop::Port(*port)).chain(nodes.map(Hop::Node)).peekable();
        let mut original = Some(frame);
        while let Some(hop) = hops.next() {
            let copy = match (&original, hops.peek()) {
                (Some(frame), Some(_)) => {
                    self.stats.port(frame.ingress()).copies += 1;
                    frame.copy(round.pool)
                }
                _ => original.take(),
            };
            match (copy, hop) {
                (Some(frame), Hop::Node(node)) => self.send(node, frame, entropy, tables, out),
                (Some(frame), Hop::Port(port)) => self.push(port, frame, out),
                // A copy that could not be made was counted as made, and ends for want of a buffer.
                (None, _) => {
                    self.stats.ended(original.as_ref().map_or(PortId(0), |frame| frame.ingress()), DropReason::NoBuffer)
                }
                (Some(frame), _) => self.stats.drop(frame, DropReason::NoReceiver),
            }
        }
        if let Some(frame) = original {
            self.stats.drop(frame, DropReason::NoReceiver);
        }
    }

    /// The question ends here, and an answer is made of it.
    fn reply(&mut self, mut frame: Frame, packet: &Packet, reply: Reply, out: &mut Outbox) {
        match neigh::write(&mut frame, packet, reply) {
            Ok(()) => {
                let port = frame.ingress();
                self.stats.ended(port, DropReason::Answered);
                self.stats.port(port).replies += 1;
                self.push(port, frame, out);
            }
            Err(reason) => self.stats.drop(frame, reason),
        }
    }

    fn serve(&mut self, frame: Frame, packet: &Packet, round: &Round<'_>, out: &mut Outbox) {
        let tables = round.tables;
        let (hop, macs) = back(packet, tables);
        let ingress = frame.ingress();
        // Whatever is not a ping is answered by an error, if at all.
        let is_ping = packet.ip().is_some_and(Ip::is_ping);
        if !is_ping && !self.icmp_budget.allows(ingress, round.now) {
            return self.stats.drop(frame, DropReason::GatewayRefused);
        }
        let answers = match self.gateway.serve(&frame, &tables.gateway, tables.tunnel_mtu, round.now) {
            Ok(answers) => answers,
            Err(reason) => return self.stats.drop(frame, reason),
        };
        let mut made = arrayvec::ArrayVec::<Option<Frame>, { crate::gateway::REPLIES }>::new();
        if !is_ping {
            self.icmp_budget.charge(ingress, answers.len() as u32, round.now);
        }
        for answer in answers {
            made.push(icmp::wrap(answer, macs, ingress, round.pool));
        }
        self.stats.drop(frame, DropReason::Answered);
        for answer in made {
            self.stats.port(ingress).replies += 1;
            match answer {
                Some(answer) => self.emit(answer, packet, Path::unchanged(hop), round, out),
                None => self.stats.ended(ingress, DropReason::NoBuffer),
            }
        }
    }
}

// What surrounds the way: making a forwarder, time, and what people ask.
impl Forwarder {
    /// A forwarder that knows nothing yet.
    pub fn new(config: &RouterConfig) -> Forwarder {
        Forwarder::sharing(Memory::new(config), config)
    }

    /// One that shares with others what frames teach.
    pub fn sharing(memory: Memory, config: &RouterConfig) -> Forwarder {
        let Memory { fdb, returns, snat } = memory;
        Forwarder {
            conntrack: ConnTrack::new(config.flows, config.seed),
            fdb,
            returns,
            snat,
            pieces: Pieces::default(),
            gateway: Stack::new(config.seed),
            probing: probing::Probing::new(config.probe_secret),
            flood_budget: Budgets::new(config.flood_rate),
            icmp_budget: Budgets::new(config.icmp_rate),
            told: Told::default(),
            stats: Stats::default(),
            last_member: (IpAddr::V4(Ipv4Addr::UNSPECIFIED), u64::MAX, NodeId(0)),
            current: PortId(0),
            seen: vec![Glimpse::default(); BATCH],
        }
    }

    /// The port by which the frame came in that [`Forwarder::forward_all`] has taken last.
    pub fn current(&self) -> PortId {
        self.current
    }

    /// Forgets what is too old. Returns when to call again; `None` if nothing is left that ages.
    pub fn tick(&mut self, now: Instant) -> Option<Instant> {
        [self.fdb.age(now), self.snat.tick(now)].into_iter().flatten().min()
    }

    /// A port begins anew, whose frames enter by so many workers: counters are zero, budgets are full.
    pub fn open_port(&mut self, port: PortId, workers: u32) {
        self.stats.reset(port);
        self.flood_budget.open(port, workers);
        self.icmp_budget.open(port, workers);
    }

    /// The counters.
    pub fn stats(&mut self) -> &mut Stats {
        &mut self.stats
    }

    /// The learned MACs.
    pub fn fdb(&self) -> Vec<FdbEntry> {
        self.fdb.entries().collect()
    }

    /// What is remembered of what the host port brought.
    pub fn returns(&self) -> ReturnsUse {
        self.returns.usage()
    }

    /// The flows that were seen within the last minutes.
    pub fn flows(&self, now: Instant) -> Vec<FlowEntry> {
        self.conntrack.entries(now).collect()
    }
}

/// What does not change while one frame passes.
struct Round<'a> {
    tables: &'a Tables,
    now: Instant,
    pool: &'a Pool,
}

/// Unwraps what came from the underlay, and checks the headers.
fn open(frame: &mut Frame, tables: &Tables) -> Result<Packet, DropReason> {
    let sender = match frame.outer {
        Some(outer) => tunnel::open(frame, outer, tables)?,
        None => Sender::Port(frame.ingress()),
    };
    Packet::parse(frame, sender)
}

fn check_source(packet: &Packet, tables: &Tables) -> Result<Option<(Mac, NodeId)>, DropReason> {
    let Tables { gateway, neighbours, macs, vtep_mac, .. } = tables;
    let known = Known { gateway, neighbours, macs, vtep_mac: *vtep_mac };
    match packet.sender {
        Sender::Port(port) => {
            match tables.role(port) {
                Some(Role::Pod(pod)) => policy::check_pod(pod, packet, known)?,
                Some(Role::Host(_)) if leaving::came_back(packet, tables).is_some() => {}
                Some(Role::Host(host)) => policy::check_host(host, packet, known)?,
                Some(Role::Underlay | Role::Uplink) | None => return Err(DropReason::PortClosed),
            }
            Ok(None)
        }
        Sender::Node(id) => {
            let node = tables.node(id).ok_or(DropReason::NotMember)?;
            policy::check_node(node, tables.mode, packet, known)?;
            Ok((tables.mode == Mode::Bridged).then_some((packet.src, id)))
        }
    }
}

fn addressed_to(packet: &Packet, tables: &Tables) -> Result<AddressedTo, DropReason> {
    let mac = packet.dst;
    match (packet.sender, tables.mode) {
        _ if mac.is_multicast() => Ok(AddressedTo::Group),
        (Sender::Port(_), _) if mac == tables.gateway.mac => Ok(AddressedTo::Router),
        // Between nodes in routed mode the inner MACs say nothing: only what is routed here arrives here.
        (Sender::Node(_), Mode::Routed) => Ok(AddressedTo::Router),
        (Sender::Node(_), Mode::Bridged) if mac == tables.vtep_mac => Ok(AddressedTo::Router),
        // The gateway's MAC is the same on each node, so a frame for it is meant for the sender's own.
        (Sender::Node(_), Mode::Bridged) if mac == tables.gateway.mac => Err(DropReason::NotForUs),
        _ => Ok(AddressedTo::Neighbour(mac)),
    }
}

fn for_us(packet: &Packet, addressed_to: &AddressedTo, tables: &Tables) -> Option<Hop> {
    if let Sender::Port(_) = packet.sender
        && let Some(reply) = neigh::answer(packet, &tables.gateway, &tables.neighbours)
    {
        return Some(Hop::Reply(reply));
    }
    if let Sender::Node(id) = packet.sender
        && tables.node(id).is_some_and(|node| probing::is_for_us(packet, node, tables))
    {
        return Some(Hop::Probe);
    }
    let ip = packet.ip()?;
    // In bridged mode each node has the same gateway: another node's pods have their own.
    let ours = matches!(packet.sender, Sender::Port(_)) || tables.mode == Mode::Routed;
    let here = ours && matches!(addressed_to, AddressedTo::Router) && tables.gateway.owns(ip.dst);
    here.then_some(Hop::Gateway)
}

/// The way back to a packet's sender, for what the router itself has to say.
fn back(packet: &Packet, tables: &Tables) -> (Hop, Macs) {
    match packet.sender {
        Sender::Port(_) if let Some(way) = leaving::came_back(packet, tables) => {
            (Hop::Port(way.port), Macs { dst: packet.src, src: way.mac })
        }
        Sender::Port(port) => (Hop::Port(port), Macs { dst: packet.src, src: tables.gateway.mac }),
        Sender::Node(node) => (Hop::Node(node), Macs { dst: packet.src, src: tables.vtep_mac }),
    }
}

/// How many copies are made; none of what is not for several.
fn receivers(hop: Hop, packet: &Packet, tables: &Tables) -> u32 {
    let Hop::Flood { ports, nodes } = hop else { return 0 };
    let own = usize::from(matches!(packet.sender, Sender::Port(_)));
    let ports = if ports { tables.flood.len().saturating_sub(own) } else { 0 };
    let nodes = if nodes { tables.members.len() } else { 0 };
    (ports + nodes) as u32
}

/// 01:80:c2:00:00:00 to 0f (IEEE 802.1Q, table 8-1): spanning tree, LACP, LLDP; never bridged.
fn is_link_control(mac: Mac) -> bool {
    mac.0[..5] == [0x01, 0x80, 0xc2, 0, 0] && mac.0[5] < 0x10
}
