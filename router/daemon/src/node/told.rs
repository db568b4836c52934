//! What the node is told to be: by its file, again with each reload, and by its source, whenever that has news.
//!
//! Both change the whole configuration in force, never a part of it. What pods got under the one before goes on: where a source gives a node
//! other ranges, the *former* ones stay its own, as the source is told, until no pod has an address of them.

use std::io::Read;
use std::net::IpAddr;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::Context;
use ipnet::IpNet;
use weft_api::{Failure, code};
use weft_ipam::{Range, Rules, Store};
use weft_router::tables::Mode;

use super::{Node, State};
use crate::control::cluster::Cluster;
use crate::control::config::check::{gateway_v4, gateway_v6};
use crate::control::config::kubernetes::NODE_NAME;
use crate::control::config::reader::{Problem, decode};
use crate::control::config::{Checked, Config};
use crate::control::host::Host;
use crate::control::saved;
use crate::control::source::{Order, View};
use crate::hostport::owner;
use crate::netlink::Netlink;

/// A configuration of the largest cluster has some megabytes; what is larger is no configuration.
const MAX_CONFIG: u64 = 64 << 20;

/// Reads the configuration and checks it against this machine, whose underlay address, unless the file says it, is `address` if that
/// is known.
pub fn read_config(path: &Path, address: Option<IpAddr>) -> anyhow::Result<Checked> {
    let node_name = std::env::var(NODE_NAME).ok();
    let look = |mut netlink: Netlink| {
        Ok(Host { defaults: netlink.default_devices()?, node_name, node_address: address, ..netlink.host()? })
    };
    let host = Netlink::open().and_then(look).context("cannot list this machine's interfaces")?;
    read_config_for(path, &host)
}

/// Logs what is odd about the configuration at `path`.
pub fn log_warnings(path: &Path, warnings: &[Problem]) {
    for warning in warnings {
        tracing::warn!("{}: {warning}", path.display());
    }
}

fn read_config_for(path: &Path, host: &Host) -> anyhow::Result<Checked> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path)
        .with_context(|| format!("cannot open the configuration {}: name it with --config", path.display()))?;
    file.take(MAX_CONFIG)
        .read_to_end(&mut bytes)
        .with_context(|| format!("cannot read the configuration {}", path.display()))?;
    decode(bytes).and_then(|text| Config::read(&text, host)).with_context(|| format!("{} is not valid", path.display()))
}

impl Node {
    /// Reads the configuration again. If it is wrong the old one stays.
    ///
    /// # Errors
    /// What is wrong, with lines and keys; or what cannot change while weftd runs.
    pub fn reload(&self) -> Result<(), Failure> {
        let refuse = |msg: String, details: &str| {
            tracing::error!("{msg}; the old configuration stays in force");
            Err(Failure { code: code::CONFIG, msg, details: details.into() })
        };
        let reloading = self.reloading.lock().unwrap_or_else(PoisonError::into_inner);
        let Checked { mut config, warnings } = match read_config(&self.config_path, self.known_address()) {
            Ok(checked) => checked,
            Err(error) => return refuse(format!("{error:#}"), "the old configuration stays in force"),
        };
        log_warnings(&self.config_path, &warnings);
        let local = Arc::clone(&self.state().local);
        let fixed = local.fixed_differences(&config);
        // What is open stays so.
        config.underlay.formats.clone_from(&local.underlay.formats);
        let has_moved = config.underlay.address != local.underlay.address;
        if !has_moved && config.underlay.subnet.is_none() {
            config.keep_device_of(&local);
        }
        if !fixed.is_empty() {
            let msg = format!("cannot change while weftd runs: {}", fixed.join(", "));
            return refuse(msg, "restart weftd, or set it back; the old configuration stays in force");
        }
        if has_moved && let Err(error) = self.rebind(&config) {
            return refuse(format!("{error:#}"), "the old configuration stays in force");
        }
        self.log_level.set(config.log.level);
        let mut state = self.state();
        let mut whole = joined(&config, state.view.cluster.as_deref());
        self.keep_former(&state, &mut whole);
        self.store.set_rules(rules(&whole, &self.store, &state.view.pods));
        let desired = state.desired.reconfigured(Arc::new(whole));
        state.local = Arc::new(config);
        self.put_in_force(&mut state, desired);
        self.tell_facts(&state);
        self.host.kick();
        tracing::info!(peers = state.desired.config.peers.len(), epoch = state.epoch, "configuration in force");
        drop(state);
        self.uplink_index.store(0, Ordering::Relaxed);
        drop(reloading);
        self.follow_uplink(None);
        Ok(())
    }

    /// Puts what a source says in force; whether that is another cluster than before, which is to be kept.
    pub fn follow(&self, view: View) -> bool {
        let has_moved = self.state().view.address != view.address;
        let is_new = self.take(view);
        if has_moved {
            self.follow_uplink(None);
        }
        is_new
    }

