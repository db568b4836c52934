//! Desired state to tables. Pure: the same state and epoch give the same tables.
//!
//! A pod that comes or goes changes little, so that its tables are made of those before ([`with_pod`], [`without_pod`]): the result is what
//! [`compile`] would say, or nothing, and then that has to be asked.
//!
//! Fails closed: what is not entered here does not pass. A port without a role forwards nothing, a node without an
//! entry is no member, an address without a route is unreachable.
//!
//! | entry | routed | bridged |
//! |---|---|---|
//! | own ranges | `Via::Local` | `Via::Local`, for packets that a pod sends to the gateway's MAC |
//! | a pod's address outside them | `Via::Local`, as a host route | the same: a pod may keep its address on another node |
//! | a peer's ranges, without a tunnel | `Via::Uplink` | |
//! | what a routing daemon says of other destinations | `Via::Uplink` | the same |
//! | a peer's ranges | `Via::Node` | `Via::Node`, likewise for packets to the gateway's MAC |

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use weft_router::tables::{GroupId, Masquerade, Node, Pod, Via};
use weft_router::{PortId, Tables};

use super::config::{Encapsulation, Peer};
use super::desired::{DesiredState, HOST, UNDERLAY, tunnel_port};

/// The tables for `state`.
pub fn compile(state: &DesiredState, epoch: u64) -> Tables {
    let config = &state.config;
    let mut tables = Tables::empty(config.gateway);
    tables.epoch = epoch;
    tables.mode = config.mode;
    tables.vni = config.vni;
    tables.vtep_mac = config.vtep_mac;
    tables.tunnel_mtu = config.mtu;
    tables.add_underlay(UNDERLAY);
    tables.address = Some(config.underlay.address);
    for format in &config.underlay.formats {
        tables.add_tunnel(tunnel_port(*format), *format);
    }
    for peer in &config.peers {
        let Some(id) = state.nodes.of(&peer.name) else { continue };
        let plainly = plainly(state, peer);
        let overhead = if plainly.is_some() { 0 } else { config.tunnel_to(peer).overhead(peer.underlay.is_ipv4()) };
        let mtu = config.underlay.mtu.saturating_sub(overhead);
        let path_mtu = path_mtu(state, peer, overhead);
        let node = Node {
            underlay: peer.underlay,
            addresses: peer.addresses.clone(),
            vtep_mac: peer.vtep_mac,
            ranges: peer.ranges.clone(),
            encap: config.tunnel_to(peer),
            mtu,
            carries: path_mtu.map_or(mtu, |path_mtu| path_mtu.min(mtu)),
        };
        tables.add_node(id, node);
        for range in peer.ranges.iter().filter(|_| plainly.is_some()) {
            tables.add_route(*range, plainly.map_or(Via::Node(id), Via::Uplink));
        }
        if let Some(mtu) = path_mtu {
            Arc::make_mut(&mut tables.path_mtus).insert(id, mtu);
        }
    }
    for range in &config.ranges {
        tables.add_route(*range, Via::Local);
    }
    add_leads(&mut tables, state);
    tables.masquerade = masquerade(state).map(Arc::new);
    if let Some(host) = &state.host {
        tables.add_host(HOST, host.clone());
    }
    for (port, pod) in &state.pods {
        for address in foreign(state, pod) {
            tables.add_route(IpNet::from(address), Via::Local);
        }
        tables.add_pod(*port, pod.clone());
    }
    tables
}

/// How long a packet of a pod to a peer may be, as far as routers said or was measured.
fn path_mtu(state: &DesiredState, peer: &Peer, overhead: u32) -> Option<u32> {
    let all = [&state.path_mtus, &state.measured].map(|all| all.get(&peer.underlay));
    all.into_iter().flatten().min().map(|mtu| mtu.saturating_sub(overhead))
}

/// The next hop of a peer that is sent packets as they are, if it can be.
fn plainly(state: &DesiredState, peer: &Peer) -> Option<GroupId> {
    let wanted = state.config.encapsulation_to(peer).0 == Encapsulation::HostGw;
    state.leads.peers.get(&peer.underlay).copied().filter(|_| wanted)
}

