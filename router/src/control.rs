//! The router from the outside: starting it, giving it ports and tables, asking it.
//!
//! [`Router`] is the daemon's handle. It runs one or more workers ([`crate::worker`]), which share the tables, swapped as one
//! `Arc`, and the FDB, and nothing else: frames and buffers never move between them. Each device is received from by one worker, which
//! [`workers::Workers`] chooses, and the underlay by all, each with a socket of its own; all workers send by all devices. Commands
//! go to each worker through a channel and are answered in order; what they answer is added up. What a worker notices by
//! itself (a port whose namespace went away) comes back as an [`Event`].
//!
//! A worker that ends by itself, which takes a bug, leaves the others running: the daemon hears of it as an
//! event, and has them receive from its TAPs ([`Router::take_over`]). A veth's frames came into that worker's own memory, so a veth has to
//! be added again.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use arc_swap::ArcSwap;
use crossbeam::channel::{self, Receiver, Sender};

use crate::bridge::FdbEntry;
use crate::conntrack::FlowEntry;
use crate::forward::Memory;
use crate::port::packet::Outlet;
use crate::port::raw::wrapper::Wrapper;
use crate::port::raw::{RawHalf, RawTunnel};
use crate::port::tap::Tap;
use crate::port::udp::{Sockets, Underlay};
use crate::port::xdp::programs::Tunnel;
use crate::port::xdp::{Hops, OpenUplink, Uplink, XdpDevice};
use crate::port::{Capabilities, PortId};
use crate::probing::Question;
use crate::returns::ReturnsUse;
use crate::snat::{self, Snat};
use crate::stats::{NodeStats, PortStats};
use crate::tables::Tables;
use crate::time::Instant;
use crate::worker::{self, News};

mod merge;
mod workers;

use workers::Workers;

/// News that wait to be taken, at most.
const NEWS: usize = 1024;

/// Sizes and limits. The defaults suit a node with some hundred pods.
#[derive(Copy, Clone, Debug)]
pub struct RouterConfig {
    /// Worker threads; one at least.
    pub workers: usize,
    /// Small buffers of each worker (2 KiB each, touched only when used).
    pub chunks: u32,
    /// Whether these shall be in huge pages, if there are as many.
    pub huge_pages: bool,
    /// Large buffers of each worker (64 KiB each, touched only when used).
    pub supers: u32,
    /// Learned MACs that the node keeps at most.
    pub fdb_limit: usize,
    /// How long a learned MAC is kept after it was last seen.
    pub fdb_age: Duration,
    /// Flows that the caches hold, in equal parts for each worker; rounded up to a power of two.
    pub flows: usize,
    /// Conversations that the host port brought and whose replies have to go back by it; rounded up to a power of two.
    pub host_flows: usize,
    /// Reserved ports, and conversations that leave the cluster by them.
    pub masquerade: snat::Limits,
    /// Broadcast and multicast copies per second and port. What enters by several workers has an equal part in each.
    pub flood_rate: u32,
    /// ICMP errors per second and port, likewise.
    pub icmp_rate: u32,
    /// Keeps others from making up answers to questions about the way to a node; from the same source.
    pub probe_secret: u64,
    /// Keeps outsiders from predicting hashes; the daemon passes a random one, tests a fixed one.
    pub seed: u64,
}

impl Default for RouterConfig {
    fn default() -> Self {
        RouterConfig {
            workers: 1,
            chunks: 8192,
            huge_pages: false,
            supers: 256,
            fdb_limit: 16_384,
            fdb_age: Duration::from_secs(300),
            flows: 65_536,
            host_flows: 65_536,
            masquerade: snat::Limits::default(),
            flood_rate: 10_000,
            icmp_rate: 100,
            probe_secret: 0,
            seed: 0,
        }
    }
}

/// A device to be made a port.
pub enum Device {
    /// A pod's TAP, offloads negotiated.
    Tap(Tap),
    /// The host end of a pod's veth, by its number in the calling thread's network namespace. It has a transmit queue for each worker and
    /// one receive queue.
    Veth(u32),
    /// An interface of the node's, to be sent by.
    Outlet(Outlet),
    /// The UDP underlay, with sockets for each worker.
    Underlay(Underlay),
    /// The underlay of a format that lies in IP, with sockets for each worker.
    Raw(RawTunnel),
    /// The same, and beside it the uplink that most of its packets take, to the next hops that are known.
    Uplink {
        /// What takes what the uplink does not.
        underlay: Underlay,
        /// The uplink.
        uplink: OpenUplink,
        /// Where nodes are reached.
        hops: Arc<ArcSwap<Hops>>,
    },
}

