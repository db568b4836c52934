//! Desired state to tables. Pure: the same state and epoch give the same tables.
//!
//! Fails closed: what is not entered here does not pass. A port without a role forwards nothing, a node without an
//! entry is no member, an address without a route is unreachable.
//!
//! | entry | routed | bridged |
//! |---|---|---|
//! | own ranges | `Via::Local` | `Via::Local`, for packets that a pod sends to the gateway's MAC |
//! | a pod's address outside them | `Via::Local`, as a host route | the same: a pod may keep its address on another node |
//! | a peer's ranges | `Via::Node` | `Via::Node`, likewise for packets to the gateway's MAC |

use std::net::IpAddr;

use ipnet::IpNet;
use weft_router::Tables;
use weft_router::tables::{Node, Pod, Via};

use super::config::Underlay;
use super::desired::{DesiredState, HOST, UNDERLAY};

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
    for peer in &config.peers {
        let Some(id) = state.nodes.of(&peer.name) else { continue };
        let node = Node { underlay: peer.underlay, vtep_mac: peer.vtep_mac, ranges: peer.ranges.clone() };
        tables.add_node(id, node);
        if let Some(mtu) = state.path_mtus.get(&peer.underlay) {
            tables.path_mtus.insert(id, mtu.saturating_sub(Underlay::overhead(peer.underlay)));
        }
    }
    for range in &config.ranges {
        tables.add_route(*range, Via::Local);
    }
    if let Some(host) = &state.host {
        tables.add_host(HOST, host.clone());
    }
    for (port, pod) in &state.pods {
        for address in addresses(pod).filter(|address| !config.ranges.iter().any(|range| range.contains(address))) {
            tables.add_route(IpNet::from(address), Via::Local);
        }
        tables.add_pod(*port, pod.clone());
    }
    tables
}

/// All addresses of a pod but the link-local one.
pub fn addresses(pod: &Pod) -> impl Iterator<Item = IpAddr> {
    pod.ipv4.iter().copied().map(IpAddr::V4).chain(pod.ipv6.iter().copied().map(IpAddr::V6))
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;
    use std::sync::Arc;

    use weft_router::PortId;
    use weft_router::pace::Limits;
    use weft_router::tables::{Dhcp, Role};

    use super::*;
    use crate::control::config::Config;
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
            match role {
                Some(Role::Pod(pod) | Role::Host(pod)) => {
                    let kind = if matches!(role, Some(Role::Host(_))) { "host" } else { "pod" };
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
        state.pods.insert(PortId(2), pod("0a:00:00:00:00:02", "10.244.1.2", "fd00:10:244:1::2"));
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
        state.pods.insert(PortId(1), pod("0a:00:00:00:00:02", "10.244.2.9", "fd00:10:244:1::2"));
        assert_eq!(text(&compile(&state, 1)), include_str!("golden/bridged.txt"));
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