/// As whom packets of pods leave the cluster. Without a way out nothing leaves.
fn masquerade(state: &DesiredState) -> Option<Masquerade> {
    let config = state.config.masquerade.as_ref().filter(|_| state.config.host_port.is_some())?;
    let nodes =
        state.config.peers.iter().flat_map(|peer| peer.addresses.iter().copied().chain([peer.underlay])).collect();
    Some(Masquerade::new(state.ways_out.clone(), &config.kept(), nodes, state.leads.own.clone()))
}

/// What a routing daemon says of other destinations than the configuration's, and what is outside.
fn add_leads(tables: &mut Tables, state: &DesiredState) {
    let leads = &state.leads;
    leads.uplinks.iter().for_each(|port| tables.add_uplink(*port));
    tables.next_hops = Arc::clone(&leads.groups);
    tables.outside = leads.outside.clone();
    let ours: Vec<IpNet> = {
        let peers = state.config.peers.iter().flat_map(|peer| &peer.ranges);
        state.config.ranges.iter().chain(&state.config.segment).chain(peers).map(IpNet::trunc).collect()
    };
    let known: std::collections::HashSet<IpNet> = ours.into_iter().collect();
    let is_ours =
        |net: IpNet| std::iter::successors(Some(net), IpNet::supernet).any(|net| known.contains(&net.trunc()));
    for (net, group) in leads.learned.all().filter(|(net, _)| !is_ours(*net)) {
        tables.add_route(net, Via::Uplink(group));
    }
}

/// The tables with one more pod than `before`; `None` if it has something that another one has, or routes of its own.
pub fn with_pod(before: &Tables, state: &DesiredState, port: PortId, pod: &Pod, epoch: u64) -> Option<Tables> {
    if before.overlaps > 0 || foreign(state, pod).next().is_some() {
        return None;
    }
    let mut tables = Tables { epoch, ..before.clone() };
    tables.add_pod(port, pod.clone());
    (tables.overlaps == 0).then_some(tables)
}

/// The tables without the pod that was behind this port in `before`.
pub fn without_pod(before: &Tables, state: &DesiredState, port: PortId, pod: &Pod, epoch: u64) -> Option<Tables> {
    if before.overlaps > 0 || foreign(state, pod).next().is_some() {
        return None;
    }
    let mut tables = Tables { epoch, ..before.clone() };
    tables.remove_pod(port);
    Some(tables)
}

/// Addresses of a pod that lie outside of this node's ranges.
fn foreign<'a>(state: &'a DesiredState, pod: &'a Pod) -> impl Iterator<Item = IpAddr> + 'a {
    let ranges = &state.config.ranges;
    addresses(pod).filter(|address| !ranges.iter().any(|range| range.contains(address)))
}

