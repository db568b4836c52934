//! What people ask to see: the data plane's and the store's state in the words of the protocol.

use std::collections::BTreeMap;
use std::net::IpAddr;

use weft_api::{
    Bandwidth, DropInfo, Failure, FdbInfo, FlowInfo, LeaseInfo, MasqueradeInfo, NatInfo, NeighbourInfo, NodeInfo,
    PortInfo, RouteInfo, code,
};
use weft_encap::format::Format;
use weft_router::path::{Hop, Sender};
use weft_router::tables::{NextHop, NextHops, Pod, Tables, Via, WayOut};
use weft_router::{DropReason, Instant, PortId, RouterError, Snapshot};

use crate::attach::key_of;
use crate::control::compile::addresses;
use crate::control::config::Encapsulation;
use crate::control::desired::{DesiredState, HOST, OUTLETS, is_underlay, tunnel_port};
use crate::egress::name_of;
use crate::hostport;
use crate::node::{Attachment, Node, State, counters};

/// Flows shown at most, those seen last first: more would not fit one answer.
const MAX_FLOWS: usize = 20_000;
/// Conversations shown at most, the youngest first.
const MAX_SESSIONS: usize = 20_000;

/// The workers' state, or why there is none.
pub fn snapshot(node: &Node, flows: bool) -> Result<Snapshot, Failure> {
    node.router.snapshot(flows).map_err(|error: RouterError| Failure {
        code: code::INTERNAL,
        msg: error.to_string(),
        details: "restart weftd; its log says why".into(),
    })
}

/// The ports, underlay first.
pub fn ports(node: &Node) -> Result<Vec<PortInfo>, Failure> {
    let snapshot = snapshot(node, false)?;
    let state = node.state();
    let names = Names::of(&state);
    let shown = snapshot.ports.iter().map(|port| {
        let (name, attachment) = names.port(port.id);
        let name = node.outlets.device(port.id).map_or(name, name_of);
        let interface = attachment.map(|attachment| &attachment.interface);
        let host = state.desired.host.as_ref().filter(|_| port.id == HOST);
        let host_name = state.desired.config.host_port.clone().filter(|_| port.id == HOST);
        let shown = |pod: &Pod| (pod.mac.to_string(), addresses(pod).collect());
        let (mac, addresses) = match interface {
            Some(interface) => shown(&Attachment::pod(interface)),
            None => host.map(shown).unwrap_or_default(),
        };
        PortInfo {
            id: u32::from(port.id.0),
            role: match port.id {
                id if is_underlay(id) => "underlay".into(),
                HOST => "host".into(),
                PortId(number) if OUTLETS.contains(&number) => "uplink".into(),
                _ => "pod".into(),
            },
            kind: port.kind.to_owned(),
            state: if port.up { "up".into() } else { "its device is gone".into() },
            name,
            ifname: interface.map(|interface| interface.name.clone()).or(host_name).unwrap_or_default(),
            mac,
            addresses,
            bandwidth: interface.map(|interface| interface.bandwidth).filter(|limits| *limits != Bandwidth::default()),
            offloads: port.capabilities.to_string(),
            worker: port.worker,
            counters: counters(&port.stats),
            out: port.stats.out,
            out_bytes: port.stats.out_bytes,
            drops: named_drops(&port.stats.dropped),
        }
    });
    Ok(shown.collect())
}

fn named_drops(dropped: &[u64; DropReason::COUNT]) -> BTreeMap<String, u64> {
    let nonzero = DropReason::ALL.iter().zip(dropped).filter(|(_, count)| **count > 0);
    nonzero.map(|(reason, count)| (reason.name().to_owned(), *count)).collect()
}

