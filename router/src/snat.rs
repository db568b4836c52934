//! Source translation: which of the node's reserved ports a conversation of a pod has outside of the cluster.
//!
//! A *session* is one conversation: protocol, the pod's address and port, the node's address and a reserved port, the other side's address
//! and port. TCP uses a port once for each destination, so as many connections to one server are possible as there are ports. A UDP
//! socket, and a series of pings, has one port for all destinations (RFC 4787, REQ-1), which is what makes calls through NATs work. In
//! either case only he who was spoken to is let in (address and port dependent filtering): the kernel's own masquerade does the same,
//! and a pod that asks one server does not expect others.
//!
//! Ports are chosen at random (RFC 6056), never by the pod: so nobody can have one that somebody else's answers arrive at. When all ports
//! of a pool are taken, those are taken back whose sessions are over; then, from a pod that has more than half of them, some of what it has
//! beyond that: first what nobody answered, then what has been silent for longest. Whoever has more than half himself is refused. A pod
//! has a limited number of sessions, as the node has.
//!
//! The table is shared by all workers. Its sessions lie in an array of fixed size that frames read and write without locks
//! (`session.rs`); a lock is taken to find the session of a flow's first packet, to open one and to close one. Which part of the table that is
//! depends on the destination for TCP, on the protocol for others.

use std::net::IpAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicUsize};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use weft_encap::ip;

use crate::drop_reason::DropReason;
use crate::flow::{FlowKey, Seed};
use crate::frame::Lazy;
use crate::path::{Handle, Side, Translation};
use crate::tables::ExactMap;
use crate::time::Instant;

pub mod pieces;
mod session;
mod shard;
mod strangers;

use session::{ANSWERED, Ends, Slot, is_ping};
use shard::{Barren, Shard, is_shared, owner_of, pool_of};
use strangers::Strangers;

/// Parts of the table: for TCP, and one each for UDP and pings.
const TCP_SHARDS: usize = 14;
const SHARDS: usize = TCP_SHARDS + 2;
/// How often a part of the sessions is looked through for old ones, and how many such parts there are.
const SWEEP_EACH: Duration = Duration::from_secs(4);
const SWEEP_PARTS: usize = 4;
/// Ports that are tried at random before they are tried in turn.
const GUESSES: usize = 12;
/// Ports towards one destination that are believed to be the kernel's. With more of them somebody is lying.
const BELIEVED: usize = 64;

/// How much there is to be given.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The first reserved port.
    pub first: u16,
    /// The last one.
    pub last: u16,
    /// Sessions of the node; memory is touched only when used.
    pub sessions: usize,
    /// Sessions of each address of a pod.
    pub per_pod: usize,
}

impl Default for Limits {
    /// The kernel gives its own sockets ports up to 60999.
    fn default() -> Self {
        Limits { first: 61_000, last: 65_535, sessions: 131_072, per_pod: 32_768 }
    }
}

impl Limits {
    /// How many ports are reserved.
    pub fn ports(&self) -> u32 {
        u32::from(self.last) - u32::from(self.first) + 1
    }
}

/// How much of it is in use.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct SnatUse {
    /// Sessions.
    pub sessions: usize,
    /// How many there can be.
    pub limit: usize,
    /// Pods' addresses that have any.
    pub pods: usize,
    /// Ports that are taken in the pool that has fewest left.
    pub fullest: u32,
    /// Ports that there are in each pool.
    pub ports: u32,
    /// Sessions that were taken back from pods that had more than half of a pool.
    pub taken_back: u32,
}

/// One session, for people.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Protocol number.
    pub protocol: u8,
    /// The pod's address and port, or the identifier of its pings.
    pub inside: (IpAddr, u16),
    /// As whom it is known outside.
    pub outside: (IpAddr, u16),
    /// The other side.
    pub remote: (IpAddr, u16),
    /// Whether that has answered.
    pub answered: bool,
    /// Whether it is over, and its port rests.
    pub over: bool,
    /// How long it is.
    pub age: Duration,
    /// How long it has been silent.
    pub idle: Duration,
}

/// The table. See the module's essay.
pub struct Snat {
    limits: Limits,
    slots: Lazy<Slot>,
    shards: Vec<Mutex<Shard>>,
    ledger: Mutex<Ledger>,
    seed: Seed,
    drawn: AtomicU32,
    taken_back: AtomicU32,
    count: AtomicUsize,
    sweep: Mutex<Sweep>,
    strangers: Strangers,
}

/// What is counted over all parts of the table.
#[derive(Default)]
struct Ledger {
    free: Vec<u32>,
    /// Slots from here on were never used.
    fresh: u32,
    per_pod: ExactMap<IpAddr, u32>,
}

#[derive(Default)]
struct Sweep {
    next: Instant,
    part: usize,
}

