//! AF_XDP ports against a real kernel: two pods on veths, and between them two ports and nothing else.

use std::collections::HashSet;
use std::net::UdpSocket;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use weft_router::pool::Pool;
use weft_router::port::sys::bpf::{Map, MapKind, Mode, Program};
use weft_router::port::sys::xsk::{Binding, Socket, Umem};
use weft_router::port::xdp::{Verdict, XdpDevice, XdpPort, programs};
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
        let mut pods = Pods { node: Netns::new("xn"), pods: Vec::new() };
        for number in 1..=count {
            pods.pods.push(Netns::new(&format!("x{number}")));
            pods.connect(number);
        }
        pods
    }

    fn connect(&self, number: usize) {
        let (node, pod) = (self.node.name(), self.pods[number - 1].name());
        let host = format!("pod{number}");
        run(&[
            "ip",
            "-n",
            node,
            "link",
            "add",
            &host,
            "numtxqueues",
            "1",
            "numrxqueues",
            "1",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            pod,
            "numtxqueues",
            "1",
            "numrxqueues",
            "1",
        ]);
        run(&["ip", "-n", node, "link", "set", &host, "up"]);
        run(&["ip", "-n", pod, "address", "add", &format!("10.244.9.{number}/24"), "dev", "eth0"]);
        run(&["ip", "-n", pod, "address", "add", &format!("fd00:9::{number}/64"), "dev", "eth0", "nodad"]);
        run(&["ip", "-n", pod, "link", "set", "eth0", "up"]);
    }

    /// What `ip link` says of a host end.
    fn shown(&self, number: usize) -> String {
        let said =
            Command::new("ip").args(["-n", self.node.name(), "-d", "link", "show", &format!("pod{number}")]).output();
        String::from_utf8_lossy(&said.unwrap().stdout).into_owned()
    }
}

fn interface(number: usize) -> u32 {
    rustix::net::netdevice::name_to_index(
        rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None).unwrap(),
        &format!("pod{number}"),
    )
    .unwrap()
}

fn open(pool: &Pool, umem: &Umem, number: usize) -> XdpPort {
    let device = XdpDevice::open(interface(number), umem).unwrap();
    XdpPort::new(device, pool, PortId(number as u16)).unwrap()
}

/// Passes what one port receives to the other, whatever it is. Returns how many frames.
fn pass(pool: &Pool, stats: &mut Stats, from: &mut XdpPort, to: &mut XdpPort) -> usize {
    let mut batch = Batch::new();
    from.receive(pool, &mut batch, stats).unwrap();
    let count = batch.len();
    let mut queue: Queue = batch.drain(..).collect();
    to.transmit(&mut queue, stats).unwrap();
    queue.drain(..).for_each(|frame| stats.drop(frame, DropReason::QueueFull));
    count
}

/// Runs `traffic` while two ports pass frames to each other; what is counted at the end is returned.
fn between(pods: &Pods, traffic: impl FnOnce() + Send) -> Stats {
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let wire = scope.spawn(|| {
            pods.node.inside(|| {
                let pool = Pool::new(CHUNKS, 16).unwrap();
                let umem = Umem::of(pool.arena());
                let (mut one, mut two) = (open(&pool, &umem, 1), open(&pool, &umem, 2));
                let mut stats = Stats::default();
                while !ended.load(Ordering::Relaxed) {
                    let passed =
                        pass(&pool, &mut stats, &mut one, &mut two) + pass(&pool, &mut stats, &mut two, &mut one);
                    if passed == 0 {
                        std::thread::sleep(Duration::from_micros(50));
                    }
                }
                let closing = Instant::now();
                drop(one);
                let took = closing.elapsed();
                drop(two);
                println!("closing took {took:?}, both {:?}", closing.elapsed());
                assert_eq!(pool.free().0, CHUNKS as usize, "chunks were lost");
                stats
            })
        });
        let traffic = scope.spawn(move || {
            // The devices become ports first.
            let deadline = Instant::now() + Duration::from_secs(5);
            while !(1..=2).all(|number| pods.shown(number).contains("prog/xdp")) {
                assert!(Instant::now() < deadline, "no program is attached: {}", pods.shown(1));
                std::thread::sleep(Duration::from_millis(5));
            }
            traffic();
        });
        let result = traffic.join();
        ended.store(true, Ordering::Relaxed);
        let stats = wire.join().unwrap();
        result.unwrap();
        for port in [ONE, TWO] {
            let counted = stats.of(port);
            assert_eq!(counted.in_flight(), 0, "{counted:?}");
        }
        for number in 1..=2 {
            assert!(!pods.shown(number).contains("xdp"), "a program was left behind: {}", pods.shown(number));
        }
        stats
    })
}

#[test]
fn tcp_and_udp_larger_than_the_mtu_pass_between_two_xdp_ports() {
    let _alone = exclusively();
    let pods = Pods::new(2);
    let (one, two) = (&pods.pods[0], &pods.pods[1]);
    let stats = between(&pods, || {
        ping(one, "10.244.9.2");
        ping(two, "fd00:9::1");
        transfer(one, two, "10.244.9.2", 16 << 20);
        transfer(two, one, "fd00:9::1", 16 << 20);
        transfer_udp_segmented(one, two, "10.244.9.2", 1_400, 40);
        run(&["ip", "netns", "exec", one.name(), "ping", "-c", "2", "-i", "0.2", "-s", "30000", "10.244.9.2"]);
    });
    let counted = stats.of(ONE);
    assert!(counted.received > 10_000, "{counted:?}");
}
