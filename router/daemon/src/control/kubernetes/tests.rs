//! The source against the API's double: what a cluster does to it, and everything that can go wrong with a server.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{mpsc, oneshot, watch};
use weft_tests::command::eventually;
use weft_tests::kubernetes::{Api, node, pod};

use super::address::discover;
use super::*;
use crate::control::host::Host;
use crate::control::source::{self, View};

const PATIENCE: Duration = Duration::from_secs(30);

/// Nodes' sources, all in one process.
struct Sources {
    runtime: Runtime,
    folder: TempDir,
}

/// One of them.
struct Followed {
    views: watch::Receiver<View>,
    orders: mpsc::Sender<Order>,
}

impl Sources {
    fn new() -> Sources {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        Sources { runtime, folder: tempfile::tempdir().unwrap() }
    }

    fn config(&self, number: u16, table: &str) -> Config {
        let folder = self.folder.path().display();
        let [high, low] = number.to_be_bytes();
        let text = format!(
            "node = \"n{number}\"\nmode = \"routed\"\nmtu = 1450\nstate_dir = \"{folder}/n{number}\"\n\
             [underlay]\naddress = \"10.200.{high}.{low}\"\n[kubernetes]\n{table}"
        );
        Config::read(&text, &Host::default()).unwrap().config
    }

    fn follow(&self, number: u16, table: &str) -> Followed {
        self.follow_with(&self.config(number, table))
    }

    fn follow_with(&self, config: &Config) -> Followed {
        let _inside = self.runtime.enter();
        let source::Following { views, orders, facts: _facts } = source::follow(config, None).unwrap();
        Followed { views, orders }
    }

    fn file(&self, name: &str, text: &str) -> std::path::PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}

impl Followed {
    fn cluster(&self) -> Arc<Cluster> {
        self.views.borrow().cluster.clone().unwrap_or_default()
    }

    fn peers(&self) -> usize {
        self.cluster().peers.len()
    }

    fn ranges(&self) -> Vec<String> {
        self.cluster().ranges.iter().map(ToString::to_string).collect()
    }

    fn trouble(&self) -> String {
        self.views.borrow().trouble.clone().unwrap_or_default()
    }

