//! A data-plane thread: poll, receive, forward, transmit, timers.
//!
//! One round serves each port that is ready with one batch, bounded in frames and bytes, and sends what came of it at once. Polling is
//! edge-triggered: a port that was not drained stays in the worker's own ready list, and while that list is not empty polling does
//! not wait. Otherwise the thread sleeps until a device, a command or a timer wakes it, and timers run only
//! while something can age.
//!
//! A port whose pod has a limit of bandwidth ([`crate::pace`]) rests when it has sent too much: it is not read from until
//! that is paid for. What is too much for it waits in its queue, within limits.
//!
//! A port whose device is gone leaves the poller at once, so that it cannot keep the thread awake; what waited for it
//! is dropped by name, and the daemon hears of it as an [`Event`]. All workers have a port of each device, and notice its end each by
//! itself; the first one tells.
//!
//! A panic ends one frame, counted as [`DropReason::RouterFault`], or one port, if the port's own code
//! panicked; the thread goes on. Whatever was counted for that frame before the panic stays counted, so
//! conservation is not exact after it. A panic anywhere else ends the thread, and its counters with it; the daemon hears of that, too.

mod attention;
mod ports;
mod telling;

pub use telling::News;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use arc_swap::{ArcSwap, Cache};
use arrayvec::ArrayVec;
use crossbeam::channel::{self, Receiver, Sender, TryRecvError};
use mio::unix::SourceFd;
use mio::{Events, Poll, Token, Waker};
use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::control;
use crate::control::{Command, Event, PortEnd, PortSnapshot, RouterConfig, Snapshot};
use crate::drop_reason::DropReason;
use crate::forward::{Forwarder, Memory};
use crate::frame::Frame;
use crate::gather::gather;
use crate::pace::{self, Bucket};
use crate::pool::Pool;
use crate::port::sys::xsk::Umem;
use crate::port::{BATCH, Batch, Capabilities, Outbox, Port, PortId, QUEUE, Queue, Received};
use crate::probing::Question;
use crate::returns::ReturnsUse;
use crate::tables::Tables;
use crate::time::Instant;
use attention::Attention;
use telling::Telling;

/// The waker's token; ports' are their numbers.
const WAKER: Token = Token(usize::MAX);

/// How soon a port that was busy is tried again.
const BUSY_RETRY: Duration = Duration::from_millis(1);

/// What all workers share.
#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) tables: Arc<ArcSwap<Tables>>,
    pub(crate) memory: Memory,
    pub(crate) events: Sender<Event>,
    pub(crate) news: Sender<News>,
}

/// A worker's thread, as others see it.
pub(crate) struct Spawned {
    /// Wakes it up after a command was sent.
    pub(crate) waker: Arc<Waker>,
    /// Its chunks, for AF_XDP sockets that are opened for it.
    pub(crate) umem: Umem,
    pub(crate) thread: JoinHandle<()>,
}

/// Starts the thread of worker `number`. `ended` is set when nobody will answer any more.
pub(crate) fn spawn(
    number: usize,
    config: RouterConfig,
    shared: Shared,
    inbox: Receiver<Command>,
    ended: Arc<AtomicBool>,
) -> io::Result<Spawned> {
    let poll = Poll::new()?;
    let waker = Arc::new(Waker::new(poll.registry(), WAKER)?);
    let (started, start) = channel::bounded(1);
    // Buffers belong to their thread, so the worker is made on it.
    let run = move || {
        // Told last of all, when the worker's sockets are closed and its commands answered by nobody.
        let mut farewell = Farewell { number, events: shared.events.clone(), ended, expected: true };
        let inbox = inbox;
        match Worker::new(&config, poll, shared) {
            Ok(mut worker) => {
                let _ = started.send(Ok(Umem::of(worker.pool.arena())));
                farewell.expected = false;
                farewell.expected = worker.run(&inbox);
            }
            Err(error) => drop(started.send(Err(error))),
        }
    };
    let thread = Builder::new().name(format!("weft-worker-{number}")).spawn(run)?;
    let umem = start.recv().unwrap_or_else(|_| Err(io::Error::other("a worker thread ended while starting")))?;
    Ok(Spawned { waker, umem, thread })
}

/// Tells of the end of a worker that nobody asked for, also when it panics.
struct Farewell {
    number: usize,
    events: Sender<Event>,
    ended: Arc<AtomicBool>,
    expected: bool,
}

