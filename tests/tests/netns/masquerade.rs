//! Packets of pods that leave the cluster in the node's name, and what comes back: a server behind a router, neither of which knows of pods.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use weft_tests::cluster::{Cluster, WeftNode};
use weft_tests::command::eventually;
use weft_tests::machine::turn;
use weft_tests::netns::{Netns, OwnNetns};
use weft_tests::traffic;

const PATIENCE: Duration = Duration::from_secs(10);
pub const SERVER: &str = "203.0.113.9";
pub const SERVER6: &str = "2001:db8:113::9";

/// A node whose default route leads to a router, and a server behind that.
pub struct Outside {
    pub node: WeftNode,
    pub pods: Vec<OwnNetns>,
    addresses: Vec<Ipv4Addr>,
    pub router: OwnNetns,
    pub server: OwnNetns,
    cluster: Cluster,
}

impl Outside {
    #[track_caller]
    pub fn new(suffix: &str, masquerade: &str, pods: usize) -> Outside {
        let cluster = Cluster::new(suffix);
        let router = cluster.machine(9);
        let server = cluster.sandbox("server");
        router.ip(&format!("link add far type veth peer name eth0 netns {}", server.0));
        router.ip("address add fd00:10:200::9/64 dev uplink nodad");
        for (at, near, far) in
            [("203.0.113.1/24", "", "203.0.113.9/24"), ("2001:db8:113::1/64", " nodad", "2001:db8:113::9/64")]
        {
            router.ip(&format!("address add {at} dev far{near}"));
            server.ip(&format!("address add {far} dev eth0{near}"));
        }
        router.ip("link set far up");
        server.ip("link set eth0 up");
        server.ip("route add 10.200.0.0/24 via 203.0.113.1");
        server.ip("route add fd00:10:200::/64 via 2001:db8:113::1");
        let node = cluster.weft_node(1, "routed", &format!("[masquerade]\n{masquerade}"));
        node.netns.ip("address add fd00:10:200::1/64 dev uplink nodad");
        node.netns.ip("route add default via 10.200.0.9");
        node.netns.ip("route add default via fd00:10:200::9");
        let pods: Vec<OwnNetns> = (1..=pods).map(|number| cluster.sandbox(&format!("p{number}"))).collect();
        let attach = |(number, pod)| weft_tests::plugin::addresses(&node.attach(&format!("c{number}"), pod));
        let v4 = |all: Vec<IpAddr>| {
            all.into_iter().find_map(|address| match address {
                IpAddr::V4(address) => Some(address),
                IpAddr::V6(_) => None,
            })
        };
        let addresses = pods.iter().enumerate().map(attach).map(|all| v4(all).expect("pods have IPv4")).collect();
        let outside = Outside { node, pods, addresses, router, server, cluster };
        for address in [SERVER, SERVER6] {
            traffic::await_answer(&outside.pods[0], address.parse().unwrap());
        }
        outside
    }

    /// How many connections a pod can open to the server's port, of so many that it tries.
    fn connect(&self, pod: usize, port: u16, tries: usize) -> Vec<TcpStream> {
        let to = SocketAddr::new(SERVER.parse().unwrap(), port);
        let open = || TcpStream::connect_timeout(&to, Duration::from_millis(700)).ok();
        self.pods[pod].inside(|| (0..tries).filter_map(|_| open()).collect())
    }

    /// The address of a pod.
    pub fn address(&self, pod: usize) -> Ipv4Addr {
        self.addresses[pod]
    }

    pub fn assert_well(&self) {
        self.node.daemon().assert_conserved();
        let problems = self.node.daemon().status().problems;
        // Tests here send what cannot pass.
        let lasting: Vec<_> = problems.iter().filter(|problem| !problem.starts_with("in the last ")).collect();
        assert!(lasting.is_empty(), "{lasting:?}\n{}", self.node.log());
    }
}

/// An echo of streams, as long as the test runs.
pub fn echo(server: &Netns, port: u16) {
    let listener = server.inside(|| TcpListener::bind(("0.0.0.0", port)).expect("nobody else listens there"));
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            std::thread::spawn(move || {
                let mut bytes = [0; 64];
                while let Ok(len @ 1..) = stream.read(&mut bytes) {
                    if stream.write_all(&bytes[..len]).is_err() {
                        break;
                    }
                }
            });
        }
    });
}

/// Says something on a stream and hears it again.
pub fn is_echoed(stream: &mut TcpStream) -> bool {
    let mut word = [0; 5];
    stream.write_all(b"hello").is_ok() && stream.read_exact(&mut word).is_ok() && &word == b"hello"
}

