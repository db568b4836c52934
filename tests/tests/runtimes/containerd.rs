//! containerd, asked as kubelet asks it.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use rustix::process::Signal;
use weft_tests::cluster::Cluster;
use weft_tests::command::eventually;
use weft_tests::containerd::{Containerd, Pod};
use weft_tests::machine::turn;

use crate::{leases, two_hosts};

const PATIENCE: Duration = Duration::from_secs(20);

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

/// What kubelet does about a pod whose first process has died, in the order that is worst for a network: the new sandbox
/// is there before the old one's DEL.
#[test]
fn a_sandbox_that_is_made_again_is_not_touched_by_the_end_of_the_old_one() {
    let _turn = turn();
    let cluster = Cluster::new("pause");
    let [n1, _n2] = two_hosts(&cluster);
    let containerd = Containerd::new(&n1);
    let (old, other) = (containerd.serve("a", &[]), containerd.serve("other", &[]));
    n1.sh(&format!("kill -9 {}", old.pause()));
    eventually("containerd notices that a sandbox has died", PATIENCE, || !old.is_ready());
    let mut new = containerd.run("a", 1, &[]).unwrap();
    new.start_server();
    reaches(&other, &new);
    old.remove();
    reaches(&other, &new);
    reaches(&new, &other);
    assert_eq!(leases(&n1), addresses(&[&new, &other]));
    new.remove();
    other.remove();
    assert_eq!(n1.daemon().leases().len(), 0);
}

#[test]
fn containerd_can_end_and_come_back_without_its_pods_noticing() {
    let _turn = turn();
    let cluster = Cluster::new("again");
    let [n1, _n2] = two_hosts(&cluster);
    let first = Containerd::new(&n1);
    let [a, b] = ["a", "b"].map(|name| {
        let pod = first.serve(name, &[]);
        (pod.id.clone(), pod.container().to_owned(), pod.addresses())
    });
    first.end(Signal::KILL);
    let containerd = Containerd::start(&n1);
    let pod = |name: &str, (id, container, _): &(String, String, Vec<IpAddr>)| {
        containerd.pod(name, id).with_container(container)
    };
    let (pod_a, pod_b) = (pod("a", &a), pod("b", &b));
    assert_eq!((pod_a.addresses(), pod_b.addresses()), (a.2, b.2));
    reaches(&pod_a, &pod_b);
    let c = containerd.serve("c", &[]);
    reaches(&c, &pod_a);
    assert_eq!(leases(&n1), addresses(&[&pod_a, &pod_b, &c]));
    for pod in [pod_a, pod_b, c] {
        pod.remove();
    }
    assert_eq!(n1.daemon().leases().len(), 0);
}

#[test]
fn a_pod_goes_while_the_daemon_is_away_and_none_comes() {
    let _turn = turn();
    let cluster = Cluster::new("gone");
    let [mut n1, _n2] = two_hosts(&cluster);
    let containerd = Containerd::new(&n1);
    let (a, b) = (containerd.serve("a", &[]), containerd.serve("b", &[]));
    n1.end_weftd(Signal::KILL);
    a.remove();
    let refused = containerd.run("c", 0, &[]).err().expect("no pod without a network");
    assert!(refused.contains("weftd"), "the error says who is missing: {refused}");
    n1.start_weftd();
    eventually("the tombstone is honoured", PATIENCE, || leases(&n1) == addresses(&[&b]));
    let c = containerd.serve("c", &[]);
    b.remove();
    c.remove();
    assert_eq!(n1.daemon().leases().len(), 0);
}

#[test]
fn after_a_loss_of_power_sandboxes_are_made_again_and_no_address_has_leaked() {
    let _turn = turn();
    let cluster = Cluster::new("power");
    let [mut n1, n2] = two_hosts(&cluster);
    let containerd2 = Containerd::new(&n2);
    let far = containerd2.serve("far", &[]);
    let old = {
        let containerd = Containerd::new(&n1);
        ["a", "b"].map(|name| containerd.serve(name, &[]).id)
    };
    n1.power_off();
    n1.power_on();
    // kubelet and containerd do not wait for weftd.
    let containerd = Containerd::start(&n1);
    containerd.pod("a", &old[0]).remove();
    n1.start_weftd();
    let mut new = containerd.run("a", 1, &[]).unwrap();
    new.start_server();
    containerd.pod("b", &old[1]).remove();
    reaches(&far, &new);
    reaches(&new, &far);
    eventually("what the last boot leased is free", PATIENCE, || leases(&n1) == addresses(&[&new]));
    new.remove();
    assert_eq!(n1.daemon().leases().len(), 0);
}