    fn take(&self, view: View) -> bool {
        let _reloading = self.reloading.lock().unwrap_or_else(PoisonError::into_inner);
        let (local, known) = {
            let state = self.state();
            (Arc::clone(&state.local), state.view.cluster.clone())
        };
        let new = view.cluster.clone().filter(|new| known.as_ref() != Some(new));
        // A large cluster takes a while to be compiled into a configuration: not with the state held.
        let config = new.as_deref().map(|cluster| cluster.join(&local));
        let mut state = self.state();
        if *state.view.pods != *view.pods {
            state.view.pods = Arc::clone(&view.pods);
            self.store.set_rules(rules(&state.desired.config, &self.store, &state.view.pods));
        }
        state.view = view;
        let Some((cluster, mut config)) = new.zip(config) else { return false };
        self.keep_former(&state, &mut config);
        self.store.set_rules(rules(&config, &self.store, &state.view.pods));
        let desired = state.desired.reconfigured(Arc::new(config));
        self.put_in_force(&mut state, desired);
        self.tell_former(&mut state);
        let (peers, epoch) = (cluster.peers.len(), state.epoch);
        drop(state);
        self.host.kick();
        tracing::debug!(peers, epoch, "news of the cluster in force");
        log_denied(&cluster, known.as_deref());
        true
    }

    /// What pods got under the configuration in force goes on under this one: their addresses, though the ranges are others, and their
    /// gateway.
    fn keep_former(&self, state: &State, config: &mut Config) {
        let before = &state.desired.config;
        let is_given = |range: &IpNet| config.ranges.iter().any(|own| own.contains(range) || range.contains(own));
        let former = before.ranges.iter().chain(&before.former);
        config.former = former.filter(|range| !is_given(range) && self.has_leases(range)).copied().collect();
        if config.mode == Mode::Routed && !state.attachments.is_empty() {
            config.gateway.ipv4 = before.gateway.ipv4.or(config.gateway.ipv4);
            config.gateway.ipv6 = before.gateway.ipv6.or(config.gateway.ipv6);
        }
    }

    /// Whether pods have addresses of a range.
    fn has_leases(&self, range: &IpNet) -> bool {
        let Ok(known) = Range::whole(*range) else { return false };
        let host = self.store.get(&owner());
        let own =
            host.iter().flat_map(|record| record.addresses()).filter(|address| range.contains(address)).count() as u64;
        self.store.usage("", &known).leased > own
    }

    /// Former ranges that no pod has anything of any more are given up.
    pub fn review_former(&self) {
        let _reloading = self.reloading.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.state();
        if state.desired.config.former.iter().any(|range| !self.has_leases(range)) {
            let mut config = Config::clone(&state.desired.config);
            config.former.retain(|range| self.has_leases(range));
            let desired = state.desired.reconfigured(Arc::new(config));
            self.put_in_force(&mut state, desired);
            self.host.kick();
        }
        self.tell_former(&mut state);
    }

    fn tell_former(&self, state: &mut State) {
        let former = state.desired.config.former.clone();
        let Some(orders) = self.orders.as_ref().filter(|_| state.told_former != former) else { return };
        // If there is no room for it, it is told with the next review.
        if orders.try_send(Order::Keeps(former.clone())).is_ok() {
            state.told_former = former;
        }
    }

    /// Keeps what is known of the cluster for the next start.
    pub fn keep_cluster(&self) {
        let (local, cluster) = {
            let state = self.state();
            (Arc::clone(&state.local), state.view.cluster.clone())
        };
        let Some(cluster) = cluster else { return };
        if let Err(error) = saved::save(&local.state_dir, &local, &cluster) {
            tracing::warn!(%error, "the state of the cluster cannot be kept in {}", local.state_dir.display());
        }
    }
}

/// The configuration of this node in its cluster; the file's alone if that is the source.
pub(super) fn joined(local: &Config, cluster: Option<&Cluster>) -> Config {
    cluster.map_or_else(|| local.clone(), |cluster| cluster.join(local))
}

fn log_denied(cluster: &Cluster, before: Option<&Cluster>) {
    let known = before.map_or(&[][..], |before| &before.problems);
    for problem in cluster.problems.iter().filter(|problem| !known.contains(problem)) {
        tracing::warn!("{problem}");
    }
}

/// What the configuration wants of the lease store.
/// What holds for addresses. One that the engine says a pod has, and that is no lease here, is not given to another one: leases were
/// lost, or the pod is about to go, and whoever is told of pods by the engine would take one for the other.
pub(super) fn rules(config: &Config, store: &Store, pods: &[IpAddr]) -> Rules {
    let mut reserved = config.leases.reserved.clone();
    // A gateway may be one of former ranges; after a restart it is that of the ranges of then.
    if config.mode == Mode::Routed {
        let [v4, v6] = [gateway_v4(&config.ranges).map(IpAddr::V4), gateway_v6(&config.ranges).map(IpAddr::V6)];
        let is_other = |address: &IpAddr| config.gateway_for(*address) != Some(*address);
        reserved.extend(v4.into_iter().chain(v6).filter(is_other).map(IpNet::from));
    }
    let strays = pods.iter().filter(|address| store.by_address("", **address).is_none());
    reserved.extend(strays.map(|address| IpNet::from(*address)));
    Rules { rest: Duration::from_secs(config.leases.rest), reserved }
}