/// What a worker noticed.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// This port is out of service, which is told once: its counters stay until [`Router::remove_port`].
    PortGone(PortId, PortEnd),
    /// The worker of this number ended by itself, which is a bug: [`Router::take_over`] moves its TAPs to others.
    WorkerEnded(usize),
}

/// Why a port is out of service.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum PortEnd {
    /// Its device is gone, with the namespace that it was in, or does not work any more.
    Device,
    /// The port's own code panicked: a bug.
    Panic,
}

/// One port, as all workers see it together.
#[derive(Clone, Debug)]
pub struct PortSnapshot {
    /// Its number.
    pub id: PortId,
    /// `tap`, `xdp`, `udp`, `packet`, `memory`.
    pub kind: &'static str,
    /// Whether its device works, for all workers.
    pub up: bool,
    /// Which worker receives from it; `None` if all do.
    pub worker: Option<usize>,
    /// What its device takes.
    pub capabilities: Capabilities,
    /// Its counters.
    pub stats: PortStats,
}

/// The state of all workers together, each at one moment between two of its batches.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// When.
    pub now: Instant,
    /// Epoch of the tables in use by all workers.
    pub epoch: u64,
    /// Workers that run.
    pub workers: usize,
    /// All ports, by number.
    pub ports: Vec<PortSnapshot>,
    /// Counters per node, indexed by `NodeId`.
    pub nodes: Vec<NodeStats>,
    /// Learned MACs.
    pub fdb: Vec<FdbEntry>,
    /// Flows in the cache.
    pub flows: Vec<FlowEntry>,
    /// What is remembered of what the host port brought.
    pub returns: ReturnsUse,
    /// Free chunks and super buffers.
    pub free: (usize, usize),
    /// How many workers have their small buffers in huge pages.
    pub huge_pages: usize,
}

/// Why the router could not do something.
#[derive(Debug)]
pub enum RouterError {
    /// No worker runs.
    Stopped,
    /// The device could not be made a port.
    Device(io::Error),
}

impl std::fmt::Display for RouterError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            RouterError::Stopped => f.write_str("the data plane has stopped"),
            RouterError::Device(error) => write!(f, "the data plane cannot use the device: {error}"),
        }
    }
}

impl std::error::Error for RouterError {}

/// What one worker gets of a device.
pub(crate) enum Half {
    Tap { tap: Arc<Tap>, receives: bool },
    Xdp { device: Box<XdpDevice>, receives: bool },
    Outlet(Arc<Outlet>),
    Underlay(Sockets),
    Raw { half: RawHalf, receives: bool },
    Uplink(Box<UplinkHalf>),
}

/// What one worker gets of an uplink.
pub(crate) struct UplinkHalf {
    pub(crate) sockets: Sockets,
    pub(crate) devices: Vec<XdpDevice>,
    pub(crate) tunnel: Tunnel,
    pub(crate) hops: Arc<ArcSwap<Hops>>,
}

/// A port for one worker.
pub(crate) struct NewPort {
    pub(crate) id: PortId,
    pub(crate) half: Half,
    pub(crate) shared: Shared,
}

/// What the workers' ports of one device have in common.
#[derive(Clone)]
pub(crate) struct Shared {
    /// By how many workers its frames enter.
    pub(crate) receivers: u32,
    /// Whether one of them has told that it is gone.
    pub(crate) told: Arc<AtomicBool>,
}

/// What is left of a port that was taken away.
pub(crate) struct Removed {
    pub(crate) stats: PortStats,
    /// From the worker that was the last to let go. Closed by the asker, since it takes the kernel some milliseconds that
    /// the worker does not have.
    pub(crate) device: Option<OwnedFd>,
}

pub(crate) enum Command {
    AddPort(NewPort, Sender<Result<(), RouterError>>),
    /// Put this in the place of the port with its number, whose counters go on.
    ReplacePort(NewPort, Sender<Result<Option<OwnedFd>, RouterError>>),
    RemovePort(PortId, Sender<Option<Removed>>),
    /// Receive from this port, too.
    Receive(PortId),
    /// Ask other nodes.
    Ask(Vec<Question>),
    Snapshot {
        flows: bool,
        answer: Sender<Snapshot>,
    },
    Stop,
    #[cfg(test)]
    Panic,
}

/// What became of the devices of a worker that ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TakenOver {
    /// From these another worker receives.
    pub moved: Vec<PortId>,
    /// From these nobody receives until they are removed and added again.
    pub left: Vec<PortId>,
}

/// The running data plane.
pub struct Router {
    workers: Workers,
    tables: Arc<ArcSwap<Tables>>,
    memory: Memory,
    events: Receiver<Event>,
    news: Receiver<News>,
}

