//! Pods by AF_XDP: everything as with TAPs, side by side with them, and nothing left when it ends.

use std::net::IpAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::json;
use weft_tests::cluster::{Cluster, WeftNode};
use weft_tests::command::{Background, eventually, run, shell};
use weft_tests::lab::Lab;
use weft_tests::machine::turn;
use weft_tests::netns::OwnNetns;
use weft_tests::{plugin, traffic};

use super::reach::{every_size_passes, everyone_reaches_everyone, pings};

/// A configuration's line in front of everything else.
fn with_port(cluster: &Cluster, port: &str, node: &mut WeftNode) {
    let config = cluster.config(node.number, "routed", "");
    let config: String =
        config.lines().filter(|line| !line.starts_with("port = \"")).map(|l| format!("{l}\n")).collect();
    match node.reload(&format!("port = \"{port}\"\n{config}")) {
        Ok(_) => assert_eq!(weft_tests::machine::port().as_deref(), Some(port), "it cannot change while weftd runs"),
        Err(error) => assert!(error.to_string().contains("cannot change while weftd runs: port"), "{error}"),
    }
    node.stop();
    node.start_again();
}

/// The kinds of the pods' ports.
fn kinds(node: &WeftNode) -> Vec<String> {
    let ports = node.daemon().ports();
    ports.into_iter().filter(|port| port.role == "pod").map(|port| port.kind).collect()
}

#[test]
fn pods_by_xdp_reach_every_other_with_packets_of_every_size() {
    let _turn = turn();
    for (mode, workers) in [("routed", "2"), ("bridged", "1")] {
        let lab = Lab::up("x", 2, 2, mode, &["--port", "xdp", "--workers", workers]);
        let ports = lab.daemon(1).ports();
        assert!(ports.iter().all(|port| port.role != "pod" || port.kind == "xdp"), "{ports:?}");
        everyone_reaches_everyone(&lab);
        let (a, b, far) = (lab.pod(1, 1), lab.pod(1, 2), lab.pod(2, 1));
        every_size_passes(a, b);
        every_size_passes(b, far);
        for (from, to) in [(a, b), (b, a), (a, far), (far, b)] {
            traffic::transfer(&from.netns(), &to.netns(), to.ipv4.into(), 32 << 20);
            traffic::transfer(&from.netns(), &to.netns(), to.ipv6.into(), 8 << 20);
        }
        lab.assert_conserved();
    }
}

#[test]
fn jumbo_frames_of_pods_by_xdp_pass_whole() {
    let _turn = turn();
    let lab = Lab::up("xj", 2, 2, "routed", &["--port", "xdp", "--mtu", "9000"]);
    let (from, near, far) = (lab.pod(1, 1), lab.pod(1, 2), lab.pod(2, 1));
    for to in [near, far] {
        pings(from, to.ipv4.into(), "-c 1 -M do -s 8922");
        every_size_passes(from, to);
        traffic::transfer(&from.netns(), &to.netns(), to.ipv4.into(), 32 << 20);
    }
    lab.assert_conserved();
}

#[test]
fn a_pod_can_ask_for_the_kind_of_its_port_and_all_kinds_reach_each_other() {
    let _turn = turn();
    let cluster = Cluster::new("xm");
    let node = cluster.weft_node(1, "routed", "");
    let attach = |name: &str, port: &str| {
        let sandbox = cluster.sandbox(name);
        let addresses = plugin::addresses(&node.attach_with(name, &sandbox, &json!({ "port": port })));
        (sandbox, addresses)
    };
    let pods = [attach("t", "tap"), attach("x", "xdp"), attach("y", "xdp"), attach("a", "auto")];
    assert_eq!(kinds(&node), ["tap", "xdp", "xdp", "tap"]);
    for (from, _) in &pods {
        for (to, addresses) in pods.iter().filter(|(to, _)| to.0 != from.0) {
            for address in addresses {
                traffic::transfer(from, to, *address, 8 << 20);
                traffic::echo_datagrams(from, to, *address, &[0, 1422, 1423, 65_000]);
            }
        }
    }
    let refused = node.runtime.call("ADD", "z", Some(&cluster.sandbox("z").path()), &json!({ "port": "veth" }));
    assert!(refused.refused(7).contains("veth"));
    node.daemon().assert_conserved();
}

