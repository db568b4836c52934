//! The state as a whole, problems first: each says what is wrong and what to do.

use std::net::SocketAddr;

use weft_api::{Failure, FreeBuffers, HostPortInfo, RangeUse, Status, code};
use weft_ipam::{Store, Usage};
use weft_router::Snapshot;
use weft_router::tables::{LEAST_V6, Mode};

use super::show;
use crate::attach::{addresses, key_of};
use crate::control::compile::addresses as addresses_of;
use crate::control::config::Config;
use crate::control::desired::UNDERLAY;
use crate::control::host::{Host, Interface};
use crate::hostport::{self, forwarding};
use crate::netlink::Netlink;
use crate::netlink::routes::PROTOCOL;
use crate::node::{Node, State, counters};

/// Above this part of its addresses a range is nearly used up.
const NEARLY: (u64, u64) = (9, 10);

/// CNI STATUS: can an ADD be served now?
pub fn ready(node: &Node) -> Result<(), Failure> {
    let fail = |code, msg: String, details: &str| Err(Failure { code, msg, details: details.into() });
    let Ok(snapshot) = node.router.snapshot(false) else {
        return fail(code::LIMITED, "the data plane has stopped".into(), "restart weftd; its log says why");
    };
    // Asking the kernel takes a while: not with the state held.
    let host = host();
    node.devices.choose(None)?;
    let state = node.state();
    let config = &state.desired.config;
    if let Some(problem) = underlay_problem(&snapshot, config, host.as_ref()) {
        return fail(code::LIMITED, problem, "pods of this node reach each other, but no other node");
    }
    if config.ranges.is_empty() {
        let why = state.view.trouble.clone().unwrap_or_else(|| "its source has not said which".into());
        return fail(code::NOT_AVAILABLE, format!("this node has no ranges: {why}"), "");
    }
    if let Some(trouble) = node.store.trouble().or(node.store.poisoned()) {
        return fail(code::NOT_AVAILABLE, trouble, "no lease can be made durable");
    }
    for (v4, family) in [(true, "IPv4"), (false, "IPv6")] {
        let mut of_family = usages(&node.store, &state).filter(|(range, _)| range.addr().is_ipv4() == v4).peekable();
        if of_family.peek().is_some() && of_family.all(|(_, usage)| usage.leased >= usage.size) {
            let msg = format!("no {family} address is free in this node's ranges");
            return fail(code::NOT_AVAILABLE, msg, "remove pods, or give the node another range and reload");
        }
    }
    Ok(())
}

/// The daemon's state.
pub fn status(node: &Node) -> Result<Status, Failure> {
    let snapshot = show::snapshot(node, false)?;
    let host = host();
    let sample = node.sample(&snapshot);
    let kernel = node.host.state();
    let state = node.state();
    let config = &state.desired.config;
    let device = host.as_ref().and_then(|host| underlay_device(config, host));
    let mut sum = state.retired;
    for port in &snapshot.ports {
        sum += &port.stats;
    }
    let kind = snapshot.ports.iter().find(|port| port.id == UNDERLAY);
    let mut problems = problems(&node.store, &state, &snapshot, host.as_ref());
    problems.extend(kind.and_then(|port| node.uplink.problem_of(port.kind)));
    problems.extend(node.uplink.path_problems(|underlay| {
        let peer = config.peers.iter().find(|peer| peer.underlay == underlay);
        peer.map(|peer| peer.name.clone())
    }));
    problems.extend(node.probing.problems(&config.node));
    problems.extend(node.uplink.tunnel_problems(config));
    problems.extend(node.egress.problems(config));
    problems.extend(node.answers.problems());
    problems.extend(node.wrapping.problem());
    problems.extend(node.outlets.problems());
    problems.extend(kernel.problems.iter().cloned());
    let tunnels = config.peers.iter().any(|peer| !state.desired.leads.peers.contains_key(&peer.underlay));
    problems.extend(forwarding::problems(config, host.as_ref(), &node.outlets.names(), tunnels));
    problems.extend(worker_problem(snapshot.workers, node.router.workers()));
    problems.extend(node.devices.choose(None).err().map(|failure| failure.to_string()));
    problems.extend(state.samples.problems(&sample, node.started, config));
    Ok(Status {
        problems,
        node: config.node.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        uptime: node.started.elapsed().as_secs_f64(),
        mode: if config.mode == Mode::Routed { "routed".into() } else { "bridged".into() },
        ranges: config.ranges.iter().map(ToString::to_string).collect(),
        gateways: [config.gateway.ipv4.map(Into::into), config.gateway.ipv6.map(Into::into)]
            .into_iter()
            .flatten()
            .collect(),
        gateway_mac: config.gateway.mac.to_string(),
        vtep_mac: config.vtep_mac.to_string(),
        underlay: SocketAddr::new(config.underlay.address, config.underlay.port).to_string(),
        underlay_kind: kind
            .map(|port| format!("{}, offloads: {}", node.uplink.shown(port.kind), port.capabilities))
            .unwrap_or_default(),
        workers: node.router.workers(),
        port: node.devices.shown(),
        source: config.source.to_string(),
        host_port: state.desired.host.as_ref().map(|interface| HostPortInfo {
            ifname: config.host_port.clone().unwrap_or_default(),
            mac: interface.mac.to_string(),
            addresses: addresses_of(interface).collect(),
            routes: kernel.routes.len(),
            protocol: PROTOCOL,
            flows: snapshot.returns.entries,
            evicted: snapshot.returns.evicted,
        }),
        masquerade: show::masquerade(node, &state.desired),
        encapsulation: usual(config),
        vni: config.vni.get(),
        mtu: config.mtu,
        underlay_mtu: device.map_or(config.underlay.mtu, |device| device.mtu),
        pods: state.attachments.len(),
        peers: config.peers.len(),
        leases: usages(&node.store, &state)
            .map(|(range, usage)| RangeUse {
                range: range.to_string(),
                leased: usage.leased,
                resting: usage.resting,
                reserved: usage.reserved,
                size: usage.size,
            })
            .collect(),
        epoch: snapshot.epoch,
        counters: counters(&sum),
        free: Some(FreeBuffers { chunks: snapshot.free.0, supers: snapshot.free.1, huge_pages: snapshot.huge_pages }),
    })
}

