//! What an idle node costs.

use std::time::Duration;

use weft_tests::cluster::Cluster;
use weft_tests::command::eventually;
use weft_tests::daemon::Daemon;
use weft_tests::flood::{Flood, Receiver, Shape};
use weft_tests::lab::Lab;
use weft_tests::machine::{binary, turn};
use weft_tests::{plugin, traffic};

#[test]
fn an_idle_daemon_with_ten_pods_uses_under_one_percent_of_a_cpu_and_64_mib() {
    let _turn = turn();
    let lab = Lab::up("idle", 1, 10, "routed", &[]);
    let daemon = lab.daemon(1);
    // What pods say when they come up is over.
    std::thread::sleep(Duration::from_secs(3));
    let before = daemon.cpu_time();
    std::thread::sleep(Duration::from_secs(10));
    let used = daemon.cpu_time() - before;
    assert!(used <= Duration::from_millis(100), "{used:?} of CPU time in ten idle seconds");
    assert!(daemon.resident_kib() < 64 << 10, "{} KiB", daemon.resident_kib());
}

/// CPU time in `seconds` in which nothing happens, at most half a percent of one; and memory: 64 MiB, and 256 KiB for each pod.
#[track_caller]
fn assert_idle(daemon: &Daemon, pods: u64, when: &str) {
    const PATIENCE: Duration = Duration::from_secs(16);
    // What pods say when they come up, or when a connection ends, is over.
    std::thread::sleep(Duration::from_secs(4));
    let before = daemon.cpu_time();
    std::thread::sleep(PATIENCE);
    let (used, resident) = (daemon.cpu_time() - before, daemon.resident_kib());
    println!("{when}: {used:?} of CPU time in {PATIENCE:?}, {resident} KiB");
    assert!(used < PATIENCE / 200, "{used:?} of CPU time in {PATIENCE:?} {when}");
    assert!(resident < (64 << 10) + pods * 256, "{resident} KiB {when}");
}

#[test]
fn with_a_hundred_pods_an_idle_daemon_stays_under_half_a_percent_and_256_kib_for_each() {
    const PODS: usize = 100;
    let _turn = turn();
    let cluster = Cluster::new("hundred");
    let node = cluster.weft_node(1, "routed", "");
    let attach = |number| {
        let name = format!("p{number}");
        let sandbox = cluster.sandbox(&name);
        let addresses = plugin::addresses(&node.attach(&name, &sandbox));
        (sandbox, addresses[0])
    };
    let pods: Vec<_> = (0..PODS).map(attach).collect();
    let daemon = node.daemon();
    assert_eq!(daemon.status().pods, PODS);
    assert_idle(&daemon, PODS as u64, "before any traffic");
    let train = [Shape { size: 1400, train: 40 }, Shape { size: 100, train: 1 }];
    for group in pods.chunks(10) {
        let receivers: Vec<_> = group.iter().map(|(pod, address)| Receiver::start(pod, *address)).collect();
        let next = receivers.iter().cycle().skip(1);
        let floods: Vec<_> = group
            .iter()
            .zip(next)
            .map(|((pod, _), to)| Flood::start(pod, to.address, &train, Duration::ZERO))
            .collect();
        for (_, address) in group {
            eventually("datagrams pass", Duration::from_secs(10), || daemon.port_of(*address).out > 2_000);
        }
        let sent: u64 = floods.into_iter().map(Flood::stop).sum();
        assert!(sent > 2_000 * group.len() as u64);
        receivers.into_iter().for_each(|receiver| assert_eq!(receiver.stop().flows.len(), train.len()));
    }
    for pair in pods.chunks(2).take(3) {
        traffic::transfer(&pair[0].0, &pair[1].0, pair[1].1, 64 << 20);
    }
    assert_idle(&daemon, PODS as u64, "after a burst");
    daemon.assert_conserved();
}

#[test]
fn the_plugin_is_one_static_binary_under_2_mib() {
    let path = binary("weft-cni");
    let size = std::fs::metadata(&path).unwrap().len();
    let bytes = std::fs::read(&path).unwrap();
    assert!(!has_interpreter(&bytes), "{} is not static; `make build` builds it so", path.display());
    assert!(size < 2 << 20, "{size} bytes");
}

/// Whether an ELF file of 64 bits names a dynamic loader in its program headers (elf(5), `PT_INTERP`): a static program has none.
fn has_interpreter(elf: &[u8]) -> bool {
    const PT_INTERP: u32 = 3;
    let half = |at: usize| usize::from(u16::from_le_bytes([elf[at], elf[at + 1]]));
    assert_eq!(elf[..6], [0x7f, b'E', b'L', b'F', 2, 1]);
    let table = u64::from_le_bytes(elf[32..40].try_into().unwrap()) as usize;
    let (size, count) = (half(54), half(56));
    let kind = |index: usize| u32::from_le_bytes(elf[table + index * size..][..4].try_into().unwrap());
    (0..count).any(|index| kind(index) == PT_INTERP)
}

#[test]
fn descriptors_and_leases_are_back_to_the_start_after_pods_came_and_went() {
    let _turn = turn();
    let cluster = Cluster::new("fds");
    let node = cluster.weft_node(1, "routed", "");
    let pod = cluster.sandbox("pod");
    let round = || {
        node.attach("pod", &pod);
        node.runtime.del("pod", &pod);
    };
    round();
    let before = node.daemon().descriptors();
    (0..20).for_each(|_| round());
    eventually("descriptors are back", Duration::from_secs(3), || node.daemon().descriptors() <= before);
    assert_eq!(node.daemon().leases().len(), 0);
    assert_eq!(node.daemon().ports().iter().filter(|port| port.role == "pod").count(), 0);
}
