//! Addresses by DHCP: the reference plugin `dhcp` and its daemon, a server in a trusted pod, and pods that lie.

use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use weft_tests::cluster::{Cluster, WeftNode, peer};
use weft_tests::command::{Background, eventually, run};
use weft_tests::machine::{need, turn};
use weft_tests::netns::{Netns, OwnNetns};
use weft_tests::network::{Attachment, Network, REFERENCE};
use weft_tests::plugin::addresses;

const CONFIG: u64 = 7;
const ADDRESS: u64 = 102;

/// The network on a node, with further keys.
fn network(node: &WeftNode, keys: &Value) -> Network {
    let mut plugin = node.runtime.config(keys);
    plugin["type"] = "weft-cni".into();
    Network::new(&node.netns, "pods", vec![plugin])
}

/// The reference plugin's daemon, which asks from inside pods.
struct Client {
    socket: PathBuf,
    _process: Background,
}

impl Client {
    fn start(folder: &Path) -> Client {
        let (socket, pid) = (folder.join("dhcp.sock"), folder.join("dhcp.pid"));
        let mut command = Command::new(Path::new(REFERENCE).join("dhcp"));
        command.arg("daemon").arg("-socketpath").arg(&socket).arg("-pidfile").arg(&pid);
        let process = Background::start(command);
        eventually("the plugin's daemon is there", Duration::from_secs(10), || socket.exists());
        Client { socket, _process: process }
    }

    fn keys(&self) -> Value {
        json!({ "ipam": { "type": "dhcp", "daemonSocketPath": self.socket } })
    }
}

/// Busybox' server in a pod, with addresses from `first` to `last`, for so many seconds.
fn serve(folder: &Path, pod: &Netns, name: &str, (first, last): (&str, &str), seconds: u32) -> (Background, PathBuf) {
    let file = |end: &str| folder.join(format!("{name}.{end}"));
    let (config, leases, log) = (file("conf"), file("leases"), file("log"));
    std::fs::write(&leases, "").expect("the folder is writable");
    let text = format!(
        "start {first}\nend {last}\ninterface eth0\nlease_file {}\npidfile {}\nmin_lease 1\nauto_time 1\n\
         option subnet 255.255.0.0\noption router 10.244.0.1\noption dns 10.244.0.53\noption lease {seconds}\n",
        leases.display(),
        file("pid").display()
    );
    std::fs::write(&config, text).expect("the folder is writable");
    let mut command = pod.command("sh");
    command.arg("-c").arg(format!("exec busybox udhcpd -f -a 100 {} >{} 2>&1", config.display(), log.display()));
    (Background::start(command), log)
}

fn count(log: &Path, what: &str) -> usize {
    std::fs::read_to_string(log).unwrap_or_default().matches(what).count()
}

fn ping(from: &Netns, to: IpAddr) {
    let family = if to.is_ipv4() { "-4" } else { "-6" };
    from.exec(&format!("ping {family} -n -q -c 2 -i 0.1 -W 3 {to}")).must();
}

/// Attaches the server's pod, which is trusted, and a pod that serves without being trusted.
fn servers(cluster: &Cluster, node: &WeftNode) -> (OwnNetns, IpAddr, OwnNetns) {
    let [server, rogue] = ["server", "rogue"].map(|name| cluster.sandbox(name));
    let trusted = network(node, &json!({ "trusted": ["dhcp"] }));
    let result = trusted.add(&Attachment::new("server", &server)).must();
    let at = addresses(&result)[0];
    network(node, &json!({})).add(&Attachment::new("rogue", &rogue)).must();
    (server, at, rogue)
}

