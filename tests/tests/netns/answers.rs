//! What the router itself says: as a gateway, as a neighbour, and about what it could not deliver.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use weft_encap::mac::Mac;
use weft_tests::frames::{self, L2, L3};
use weft_tests::lab::{Lab, Pod};
use weft_tests::machine::turn;
use weft_tests::wire::Wire;

const SHORT: Duration = Duration::from_millis(500);

#[test]
fn the_gateway_answers_pings_and_traceroutes() {
    let _turn = turn();
    for mode in ["routed", "bridged"] {
        let lab = Lab::up("a", 2, 1, mode, &[]);
        let (pod, far) = (lab.pod(1, 1), lab.pod(2, 1));
        let gateway6 = pod.gateway6();
        for size in [0, 56, 1422, 3000] {
            for gateway in [IpAddr::V4(pod.gateway4), IpAddr::V6(gateway6)] {
                pod.netns().exec(&format!("ping -n -c 2 -i 0.1 -W 2 -s {size} {gateway}")).must();
            }
        }
        if mode == "routed" {
            for (family, to, gateway) in
                [("-4", IpAddr::V4(far.ipv4), IpAddr::V4(pod.gateway4)), ("-6", far.ipv6.into(), gateway6.into())]
            {
                let route = pod.netns().exec(&format!("traceroute {family} -n -q 1 -w 2 {to}")).must();
                assert!(route.contains(&gateway.to_string()), "the gateway is on the way to {to}: {route}");
                assert!(
                    route.lines().last().is_some_and(|last| last.contains(&to.to_string())),
                    "{to} is the end: {route}"
                );
            }
        }
        let route = pod.netns().exec(&format!("traceroute -n -q 1 -w 2 {}", pod.gateway4)).must();
        assert_eq!(route.lines().count(), 2, "the gateway is one hop away: {route}");
        lab.assert_conserved();
    }
}

/// Sends frames from a pod and returns what comes to it that is like this.
fn answer(pod: &Pod, frame: &[u8], like: impl FnMut(&[u8]) -> bool) -> Option<Vec<u8>> {
    let wire = Wire::open(&pod.netns(), &pod.ifname);
    assert!(wire.send(frame));
    wire.find(SHORT, like)
}

fn is_arp_reply(frame: &[u8]) -> bool {
    frame[12..14] == [8, 6] && frame[20..22] == [0, 2]
}

fn is_advertisement(frame: &[u8]) -> bool {
    frame[12..14] == [0x86, 0xdd] && frame.get(20) == Some(&58) && frame.get(54) == Some(&136)
}

#[test]
fn arp_is_answered_with_the_targets_own_mac_and_a_probe_never() {
    let _turn = turn();
    let lab = Lab::up("p", 2, 2, "routed", &[]);
    let (pod, other, far) = (lab.pod(1, 1), lab.pod(1, 2), lab.pod(2, 1));
    let ask = |spa, target| answer(pod, &frames::arp_request(pod.mac(), spa, target), is_arp_reply);
    let reply = ask(pod.ipv4, other.ipv4).expect("the neighbour's address is answered for");
    assert_eq!(reply[22..28], other.mac().0);
    let gateway = lab.daemon(1).status().gateway_mac.parse::<Mac>().unwrap();
    let reply = ask(pod.ipv4, pod.gateway4).expect("the gateway's address is answered for");
    assert_eq!(reply[22..28], gateway.0);
    // (A probe for a neighbour's address goes to the neighbour, who may well answer; the router does not.)
    assert_eq!(ask(Ipv4Addr::UNSPECIFIED, pod.gateway4), None, "a probe for the gateway's address");
    assert_eq!(ask(Ipv4Addr::UNSPECIFIED, pod.ipv4), None, "a probe for the own address");
    assert_eq!(ask(pod.ipv4, pod.ipv4), None, "an announcement");
    assert_eq!(ask(pod.ipv4, far.ipv4), None, "a pod of another node is not on this link");
    // Its own stack is the one to find a neighbour through all this.
    pod.netns().exec("ip neigh flush all");
    pod.netns().exec(&format!("ping -n -c 1 -W 2 {}", other.ipv4)).must();
    assert!(pod.netns().ip(&format!("neigh show {}", other.ipv4)).contains(&other.mac));
}

