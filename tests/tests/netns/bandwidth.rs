//! Limits of bandwidth, measured: what a pod may send and receive, and that others do not feel it.

use std::net::IpAddr;
use std::time::Duration;

use serde_json::{Value, json};
use weft_tests::cluster::{Cluster, peer};
use weft_tests::command::eventually;
use weft_tests::machine::turn;
use weft_tests::netns::OwnNetns;
use weft_tests::traffic;

/// How far what is measured may be from the limit. iperf3 counts payload, the limit IP packets with their headers.
const WITHIN: f64 = 0.04;
/// A busy machine may not keep up for once.
const ATTEMPTS: usize = 4;
/// What of a packet of 1450 bytes is payload: of TCP with timestamps, and of the datagrams of the tests.
const TCP: f64 = 1398.0 / 1450.0;
const UDP: f64 = 1400.0 / 1428.0;

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
fn measures(limit: u64, what: &str, share: f64, measure: impl Fn() -> f64) {
    let mut seen = Vec::new();
    for _ in 0..ATTEMPTS {
        let ratio = measure() / (limit as f64 * share);
        println!("{what} at {limit} bit/s: {ratio:.4} of it, less headers");
        if (ratio - 1.0).abs() <= WITHIN {
            return;
        }
        seen.push(ratio);
    }
    panic!("{what} at {limit} bit/s: {seen:.3?} of it");
}

/// Pods of this kind send and receive at these rates, as far as one without a limit can at all on this machine, by TCP and UDP.
fn rates_hold(suffix: &str, port: &str, rates: &[u64]) {
    let cluster = Cluster::new(suffix);
    let node = cluster.weft_node(1, "routed", "");
    let [free, other] = ["free", "other"].map(|name| cluster.sandbox(name));
    let kind = json!({ "port": port });
    let to_free = address_of(&node.attach_with("free", &free, &kind));
    let to_other = address_of(&node.attach_with("other", &other, &kind));
    let run = |from: &OwnNetns, to: &OwnNetns, address, more: &str| {
        traffic::iperf3(from, to, address, &format!("-t 3 -O 1 -C cubic {more}"))
    };
    let [tcp, udp] = ["", "-u -l 1400 -b 0"].map(|more| run(&free, &other, to_other, more));
    for (number, rate) in rates.iter().copied().enumerate() {
        // The first rates are such that every machine has to reach them.
        let reaches = |unlimited: f64| number < 2 || unlimited > rate as f64 * 1.5;
        let name = format!("limited{number}");
        let pod = cluster.sandbox(&name);
        let mut keys = limited(rate, rate);
        keys["port"] = port.into();
        let to_pod = address_of(&node.attach_with(&name, &pod, &keys));
        let shown = node.daemon().port_of(to_pod).bandwidth.expect("its limits are shown");
        assert_eq!((shown.ingress_rate, shown.egress_rate), (rate, rate));
        if reaches(tcp) {
            measures(rate, "TCP to the pod", TCP, || run(&free, &pod, to_pod, ""));
            measures(rate, "TCP from the pod", TCP, || run(&pod, &free, to_free, ""));
        }
        if reaches(udp / 1.5) {
            let flood = format!("-u -l 1400 -b {}", rate * 3 / 2);
            measures(rate, "UDP to the pod", UDP, || run(&free, &pod, to_pod, &flood));
            measures(rate, "UDP from the pod", UDP, || run(&pod, &free, to_free, &flood));
        }
        node.runtime.del(&name, &pod);
    }
    node.daemon().assert_conserved();
    assert_eq!(node.daemon().status().problems, Vec::<String>::new());
}

#[test]
fn pods_send_and_receive_at_their_rates() {
    let _turn = turn();
    rates_hold("bw", "tap", &[1_000_000, 10_000_000, 100_000_000, 1_000_000_000, 5_000_000_000]);
}

#[test]
fn pods_by_af_xdp_do_so_as_far_as_they_get() {
    let _turn = turn();
    rates_hold("bx", "xdp", &[1_000_000, 20_000_000, 100_000_000, 1_000_000_000]);
}

#[test]
fn across_nodes_the_rates_hold_as_well() {
    let _turn = turn();
    let cluster = Cluster::new("bn");
    let near = cluster.weft_node(1, "routed", &peer(2, None));
    let far = cluster.weft_node(2, "routed", &peer(1, None));
    let free = cluster.sandbox("free");
    let to_free = address_of(&far.attach("free", &free));
    for rate in [1_000_000, 50_000_000] {
        let name = format!("limited{rate}");
        let pod = cluster.sandbox(&name);
        let to_pod = address_of(&near.attach_with(&name, &pod, &limited(rate, rate)));
        traffic::await_answer(&free, to_pod);
        let run = |from: &OwnNetns, to: &OwnNetns, address| traffic::iperf3(from, to, address, "-t 3 -O 1 -C cubic");
        measures(rate, "TCP from another node", TCP, || run(&free, &pod, to_pod));
        measures(rate, "TCP to another node", TCP, || run(&pod, &free, to_free));
        near.runtime.del(&name, &pod);
    }
    for node in [&near, &far] {
        node.daemon().assert_conserved();
    }
}

#[test]
fn after_a_pause_a_burst_passes_at_once() {
    let _turn = turn();
    let cluster = Cluster::new("bb");
    let node = cluster.weft_node(1, "routed", "");
    let [free, pod, strict] = ["free", "pod", "strict"].map(|name| cluster.sandbox(name));
    let to_free = address_of(&node.attach("free", &free));
    // A megabyte, which takes a second at the rate; and next to nothing.
    let [to_pod, to_strict] = [("pod", &pod, 8_000_000_u64), ("strict", &strict, 1)].map(|(name, netns, burst)| {
        let limits = json!({
            "ingressRate": 8_000_000, "ingressBurst": burst, "egressRate": 8_000_000, "egressBurst": burst
        });
        address_of(&node.attach_with(name, netns, &json!({ "bandwidth": limits })))
    });
    let seconds = |from: &OwnNetns, to: &OwnNetns, address| {
        let started = std::time::Instant::now();
        traffic::transfer(from, to, address, 900_000);
        started.elapsed().as_secs_f64()
    };
    for (what, from, to, address) in [("to", &free, &pod, to_pod), ("from", &pod, &free, to_free)] {
        eventually(&format!("a burst {what} the pod passes at once"), Duration::from_secs(30), || {
            // Full again.
            std::thread::sleep(Duration::from_millis(1200));
            seconds(from, to, address) < 0.6
        });
    }
    for (what, from, to, address) in [("to", &free, &strict, to_strict), ("from", &strict, &free, to_free)] {
        let took = seconds(from, to, address);
        assert!(took > 0.8, "without a burst 900 kB {what} the pod took {took} s at 8 Mbit/s");
    }
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
    std::thread::sleep(Duration::from_millis(500));
    let _floods = (flood(&pod, to_two), flood(&one, to_pod));
    std::thread::sleep(Duration::from_millis(500));
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
