//! Environments, inputs and namespaces that no runtime should give: the right code, at once, and nothing done.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;

use serde_json::{Value, json};
use weft_api::code;

use crate::daemon::Daemon;
use crate::folder::Folder;
use crate::pod::Pod;
use crate::runtime::{Call, config, quickly};

/// A call with a daemon that would do anything.
fn call(folder: &Folder, command: &str, mut keys: Value) -> Call {
    keys["socket"] = folder.path().join("weftd.sock").display().to_string().into();
    keys["stateDir"] = folder.path().join("state").display().to_string().into();
    Call::new(command).config(&config("1.1.0", keys))
}

#[test]
fn a_bad_environment_is_code_4_and_names_the_variable() {
    let (folder, pod) = (Folder::new(), Pod::new());
    let daemon = Daemon::willing(folder.path());
    // An environment string of more than 128 KiB does not pass execve.
    let long = "x".repeat(128 * 1024 - 100);
    let cases: [(&str, Option<&[u8]>); 24] = [
        ("CNI_COMMAND", None),
        ("CNI_COMMAND", Some(b"")),
        ("CNI_COMMAND", Some(b"add")),
        ("CNI_COMMAND", Some(long.as_bytes())),
        ("CNI_CONTAINERID", None),
        ("CNI_CONTAINERID", Some(b"")),
        ("CNI_CONTAINERID", Some(b"../../etc/passwd")),
        ("CNI_CONTAINERID", Some(b"..")),
        ("CNI_CONTAINERID", Some(b"a/../b")),
        ("CNI_CONTAINERID", Some(b"-a")),
        ("CNI_CONTAINERID", Some(b"a\nb")),
        ("CNI_CONTAINERID", Some(b"\xff\xfe")),
        ("CNI_CONTAINERID", Some(long.as_bytes())),
        ("CNI_IFNAME", None),
        ("CNI_IFNAME", Some(b".")),
        ("CNI_IFNAME", Some(b"..")),
        ("CNI_IFNAME", Some(b"a/b")),
        ("CNI_IFNAME", Some(b"a:b")),
        ("CNI_IFNAME", Some(b"a b")),
        ("CNI_IFNAME", Some(b"sixteen-bytes-xx")),
        ("CNI_ARGS", Some(b"FOO=BAR")),
        ("CNI_ARGS", Some(b"nonsense")),
        ("CNI_ARGS", Some(b"IP=everything")),
        ("CNI_ARGS", Some(long.as_bytes())),
    ];
    for (name, value) in cases {
        let call = call(&folder, "ADD", json!({})).set("CNI_NETNS", pod.netns());
        let call = match value {
            Some(value) => call.set(name, OsStr::from_bytes(value)),
            None => call.unset(name),
        };
        let text = quickly(|| call.run()).error(code::ENVIRONMENT);
        assert!(text.contains(name), "{text}");
    }
    assert_eq!(daemon.seen().len(), 0);
}

#[test]
fn hostile_names_leave_nothing_anywhere_when_the_daemon_is_away() {
    let folder = Folder::new();
    for container in ["../evil", "..", "/evil", "a/b"] {
        call(&folder, "DEL", json!({})).set("CNI_CONTAINERID", container).run().error(code::ENVIRONMENT);
    }
    for ifname in ["../evil", "..", "a/b"] {
        call(&folder, "DEL", json!({})).set("CNI_IFNAME", ifname).run().error(code::ENVIRONMENT);
    }
    for name in [json!("../evil"), json!(".."), json!("a\0b"), json!("x".repeat(1 << 19)), json!(["pods"])] {
        call(&folder, "DEL", json!({ "name": name })).run().error(code::CONFIG);
    }
    assert_eq!(folder.everything(), [""; 0]);
}