impl Drop for Farewell {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        if !self.expected {
            let _ = self.events.send(Event::WorkerEnded(self.number));
        }
    }
}

/// A port's place. It stays when the device is gone, until the daemon removes the port.
struct Slot {
    port: Option<Box<dyn Port>>,
    kind: &'static str,
    capabilities: Capabilities,
    shared: control::Shared,
    ready: bool,
    busy: bool,
    can_peek: bool,
}

struct Worker {
    poll: Poll,
    events: Sender<Event>,
    tables: Cache<Arc<ArcSwap<Tables>>, Arc<Tables>>,
    tunnel_mtu: u32,
    ports: Vec<Option<Slot>>,
    /// Ports that may have something to give.
    ready: VecDeque<PortId>,
    /// Ports that did not take all of their queues.
    busy: Vec<PortId>,
    /// Ports that are not received from before some time.
    resting: Vec<(PortId, Instant)>,
    /// Frames that may pass now, of a port with a limit.
    passing: Queue,
    /// Free buffers below which nothing is kept waiting for a port with a limit.
    scarce: (usize, usize),
    pool: Pool,
    forwarder: Forwarder,
    outbox: Outbox,
    next_tick: Option<Instant>,
    batch: Batch,
    attention: Attention,
    telling: Telling,
}

impl Worker {
    fn new(config: &RouterConfig, poll: Poll, shared: Shared) -> io::Result<Worker> {
        Ok(Worker {
            poll,
            events: shared.events,
            tables: Cache::new(shared.tables),
            tunnel_mtu: 0,
            ports: Vec::new(),
            ready: VecDeque::new(),
            busy: Vec::new(),
            resting: Vec::new(),
            passing: Queue::new(),
            scarce: (config.chunks as usize / 4, config.supers as usize / 4),
            pool: if config.huge_pages {
                Pool::in_huge_pages(config.chunks, config.supers)?
            } else {
                Pool::new(config.chunks, config.supers)?
            },
            forwarder: Forwarder::sharing(shared.memory, config),
            outbox: Outbox::new(),
            next_tick: None,
            batch: Batch::new(),
            attention: Attention::default(),
            telling: Telling::new(shared.news),
        })
    }

