//! Bulk: TCP and UDP both ways, and a gibibyte that arrives as it was sent.

use std::net::IpAddr;

use weft_tests::lab::{Lab, Pod};
use weft_tests::machine::turn;
use weft_tests::traffic;

/// Anything that works at all is faster than this; how fast it ought to be is the benches' question.
const ALIVE: f64 = 100e6;

#[track_caller]
fn both_ways(a: &Pod, b: &Pod) {
    for address in [IpAddr::V4(b.ipv4), IpAddr::V6(b.ipv6)] {
        for direction in ["", "-R"] {
            let tcp = traffic::iperf3(&a.netns(), &b.netns(), address, &format!("-C cubic -t 1 {direction}"));
            assert!(tcp > ALIVE, "TCP {} and {address} {direction}: {tcp} bit/s", a.name);
            let udp = traffic::iperf3(&a.netns(), &b.netns(), address, &format!("-u -b 200M -l 1400 -t 1 {direction}"));
            assert!(udp > ALIVE, "UDP {} and {address} {direction}: {udp} bit/s", a.name);
        }
    }
}

#[test]
fn tcp_and_udp_run_both_ways_on_one_node_and_across_nodes() {
    let _turn = turn();
    for mode in ["routed", "bridged"] {
        let lab = Lab::up("i", 2, 2, mode, &[]);
        both_ways(lab.pod(1, 1), lab.pod(1, 2));
        both_ways(lab.pod(1, 1), lab.pod(2, 1));
        let parallel = traffic::iperf3(
            &lab.pod(1, 1).netns(),
            &lab.pod(2, 2).netns(),
            lab.pod(2, 2).ipv4.into(),
            "-C cubic -P 8 -t 2 --bidir",
        );
        assert!(parallel > ALIVE);
        lab.assert_conserved();
    }
}

#[test]
fn a_gibibyte_arrives_as_it_was_sent() {
    let _turn = turn();
    let lab = Lab::up("g", 2, 2, "routed", &[]);
    let (a, b, far) = (lab.pod(1, 1), lab.pod(1, 2), lab.pod(2, 1));
    traffic::transfer(&a.netns(), &far.netns(), far.ipv4.into(), 1 << 30);
    traffic::transfer(&far.netns(), &a.netns(), a.ipv6.into(), 256 << 20);
    traffic::transfer(&a.netns(), &b.netns(), b.ipv4.into(), 256 << 20);
    lab.assert_conserved();
}