#[test]
fn a_pod_by_xdp_is_checked_deleted_and_noticed_when_it_vanishes() {
    let _turn = turn();
    let cluster = Cluster::new("xl");
    let node = cluster.weft_node(1, "routed", "");
    let keys = json!({ "port": "xdp" });
    let (gone, stays) = (cluster.sandbox("gone"), cluster.sandbox("stays"));
    let links = node.netns.ip("-br link show");
    node.attach_with("gone", &gone, &keys);
    let result = node.attach_with("stays", &stays, &keys);
    assert_eq!(node.netns.ip("-br link show"), links, "nothing of it is seen on the node");
    assert!(node.runtime.check("stays", &stays, &result).success);
    let again = node.runtime.call("ADD", "another", Some(&stays.path()), &keys);
    assert!(again.refused(101).contains("eth0 already"));
    assert_eq!(kinds(&node).len(), 2, "what failed is undone");
    stays.ip("route del default");
    assert!(!node.runtime.check("stays", &stays, &result).success, "a missing route is told");
    let identity = gone.identity().unwrap();
    drop(gone);
    eventually("the port of a deleted pod is gone", Duration::from_secs(2), || kinds(&node).len() == 1);
    let held = format!("find /proc/[0-9]*/fd /proc/[0-9]*/ns -lname 'net:\\[{}\\]' 2>/dev/null | head -3", identity.1);
    eventually("nobody holds the namespace", Duration::from_secs(2), || run(shell(&held)).out.trim().is_empty());
    assert_eq!(node.daemon().leases().len(), 4, "the leases wait for DEL");
    node.runtime.del("stays", &stays);
    assert!(!stays.ip("-o link show").contains("eth0"), "DEL takes the device");
    assert!(kinds(&node).is_empty());
    node.daemon().assert_conserved();
}

#[test]
fn a_killed_daemon_leaves_no_device_and_a_stopped_one_neither() {
    let _turn = turn();
    let cluster = Cluster::new("xk");
    let mut node = cluster.weft_node(1, "routed", "");
    with_port(&cluster, "xdp", &mut node);
    let (one, two) = (cluster.sandbox("one"), cluster.sandbox("two"));
    let links = node.netns.ip("-br link show");
    // The node's own port goes with weftd as well.
    let links: String =
        links.lines().filter(|link| !link.starts_with("weft0")).map(|link| format!("{link}\n")).collect();
    for round in 0..4 {
        let address = plugin::addresses(&node.attach("one", &one))[0];
        node.attach("two", &two);
        traffic::transfer(&two, &one, address, 4 << 20);
        let status = node.daemon().status();
        assert!(status.port.starts_with("xdp, offloads: "), "{}", status.port);
        let objects = node.daemon().bpf_objects();
        assert!(
            objects.len() >= 2 && objects.iter().all(|object| object.exists()),
            "a program and its map at least: {objects:?}"
        );
        if round % 2 == 0 {
            node.kill()
        } else {
            node.stop()
        }
        for sandbox in [&one, &two] {
            eventually("the device is gone", Duration::from_secs(2), || !sandbox.ip("-o link show").contains("eth0"));
        }
        assert_eq!(node.netns.ip("-br link show"), links);
        let are_gone = || !objects.iter().any(|object| object.exists());
        eventually("its programs and maps are gone", Duration::from_secs(5), are_gone);
        node.start_again();
        assert_eq!(node.daemon().leases().len(), 4);
        node.runtime.del("one", &one);
        node.runtime.del("two", &two);
    }
}

/// How many pods come and go, unless `WEFT_TEST_ROUNDS` says otherwise.
const ROUNDS: u32 = 1_000;
/// So many at once: most of a round is waiting for the kernel.
const AT_ONCE: u32 = 4;