#[test]
fn solicitations_are_answered_with_the_targets_own_mac_and_duplicate_detection_never() {
    let _turn = turn();
    let lab = Lab::up("d", 1, 2, "routed", &[]);
    let (pod, other) = (lab.pod(1, 1), lab.pod(1, 2));
    let ask = |src, target| answer(pod, &frames::solicit(pod.mac(), src, target), is_advertisement);
    let reply = ask(pod.ipv6, other.ipv6).expect("the neighbour's address is answered for");
    assert_eq!(reply[80..86], other.mac().0);
    let gateway = lab.daemon(1).status().gateway_mac.parse::<Mac>().unwrap();
    let reply = ask(pod.ipv6, pod.gateway6()).expect("the gateway's address is answered for");
    assert_eq!(reply[80..86], gateway.0);
    assert_eq!(ask(Ipv6Addr::UNSPECIFIED, pod.ipv6), None, "duplicate detection of the own address");
    assert_eq!(ask(Ipv6Addr::UNSPECIFIED, other.ipv6), None, "duplicate detection of a neighbour's address");
    // A pod that adds an address with duplicate detection gets it: nobody answered.
    pod.netns().ip(&format!("address add fe80::77/64 dev {}", pod.ifname));
    weft_tests::command::eventually("duplicate detection ends", Duration::from_secs(5), || {
        !pod.netns().ip(&format!("-6 address show dev {} tentative", pod.ifname)).contains("fe80::77")
    });
    assert!(!pod.netns().ip(&format!("-6 address show dev {} dadfailed", pod.ifname)).contains("fe80::77"));
}

#[test]
fn a_packet_to_nowhere_is_told_so_and_counted_by_name() {
    let _turn = turn();
    let lab = Lab::up("n", 2, 1, "routed", &[]);
    let (pod, daemon) = (lab.pod(1, 1), lab.daemon(1));
    for (target, reason, said) in [
        // What no table knows is the node's kernel to route, which here cannot either.
        ("192.0.2.1", None, "Unreachable"),
        ("2001:db8::1", None, "nreachable"),
        ("10.244.1.250", Some("UnknownNeighbour"), "Unreachable"),
        ("10.244.77.1", None, "Unreachable"),
    ] {
        let before = reason.map(|reason| daemon.drops(reason));
        // A neighbour of its own range is asked for by ARP, unless a route leads by the gateway.
        let via = if target.contains(':') { pod.gateway6().to_string() } else { pod.gateway4.to_string() };
        pod.netns().ip(&format!("route replace {target} via {via} dev {}", pod.ifname));
        let ping = pod.netns().exec(&format!("ping -n -c 2 -i 0.2 -W 1 {target}"));
        assert!(!ping.success && ping.out.contains(said), "{target}: {}", ping.out);
        let after = reason.map(|reason| daemon.drops(reason));
        assert!(after >= before.map(|before| before + 2), "{target}: {:?}", daemon.all_drops());
    }
    lab.assert_conserved();
}

#[test]
fn a_packet_over_the_mtu_is_told_the_mtu_and_never_reaches_the_wire() {
    let _turn = turn();
    let lab = Lab::up("m", 2, 1, "routed", &[]);
    let (pod, far, daemon) = (lab.pod(1, 1), lab.pod(2, 1), lab.daemon(1));
    let gateway: Mac = daemon.status().gateway_mac.parse().unwrap();
    let underlay = lab.wire(1);
    // The pod takes its interface to be wider than the way on is.
    pod.netns().ip(&format!("link set {} mtu 9000", pod.ifname));
    let l2 = L2 { src: pod.mac(), dst: gateway };
    for (l3, kind, at) in [(L3::new(pod.ipv4, far.ipv4), [3, 4], 34), (L3::new(pod.ipv6, far.ipv6), [2, 0], 54)] {
        let frame = frames::udp(l2, l3, (1000, 9), &[0x42; 2000]);
        let error = answer(pod, &frame, |frame| {
            frame.len() > 100 && frame.get(at..at + 2) == Some(&kind) && frame[..6] == pod.mac().0
        });
        let error = error.unwrap_or_else(|| panic!("nobody told {l3:?}: {:?}", daemon.all_drops()));
        let mtu = u32::from_be_bytes(error[at + 4..at + 8].try_into().unwrap());
        assert_eq!(mtu, 1450, "{l3:?}");
    }
    assert!(daemon.drops("MtuExceeded") >= 2);
    let oversize =
        underlay.collect(SHORT).iter().filter(|frame| frame.windows(64).any(|bytes| bytes == [0x42; 64])).count();
    assert_eq!(oversize, 0, "frames of the refused packets were on the wire");
    lab.assert_conserved();
}