fn pods_get_addresses(suffix: &str, port: Option<&str>) {
    let _turn = turn();
    need(&[("busybox", "busybox-static"), ("/usr/lib/cni/dhcp", "containernetworking-plugins")]);
    let cluster = Cluster::new(suffix);
    let near = cluster.weft_node(1, "bridged", &peer(2, None));
    let far = cluster.weft_node(2, "bridged", &peer(1, None));
    let folder = cluster.folder.path();
    let client = Client::start(folder);
    let (server, at, rogue) = servers(&cluster, &near);
    let (_server, log) = serve(folder, &server, "server", ("10.244.9.10", "10.244.9.19"), 20);
    let (_rogue, _) = serve(folder, &rogue, "rogue", ("10.244.66.10", "10.244.66.19"), 20);
    let mut keys = client.keys();
    keys["port"] = port.into();
    let mut pods = Vec::new();
    for (name, node) in [("one", &near), ("two", &far)] {
        let pod = cluster.sandbox(name);
        let (network, attachment) = (network(node, &keys), Attachment::new(name, &pod));
        let result = network.add(&attachment).must();
        let given = addresses(&result);
        assert!(given.len() == 1 && given[0].to_string().starts_with("10.244.9.1"), "{result}");
        assert!(pod.ip("address show dev eth0").contains(&format!("{}/16", given[0])), "{result}");
        assert!(pod.ip("route").contains("default via 10.244.0.1 dev eth0"), "{}", pod.ip("route"));
        let leased = node.daemon().leases();
        assert!(leased.iter().any(|lease| lease.address == given[0] && lease.key.container == name), "{leased:?}");
        network.check(&attachment, &result).must();
        assert_eq!(network.add(&attachment).refused(101), format!("container {name} is attached by eth0 already"));
        pods.push((pod, network, attachment, result, given[0]));
    }
    ping(&pods[0].0, pods[1].4);
    ping(&pods[1].0, pods[0].4);
    ping(&server, pods[1].4);
    ping(&pods[1].0, at);
    assert!(near.daemon().drops("DhcpServer") > 0, "what the other server said ended at its port");
    // The lease is renewed after half its time, as long as the pod lives.
    let before = count(&log, "sending ACK");
    eventually("both leases are renewed", Duration::from_secs(60), || count(&log, "sending ACK") >= before + 2);
    // A renewal takes several messages, and one that is under way would undo what is given back meanwhile.
    std::thread::sleep(Duration::from_secs(2));
    ping(&pods[0].0, pods[1].4);
    for (_pod, network, attachment, result, address) in &pods {
        for _ in 0..2 {
            network.del(attachment, result).must();
        }
        let node = if attachment.container == "one" { &near } else { &far };
        assert!(node.daemon().leases().iter().all(|lease| lease.address != *address));
    }
    // They were renewed, and would be the pods' for more than these eight seconds.
    let free = || {
        let mut command = Command::new("busybox");
        command.args(["dumpleases", "-r", "-f"]).arg(folder.join("server.leases"));
        // It fails when it meets the server writing.
        let said = run(command);
        said.success && (said.out.matches("expired").count() >= 2 || !said.out.contains("10.244.9.1"))
    };
    eventually("the server has both addresses back", Duration::from_secs(8), free);
    for (node, told) in [(&near, 1), (&far, 0)] {
        node.daemon().assert_conserved();
        let mut problems = node.daemon().status().problems;
        // Who knows the MAC of a pod that is gone may still send to it, and while it gets its addresses its interface is down for a moment.
        problems.retain(|one| !one.contains("NotForUs") && !one.contains("PortDown"));
        assert!(problems.len() == told && problems.iter().all(|one| one.contains("DhcpServer")), "{problems:?}");
    }
}

#[test]
fn pods_get_their_addresses_from_a_trusted_pod_on_any_node_and_keep_them() {
    pods_get_addresses("dh", None);
}

#[test]
fn pods_by_af_xdp_get_theirs_as_well() {
    pods_get_addresses("dx", Some("xdp"));
}

