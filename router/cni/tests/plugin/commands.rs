//! Each command with a daemon that is there.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::time::Duration;

use serde_json::{Value, json};
use weft_api::code;

use crate::daemon::{Daemon, ok, refuse};
use crate::folder::Folder;
use crate::pod::Pod;
use crate::runtime::{Call, config, quickly};

const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

fn with_socket(folder: &Folder, version: &str, mut keys: Value) -> Value {
    keys["socket"] = folder.path().join("weftd.sock").display().to_string().into();
    keys["stateDir"] = folder.path().join("state").display().to_string().into();
    config(version, keys)
}

/// What an ADD of that version says when the played daemon attaches.
fn expected_result(version: &str, netns: &str) -> Value {
    let mut result = json!({
        "cniVersion": version,
        "interfaces": [{ "name": "eth0", "mac": "02:00:00:00:00:02", "sandbox": netns }],
        "ips": [
            { "interface": 0, "address": "10.244.1.2/24", "gateway": "10.244.1.1" },
            { "interface": 0, "address": "fd00:10:244:1::2/64", "gateway": "fd00:10:244:1::1" }
        ],
        "routes": [
            { "dst": "0.0.0.0/0", "gw": "10.244.1.1" },
            { "dst": "::/0", "gw": "fd00:10:244:1::1" }
        ],
        "dns": {}
    });
    if version < "1.0.0" {
        result["ips"][0]["version"] = "4".into();
        result["ips"][1]["version"] = "6".into();
    }
    if version == "1.1.0" {
        result["interfaces"][0]["mtu"] = 1450.into();
    }
    result
}