/// Accepts connections as long as the test runs, keeps them, and says from where they are.
fn listen(server: &Netns, port: u16) -> std::sync::mpsc::Receiver<(TcpStream, SocketAddr)> {
    let listener = server.inside(|| TcpListener::bind(("0.0.0.0", port)).expect("nobody else listens there"));
    let (sender, accepted) = std::sync::mpsc::channel();
    std::thread::spawn(move || while listener.accept().is_ok_and(|new| sender.send(new).is_ok()) {});
    accepted
}

#[test]
fn pods_reach_what_knows_only_the_node_and_hear_from_it() {
    let _turn = turn();
    let outside = Outside::new("mq", "", 2);
    let (pod, server) = (&outside.pods[0], &outside.server);
    for address in [SERVER, SERVER6].map(|address| address.parse::<IpAddr>().unwrap()) {
        traffic::transfer(pod, server, address, 32 << 20);
        // Nobody cuts packets of IPv6 on their way: the server is told how long they may be.
        let family = if address.is_ipv4() { "-4" } else { "-6" };
        let long = || pod.exec(&format!("ping {family} -n -q -c 1 -W 1 -s 5000 {address}")).success;
        eventually("the server knows how long packets may be", PATIENCE, long);
        traffic::echo_datagrams(pod, server, address, &[0, 1, 1400, 1422, 5000, 30_000]);
        // A port where nobody listens says so.
        let said = TcpStreamError::of(pod, SocketAddr::new(address, 9));
        assert_eq!(said, std::io::ErrorKind::ConnectionRefused);
    }
    // The ways there, as routers tell.
    for (family, server, hop) in [("-4", SERVER, "10.200.0.9"), ("-6", SERVER6, "fd00:10:200::9")] {
        let said = pod.exec(&format!("traceroute {family} -n -w 2 -q 1 -m 4 {server}"));
        let hops: Vec<&str> = said.out.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1)).collect();
        assert_eq!(hops[1..], [hop, server], "{}", said.out);
    }
    // A narrower way beyond is told, and believed.
    outside.router.ip("link set far mtu 1300");
    let said = pod.exec(&format!("ping -4 -n -c 1 -W 2 -M do -s 1350 {SERVER}"));
    assert!(!said.success && said.out.contains("mtu = 1300"), "{}", said.out);
    outside.server.ip("link set eth0 mtu 1300");
    for address in [SERVER, SERVER6] {
        traffic::transfer(pod, server, address.parse().unwrap(), 4 << 20);
    }
    // The router itself is on the node's own network, and knows of no pods either.
    traffic::transfer(pod, &outside.router, "10.200.0.9".parse().unwrap(), 4 << 20);
    outside.assert_well();
}

/// What becomes of a connection that is refused.
struct TcpStreamError;

impl TcpStreamError {
    fn of(from: &Netns, to: SocketAddr) -> std::io::ErrorKind {
        from.inside(|| TcpStream::connect_timeout(&to, PATIENCE)).expect_err("nobody listens there").kind()
    }
}

#[test]
fn superframes_leave_and_return_whole() {
    let _turn = turn();
    let outside = Outside::new("mqs", "", 1);
    traffic::transfer(&outside.pods[0], &outside.server, SERVER.parse().unwrap(), 64 << 20);
    let ports = outside.node.daemon().ports();
    let uplink = ports.iter().find(|port| port.kind == "packet").expect("there is an uplink");
    assert!(uplink.out_bytes / uplink.out > 4000, "{uplink:?}");
    // What comes back is as long as the kernel made it.
    let rate = traffic::iperf3(&outside.pods[0], &outside.server, SERVER.parse().unwrap(), "-C cubic -t 1 -R");
    let ports = outside.node.daemon().ports();
    let host = ports.iter().find(|port| port.role == "host").expect("there is a host port");
    assert!(rate > 100e6 && host.counters.received_bytes / host.counters.received > 4000, "{rate} {host:?}");
    outside.assert_well();
}

#[test]
fn as_many_connections_to_one_server_as_there_are_ports_and_then_a_named_drop() {
    let _turn = turn();
    let outside = Outside::new("mqn", "first_port = 61000\nlast_port = 61149\n", 3);
    let (accepted, other) = (listen(&outside.server, 8000), listen(&outside.server, 8001));
    let kept = outside.connect(0, 8000, 150);
    assert_eq!(kept.len(), 150, "{:?}", outside.node.daemon().all_drops());
    let came = (0..kept.len()).map_while(|_| accepted.recv_timeout(PATIENCE).ok());
    let from: std::collections::HashSet<SocketAddr> = came.map(|(_, from)| from).collect();
    assert_eq!(from.len(), 150);
    assert!(from.iter().all(|from| from.ip() == outside.node.underlay() && (61_000..61_150).contains(&from.port())));
    assert_eq!(outside.connect(0, 8000, 1).len(), 0);
    assert!(outside.node.daemon().drops("MasqueradePorts") > 0);
    // Another port of the server is another destination, for the abuser and for others.
    assert_eq!((outside.connect(0, 8001, 20).len(), outside.connect(1, 8001, 20).len()), (20, 20));
    // And others are not the abuser: it gives back what is beyond its half.
    assert_eq!(outside.connect(1, 8000, 30).len() + outside.connect(2, 8000, 30).len(), 60);
    outside.assert_well();
    drop((kept, accepted, other));
}

