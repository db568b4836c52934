//! Several workers on a node: everything as with one, and each of them has its part.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use weft_tests::cluster::{Cluster, WeftNode};
use weft_tests::command::{Background, eventually, run, shell};
use weft_tests::daemon::Daemon;
use weft_tests::lab::{Lab, Pod};
use weft_tests::machine::turn;
use weft_tests::plugin;
use weft_tests::traffic;

/// Time on a CPU of each worker thread, by its number.
fn worker_times(daemon: &Daemon) -> BTreeMap<usize, Duration> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.pid)).unwrap();
    let time = |task: std::io::Result<std::fs::DirEntry>| {
        let path = task.unwrap().path();
        let number = std::fs::read_to_string(path.join("comm")).ok()?.trim().strip_prefix("weft-worker-")?.parse();
        // schedstat: nanoseconds on a CPU come first.
        let stat = std::fs::read_to_string(path.join("schedstat")).ok()?;
        Some((number.ok()?, Duration::from_nanos(stat.split(' ').next()?.parse().ok()?)))
    };
    tasks.filter_map(time).collect()
}

/// Sends numbered datagrams of many flows at once, and checks that none overtakes another of its flow.
#[track_caller]
fn datagrams_stay_in_order(from: &Pod, to: &Pod, address: IpAddr) {
    const FLOWS: usize = 16;
    const EACH: u32 = 1500;
    let server = to.netns().inside(|| UdpSocket::bind(SocketAddr::new(address, 0)).unwrap());
    let target = server.local_addr().unwrap();
    server.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let any: IpAddr = if address.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let clients: Vec<UdpSocket> =
        from.netns().inside(|| (0..FLOWS).map(|_| UdpSocket::bind(SocketAddr::new(any, 0)).unwrap()).collect());
    let mut last = BTreeMap::new();
    let mut count = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..EACH {
                clients.iter().for_each(|client| drop(client.send_to(&number.to_be_bytes(), target)));
                if number % 8 == 0 {
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        });
        let mut buffer = [0; 4];
        while let Ok((_, flow)) = server.recv_from(&mut buffer) {
            let number = u32::from_be_bytes(buffer);
            let before = last.insert(flow, number);
            assert!(before.is_none_or(|before| before < number), "{number} of {flow} came after {before:?}");
            count += 1;
            if number == EACH - 1 && last.len() == FLOWS && last.values().all(|last| *last == EACH - 1) {
                break;
            }
        }
    });
    assert_eq!(last.len(), FLOWS);
    assert!(count > FLOWS as u32 * EACH / 2, "only {count} datagrams arrived");
}

#[track_caller]
fn tcp(from: &Pod, to: &Pod, args: &str) {
    let rate = traffic::iperf3(&from.netns(), &to.netns(), to.ipv4.into(), &format!("-C cubic -t 2 {args}"));
    // Anything that works at all is faster; how fast it ought to be is the benches' question.
    assert!(rate > 100e6, "{} to {} {args}: {rate} bit/s", from.name, to.name);
}

#[test]
fn two_workers_share_the_work_keep_order_and_lose_nothing() {
    let _turn = turn();
    for mode in ["routed", "bridged"] {
        // The lab is up when every pod has reached every other.
        let lab = Lab::up("w", 2, 3, mode, &["--workers", "2"]);
        let before: Vec<_> = lab.nodes.iter().map(|node| worker_times(&node.daemon())).collect();
        let (near, neighbour, far) = (lab.pod(1, 1), lab.pod(1, 2), lab.pod(2, 1));
        tcp(near, far, "-P 4 --bidir");
        tcp(near, neighbour, "-P 4 --bidir");
        tcp(neighbour, far, "-R");
        for (from, to) in [(near, far), (neighbour, far), (near, neighbour)] {
            datagrams_stay_in_order(from, to, to.ipv4.into());
            datagrams_stay_in_order(from, to, to.ipv6.into());
        }
        traffic::transfer(&near.netns(), &far.netns(), far.ipv6.into(), 64 << 20);
        for (node, before) in lab.nodes.iter().zip(before) {
            let daemon = node.daemon();
            assert_eq!((daemon.status().workers, before.len()), (2, 2));
            let owners: BTreeSet<_> = daemon.ports().iter().map(|port| port.worker).collect();
            assert_eq!(owners, [None, Some(0), Some(1)].into());
            for (number, now) in worker_times(&daemon) {
                let used = now - before[&number];
                assert!(
                    used > Duration::from_millis(20),
                    "worker {number} of {} has done nothing: {used:?}",
                    node.name
                );
            }
            let macs: Vec<_> = daemon.fdb().into_iter().map(|entry| entry.mac).collect();
            assert_eq!(macs.iter().collect::<BTreeSet<_>>().len(), macs.len(), "a MAC is there twice: {macs:?}");
        }
        lab.assert_conserved();
    }
}

