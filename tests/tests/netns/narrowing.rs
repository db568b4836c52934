//! Paths between nodes that change while they are used: how much they carry, and whether there is somebody at the other end.
//!
//! Between two nodes are two routers with a link whose MTU is changed. No router says a word about it: ICMP is filtered.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use weft_api::{NodeInfo, Request, WayInfo};
use weft_tests::cluster::{Cluster, WeftNode};
use weft_tests::command::eventually;
use weft_tests::machine::turn;
use weft_tests::netns::OwnNetns;
use weft_tests::traffic;

use super::uplink::pod;

const PATIENCE: Duration = Duration::from_secs(10);

/// Two nodes with a pod each, and two routers between them.
struct Bed {
    nodes: [WeftNode; 2],
    pods: Vec<(OwnNetns, Vec<IpAddr>)>,
    routers: [OwnNetns; 2],
    _cluster: Cluster,
}

impl Bed {
    /// With uplinks of that MTU, and pods that use what those leave.
    fn new(cluster: Cluster, mtu: u32) -> Bed {
        let config = |number, other| {
            let text = cluster.config(number, "routed", &cluster.peer(other, None));
            text.lines().filter(|line| !line.starts_with("mtu = ")).map(|line| format!("{line}\n")).collect::<String>()
        };
        cluster.underlay().ip(&format!("link set br0 mtu {mtu}"));
        let routers = [cluster.machine(9), cluster.machine(8)];
        let node = |number: u8, other| cluster.weft_node_of_mtu(number, &config(number, other), mtu);
        let nodes = [node(1, 2), node(2, 1)];
        for number in [8, 9] {
            cluster.underlay().ip(&format!("link set n{number} mtu {mtu}"));
            routers[usize::from(number == 8)].ip(&format!("link set uplink mtu {mtu}"));
        }
        routers[0].ip(&format!("link add between mtu {mtu} type veth peer name between netns {}", routers[1].0));
        let v6 = cluster.address(1).is_ipv6();
        let (family, len, links) =
            if v6 { ("-6", 64, ["fd00:77::1", "fd00:77::2"]) } else { ("-4", 24, ["10.77.0.1", "10.77.0.2"]) };
        for (router, address) in routers.iter().zip(links) {
            router.ip(&format!("link set between mtu {mtu} up"));
            router.ip(&format!("{family} address add {address}/{len} dev between{}", if v6 { " nodad" } else { "" }));
            // Nobody is told that a packet is too long.
            router.exec("nft add table inet silent").must();
            router.exec("nft add chain inet silent out { type filter hook output priority 0 ; }").must();
            router.exec("nft add rule inet silent out icmp type destination-unreachable drop").must();
            router.exec("nft add rule inet silent out icmpv6 type packet-too-big drop").must();
        }
        let (one, two) = (cluster.address(1), cluster.address(2));
        let single = if v6 { 128 } else { 32 };
        for (machine, to, via, device) in [
            (&*nodes[0].netns, two, cluster.address(9).to_string(), "uplink"),
            (&*nodes[1].netns, one, cluster.address(8).to_string(), "uplink"),
            (&*routers[0], two, links[1].to_owned(), "between"),
            (&*routers[1], one, links[0].to_owned(), "between"),
        ] {
            machine.ip(&format!("{family} route add {to}/{single} via {via} dev {device}"));
        }
        let pods: Vec<_> = nodes.iter().map(|node| pod(&cluster, node)).collect();
        let bed = Bed { nodes, pods, routers, _cluster: cluster };
        bed.pods[1].1.iter().for_each(|address| traffic::await_answer(&bed.pods[0].0, *address));
        bed
    }

    /// What lies between carries packets of that length.
    fn set_mtu(&self, mtu: u32) {
        self.routers.iter().for_each(|router| drop(router.ip(&format!("link set between mtu {mtu}"))));
    }

