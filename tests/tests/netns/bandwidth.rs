//! Limits of bandwidth, measured: what a pod may send and receive, and that others do not feel it.

use std::net::IpAddr;

use serde_json::{Value, json};
use weft_tests::cluster::{Cluster, peer};
use weft_tests::machine::turn;
use weft_tests::netns::OwnNetns;
use weft_tests::traffic;

/// How far what is measured may be from the limit, on a machine that has other things to do. What is counted are IP packets, what iperf3
/// sees is their payload.
const WITHIN: f64 = 0.1;
/// A busy machine may not keep up for once.
const ATTEMPTS: usize = 4;

fn limited(to: u64, from: u64) -> Value {
    let limits = json!({ "ingressRate": to, "ingressBurst": to / 20, "egressRate": from, "egressBurst": from / 20 });
    json!({ "capabilities": { "bandwidth": true }, "runtimeConfig": { "bandwidth": limits } })
}

/// The first address that ADD's result has.
fn address_of(result: &Value) -> IpAddr {
    let text = result["ips"][0]["address"].as_str().expect("an address with its prefix length");
    text.split('/').next().expect("there is always a first part").parse().expect("an address")
}

#[track_caller]
fn measures(limit: u64, what: &str, measure: impl Fn() -> f64) {
    let mut seen = Vec::new();
    for _ in 0..ATTEMPTS {
        let ratio = measure() / limit as f64;
        if (ratio - 1.0).abs() <= WITHIN {
            return;
        }
        seen.push(ratio);
    }
    panic!("{what} at {limit} bit/s: {seen:.3?} of it");
}

fn rates_hold(node_port: &str) {
    let cluster = Cluster::new("bw");
    let more = format!("{}{}", peer(2, None), "");
    let node = cluster.weft_node_of(1, &format!("{node_port}{}", cluster.config(1, "routed", &more)), "");
    let _far = cluster.weft_node(2, "routed", &peer(1, None));
    let free = cluster.sandbox("free");
    let to_free = address_of(&node.attach("free", &free));
    for (number, rate) in [20_000_000_u64].into_iter().enumerate() {
        let name = format!("limited{number}");
        let pod = cluster.sandbox(&name);
        let to_pod = address_of(&node.attach_with(&name, &pod, &limited(rate, rate)));
        let shown = node.daemon().port_of(to_pod).bandwidth.expect("its limits are shown");
        assert_eq!((shown.ingress_rate, shown.egress_rate), (rate, rate));
        let run = |from: &OwnNetns, to: &OwnNetns, address, more: &str| {
            traffic::iperf3(from, to, address, &format!("-t 4 -O 1 {more}"))
        };
        measures(rate, "TCP to the pod", || run(&free, &pod, to_pod, "-C cubic"));
        measures(rate, "TCP from the pod", || run(&pod, &free, to_free, "-C cubic"));
        let flood = format!("-u -l 1400 -b {}", rate * 2);
        measures(rate, "UDP to the pod", || run(&free, &pod, to_pod, &flood));
        measures(rate, "UDP from the pod", || run(&pod, &free, to_free, &flood));
        let key = node.runtime.call("DEL", &name, Some(&pod.path()), &Value::Null);
        assert!(key.success, "{}", key.json);
    }
    node.daemon().assert_conserved();
    assert_eq!(node.daemon().status().problems, Vec::<String>::new());
}

#[test]
fn pods_send_and_receive_at_their_rates() {
    let _turn = turn();
    rates_hold("");
}

#[test]
fn a_limited_pod_that_sends_all_it_can_is_not_felt_by_others() {
    let _turn = turn();
    let cluster = Cluster::new("bo");
    let node = cluster.weft_node(1, "routed", "");
    let [pod, one, two] = ["pod", "one", "two"].map(|name| cluster.sandbox(name));
    let to_pod = address_of(&node.attach_with("pod", &pod, &limited(1_000_000, 1_000_000)));
    node.attach("one", &one);
    let to_two = address_of(&node.attach("two", &two));
    let free = traffic::iperf3(&one, &two, to_two, "-t 2 -C cubic");
    let flood = |from: &OwnNetns, to: IpAddr| {
        let mut command = from.command("iperf3");
        command.args(["-u", "-b", "50M", "-l", "1400", "-t", "60", "-c", &to.to_string(), "-p", "5302"]);
        weft_tests::command::Background::start(command)
    };
    let server = |at: &OwnNetns| {
        let mut command = at.command("iperf3");
        command.args(["-s", "-p", "5302"]);
        weft_tests::command::Background::start(command)
    };
    let _servers = (server(&pod), server(&two));
    std::thread::sleep(std::time::Duration::from_millis(500));
    let _floods = (flood(&pod, to_two), flood(&one, to_pod));
    std::thread::sleep(std::time::Duration::from_millis(500));
    let mut best: f64 = 0.0;
    for _ in 0..ATTEMPTS {
        best = best.max(traffic::iperf3(&one, &two, to_two, "-t 2 -C cubic") / free);
        if best > 0.5 {
            break;
        }
    }
    // The floods themselves take some of the machine.
    assert!(best > 0.5, "others have {best:.2} of what they had");
    let said = one.exec(&format!("ping -4 -n -q -c 20 -i 0.05 -W 1 {to_two}"));
    assert!(said.success, "{}", said.out);
}