    #[track_caller]
    fn await_peers(&self, count: usize) {
        let started = Instant::now();
        while self.peers() != count {
            assert!(
                started.elapsed() < PATIENCE,
                "{} peers instead of {count}: {:?}",
                self.peers(),
                self.views.borrow()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[track_caller]
    fn await_trouble(&self, part: &str) {
        let started = Instant::now();
        while !self.trouble().contains(part) || (part.is_empty() && !self.trouble().is_empty()) {
            assert!(started.elapsed() < PATIENCE, "the trouble is not {part:?} but {:?}", self.trouble());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A token is not asked for; a short time of silence.
fn at(api: &Api, sources: &Sources) -> String {
    let token = sources.file("token", "good");
    format!("servers = [\"{}\"]\ntoken_file = \"{}\"\nidle = 2\n", api.url(), token.display())
}

fn three() -> (Api, Sources, Followed) {
    let (api, sources) = (Api::start(), Sources::new());
    (1..=3).for_each(|number| drop(api.add_node(number)));
    let followed = sources.follow(1, &at(&api, &sources));
    followed.await_peers(2);
    eventually("its facts are written", PATIENCE, || api.announced("n1").is_some());
    (api, sources, followed)
}

#[test]
fn nodes_become_peers_and_this_nodes_facts_are_written_once() {
    let (api, _sources, followed) = three();
    assert_eq!(followed.ranges(), ["10.244.1.0/24", "fd00:10:244:1::/64"]);
    let said = api.announced("n1").unwrap();
    assert_eq!((said["underlay"].as_str(), said["encapsulation"].as_str()), (Some("10.200.0.1"), Some("vxlan")));
    assert_eq!((said["mtu"].as_u64(), said["vni"].as_u64(), said["port"].as_u64()), (Some(1450), Some(1), Some(8472)));
    assert_eq!(api.condition("n1", "NetworkUnavailable"), None, "it does not serve yet");
    followed.orders.blocking_send(Order::Serving).unwrap();
    eventually("the Node has a network", PATIENCE, || {
        api.condition("n1", "NetworkUnavailable").as_deref() == Some("False")
    });
    assert_eq!(api.condition("n1", "MemoryPressure").as_deref(), Some("False"), "other conditions are still there");
    let patches: Vec<_> = api.asked().into_iter().filter(|asked| asked.verb == "patch").collect();
    assert!(patches.iter().all(|asked| asked.manager == "weftd"), "{patches:?}");

    api.add_node(4);
    followed.await_peers(3);
    api.delete("nodes", "n2");
    followed.await_peers(2);
    let before = api.asked().len();
    for beat in 0..20 {
        api.edit("nodes", "n3", |node| node["status"]["beat"] = json!(beat));
    }
    std::thread::sleep(Duration::from_secs(1));
    // Streams may have been opened anew, for nothing else was heard of the pods.
    assert!(api.asked().len() - before <= 3, "{:?}", &api.asked()[before..]);
    assert_eq!((api.count("patch nodes"), api.count("patch nodes/status"), api.count("list nodes")), (1, 1, 1));
    assert_eq!(followed.trouble(), "");
}

#[test]
fn somebody_who_removes_what_we_said_has_it_written_again() {
    let (api, _sources, _followed) = three();
    api.edit("nodes", "n1", |node| drop(node["metadata"].as_object_mut().unwrap().remove("annotations")));
    eventually("it is written again", PATIENCE, || api.announced("n1").is_some());
}

#[test]
fn a_server_that_was_away_is_found_again_and_what_is_right_is_not_written_again() {
    let (mut api, _sources, followed) = three();
    api.stop();
    followed.await_trouble("cannot reach");
    assert_eq!((followed.peers(), followed.ranges().len()), (2, 2), "what was known stays");
    api.delete("nodes", "n2");
    api.add_node(5);
    api.add_node(6);
    let patches = api.count("patch nodes");
    api.start_again();
    let started = Instant::now();
    followed.await_peers(3);
    followed.await_trouble("");
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    assert_eq!((api.count("patch nodes"), api.count("list nodes")), (patches, 1), "it goes on where it was");
}

#[test]
fn a_history_that_is_forgotten_means_that_everything_is_listed_again() {
    let (mut api, _sources, followed) = three();
    api.stop();
    api.delete("nodes", "n2");
    api.add_node(7);
    api.add_node(8);
    api.forget();
    api.start_again();
    followed.await_peers(3);
    assert!(api.count("list nodes") >= 2);
    followed.await_trouble("");
}

#[test]
fn a_server_that_was_set_back_is_believed() {
    let (mut api, _sources, followed) = three();
    api.add_node(4);
    api.add_node(5);
    api.edit("nodes", "n3", |node| node["status"]["beat"] = json!(1));
    followed.await_peers(4);
    api.stop();
    api.set_back(2);
    api.start_again();
    followed.await_peers(3);
    followed.await_trouble("");
}

#[test]
fn a_stream_that_hangs_is_opened_again() {
    let (api, _sources, followed) = three();
    api.spoil(|faults| faults.hang_streams = true);
    std::thread::sleep(Duration::from_millis(100));
    api.add_node(4);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(followed.peers(), 2, "the stream hangs");
    api.spoil(|faults| faults.hang_streams = false);
    followed.await_peers(3);
    assert_eq!((followed.trouble(), api.count("list nodes")), (String::new(), 1));
}

#[test]
fn a_server_that_hangs_altogether_is_said_to_and_given_up() {
    let (api, sources) = (Api::start(), Sources::new());
    api.add_node(1);
    api.spoil(|faults| faults.hang_requests = true);
    let followed = sources.follow(1, &at(&api, &sources));
    followed.await_trouble("does not answer, asked to list nodes");
    api.spoil(|faults| faults.hang_requests = false);
    eventually("its ranges are known", PATIENCE, || followed.ranges().len() == 2);
}

#[test]
fn bookmarks_keep_a_stream_without_changes_open() {
    let (api, sources) = (Api::start(), Sources::new());
    api.add_node(1);
    api.spoil(|faults| faults.bookmark_every = Duration::from_millis(300));
    let followed = sources.follow(1, &at(&api, &sources));
    eventually("its ranges are known", PATIENCE, || followed.ranges().len() == 2 && api.announced("n1").is_some());
    std::thread::sleep(Duration::from_millis(300));
    let before = api.asked().len();
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(api.asked().len(), before, "nothing is asked in the steady state: {:?}", &api.asked()[before..]);
}

#[test]
fn refusals_of_all_kinds_pass() {
    for status in [500, 429, 503, 410] {
        let (api, sources) = (Api::start(), Sources::new());
        (1..=3).for_each(|number| drop(api.add_node(number)));
        api.spoil(|faults| (faults.fail, faults.fail_with) = (6, status));
        let followed = sources.follow(1, &at(&api, &sources));
        followed.await_peers(2);
        eventually("its facts are written", PATIENCE, || api.announced("n1").is_some());
        followed.await_trouble("");
    }
}

#[test]
fn streams_that_come_in_pieces_are_put_together() {
    let (api, sources) = (Api::start(), Sources::new());
    (1..=2).for_each(|number| drop(api.add_node(number)));
    api.spoil(|faults| faults.slow = Some((61, Duration::from_micros(200))));
    let followed = sources.follow(1, &at(&api, &sources));
    followed.await_peers(1);
    api.add_node(3);
    followed.await_peers(2);
}

#[test]
fn thousands_of_objects_come_in_pages() {
    let (api, sources) = (Api::start(), Sources::new());
    (1..=1200).for_each(|number| drop(api.add_node(number)));
    (0..1100).for_each(|number| drop(api.put("pods", pod(&format!("p{number}"), "n1", "10.244.1.9"))));
    let followed = sources.follow(1, &at(&api, &sources));
    followed.await_peers(1199);
    assert!(api.count("list nodes") >= 3);
    assert_eq!(followed.trouble(), "");
    eventually("pods are listed, too", PATIENCE, || api.count("list pods") >= 3 && api.count("watch pods") >= 1);
}

#[test]
fn addresses_of_pods_that_live_are_known() {
    let (api, sources) = (Api::start(), Sources::new());
    api.add_node(1);
    api.put("pods", pod("one", "n1", "10.244.1.9"));
    api.put("pods", pod("elsewhere", "n2", "10.244.2.9"));
    let mut ended = pod("ended", "n1", "10.244.1.8");
    ended["status"]["phase"] = json!("Succeeded");
    api.put("pods", ended);
    let mut hosts = pod("hosts", "n1", "10.200.0.1");
    hosts["spec"]["hostNetwork"] = json!(true);
    api.put("pods", hosts);
    let followed = sources.follow(1, &at(&api, &sources));
    let known = || followed.views.borrow().pods.iter().map(ToString::to_string).collect::<Vec<_>>();
    eventually("its ranges are known", PATIENCE, || followed.ranges().len() == 2);
    assert_eq!(known(), ["10.244.1.9"], "before the first range is");
    api.put("pods", pod("two", "n1", "10.244.1.7"));
    eventually("the second one is known", PATIENCE, || known() == ["10.244.1.7", "10.244.1.9"]);
    api.delete("pods", "default/one");
    eventually("the first one is gone", PATIENCE, || known() == ["10.244.1.7"]);
}

#[test]
fn a_token_that_ended_is_read_again() {
    let (api, sources) = (Api::start(), Sources::new());
    (1..=2).for_each(|number| drop(api.add_node(number)));
    api.spoil(|faults| faults.token = Some("good".into()));
    let followed = sources.follow(1, &at(&api, &sources));
    followed.await_peers(1);
    api.spoil(|faults| faults.token = Some("better".into()));
    followed.await_trouble("(401");
    assert!(followed.trouble().contains("/token is not valid there, or no more"), "{}", followed.trouble());
    sources.file("token", "better");
    api.add_node(3);
    followed.await_peers(2);
    followed.await_trouble("");
    std::fs::remove_file(sources.folder.path().join("token")).unwrap();
    followed.await_trouble("there is no token: cannot read");
}

#[test]
fn what_is_forbidden_is_named() {
    let (api, sources) = (Api::start(), Sources::new());
    (1..=2).for_each(|number| drop(api.add_node(number)));
    api.spoil(|faults| {
        faults.forbidden = vec![("list", "nodes".into()), ("patch", "nodes".into()), ("watch", "pods".into())]
    });
    let followed = sources.follow(1, &at(&api, &sources));
    followed.await_trouble("refused to list nodes (403, nodes is forbidden");
    assert!(followed.trouble().contains("deploy/kubernetes"), "{}", followed.trouble());
    api.spoil(|faults| drop(faults.forbidden.remove(0)));
    followed.await_peers(1);
    followed.await_trouble("refused to watch pods");
    api.spoil(|faults| drop(faults.forbidden.pop()));
    followed.await_trouble("refused to patch nodes");
    assert_eq!(followed.ranges().len(), 2, "it serves nevertheless");
    api.spoil(|faults| faults.forbidden.clear());
    followed.await_trouble("");
}

#[test]
fn bad_objects_deny_themselves_alone() {
    let (api, _sources, followed) = three();
    let mut absurd = node(4);
    absurd["metadata"]["annotations"]["weft.internal/node"] = json!("{\"underlay\": 7}");
    api.put("nodes", absurd);
    let mut unparsable = node(5);
    unparsable["spec"]["podCIDRs"] = json!(["10.244.5.0/99"]);
    api.put("nodes", unparsable);
    let mut strange = node(6);
    strange["spec"] = json!("strange");
    api.put("nodes", strange);
    let mut thief = node(7);
    thief["spec"]["podCIDRs"] = json!(["10.244.3.0/25"]);
    api.put("nodes", thief);
    api.add_node(8);
    followed.await_peers(3);
    let problems = || followed.cluster().problems.clone();
    eventually("all four are said", PATIENCE, || problems().len() == 4);
    for part in ["weft.internal/node cannot be read", "no prefix", "it cannot be read", "overlaps 10.244.3.0/24 of n3"]
    {
        assert!(problems().iter().any(|problem| problem.contains(part)), "{part}: {:?}", problems());
    }
    let mut good = node(4);
    good["metadata"]["uid"] = json!("");
    api.put("nodes", good);
    followed.await_peers(4);
}

#[test]
fn a_node_without_ranges_says_what_gives_it_some() {
    let (api, sources) = (Api::start(), Sources::new());
    let mut bare = node(1);
    bare["spec"] = json!({});
    api.put("nodes", bare);
    let followed = sources.follow(1, &at(&api, &sources));
    followed.await_trouble("--allocate-node-cidrs");
    assert!(followed.ranges().is_empty());
    api.add_node(1);
    eventually("its ranges are known", PATIENCE, || followed.ranges().len() == 2 && followed.trouble().is_empty());
    let other = sources.follow(9, &at(&api, &sources));
    other.await_trouble("no Node \"n9\"");
}

#[test]
fn a_node_that_is_made_again_has_its_new_range_and_facts() {
    let (api, _sources, followed) = three();
    api.delete("nodes", "n1");
    followed.await_trouble("no Node \"n1\"");
    assert_eq!(followed.ranges(), ["10.244.1.0/24", "fd00:10:244:1::/64"], "what it had stays");
    let mut again = node(1);
    again["metadata"]["uid"] = json!("another");
    again["spec"]["podCIDRs"] = json!(["10.244.77.0/24"]);
    api.put("nodes", again);
    eventually("the new one is in force", PATIENCE, || {
        followed.ranges() == ["10.244.77.0/24"] && followed.trouble().is_empty()
    });
    eventually("its facts are written", PATIENCE, || api.announced("n1").is_some());
}

#[test]
fn of_two_machines_with_one_name_the_first_stays() {
    let (api, sources, first) = three();
    first.orders.blocking_send(Order::Serving).unwrap();
    let clone = Config {
        state_dir: sources.folder.path().join("clone"),
        underlay: super::super::config::Underlay {
            address: "10.200.0.99".parse().unwrap(),
            ..sources.config(1, "").underlay
        },
        ..sources.config(1, &at(&api, &sources))
    };
    let second = sources.follow_with(&clone);
    second.await_trouble("another machine is the Node \"n1\"");
    assert!(second.ranges().is_empty());
    eventually("the first insists", PATIENCE, || {
        api.announced("n1").is_some_and(|said| said["underlay"] == "10.200.0.1")
    });
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(first.ranges().len(), 2);
    assert!(api.count("patch nodes") <= 5, "they do not fight: {}", api.count("patch nodes"));
    assert_eq!(api.announced("n1").unwrap()["underlay"], "10.200.0.1");
}

#[test]
fn a_machine_with_a_new_disk_gets_its_node_back_after_a_while() {
    let (api, sources) = (Api::start(), Sources::new());
    let mut before = node(1);
    let said = json!({"identity": "old", "underlay": "10.200.0.1", "encapsulation": "vxlan", "vni": 1, "port": 8472, "mode": "routed",
        "vtep_mac": "02:00:00:00:00:01", "mtu": 1450});
    before["metadata"]["annotations"]["weft.internal/node"] = json!(said.to_string());
    api.put("nodes", before);
    let followed = sources.follow(1, &at(&api, &sources));
    followed.await_trouble("waiting whether it objects");
    assert!(followed.ranges().is_empty());
    eventually("nobody objects", PATIENCE, || followed.ranges().len() == 2 && followed.trouble().is_empty());
}

#[test]
fn the_underlay_address_may_come_late() {
    let (api, sources) = (Api::start(), Sources::new());
    let mut late = node(1);
    late["status"]["addresses"] = json!([{"type": "Hostname", "address": "n1"}]);
    api.put("nodes", late);
    let config = sources.config(1, &at(&api, &sources));
    let super::super::config::source::SourceConfig::Kubernetes(kubernetes) = config.source else { panic!() };
    let (told, mut heard) = mpsc::unbounded_channel();
    let (sender, found) = oneshot::channel();
    let asked = (*kubernetes).clone();
    sources.runtime.spawn(async move {
        let tell = move |why| drop(told.send(why));
        sender.send(discover(&asked, "n1", None, tell).await).unwrap();
    });
    assert!(heard.blocking_recv().unwrap().contains("has no InternalIP yet"));
    api.add_node(1);
    assert_eq!(found.blocking_recv().unwrap(), Some("10.200.0.1".parse().unwrap()));
    let said = "weft.internal/underlay-address";
    api.edit("nodes", "n1", |node| node["metadata"]["annotations"][said] = json!("10.9.9.9"));
    let found = sources.runtime.block_on(discover(&kubernetes, "n1", None, |_| ()));
    assert_eq!(found, Some("10.9.9.9".parse().unwrap()), "the operator's word goes first");
}

#[test]
fn two_hundred_nodes_that_join_at_once_are_no_herd() {
    const NODES: u16 = 200;
    let (api, sources) = (Api::start(), Sources::new());
    api.spoil(|faults| faults.bookmark_every = Duration::from_millis(500));
    for number in 1..=NODES {
        // Forty thousand of them are read here, by one process that is not optimised.
        let mut small = node(number);
        small["metadata"]["managedFields"] = json!([]);
        small["status"]["images"] = json!([]);
        api.put("nodes", small);
    }
    let table = at(&api, &sources).replace("idle = 2", "idle = 60");
    let started = Instant::now();
    let all: Vec<Followed> = (1..=NODES).map(|number| sources.follow(number, &table)).collect();
    let patience = PATIENCE * 10;
    eventually("all know all", patience, || all.iter().all(|followed| followed.peers() == usize::from(NODES) - 1));
    let known = started.elapsed();
    eventually("all have spoken", patience, || {
        (1..=NODES).all(|number| api.announced(&format!("n{number}")).is_some())
    });
    let spoken = started.elapsed();
    let announced = |followed: &Followed| followed.cluster().peers.iter().all(|peer| peer.vtep_mac.is_local());
    assert!(all.iter().all(announced));
    // One list, stream and patch each, and as much for pods.
    let asked = api.asked().len();
    assert!(asked <= usize::from(NODES) * 8, "{asked} requests of {NODES} nodes");
    std::thread::sleep(Duration::from_secs(2));
    let settled = api.asked().len();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(api.asked().len(), settled, "nothing is asked in the steady state");
    eprintln!(
        "{NODES} nodes: peers known after {known:?}, all spoken after {spoken:?}, {asked} requests, {} in the busiest second",
        api.busiest_second()
    );
}

#[test]
fn servers_with_certificates_are_trusted_if_the_authority_is() {
    let sources = Sources::new();
    let folder = sources.folder.path();
    certificates(folder);
    let listen = || std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let api = Api::start_at(listen, Some((&folder.join("server.pem"), &folder.join("server.key"))));
    (1..=2).for_each(|number| drop(api.add_node(number)));
    let table = at(&api, &sources);
    let good = sources.follow(1, &format!("{table}ca = \"{}\"\n", folder.join("ca.pem").display()));
    good.await_peers(1);
    let wrong = sources.follow(2, &format!("{table}ca = \"{}\"\n", folder.join("other.pem").display()));
    wrong.await_trouble("is the CA the one that signed");
    let plain = sources.follow(2, &table.replace("https://", "http://"));
    plain.await_trouble("cannot reach http://127.0.0.1");
}

/// An authority, another one, and a server's certificate by each.
pub fn certificates(folder: &Path) {
    let script = "set -e
        for ca in ca other; do
            openssl req -x509 -newkey rsa:2048 -nodes -keyout $ca.key -out $ca.pem -days 2 -subj /CN=weft-test-$ca
        done
        printf 'subjectAltName=IP:127.0.0.1\\nextendedKeyUsage=serverAuth\\n' > server.ext
        for both in server:ca stranger:other; do
            name=${both%:*} ca=${both#*:}
            openssl req -newkey rsa:2048 -nodes -keyout $name.key -out $name.csr -subj /CN=server
            openssl x509 -req -in $name.csr -CA $ca.pem -CAkey $ca.key -CAcreateserial -out $name.pem -days 2 -extfile server.ext
        done";
    let done = std::process::Command::new("sh").args(["-c", script]).current_dir(folder).output().unwrap();
    assert!(done.status.success(), "{}: `apt-get install openssl`", String::from_utf8_lossy(&done.stderr));
}
