//! What a lab will consist of: names and addresses, worked out before anything is made.
//!
//! Everything follows from the lab's name and three numbers, so that two labs never collide and `down` can check
//! that what a record names is a lab's. The default lab has the plain names (`weft-n1`, `weft-n1-p1`), lab `x` has
//! `weft-x-n1` and so on. Node N has 10.200.0.N or fd00:10:200::N on the underlay and gives pods addresses of 10.244.N.0/24 and
//! fd00:10:244:N::/64 in both modes, unless they come from etcd, which cuts them out of the same networks as it pleases; in bridged mode these lie in one /16 and one /48 that are on-link everywhere.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Result, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use weft_encap::format::Format;

/// The lab that has the plain names.
pub const DEFAULT: &str = "default";
/// Most nodes in a lab.
pub const MAX_NODES: u8 = 16;
/// Most pods on a node.
pub const MAX_PODS: u8 = 64;
/// Most workers of a weftd.
pub const MAX_WORKERS: u8 = 64;
/// Smallest MTU of pods: what IPv6 demands (RFC 8200, section 5).
const MIN_POD_MTU: u32 = 1280;
/// Smallest MTU of the underlay.
pub const MIN_MTU: u32 = MIN_POD_MTU + Family::Ipv4.overhead();
/// Largest MTU of the underlay.
pub const MAX_MTU: u32 = 9216;
/// The number of the etcd's address on the underlay, and its port.
const ETCD_HOST: u8 = 250;
const ETCD_PORT: u16 = 2379;
/// The interface of a node that leads to the underlay.
pub const UPLINK: &str = "uplink";
/// VXLAN's port, as Linux and Flannel have it.
pub const PORT: u16 = 8472;
/// VXLAN's network identifier.
pub const VNI: u32 = 1;

const MAX_NAME: usize = 24;

/// How the pod network is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Each node has its own ranges; packets between nodes are routed.
    Routed,
    /// One L2 segment over all nodes.
    Bridged,
}

impl Mode {
    /// As in the daemon's configuration.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Routed => "routed",
            Mode::Bridged => "bridged",
        }
    }
}

/// What pods get as devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Port {
    /// A TAP.
    Tap,
    /// A veth that leads to AF_XDP sockets.
    Xdp,
    /// What suits the node.
    Auto,
}

/// Where the nodes know each other from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "kebab-case")]
pub enum Source {
    /// The configuration of each node.
    #[default]
    File,
    /// An etcd of the lab's own.
    Etcd,
}

/// How the tunnel's packets leave and enter the nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Underlay {
    /// By sockets of the kernel.
    Udp,
    /// By AF_XDP sockets on the uplink.
    Xdp,
    /// By what is faster.
    Auto,
}

/// What packets between nodes are wrapped in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
#[value(rename_all = "kebab-case")]
pub enum Encapsulation {
    /// VXLAN.
    #[default]
    Vxlan,
    /// Geneve.
    Geneve,
    /// GRE: with IP inside, with Ethernet in bridged mode.
    Gre,
    /// GRE with Ethernet inside.
    Gretap,
    /// IP in IP.
    Ipip,
    /// Nothing.
    HostGw,
}

impl Encapsulation {
    /// What it adds to a pod's packet, the outer IP header included.
    pub fn overhead(self, mode: Mode, family: Family) -> u32 {
        let format = match (self, mode) {
            (Encapsulation::Vxlan, _) => Format::Vxlan,
            (Encapsulation::Geneve, _) => Format::Geneve,
            (Encapsulation::Gre, Mode::Routed) => Format::Gre,
            (Encapsulation::Gretap, _) | (Encapsulation::Gre, Mode::Bridged) => Format::Gretap,
            (Encapsulation::Ipip, _) => Format::Ipip,
            (Encapsulation::HostGw, _) => return 0,
        };
        format.overhead(family == Family::Ipv4)
    }
}

/// What addresses nodes have on the underlay.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Family {
    /// 10.200.0.N.
    #[default]
    Ipv4,
    /// fd00:10:200::N.
    Ipv6,
}

impl Family {
    /// What VXLAN adds to a pod's packet, as no other encapsulation adds more.
    pub const fn overhead(self) -> u32 {
        Format::Vxlan.overhead(matches!(self, Family::Ipv4))
    }

    /// Number `host` of the underlay's addresses.
    fn address(self, host: u8) -> IpAddr {
        match self {
            Family::Ipv4 => Ipv4Addr::new(10, 200, 0, host).into(),
            Family::Ipv6 => Ipv6Addr::new(0xfd00, 0x10, 0x200, 0, 0, 0, 0, host.into()).into(),
        }
    }

    /// How much of such an address is the underlay's.
    pub fn prefix_len(self) -> u8 {
        match self {
            Family::Ipv4 => 24,
            Family::Ipv6 => 64,
        }
    }
}

