//! A pod's namespace is deleted under the daemon: by whatever way the pod has its interface, port and namespace are gone within a moment, and
//! no sooner than nobody wants them any more.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use weft_tests::cluster::{Cluster, WeftNode};
use weft_tests::command::{Background, eventually, run};
use weft_tests::machine::turn;
use weft_tests::netns::{Nameless, Netns, OwnNetns};

/// How soon all of it has to be gone, once the namespace's name is.
const SOON: Duration = Duration::from_millis(100);
/// Tries until one is that soon: others may use the machine.
const TRIES: usize = 8;
const PATIENCE: Duration = Duration::from_secs(20);

fn port(kind: &str) -> Value {
    json!({ "port": kind })
}

fn pods(node: &WeftNode) -> usize {
    node.daemon().status().pods
}

/// Puts one end of a veth into a namespace, so that the other end says whether that lives: the kernel takes it away together with it.
#[track_caller]
fn witness(cluster: &Cluster, inside: &Netns, name: &str) -> impl Fn() -> bool + use<> {
    let outside = cluster.underlay().0.clone();
    cluster.underlay().ip(&format!("link add {name} type veth peer name witness netns {}", inside.0));
    let name = name.to_owned();
    move || {
        let mut command = Command::new("ip");
        command.args(["-n", &outside, "link", "show", "dev", &name]);
        run(command).success
    }
}

#[track_caller]
fn delete(netns: &Netns) {
    let mut command = Command::new("ip");
    command.args(["netns", "delete", &netns.0]);
    run(command).must();
}

#[test]
fn port_and_namespace_are_gone_within_a_moment_of_its_name() {
    let _turn = turn();
    let cluster = Cluster::new("gone");
    let node = cluster.weft_node(1, "routed", "");
    for kind in ["tap", "xdp"] {
        let mut took = Vec::new();
        for round in 0..TRIES {
            let name = format!("{kind}{round}");
            let pod = cluster.sandbox(&name);
            node.attach_with(&name, &pod, &port(kind));
            let lives = witness(&cluster, &pod, &name);
            assert!(lives() && pods(&node) == 1);
            delete(&pod);
            let started = Instant::now();
            while pods(&node) == 1 {
                assert!(started.elapsed() < PATIENCE, "the port of {name} stays:\n{}", node.log());
                std::thread::sleep(Duration::from_millis(1));
            }
            took.push(started.elapsed());
            eventually("the kernel has freed the namespace", PATIENCE, || !lives());
            assert_eq!(node.daemon().leases().len(), 2, "the leases wait for a DEL");
            node.runtime.call("DEL", &name, None, &Value::Null).must();
            if took[round] < SOON {
                break;
            }
        }
        println!("{kind}: {took:?}");
        assert!(took.iter().any(|took| *took < SOON), "{kind}: {took:?}");
    }
    assert_eq!(node.daemon().leases().len(), 0);
}

#[test]
fn a_namespace_without_a_name_is_not_kept_alive() {
    let _turn = turn();
    let cluster = Cluster::new("nameless");
    let node = cluster.weft_node(1, "routed", "");
    for kind in ["tap", "xdp"] {
        let pod = Nameless::new();
        node.runtime.call("ADD", kind, Some(&pod.path()), &port(kind)).must();
        drop(pod);
        eventually("the port is gone", PATIENCE, || pods(&node) == 0);
        node.runtime.call("DEL", kind, None, &Value::Null).must();
    }
}

/// A process in a namespace, which goes when this goes.
fn process_in(netns: &Netns) -> Background {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", netns.path().display())).args(["sleep", "600"]);
    Background::start(command)
}

fn is_in(process: &Background, inode: u64) -> bool {
    let link = std::fs::read_link(format!("/proc/{}/ns/net", process.pid()));
    link.is_ok_and(|link| link == Path::new(&format!("net:[{inode}]")))
}

#[test]
fn what_is_not_mounted_lives_as_long_as_a_process_is_in_it_and_may_be_mounted_again() {
    let _turn = turn();
    let cluster = Cluster::new("inside");
    let node = cluster.weft_node(1, "routed", "");
    let pod = cluster.sandbox("pod");
    let inode = pod.identity().unwrap().1;
    node.attach_with("pod", &pod, &port("tap"));
    let lives = witness(&cluster, &pod, "pod");
    let first = process_in(&pod);
    eventually("the process is there", PATIENCE, || is_in(&first, inode));
    let stays = |what: &str| {
        std::thread::sleep(Duration::from_millis(500));
        assert!(pods(&node) == 1 && lives(), "{what}:\n{}", node.log());
    };
    delete(&pod);
    stays("its name is gone, and a process is in it");
    // Mounted at another path, its processes may go.
    let again = OwnNetns::new(&format!("{}-other", cluster.name));
    delete(&again);
    let mut command = Command::new("ip");
    command.args(["netns", "attach", &again.0, &first.pid().to_string()]);
    run(command).must();
    assert_eq!(again.identity().unwrap().1, inode);
    drop(first);
    stays("it has another name");
    let pinged = again.exec("ping -n -c 1 -W 5 10.244.1.1");
    assert!(pinged.success, "{}", pinged.out);
    let second = process_in(&again);
    eventually("another process is there", PATIENCE, || is_in(&second, inode));
    delete(&again);
    stays("another process is in it");
    drop(second);
    eventually("the last process has gone, and so has the port", PATIENCE, || pods(&node) == 0);
    eventually("the kernel has freed the namespace", PATIENCE, || !lives());
}

#[test]
fn a_daemon_that_is_killed_keeps_no_namespace_alive() {
    let _turn = turn();
    let cluster = Cluster::new("killed");
    let mut node = cluster.weft_node(1, "routed", "");
    let pod = cluster.sandbox("pod");
    node.attach_with("pod", &pod, &port("tap"));
    let lives = witness(&cluster, &pod, "pod");
    node.kill();
    assert!(lives());
    delete(&pod);
    eventually("the kernel has freed the namespace", PATIENCE, || !lives());
}

#[test]
fn mounts_that_come_and_go_cost_the_daemon_next_to_nothing() {
    const PODS: usize = 50;
    const MOUNTS: usize = 150;
    let _turn = turn();
    let cluster = Cluster::new("mounts");
    let node = cluster.weft_node(1, "routed", "");
    let kept: Vec<OwnNetns> = (0..PODS).map(|number| cluster.sandbox(&format!("p{number}"))).collect();
    for (number, pod) in kept.iter().enumerate() {
        node.attach_with(&format!("p{number}"), pod, &port("tap"));
    }
    std::thread::sleep(Duration::from_secs(2));
    let (started, before) = (Instant::now(), node.daemon().cpu_time());
    for number in 0..MOUNTS {
        drop(cluster.sandbox(&format!("m{number}")));
    }
    let (elapsed, used) = (started.elapsed(), node.daemon().cpu_time() - before);
    println!("{used:?} of CPU time in {elapsed:?} with {MOUNTS} mounts");
    // Its own clock has ticks of 10 ms.
    assert!(used < elapsed / 20 + Duration::from_millis(20), "{used:?} of CPU time in {elapsed:?}");
    assert_eq!(pods(&node), PODS);
    let before = node.daemon().cpu_time();
    std::thread::sleep(Duration::from_secs(5));
    let used = node.daemon().cpu_time() - before;
    assert!(used <= Duration::from_millis(50), "{used:?} of CPU time in five idle seconds");
}
