//! GRE and IP in IP with superframes: they leave whole, arrive byte for byte whoever cuts them, and are cut by the router itself where the
//! kernel's way is closed.

use weft_api::PortInfo;
use weft_tests::lab::Lab;
use weft_tests::machine::turn;
use weft_tests::netns::Netns;
use weft_tests::traffic;

/// Enough for some hundreds of superframes.
const BYTES: u64 = 32 << 20;
/// A full frame on these wires.
const WIRE: u64 = 1514;

/// Who cuts superframes.
const CUT: [(&str, &str); 2] = [("nobody", "on"), ("the kernel", "off")];

fn port(lab: &Lab, node: usize, format: &str) -> PortInfo {
    let number = if format == "ipip" { 4 } else { 3 };
    lab.daemon(node).ports().into_iter().find(|port| port.id == number).expect("every node takes in every format")
}

/// Mean length of what a node sends by a format while `work` is done.
fn mean(lab: &Lab, format: &str, work: impl FnOnce()) -> u64 {
    let before = port(lab, 1, format);
    work();
    let after = port(lab, 1, format);
    (after.out_bytes - before.out_bytes) / (after.out - before.out).max(1)
}

/// Has the uplink cut what is too long for the wire by itself, or take it as it is.
fn offloads(node: &Netns, state: &str) {
    let features = ["tso", "gso", "tx-gre-segmentation", "tx-ipxip4-segmentation", "tx-ipxip6-segmentation", "tx"];
    let line: Vec<String> = features.iter().map(|feature| format!("{feature} {state}")).collect();
    node.exec(&format!("ethtool -K uplink {}", line.join(" "))).must();
}

fn passes(lab: &Lab, format: &str) -> u64 {
    let (one, two) = (lab.pod(1, 1), lab.pod(2, 1));
    mean(lab, format, || {
        for address in [two.ipv4.into(), two.ipv6.into()] {
            traffic::transfer(&one.netns(), &two.netns(), address, BYTES);
        }
    })
}

#[test]
fn superframes_leave_whole_in_gre_and_in_ip_and_arrive_whoever_cuts_them() {
    let _turn = turn();
    for family in ["ipv4", "ipv6"] {
        for (format, mode) in [("gre", "routed"), ("gretap", "bridged"), ("ipip", "routed")] {
            let lab = Lab::up("s", 2, 1, mode, &["--encapsulation", format, "--underlay-family", family]);
            let node = lab.nodes[0].netns();
            for (who, state) in CUT {
                offloads(&node, state);
                let mean = passes(&lab, format);
                assert!(mean > 3 * WIRE, "{format} over {family}, cut by {who}: {mean} bytes on the average");
            }
            let unreachable = lab.daemon(1).drops("UnderlayUnreachable");
            assert_eq!(unreachable, 0, "{format} over {family}");
            lab.assert_conserved();
        }
    }
}

#[test]
fn where_the_kernel_forwards_nothing_superframes_are_cut_here_and_it_is_counted() {
    let _turn = turn();
    let lab = Lab::up("c", 2, 1, "routed", &["--encapsulation", "gre"]);
    let node = lab.nodes[0].netns();
    assert!(passes(&lab, "gre") > 3 * WIRE);
    node.set("net/ipv4/conf/weft0/forwarding", "0");
    let mean = passes(&lab, "gre");
    assert!(mean <= WIRE, "{mean} bytes on the average");
    assert!(lab.daemon(1).lost_at(3, "UnderlayUnreachable") > 0, "those that found out are lost, and named");
    lab.assert_conserved();
}

#[test]
fn the_program_is_there_only_where_somebody_is_sent_such_a_format() {
    let _turn = turn();
    for (format, count) in [("ipip", 2), ("vxlan", 0)] {
        let lab = Lab::up("p", 2, 1, "routed", &["--port", "tap", "--underlay", "udp", "--encapsulation", format]);
        let objects = lab.daemon(1).bpf_objects();
        assert_eq!(objects.len(), count, "{format}: a program and its map, or nothing: {objects:?}");
    }
}
