//! The node as it is: data plane, leases and attachments, kept in step.
//!
//! One mutex holds what requests change; it is held for memory work, never for work on devices, inside namespaces or for the disk. The lease
//! store has locks of its own. The data plane is told by [`Node::put_in_force`], which compiles the whole state anew, and by
//! [`Node::follow_pod`], which makes the tables with a pod of those without it.

mod following;
mod told;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Instant;

use anyhow::Context;
use ipnet::IpNet;
use rustix::rand::GetRandomFlags;
use rustix::time::{ClockId, clock_gettime};
use weft_api::{AttachmentKey, Counters};
use weft_ipam::Store;
use weft_router::stats::PortStats;
use weft_router::tables::{NodeId, Pod, WayOut};
use weft_router::{PortEnd, PortId, Router, RouterConfig, Snapshot, Tables, TakenOver};

use crate::api::losses::{Sample, Samples};
use crate::attach::census::Census;
use crate::attach::device::{self, Devices};
use crate::attach::pod::Interface;
use crate::attach::reconcile::Suspects;
use crate::attach::turn::Turns;
use crate::attach::veth::Veth;
use crate::attach::watch::Watch;
use crate::control::compile::{compile, with_pod, without_pod};
use crate::control::config::{Config, default_workers};
use crate::control::desired::{DesiredState, HOST, OUTLETS, PortNumbers, is_underlay};
use crate::control::source::{Order, View};
use crate::egress::answers::AnswerLeads;
use crate::egress::{Egress, Leads, Outlets};
use crate::hostport::HostPort;

use crate::log::LogLevel;
use crate::metrics::Requests;
use crate::probing::Probing;
use crate::uplink::{Tunnels, Uplink, Wrapping};
use told::{joined, rules};
pub use told::{log_warnings, read_config};

/// Folder of the lease store below the state folder.
const LEASES: &str = "leases";

/// The running node.
pub struct Node {
    /// Where the configuration is read from, again on reload.
    pub config_path: PathBuf,
    /// When weftd started.
    pub started: Instant,
    /// The data plane.
    pub router: Router,
    /// How other nodes are reached.
    pub uplink: Uplink,
    /// What is known of the ways to other nodes.
    pub probing: Probing,
    /// What leaves without a tunnel.
    pub egress: Egress,
    /// What leads answers from outside to the host port.
    pub answers: AnswerLeads,
    /// What sends superframes whole in formats that lie in IP.
    pub wrapping: Wrapping,
    /// The interfaces by which it does.
    pub outlets: Outlets,
    /// The kinds of devices that pods can have here.
    pub devices: Devices,
    /// The leases.
    pub store: Store,
    /// Which pods' network namespaces are still there.
    pub census: Census,
    /// Leases whose namespace was gone at the last look.
    pub suspects: Suspects,
    /// Namespaces that live as long as our descriptors.
    pub watch: Watch,
    /// One request at a time for each attachment.
    pub turns: Turns,
    /// Where the source takes orders, if it is not the file.
    pub orders: Option<tokio::sync::mpsc::Sender<Order>>,
    /// Where the source hears what this node is, if it is not the file.
    pub facts: Option<tokio::sync::watch::Sender<Arc<Config>>>,
    /// This node's own interface in the pod network.
    pub host: HostPort,
    /// Counts of the runtime's requests.
    pub requests: Requests,
    log_level: LogLevel,
    /// The number of the underlay's device; 0 if it is not known.
    uplink_index: AtomicU32,
    /// Held over a whole reload, so that the file that was read last is the one in force; and while a source's news are put in force.
    reloading: Mutex<()>,
    state: Mutex<State>,
}

/// What requests change.
pub struct State {
    /// What the tables in force were made of; its configuration has what the source knows.
    pub desired: DesiredState,
    /// The configuration as it stands in the file.
    local: Arc<Config>,
    /// What the source said last.
    pub view: View,
    /// Attachments that have a port.
    pub attachments: BTreeMap<AttachmentKey, Attachment>,
    /// Sums of ports that are gone.
    pub retired: PortStats,
    /// The counters of the last while.
    pub samples: Samples,
    /// The former ranges that the source was told of.
    told_former: Vec<IpNet>,
    /// Which ports can be given. One whose removal from the workers is under way is not yet among them.
    numbers: PortNumbers,
    epoch: u64,
}