    fn way(&self, from: usize) -> WayInfo {
        let nodes: Vec<NodeInfo> = self.nodes[from].daemon().ask(&Request::Nodes);
        let asked = nodes.into_iter().find(|node| !node.local).and_then(|node| node.asked);
        asked.unwrap_or_else(|| panic!("it is asked:\n{}", self.nodes[from].log()))
    }

    /// The first pod's kernel believes that so much gets there; as much as its device allows if that is nothing.
    fn await_told(&self, address: IpAddr, mtu: Option<u32>) {
        let pod = &self.pods[0].0;
        eventually(&format!("the pod believes in {mtu:?}"), Duration::from_secs(10), || {
            let said = pod.ip(&format!("route get {address}"));
            mtu.map_or(!said.contains(" mtu "), |mtu| said.contains(&format!("mtu {mtu}")))
        });
    }

    fn await_measured(&self, mtu: u32) {
        for from in [0, 1] {
            let started = Instant::now();
            while self.way(from).measured != Some(mtu) {
                let way = self.way(from);
                assert!(started.elapsed() < Duration::from_secs(15), "{mtu}: {way:?}\n{}", self.nodes[from].log());
                // Who is not spoken with is not asked.
                self.pods[0].0.exec(&format!("ping -n -q -c 1 -W 1 {}", self.pods[1].1[0]));
                thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

/// A stream that goes on until it is told to end, and how far it has come.
struct Stream<'a> {
    received: &'a AtomicU64,
}

impl Stream<'_> {
    /// The longest time for which nothing arrives while `what` is done and for a while after.
    fn longest_pause(&self, what: impl FnOnce()) -> Duration {
        let (mut longest, mut last) = (Duration::ZERO, (self.received.load(Ordering::Relaxed), Instant::now()));
        what();
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(2) {
            thread::sleep(Duration::from_millis(5));
            let now = self.received.load(Ordering::Relaxed);
            if now != last.0 {
                longest = longest.max(last.1.elapsed());
                last = (now, Instant::now());
            }
        }
        longest.max(last.1.elapsed())
    }
}

/// Ends the stream, whatever happens.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Does `what` while a stream flows from the first pod to that address of the second.
fn streaming(bed: &Bed, to: IpAddr, what: impl FnOnce(&Stream<'_>)) {
    let [(one, _), (two, _)] = &bed.pods[..] else { panic!("two pods") };
    let listener = two.inside(|| TcpListener::bind((to, 7100)).expect("the pod has the address"));
    let (ended, received) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().expect("somebody connects");
            stream.set_read_timeout(Some(PATIENCE)).expect("a timeout can be set");
            let mut piece = vec![0; 256 << 10];
            while let Ok(len @ 1..) = stream.read(&mut piece) {
                received.fetch_add(len as u64, Ordering::Relaxed);
            }
        });
        let mut stream = one.inside(|| TcpStream::connect((to, 7100)).expect("it listens"));
        stream.set_write_timeout(Some(PATIENCE)).expect("a timeout can be set");
        let _ends = Ends(&ended);
        let (is_ended, piece) = (&ended, vec![7; 64 << 10]);
        scope.spawn(move || {
            // As fast as it goes would leave nothing of this machine for anybody else.
            while !is_ended.load(Ordering::Relaxed) && stream.write_all(&piece).is_ok() {
                thread::sleep(Duration::from_millis(2));
            }
        });
        let begun = || received.load(Ordering::Relaxed) > 1 << 20;
        eventually("the stream flows", Duration::from_secs(10), begun);
        what(&Stream { received: &received });
    });
}

