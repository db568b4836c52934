//! The host port: who reaches whom through `weft0`, and that it stays what it shall be.

use std::net::IpAddr;
use std::time::Duration;

use weft_tests::cluster::{Cluster, WeftNode, peer};
use weft_tests::command::eventually;
use weft_tests::daemon::Daemon;
use weft_tests::lab::{Lab, Node, Pod};
use weft_tests::machine::turn;
use weft_tests::netns::Netns;
use weft_tests::traffic;

const PATIENCE: Duration = Duration::from_secs(10);

/// Both addresses of a node's own interface, IPv4 first.
fn own_addresses(daemon: &Daemon) -> [IpAddr; 2] {
    let info = daemon.status().host_port.expect("the node has a host port");
    info.addresses.try_into().expect("one address of each family")
}

#[track_caller]
fn pings(from: &Netns, to: IpAddr, options: &str) {
    let family = if to.is_ipv4() { "-4" } else { "-6" };
    let said = from.exec(&format!("ping {family} -n -q -i 0.05 -W 2 {options} {to}"));
    assert!(said.success, "{} to {to} with {options}: {}{}", from.0, said.out, said.err);
}

fn both(pod: &Pod) -> [IpAddr; 2] {
    [pod.ipv4.into(), pod.ipv6.into()]
}

fn everyone_reaches_the_nodes_and_the_nodes_everyone(mode: &str) {
    let lab = Lab::up(&format!("h{}", &mode[..1]), 2, 2, mode, &[]);
    let nodes: Vec<(&Node, [IpAddr; 2])> = lab.nodes.iter().map(|node| (node, own_addresses(&node.daemon()))).collect();
    for (node, own) in &nodes {
        for pod in lab.pods() {
            both(pod).iter().for_each(|address| pings(&node.netns(), *address, "-c 2"));
            own.iter().for_each(|address| pings(&pod.netns(), *address, "-c 2"));
            // The node's address among the nodes, as hostNetwork pods and the API server have it.
            pings(&pod.netns(), node.underlay, "-c 2");
        }
    }
    let (first, second) = (&lab.nodes[0], &lab.nodes[1]);
    let (near, far) = (lab.pod(1, 1), lab.pod(2, 1));
    for size in [0, 1402, 1403, 1422, 1423, 9000, 65_000] {
        for address in both(near).into_iter().chain(both(far)) {
            pings(&first.netns(), address, &format!("-c 2 -s {size}"));
        }
    }
    for pod in [near, far] {
        for address in both(pod) {
            traffic::transfer(&first.netns(), &pod.netns(), address, 32 << 20);
            traffic::echo_datagrams(&first.netns(), &pod.netns(), address, &[0, 1, 1422, 1423, 5000, 65_000]);
        }
        for address in nodes[0].1 {
            traffic::transfer(&pod.netns(), &first.netns(), address, 32 << 20);
        }
        traffic::transfer(&pod.netns(), &second.netns(), second.underlay, 8 << 20);
    }
    // Superframes pass whole: the node's kernel cut none of what went to its own pod.
    let host = first.daemon().ports().into_iter().find(|port| port.role == "host").expect("the node has a host port");
    assert!(host.counters.received_bytes / host.counters.received > 4000, "{host:?}");
    lab.assert_conserved();
    for node in &lab.nodes {
        let drops = node.daemon().all_drops();
        // A pod whose interface is not up yet hears nothing of what is said to everybody.
        let fine = ["Answered", "NoReceiver", "PortAbsent", "PortDown"];
        assert!(drops.keys().all(|reason| fine.contains(&reason.as_str())), "{drops:?}");
        assert_eq!(node.daemon().status().problems, Vec::<String>::new());
    }
}

#[test]
fn routed_everyone_reaches_the_nodes_and_the_nodes_reach_everyone() {
    let _turn = turn();
    everyone_reaches_the_nodes_and_the_nodes_everyone("routed");
}

#[test]
fn bridged_everyone_reaches_the_nodes_and_the_nodes_reach_everyone() {
    let _turn = turn();
    everyone_reaches_the_nodes_and_the_nodes_everyone("bridged");
}

