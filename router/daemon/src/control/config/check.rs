//! What must hold between the values of a configuration, and between them and the machine.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use ipnet::IpNet;
use weft_encap::geneve;
use weft_encap::mac::Mac;
use weft_encap::vxlan::Vni;
use weft_router::tables::{Gateway, Mode};

use super::mtu;
use super::reader::{At, Place, Problem, Reader, Switch};
use super::source::{SourceConfig, check_beside, missing_underlay};
use super::{
    Config, DEFAULT_HOST_PORT, DEFAULT_PORT, DEFAULT_STATE_DIR, Draft, DraftPeer, DraftUnderlay, Peer, PortKind,
    Underlay, UnderlayKind, encapsulation,
};
use crate::control::derive;
use crate::control::host::Host;

/// With more, a superframe would not hold two segments: it has at most 65,493 bytes, 22 of each segment are ours.
pub const MAX_MTU: u32 = 32_700;
/// Longer names do not fit what DNS and Kubernetes call a name.
const MAX_NAME: usize = 253;
/// Nodes are numbered with 16 bits, and some numbers wait for reuse.
const MAX_PEERS: usize = 60_000;

/// Checks the draft; notes problems in `reader`. `None` if something needed is missing.
pub(super) fn check(draft: Draft, reader: &mut Reader<'_>, host: &Host) -> (Option<Config>, Vec<Problem>) {
    let mut warnings = Vec::new();
    // All nodes of a Kubernetes cluster can share one file: their names then come from where each of them runs.
    let named = host.node_name.as_ref().filter(|_| draft.kubernetes.is_some());
    let named = named.map(|name| At { value: name.clone(), place: root("node") });
    let advice = match &draft.kubernetes {
        None => "write a name for this node",
        Some(_) => "write the name of this machine's Node, or set NODE_NAME in weftd's environment",
    };
    let node = needed(reader, draft.node.as_ref().or(named.as_ref()), &root("node"), advice);
    if let Some(node) = node {
        check_name(reader, node);
    }
    let mode = check_mode(reader, draft.mode.as_ref());
    let source = check_source(reader, &draft, mode);
    let underlay = check_underlay(reader, &draft, host);
    check_paths(reader, &draft);
    let host_port = check_host_port(reader, &draft);
    check_ranges(reader, &draft, mode);
    check_peers(reader, &draft);
    let gateway = check_gateway(reader, &draft, mode);
    check_macs(reader, &draft);
    encapsulation::check(reader, &draft, mode);
    let mtus = underlay.and_then(|underlay| mtu::check_mtu(reader, &draft, (mode, underlay), host, &mut warnings));
    let overhead = encapsulation::most_overhead(&draft, mode, underlay.is_none_or(|address| address.is_ipv4()));
    let built = (|| {
        let (node, mode, (mtu, underlay_mtu), source) = (node?, mode?, mtus?, source?);
        let subnet = encapsulation::subnet(host, underlay?);
        let underlay = build_underlay(draft.underlay.as_ref(), underlay?, underlay_mtu, (mode, subnet));
        let underlay = Underlay { overhead, ..underlay };
        let vtep_mac = || derive::vtep_mac(&node.value, underlay.address);
        Some(Config {
            node: node.value.clone(),
            mode,
            workers: draft.workers.as_ref().map(|workers| workers.value),
            port: draft.port.as_ref().map_or(PortKind::Tap, |port| port.value),
            host_port: host_port.clone(),
            vni: Vni::new(draft.vni.as_ref().map_or(1, |vni| vni.value))?,
            mtu,
            mtu_is_given: draft.mtu.is_some(),
            socket: draft.socket.as_ref().map_or(PathBuf::from(weft_api::SOCKET), |path| path.value.clone()),
            state_dir: draft.state_dir.as_ref().map_or(PathBuf::from(DEFAULT_STATE_DIR), |path| path.value.clone()),
            source,
            ranges: values(&draft.ranges),
            former: Vec::new(),
            segment: values(&draft.segment),
            gateway,
            vtep_mac: draft.vtep_mac.as_ref().map_or_else(vtep_mac, |mac| mac.value),
            underlay,
            peers: draft.peers.iter().map(|peer| build_peer(peer, mode)).collect::<Option<_>>()?,
            routes: draft.routes,
            masquerade: draft.masquerade,
            limits: draft.limits,
            metrics: draft.metrics.as_ref().map(|metrics| metrics.value),
            leases: draft.leases,
            cni: draft.cni,
            log: draft.log,
        })
    })();
    (built, warnings)
}

