//! Pods that vanish, daemons that are killed, stopped and reconfigured.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use weft_tests::cluster::{Cluster, peer};
use weft_tests::command::{eventually, run, shell};
use weft_tests::lab::Lab;
use weft_tests::machine::turn;
use weft_tests::plugin;
use weft_tests::traffic;

#[test]
fn a_deleted_pod_is_noticed_and_cleaned_and_the_others_go_on() {
    let _turn = turn();
    let lab = Lab::up("del", 2, 2, "routed", &[]);
    let daemon = lab.daemon(1);
    let (gone, stays, far) = (lab.pod(1, 1), lab.pod(1, 2), lab.pod(2, 1));
    let identity = gone.netns().identity().unwrap();
    let pings = stays.netns().command("ping");
    let mut pings = pings;
    pings.args(["-n", "-q", "-i", "0.01", "-c", "300", "-W", "1", &far.ipv4.to_string()]);
    let watcher = std::thread::spawn(move || run(pings));
    run(shell(&format!("ip netns del {}", gone.netns))).must();
    let port = |address: IpAddr| daemon.ports().into_iter().find(|port| port.addresses.contains(&address));
    eventually("the port of a deleted pod is gone or down", Duration::from_secs(1), || {
        port(gone.ipv4.into()).is_none_or(|port| port.state != "up")
    });
    // The namespace itself has really gone: nobody, the daemon least of all, still holds it.
    let held =
        shell(&format!("find /proc/[0-9]*/fd /proc/[0-9]*/ns -lname 'net:\\[{}\\]' 2>/dev/null | head -3", identity.1));
    eventually("nobody holds the namespace", Duration::from_secs(2), || run_again(&held).trim().is_empty());
    let before = daemon.cpu_time();
    std::thread::sleep(Duration::from_secs(2));
    let report = watcher.join().unwrap().must();
    assert!(report.contains(" 0% packet loss"), "another pod lost packets: {report}");
    std::thread::sleep(Duration::from_secs(2));
    assert!(daemon.cpu_time() - before < Duration::from_millis(400), "weftd spins after a pod was deleted");
    far.netns().exec(&format!("ping -n -c 1 -W 1 {}", stays.ipv4)).must();
    assert!(!far.netns().exec(&format!("ping -n -c 1 -W 1 {}", gone.ipv4)).success);
    lab.assert_conserved();
}

fn run_again(command: &std::process::Command) -> String {
    let mut again = std::process::Command::new(command.get_program());
    again.args(command.get_args());
    run(again).out
}

#[test]
fn an_acknowledged_lease_survives_kill_9() {
    let _turn = turn();
    let cluster = Cluster::new("kill");
    let mut node = cluster.weft_node(1, "routed", "");
    let mut given = BTreeSet::new();
    let mut sandboxes = Vec::new();
    for round in 0..3 {
        for number in 0..4 {
            let name = format!("p{round}{number}");
            let sandbox = cluster.sandbox(&name);
            let result = node.attach(&name, &sandbox);
            for address in plugin::addresses(&result) {
                assert!(given.insert(address), "{address} was given twice");
            }
            sandboxes.push((name, sandbox));
        }
        node.kill();
        node.start_again();
        let leased: BTreeSet<IpAddr> = node.daemon().leases().iter().map(|lease| lease.address).collect();
        assert_eq!(leased, given, "after {} kills", round + 1);
    }
    for (name, sandbox) in &sandboxes {
        node.runtime.del(name, sandbox);
    }
    assert_eq!(node.daemon().leases().len(), 0);
}

#[test]
fn a_reload_loses_nothing_and_a_bad_one_changes_nothing() {
    let _turn = turn();
    let cluster = Cluster::new("load");
    let n1 = cluster.weft_node(1, "routed", &peer(2, None));
    let n2 = cluster.weft_node(2, "routed", &peer(1, None));
    let (a, b) = (cluster.sandbox("a"), cluster.sandbox("b"));
    n1.attach("a", &a);
    let address = plugin::addresses(&n2.attach("b", &b))[0];
    traffic::await_answer(&a, address);
    let mut flood = a.command("ping");
    flood.args(["-n", "-q", "-i", "0.002", "-c", "1500", "-W", "1", &address.to_string()]);
    let flood = std::thread::spawn(move || run(flood));
    let with = |more: &str| cluster.config(1, "routed", &format!("{}{more}", peer(2, None)));
    for round in 0..10 {
        let other = if round % 2 == 0 { peer(9, None) } else { String::new() };
        n1.reload(&with(&other)).unwrap_or_else(|error| panic!("a good configuration is refused: {error}"));
        assert_eq!(n1.daemon().status().peers, 1 + usize::from(round % 2 == 0));
        let error =
            n1.reload(&with("[[peers]]\nname = \"n3\"\nunderlay = \"10.200.0.300\"\n")).unwrap_err().to_string();
        assert!(error.contains("underlay") && error.contains("line"), "the error names line and key: {error}");
        assert_eq!(n1.daemon().status().peers, 1 + usize::from(round % 2 == 0), "the old one stays in force");
        std::thread::sleep(Duration::from_millis(100));
    }
    let report = flood.join().unwrap().must();
    assert!(report.contains(" 0% packet loss"), "{report}");
    n1.daemon().assert_conserved();
    n2.daemon().assert_conserved();
}

#[test]
fn a_clean_stop_leaves_nothing_and_a_new_start_finds_everything() {
    let _turn = turn();
    let cluster = Cluster::new("stop");
    let mut node = cluster.weft_node(1, "routed", "");
    let pod = cluster.sandbox("pod");
    let result = node.attach("pod", &pod);
    let socket = node.runtime.socket.clone();
    let links = node.netns.ip("-o link show");
    assert!(!links.contains("tun"), "no device of a pod is in the node's namespace: {links}");
    node.stop();
    assert!(!socket.exists(), "the socket is left");
    let left = node.netns.ip("-o link show");
    assert!(links.contains(": weft0") && !left.contains(": weft0"), "the node's own interface goes, too: {left}");
    assert_eq!(left.lines().count(), links.lines().count() - 1, "{left}");
    assert!(!Path::new(&socket).exists());
    let del = node.runtime.call("DEL", "pod", Some(&pod.path()), &serde_json::Value::Null);
    assert!(del.success, "DEL succeeds without the daemon: {}", del.json);
    node.start_again();
    eventually("the tombstone is honoured", Duration::from_secs(5), || node.daemon().leases().is_empty());
    assert_ne!(plugin::addresses(&node.attach("pod2", &pod)).len(), 0, "after {result}");
}