#[test]
fn version_lists_what_is_supported_and_needs_neither_daemon_nor_input() {
    let supported = json!(VERSIONS);
    for (input, version) in [
        ("", "1.1.0"),
        ("\n", "1.1.0"),
        (r#"{"cniVersion":"0.3.1"}"#, "0.3.1"),
        (r#"{"cniVersion":"1.0.0"}"#, "1.0.0"),
        (r#"{"cniVersion":"7.0.0"}"#, "1.1.0"),
        ("{}", "1.1.0"),
    ] {
        let call = Call::new("VERSION").unset("CNI_CONTAINERID").unset("CNI_IFNAME").unset("CNI_PATH").input(input);
        let expected = json!({ "cniVersion": version, "supportedVersions": supported });
        assert_eq!(quickly(|| call.run()).result(), expected);
    }
    Call::new("VERSION").input("{").run().error(code::DECODE);
}

#[test]
fn version_does_not_wait_for_an_input_that_is_left_open() {
    for (written, version) in [("", "1.1.0"), (r#"{"cniVersion":"0.4.0"}"#, "0.4.0")] {
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(written.as_bytes()).unwrap();
        let outcome = Call::new("VERSION").run_from(File::from(OwnedFd::from(reader)));
        assert!(outcome.elapsed < Duration::from_secs(4), "it took {:?}", outcome.elapsed);
        assert_eq!(outcome.result()["cniVersion"], version);
        drop(writer);
    }
}

#[test]
fn an_attachment_lives_its_life_in_every_version() {
    let (folder, pod) = (Folder::new(), Pod::new());
    for version in VERSIONS {
        let daemon = Daemon::willing(folder.path());
        let call = |command: &str, keys: Value| {
            Call::new(command).set("CNI_NETNS", pod.netns()).config(&with_socket(&folder, version, keys)).run()
        };
        let result = call("ADD", json!({})).result();
        assert_eq!(result, expected_result(version, &pod.netns()));

        let checked = call("CHECK", json!({ "prevResult": result }));
        if version < "0.4.0" {
            assert!(checked.error(code::VERSION).contains("CHECK"));
        } else {
            checked.silent();
        }
        for (command, keys) in [("GC", json!({ "cni.dev/valid-attachments": [] })), ("STATUS", json!({}))] {
            let outcome = call(command, keys);
            if version < "1.1.0" {
                assert!(outcome.error(code::VERSION).contains(command));
            } else {
                outcome.silent();
            }
        }
        call("DEL", json!({ "prevResult": result })).silent();
        call("DEL", json!({})).silent();

        let asked: Vec<String> = daemon.seen().iter().map(|seen| seen.request["op"].as_str().unwrap().into()).collect();
        let expected: &[&str] = match version {
            "1.1.0" => &["add", "check", "gc", "ready", "del", "del"],
            "0.4.0" | "1.0.0" => &["add", "check", "del", "del"],
            _ => &["add", "del", "del"],
        };
        assert_eq!(asked, expected, "{version}");
    }
}

#[test]
fn add_hands_over_the_namespace_and_everything_that_was_asked_for() {
    let (folder, pod) = (Folder::new(), Pod::new());
    let daemon = Daemon::willing(folder.path());
    let arguments = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_UID=u1;\
                     K8S_POD_INFRA_CONTAINER_ID=c1;IP=10.244.1.9;Other=x";
    let keys = json!({
        "mtu": 1400,
        "args": { "cni": { "ips": ["fd00::9"] } },
        "runtimeConfig": {
            "ips": ["10.244.1.10/24"], "mac": "02-00-00-00-00-AA", "ipRanges": [[{ "subnet": "10.9.0.0/24" }]]
        },
        "ipam": {
            "type": "weft",
            "ranges": [[{ "subnet": "10.8.0.0/24", "rangeStart": "10.8.0.5", "gateway": "10.8.0.1" }]]
        }
    });
    let call = Call::new("ADD").set("CNI_NETNS", pod.netns()).set("CNI_ARGS", arguments);
    call.config(&with_socket(&folder, "1.1.0", keys)).run().result();
    let seen = daemon.only();
    assert_eq!(seen.netns, Some(pod.identity()));
    let expected = json!({
        "op": "add", "network": "pods", "container": "c1", "ifname": "eth0", "netns": pod.netns(),
        "requested": ["10.244.1.9", "fd00::9", "10.244.1.10"],
        "ranges": [
            [{ "subnet": "10.9.0.0/24" }],
            [{ "subnet": "10.8.0.0/24", "rangeStart": "10.8.0.5", "gateway": "10.8.0.1" }]
        ],
        "mac": "02:00:00:00:00:aa", "mtu": 1400,
        "labels": {
            "K8S_POD_NAMESPACE": "default", "K8S_POD_NAME": "web-0", "K8S_POD_UID": "u1", "K8S_POD_INFRA_CONTAINER_ID": "c1"
        }
    });
    assert_eq!(seen.request, expected);
}

#[test]
fn add_in_a_chain_appends_to_the_result_before() {
    let (folder, pod) = (Folder::new(), Pod::new());
    let _daemon = Daemon::willing(folder.path());
    let before = json!({
        "cniVersion": "1.0.0",
        "interfaces": [{ "name": "net1", "mac": "02:00:00:00:00:99", "sandbox": pod.netns() }],
        "ips": [{ "interface": 0, "address": "192.0.2.9/24" }],
        "dns": { "nameservers": ["192.0.2.53"] }
    });
    let config = with_socket(&folder, "1.0.0", json!({ "prevResult": before }));
    let result = Call::new("ADD").set("CNI_NETNS", pod.netns()).config(&config).run().result();
    assert_eq!(result["interfaces"][0], before["interfaces"][0]);
    assert_eq!(result["interfaces"][1]["name"], "eth0");
    assert_eq!(result["ips"][0], before["ips"][0]);
    let ours: Vec<&Value> = result["ips"].as_array().unwrap()[1..].iter().map(|ip| &ip["interface"]).collect();
    assert_eq!(ours, [1, 1]);
    assert_eq!(result["dns"], before["dns"]);
}

#[test]
fn a_refusal_of_the_daemon_reaches_the_runtime_as_it_is() {
    let (folder, pod) = (Folder::new(), Pod::new());
    let _daemon = Daemon::start(folder.path(), |_, _| refuse(code::EXISTS, "eth0 exists already in the pod"));
    let config = with_socket(&folder, "0.4.0", json!({ "prevResult": expected_result("0.4.0", &pod.netns()) }));
    for command in ["ADD", "CHECK", "DEL"] {
        let outcome = Call::new(command).set("CNI_NETNS", pod.netns()).config(&config).run();
        assert_eq!(outcome.output.as_ref().unwrap()["cniVersion"], "0.4.0");
        assert!(outcome.error(code::EXISTS).contains("eth0 exists already"));
    }
    assert!(!folder.path().join("state").exists(), "a refused DEL is not the business of a tombstone");
}

#[test]
fn check_tells_the_daemon_what_the_runtime_believes() {
    let (folder, pod) = (Folder::new(), Pod::new());
    let daemon = Daemon::willing(folder.path());
    let run = |keys: Value| {
        Call::new("CHECK").set("CNI_NETNS", pod.netns()).config(&with_socket(&folder, "1.1.0", keys)).run()
    };
    run(json!({ "prevResult": expected_result("1.1.0", &pod.netns()) })).silent();
    let seen = daemon.only();
    assert_eq!(seen.netns, Some(pod.identity()));
    assert_eq!(seen.request["expected"], crate::daemon::attached());

    assert!(run(json!({})).error(code::CONFIG).contains("prevResult"));
    assert!(run(json!({ "prevResult": 7 })).error(code::CONFIG).contains("prevResult"));
    let other = json!({ "interfaces": [{ "name": "eth1", "sandbox": pod.netns() }] });
    assert!(run(json!({ "prevResult": other })).error(code::CHECK).contains("eth0"));
    assert_eq!(daemon.seen().len(), 1, "what is refused here does not reach the daemon");
}

#[test]
fn del_does_not_need_the_namespace_nor_a_configuration_that_an_add_could_use() {
    let folder = Folder::new();
    let daemon = Daemon::willing(folder.path());
    let broken = json!({ "ipam": { "type": "weft", "ranges": 7 }, "mtu": "x", "runtimeConfig": 7, "prevResult": [] });
    let call = Call::new("DEL").config(&with_socket(&folder, "1.1.0", broken)).set("CNI_ARGS", "not arguments");
    call.clone().run().silent();
    call.clone().set("CNI_NETNS", "").run().silent();
    call.clone().set("CNI_NETNS", "/run/netns/weft-that-never-was").run().silent();
    let pod = Pod::new();
    call.set("CNI_NETNS", pod.netns()).run().silent();
    let netns: Vec<_> = daemon.seen().iter().map(|seen| seen.netns).collect();
    assert_eq!(netns, [None, None, None, Some(pod.identity())]);
    assert_eq!(
        daemon.seen()[0].request,
        json!({ "op": "del", "network": "pods", "container": "c1", "ifname": "eth0" })
    );
}

#[test]
fn gc_passes_the_list_and_refuses_to_go_without_one() {
    let folder = Folder::new();
    let daemon = Daemon::willing(folder.path());
    let run = |keys: Value| {
        let call = Call::new("GC").unset("CNI_CONTAINERID").unset("CNI_IFNAME");
        call.config(&with_socket(&folder, "1.1.0", keys)).run()
    };
    let list = json!([{ "containerID": "c1", "ifname": "eth0" }, { "containerID": "c2", "ifname": "eth1" }]);
    run(json!({ "cni.dev/valid-attachments": list, "cni.dev/attachments": list })).silent();
    run(json!({ "cni.dev/attachments": [] })).silent();
    assert!(run(json!({})).error(code::CONFIG).contains("valid-attachments"));
    let asked: Vec<Value> = daemon.seen().into_iter().map(|seen| seen.request).collect();
    assert_eq!(
        asked,
        [
            json!({ "op": "gc", "network": "pods", "valid": [["c1", "eth0"], ["c2", "eth1"]] }),
            json!({ "op": "gc", "network": "pods", "valid": [] }),
        ]
    );
}

#[test]
fn status_is_50_or_51_whatever_the_daemon_lacks_and_7_or_2_when_no_add_could_succeed() {
    let folder = Folder::new();
    let _daemon = Daemon::start(folder.path(), |_, number| match number {
        0 => ok(json!({})),
        1 => refuse(code::NOT_AVAILABLE, "starting"),
        2 => refuse(code::LIMITED, "the underlay is gone"),
        _ => refuse(code::INTERNAL, "odd"),
    });
    let run = |keys: Value| {
        let call = Call::new("STATUS").unset("CNI_CONTAINERID").unset("CNI_IFNAME");
        call.config(&with_socket(&folder, "1.1.0", keys)).run()
    };
    run(json!({})).silent();
    assert!(run(json!({})).error(code::NOT_AVAILABLE).contains("starting"));
    assert!(run(json!({})).error(code::LIMITED).contains("underlay"));
    assert!(run(json!({})).error(code::NOT_AVAILABLE).contains("odd"));
    run(json!({ "mtu": "x" })).error(code::CONFIG);
    run(json!({ "ipMasq": true })).error(code::UNSUPPORTED_FIELD);
}