fn build_underlay(
    draft: Option<&DraftUnderlay>,
    address: IpAddr,
    mtu: u32,
    (mode, subnet): (Mode, Option<IpNet>),
) -> Underlay {
    let usual = draft.and_then(|draft| draft.encapsulation.as_ref());
    Underlay {
        address,
        is_given: draft.is_some_and(|draft| draft.address.is_some()),
        port: draft.and_then(|draft| draft.port.as_ref()).map_or(DEFAULT_PORT, |port| port.value),
        device: draft.and_then(|draft| draft.device.as_ref()).map(|device| device.value.clone()),
        kind: draft.and_then(|draft| draft.kind.as_ref()).map_or(UnderlayKind::Udp, |kind| kind.value),
        vlan: draft.and_then(|draft| draft.vlan.as_ref()).map(|vlan| vlan.value),
        encapsulation: encapsulation::chosen(usual, mode).unwrap_or_default(),
        cross_subnet: draft.and_then(|draft| draft.cross_subnet.as_ref()).is_some_and(|crossing| crossing.value),
        geneve_port: draft.and_then(|draft| draft.geneve_port.as_ref()).map_or(geneve::PORT, |port| port.value),
        subnet,
        formats: encapsulation::formats_of(mode),
        mtu,
        overhead: 0,
    }
}

fn build_peer(draft: &DraftPeer, mode: Mode) -> Option<Peer> {
    let (name, underlay) = (draft.name.as_ref()?.value.clone(), draft.underlay.as_ref()?.value.to_canonical());
    let vtep_mac = draft.vtep_mac.as_ref().map_or_else(|| derive::vtep_mac(&name, underlay), |mac| mac.value);
    let encapsulation = encapsulation::chosen(draft.encapsulation.as_ref(), mode);
    Some(Peer {
        name,
        underlay,
        addresses: Vec::new(),
        ranges: values(&draft.ranges),
        vtep_mac,
        encapsulation,
        accepts: None,
    })
}

fn check_name(reader: &mut Reader<'_>, name: &At<String>) {
    if !is_name(&name.value) {
        let what = format!("{:?} is no name: use 1 to {MAX_NAME} of letters, digits, '.', '_', '-'", name.value);
        reader.problem(&name.place, what);
    }
}

/// Whether `text` can be a node's name.
pub fn is_name(text: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    !text.is_empty() && text.len() <= MAX_NAME && text.chars().all(fits)
}

/// The source, if what is needed for it is there.
fn check_source(reader: &mut Reader<'_>, draft: &Draft, mode: Option<Mode>) -> Option<SourceConfig> {
    let engine = match (&draft.etcd, &draft.kubernetes) {
        (None, None) => return Some(SourceConfig::File),
        (Some(_), None) => "etcd",
        (None, Some(_)) => "kubernetes",
        (Some(_), Some(kubernetes)) => {
            reader.problem(kubernetes.place(), "stands beside [etcd]: a cluster has one source, remove the other");
            return None;
        }
    };
    let ranges = draft.ranges.first().map(|at| (&at.place, "ranges"));
    let peers = draft.peers.first().map(|peer| (&peer.section, "peers"));
    let gateway = draft.gateway.first().map(|at| (&at.place, "gateway"));
    let beside: Vec<(&Place, &str)> = [ranges, peers, gateway].into_iter().flatten().collect();
    check_beside(reader, engine, &beside, mode);
    if let Some(kubernetes) = &draft.kubernetes {
        return Some(SourceConfig::Kubernetes(Box::new(kubernetes.check(reader))));
    }
    let etcd = draft.etcd.as_ref()?;
    for at in &etcd.network {
        check_inside_segment(reader, draft, mode, at);
    }
    etcd.check(reader).map(|etcd| SourceConfig::Etcd(Box::new(etcd)))
}