impl Snat {
    /// Room for as many sessions as the limits say. `seed` keeps outsiders from guessing ports.
    pub fn new(limits: Limits, seed: u64) -> Snat {
        let slots = Lazy::zeroed(limits.sessions);
        Snat {
            limits,
            slots,
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            ledger: Mutex::default(),
            seed: Seed::new(seed.rotate_left(17) ^ 0x6d61_7371_7565_7261),
            drawn: AtomicU32::new(0),
            taken_back: AtomicU32::new(0),
            count: AtomicUsize::new(0),
            sweep: Mutex::default(),
            strangers: Strangers::new(),
        }
    }

    /// The session that a pod's flow has, if it has one.
    pub fn leaving(&self, inside: &FlowKey) -> Option<Translation> {
        let slot = *self.shard(inside.protocol(), inside.dst(), inside.ports().1).inside.get(inside)?;
        self.translation(slot, Side::Source)
    }

    /// The session that a packet from outside belongs to, whose flow is this from the node's point of view: from the node's address.
    pub fn entering(&self, outside: &FlowKey) -> Option<Translation> {
        let slot = *self.shard(outside.protocol(), outside.dst(), outside.ports().1).outside.get(outside)?;
        self.translation(slot, Side::Destination)
    }

    /// The session that a packet of this one goes on in, which was sent to the outer port of that one's pod, if that has sent to this one's.
    pub fn turned(&self, handle: Handle) -> Option<Translation> {
        let ends = self.slots.get(handle.slot as usize)?.ends(handle.version)?;
        self.entering(&FlowKey::between(ends.protocol, ends.remote, ends.outside))
    }

    /// The pod that has this port for all destinations.
    pub fn owner(&self, protocol: u8, outside: IpAddr, port: u16) -> Option<IpAddr> {
        self.shard(protocol, outside, port).owners.get(&owner_of(protocol, (outside, port))).copied()
    }

    /// This flow from the node, of which something came back, is the kernel's: no session shall look like it.
    pub fn is_strangers(&self, outside: &FlowKey, now: Instant) {
        self.strangers.note(outside, &self.seed, now);
    }

    /// Opens a session for a pod's flow, as this address of the node's; or gives the one that another worker has opened meanwhile.
    ///
    /// # Errors
    /// `MasqueradeQuota`, `MasqueradeFull`, `MasqueradePorts`; `NotMasqueraded` for a protocol without ports.
    pub fn open(&self, inside: &FlowKey, outside: IpAddr, now: Instant) -> Result<Translation, DropReason> {
        let (port, far) = inside.ports();
        let protocol = inside.protocol();
        if protocol != ip::TCP && !is_shared(protocol) {
            return Err(DropReason::NotMasqueraded);
        }
        let far = if is_ping(protocol) { 0 } else { far };
        let mut ends =
            Ends { protocol, inside: (inside.src(), port), outside: (outside, 0), remote: (inside.dst(), far) };
        let mut shard = self.shard(protocol, inside.dst(), inside.ports().1);
        if let Some(slot) = shard.inside.get(inside).copied() {
            match self.translation(slot, Side::Source) {
                Some(known) if known.address == outside => return Ok(known),
                // The node has another address by now.
                _ => self.close(&mut shard, slot),
            }
        }
        ends.outside.1 = match shard.port_of(&ends) {
            Some(port) => port,
            None => self.choose(&mut shard, &ends, now)?,
        };
        let slot = self.admit(ends.inside.0)?;
        let version = self.slots[slot as usize].begin(&ends, now);
        shard.enter(&ends, slot);
        let handle = Handle { slot, version };
        Ok(Translation { side: Side::Source, address: outside, port: ends.outside.1, handle })
    }

    /// What becomes of a packet of a flow that is known to be of this session; `flags` are TCP's. `None`: the session is gone.
    #[inline(always)]
    pub fn pass(&self, handle: Handle, side: Side, flags: u8, now: Instant) -> Option<Translation> {
        let slot = self.slots.get(handle.slot as usize)?;
        let translation = slot.translation(handle, side)?;
        slot.pass(side, flags, now);
        Some(translation)
    }

    /// Closes what is known outside by an address that is the node's no longer.
    pub fn forget(&self, is_gone: impl Fn(IpAddr) -> bool) {
        self.each_alive(0..self.slots.len(), |slot, ends| {
            if is_gone(ends.outside.0) {
                self.close_if(slot, |_| true);
            }
        });
    }

