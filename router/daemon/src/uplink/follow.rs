//! Following the kernel's routes and neighbours, live: a thread of its own, with sockets of the node's namespace.
//!
//! Told by notices, it asks the kernel how each node is reached and gives the data plane the next hops. A next hop that is in use and
//! of which nobody has heard for a while is looked for, as the kernel would do for its own packets: so it stays known, and one that is
//! gone is noticed. Hops that are not known are not looked for here; what is sent there takes the kernel's way, and has it look.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use arc_swap::ArcSwap;
use rustix::net::RecvFlags;
use weft_router::port::xdp::Hops;
use weft_router::port::xdp::programs::Tunnel;
use weft_router::port::xdp::too_big::{self, TooBig};

use super::hops::{Device, Known, Way};
use super::name_of;
use crate::netlink::Netlink;
use crate::netlink::follower::{Follow, Follower};
use crate::netlink::paths::Change;

/// How long routes are left alone after they were asked for: a router may announce thousands at once.
const PAUSE: Duration = Duration::from_millis(50);

/// How many ICMP messages are looked at within a tick: what is guessed shall take long.
const HEARD: u32 = 50;
/// How long a path is taken to be as narrow as a router said (RFC 1191 section 6.3, RFC 8201 section 4).
const FORGET: Duration = Duration::from_secs(600);

/// What is to be followed.
#[derive(Debug, Clone)]
pub struct Subject {
    /// The tunnel as its packets are written.
    pub tunnel: Tunnel,
    /// This node's underlay address.
    pub address: IpAddr,
    /// The device by which routes leave.
    pub device: u32,
    /// The device that the program is on; the same, but for a VLAN.
    pub uplink: u32,
    /// The tag of frames.
    pub vlan: Option<u16>,
}

/// The thread, as others see it.
pub struct Followed {
    hops: Arc<ArcSwap<Hops>>,
    shared: Arc<Shared>,
    follower: Follower,
}

impl fmt::Debug for Followed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Followed").field("ways", &lock(&self.shared.ways)).finish_non_exhaustive()
    }
}

/// Told when path MTUs change.
pub type Listener = Arc<dyn Fn() + Send + Sync>;

struct Shared {
    nodes: Mutex<Vec<IpAddr>>,
    ways: Mutex<BTreeMap<IpAddr, Way>>,
    path_mtus: Mutex<BTreeMap<IpAddr, u32>>,
    /// What packets to nodes may be long as was measured, if that is news.
    measured: Mutex<Option<BTreeMap<IpAddr, u32>>>,
    listener: OnceLock<Listener>,
}

impl Followed {
    /// Starts it, in the namespace of the calling thread.
    ///
    /// # Errors
    /// There are no descriptors or threads left, or netlink is not allowed.
    pub fn start(subject: Subject) -> anyhow::Result<Followed> {
        let complaints =
            too_big::open(subject.address.is_ipv4()).context("cannot open a socket for ICMP (CAP_NET_RAW)")?;
        let shared = Arc::new(Shared {
            nodes: Mutex::default(),
            ways: Mutex::default(),
            path_mtus: Mutex::default(),
            measured: Mutex::default(),
            listener: OnceLock::new(),
        });
        let hops = Arc::new(ArcSwap::from_pointee(Hops::default()));
        let finder = Finder {
            subject,
            complaints,
            known: Known::default(),
            stale: true,
            asked: None,
            heard: 0,
            believed: BTreeMap::new(),
            hops: Arc::clone(&hops),
            shared: Arc::clone(&shared),
        };
        Ok(Followed { hops, shared, follower: Follower::start(finder)? })
    }

    /// The next hops that are known, kept up to date.
    pub fn hops(&self) -> Arc<ArcSwap<Hops>> {
        Arc::clone(&self.hops)
    }

    /// Follows the ways to these nodes from now on.
    pub fn set_nodes(&self, nodes: impl Iterator<Item = IpAddr>) {
        let mut nodes: Vec<IpAddr> = nodes.collect();
        nodes.sort_unstable();
        let mut known = lock(&self.shared.nodes);
        if *known != nodes {
            *known = nodes;
            drop(known);
            self.follower.wake();
        }
    }

