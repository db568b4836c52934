//! Namespaces with pods and nodes in them, and traffic between them.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use weft_encap::mac::Mac;
use weft_router::PortSnapshot;
use weft_router::pace::Limits;
use weft_router::port::sys::message::{self, Message};
use weft_router::port::tap::Tap;
use weft_router::port::udp::Underlay;
use weft_router::tables::{Dhcp, Gateway, Node as Peer, NodeId, Pod, Tables, Via};
use weft_router::{Device, PortId, Router, RouterConfig};

const UNDERLAY: PortId = PortId(0);
const TUNNEL_PORT: u16 = 8472;

/// One test at a time: they measure, and the machine is small.
pub fn exclusively() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    assert!(rustix::process::geteuid().is_root(), "this test needs root: run it as root, or with `sudo -E cargo test`");
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a command that must succeed.
pub fn run(command: &[&str]) {
    let output = Command::new(command[0]).args(&command[1..]).output();
    let output =
        output.unwrap_or_else(|error| panic!("{}: {error}; apt-get install iproute2 iputils-ping ethtool", command[0]));
    assert!(output.status.success(), "{}: {}{}", command.join(" "), text(&output.stdout), text(&output.stderr));
}

fn text(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

/// A network namespace that is removed when it is dropped.
pub struct Netns {
    name: String,
}

impl Netns {
    pub fn new(tag: &str) -> Netns {
        let name = format!("weft-t{}-{tag}", std::process::id());
        run(&["ip", "netns", "add", &name]);
        let netns = Netns { name };
        run(&["ip", "-n", netns.name(), "link", "set", "lo", "up"]);
        netns
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs something on a thread of its own in this namespace.
    pub fn inside<T: Send>(&self, what: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| scope.spawn(|| self.enter(what)).join().unwrap())
    }

    fn enter<T>(&self, what: impl FnOnce() -> T) -> T {
        let netns = std::fs::File::open(format!("/run/netns/{}", self.name)).unwrap();
        move_into_link_name_space(std::os::fd::AsFd::as_fd(&netns), Some(LinkNameSpaceType::Network)).unwrap();
        what()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// A node: a namespace with a router, and the tables that it shall have. Its pods are 10.244.N.2 and on.
pub struct Node {
    number: u8,
    router: Option<Router>,
    pods: Vec<(PortId, Pod)>,
    peers: Vec<Peer>,
    has_underlay: bool,
    epoch: u64,
    netns: Netns,
}

impl Node {
    pub fn new(number: u8) -> Node {
        let netns = Netns::new(&format!("n{number}"));
        let mut node =
            Node { number, router: None, pods: Vec::new(), peers: Vec::new(), has_underlay: false, epoch: 0, netns };
        node.router = Some(Router::start(RouterConfig::default(), node.tables()).unwrap());
        node
    }

    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    pub fn router(&self) -> &Router {
        self.router.as_ref().unwrap()
    }

    pub fn vtep_mac(&self) -> Mac {
        Mac([2, 0xee, 0, 0, 0, self.number])
    }

    pub fn underlay(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 200, 0, self.number)
    }

    /// Makes a TAP in the node's namespace and moves it into that of a new pod.
    pub fn add_pod(&mut self, number: u8) -> Netns {
        let pod = Netns::new(&format!("n{}p{number}", self.number));
        let tap = self.netns.inside(|| Tap::create("weft%d")).unwrap();
        let mac = Mac([2, 0xaa, 0, 0, self.number, number]);
        let (node, name) = (self.netns.name(), tap.name());
        run(&["ip", "-n", node, "link", "set", name, "netns", pod.name(), "name", "eth0", "address", &mac.to_string()]);
        let ipv4 = Ipv4Addr::new(10, 244, self.number, number + 1);
        let ipv6 = Ipv6Addr::new(0xfd00, 0x10, 0x244, self.number.into(), 0, 0, 0, u16::from(number) + 1);
        let ip = |arguments: &[&str]| run(&[&["ip", "-n", pod.name()], arguments].concat());
        ip(&["link", "set", "eth0", "mtu", "1450"]);
        ip(&["address", "add", &format!("{ipv4}/24"), "dev", "eth0"]);
        ip(&["address", "add", &format!("{ipv6}/64"), "dev", "eth0", "nodad"]);
        ip(&["link", "set", "eth0", "up"]);
        ip(&["route", "add", "default", "via", &format!("10.244.{}.1", self.number)]);
        ip(&["-6", "route", "add", "default", "via", &format!("fd00:10:244:{}::1", self.number)]);
        let port = PortId(number.into());
        self.router().add_port(port, Device::Tap(tap)).unwrap();
        self.pods.push((
            port,
            Pod {
                mac,
                ipv4: vec![ipv4],
                ipv6: vec![ipv6],
                mtu: 1450,
                limits: Limits::default(),
                dhcp: Dhcp::default(),
            },
        ));
        pod
    }

    pub fn open_underlay(&mut self) {
        let local = SocketAddr::new(self.underlay().into(), TUNNEL_PORT);
        let underlay = self.netns.inside(|| Underlay::open(local, 16)).unwrap();
        self.router().add_port(UNDERLAY, Device::Underlay(underlay)).unwrap();
        self.has_underlay = true;
    }

    pub fn add_peer(&mut self, peer: &Peer) {
        self.peers.push(peer.clone());
    }

    /// This node as others see it.
    pub fn as_peer(&self) -> Peer {
        peer(self.number, self.vtep_mac())
    }

    /// Puts what was added in force.
    pub fn apply(&mut self) {
        self.epoch += 1;
        self.router().set_tables(self.tables());
    }

    /// The same, with something that is not said otherwise.
    pub fn apply_with(&mut self, change: impl FnOnce(&mut Tables)) {
        self.epoch += 1;
        let mut tables = self.tables();
        change(&mut tables);
        self.router().set_tables(tables);
    }

    fn tables(&self) -> Tables {
        let number = self.number;
        let mut tables = Tables::empty(Gateway {
            mac: Mac([2, 0, 0, 0, 0, 1]),
            ipv4: Some(Ipv4Addr::new(10, 244, number, 1)),
            ipv6: Some(Ipv6Addr::new(0xfd00, 0x10, 0x244, number.into(), 0, 0, 0, 1)),
        });
        tables.epoch = self.epoch;
        tables.vtep_mac = self.vtep_mac();
        if self.has_underlay {
            tables.add_underlay(UNDERLAY);
        }
        for (port, pod) in &self.pods {
            tables.add_pod(*port, pod.clone());
        }
        for range in ranges(number) {
            tables.add_route(range, Via::Local);
        }
        for (index, peer) in self.peers.iter().enumerate() {
            tables.add_node(NodeId(index as u16), peer.clone());
        }
        tables
    }

    /// Waits until no frame is in flight, asserts that each was accounted for, and returns the counters.
    pub fn settle(&self) -> Vec<PortSnapshot> {
        let started = Instant::now();
        loop {
            let snapshot = self.router().snapshot(false).unwrap();
            let in_flight: Vec<i64> = snapshot.ports.iter().map(|port| port.stats.in_flight()).collect();
            if in_flight.iter().all(|frames| *frames == 0) {
                for port in &snapshot.ports {
                    let faults = port.stats.dropped[weft_router::DropReason::RouterFault as usize];
                    assert_eq!((port.stats.overruns, faults), (0, 0), "port {}", port.id);
                }
                return snapshot.ports;
            }
            assert!(started.elapsed() < Duration::from_secs(5), "frames in flight by port: {in_flight:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn ranges(number: u8) -> [ipnet::IpNet; 2] {
    [format!("10.244.{number}.0/24"), format!("fd00:10:244:{number}::/64")].map(|range| range.parse().unwrap())
}

fn peer(number: u8, vtep_mac: Mac) -> Peer {
    Peer::new(Ipv4Addr::new(10, 200, 0, number).into(), vtep_mac, ranges(number).to_vec())
}

/// Makes a namespace node 2 with a VXLAN device of the kernel: not learning, neighbours and FDB permanent.
pub fn make_kernel_node(kernel: &Netns, node: &Node) -> Peer {
    let mac = Mac([2, 0xee, 0, 0, 0, 2]);
    let ours = node.vtep_mac().to_string();
    let ip = |arguments: &str| {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        run(&[&["ip", "-n", kernel.name()][..], &arguments].concat());
    };
    ip("link add vx0 type vxlan id 1 dstport 8472 local 10.200.0.2 dev up0 nolearning");
    ip(&format!("link set vx0 address {mac} up"));
    ip("address add 10.244.2.1/32 dev vx0");
    ip("address add fd00:10:244:2::1/128 dev vx0 nodad");
    ip(&format!("neigh add 10.244.1.1 lladdr {ours} dev vx0 nud permanent"));
    ip(&format!("neigh add fd00:10:244:1::1 lladdr {ours} dev vx0 nud permanent"));
    ip("route add 10.244.1.0/24 via 10.244.1.1 dev vx0 onlink");
    ip("-6 route add fd00:10:244:1::/64 via fd00:10:244:1::1 dev vx0 onlink");
    run(&["bridge", "-n", kernel.name(), "fdb", "add", &ours, "dev", "vx0", "dst", "10.200.0.1"]);
    peer(2, mac)
}

/// Three pings, of which all must be answered once neighbours are known.
pub fn ping(from: &Netns, to: &str) {
    run(&["ip", "netns", "exec", from.name(), "ping", "-c", "3", "-i", "0.2", "-W", "2", to]);
}

fn bytes_of(len: usize, start: usize) -> Vec<u8> {
    (start..start + len).map(|index| ((index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// Sends so many bytes by TCP and compares each.
pub fn transfer(from: &Netns, to: &Netns, address: &str, len: usize) {
    const PIECE: usize = 1 << 20;
    let address: IpAddr = address.parse().unwrap();
    let listener = to.inside(|| TcpListener::bind((address, 0)).unwrap());
    let target = listener.local_addr().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut stream = from.enter(|| TcpStream::connect_timeout(&target, Duration::from_secs(5)).unwrap());
            stream.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
            for start in (0..len).step_by(PIECE) {
                stream.write_all(&bytes_of(PIECE.min(len - start), start)).unwrap();
            }
        });
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut piece = vec![0; PIECE];
        for start in (0..len).step_by(PIECE) {
            let piece = &mut piece[..PIECE.min(len - start)];
            stream.read_exact(piece).unwrap();
            assert!(*piece == bytes_of(piece.len(), start), "bytes from {start} on arrived changed");
        }
    });
}

/// Has the kernel cut a UDP superframe into `count` datagrams of `size` bytes, and compares what arrives.
pub fn transfer_udp_segmented(from: &Netns, to: &Netns, address: &str, size: usize, count: usize) {
    let address: IpAddr = address.parse().unwrap();
    let receiver = to.inside(|| UdpSocket::bind((address, 0)).unwrap());
    receiver.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let any: IpAddr = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let sender = from.inside(|| UdpSocket::bind((any, 0)).unwrap());
    let sent = bytes_of(size * count - 7, 0);
    let messages = [Message { to: receiver.local_addr().unwrap(), tos: 0, slices: 0..1, segment: size as u16 }];
    message::send(&sender, &messages, &[std::io::IoSlice::new(&sent)]).unwrap();
    let (mut received, mut datagram) = (Vec::new(), vec![0; 70_000]);
    while received.len() < sent.len() {
        let len = receiver
            .recv(&mut datagram)
            .unwrap_or_else(|error| panic!("{error} after {} of {} bytes to {address}", received.len(), sent.len()));
        assert_eq!(len, size.min(sent.len() - received.len()));
        received.extend_from_slice(&datagram[..len]);
    }
    assert!(received == sent, "datagrams arrived changed or out of order");
}

/// CPU time of the worker threads of this process.
pub fn worker_cpu() -> Duration {
    let mut total = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let path = task.unwrap().path();
        let read = |file| std::fs::read_to_string(path.join(file)).unwrap_or_default();
        if read("comm").starts_with("weft-worker") {
            // schedstat(proc): time on a CPU in nanoseconds comes first.
            total += read("schedstat").split(' ').next().and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    Duration::from_nanos(total)
}