#[test]
fn what_no_table_knows_is_the_nodes_kernel_to_route() {
    let _turn = turn();
    let lab = Lab::up("hx", 2, 1, "routed", &[]);
    let (pod, node) = (lab.pod(1, 1), &lab.nodes[0]);
    // An address beyond the node, to which it routes, and which knows its way back.
    node.netns().ip("link add beyond type veth peer name end");
    let outside = weft_tests::netns::OwnNetns::new(&format!("{}-outside", lab.name));
    node.netns().ip(&format!("link set end netns {}", outside.0));
    node.netns().ip("address add 192.0.2.1/24 dev beyond");
    node.netns().ip("link set beyond up");
    outside.ip("address add 192.0.2.9/24 dev end");
    outside.ip("link set end up");
    outside.ip("route add 10.244.0.0/16 via 192.0.2.1");
    traffic::await_answer(&pod.netns(), "192.0.2.9".parse().unwrap());
    traffic::transfer(&pod.netns(), &outside, "192.0.2.9".parse().unwrap(), 16 << 20);
    traffic::transfer(&outside, &pod.netns(), pod.ipv4.into(), 16 << 20);
    // The kernel's own word about what it cannot route reaches the pod.
    let said = pod.netns().exec("ping -4 -n -c 1 -W 2 198.51.100.1");
    assert!(!said.success && said.out.contains("Net Unreachable"), "{}", said.out);
    // So does its word about what is too large for the way beyond.
    node.netns().ip("link set beyond mtu 1300");
    let said = pod.netns().exec("ping -4 -n -c 1 -W 2 -M do -s 1350 192.0.2.9");
    assert!(!said.success && said.out.contains("mtu = 1300"), "{}", said.out);
    // And the first hops of the way are the gateway and the node.
    let said = pod.netns().exec("traceroute -n -w 1 -q 1 -m 3 192.0.2.9");
    let hops: Vec<&str> = said.out.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1)).collect();
    let own = own_addresses(&node.daemon())[0].to_string();
    assert_eq!(hops, [&pod.gateway4.to_string(), &own, "192.0.2.9"], "{}", said.out);
    lab.assert_conserved();
}

/// Datagrams that fit one packet, and such that do not.
const SIZES: [usize; 6] = [0, 1, 1422, 1423, 5000, 30_000];

/// What kube-proxy has a node do: a service's address, and a port of the node's, lead to a backend.
fn nat(node: &Netns, service: &str, backend: &str) {
    let family = if backend.starts_with('[') { "ip6" } else { "ip" };
    let rules = format!(
        "table {family} services {{
            chain prerouting {{ type nat hook prerouting priority dstnat; {family} daddr {service} meta l4proto {{ tcp, udp }} dnat to {backend}; }}
            chain output {{ type nat hook output priority -100; {family} daddr {service} meta l4proto {{ tcp, udp }} dnat to {backend}; }}
            chain forward {{ type filter hook forward priority 0; ct state invalid counter drop; }}
        }}"
    );
    let folder = tempfile::tempdir().expect("there is a folder for temporary files");
    let file = folder.path().join("rules.nft");
    std::fs::write(&file, rules).expect("the folder is writable");
    node.exec(&format!("nft -f {}", file.display())).must();
}

fn no_nat(node: &Netns) {
    node.exec("nft flush ruleset").must();
}

/// A pod, and the node itself, speak to a service whose backend is wherever `backend` says, by TCP and UDP.
#[track_caller]
fn service_works(clients: &[&Netns], node: &Netns, service: &str, backend: (&Netns, IpAddr), sizes: &[usize]) {
    let (netns, address) = backend;
    let service: IpAddr = service.parse().unwrap();
    for client in clients {
        let start = |port| if address.is_ipv4() { format!("{address}:{port}") } else { format!("[{address}]:{port}") };
        for size in [100, 8 << 20] {
            let listener = netns.inside(|| std::net::TcpListener::bind((address, 0)).unwrap());
            nat(node, &service.to_string(), &start(listener.local_addr().unwrap().port()));
            traffic::transfer_by(client, service, 80, listener, size);
            no_nat(node);
        }
        let server = netns.inside(|| std::net::UdpSocket::bind((address, 0)).unwrap());
        nat(node, &service.to_string(), &start(server.local_addr().unwrap().port()));
        traffic::echo_datagrams_by(client, service, 53, server, sizes);
        no_nat(node);
    }
}

