//! Masquerade when it is crowded: tens of thousands of connections, a pod that opens them without end, and messages that lie about them.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Lines, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
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
const PER_POD: usize = 3000;
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

/// CVE-2021-20322: nobody who does not see a flow narrows it, and nobody below what senders believe.
#[test]
fn messages_about_flows_that_are_not_there_or_not_so_change_no_path() {
    let _turn = turn();
    let outside = Outside::new("cl", "", 1);
    let (pod, node) = (&outside.pods[0], &outside.node);
    for port in [8000, 8001] {
        echo(&outside.server, port);
    }
    let listener6 = outside.server.inside(|| TcpListener::bind((SERVER6, 8000)).unwrap());
    // What the node sends is seen at the other end of its wire, and what is sent there is from the network.
    let wire = Wire::open(&outside.router, "uplink");
    let l2 = L2 { src: mac_of(&outside.router, "uplink"), dst: mac_of(&node.netns, "uplink") };
    let connect = |to: &str, port| {
        let to = SocketAddr::new(to.parse().unwrap(), port);
        pod.inside(|| TcpStream::connect_timeout(&to, PATIENCE)).expect("it listens")
    };
    let mut stream = connect(SERVER, 8000);
    let mut stream6 = connect(SERVER6, 8000);
    let _server6 = listener6.accept().expect("it was connected to");
    let socket = pod.inside(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    socket.send_to(b"hello", (SERVER, 9)).unwrap();
    assert!(is_echoed(&mut stream));
    stream6.write_all(b"hello").unwrap();
    let ours = IpAddr::from(node.underlay());
    let of = |v6: bool, protocol: u8| {
        let (kind, at) = if v6 { ([0x86, 0xdd], 20) } else { ([8, 0], 23) };
        let to = if v6 { 38..54 } else { 30..34 };
        let server = if v6 { ip_bytes(SERVER6) } else { ip_bytes(SERVER) };
        let is_it = move |frame: &[u8]| {
            frame.len() > 54 && frame[12..14] == kind && frame[at] == protocol && frame[to.clone()] == server
        };
        is_it
    };
    // The last packets of each flow, as they left.
    let frames = wire.collect(Duration::from_millis(300));
    let last = |v6, protocol| frames.iter().rfind(|frame| of(v6, protocol)(frame)).expect("it was on the wire").clone();
    let (tcp4, tcp6, udp4) = (
        last(false, 6),
        last(true, 6),
        frames.iter().rfind(|frame| frame[23] == 17 && frame[12..14] == [8, 0]).cloned(),
    );
    let router = L3::new("198.51.100.7".parse::<IpAddr>().unwrap(), ours);
    let node6: IpAddr = "fd00:10:200::1".parse().unwrap();
    let router6 = L3::new("2001:db8:99::7".parse::<IpAddr>().unwrap(), node6);
    let told = || {
        let route = |netns: &Netns, to: &str| netns.ip(&format!("route get {to}")).contains(" mtu ");
        [SERVER, SERVER6].map(|to| route(pod, to) || route(&node.netns, to))
    };
    let mtu = node.daemon().status().mtu;
    for number in 0..1000_u32 {
        let random = number.wrapping_mul(2_654_435_761);
        let mut quoted = match (number % 4, &udp4) {
            (0, _) => tcp6.clone(),
            (1, Some(udp)) => udp.clone(),
            _ => tcp4.clone(),
        };
        let v6 = number % 4 == 0;
        let l4 = if v6 { 54 } else { 34 };
        match number % 3 {
            // Another port of the node's, reserved or not.
            0 => quoted[l4..l4 + 2].copy_from_slice(&(((random >> 16) as u16) ^ 0x8000).to_be_bytes()),
            // Another port of the server.
            1 => quoted[l4 + 2] ^= 0x40,
            // A sequence number that was never sent; UDP has none.
            _ if quoted[if v6 { 20 } else { 23 }] == 6 => quoted[l4 + 4] ^= 0x55,
            _ => quoted[l4 + 1] ^= 0x55,
        }
        let len = quoted.len().min(14 + 548);
        let frame = match (v6, number % 5) {
            (true, 0) => message6(l2, router6, [137, 0], 0, &[&ip_bytes("fe80::1")[..], &ip_bytes(SERVER6)].concat()),
            (true, _) => message6(l2, router6, [2, 0], 1280 + number % 100, &quoted[14..len]),
            (false, 0) => message(l2, router, [5, 1], u32::from(node.underlay()), &quoted[14..len]),
            (false, _) => message(l2, router, [3, 4], 68 + number % 1200, &quoted[14..len]),
        };
        assert!(wire.send(&frame));
    }
    assert!(is_echoed(&mut stream));
    thread::sleep(Duration::from_millis(300));
    assert_eq!(told(), [false, false], "a lie was believed: {}", pod.ip(&format!("route get {SERVER}")));
    assert_eq!(node.daemon().status().mtu, mtu);
    // Who sees the flow is believed, down to what senders believe at least.
    let last = {
        assert!(is_echoed(&mut stream));
        stream6.write_all(b"hello").unwrap();
        let frames = wire.collect(Duration::from_millis(300));
        move |v6, protocol| frames.iter().rfind(|frame| of(v6, protocol)(frame)).expect("it was on the wire").clone()
    };
    let (tcp4, tcp6) = (last(false, 6), last(true, 6));
    // The acknowledged is quoted in vain: there has to be something under way.
    outside.server.ip("link set eth0 down");
    stream.write_all(b"again").unwrap();
    stream6.write_all(b"again").unwrap();
    let frames = wire.collect(Duration::from_millis(300));
    let newest = |v6, other: &Vec<u8>| frames.iter().rfind(|frame| of(v6, 6)(frame)).unwrap_or(other).clone();
    let (tcp4, tcp6) = (newest(false, &tcp4), newest(true, &tcp6));
    assert!(wire.send(&message(l2, router, [3, 4], 68, &tcp4[14..])));
    assert!(wire.send(&message6(l2, router6, [2, 0], 600, &tcp6[14..])));
    let believed = |to: &str, mtu: &str| pod.ip(&format!("route get {to}")).contains(&format!(" mtu {mtu}"));
    eventually("the pod believes 552 bytes, and no less", PATIENCE, || {
        believed(SERVER, "552") || believed(SERVER, "lock 552")
    });
    let said = pod.ip(&format!("route get {SERVER6}"));
    assert!(!said.contains(" mtu ") || said.contains(" mtu 1280"), "{said}");
}

fn ip_bytes(address: &str) -> Vec<u8> {
    match address.parse().unwrap() {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}
