//! Leases without pods, and pods without DEL.

use std::fs;
use std::process::Command;

use weft_api::{AttachmentKey, Client, Empty, LeaseInfo, Request};

use crate::lab::*;

const RANGE: &str = "mode = \"routed\"\nmtu = 1450\nranges = [\"10.244.1.0/25\"]";

fn containers(lab: &Lab) -> Vec<String> {
    let mut all: Vec<String> =
        lab.call::<Vec<LeaseInfo>>(Request::Leases).into_iter().map(|l| l.key.container).collect();
    all.sort();
    all
}

fn delete(lab: &mut Lab, namespace: &str) {
    run(&["ip", "netns", "del", namespace]);
    lab.namespaces.retain(|known| known != namespace);
}

fn kill(lab: &mut Lab) {
    lab.signal(rustix::process::Signal::KILL);
    lab.daemon.take().unwrap().wait().unwrap();
}

#[test]
fn the_lease_of_a_pod_that_is_gone_is_freed_without_a_del_and_that_of_a_living_one_is_not() {
    let mut lab = Lab::with_daemon("gone", RANGE);
    let pods = ["p1", "p2"].map(|name| lab.namespace(name));
    for (namespace, container) in pods.iter().zip(["gone", "lives"]) {
        lab.add(namespace, attach(container)).unwrap();
    }
    // A living namespace whose device was removed is no namespace that is gone.
    run(&["ip", "-n", &pods[1], "link", "del", "eth0"]);
    delete(&mut lab, &pods[0]);
    assert!(until_seconds(120, || containers(&lab) == ["lives"]), "{:?}", containers(&lab));
    // The inode of the one that is gone may be another's by now; its lease is gone all the same.
    let next = lab.namespace("p3");
    lab.add(&next, attach("gone")).unwrap();
    assert_eq!(containers(&lab), ["gone", "lives"]);
}

#[test]
fn a_start_frees_what_lost_its_namespace_meanwhile_and_keeps_the_rest() {
    let mut lab = Lab::with_daemon("meanwhile", RANGE);
    let pods = ["p1", "p2"].map(|name| lab.namespace(name));
    for (namespace, container) in pods.iter().zip(["gone", "lives"]) {
        lab.add(namespace, attach(container)).unwrap();
    }
    kill(&mut lab);
    delete(&mut lab, &pods[0]);
    lab.start();
    assert!(until(|| containers(&lab) == ["lives"]), "{:?}", containers(&lab));
    let Empty {} = lab.call(Request::Del(key("lives")));
    assert_eq!(containers(&lab), Vec::<String>::new());
}

#[test]
fn after_a_boot_the_leases_are_those_of_living_pods_each_time_it_boots() {
    let boot = tempfile::NamedTempFile::new().unwrap();
    let config = format!("{RANGE}\n[leases]\nboot_id = {:?}", boot.path());
    fs::write(boot.path(), "boot 0\n").unwrap();
    let mut lab = Lab::with_daemon("boots", &config);
    // What a boot does to pods: they are gone, and no DEL came. As their namespaces are kept here, only the boot id says so.
    let namespaces: Vec<String> = (0..4).map(|n| lab.namespace(&format!("p{n}"))).collect();
    for round in 1..=3 {
        // A hundred pods of 125 addresses, in four namespaces to be quick.
        let client = || Client::connect(&lab.path("run/weftd.sock"), PATIENCE).unwrap();
        std::thread::scope(|scope| {
            for (index, namespace) in namespaces.iter().enumerate() {
                let mut client = client();
                scope.spawn(move || {
                    for pod in 0..25 {
                        let mut request = attach(&format!("r{round}-{index}-{pod}"));
                        request.key.ifname = format!("e{round}-{pod}");
                        let fd = open(namespace);
                        let added = client
                            .call_with_fd::<weft_api::Attached>(&Request::Add(request), std::os::fd::AsFd::as_fd(&fd));
                        added.unwrap_or_else(|error| panic!("round {round}: {error}"));
                    }
                });
            }
        });
        assert_eq!(containers(&lab).len(), 100);
        kill(&mut lab);
        fs::write(boot.path(), format!("boot {round}\n")).unwrap();
        lab.start();
        assert!(until(|| containers(&lab).is_empty()), "{:?}", containers(&lab));
    }
}

#[test]
fn a_del_of_an_old_sandbox_leaves_the_new_one_of_the_same_pod_alone() {
    let mut lab = Lab::with_daemon("sandboxes", RANGE);
    let pods = ["p1", "p2"].map(|name| lab.namespace(name));
    let labels = [("K8S_POD_NAMESPACE", "default"), ("K8S_POD_NAME", "web-0"), ("K8S_POD_UID", "u1")];
    for (namespace, container) in pods.iter().zip(["old", "new"]) {
        let mut request = attach(container);
        request.labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        lab.add(namespace, request).unwrap();
    }
    for _ in 0..2 {
        let Empty {} = lab.call(Request::Del(key("old")));
        assert_eq!(containers(&lab), ["new"]);
        let (ok, text) = output(&["ip", "netns", "exec", &pods[1], "ping", "-c", "1", "-W", "2", "10.244.1.1"]);
        assert!(ok, "{text}");
    }
    // Nor does one of another network's attachment, or of another interface.
    for other in
        [AttachmentKey { network: "other".into(), ..key("new") }, AttachmentKey { ifname: "eth1".into(), ..key("new") }]
    {
        let Empty {} = lab.call(Request::Del(other));
    }
    assert_eq!(containers(&lab), ["new"]);
    assert!(
        Command::new("ip").args(["-n", &pods[0], "link", "show", "eth0"]).output().is_ok_and(|o| !o.status.success())
    );
}