#[test]
fn services_lead_to_backends_here_and_elsewhere_and_on_the_node() {
    let _turn = turn();
    let lab = Lab::up("hs", 2, 2, "routed", &[]);
    let node = lab.nodes[0].netns();
    let own = own_addresses(&lab.daemon(1));
    let client = lab.pod(1, 1);
    for (service, v4) in [("10.96.0.10", true), ("fd00:96::a", false)] {
        let address = |pod: &Pod| if v4 { IpAddr::V4(pod.ipv4) } else { pod.ipv6.into() };
        // The node itself needs some route to a service's address; most nodes have a default route.
        node.ip(&format!("{} route add {service} dev weft0", if v4 { "-4" } else { "-6" }));
        let clients = [&client.netns(), &node];
        for backend in [lab.pod(1, 2), lab.pod(2, 1)] {
            service_works(&clients, &node, service, (&backend.netns(), address(backend)), &SIZES);
        }
        let host = if v4 { lab.nodes[0].underlay } else { own[1] };
        service_works(&clients[..1], &node, service, (&node, host), &SIZES);
    }
    // Another node itself, as the API server is: it answers the pod by the tunnel, and the kernel that translated hears of it all the same.
    let (other, address) = (lab.nodes[1].netns(), lab.nodes[1].underlay);
    service_works(&[&client.netns()], &node, "10.96.0.10", (&other, address), &SIZES);
    let info = lab.daemon(1).status().host_port.expect("the node has a host port");
    assert!(info.flows > 0 && info.evicted == 0, "{info:?}");
    lab.assert_conserved();
}

#[test]
fn bridged_services_lead_to_backends_here_and_elsewhere() {
    let _turn = turn();
    let lab = Lab::up("hg", 2, 2, "bridged", &[]);
    let (node, client) = (lab.nodes[0].netns(), lab.pod(1, 1));
    for backend in [lab.pod(1, 2), lab.pod(2, 1)] {
        service_works(&[&client.netns()], &node, "10.96.0.10", (&backend.netns(), backend.ipv4.into()), &SIZES);
        service_works(&[&client.netns()], &node, "fd00:96::a", (&backend.netns(), backend.ipv6.into()), &SIZES);
    }
    lab.assert_conserved();
}

#[test]
fn a_port_of_the_nodes_leads_to_a_pod_for_others_and_for_pods() {
    let _turn = turn();
    let lab = Lab::up("hp", 2, 2, "routed", &[]);
    let (node, other, backend) = (lab.nodes[0].netns(), lab.nodes[1].netns(), lab.pod(1, 2));
    let published = lab.nodes[0].underlay.to_string();
    // Another machine, whose larger datagrams would be told of the smaller MTU behind the node; and a pod of this node.
    let to = (&backend.netns(), backend.ipv4.into());
    service_works(&[&other], &node, &published, to, &[0, 1, 1422]);
    service_works(&[&lab.pod(1, 1).netns()], &node, &published, to, &SIZES);
    lab.assert_conserved();
}

/// The routes that carry Weft's protocol number, of both families.
fn routes(node: &Netns) -> Vec<String> {
    let all = node.ip("-4 route show proto 87") + &node.ip("-6 route show proto 87");
    all.lines().map(|line| line.trim().to_owned()).collect()
}

#[test]
fn what_somebody_does_to_the_interface_is_put_right() {
    let _turn = turn();
    let lab = Lab::up("hw", 2, 1, "routed", &[]);
    let (node, far) = (&lab.nodes[0], lab.pod(2, 1));
    let (daemon, netns) = (node.daemon(), node.netns());
    let own = own_addresses(&daemon);
    let wanted = routes(&netns);
    assert_eq!(wanted.len(), 6, "{wanted:?}");
    let elsewhere = format!("link set weft0 netns {}", far.netns);
    let deeds = [
        "route del 10.244.2.0/24",
        "-6 route flush proto 87",
        "address flush dev weft0",
        "link set weft0 mtu 1300",
        "link set weft0 address 0a:00:00:00:00:77",
        "link set weft0 down",
        "link set weft0 name mine",
        "link delete weft0",
        &elsewhere,
    ];
    for deed in deeds {
        netns.ip(deed);
        eventually(&format!("{deed:?} is put right"), PATIENCE, || {
            routes(&netns) == wanted && netns.exec("ip link show weft0").out.contains("mtu 1450")
        });
        both(far).iter().for_each(|address| traffic::await_answer(&netns, *address));
        assert_eq!(own_addresses(&daemon), own);
        // Frames that were under way to it meanwhile may count as losses.
        let about = |problem: &String| problem.contains("weft0") || problem.contains("this node");
        let left: Vec<String> = daemon.status().problems.into_iter().filter(about).collect();
        assert_eq!(left, Vec::<String>::new(), "{deed}");
    }
    lab.assert_conserved();
}