/// The routes.
pub fn routes(node: &Node) -> Vec<RouteInfo> {
    let tables = node.router.tables();
    let state = node.state();
    let names = Names::of(&state);
    let route = |destination: String, via: &Via| match via {
        Via::Local => RouteInfo { destination, via: "local".into(), underlay: None },
        Via::Node(id) => {
            RouteInfo { destination, via: names.node(*id), underlay: tables.node(*id).map(|node| node.underlay) }
        }
        Via::Uplink(group) => RouteInfo { destination, via: next_hops(tables.group(*group)), underlay: None },
    };
    let v4 = tables.routes4.iter().map(|(net, via)| route(net.to_string(), via));
    let v6 = tables.routes6.iter().map(|(net, via)| route(net.to_string(), via));
    v4.chain(v6).chain(gateway_routes(&tables)).chain(host_routes(&tables)).collect()
}

/// A group's next hops.
fn next_hops(group: &NextHops) -> String {
    let one = |hop: &NextHop| format!("port {} {}", hop.port, hop.macs.dst);
    match group.all() {
        [] => "host, for no next hop is known".into(),
        all => all.iter().map(one).collect::<Vec<_>>().join(", "),
    }
}

/// What has no other route is the node's kernel's to route.
fn host_routes(tables: &Tables) -> impl Iterator<Item = RouteInfo> {
    let everything = ["0.0.0.0/0", "::/0"].into_iter().filter(|_| tables.host.is_some());
    everything.map(|all| RouteInfo { destination: all.into(), via: "host".into(), underlay: None })
}

fn gateway_routes(tables: &Tables) -> impl Iterator<Item = RouteInfo> {
    let v4 = tables.gateway.ipv4.map(|address| format!("{address}/32"));
    let v6 = tables.gateway.ipv6.map(|address| format!("{address}/128"));
    let gateway = |destination| RouteInfo { destination, via: "gateway".into(), underlay: None };
    v4.into_iter().chain(v6).map(gateway)
}

/// The forwarding database: pods and the gateway, then what was learned.
pub fn fdb(node: &Node) -> Result<Vec<FdbInfo>, Failure> {
    let snapshot = snapshot(node, false)?;
    let tables = node.router.tables();
    let state = node.state();
    let names = Names::of(&state);
    let entry = |mac: String, at: String, kind: &str, age: f64| FdbInfo { mac, at, kind: kind.into(), age };
    let mut all = vec![entry(tables.gateway.mac.to_string(), "gateway".into(), "static", 0.0)];
    all.extend(tables.macs.iter().map(|(mac, port)| entry(mac.to_string(), format!("port {port}"), "static", 0.0)));
    all.sort_by(|a, b| (&a.at, &a.mac).cmp(&(&b.at, &b.mac)));
    all.extend(snapshot.fdb.iter().map(|learned| {
        let at = format!("node {}", names.node(learned.node));
        entry(learned.mac.to_string(), at, "learned", snapshot.now.since(learned.last_seen).as_secs_f64())
    }));
    Ok(all)
}

/// The neighbours that the router answers for.
pub fn neighbours(node: &Node) -> Vec<NeighbourInfo> {
    let tables = node.router.tables();
    let gateway = tables.gateway;
    let own = [gateway.ipv4.map(IpAddr::V4), gateway.ipv6.map(IpAddr::V6), Some(gateway.mac.link_local().into())];
    let own = own.into_iter().flatten();
    let mut all: Vec<NeighbourInfo> = own
        .map(|address| NeighbourInfo { address, mac: gateway.mac.to_string(), at: "gateway".into() })
        .chain(tables.neighbours.iter().map(|(address, neighbour)| NeighbourInfo {
            address: *address,
            mac: neighbour.mac.to_string(),
            at: format!("port {}", neighbour.port),
        }))
        .collect();
    all.sort_by_key(|neighbour| neighbour.address);
    all
}

