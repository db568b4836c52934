//! What an idle node costs.

use std::time::Duration;

use weft_tests::cluster::Cluster;
use weft_tests::lab::Lab;
use weft_tests::machine::{binary, turn};

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
    weft_tests::command::eventually("descriptors are back", Duration::from_secs(3), || {
        node.daemon().descriptors() <= before
    });
    assert_eq!(node.daemon().leases().len(), 0);
    assert_eq!(node.daemon().ports().iter().filter(|port| port.role == "pod").count(), 0);
}