fn check_mode(reader: &mut Reader<'_>, mode: Option<&At<String>>) -> Option<Mode> {
    let mode = needed(reader, mode, &root("mode"), "write \"routed\" or \"bridged\"")?;
    match mode.value.as_str() {
        "routed" => Some(Mode::Routed),
        "bridged" => Some(Mode::Bridged),
        other => {
            reader.problem(&mode.place, format!("{other:?} is neither \"routed\" nor \"bridged\""));
            None
        }
    }
}

fn check_underlay(reader: &mut Reader<'_>, draft: &Draft, host: &Host) -> Option<IpAddr> {
    let advice = "write this node's address in the network between the nodes";
    let underlay = draft.underlay.as_ref();
    if let Some(address) = underlay.and_then(|underlay| underlay.address.as_ref()) {
        check_host_address(reader, address);
        return Some(address.value.to_canonical());
    }
    if draft.etcd.is_some() || draft.kubernetes.is_some() {
        let device = underlay.and_then(|underlay| underlay.device.as_ref()).map(|device| device.value.as_str());
        let main = || host.main_address(device, |address| special(address).is_none());
        let found = host.node_address.filter(|address| special(*address).is_none()).or_else(main);
        if found.is_none() {
            reader.problem(&missing_underlay(), format!("is missing, and this machine has no main address: {advice}"));
        }
        // What stands in the file is compared with all that is for pods later on.
        let network = draft.etcd.iter().flat_map(|etcd| &etcd.network);
        for (range, address) in
            network.filter_map(|range| Some((range, found.filter(|own| range.value.contains(own))?)))
        {
            let what =
                format!("{} has this machine's address {address} in it: pods need a network of their own", range.value);
            reader.problem(&range.place, what);
        }
        return found;
    }
    let place = underlay.map_or(root("underlay.address"), |underlay| underlay.section.clone());
    // A value of the wrong kind has its problem already.
    if !reader.problems.iter().any(|problem| problem.place.key == place.key) {
        reader.problem(&place, format!("is missing: {advice}"));
    }
    None
}

/// Whether an address can be a node's: one that packets can be sent to and from.
fn check_host_address(reader: &mut Reader<'_>, at: &At<IpAddr>) {
    if let Some(kind) = special(at.value) {
        reader.problem(&at.place, format!("{} is {kind}: write an address that the other nodes can reach", at.value));
    }
}

/// The host port's name must be one that the kernel takes, and nobody else's.
fn check_host_port(reader: &mut Reader<'_>, draft: &Draft) -> Option<String> {
    let usual = At { value: Switch::On, place: root("host_port") };
    let At { value, place } = draft.host_port.as_ref().unwrap_or(&usual);
    let name = match value {
        Switch::On => DEFAULT_HOST_PORT,
        Switch::Off => return None,
        Switch::Named(name) => name,
    };
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let dots = matches!(name, "." | "..");
    // IFNAMSIZ is 16, the terminating zero included.
    if name.is_empty() || name.len() > 15 || !name.chars().all(fits) || dots || ["lo", "all", "default"].contains(&name)
    {
        let what = format!("{name:?} is no name for an interface: use 1 to 15 of letters, digits, '.', '_', '-'");
        reader.problem(place, what);
    }
    let device = draft.underlay.as_ref().and_then(|underlay| underlay.device.as_ref());
    if device.is_some_and(|device| device.value == name) {
        reader.problem(place, format!("{name} is the underlay's device: choose another name"));
    }
    Some(name.to_owned())
}

fn check_paths(reader: &mut Reader<'_>, draft: &Draft) {
    for path in [&draft.socket, &draft.state_dir].into_iter().flatten() {
        if !path.value.is_absolute() {
            reader.problem(&path.place, format!("{:?} is not absolute: begin the path with '/'", path.value));
        }
    }
    // sun_path has 108 bytes, the terminating zero included.
    if let Some(socket) = draft.socket.as_ref().filter(|socket| socket.value.as_os_str().len() > 107) {
        reader.problem(&socket.place, "is longer than the 107 bytes that a unix socket's path may have");
    }
}

