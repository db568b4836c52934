//! The data paths that are compared: one line each.

use super::ovs::Ports;
use crate::lab::plan::Plan;

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
}

/// What carries the frames.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// weftd; with what its lab has other than a plain one.
    Weft(fn(Plan) -> Plan),
    /// The kernel's bridge on a node, its VXLAN device between nodes, as Flannel lays them out.
    Kernel,
    /// Open vSwitch's userspace datapath.
    Ovs(Ports),
}

/// All of them, in the order in which they are shown. A Weft with other ports or another underlay is one more line.
pub const CONTENDERS: [Contender; 4] = [
    Contender { id: "weft", label: "Weft, TAP and UDP", short: "Weft", kind: Kind::Weft(|plan| plan) },
    Contender { id: "kernel", label: "kernel", short: "kernel", kind: Kind::Kernel },
    Contender { id: "ovs-xdp", label: "OVS AF_XDP", short: "OVS XDP", kind: Kind::Ovs(Ports::AfXdp) },
    Contender { id: "ovs-packet", label: "OVS AF_PACKET", short: "OVS packet", kind: Kind::Ovs(Ports::AfPacket) },
];

impl Contender {
    /// Whether its figures are what the others' are held against.
    pub fn is_weft(&self) -> bool {
        matches!(self.kind, Kind::Weft(_))
    }

    /// Whether threads of its own look for frames all the time, and so use a processor when there are none.
    pub fn spins(&self) -> bool {
        matches!(self.kind, Kind::Ovs(Ports::AfXdp))
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
    fn there_is_a_weft_and_something_to_hold_it_against() {
        assert!(CONTENDERS.iter().any(Contender::is_weft));
        assert!(!CONTENDERS.iter().all(Contender::is_weft));
    }
}