/// How full each of the node's ranges is.
fn usages(store: &Store, state: &State) -> impl Iterator<Item = (ipnet::IpNet, Usage)> {
    let config = &state.desired.config;
    let own: Vec<_> = store.get(&hostport::owner()).map(|record| record.addresses().collect()).unwrap_or_default();
    config.ranges.iter().filter_map(move |range| {
        let known = addresses::own_range(config, *range).ok()?;
        let mut usage = store.usage("", &known);
        // What this node itself has was never any pod's to have.
        if own.iter().any(|address| known.contains(*address)) {
            usage.leased = usage.leased.saturating_sub(1);
            usage.size = if usage.size == u64::MAX { u64::MAX } else { usage.size.saturating_sub(1) };
        }
        Some((*range, usage))
    })
}

fn host() -> Option<Host> {
    Netlink::open().and_then(|mut netlink| netlink.host()).ok()
}

fn underlay_device<'h>(config: &Config, host: &'h Host) -> Option<&'h Interface> {
    host.holder_of(config.underlay.address)
}

/// What other nodes are sent by, in the words of the configuration.
fn usual(config: &Config) -> String {
    let underlay = &config.underlay;
    let plain = if underlay.cross_subnet { "host-gw within the subnet, else " } else { "" };
    format!("{plain}{}", underlay.encapsulation.name())
}

/// Everything that is wrong, the gravest first, but for losses.
fn problems(store: &Store, state: &State, snapshot: &Snapshot, host: Option<&Host>) -> Vec<String> {
    let config = &state.desired.config;
    let mut all = Vec::new();
    all.extend(underlay_problem(snapshot, config, host));
    all.extend(host.and_then(|host| mtu_problem(config, host)));
    all.extend(store_problems(store));
    all.extend(source_problems(state));
    all.extend(unattached_problem(store, state));
    all.extend(peer_problems(state, snapshot));
    all.extend(usages(store, state).filter(|(_, usage)| nearly_full(*usage)).map(|(range, usage)| {
        let (leased, size) = (usage.leased, usage.size);
        format!("{leased} of the {size} addresses of {range} are leased: give the node another range and reload")
    }));
    all
}

fn nearly_full(usage: Usage) -> bool {
    u128::from(usage.leased) * u128::from(NEARLY.1) > u128::from(usage.size) * u128::from(NEARLY.0)
}

fn underlay_problem(snapshot: &Snapshot, config: &Config, host: Option<&Host>) -> Option<String> {
    let address = config.underlay.address;
    if !snapshot.ports.iter().any(|port| port.id == UNDERLAY && port.up) {
        return Some("the underlay's socket is broken: other nodes cannot be reached; restart weftd".into());
    }
    match underlay_device(config, host?) {
        None => Some(format!("no interface has the underlay address {address}: give it back, or configure another")),
        Some(device) if !device.up => {
            Some(format!("{}, which has the underlay address {address}, is down: set it up", device.name))
        }
        Some(_) => None,
    }
}

