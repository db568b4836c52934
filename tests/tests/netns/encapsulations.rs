//! Every format between nodes of ours: what it carries, what it looks like on the wire to somebody else's eyes (tshark), and that it is
//! changed under traffic without a loss.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use weft_api::{NodeInfo, Request};
use weft_tests::cluster::{Cluster, WeftNode};
use weft_tests::command::{Background, eventually};
use weft_tests::lab::Lab;
use weft_tests::machine::{need, turn};
use weft_tests::netns::{Netns, OwnNetns};
use weft_tests::{plugin, traffic};

const ALL: [&str; 5] = ["vxlan", "geneve", "gre", "gretap", "ipip"];
const FAMILIES: [&str; 2] = ["ipv4", "ipv6"];

/// What a node's peers are sent by.
fn sent_by(node: &weft_tests::daemon::Daemon) -> Vec<String> {
    let nodes: Vec<NodeInfo> = node.ask(&Request::Nodes);
    nodes.into_iter().filter(|node| !node.local).map(|node| node.encapsulation).collect()
}

/// Streams longer than any packet, and datagrams of all sizes, those in fragments among them, both ways and by both families.
fn everything_passes(lab: &Lab) {
    let (one, two) = (lab.pod(1, 1), lab.pod(2, 1));
    for (from, to) in [(one, two), (two, one)] {
        for address in [to.ipv4.into(), to.ipv6.into()] {
            traffic::transfer(&from.netns(), &to.netns(), address, 4 << 20);
            traffic::echo_datagrams(&from.netns(), &to.netns(), address, &[1, 1200, 1402, 1432, 1500, 9000, 40_000]);
        }
    }
}

#[test]
fn each_format_carries_everything_over_ipv4_and_ipv6() {
    let _turn = turn();
    for family in FAMILIES {
        for format in ALL {
            let lab = Lab::up("f", 2, 1, "routed", &["--encapsulation", format, "--underlay-family", family]);
            everything_passes(&lab);
            for node in [1, 2] {
                assert_eq!(sent_by(&lab.daemon(node)), [format], "over {family}");
                let status = lab.daemon(node).status();
                assert!(status.problems.is_empty(), "{format} over {family}: {:?}", status.problems);
            }
            lab.assert_conserved();
        }
    }
}

#[test]
fn bridged_every_format_with_ethernet_inside_carries_a_segment() {
    let _turn = turn();
    for (format, shown) in [("geneve", "geneve"), ("gre", "gretap"), ("gretap", "gretap")] {
        let lab = Lab::up("b", 2, 1, "bridged", &["--encapsulation", format]);
        everything_passes(&lab);
        assert_eq!(sent_by(&lab.daemon(1)), [shown]);
        lab.assert_conserved();
    }
    let refused =
        Lab::up("r", 1, 1, "bridged", &[]).weft(&["lab", "up", "--mode", "bridged", "--encapsulation", "ipip"]);
    assert!(!refused.success && refused.err.contains("carries no Ethernet frames"), "{}", refused.err);
}

/// What tshark reads of a packet, field by field.
type Fields = std::collections::BTreeMap<&'static str, String>;

const FIELDS: [&str; 13] = [
    "frame.protocols",
    "ip.flags.df",
    "ip.checksum.status",
    "udp.checksum.status",
    "tcp.checksum.status",
    "icmp.checksum.status",
    "icmpv6.checksum.status",
    "vxlan.vni",
    "vxlan.flags",
    "geneve.vni",
    "gre.flags_and_version",
    "gre.proto",
    "_ws.malformed",
];

/// The packets of a file as tshark reads them, all checksums verified.
fn dissect(file: &Path) -> Vec<Fields> {
    let mut command = std::process::Command::new("tshark");
    command.args([
        "-r",
        &file.display().to_string(),
        "-d",
        "udp.port==8472,vxlan",
        "-T",
        "fields",
        "-E",
        "separator=|",
    ]);
    for proto in ["ip", "udp", "tcp"] {
        command.args(["-o", &format!("{proto}.check_checksum:TRUE")]);
    }
    for field in FIELDS {
        command.args(["-e", field]);
    }
    let text = weft_tests::command::run(command).must();
    let read = |line: &str| FIELDS.iter().copied().zip(line.split('|').map(str::to_owned)).collect();
    text.lines().map(read).collect()
}

