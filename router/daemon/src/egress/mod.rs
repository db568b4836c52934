//! Leaving the node without a tunnel: next hops from the kernel's tables, followed live.
//!
//! The node's kernel routes, a routing daemon writes its routes, and neighbours are the kernel's to find; here all that is read and
//! put before the data plane ([`find`] says what), which then sends by packet sockets on the node's interfaces ([`outlets`]). What is not
//! known is not guessed: such packets go to the kernel by the host port, which routes them as it would its own.
//!
//! [`Egress`] follows the kernel's notices. It reads the tables anew when they changed, the sooner the
//! faster that is done. Next hops that nobody has heard of for a while, or not yet, are looked for, as the kernel does for its own
//! packets: what leaves by a packet socket tells the kernel nothing.

pub mod answers;
pub mod find;
mod outlets;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use weft_encap::mac::Mac;

use crate::control::config::{Config, Encapsulation};
use crate::netlink::follower::{Follow, Follower};
use crate::netlink::paths::Change;
use crate::netlink::{Link, Netlink};
use find::{Device, Found, Known, Wanted};
pub use outlets::{Leads, Outlets, name_of};

/// How many next hops are looked for at once.
const SOUGHT: usize = 64;
/// Least time between two readings of the tables, which is also in proportion to how long that takes: whoever changes thousands of routes
/// without end shall not keep a CPU busy.
const PAUSE: Duration = Duration::from_millis(50);
const SHARE: u32 = 10;

/// The thread, as others see it.
pub struct Egress {
    shared: Arc<Shared>,
    follower: Follower,
}

impl fmt::Debug for Egress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Egress").field("found", &self.found()).finish_non_exhaustive()
    }
}

/// Told when something else was found.
type Listener = Box<dyn Fn() + Send + Sync>;

struct Shared {
    wanted: Mutex<Wanted>,
    found: Mutex<Arc<Found>>,
    listener: OnceLock<Listener>,
}

impl Wanted {
    /// What this configuration asks for.
    pub fn of(config: &Config) -> Wanted {
        let plain = |peer: &&crate::control::config::Peer| config.encapsulation_to(peer).0 == Encapsulation::HostGw;
        Wanted {
            underlay: config.underlay.address,
            peers: config.peers.iter().filter(plain).map(|peer| peer.underlay).collect(),
            routes: config.routes.clone(),
            outside: config.masquerade.is_some() && config.host_port.is_some(),
            host_port: config.host_port.clone(),
        }
    }
}

impl Egress {
    /// Starts it, in the namespace of the calling thread.
    ///
    /// # Errors
    /// There are no descriptors or threads left, or netlink is not allowed.
    pub fn start(config: &Config) -> anyhow::Result<Egress> {
        let shared = Arc::new(Shared {
            wanted: Mutex::new(Wanted::of(config)),
            found: Mutex::default(),
            listener: OnceLock::new(),
        });
        let finder = Finder {
            known: Known::default(),
            unread: true,
            read: None,
            pause: PAUSE,
            sought: None,
            shared: Arc::clone(&shared),
        };
        Ok(Egress { shared, follower: Follower::start(finder)? })
    }

    /// Looks for what this configuration asks for from now on.
    pub fn follow(&self, config: &Config) {
        let new = Wanted::of(config);
        let mut wanted = lock(&self.shared.wanted);
        if *wanted != new {
            *wanted = new;
            drop(wanted);
            self.follower.wake();
        }
    }

    /// Has everything be read anew.
    pub fn look_again(&self) {
        self.follower.wake();
    }

    /// What was found last.
    pub fn found(&self) -> Arc<Found> {
        Arc::clone(&lock(&self.shared.found))
    }

    /// Who is told when that changes; told at once of what was found before. The first one stays.
    pub fn on_change(&self, listener: Listener) {
        let _ = self.shared.listener.set(listener);
        self.follower.wake();
    }

    /// By which interface peers are sent packets as they are.
    pub fn plain(&self, config: &Config) -> BTreeMap<IpAddr, u32> {
        let found = self.found();
        let wanted = config.peers.iter().filter(|peer| config.encapsulation_to(peer).0 == Encapsulation::HostGw);
        wanted.filter_map(|peer| Some((peer.underlay, found.peers.get(&peer.underlay)?.0))).collect()
    }

