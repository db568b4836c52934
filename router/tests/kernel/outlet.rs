//! Uplinks: frames that leave by an interface of the node's, and what the kernel makes of them.

use std::sync::Arc;

use weft_encap::mac::Mac;
use weft_router::path::Macs;
use weft_router::port::packet::Outlet;
use weft_router::tables::{GroupId, NextHop, NextHops, Via};
use weft_router::{Device, Event, PortId};

use crate::bed::{Netns, Node, exclusively, run, transfer_udp_segmented};

const UPLINK: PortId = PortId(7);

/// What `ip -o link show` says of the interface.
fn shown(netns: &Netns) -> String {
    let output = std::process::Command::new("ip").args(["-n", netns.name(), "-o", "link", "show", "up0"]).output();
    String::from_utf8(output.unwrap().stdout).unwrap()
}

fn mac_of(netns: &Netns) -> Mac {
    shown(netns).split_whitespace().skip_while(|word| *word != "link/ether").nth(1).unwrap().parse().unwrap()
}

fn index_of(netns: &Netns) -> u32 {
    shown(netns).split(':').next().unwrap().parse().unwrap()
}

/// A node with a pod that reaches 10.9.0.0/24 and fd00:9::/64 by its uplink, and who has these.
fn uplink(offloads: bool) -> (Node, Netns, Netns) {
    let (mut node, far) = (Node::new(1), Netns::new("far"));
    super::join(node.netns(), &far);
    if !offloads {
        super::without_offloads(node.netns());
        super::without_offloads(&far);
    }
    for address in ["10.9.0.1/24", "fd00:9::1/64"] {
        run(&["ip", "-n", far.name(), "address", "add", address, "dev", "lo"]);
    }
    let index = index_of(node.netns());
    let outlet = node.netns().inside(|| Outlet::open(index)).unwrap();
    node.router().add_port(UPLINK, Device::Outlet(outlet)).unwrap();
    let macs = Macs { dst: mac_of(&far), src: mac_of(node.netns()) };
    let pod = node.add_pod(1);
    node.apply_with(|tables| {
        tables.add_uplink(UPLINK);
        tables.next_hops = Arc::new(vec![NextHops::new([NextHop { port: UPLINK, macs, mtu: 1500, weight: 1 }])]);
        for range in ["10.9.0.0/24", "fd00:9::/64"] {
            tables.add_route(range.parse().unwrap(), Via::Uplink(GroupId(0)));
        }
    });
    (node, pod, far)
}

#[test]
fn superframes_and_partial_checksums_arrive_with_and_without_offloads() {
    let _alone = exclusively();
    for offloads in [true, false] {
        let (node, pod, far) = uplink(offloads);
        for address in ["10.9.0.1", "fd00:9::1"] {
            transfer_udp_segmented(&pod, &far, address, 1_300, 40);
            transfer_udp_segmented(&pod, &far, address, 100, 2);
        }
        let counted = node.settle();
        let by = counted.iter().find(|port| port.id == UPLINK).unwrap();
        assert_eq!((by.kind, by.up, by.stats.received), ("packet", true, 0));
        // Four superframes, and what the pod's kernel says by itself.
        assert!((4..80).contains(&by.stats.out), "{} frames: superframes were cut", by.stats.out);
    }
}

#[test]
fn an_interface_that_goes_is_told_and_one_that_is_down_ends_frames_by_name() {
    let _alone = exclusively();
    let (node, pod, _far) = uplink(true);
    let send = || {
        pod.inside(|| {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.send_to(b"anybody?", "10.9.0.1:9").unwrap();
        });
        std::thread::sleep(std::time::Duration::from_millis(50));
    };
    run(&["ip", "-n", node.netns().name(), "link", "set", "up0", "down"]);
    send();
    let down = |node: &Node| {
        let dropped = |port: &weft_router::PortSnapshot| port.stats.dropped[weft_router::DropReason::PortDown as usize];
        node.settle().iter().map(dropped).sum::<u64>()
    };
    assert_eq!(down(&node), 1);
    run(&["ip", "-n", node.netns().name(), "link", "del", "up0"]);
    send();
    let event = node.router().events().recv_timeout(std::time::Duration::from_secs(5)).unwrap();
    assert!(matches!(event, Event::PortGone(UPLINK, _)), "{event:?}");
    node.settle();
}
