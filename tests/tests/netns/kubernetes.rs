//! Clusters that form by the Kubernetes API: Nodes that come and go, an API server that does, and traffic that notices neither.

use std::net::{IpAddr, TcpListener};
use std::time::{Duration, Instant};

use serde_json::json;
use weft_api::{Empty, Failure, Request, Status, code};
use weft_tests::beacon::Beacon;
use weft_tests::cluster::{Cluster, WeftNode};
use weft_tests::command::eventually;
use weft_tests::daemon::Daemon;
use weft_tests::kubernetes::{Api, node, pod};
use weft_tests::machine::turn;
use weft_tests::netns::{Netns, OwnNetns};
use weft_tests::plugin;
use weft_tests::traffic::{Pings, await_answer};

/// The API server's address on the underlay.
const ADDRESS: &str = "10.200.0.250";
/// Seconds of silence after which a stream of changes is taken to hang.
const IDLE: u64 = 2;
const PATIENCE: Duration = Duration::from_secs(30);
/// For how long the API server is away.
const AWAY: Duration = Duration::from_secs(60);

/// A cluster whose nodes know each other by the Kubernetes API only.
struct Formed {
    cluster: Cluster,
    api: Api,
    /// The table `kubernetes` of their configuration.
    engine: String,
    /// Whether pods have the MTU that the uplink leaves.
    joins_without_mtu: bool,
    nodes: Vec<WeftNode>,
    /// A pod of each, and its addresses.
    pods: Vec<(OwnNetns, Vec<IpAddr>)>,
}

impl Formed {
    fn new(suffix: &str) -> Formed {
        let cluster = Cluster::new(suffix);
        let underlay = Netns(cluster.underlay().0.clone());
        underlay.ip(&format!("address add {ADDRESS}/24 dev br0"));
        let listen = move || underlay.inside(|| TcpListener::bind((ADDRESS, 6443))).expect("the address is there");
        let api = Api::start_at(listen, None);
        let token = cluster.folder.path().join("token");
        std::fs::write(&token, "token").unwrap();
        // The first of the two is nobody.
        let engine = format!(
            "[kubernetes]\nservers = [\"http://10.200.0.251:6443\", \"{}\"]\ntoken_file = \"{}\"\nidle = {IDLE}\n",
            api.url(),
            token.display()
        );
        Formed { cluster, api, engine, joins_without_mtu: false, nodes: Vec::new(), pods: Vec::new() }
    }

    /// Starts a weftd; its Node is there, or is not yet.
    fn start(&mut self, number: u8) {
        // The address is the Node's to say.
        let config = self.cluster.config_by(number, "routed", &self.engine);
        let config = config.replace(&format!("address = \"10.200.0.{number}\"\n"), "");
        let config = if self.joins_without_mtu { config.replace("mtu = 1450\n", "") } else { config };
        self.nodes.push(self.cluster.weft_node_unready(number, &config, ""));
    }

    /// Gives the newest node a pod, as soon as it takes one.
    fn attach(&mut self) {
        let node = self.nodes.last().unwrap();
        node.await_ready();
        self.pods.push(self.pod(node, "pod"));
    }

    fn pod(&self, node: &WeftNode, name: &str) -> (OwnNetns, Vec<IpAddr>) {
        let pod = self.cluster.sandbox(&format!("{name}{}", node.number));
        let addresses = plugin::addresses(&node.attach(name, &pod));
        (pod, addresses)
    }

    fn join_all(&mut self, numbers: std::ops::RangeInclusive<u8>) {
        for number in numbers {
            self.api.add_node(number.into());
            self.start(number);
            self.attach();
        }
    }

    fn daemon(&self, number: u8) -> Daemon {
        self.nodes.iter().find(|node| node.number == number).expect("it has joined").daemon()
    }

    /// All have said who they are, and that pods have a network.
    fn await_spoken(&self) {
        for node in &self.nodes {
            let name = format!("n{}", node.number);
            eventually("its facts are written", PATIENCE, || {
                self.api.announced(&name).is_some()
                    && self.api.condition(&name, "NetworkUnavailable").as_deref() == Some("False")
            });
        }
    }

    /// Every pod reaches every other, by both families.
    fn assert_matrix(&self) {
        for (from, _) in &self.pods {
            for address in self.pods.iter().filter(|(to, _)| to.0 != from.0).flat_map(|(_, addresses)| addresses) {
                await_answer(from, *address);
            }
        }
    }
}

