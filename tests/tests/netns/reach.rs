//! Who reaches whom, and with packets of which size.

use std::net::IpAddr;

use weft_tests::lab::{Lab, Pod};
use weft_tests::machine::turn;
use weft_tests::traffic;

/// Sizes of ping payloads around every edge: none, MTU less headers, one fragment and two, the largest.
const SIZES: [usize; 16] = [0, 1, 17, 18, 19, 56, 1372, 1402, 1403, 1422, 1423, 2844, 2845, 9000, 32_768, 65_000];

#[track_caller]
pub fn pings(from: &Pod, to: IpAddr, options: &str) {
    let family = if to.is_ipv4() { "-4" } else { "-6" };
    let said = from.netns().exec(&format!("ping {family} -n -q -i 0.05 -W 2 {options} {to}"));
    assert!(said.success, "{} to {to} with {options}: {}{}", from.name, said.out, said.err);
}

#[track_caller]
pub fn everyone_reaches_everyone(lab: &Lab) {
    for from in lab.pods() {
        for to in lab.pods() {
            for address in [IpAddr::V4(to.ipv4), IpAddr::V6(to.ipv6)] {
                pings(from, address, "-c 1");
            }
        }
    }
}

/// A few sizes each way; `-c 2`, so that a flow's first frame and one that is cached both count.
#[track_caller]
pub fn every_size_passes(from: &Pod, to: &Pod) {
    for size in SIZES {
        for address in [IpAddr::V4(to.ipv4), IpAddr::V6(to.ipv6)] {
            pings(from, address, &format!("-c 2 -s {size}"));
        }
    }
    for address in [IpAddr::V4(to.ipv4), IpAddr::V6(to.ipv6)] {
        traffic::echo_datagrams(&from.netns(), &to.netns(), address, &[0, 1, 1402, 1403, 1422, 1423, 5000, 65_000]);
    }
}

#[test]
fn routed_every_pod_reaches_every_other_with_packets_of_every_size() {
    let _turn = turn();
    let lab = Lab::up("r", 3, 3, "routed", &[]);
    everyone_reaches_everyone(&lab);
    every_size_passes(lab.pod(1, 1), lab.pod(1, 2));
    every_size_passes(lab.pod(1, 1), lab.pod(2, 1));
    every_size_passes(lab.pod(3, 3), lab.pod(2, 2));
    lab.assert_conserved();
}

#[test]
fn bridged_every_pod_reaches_every_other_with_packets_of_every_size() {
    let _turn = turn();
    let lab = Lab::up("b", 2, 2, "bridged", &[]);
    everyone_reaches_everyone(&lab);
    every_size_passes(lab.pod(1, 1), lab.pod(1, 2));
    every_size_passes(lab.pod(1, 1), lab.pod(2, 1));
    lab.assert_conserved();
}

#[test]
fn a_larger_underlay_gives_larger_packets() {
    let _turn = turn();
    let lab = Lab::up("j", 2, 1, "routed", &["--mtu", "9000"]);
    let (from, to) = (lab.pod(1, 1), lab.pod(2, 1));
    pings(from, to.ipv4.into(), "-c 1 -M do -s 8922");
    pings(from, to.ipv6.into(), "-c 1 -M do -s 8902");
    every_size_passes(from, to);
    traffic::transfer(&from.netns(), &to.netns(), to.ipv4.into(), 64 << 20);
    lab.assert_conserved();
}

#[test]
fn no_offloads_in_the_underlay_change_nothing_but_speed() {
    let _turn = turn();
    let lab = Lab::up("o", 2, 1, "routed", &[]);
    for node in &lab.nodes {
        // What a network card without offloads looks like: nothing leaves in one piece, nothing leaves unsummed.
        let off = "tso off gso off tx-udp-segmentation off tx-udp_tnl-segmentation off tx-udp_tnl-csum-segmentation off tx off gro off";
        node.netns().exec(&format!("ethtool -K uplink {off}"));
    }
    let (from, to) = (lab.pod(1, 1), lab.pod(2, 1));
    every_size_passes(from, to);
    for address in [IpAddr::V4(to.ipv4), IpAddr::V6(to.ipv6)] {
        traffic::transfer(&from.netns(), &to.netns(), address, 32 << 20);
    }
    lab.assert_conserved();
}
