//! The ways to other nodes, watched by asking: is a node there, how long does a packet take, how long may it be.
//!
//! What is asked and what follows from the answers is [`peer`]'s to say, of each node by itself and without a clock. Here are the clock, the
//! budget, and the thread. The data plane tells with whom there is traffic ([`News::Traffic`]), asks what we have it ask, and hands us
//! the answers ([`weft_router::probing`]). The thread sleeps while there is no traffic.
//!
//! All questions of a node together stay within [`BUDGET`]: so many nodes are asked every [`peer::EACH`], and one that goes away is noticed
//! within 300 ms; with more nodes that have traffic at the same time, each is asked more rarely, in proportion.
//!
//! What ways carry goes into the tables ([`Node::ways_changed`]), and pods are told when they send what is longer. That a node is
//! away has no consequences yet but for who looks: as long as there is one way only, it is used.

mod peer;
mod rtt;
mod search;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::Builder;
use std::time::Duration;

use anyhow::Context;
use weft_api::WayInfo;
use weft_router::probing::{self as probe, Heard, Question};
use weft_router::tables::{LEAST_V6, NodeId};
use weft_router::{Instant, News, Tables};

use crate::control::config::Config;
use crate::control::desired::NodeNumbers;
use crate::node::Node;
use peer::{Change, EACH, Look, Peer, State};

/// Questions per second, to all nodes together.
pub const BUDGET: u32 = 1000;
/// What may be asked at once beyond that: some searches for what a path carries.
const BURST: f64 = 300.0;
/// News that are taken in before it is looked what is due.
const AT_ONCE: usize = 256;
/// Questions that are due about now are asked together.
const TOGETHER: Duration = Duration::from_millis(2);

/// The ways to all nodes. See the module's essay.
#[derive(Debug, Default)]
pub struct Probing {
    ways: Mutex<Ways>,
}

/// What is known of them.
#[derive(Debug, Default)]
struct Ways {
    ways: BTreeMap<NodeId, Way>,
    /// Of which tables the nodes are.
    epoch: u64,
    /// What may be asked at once, and as of when.
    tokens: f64,
    at: Instant,
    asked: u64,
    answered: u64,
}

#[derive(Debug)]
struct Way {
    name: String,
    underlay: IpAddr,
    peer: Peer,
    /// What questions are wrapped in and pods' packets are not.
    beside: u32,
    /// What the underlay's device takes.
    device: u32,
    /// When it is to be looked at again.
    due: Option<Instant>,
}

/// What came of one look at all of them.
#[derive(Debug, Default)]
struct Round {
    questions: Vec<Question>,
    changes: Vec<(NodeId, Change)>,
    again: Option<Instant>,
}

/// Watches the ways to other nodes from now on.
///
/// # Errors
/// No thread can be started.
pub fn start(node: &Arc<Node>) -> anyhow::Result<()> {
    let news = node.router.news().clone();
    node.probing.round(node, Vec::new());
    let node: Weak<Node> = Arc::downgrade(node);
    let thread = Builder::new().name("weft-probes".into()).stack_size(512 << 10);
    let take = move |patience: Duration| match news.recv_timeout(patience) {
        Ok(first) => Some(std::iter::once(first).chain(news.try_iter().take(AT_ONCE)).collect()),
        Err(error) if error.is_timeout() => Some(Vec::new()),
        // The workers have ended.
        Err(_) => None,
    };
    thread.spawn(move || follow(&node, take)).context("cannot start a thread (ulimit -u)")?;
    Ok(())
}

/// `take` waits for news, for so long at most.
fn follow(node: &Weak<Node>, take: impl Fn(Duration) -> Option<Vec<News>>) {
    let mut patience = Duration::MAX;
    while let Some(news) = take(patience.min(Duration::from_secs(3600))) {
        let Some(node) = node.upgrade() else { return };
        let again = node.probing.round(&node, news);
        patience = again.map_or(Duration::MAX, |again| again.since(Instant::boottime()));
    }
}

impl Probing {
    /// Takes news in and does what is due. Says when to look again.
    fn round(&self, node: &Node, news: Vec<News>) -> Option<Instant> {
        let tables = node.router.tables();
        if self.lock().epoch != tables.epoch {
            let (config, nodes) = {
                let state = node.state();
                (Arc::clone(&state.desired.config), state.desired.nodes.clone())
            };
            self.lock().follow(&config, &nodes, &tables, Instant::boottime());
        }
        let round = self.lock().round(news, Instant::boottime());
        if !round.questions.is_empty() {
            node.router.ask(round.questions);
        }
        let (mut measured, mut wider) = (false, false);
        for (id, change) in round.changes {
            measured |= matches!(change, Change::Carries { .. } | Change::Up(None));
            wider |= matches!(change, Change::Carries { before, now } if now > before);
            self.lock().log(id, &change);
        }
        if measured {
            node.ways_changed();
        }
        if wider {
            node.forget_paths_in_pods();
        }
        round.again
    }