    /// Forgets what is too old. Returns when to call again; `None` if there is no session.
    pub fn tick(&self, now: Instant) -> Option<Instant> {
        if self.count.load(Relaxed) == 0 {
            return None;
        }
        let mut sweep = self.sweep.try_lock().ok()?;
        if sweep.next > now {
            return Some(sweep.next);
        }
        sweep.next = now + SWEEP_EACH;
        sweep.part = (sweep.part + 1) % SWEEP_PARTS;
        let part = self.slots.len().div_ceil(SWEEP_PARTS);
        let (first, end) = (sweep.part * part, ((sweep.part + 1) * part).min(self.slots.len()));
        self.each_alive(first..end, |slot, _| self.close_if(slot, |session| session.is_old(now)));
        Some(sweep.next)
    }

    /// How much is in use.
    pub fn usage(&self) -> SnatUse {
        let (sessions, pods) = (self.count.load(Relaxed), self.lock_ledger().per_pod.len());
        let fullest = |shard: &Mutex<Shard>| lock(shard).pools.values().map(|pool| pool.taken).max();
        SnatUse {
            sessions,
            limit: self.limits.sessions,
            pods,
            fullest: self.shards.iter().filter_map(fullest).max().unwrap_or(0),
            ports: self.limits.ports(),
            taken_back: self.taken_back.load(Relaxed),
        }
    }

    /// The sessions that there are.
    pub fn sessions(&self, now: Instant) -> Vec<Session> {
        let mut found = Vec::new();
        self.each_alive(0..self.slots.len(), |slot, ends| {
            let session = &self.slots[slot as usize];
            found.push(Session {
                protocol: ends.protocol,
                inside: ends.inside,
                outside: ends.outside,
                remote: ends.remote,
                answered: session.state() & ANSWERED != 0,
                over: ends.protocol == ip::TCP && session.is_over(),
                age: Duration::from_secs(session.age(now).into()),
                idle: Duration::from_secs(session.idle(now).into()),
            });
        });
        found
    }
}

// Choosing ports, and taking them back.
impl Snat {
    fn choose(&self, shard: &mut Shard, ends: &Ends, now: Instant) -> Result<u16, DropReason> {
        if let Some(port) = self.free_port(shard, ends, now) {
            return Ok(port);
        }
        let room = self.make_room(shard, &pool_of(ends), ends, now);
        room.then(|| self.free_port(shard, ends, now)).flatten().ok_or(DropReason::MasqueradePorts)
    }

    fn free_port(&self, shard: &Shard, ends: &Ends, now: Instant) -> Option<u16> {
        let ports = self.limits.ports();
        if let Some(pool) = shard.pools.get(&pool_of(ends))
            && (pool.taken >= ports || pool.is_barren(ends.inside.0, now))
        {
            return None;
        }
        let with =
            |offset: u32| Ends { outside: (ends.outside.0, self.limits.first + (offset % ports) as u16), ..*ends };
        let start = self.draw(ends);
        let guesses = (0..GUESSES).map(|guess| (start >> (guess * 4)) as u32);
        let in_turn = || (0..ports).map(|step| with((start as u32 % ports) + step)).filter(|ends| shard.is_free(ends));
        let strange = |ends: &Ends| self.strangers.know(&ends.outside_key(), &self.seed, now);
        let guessed = guesses.map(with).filter(|ends| shard.is_free(ends)).find(|ends| !strange(ends));
        let free = guessed.or_else(|| in_turn().find(|ends| !strange(ends)));
        let free = free.or_else(|| in_turn().next().filter(|_| in_turn().nth(BELIEVED).is_some()));
        free.map(|ends| ends.outside.1)
    }

    /// A number that nobody can guess.
    fn draw(&self, ends: &Ends) -> u64 {
        let drawn = self.drawn.fetch_add(1, Relaxed).to_be_bytes();
        let salt = (IpAddr::from(drawn), ends.inside.1);
        FlowKey::between(ends.protocol, ends.inside, salt).hash(&self.seed)
    }

    /// Closes what is over in a pool without ports to give, else some of what a pod has beyond its half. Returns whether anything was.
    fn make_room(&self, shard: &mut Shard, pool: &FlowKey, asking: &Ends, now: Instant) -> bool {
        let half = self.limits.ports() / 2;
        if shard.pools.get(pool).is_none_or(|pool| pool.is_barren(asking.inside.0, now)) {
            return false;
        }
        let (over, alive) = self.look_through(shard, pool, now);
        for slot in &over {
            self.close(shard, *slot);
        }
        if !over.is_empty() {
            return true;
        }
        let mut per_pod: ExactMap<IpAddr, Vec<Worth>> = ExactMap::default();
        alive.into_iter().for_each(|worth| per_pod.entry(worth.pod).or_default().push(worth));
        let most = per_pod.into_iter().max_by_key(|(_, sessions)| sessions.len());
        match most {
            Some((pod, mut sessions)) if pod != asking.inside.0 && sessions.len() as u32 > half => {
                sessions.sort_unstable_by_key(|worth| (worth.answered, std::cmp::Reverse(worth.idle)));
                let beyond = (sessions.len() as u32 - half).min((half / 8).max(1));
                for worth in &sessions[..beyond as usize] {
                    self.close(shard, worth.slot);
                }
                self.taken_back.fetch_add(beyond, Relaxed);
                true
            }
            most => {
                let most = most.filter(|(_, sessions)| sessions.len() as u32 > half).map(|(pod, _)| pod);
                if let Some(pool) = shard.pools.get_mut(pool) {
                    pool.barren = Some(Barren { when: now.seconds(), taken: pool.taken, most });
                }
                false
            }
        }
    }

