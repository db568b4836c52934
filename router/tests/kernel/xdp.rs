//! AF_XDP ports against a real kernel: two pods on veths, and between them two ports and nothing else.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use etherparse::{PacketBuilder, VlanId};
use rustix::io::Errno;
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketType, socket, sockopt};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use weft_encap::checksum::pseudo_v4;
use weft_encap::mac::Mac;
use weft_encap::offload::{Gso, GsoKind, Partial};
use weft_router::frame::{Frame, Outer};
use weft_router::pool::Pool;
use weft_router::port::sys::bpf::{Map, MapKind, Mode, Program};
use weft_router::port::sys::xsk::{Binding, Descriptor, Socket, Umem};
use weft_router::port::tap::{Tap, TapPort};
use weft_router::port::udp::{UdpPort, Underlay};
use weft_router::port::xdp::outer::NextHop;
use weft_router::port::xdp::programs::Tunnel;
use weft_router::port::xdp::{
    Attachment, Hops, KernelWay, PodProgram, Verdict, XdpDevice, XdpPort, XdpUnderlay, programs,
};
use weft_router::port::{Batch, Port, Queue};
use weft_router::stats::Stats;
use weft_router::{DropReason, PortId};

use super::bed::{Netns, exclusively, ping, run, transfer, transfer_udp_segmented};

const CHUNKS: u32 = 8192;
const ONE: PortId = PortId(1);
const TWO: PortId = PortId(2);

/// A node with pods on veths whose host ends are `pod1`, `pod2`, ….
struct Pods {
    node: Netns,
    pods: Vec<Netns>,
}

impl Pods {
    fn new(count: usize) -> Pods {
        Pods::with_mtu(count, 1500)
    }

    fn with_mtu(count: usize, mtu: u32) -> Pods {
        let mut pods = Pods { node: Netns::new("xn"), pods: Vec::new() };
        for number in 1..=count {
            let pod = Netns::new(&format!("x{number}"));
            // Frames of the pod are received by one worker, and sent to it by two.
            let (host, peer) = ("numtxqueues 2 numrxqueues 1", "numtxqueues 1 numrxqueues 2");
            let peer = format!("peer name eth0 netns {} mtu {mtu} {peer}", pod.name());
            pods.ip(&format!("link add pod{number} mtu {mtu} {host} type veth {peer}"));
            pods.ip(&format!("link set pod{number} up"));
            configure(&pod, number);
            pods.pods.push(pod);
        }
        pods
    }

    /// Runs `ip` in the node.
    fn ip(&self, args: &str) {
        ip(&self.node, args);
    }