    /// What each way carries that was measured, by the node's underlay address, the outer IP header included. One that carries all that
    /// pods use counts as wide as the device: they may soon be wrapped in something else.
    pub fn measured(&self) -> BTreeMap<IpAddr, u32> {
        let ways = self.lock();
        let outer = |way: &Way| {
            let measured = way.peer.measured()? + way.peer.overhead();
            Some(if way.peer.narrow().is_none() { measured.max(way.device) } else { measured })
        };
        ways.ways.values().filter_map(|way| Some((way.underlay, outer(way)?))).collect()
    }

    /// Something changed here, so that ways may carry more than they did.
    pub fn try_rise(&self) {
        let now = Instant::boottime();
        self.lock().ways.values_mut().for_each(|way| way.peer.try_rise(now));
    }

    /// What is known of the way to a node.
    pub fn info(&self, id: NodeId) -> Option<WayInfo> {
        let (now, ways) = (Instant::boottime(), self.lock());
        ways.ways.get(&id).map(|way| way.info(now))
    }

    /// How many questions were asked and answered; how many nodes are asked, are away, and have a way that carries less than pods use.
    pub fn counts(&self) -> Counts {
        let (now, ways) = (Instant::boottime(), self.lock());
        let count = |is: &dyn Fn(&Peer) -> bool| ways.ways.values().filter(|way| is(&way.peer)).count();
        Counts {
            asked: ways.asked,
            answered: ways.answered,
            active: count(&|peer| peer.is_active(now)),
            away: count(&|peer| peer.state().0 == State::Away),
            narrow: count(&|peer| peer.narrow().is_some()),
        }
    }