#[test]
fn a_path_that_changes_under_a_stream_costs_one_retransmission_and_pods_learn_both_ways() {
    let _turn = turn();
    for (cluster, overhead) in [(Cluster::new("na").by("udp"), 50), (Cluster::new("nb").by("udp").over_v6(), 70)] {
        let bed = Bed::new(cluster, 9000);
        bed.set_mtu(1500);
        bed.await_measured(1500 - overhead);
        for address in &bed.pods[1].1 {
            streaming(&bed, *address, |stream| {
                let paused = stream.longest_pause(|| bed.set_mtu(1400));
                assert!(
                    paused < Duration::from_secs(1),
                    "{address}: nothing arrived for {paused:?}\n{:?}\n{}",
                    bed.way(0),
                    bed.nodes[0].log()
                );
                bed.await_measured(1400 - overhead);
                bed.await_told(*address, Some(1400 - overhead));
                let paused = stream.longest_pause(|| bed.set_mtu(9000));
                assert!(
                    paused < Duration::from_secs(1),
                    "{address}: nothing arrived for {paused:?}\n{:?}\n{}",
                    bed.way(0),
                    bed.nodes[0].log()
                );
                bed.await_measured(9000 - overhead);
                bed.await_told(*address, None);
            });
            bed.set_mtu(1500);
            bed.await_measured(1500 - overhead);
        }
        bed.nodes.iter().for_each(|node| node.daemon().assert_conserved());
    }
}

/// What a node knows of the way to its peer.
fn way_of(node: &WeftNode) -> WayInfo {
    let nodes: Vec<NodeInfo> = node.daemon().ask(&Request::Nodes);
    nodes.into_iter().find(|node| !node.local).and_then(|node| node.asked).expect("it is asked")
}

#[test]
fn a_node_that_is_cut_off_is_noticed_and_back_at_once_and_who_is_not_spoken_with_is_not_asked() {
    let _turn = turn();
    let cluster = Cluster::new("nc").by("udp");
    let node = |number, other| cluster.weft_node(number, "routed", &cluster.peer(other, None));
    let nodes = [node(1, 2), node(2, 1)];
    let pods: Vec<_> = nodes.iter().map(|node| pod(&cluster, node)).collect();
    let local = cluster.sandbox("local");
    let beside = weft_tests::plugin::addresses(&nodes[0].attach("local", &local))[0];
    let (here, there) = (&pods[0].0, pods[1].1[0]);
    traffic::await_answer(here, there);
    let state = |wanted: &str| {
        let is = || {
            let _ = here.exec(&format!("ping -n -q -c 1 -W 0.1 {there}"));
            way_of(&nodes[0]).state == wanted
        };
        eventually(&format!("n2 is {wanted}"), Duration::from_secs(10), is);
    };
    state("up");
    let pings = traffic::Pings::start(here, beside);
    for _ in 0..2 {
        cluster.underlay().ip("link set n2 down");
        state("away");
        let problems = nodes[0].daemon().status().problems;
        assert!(
            problems.iter().any(|problem| problem.contains("n2 (10.200.0.2) does not answer any more")),
            "{problems:?}"
        );
        let way = way_of(&nodes[0]);
        assert!(way.reason.starts_with("no answer for ") && way.measured == Some(1450), "{way:?}");
        cluster.underlay().ip("link set n2 up");
        state("up");
    }
    pings.assert_none_lost(10);
    assert!(!nodes[0].daemon().status().problems.iter().any(|problem| problem.contains("n2")));
    // Nobody speaks: nothing is asked, and nothing is to do.
    thread::sleep(Duration::from_secs(6));
    let idle = || {
        let (before, out) = (nodes[0].daemon().cpu_time(), nodes[0].daemon().underlay().out);
        thread::sleep(Duration::from_secs(2));
        nodes[0].daemon().underlay().out == out && nodes[0].daemon().cpu_time() - before < Duration::from_millis(20)
    };
    assert!((0..5).any(|_| idle()), "an idle node does something all the time");
    nodes.iter().for_each(|node| node.daemon().assert_conserved());
}

