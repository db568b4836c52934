//! Clusters that form by themselves, by a real etcd: nodes that come and go, an etcd that does, and traffic that notices neither.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use weft_api::{Empty, Failure, Request, code};
use weft_tests::beacon::{Beacon, Talk};
use weft_tests::cluster::{Cluster, WeftNode};
use weft_tests::command::eventually;
use weft_tests::daemon::Daemon;
use weft_tests::etcd::{ADDRESS, Etcd};
use weft_tests::machine::turn;
use weft_tests::netns::OwnNetns;
use weft_tests::plugin;
use weft_tests::traffic::{Pings, await_answer};

/// The short lease, in seconds. etcd itself gives no shorter ones than two.
const LEASE: u64 = 2;
const PATIENCE: Duration = Duration::from_secs(30);

/// A cluster whose nodes know each other by etcd only.
struct Formed {
    cluster: Cluster,
    etcd: Etcd,
    /// The table `etcd` of their configuration.
    engine: String,
    nodes: Vec<WeftNode>,
    /// A pod of each, and its addresses.
    pods: Vec<(OwnNetns, Vec<IpAddr>)>,
}

impl Formed {
    fn new(suffix: &str, rest: u64) -> Formed {
        let cluster = Cluster::new(suffix);
        let etcd = Etcd::start(&cluster);
        let engine = engine(&etcd, rest, "");
        Formed { cluster, etcd, engine, nodes: Vec::new(), pods: Vec::new() }
    }

    fn join(&mut self, number: u8) {
        let config = self.cluster.config_by(number, "routed", &self.engine);
        self.nodes.push(self.cluster.weft_node_unready(number, &config, ""));
    }

    /// Gives the newest node a pod, as soon as it takes one.
    fn attach(&mut self) {
        let node = self.nodes.last().unwrap();
        node.await_ready();
        let pod = self.cluster.sandbox(&format!("p{}", node.number));
        let addresses = plugin::addresses(&node.attach("pod", &pod));
        self.pods.push((pod, addresses));
    }

    fn join_all(&mut self, numbers: std::ops::RangeInclusive<u8>) {
        for number in numbers {
            self.join(number);
            self.attach();
        }
    }