/// The bytes of the packets in a file, from the outer Ethernet header on.
fn bytes(file: &Path) -> Vec<Vec<u8>> {
    let file = std::fs::read(file).expect("tcpdump has written it");
    let (mut rest, mut all) = (&file[24..], Vec::new());
    while rest.len() >= 16 {
        let len = u32::from_le_bytes(rest[8..12].try_into().expect("four bytes")) as usize;
        all.push(rest[16..16 + len].to_vec());
        rest = &rest[16 + len..];
    }
    all
}

/// What stands between the outer IP header and the inner packet or frame, but for the ports and the checksum of UDP.
fn between(format: &str, inner_is_v4: bool) -> (u8, Vec<u8>) {
    let ethertype: [u8; 2] = if inner_is_v4 { [0x08, 0x00] } else { [0x86, 0xdd] };
    match format {
        "vxlan" => (17, vec![0x08, 0, 0, 0, 0, 0, 1, 0]),
        "geneve" => (17, vec![0, 0, 0x65, 0x58, 0, 0, 1, 0]),
        "gre" => (47, [&[0, 0], &ethertype[..]].concat()),
        "gretap" => (47, vec![0, 0, 0x65, 0x58]),
        "ipip" => (if inner_is_v4 { 4 } else { 41 }, Vec::new()),
        other => panic!("{other}"),
    }
}

/// Holds the bytes of a packet against what the RFCs say is in front of the inner one. Returns whether that is IPv4.
fn check_bytes(packet: &[u8], format: &str, outer_is_v4: bool) -> bool {
    let ip = &packet[14..];
    let (protocol, rest) = if outer_is_v4 { (ip[9], &ip[20..]) } else { (ip[6], &ip[40..]) };
    let rest = if protocol == 17 { &rest[8..] } else { rest };
    let carries_ethernet = matches!(format, "vxlan" | "geneve" | "gretap");
    let inner_is_v4 = [true, false].into_iter().find(|v4| {
        let (expected, header) = between(format, *v4);
        let Some(inner) = rest.strip_prefix(&header[..]) else { return false };
        let inner = if carries_ethernet { &inner[14..] } else { inner };
        protocol == expected && inner[0] >> 4 == if *v4 { 4 } else { 6 }
    });
    inner_is_v4.unwrap_or_else(|| panic!("{format}: {packet:02x?}"))
}

fn check_dissection(fields: &Fields, format: &str, outer_is_v4: bool) {
    let outer = if outer_is_v4 { "eth:ethertype:ip:" } else { "eth:ethertype:ipv6:" };
    let between = match format {
        "vxlan" => "udp:vxlan:eth:ethertype:",
        "geneve" => "udp:geneve:eth:ethertype:",
        "gre" => "gre:",
        "gretap" => "gre:eth:ethertype:",
        _ => "",
    };
    let start = format!("{outer}{between}ip");
    assert!(fields["frame.protocols"].starts_with(&start), "{format}: {fields:?}");
    assert_eq!(fields["_ws.malformed"], "", "{fields:?}");
    // "Good" is 1, "not present" 3; one for each header of that kind.
    for field in FIELDS.iter().filter(|field| field.ends_with("checksum.status")) {
        assert!(fields[field].split(',').all(|status| matches!(status, "" | "1" | "3")), "{format}: {fields:?}");
    }
    if outer_is_v4 {
        assert!(matches!(fields["ip.flags.df"].split(',').next(), Some("1" | "True")), "{format}: {fields:?}");
    }
    let (field, value) = match format {
        "vxlan" => ("vxlan.vni", "1"),
        "geneve" => ("geneve.vni", "1"),
        "gre" | "gretap" => ("gre.flags_and_version", "0"),
        _ => return,
    };
    let number = u32::from_str_radix(fields[field].trim_start_matches("0x"), 16).map(|number| number.to_string());
    assert_eq!(number.as_deref(), Ok(value), "{format}: {fields:?}");
}

