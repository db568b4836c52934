//! The generator and the sink against the kernel's own paths. Needs root, `ip`, `ethtool`.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use weft_router::port::sys::bpf::{Map, MapKind, Program};
use weft_router::port::sys::tun;
use weft_router::port::xdp::Verdict;

use super::programs::{self, Headers, sink};
use super::*;
use crate::lab::command::Run;
use crate::lab::net;

const HEADERS: Headers = Headers {
    macs: ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]),
    addresses: (Ipv4Addr::new(10, 9, 0, 1), Ipv4Addr::new(10, 9, 0, 2)),
};

/// Namespaces of one test, which runs alone: trials want the machine's CPUs.
struct Bed {
    _alone: MutexGuard<'static, ()>,
    netns: Vec<String>,
}

impl Bed {
    fn new(test: &str, count: usize) -> Bed {
        static ALONE: Mutex<()> = Mutex::new(());
        assert!(
            rustix::process::geteuid().is_root(),
            "this test needs root: run it as root, or with `sudo -E cargo test`"
        );
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bed = Bed { _alone: alone, netns: Vec::new() };
        for index in 0..count {
            let name = format!("weft-t{}-{test}{index}", std::process::id());
            bed.netns.push(name.clone());
            ip(&format!("netns add {name}"));
            ip(&format!("-n {name} link set lo up"));
        }
        bed
    }

    /// Two pods, each on a veth.
    fn veth(&self, one: usize, one_name: &str, two: usize, two_name: &str) {
        let (one, two) = (&self.netns[one], &self.netns[two]);
        ip(&format!("-n {one} link add {one_name} type veth peer name {two_name} netns {two}"));
        ip(&format!("-n {one} link set {one_name} up"));
        ip(&format!("-n {two} link set {two_name} up"));
    }

    fn ends(&self, from: usize, to: usize) -> Ends {
        let end = |index: usize| End {
            netns: self.netns[index].clone(),
            device: "eth0".into(),
            address: Ipv4Addr::new(10, 9, 0, index as u8 + 1),
        };
        Ends { from: end(from), to: end(to), gateway: None, cpu: None }
    }

    /// Two pods on a bridge in a namespace between them.
    fn bridge(test: &str) -> (Bed, Ends) {
        let bed = Bed::new(test, 3);
        let middle = &bed.netns[2];
        ip(&format!("-n {middle} link add br0 type bridge"));
        ip(&format!("-n {middle} link set br0 up"));
        for pod in [0, 1] {
            bed.veth(pod, "eth0", 2, &format!("p{pod}"));
            ip(&format!("-n {middle} link set p{pod} master br0"));
        }
        let ends = bed.ends(0, 1);
        bed.lead("p1", "static");
        (bed, ends)
    }

    /// Tells the bridge where the receiver is, rather than having it learn that.
    fn lead(&self, port: &str, how: &str) {
        let mac = device::Device::look(&self.netns[1], "eth0").unwrap().mac().unwrap();
        let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
        let bridge =
            Run::new("bridge").args(["-n", &self.netns[2], "fdb", "replace", &mac, "dev", port, "master", how]);
        bridge.succeed().unwrap();
    }

    /// What the devices say that must be as before: programs and GRO.
    fn traces(&self) -> Vec<String> {
        let mut traces = Vec::new();
        for netns in &self.netns {
            let links = ip(&format!("-n {netns} -d link show"));
            traces.extend(links.lines().filter(|line| line.contains("xdp")).map(str::to_owned));
        }
        for port in ["p0", "p1"] {
            if self.netns.len() > 2 {
                let said = Run::inside(&self.netns[2], "ethtool").args(["-k", port]).succeed().unwrap();
                let said = String::from_utf8(said).unwrap();
                traces.extend(
                    said.lines().filter(|line| line.contains("generic-receive-offload: on")).map(str::to_owned),
                );
            }
        }
        traces
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        for netns in &self.netns {
            let _ = net::remove_namespace(netns);
        }
    }
}

fn ip(args: &str) -> String {
    String::from_utf8(Run::ip(args).succeed().unwrap()).unwrap()
}

