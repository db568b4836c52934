//! The ports against a real kernel: TAPs in namespaces, the UDP underlay between nodes, a kernel VXLAN device as the
//! other node. Needs root, `ip`, `bridge`, `ping` and `ethtool`.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod answers;
mod bed;
mod outlet;
mod xdp;

use std::time::{Duration, Instant};

use bed::{Netns, Node, exclusively, ping, run, transfer, transfer_udp_segmented, worker_cpu};
use weft_router::{DropReason, Event};

const MIB: usize = 1 << 20;

/// The underlay between two nodes: a veth pair.
fn join(one: &Netns, two: &Netns) {
    let (first, second) = (one.name(), two.name());
    run(&["ip", "-n", first, "link", "add", "up0", "type", "veth", "peer", "name", "up0", "netns", second]);
    for (netns, address) in [(first, "10.200.0.1/24"), (second, "10.200.0.2/24")] {
        run(&["ip", "-n", netns, "address", "add", address, "dev", "up0"]);
        run(&["ip", "-n", netns, "link", "set", "up0", "up"]);
    }
}

/// Makes a veth look like a NIC that can do nothing.
fn without_offloads(netns: &Netns) {
    let off = ["tso", "tx-udp-segmentation", "tx-udp_tnl-segmentation", "tx-udp_tnl-csum-segmentation", "tx"];
    for feature in off {
        run(&["ip", "netns", "exec", netns.name(), "ethtool", "-K", "up0", feature, "off"]);
    }
    run(&["ip", "netns", "exec", netns.name(), "ethtool", "-K", "up0", "gro", "on"]);
}

#[test]
fn two_pods_of_a_node_exchange_superframes_whole() {
    let _alone = exclusively();
    let mut node = Node::new(1);
    let (one, two) = (node.add_pod(1), node.add_pod(2));
    node.apply();
    ping(&one, "10.244.1.3");
    ping(&two, "fd00:10:244:1::2");
    ping(&one, "10.244.1.1");
    transfer(&one, &two, "10.244.1.3", 64 * MIB);
    transfer(&two, &one, "fd00:10:244:1::2", 64 * MIB);
    let counted = node.settle();
    let (received, bytes) = counted
        .iter()
        .fold((0, 0), |(frames, bytes), port| (frames + port.stats.received, bytes + port.stats.received_bytes));
    assert!(bytes > 128 * MIB as u64);
    assert!(bytes / received > 5_000, "{bytes} bytes in {received} frames: superframes were cut");
    assert!(counted.iter().all(|port| port.capabilities.tcp4 && port.capabilities.tcp6));
}

#[test]
fn a_namespace_that_goes_away_is_reported_and_keeps_nobody_awake() {
    let _alone = exclusively();
    let mut node = Node::new(1);
    let (one, two) = (node.add_pod(1), node.add_pod(2));
    node.apply();
    ping(&one, "10.244.1.3");
    drop(two);
    let event = node.router().events().recv_timeout(Duration::from_secs(5)).unwrap();
    assert_eq!(event, Event::PortGone(weft_router::PortId(2), weft_router::PortEnd::Device));
    let before = worker_cpu();
    std::thread::sleep(Duration::from_secs(1));
    let spent = worker_cpu() - before;
    assert!(spent < Duration::from_millis(10), "the idle worker used {spent:?} in a second");
    ping(&one, "10.244.1.1");
    let counted = node.settle();
    assert!(!counted.iter().any(|port| port.id.0 == 2 && port.up));
    assert!(node.router().remove_port(weft_router::PortId(2)).unwrap().is_some());
}

#[test]
fn a_link_that_is_down_refuses_frames_and_works_again_when_it_is_up() {
    let _alone = exclusively();
    let mut node = Node::new(1);
    let (one, two) = (node.add_pod(1), node.add_pod(2));
    node.apply();
    ping(&one, "10.244.1.3");
    run(&["ip", "-n", two.name(), "link", "set", "eth0", "down"]);
    let lost = ["ip", "netns", "exec", one.name(), "ping", "-c", "1", "-W", "1", "10.244.1.3"];
    assert!(!std::process::Command::new(lost[0]).args(&lost[1..]).output().unwrap().status.success());
    run(&["ip", "-n", two.name(), "link", "set", "eth0", "up"]);
    ping(&one, "10.244.1.3");
    let counted = node.settle();
    assert!(counted[0].stats.dropped[DropReason::PortDown as usize] > 0);
    assert!(counted.iter().all(|port| port.up));
}