    /// How long packets to a node may be, where a route or a router on the way says so.
    pub fn path_mtus(&self) -> BTreeMap<IpAddr, u32> {
        lock(&self.shared.path_mtus).clone()
    }

    /// It was measured how long packets to these nodes may be, the outer IP header included. That holds, whatever routers said.
    pub fn measured(&self, all: BTreeMap<IpAddr, u32>) {
        *lock(&self.shared.measured) = Some(all);
        self.follower.wake();
    }

    /// Who is told when that changes. The first one stays.
    pub fn on_path_mtu(&self, listener: Listener) {
        let _ = self.shared.listener.set(listener);
        // What was known before has been told to nobody.
        if let Some(listener) = self.shared.listener.get()
            && !self.path_mtus().is_empty()
        {
            listener();
        }
    }

    /// How frames to a node leave; none if that is not known yet.
    pub fn way(&self, node: IpAddr) -> Option<Way> {
        lock(&self.shared.ways).get(&node).copied()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps the ways in step with the kernel.
struct Finder {
    subject: Subject,
    /// ICMP messages.
    complaints: OwnedFd,
    known: Known,
    /// Whether routes have to be asked for.
    stale: bool,
    /// When they were.
    asked: Option<Instant>,
    /// How many messages were looked at since the last tick.
    heard: u32,
    /// When a path's MTU was believed.
    believed: BTreeMap<IpAddr, Instant>,
    hops: Arc<ArcSwap<Hops>>,
    shared: Arc<Shared>,
}

impl Follow for Finder {
    const THREAD: &'static str = "weft-hops";
    const STACK: usize = 512 << 10;

    fn work(&mut self, kernel: &mut Netlink) -> Option<Instant> {
        if !self.stale {
            return None;
        }
        let due = self.asked.map(|asked| asked + PAUSE);
        if due.is_some_and(|due| due > Instant::now()) {
            return due;
        }
        self.learn_routes(kernel);
        None
    }

    fn tick(&mut self, kernel: &mut Netlink) {
        self.heard = 0;
        self.look_for_silent(kernel);
        self.forget_path_mtus();
    }

    fn woken(&mut self) {
        self.stale = true;
        let measured = lock(&self.shared.measured).take();
        measured.into_iter().flatten().for_each(|(node, mtu)| self.know(node, mtu));
    }

    fn told(&mut self, changes: &[Change], kernel: &mut Netlink) -> io::Result<()> {
        let (routes, hops) = self.known.take_all(changes);
        self.stale |= routes;
        if changes.contains(&Change::Everything) {
            self.known.neighbours.learn(kernel)?;
        }
        if hops && !self.stale {
            self.publish();
        }
        Ok(())
    }

    fn lost(&mut self, error: &io::Error) {
        tracing::error!(%error, "the kernel's notices cannot be read: ways to other nodes are no longer followed");
        self.hops.store(Arc::default());
    }

    /// What is beyond the limit waits for the next tick, or is lost.
    fn beside(&self) -> Option<BorrowedFd<'_>> {
        (self.heard < HEARD).then(|| self.complaints.as_fd())
    }

    fn heard(&mut self) {
        self.hear();
    }
}

impl Finder {
    /// Reads what routers say.
    fn hear(&mut self) {
        let mut bytes = [0; 1500];
        while self.heard < HEARD {
            let Ok((_, len)) = rustix::net::recv(&self.complaints, &mut bytes[..], RecvFlags::DONTWAIT) else { return };
            self.heard += 1;
            let (message, tunnel) = (&bytes[..len.min(bytes.len())], &self.subject.tunnel);
            let v4 = self.subject.address.is_ipv4();
            let read = if v4 { too_big::read_v4(message, tunnel) } else { too_big::read_v6(message, tunnel) };
            if let Some(told) = read {
                self.believe(told);
            }
        }
    }

