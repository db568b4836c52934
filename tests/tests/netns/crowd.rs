//! Masquerade when it is crowded: tens of thousands of connections, a pod that opens them without end, and messages that lie about them.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Lines, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, ChildStdout, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use weft_encap::mac::Mac;
use weft_tests::command::eventually;
use weft_tests::frames::{L2, L3, internet_checksum, tcp};
use weft_tests::machine::{raise_descriptor_limit, turn};
use weft_tests::netns::{Netns, OwnNetns};
use weft_tests::wire::Wire;

use super::masquerade::{Outside, SERVER, SERVER6, echo, is_echoed};

const PATIENCE: Duration = Duration::from_secs(10);
const PODS: usize = 20;
/// A multiple of the ports, so that all of them have as many.
const PER_POD: usize = 3008;
const PORTS: usize = 16;

/// One end of many connections, a process of its own: see the program `crowd`.
struct End {
    process: Child,
    said: Lines<BufReader<ChildStdout>>,
}

impl End {
    fn start(netns: &Netns, arguments: &str) -> End {
        let mut command = netns.command(env!("CARGO_BIN_EXE_crowd"));
        command.args(arguments.split(' ')).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().expect("it is built with the tests");
        let said = BufReader::new(process.stdout.take().expect("it is piped")).lines();
        End { process, said }
    }

    fn hear(&mut self) -> String {
        self.said.next().expect("it says something").expect("it can be read")
    }