#[test]
fn nodes_find_each_other_one_joins_and_one_leaves() {
    let _turn = turn();
    let mut formed = Formed::new("kube");
    formed.join_all(1..=3);
    formed.assert_matrix();
    assert_eq!(formed.daemon(2).status().ranges, ["10.244.2.0/24", "fd00:10:244:2::/64"]);
    assert_eq!(formed.daemon(2).status().underlay, "10.200.0.2:8472");
    formed.await_spoken();

    // A machine that is busy with something else may take longer; then the next one may show it.
    let newest = (4..=6).find(|number| {
        let started = Instant::now();
        formed.api.add_node((*number).into());
        formed.start(*number);
        formed.attach();
        await_answer(&formed.pods[0].0, formed.pods.last().unwrap().1[0]);
        started.elapsed() < Duration::from_secs(2)
    });
    let newest = newest.expect("a node joins in less than two seconds");
    assert_eq!(formed.daemon(1).status().peers, usize::from(newest) - 1);
    eventually("nothing is wrong", PATIENCE, || formed.daemon(1).status().problems == Vec::<String>::new());

    let refused = formed.daemon(newest).try_ask::<Empty>(&Request::Leave).unwrap_err().to_string();
    assert!(refused.contains("1 pods are attached"), "{refused}");
    formed.api.delete("nodes", &format!("n{newest}"));
    eventually("the others let it go", PATIENCE, || formed.daemon(1).status().peers == usize::from(newest) - 2);
}

#[test]
fn a_node_that_is_made_again_gives_the_new_range_and_keeps_its_pods() {
    let _turn = turn();
    let mut formed = Formed::new("kubeagain");
    formed.join_all(1..=2);
    formed.assert_matrix();
    formed.api.delete("nodes", "n1");
    eventually("it says so", PATIENCE, || {
        formed.daemon(1).status().problems.iter().any(|problem| problem.contains("no Node \"n1\""))
    });
    let mut again = node(1);
    again["metadata"]["uid"] = json!("00000000-aaaa-4000-8000-000000000001");
    again["spec"]["podCIDRs"] = json!(["fd00:10:244:71::/64", "10.244.71.0/24"]);
    formed.api.put("nodes", again);
    eventually("its new range is in force", PATIENCE, || formed.daemon(1).status().ranges[1] == "10.244.71.0/24");
    let (new, addresses) = formed.pod(&formed.nodes[0], "new");
    assert_eq!(addresses[1].to_string(), "10.244.71.2", "in the order of podCIDRs, and no gateway's");
    await_answer(&formed.pods[1].0, addresses[1]);
    await_answer(&new, formed.pods[1].1[1]);
    // The old pod, by both families, from and to everywhere.
    eventually("the others hear of what it keeps", PATIENCE, || {
        let said = formed.api.announced("n1").unwrap_or_default();
        said["former"].as_array().is_some_and(|former| former.len() == 2)
    });
    for address in &formed.pods[0].1 {
        await_answer(&formed.pods[1].0, *address);
        await_answer(&new, *address);
        await_answer(&formed.nodes[0].netns, *address);
        await_answer(&formed.nodes[1].netns, *address);
    }
    for address in &formed.pods[1].1 {
        formed.pods[0].0.ip("neigh flush all");
        await_answer(&formed.pods[0].0, *address);
    }
    formed.nodes[0].runtime.del("pod", &formed.pods[0].0);
    eventually("what nobody has any more is given up", PATIENCE, || {
        formed.api.announced("n1").is_some_and(|said| said.get("former").is_none())
    });
}

#[test]
fn while_the_api_is_away_traffic_flows_and_nodes_restart() {
    let _turn = turn();
    let mut formed = Formed::new("kubeaway");
    formed.join_all(1..=3);
    formed.assert_matrix();
    formed.await_spoken();
    let pings = Pings::start(&formed.pods[0].0, formed.pods[1].1[0]);
    formed.api.stop();
    let away = Instant::now();
    eventually("it is missed", PATIENCE, || {
        formed.daemon(1).status().problems.iter().any(|problem| problem.contains("cannot reach"))
    });
    let (_late, addresses) = formed.pod(&formed.nodes[0], "late");
    assert!(addresses[0].to_string().starts_with("10.244.1."), "{addresses:?}");
    // What it knew is on its disk within a second.
    std::thread::sleep(Duration::from_secs(2));
    formed.nodes[2].kill();
    formed.nodes[2].start_again();
    let (restarted, addresses) = formed.pod(&formed.nodes[2], "cold");
    assert!(addresses[0].to_string().starts_with("10.244.3."), "{addresses:?}");
    await_answer(&restarted, formed.pods[0].1[1]);
    let memory = formed.daemon(1).resident_kib();
    std::thread::sleep(AWAY.saturating_sub(away.elapsed()));
    let grown = formed.daemon(1).resident_kib().saturating_sub(memory);
    assert!(grown < 4096, "{grown} KiB more for waiting");
    formed.api.add_node(4);
    let patches = formed.api.count("patch nodes");
    formed.api.start_again();
    let started = Instant::now();
    eventually("all are in step", PATIENCE, || {
        (1..=3).all(|number| {
            let status = formed.daemon(number).status();
            status.peers == 3 && !status.problems.iter().any(|problem| problem.starts_with("kubernetes"))
        })
    });
    let back = started.elapsed();
    eprintln!("in step {back:?} after the API is back");
    // Five seconds, and what a machine that is busy with something else adds.
    assert!(back < Duration::from_secs(8), "{back:?}");
    assert_eq!(formed.api.count("patch nodes"), patches, "what is right is not written again");
    pings.assert_none_lost(2000);
}

