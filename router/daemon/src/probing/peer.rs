//! The way to one node: whether it is there, how long it is, how much it carries. Pure: time is an argument, and what is to be
//! sent is returned.
//!
//! While pods speak with the node, it is asked regularly, each time with a packet of full size: one that is answered shows that the
//! way is there *and* carries what pods send. What is not answered in time is asked again soon, large and small. If small ones are answered
//! and large ones are not, the way has become narrower, and a [`Search`] finds out how narrow; if none is, the node is away. A way that
//! carries less than pods use is tried for more again and again, and at once when something changed here.
//!
//! A node that has never answered is no Weft, or cannot be reached; it is asked a few times, then hardly ever. When it asks us, it is one.
//!
//! Each direction is measured by who sends in it, for answers are short.

use std::collections::VecDeque;
use std::time::Duration;

use weft_router::Instant;

use super::rtt::Rtt;
use super::search::{Search, Step};

/// How often a node is asked, unless there are too many.
pub const EACH: Duration = Duration::from_millis(100);
/// How long after the last traffic it is.
const ACTIVE: Duration = Duration::from_secs(5);
/// How often it is asked when answers are late.
const HASTE: Duration = Duration::from_millis(25);
/// Answers that take no longer than this are never late.
const LEAST_PATIENCE: Duration = Duration::from_millis(30);
/// How long a node is silent before it is taken to be away, counted from the first question that it did not answer.
const SILENCE: Duration = Duration::from_millis(190);
/// However many are lost lately, it is away after this.
const LONGEST_SILENCE: Duration = Duration::from_secs(1);
/// How likely it may be that a node is taken to be away by chance: by so many questions in a row that are lost, as often as they were
/// lately.
const CHANCE: f64 = 1e-6;
/// How likely it may be that large packets are lost by chance while small ones are not: then it is looked whether they are too large.
const HARDLY_LOST: f64 = 1e-2;
/// After that an answer has no meaning any more.
const FORGET: Duration = Duration::from_secs(10);
/// Questions remembered at most.
const OPEN: usize = 512;
/// A node that is away is asked more rarely after this.
const LONG: Duration = Duration::from_secs(30);
/// Pauses before a wider path is tried again.
const RISES: [Duration; 4] =
    [Duration::from_secs(1), Duration::from_secs(2), Duration::from_secs(5), Duration::from_secs(10)];
/// Pauses before a node that never answered is asked again, after the first questions.
const HARDLY: [Duration; 3] = [Duration::from_secs(10), Duration::from_secs(60), Duration::from_secs(600)];
/// Questions before that.
const FIRST: u32 = 5;
/// Changes that are told one by one, and the time after which one counts half.
const FLAPS: f64 = 4.0;
const HALF: Duration = Duration::from_secs(60);

/// What is known of a way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Nothing has been asked yet.
    Unknown,
    /// The node never answered: it is no Weft, or none that can be reached.
    Silent,
    /// It answers.
    Up,
    /// It answered once, and no longer does.
    Away,
}

/// What has changed.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// The node answers: for the first time (`None`), or after having been away for so long.
    Up(Option<Duration>),
    /// It does not answer any more, since so long.
    Away(Duration),
    /// The way carries packets of that length, where it carried others before.
    Carries {
        /// Before.
        before: u32,
        /// From now on.
        now: u32,
    },
    /// It comes and goes: changes are counted, and not told, until it is calm.
    Flaps,
}

/// A question that may still be answered.
#[derive(Debug, Clone, Copy)]
struct Open {
    number: u32,
    size: u32,
    at: Instant,
    /// Whether it was counted as lost.
    late: bool,
}

/// The way to one node.
#[derive(Debug, Clone)]
pub struct Peer {
    least: u32,
    most: u32,
    overhead: u32,
    mtu: u32,
    /// Whether somebody says that it does not answer, so that it is not asked before it does.
    is_foreign: bool,
    state: State,
    since: Instant,
    active_until: Instant,
    was_active: bool,
    open: VecDeque<Open>,
    number: u32,
    next: Instant,
    tries: u32,
    rtt: Rtt,
    /// When the last question was sent that has been answered, and the same of those of full size.
    proven: Instant,
    /// When the last answer came.
    heard: Instant,
    proven_full: Instant,
    search: Option<Search>,
    rise_at: Instant,
    rises: usize,
    flaps: (f64, Instant),
    changes: u64,
    last: Option<(Instant, Change)>,
}