    /// Sends no more to this node at once. A path does not become wider by what somebody says, but by time.
    fn believe(&mut self, told: TooBig) {
        let TooBig { node, mtu } = told;
        let now = self.hops.load().get(&node).map(|hop| hop.next.mtu);
        if now.is_some_and(|now| mtu < now) {
            tracing::info!(%node, mtu, "a router on the way to this node says how long packets may be");
            self.believed.insert(node, Instant::now());
            self.known.path_mtu.insert(node, mtu);
            self.publish();
        }
    }

    /// What was measured holds, whatever was believed.
    fn know(&mut self, node: IpAddr, mtu: u32) {
        self.believed.remove(&node);
        self.known.path_mtu.insert(node, mtu);
    }

    /// Tries again what once was too big, for paths become wider, too.
    fn forget_path_mtus(&mut self) {
        let before: Vec<IpAddr> = self.believed.keys().copied().collect();
        self.believed.retain(|_, since| since.elapsed() < FORGET);
        if self.believed.len() < before.len() {
            self.known.path_mtu.retain(|node, _| !before.contains(node) || self.believed.contains_key(node));
            self.publish();
        }
    }

    /// Asks for the device and all routes.
    fn learn_routes(&mut self, kernel: &mut Netlink) {
        (self.stale, self.asked) = (false, Some(Instant::now()));
        self.known.device = self.device(kernel).unwrap_or(None);
        let (address, port) = (self.subject.address, self.subject.tunnel.port);
        let nodes = lock(&self.shared.nodes).clone();
        self.known.routes = nodes.iter().map(|node| (*node, kernel.route(address, *node, port).ok())).collect();
        self.publish();
    }

    fn device(&self, kernel: &mut Netlink) -> io::Result<Option<Device>> {
        let Subject { device, uplink, vlan, .. } = self.subject;
        let (Some(way), Some(under)) = (kernel.detailed(device)?, kernel.detailed(uplink)?) else {
            return Ok(None);
        };
        let up = [&way, &under].iter().all(|found| found.link.up && found.link.carrier);
        let mtu = way.link.mtu.min(under.link.mtu);
        Ok(way.link.mac.filter(|_| up).map(|mac| Device { index: device, mac, mtu, vlan }))
    }

    fn publish(&mut self) {
        let ways = self.known.ways();
        let before = std::mem::replace(&mut *lock(&self.shared.ways), ways.clone());
        self.hops.store(Arc::new(self.known.hops()));
        for (node, way) in &ways {
            if before.get(node) != Some(way) {
                Finder::tell(*node, *way);
            }
        }
        let narrow = self.known.narrow();
        let before = std::mem::replace(&mut *lock(&self.shared.path_mtus), narrow.clone());
        if before != narrow
            && let Some(listener) = self.shared.listener.get()
        {
            listener();
        }
    }

    /// Logs what has become of a way, unless it is a matter of milliseconds.
    fn tell(node: IpAddr, way: Way) {
        match way {
            Way::Uplink => tracing::debug!(%node, "reached by AF_XDP"),
            Way::Unresolved(next) => tracing::debug!(%node, %next, "reached by UDP: the next hop's MAC is not known"),
            Way::Elsewhere(device) => {
                let device = name_of(device);
                tracing::warn!(%node, device, "reached by UDP: its route does not leave by the uplink");
            }
            Way::NoRoute => tracing::warn!(%node, "there is no route to this node"),
            Way::NoUplink => tracing::warn!(%node, "reached by UDP: the uplink is down or gone"),
        }
    }

    /// Has the kernel look for next hops that are in use and have been silent.
    fn look_for_silent(&mut self, kernel: &mut Netlink) {
        let hops = self.hops.load_full();
        let used = hops.iter().filter(|(_, hop)| hop.take_used()).map(|(node, _)| *node);
        let mut silent: Vec<(u32, IpAddr)> = used
            .filter_map(|node| self.known.neighbour_of(node))
            .filter(|(_, is_stale)| *is_stale)
            .map(|(key, _)| key)
            .collect();
        silent.sort_unstable();
        silent.dedup();
        for (device, address) in silent {
            if let Err(error) = kernel.use_neighbour(device, address) {
                tracing::debug!(%address, %error, "the kernel does not look for this neighbour");
            }
        }
    }
}
