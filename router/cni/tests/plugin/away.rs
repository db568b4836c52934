//! Each command with a daemon that is away, comes late, or goes away in the middle.

use std::os::unix::net::UnixListener;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use weft_api::{AttachmentKey, code};

use crate::daemon::{Daemon, Reaction, attached, ok};
use crate::folder::Folder;
use crate::pod::Pod;
use crate::runtime::{Call, config, quickly};

fn call(folder: &Folder, command: &str, mut keys: Value) -> Call {
    keys["socket"] = folder.path().join("weftd.sock").display().to_string().into();
    keys["stateDir"] = folder.path().join("state").display().to_string().into();
    Call::new(command).config(&config("1.1.0", keys))
}

fn tombstones(folder: &Folder) -> Vec<AttachmentKey> {
    let read = |name: &String| serde_json::from_slice(&std::fs::read(folder.path().join(name)).unwrap()).unwrap();
    folder.everything().iter().filter(|name| name.ends_with(".json")).map(read).collect()
}

#[test]
fn commands_wait_for_the_daemon_and_then_say_where_to_look() {
    let (folder, pod) = (Folder::new(), Pod::new());
    let previous = json!({ "interfaces": [{ "name": "eth0", "sandbox": pod.netns() }] });
    let cases = [
        ("ADD", json!({}), code::TRY_AGAIN),
        ("CHECK", json!({ "prevResult": previous }), code::TRY_AGAIN),
        ("STATUS", json!({}), code::NOT_AVAILABLE),
    ];
    for (command, mut keys, code) in cases {
        keys["wait"] = 0.3.into();
        let outcome = call(&folder, command, keys).set("CNI_NETNS", pod.netns()).run();
        assert!(outcome.elapsed >= Duration::from_millis(300), "{command} gave up after {:?}", outcome.elapsed);
        assert!(outcome.elapsed < Duration::from_secs(5), "{command} took {:?}", outcome.elapsed);
        let text = outcome.error(code);
        for part in ["weftd.sock", "No such file", "is weftd running?", "systemctl status weftd"] {
            assert!(text.contains(part), "{command}: {text}");
        }
    }
    assert_eq!(folder.everything(), [""; 0], "only DEL and GC leave something behind");
}

#[test]
fn a_daemon_that_comes_late_is_waited_for() {
    let (folder, pod) = (Folder::new(), Pod::new());
    for (command, keys) in [("ADD", json!({})), ("STATUS", json!({}))] {
        thread::scope(|scope| {
            let running = scope.spawn(|| call(&folder, command, keys).set("CNI_NETNS", pod.netns()).run());
            thread::sleep(Duration::from_millis(300));
            let daemon = Daemon::willing(folder.path());
            let outcome = running.join().unwrap();
            assert!(outcome.success, "{command}: {:?}", outcome.output);
            assert_eq!(daemon.seen().len(), 1);
        });
    }
}

#[test]
fn a_socket_that_nobody_may_use_is_not_waited_for() {
    let (folder, pod) = (Folder::new(), Pod::new());
    std::fs::write(folder.path().join("file"), "").unwrap();
    let config = config("1.1.0", json!({ "socket": folder.path().join("file/x").display().to_string() }));
    let call = Call::new("ADD").set("CNI_NETNS", pod.netns()).config(&config);
    quickly(|| call.run()).error(code::TRY_AGAIN);
}

#[test]
fn del_succeeds_at_once_and_leaves_one_tombstone_that_names_the_attachment() {
    let folder = Folder::new();
    let call = call(&folder, "DEL", json!({}));
    quickly(|| call.run()).silent();
    call.run().silent();
    let expected = AttachmentKey { network: "pods".into(), container: "c1".into(), ifname: "eth0".into() };
    assert_eq!(tombstones(&folder), [expected]);
    let everything = folder.everything();
    assert_eq!(everything.len(), 3, "{everything:?}");

    call.clone().set("CNI_IFNAME", "eth1").run().silent();
    assert_eq!(tombstones(&folder).len(), 2);
}

#[test]
fn gc_succeeds_at_once_and_leaves_one_tombstone_for_each_network() {
    let folder = Folder::new();
    let gc = |valid: Value| call(&folder, "GC", json!({ "cni.dev/valid-attachments": valid }));
    quickly(|| gc(json!([])).run()).silent();
    gc(json!([{ "containerID": "c1", "ifname": "eth0" }])).run().silent();
    let left: Vec<String> = folder.everything().into_iter().filter(|name| name.ends_with(".json")).collect();
    assert_eq!(left.len(), 1, "{left:?}");
    let said: Value = serde_json::from_slice(&std::fs::read(folder.path().join(&left[0])).unwrap()).unwrap();
    assert_eq!(said, json!({ "gc": { "network": "pods", "valid": [["c1", "eth0"]] } }));
}

#[test]
fn del_does_not_wait_for_a_daemon_that_hangs() {
    let folder = Folder::new();
    // It is there, and accepts connections as far as the kernel does that for it, but never answers.
    let _hung = UnixListener::bind(folder.path().join("weftd.sock")).unwrap();
    let outcome = call(&folder, "DEL", json!({})).run();
    assert!(outcome.elapsed < Duration::from_secs(10), "it took {:?}", outcome.elapsed);
    outcome.silent();
    assert_eq!(tombstones(&folder).len(), 1);
}

#[test]
fn del_fails_when_not_even_a_tombstone_can_be_left() {
    let folder = Folder::new();
    std::fs::write(folder.path().join("state"), "a file where the folder should be").unwrap();
    let text = call(&folder, "DEL", json!({})).run().error(code::TRY_AGAIN);
    assert!(text.contains("is weftd running?") && text.contains("state"), "{text}");
}

#[test]
fn del_takes_its_tombstone_back_when_the_daemon_answers_after_all() {
    let folder = Folder::new();
    let daemon = Daemon::start(folder.path(), |_, number| if number == 0 { Reaction::HangUp } else { ok(json!({})) });
    call(&folder, "DEL", json!({})).run().silent();
    assert_eq!(daemon.seen().len(), 2);
    assert_eq!(tombstones(&folder), []);
}

#[test]
fn a_daemon_that_goes_away_in_the_middle_of_an_add_is_not_asked_twice() {
    let (folder, pod) = (Folder::new(), Pod::new());
    let daemon = Daemon::start(folder.path(), |_, number| match number {
        0 => Reaction::HangUp,
        _ => ok(attached()),
    });
    let outcome = call(&folder, "ADD", json!({})).set("CNI_NETNS", pod.netns()).run();
    assert!(outcome.error(code::TRY_AGAIN).contains("without an answer"));
    assert_eq!(daemon.seen().len(), 1);
}

#[test]
fn an_answer_that_is_not_one_is_told_and_nothing_else_is_written() {
    let (folder, pod) = (Folder::new(), Pod::new());
    let _daemon = Daemon::start(folder.path(), |_, _| ok(json!({ "mac": 7 })));
    let outcome = call(&folder, "ADD", json!({})).set("CNI_NETNS", pod.netns()).run();
    assert!(outcome.error(code::TRY_AGAIN).contains("cannot be used"));
}
