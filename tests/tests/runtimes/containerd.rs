//! containerd, asked as kubelet asks it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use weft_tests::cluster::Cluster;
use weft_tests::containerd::{Containerd, Pod};
use weft_tests::machine::turn;

use crate::{leases, two_hosts};

#[track_caller]
fn reaches(from: &Pod, to: &Pod) {
    for address in to.addresses() {
        assert_eq!(from.fetch(address, 80), to.name, "{} at {address}", to.name);
    }
}

fn addresses(pods: &[&Pod]) -> BTreeSet<IpAddr> {
    pods.iter().flat_map(|pod| pod.addresses()).collect()
}

#[test]
fn pods_of_two_nodes_start_connect_execute_and_go() {
    let _turn = turn();
    let cluster = Cluster::new("cri");
    let [n1, n2] = two_hosts(&cluster);
    let (containerd1, containerd2) = (Containerd::new(&n1), Containerd::new(&n2));
    assert!(containerd1.is_network_ready());
    let (a, b, c) = (containerd1.serve("a", &[]), containerd1.serve("b", &[]), containerd2.serve("c", &[]));
    let all = [&a, &b, &c];
    for from in all {
        for to in all {
            reaches(from, to);
        }
    }
    assert_eq!(leases(&n1), addresses(&[&a, &b]), "what containerd tells is what weftd leased");
    assert_eq!(a.addresses().len(), 2);
    for pod in [&b, &c] {
        pod.remove();
    }
    assert_eq!(leases(&n1), addresses(&[&a]));
    a.remove();
    for host in [&n1, &n2] {
        assert_eq!(host.daemon().leases().len(), 0);
        host.daemon().assert_conserved();
        assert_eq!(host.sh("ls /run/netns"), "", "containerd's own namespaces are gone");
    }
}
