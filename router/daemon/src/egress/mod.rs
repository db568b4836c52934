//! Leaving the node without a tunnel: next hops from the kernel's tables, followed live.
//!
//! The node's kernel routes, a routing daemon writes its routes, and neighbours are the kernel's to find; here all that is read and
//! put before the data plane ([`find`] says what), which then sends by packet sockets on the node's interfaces ([`outlets`]). What is not
//! known is not guessed: such packets go to the kernel by the host port, which routes them as it would its own.
//!
//! [`Egress`] is a thread of its own, told by the kernel's notices. It reads the tables anew when they changed, the sooner the
//! faster that is done. Next hops that nobody has heard of for a while, or not yet, are looked for, as the kernel does for its own
//! packets: what leaves by a packet socket tells the kernel nothing.

pub mod answers;
pub mod find;
mod outlets;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use weft_encap::mac::Mac;

use crate::control::config::{Config, Encapsulation};
use crate::netlink::paths::Change;
use crate::netlink::{Link, Netlink};
use find::{Device, Found, Known, Wanted};
pub use outlets::{Leads, Outlets, name_of};

/// How often next hops are looked for.
const TICK: Duration = Duration::from_secs(1);
/// How many at once.
const SOUGHT: usize = 64;
/// Least time between two readings of the tables, which is also in proportion to how long that takes: whoever changes thousands of routes
/// without end shall not keep a CPU busy.
const PAUSE: Duration = Duration::from_millis(50);
const SHARE: u32 = 10;