/// The flows in the cache, those seen last first.
pub fn flows(node: &Node) -> Result<Vec<FlowInfo>, Failure> {
    let mut snapshot = snapshot(node, true)?;
    snapshot.flows.sort_by_key(|flow| std::cmp::Reverse(flow.last_seen));
    snapshot.flows.truncate(MAX_FLOWS);
    let state = node.state();
    let names = Names::of(&state);
    let flow = |flow: &weft_router::conntrack::FlowEntry| {
        let (source_port, destination_port) = flow.key.ports();
        FlowInfo {
            protocol: protocol(flow.key.protocol()),
            source: flow.key.src(),
            source_port,
            destination: flow.key.dst(),
            destination_port,
            from: match flow.sender {
                Sender::Port(port) => format!("port {port}"),
                Sender::Node(id) => format!("node {}", names.node(id)),
            },
            to: match flow.verdict.path.hop {
                Hop::Port(port) => format!("port {port}"),
                Hop::Node(id) => format!("node {}", names.node(id)),
                Hop::Flood { .. } => "flood".into(),
                Hop::Reply(_) | Hop::Gateway | Hop::Probe => "gateway".into(),
            },
            frames: flow.frames,
            bytes: flow.bytes,
            age: snapshot.now.since(flow.last_seen).as_secs_f64(),
        }
    };
    Ok(snapshot.flows.iter().map(flow).collect())
}

/// What leaves the cluster in the node's name, the youngest first.
pub fn nat(node: &Node) -> Vec<NatInfo> {
    let mut sessions = node.router.snat().sessions(Instant::boottime());
    sessions.sort_by_key(|session| session.age);
    let shown = sessions.into_iter().take(MAX_SESSIONS).map(|session| NatInfo {
        protocol: protocol(session.protocol),
        inside: session.inside.0,
        inside_port: session.inside.1,
        outside: session.outside.0,
        outside_port: session.outside.1,
        remote: session.remote.0,
        remote_port: session.remote.1,
        state: match (session.over, session.answered) {
            (true, _) => "over".into(),
            (false, true) => "open".into(),
            (false, false) => "unanswered".into(),
        },
        age: session.age.as_secs_f64(),
        idle: session.idle.as_secs_f64(),
    });
    shown.collect()
}

/// As [`Request::Status`](weft_api::Request::Status) has it.
pub fn masquerade(node: &Node, desired: &DesiredState) -> Option<MasqueradeInfo> {
    let limits = desired.config.masquerade.as_ref()?.limits;
    let usage = node.router.snat().usage();
    let way = |way: &WayOut| {
        let addresses: Vec<String> = way.addresses.iter().map(|net| net.addr().to_string()).collect();
        let name = node.outlets.device(way.port).map(name_of).unwrap_or_default();
        format!("{name} as {}", addresses.join(" "))
    };
    Some(MasqueradeInfo {
        ways: desired.ways_out.iter().map(way).collect(),
        ports: (limits.first, limits.last),
        sessions: usage.sessions,
        limit: usage.limit,
        pods: usage.pods,
        fullest: usage.fullest,
        taken_back: usage.taken_back,
    })
}

fn protocol(number: u8) -> String {
    match number {
        1 | 58 => "icmp".into(),
        6 => "tcp".into(),
        17 => "udp".into(),
        other => other.to_string(),
    }
}

/// The leases.
pub fn leases(node: &Node) -> Vec<LeaseInfo> {
    let state = node.state();
    let of = |record: &weft_ipam::Record| {
        let key = key_of(&record.owner);
        let attached = state.attachments.contains_key(&key);
        let lease = |address| LeaseInfo { address, key: key.clone(), attached };
        record.addresses().map(lease).collect::<Vec<_>>()
    };
    // What this node itself has is no attachment's, and shown by the state.
    let records = node.store.records();
    records.iter().filter(|record| record.owner != hostport::owner()).flat_map(|record| of(record)).collect()
}

/// What [`PortStats::overruns`](weft_router::stats::PortStats::overruns) means.
const OVERRUN: &str = "the kernel dropped it before it could be read by this port, whose buffer was full";
/// What [`PortStats::undelivered`](weft_router::stats::PortStats::undelivered) means.
const UNDELIVERED: &str =
    "it left by this port, and the kernel dropped it there: the device is down, or its queue full";