/// A lab to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The lab's name.
    pub lab: String,
    /// Number of nodes.
    pub nodes: u8,
    /// Number of pods on each.
    pub pods: u8,
    /// Layout.
    pub mode: Mode,
    /// MTU of the underlay.
    pub mtu: u32,
    /// Workers of each weftd; as many as it chooses unless given.
    pub workers: Option<u8>,
    /// Kind of the pods' ports; what weftd has unless given.
    pub port: Option<Port>,
    /// Where the nodes know each other from.
    pub source: Source,
    /// Kind of the underlay; what weftd has unless given.
    pub underlay: Option<Underlay>,
    /// What addresses nodes have there.
    pub family: Family,
    /// What packets between nodes are wrapped in.
    pub encapsulation: Encapsulation,
    /// Whether pods leave the cluster in their node's name.
    pub masquerade: bool,
    /// Whether the process that builds it ends it as well.
    pub is_passing: bool,
}

impl Plan {
    /// Checks the numbers.
    pub fn new(lab: &str, nodes: u8, pods: u8, mode: Mode, mtu: u32) -> Result<Plan> {
        check_name(lab)?;
        if nodes == 0 || nodes > MAX_NODES {
            bail!("a lab has 1 to {MAX_NODES} nodes, not {nodes}");
        }
        if pods > MAX_PODS {
            bail!("a node of a lab has up to {MAX_PODS} pods, not {pods}");
        }
        if !(MIN_MTU..=MAX_MTU).contains(&mtu) {
            bail!("the underlay's MTU must be between {MIN_MTU} and {MAX_MTU}, not {mtu}");
        }
        Ok(Plan {
            lab: lab.to_owned(),
            nodes,
            pods,
            mode,
            mtu,
            workers: None,
            port: None,
            source: Source::File,
            underlay: None,
            family: Family::Ipv4,
            encapsulation: Encapsulation::Vxlan,
            masquerade: false,
            is_passing: false,
        })
    }

    /// With an underlay of this family.
    pub fn over(self, family: Family) -> Result<Plan> {
        let least = MIN_POD_MTU + family.overhead();
        if self.mtu < least {
            bail!("with this kind of addresses the underlay's MTU must be at least {least}, not {}", self.mtu);
        }
        Ok(Plan { family, ..self })
    }

    /// With this between the nodes.
    pub fn wrapped(self, encapsulation: Encapsulation) -> Result<Plan> {
        if self.mode == Mode::Bridged && matches!(encapsulation, Encapsulation::Ipip | Encapsulation::HostGw) {
            bail!(
                "this encapsulation carries no Ethernet frames, which a bridged lab needs: choose vxlan, geneve or gre"
            );
        }
        Ok(Plan { encapsulation, ..self })
    }

    /// Nodes count from 1.
    pub fn node_numbers(&self) -> std::ops::RangeInclusive<u8> {
        1..=self.nodes
    }

    /// So do pods.
    pub fn pod_numbers(&self) -> std::ops::RangeInclusive<u8> {
        1..=self.pods
    }

    /// The namespace of the underlay's bridge.
    pub fn underlay_netns(&self) -> String {
        format!("{}underlay", prefix(&self.lab))
    }

    /// The namespace of a node.
    pub fn node_netns(&self, node: u8) -> String {
        format!("{}{}", prefix(&self.lab), node_name(node))
    }

    /// The namespace of a pod.
    pub fn pod_netns(&self, node: u8, pod: u8) -> String {
        format!("{}{}", prefix(&self.lab), pod_name(node, pod))
    }

    /// All namespaces, in the order in which they are made.
    pub fn all_netns(&self) -> Vec<String> {
        let mut all = vec![self.underlay_netns()];
        for node in self.node_numbers() {
            all.push(self.node_netns(node));
            all.extend(self.pod_numbers().map(|pod| self.pod_netns(node, pod)));
        }
        all
    }

    /// MTU of the pods.
    pub fn pod_mtu(&self) -> u32 {
        self.mtu - self.encapsulation.overhead(self.mode, self.family)
    }

    /// A node's address on the underlay.
    pub fn underlay_address(&self, node: u8) -> IpAddr {
        self.family.address(node)
    }

    /// Where the lab's etcd is, on the underlay.
    pub fn etcd(&self) -> SocketAddr {
        SocketAddr::new(self.family.address(ETCD_HOST), ETCD_PORT)
    }
}

/// The name of a node, which is also the end of its namespace's name.
pub fn node_name(node: u8) -> String {
    format!("n{node}")
}

/// The name of a pod.
pub fn pod_name(node: u8, pod: u8) -> String {
    format!("n{node}-p{pod}")
}

/// The ranges from which a node gives addresses, in CIDR form.
pub fn ranges(node: u8) -> [String; 2] {
    [format!("10.244.{node}.0/24"), format!("fd00:10:244:{node}::/64")]
}