#[test]
fn routes_of_others_are_never_replaced_and_are_reported() {
    let _turn = turn();
    let lab = Lab::up("hf", 2, 1, "routed", &[]);
    let (daemon, netns) = (lab.daemon(1), lab.nodes[0].netns());
    netns.ip("route replace 10.244.2.0/24 via 10.200.0.9");
    let told = |part: &str| daemon.status().problems.iter().any(|problem| problem.contains(part));
    eventually("the route of somebody else is reported", PATIENCE, || told("10.244.2.0/24, by 10.200.0.9"));
    assert!(netns.ip("route show 10.244.2.0/24").contains("via 10.200.0.9"));
    netns.ip("route del 10.244.2.0/24");
    eventually("the route is back", PATIENCE, || routes(&netns).len() == 6 && daemon.status().problems.is_empty());
    // Part of a range is enough.
    netns.ip("route add blackhole 10.244.2.128/25");
    eventually("a part that leads elsewhere is reported", PATIENCE, || told("10.244.2.128/25"));
    // What the operator has switched off is the operator's.
    netns.ip("route del blackhole 10.244.2.128/25");
    netns.set("net/ipv4/ip_forward", "0");
    eventually("a kernel that does not route is reported", PATIENCE, || told("net.ipv4.ip_forward is 0"));
}

fn two_nodes(cluster: &Cluster, more: &str) -> [WeftNode; 2] {
    [(1, 2), (2, 1)].map(|(number, other)| cluster.weft_node(number, "routed", &format!("{}{more}", peer(other, None))))
}

#[test]
fn the_addresses_survive_a_restart_and_no_pod_gets_them() {
    let _turn = turn();
    let cluster = Cluster::new("hr");
    let [mut node, _other] = two_nodes(&cluster, "");
    let own = own_addresses(&node.daemon());
    assert_eq!(own[0].to_string(), "10.244.1.254");
    let sandbox = cluster.sandbox("p1");
    let asked = serde_json::json!({ "runtimeConfig": { "ips": ["10.244.1.254/24"] }, "capabilities": { "ips": true } });
    let refused = node.runtime.call("ADD", "p1", Some(&sandbox.path()), &asked);
    assert!(!refused.success, "{}", refused.json);
    node.attach("p1", &sandbox);
    node.kill();
    assert!(!node.netns.exec("ip link show weft0").success, "the interface goes with weftd");
    let left = routes(&node.netns);
    let nowhere = |route: &String| route.starts_with("unreachable ");
    assert!(
        left.len() == 2 && left.iter().all(nowhere),
        "and so do its routes, but for what answers instead of pods: {left:?}"
    );
    node.start_again();
    assert_eq!(own_addresses(&node.daemon()), own);
    assert_eq!(routes(&node.netns).len(), 6);
    node.stop();
    assert!(!node.netns.exec("ip link show weft0").success);
    assert_eq!(node.netns.ip("address show").matches("10.244").count(), 0);
}

#[test]
fn it_can_have_another_name_or_be_left_out() {
    let _turn = turn();
    let cluster = Cluster::new("hn");
    let config = |number: u8, switch: &str| format!("host_port = {switch}\n{}", cluster.config(number, "routed", ""));
    let node = cluster.weft_node_of(1, &config(1, "\"pods\""), "");
    assert!(node.netns.ip("address show pods").contains("10.244.1.254/32"));
    let refused = node.reload(&config(1, "false")).unwrap_err().to_string();
    assert!(refused.contains("host_port"), "{refused}");
    let without = cluster.weft_node_of(2, &config(2, "false"), "");
    assert!(without.daemon().status().host_port.is_none());
    assert!(without.daemon().ports().iter().all(|port| port.role != "host"));
    assert_eq!(routes(&without.netns), Vec::<String>::new());
    let (sandbox, status) = (cluster.sandbox("p1"), without.daemon().status());
    assert_eq!(status.problems, Vec::<String>::new());
    without.attach("p1", &sandbox);
    let said = sandbox.exec("ping -4 -n -c 1 -W 1 10.200.0.2");
    assert!(said.out.contains("Net Unreachable"), "{}", said.out);
}

#[test]
fn a_name_that_is_taken_is_reported_and_used_once_it_is_free() {
    let _turn = turn();
    let cluster = Cluster::new("ht");
    let mut node = cluster.weft_node(1, "routed", "");
    node.stop();
    node.netns.ip("link add weft0 type bridge");
    node.start_again();
    let problems = node.daemon().status().problems;
    assert!(problems.iter().any(|problem| problem.contains("there is an interface weft0 already")), "{problems:?}");
    node.netns.ip("link delete weft0");
    eventually("the name is used", PATIENCE, || {
        node.daemon().status().problems.is_empty() && routes(&node.netns).len() == 4
    });
}