/// Pings, a stream and datagrams in fragments from pod to pod, as they come in at the other node.
fn capture(lab: &Lab, file: &Path) -> Vec<Vec<u8>> {
    let (one, two) = (lab.pod(1, 1), lab.pod(2, 1));
    // A checksum that is left to the device would not be on this wire.
    lab.nodes[0].netns().exec("ethtool -K uplink tx off").must();
    let filter = format!("src host {} and not icmp6 and not arp and not (ip proto 1)", lab.nodes[0].underlay);
    let mut command = lab.nodes[1].netns().command("tcpdump");
    command.args(["-i", "uplink", "-Q", "in", "-U", "-n", "-w", &file.display().to_string(), &filter]);
    let dump = Background::start(command);
    eventually("tcpdump begins", Duration::from_secs(10), || file.metadata().is_ok_and(|file| file.len() >= 24));
    for address in [two.ipv4.into(), two.ipv6.into()] {
        traffic::await_answer(&one.netns(), address);
        traffic::transfer(&one.netns(), &two.netns(), address, 20_000);
        traffic::echo_datagrams(&one.netns(), &two.netns(), address, &[100, 3000]);
    }
    let enough = || bytes(file).len() >= 30;
    eventually("tcpdump has written what passed", Duration::from_secs(10), enough);
    drop(dump);
    bytes(file)
}

#[test]
fn tshark_reads_each_format_as_it_is_meant_over_ipv4_and_ipv6() {
    let _turn = turn();
    need(&[("tshark", "tshark"), ("tcpdump", "tcpdump"), ("ethtool", "ethtool")]);
    let folder = tempfile::tempdir().unwrap();
    for family in FAMILIES {
        for format in ALL {
            let lab = Lab::up("t", 2, 1, "routed", &["--encapsulation", format, "--underlay-family", family]);
            let (file, outer_is_v4) = (folder.path().join(format!("{format}-{family}.pcap")), family == "ipv4");
            let packets = capture(&lab, &file);
            let v4 = packets.iter().filter(|packet| check_bytes(packet, format, outer_is_v4)).count();
            assert!(v4 >= 10 && packets.len() - v4 >= 10, "{v4} of {} have IPv4 inside", packets.len());
            let read = dissect(&file);
            assert!(read.len() >= packets.len());
            read.iter().for_each(|fields| check_dissection(fields, format, outer_is_v4));
        }
    }
}

/// The configuration of a node of three that sends by this format, and `[[peers]]` by others if these say so.
fn config(cluster: &Cluster, number: u8, format: &str, peers: [&str; 3]) -> String {
    let others = (1..=3u8).filter(|other| *other != number);
    let peer = |other: u8| match peers[usize::from(other) - 1] {
        "" => cluster.peer(other, None),
        own => cluster.peer(other, None).trim_end().to_owned() + &format!("\nencapsulation = \"{own}\"\n"),
    };
    let text = cluster.config(number, "routed", &others.map(peer).collect::<String>());
    text.replace("device = \"uplink\"\n", &format!("device = \"uplink\"\nencapsulation = \"{format}\"\n"))
}

/// Three nodes with a pod each.
fn three(cluster: &Cluster, configs: [String; 3]) -> (Vec<WeftNode>, Vec<(OwnNetns, Vec<std::net::IpAddr>)>) {
    let nodes: Vec<WeftNode> =
        (1..).zip(&configs).map(|(number, text)| cluster.weft_node_of(number, text, "")).collect();
    let pod = |node: &WeftNode| {
        let pod = cluster.sandbox(&format!("p{}", node.number));
        let addresses = plugin::addresses(&node.attach("pod", &pod));
        (pod, addresses)
    };
    let pods: Vec<_> = nodes.iter().map(pod).collect();
    for (from, own) in &pods {
        let others = pods.iter().filter(|(_, addresses)| addresses != own);
        others.flat_map(|(_, addresses)| addresses).for_each(|address| traffic::await_answer(from, *address));
    }
    (nodes, pods)
}

#[test]
fn every_peer_has_a_format_of_its_own_and_each_direction_another() {
    let _turn = turn();
    let cluster = Cluster::new("m");
    let configs = [
        config(&cluster, 1, "vxlan", ["", "geneve", "gre"]),
        config(&cluster, 2, "ipip", ["gretap", "", ""]),
        config(&cluster, 3, "geneve", ["ipip", "", ""]),
    ];
    let (nodes, pods) = three(&cluster, configs);
    let expected = [["geneve", "gre"], ["gretap", "ipip"], ["ipip", "geneve"]];
    for (node, expected) in nodes.iter().zip(expected) {
        assert_eq!(sent_by(&node.daemon()), expected);
    }
    for (from, to) in [(0, 1), (1, 2), (2, 0)] {
        for address in &pods[to].1 {
            traffic::transfer(&pods[from].0, &pods[to].0, *address, 1 << 20);
            traffic::echo_datagrams(&pods[from].0, &pods[to].0, *address, &[1, 1400, 5000]);
        }
    }
    nodes.iter().for_each(|node| node.daemon().assert_conserved());
}