/// What is on-link in bridged mode.
pub const SEGMENT: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/48"];
/// The gateway in bridged mode, the same everywhere.
pub const SEGMENT_GATEWAY: [&str; 2] = ["10.244.0.1", "fd00:10:244::1"];

/// Address number `host` of a node's IPv4 range.
pub fn range_v4(node: u8, host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, node, host)
}

/// What the names of a lab's namespaces begin with.
pub fn prefix(lab: &str) -> String {
    if lab == DEFAULT { "weft-".to_owned() } else { format!("weft-{lab}-") }
}

/// Whether a namespace's name is one that lab `lab` could have made.
pub fn is_netns_of(lab: &str, netns: &str) -> bool {
    let Some(rest) = netns.strip_prefix(&prefix(lab)) else { return false };
    let number = |text: &str| !text.is_empty() && text.len() <= 3 && text.bytes().all(|b| b.is_ascii_digit());
    let (node, pod) = rest.split_once("-p").map_or((rest, None), |(node, pod)| (node, Some(pod)));
    rest == "underlay" || (node.strip_prefix('n').is_some_and(number) && pod.is_none_or(number))
}

/// Checks the name of a lab: it becomes part of names and paths.
pub fn check_name(lab: &str) -> Result<()> {
    let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if lab.is_empty() || lab.len() > MAX_NAME || !lab.bytes().all(good) || lab.starts_with('-') {
        bail!("{lab:?} cannot be a lab's name: take up to {MAX_NAME} of a-z, 0-9 and -, not starting with -");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(lab: &str) -> Plan {
        Plan::new(lab, 2, 1, Mode::Routed, 1500).unwrap()
    }

    #[test]
    fn the_default_lab_has_the_plain_names() {
        let expected = ["weft-underlay", "weft-n1", "weft-n1-p1", "weft-n2", "weft-n2-p1"];
        assert_eq!(plan(DEFAULT).all_netns(), expected);
    }

    #[test]
    fn another_lab_has_its_name_in_all_of_them() {
        let expected = ["weft-x-underlay", "weft-x-n1", "weft-x-n1-p1", "weft-x-n2", "weft-x-n2-p1"];
        assert_eq!(plan("x").all_netns(), expected);
    }

    #[test]
    fn labs_never_share_a_namespace() {
        let labs = [DEFAULT, "n1", "n1-p1", "n1-n1", "underlay", "x", "x-n1", "p1"];
        let mut all: Vec<String> = labs.iter().flat_map(|lab| plan(lab).all_netns()).collect();
        let count = all.len();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count);
    }

    #[test]
    fn only_a_labs_own_namespaces_are_recognised_as_its() {
        for lab in [DEFAULT, "x", "n1"] {
            assert!(plan(lab).all_netns().iter().all(|netns| is_netns_of(lab, netns)));
        }
        for foreign in
            ["weft-", "weft-n", "weft-n1-p", "weft-x-n1", "weft-n1-p1-", "weft-t12-n1", "n1", "weft-n1234", "weft-nx"]
        {
            assert!(!is_netns_of(DEFAULT, foreign), "{foreign}");
        }
    }

    #[test]
    fn addresses_agree_with_the_ranges_they_are_of() {
        for node in 1..=MAX_NODES {
            assert_eq!(format!("{}/24", range_v4(node, 0)), ranges(node)[0]);
            assert!(ranges(node)[1].starts_with("fd00:10:244:"));
        }
        assert_eq!(plan("x").underlay_address(3).to_string(), "10.200.0.3");
    }

    #[test]
    fn numbers_and_names_out_of_bounds_are_refused() {
        let make = |nodes, pods, mtu| Plan::new("x", nodes, pods, Mode::Bridged, mtu);
        assert!(make(0, 1, 1500).is_err());
        assert!(make(MAX_NODES + 1, 1, 1500).is_err());
        assert!(make(1, MAX_PODS + 1, 1500).is_err());
        assert!(make(1, 0, MIN_MTU).is_ok());
        assert!(make(1, 1, MIN_MTU - 1).is_err());
        assert!(make(1, 1, MAX_MTU + 1).is_err());
        for name in ["", "-x", "a/b", "..", "A", "a b", "a\0", &"x".repeat(MAX_NAME + 1)] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn pods_get_what_the_tunnel_leaves() {
        assert_eq!(plan("x").pod_mtu(), 1450);
        let plan = plan("x").over(Family::Ipv6).unwrap();
        assert_eq!((plan.pod_mtu(), plan.underlay_address(3).to_string()), (1430, "fd00:10:200::3".into()));
        assert_eq!(plan.etcd().to_string(), "[fd00:10:200::fa]:2379");
        assert!(Plan { mtu: 1349, ..plan.clone() }.over(Family::Ipv6).is_err());
        assert!(Plan { mtu: 1350, ..plan }.over(Family::Ipv6).is_ok());
    }
}