/// What comes of looking at a way.
#[derive(Debug, Default)]
pub struct Look {
    /// Packets to be sent: number and length.
    pub ask: Vec<(u32, u32)>,
    /// What has changed, the last of it last.
    pub changes: Vec<Change>,
    /// When to look again; `None` before there is traffic or an answer.
    pub again: Option<Instant>,
}

impl Peer {
    /// A way that nobody has used yet. Packets from `least` to `most` bytes can be asked about; `overhead` is wrapped around them.
    pub fn new(least: u32, most: u32, overhead: u32, is_foreign: bool, now: Instant) -> Peer {
        Peer {
            least,
            most: most.max(least),
            overhead,
            mtu: most.max(least),
            is_foreign,
            state: State::Unknown,
            since: now,
            active_until: Instant::default(),
            was_active: false,
            open: VecDeque::new(),
            number: 0,
            next: now,
            tries: 0,
            rtt: Rtt::default(),
            proven: now,
            heard: now,
            proven_full: now,
            search: None,
            rise_at: now,
            rises: 0,
            flaps: (0.0, now),
            changes: 0,
            last: None,
        }
    }

    /// Pods speak with the node.
    pub fn traffic(&mut self, now: Instant) {
        self.active_until = now + ACTIVE;
    }

    /// It asked us, so it answers, too.
    pub fn asked(&mut self, now: Instant) {
        self.is_foreign = false;
        if matches!(self.state, State::Unknown | State::Silent) && self.tries > 0 {
            (self.tries, self.next) = (0, now);
        }
    }

    /// Pods use packets of up to this length from now on. More than was measured has to be measured first.
    pub fn set_most(&mut self, most: u32, overhead: u32, now: Instant) {
        let most = most.max(self.least);
        if (most, overhead) == (self.most, self.overhead) {
            return;
        }
        // What was measured is the length of the whole packet. A way that carries all that was asked for may carry more: another
        // encapsulation alone does not make it narrow.
        let rewrapped = overhead != self.overhead && most <= self.most && self.narrow().is_none();
        let carried = (self.mtu + self.overhead).saturating_sub(overhead).max(self.least);
        let carried = if rewrapped { most } else { carried };
        (self.most, self.overhead, self.search) = (most, overhead, None);
        self.mtu = if self.is_known() { carried.min(most) } else { most };
        self.try_rise(now);
    }

    /// Something has changed here, so that the way may be another one.
    pub fn try_rise(&mut self, now: Instant) {
        (self.rise_at, self.rises) = (now, 0);
        self.next = self.next.min(now);
    }

    /// A question of this number and length was answered.
    pub fn answered(&mut self, number: u32, size: u32, now: Instant, look: &mut Look) {
        let found = self.open.iter().position(|open| (open.number, open.size) == (number, size));
        let Some(open) = found.and_then(|at| self.open.remove(at)) else { return };
        self.rtt.answered(now.since(open.at), open.late);
        (self.proven, self.heard) = (self.proven.max(open.at), now);
        if size >= self.mtu {
            self.proven_full = self.proven_full.max(open.at);
        }
        if self.state != State::Up {
            let away = (self.state == State::Away).then(|| now.since(self.since));
            (self.tries, self.is_foreign) = (0, false);
            self.turn(State::Up, Change::Up(away), now, look);
        }
        if let Some(search) = &mut self.search {
            search.answered(size, now);
        }
    }

    /// Looks at what is due. `each` is how often the node can be asked.
    pub fn look(&mut self, each: Duration, now: Instant, look: &mut Look) {
        self.forget(now);
        let is_active = now < self.active_until;
        if !is_active {
            self.was_active = false;
            self.search = None;
            self.open.clear();
            return;
        }
        if !std::mem::replace(&mut self.was_active, true) {
            self.begin(now);
        }
        match self.state {
            State::Unknown | State::Silent => self.try_first(now, look),
            State::Up | State::Away => self.follow(each, now, look),
        }
        look.again = Some(self.due(now));
    }

    /// Traffic begins, after a while in which anything may have happened.
    fn begin(&mut self, now: Instant) {
        (self.proven, self.heard, self.proven_full, self.next) = (now, now, now, now);
        if self.mtu < self.most {
            self.try_rise(now);
        }
        if self.state == State::Silent {
            self.next = now.max(self.since + HARDLY[(self.tries.saturating_sub(FIRST) as usize).min(HARDLY.len() - 1)]);
        }
    }