/// The thread, as others see it.
pub struct Egress {
    shared: Arc<Shared>,
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
    /// Told when something else is wanted, and when nobody wants to know any more.
    wake: OwnedFd,
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
        let notices = Netlink::follow_paths().context("cannot follow the kernel's routes and neighbours")?;
        let asking = Netlink::open().context("cannot open a netlink socket")?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context("cannot make an eventfd")?;
        let shared = Arc::new(Shared {
            wanted: Mutex::new(Wanted::of(config)),
            found: Mutex::default(),
            listener: OnceLock::new(),
            wake,
        });
        let mut thread = Thread {
            notices,
            asking,
            known: Known::default(),
            unread: Some(Instant::now()),
            pause: PAUSE,
            sought: None,
            shared: Arc::clone(&shared),
        };
        let builder = thread::Builder::new().name("weft-egress".into()).stack_size(1 << 20);
        builder.spawn(move || thread.run()).context("cannot start a thread (ulimit -u)")?;
        Ok(Egress { shared })
    }

    /// Looks for what this configuration asks for from now on.
    pub fn follow(&self, config: &Config) {
        let new = Wanted::of(config);
        let mut wanted = lock(&self.shared.wanted);
        if *wanted != new {
            *wanted = new;
            drop(wanted);
            self.shared.wake();
        }
    }

    /// Has everything be read anew.
    pub fn look_again(&self) {
        self.shared.wake();
    }

    /// What was found last.
    pub fn found(&self) -> Arc<Found> {
        Arc::clone(&lock(&self.shared.found))
    }

    /// Who is told when that changes; told at once of what was found before. The first one stays.
    pub fn on_change(&self, listener: Listener) {
        let _ = self.shared.listener.set(listener);
        self.shared.wake();
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

impl Drop for Egress {
    fn drop(&mut self) {
        // The thread has the only other reference, and ends when it sees that.
        self.shared.wake();
    }
}

impl Shared {
    fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Thread {
    notices: Netlink,
    asking: Netlink,
    known: Known,
    /// Since when tables have changed that were not read since, and when that may be done.
    unread: Option<Instant>,
    /// How long they are left alone after they were read.
    pause: Duration,
    /// Who was looked for last.
    sought: Option<(u32, IpAddr)>,
    shared: Arc<Shared>,
}

impl Thread {
    fn run(&mut self) {
        let (mut ticked, mut read) = (Instant::now(), None::<Instant>);
        if let Err(error) = self.learn_neighbours() {
            tracing::error!(%error, "the kernel's neighbours cannot be read: all that needs no tunnel goes by the kernel");
        }
        loop {
            if self.unread.is_some() && read.is_none_or(|read| read.elapsed() >= self.pause) {
                self.read();
                read = Some(Instant::now());
            }
            if ticked.elapsed() >= TICK {
                ticked = Instant::now();
                self.seek();
            }
            let due = read.filter(|_| self.unread.is_some()).map(|read| self.pause.saturating_sub(read.elapsed()));
            let tick = TICK.saturating_sub(ticked.elapsed());
            if let Err(error) = self.wait(due.map_or(tick, |due| due.min(tick))) {
                tracing::error!(%error, "the kernel's notices cannot be read: all that needs no tunnel goes by the kernel");
                self.publish(Found::default());
                return;
            }
            // The owner has the other one.
            if Arc::strong_count(&self.shared) == 1 {
                return;
            }
        }
    }

    /// Sleeps until there is something to do.
    fn wait(&mut self, patience: Duration) -> io::Result<()> {
        let patience = Timespec { tv_sec: 0, tv_nsec: patience.as_nanos().min(999_999_999) as _ };
        let mut ready = [
            PollFd::new(&self.shared.wake, PollFlags::IN),
            PollFd::from_borrowed_fd(self.notices.readable(), PollFlags::IN),
        ];
        match poll(&mut ready, Some(&patience)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let [woken, told] = ready.map(|fd| !fd.revents().is_empty());
        if woken {
            let _ = rustix::io::read(&self.shared.wake, &mut [0_u8; 8]);
            self.unread.get_or_insert_with(Instant::now);
        }
        if told {
            let changes = self.notices.changes()?;
            self.take(&changes)?;
        }
        Ok(())
    }

    fn take(&mut self, changes: &[Change]) -> io::Result<()> {
        let mut changed = false;
        for change in changes {
            match change {
                Change::Neighbour(neighbour) => changed |= self.concerns(neighbour) & self.known.take(*neighbour),
                Change::Routes => drop(self.unread.get_or_insert_with(Instant::now)),
                Change::Everything => {
                    self.learn_neighbours()?;
                    self.unread.get_or_insert_with(Instant::now);
                }
            }
        }
        if changed && self.unread.is_none() {
            self.find();
        }
        Ok(())
    }

    /// Whether somebody may be sent to because of a neighbour.
    fn concerns(&self, neighbour: &crate::netlink::paths::Neighbour) -> bool {
        let known = lock(&self.shared.found).in_use.contains(&(neighbour.device, neighbour.address));
        known || lock(&self.shared.wanted).outside
    }

    fn learn_neighbours(&mut self) -> io::Result<()> {
        let all = self.asking.neighbours()?;
        self.known.neighbours.clear();
        for neighbour in all {
            self.known.take(neighbour);
        }
        Ok(())
    }

    /// Reads the tables.
    fn read(&mut self) {
        self.unread = None;
        let begun = Instant::now();
        if let Err(error) = self.read_tables() {
            tracing::warn!(%error, "the kernel's routes cannot be read");
            // What was known is not true any more.
            self.known.table.clear();
            self.known.devices.clear();
        }
        self.find();
        self.pause = PAUSE.max(begun.elapsed() * SHARE);
    }

    fn read_tables(&mut self) -> io::Result<()> {
        let host_port = lock(&self.shared.wanted).host_port.clone();
        let leads_out =
            |link: &Link| link.mac.is_some_and(|mac| mac != Mac::ZERO) && Some(&link.name) != host_port.as_ref();
        let device = |link: Link| {
            let up = link.up && link.carrier;
            (link.index, Device { mac: link.mac.unwrap_or(Mac::ZERO), mtu: link.mtu, up })
        };
        self.known.devices = self.asking.links()?.into_iter().filter(leads_out).map(device).collect();
        self.known.addresses = self.asking.addresses()?;
        self.known.table = self.asking.main_table()?;
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

    /// Has the kernel look for next hops that are not known or have been silent, in turn.
    fn seek(&mut self) {
        let found = Arc::clone(&lock(&self.shared.found));
        let is_quiet = |key: &&(u32, IpAddr)| self.known.neighbours.get(*key).is_none_or(|(_, is_stale)| *is_stale);
        let quiet: BTreeSet<(u32, IpAddr)> = found.in_use.iter().filter(is_quiet).copied().collect();
        let after = quiet.iter().filter(|key| self.sought.is_some_and(|sought| **key > sought));
        let turn: Vec<_> = after.chain(&quiet).take(SOUGHT.min(quiet.len())).copied().collect();
        self.sought = turn.last().copied();
        for (device, address) in turn {
            if self.known.devices.get(&device).is_some_and(|device| device.up)
                && let Err(error) = self.asking.use_neighbour(device, address)
            {
                tracing::debug!(%address, %error, "the kernel does not look for this neighbour");
            }
        }
    }
}
