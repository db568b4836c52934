//! The router from the outside: starting it, giving it ports and tables, asking it.
//!
//! [`Router`] is the daemon's handle. Commands go to the worker through a channel and are answered in
//! order; tables are swapped as one `Arc`. What the worker notices by itself (a port whose namespace went
//! away) comes back as an [`Event`].

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use arc_swap::ArcSwap;
use crossbeam::channel::{self, Receiver, Sender};

use crate::bridge::FdbEntry;
use crate::conntrack::FlowEntry;
use crate::port::tap::Tap;
use crate::port::udp::Underlay;
use crate::port::{Capabilities, PortId};
use crate::stats::{NodeStats, PortStats};
use crate::tables::Tables;
use crate::time::Instant;
use crate::worker;

/// Sizes and limits of the worker. The defaults suit a node with some hundred pods.
#[derive(Copy, Clone, Debug)]
pub struct RouterConfig {
    /// Small buffers (2 KiB each, touched only when used).
    pub chunks: u32,
    /// Large buffers (64 KiB each, touched only when used).
    pub supers: u32,
    /// Learned MACs that the node keeps at most.
    pub fdb_limit: usize,
    /// How long a learned MAC is kept after it was last seen.
    pub fdb_age: Duration,
    /// Flows that the cache holds; rounded up to a power of two.
    pub flows: usize,
    /// Broadcast and multicast copies per second and port.
    pub flood_rate: u32,
    /// ICMP errors per second and port.
    pub icmp_rate: u32,
    /// Keeps outsiders from predicting hashes; the daemon passes a random one, tests a fixed one.
    pub seed: u64,
}

impl Default for RouterConfig {
    fn default() -> Self {
        RouterConfig {
            chunks: 8192,
            supers: 256,
            fdb_limit: 16_384,
            fdb_age: Duration::from_secs(300),
            flows: 65_536,
            flood_rate: 10_000,
            icmp_rate: 100,
            seed: 0,
        }
    }
}

/// A device to be made a port.
pub enum Device {
    /// A pod's TAP, offloads negotiated.
    Tap(Tap),
    /// The UDP underlay.
    Underlay(Underlay),
}

/// What the worker noticed.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// This port is out of service: it was removed from the worker, its counters stay until
    /// [`Router::remove_port`].
    PortGone(PortId, PortEnd),
}

/// Why a port is out of service.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum PortEnd {
    /// Its device is gone, with the namespace that it was in, or does not work any more.
    Device,
    /// The port's own code panicked: a bug.
    Panic,
}

/// One port as the worker sees it.
#[derive(Clone, Debug)]
pub struct PortSnapshot {
    /// Its number.
    pub id: PortId,
    /// `tap`, `udp`, `memory`.
    pub kind: &'static str,
    /// Whether its device works.
    pub up: bool,
    /// What its device takes.
    pub capabilities: Capabilities,
    /// Its counters.
    pub stats: PortStats,
}

/// The worker's state at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// When.
    pub now: Instant,
    /// Epoch of the tables in use.
    pub epoch: u64,
    /// All ports, by number.
    pub ports: Vec<PortSnapshot>,
    /// Counters per node, indexed by `NodeId`.
    pub nodes: Vec<NodeStats>,
    /// Learned MACs.
    pub fdb: Vec<FdbEntry>,
    /// Flows in the cache.
    pub flows: Vec<FlowEntry>,
    /// Free chunks and super buffers.
    pub free: (usize, usize),
}

/// Why the router could not do something.
#[derive(Debug)]
pub enum RouterError {
    /// The worker thread is gone (it ended, or never started).
    Stopped,
    /// The device could not be made a port.
    Device(io::Error),
}

impl std::fmt::Display for RouterError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            RouterError::Stopped => f.write_str("the data-plane worker has stopped"),
            RouterError::Device(error) => write!(f, "the worker cannot use the device: {error}"),
        }
    }
}

impl std::error::Error for RouterError {}

/// What is left of a port that was taken away.
pub(crate) struct Removed {
    pub(crate) stats: PortStats,
    /// Closed by the asker, since it takes the kernel some milliseconds that the worker does not have.
    pub(crate) device: Option<OwnedFd>,
}

pub(crate) enum Command {
    AddPort(PortId, Device, Sender<Result<(), RouterError>>),
    RemovePort(PortId, Sender<Option<Removed>>),
    Snapshot { flows: bool, answer: Sender<Snapshot> },
    Stop,
}

/// The running data plane.
pub struct Router {
    commands: Sender<Command>,
    waker: Arc<mio::Waker>,
    tables: Arc<ArcSwap<Tables>>,
    events: Receiver<Event>,
    thread: Option<JoinHandle<()>>,
}

impl Router {
    /// Starts the worker thread.
    ///
    /// # Errors
    /// The kernel's, if there is no memory or no descriptor for it.
    pub fn start(config: RouterConfig, tables: Tables) -> io::Result<Router> {
        let (commands, inbox) = channel::unbounded();
        let (outbox, events) = channel::unbounded();
        let tables = Arc::new(ArcSwap::from_pointee(tables));
        let (waker, thread) = worker::spawn(config, Arc::clone(&tables), inbox, outbox)?;
        Ok(Router { commands, waker, tables, events, thread: Some(thread) })
    }

    /// Puts new tables in force; the worker uses them from its next batch on. Without loss.
    pub fn set_tables(&self, tables: Tables) {
        self.tables.store(Arc::new(tables));
        let _ = self.waker.wake();
    }

    /// The tables in force.
    pub fn tables(&self) -> Arc<Tables> {
        self.tables.load_full()
    }

    /// Gives the worker a port. It forwards nothing until the tables say who is behind it.
    ///
    /// # Errors
    /// The device cannot be polled, or the worker is gone.
    pub fn add_port(&self, id: PortId, device: Device) -> Result<(), RouterError> {
        self.ask(|answer| Command::AddPort(id, device, answer))?
    }

    /// Takes a port away and closes its device. Returns its last counters; `None` if there was no such port.
    ///
    /// # Errors
    /// The worker is gone.
    pub fn remove_port(&self, id: PortId) -> Result<Option<PortStats>, RouterError> {
        let removed = self.ask(|answer| Command::RemovePort(id, answer))?;
        Ok(removed.map(|Removed { stats, device }| {
            drop(device);
            stats
        }))
    }

    /// The worker's state, between two batches. Flows are copied only if asked for.
    ///
    /// # Errors
    /// The worker is gone.
    pub fn snapshot(&self, flows: bool) -> Result<Snapshot, RouterError> {
        self.ask(|answer| Command::Snapshot { flows, answer })
    }

    /// What the worker noticed by itself, in order.
    pub fn events(&self) -> &Receiver<Event> {
        &self.events
    }

    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Result<T, RouterError> {
        let (answer, reply) = channel::bounded(1);
        self.commands.send(command(answer)).map_err(|_| RouterError::Stopped)?;
        self.waker.wake().map_err(|_| RouterError::Stopped)?;
        reply.recv().map_err(|_| RouterError::Stopped)
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Stop);
        let _ = self.waker.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
