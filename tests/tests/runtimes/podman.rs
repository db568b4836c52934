//! Podman.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use rustix::process::Signal;
use weft_tests::cluster::Cluster;
use weft_tests::command::eventually;
use weft_tests::machine::turn;
use weft_tests::podman::{Container, Podman};

use crate::{leases, two_hosts};

/// The addresses of containers, which are those that weftd leases.
fn addresses(containers: &[&Container]) -> BTreeSet<IpAddr> {
    containers.iter().flat_map(|container| container.addresses("weft")).collect()
}

#[track_caller]
fn reaches(from: &Container, to: &Container) {
    for address in to.addresses("weft") {
        assert_eq!(from.fetch(address, 80), to.name, "{} at {address}", to.name);
    }
}

#[test]
fn containers_of_two_nodes_start_connect_execute_and_go() {
    let _turn = turn();
    let cluster = Cluster::new("pod");
    let [n1, n2] = two_hosts(&cluster);
    let (podman1, podman2) = (Podman::new(&n1), Podman::new(&n2));
    let (a, b, c) = (podman1.serve("a", &[]), podman1.serve("b", &[]), podman2.serve("c", &[]));
    let all = [&a, &b, &c];
    for from in all {
        for to in all {
            reaches(from, to);
        }
    }
    assert_eq!(leases(&n1), addresses(&[&a, &b]), "what podman shows is what weftd leased");
    let port = n1.daemon().port_of(a.addresses("weft")[0]);
    let told = a.inspect();
    assert_eq!((&told["Id"], &a.network("weft")["MacAddress"]), (&port.name.into(), &port.mac.clone().into()));
    assert!(a.exec("ip -o link show eth0").must().contains(&port.mac));
    for container in [&b, &c] {
        container.call(&["rm", "--force"]).must();
    }
    assert_eq!(leases(&n1), addresses(&[&a]));
    assert_eq!(leases(&n2), BTreeSet::new());
    reaches(&a, &a);
    a.call(&["rm", "--force"]).must();
    assert_eq!(n1.daemon().leases().len(), 0);
    for host in [&n1, &n2] {
        host.daemon().assert_conserved();
        assert!(host.daemon().ports().iter().all(|port| port.role != "pod"), "{:?}", host.daemon().ports());
        assert_eq!(host.sh("ls /run/netns"), "", "podman's own namespaces are gone");
    }
}

#[test]
fn a_container_that_stops_or_dies_gives_everything_back_and_can_start_again() {
    let _turn = turn();
    let cluster = Cluster::new("stop");
    let [n1, _n2] = two_hosts(&cluster);
    let podman = Podman::new(&n1);
    let (a, b) = (podman.serve("a", &[]), podman.serve("b", &[]));
    b.call(&["stop"]).must();
    assert_eq!(leases(&n1), addresses(&[&a]));
    b.call(&["start"]).must();
    b.await_server();
    reaches(&a, &b);
    assert_eq!(leases(&n1), addresses(&[&a, &b]));
    // Nobody asked for this end; what watches the container sees to it.
    n1.sh(&format!("kill -9 {}", b.inspect()["State"]["Pid"]));
    eventually("what a dead container had is free", Duration::from_secs(10), || leases(&n1) == addresses(&[&a]));
    b.call(&["restart"]).must();
    b.await_server();
    reaches(&b, &a);
    podman.call(&["rm", "--force", "--all"]).must();
    assert_eq!(n1.daemon().leases().len(), 0);
}

#[test]
fn containers_of_one_podman_pod_share_an_attachment() {
    let _turn = turn();
    let cluster = Cluster::new("share");
    let [n1, n2] = two_hosts(&cluster);
    let (podman, far) = (Podman::new(&n1), Podman::new(&n2));
    podman.call(&["pod", "create", "--name", "p", "--infra-image", weft_tests::image::IMAGE]).must();
    let a = podman.serve("a", &["--pod", "p"]);
    let infra = podman.call(&["pod", "inspect", "p", "--format", "{{.InfraContainerID}}"]).must();
    let infra = podman.container(infra.trim());
    assert_eq!(leases(&n1), addresses(&[&infra]));
    let other = far.serve("other", &[]);
    for address in infra.addresses("weft") {
        assert_eq!(other.fetch(address, 80), "a");
    }
    assert_eq!(a.fetch(other.addresses("weft")[0], 80), "other");
    podman.call(&["pod", "rm", "--force", "p"]).must();
    assert_eq!(n1.daemon().leases().len(), 0);
}

#[test]
fn a_daemon_that_is_away_keeps_no_container_from_going() {
    let _turn = turn();
    let cluster = Cluster::new("away");
    let [mut n1, _n2] = two_hosts(&cluster);
    let kept = {
        let podman = Podman::new(&n1);
        podman.serve("a", &[]);
        podman.serve("b", &[]).addresses("weft")
    };
    n1.end_weftd(Signal::KILL);
    let podman = Podman::again(&n1);
    podman.container("a").call(&["rm", "--force"]).must();
    n1.start_weftd();
    let podman = Podman::again(&n1);
    eventually("the tombstone is honoured", Duration::from_secs(5), || leases(&n1) == kept.into());
    let b = podman.container("b");
    b.call(&["restart"]).must();
    b.await_server();
    let c = podman.serve("c", &[]);
    reaches(&c, &b);
    assert_eq!(leases(&n1), addresses(&[&b, &c]));
    podman.call(&["rm", "--force", "--all"]).must();
    assert_eq!(n1.daemon().leases().len(), 0);
}

#[test]
fn after_a_loss_of_power_containers_start_again_and_no_address_has_leaked() {
    let _turn = turn();
    let cluster = Cluster::new("boot");
    let [mut n1, n2] = two_hosts(&cluster);
    let far = Podman::new(&n2).serve("far", &[]);
    {
        let podman = Podman::new(&n1);
        for name in ["a", "b", "c"] {
            podman.serve(name, &[]);
        }
    }
    n1.power_off();
    n1.power_on();
    n1.start_weftd();
    eventually("what the last boot leased is free", Duration::from_secs(30), || n1.daemon().leases().is_empty());
    let podman = Podman::again(&n1);
    let a = podman.container("a");
    a.call(&["start"]).must();
    a.await_server();
    reaches(&a, &far);
    reaches(&far, &a);
    assert_eq!(leases(&n1), addresses(&[&a]));
    podman.call(&["rm", "--force", "--all"]).must();
    assert_eq!(n1.daemon().leases().len(), 0);
}