/// An attachment that has a port.
#[derive(Debug, Clone)]
pub struct Attachment {
    /// Its port.
    pub port: PortId,
    /// Its interface in the pod.
    pub interface: Interface,
    /// Its veth, if it has no TAP.
    pub veth: Option<Arc<Veth>>,
}

impl Node {
    /// Opens the lease store, starts the data plane and gives it the underlay. `kicks` reaches whoever keeps the host port. What it returns beside the node says which veths have
    /// gone: [`Node::veth_removed`], [`Node::veths_removed`].
    ///
    /// # Errors
    /// What could not be had, and what to do.
    pub fn start(
        local: Config,
        tunnels: Tunnels,
        view: View,
        config_path: PathBuf,
        log_level: LogLevel,
        kicks: mpsc::Sender<()>,
    ) -> anyhow::Result<(Node, mpsc::Receiver<Option<u32>>)> {
        let config = joined(&local, view.cluster.as_deref());
        let folder = config.state_dir.join(LEASES);
        let census = Census::new(&config.leases.boot_id);
        let store = Store::open(&folder).with_context(|| format!("cannot open the leases in {}", folder.display()))?;
        if let Some(recovery) = store.recovery() {
            tracing::warn!("{recovery}; it was cut off");
        }
        store.set_rules(rules(&config, &store, &view.pods));
        // What rests is written down by the clock of its boot: before anything else is asked of the store.
        store.begin_boot(census.boot(), since_boot()).context("cannot write to the lease store")?;
        let workers = workers(&config);
        let desired = DesiredState::new(Arc::new(config));
        let epoch = 1;
        let sizes =
            RouterConfig { workers, seed: random_seed()?, probe_secret: random_seed()?, ..desired.config.sizes() };
        let router = Router::start(sizes, compile(&desired, epoch))
            .context("cannot start the data plane: not enough memory or descriptors (ulimit -n)")?;
        let uplink = Uplink::open(&desired.config.underlay, tunnels, &router)?;
        uplink.set_nodes(router.tables().members.keys().copied());
        let egress = Egress::start(&desired.config)?;
        let (removed, removals) = mpsc::channel();
        let devices = Devices::new(desired.config.port, desired.config.mtu, workers, removed);
        let state = State {
            desired,
            local: Arc::new(local),
            view,
            attachments: BTreeMap::new(),
            retired: PortStats::default(),
            samples: Samples::default(),
            told_former: Vec::new(),
            numbers: PortNumbers::default(),
            epoch,
        };
        let node = Node {
            config_path,
            started: Instant::now(),
            router,
            uplink,
            probing: Probing::default(),
            egress,
            answers: AnswerLeads::default(),
            wrapping: Wrapping::default(),
            outlets: Outlets::default(),
            devices,
            store,
            census,
            suspects: Suspects::default(),
            watch: Watch::new(),
            turns: Turns::default(),
            orders: None,
            facts: None,
            host: HostPort::new(kicks),
            requests: Requests::default(),
            log_level,
            uplink_index: AtomicU32::new(0),
            reloading: Mutex::default(),
            state: Mutex::new(state),
        };
        Ok((node, removals))
    }

    /// Routers between nodes said how long packets may be.
    pub fn path_mtus_changed(&self) {
        let mut state = self.state();
        let desired = DesiredState { path_mtus: self.uplink.path_mtus(), ..state.desired.clone() };
        self.put_in_force(&mut state, desired);
    }

    /// It was measured anew what ways to other nodes carry.
    pub fn ways_changed(&self) {
        let measured = self.probing.measured();
        let mut state = self.state();
        self.uplink.measured(&measured);
        let desired = DesiredState { measured, ..state.desired.clone() };
        let (before, after) = (self.router.tables(), compile(&desired, state.epoch));
        let mtus = |tables: &Tables| -> Vec<[u32; 2]> {
            let ids = (0..tables.nodes.len()).map(|index| NodeId(index as u16));
            ids.map(|id| [tables.mtu_to(id, false), tables.mtu_to(id, true)]).collect()
        };
        if mtus(&before) == mtus(&after) {
            // It counts if pods use more one day. Until then, no flow has to be decided anew.
            state.desired = desired;
        } else {
            self.put_in_force(&mut state, desired);
        }
    }