/// Two of our own nodes, each with a pod.
fn two_nodes(offloads: bool) -> ((Node, Netns), (Node, Netns)) {
    let (mut one, mut two) = (Node::new(1), Node::new(2));
    join(one.netns(), two.netns());
    if !offloads {
        without_offloads(one.netns());
        without_offloads(two.netns());
    }
    one.open_underlay();
    two.open_underlay();
    one.add_peer(&two.as_peer());
    two.add_peer(&one.as_peer());
    let (first, second) = (one.add_pod(1), two.add_pod(1));
    one.apply();
    two.apply();
    ping(&first, "10.244.2.2");
    ping(&second, "fd00:10:244:1::2");
    ((one, first), (two, second))
}

#[test]
fn pods_of_two_nodes_exchange_everything_behind_nics_without_offloads() {
    let _alone = exclusively();
    let ((one, first), (two, second)) = two_nodes(false);
    transfer(&first, &second, "10.244.2.2", 16 * MIB);
    transfer(&second, &first, "fd00:10:244:1::2", 16 * MIB);
    transfer_udp_segmented(&first, &second, "10.244.2.2", 1_400, 40);
    run(&["ip", "netns", "exec", first.name(), "ping", "-c", "2", "-i", "0.2", "-s", "30000", "10.244.2.2"]);
    one.settle();
    two.settle();
}

#[test]
fn superframes_are_merged_again_on_the_other_node() {
    let _alone = exclusively();
    let ((one, first), (two, second)) = two_nodes(true);
    transfer(&first, &second, "10.244.2.2", 64 * MIB);
    transfer_udp_segmented(&first, &second, "10.244.2.2", 1_400, 40);
    one.settle();
    let counted = two.settle();
    let underlay = &counted[0].stats;
    assert!(underlay.merged > underlay.received / 2, "{} of {} were merged", underlay.merged, underlay.received);
}

/// Linux's own VXLAN device as the other node, laid out as Flannel does.
fn kernel_peer(offloads: bool) {
    let _alone = exclusively();
    let (mut node, kernel) = (Node::new(1), Netns::new("kernel"));
    join(node.netns(), &kernel);
    if !offloads {
        without_offloads(node.netns());
        without_offloads(&kernel);
    }
    node.open_underlay();
    node.add_peer(&bed::make_kernel_node(&kernel, &node));
    let pod = node.add_pod(1);
    node.apply();
    ping(&pod, "10.244.2.1");
    ping(&kernel, "fd00:10:244:1::2");
    for address in ["10.244.2.1", "fd00:10:244:2::1"] {
        transfer(&pod, &kernel, address, 16 * MIB);
        transfer_udp_segmented(&pod, &kernel, address, 1_300, 20);
    }
    for address in ["10.244.1.2", "fd00:10:244:1::2"] {
        transfer(&kernel, &pod, address, 16 * MIB);
        transfer_udp_segmented(&kernel, &pod, address, 1_300, 20);
    }
    run(&["ip", "netns", "exec", pod.name(), "ping", "-c", "2", "-i", "0.2", "-s", "30000", "10.244.2.1"]);
    node.settle();
}

#[test]
fn a_kernel_vxlan_device_is_a_peer_with_its_superframes_passing_whole() {
    kernel_peer(true);
}

#[test]
fn a_kernel_vxlan_device_is_a_peer_behind_a_nic_without_offloads() {
    kernel_peer(false);
}

#[test]
fn the_worker_sleeps_when_nothing_happens() {
    let _alone = exclusively();
    let mut node = Node::new(1);
    let pods: Vec<_> = (1..=5).map(|number| node.add_pod(number)).collect();
    node.apply();
    ping(&pods[0], "10.244.1.3");
    // Neighbour discovery and the like of five fresh interfaces.
    std::thread::sleep(Duration::from_secs(2));
    let (before, started) = (worker_cpu(), Instant::now());
    std::thread::sleep(Duration::from_secs(2));
    let share = (worker_cpu() - before).as_secs_f64() / started.elapsed().as_secs_f64();
    assert!(share < 0.005, "the idle worker used {:.2} % of a CPU", share * 100.0);
}
