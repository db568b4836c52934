//! Clusters that form by the Kubernetes API: Nodes that come and go, an API server that does, and traffic that notices neither.

use std::net::{IpAddr, TcpListener};
use std::time::{Duration, Instant};

use serde_json::json;
use weft_api::{Empty, Failure, Request, code};
use weft_tests::cluster::{Cluster, WeftNode};
use weft_tests::command::eventually;
use weft_tests::daemon::Daemon;
use weft_tests::kubernetes::{Api, node};
use weft_tests::machine::turn;
use weft_tests::netns::{Netns, OwnNetns};
use weft_tests::plugin;
use weft_tests::traffic::{Pings, await_answer};

/// The API server's address on the underlay.
const ADDRESS: &str = "10.200.0.250";
/// Seconds of silence after which a stream of changes is taken to hang.
const IDLE: u64 = 2;
const PATIENCE: Duration = Duration::from_secs(30);

/// A cluster whose nodes know each other by the Kubernetes API only.
struct Formed {
    cluster: Cluster,
    api: Api,
    /// The table `kubernetes` of their configuration.
    engine: String,
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
        Formed { cluster, api, engine, nodes: Vec::new(), pods: Vec::new() }
    }

    /// Starts a weftd; its Node is there, or is not yet.
    fn start(&mut self, number: u8) {
        // The address is the Node's to say.
        let config = self.cluster.config_by(number, "routed", &self.engine);
        let config = config.replace(&format!("address = \"10.200.0.{number}\"\n"), "");
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
    again["spec"]["podCIDRs"] = json!(["10.244.71.0/24", "fd00:10:244:71::/64"]);
    formed.api.put("nodes", again);
    eventually("its new range is in force", PATIENCE, || formed.daemon(1).status().ranges[0] == "10.244.71.0/24");
    assert_eq!(formed.daemon(1).leases().len(), 2, "the old leases are still there");
    let (new, addresses) = formed.pod(&formed.nodes[0], "new");
    assert_eq!(addresses[0].to_string(), "10.244.71.2");
    await_answer(&formed.pods[1].0, addresses[0]);
    await_answer(&new, formed.pods[1].1[1]);
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
    std::thread::sleep(Duration::from_secs(8));
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
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert_eq!(formed.api.count("patch nodes"), patches, "what is right is not written again");
    pings.assert_none_lost(400);
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
    let pod = formed.cluster.sandbox("early");
    let refused = formed.nodes[1].runtime.call("ADD", "early", Some(&pod.path()), &json!({"wait": 0}));
    let failure: Failure = serde_json::from_value(refused.json).unwrap();
    assert_eq!(failure.code, code::TRY_AGAIN, "{failure:?}");
    formed.api.edit("nodes", "n2", |found| found["spec"] = node(2)["spec"].clone());
    formed.attach();
    formed.assert_matrix();

    formed.api.spoil(|faults| faults.hang_streams = true);
    std::thread::sleep(Duration::from_millis(200));
    formed.api.add_node(3);
    formed.api.spoil(|faults| faults.hang_streams = false);
    eventually("streams that hung are opened again", PATIENCE, || {
        (1..=2).all(|number| formed.daemon(number).status().peers == 2)
    });
}