/// Each range for itself, then all against each other: no address may belong to two nodes.
fn check_ranges(reader: &mut Reader<'_>, draft: &Draft, mode: Option<Mode>) {
    if draft.etcd.is_none()
        && draft.kubernetes.is_none()
        && draft.ranges.is_empty()
        && !reader.problems.iter().any(|problem| problem.place.key == "ranges")
    {
        reader.problem(&root("ranges"), "is missing: write the prefixes out of which this node gives addresses");
    }
    check_segment(reader, draft, mode);
    let own = draft.ranges.iter().map(|range| (range, "this node".to_owned()));
    let theirs = draft.peers.iter().flat_map(|peer| {
        let name = peer.name.as_ref().map_or(peer.section.key.clone(), |name| format!("peer {}", name.value));
        peer.ranges.iter().map(move |range| (range, name.clone()))
    });
    let all: Vec<(&At<IpNet>, String)> = own.chain(theirs).collect();
    for (range, _) in &all {
        check_range(reader, range);
        check_inside_segment(reader, draft, mode, range);
    }
    check_overlaps(reader, all);
}

fn check_inside_segment(reader: &mut Reader<'_>, draft: &Draft, mode: Option<Mode>, range: &At<IpNet>) {
    let bridged = mode == Some(Mode::Bridged) && !draft.segment.is_empty();
    if bridged && !draft.segment.iter().any(|segment| segment.value.contains(&range.value)) {
        let what = format!("{} is not inside the segment: add it there, or change the range", range.value);
        reader.problem(&range.place, what);
    }
}

/// Whether pods can have the addresses of a prefix.
pub fn check_range(reader: &mut Reader<'_>, range: &At<IpNet>) {
    if let Some(kind) = special(range.value.network()).or_else(|| special(range.value.broadcast())) {
        reader.problem(&range.place, format!("{} is {kind}: pods cannot have such addresses", range.value));
    } else if let Err(error) = weft_ipam::Range::whole(range.value) {
        reader.problem(&range.place, error.to_string());
    }
}

fn check_segment(reader: &mut Reader<'_>, draft: &Draft, mode: Option<Mode>) {
    match (mode, draft.segment.first()) {
        (Some(Mode::Routed), Some(first)) => {
            reader.problem(&first.place, "only bridged mode has a segment: remove it, or set mode = \"bridged\"");
        }
        (Some(Mode::Bridged), None) => {
            reader
                .problem(&root("segment"), "is missing: bridged mode needs the on-link prefixes of all nodes together");
        }
        _ => {}
    }
    for (number, segment) in draft.segment.iter().enumerate() {
        check_range(reader, segment);
        let same = |other: &&At<IpNet>| other.value.addr().is_ipv4() == segment.value.addr().is_ipv4();
        if draft.segment[..number].iter().any(|other| same(&other)) {
            reader.problem(&segment.place, "is the second prefix of its family: a segment has one of each at most");
        }
    }
}

/// Prefixes nest or are disjoint. In order of their first address, one overlaps an earlier one exactly if it lies in the last
/// one that was not inside another.
fn check_overlaps(reader: &mut Reader<'_>, mut all: Vec<(&At<IpNet>, String)>) {
    all.sort_by_key(|(range, _)| (range.value.addr().is_ipv6(), range.value.network(), range.value.prefix_len()));
    let mut outer: Option<&(&At<IpNet>, String)> = None;
    for item in &all {
        match outer {
            Some((range, owner)) if range.value.contains(&item.0.value) => {
                let what = format!(
                    "{} of {} overlaps {} of {owner} (line {}): give each its own",
                    item.0.value, item.1, range.value, range.place.line
                );
                reader.problem(&item.0.place, what);
            }
            _ => outer = Some(item),
        }
    }
}