    /// Runs until it is told to stop; `false` if it ends for another reason.
    fn run(&mut self, inbox: &Receiver<Command>) -> bool {
        let mut ready = Events::with_capacity(256);
        loop {
            self.attend();
            match self.poll.poll(&mut ready, self.patience()) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // The poller itself is broken, which only a bug can do.
                Err(_) => return false,
            }
            for event in &ready {
                if event.token() != WAKER {
                    self.told(event.token());
                }
            }
            // Commands need no event of their own: looking costs nothing beside the poll.
            if !self.obey(inbox) {
                return true;
            }
            self.round();
        }
    }

    /// How long the thread may sleep.
    fn patience(&self) -> Option<Duration> {
        if !self.ready.is_empty() {
            return Some(Duration::ZERO);
        }
        let woken = self.resting.iter().map(|(_, until)| *until).chain(self.next_tick).chain(self.telling.due()).min();
        let wait = woken.map(|woken| woken.since(Instant::boottime()));
        if self.busy.is_empty() { wait } else { Some(wait.unwrap_or(BUSY_RETRY).min(BUSY_RETRY)) }
    }

    fn mark_ready(&mut self, id: PortId) {
        if let Some(Some(slot)) = self.ports.get_mut(id.index())
            && slot.port.is_some()
            && !std::mem::replace(&mut slot.ready, true)
        {
            self.ready.push_back(id);
        }
    }

    /// Serves all ports that are ready, once.
    fn round(&mut self) {
        let tables = Arc::clone(self.tables.load());
        self.tell_mtu(&tables);
        for id in std::mem::take(&mut self.busy) {
            if let Some(Some(slot)) = self.ports.get_mut(id.index()) {
                slot.busy = false;
            }
            self.transmit(id, &tables);
        }
        self.rouse();
        let mut worked = false;
        for _ in 0..self.ready.len() {
            let Some(id) = self.ready.pop_front() else { break };
            worked |= self.serve(id, &tables);
        }
        self.tick(worked);
    }

    /// Receives one batch from a port, forwards it, and sends what came of it. Returns whether there was a frame.
    fn serve(&mut self, id: PortId, tables: &Tables) -> bool {
        let Some(Some(slot)) = self.ports.get_mut(id.index()) else { return false };
        slot.ready = false;
        let Some(port) = &mut slot.port else { return false };
        let limit =
            tables.limits(id).and_then(|limits| limits.from.as_deref()).map(|limit| (limit, Instant::boottime()));
        match limit {
            Some((limit, now)) if !limit.allows(now) => {
                self.rest(id, limit.due());
                return false;
            }
            limit => self.batch.limit(limit.map_or(usize::MAX, |(limit, now)| limit.room(now))),
        }
        let received = guarded(|| {
            let received = port.receive(&self.pool, &mut self.batch, self.forwarder.stats());
            if port.gathers() {
                gather(&mut self.batch, &self.pool, self.forwarder.stats());
            }
            received
        });
        let worked = !self.batch.is_empty();
        self.attention.note(id, self.batch.len(), slot.can_peek);
        if let Some((limit, now)) = limit {
            limit.charge(self.batch.iter().map(pace::cost).sum(), now);
        }
        self.forward(tables);
        match received {
            Ok(Received::Drained) => {}
            Ok(Received::More) => self.mark_ready(id),
            Err(why) => self.gone(id, why),
        }
        self.flush(tables);
        worked
    }

    /// Forwards what was received.
    fn forward(&mut self, tables: &Tables) {
        let now = Instant::boottime();
        let mut frames = self.batch.drain(..);
        loop {
            let forwarded = catch_unwind(AssertUnwindSafe(|| {
                self.forwarder.forward_all(&mut frames, tables, now, &self.pool, &mut self.outbox);
            }));
            if forwarded.is_ok() {
                break;
            }
            let at_fault = self.forwarder.current();
            self.forwarder.stats().port(at_fault).dropped[DropReason::RouterFault as usize] += 1;
        }
        self.telling.heard(self.forwarder.heard().drain(..));
        self.telling.traffic(self.forwarder.stats().nodes(), now);
    }

    /// Asks other nodes.
    fn ask(&mut self, questions: &[Question]) {
        let (tables, now) = (Arc::clone(self.tables.load()), Instant::boottime());
        for question in questions {
            self.forwarder.ask(question, &tables, now, &self.pool, &mut self.outbox);
        }
        self.flush(&tables);
    }

    /// Has all ports send that were given frames.
    fn flush(&mut self, tables: &Tables) {
        while let Some(id) = self.outbox.touched() {
            self.transmit(id, tables);
        }
    }

    /// A port is not received from before `until`.
    fn rest(&mut self, id: PortId, until: Instant) {
        if !self.resting.iter().any(|(resting, _)| *resting == id) {
            self.resting.push((id, until));
        }
    }

    /// Ports that have rested long enough are asked again.
    fn rouse(&mut self) {
        if self.resting.is_empty() {
            return;
        }
        let now = Instant::boottime();
        let due: ArrayVec<PortId, BATCH> =
            self.resting.iter().filter(|(_, until)| *until <= now).map(|(id, _)| *id).take(BATCH).collect();
        self.resting.retain(|(id, _)| !due.contains(id));
        due.into_iter().for_each(|id| self.mark_ready(id));
    }

    /// Sends what a limit lets through now, and drops what is too much to wait.
    fn transmit_within(&mut self, id: PortId, limit: &Bucket) {
        let now = Instant::boottime();
        let queue = self.outbox.queue(id);
        let slot = self.ports.get_mut(id.index()).and_then(Option::as_mut);
        let Some((port, busy)) = slot.and_then(|slot| Some((slot.port.as_mut()?, &mut slot.busy))) else {
            return self.empty_queue(id);
        };
        pace::cut::to_packets(queue, limit, now, &self.pool, self.scarce.0, self.forwarder.stats());
        while limit.allows(now)
            && let Some(frame) = queue.pop_front()
        {
            limit.charge(pace::cost(&frame), now);
            self.passing.push_back(frame);
        }
        let sent = guarded(|| port.transmit(&mut self.passing, self.forwarder.stats()));
        // What a busy device did not take comes first the next time, and has been paid for.
        while let Some(frame) = self.passing.pop_back() {
            queue.push_front(frame);
        }
        let (chunks, supers) = self.pool.free();
        let is_scarce = chunks < self.scarce.0 || supers < self.scarce.1;
        let mut bytes = 0;
        let fits = |frame: &&Frame| {
            let before = bytes;
            bytes += pace::cost(frame);
            before < limit.queue()
        };
        let most = if is_scarce { 1 } else { QUEUE };
        let waits = queue.iter().take(most).take_while(fits).count();
        for frame in queue.drain(waits..) {
            self.forwarder.stats().drop(frame, DropReason::Bandwidth);
        }
        match sent {
            Ok(()) if queue.is_empty() => {}
            Ok(()) => {
                if !std::mem::replace(busy, true) {
                    self.busy.push(id);
                }
            }
            Err(why) => self.gone(id, why),
        }
    }

    fn transmit(&mut self, id: PortId, tables: &Tables) {
        if let Some(limit) = tables.limits(id).and_then(|limits| limits.to.as_deref()) {
            return self.transmit_within(id, limit);
        }
        let queue = self.outbox.queue(id);
        let slot = self.ports.get_mut(id.index()).and_then(Option::as_mut);
        let Some((port, busy, can_peek)) =
            slot.and_then(|slot| Some((slot.port.as_mut()?, &mut slot.busy, slot.can_peek)))
        else {
            return self.empty_queue(id);
        };
        self.attention.note(id, queue.len(), can_peek);
        match guarded(|| port.transmit(queue, self.forwarder.stats())) {
            Ok(()) if queue.is_empty() => {}
            Ok(()) => {
                if !std::mem::replace(busy, true) {
                    self.busy.push(id);
                }
            }
            Err(why) => self.gone(id, why),
        }
    }

    /// Drops what waits for a port that is not there. The tables know a pod a little before its device is here, and its device goes
    /// a little before the frames to it: only a device that ended by itself is a loss.
    fn empty_queue(&mut self, id: PortId) {
        let known = self.ports.get(id.index()).is_some_and(Option::is_some);
        let reason = if known { DropReason::PortDown } else { DropReason::PortAbsent };
        for frame in self.outbox.queue(id).drain(..) {
            self.forwarder.stats().drop(frame, reason);
        }
    }

    /// Takes a port that does not work any more out of service.
    fn gone(&mut self, id: PortId, why: PortEnd) {
        drop(self.retire(id));
        let slot = self.ports.get(id.index()).and_then(Option::as_ref);
        if slot.is_some_and(|slot| !slot.shared.told.swap(true, Ordering::Relaxed)) {
            let _ = self.events.send(Event::PortGone(id, why));
        }
    }

    /// Ends a port; its device, if closing that takes long, is for the asker to close.
    fn retire(&mut self, id: PortId) -> Option<OwnedFd> {
        let mut device = None;
        if let Some(Some(slot)) = self.ports.get_mut(id.index())
            && let Some(port) = slot.port.take()
        {
            if let Some(fd) = port.readable() {
                // Closing alone is not enough if someone else holds the descriptor too.
                let _ = self.poll.registry().deregister(&mut SourceFd(&fd.as_raw_fd()));
            }
            device = port.retire();
            (slot.ready, slot.busy) = (false, false);
        }
        self.attention.forget(id);
        self.ready.retain(|ready| *ready != id);
        self.busy.retain(|busy| *busy != id);
        self.resting.retain(|(resting, _)| *resting != id);
        self.empty_queue(id);
        device
    }

    /// Lets what was learned age, as often as there is something that can.
    fn tick(&mut self, worked: bool) {
        if self.telling.due().is_some() {
            self.telling.traffic(self.forwarder.stats().nodes(), Instant::boottime());
        }
        let due = match self.next_tick {
            Some(tick) => tick <= Instant::boottime(),
            None => worked,
        };
        if due {
            self.next_tick = self.forwarder.tick(Instant::boottime());
        }
    }

    fn tell_mtu(&mut self, tables: &Tables) {
        if self.tunnel_mtu != tables.tunnel_mtu {
            self.tunnel_mtu = tables.tunnel_mtu;
            for port in self.ports.iter_mut().flatten().filter_map(|slot| slot.port.as_mut()) {
                port.set_tunnel_mtu(tables.tunnel_mtu);
            }
        }
    }

    /// Carries out all waiting commands; `false` if the thread shall end.
    fn obey(&mut self, inbox: &Receiver<Command>) -> bool {
        loop {
            // An asker that is gone needs no answer.
            match inbox.try_recv() {
                Ok(Command::AddPort(port, answer)) => drop(answer.send(self.add(port))),
                Ok(Command::ReplacePort(port, answer)) => drop(answer.send(self.replace(port))),
                Ok(Command::Receive(id)) => self.receive(id),
                Ok(Command::Ask(questions)) => self.ask(&questions),
                Ok(Command::RemovePort(id, answer)) => drop(answer.send(self.remove(id))),
                #[cfg(test)]
                Ok(Command::Panic) => panic!("a worker with a bug"),
                Ok(Command::Snapshot { flows, answer }) => drop(answer.send(self.snapshot(flows))),
                Err(TryRecvError::Empty) => return true,
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn snapshot(&mut self, flows: bool) -> Snapshot {
        let now = Instant::boottime();
        let stats = self.forwarder.stats();
        for port in self.ports.iter_mut().flatten().filter_map(|slot| slot.port.as_mut()) {
            port.count(stats);
        }
        let ports = self.ports.iter().enumerate().filter_map(|(index, slot)| {
            let (id, slot) = (PortId(index as u16), slot.as_ref()?);
            let capabilities = slot.port.as_ref().map_or(slot.capabilities, |port| port.capabilities());
            let kind = slot.port.as_ref().map_or(slot.kind, |port| port.kind());
            let (up, stats) = (slot.port.is_some(), stats.of(id));
            Some(PortSnapshot { id, kind, up, worker: None, capabilities, stats })
        });
        let (ports, nodes) = (ports.collect(), stats.nodes().to_vec());
        Snapshot {
            now,
            epoch: self.tables.load().epoch,
            workers: 1,
            ports,
            nodes,
            // All workers have the same ones.
            fdb: Vec::new(),
            returns: ReturnsUse::default(),
            flows: if flows { self.forwarder.flows(now) } else { Vec::new() },
            free: self.pool.free(),
            huge_pages: usize::from(self.pool.arena().is_huge()),
        }
    }
}

/// A port whose code panics is as good as gone.
fn guarded<T>(call: impl FnOnce() -> io::Result<T>) -> Result<T, PortEnd> {
    let called = catch_unwind(AssertUnwindSafe(call)).map_err(|_| PortEnd::Panic)?;
    called.map_err(|_| PortEnd::Device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pace::{Limit, Limits};
    use crate::port::memory::{MemoryPort, Wire};
    use crate::port::sample;
    use crate::stats::Stats;
    use crate::tables::{Dhcp, Gateway, Pod, Role};
    use std::os::fd::BorrowedFd;
    use weft_encap::mac::Mac;

    const A: PortId = PortId(1);
    const B: PortId = PortId(2);

    fn tables() -> Tables {
        let mut tables = Tables::empty(Gateway { mac: Mac([2, 0, 0, 0, 0, 0xff]), ipv4: None, ipv6: None });
        tables.epoch = 1;
        for (port, number) in [(A, 1), (B, 2)] {
            let mac = Mac([2, 0, 0, 0, 0, number]);
            tables.add_pod(
                port,
                Pod {
                    mac,
                    ipv4: vec![[10, 0, 0, number].into()],
                    ipv6: Vec::new(),
                    mtu: 1450,
                    limits: Limits::default(),
                    dhcp: Dhcp::default(),
                },
            );
        }
        tables
    }

    fn shared() -> (Shared, Receiver<Event>) {
        let (sender, events) = channel::unbounded();
        let tables = Arc::new(ArcSwap::from_pointee(tables()));
        let memory = Memory::new(&RouterConfig { fdb_limit: 64, host_flows: 64, seed: 1, ..RouterConfig::default() });
        (Shared { tables, memory, events: sender, news: channel::bounded(16).0 }, events)
    }

    /// A port that no other worker has.
    fn alone() -> control::Shared {
        control::Shared { receivers: 1, told: Arc::default() }
    }

    /// A worker without a thread, and what it reports.
    fn worker() -> (Worker, Receiver<Event>) {
        let (shared, events) = shared();
        let config = RouterConfig { chunks: 2048, supers: 16, ..RouterConfig::default() };
        (Worker::new(&config, Poll::new().unwrap(), shared).unwrap(), events)
    }

    impl Worker {
        fn plug(&mut self, port: MemoryPort, id: PortId) -> (Wire, Wire) {
            let wires = (port.inbox(), port.outbox());
            self.insert(id, Box::new(port), alone()).unwrap();
            wires
        }

        fn in_flight(&mut self) -> i64 {
            [A, B].iter().map(|id| self.forwarder.stats().of(*id).in_flight()).sum()
        }

        fn run_dry(&mut self) {
            while !self.ready.is_empty() {
                self.round();
            }
        }
    }

    #[test]
    fn a_port_with_more_than_a_batch_is_served_until_it_is_empty() {
        let (mut worker, _events) = worker();
        let (inbox, _) = worker.plug(MemoryPort::new(A), A);
        let (_, outbox) = worker.plug(MemoryPort::new(B), B);
        let packet = sample::udp4(100, 0).0;
        inbox.borrow_mut().extend((0..3 * BATCH + 5).map(|_| packet.clone()));
        worker.round();
        assert_eq!(worker.patience(), Some(Duration::ZERO));
        assert_eq!(outbox.borrow().len(), BATCH);
        worker.run_dry();
        assert!(outbox.borrow().iter().all(|sent| *sent == packet));
        assert_eq!(outbox.borrow().len(), 3 * BATCH + 5);
        assert_eq!(worker.in_flight(), 0);
        assert_eq!(worker.pool.free(), (2048, 16));
    }

    #[test]
    fn an_idle_worker_sleeps_until_it_is_woken() {
        let (mut worker, _events) = worker();
        worker.plug(MemoryPort::new(A), A);
        worker.run_dry();
        assert_eq!(worker.patience(), None);
    }

    #[test]
    fn a_port_that_breaks_is_reported_once_and_what_waits_for_it_is_dropped_by_name() {
        let (mut worker, events) = worker();
        let (inbox, _) = worker.plug(MemoryPort::new(A), A);
        let mut broken = MemoryPort::new(B);
        broken.break_down();
        worker.insert(B, Box::new(broken), alone()).unwrap();
        inbox.borrow_mut().extend((0..3).map(|_| sample::udp4(100, 0).0));
        worker.run_dry();
        assert_eq!(events.try_iter().collect::<Vec<_>>(), [Event::PortGone(B, PortEnd::Device)]);
        let counted = worker.forwarder.stats().of(A);
        assert_eq!((counted.dropped[DropReason::PortDown as usize], counted.in_flight()), (3, 0));
        assert!(!worker.snapshot(true).ports.iter().any(|port| port.id == B && port.up));
        assert!(worker.remove(B).is_some());
        assert!(worker.remove(B).is_none());
        assert!(events.is_empty());
    }

    #[test]
    fn a_port_whose_device_is_replaced_keeps_its_counters_and_what_waits_for_it() {
        let (mut worker, events) = worker();
        let (inbox, _) = worker.plug(MemoryPort::new(A), A);
        let (_, outbox) = worker.plug(MemoryPort::new(B).with_room(2), B);
        inbox.borrow_mut().extend((0..5).map(|_| sample::udp4(100, 0).0));
        worker.run_dry();
        assert_eq!((outbox.borrow().len(), worker.in_flight()), (2, 3));
        let other = MemoryPort::new(B);
        let (theirs, sent) = (other.inbox(), other.outbox());
        worker.put_in_place(B, Box::new(other), alone()).unwrap();
        worker.round();
        assert_eq!((sent.borrow().len(), worker.in_flight()), (3, 0));
        theirs.borrow_mut().push_back(sample::udp4(100, 0).0);
        worker.mark_ready(B);
        worker.run_dry();
        let counted = worker.forwarder.stats().of(B);
        assert_eq!((counted.out, counted.received), (5, 1), "what the first one sent counts, too");
        // One that broke is replaced as well.
        let mut broken = MemoryPort::new(B);
        broken.break_down();
        worker.put_in_place(B, Box::new(broken), alone()).unwrap();
        worker.run_dry();
        assert_eq!(events.try_iter().count(), 1);
        let last = MemoryPort::new(B);
        let sent = last.outbox();
        worker.put_in_place(B, Box::new(last), alone()).unwrap();
        inbox.borrow_mut().push_back(sample::udp4(100, 0).0);
        worker.mark_ready(A);
        worker.run_dry();
        assert_eq!(sent.borrow().len(), 1);
    }

    #[test]
    fn a_busy_port_is_tried_again_and_loses_nothing() {
        let (mut worker, _events) = worker();
        let (inbox, _) = worker.plug(MemoryPort::new(A), A);
        let (_, outbox) = worker.plug(MemoryPort::new(B).with_room(2), B);
        inbox.borrow_mut().extend((0..5).map(|_| sample::udp4(100, 0).0));
        worker.run_dry();
        assert_eq!((outbox.borrow().len(), worker.in_flight()), (2, 3));
        assert_eq!(worker.patience(), Some(BUSY_RETRY));
        let mut arrived = 0;
        while !worker.busy.is_empty() {
            arrived += outbox.borrow_mut().drain(..).count();
            worker.round();
        }
        assert_eq!((arrived + outbox.borrow().len(), worker.in_flight()), (5, 0));
    }

    #[test]
    fn a_number_in_use_is_refused_and_one_used_again_counts_from_zero() {
        let (mut worker, _events) = worker();
        let (inbox, _) = worker.plug(MemoryPort::new(A), A);
        inbox.borrow_mut().push_back(sample::udp4(100, 0).0);
        worker.run_dry();
        let error = worker.insert(A, Box::new(MemoryPort::new(A)), alone()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(worker.remove(A).unwrap().stats.received, 1);
        worker.plug(MemoryPort::new(A), A);
        assert_eq!(worker.forwarder.stats().of(A).received, 0);
    }

    /// A worker whose pod A may send, and whose pod B may receive, that much.
    fn limited(from_a: Option<u64>, to_b: Option<u64>) -> Worker {
        let (shared, _) = shared();
        let limit = |rate: Option<u64>| rate.map(|rate| Limit { rate, burst: 1 });
        let mut tables = tables();
        for (port, number, limits) in [(A, 1, Limits::new(None, limit(from_a))), (B, 2, Limits::new(limit(to_b), None))]
        {
            let mac = Mac([2, 0, 0, 0, 0, number]);
            let ipv4 = vec![[10, 0, 0, number].into()];
            tables.set_port(
                port,
                Role::Pod(Pod { mac, ipv4, ipv6: Vec::new(), mtu: 1450, limits, dhcp: Dhcp::default() }),
            );
        }
        shared.tables.store(Arc::new(tables));
        let config = RouterConfig { chunks: 2048, supers: 16, ..RouterConfig::default() };
        Worker::new(&config, Poll::new().unwrap(), shared).unwrap()
    }

    #[test]
    fn a_pod_that_has_sent_too_much_is_not_read_from_until_that_is_paid_for() {
        let mut worker = limited(Some(1_000_000), None);
        let (inbox, _) = worker.plug(MemoryPort::new(A), A);
        let (_, outbox) = worker.plug(MemoryPort::new(B), B);
        inbox.borrow_mut().extend((0..200).map(|_| sample::udp4(1000, 0).0));
        worker.run_dry();
        // 20 ms at that rate are 2500 bytes.
        let (passed, left) = (outbox.borrow().len(), inbox.borrow().len());
        assert!((1..=10).contains(&passed) && passed + left == 200, "{passed} {left}");
        let patience = worker.patience().expect("it wakes by itself");
        assert!(patience > Duration::ZERO && patience < Duration::from_millis(50), "{patience:?}");
        std::thread::sleep(patience + Duration::from_millis(1));
        worker.rouse();
        worker.run_dry();
        assert!(outbox.borrow().len() > passed);
        assert_eq!(worker.in_flight(), 0, "what was not read is not here");
    }

    #[test]
    fn what_is_too_much_for_a_pod_waits_and_what_is_too_much_to_wait_ends_by_name() {
        let mut worker = limited(None, Some(1_000_000));
        let (inbox, _) = worker.plug(MemoryPort::new(A), A);
        let (_, outbox) = worker.plug(MemoryPort::new(B), B);
        inbox.borrow_mut().extend((0..400).map(|_| sample::udp4(1000, 0).0));
        worker.run_dry();
        let (passed, waiting) = (outbox.borrow().len(), worker.in_flight());
        assert!((1..=10).contains(&passed), "{passed}");
        // 128 KiB of packets of 1028 bytes.
        assert_eq!(waiting, 128);
        let counted = worker.forwarder.stats().of(A);
        assert_eq!(counted.dropped[DropReason::Bandwidth as usize] as usize, 400 - passed - 128);
        assert_eq!(worker.patience(), Some(BUSY_RETRY));
        std::thread::sleep(Duration::from_millis(30));
        worker.round();
        assert!(outbox.borrow().len() > passed && worker.in_flight() < waiting);
        assert!(worker.remove(B).is_some());
        assert_eq!(worker.in_flight(), 0, "a port that goes takes what waits along");
    }

    #[test]
    fn frames_for_a_port_without_a_device_are_dropped_by_name() {
        let (mut worker, _events) = worker();
        let (inbox, _) = worker.plug(MemoryPort::new(A), A);
        inbox.borrow_mut().push_back(sample::udp4(100, 0).0);
        worker.run_dry();
        let counted = worker.forwarder.stats().of(A);
        assert_eq!((counted.dropped[DropReason::PortAbsent as usize], counted.in_flight()), (1, 0));
    }

    /// A port whose code has a bug.
    struct Faulty;

    impl Port for Faulty {
        fn receive(&mut self, _: &Pool, _: &mut Batch, _: &mut Stats) -> io::Result<Received> {
            panic!("a bug in a port")
        }

        fn transmit(&mut self, _: &mut Queue, _: &mut Stats) -> io::Result<()> {
            panic!("a bug in a port")
        }

        fn readable(&self) -> Option<BorrowedFd<'_>> {
            None
        }

        fn capabilities(&self) -> Capabilities {
            Capabilities::default()
        }

        fn kind(&self) -> &'static str {
            "memory"
        }
    }

    #[test]
    fn a_port_whose_code_panics_is_taken_out_and_the_others_go_on() {
        let (mut worker, events) = worker();
        let (inbox, _) = worker.plug(MemoryPort::new(A), A);
        let (_, outbox) = worker.plug(MemoryPort::new(B), B);
        worker.insert(PortId(3), Box::new(Faulty), alone()).unwrap();
        worker.run_dry();
        assert_eq!(events.try_iter().collect::<Vec<_>>(), [Event::PortGone(PortId(3), PortEnd::Panic)]);
        inbox.borrow_mut().push_back(sample::udp4(100, 0).0);
        worker.mark_ready(A);
        worker.run_dry();
        assert_eq!(outbox.borrow().len(), 1);
    }

    #[test]
    fn the_thread_answers_commands_in_order_and_ends_when_it_is_told_to() {
        let (commands, inbox) = channel::unbounded();
        let (shared, events) = shared();
        let Spawned { waker, thread, .. } = spawn(3, RouterConfig::default(), shared, inbox, Arc::default()).unwrap();
        let (answer, snapshot) = channel::bounded(1);
        commands.send(Command::Snapshot { flows: true, answer }).unwrap();
        waker.wake().unwrap();
        assert_eq!(snapshot.recv().unwrap().epoch, 1);
        let (answer, removed) = channel::bounded(1);
        commands.send(Command::RemovePort(A, answer)).unwrap();
        commands.send(Command::Stop).unwrap();
        waker.wake().unwrap();
        assert!(removed.recv().unwrap().is_none());
        thread.join().unwrap();
        assert!(events.is_empty());
    }

    #[test]
    fn a_thread_that_panics_is_told_of_after_its_commands_end() {
        let (commands, inbox) = channel::unbounded();
        let (shared, events) = shared();
        let Spawned { waker, thread, .. } = spawn(3, RouterConfig::default(), shared, inbox, Arc::default()).unwrap();
        commands.send(Command::Panic).unwrap();
        waker.wake().unwrap();
        assert_eq!(events.recv().unwrap(), Event::WorkerEnded(3));
        assert!(commands.send(Command::Stop).is_err());
        assert!(thread.join().is_err());
        assert!(events.recv().is_err());
    }

    #[test]
    fn the_end_of_a_device_is_told_by_one_of_its_workers() {
        let common = alone();
        let mut told = 0;
        for _ in 0..2 {
            let (mut worker, events) = worker();
            let mut broken = MemoryPort::new(B);
            broken.break_down();
            worker.insert(B, Box::new(broken), common.clone()).unwrap();
            worker.run_dry();
            assert!(worker.snapshot(false).ports.iter().all(|port| !port.up));
            told += events.try_iter().count();
        }
        assert_eq!(told, 1);
    }
}