#[test]
fn sizes_count_the_frame_check_sequence_and_keep_to_the_mtu() {
    assert_eq!(programs::sizes(Mix::SMALL, 1500), [60; 12]);
    assert_eq!(programs::sizes(Mix::Size(9000), 1500), [1514; 12]);
    let sizes = programs::sizes(Mix::Imix, 1500);
    let count = |size| sizes.iter().filter(|&&has| has == size).count();
    assert_eq!((count(60), count(566), count(1514)), (7, 4, 1));
    assert!(programs::sizes(Mix::Imix, 1450).contains(&1464));
}

#[test]
fn a_generated_frame_is_a_valid_udp_packet() {
    let frame = programs::frame(&HEADERS, 60);
    let sum: u32 = frame[14..34].chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff, "the header's checksum is wrong");
    assert_eq!(&frame[..14], [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0]);
    assert_eq!(&frame[14..24], [0x45, 0, 0, 46, 0, 0, 0x40, 0, 64, 17]);
    assert_eq!(&frame[26..42], [10, 9, 0, 1, 10, 9, 0, 2, 0xc0, 0, 0, 9, 0, 26, 0, 0]);
}

#[test]
fn the_sink_tells_loss_reordering_duplicates_and_strangers_apart() {
    let _bed = Bed::new("sink", 0);
    let state = Map::create(MapKind::Array, "weft_sink", 4, sink::WORDS * 8, 1).unwrap();
    let program = Program::load("weft_sink", &programs::absorb(&state)).unwrap();
    let mut words = vec![0_u8; sink::WORDS * 8];
    words[sink::TAG as usize..sink::TAG as usize + 8].copy_from_slice(&7_u64.to_ne_bytes());
    state.update(&[0; 4], &words).unwrap();
    let frame = |tag: u16, number: u64| {
        let mut frame = programs::frame(&HEADERS, 60);
        frame[42..44].copy_from_slice(&tag.to_ne_bytes());
        frame[48..56].copy_from_slice(&number.to_ne_bytes());
        frame
    };
    // Of one flow: 0, 256, twice; 768 before 512. Of another: 3 and 515, which is a loss and no disorder.
    for number in [0, 256, 256, 768, 512, 3, 515] {
        assert_eq!(program.run(&frame(7, number)).unwrap().0, Verdict::Drop as u32);
    }
    assert_eq!(program.run(&frame(6, 1)).unwrap().0, Verdict::Drop as u32, "a straggler ends here");
    let mut strangers = vec![frame(7, 9); 4];
    strangers[0][12] = 0x86;
    strangers[1][23] = 6;
    strangers[2][44] ^= 1;
    strangers[3].truncate(59);
    for stranger in strangers {
        assert_eq!(program.run(&stranger).unwrap(), (Verdict::Pass as u32, stranger));
    }
    state.lookup(&[0; 4], &mut words).unwrap();
    let word = |at: i16| u64::from_ne_bytes(words[at as usize..at as usize + 8].try_into().unwrap());
    assert_eq!((word(sink::RECEIVED), word(sink::LATE), word(sink::DUPLICATED)), (7, 2, 1));
}

#[test]
fn through_a_kernel_bridge_every_frame_arrives_in_order_and_nothing_is_left_behind() {
    let (bed, ends) = Bed::bridge("bridge");
    let before = bed.traces();
    for mix in [Mix::SMALL, Mix::Imix] {
        let trial = offer(&ends, mix, Some(20_000.0), Duration::from_millis(300)).unwrap();
        // Less if the machine is busy, never more.
        assert!((1_000..=6_001).contains(&trial.sent), "{trial:?}");
        assert_eq!((trial.received, trial.lost(), trial.refused), (trial.sent, 0, 0), "{trial:?}");
        assert_eq!((trial.reordered, trial.duplicated), (0, 0), "{trial:?}");
        assert_eq!(bed.traces(), before);
    }
    assert!(before.is_empty(), "{before:?}");
}

#[test]
fn a_path_that_carries_nothing_is_an_error_and_leaves_nothing_behind() {
    let (bed, ends) = Bed::bridge("loss");
    // The bridge takes the receiver's MAC for its own.
    bed.lead("p1", "permanent");
    let error = offer(&ends, Mix::SMALL, Some(10_000.0), Duration::from_millis(50)).unwrap_err().to_string();
    assert!(error.contains("none arrived"), "{error}");
    assert!(bed.traces().is_empty());
}