#[test]
fn a_pod_that_goes_under_traffic_takes_nothing_along() {
    let _turn = turn();
    let lab = Lab::up("wd", 2, 3, "routed", &["--workers", "2"]);
    let daemon = lab.daemon(1);
    let (gone, stays, far) = (lab.pod(1, 1), lab.pod(1, 2), lab.pod(2, 1));
    // Both workers send to the pod that goes, and it sends itself.
    let mut floods = Vec::new();
    for (from, to) in [(stays, gone), (lab.pod(1, 3), gone), (far, gone), (gone, far)] {
        let mut ping = from.netns().command("ping");
        ping.args(["-n", "-q", "-i", "0.001", "-s", "1000", &to.ipv4.to_string()]);
        floods.push(Background::start(ping));
    }
    let transfer = {
        let (stays, far) = (stays.clone(), far.clone());
        std::thread::spawn(move || traffic::transfer(&stays.netns(), &far.netns(), far.ipv4.into(), 128 << 20))
    };
    std::thread::sleep(Duration::from_millis(300));
    run(shell(&format!("ip netns del {}", gone.netns))).must();
    // A process of the pod's keeps its namespace: the one that pings.
    floods.truncate(3);
    eventually("the port of a deleted pod is gone", Duration::from_secs(3), || {
        !daemon.ports().iter().any(|port| port.addresses.contains(&gone.ipv4.into()))
    });
    drop(floods);
    transfer.join().expect("the transfer beside it goes on");
    assert!(daemon.status().problems.iter().all(|problem| !problem.contains("worker")));
    lab.assert_conserved();
}

#[test]
fn pods_that_come_and_go_leave_nothing_and_workers_stay_even() {
    let _turn = turn();
    let cluster = Cluster::new("wc");
    let mut node = cluster.weft_node(1, "routed", "");
    let config = format!("workers = 3\n{}", cluster.config(1, "routed", ""));
    assert!(node.reload(&config).unwrap_err().to_string().contains("workers"), "it needs a restart");
    node.stop();
    node.start_again();
    // With the node's own port there are six.
    let sandboxes: Vec<_> = (0..5).map(|number| cluster.sandbox(&format!("p{number}"))).collect();
    let round = |node: &WeftNode| {
        for (number, sandbox) in sandboxes.iter().enumerate() {
            node.attach(&format!("p{number}"), sandbox);
        }
        let mut ports = [0; 3];
        let read = node.daemon().ports().into_iter().filter(|port| port.role != "underlay");
        read.filter_map(|port| port.worker).for_each(|worker| ports[worker] += 1);
        assert_eq!(ports, [2, 2, 2]);
        for (number, sandbox) in sandboxes.iter().enumerate() {
            node.runtime.del(&format!("p{number}"), sandbox);
        }
    };
    round(&node);
    let before = node.daemon().descriptors();
    (0..5).for_each(|_| round(&node));
    eventually("descriptors are back", Duration::from_secs(3), || node.daemon().descriptors() <= before);
    let idle = node.daemon().cpu_time();
    std::thread::sleep(Duration::from_secs(3));
    assert!(node.daemon().cpu_time() - idle <= Duration::from_millis(30), "idle workers sleep");
    assert!(plugin::addresses(&node.attach("last", &sandboxes[0])).len() == 2);
}
