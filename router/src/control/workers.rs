//! The workers as a set: what all of them are told and asked, and which of them receives from what.
//!
//! A device goes to the worker that receives from the fewest, and stays there as long as both live: to move it would
//! reorder its flows. A TAP outlives its worker; a veth's socket is of its worker's memory and ends with it. All workers have its sending half before one receives from it, and a device is closed when
//! all have let go.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crossbeam::channel::{self, Receiver, Sender};

use super::{
    Command, Device, Half, NewPort, Removed, RouterConfig, RouterError, Shared, Snapshot, TakenOver, UplinkHalf, merge,
};
use crate::port::PortId;
use crate::port::raw::wrapper::{Wrapper, WrapperPlace};
use crate::port::sys::xsk::Umem;
use crate::port::udp::{Sockets, Underlay};
use crate::port::xdp::{KeptProgram, OpenUplink, PodProgram, XdpDevice};
use crate::probing::Question;
use crate::stats::PortStats;
use crate::worker::{self, Spawned};

/// The running workers.
pub(super) struct Workers {
    all: Vec<Handle>,
    /// Who receives from each port that one worker alone receives from.
    owners: Mutex<BTreeMap<PortId, Owner>>,
    /// What leads frames from veths to their sockets; loaded for the first.
    pods: Mutex<Option<Arc<PodProgram>>>,
    /// A veth that is always open.
    kept: Mutex<Option<KeptVeth>>,
    /// By what superframes leave in formats that lie directly in IP.
    wrapper: WrapperPlace,
    /// Whose turn it is to ask.
    turn: AtomicUsize,
}

/// Who receives from a port.
#[derive(Copy, Clone)]
struct Owner {
    worker: usize,
    /// Whether another worker can receive instead.
    is_movable: bool,
    /// Whether it counts when work is shared out: a format that few peers use does not.
    counts: bool,
}

/// What keeps the workers' memory registered, and the pods' program in the kernel's table of programs.
struct KeptVeth {
    _program: KeptProgram,
    _sockets: Vec<XdpDevice>,
}