    /// Has answers to what leaves in the node's name come back by the host port; the interfaces where they do.
    fn lead_answers(&self, config: &Config, leads: &Leads) -> Vec<WayOut> {
        let ports = config.masquerade.as_ref().map(|masquerade| (masquerade.limits.first, masquerade.limits.last));
        let ways = self.answers.follow(&leads.ways, &leads.own, self.host.interface(), ports);
        if !leads.own.is_empty() {
            self.router.snat().forget(|address| !leads.own.contains(&address));
        }
        ways
    }

    /// The host port's interface is another one.
    pub fn host_made(&self) {
        let mut state = self.state();
        self.wrapping.follow(&state.desired.config, self.host.interface(), &self.router);
        let ways_out = self.lead_answers(&state.desired.config, &state.desired.leads);
        let desired = DesiredState { ways_out, ..state.desired.clone() };
        self.put_in_force(&mut state, desired);
    }

    /// The kernel's routes or neighbours lead elsewhere.
    pub fn leads_changed(&self) {
        let mut retired = PortStats::default();
        let leads = self.outlets.follow(&self.egress.found(), &self.router, &mut retired);
        let mut state = self.state();
        state.retired += &retired;
        if let Some(leads) = leads {
            let moved = leads.peers.keys().ne(state.desired.leads.peers.keys());
            let ways_out = self.lead_answers(&state.desired.config, &leads);
            let desired = DesiredState { leads, ways_out, ..state.desired.clone() };
            self.put_in_force(&mut state, desired);
            drop(state);
            if moved {
                self.host.kick();
            }
        }
    }

    /// What requests change. Never hold it while working on devices or inside namespaces.
    pub fn state(&self) -> MutexGuard<'_, State> {
        // A request that panicked leaves consistent state behind: it is changed in single steps.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters an attachment and puts it in force; `None` if no port number is free.
    pub fn attach(&self, key: &AttachmentKey, interface: Interface, veth: Option<Arc<Veth>>) -> Option<PortId> {
        let mut state = self.state();
        let port = state.numbers.take()?;
        let pod = Attachment::pod(&interface);
        state.attachments.insert(key.clone(), Attachment { port, interface, veth });
        self.follow_pod(&mut state, |before, desired, epoch| {
            let tables = with_pod(before, desired, port, &pod, epoch);
            desired.pods.insert(port, pod);
            tables
        });
        Some(port)
    }

    /// Puts in force what has become of an attachment's interface; `false` if it is gone.
    pub fn change(&self, key: &AttachmentKey, interface: &Interface) -> bool {
        let mut state = self.state();
        let Some(attachment) = state.attachments.get_mut(key) else { return false };
        attachment.interface = interface.clone();
        let port = attachment.port;
        let mut desired = state.desired.clone();
        desired.pods.insert(port, Attachment::pod(interface));
        self.put_in_force(&mut state, desired);
        true
    }

    /// Takes an attachment's port and its place in the tables away; whether it had one. The lease stays.
    pub fn detach(&self, key: &AttachmentKey) -> bool {
        let attachment = {
            let mut state = self.state();
            let Some(attachment) = state.attachments.remove(key) else { return false };
            self.follow_pod(&mut state, |before, desired, epoch| {
                let pod = desired.pods.remove(&attachment.port)?;
                without_pod(before, desired, attachment.port, &pod, epoch)
            });
            attachment
        };
        let port = attachment.port;
        self.watch.forget(port);
        // Closing a device takes the kernel a while: not with the state held.
        let last = self.router.remove_port(port);
        drop(attachment);
        let mut state = self.state();
        state.numbers.give_back(port);
        match last {
            Ok(Some(stats)) => state.retired += &stats,
            Ok(None) => {}
            Err(error) => tracing::error!(%port, %error, "cannot remove a port"),
        }
        true
    }

    /// Says who this node itself is in the pod network.
    pub fn set_host(&self, interface: Option<Pod>) {
        let mut state = self.state();
        let desired = DesiredState { host: interface, ..state.desired.clone() };
        self.put_in_force(&mut state, desired);
    }

    /// Takes the host port away from the data plane, if it is there. Its counters stay in the sums.
    pub fn remove_host(&self) {
        self.set_host(None);
        if let Ok(Some(last)) = self.router.remove_port(HOST) {
            self.state().retired += &last;
        }
    }