#[test]
fn what_a_node_lacks_is_said_to_the_runtime_and_may_come_late() {
    let _turn = turn();
    let mut formed = Formed::new("kubelate");
    formed.join_all(1..=1);
    let mut bare = node(2);
    bare["spec"] = json!({});
    bare["status"]["addresses"] = json!([]);
    formed.start(2);
    let said = |part: &str| {
        let daemon = formed.daemon(2);
        let ready = daemon.try_ask::<Empty>(&Request::Ready).err().map(|error| error.to_string());
        ready.is_some_and(|said| said.contains(part))
    };
    eventually("there is no such Node", PATIENCE, || said("no Node \"n2\" yet"));
    formed.api.put("nodes", bare.clone());
    eventually("there is no address", PATIENCE, || said("no InternalIP yet"));
    bare["status"] = node(2)["status"].clone();
    formed.api.put("nodes", bare);
    eventually("there is no range", PATIENCE, || said("--allocate-node-cidrs"));
    let early = formed.cluster.sandbox("early");
    let refused = formed.nodes[1].runtime.call("ADD", "early", Some(&early.path()), &json!({"wait": 0}));
    let failure: Failure = serde_json::from_value(refused.json).unwrap();
    assert_eq!(failure.code, code::TRY_AGAIN, "{failure:?}");
    let status = formed.nodes[1].runtime.call("STATUS", "", None, &json!({"wait": 0})).refused(50);
    assert!(status.contains("--allocate-node-cidrs"), "{status}");
    // A pod of before whose lease is lost, and one that has ended.
    formed.api.put("pods", pod("lost", "n2", "10.244.2.2"));
    let mut ended = pod("ended", "n2", "10.244.2.3");
    ended["status"]["phase"] = json!("Failed");
    formed.api.put("pods", ended);
    formed.api.edit("nodes", "n2", |found| found["spec"] = node(2)["spec"].clone());
    formed.attach();
    assert_eq!(formed.pods[1].1[0].to_string(), "10.244.2.3", "no pod gets what another one has");
    formed.assert_matrix();

    formed.api.spoil(|faults| faults.hang_streams = true);
    std::thread::sleep(Duration::from_millis(200));
    formed.api.add_node(3);
    formed.api.spoil(|faults| faults.hang_streams = false);
    eventually("streams that hung are opened again", PATIENCE, || {
        (1..=2).all(|number| formed.daemon(number).status().peers == 2)
    });
}

#[test]
fn thousands_of_nodes_and_pods_fit() {
    const NODES: u16 = 5000;
    let _turn = turn();
    let mut formed = Formed::new("kubemany");
    (1..=NODES).for_each(|number| drop(formed.api.add_node(number)));
    (0..5000_u16).for_each(|number| {
        drop(formed.api.put("pods", pod(&format!("p{number}"), &format!("n{}", number % 50 + 2), "10.9.9.9")))
    });
    let started = Instant::now();
    formed.start(1);
    let peers = |formed: &Formed| formed.daemon(1).try_ask::<Status>(&Request::Status).map_or(0, |status| status.peers);
    eventually("all are known", Duration::from_secs(60), || peers(&formed) == usize::from(NODES) - 1);
    let known = started.elapsed();
    formed.attach();
    std::thread::sleep(Duration::from_secs(2));
    let resident = formed.daemon(1).resident_kib();
    let mut changes: Vec<Duration> = Vec::new();
    for more in 0..5 {
        let changed = Instant::now();
        formed.api.add_node(NODES + 1 + more);
        while peers(&formed) != usize::from(NODES + more) {
            assert!(changed.elapsed() < PATIENCE, "one more is not known");
            std::thread::sleep(Duration::from_millis(1));
        }
        changes.push(changed.elapsed());
        // Those that come soon after each other are gathered.
        std::thread::sleep(Duration::from_millis(1100));
    }
    changes.sort_unstable();
    eprintln!("{NODES} Nodes: known after {known:?}, {} MiB, one more after {:?}", resident >> 10, changes[2]);
    assert!(resident < 200 << 10, "{resident} KiB");
    assert!(formed.daemon(1).status().problems.iter().all(|problem| !problem.starts_with("kubernetes")));
}

