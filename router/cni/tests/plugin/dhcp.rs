//! The plugin `dhcp` works by the interface: it comes between the two halves of an ADD, and before a DEL.

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use weft_api::code;

use crate::daemon::{Daemon, Reaction, ok, refuse};
use crate::delegation::{attached, calls, given, plugin};
use crate::folder::Folder;
use crate::pod::Pod;
use crate::runtime::{Call, config};

fn call(folder: &Folder, command: &str, mut keys: Value) -> Call {
    keys["socket"] = folder.path().join("weftd.sock").display().to_string().into();
    keys["stateDir"] = folder.path().join("state").display().to_string().into();
    keys["ipam"] = json!({ "type": "dhcp" });
    let call = Call::new(command).config(&config("1.1.0", keys)).set("CNI_PATH", folder.path().display().to_string());
    call.set("PATH", "/usr/bin:/bin")
}

/// What the daemon was asked, and how often the plugin had been called by then.
type Order = Arc<Mutex<Vec<(String, usize)>>>;

/// A daemon that refuses what `fails` names.
fn daemon(folder: &Folder, fails: &'static str, with: u32) -> (Daemon, Order) {
    let order = Order::default();
    let (noted, log) = (Arc::clone(&order), folder.path().join("calls"));
    let daemon = Daemon::start(folder.path(), move |seen, _| -> Reaction {
        let op = seen.request["op"].as_str().unwrap().to_owned();
        let called = std::fs::read_to_string(&log).unwrap_or_default().lines().count();
        noted.lock().unwrap().push((op.clone(), called));
        match op.as_str() {
            op if op == fails => refuse(with, "no"),
            "prepare" => {
                let mut bare = attached();
                (bare["addresses"], bare["routes"]) = (json!([]), json!([]));
                ok(bare)
            }
            "complete" | "add" => ok(attached()),
            _ => ok(json!({})),
        }
    });
    (daemon, order)
}

fn order(order: &Order) -> Vec<(String, usize)> {
    order.lock().unwrap().clone()
}

fn expected(all: &[(&str, usize)]) -> Vec<(String, usize)> {
    all.iter().map(|(op, called)| ((*op).to_owned(), *called)).collect()
}

#[test]
fn the_interface_is_there_before_the_plugin_is_asked_and_until_it_has_given_back() {
    let (folder, pod) = (Folder::new(), Pod::new());
    plugin(&folder, "dhcp", "1.1.0", &given(), "");
    let (daemon, seen) = daemon(&folder, "", 0);
    let result = call(&folder, "ADD", json!({})).set("CNI_NETNS", pod.netns()).run().result();
    assert_eq!(result["ips"], json!([{ "interface": 0, "address": "10.244.1.9/24", "gateway": "10.244.1.1" }]));
    assert_eq!(result["dns"], given()["dns"]);
    assert_eq!(order(&seen), expected(&[("prepare", 0), ("complete", 1)]));
    let asked = daemon.seen();
    assert!(asked.iter().all(|asked| asked.netns.is_some()), "{asked:?}");
    assert_eq!(asked[0].request.get("given"), None);
    assert_eq!(asked[1].request["given"], json!([{ "address": "10.244.1.9/24", "gateway": "10.244.1.1" }]));
    call(&folder, "DEL", json!({ "prevResult": result })).set("CNI_NETNS", pod.netns()).run().silent();
    assert_eq!(order(&seen)[2..], expected(&[("del", 2)]));
    assert_eq!(calls(&folder), ["ADD c1 eth0", "DEL c1 eth0"]);
}

#[test]
fn whatever_fails_the_address_is_given_back_first_and_the_interface_goes_then() {
    for (plugin_fails, daemon_fails, told) in [("ADD", "", 123), ("", "complete", code::ADDRESS)] {
        let (folder, pod) = (Folder::new(), Pod::new());
        plugin(&folder, "dhcp", "1.1.0", &given(), plugin_fails);
        let (_daemon, seen) = daemon(&folder, daemon_fails, code::ADDRESS);
        call(&folder, "ADD", json!({})).set("CNI_NETNS", pod.netns()).run().error(told);
        assert_eq!(calls(&folder), ["ADD c1 eth0", "DEL c1 eth0"]);
        assert_eq!(order(&seen).last().unwrap(), &("del".to_owned(), 2), "{:?}", order(&seen));
    }
}

#[test]
fn an_interface_that_is_not_made_is_not_asked_by() {
    for (code, told) in [(code::EXISTS, code::EXISTS), (code::REQUEST, code::UNSUPPORTED_FIELD)] {
        let (folder, pod) = (Folder::new(), Pod::new());
        plugin(&folder, "dhcp", "1.1.0", &given(), "");
        let (_daemon, seen) = daemon(&folder, "prepare", code);
        let text = call(&folder, "ADD", json!({})).set("CNI_NETNS", pod.netns()).run().error(told);
        assert!(told == code::EXISTS || text.contains("same release"), "{text}");
        assert_eq!((order(&seen), calls(&folder)), (expected(&[("prepare", 0)]), Vec::new()));
    }
}

#[test]
fn a_del_succeeds_also_when_the_address_cannot_be_given_back() {
    for is_there in [true, false] {
        let (folder, pod) = (Folder::new(), Pod::new());
        if is_there {
            plugin(&folder, "dhcp", "1.1.0", &given(), "DEL");
        }
        let (_daemon, seen) = daemon(&folder, "", 0);
        call(&folder, "DEL", json!({})).set("CNI_NETNS", pod.netns()).run().silent();
        assert_eq!(order(&seen), expected(&[("del", usize::from(is_there))]));
    }
}

#[test]
fn trust_is_asked_for_and_a_daemon_that_knows_of_none_is_told_off() {
    let (folder, pod) = (Folder::new(), Pod::new());
    let (daemon, _) = daemon(&folder, "", 0);
    let mut call = call(&folder, "ADD", json!({})).set("CNI_NETNS", pod.netns());
    let keys = json!({
        "trusted": ["dhcp"], "socket": folder.path().join("weftd.sock"), "stateDir": folder.path().join("state")
    });
    call = call.config(&config("1.1.0", keys));
    assert!(call.run().error(code::UNSUPPORTED_FIELD).contains("same release"));
    let asked = daemon.seen();
    assert_eq!(asked[0].request["trusted"], json!(["dhcp"]));
    assert_eq!(asked[1].request["op"], "del");
}