    /// `port` is out of service, most often because its namespace was deleted. The lease stays until DEL or GC.
    pub fn port_gone(&self, port: PortId, why: PortEnd) {
        // The number may have been given to another attachment since.
        let dead = self.router.snapshot(false).is_ok_and(|now| now.ports.iter().any(|p| p.id == port && !p.up));
        if !dead {
            return;
        }
        if is_underlay(port) {
            tracing::error!(%port, "an underlay's socket is broken: other nodes cannot be reached by it; restart weftd");
            return;
        }
        if port == HOST {
            tracing::warn!("the host port's interface is gone: it is made anew");
            return self.host.lost();
        }
        if OUTLETS.contains(&port.0) {
            return self.outlet_gone(port);
        }
        let key = {
            let state = self.state();
            let found = state.attachments.iter().find(|(_, attachment)| attachment.port == port);
            found.map(|(key, _)| key.clone())
        };
        if let Some(key) = key {
            self.detach(&key);
            match why {
                PortEnd::Device => log_gone(&key),
                PortEnd::Panic => tracing::error!(
                    container = key.container,
                    ifname = key.ifname,
                    "the pod is cut off, for its port's code panicked, see above: recreate the pod, and report this as a bug"
                ),
            }
        }
    }

    /// An interface that frames left by is gone: what it led to goes other ways, and it is opened anew if it is back.
    fn outlet_gone(&self, port: PortId) {
        if self.outlets.lost(port) {
            tracing::warn!(%port, "an interface that frames left by is gone");
            if let Ok(Some(last)) = self.router.remove_port(port) {
                self.state().retired += &last;
            }
            self.leads_changed();
            self.egress.look_again();
        }
    }

    /// Nobody but us has the namespace of this port's pod any more.
    pub fn given_up(&self, key: &AttachmentKey, port: PortId) {
        // The runtime may have asked for another since.
        let _turn = self.turns.take(key);
        let is_there = self.state().attachments.get(key).is_some_and(|attachment| attachment.port == port);
        if is_there && self.detach(key) {
            log_gone(key);
        }
    }

    /// The veth of that number is gone: with the namespace of its pod, unless we removed it. The lease stays until DEL or GC.
    pub fn veth_removed(&self, index: u32) {
        let found = {
            let state = self.state();
            let mut all = state.attachments.iter();
            let is_it = |attachment: &Attachment| attachment.veth.as_ref().is_some_and(|veth| veth.index() == index);
            all.find(|(_, attachment)| is_it(attachment)).map(|(key, _)| key.clone())
        };
        if let Some(key) = found {
            self.veth_gone(&key, index);
        }
    }

    /// Veths may have gone, with the namespaces of their pods. The leases stay until DEL or GC.
    pub fn veths_removed(&self) {
        // Attachments first: a veth is there before its attachment is entered.
        let attached: Vec<(AttachmentKey, u32)> = {
            let state = self.state();
            let all = state.attachments.iter();
            all.filter_map(|(key, attachment)| Some((key.clone(), attachment.veth.as_ref()?.index()))).collect()
        };
        let present = self.devices.started().map(|veths| veths.present());
        match present {
            None => {}
            Some(Err(error)) => tracing::warn!(%error, "the pods' veths could not be listed"),
            Some(Ok(present)) => {
                let gone = attached.into_iter().filter(|(_, index)| !present.contains(index));
                gone.for_each(|(key, index)| self.veth_gone(&key, index));
            }
        }
    }

    fn veth_gone(&self, key: &AttachmentKey, index: u32) {
        // The runtime may have asked for another since.
        let _turn = self.turns.take(key);
        let same = |attachment: &Attachment| attachment.veth.as_ref().is_some_and(|veth| veth.index() == index);
        let is_there = self.state().attachments.get(key).is_some_and(same);
        if is_there && self.detach(key) {
            log_gone(key);
        }
    }

    /// A worker of the data plane ended by itself.
    pub fn worker_ended(&self, worker: usize) {
        let TakenOver { moved, left } = self.router.take_over(worker);
        tracing::error!(
            worker,
            pods = moved.len() + left.len(),
            "a worker of the data plane panicked, see above: the others go on, and receive from its pods; restart weftd, and report \
             this as a bug"
        );
        left.into_iter().for_each(|port| self.open_again(port));
    }