    /// What is wrong with ways.
    pub fn problems(&self, here: &str) -> Vec<String> {
        self.lock().ways.values().filter_map(|way| way.problem(here)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Ways> {
        // A look that panicked leaves ways that are looked at again.
        self.ways.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Probing::counts`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Questions asked.
    pub asked: u64,
    /// Answers heard.
    pub answered: u64,
    /// Nodes that are asked now.
    pub active: usize,
    /// Nodes that answered once and do not any more.
    pub away: usize,
    /// Ways that carry less than pods use.
    pub narrow: usize,
}

impl Ways {
    /// Takes the nodes of these tables in.
    fn follow(&mut self, config: &Config, nodes: &NodeNumbers, tables: &Tables, now: Instant) {
        self.epoch = tables.epoch;
        let mut before = std::mem::take(&mut self.ways);
        for peer in &config.peers {
            let Some(id) = nodes.of(&peer.name) else { continue };
            let Some(node) = tables.node(id) else { continue };
            let (underlay, overhead) = (node.underlay, config.tunnel_to(peer).overhead(node.underlay.is_ipv4()));
            // Who is sent packets as they are is still asked through a tunnel, by packets that are as long in the end.
            let beside = if node.mtu + overhead > config.underlay.mtu { overhead } else { 0 };
            let most = tables.tunnel_mtu.min(node.mtu).saturating_sub(beside).min(probe::LONGEST);
            let known = before.remove(&id).filter(|way| way.underlay == underlay);
            let way = known.unwrap_or_else(|| {
                // Who has another MAC than a Weft of that name would have is most often a VXLAN device of the kernel's.
                let is_foreign = peer.vtep_mac != crate::control::derive::vtep_mac(&peer.name, underlay);
                let least = probe::shortest(underlay.is_ipv4());
                Way {
                    name: peer.name.clone(),
                    underlay,
                    peer: Peer::new(least, most, overhead, is_foreign, now),
                    beside,
                    device: config.underlay.mtu,
                    due: None,
                }
            });
            let way = self.ways.entry(id).or_insert(way);
            (way.beside, way.device) = (beside, config.underlay.mtu);
            way.peer.set_most(most, overhead, now);
        }
    }

    fn round(&mut self, news: Vec<News>, now: Instant) -> Round {
        let mut round = Round::default();
        for news in news {
            self.take(news, now, &mut round);
        }
        self.refill(now);
        let active = self.ways.values().filter(|way| way.peer.is_active(now)).count() as u32;
        let each = EACH.max(Duration::from_secs(1) * active / BUDGET);
        // Whose turn did not come goes first the next time: it is due for longer.
        let mut due: Vec<(Instant, NodeId)> = self
            .ways
            .iter()
            .filter_map(|(id, way)| Some((way.due.filter(|due| *due <= now + TOGETHER)?, *id)))
            .collect();
        due.sort_unstable();
        for (_, id) in due {
            let Some(way) = self.ways.get_mut(&id) else { continue };
            if self.tokens <= 0.0 {
                way.due = Some(now + TOGETHER * 2);
                continue;
            }
            let mut look = Look::default();
            way.peer.look(each, now, &mut look);
            way.due = look.again;
            self.tokens -= look.ask.len() as f64;
            self.asked += look.ask.len() as u64;
            round.questions.extend(look.ask.iter().map(|(number, size)| Question {
                node: id,
                size: *size,
                number: *number,
            }));
            round.changes.extend(look.changes.into_iter().map(|change| (id, change)));
        }
        round.again = self.ways.values().filter_map(|way| way.due).min();
        round
    }

    fn take(&mut self, news: News, now: Instant, round: &mut Round) {
        match news {
            News::Traffic(nodes) => {
                for id in nodes {
                    let Some(way) = self.ways.get_mut(&id) else { continue };
                    way.peer.traffic(now);
                    way.due = Some(way.due.unwrap_or(now));
                }
            }
            News::Heard(Heard::Question(id)) => {
                if let Some(way) = self.ways.get_mut(&id) {
                    way.peer.asked(now);
                }
            }
            News::Heard(Heard::Answer { to, at, .. }) => {
                let Some(way) = self.ways.get_mut(&to.node) else { return };
                self.answered += 1;
                let mut look = Look::default();
                way.peer.answered(to.number, to.size, at, &mut look);
                round.changes.extend(look.changes.into_iter().map(|change| (to.node, change)));
            }
        }
    }

    fn refill(&mut self, now: Instant) {
        let more = now.since(self.at).as_secs_f64() * f64::from(BUDGET);
        (self.tokens, self.at) = ((self.tokens + more).min(BURST), now);
    }

    fn log(&self, id: NodeId, change: &Change) {
        let Some(way) = self.ways.get(&id) else { return };
        let (node, what) = (way.name.as_str(), told(change));
        match change {
            Change::Up(None) => tracing::debug!(node, "{what}"),
            Change::Up(Some(_)) => tracing::info!(node, "{what}"),
            Change::Carries { before, now } if now > before => tracing::info!(node, "{what}"),
            Change::Carries { .. } | Change::Away(_) | Change::Flaps => tracing::warn!(node, "{what}"),
        }
    }
}

/// A change in words.
fn told(change: &Change) -> String {
    match change {
        Change::Up(None) => "answers".into(),
        Change::Up(Some(away)) => format!("answers again, after {:.1} s", away.as_secs_f64()),
        Change::Away(silent) => format!("no answer for {} ms, though pods speak with it", silent.as_millis()),
        Change::Carries { before, now } if now < before => {
            format!("the way carries {now} bytes, not {before}: longer packets were not answered, shorter ones were")
        }
        Change::Carries { before, now } => {
            format!("the way carries {now} bytes, not just {before}: these were answered")
        }
        Change::Flaps => "comes and goes: changes are counted, and told again when it is calm".into(),
    }
}

impl Way {
    fn info(&self, now: Instant) -> WayInfo {
        let (state, since) = self.peer.state();
        let (last, changes) = self.peer.last();
        let rtt = self.peer.rtt();
        let micros = |time: Duration| time.as_secs_f64() * 1e6;
        WayInfo {
            state: match state {
                State::Unknown => "unknown",
                State::Silent => "silent",
                State::Up => "up",
                State::Away => "away",
            }
            .into(),
            since: now.since(since).as_secs_f64(),
            mtu: self.peer.most() + self.beside,
            measured: self.peer.measured().map(|mtu| mtu + self.beside),
            rtt: rtt.last().map(micros),
            rtt_median: rtt.median().map(micros),
            loss: rtt.last().map(|_| rtt.loss()),
            changes,
            reason: last.map(|(_, change)| told(change)).unwrap_or_default(),
            changed: last.map(|(at, _)| now.since(*at).as_secs_f64()),
        }
    }

    fn problem(&self, here: &str) -> Option<String> {
        let (name, peer) = (&self.name, &self.peer);
        match (peer.state().0, peer.narrow()) {
            (State::Away, _) => Some(format!(
                "{name} ({}) does not answer any more, though pods speak with it: is it running, and is the network between well?",
                self.underlay
            )),
            (_, Some(mtu)) if mtu + self.beside < LEAST_V6 => Some(format!(
                "{here} → {name} carries {}, pods use {}: IPv6 demands {LEAST_V6}, so packets of up to that go in fragments, which is slow and \
                 which firewalls may drop; raise the MTU of what is on that path",
                mtu + self.beside,
                peer.most() + self.beside
            )),
            (_, Some(mtu)) => Some(format!(
                "{here} → {name} carries {}, pods use {}: they are told when they send what is longer; raise the MTU of what is \
                 on that path, or lower the key mtu",
                mtu + self.beside,
                peer.most() + self.beside
            )),
            _ => None,
        }
    }
}