/// The drop counters that are not zero; and, beside them, what the kernel dropped before or behind us.
pub fn drops(node: &Node) -> Result<Vec<DropInfo>, Failure> {
    let snapshot = snapshot(node, false)?;
    let state = node.state();
    let names = Names::of(&state);
    let mut all = Vec::new();
    for port in &snapshot.ports {
        let (name, _) = names.port(port.id);
        for (reason, count) in DropReason::ALL.iter().zip(port.stats.dropped).filter(|(_, count)| *count > 0) {
            all.push(DropInfo {
                port: u32::from(port.id.0),
                name: name.clone(),
                reason: reason.name().into(),
                meaning: reason.meaning().into(),
                is_loss: reason.is_loss(),
                count,
            });
        }
        let of_kernel =
            [("KernelOverrun", OVERRUN, port.stats.overruns), ("Undelivered", UNDELIVERED, port.stats.undelivered)];
        all.extend(of_kernel.into_iter().filter(|(.., count)| *count > 0).map(|(reason, meaning, count)| DropInfo {
            port: u32::from(port.id.0),
            name: name.clone(),
            reason: reason.into(),
            meaning: meaning.into(),
            is_loss: true,
            count,
        }));
    }
    Ok(all)
}

/// This node and its peers.
pub fn nodes(node: &Node) -> Result<Vec<NodeInfo>, Failure> {
    let snapshot = snapshot(node, false)?;
    let state = node.state();
    let config = &state.desired.config;
    let mut all = vec![NodeInfo {
        name: config.node.clone(),
        underlay: config.underlay.address,
        ranges: config.ranges.iter().map(ToString::to_string).collect(),
        vtep_mac: config.vtep_mac.to_string(),
        local: true,
        sent: 0,
        received: 0,
        last_seen: None,
        encapsulation: String::new(),
        way: String::new(),
        asked: None,
    }];
    all.extend(config.peers.iter().map(|peer| {
        let id = state.desired.nodes.of(&peer.name);
        let stats = id.and_then(|id| snapshot.nodes.get(id.index())).copied().unwrap_or_default();
        NodeInfo {
            name: peer.name.clone(),
            underlay: peer.underlay,
            ranges: peer.ranges.iter().map(ToString::to_string).collect(),
            vtep_mac: peer.vtep_mac.to_string(),
            local: false,
            sent: stats.sent,
            received: stats.received,
            last_seen: stats.last_seen.map(|seen| snapshot.now.since(seen).as_secs_f64()),
            asked: id.and_then(|id| node.probing.info(id)),
            encapsulation: config.encapsulation_to(peer).0.name().to_owned(),
            way: match config.encapsulation_to(peer).0 {
                Encapsulation::Tunnel(Format::Vxlan) => node.uplink.way(peer.underlay),
                Encapsulation::Tunnel(Format::Geneve) => "udp".to_owned(),
                Encapsulation::Tunnel(Format::Gre | Format::Gretap | Format::Ipip) => "raw".to_owned(),
                Encapsulation::HostGw => "uplink".to_owned(),
            },
        }
    }));
    Ok(all)
}

/// The names behind numbers.
struct Names<'a> {
    state: &'a State,
    ports: BTreeMap<PortId, (&'a str, &'a Attachment)>,
}

impl<'a> Names<'a> {
    fn of(state: &'a State) -> Names<'a> {
        let ports = state.attachments.iter().map(|(key, to)| (to.port, (key.container.as_str(), to))).collect();
        Names { state, ports }
    }

    fn port(&self, id: PortId) -> (String, Option<&'a Attachment>) {
        let underlay = &self.state.desired.config.underlay;
        if let Some(format) = underlay.formats.iter().find(|format| tunnel_port(**format) == id) {
            return (underlay.end(*format), None);
        }
        if id == HOST {
            return ("this node".to_owned(), None);
        }
        match self.ports.get(&id) {
            Some((name, attachment)) => ((*name).to_owned(), Some(*attachment)),
            None => (String::new(), None),
        }
    }

    fn node(&self, id: weft_router::tables::NodeId) -> String {
        self.state.desired.nodes.name(id).map_or_else(|| format!("left, number {}", id.0), str::to_owned)
    }
}