fn check_peers(reader: &mut Reader<'_>, draft: &Draft) {
    if let Some(peer) = draft.peers.get(MAX_PEERS) {
        reader.problem(&peer.section, format!("is one too many: a node has at most {MAX_PEERS} peers"));
    }
    let mut names: HashMap<&str, (&Place, &str)> = HashMap::new();
    let mut addresses: HashMap<IpAddr, (&Place, &str)> = HashMap::new();
    if let Some(node) = &draft.node {
        names.insert(&node.value, (&node.place, "this node's name; peers are the other nodes"));
    }
    if let Some(address) = draft.underlay.as_ref().and_then(|underlay| underlay.address.as_ref()) {
        let own = (&address.place, "this node's address; peers are the other nodes");
        addresses.insert(address.value.to_canonical(), own);
    }
    for peer in &draft.peers {
        let place = |key: &str| Place { line: peer.section.line, key: format!("{}.{key}", peer.section.key) };
        if let Some(name) = needed(reader, peer.name.as_ref(), &place("name"), "write the name of that node") {
            check_name(reader, name);
            unique(reader, &mut names, name.value.as_str(), &name.place);
        }
        let advice = "write that node's underlay address";
        if let Some(address) = needed(reader, peer.underlay.as_ref(), &place("underlay"), advice) {
            check_host_address(reader, address);
            check_family(reader, draft, address);
            unique(reader, &mut addresses, address.value.to_canonical(), &address.place);
        }
    }
    check_underlay_outside_ranges(reader, draft);
}

fn unique<'a, K: std::hash::Hash + Eq + std::fmt::Display>(
    reader: &mut Reader<'_>,
    seen: &mut HashMap<K, (&'a Place, &'static str)>,
    key: K,
    place: &'a Place,
) {
    match seen.get(&key) {
        Some((earlier, "")) => {
            let what = format!("{key} stands in line {} already: each node has its own", earlier.line);
            reader.problem(place, what);
        }
        Some((_, why)) => reader.problem(place, format!("{key} is {why}")),
        None => drop(seen.insert(key, (place, ""))),
    }
}

fn check_family(reader: &mut Reader<'_>, draft: &Draft, address: &At<IpAddr>) {
    let Some(own) = draft.underlay.as_ref().and_then(|underlay| underlay.address.as_ref()) else { return };
    if own.value.to_canonical().is_ipv4() != address.value.to_canonical().is_ipv4() {
        let what = format!("{} is not of the family of underlay.address {}", address.value, own.value);
        reader.problem(&address.place, what);
    }
}

/// A node inside a pod range would have its tunnel packets routed into the tunnel.
fn check_underlay_outside_ranges(reader: &mut Reader<'_>, draft: &Draft) {
    let own = draft.underlay.as_ref().and_then(|underlay| underlay.address.as_ref());
    let addresses = own.into_iter().chain(draft.peers.iter().filter_map(|peer| peer.underlay.as_ref()));
    let network = draft.etcd.iter().flat_map(|etcd| &etcd.network);
    let peers = draft.peers.iter().flat_map(|peer| &peer.ranges);
    let ranges: Vec<&At<IpNet>> = draft.ranges.iter().chain(&draft.segment).chain(network).chain(peers).collect();
    // Longest match is overkill here: the first hit is as good for the message.
    let mut by_network: HashMap<IpNet, &At<IpNet>> = HashMap::new();
    let mut lengths = std::collections::BTreeSet::new();
    for range in ranges {
        lengths.insert(range.value.prefix_len());
        by_network.insert(range.value.trunc(), range);
    }
    for address in addresses {
        let canonical = address.value.to_canonical();
        let networks = lengths.iter().filter_map(|length| Some(IpNet::new(canonical, *length).ok()?.trunc()));
        if let Some(range) = networks.filter_map(|network| by_network.get(&network)).next() {
            let what = format!(
                "{} lies in {} (line {}), which is for pods: the underlay needs addresses of its own",
                address.value, range.value, range.place.line
            );
            reader.problem(&address.place, what);
        }
    }
}

