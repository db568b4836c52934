//! One segment over all nodes: broadcast, multicast, addresses that stay, and a gateway that does not travel.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use weft_encap::mac::Mac;
use weft_tests::cluster::{Cluster, peer};
use weft_tests::frames::{self, L2};
use weft_tests::lab::Lab;
use weft_tests::machine::turn;
use weft_tests::plugin;
use weft_tests::traffic;
use weft_tests::wire::Wire;

const SHORT: Duration = Duration::from_millis(700);

#[test]
fn broadcast_and_multicast_reach_every_other_pod_of_every_node_once() {
    let _turn = turn();
    let lab = Lab::up("c", 2, 2, "bridged", &[]);
    let sender = lab.pod(1, 1);
    for dst in [Mac::BROADCAST, Mac([0x01, 0, 0x5e, 1, 2, 3]), Mac([0x33, 0x33, 0, 0, 0x12, 0x34])] {
        let wires: Vec<Wire> = lab.pods().map(|pod| Wire::open(&pod.netns(), &pod.ifname)).collect();
        let mark = frames::ethernet(L2 { src: sender.mac(), dst }, 0x88b5, &[dst.0[5]; 64]);
        assert!(Wire::open(&sender.netns(), &sender.ifname).send(&mark));
        for (pod, wire) in lab.pods().zip(&wires).skip(1) {
            let copies = wire.collect(SHORT).into_iter().filter(|frame| *frame == mark).count();
            assert_eq!(copies, 1, "{dst} at {}", pod.name);
        }
        // The sender sees it going out, and not coming back.
        assert_eq!(wires[0].collect(SHORT).into_iter().filter(|frame| *frame == mark).count(), 1, "{dst} came back");
    }
    lab.assert_conserved();
}

#[test]
fn a_datagram_to_everybody_arrives_at_sockets_on_another_node() {
    let _turn = turn();
    let lab = Lab::up("u", 2, 1, "bridged", &[]);
    let (sender, receiver) = (lab.pod(1, 1), lab.pod(2, 1));
    let group = Ipv4Addr::new(239, 1, 2, 3);
    let listener = receiver.netns().inside(|| {
        let socket = UdpSocket::bind("0.0.0.0:7777").unwrap();
        socket.join_multicast_v4(&group, &receiver.ipv4).unwrap();
        socket
    });
    listener.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    let socket = sender.netns().inside(|| UdpSocket::bind((sender.ipv4, 0)).unwrap());
    socket.set_broadcast(true).unwrap();
    sender.netns().ip(&format!("route replace 224.0.0.0/4 dev {}", sender.ifname));
    for target in [Ipv4Addr::BROADCAST, Ipv4Addr::new(10, 244, 255, 255), group] {
        socket.send_to(target.to_string().as_bytes(), SocketAddr::new(target.into(), 7777)).unwrap();
        let mut buffer = [0; 64];
        let (len, from) = listener.recv_from(&mut buffer).unwrap_or_else(|error| panic!("{target}: {error}"));
        assert_eq!((&buffer[..len], from.ip()), (target.to_string().as_bytes(), sender.ipv4.into()));
    }
    lab.assert_conserved();
}

#[test]
fn the_gateways_mac_never_crosses_the_tunnel() {
    let _turn = turn();
    let lab = Lab::up("w", 2, 2, "bridged", &[]);
    let (pod, far) = (lab.pod(1, 1), lab.pod(2, 1));
    let gateway: Mac = lab.daemon(1).status().gateway_mac.parse().unwrap();
    let underlay = lab.wire(1);
    for line in [
        format!("ping -n -c 3 -i 0.1 -W 1 {}", pod.gateway4),
        format!("ping -n -c 3 -i 0.1 -W 1 {}", pod.gateway6()),
        format!("ping -n -c 3 -i 0.1 -W 1 {}", far.ipv4),
        "ping -n -c 1 -W 1 192.0.2.1".to_owned(),
        format!("ping -n -b -c 1 -W 1 {}", Ipv4Addr::new(10, 244, 255, 255)),
    ] {
        pod.netns().exec(&line);
    }
    let wire = Wire::open(&pod.netns(), &pod.ifname);
    wire.send(&frames::arp_request(pod.mac(), pod.ipv4, pod.gateway4));
    wire.send(&frames::solicit(pod.mac(), pod.ipv6, pod.gateway6()));
    let frames = underlay.collect(SHORT);
    let tunnelled: Vec<&[u8]> = frames.iter().filter_map(|frame| tunnelled(frame)).collect();
    assert!(tunnelled.len() >= 6, "only {} tunnelled frames were seen", tunnelled.len());
    for inner in tunnelled {
        let claims = inner.get(22..28) == Some(&gateway.0) && inner[12..14] == [8, 6];
        assert!(inner[..6] != gateway.0 && inner[6..12] != gateway.0 && !claims, "{inner:02x?}");
    }
}

/// The inner frame of VXLAN over UDP over IPv4.
fn tunnelled(frame: &[u8]) -> Option<&[u8]> {
    let is_ours = frame.get(12..14)? == [8, 0] && *frame.get(23)? == 17 && frame.get(36..38)? == 8472u16.to_be_bytes();
    is_ours.then(|| frame.get(50..)).flatten()
}

#[test]
fn a_pod_keeps_its_address_when_it_moves_to_another_node() {
    let _turn = turn();
    let cluster = Cluster::new("k");
    let (n1, n2) = (cluster.weft_node(1, "bridged", &peer(2, None)), cluster.weft_node(2, "bridged", &peer(1, None)));
    let (home, away, other) = (cluster.sandbox("home"), cluster.sandbox("away"), cluster.sandbox("other"));
    let first = n1.attach("roamer", &home);
    n2.attach("other", &other);
    let (v4, v6, mac) = (plugin::addresses(&first)[0], plugin::addresses(&first)[1], plugin::mac(&first));
    for address in [v4, v6] {
        traffic::await_answer(&other, address);
    }
    n1.runtime.del("roamer", &home);
    // The address of before, asked for on the second node.
    let keys = serde_json::json!({ "args": { "cni": { "ips": [v4.to_string(), v6.to_string()] } } });
    let again = n2.runtime.call("ADD", "roamer", Some(&away.path()), &keys).must();
    assert!(plugin::addresses(&again).contains(&v4), "{again}");
    assert_ne!(plugin::mac(&again), mac, "it is another interface");
    let third = cluster.sandbox("third");
    n1.attach("third", &third);
    // Whoever knew the address at its old MAC hears of the new one at once, though the pod says nothing of itself.
    for (from, address) in [(&third, v4), (&other, v4), (&other, v6)] {
        let ping = || from.exec(&format!("ping -n -c 1 -W 1 {address}")).success;
        let what = format!("{address} is found at its new node by {}", from.0);
        weft_tests::command::eventually(&what, Duration::from_secs(3), ping);
    }
    n1.daemon().assert_conserved();
    n2.daemon().assert_conserved();
}
