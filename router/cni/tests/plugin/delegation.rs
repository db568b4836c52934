//! Another plugin gives the addresses: a script that is played by the test, which notes how it was called.

use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};
use weft_api::code;

use crate::daemon::{Daemon, Reaction, ok, refuse};
use crate::folder::Folder;
use crate::pod::Pod;
use crate::runtime::{Call, config};

/// An IPAM plugin `name` of CNI up to `newest`: it answers an ADD with `result`, and fails every command that `fails` names.
pub fn plugin(folder: &Folder, name: &str, newest: &str, result: &Value, fails: &str) {
    let script = format!(
        r#"#!/bin/sh
input=$(cat)
[ "$CNI_COMMAND" = VERSION ] && {{ echo '{{"cniVersion":"1.0.0","supportedVersions":["0.4.0","{newest}"]}}'; exit; }}
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME netns=$CNI_NETNS $input" >>{folder}/calls
case $input in *'"cniVersion":"{newest}"'*|*'"cniVersion":"0.4.0"'*) ;; *)
    echo '{{"code":1,"msg":"incompatible CNI versions"}}'; exit 1;; esac
case "{fails}" in *$CNI_COMMAND*) echo '{{"code":123,"msg":"no luck","details":"try less"}}'; exit 1;; esac
[ "$CNI_COMMAND" = ADD ] && echo '{result}'
exit 0
"#,
        folder = folder.path().display()
    );
    let path = folder.path().join(name);
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// The commands that the plugin was called with, each with its attachment.
pub fn calls(folder: &Folder) -> Vec<String> {
    let all = std::fs::read_to_string(folder.path().join("calls")).unwrap_or_default();
    all.lines().map(|line| line.split(" netns=").next().unwrap().to_owned()).collect()
}

fn call(folder: &Folder, command: &str, mut keys: Value) -> Call {
    keys["socket"] = folder.path().join("weftd.sock").display().to_string().into();
    keys["stateDir"] = folder.path().join("state").display().to_string().into();
    keys["ipam"] = json!({ "type": "giver", "its": "own" });
    let path = format!("/nonexistent:{}:/usr/bin:/bin", folder.path().display());
    let call = Call::new(command).config(&config("1.1.0", keys)).set("CNI_PATH", path);
    call.set("PATH", "/usr/bin:/bin")
}

pub fn given() -> Value {
    json!({
        "cniVersion": "1.0.0", "ips": [{ "address": "10.244.1.9/24", "gateway": "10.244.1.1" }],
        "routes": [{ "dst": "0.0.0.0/0" }], "dns": { "nameservers": ["10.0.0.3"] }
    })
}

pub fn attached() -> Value {
    json!({
        "ifname": "eth0", "mac": "02:00:00:00:00:02", "mtu": 1450,
        "addresses": [{ "address": "10.244.1.9/24", "gateway": "10.244.1.1" }],
        "routes": [{ "destination": "0.0.0.0/0", "gateway": "10.244.1.1" }]
    })
}

fn daemon(folder: &Folder, known: bool) -> Daemon {
    Daemon::start(folder.path(), move |seen, _| match seen.request["op"].as_str().unwrap() {
        "find" => ok(json!({ "attached": known })),
        "add" => ok(attached()),
        "gc" => ok(json!({ "freed": [{ "network": "pods", "container": "old", "ifname": "net1" }] })),
        _ => ok(json!({})),
    })
}

#[test]
fn what_it_gives_goes_to_the_daemon_and_into_the_result() {
    for newest in ["1.1.0", "1.0.0"] {
        let (folder, pod) = (Folder::new(), Pod::new());
        plugin(&folder, "giver", newest, &given(), "");
        let daemon = daemon(&folder, false);
        let result = call(&folder, "ADD", json!({})).set("CNI_NETNS", pod.netns()).run().result();
        assert_eq!(result["cniVersion"], "1.1.0");
        assert_eq!(result["ips"], json!([{ "interface": 0, "address": "10.244.1.9/24", "gateway": "10.244.1.1" }]));
        assert_eq!(result["dns"], given()["dns"]);
        let add = &daemon.seen()[1].request;
        assert_eq!(add["given"], json!([{ "address": "10.244.1.9/24", "gateway": "10.244.1.1" }]));
        assert_eq!(add["routes"], json!([{ "destination": "0.0.0.0/0", "gateway": "0.0.0.0" }]));
        let said = std::fs::read_to_string(folder.path().join("calls")).unwrap();
        assert!(said.contains("\"its\":\"own\"") && said.contains(&pod.netns()), "{said}");
        let keys = json!({ "prevResult": result });
        call(&folder, "CHECK", keys.clone()).set("CNI_NETNS", pod.netns()).run().silent();
        call(&folder, "DEL", keys).set("CNI_NETNS", pod.netns()).run().silent();
        let mut expected = vec!["ADD c1 eth0", "CHECK c1 eth0", "DEL c1 eth0"];
        if newest == "1.0.0" {
            // Each was refused once, and asked again in a version that it has.
            expected = expected.into_iter().flat_map(|one| [one, one]).collect();
        }
        assert_eq!(calls(&folder), expected, "{newest}");
    }
}