#[test]
fn pods_by_xdp_that_come_and_go_leave_nothing() {
    let _turn = turn();
    let rounds = std::env::var("WEFT_TEST_ROUNDS").map_or(ROUNDS, |rounds| rounds.parse().expect("a number"));
    let cluster = Cluster::new("xc");
    let node = cluster.weft_node(1, "routed", "");
    let keys = json!({ "port": "xdp" });
    let other = cluster.sandbox("other");
    let pods: Vec<_> = (0..AT_ONCE).map(|lane| cluster.sandbox(&format!("pod{lane}"))).collect();
    let round = |number: u32| {
        let lane = number % AT_ONCE;
        let (name, pod) = (format!("pod{lane}"), &pods[lane as usize]);
        let address = plugin::addresses(&node.attach_with(&name, pod, &keys))[0];
        // Each pod has another address, and each flow its place in tables whose memory is touched only when used.
        if !number.is_multiple_of(100) {
            node.runtime.del(&name, pod);
            return;
        }
        let answer = other.exec(&format!("ping -n -q -c 1 -W 2 {address}"));
        assert!(answer.success, "{}{}", answer.out, answer.err);
        node.runtime.del(&name, pod);
    };
    let objects = Mutex::new(std::collections::BTreeSet::new());
    let rounds_of = |count: u32| {
        std::thread::scope(|scope| {
            for lane in 0..AT_ONCE {
                let (round, objects, node) = (&round, &objects, &node);
                scope.spawn(move || {
                    for number in (lane..count).step_by(AT_ONCE as usize) {
                        round(number);
                        objects.lock().unwrap().extend(node.daemon().bpf_objects());
                    }
                });
            }
        });
    };
    node.attach_with("other", &other, &keys);
    // Each thread's heap grows to its size first.
    rounds_of(300);
    let threads = || std::fs::read_dir(format!("/proc/{}/task", node.daemon().pid)).unwrap().count();
    std::thread::sleep(Duration::from_millis(300));
    let (descriptors, tasks, resident) = (node.daemon().descriptors(), threads(), node.daemon().resident_kib());
    let chunks = || node.daemon().status().free.expect("it is running").chunks;
    let free = chunks();
    let began = Instant::now();
    rounds_of(rounds);
    println!("{rounds} rounds took {:?}", began.elapsed());
    let names = || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", node.daemon().pid)).unwrap();
        let name =
            |task: std::io::Result<std::fs::DirEntry>| std::fs::read_to_string(task.unwrap().path().join("comm"));
        tasks.filter_map(|task| name(task).ok()).collect::<String>()
    };
    // The control plane's own threads stay for ten seconds without work.
    let (patience, started) = (Duration::from_secs(15), std::time::Instant::now());
    while node.daemon().descriptors() > descriptors || threads() > tasks {
        let now = (node.daemon().descriptors(), threads());
        assert!(
            started.elapsed() < patience,
            "{now:?} descriptors and threads, not {descriptors} and {tasks}: {}",
            names()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    eventually("their programs and maps are gone", Duration::from_secs(5), || {
        let kept = node.daemon().bpf_objects();
        kept.len() == 2 && objects.lock().unwrap().iter().all(|object| kept.contains(object) || !object.exists())
    });
    // The chunks of what was sent last come back when something else is sent: those are a handful, whatever was before.
    eventually("their chunks are free", Duration::from_secs(5), || chunks() + 64 >= free);
    let grown = node.daemon().resident_kib().saturating_sub(resident);
    // Addresses that rest are remembered for a while; a page for each pod would be as much again.
    assert!(grown < 4096, "{grown} KiB more after {rounds} pods");
    assert_eq!((kinds(&node).len(), node.daemon().leases().len()), (1, 2));
    node.daemon().assert_conserved();
}

#[test]
fn an_idle_daemon_with_twenty_pods_by_xdp_uses_under_one_percent_of_a_cpu_and_64_mib() {
    let _turn = turn();
    let lab = Lab::up("xi", 1, 20, "routed", &["--port", "xdp"]);
    let daemon = lab.daemon(1);
    std::thread::sleep(Duration::from_secs(3));
    let before = daemon.cpu_time();
    std::thread::sleep(Duration::from_secs(5));
    let used = daemon.cpu_time() - before;
    assert!(used <= Duration::from_millis(50), "{used:?} of CPU time in five idle seconds");
    assert!(daemon.resident_kib() < 64 << 10, "{} KiB", daemon.resident_kib());
}

#[test]
fn auto_is_a_tap_and_xdp_where_no_tap_can_be_made() {
    let _turn = turn();
    let cluster = Cluster::new("xa");
    let keys = json!({ "port": "auto" });
    let hidden = "unshare -m sh -c 'mount --bind /dev/null /dev/net/tun && exec \"$@\"' sh";
    let node = cluster.weft_node_by(1, "routed", "", hidden);
    let pods = [cluster.sandbox("a"), cluster.sandbox("b")];
    let address = |name: &str, pod: &OwnNetns| plugin::addresses(&node.attach_with(name, pod, &keys))[0];
    let (first, second): (IpAddr, IpAddr) = (address("a", &pods[0]), address("b", &pods[1]));
    assert_eq!(kinds(&node), ["xdp", "xdp"]);
    traffic::transfer(&pods[0], &pods[1], second, 4 << 20);
    traffic::transfer(&pods[1], &pods[0], first, 4 << 20);
    let lab = Lab::up("xb", 1, 1, "routed", &["--port", "auto"]);
    assert_eq!(lab.daemon(1).status().port, "tap (auto)");
    assert_eq!(lab.daemon(1).port_of(lab.pod(1, 1).ipv4.into()).kind, "tap");
}

#[test]
fn auto_gives_a_veth_to_a_pod_for_which_no_tap_can_be_made_any_more() {
    let _turn = turn();
    let cluster = Cluster::new("xf");
    let node = cluster.weft_node_by(1, "routed", "", "unshare -m");
    let names = ["before", "hidden", "refused"];
    let pods = names.map(|name| cluster.sandbox(name));
    let auto = json!({ "port": "auto" });
    let first = plugin::addresses(&node.attach_with(names[0], &pods[0], &auto))[0];
    run(shell(&format!("nsenter -t {} -m mount --bind /dev/null /dev/net/tun", node.daemon().pid))).must();
    let second = plugin::addresses(&node.attach_with(names[1], &pods[1], &auto))[0];
    assert_eq!(kinds(&node), ["tap", "xdp"]);
    assert!(node.log().contains("no TAP could be made for it"), "{}", node.log());
    traffic::transfer(&pods[0], &pods[1], second, 4 << 20);
    traffic::transfer(&pods[1], &pods[0], first, 4 << 20);
    // Who asks for a TAP gets nothing else.
    let refused = node.runtime.call("ADD", names[2], Some(&pods[2].path()), &json!({ "port": "tap" }));
    assert!(!refused.success && kinds(&node).len() == 2, "{refused:?}");
    node.daemon().assert_conserved();
}

/// What the systemd unit leaves weftd, as arguments of setpriv.
fn capabilities_of_the_unit(but: &str) -> String {
    let unit = include_str!("../../../deploy/weftd.service");
    let all = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).expect("the unit limits them");
    let kept = all.split(' ').filter(|one| *one != but).map(|one| one.trim_start_matches("CAP_").to_lowercase());
    let kept: Vec<String> = kept.map(|one| format!("+{one}")).collect();
    format!("setpriv --bounding-set=-all,{}", kept.join(","))
}