    /// Gives a veth that nobody receives from to the workers anew.
    fn open_again(&self, port: PortId) {
        let found = {
            let state = self.state();
            let mut all = state.attachments.iter();
            all.find(|(_, attachment)| attachment.port == port)
                .map(|(key, attachment)| (key.clone(), attachment.clone()))
        };
        let Some((key, Attachment { veth: Some(veth), .. })) = found else { return };
        if let Ok(Some(last)) = self.router.remove_port(port) {
            self.state().retired += &last;
        }
        if let Err(error) = device::open_veth(&self.router, port, &veth) {
            tracing::error!(
                container = key.container,
                ifname = key.ifname,
                "the pod is cut off, for no other worker could take its device: recreate the pod: {error}"
            );
            drop(veth);
            self.detach(&key);
        }
    }

    /// Tries again to write releases that the disk did not take.
    pub fn write_pending_releases(&self) {
        if self.store.pending() > 0
            && let Err(error) = self.store.flush()
        {
            tracing::warn!(pending = self.store.pending(), "released leases stay taken: {error}");
        }
    }

    /// The counters as `snapshot` has them. Not to be called with the state held: the kernel is asked, too.
    pub fn sample(&self, snapshot: &Snapshot) -> Sample {
        let config = Arc::clone(&self.state().desired.config);
        Sample::take(snapshot, &config.underlay)
    }

    /// Remembers the counters of this moment; losses are reported from some of these on.
    pub fn keep_sample(&self) {
        let Ok(snapshot) = self.router.snapshot(false) else { return };
        let sample = self.sample(&snapshot);
        self.state().samples.push(sample);
    }

    /// A pod comes or goes: `change` changes what is desired, and says what the tables before become by that, if it can be said so.
    fn follow_pod(&self, state: &mut State, change: impl FnOnce(&Tables, &mut DesiredState, u64) -> Option<Tables>) {
        state.epoch += 1;
        let tables = change(&self.router.tables(), &mut state.desired, state.epoch);
        match tables {
            Some(tables) => self.router.set_tables(tables),
            None => self.put_compiled(&state.desired, state.epoch),
        }
    }

    fn put_in_force(&self, state: &mut State, desired: DesiredState) {
        if state.desired == desired {
            return;
        }
        state.epoch += 1;
        self.put_compiled(&desired, state.epoch);
        state.desired = desired;
    }

    fn put_compiled(&self, desired: &DesiredState, epoch: u64) {
        let tables = compile(desired, epoch);
        self.uplink.set_nodes(tables.members.keys().copied());
        self.egress.follow(&desired.config);
        self.wrapping.follow(&desired.config, self.host.interface(), &self.router);
        self.router.set_tables(tables);
    }
}

fn log_gone(key: &AttachmentKey) {
    tracing::info!(container = key.container, ifname = key.ifname, "the pod's network namespace is gone");
}

/// The clock by which freed addresses rest: milliseconds since the boot, whatever the date is set to.
pub fn since_boot() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let [seconds, nanos] = [now.tv_sec, now.tv_nsec].map(|part| u64::try_from(part).unwrap_or_default());
    seconds * 1000 + nanos / 1_000_000
}

/// How many workers the data plane has.
pub fn workers(config: &Config) -> usize {
    config.workers.unwrap_or_else(|| default_workers(cpus()))
}

/// CPUs that weftd may use.
fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// What keeps outsiders from choosing buckets and sequence numbers: unknown to them, and another one after each start.
pub fn random_seed() -> anyhow::Result<u64> {
    let mut bytes = [0; 8];
    let filled = rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty());
    // Requests of up to 256 bytes are answered whole (getrandom(2)).
    anyhow::ensure!(filled.context("the kernel gives no random numbers")? == bytes.len(), "too few random numbers");
    Ok(u64::from_ne_bytes(bytes))
}

/// A port's counters as the API has them.
pub fn counters(stats: &PortStats) -> Counters {
    Counters {
        received: stats.received,
        received_bytes: stats.received_bytes,
        created: stats.created(),
        sent: stats.sent,
        sent_bytes: stats.sent_bytes,
        dropped: stats.dropped_total(),
        merged: stats.merged,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_starts_have_the_same_seed() {
        let [first, second] = [random_seed().unwrap(), random_seed().unwrap()];
        assert!(first != second && first != 0, "{first:#x} {second:#x}");
    }
}