#[test]
fn a_bad_configuration_a_hundred_times_a_second_harms_nobody() {
    let _turn = turn();
    let mut formed = Formed::new("kubereload");
    formed.join_all(1..=2);
    formed.assert_matrix();
    let config = formed.cluster.config_by(1, "routed", &formed.engine).replace("address = \"10.200.0.1\"\n", "");
    let bad = [
        (config.replace("mtu = 1450", "mtu = 14"), "line 4: mtu"),
        (config.replace("idle = 2", "idle = \"never\""), "kubernetes.idle"),
        (config.replace("idle = 2", "idle = 3"), "cannot change while weftd runs: kubernetes"),
    ];
    let pings = Pings::start(&formed.pods[0].0, formed.pods[1].1[0]);
    let started = Instant::now();
    for round in 0..400_u32 {
        let (text, why) = &bad[round as usize % bad.len()];
        let said = formed.nodes[0].reload(text).unwrap_err().to_string();
        assert!(said.contains(why), "{said}");
        std::thread::sleep((started + Duration::from_millis(10) * round).saturating_duration_since(Instant::now()));
    }
    formed.nodes[0].reload(&config).unwrap();
    pings.assert_none_lost(100);
    let status = formed.daemon(1).status();
    assert_eq!((status.mtu, status.peers, status.ranges.len()), (1450, 1, 2));
}

#[test]
fn a_node_whose_address_and_mtu_change_says_so_and_the_others_follow() {
    let _turn = turn();
    let mut formed = Formed::new("kubemove");
    formed.joins_without_mtu = true;
    formed.join_all(1..=2);
    formed.assert_matrix();
    formed.await_spoken();
    let (one, beacon) = (&formed.nodes[0], {
        let [(here, _), (there, addresses)] = &formed.pods[..] else { panic!("two pods") };
        Beacon::start(here, there, addresses[0])
    });
    one.netns.set("net/ipv4/conf/all/promote_secondaries", "1");
    one.netns.ip("address add 10.200.0.61/24 dev uplink");
    // What the kubelet does when it sees that.
    formed.api.edit("nodes", "n1", |node| {
        node["status"]["addresses"] = json!([{"type": "InternalIP", "address": "10.200.0.61"}]);
    });
    let said = |key: &str| formed.api.announced("n1").map(|said| said[key].clone());
    eventually("it says so", PATIENCE, || said("underlay") == Some(json!("10.200.0.61")));
    one.netns.ip("address del 10.200.0.1/24 dev uplink");
    let back = beacon.await_back(Instant::now(), PATIENCE);
    assert!(back < Duration::from_secs(5), "{back:?}");
    assert_eq!(formed.daemon(1).status().underlay, "10.200.0.61:8472");
    formed.assert_matrix();
    // The one that it has is gone before it has another one, and the Node says that later: until then nobody knows.
    one.netns.ip("address del 10.200.0.61/24 dev uplink");
    one.netns.ip("address add 10.200.0.62/24 dev uplink");
    formed.api.edit("nodes", "n1", |node| {
        node["status"]["addresses"] = json!([{"type": "InternalIP", "address": "10.200.0.62"}]);
    });
    eventually("it says so", PATIENCE, || said("underlay") == Some(json!("10.200.0.62")));
    beacon.await_back(Instant::now(), PATIENCE);
    // Its MTU, too.
    assert_eq!(said("mtu"), Some(json!(1450)));
    one.netns.ip("link set uplink mtu 1400");
    eventually("it says so", PATIENCE, || said("mtu") == Some(json!(1350)));
    let (mut wrong, begun) = (vec![String::new()], Instant::now());
    while !wrong.is_empty() {
        assert!(begun.elapsed() < 2 * PATIENCE, "{wrong:?}");
        std::thread::sleep(Duration::from_millis(100));
        wrong = formed.nodes.iter().flat_map(|node| node.daemon().status().problems).collect();
        wrong.retain(|what| !what.starts_with("in the last "));
    }
    // Nothing is written while nothing changes.
    let written = formed.api.count("PATCH");
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(formed.api.count("PATCH"), written);
    assert!(!one.log().contains("another machine says"), "{}", one.log());
    drop(beacon);
    formed.nodes.iter().for_each(|node| node.daemon().assert_conserved());
}