fn check_gateway(reader: &mut Reader<'_>, draft: &Draft, mode: Option<Mode>) -> Gateway {
    let homes = if mode == Some(Mode::Bridged) { &draft.segment } else { &draft.ranges };
    let mut gateway = Gateway {
        mac: draft.gateway_mac.as_ref().map_or(derive::GATEWAY_MAC, |mac| mac.value),
        ipv4: None,
        ipv6: None,
    };
    for at in &draft.gateway {
        let address = at.value.to_canonical();
        let taken = if address.is_ipv4() { gateway.ipv4.is_some() } else { gateway.ipv6.is_some() };
        let home = homes.iter().find(|home| home.value.contains(&address));
        let usable = home.is_some_and(|home| address != home.value.network() && address != last_unusable(home.value));
        if taken {
            reader.problem(&at.place, "is the second gateway of its family: there is one of each at most");
        } else if !usable {
            let of = if mode == Some(Mode::Bridged) { "the segment" } else { "this node's ranges" };
            reader.problem(&at.place, format!("{address} is not a usable address of {of}"));
        }
        match address {
            IpAddr::V4(address) => gateway.ipv4 = Some(address),
            IpAddr::V6(address) => gateway.ipv6 = Some(address),
        }
    }
    let homes: Vec<IpNet> = values(homes);
    Gateway { ipv4: gateway.ipv4.or(gateway_v4(&homes)), ipv6: gateway.ipv6.or(gateway_v6(&homes)), ..gateway }
}

/// The IPv4 gateway of pods in these prefixes: the first address, which is what every pod expects, and what the lease store never
/// gives away.
pub fn gateway_v4(homes: &[IpNet]) -> Option<Ipv4Addr> {
    let first = homes.iter().filter_map(|home| Some(weft_ipam::Range::whole(*home).ok()?.gateway()));
    first.filter_map(|address| if let IpAddr::V4(address) = address { Some(address) } else { None }).next()
}

/// The same for IPv6.
pub fn gateway_v6(homes: &[IpNet]) -> Option<Ipv6Addr> {
    let first = homes.iter().filter_map(|home| Some(weft_ipam::Range::whole(*home).ok()?.gateway()));
    first.filter_map(|address| if let IpAddr::V6(address) = address { Some(address) } else { None }).next()
}

/// IPv4's broadcast address; IPv6 has none, so its network address stands in.
fn last_unusable(home: IpNet) -> IpAddr {
    if home.addr().is_ipv4() { home.broadcast() } else { home.network() }
}

fn check_macs(reader: &mut Reader<'_>, draft: &Draft) {
    let peers = draft.peers.iter().filter_map(|peer| peer.vtep_mac.as_ref());
    let all: Vec<&At<Mac>> = [&draft.gateway_mac, &draft.vtep_mac].into_iter().flatten().chain(peers).collect();
    for at in &all {
        if !at.value.is_unicast() {
            reader.problem(&at.place, format!("{} is not a unicast address: make the first digit pair even", at.value));
        }
    }
    let gateway = draft.gateway_mac.as_ref().map_or(derive::GATEWAY_MAC, |mac| mac.value);
    for at in all.iter().filter(|at| at.value == gateway && !at.place.key.ends_with("gateway_mac")) {
        reader.problem(&at.place, format!("{gateway} is the gateway's MAC, which never leaves a node: choose another"));
    }
}

/// Why an address is nobody's that others could reach.
pub fn special(address: IpAddr) -> Option<&'static str> {
    let kinds = |loopback, unspecified, multicast, link_local, reserved| {
        let kinds = [
            (loopback, "loopback"),
            (unspecified, "unspecified"),
            (multicast, "multicast"),
            (link_local, "link-local"),
            (reserved, "reserved"),
        ];
        kinds.into_iter().find(|(holds, _)| *holds).map(|(_, kind)| kind)
    };
    match address.to_canonical() {
        IpAddr::V4(a) => {
            let first = a.octets()[0];
            kinds(first == 127, first == 0, a.is_multicast(), a.is_link_local(), first >= 240)
        }
        IpAddr::V6(a) => {
            let link_local = a.is_unicast_link_local();
            kinds(a.is_loopback(), a.is_unspecified(), a.is_multicast(), link_local, false)
        }
    }
}

fn needed<'a, T>(reader: &mut Reader<'_>, value: Option<&'a At<T>>, place: &Place, advice: &str) -> Option<&'a At<T>> {
    // A value of the wrong kind has its problem already.
    if value.is_none() && !reader.problems.iter().any(|problem| problem.place.key == place.key) {
        reader.problem(place, format!("is missing: {advice}"));
    }
    value
}

pub fn root(key: &str) -> Place {
    Place { line: 1, key: key.to_owned() }
}

fn values<T: Clone>(list: &[At<T>]) -> Vec<T> {
    list.iter().map(|at| at.value.clone()).collect()
}