    /// What is wrong with ways that need no tunnel.
    pub fn problems(&self, config: &Config) -> Vec<String> {
        let found = self.found();
        let mut all = found.problems.clone();
        let plain = config.peers.iter().filter(|peer| config.encapsulation_to(peer).0 == Encapsulation::HostGw);
        let (near, far): (Vec<_>, Vec<_>) = plain.partition(|peer| found.peers.contains_key(&peer.underlay));
        if let Some(one) = far.first() {
            let others = if far.len() > 1 { format!(" and {} others are", far.len() - 1) } else { " is".into() };
            all.push(format!(
                "{}{others} not on the network of {} and cannot be sent packets as they are: they go by {}; write cross_subnet = true \
                 and an encapsulation for such nodes",
                one.name,
                config.underlay.address,
                config.tunnel_to(one),
            ));
        }
        if config.host_port.is_none() && !near.is_empty() {
            all.push(
                "without a host port nothing comes back from nodes that are sent packets as they are (host-gw): write a name for \
                 host_port, or another encapsulation"
                    .into(),
            );
        }
        all
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads the kernel's tables and finds what is wanted.
struct Finder {
    known: Known,
    /// Whether tables have changed that were not read since.
    unread: bool,
    /// When they were read last.
    read: Option<Instant>,
    /// How long they are left alone after that.
    pause: Duration,
    /// Who was looked for last.
    sought: Option<(u32, IpAddr)>,
    shared: Arc<Shared>,
}

impl Follow for Finder {
    const THREAD: &'static str = "weft-egress";
    const STACK: usize = 1 << 20;

    fn work(&mut self, kernel: &mut Netlink) -> Option<Instant> {
        if !self.unread {
            return None;
        }
        let due = self.read.map(|read| read + self.pause);
        if due.is_some_and(|due| due > Instant::now()) {
            return due;
        }
        self.read_all(kernel);
        self.read = Some(Instant::now());
        None
    }

    /// Has the kernel look for next hops that are not known or have been silent, in turn.
    fn tick(&mut self, kernel: &mut Netlink) {
        let found = Arc::clone(&lock(&self.shared.found));
        let is_quiet = |key: &&(u32, IpAddr)| self.known.neighbours.get(*key).is_none_or(|(_, is_stale)| *is_stale);
        let quiet: BTreeSet<(u32, IpAddr)> = found.in_use.iter().filter(is_quiet).copied().collect();
        let after = quiet.iter().filter(|key| self.sought.is_some_and(|sought| **key > sought));
        let turn: Vec<_> = after.chain(&quiet).take(SOUGHT.min(quiet.len())).copied().collect();
        self.sought = turn.last().copied();
        for (device, address) in turn {
            if self.known.devices.get(&device).is_some_and(|device| device.up)
                && let Err(error) = kernel.use_neighbour(device, address)
            {
                tracing::debug!(%address, %error, "the kernel does not look for this neighbour");
            }
        }
    }

    fn woken(&mut self) {
        self.unread = true;
    }

    fn told(&mut self, changes: &[Change], kernel: &mut Netlink) -> io::Result<()> {
        let mut changed = false;
        for change in changes {
            match change {
                Change::Neighbour(neighbour) => {
                    changed |= self.concerns(neighbour) & self.known.neighbours.take(*neighbour);
                }
                Change::Routes => self.unread = true,
                Change::Everything => {
                    self.known.neighbours.learn(kernel)?;
                    self.unread = true;
                }
            }
        }
        if changed && !self.unread {
            self.find();
        }
        Ok(())
    }

    fn lost(&mut self, error: &io::Error) {
        tracing::error!(%error, "the kernel's notices cannot be read: all that needs no tunnel goes by the kernel");
        self.publish(Found::default());
    }
}

impl Finder {
    /// Whether somebody may be sent to because of a neighbour.
    fn concerns(&self, neighbour: &crate::netlink::paths::Neighbour) -> bool {
        let known = lock(&self.shared.found).in_use.contains(&(neighbour.device, neighbour.address));
        known || lock(&self.shared.wanted).outside
    }

    /// Reads the tables.
    fn read_all(&mut self, kernel: &mut Netlink) {
        self.unread = false;
        let begun = Instant::now();
        if let Err(error) = self.read_tables(kernel) {
            tracing::warn!(%error, "the kernel's routes cannot be read");
            // What was known is not true any more.
            self.known.table.clear();
            self.known.devices.clear();
        }
        self.find();
        self.pause = PAUSE.max(begun.elapsed() * SHARE);
    }

    fn read_tables(&mut self, kernel: &mut Netlink) -> io::Result<()> {
        let host_port = lock(&self.shared.wanted).host_port.clone();
        let leads_out =
            |link: &Link| link.mac.is_some_and(|mac| mac != Mac::ZERO) && Some(&link.name) != host_port.as_ref();
        let device = |link: Link| {
            let up = link.up && link.carrier;
            (link.index, Device { mac: link.mac.unwrap_or(Mac::ZERO), mtu: link.mtu, up })
        };
        self.known.devices = kernel.links()?.into_iter().filter(leads_out).map(device).collect();
        self.known.addresses = kernel.addresses()?;
        self.known.table = kernel.main_table()?;
        Ok(())
    }

    fn find(&mut self) {
        let wanted = lock(&self.shared.wanted).clone();
        let found = self.known.find(&wanted);
        self.publish(found);
    }

    fn publish(&mut self, found: Found) {
        *lock(&self.shared.found) = Arc::new(found);
        if let Some(listener) = self.shared.listener.get() {
            listener();
        }
    }
}