/// One worker; its thread ends with this.
struct Handle {
    commands: Sender<Command>,
    waker: Arc<mio::Waker>,
    umem: Umem,
    /// Set before its end is told.
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Workers {
    pub(super) fn start(config: RouterConfig, shared: &worker::Shared) -> io::Result<Workers> {
        let count = config.workers.max(1);
        let each = RouterConfig { flows: config.flows.div_ceil(count), ..config };
        let start = |number| {
            let (commands, inbox) = channel::unbounded();
            let ended = Arc::new(AtomicBool::new(false));
            let Spawned { waker, umem, thread } =
                worker::spawn(number, each, shared.clone(), inbox, Arc::clone(&ended))?;
            Ok(Handle { commands, waker, umem, ended, thread: Some(thread) })
        };
        let all = (0..count).map(start).collect::<io::Result<_>>()?;
        Ok(Workers {
            all,
            owners: Mutex::default(),
            pods: Mutex::default(),
            kept: Mutex::default(),
            wrapper: WrapperPlace::default(),
            turn: AtomicUsize::new(0),
        })
    }

    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    pub(super) fn set_wrapper(&self, wrapper: Option<Arc<Wrapper>>) {
        self.wrapper.store(wrapper);
    }

    /// Has all of them look at the tables.
    pub(super) fn wake(&self) {
        self.all.iter().for_each(|worker| drop(worker.waker.wake()));
    }

    pub(super) fn add_port(&self, id: PortId, device: Device) -> Result<(), RouterError> {
        let is_new = !self.owners().contains_key(&id);
        let added = self.add_halves(id, device);
        if is_new && added.is_err() {
            self.owners().remove(&id);
        }
        added
    }

    fn add_halves(&self, id: PortId, device: Device) -> Result<(), RouterError> {
        let halves = self.halves(id, device)?;
        let (receiving, sending): (Vec<_>, Vec<_>) = halves.into_iter().partition(|(_, port)| port.receives());
        let mut added = Vec::new();
        for ports in [sending, receiving] {
            let asked: Vec<_> = ports
                .into_iter()
                .map(|(worker, port)| (worker, self.all[worker].ask(|answer| Command::AddPort(port, answer))))
                .collect();
            for (worker, reply) in asked {
                match reply.and_then(|reply| reply.recv().ok()) {
                    Some(Ok(())) => added.push(worker),
                    Some(Err(error)) => return Err(self.undo(id, added, error)),
                    None => {}
                }
            }
        }
        if added.is_empty() { Err(RouterError::Stopped) } else { Ok(()) }
    }

    /// Gives all that run another device for a port. The first error is told after all were asked.
    pub(super) fn replace_port(&self, id: PortId, device: Device) -> Result<(), RouterError> {
        let halves = self.halves(id, device)?;
        let asked: Vec<_> = halves
            .into_iter()
            .filter_map(|(worker, port)| self.all[worker].ask(|answer| Command::ReplacePort(port, answer)))
            .collect();
        // What was before is closed here, for that takes the kernel long.
        let answers: Vec<_> = asked.into_iter().filter_map(|reply| reply.recv().ok()).collect();
        if answers.is_empty() {
            return Err(RouterError::Stopped);
        }
        answers.into_iter().try_for_each(|answer| answer.map(drop))
    }

    /// Takes a port from those that had it already, for another could not take it.
    fn undo(&self, id: PortId, added: Vec<usize>, error: RouterError) -> RouterError {
        for worker in added {
            if let Some(reply) = self.all[worker].ask(|answer| Command::RemovePort(id, answer)) {
                drop(reply.recv());
            }
        }
        error
    }

    /// What each worker gets of a device.
    fn halves(&self, id: PortId, device: Device) -> Result<Vec<(usize, NewPort)>, RouterError> {
        let told = Arc::new(AtomicBool::new(false));
        let port = |half, receivers| NewPort { id, half, shared: Shared { receivers, told: Arc::clone(&told) } };
        let count = self.count();
        match device {
            Device::Tap(tap) => {
                let (tap, owner) = (Arc::new(tap), self.place(id, true, true)?);
                let half = |worker| Half::Tap { tap: Arc::clone(&tap), receives: worker == owner };
                Ok((0..count).map(|worker| (worker, port(half(worker), 1))).collect())
            }
            Device::Veth(interface) => {
                let halves = self.open_veth(interface, self.place(id, false, true)?).map_err(RouterError::Device)?;
                Ok(halves.into_iter().map(|(worker, half)| (worker, port(half, 1))).collect())
            }
            Device::Outlet(outlet) => {
                let outlet = Arc::new(outlet);
                let half = |worker| (worker, port(Half::Outlet(Arc::clone(&outlet)), 1));
                Ok((0..count).map(half).collect())
            }
            Device::Underlay(underlay) => {
                let half = |sockets| port(Half::Underlay(sockets), count as u32);
                Ok(self.sockets(underlay)?.into_iter().map(half).enumerate().collect())
            }
            Device::Raw(tunnel) => {
                self.check_workers(tunnel.workers())?;
                let owner = self.place(id, true, false)?;
                let half = |(worker, half)| (worker, port(Half::Raw { half, receives: worker == owner }, 1));
                let tunnel = tunnel.with_wrapper(Arc::clone(&self.wrapper));
                Ok(tunnel.into_halves().enumerate().map(half).collect())
            }
            Device::Uplink { underlay, uplink, hops } => {
                let OpenUplink { devices, tunnel, .. } = uplink;
                let half = |(sockets, devices): (Sockets, Vec<XdpDevice>)| {
                    let (tunnel, hops) = (tunnel.clone(), Arc::clone(&hops));
                    let uplink = UplinkHalf { sockets, devices, tunnel, hops };
                    port(Half::Uplink(Box::new(uplink)), count as u32)
                };
                Ok(self.sockets(underlay)?.into_iter().zip(devices).map(half).enumerate().collect())
            }
        }
    }

    /// An underlay's sockets, if there are some for each worker.
    fn sockets(&self, underlay: Underlay) -> Result<Vec<Sockets>, RouterError> {
        let sockets = underlay.into_sockets();
        self.check_workers(sockets.len())?;
        Ok(sockets)
    }

    fn check_workers(&self, sockets: usize) -> Result<(), RouterError> {
        let count = self.count();
        let what = || format!("there are sockets for {sockets} workers, but {count} workers");
        let wrong = || RouterError::Device(io::Error::new(io::ErrorKind::InvalidInput, what()));
        if sockets == count { Ok(()) } else { Err(wrong()) }
    }

    /// The chunks of each worker.
    pub(super) fn umems(&self) -> Vec<Umem> {
        self.all.iter().map(|worker| worker.umem.clone()).collect()
    }

    /// Opens a veth for each worker that runs: the owner receives by queue 0, the others have the queues behind it to send.
    fn open_veth(&self, interface: u32, owner: usize) -> io::Result<Vec<(usize, Half)>> {
        let others = (0..self.count()).filter(|worker| *worker != owner && self.runs(*worker));
        let mut halves = Vec::new();
        for (queue, worker) in (1..).zip(others) {
            let device = XdpDevice::open_sender(interface, queue, &self.all[worker].umem)?;
            halves.push((worker, Half::Xdp { device: Box::new(device), receives: false }));
        }
        let device = XdpDevice::open_with(interface, &self.all[owner].umem, &self.pod_program()?)?;
        halves.push((owner, Half::Xdp { device: Box::new(device), receives: true }));
        Ok(halves)
    }

    pub(super) fn keep_veths(&self, interface: u32) -> io::Result<()> {
        let running = (0..).zip(&self.all).filter(|(_, worker)| worker.runs());
        let kept = KeptVeth {
            _program: self.pod_program()?.keep(interface).map_err(io::Error::other)?,
            _sockets: running
                .map(|(queue, worker)| XdpDevice::open_sender(interface, queue, &worker.umem))
                .collect::<io::Result<_>>()?,
        };
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(kept);
        Ok(())
    }

    fn pod_program(&self) -> io::Result<Arc<PodProgram>> {
        let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(program) = &*pods {
            return Ok(Arc::clone(program));
        }
        let program = Arc::new(PodProgram::load().map_err(io::Error::other)?);
        Ok(Arc::clone(pods.insert(program)))
    }

    /// Chooses who receives from a port.
    fn place(&self, id: PortId, is_movable: bool, counts: bool) -> Result<usize, RouterError> {
        let mut owners = self.owners();
        if let Some(owner) = owners.get(&id).filter(|owner| self.runs(owner.worker)) {
            // It is in use, as the workers will say.
            return Ok(owner.worker);
        }
        let worker = self.least_loaded(&owners).ok_or(RouterError::Stopped)?;
        owners.insert(id, Owner { worker, is_movable, counts });
        Ok(worker)
    }

    fn least_loaded(&self, owners: &BTreeMap<PortId, Owner>) -> Option<usize> {
        let load = |worker: &usize| owners.values().filter(|owner| owner.counts && owner.worker == *worker).count();
        (0..self.count()).filter(|worker| self.all[*worker].runs()).min_by_key(load)
    }

    pub(super) fn remove_port(&self, id: PortId) -> Result<Option<PortStats>, RouterError> {
        let removed = self.ask_all(|answer| Command::RemovePort(id, answer))?;
        self.owners().remove(&id);
        let mut sum = None;
        for Removed { stats, device } in removed.into_iter().flatten() {
            drop(device);
            *sum.get_or_insert_default() += &stats;
        }
        Ok(sum)
    }

    /// Has the next worker that runs ask.
    pub(super) fn ask_others(&self, questions: Vec<Question>) {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let order = (0..self.count()).map(|number| turn.wrapping_add(number) % self.count());
        if let Some(worker) = order.into_iter().find(|worker| self.runs(*worker)) {
            self.all[worker].tell(Command::Ask(questions));
        }
    }

    pub(super) fn snapshot(&self, flows: bool) -> Result<Snapshot, RouterError> {
        let all = self.ask_all(|answer| Command::Snapshot { flows, answer })?;
        let mut snapshot = merge::snapshots(all).ok_or(RouterError::Stopped)?;
        let owners = self.owners();
        snapshot.ports.iter_mut().for_each(|port| port.worker = owners.get(&port.id).map(|owner| owner.worker));
        Ok(snapshot)
    }

    /// Has others receive from what an ended worker received from, as far as they can.
    pub(super) fn take_over(&self, ended: usize) -> TakenOver {
        let mut taken = TakenOver::default();
        if self.runs(ended) {
            return taken;
        }
        let mut owners = self.owners();
        let orphans: Vec<(PortId, Owner)> =
            owners.iter().filter(|(_, owner)| owner.worker == ended).map(|(id, owner)| (*id, *owner)).collect();
        for (id, owner) in orphans {
            owners.remove(&id);
            match self.least_loaded(&owners) {
                Some(worker) if owner.is_movable => {
                    owners.insert(id, Owner { worker, ..owner });
                    self.all[worker].tell(Command::Receive(id));
                    taken.moved.push(id);
                }
                _ => taken.left.push(id),
            }
        }
        taken
    }

    fn runs(&self, worker: usize) -> bool {
        self.all.get(worker).is_some_and(Handle::runs)
    }

    /// Asks all at once, and collects the answers of those that run.
    fn ask_all<T>(&self, command: impl Fn(Sender<T>) -> Command) -> Result<Vec<T>, RouterError> {
        let replies: Vec<_> = self.all.iter().map(|worker| worker.ask(&command)).collect();
        let answers: Vec<T> = replies.into_iter().flatten().filter_map(|reply| reply.recv().ok()).collect();
        if answers.is_empty() { Err(RouterError::Stopped) } else { Ok(answers) }
    }

    fn owners(&self) -> MutexGuard<'_, BTreeMap<PortId, Owner>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl NewPort {
    fn receives(&self) -> bool {
        !matches!(
            self.half,
            Half::Tap { receives: false, .. } | Half::Xdp { receives: false, .. } | Half::Raw { receives: false, .. }
        )
    }
}

impl Handle {
    /// Sends a command; whether there was somebody to take it.
    fn tell(&self, command: Command) -> bool {
        self.commands.send(command).is_ok() && self.waker.wake().is_ok()
    }