    /// The sessions of a pool: those that are over or old, and the others with what they are worth.
    fn look_through(&self, shard: &Shard, pool: &FlowKey, now: Instant) -> (Vec<u32>, Vec<Worth>) {
        let (mut over, mut alive) = (Vec::new(), Vec::new());
        for slot in shard.outside.values().copied() {
            let session = &self.slots[slot as usize];
            let Some(ends) = session.alive().and_then(|version| session.ends(version)) else { continue };
            if pool_of(&ends) != *pool {
                continue;
            }
            if session.is_old(now) || (ends.protocol == ip::TCP && session.is_over()) {
                over.push(slot);
            } else {
                let answered = session.state() & ANSWERED != 0;
                alive.push(Worth { slot, pod: ends.inside.0, answered, idle: session.idle(now) });
            }
        }
        (over, alive)
    }

    /// A slot for one more session of this pod's.
    fn admit(&self, pod: IpAddr) -> Result<u32, DropReason> {
        let mut ledger = self.lock_ledger();
        let has = ledger.per_pod.get(&pod).copied().unwrap_or(0);
        if has as usize >= self.limits.per_pod {
            return Err(DropReason::MasqueradeQuota);
        }
        let slot = match ledger.free.pop() {
            Some(slot) => slot,
            None if (ledger.fresh as usize) < self.slots.len() => {
                ledger.fresh += 1;
                ledger.fresh - 1
            }
            None => return Err(DropReason::MasqueradeFull),
        };
        ledger.per_pod.insert(pod, has + 1);
        self.count.fetch_add(1, Relaxed);
        Ok(slot)
    }

    fn close_if(&self, slot: u32, is_due: impl Fn(&Slot) -> bool) {
        let session = &self.slots[slot as usize];
        let Some(ends) = session.alive().and_then(|version| session.ends(version)) else { return };
        let far = if is_ping(ends.protocol) { ends.inside.1 } else { ends.remote.1 };
        let mut shard = self.shard(ends.protocol, ends.remote.0, far);
        // It may have become another one before the lock was ours.
        let same = session.alive().and_then(|version| session.ends(version)) == Some(ends);
        if same && is_due(session) {
            self.close(&mut shard, slot);
        }
    }

    /// Closes a session, in the shard that it is in.
    fn close(&self, shard: &mut Shard, slot: u32) {
        let session = &self.slots[slot as usize];
        let Some(ends) = session.alive().and_then(|version| session.ends(version)) else { return };
        shard.remove(&ends);
        session.end();
        let mut ledger = self.lock_ledger();
        if let Some(has) = ledger.per_pod.get_mut(&ends.inside.0) {
            *has -= 1;
            if *has == 0 {
                ledger.per_pod.remove(&ends.inside.0);
            }
        }
        ledger.free.push(slot);
        self.count.fetch_sub(1, Relaxed);
    }

    fn each_alive(&self, slots: std::ops::Range<usize>, mut visit: impl FnMut(u32, Ends)) {
        let end = slots.end.min(self.lock_ledger().fresh as usize);
        for slot in slots.start..end {
            let session = &self.slots[slot];
            if let Some(ends) = session.alive().and_then(|version| session.ends(version)) {
                visit(slot as u32, ends);
            }
        }
    }

    fn translation(&self, slot: u32, side: Side) -> Option<Translation> {
        let session = &self.slots[slot as usize];
        session.translation(Handle { slot, version: session.alive()? }, side)
    }

    fn shard(&self, protocol: u8, remote: IpAddr, port: u16) -> MutexGuard<'_, Shard> {
        let index = match protocol {
            ip::UDP => TCP_SHARDS,
            ip::ICMP | ip::ICMPV6 => TCP_SHARDS + 1,
            _ => FlowKey::between(protocol, (remote, port), (remote, port)).hash(&self.seed) as usize % TCP_SHARDS,
        };
        lock(&self.shards[index])
    }

    fn lock_ledger(&self) -> MutexGuard<'_, Ledger> {
        lock(&self.ledger)
    }
}

/// What a session is worth when ports are short.
struct Worth {
    slot: u32,
    pod: IpAddr,
    answered: bool,
    idle: u32,
}

/// A panic in between leaves at most a port that nobody finds, which ends with its time.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