impl Router {
    /// Starts the worker threads.
    ///
    /// # Errors
    /// The kernel's, if there is no memory or no descriptor for them.
    pub fn start(config: RouterConfig, tables: Tables) -> io::Result<Router> {
        let (outbox, events) = channel::unbounded();
        let (news_outbox, news) = channel::bounded(NEWS);
        let tables = Arc::new(ArcSwap::from_pointee(tables));
        let memory = Memory::new(&config);
        let shared =
            worker::Shared { tables: Arc::clone(&tables), memory: memory.clone(), events: outbox, news: news_outbox };
        let workers = Workers::start(config, &shared)?;
        Ok(Router { workers, tables, memory, events, news })
    }

    /// Puts new tables in force; each worker uses them from its next batch on. Without loss.
    pub fn set_tables(&self, tables: Tables) {
        self.tables.store(Arc::new(tables));
        self.workers.wake();
    }

    /// The tables in force.
    pub fn tables(&self) -> Arc<Tables> {
        self.tables.load_full()
    }

    /// By what superframes leave whole in formats that lie directly in IP. Without, they are cut here.
    pub fn set_wrapper(&self, wrapper: Option<Wrapper>) {
        self.workers.set_wrapper(wrapper.map(Arc::new));
    }

    /// How many workers were started.
    pub fn workers(&self) -> usize {
        self.workers.count()
    }

    /// Opens an uplink for the workers, to become [`Device::Uplink`]. From the calling thread's network namespace.
    ///
    /// # Errors
    /// Those of [`OpenUplink::open`], in words.
    pub fn open_uplink(&self, uplink: &Uplink, tunnel: Tunnel) -> io::Result<OpenUplink> {
        OpenUplink::open(uplink, tunnel, &self.workers.umems())
    }

    /// Gives the workers a port. It forwards nothing until the tables say who is behind it.
    ///
    /// # Errors
    /// The device cannot be polled, the underlay has sockets for another number of workers, AF_XDP cannot be used with the veth, or no
    /// worker runs.
    pub fn add_port(&self, id: PortId, device: Device) -> Result<(), RouterError> {
        self.workers.add_port(id, device)
    }

    /// Gives the workers another device for a port that they have, whose counters go on, and closes the one before. What waits for the port
    /// leaves by the new one. If that cannot be used the old one stays, for those workers that could not take it.
    ///
    /// # Errors
    /// Those of [`Router::add_port`].
    pub fn replace_port(&self, id: PortId, device: Device) -> Result<(), RouterError> {
        self.workers.replace_port(id, device)
    }

    /// Opens a veth that is nobody's port, by its number in the calling thread's network namespace, and keeps it open: it has a queue for
    /// each worker. As long as one veth is open, opening another one is quick, for the workers' memory is registered with the kernel and
    /// the program is in use.
    ///
    /// # Errors
    /// Those of [`Router::add_port`] with a veth.
    pub fn keep_veths(&self, interface: u32) -> io::Result<()> {
        self.workers.keep_veths(interface)
    }

    /// Takes a port away from all workers and closes its device. Returns its last counters; `None` if there was no such port.
    ///
    /// # Errors
    /// No worker runs.
    pub fn remove_port(&self, id: PortId) -> Result<Option<PortStats>, RouterError> {
        self.workers.remove_port(id)
    }

    /// The workers' state. Flows are copied only if asked for.
    ///
    /// # Errors
    /// No worker runs.
    pub fn snapshot(&self, flows: bool) -> Result<Snapshot, RouterError> {
        let snapshot = self.workers.snapshot(flows)?;
        let Memory { fdb, returns, .. } = &self.memory;
        Ok(Snapshot { fdb: fdb.entries().collect(), returns: returns.usage(), ..snapshot })
    }

    /// Who is who outside of the cluster.
    pub fn snat(&self) -> &Snat {
        &self.memory.snat
    }

    /// Has others receive from the TAPs of a worker that ended.
    pub fn take_over(&self, worker: usize) -> TakenOver {
        self.workers.take_over(worker)
    }

    /// Has these questions asked, by one worker after the other. What is not asked is not told of: no answer is all that there is.
    pub fn ask(&self, questions: Vec<Question>) {
        self.workers.ask_others(questions);
    }

    /// What came of questions, and with which nodes there is traffic. What is not taken in time is lost.
    pub fn news(&self) -> &Receiver<News> {
        &self.news
    }

    /// What the workers noticed by themselves, in the order of each.
    pub fn events(&self) -> &Receiver<Event> {
        &self.events
    }
}