    fn try_first(&mut self, now: Instant, look: &mut Look) {
        if self.is_foreign || now < self.next {
            return;
        }
        self.ask(self.least, now, look);
        self.ask(self.mtu, now, look);
        self.tries += 1;
        self.next = now + EACH;
        if self.tries >= FIRST {
            self.next = now + HARDLY[((self.tries - FIRST) as usize).min(HARDLY.len() - 1)];
            (self.state, self.since) = (State::Silent, now);
        }
    }

    fn follow(&mut self, each: Duration, now: Instant, look: &mut Look) {
        let patience = self.patience();
        let late = self.open.iter().filter(|open| open.at > self.proven && now.since(open.at) > patience);
        let (is_late, first) = (late.clone().count() > 0, late.map(|open| open.at).min());
        if self.state == State::Up
            && let Some(first) = first
            && self.is_away(first, now)
        {
            self.search = None;
            self.turn(State::Away, Change::Away(now.since(self.proven)), now, look);
        }
        if self.state == State::Up {
            self.measure(patience, now, look);
        }
        if now >= self.next {
            let is_full_late = self.has_full_late(patience, now);
            self.ask(self.mtu, now, look);
            if is_late || is_full_late || self.state == State::Away {
                self.ask(self.least, now, look);
            }
            let long = self.state == State::Away && now.since(self.since) > LONG;
            let hasty = self.state == State::Up && (is_late || is_full_late);
            self.next = now
                + if long {
                    EACH * 5
                } else if hasty {
                    HASTE
                } else {
                    each
                };
        } else if self.state == State::Up && is_late {
            // The first late one is not waited for as long as all is well.
            self.next = self.next.min(now + HASTE);
        }
    }

    /// Whether the node is away, whose first question without an answer was sent at `first`.
    fn is_away(&self, first: Instant, now: Instant) -> bool {
        let unanswered = self.open.iter().filter(|open| open.at >= first).count();
        let needed = (CHANCE.ln() / self.rtt.loss().clamp(0.01, 0.9).ln()).ceil() as usize;
        let silence = SILENCE.max(self.patience() + SILENCE - LEAST_PATIENCE);
        let is_silent = now.since(self.heard).min(now.since(first)) >= silence;
        is_silent && (unanswered >= needed.max(4) || now.since(first) >= silence + LONGEST_SILENCE)
    }

    /// Whether large packets are missing though later small ones were answered.
    fn has_full_late(&self, patience: Duration, now: Instant) -> bool {
        self.full_late(patience, now).next().is_some()
    }

    fn full_late(&self, patience: Duration, now: Instant) -> impl Iterator<Item = &Open> {
        let (mtu, after, proven) = (self.mtu, self.proven_full, self.proven);
        self.open
            .iter()
            .filter(move |open| open.size == mtu && open.at > after && open.at <= proven)
            .filter(move |open| now.since(open.at) > patience)
    }

    /// How many large packets in a row are hardly lost by chance.
    fn suspicious(&self) -> usize {
        ((HARDLY_LOST.ln() / self.rtt.loss().clamp(0.01, 0.9).ln()).ceil() as usize).max(2)
    }

    /// Finds out what the way carries, if that may have changed.
    fn measure(&mut self, patience: Duration, now: Instant, look: &mut Look) {
        // Before anything else it has to be known what still gets through.
        if !self.search.as_ref().is_some_and(Search::is_for_less)
            && self.full_late(patience, now).count() >= self.suspicious()
        {
            self.search = Some(Search::new(0, self.least, self.mtu, self.overhead, now));
        } else if self.search.is_none() && self.mtu < self.most && now >= self.rise_at {
            self.search = Some(Search::new(self.mtu, self.least, self.most, self.overhead, now));
            self.rise_at = now + RISES[self.rises];
            self.rises = (self.rises + 1).min(RISES.len() - 1);
        }
        let Some(mut search) = self.search.take() else { return };
        let is_for_less = search.is_for_less();
        let (low, is_tried) = (search.low(), search.is_tried());
        match search.step(now, patience) {
            Step::Wait(_) => self.search = Some(search),
            Step::Ask => {
                for size in search.unanswered().collect::<Vec<_>>() {
                    self.ask(size, now, look);
                }
                self.search = Some(search);
            }
            Step::Found(0) => {}
            // Nothing more gets through than before.
            Step::Found(size) if size == self.mtu && !is_for_less => {}
            Step::Found(size) => self.carry(size, now, look),
        }
        // What is known before all is: pods wait for it. That it is no more is known when more was asked for often enough.
        if low > 0 && (low > self.mtu || low < self.mtu && is_tried) && self.search.is_some() {
            self.carry(low, now, look);
        }
    }