    /// Sends a command; `None` if nobody will answer.
    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Option<Receiver<T>> {
        let (answer, reply) = channel::bounded(1);
        self.tell(command(answer)).then_some(reply)
    }

    fn runs(&self) -> bool {
        !self.ended.load(Ordering::Acquire)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.tell(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Event;
    use crate::control::{PortSnapshot, Router};
    use crate::pace::Limits;
    use crate::port::memory::Packet;
    use crate::port::sample;
    use crate::port::tap::tests::{ALL, give, take, tap};
    use crate::tables::Tables;
    use crate::tables::{Dhcp, Gateway, Pod};
    use rustix::event::{PollFd, PollFlags, poll};
    use std::os::fd::OwnedFd;
    use weft_encap::mac::Mac;

    const PODS: u16 = 4;

    /// A router whose ports 1 to [`PODS`] are pods.
    fn router(workers: usize) -> Router {
        let mut tables = Tables::empty(Gateway { mac: Mac([2, 0, 0, 0, 0, 0xff]), ipv4: None, ipv6: None });
        for number in 1..=PODS as u8 {
            let pod = Pod {
                mac: Mac([2, 0, 0, 0, 0, number]),
                ipv4: vec![[10, 0, 0, number].into()],
                ipv6: Vec::new(),
                mtu: 1450,
                limits: Limits::default(),
                dhcp: Dhcp::default(),
            };
            tables.add_pod(PortId(number.into()), pod);
        }
        let config = RouterConfig { workers, chunks: 64, supers: 8, flows: 64, ..RouterConfig::default() };
        Router::start(config, tables).unwrap()
    }

    fn plug(router: &Router, port: u16) -> OwnedFd {
        let (tap, other) = tap(ALL);
        router.add_port(PortId(port), Device::Tap(tap)).unwrap();
        other
    }

    fn port(router: &Router, port: u16) -> PortSnapshot {
        router.snapshot(false).unwrap().ports.into_iter().find(|found| found.id.0 == port).unwrap()
    }

    fn await_readable(other: &OwnedFd) {
        let patience = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
        assert_eq!(poll(&mut [PollFd::new(other, PollFlags::IN)], Some(&patience)).unwrap(), 1, "nothing arrived");
    }

    /// From pod 1 to pod 2, and back.
    fn packets() -> (Packet, Packet) {
        let there = sample::udp4(100, 0).0;
        let mut back = there.clone();
        back.bytes[..12].rotate_left(6);
        back.bytes[26..34].rotate_left(4);
        (there, back)
    }

    fn passes(from: &OwnedFd, to: &OwnedFd, packet: &Packet) {
        give(from, packet);
        await_readable(to);
        assert_eq!(take(to), *packet);
    }

    fn talk(one: &OwnedFd, two: &OwnedFd) {
        let (there, back) = packets();
        passes(one, two, &there);
        passes(two, one, &back);
    }

    #[test]
    fn devices_spread_over_workers_and_pods_of_different_ones_talk() {
        let router = router(2);
        let others: Vec<OwnedFd> = (1..=PODS).map(|id| plug(&router, id)).collect();
        let owners = || (1..=PODS).map(|id| port(&router, id).worker).collect::<Vec<_>>();
        assert_eq!(owners(), [Some(0), Some(1), Some(0), Some(1)]);
        talk(&others[0], &others[1]);
        let snapshot = router.snapshot(true).unwrap();
        assert_eq!((snapshot.workers, snapshot.ports.len(), snapshot.flows.len()), (2, PODS.into(), 2));
        let counted =
            |port: &PortSnapshot| (port.stats.received, port.stats.sent, port.stats.out, port.stats.in_flight());
        assert_eq!(
            snapshot.ports.iter().map(counted).collect::<Vec<_>>(),
            [(1, 1, 1, 0), (1, 1, 1, 0), (0, 0, 0, 0), (0, 0, 0, 0)]
        );
        assert_eq!(snapshot.free, (2 * 64, 2 * 8));
        router.remove_port(PortId(2)).unwrap();
        let _new = plug(&router, 2);
        assert_eq!(owners(), [Some(0), Some(1), Some(0), Some(1)], "the one with fewest gets the next");
    }

    #[test]
    fn a_port_that_is_removed_is_closed_and_its_counters_are_those_of_all_workers() {
        let router = router(3);
        let others: Vec<OwnedFd> = (1..=2).map(|id| plug(&router, id)).collect();
        talk(&others[0], &others[1]);
        let last = router.remove_port(PortId(1)).unwrap().unwrap();
        assert_eq!((last.received, last.sent, last.out, last.in_flight()), (1, 1, 1, 0));
        assert_eq!(rustix::io::read(&others[0], &mut [0; 1]), Ok(0), "the other end of a closed socket");
        assert!(router.remove_port(PortId(1)).unwrap().is_none());
        let again = plug(&router, 1);
        talk(&again, &others[1]);
        assert_eq!(port(&router, 1).stats.received, 1);
    }

    #[test]
    fn a_number_in_use_is_refused_and_the_port_that_has_it_stays() {
        let router = router(2);
        let others: Vec<OwnedFd> = (1..=2).map(|id| plug(&router, id)).collect();
        for _ in 0..2 {
            let (second, other) = tap(ALL);
            assert!(matches!(router.add_port(PortId(1), Device::Tap(second)), Err(RouterError::Device(_))));
            assert_eq!(rustix::io::read(&other, &mut [0; 1]), Ok(0), "what was refused is closed");
        }
        assert_eq!(port(&router, 1).worker, Some(0));
        talk(&others[0], &others[1]);
    }

    #[test]
    fn an_underlay_for_another_number_of_workers_is_refused() {
        let router = router(2);
        let underlay =
            |workers| Device::Underlay(Underlay::open_for(workers, "127.0.0.1:0".parse().unwrap(), 1).unwrap());
        let error = router.add_port(PortId(0), underlay(1)).unwrap_err().to_string();
        assert!(error.contains("sockets for 1 workers, but 2 workers"), "{error}");
        router.add_port(PortId(0), underlay(2)).unwrap();
        assert_eq!(port(&router, 0).worker, None);
    }

    #[test]
    fn when_a_worker_ends_the_others_receive_from_its_devices() {
        let router = router(2);
        let others: Vec<OwnedFd> = (1..=PODS).map(|id| plug(&router, id)).collect();
        assert_eq!(router.take_over(0), TakenOver::default(), "it runs");
        assert_eq!(router.workers.place(PortId(9), false, true).unwrap(), 0);
        assert!(router.workers.all[0].tell(Command::Panic));
        assert_eq!(router.events().recv().unwrap(), Event::WorkerEnded(0));
        passes(&others[1], &others[0], &packets().1);
        assert_eq!(router.take_over(0), TakenOver { moved: vec![PortId(1), PortId(3)], left: vec![PortId(9)] });
        talk(&others[0], &others[1]);
        let _late = {
            router.remove_port(PortId(3)).unwrap();
            plug(&router, 3)
        };
        assert_eq!((router.snapshot(false).unwrap().workers, port(&router, 3).worker), (1, Some(1)));
        assert!(router.workers.all[1].tell(Command::Panic));
        assert_eq!(router.events().recv().unwrap(), Event::WorkerEnded(1));
        assert!(router.events().recv().is_err(), "nobody is left");
        assert!(matches!(router.snapshot(false), Err(RouterError::Stopped)));
    }
}