/// All addresses of a pod but the link-local one.
pub fn addresses(pod: &Pod) -> impl Iterator<Item = IpAddr> + '_ {
    pod.ipv4.iter().copied().map(IpAddr::V4).chain(pod.ipv6.iter().copied().map(IpAddr::V6))
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;
    use std::sync::Arc;

    use weft_router::pace::Limits;
    use weft_router::tables::{Dhcp, Role};

    use super::*;
    use crate::control::config::Config;
    use crate::control::desired::FIRST_POD;
    use crate::control::host::Host;

    fn state(config: &str) -> DesiredState {
        DesiredState::new(Arc::new(Config::read(config, &Host::default()).unwrap().config))
    }

    fn pod(mac: &str, ipv4: &str, ipv6: &str) -> Pod {
        Pod {
            mac: mac.parse().unwrap(),
            ipv4: vec![ipv4.parse().unwrap()],
            ipv6: vec![ipv6.parse().unwrap()],
            mtu: 1400,
            limits: Limits::default(),
            dhcp: Dhcp::default(),
        }
    }

    /// Everything in the tables, in an order of its own.
    fn text(tables: &Tables) -> String {
        let mut out = String::new();
        writeln!(out, "epoch {} {:?} vni {} mtu {}", tables.epoch, tables.mode, tables.vni, tables.tunnel_mtu).unwrap();
        let gateway = tables.gateway;
        writeln!(out, "gateway {} {:?} {:?}", gateway.mac, gateway.ipv4, gateway.ipv6).unwrap();
        writeln!(out, "vtep {} underlay {:?}", tables.vtep_mac, tables.underlay).unwrap();
        for (number, role) in tables.ports.iter().enumerate() {
            match role.as_deref() {
                Some(Role::Pod(pod) | Role::Host(pod)) => {
                    let kind = if matches!(role.as_deref(), Some(Role::Host(_))) { "host" } else { "pod" };
                    let all: Vec<String> = addresses(pod).map(|address| address.to_string()).collect();
                    writeln!(out, "port {number} {kind} {} {} mtu {}", pod.mac, all.join(" "), pod.mtu).unwrap();
                }
                other => writeln!(out, "port {number} {other:?}").unwrap(),
            }
        }
        for (number, node) in tables.nodes.iter().enumerate() {
            match node {
                Some(node) => {
                    writeln!(out, "node {number} {} {} {:?}", node.underlay, node.vtep_mac, node.ranges).unwrap()
                }
                None => writeln!(out, "node {number} none").unwrap(),
            }
        }
        let mut lines: Vec<String> = Vec::new();
        lines.extend(tables.routes4.iter().map(|(net, via)| format!("route {net} {via:?}")));
        lines.extend(tables.routes6.iter().map(|(net, via)| format!("route {net} {via:?}")));
        lines.extend(tables.members.iter().map(|(address, node)| format!("member {address} {node:?}")));
        lines.extend(tables.neighbours.iter().map(|(address, n)| format!("neighbour {address} {} {}", n.mac, n.port)));
        lines.extend(tables.macs.iter().map(|(mac, port)| format!("mac {mac} {port}")));
        lines.extend(tables.flood.iter().map(|port| format!("flood {port}")));
        lines.sort();
        out + &lines.join("\n") + "\n"
    }

    const ROUTED: &str = r#"
        node = "n1"
        mode = "routed"
        mtu = 1450
        ranges = ["10.244.1.0/24", "fd00:10:244:1::/64"]
        vtep_mac = "02:00:00:00:00:01"
        [underlay]
        address = "10.200.0.1"
        [[peers]]
        name = "n2"
        underlay = "10.200.0.2"
        ranges = ["10.244.2.0/24", "fd00:10:244:2::/64"]
        vtep_mac = "02:00:00:00:00:02"
        [[peers]]
        name = "n3"
        underlay = "10.200.0.3"
        ranges = ["10.244.3.0/24"]
        vtep_mac = "02:00:00:00:00:03"
    "#;

    #[test]
    fn routed_tables_hold_exactly_what_was_configured_and_attached() {
        let mut state = state(ROUTED);
        state.pods.insert(FIRST_POD, pod("0a:00:00:00:00:02", "10.244.1.2", "fd00:10:244:1::2"));
        assert_eq!(text(&compile(&state, 7)), include_str!("golden/routed.txt"));
    }

    #[test]
    fn the_host_port_is_a_neighbour_and_takes_what_has_no_route() {
        let mut state = state(ROUTED);
        state.host = Some(pod("0a:00:00:00:00:fe", "10.244.1.254", "fd00:10:244:1::fe"));
        let tables = compile(&state, 1);
        assert_eq!(tables.host, tables.neighbours.get(&"10.244.1.254".parse::<IpAddr>().unwrap()).copied());
        assert!(text(&tables).contains("port 1 host 0a:00:00:00:00:fe 10.244.1.254 fd00:10:244:1::fe mtu 1400\n"));
        assert!(text(&tables).contains("flood 1\n") && !text(&tables).contains("0.0.0.0/0"));
    }

    #[test]
    fn bridged_tables_route_a_foreign_address_to_the_pod_that_kept_it() {
        let config = ROUTED.replace("\"routed\"", "\"bridged\"\nsegment = [\"10.244.0.0/16\", \"fd00:10:244::/48\"]");
        let mut state = state(&config);
        state.pods.insert(FIRST_POD, pod("0a:00:00:00:00:02", "10.244.2.9", "fd00:10:244:1::2"));
        assert_eq!(text(&compile(&state, 1)), include_str!("golden/bridged.txt"));
    }

    #[test]
    fn what_leads_away_without_a_tunnel_never_takes_what_the_configuration_says_of() {
        let text = ROUTED.replace("[underlay]", "[underlay]\nencapsulation = \"host-gw\"");
        let mut state = state(&text);
        let [near, learned] = [GroupId(1), GroupId(2)];
        state.leads.uplinks = vec![PortId(5)];
        state.leads.peers.insert("10.200.0.2".parse().unwrap(), near);
        for net in ["10.0.0.0/8", "10.244.1.128/25", "10.244.3.0/24", "10.244.9.0/24"] {
            state.leads.learned.insert(net.parse().unwrap(), learned);
        }
        let tables = compile(&state, 1);
        let via = |net: &str| tables.routes4.get(&net.parse().unwrap()).copied();
        assert_eq!(via("10.244.1.0/24"), Some(Via::Local));
        assert_eq!((via("10.244.1.128/25"), via("10.0.0.0/8")), (None, Some(Via::Uplink(learned))));
        assert_eq!((via("10.244.9.0/24"), via("10.244.2.0/24")), (Some(Via::Uplink(learned)), Some(Via::Uplink(near))));
        let far = state.nodes.of("n3").unwrap();
        assert_eq!(via("10.244.3.0/24"), Some(Via::Node(far)), "it is not on the network, and gets the tunnel");
        assert_eq!(tables.role(PortId(5)), Some(&Role::Uplink));
    }

    /// The pod of that number. Some have a MAC that another one has, some an address of another node's range.
    fn some_pod(number: u16) -> Pod {
        let low = number % 200 + 10;
        let mac = format!("0a:00:00:00:00:{:02x}", if number.is_multiple_of(37) { 1 } else { low });
        let ipv4 = if number.is_multiple_of(29) { format!("10.244.2.{low}") } else { format!("10.244.1.{low}") };
        pod(&mac, &ipv4, &format!("fd00:10:244:1::{low:x}"))
    }

    #[test]
    fn tables_that_follow_pods_one_by_one_are_those_of_a_whole_compile() {
        let bridged = ROUTED.replace("\"routed\"", "\"bridged\"\nsegment = [\"10.244.0.0/16\", \"fd00:10:244::/48\"]");
        for config in [ROUTED, &bridged] {
            let mut state = state(config);
            state.host = Some(pod("0a:00:00:00:00:fe", "10.244.1.254", "fd00:10:244:1::fe"));
            let (mut tables, mut random, mut followed) = (compile(&state, 0), 1_u64, 0);
            for epoch in 1..3000 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let port = PortId(FIRST_POD.0 + (random >> 33) as u16 % 40);
                let next = match state.pods.remove(&port) {
                    Some(pod) => without_pod(&tables, &state, port, &pod, epoch),
                    None => {
                        let pod = some_pod((random >> 45) as u16);
                        state.pods.insert(port, pod.clone());
                        with_pod(&tables, &state, port, &pod, epoch)
                    }
                };
                followed += u32::from(next.is_some());
                let whole = compile(&state, epoch);
                tables = next.unwrap_or_else(|| compile(&state, epoch));
                assert_eq!((text(&tables), tables.overlaps), (text(&whole), whole.overlaps));
            }
            assert!((100..2900).contains(&followed), "{followed} were made of those before");
        }
    }

    #[test]
    fn a_pod_that_comes_shares_what_is_of_other_nodes() {
        let mut state = state(ROUTED);
        let before = compile(&state, 1);
        let pod = some_pod(1);
        state.pods.insert(FIRST_POD, pod.clone());
        let after = with_pod(&before, &state, FIRST_POD, &pod, 2).unwrap();
        assert!(Arc::ptr_eq(&before.nodes, &after.nodes) && Arc::ptr_eq(&before.routes4, &after.routes4));
        assert!(Arc::ptr_eq(&before.members, &after.members) && Arc::ptr_eq(&before.routes6, &after.routes6));
    }

    #[test]
    fn a_peer_that_leaves_takes_its_routes_along_and_leaves_the_other_numbers_alone() {
        let before = state(ROUTED);
        let without = ROUTED.replace("name = \"n2\"", "name = \"n0\"");
        let config = Config::read(&without, &Host::default()).unwrap().config;
        let after = compile(&before.reconfigured(Arc::new(config)), 2);
        assert!(after.nodes[0].is_none(), "n2's number waits for it");
        assert_eq!(after.nodes[1].as_ref().unwrap().underlay.to_string(), "10.200.0.3");
        assert_eq!(after.nodes[2].as_ref().unwrap().underlay.to_string(), "10.200.0.2");
        assert_eq!(after.members.len(), 2);
    }
}