#[test]
fn what_the_node_itself_and_its_containers_say_is_theirs() {
    let _turn = turn();
    let outside = Outside::new("mqk", "", 1);
    let (node, server) = (&outside.node.netns, &outside.server);
    // A container behind the kernel's own masquerade, on the same address.
    let container = OwnNetns::new(&format!("{}-box", outside.server.0.trim_start_matches("weft-")));
    node.ip(&format!("link add box type veth peer name eth0 netns {}", container.0));
    node.ip("address add 172.30.0.1/24 dev box");
    node.ip("link set box up");
    container.ip("address add 172.30.0.2/24 dev eth0");
    container.ip("link set eth0 up");
    container.ip("route add default via 172.30.0.1");
    let folder = tempfile::tempdir().expect("there is a folder for temporary files");
    let rules = folder.path().join("rules.nft");
    let text = "table ip box {\nchain post {\ntype nat hook postrouting priority srcnat;\nip saddr 172.30.0.0/24 oifname uplink masquerade\n}\n}\n";
    std::fs::write(&rules, text).expect("the folder is writable");
    node.exec(&format!("nft -f {}", rules.display())).must();
    traffic::await_answer(&container, SERVER.parse().unwrap());
    for from in [node, &container, &outside.pods[0]] {
        traffic::transfer(from, server, SERVER.parse().unwrap(), 8 << 20);
        traffic::echo_datagrams(from, server, SERVER.parse().unwrap(), &[0, 1, 1400, 5000]);
        from.exec(&format!("ping -4 -n -q -c 3 -i 0.05 -W 2 {SERVER}")).must();
    }
    // With ports of the reserved range, too: what weftd does not know goes back to the kernel.
    for from in [node, &container] {
        let port = 8100 + u16::from(from.0.ends_with("box"));
        let accepted = listen(server, port);
        let mut stream = from.inside(|| {
            use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
            let socket = socket(AddressFamily::INET, SocketType::STREAM, None).expect("there are descriptors");
            bind(&socket, &SocketAddr::from(([0, 0, 0, 0], 63_123))).expect("nobody has that port");
            connect(&socket, &SocketAddr::new(SERVER.parse().unwrap(), port)).expect("the server listens");
            TcpStream::from(socket)
        });
        stream.write_all(b"hello").unwrap();
        let (_, seen) = accepted.recv_timeout(PATIENCE).expect("it is accepted");
        assert_eq!(seen, SocketAddr::new(outside.node.underlay().into(), 63_123));
    }
    // And who asks the node there gets its own answer.
    let listener = node.inside(|| TcpListener::bind("0.0.0.0:64321").unwrap());
    traffic::transfer_by(server, outside.node.underlay().into(), 64_321, listener, 1 << 20);
    outside.assert_well();
}

#[test]
fn it_is_gone_with_weftd_and_there_again_with_it() {
    let _turn = turn();
    let mut outside = Outside::new("mqr", "", 1);
    let links = |outside: &Outside| outside.node.netns.ip("-d link show uplink").contains("tcx");
    outside.node.kill();
    assert!(!links(&outside));
    traffic::transfer(&outside.node.netns, &outside.server, SERVER.parse().unwrap(), 1 << 20);
    outside.node.start_again();
    let pod = OwnNetns::new(&format!("{}-again", outside.pods[0].0.trim_start_matches("weft-")));
    outside.node.attach("again", &pod);
    traffic::await_answer(&pod, SERVER.parse().unwrap());
    // Another address of the node's is used from then on, and who was known by the other one hears of it.
    echo(&outside.server, 8000);
    let to = SocketAddr::new(SERVER.parse().unwrap(), 8000);
    let mut stream = pod.inside(|| TcpStream::connect_timeout(&to, PATIENCE)).expect("it listens");
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(is_echoed(&mut stream));
    outside.node.netns.ip("address add 10.200.0.77/25 dev uplink");
    outside.node.netns.ip("address del 10.200.0.1/24 dev uplink");
    outside.node.netns.ip("route replace default via 10.200.0.9");
    eventually("pods leave as the node's new address", PATIENCE, || {
        let pinged = pod.exec(&format!("ping -4 -n -q -c 1 -W 1 {SERVER}")).success;
        let known: Vec<weft_api::NatInfo> = outside.node.daemon().ask(&weft_api::Request::Nat);
        pinged && known.iter().all(|session| session.outside == IpAddr::from([10, 200, 0, 77]))
    });
    let ended = stream.write_all(b"hello").and_then(|()| stream.read(&mut [0; 5]));
    assert_eq!(ended.map_err(|error| error.kind()), Err(std::io::ErrorKind::ConnectionReset));
}

