//! The data paths that are compared: one line each.

use super::ovs::Ports;
use super::task::Layout;
use crate::lab::plan::{Encapsulation, Plan, Port};

/// One of the data paths.
#[derive(Debug)]
pub struct Contender {
    /// Its name on the command line, in files, and in the name of its lab.
    pub id: &'static str,
    /// Its name for people.
    pub label: &'static str,
    /// The same where there is little room.
    pub short: &'static str,
    /// What it is.
    pub kind: Kind,
    /// Beside which of the others the table has its ratios; a file has all. Empty: it is only compared with.
    pub rivals: &'static [&'static str],
}

/// What carries the frames.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// weftd; with what its lab has other than a plain one.
    Weft(fn(Plan) -> Plan),
    /// The same with another encapsulation, whose pods of one node are not measured again.
    Wrapped(fn(Plan) -> Plan),
    /// The same with masquerade, measured by what leaves the cluster alone.
    Masquerading,
    /// The kernel's bridge on a node, its VXLAN device between nodes, as Flannel lays them out.
    Kernel,
    /// The kernel's without a tunnel: its own routes from node to node.
    Routes,
    /// Open vSwitch's userspace datapath.
    Ovs(Ports),
    /// DPDK's testpmd, which passes frames on unseen between two pods of one node.
    Testpmd,
}

/// All of them, in the order in which they are shown. A Weft with other ports or another underlay is one more line.
pub const CONTENDERS: [Contender; 12] = [
    Contender {
        id: "weft",
        label: "Weft, TAP and UDP",
        short: "Weft",
        kind: Kind::Weft(|plan| plan),
        rivals: &["kernel", "ovs-xdp", "ovs-packet"],
    },
    Contender { id: "kernel", label: "kernel", short: "kernel", kind: Kind::Kernel, rivals: &[] },
    Contender {
        id: "weft-xdp",
        label: "Weft, AF_XDP pods",
        short: "Weft XDP",
        kind: Kind::Weft(|plan| Plan { port: Some(Port::Xdp), ..plan }),
        rivals: &["kernel", "ovs-xdp", "testpmd"],
    },
    wrapped("weft-geneve", "Weft, Geneve", "Geneve", &["kernel"], |plan| Plan {
        encapsulation: Encapsulation::Geneve,
        ..plan
    }),
    wrapped("weft-gre", "Weft, GRE", "GRE", &["kernel"], |plan| Plan { encapsulation: Encapsulation::Gre, ..plan }),
    wrapped("weft-ipip", "Weft, IP in IP", "IPIP", &["kernel"], |plan| Plan {
        encapsulation: Encapsulation::Ipip,
        ..plan
    }),
    wrapped("weft-host-gw", "Weft, no tunnel", "host-gw", &["kernel-routes"], |plan| Plan {
        encapsulation: Encapsulation::HostGw,
        ..plan
    }),
    Contender { id: "kernel-routes", label: "kernel, no tunnel", short: "routes", kind: Kind::Routes, rivals: &[] },
    Contender {
        id: "weft-out",
        label: "Weft, masquerade",
        short: "masquerade",
        kind: Kind::Masquerading,
        rivals: &["kernel"],
    },
    Contender { id: "ovs-xdp", label: "OVS AF_XDP", short: "OVS XDP", kind: Kind::Ovs(Ports::AfXdp), rivals: &[] },
    Contender {
        id: "ovs-packet",
        label: "OVS AF_PACKET",
        short: "OVS packet",
        kind: Kind::Ovs(Ports::AfPacket),
        rivals: &[],
    },
    Contender { id: "testpmd", label: "testpmd AF_XDP io", short: "testpmd", kind: Kind::Testpmd, rivals: &[] },
];

/// A Weft that wraps packets between nodes in something else than VXLAN: only what passes between nodes is another there. This kernel has
/// VXLAN alone, and its routes, to hold beside it.
const fn wrapped(
    id: &'static str,
    label: &'static str,
    short: &'static str,
    rivals: &'static [&'static str],
    with: fn(Plan) -> Plan,
) -> Contender {
    Contender { id, label, short, kind: Kind::Wrapped(with), rivals }
}

impl Contender {
    /// Whether its figures are what the others' are held against.
    pub fn is_weft(&self) -> bool {
        matches!(self.kind, Kind::Weft(_) | Kind::Wrapped(_) | Kind::Masquerading)
    }

    /// Whether threads of its own look for frames all the time, and so use a processor when there are none.
    pub fn spins(&self) -> bool {
        matches!(self.kind, Kind::Ovs(Ports::AfXdp) | Kind::Testpmd)
    }

    /// Whether it is neither the Weft that is installed by default nor the kernel, by which that is judged first of all.
    pub fn is_guest(&self) -> bool {
        !matches!(self.id, "weft" | "kernel")
    }

    /// Whether a run goes on without it where it cannot be built.
    pub fn is_dispensable(&self) -> bool {
        matches!(self.kind, Kind::Ovs(_) | Kind::Testpmd)
    }

    /// Whether it has such pods.
    pub fn has(&self, layout: Layout) -> bool {
        match self.kind {
            Kind::Testpmd => layout == Layout::Same,
            Kind::Wrapped(_) | Kind::Routes => layout == Layout::Two,
            Kind::Masquerading => layout == Layout::Out,
            // It takes rules that `nft` makes.
            Kind::Kernel => layout != Layout::Out || super::is_installed("nft"),
            Kind::Weft(_) | Kind::Ovs(_) => layout != Layout::Out,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::plan;

    #[test]
    fn names_are_different_and_can_be_part_of_a_labs() {
        for (index, contender) in CONTENDERS.iter().enumerate() {
            plan::check_name(&format!("bench-{}", contender.id)).unwrap();
            assert!(CONTENDERS[index + 1..].iter().all(|other| other.id != contender.id));
        }
    }

    #[test]
    fn rivals_are_others() {
        for contender in &CONTENDERS {
            let is_other = |id: &&str| CONTENDERS.iter().any(|other| other.id == *id && !other.is_weft());
            assert!(contender.rivals.iter().all(is_other), "{}", contender.id);
            assert_eq!(contender.rivals.is_empty(), !contender.is_weft());
        }
    }

    #[test]
    fn there_is_a_weft_and_something_to_hold_it_against() {
        assert!(CONTENDERS.iter().any(Contender::is_weft));
        assert!(!CONTENDERS.iter().all(Contender::is_weft));
    }
}
