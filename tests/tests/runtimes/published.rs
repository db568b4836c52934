//! The node itself, and ports that are published on it: `portmap` behind `weft-cni`, and the node's own port.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use weft_tests::cluster::Cluster;
use weft_tests::command::eventually;
use weft_tests::containerd::Containerd;
use weft_tests::cri::PortMapping;
use weft_tests::host::Host;
use weft_tests::image::write_page;
use weft_tests::machine::turn;
use weft_tests::netns::Netns;
use weft_tests::podman::Podman;
use weft_tests::traffic::fetch;

use crate::two_hosts;

const PATIENCE: Duration = Duration::from_secs(20);

/// `portmap` as podman and Kubernetes are told to run it.
const CONFLIST: &str = r#"{
  "cniVersion": "1.0.0",
  "name": "weft",
  "plugins": [
    { "type": "weft-cni" },
    { "type": "portmap", "capabilities": { "portMappings": true }, "snat": true }
  ]
}"#;

fn publish(host: &Host) {
    host.write("/etc/cni/net.d/05-weft.conflist", CONFLIST);
    host.sh("echo 1 >/proc/sys/net/ipv4/ip_forward");
}

/// That a server says its name, once all who have to do with it are ready.
#[track_caller]
fn answers(from: &Netns, address: IpAddr, port: u16, name: &str) {
    let server = SocketAddr::new(address, port);
    let what = format!("{} is told {name:?} by {server}", from.0);
    eventually(&what, PATIENCE, || fetch(from, server).is_ok_and(|said| said == name));
}

#[test]
fn podman_publishes_a_port_and_the_node_reaches_its_containers_and_they_it() {
    let _turn = turn();
    let cluster = Cluster::new("ppub");
    let [n1, n2] = two_hosts(&cluster);
    publish(&n1);
    let (podman, far) = (Podman::new(&n1), Podman::new(&n2));
    let (a, b) = (podman.serve("a", &["--publish", "8080:80"]), podman.serve("b", &[]));
    let c = far.serve("c", &[]);
    for container in [&a, &b, &c] {
        for address in container.addresses("weft") {
            answers(n1.netns(), address, 80, &container.name);
        }
    }
    let stranger = cluster.machine(9);
    let node = IpAddr::from([10, 200, 0, 1]);
    answers(&stranger, node, 8080, "a");
    answers(n1.netns(), node, 8080, "a");
    answers(n2.netns(), node, 8080, "a");
    // A pod that reaches another one of its node by the node's address: both directions pass the node's translation.
    assert_eq!(b.fetch(node, 8080), "a");
    write_page(&n1.disk().join("www"), "the node");
    let _server = n1.start("httpd", &["busybox", "httpd", "-f", "-p", "81", "-h", "/run/test/disk/www"]);
    answers(n1.netns(), node, 81, "the node");
    assert_eq!(b.fetch(node, 81), "the node");
    podman.call(&["rm", "--force", "a"]).must();
    assert!(fetch(&stranger, SocketAddr::new(node, 8080)).is_err(), "the port is still open");
}

#[test]
fn containerd_publishes_a_port() {
    let _turn = turn();
    let cluster = Cluster::new("cpub");
    let [n1, _n2] = two_hosts(&cluster);
    publish(&n1);
    let containerd = Containerd::new(&n1);
    let pod = containerd.serve("a", &[PortMapping { protocol: 0, container_port: 80, host_port: 8081 }]);
    let stranger = cluster.machine(9);
    let node = IpAddr::from([10, 200, 0, 1]);
    answers(&stranger, node, 8081, "a");
    for address in pod.addresses() {
        answers(n1.netns(), address, 80, "a");
    }
    pod.remove();
    assert!(fetch(&stranger, SocketAddr::new(node, 8081)).is_err(), "the port is still open");
}