#[test]
fn a_reload_switches_it_on_and_off_and_superframes_return_whole() {
    let _turn = turn();
    let outside = Outside::new("mqg", "", 1);
    let segments = |outside: &Outside| {
        let links: serde_json::Value = serde_json::from_str(&outside.node.netns.ip("-d -j link show weft0")).unwrap();
        links[0]["gso_max_segs"].as_u64().expect("the kernel says how many")
    };
    let config = |more: &str| outside.cluster.config(1, "routed", more);
    assert_eq!(segments(&outside), 65_535);
    // What is sent to other nodes has to fit into one datagram of the underlay.
    outside.node.reload(&config("")).expect("it can be switched off");
    eventually("weft0 is as without it", PATIENCE, || segments(&outside) == 44);
    assert!(!outside.node.netns.ip("-d link show uplink").contains("tcx"));
    outside.node.reload(&config("[masquerade]\n")).expect("it can be switched on");
    eventually("weft0 takes what uplinks bring", PATIENCE, || segments(&outside) == 65_535);
    let server = SERVER.parse().unwrap();
    traffic::await_answer(&outside.pods[0], server);
    let received = || outside.node.daemon().ports().into_iter().find(|port| port.role == "host").unwrap().counters;
    let before = received();
    traffic::iperf3(&outside.pods[0], &outside.server, server, "-C cubic -t 1 -R");
    let after = received();
    let mean = (after.received_bytes - before.received_bytes) / (after.received - before.received);
    assert!(mean > 4000, "{mean} bytes in each frame");
    outside.assert_well();
}

/// What a server outside says of where a datagram came from, as STUN does (RFC 8489).
fn tell_from(server: &Netns, port: u16) {
    let socket = server.inside(|| UdpSocket::bind(("0.0.0.0", port)).expect("nobody else listens there"));
    std::thread::spawn(move || {
        while let Ok((_, from)) = socket.recv_from(&mut [0; 64]) {
            let _ = socket.send_to(from.to_string().as_bytes(), from);
        }
    });
}

#[test]
fn two_pods_that_only_know_their_outer_addresses_reach_each_other() {
    let _turn = turn();
    let outside = Outside::new("mqp", "", 2);
    tell_from(&outside.server, 3478);
    let sockets = [0, 1].map(|pod| {
        let socket = outside.pods[pod].inside(|| UdpSocket::bind("0.0.0.0:0").unwrap());
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    });
    let mut buffer = [0; 64];
    let outer = [0, 1].map(|pod: usize| {
        sockets[pod].send_to(b"who am I?", (SERVER, 3478)).unwrap();
        let (len, _) = sockets[pod].recv_from(&mut buffer).expect("the server answers");
        String::from_utf8_lossy(&buffer[..len]).parse::<SocketAddr>().unwrap()
    });
    assert!(outer.iter().all(|outer| outer.ip() == IpAddr::from(outside.node.underlay())) && outer[0] != outer[1]);
    let daemon = outside.node.daemon();
    sockets[0].send_to(b"too early", outer[1]).unwrap();
    eventually("nobody has asked for that", PATIENCE, || daemon.drops("Uninvited") == 1);
    for (from, to, text) in [(1, 0, "one"), (0, 1, "two"), (1, 0, "three"), (0, 1, "four")] {
        sockets[from].send_to(text.as_bytes(), outer[to]).unwrap();
        let (len, whom) = sockets[to].recv_from(&mut buffer).expect("it arrives");
        assert_eq!((&buffer[..len], whom), (text.as_bytes(), outer[from]));
    }
    // Who closes its socket says so, to whom it was known by.
    let [one, two] = sockets;
    one.connect(outer[1]).unwrap();
    drop(two);
    one.send(b"gone?").unwrap();
    assert_eq!(one.recv(&mut buffer).map_err(|error| error.kind()), Err(std::io::ErrorKind::ConnectionRefused));
    // Where no pod is the node itself answers.
    let listener = outside.node.netns.inside(|| TcpListener::bind("0.0.0.0:64321").unwrap());
    traffic::transfer_by(&outside.pods[0], outside.node.underlay().into(), 64_321, listener, 1 << 20);
    outside.assert_well();
}