    fn carry(&mut self, size: u32, now: Instant, look: &mut Look) {
        let before = self.mtu;
        if size == before {
            self.proven_full = now;
            return;
        }
        (self.mtu, self.proven_full) = (size.min(self.most), now);
        if size < before {
            (self.rise_at, self.rises) = (now + RISES[0], 1);
        }
        self.note(Change::Carries { before, now: self.mtu }, now, look);
    }

    fn ask(&mut self, size: u32, now: Instant, look: &mut Look) {
        self.number = self.number.wrapping_add(1);
        if self.open.len() >= OPEN {
            self.open.pop_front();
        }
        self.open.push_back(Open { number: self.number, size, at: now, late: false });
        look.ask.push((self.number, size));
    }

    /// Counts as lost what is late, once, and forgets what is of no use any more.
    fn forget(&mut self, now: Instant) {
        while self.open.front().is_some_and(|open| now.since(open.at) > FORGET) {
            self.open.pop_front();
        }
        let (patience, mtu) = (self.patience() * 2, self.mtu);
        for open in self.open.iter_mut().filter(|open| !open.late && now.since(open.at) > patience) {
            open.late = true;
            // What is too long for the way is not lost by chance.
            if open.size <= mtu {
                self.rtt.lost();
            }
        }
    }

    fn turn(&mut self, state: State, change: Change, now: Instant, look: &mut Look) {
        (self.state, self.since) = (state, now);
        let (count, at) = self.flaps;
        let halves = now.since(at).as_secs_f64() / HALF.as_secs_f64();
        let count = count * 0.5_f64.powf(halves) + 1.0;
        let was_calm = self.flaps.0 * 0.5_f64.powf(halves) < FLAPS;
        self.flaps = (count, now);
        if count < FLAPS {
            self.note(change, now, look);
        } else {
            self.changes += 1;
            self.last = Some((now, change));
            if was_calm {
                look.changes.push(Change::Flaps);
            }
        }
    }

    fn note(&mut self, change: Change, now: Instant, look: &mut Look) {
        self.changes += 1;
        self.last = Some((now, change.clone()));
        look.changes.push(change);
    }

    /// How long an answer may take.
    fn patience(&self) -> Duration {
        self.rtt.patience().max(LEAST_PATIENCE)
    }

    fn due(&self, now: Instant) -> Instant {
        let soon = now + Duration::from_millis(5);
        let patience = self.patience();
        let waits = self.search.is_some() || self.open.iter().any(|open| now.since(open.at) <= patience * 2);
        match self.state {
            State::Up if waits => soon.min(self.next),
            _ => self.next.max(soon),
        }
    }

    fn is_known(&self) -> bool {
        matches!(self.state, State::Up | State::Away)
    }

    /// How long packets may be that are sent now; `None` if nothing says that it is not as configured.
    pub fn narrow(&self) -> Option<u32> {
        (self.mtu < self.most).then_some(self.mtu)
    }

    /// What was measured, if anything was.
    pub fn measured(&self) -> Option<u32> {
        self.is_known().then_some(self.mtu)
    }

    /// What is wrapped around each packet.
    pub fn overhead(&self) -> u32 {
        self.overhead
    }

    /// What pods use.
    pub fn most(&self) -> u32 {
        self.most
    }

    /// Whether there is traffic, so that the node is asked.
    pub fn is_active(&self, now: Instant) -> bool {
        let is_asked = self.is_known() || self.state == State::Unknown && !self.is_foreign;
        is_asked && now < self.active_until
    }

    /// What is known of it, and since when.
    pub fn state(&self) -> (State, Instant) {
        (self.state, self.since)
    }

    /// What has changed last, when, and how often anything did.
    pub fn last(&self) -> (Option<&(Instant, Change)>, u64) {
        (self.last.as_ref(), self.changes)
    }

    /// How long answers take, and how many do not come.
    pub fn rtt(&self) -> &Rtt {
        &self.rtt
    }
}

#[cfg(test)]
#[path = "model.rs"]
mod tests;
