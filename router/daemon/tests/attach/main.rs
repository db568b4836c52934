//! The real `weftd` in a namespace of its own, attaching pods by the API, as the CNI plugin does. Needs root.

#![allow(clippy::unwrap_used, reason = "a test that fails shall say where")]

mod lab;
mod leases;
mod metrics;

use std::fs::{self, File};
use std::io::Write;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};

use weft_api::{
    Attach, Attached, AttachmentKey, Check, ClientError, Collected, Empty, FlowInfo, Gc, LeaseInfo, NodeInfo, PortInfo,
    Request, Status, code,
};

use lab::*;

/// The ports of pods.
fn ports(lab: &Lab) -> Vec<PortInfo> {
    lab.call::<Vec<PortInfo>>(Request::Ports).into_iter().filter(|port| port.role == "pod").collect()
}

#[test]
fn a_pod_gets_its_interface_and_reaches_gateway_and_neighbour() {
    let mut lab = Lab::with_daemon("ping", ROUTED);
    let (a, b) = (lab.namespace("a"), lab.namespace("b"));
    let first = lab.add(&a, attach("a")).unwrap();
    assert_eq!((first.ifname.as_str(), first.mtu), ("eth0", 1450));
    let addresses: Vec<&str> = first.addresses.iter().map(|address| address.address.as_str()).collect();
    assert_eq!(addresses, ["10.244.1.2/24", "fd00:10:244:1::2/64"]);
    let link = run(&["ip", "-n", &a, "-d", "link", "show", "eth0"]);
    for expected in [first.mac.as_str(), "mtu 1450", "qlen 1000", "gso_max_segs 44", "LOWER_UP"] {
        assert!(link.contains(expected), "{expected} in {link}");
    }
    let routes = run(&["ip", "-n", &a, "route"]) + &run(&["ip", "-n", &a, "-6", "route"]);
    assert!(routes.contains("default via 10.244.1.1 dev eth0"), "{routes}");
    assert!(routes.contains("default via fd00:10:244:1::1 dev eth0"), "{routes}");
    assert!(!left_over_devices(&lab));

    lab.add(&b, attach("b")).unwrap();
    for target in ["10.244.1.1", "10.244.1.3", "fd00:10:244:1::1", "fd00:10:244:1::3"] {
        run(&["ip", "netns", "exec", &a, "ping", "-c", "2", "-W", "5", target]);
    }
    let status: Status = lab.call(Request::Status);
    assert_eq!((status.pods, status.mtu, status.underlay_mtu), (2, 1450, 1500));
    let ports = ports(&lab);
    assert!(ports.len() == 2 && ports.iter().all(|port| port.counters.received > 0), "{ports:?}");
    let leases: Vec<LeaseInfo> = lab.call(Request::Leases);
    assert!(leases.len() == 4 && leases.iter().all(|lease| lease.attached));
    let descriptor = open(&a);
    let check = Request::Check(Check { key: key("a"), expected: Some(first) });
    lab.client().call_with_fd::<Empty>(&check, descriptor.as_fd()).unwrap();
    run(&["ip", "-n", &a, "addr", "del", "10.244.1.2/24", "dev", "eth0"]);
    let found = lab.client().call_with_fd::<Empty>(&check, descriptor.as_fd());
    assert!(
        matches!(&found, Err(ClientError::Refused(failure))
        if failure.code == code::CHECK && failure.msg.contains("no address 10.244.1.2/24")),
        "{found:?}"
    );
    let _silent = lab.client();
    let start = Instant::now();
    assert_eq!(lab.stop(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(3), "a silent client holds nobody up: {:?}", start.elapsed());
    assert!(!lab.path("run/weftd.sock").exists());
}

/// Pods of two nodes: pings in both families, and a transfer that is larger than any frame.
fn reaches_across(name: &str, mode: &str) {
    let config = |own: u8, other: u8| {
        format!(
            "{mode}\nranges = [\"10.244.{own}.0/24\", \"fd00:10:244:{own}::/64\"]\n[[peers]]\nname = \"m{other}\"\n\
             underlay = \"10.200.0.{other}\"\nranges = [\"10.244.{other}.0/24\", \"fd00:10:244:{other}::/64\"]"
        )
    };
    let [mut one, mut two] = Lab::pair(name, [&config(1, 2), &config(2, 1)]);
    let (a, b) = (one.namespace("a"), two.namespace("b"));
    one.add(&a, attach("a")).unwrap();
    let other = two.add(&b, attach("b")).unwrap();
    for address in &other.addresses {
        let target = address.address.split('/').next().unwrap();
        run(&["ip", "netns", "exec", &a, "ping", "-c", "3", "-W", "5", target]);
        run(&["ip", "netns", "exec", &a, "ping", "-c", "2", "-W", "5", "-s", "20000", target]);
    }
    let nodes: Vec<NodeInfo> = one.call(Request::Nodes);
    assert!(nodes[1].sent > 0 && nodes[1].received > 0 && nodes[1].last_seen.is_some(), "{nodes:?}");
    assert!(!one.call::<Vec<FlowInfo>>(Request::Flows).is_empty());
    let status: Status = one.call(Request::Status);
    assert_eq!(status.problems, Vec::<String>::new());
    let mut client = one.client();
    client.call::<Empty>(&Request::Ready).unwrap();
}

#[test]
fn pods_of_two_nodes_reach_each_other_in_routed_mode() {
    reaches_across("routed", "mode = \"routed\"");
}

#[test]
fn pods_of_two_nodes_reach_each_other_in_bridged_mode() {
    reaches_across("bridged", "mode = \"bridged\"\nsegment = [\"10.244.0.0/16\", \"fd00:10:244::/48\"]");
}

#[test]
fn del_is_repeatable_and_leaves_nothing() {
    let mut lab = Lab::with_daemon("del", ROUTED);
    let pod = lab.namespace("a");
    lab.add(&pod, attach("a")).unwrap();
    assert_eq!(refusal(lab.add(&pod, attach("a"))), code::EXISTS);
    for _ in 0..2 {
        let _: Empty = lab.call(Request::Del(key("a")));
        assert!(until(|| !output(&["ip", "-n", &pod, "link", "show", "eth0"]).0));
        assert_eq!(lab.call::<Vec<LeaseInfo>>(Request::Leases), []);
        assert_eq!(ports(&lab), []);
    }
    lab.add(&pod, attach("a")).unwrap();
    let second = Attach { key: AttachmentKey { ifname: "net1".into(), ..key("a") }, ..attach("a") };
    assert_eq!(lab.add(&pod, second).unwrap().routes, [], "the first interface has the default routes");
    let gc = Gc { network: "pods".into(), valid: vec![("a".into(), "net1".into())] };
    assert_eq!(lab.call::<Collected>(Request::Gc(gc)).freed, [key("a")]);
    assert_eq!(ports(&lab).len(), 1);
}

#[test]
fn a_failed_add_leaves_no_lease_device_or_port() {
    let mut lab = Lab::with_daemon("undo", ROUTED);
    let pod = lab.namespace("a");
    // The name is taken in the pod: the ADD fails at its last step but one.
    run(&["ip", "-n", &pod, "link", "add", "eth0", "type", "bridge"]);
    assert_eq!(refusal(lab.add(&pod, attach("a"))), code::EXISTS);
    assert_eq!(refusal(lab.add(&lab.namespaces[0], attach("b"))), code::NETNS, "weftd's own namespace");
    let cases: [(Attach, u32); 6] = [
        (Attach { requested: vec!["10.244.1.1".parse().unwrap()], ..attach("c") }, code::ADDRESS),
        (Attach { requested: vec!["10.9.9.9".parse().unwrap()], ..attach("c") }, code::ADDRESS),
        (Attach { mtu: Some(1451), ..attach("c") }, code::CONFIG),
        (Attach { mac: Some("01:00:00:00:00:00".into()), ..attach("c") }, code::CONFIG),
        (Attach { mac: Some("02:77:65:66:74:01".into()), ..attach("c") }, code::ADDRESS),
        (Attach { key: AttachmentKey { ifname: "../x".into(), ..key("c") }, ..attach("c") }, code::ENVIRONMENT),
    ];
    for (request, expected) in cases {
        assert_eq!(refusal(lab.add(&pod, request)), expected);
    }
    let file =
        lab.client().call_with_fd::<Attached>(&Request::Add(attach("c")), File::open("/dev/null").unwrap().as_fd());
    assert_eq!(refusal(file), code::NETNS);
    assert_eq!(refusal(lab.client().call::<Attached>(&Request::Add(attach("c")))), code::NETNS);
    assert_eq!(lab.call::<Vec<LeaseInfo>>(Request::Leases), []);
    assert_eq!(ports(&lab), []);
    assert!(!left_over_devices(&lab));
    assert_eq!(run(&["ip", "-n", &pod, "-o", "link"]).lines().filter(|line| line.contains("weft")).count(), 0);

    let request = Attach {
        requested: vec!["10.244.1.77".parse().unwrap()],
        mac: Some("0a:00:00:00:00:77".into()),
        mtu: Some(1400),
        key: AttachmentKey { ifname: "net1".into(), ..key("c") },
        ..attach("c")
    };
    let made = lab.add(&pod, request).unwrap();
    assert_eq!((made.mac.as_str(), made.mtu), ("0a:00:00:00:00:77", 1400));
    assert_eq!(made.addresses[0].address, "10.244.1.77/24");
}

#[test]
fn a_deleted_namespace_is_noticed_and_its_lease_waits() {
    let mut lab = Lab::with_daemon("gone", ROUTED);
    let pod = lab.namespace("a");
    lab.add(&pod, attach("a")).unwrap();
    run(&["ip", "netns", "del", &pod]);
    assert!(until(|| lab.call::<Status>(Request::Status).pods == 0), "{}", lab.log());
    assert_eq!(ports(&lab), []);
    let leases: Vec<LeaseInfo> = lab.call(Request::Leases);
    assert!(leases.len() == 2 && leases.iter().all(|lease| !lease.attached));
    let _: Empty = lab.call(Request::Del(key("a")));
    assert_eq!(lab.call::<Vec<LeaseInfo>>(Request::Leases), []);
}

#[test]
fn leases_survive_a_crash_and_tombstones_are_honoured_at_the_next_start() {
    let mut lab = Lab::with_daemon("crash", ROUTED);
    let (a, b) = (lab.namespace("a"), lab.namespace("b"));
    lab.add(&a, attach("a")).unwrap();
    lab.add(&b, attach("b")).unwrap();
    lab.signal(rustix::process::Signal::KILL);
    lab.daemon.take().unwrap().wait().unwrap();
    let tombstones = lab.path("state/tombstones");
    fs::create_dir_all(&tombstones).unwrap();
    fs::write(tombstones.join("1.json"), serde_json::to_vec(&key("b")).unwrap()).unwrap();
    // The socket's file is still there: it is stale, and replaced.
    lab.daemon = None;
    lab.start();
    let leases: Vec<LeaseInfo> = lab.call(Request::Leases);
    assert!(leases.len() == 2 && leases.iter().all(|lease| lease.key == key("a") && !lease.attached), "{leases:?}");
    assert_eq!(fs::read_dir(&tombstones).unwrap().count(), 0);
    let status: Status = lab.call(Request::Status);
    assert!(status.problems.iter().any(|problem| problem.contains("a/eth0")), "{:?}", status.problems);
    let again = lab.add(&b, attach("b")).unwrap();
    assert_ne!(again.addresses[0].address, "10.244.1.2/24", "that one is a's");
}

#[test]
fn a_tombstone_is_honoured_while_the_daemon_lives() {
    let mut lab = Lab::with_daemon("tombstone", ROUTED);
    let pod = lab.namespace("a");
    lab.add(&pod, attach("a")).unwrap();
    let tombstones = lab.path("state/tombstones");
    fs::create_dir_all(&tombstones).unwrap();
    fs::write(tombstones.join("1.json"), serde_json::to_vec(&key("a")).unwrap()).unwrap();
    assert!(until(|| lab.call::<Vec<LeaseInfo>>(Request::Leases).is_empty()), "{}", lab.log());
    assert_eq!(ports(&lab), []);
    assert!(until(|| fs::read_dir(&tombstones).unwrap().count() == 0), "{}", lab.log());
}

#[test]
fn reload_changes_peers_and_refuses_what_cannot_change_or_is_wrong() {
    let lab = Lab::with_daemon("reload", ROUTED);
    let peer = "[[peers]]\nname = \"n2\"\nunderlay = \"10.200.0.2\"\nranges = [\"10.244.2.0/24\"]";
    lab.configure(&format!("{ROUTED}\n{peer}"));
    let _: Empty = lab.call(Request::Reload);
    let nodes: Vec<NodeInfo> = lab.call(Request::Nodes);
    assert_eq!(nodes.iter().map(|node| node.name.as_str()).collect::<Vec<_>>(), ["n1", "n2"]);
    let epoch = lab.call::<Status>(Request::Status).epoch;

    lab.configure(&format!("{ROUTED}\nvni = 7\n"));
    let refused = lab.client().call::<Empty>(&Request::Reload).unwrap_err().to_string();
    assert!(refused.contains("cannot change while weftd runs: vni"), "{refused}");
    lab.configure(&format!("{ROUTED}\nbogus = 7\n"));
    let refused = lab.client().call::<Empty>(&Request::Reload).unwrap_err().to_string();
    assert!(refused.contains("line 6: bogus: unknown key"), "{refused}");
    assert_eq!(lab.call::<Vec<NodeInfo>>(Request::Nodes).len(), 2);
    assert_eq!(lab.call::<Status>(Request::Status).epoch, epoch);
}

#[test]
fn a_hangup_reloads_and_a_second_daemon_is_refused() {
    let mut lab = Lab::with_daemon("second", ROUTED);
    let peer = "[[peers]]\nname = \"n2\"\nunderlay = \"10.200.0.2\"\nranges = [\"10.244.2.0/24\"]";
    lab.configure(&format!("{ROUTED}\n{peer}"));
    lab.signal(rustix::process::Signal::HUP);
    assert!(until(|| lab.call::<Vec<NodeInfo>>(Request::Nodes).len() == 2), "{}", lab.log());

    let second = Command::new("ip")
        .args(["netns", "exec", &lab.namespaces[0], env!("CARGO_BIN_EXE_weftd"), "--config"])
        .arg(lab.path("weftd.toml"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.status.code(), Some(1), "{text}");
    assert!(text.contains("only one daemon may write to it"), "{text}");
    let status: Status = lab.call(Request::Status);
    assert_eq!(status.peers, 1, "the first one goes on");
}

#[test]
fn a_hangup_during_the_start_reloads_and_warnings_of_the_start_are_logged() {
    let mut lab = Lab::with_daemon("early", ROUTED);
    assert_eq!(lab.stop(), Some(0));
    // The start waits for whoever writes into the FIFO; the reload finds a file in its place.
    let (config, good) = (lab.path("weftd.toml"), lab.path("good.toml"));
    let text = format!("{}device = \"absent\"\n", fs::read_to_string(&config).unwrap());
    fs::write(&good, &text).unwrap();
    fs::remove_file(&config).unwrap();
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &config, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    lab.spawn();
    let mut fifo = fs::OpenOptions::new().write(true).open(&config).unwrap();
    lab.signal(rustix::process::Signal::HUP);
    fs::rename(&good, &config).unwrap();
    fifo.write_all(text.as_bytes()).unwrap();
    drop(fifo);
    lab.wait_until_ready();
    assert!(until(|| lab.log().contains("configuration in force")), "{}", lab.log());
    let log = lab.log();
    let warned = log.find("\"absent\" is not a device of this machine");
    assert!(warned.is_some() && warned < log.find("ready"), "{log}");
}

#[test]
fn concurrent_adds_get_distinct_addresses_and_other_clients_are_served() {
    let mut lab = Lab::with_daemon("many", ROUTED);
    let names: Vec<String> = (0..8).map(|number| format!("p{number}")).collect();
    let namespaces: Vec<String> = names.iter().map(|name| lab.namespace(name)).collect();
    // Idle and half-said clients, more than there are slots.
    let idle: Vec<std::os::unix::net::UnixStream> = (0..200)
        .map(|_| {
            let mut stream = std::os::unix::net::UnixStream::connect(lab.path("run/weftd.sock")).unwrap();
            stream.write_all(b"{\"version\":1,").unwrap();
            stream
        })
        .collect();
    let lab = &lab;
    let mut addresses: Vec<IpAddr> = std::thread::scope(|scope| {
        let adds: Vec<_> = names
            .iter()
            .zip(&namespaces)
            .map(|(name, namespace)| scope.spawn(move || lab.add(namespace, attach(name)).unwrap()))
            .collect();
        let made = adds.into_iter().map(|add| add.join().unwrap());
        made.map(|made| made.addresses[0].address.split('/').next().unwrap().parse().unwrap()).collect()
    });
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), names.len());
    drop(idle);
}

#[test]
fn check_and_usage_have_their_exit_codes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weftd.toml");
    let weftd = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_weftd")).args(arguments).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let config = path.to_str().unwrap();
    fs::write(&path, format!("node = \"n1\"\nmtu = 1450\n{ROUTED}\n[underlay]\naddress = \"10.200.0.1\"\n")).unwrap();
    assert_eq!(weftd(&["--config", config, "--check"]).0, Some(0));
    fs::write(&path, "node = \"n1\"\nmode = \"x\"").unwrap();
    let (code, text) = weftd(&["--config", config, "--check"]);
    assert_eq!(code, Some(2));
    assert!(text.contains("line 2: mode: \"x\" is neither"), "{text}");
    assert_eq!(weftd(&["--config", "/nowhere"]).0, Some(2));
    assert_eq!(weftd(&["--bogus"]).0, Some(2));
    assert_eq!(weftd(&["--version"]).0, Some(0));
}