fn worker_problem(running: usize, started: usize) -> Option<String> {
    (running < started).then(|| {
        format!(
            "{} of the {started} workers of the data plane stopped, which is a bug: weftd's log says why; restart weftd",
            started - running
        )
    })
}

fn mtu_problem(config: &Config, host: &Host) -> Option<String> {
    let device = underlay_device(config, host)?;
    let needed = config.mtu + config.underlay.encapsulation.overhead(config.underlay.address.is_ipv4());
    let what_follows = match config.mtu {
        LEAST_V6 => {
            "longer packets go to other nodes in fragments, which is slow and which firewalls may drop; raise the device's MTU"
        }
        _ => "large packets are lost; raise the device's MTU, or lower the key mtu and recreate the pods",
    };
    (device.mtu < needed).then(|| {
        format!(
            "pods have an MTU of {}, which needs {needed} on the underlay, but {} has {}: {what_follows}",
            config.mtu, device.name, device.mtu
        )
    })
}

fn source_problems(state: &State) -> Vec<String> {
    let trouble = state.view.trouble.iter().map(|why| format!("{why}; what was known of the cluster stays in force"));
    let denied = state.view.cluster.iter().flat_map(|cluster| &cluster.problems).cloned();
    trouble.chain(denied).collect()
}

fn store_problems(store: &Store) -> Vec<String> {
    let pending = store.pending();
    let leases = if pending == 1 { "lease" } else { "leases" };
    let waiting =
        (pending > 0).then(|| format!("{pending} released {leases} could not be written to the lease store yet"));
    [store.trouble(), waiting].into_iter().flatten().collect()
}

fn unattached_problem(store: &Store, state: &State) -> Option<String> {
    let without = store.records();
    let without: Vec<String> = without
        .iter()
        // What is nobody's pod has no device: a reservation, or what another program gave.
        .filter(|record| record.facts.mac.is_some() && record.owner != hostport::owner())
        .map(|record| key_of(&record.owner))
        .filter(|key| !state.attachments.contains_key(key))
        .map(|key| format!("{}/{}", key.container, key.ifname))
        .collect();
    without_device(&without)
}

fn without_device(pods: &[String]) -> Option<String> {
    let first = pods.first()?;
    let who = match pods.len() {
        1 => format!("1 lease belongs to a pod without a device ({first})"),
        count => format!("{count} leases belong to pods without a device ({first} and {} more)", count - 1),
    };
    Some(format!(
        "{who}: weftd was restarted, which ends the devices of its pods; recreate those that are still there, the leases of \
         the others are freed"
    ))
}

fn peer_problems(state: &State, snapshot: &Snapshot) -> Vec<String> {
    let config = &state.desired.config;
    let tunnelled = config.peers.iter().filter(|peer| !state.desired.leads.peers.contains_key(&peer.underlay));
    let silent = tunnelled.filter(|peer| {
        let id = state.desired.nodes.of(&peer.name);
        let stats = id.and_then(|id| snapshot.nodes.get(id.index()));
        stats.is_some_and(|stats| stats.sent > 0 && stats.last_seen.is_none())
    });
    let told = |peer: &crate::control::config::Peer| {
        format!(
            "{} has been sent to, and nothing ever came from {}: is weftd running there with this node as a peer, and does a \
             firewall drop UDP port {}?",
            peer.name, peer.underlay, config.underlay.port
        )
    };
    silent.map(told).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_nearly_full_above_nine_tenths() {
        assert!(!nearly_full(Usage { leased: 9, resting: 0, reserved: 0, size: 10 }));
        assert!(nearly_full(Usage { leased: 10, resting: 0, reserved: 0, size: 10 }));
        assert!(!nearly_full(Usage { leased: 3, resting: 0, reserved: 0, size: u64::MAX }));
    }

    #[test]
    fn workers_that_stopped_are_a_problem() {
        assert_eq!(worker_problem(2, 2), None);
        assert!(worker_problem(1, 4).unwrap().starts_with("3 of the 4 workers "));
    }

    #[test]
    fn one_lease_belongs_and_two_belong() {
        let told = |pods: &[&str]| without_device(&pods.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(told(&[]), None);
        assert!(told(&["a/eth0"]).unwrap().starts_with("1 lease belongs to a pod without a device (a/eth0): "));
        let two = told(&["a/eth0", "b/eth0"]).unwrap();
        assert!(two.starts_with("2 leases belong to pods without a device (a/eth0 and 1 more): "), "{two}");
    }
}