#[test]
fn what_it_gave_is_freed_when_a_later_step_fails() {
    let (folder, pod) = (Folder::new(), Pod::new());
    plugin(&folder, "giver", "1.1.0", &given(), "");
    let _daemon = Daemon::start(folder.path(), |seen, _| match seen.request["op"].as_str().unwrap() {
        "find" => ok(json!({ "attached": false })),
        _ => refuse(code::NETNS, "no"),
    });
    call(&folder, "ADD", json!({})).set("CNI_NETNS", pod.netns()).run().error(code::NETNS);
    assert_eq!(calls(&folder), ["ADD c1 eth0", "DEL c1 eth0"]);
}

#[test]
fn an_add_that_it_fails_is_undone_and_told_as_it_told_it() {
    let (folder, pod) = (Folder::new(), Pod::new());
    plugin(&folder, "giver", "1.1.0", &given(), "ADD");
    let daemon = daemon(&folder, false);
    let text = call(&folder, "ADD", json!({})).set("CNI_NETNS", pod.netns()).run().error(123);
    assert!(text.contains("giver") && text.contains("no luck") && text.contains("try less"), "{text}");
    assert_eq!(calls(&folder), ["ADD c1 eth0", "DEL c1 eth0"]);
    assert_eq!(daemon.seen().len(), 1, "the daemon is not asked for a port");
    for odd in [json!({}), json!({ "ips": [] }), json!({ "ips": [{ "address": "x" }], "routes": 7 })] {
        plugin(&folder, "giver", "1.1.0", &odd, "");
        call(&folder, "ADD", json!({})).set("CNI_NETNS", pod.netns()).run().error(code::DELEGATE);
    }
}

#[test]
fn a_second_add_leaves_the_first_ones_addresses_alone() {
    let (folder, pod) = (Folder::new(), Pod::new());
    plugin(&folder, "giver", "1.1.0", &given(), "");
    let _daemon = daemon(&folder, true);
    call(&folder, "ADD", json!({})).set("CNI_NETNS", pod.netns()).run().error(code::EXISTS);
    assert_eq!(calls(&folder), [""; 0]);
}

#[test]
fn its_failures_at_check_del_gc_and_status_are_passed_on() {
    let (folder, pod) = (Folder::new(), Pod::new());
    plugin(&folder, "giver", "1.1.0", &given(), "CHECK DEL GC STATUS");
    let daemon = daemon(&folder, false);
    let previous = json!({ "interfaces": [{ "name": "eth0", "sandbox": pod.netns() }] });
    let run = |command: &str| {
        let keys = json!({ "prevResult": previous, "cni.dev/valid-attachments": [] });
        call(&folder, command, keys).set("CNI_NETNS", pod.netns()).run()
    };
    for command in ["CHECK", "DEL", "GC"] {
        assert!(run(command).error(123).contains("no luck"), "{command}");
    }
    assert!(run("STATUS").error(code::NOT_AVAILABLE).contains("no luck"));
    let asked: Vec<String> = daemon.seen().iter().map(|seen| seen.request["op"].as_str().unwrap().to_owned()).collect();
    assert_eq!(asked, ["del", "gc", "ready"], "the port is freed before the address");
}

#[test]
fn one_that_knows_no_gc_is_asked_to_free_what_was_collected() {
    let folder = Folder::new();
    plugin(&folder, "giver", "1.0.0", &given(), "");
    let _daemon = daemon(&folder, false);
    call(&folder, "GC", json!({ "cni.dev/valid-attachments": [] })).run().silent();
    assert_eq!(calls(&folder), ["DEL old net1", "DEL old net1"], "refused in version 1.1.0, asked again in 1.0.0");
    call(&folder, "STATUS", json!({})).run().silent();
    assert_eq!(calls(&folder).len(), 2, "nor does it know STATUS");
}

#[test]
fn one_that_is_missing_is_named_with_where_it_was_looked_for() {
    let (folder, pod) = (Folder::new(), Pod::new());
    let _daemon = Daemon::start(folder.path(), |_, _| Reaction::HangUp);
    let text = call(&folder, "ADD", json!({})).set("CNI_NETNS", pod.netns()).run().error(code::CONFIG);
    assert!(text.contains("giver") && text.contains("/nonexistent"), "{text}");
    let call = call(&folder, "ADD", json!({})).set("CNI_NETNS", pod.netns()).unset("CNI_PATH");
    assert!(call.run().error(code::ENVIRONMENT).contains("CNI_PATH"));
}

#[test]
fn a_daemon_that_gives_addresses_of_its_own_is_told_off() {
    let (folder, pod) = (Folder::new(), Pod::new());
    plugin(&folder, "giver", "1.1.0", &given(), "");
    let daemon = Daemon::start(folder.path(), |seen, _| match seen.request["op"].as_str().unwrap() {
        "find" => ok(json!({ "attached": false })),
        "add" => ok(crate::daemon::attached()),
        _ => ok(json!({})),
    });
    let text = call(&folder, "ADD", json!({})).set("CNI_NETNS", pod.netns()).run().error(code::UNSUPPORTED_FIELD);
    assert!(text.contains("same release"), "{text}");
    assert_eq!(daemon.seen()[2].request["op"], "del");
    assert_eq!(calls(&folder), ["ADD c1 eth0", "DEL c1 eth0"]);
}