    fn daemon(&self, number: u8) -> Daemon {
        self.nodes.iter().find(|node| node.number == number).expect("it has joined").daemon()
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

fn engine(etcd: &Etcd, rest: u64, more: &str) -> String {
    format!(
        "[etcd]\nendpoints = [\"http://10.200.0.251:2379\", \"{}\"]\nnetwork = [\"10.244.0.0/21\", \"fd00:10:244::/61\"]\n\
         lease = {LEASE}\nrest = {rest}\n{more}",
        etcd.url()
    )
}

fn ranges(daemon: &Daemon) -> Vec<String> {
    daemon.status().ranges
}

#[test]
fn five_nodes_find_each_other_a_sixth_joins_and_one_leaves() {
    let _turn = turn();
    let mut formed = Formed::new("etcd", 1);
    formed.join_all(1..=5);
    formed.assert_matrix();
    let all: BTreeSet<String> = (1..=5).flat_map(|number| ranges(&formed.daemon(number))).collect();
    assert_eq!(all.len(), 10, "each has one of each family, of its own: {all:?}");

    // A machine that is busy with something else may take longer; then the next one may show it.
    let newest = (6..=8).find(|number| {
        let started = Instant::now();
        formed.join(*number);
        formed.attach();
        await_answer(&formed.pods[0].0, formed.pods.last().unwrap().1[0]);
        started.elapsed() < Duration::from_secs(2)
    });
    let newest = newest.expect("a node joins in less than two seconds");
    let others = usize::from(newest) - 1;
    assert_eq!(formed.daemon(newest).status().peers, others);
    assert_eq!(formed.daemon(1).status().problems, Vec::<String>::new());

    let daemon = formed.daemon(newest);
    let left = ranges(&daemon);
    let refused = daemon.try_ask::<Empty>(&Request::Leave).unwrap_err().to_string();
    assert!(refused.contains("1 pods are attached"), "{refused}");
    formed.nodes[others].runtime.del("pod", &formed.pods[others].0);
    daemon.ask::<Empty>(&Request::Leave);
    eventually("the others let it go", PATIENCE, || formed.daemon(1).status().peers == others - 1);
    let not_ready = daemon.try_ask::<Empty>(&Request::Ready).unwrap_err().to_string();
    assert!(not_ready.contains("has left the cluster"), "{not_ready}");
    let slots = || formed.etcd.keys("/weft/slots/").len();
    eventually("its part of the network is free after its lease", PATIENCE, || slots() == others);
    formed.nodes[others].stop();
    formed.nodes[others].start_again();
    assert_eq!(ranges(&formed.daemon(newest)).len(), left.len(), "it may come again");
}

#[test]
fn a_node_cut_off_from_etcd_beyond_its_lease_loses_nothing() {
    let _turn = turn();
    let mut formed = Formed::new("etcdcut", 1);
    formed.join_all(1..=3);
    formed.assert_matrix();
    let before = ranges(&formed.daemon(3));
    let to = Pings::start(&formed.pods[0].0, formed.pods[2].1[0]);
    let from = Pings::start(&formed.pods[2].0, formed.pods[1].1[1]);

    formed.nodes[2].netns.ip(&format!("neigh replace {ADDRESS} lladdr 02:00:00:00:00:99 dev uplink nud permanent"));
    let alive = || formed.etcd.keys("/weft/nodes/").len() + formed.etcd.keys("/weft/resting/").len();
    eventually("its leases end, the short and the long one", Duration::from_secs(60), || alive() == 4);
    // As many newcomers as there are parts left: none gets the one that is in use.
    formed.join_all(4..=8);
    let all: Vec<String> = (1..=8).flat_map(|number| ranges(&formed.daemon(number))).collect();
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 16, "{all:?}");
    eventually("it says so", Duration::from_secs(30), || {
        formed.daemon(3).status().problems.iter().any(|problem| problem.starts_with("etcd: "))
    });
    to.assert_none_lost(100);
    from.assert_none_lost(100);

    formed.nodes[2].netns.ip(&format!("neigh delete {ADDRESS} dev uplink"));
    eventually("it is back in step", Duration::from_secs(60), || formed.daemon(3).status().problems.is_empty());
    assert_eq!(ranges(&formed.daemon(3)), before);
    assert_eq!(formed.daemon(3).status().peers, 7);
    formed.assert_matrix();
}

#[test]
fn while_etcd_is_away_traffic_flows_and_nodes_restart() {
    let _turn = turn();
    let mut formed = Formed::new("etcdaway", 600);
    formed.join_all(1..=3);
    formed.assert_matrix();
    let before = ranges(&formed.daemon(3));
    let pings = Pings::start(&formed.pods[0].0, formed.pods[1].1[0]);
    formed.etcd.stop();
    // Its own pods' devices end with it, but what it knows of the cluster does not.
    formed.nodes[2].kill();
    formed.nodes[2].start_again();
    assert_eq!(ranges(&formed.daemon(3)), before);
    let pod = formed.cluster.sandbox("late");
    let addresses = plugin::addresses(&formed.nodes[2].attach("late", &pod));
    await_answer(&pod, formed.pods[0].1[0]);
    await_answer(&formed.pods[0].0, addresses[1]);
    std::thread::sleep(Duration::from_secs(3 * LEASE));
    pings.assert_none_lost(100);
    let revision = |etcd: &Etcd| {
        let said: serde_json::Value = serde_json::from_str(&etcd.ctl("get --prefix /weft/slots -w json")).unwrap();
        let kvs = said["kvs"].as_array().unwrap();
        kvs.iter().map(|kv| kv["mod_revision"].as_i64().unwrap()).collect::<Vec<_>>()
    };
    formed.etcd.start_again();
    let slots = revision(&formed.etcd);
    for number in 1..=3 {
        let in_step = || !formed.daemon(number).status().problems.iter().any(|problem| problem.starts_with("etcd"));
        eventually("it is back in step", Duration::from_secs(30), in_step);
    }
    assert_eq!(revision(&formed.etcd), slots, "what was right was not written again");
    assert_eq!(ranges(&formed.daemon(3)), before);
}

#[test]
fn an_etcd_restored_from_an_older_state_learns_what_it_forgot() {
    let _turn = turn();
    let mut formed = Formed::new("etcdold", 600);
    formed.join_all(1..=2);
    let snapshot = formed.etcd.snapshot();
    formed.join_all(3..=4);
    formed.assert_matrix();
    let before: Vec<Vec<String>> = (1..=4).map(|number| ranges(&formed.daemon(number))).collect();
    let pings = Pings::start(&formed.pods[0].0, formed.pods[3].1[0]);
    formed.etcd.stop();
    formed.etcd.restore(&snapshot);
    eventually("all four are known to etcd again", Duration::from_secs(60), || {
        formed.etcd.keys("/weft/slots/").len() == 4 && formed.etcd.keys("/weft/nodes/").len() == 4
    });
    for number in 1..=4 {
        let status = || formed.daemon(number).status();
        eventually("each node knows the others", PATIENCE, || status().peers == 3 && status().problems.is_empty());
    }
    let after: Vec<Vec<String>> = (1..=4).map(|number| ranges(&formed.daemon(number))).collect();
    assert_eq!(after, before);
    pings.assert_none_lost(50);
    formed.assert_matrix();
}

#[test]
fn a_node_without_ranges_says_so_until_it_has_some() {
    let _turn = turn();
    let mut formed = Formed::new("etcdlate", 600);
    formed.etcd.stop();
    formed.join(1);
    let daemon = formed.daemon(1);
    let reason = |request: &Request| -> Failure {
        match daemon.try_ask::<Empty>(request) {
            Err(weft_api::ClientError::Refused(failure)) => failure,
            other => panic!("{other:?}"),
        }
    };
    eventually("it listens", PATIENCE, || daemon.socket.exists());
    eventually("it says why it cannot go on", PATIENCE, || reason(&Request::Ready).msg.contains("etcd"));
    assert_eq!(reason(&Request::Ready).code, code::NOT_AVAILABLE);
    assert_eq!(reason(&Request::Status).code, code::TRY_AGAIN);
    let pod = formed.cluster.sandbox("early");
    let node = &formed.nodes[0];
    let said = node.runtime.call("ADD", "early", Some(&pod.path()), &serde_json::json!({"wait": 0})).refused(11);
    assert!(said.contains("does not know its ranges yet"), "{said}");
    node.runtime.del("early", &pod);
    formed.etcd.start_again();
    formed.attach();
    let tombstones = formed.cluster.folder.path().join("n1.state/tombstones");
    eventually("the tombstone is honoured", PATIENCE, || std::fs::read_dir(&tombstones).unwrap().count() == 0);
}

#[test]
fn one_of_two_machines_with_one_name_is_refused_and_told() {
    let _turn = turn();
    let mut formed = Formed::new("etcdtwo", 600);
    formed.join_all(1..=1);
    let config = formed.cluster.config_by(2, "routed", &formed.engine).replace("node = \"n2\"", "node = \"n1\"");
    let other = formed.cluster.weft_node_unready(2, &config, "");
    eventually("the second is told", PATIENCE, || {
        let said = other.daemon().try_ask::<Empty>(&Request::Ready).unwrap_err().to_string();
        said.contains("another machine, at 10.200.0.1, is the node \"n1\"")
    });
    assert_eq!(formed.etcd.keys("/weft/slots/").len(), 1);
    assert_eq!(formed.daemon(1).status().problems, Vec::<String>::new());
}

#[test]
fn what_strangers_write_denies_itself() {
    let _turn = turn();
    let mut formed = Formed::new("etcdbad", 600);
    formed.join_all(1..=2);
    let own = formed.etcd.keys("/weft/slots/");
    let free = (0..8).map(|slot| format!("/weft/slots/{slot}")).find(|key| !own.contains(key)).unwrap();
    formed
        .etcd
        .ctl(&format!("put {free} {{\"identity\":\"x\",\"name\":\"n9\",\"underlay\":\"10.200.0.1\",\"ranges\":[]}}"));
    formed.etcd.ctl("put /weft/nodes/n9 {\"identity\":\"x\",\"underlay\":\"10.200.0.1\"}");
    formed.etcd.ctl("put /weft/slots/4000000000 garbage");
    formed.etcd.ctl("put /weft/nodes/ 7");
    let daemon = formed.daemon(2);
    let problems = || daemon.status().problems;
    eventually("both are reported", PATIENCE, || {
        let all = problems().join("\n");
        all.contains("the node \"n9\" is left out: 10.200.0.1 is the address of n1") && all.contains("cannot be read")
    });
    formed.join_all(3..=3);
    formed.assert_matrix();
    formed.etcd.ctl(&format!("del {free}"));
    formed.etcd.ctl("del /weft/slots/4000000000");
    eventually("nothing is wrong any more", PATIENCE, || problems().is_empty());
}

#[test]
fn passwords_certificates_and_tokens_that_end_are_no_obstacle() {
    let _turn = turn();
    let cluster = Cluster::new("etcdtls");
    let etcd = Etcd::start_guarded(&cluster, 2);
    let folder = cluster.folder.path().display().to_string();
    std::fs::write(cluster.folder.path().join("password"), "secret\n").unwrap();
    let more = format!(
        "user = \"weft\"\npassword_file = \"{folder}/password\"\nca = \"{folder}/ca.pem\"\ncertificate = \"{folder}/client.pem\"\n\
         key = \"{folder}/client.key\"\n"
    );
    let engine = engine(&etcd, 600, &more);
    let mut formed = Formed { cluster, etcd, engine, nodes: Vec::new(), pods: Vec::new() };
    formed.join_all(1..=2);
    formed.assert_matrix();
    // Several tokens long: leases are kept all the while.
    std::thread::sleep(Duration::from_secs(3 * LEASE));
    assert_eq!(formed.daemon(1).status().problems, Vec::<String>::new());
    assert_eq!(formed.etcd.keys("/weft/nodes/").len(), 2);
    formed.join_all(3..=3);
    eventually("the first hears of the third", PATIENCE, || formed.daemon(1).status().peers == 2);
    std::fs::write(formed.cluster.folder.path().join("password"), "wrong").unwrap();
    formed.join(4);
    eventually("a wrong password is said to be one", PATIENCE, || {
        let said = formed.daemon(4).try_ask::<Empty>(&Request::Ready).err().map(|error| error.to_string());
        said.is_some_and(|said| said.contains("etcd does not let the user \"weft\" in"))
    });
}

#[test]
fn a_node_that_gets_another_address_says_so_and_the_others_follow() {
    let _turn = turn();
    let mut formed = Formed::new("etcdmove", 3600);
    for number in 1..=2 {
        // The address is that of the uplink.
        let config = formed.cluster.config_by(number, "routed", &formed.engine);
        let config = config.replace(&format!("address = \"10.200.0.{number}\"\n"), "");
        formed.nodes.push(formed.cluster.weft_node_unready(number, &config, ""));
        formed.attach();
    }
    formed.assert_matrix();
    let part = ranges(&formed.daemon(1));
    let [(here, _), (there, addresses)] = &formed.pods[..] else { panic!("two pods") };
    let beacon = Beacon::start(here, there, addresses[0]);
    let mut talk = Talk::start(here, there, addresses[0]);
    talk.goes_on();
    for number in 71..=72 {
        let one = &formed.nodes[0].netns;
        one.ip("address flush dev uplink scope global");
        one.ip(&format!("address add 10.200.0.{number}/24 dev uplink"));
        let back = beacon.await_back(Instant::now(), PATIENCE);
        assert!(back < Duration::from_secs(10), "{back:?}");
        talk.goes_on();
    }
    assert_eq!(ranges(&formed.daemon(1)), part);
    eventually("nothing is wrong", PATIENCE, || {
        formed.nodes.iter().all(|node| node.daemon().status().problems.iter().all(|what| what.starts_with("in the last ")))
    });
    drop(beacon);
    formed.nodes.iter().for_each(|node| node.daemon().assert_conserved());
}