#[test]
fn a_peer_that_is_no_weft_is_left_in_peace() {
    let _turn = turn();
    let cluster = Cluster::new("nf").by("udp");
    let node = cluster.weft_node(1, "routed", &cluster.peer(2, Some("02:00:00:00:00:02")));
    let far = cluster.machine(2);
    far.ip("link add vx type vxlan id 1 dstport 8472 local 10.200.0.2 remote 10.200.0.1 dev uplink");
    far.ip("link set vx address 02:00:00:00:00:02 up");
    far.ip("address add 10.244.2.2/32 dev vx");
    let vtep = node.daemon().status().vtep_mac;
    far.ip("route add 10.244.1.0/24 dev vx via 10.244.1.1 onlink");
    far.ip(&format!("neigh add 10.244.1.1 lladdr {vtep} dev vx nud permanent"));
    let (here, _) = pod(&cluster, &node);
    let wire = weft_tests::wire::Wire::open(cluster.underlay(), "n1");
    traffic::await_answer(&here, "10.244.2.2".parse().expect("an address"));
    let pings = traffic::Pings::start(&here, "10.244.2.2".parse().expect("an address"));
    thread::sleep(Duration::from_secs(1));
    pings.assert_none_lost(10);
    let frames: Vec<_> = std::iter::from_fn(|| wire.next(Duration::from_millis(50))).collect();
    let is_probe = |frame: &&Vec<u8>| frame.windows(4).any(|bytes| bytes == b"WFTP");
    assert!(frames.len() > 20 && !frames.iter().any(|frame| is_probe(&frame)));
    let way = way_of(&node);
    assert_eq!((way.state.as_str(), way.measured, way.mtu), ("unknown", None, 1450));
}

#[test]
fn an_underlay_device_with_another_mtu_gives_pods_another_one_and_a_link_that_flaps_loses_nothing_for_long() {
    let _turn = turn();
    let cluster = Cluster::new("ne").by("udp");
    let config = |number, other| {
        let text = cluster.config(number, "routed", &cluster.peer(other, None));
        text.lines().filter(|line| !line.starts_with("mtu = ")).map(|line| format!("{line}\n")).collect::<String>()
    };
    cluster.underlay().ip("link set br0 mtu 9000");
    let nodes = [(1, 2), (2, 1)].map(|(number, other)| cluster.weft_node_of_mtu(number, &config(number, other), 1500));
    let pods: Vec<_> = nodes.iter().map(|node| pod(&cluster, node)).collect();
    let there = pods[1].1[0];
    traffic::await_answer(&pods[0].0, there);
    let set = |mtu: u32| {
        for node in &nodes {
            cluster.underlay().ip(&format!("link set n{} mtu {mtu}", node.number));
            node.netns.ip(&format!("link set uplink mtu {mtu}"));
        }
        for (node, (pod, _)) in nodes.iter().zip(&pods) {
            for (netns, name) in [(&**pod, "eth0"), (&*node.netns, "weft0")] {
                let has = || netns.ip(&format!("link show {name}")).contains(&format!("mtu {} ", mtu - 50));
                eventually(&format!("{name} has what {mtu} leaves"), Duration::from_secs(10), has);
            }
            assert_eq!(node.daemon().status().mtu, mtu - 50);
        }
        let longest = || pods[0].0.exec(&format!("ping -n -q -c 1 -W 1 -M do -s {} {there}", mtu - 78)).success;
        eventually("the longest packet passes", Duration::from_secs(10), longest);
    };
    [9000, 1400, 1500].into_iter().for_each(set);
    let before = nodes[0].daemon().descriptors();
    // Both ends: what the kernel makes of it is the same, and it takes a moment.
    cluster.underlay().ip_batch(&"link set n1 down\nlink set n1 up\n".repeat(1000));
    let started = Instant::now();
    traffic::await_answer(&pods[0].0, there);
    assert!(started.elapsed() < Duration::from_secs(5), "back after {:?}", started.elapsed());
    assert!(nodes[0].daemon().descriptors() <= before + 1, "descriptors are leaked");
    traffic::transfer(&pods[0].0, &pods[1].0, there, 4 << 20);
    nodes.iter().for_each(|node| node.daemon().assert_conserved());
}