    /// The program goes when its port's thread has closed it.
    fn expect_no_program(&self, number: usize) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.shown(number).contains("prog/xdp") {
            assert!(Instant::now() < deadline, "a program was left behind: {}", self.shown(number));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What `ip link` says of a host end.
    fn shown(&self, number: usize) -> String {
        let said =
            Command::new("ip").args(["-n", self.node.name(), "-d", "link", "show", &format!("pod{number}")]).output();
        String::from_utf8_lossy(&said.unwrap().stdout).into_owned()
    }
}

fn ip(netns: &Netns, args: &str) {
    let command: Vec<&str> = ["ip", "-n", netns.name()].into_iter().chain(args.split(' ')).collect();
    run(&command);
}

/// Gives a pod its addresses.
fn configure(pod: &Netns, number: usize) {
    ip(pod, &format!("address add 10.244.9.{number}/24 dev eth0"));
    ip(pod, &format!("address add fd00:9::{number}/64 dev eth0 nodad"));
    ip(pod, "link set eth0 up");
}

/// The number of a host end, on a thread in the node's namespace.
fn interface(number: usize) -> u32 {
    let any = socket(AddressFamily::INET, SocketType::DGRAM, None).unwrap();
    name_to_index(&any, &format!("pod{number}")).unwrap()
}

fn open(pool: &Pool, umem: &Umem, number: usize) -> XdpPort {
    let device = XdpDevice::open(interface(number), umem).unwrap();
    XdpPort::new(device, pool, PortId(number as u16)).unwrap()
}

/// Passes what one port receives to the other, whatever it is. Returns how many frames.
fn pass(pool: &Pool, stats: &mut Stats, from: &mut dyn Port, to: &mut dyn Port) -> usize {
    let mut batch = Batch::new();
    from.receive(pool, &mut batch, stats).unwrap();
    let count = batch.len();
    let mut queue: Queue = batch.drain(..).collect();
    to.transmit(&mut queue, stats).unwrap();
    queue.drain(..).for_each(|frame| stats.drop(frame, DropReason::QueueFull));
    count
}

/// What carries a pod's frames in the node: what receives from it, and what sends to it. Mostly they are one.
struct Ends {
    port: Box<dyn Port>,
    sender: Option<(Box<dyn Port>, Pool)>,
}

impl From<XdpPort> for Ends {
    fn from(port: XdpPort) -> Ends {
        Ends { port: Box::new(port), sender: None }
    }
}

impl Ends {
    fn to(&mut self) -> &mut dyn Port {
        self.sender.as_mut().map_or(&mut *self.port, |(sender, _)| &mut **sender)
    }
}

/// Runs `traffic` while two ports, which `make` makes in the node's namespace, pass frames to each other. Returns what was
/// counted.
fn between(
    pods: &Pods,
    make: impl FnOnce(&Pool, &Umem) -> (Ends, Ends) + Send,
    traffic: impl FnOnce() + Send,
) -> Stats {
    between_in(pods, || Pool::new(CHUNKS, 64).unwrap(), make, traffic)
}

/// The same, with chunks of this pool.
fn between_in(
    pods: &Pods,
    pool: impl FnOnce() -> Pool + Send,
    make: impl FnOnce(&Pool, &Umem) -> (Ends, Ends) + Send,
    traffic: impl FnOnce() + Send,
) -> Stats {
    let (ready, ended) = (AtomicBool::new(false), AtomicBool::new(false));
    let wire = || {
        let pool = pool();
        let umem = Umem::of(pool.arena());
        let (mut one, mut two) = make(&pool, &umem);
        let mut stats = Stats::default();
        ready.store(true, Ordering::Release);
        while !ended.load(Ordering::Relaxed) {
            let there = pass(&pool, &mut stats, &mut *one.port, two.to());
            if there + pass(&pool, &mut stats, &mut *two.port, one.to()) == 0 {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        let closing = Instant::now();
        drop(one.port);
        assert!(closing.elapsed() < Duration::from_millis(10), "the worker waited {:?}", closing.elapsed());
        drop(two.port);
        settle(&pool);
        assert_eq!(pool.free().1, 64);
        stats
    };
    let stats = std::thread::scope(|scope| {
        let wire = scope.spawn(|| pods.node.inside(wire));
        while !ready.load(Ordering::Acquire) && !wire.is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(traffic));
        ended.store(true, Ordering::Relaxed);
        let stats = wire.join().unwrap();
        result.unwrap();
        stats
    });
    for port in [ONE, TWO] {
        let counted = stats.of(port);
        assert!(counted.in_flight() == 0 && counted.received > 0, "{counted:?}");
    }
    (1..=pods.pods.len()).for_each(|number| pods.expect_no_program(number));
    stats
}

/// Waits until the kernel has given all chunks back.
fn settle(pool: &Pool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while pool.free().0 < CHUNKS as usize {
        assert!(Instant::now() < deadline, "{} of {CHUNKS} chunks came back", pool.free().0);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Everything that goes wrong when checksums or segments do.
fn exercise(one: &Netns, two: &Netns) {
    ping(one, "10.244.9.2");
    ping(two, "fd00:9::1");
    transfer(one, two, "10.244.9.2", 16 << 20);
    transfer(two, one, "fd00:9::1", 16 << 20);
    transfer_udp_segmented(one, two, "10.244.9.2", 1_400, 40);
    transfer_udp_segmented(two, one, "fd00:9::1", 1_400, 40);
    run(&["ip", "netns", "exec", one.name(), "ping", "-c", "2", "-i", "0.2", "-s", "30000", "10.244.9.2"]);
}

#[test]
fn tcp_and_udp_larger_than_the_mtu_pass_between_two_xdp_ports() {
    let _alone = exclusively();
    let pods = Pods::new(2);
    let make = |pool: &Pool, umem: &Umem| (open(pool, umem, 1).into(), open(pool, umem, 2).into());
    let stats = between(&pods, make, || exercise(&pods.pods[0], &pods.pods[1]));
    assert!(stats.of(ONE).received > 10_000, "{:?}", stats.of(ONE));
}

const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages that the kernel keeps ready while this lives.
struct Reserved(u32);

impl Reserved {
    fn new(more: u32) -> Reserved {
        let number = || -> u32 { std::fs::read_to_string(HUGE_PAGES).unwrap().trim().parse().unwrap() };
        let before = number();
        std::fs::write(HUGE_PAGES, (before + more).to_string()).expect("root may reserve huge pages");
        let reserved = Reserved(before);
        assert!(number() >= before + more, "the kernel has no memory for {more} huge pages");
        reserved
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let _ = std::fs::write(HUGE_PAGES, self.0.to_string());
    }
}

#[test]
fn chunks_lie_in_huge_pages_if_there_are_some() {
    let _alone = exclusively();
    let pods = Pods::new(2);
    let _reserved = Reserved::new(CHUNKS * 2 / 1024 + 1);
    let pool = || {
        let pool = Pool::in_huge_pages(CHUNKS, 64).unwrap();
        assert!(pool.arena().is_huge());
        pool
    };
    let make = |pool: &Pool, umem: &Umem| (open(pool, umem, 1).into(), open(pool, umem, 2).into());
    between_in(&pods, pool, make, || exercise(&pods.pods[0], &pods.pods[1]));
    let free = std::fs::read_to_string("/proc/meminfo").unwrap();
    let free = free.lines().find_map(|line| line.strip_prefix("HugePages_Free:")).expect("the kernel has huge pages");
    // One page more than there are.
    let chunks = (free.trim().parse::<u32>().unwrap() + 1) * 1024;
    let pool = Pool::in_huge_pages(chunks, 1).unwrap();
    assert!(!pool.arena().is_huge() && pool.chunk().is_some());
}

#[test]
fn superframes_of_a_tap_are_cut_for_an_xdp_port() {
    let _alone = exclusively();
    let mut pods = Pods::new(1);
    let tap_pod = Netns::new("x2");
    let tap = pods.node.inside(|| Tap::create("tap%d").unwrap());
    pods.ip(&format!("link set {} netns {} name eth0", tap.name(), tap_pod.name()));
    configure(&tap_pod, 2);
    let make = |pool: &Pool, umem: &Umem| {
        let tap = Ends { port: Box::new(TapPort::new(Arc::new(tap), TWO, true)), sender: None };
        (open(pool, umem, 1).into(), tap)
    };
    let stats = between(&pods, make, || exercise(&pods.pods[0], &tap_pod));
    assert!(stats.of(TWO).splits > 5_000, "{:?}", stats.of(TWO));
    pods.pods.push(tap_pod);
}

#[test]
fn jumbo_frames_pass_whole() {
    let _alone = exclusively();
    let pods = Pods::with_mtu(2, 9_000);
    let make = |pool: &Pool, umem: &Umem| (open(pool, umem, 1).into(), open(pool, umem, 2).into());
    let stats = between(&pods, make, || {
        let (one, two) = (&pods.pods[0], &pods.pods[1]);
        run(&["ip", "netns", "exec", one.name(), "ping", "-c", "1", "-M", "do", "-s", "8972", "10.244.9.2"]);
        exercise(one, two);
        transfer_udp_segmented(one, two, "10.244.9.2", 8_900, 7);
    });
    let counted = stats.of(ONE);
    assert!(counted.received_bytes / counted.received > 3_000, "{counted:?}");
}

#[test]
fn a_second_worker_sends_to_a_pod_that_the_first_receives_from() {
    let _alone = exclusively();
    let pods = Pods::new(2);
    let make = |pool: &Pool, umem: &Umem| {
        let mut two = Ends::from(open(pool, umem, 2));
        let others = Pool::new(CHUNKS, 4).unwrap();
        let device = XdpDevice::open_sender(interface(2), 1, &Umem::of(others.arena())).unwrap();
        assert_eq!(
            Errno::from_io_error(&XdpDevice::open_sender(interface(2), 2, umem).unwrap_err()),
            Some(Errno::INVAL)
        );
        let sender = XdpPort::new(device, &others, TWO).unwrap();
        assert_eq!(sender.lent(), (0, 0), "it holds nothing to receive into");
        two.sender = Some((Box::new(sender), others));
        (open(pool, umem, 1).into(), two)
    };
    between(&pods, make, || exercise(&pods.pods[0], &pods.pods[1]));
}

#[test]
fn pods_that_share_a_program_are_told_apart_and_come_and_go_one_by_one() {
    let _alone = exclusively();
    let pods = Pods::new(3);
    let program = Arc::new(PodProgram::load().unwrap());
    let make = |pool: &Pool, umem: &Umem| {
        let [one, two, gone] = [1, 2, 3].map(|number| {
            let device = XdpDevice::open_with(interface(number), umem, &program).unwrap();
            XdpPort::new(device, pool, PortId(number as u16)).unwrap()
        });
        drop(gone);
        pods.expect_no_program(3);
        // A pod that comes back finds its place free.
        let _again = XdpDevice::open_with(interface(3), umem, &program).unwrap();
        (one.into(), two.into())
    };
    between(&pods, make, || exercise(&pods.pods[0], &pods.pods[1]));
    for number in 1..=3 {
        pods.expect_no_program(number);
    }
}

#[test]
fn a_device_that_goes_away_breaks_its_port_and_no_other() {
    let _alone = exclusively();
    let mut pods = Pods::new(2);
    let gone = pods.pods.pop().unwrap();
    pods.node.inside(|| {
        let pool = Pool::new(CHUNKS, 16).unwrap();
        let umem = Umem::of(pool.arena());
        // The second registers the memory, so that the first has to do without it afterwards.
        let (mut two, mut one) = (open(&pool, &umem, 2), open(&pool, &umem, 1));
        let (mut batch, mut stats) = (Batch::new(), Stats::default());
        drop(gone);
        let deadline = Instant::now() + Duration::from_secs(5);
        let error = loop {
            match two.receive(&pool, &mut batch, &mut stats) {
                Err(error) => break error,
                Ok(_) => batch.clear(),
            }
            assert!(Instant::now() < deadline, "nobody noticed");
            std::thread::sleep(Duration::from_millis(5));
        };
        assert_eq!(Errno::from_io_error(&error), Some(Errno::NXIO));
        drop(two);
        one.receive(&pool, &mut batch, &mut stats).unwrap();
        batch.clear();
        drop(one);
        settle(&pool);
        let again = open(&pool, &umem, 1);
        drop(again);
        settle(&pool);
    });
}

#[test]
fn what_a_driver_refuses_is_told_with_the_reason() {
    let _alone = exclusively();
    let pods = Pods::new(1);
    pods.ip("link add bridge type bridge");
    pods.node.inside(|| {
        let any = socket(AddressFamily::INET, SocketType::DGRAM, None).unwrap();
        let map = Map::create(MapKind::Xsk, "none", 4, 4, 1).unwrap();
        let program = Program::load("none", &programs::pod(&map)).unwrap();
        let attach = |index| program.attach(index, Mode::Native).unwrap_err().to_string();
        let bridge = attach(name_to_index(&any, "bridge").unwrap());
        assert!(bridge.contains("the driver has no XDP"), "{bridge}");
        let none = attach(9_999);
        assert!(none.contains("the device is gone"), "{none}");
    });
}

#[test]
fn a_program_of_somebody_else_is_left_alone_and_named() {
    let _alone = exclusively();
    let pods = Pods::new(1);
    pods.node.inside(|| {
        let pool = Pool::new(CHUNKS, 16).unwrap();
        let umem = Umem::of(pool.arena());
        let map = Map::create(MapKind::Xsk, "theirs", 4, 4, 1).unwrap();
        let theirs = Program::load("theirs", &programs::pod(&map)).unwrap().attach(interface(1), Mode::Native).unwrap();
        let error = XdpDevice::open(interface(1), &umem).unwrap_err().to_string();
        assert!(error.contains("another program is attached"), "{error}");
        assert!(pods.shown(1).contains("name theirs") || pods.shown(1).contains("prog/xdp"), "{}", pods.shown(1));
        drop(theirs);
        pods.expect_no_program(1);
        let ours = open(&pool, &umem, 1);
        let device = XdpDevice::open(interface(1), &umem).unwrap_err();
        assert_eq!(Errno::from_io_error(&device), Some(Errno::BUSY), "a queue has one socket");
        drop(ours);
        settle(&pool);
    });
}

/// Names the node's namespace to a process that shall hold a port until it is killed.
const HOLD: &str = "WEFT_TEST_HOLD";

#[test]
fn a_killed_process_leaves_no_program_behind() {
    if let Ok(netns) = std::env::var(HOLD) {
        return hold(&netns);
    }
    let _alone = exclusively();
    let pods = Pods::new(1);
    let itself = std::env::current_exe().unwrap();
    let test = ["--exact", "xdp::a_killed_process_leaves_no_program_behind"];
    let mut holder = Command::new(itself).args(test).env(HOLD, pods.node.name()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while !pods.shown(1).contains("prog/xdp") && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    let attached = pods.shown(1);
    holder.kill().unwrap();
    holder.wait().unwrap();
    assert!(attached.contains("prog/xdp"), "{attached}");
    pods.expect_no_program(1);
    pods.node.inside(|| {
        let pool = Pool::new(CHUNKS, 1).unwrap();
        drop(open(&pool, &Umem::of(pool.arena()), 1));
        settle(&pool);
    });
}

/// The other process's part.
fn hold(netns: &str) {
    let netns = std::fs::File::open(format!("/run/netns/{netns}")).unwrap();
    move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
    let pool = Pool::new(CHUNKS, 1).unwrap();
    let _port = open(&pool, &Umem::of(pool.arena()), 1);
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn attaching_and_detaching_leaks_nothing() {
    let _alone = exclusively();
    let pods = Pods::new(2);
    pods.node.inside(|| {
        let pool = Pool::new(CHUNKS, 16).unwrap();
        let umem = Umem::of(pool.arena());
        let count = |what| std::fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
        let before = (count("fd"), count("map_files"));
        for _ in 0..20 {
            let ports = (open(&pool, &umem, 1), open(&pool, &umem, 2));
            assert!(pool.free().0 < CHUNKS as usize);
            drop(ports);
            settle(&pool);
        }
        let deadline = Instant::now() + Duration::from_secs(5);
        while count("fd") > before.0 {
            assert!(Instant::now() < deadline, "{} descriptors were {}", count("fd"), before.0);
            std::thread::sleep(Duration::from_millis(5));
        }
        // The threads that close leave their stacks for the next ones.
        assert!(count("map_files") <= before.1 + 16, "{} mappings were {}", count("map_files"), before.1);
    });
    (1..=2).for_each(|number| pods.expect_no_program(number));
}

#[test]
fn the_kernel_refuses_descriptors_that_are_wrong_and_goes_on() {
    let _alone = exclusively();
    let pods = Pods::new(1);
    pods.node.inside(|| {
        let pool = Pool::new(64, 1).unwrap();
        let umem = Umem::of(pool.arena());
        let binding = Binding { interface: interface(1), queue: 0, ring: 64, zero_copy: false };
        let (wakeup, mut rings) = Socket::open(&umem, binding).unwrap().into_parts();
        let end = 64 * 2048;
        let wrong = [(end, 60), (end - 30, 60), (2048 - 30, 60), (u64::MAX, 60), (128, 2048), (128, u32::MAX as usize)];
        for (address, len) in wrong {
            assert!(rings.transmit.push(Descriptor::plain(address, len)));
        }
        assert!(rings.transmit.push(Descriptor { options: 1 << 31, ..Descriptor::plain(128, 60) }));
        assert!(rings.transmit.push(Descriptor::plain(128, 60)));
        rings.transmit.submit();
        for _ in 0..20 {
            let _ = wakeup.transmit();
        }
        assert_eq!(rings.transmit.unread(), 0);
        // Some kernels give back those that they refused, too.
        assert_eq!(std::iter::from_fn(|| rings.completion.pop()).last(), Some(128));
        let counted = sockopt::xdp_statistics(wakeup.as_fd()).unwrap();
        assert_eq!(counted.tx_invalid_descs, wrong.len() as u64 + 1);
    });
}

const OURS: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 9, 0, 1)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1))];
const PORT: u16 = 8472;

/// A UDP packet in an Ethernet frame with these VLAN tags.
fn packet(tags: &[u16], to: IpAddr, port: u16) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2([2; 6], [4; 6]);
    let mut bytes = Vec::new();
    let payload = [7; 30];
    let address4 = |to: Ipv4Addr| ([10, 9, 0, 2], to.octets(), 64);
    let address6 = |to: Ipv6Addr| ([0xfd; 16], to.octets(), 64);
    let id = |tag: &u16| VlanId::try_new(*tag).unwrap();
    let builder = match (tags, to) {
        ([], IpAddr::V4(to)) => {
            let a = address4(to);
            builder.ipv4(a.0, a.1, a.2)
        }
        ([], IpAddr::V6(to)) => {
            let a = address6(to);
            builder.ipv6(a.0, a.1, a.2)
        }
        ([one], IpAddr::V4(to)) => {
            let a = address4(to);
            builder.single_vlan(id(one)).ipv4(a.0, a.1, a.2)
        }
        ([one], IpAddr::V6(to)) => {
            let a = address6(to);
            builder.single_vlan(id(one)).ipv6(a.0, a.1, a.2)
        }
        ([one, two, ..], IpAddr::V4(to)) => {
            let a = address4(to);
            builder.double_vlan(id(one), id(two)).ipv4(a.0, a.1, a.2)
        }
        ([one, two, ..], IpAddr::V6(to)) => {
            let a = address6(to);
            builder.double_vlan(id(one), id(two)).ipv6(a.0, a.1, a.2)
        }
    };
    builder.udp(5_000, port).write(&mut bytes, &payload).unwrap();
    bytes
}

#[test]
fn the_uplinks_program_takes_our_tunnels_packets_and_nothing_else() {
    let _alone = exclusively();
    let sockets = Map::create(MapKind::Xsk, "none", 4, 4, 1).unwrap();
    let tunnel = Tunnel { addresses: OURS.to_vec(), port: PORT, vlan: None, secret: 7 };
    // Where there is no socket, what would have been taken is dropped here, so that it can be told apart.
    let program = Program::load("uplink", &programs::uplink(&sockets, &tunnel, Verdict::Drop)).unwrap();
    let judge = |bytes: &[u8]| {
        let (verdict, after) = program.run(bytes).unwrap();
        assert_eq!(after, bytes, "it changes nothing");
        assert!(verdict == Verdict::Drop as u32 || verdict == Verdict::Pass as u32, "{verdict}");
        verdict == Verdict::Drop as u32
    };
    for to in OURS {
        for tags in [&[][..], &[100], &[100, 200]] {
            let good = packet(tags, to, PORT);
            assert!(judge(&good), "{to} behind {tags:?}");
            assert!(!judge(&packet(tags, to, PORT + 1)), "another port");
            let (ip, family) = (14 + 4 * tags.len(), u8::from(to.is_ipv6()));
            let header = [28, 48][usize::from(family)];
            (14..ip + header).for_each(|len| assert!(!judge(&good[..len]), "cut to {len} bytes"));
            assert!(judge(&good[..ip + header]));
            let last = ip + [19, 39][usize::from(family)];
            let protocol = ip + [9, 6][usize::from(family)];
            for (at, what) in [(last, "another address"), (protocol, "another protocol"), (ip - 1, "another type")] {
                let mut other = good.clone();
                other[at] ^= 1;
                assert!(!judge(&other), "{what}");
            }
        }
    }
    let mut options = packet(&[], OURS[0], PORT);
    options[14] = 0x46;
    assert!(!judge(&options));
    for flags in [[0x20, 0], [0, 1], [0x1f, 0xff]] {
        let mut fragment = packet(&[], OURS[0], PORT);
        fragment[20..22].copy_from_slice(&flags);
        assert!(!judge(&fragment), "{flags:?}");
    }
    let mut third = packet(&[1, 2], OURS[0], PORT);
    third[20..22].copy_from_slice(&[0x81, 0]);
    assert!(!judge(&third));
    let without = Program::load("uplink", &programs::uplink(&sockets, &tunnel, Verdict::Pass)).unwrap();
    assert_eq!(without.run(&packet(&[], OURS[0], PORT)).unwrap().0, Verdict::Pass as u32);
}

#[test]
fn an_uplink_in_use_leaves_the_nodes_own_traffic_alone() {
    let _alone = exclusively();
    let pods = Pods::new(1);
    // Here `pod1` is the node's uplink, and the pod another machine.
    pods.ip("address add 10.244.9.100/24 dev pod1");
    let (own, other) = ("10.244.9.100", &pods.pods[0]);
    let listener = pods.node.inside(|| UdpSocket::bind((own, PORT)).unwrap());
    listener.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let sender = other.inside(|| UdpSocket::bind("10.244.9.1:0").unwrap());
    let say = |text: &[u8]| sender.send_to(text, (own, PORT)).map(drop).unwrap();
    ping(other, own);
    pods.node.inside(|| {
        let pool = Pool::new(CHUNKS, 1).unwrap();
        let umem = Umem::of(pool.arena());
        let binding = Binding { interface: interface(1), queue: 0, ring: 2048, zero_copy: false };
        let socket = Socket::open(&umem, binding).unwrap();
        let tunnel = Tunnel { addresses: vec![own.parse().unwrap()], port: PORT, vlan: None, secret: 7 };
        let attachment = Attachment::uplink(interface(1), &[&socket], &tunnel, Mode::Native).unwrap();
        let mut port = XdpPort::new(XdpDevice::new(attachment, socket), &pool, PortId(1)).unwrap();
        let mut receive = || {
            let (mut batch, mut stats) = (Batch::new(), Stats::default());
            port.receive(&pool, &mut batch, &mut stats).unwrap();
            batch.drain(..).map(|frame| frame.to_vec()).collect::<Vec<_>>()
        };
        ping(other, own);
        transfer(other, &pods.node, own, 4 << 20);
        assert!(receive().is_empty(), "it took what is not ours");
        say(b"ours");
        let deadline = Instant::now() + Duration::from_secs(2);
        let taken = loop {
            let taken = receive();
            if !taken.is_empty() || Instant::now() > deadline {
                break taken;
            }
        };
        assert_eq!(taken.len(), 1);
        assert!(taken[0].ends_with(b"ours"));
        // Larger than the MTU: the kernel puts the fragments together for the UDP socket.
        say(&[9; 3_000]);
        let mut datagram = [0; 4_000];
        assert_eq!(listener.recv(&mut datagram).unwrap(), 3_000);
        drop(port);
        settle(&pool);
    });
    pods.expect_no_program(1);
    say(b"back again");
    let mut datagram = [0; 100];
    assert_eq!(listener.recv(&mut datagram).unwrap(), 10);
}

const TUNNEL: [u8; 8] = [8, 0, 0, 0, 0, 0, 1, 0];

/// An inner UDP datagram behind a tunnel header, to be cut into datagrams of `size` bytes if that is not 0.
fn tunnelled(len: usize, size: u16, to: IpAddr, pool: &Pool) -> Frame {
    let payload: Vec<u8> = (0..len as u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut bytes = TUNNEL.to_vec();
    let builder = PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4([10, 244, 1, 2], [10, 244, 2, 2], 64).udp(7, 9);
    builder.write(&mut bytes, &payload).unwrap();
    let pseudo = pseudo_v4([10, 244, 1, 2].into(), [10, 244, 2, 2].into(), 17, 8 + len as u32).fold();
    bytes[48..50].copy_from_slice(&pseudo.to_be_bytes());
    let mut frame = Frame::from_bytes(&bytes, ONE, pool).unwrap();
    frame.offload.partial = Some(Partial { start: 34, offset: 6 });
    frame.offload.gso = (size > 0).then_some(Gso { kind: GsoKind::Udp, ecn: false, size, header_len: 42 });
    frame.outer = Some(Outer { entropy: 77, ..Outer::vxlan(to) });
    frame
}

/// Sends frames by one port, and returns the payload that comes out of the other, and whom it came from.
fn carry(pool: &Pool, from: &mut dyn Port, to: &mut dyn Port, frames: Vec<Frame>) -> (Vec<u8>, Vec<IpAddr>) {
    let (mut stats, mut batch) = (Stats::default(), Batch::new());
    let wanted: usize = frames.iter().map(|frame| frame.len() - 50).sum();
    frames.iter().for_each(|frame| stats.received(frame));
    let mut queue: Queue = frames.into();
    let (mut payload, mut peers) = (Vec::new(), Vec::new());
    let deadline = Instant::now() + Duration::from_secs(5);
    while payload.len() < wanted {
        assert!(Instant::now() < deadline, "{} of {wanted} bytes came: {:?}", payload.len(), stats.of(ONE));
        from.transmit(&mut queue, &mut stats).unwrap();
        to.receive(pool, &mut batch, &mut stats).unwrap();
        for frame in batch.drain(..) {
            peers.push(frame.outer.unwrap().peer);
            let bytes = frame.to_vec();
            assert_eq!(bytes[..8], TUNNEL);
            payload.extend_from_slice(&bytes[50..]);
        }
    }
    assert!(queue.is_empty());
    (payload, peers)
}

/// Two nodes, each with an address of both families and a MAC that says its number.
fn underlays() -> [Netns; 2] {
    let nodes = [Netns::new("u1"), Netns::new("u2")];
    let queues = "numrxqueues 1 numtxqueues 1";
    let first = format!("link add up0 address 02:00:00:00:00:01 {queues} type veth");
    let second = format!("peer name up0 address 02:00:00:00:00:02 netns {} {queues}", nodes[1].name());
    ip(&nodes[0], &format!("{first} {second}"));
    for (number, netns) in (1..).zip(&nodes) {
        ip(netns, &format!("address add 10.200.0.{number}/24 dev up0"));
        ip(netns, &format!("address add fd00:200::{number}/64 dev up0 nodad"));
        ip(netns, "link set up0 up");
    }
    nodes
}

#[test]
fn an_xdp_underlay_and_the_kernels_udp_understand_each_other() {
    let _alone = exclusively();
    for (here, there) in [("10.200.0.1", "10.200.0.2"), ("fd00:200::1", "fd00:200::2")] {
        let (here, there): (IpAddr, IpAddr) = (here.parse().unwrap(), there.parse().unwrap());
        let nodes = underlays();
        let pool = Pool::new(CHUNKS, 64).unwrap();
        let umem = Umem::of(pool.arena());
        let tunnel = Tunnel { addresses: vec![here], port: PORT, vlan: None, secret: 7 };
        let udp = |node: &Netns, address| {
            let underlay = node.inside(|| Underlay::open((address, PORT).into(), 4).unwrap());
            UdpPort::new(underlay.into_sockets().remove(0), ONE, 1450)
        };
        let device = nodes[0].inside(|| {
            let any = socket(AddressFamily::INET, SocketType::DGRAM, None).unwrap();
            let interface = name_to_index(&any, "up0").unwrap();
            let binding = Binding { interface, queue: 0, ring: 2048, zero_copy: false };
            let socket = Socket::open(&umem, binding).unwrap();
            let attachment = Attachment::uplink(interface, &[&socket], &tunnel, Mode::Native).unwrap();
            XdpDevice::new(attachment, socket)
        });
        let hops = Arc::new(ArcSwap::from_pointee(Hops::default()));
        let kernel = KernelWay::new(Box::new(udp(&nodes[0], here)));
        let mut xdp = XdpUnderlay::new(vec![device], tunnel, Arc::clone(&hops), kernel, &pool, ONE).unwrap();
        let mut other = udp(&nodes[1], there);
        let sizes = [(18, 0), (1_300, 0), (20_000, 1_300)];
        let expected =
            |frames: &[Frame]| frames.iter().flat_map(|frame| frame.to_vec().split_off(50)).collect::<Vec<_>>();
        // At first the node's next hop is not known, and the kernel finds it. In the end the path is too narrow for most.
        for (known, mtu) in [(false, 0), (true, 1500), (true, 1280)] {
            if known {
                let [source, target] = [1, 2].map(|last| Mac([2, 0, 0, 0, 0, last]));
                let hop = NextHop { source, target, vlan: None, mtu };
                hops.store(Arc::new([(there, hop.into())].into_iter().collect()));
            }
            for (len, size) in sizes {
                let frames: Vec<Frame> = (0..3).map(|_| tunnelled(len, size, there, &pool)).collect();
                let payload = expected(&frames);
                let (came, peers) = carry(&pool, &mut xdp, &mut other, frames);
                assert!(came == payload && peers.iter().all(|peer| *peer == here), "{len} bytes, {known} {mtu}");
                let frames: Vec<Frame> = (0..3).map(|_| tunnelled(len, size, here, &pool)).collect();
                let payload = expected(&frames);
                let (came, peers) = carry(&pool, &mut other, &mut xdp, frames);
                assert!(came == payload && peers.iter().all(|peer| *peer == there), "{len} bytes back, {known}");
            }
        }
        ping(&nodes[1], &here.to_string());
        drop((xdp, other));
        settle(&pool);
    }
}