#[test]
fn the_rights_that_the_unit_leaves_suffice_and_a_missing_one_is_named() {
    let _turn = turn();
    let cluster = Cluster::new("xr");
    let keys = json!({ "port": "xdp" });
    let pod = cluster.sandbox("pod");
    let node = cluster.weft_node_by(1, "routed", "", &capabilities_of_the_unit(""));
    node.attach_with("pod", &pod, &keys);
    assert_eq!(kinds(&node), ["xdp"]);
    node.runtime.del("pod", &pod);
    let node = cluster.weft_node_by(2, "routed", "", &capabilities_of_the_unit("CAP_NET_RAW"));
    let refused = node.runtime.call("ADD", "pod", Some(&pod.path()), &keys).refused(50);
    assert!(refused.contains("AF_XDP") && refused.contains("not permitted"), "{refused}");
    assert!(node.daemon().leases().is_empty(), "what failed is undone");
    node.attach("pod", &pod);
    assert_eq!(kinds(&node), ["tap"]);
}

#[test]
fn a_pod_by_xdp_that_goes_under_traffic_takes_nothing_along() {
    let _turn = turn();
    let lab = Lab::up("xg", 2, 3, "routed", &["--port", "xdp", "--workers", "2"]);
    let daemon = lab.daemon(1);
    let (gone, stays, far) = (lab.pod(1, 1), lab.pod(1, 2), lab.pod(2, 1));
    let mut floods = Vec::new();
    for (from, to) in [(stays, gone), (lab.pod(1, 3), gone), (far, gone), (gone, far)] {
        let mut ping = from.netns().command("ping");
        ping.args(["-n", "-q", "-i", "0.001", "-s", "1000", &to.ipv4.to_string()]);
        floods.push(Background::start(ping));
    }
    std::thread::sleep(Duration::from_millis(300));
    run(shell(&format!("ip netns del {}", gone.netns))).must();
    // A process of the pod's keeps its namespace: the one that pings.
    floods.truncate(3);
    eventually("the port of a deleted pod is gone", Duration::from_secs(3), || {
        !daemon.ports().iter().any(|port| port.addresses.contains(&gone.ipv4.into()))
    });
    drop(floods);
    traffic::transfer(&stays.netns(), &far.netns(), far.ipv4.into(), 32 << 20);
    assert!(daemon.status().problems.iter().all(|problem| !problem.contains("worker")));
    lab.assert_conserved();
}