#[test]
fn input_that_is_no_configuration_has_the_right_code() {
    let deep = format!("{{\"cniVersion\":\"1.1.0\",\"name\":\"pods\",\"x\":{}", "[".repeat(500_000));
    let deep_and_closed = format!("{{\"x\":{}{}}}", "[".repeat(200_000), "]".repeat(200_000));
    let cases: [(&[u8], u32); 20] = [
        (b"", code::DECODE),
        (b"\0\0\0\0", code::DECODE),
        (b"{", code::DECODE),
        (b"\xff\xfe{}", code::DECODE),
        (b"{\"name\":\"\xff\"}", code::DECODE),
        (b"{} {}", code::DECODE),
        (b"{\"cniVersion\":\"1.1.0\",\"name\":\"pods\"", code::DECODE),
        (b"{\"cniVersion\":\"1.1.0\",\"name\":\"a\nb\"}", code::DECODE),
        (b"{\"mtu\":1e999999}", code::DECODE),
        (deep.as_bytes(), code::DECODE),
        (deep_and_closed.as_bytes(), code::DECODE),
        (b"null", code::VERSION),
        (b"[]", code::VERSION),
        (b"{}", code::VERSION),
        (b"{\"cniVersion\":\"9.9.9\",\"name\":\"pods\"}", code::VERSION),
        (b"{\"cniVersion\":\"0.2.0\",\"name\":\"pods\"}", code::VERSION),
        (b"{\"cniVersion\":[],\"name\":\"pods\"}", code::VERSION),
        (b"{\"cniVersion\":\"1.1.0\"}", code::CONFIG),
        (b"{\"cniVersion\":\"1.1.0\",\"name\":\"\"}", code::CONFIG),
        (b"{\"cniVersion\":\"1.1.0\",\"name\":\"a\\u0000b\"}", code::CONFIG),
    ];
    for (input, expected) in cases {
        for command in ["ADD", "DEL", "CHECK", "GC", "STATUS"] {
            let call = Call::new(command).set("CNI_NETNS", "/nonexistent").input(input);
            let outcome = quickly(|| call.run());
            assert_eq!(outcome.output.as_ref().unwrap()["cniVersion"], "1.1.0");
            outcome.error(expected);
        }
    }
}

#[test]
fn input_that_does_not_end_is_cut_off() {
    let mut long = json!({ "cniVersion": "1.1.0", "name": "pods", "filler": "x".repeat(1024 * 1024) }).to_string();
    let call = Call::new("ADD").input(long.clone());
    assert!(quickly(|| call.run()).error(code::CONFIG).contains("1024 KiB"));
    // As large as it may be is read.
    long.truncate(1024 * 1024);
    let call = Call::new("ADD").input(long);
    call.run().error(code::DECODE);
    for command in ["ADD", "VERSION"] {
        let zero = || File::open("/dev/zero").unwrap();
        quickly(|| Call::new(command).run_from(zero())).error(code::CONFIG);
    }
}

/// Paths that are no pod's namespace.
fn not_a_pods(folder: &Folder) -> Vec<String> {
    let (fifo, file) = (folder.path().join("fifo"), folder.path().join("file"));
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    std::fs::write(&file, "not a namespace").unwrap();
    let mut paths: Vec<String> = [fifo, file, folder.path().to_owned()].map(|path| path.display().to_string()).to_vec();
    paths.push(format!("/proc/{}/ns/net", std::process::id()));
    let fixed = ["/proc/1/ns/net", "/proc/self/ns/net", "/proc/self/ns/mnt", "/dev/null", "/nonexistent", "relative"];
    paths.extend(fixed.map(str::to_owned));
    paths.push("x/".repeat(60_000));
    paths
}

#[test]
fn add_and_check_refuse_a_namespace_that_is_not_a_pods() {
    let folder = Folder::new();
    let daemon = Daemon::willing(folder.path());
    let previous = json!({ "prevResult": { "interfaces": [{ "name": "eth0", "sandbox": "/x" }] } });
    for command in ["ADD", "CHECK"] {
        let call = call(&folder, command, previous.clone());
        assert!(quickly(|| call.run()).error(code::ENVIRONMENT).contains("CNI_NETNS"));
        for path in not_a_pods(&folder).into_iter().chain([String::new()]) {
            let call = call.clone().set("CNI_NETNS", &path);
            let text = quickly(|| call.run()).error(code::ENVIRONMENT);
            assert!(text.contains("CNI_NETNS"), "{text}");
        }
        std::fs::remove_file(folder.path().join("fifo")).unwrap();
    }
    assert_eq!(daemon.seen().len(), 0);
}

#[test]
fn del_goes_by_the_name_and_never_hands_over_a_namespace_that_is_not_a_pods() {
    let folder = Folder::new();
    let daemon = Daemon::willing(folder.path());
    let paths = not_a_pods(&folder);
    for path in paths.iter().map(String::as_str).chain([""]) {
        let call = call(&folder, "DEL", json!({})).set("CNI_NETNS", path);
        quickly(|| call.run()).silent();
    }
    let seen = daemon.seen();
    assert!(seen.len() > paths.len());
    assert!(seen.iter().all(|seen| seen.netns.is_none() && seen.request["op"] == "del"), "{seen:?}");
}

#[test]
fn the_namespace_that_the_plugin_itself_lives_in_is_the_hosts() {
    let (folder, node, pod) = (Folder::new(), Pod::new(), Pod::new());
    let daemon = Daemon::willing(folder.path());
    let inside = call(&folder, "ADD", json!({})).through(&["ip", "netns", "exec", node.name()]);
    let text = inside.clone().set("CNI_NETNS", node.netns()).run().error(code::ENVIRONMENT);
    assert!(text.contains("host's own"), "{text}");
    assert_eq!(daemon.seen().len(), 0);
    inside.set("CNI_NETNS", pod.netns()).run().result();
    assert_eq!(daemon.only().netns, Some(pod.identity()));
}
