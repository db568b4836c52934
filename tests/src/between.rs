//! Two nodes with a pod each, and between them two routers with a link that is narrower than the nodes' own.

use std::net::IpAddr;

use crate::cluster::{Cluster, WeftNode};
use crate::netns::OwnNetns;

/// The nodes, and what lies between them.
pub struct Between {
    /// The nodes.
    pub nodes: [WeftNode; 2],
    /// A pod of each, with its addresses.
    pub pods: Vec<(OwnNetns, Vec<IpAddr>)>,
    /// The routers, each beside the node of its place.
    pub routers: [OwnNetns; 2],
    _cluster: Cluster,
}

impl Between {
    /// With a link of that MTU between the routers. Everything else is as it always is.
    #[track_caller]
    pub fn new(cluster: Cluster, mtu: u32) -> Between {
        let routers = [cluster.machine(9), cluster.machine(8)];
        let node = |number, other| cluster.weft_node(number, "routed", &cluster.peer(other, None));
        let nodes = [node(1, 2), node(2, 1)];
        Between::with(cluster, nodes, routers, mtu)
    }

    /// With uplinks of that MTU as well, pods that use what those leave, and routers that tell nobody that a packet is too long.
    #[track_caller]
    pub fn wide_and_silent(cluster: Cluster, mtu: u32) -> Between {
        let config = |number, other| {
            let text = cluster.config(number, "routed", &cluster.peer(other, None));
            text.lines().filter(|line| !line.starts_with("mtu = ")).map(|line| format!("{line}\n")).collect::<String>()
        };
        cluster.underlay().ip(&format!("link set br0 mtu {mtu}"));
        let routers = [cluster.machine(9), cluster.machine(8)];
        let node = |number: u8, other| cluster.weft_node_of_mtu(number, &config(number, other), mtu);
        let nodes = [node(1, 2), node(2, 1)];
        for (number, router) in [(9, &routers[0]), (8, &routers[1])] {
            cluster.underlay().ip(&format!("link set n{number} mtu {mtu}"));
            router.ip(&format!("link set uplink mtu {mtu}"));
            router.exec("nft add table inet silent").must();
            router.exec("nft add chain inet silent out { type filter hook output priority 0 ; }").must();
            router.exec("nft add rule inet silent out icmp type destination-unreachable drop").must();
            router.exec("nft add rule inet silent out icmpv6 type packet-too-big drop").must();
        }
        Between::with(cluster, nodes, routers, mtu)
    }

    fn with(cluster: Cluster, nodes: [WeftNode; 2], routers: [OwnNetns; 2], mtu: u32) -> Between {
        routers[0].ip(&format!("link add between mtu {mtu} type veth peer name between netns {}", routers[1].0));
        let (family, len, links) = match cluster.address(1) {
            IpAddr::V6(_) => ("-6", "64 nodad", ["fd00:77::1", "fd00:77::2"]),
            IpAddr::V4(_) => ("-4", "24", ["10.77.0.1", "10.77.0.2"]),
        };
        for (router, address) in routers.iter().zip(links) {
            router.ip(&format!("link set between mtu {mtu} up"));
            router.ip(&format!("{family} address add {address}/{len} dev between"));
        }
        let (one, two) = (cluster.address(1), cluster.address(2));
        for (machine, to, via, device) in [
            (&*nodes[0].netns, two, cluster.address(9).to_string(), "uplink"),
            (&*nodes[1].netns, one, cluster.address(8).to_string(), "uplink"),
            (&*routers[0], two, links[1].to_owned(), "between"),
            (&*routers[1], one, links[0].to_owned(), "between"),
        ] {
            machine.ip(&format!("{family} route add {to} via {via} dev {device}"));
        }
        let pods = nodes.iter().map(|node| cluster.pod(node)).collect();
        Between { nodes, pods, routers, _cluster: cluster }
    }

    /// What lies between carries packets of that length from now on.
    pub fn set_mtu(&self, mtu: u32) {
        self.routers.iter().for_each(|router| drop(router.ip(&format!("link set between mtu {mtu}"))));
    }
}