/// Datagrams at 10,000 a second for so many seconds: how many were sent, and how many were lost.
fn datagrams(from: &Netns, to: std::net::IpAddr, seconds: u32) -> (u64, u64) {
    let said = from.exec(&format!("iperf3 -J -u -b 8M -l 100 -t {seconds} -p 5301 -c {to}")).must();
    let report: Value = serde_json::from_str(&said).expect("iperf3 prints JSON");
    let sum = &report["end"]["sum"];
    let number = |name: &str| sum[name].as_u64().unwrap_or_else(|| panic!("no {name} in {sum}"));
    (number("packets"), number("lost_packets"))
}

/// Changes the format on each node in turn, all through the list, while datagrams, a stream and pings pass. How many datagrams were sent,
/// and how many were lost.
fn change_under_traffic(
    cluster: &Cluster,
    nodes: &[WeftNode],
    pods: &[(OwnNetns, Vec<std::net::IpAddr>)],
) -> (u64, u64) {
    let mut server = pods[1].0.command("iperf3");
    server.args(["-s", "-1", "-p", "5301"]);
    let _server = Background::start(server);
    let listens = || pods[1].0.exec("ss -Hltn sport = :5301").out.contains("5301");
    eventually("iperf3 listens", Duration::from_secs(10), listens);
    std::thread::scope(|scope| {
        let datagrams = scope.spawn(|| datagrams(&pods[0].0, pods[1].1[0], 5));
        let stream = scope.spawn(|| {
            while !datagrams.is_finished() {
                traffic::transfer(&pods[1].0, &pods[2].0, pods[2].1[0], 1 << 20);
                std::thread::sleep(Duration::from_millis(20));
            }
            datagrams.join().expect("iperf3 ends")
        });
        std::thread::sleep(Duration::from_millis(700));
        for format in ["geneve", "gre", "ipip", "gretap", "vxlan"] {
            for node in nodes {
                node.reload(&config(cluster, node.number, format, [""; 3])).expect("it can change while weftd runs");
                assert_eq!(sent_by(&node.daemon()), [format; 2]);
                std::thread::sleep(Duration::from_millis(150));
            }
        }
        stream.join().expect("no stream breaks")
    })
}

#[test]
fn the_format_is_changed_on_each_node_in_turn_without_a_loss() {
    let _turn = turn();
    need(&[("iperf3", "iperf3")]);
    let cluster = Cluster::new("l");
    let configs = [1, 2, 3].map(|number| config(&cluster, number, "vxlan", [""; 3]));
    let (nodes, pods) = three(&cluster, configs);
    // A machine that is busy with something else loses datagrams before they are read; what is lost by the change is so each time.
    let mut tried = Vec::new();
    while tried.len() < 3 && tried.iter().all(|(_, lost)| *lost > 0) {
        tried.push(change_under_traffic(&cluster, &nodes, &pods));
    }
    assert!(tried.iter().all(|(sent, _)| *sent > 40_000), "{tried:?}");
    assert!(tried.iter().any(|(_, lost)| *lost == 0), "datagrams sent and lost: {tried:?}");
    for node in &nodes {
        let ports = node.daemon().ports();
        let used = ports.iter().filter(|port| port.role == "underlay" && port.counters.received > 0).count();
        // To the first one nobody sends much.
        assert!(used == 4 || node.number == 1, "VXLAN, Geneve, GRE and IP in IP brought something: {ports:?}");
        let drops = node.daemon().all_drops();
        for reason in
            ["NotMember", "TunnelHeader", "TunnelPayload", "NoRoute", "PortAbsent", "UnderlayMtu", "MtuExceeded"]
        {
            assert_eq!(drops.get(reason), None, "{drops:?}");
        }
        node.daemon().assert_conserved();
    }
}