#[test]
fn a_device_that_is_down_or_missing_is_named() {
    let bed = Bed::new("down", 2);
    bed.veth(0, "eth0", 1, "eth0");
    ip(&format!("-n {} link set eth0 down", bed.netns[1]));
    let error = format!("{:#}", search(&bed.ends(0, 1), Mix::SMALL, &Limits::SHORT).unwrap_err());
    assert!(error.contains("is down"), "{error}");
    let mut ends = bed.ends(0, 1);
    ends.from.device = "eth7".into();
    let error = format!("{:#}", search(&ends, Mix::SMALL, &Limits::SHORT).unwrap_err());
    assert!(error.contains("eth7"), "{error}");
}

#[test]
fn a_search_through_one_veth_finds_the_generators_own_limit() {
    let bed = Bed::new("alone", 2);
    bed.veth(0, "eth0", 1, "eth0");
    let limits = Limits { trial: Duration::from_millis(150), trials: 6, ..Limits::SHORT };
    let rate = search(&bed.ends(0, 1), Mix::SMALL, &limits).unwrap();
    assert!(rate.offered_max_pps > 100_000.0, "{rate:?}");
    assert!(rate.pdr_pps > 0.0 && rate.pdr_pps >= rate.ndr_pps, "{rate:?}");
    assert_eq!((rate.reordered, rate.duplicated, rate.generic_sink), (0, 0, false), "{rate:?}");
    assert!(bed.traces().is_empty());
}

/// The simplest path there is: what is read from one TAP is written to the other, with a pause before each frame after `swift` of them.
fn relay(from: &OwnedFd, to: &OwnedFd, swift: usize, stopped: &AtomicBool) {
    let mut frame = [0; 2048];
    let mut count = 0;
    while !stopped.load(Ordering::Relaxed) {
        match rustix::io::read(from, &mut frame) {
            Ok(len) => {
                let _ = rustix::io::write(to, &frame[..len]);
                count += 1;
            }
            Err(_) => std::thread::sleep(Duration::from_micros(200)),
        }
        if count > swift {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A trial from one TAP to the other, with a relay that is swift for so many frames.
fn offer_between_taps(bed: &Bed, taps: &[OwnedFd; 2], swift: usize, asked: Option<f64>, length: u64) -> Trial {
    let stopped = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| relay(&taps[0], &taps[1], swift, &stopped));
        let trial = offer(&bed.ends(0, 1), Mix::SMALL, asked, Duration::from_millis(length));
        stopped.store(true, Ordering::Relaxed);
        trial.expect("a trial between devices that are there")
    })
}

#[test]
fn between_taps_what_the_ring_refused_is_told_from_what_was_lost_later() {
    let bed = Bed::new("tap", 2);
    let taps = [0, 1].map(|pod| {
        let tap = stream::inside(&bed.netns[pod], || Ok(tun::create("eth0")?)).unwrap();
        ip(&format!("-n {} link set eth0 txqueuelen 1000 up", bed.netns[pod]));
        tap
    });
    // The ring holds the whole trial, however late the relay is scheduled.
    let calm = offer_between_taps(&bed, &taps, usize::MAX, Some(2_000.0), 300);
    assert!(calm.sent >= 100, "{calm:?}");
    assert_eq!((calm.received, calm.refused, calm.reordered), (calm.sent, 0, 0), "{calm:?}");
    // However fast the machine is, a frame a millisecond is less than is offered.
    ip(&format!("-n {} link set eth0 txqueuelen 100", bed.netns[0]));
    let overload = offer_between_taps(&bed, &taps, 0, None, 100);
    assert!(overload.received >= 100 && overload.refused > overload.received, "{overload:?}");
    // What the pod's kernel says of its own accord (neighbours, routers) is taken by the ring as well.
    let lost_later = overload.lost() - overload.refused;
    assert!(lost_later <= 8 && overload.reordered == 0, "{overload:?}");
    assert!(bed.traces().is_empty());
}
