//! More than can be forwarded, to pods that take nothing or are not there half of the time: every frame is accounted for, and every buffer
//! is back.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use rustix::process::Signal;
use weft_api::PortInfo;
use weft_tests::command::eventually;
use weft_tests::daemon::Daemon;
use weft_tests::flood::{Flood, SMALL, Shape};
use weft_tests::lab::{Lab, Pod};
use weft_tests::machine::turn;

/// How often the receiver's link goes down and comes back.
const ROUNDS: usize = 8;

/// What a pod's kernel says of its interface: packets that it handed to weftd, that it got from weftd, and that it dropped because weftd
/// had not taken those before.
fn link(pod: &Pod) -> (u64, u64, u64) {
    let said: serde_json::Value =
        serde_json::from_str(&pod.netns().ip(&format!("-j -s link show {}", pod.ifname))).unwrap();
    let count = |direction: &str, what: &str| said[0]["stats64"][direction][what].as_u64().unwrap();
    (count("tx", "packets"), count("rx", "packets"), count("tx", "dropped"))
}

/// What weftd has counted of each pod is what the pod's own kernel has, but for what was lost between them, which AF_XDP says.
#[track_caller]
fn assert_kernel_agrees(daemon: &Daemon, pods: &[Pod]) {
    for pod in pods {
        let address = pod.ipv4.into();
        let ((handed, got, _), port) = (link(pod), daemon.port_of(address));
        let (overruns, undelivered) =
            (daemon.lost_at(port.id, "KernelOverrun"), daemon.lost_at(port.id, "Undelivered"));
        assert!(port.kind == "xdp" || (overruns, undelivered) == (0, 0), "{}: {port:?}", pod.name);
        let counted = (port.counters.received + overruns, port.out - undelivered);
        assert_eq!(
            counted,
            (handed, got),
            "{}: weftd, and the kernel; lost between them: {overruns}, {undelivered}",
            pod.name
        );
    }
}

/// What pods have as ports, the same for all.
fn kind_of_pods(ports: &[PortInfo]) -> &str {
    &ports.iter().find(|port| port.role == "pod").expect("there are pods").kind
}

fn overloaded(workers: &str) {
    let _turn = turn();
    let lab = Lab::up(&format!("ov{workers}"), 2, 3, "routed", &["--workers", workers]);
    let free: Vec<_> = lab.nodes.iter().map(|node| node.daemon().status().free.unwrap()).collect();
    let (receiver, far) = (lab.pod(1, 2), lab.pod(2, 1));
    // Nobody reads from these sockets: they take what fits, and the rest ends in the pod.
    let sockets = [receiver, far].map(|pod| {
        let address = SocketAddr::new(pod.ipv4.into(), 0);
        pod.netns().inside(|| UdpSocket::bind(address).unwrap())
    });
    let [near, away] = sockets.each_ref().map(|socket| socket.local_addr().unwrap());
    let single = Shape { size: SMALL, train: 1 };
    let train = Shape { size: SMALL, train: 60 };
    let floods = [
        (lab.pod(1, 1), near, [single, single, train]),
        (lab.pod(1, 3), away, [single, train, single]),
        (lab.pod(2, 2), near, [train, single, single]),
    ]
    .map(|(from, to, shapes)| Flood::start(&from.netns(), to, &shapes, Duration::ZERO));
    for _ in 0..ROUNDS {
        receiver.netns().ip(&format!("link set {} down", receiver.ifname));
        std::thread::sleep(Duration::from_millis(100));
        receiver.netns().ip(&format!("link set {} up", receiver.ifname));
        std::thread::sleep(Duration::from_millis(100));
        // However fast it may be, now it falls behind.
        lab.daemon(1).signal(Signal::STOP);
        std::thread::sleep(Duration::from_millis(50));
        lab.daemon(1).signal(Signal::CONT);
    }
    let sent: u64 = floods.into_iter().map(Flood::stop).sum();
    lab.assert_conserved();
    let (drops, ports) = (lab.daemon(1).all_drops(), lab.daemon(1).ports());
    let by_xdp = kind_of_pods(&ports) == "xdp";
    let overruns = drops.get("KernelOverrun").copied().unwrap_or(0);
    let lost: u64 = overruns + lab.pods().map(|pod| link(pod).2).sum::<u64>();
    let merged: u64 = ports.iter().map(|port| port.counters.merged).sum();
    println!("{workers} workers: {sent} datagrams, {lost} not taken in time, {merged} merged, dropped: {drops:?}");
    assert!(lost > 0, "weftd was never behind");
    let down = if by_xdp { "Undelivered" } else { "PortDown" };
    assert!(drops.get(down).is_some_and(|count| *count > 100), "{drops:?}");
    // By UDP trains arrive as they were sent, and count as merged; by AF_XDP they are cut, and datagrams stay as they came. Those of a
    // pod by AF_XDP are cut by its own kernel: then there are none.
    let cut: u64 = ports.iter().map(|port| port.counters.created).sum();
    let underlay = ports.iter().find(|port| port.role == "underlay").expect("a node has one").kind.clone();
    match (kind_of_pods(&ports), &*underlay) {
        ("xdp", _) => {
            assert!(ports.iter().all(|port| port.role != "pod" || !port.offloads.contains("uso")), "{ports:?}")
        }
        (_, "xdp") => assert!(cut > 100, "hardly anything was cut: {ports:?}"),
        _ => assert!(merged > 100, "hardly anything was merged: {ports:?}"),
    }
    for (node, free) in lab.nodes.iter().zip(free) {
        // A device by AF_XDP keeps as many chunks ready as bursts have needed, up to a ring of them.
        let kept = if underlay == "xdp" { 2048 } else { 0 } + if by_xdp { 3 * 2048 } else { 0 };
        eventually("all buffers are back", Duration::from_secs(3), || {
            let now = node.daemon().status().free.expect("it runs");
            now.supers == free.supers && (free.chunks - kept..=free.chunks).contains(&now.chunks)
        });
        assert_kernel_agrees(&node.daemon(), &node.pods);
    }
}

#[test]
fn under_overload_one_worker_accounts_for_every_frame_and_buffer() {
    overloaded("1");
}

#[test]
fn under_overload_two_workers_account_for_every_frame_and_buffer() {
    overloaded("2");
}
