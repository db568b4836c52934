//! The same cluster on the kernel's own data path, to compare with.
//!
//! Flannel's layout: on each node a bridge with a veth to each pod and the gateway's address, and a VXLAN device that
//! is not in the bridge and does not learn; routes to the other nodes' ranges lead through it, by permanent neighbour
//! and FDB entries. Without a tunnel those routes lead to the other nodes themselves. Namespaces, addresses, MTU and underlay are those of the
//! lab that it is the twin of.

use std::net::Ipv4Addr;

use anyhow::Result;

use super::command::Run;
use super::plan::{self, Encapsulation, PORT, Plan, UPLINK, VNI};
use super::record::{Cluster, Kind, Record};
use super::{net, up};

const BRIDGE: &str = "cni0";
const TUNNEL: &str = "vxlan1";

/// Builds the twin. If that fails, nothing of it is left.
pub fn build(plan: &Plan) -> Result<()> {
    let mut record = up::reserve(plan, Kind::Kernel)?;
    lay_out(plan, &mut record).map_err(|error| up::undo(&record, error, false))
}

/// The address of a pod of the twin.
pub fn pod_address(node: u8, pod: u8) -> Ipv4Addr {
    plan::range_v4(node, pod + 1)
}

fn lay_out(plan: &Plan, record: &mut Record) -> Result<()> {
    net::make_namespaces(plan)?;
    net::make_underlay(plan)?;
    for node in plan.node_numbers() {
        for line in node_lines(plan, node) {
            run(plan, &line)?;
        }
        let forward = "echo 1 > /proc/sys/net/ipv4/ip_forward";
        Run::inside(&plan.node_netns(node), "sh").building(&plan.lab).args(["-c", forward]).succeed()?;
        for pod in plan.pod_numbers() {
            for line in pod_lines(plan, node, pod) {
                run(plan, &line)?;
            }
        }
    }
    record.cluster = Some(Cluster::default());
    record.save()
}

fn run(plan: &Plan, line: &str) -> Result<()> {
    let mut words = line.split_whitespace();
    let program = words.next().unwrap_or_default();
    Run::new(program).building(&plan.lab).args(words).succeed().map(drop)
}

fn node_lines(plan: &Plan, node: u8) -> Vec<String> {
    let (netns, mtu) = (plan.node_netns(node), plan.pod_mtu());
    let gateway = plan::range_v4(node, 1);
    let mut lines = vec![
        format!("ip -n {netns} link add {BRIDGE} mtu {mtu} type bridge"),
        format!("ip -n {netns} address add {gateway}/24 dev {BRIDGE}"),
        format!("ip -n {netns} link set {BRIDGE} up"),
    ];
    if plan.encapsulation == Encapsulation::HostGw {
        let peers = plan.node_numbers().filter(|peer| *peer != node);
        let to = |peer| (plan::range_v4(peer, 0), plan.underlay_address(peer));
        lines.extend(
            peers.map(to).map(|(net, peer)| format!("ip -n {netns} route add {net}/24 via {peer} dev {UPLINK}")),
        );
    } else {
        lines.extend(tunnel_lines(plan, node));
    }
    lines
}

fn tunnel_lines(plan: &Plan, node: u8) -> Vec<String> {
    let (netns, mtu, network) = (plan.node_netns(node), plan.pod_mtu(), plan::range_v4(node, 0));
    let (local, mac) = (plan.underlay_address(node), tunnel_mac(node));
    let mut lines = vec![
        format!(
            "ip -n {netns} link add {TUNNEL} address {mac} mtu {mtu} \
             type vxlan id {VNI} dev {UPLINK} local {local} dstport {PORT} nolearning"
        ),
        format!("ip -n {netns} address add {network}/32 dev {TUNNEL}"),
        format!("ip -n {netns} link set {TUNNEL} up"),
    ];
    for peer in plan.node_numbers().filter(|peer| *peer != node) {
        let (network, underlay, mac) = (plan::range_v4(peer, 0), plan.underlay_address(peer), tunnel_mac(peer));
        lines.push(format!("ip -n {netns} neigh add {network} lladdr {mac} dev {TUNNEL} nud permanent"));
        lines.push(format!("bridge -n {netns} fdb append {mac} dev {TUNNEL} dst {underlay}"));
        lines.push(format!("ip -n {netns} route add {network}/24 via {network} dev {TUNNEL} onlink"));
    }
    lines
}

fn pod_lines(plan: &Plan, node: u8, pod: u8) -> Vec<String> {
    let (netns, host, mtu) = (plan.pod_netns(node, pod), plan.node_netns(node), plan.pod_mtu());
    let (address, gateway) = (pod_address(node, pod), plan::range_v4(node, 1));
    vec![
        format!("ip -n {netns} link add eth0 mtu {mtu} type veth peer name p{pod} mtu {mtu} netns {host}"),
        format!("ip -n {netns} address add {address}/24 dev eth0"),
        format!("ip -n {netns} link set eth0 up"),
        format!("ip -n {host} link set p{pod} master {BRIDGE} up"),
        format!("ip -n {netns} route add default via {gateway}"),
    ]
}

fn tunnel_mac(node: u8) -> String {
    format!("02:00:00:00:01:{node:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::plan::Mode;

    #[test]
    fn a_node_of_the_twin_has_flannels_layout() {
        let plan = Plan::new("t", 2, 1, Mode::Routed, 1500).unwrap();
        let lines = node_lines(&plan, 1);
        let has = |text: &str| assert!(lines.iter().any(|line| line.contains(text)), "{text}: {lines:#?}");
        has("vxlan id 1 dev uplink local 10.200.0.1 dstport 8472 nolearning");
        has("route add 10.244.2.0/24 via 10.244.2.0 dev vxlan1 onlink");
        has("neigh add 10.244.2.0 lladdr 02:00:00:00:01:02 dev vxlan1 nud permanent");
        has("fdb append 02:00:00:00:01:02 dev vxlan1 dst 10.200.0.2");
        assert!(lines.iter().all(|line| line.contains("-n weft-t-n1 ")), "{lines:#?}");
    }

    #[test]
    fn without_a_tunnel_routes_lead_to_the_nodes_themselves() {
        let plan = Plan::new("t", 2, 1, Mode::Routed, 1500).unwrap().wrapped(Encapsulation::HostGw).unwrap();
        let lines = node_lines(&plan, 1);
        assert!(
            lines.iter().any(|line| line.ends_with("route add 10.244.2.0/24 via 10.200.0.2 dev uplink")),
            "{lines:#?}"
        );
        assert!(lines.iter().all(|line| !line.contains(TUNNEL)), "{lines:#?}");
    }

    #[test]
    fn nothing_is_made_outside_the_twins_namespaces() {
        let plan = Plan::new("t", 3, 2, Mode::Routed, 1500).unwrap();
        for node in plan.node_numbers() {
            let pods = plan.pod_numbers().flat_map(|pod| pod_lines(&plan, node, pod));
            for line in node_lines(&plan, node).into_iter().chain(pods) {
                let netns = line.split_whitespace().nth(2).unwrap();
                assert!(plan.all_netns().iter().any(|own| own == netns), "{line}");
            }
        }
    }
}