    fn go_on(&mut self) {
        let input = self.process.stdin.as_mut().expect("it is piped");
        input.write_all(b"go on\n").expect("it is waiting");
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn sixty_thousand_connections_of_twenty_pods_to_sixteen_ports_share_ten_thousand() {
    let _turn = turn();
    raise_descriptor_limit(5000);
    let outside = Outside::new("cs", "first_port = 50000\nlast_port = 59999\n", PODS);
    let each = PODS * PER_POD / PORTS;
    let mut servers: Vec<End> =
        (0..PORTS).map(|port| End::start(&outside.server, &format!("listen {} {each}", 8000 + port))).collect();
    servers.iter_mut().for_each(|server| assert_eq!(server.hear(), "ready"));
    let begun = Instant::now();
    let connect =
        |(pod, netns): (usize, &OwnNetns)| End::start(netns, &format!("connect {SERVER} 8000 {PORTS} {PER_POD} {pod}"));
    let mut clients: Vec<End> = outside.pods.iter().enumerate().map(connect).collect();
    let seen = thread::scope(|scope| {
        let listen = |server: &mut End| (0..each).map(|_| server.hear().parse().unwrap()).collect::<Vec<SocketAddr>>();
        let heard: Vec<_> = servers.iter_mut().map(|server| scope.spawn(move || listen(server))).collect();
        clients.iter_mut().for_each(|client| assert_eq!(client.hear(), "ready"));
        heard.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    println!("{} connections in {:?}", PODS * PER_POD, begun.elapsed());
    // Each is another one to the server, and all of them are the node's.
    let node = IpAddr::from(outside.node.underlay());
    for from in &seen {
        assert_eq!(from.iter().collect::<HashSet<_>>().len(), each);
        assert!(from.iter().all(|from| from.ip() == node && (50_000..60_000).contains(&from.port())));
    }
    let told = outside.node.daemon().status().masquerade.expect("it is on");
    assert!(told.sessions >= PODS * PER_POD && told.pods >= PODS && told.taken_back == 0, "{told:?}");
    // What the server says to each arrives at the one that it speaks with.
    clients.iter_mut().for_each(End::go_on);
    for client in &mut clients {
        assert_eq!(client.hear(), "right");
    }
    assert_eq!(outside.node.daemon().drops("MasqueradePorts"), 0);
    outside.assert_well();
}

fn mac_of(netns: &Netns, ifname: &str) -> Mac {
    let links: serde_json::Value = serde_json::from_str(&netns.ip(&format!("-j link show {ifname}"))).unwrap();
    links[0]["address"].as_str().unwrap().parse().unwrap()
}

/// A pod that opens connections to anybody, as fast as it can; how many it has tried.
fn flood(pod: &OwnNetns, address: Ipv4Addr, gateway: Mac, is_over: &AtomicBool, tried: &AtomicU64) {
    let wire = Wire::open(pod, "eth0");
    let l2 = L2 { src: mac_of(pod, "eth0"), dst: gateway };
    let mut state = 1_u32;
    let mut frame = tcp(l2, L3::new(address, Ipv4Addr::new(198, 18, 0, 1)), (1024, 80), 1, &[]);
    frame[47] = 2;
    while !is_over.load(Ordering::Relaxed) {
        for _ in 0..64 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            frame[32..34].copy_from_slice(&state.to_be_bytes()[..2]);
            frame[34..36].copy_from_slice(&((state >> 8) as u16 | 1024).to_be_bytes());
            frame[24..26].fill(0);
            let sum = internet_checksum(&frame[14..34]);
            frame[24..26].copy_from_slice(&sum.to_be_bytes());
            // What its queue does not take any more is lost to itself.
            let _ = wire.offer(&frame);
        }
        tried.fetch_add(64, Ordering::Relaxed);
    }
}

#[test]
fn a_pod_that_opens_connections_without_end_harms_itself_alone() {
    let _turn = turn();
    let outside = Outside::new("cf", "", 3);
    // To where it sends nobody is, and nobody says so.
    outside.router.ip("route add blackhole 198.18.0.0/15");
    echo(&outside.server, 8000);
    let (node, daemon) = (&outside.node, outside.node.daemon());
    let address = |pod: usize| outside.address(pod);
    let gateway = {
        let said = outside.pods[0].ip("-j neigh show 10.244.1.1");
        let neighbours: serde_json::Value = serde_json::from_str(&said).unwrap();
        neighbours[0]["lladdr"].as_str().unwrap_or_else(|| panic!("{said}")).parse().unwrap()
    };
    let to = SocketAddr::new(SERVER.parse().unwrap(), 8000);
    let open = |pod: usize| {
        let stream = outside.pods[pod].inside(|| TcpStream::connect_timeout(&to, PATIENCE)).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        Some(stream)
    };
    let mut established: Vec<TcpStream> = (0..3).map(|pod| open(pod).expect("it listens")).collect();
    let (is_over, tried) = (AtomicBool::new(false), AtomicU64::new(0));
    let before = daemon.resident_kib();
    thread::scope(|scope| {
        let _over = Over(&is_over);
        scope.spawn(|| flood(&outside.pods[0], address(0), gateway, &is_over, &tried));
        let begun = Instant::now();
        eventually("the flood has used its share up", Duration::from_secs(30), || {
            daemon.drops("MasqueradeQuota") > 1000
        });
        let opened: Vec<TcpStream> = (0..1000).filter_map(|number| open(1 + number % 2)).collect();
        assert!(opened.len() >= 999, "{} of 1000 connections of others", opened.len());
        assert!(opened.into_iter().all(|mut stream| is_echoed(&mut stream)));
        assert!(established.iter_mut().all(is_echoed), "what was established goes on");
        let rate = tried.load(Ordering::Relaxed) as f64 / begun.elapsed().as_secs_f64();
        println!("{rate:.0} connections tried per second");
        assert!(rate > 50_000.0, "{rate:.0} connections tried per second are no flood");
    });
    let grown = daemon.resident_kib().saturating_sub(before);
    assert!(grown < 64 << 10, "the table took {grown} KiB");
    let told = daemon.status().masquerade.expect("it is on");
    assert!(told.sessions < told.limit / 4 + 2000, "{told:?}");
    for reason in ["MasqueradeQuota", "MasqueradeFull", "MasqueradePorts"] {
        let lost = |pod: usize| daemon.lost_at(daemon.port_of(address(pod).into()).id, reason);
        assert_eq!((lost(1), lost(2)), (0, 0), "{reason}");
        assert_eq!(lost(0) > 0, reason == "MasqueradeQuota", "{reason}");
    }
    node.daemon().assert_conserved();
}

/// Ends a flood, whatever happens.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// An ICMP message of this type and code with these four bytes and this quotation, from a router on the way.
fn message(l2: L2, l3: L3, head: [u8; 2], rest: u32, quoted: &[u8]) -> Vec<u8> {
    let mut icmp = [&head[..], &[0, 0], &rest.to_be_bytes(), quoted].concat();
    let IpAddr::V4(src) = l3.src else { panic!("an ICMP message is IPv4's") };
    let IpAddr::V4(dst) = l3.dst else { panic!("an ICMP message is IPv4's") };
    let sum = internet_checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut ip = vec![0x45, 0, 0, 0, 0, 0, 0, 0, l3.ttl, 1, 0, 0];
    ip.extend_from_slice(&src.octets());
    ip.extend_from_slice(&dst.octets());
    let len = (ip.len() + icmp.len()) as u16;
    ip[2..4].copy_from_slice(&len.to_be_bytes());
    let sum = internet_checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    [&l2.dst.0[..], &l2.src.0, &[8, 0], &ip, &icmp].concat()
}

/// The same for IPv6.
fn message6(l2: L2, l3: L3, head: [u8; 2], rest: u32, quoted: &[u8]) -> Vec<u8> {
    let body = [&head[..], &[0, 0], &rest.to_be_bytes(), quoted].concat();
    let (IpAddr::V6(src), IpAddr::V6(dst)) = (l3.src, l3.dst) else { panic!("an ICMPv6 message is IPv6's") };
    weft_tests::frames::icmp6(l2, src, dst, 64, &body)
}

/// Flows of a pod to a server, and somebody on the node's network who sees them and can send what he likes.
struct Watched {
    outside: Outside,
    wire: Wire,
    l2: L2,
    /// By each family.
    streams: [TcpStream; 2],
    _servers: Vec<TcpListener>,
}

/// Who is supposed to complain, to whom, by each family.
const ROUTERS: [&str; 2] = ["198.51.100.7", "2001:db8:99::7"];
const NODES: [&str; 2] = ["10.200.0.1", "fd00:10:200::1"];
const SERVERS: [&str; 2] = [SERVER, SERVER6];

impl Watched {
    #[track_caller]
    fn new(suffix: &str) -> Watched {
        let outside = Outside::new(suffix, "", 1);
        let (pod, server) = (&outside.pods[0], &outside.server);
        let servers: Vec<TcpListener> =
            server.inside(|| SERVERS.iter().map(|at| TcpListener::bind((*at, 8000)).unwrap()).collect());
        let connect = |to: &str| {
            let to = SocketAddr::new(to.parse().unwrap(), 8000);
            pod.inside(|| TcpStream::connect_timeout(&to, PATIENCE)).expect("it listens")
        };
        let streams = SERVERS.map(connect);
        // What the node sends is seen at the other end of its wire, and what is sent there is from the network.
        let wire = Wire::open(&outside.router, "uplink");
        let l2 = L2 { src: mac_of(&outside.router, "uplink"), dst: mac_of(&outside.node.netns, "uplink") };
        Watched { outside, wire, l2, streams, _servers: servers }
    }

    /// Has the flows send something, and gives the last packet of each as it left: TCP by IPv4 and IPv6.
    fn last_sent(&mut self) -> [Vec<u8>; 2] {
        self.streams.iter_mut().for_each(|stream| stream.write_all(b"hello").expect("it is open"));
        let frames = self.wire.collect(Duration::from_millis(300));
        [0, 1].map(|family| {
            let server = ip_bytes(SERVERS[family]);
            let is_it = |frame: &&Vec<u8>| match family {
                0 => frame[12..14] == [8, 0] && frame[23] == 6 && frame[30..34] == server,
                _ => frame[12..14] == [0x86, 0xdd] && frame[20] == 6 && frame[38..54] == server,
            };
            frames.iter().filter(|frame| frame.len() > 54).rfind(is_it).expect("it was on the wire").clone()
        })
    }

    /// A router complains that a packet was too long, which it quotes.
    fn complain(&self, family: usize, mtu: u32, packet: &[u8]) {
        let quoted = &packet[14..packet.len().min(14 + 548)];
        let head = if family == 0 { [3, 4] } else { [2, 0] };
        self.say(family, head, mtu, quoted);
    }

    fn say(&self, family: usize, head: [u8; 2], rest: u32, body: &[u8]) {
        let l3 = L3::new(ROUTERS[family].parse::<IpAddr>().unwrap(), NODES[family].parse::<IpAddr>().unwrap());
        let make = if family == 0 { message } else { message6 };
        assert!(self.wire.send(&make(self.l2, l3, head, rest, body)));
    }

    /// What the pod's kernel, and the node's, believe of the way to a server.
    fn believed(&self, family: usize) -> [String; 2] {
        let ask = |netns: &Netns| netns.ip(&format!("route get {}", SERVERS[family]));
        [ask(&self.outside.pods[0]), ask(&self.outside.node.netns)]
    }
}

/// A packet that was never sent, made of one that was.
fn never_sent(packet: &[u8], family: usize, number: u32) -> Vec<u8> {
    let (mut packet, l4) = (packet.to_vec(), [34, 54][family]);
    let random = number.wrapping_mul(2_654_435_761);
    match number % 3 {
        // From another port of the node's, reserved or not.
        0 => packet[l4..l4 + 2].copy_from_slice(&((random >> 16) as u16 ^ 0x8000).to_be_bytes()),
        // To another port of the server.
        1 => packet[l4 + 2] ^= 0x40,
        // With another sequence number.
        _ => packet[l4 + 4] ^= 0x55,
    }
    packet
}

/// CVE-2021-20322: nobody who does not see a flow narrows it, and who does not below what senders believe.
#[test]
fn messages_about_flows_that_are_not_there_or_not_so_change_no_path() {
    let _turn = turn();
    let mut watched = Watched::new("cl");
    let sent = watched.last_sent();
    let mtu = watched.outside.node.daemon().status().mtu;
    for number in 0..1000 {
        let family = (number / 4 % 2) as usize;
        match (number % 4, family) {
            (0, 0) => watched.say(0, [5, 1], u32::from_be_bytes([10, 200, 0, 1]), &sent[0][14..42]),
            (0, _) => watched.say(1, [137, 0], 0, &[&ip_bytes("fe80::1")[..], &ip_bytes(SERVER6)].concat()),
            _ => {
                watched.complain(family, [68, 1280][family] + number % 120, &never_sent(&sent[family], family, number))
            }
        }
    }
    watched.last_sent();
    for family in [0, 1] {
        let believed = watched.believed(family);
        assert!(!believed.iter().any(|said| said.contains(" mtu ") || said.contains("redirected")), "{believed:?}");
    }
    assert_eq!(watched.outside.node.daemon().status().mtu, mtu);
    // Who sees the flow is believed while its packet is under way, and down to what senders believe at least.
    watched.outside.router.ip("link set far down");
    let last = watched.last_sent();
    eventually("the pod believes that 552 bytes pass, and no less", PATIENCE, || {
        watched.complain(0, 68, &last[0]);
        watched.believed(0)[0].contains("mtu 552") || watched.believed(0)[0].contains("lock 552")
    });
    watched.complain(1, 600, &last[1]);
    thread::sleep(Duration::from_millis(100));
    let said = &watched.believed(1)[0];
    assert!(!said.contains(" mtu ") || said.contains(" mtu 1280"), "{said}");
    watched.outside.assert_well();
}

fn ip_bytes(address: &str) -> Vec<u8> {
    match address.parse().unwrap() {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}