/// A plugin `dhcp` that looks around while the pod has no address, and then says what it is told to.
fn looking(folder: &Path, pod: &Netns, answer: &str) -> PathBuf {
    let place = folder.join("plugins");
    std::fs::create_dir_all(&place).expect("the folder is writable");
    let (report, netns) = (folder.join("report").display().to_string(), &pod.0);
    let script = format!(
        "#!/bin/sh\ncat >/dev/null\n\
         [ \"$CNI_COMMAND\" = VERSION ] && {{ echo '{{\"cniVersion\":\"1.0.0\",\"supportedVersions\":[\"1.0.0\",\"1.1.0\"]}}'; exit; }}\n\
         echo \"$CNI_COMMAND $(ip -n {netns} -o link show eth0 2>/dev/null | grep -c UP)\" >>{report}\n\
         [ $CNI_COMMAND = ADD ] || exit 0\n\
         ip -n {netns} address add 10.244.1.200/16 dev eth0\n\
         ip netns exec {netns} ping -n -q -c 3 -i 0.2 -W 1 $(cat {folder}/server) >/dev/null && echo REACHED >>{report}\n\
         ip -n {netns} address del 10.244.1.200/16 dev eth0\n\
         echo '{answer}'\n",
        folder = folder.display()
    );
    let path = place.join("dhcp");
    std::fs::write(&path, script).expect("the folder is writable");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("it is ours");
    place
}

#[test]
fn before_it_has_its_address_a_pod_reaches_nobody_and_what_fails_leaves_nothing() {
    let _turn = turn();
    let cluster = Cluster::new("dl");
    let node = cluster.weft_node(1, "bridged", "");
    let folder = cluster.folder.path().to_owned();
    let server = cluster.sandbox("server");
    let at = addresses(&node.attach("server", &server))[0];
    std::fs::write(folder.join("server"), at.to_string()).expect("the folder is writable");
    let report = || std::fs::read_to_string(folder.join("report")).unwrap_or_default();
    let pod = cluster.sandbox("pod");
    let keys = json!({ "ipam": { "type": "dhcp" } });
    for (address, refused) in
        [("10.245.0.9/16", Some(ADDRESS)), (&format!("{at}/16"), Some(ADDRESS)), ("10.244.9.9/16", None)]
    {
        let answer = json!({ "cniVersion": "1.0.0", "ips": [{ "address": address }] });
        let place = looking(&folder, &pod, &answer.to_string());
        let mut network = network(&node, &keys);
        network.path = Some(format!("{}:/usr/lib/cni", place.display()));
        let attachment = Attachment::new("pod", &pod);
        let _ = std::fs::remove_file(folder.join("report"));
        let added = network.add(&attachment);
        match refused {
            Some(code) => {
                added.refused(code);
                assert_eq!(report(), "ADD 1\nDEL 1\n", "the address is given back while there is an interface");
                assert!(!pod.ip("link").contains("eth0"));
                assert_eq!(node.daemon().status().pods, 1);
                assert_eq!(node.daemon().leases().iter().filter(|lease| lease.key.container == "pod").count(), 0);
            }
            None => {
                let result = added.must();
                assert_eq!(report(), "ADD 1\n");
                assert!(node.daemon().drops("AddressPending") > 0);
                ping(&pod, at);
                network.del(&attachment, &result).must();
                assert_eq!(report(), "ADD 1\nDEL 1\n");
                assert!(!pod.ip("link").contains("eth0"));
            }
        }
    }
    node.daemon().assert_conserved();
}

#[test]
fn where_nobody_hears_a_pods_question_dhcp_is_refused() {
    let _turn = turn();
    let cluster = Cluster::new("dr");
    let node = cluster.weft_node(1, "routed", "");
    let pod = cluster.sandbox("pod");
    let refused =
        network(&node, &json!({ "ipam": { "type": "dhcp" } })).add(&Attachment::new("pod", &pod)).refused(CONFIG);
    assert!(refused.contains("bridged"), "{refused}");
    assert!(!pod.ip("link").contains("eth0"));
}
