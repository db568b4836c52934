//! What fails around weftd: its disk, its descriptors, its clients. Traffic goes on, ADD says "try again later", DEL succeeds.

use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use serde_json::{Value, json};
use weft_api::{Attach, Attached, AttachmentKey, ClientError, Empty, Request};
use weft_tests::cluster::{Cluster, WeftNode};
use weft_tests::command::{Background, eventually, run};
use weft_tests::machine::{binary, need, raise_descriptor_limit, turn};
use weft_tests::netns::OwnNetns;
use weft_tests::plugin::{self, addresses};

const TRY_AGAIN: u64 = 11;

/// A file system of its own for a node's state; it goes when this goes.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn new(at: &Path, kib: u32) -> Tmpfs {
        std::fs::create_dir_all(at).expect("the folder is writable");
        mount(&["-t", "tmpfs", "-o", &format!("size={kib}k,mode=0700"), "tmpfs"], at);
        Tmpfs(at.to_owned())
    }

    /// Leaves no byte free. Returns what does.
    fn fill(&self) -> PathBuf {
        let path = self.0.join("ballast");
        let mut file = std::fs::File::create(&path).expect("there is room for a name");
        while file.write_all(&[0; 4096]).is_ok() {}
        path
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

fn mount(arguments: &[&str], at: &Path) {
    let mut command = Command::new("mount");
    command.args(arguments).arg(at);
    run(command).must();
}

/// A node with two pods, one of which asks the other all the time.
struct Bed {
    // Before its folders go.
    node: WeftNode,
    state: Tmpfs,
    pods: Vec<OwnNetns>,
    cluster: Cluster,
}

impl Bed {
    fn new(suffix: &str) -> Bed {
        let cluster = Cluster::new(suffix);
        let state = Tmpfs::new(&cluster.folder.path().join("n1.state"), 256);
        let node = cluster.weft_node(1, "routed", "");
        let pods = ["one", "two"].map(|name| cluster.sandbox(name)).into_iter().collect();
        Bed { node, state, pods, cluster }
    }

    /// Attaches both, and begins to ping from one to the other.
    fn traffic(&self) -> Pings {
        self.node.attach("one", &self.pods[0]);
        let to = addresses(&self.node.attach("two", &self.pods[1]))[0];
        weft_tests::traffic::await_answer(&self.pods[0], to);
        let mut ping = self.pods[0].command("ping");
        ping.args(["-n", "-q", "-i", "0.01", "-W", "2", &to.to_string()]).stdout(Stdio::piped());
        Pings(ping.spawn().expect("ping is installed"))
    }

    fn add(&self, name: &str, pod: &OwnNetns) -> plugin::Answer {
        self.node.runtime.call("ADD", name, Some(&pod.path()), &Value::Null)
    }

    /// A lease without an interface, with so long a note.
    fn lease(&self, container: &str, note: usize) -> Result<Attached, ClientError> {
        let key = AttachmentKey { network: "pods".into(), container: container.into(), ifname: "x0".into() };
        let attach = json!({ "network": key.network, "container": key.container, "ifname": key.ifname, "netns": "",
            "labels": { "note": "x".repeat(note) } });
        let attach: Attach = serde_json::from_value(attach).expect("that is one");
        self.node.daemon().try_ask(&Request::Lease(attach))
    }
}

/// A ping that goes on; it is killed when this goes.
struct Pings(Child);

impl Pings {
    /// Ends it. The last request may have no answer yet.
    #[track_caller]
    fn lost_nothing(mut self) {
        // So that there is something to lose, however quick the test is.
        std::thread::sleep(Duration::from_millis(500));
        let pid = Pid::from_child(&self.0);
        kill_process(pid, Signal::INT).expect("it pings");
        let mut said = String::new();
        self.0.stdout.take().expect("it is piped").read_to_string(&mut said).expect("it speaks text");
        let count = |what: &str| -> u64 {
            let before = said.split(what).next().and_then(|before| before.split_whitespace().last());
            before.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("no {what}: {said}"))
        };
        let (sent, received) = (count(" packets transmitted"), count(" received"));
        assert!(sent > 10 && received + 1 >= sent, "{said}");
    }
}

impl Drop for Pings {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// ADD is told to try again and leaves nothing; DEL succeeds.
#[track_caller]
fn refuses_adds_and_lets_go(bed: &Bed, name: &str) {
    let pod = bed.cluster.sandbox(name);
    let said = bed.add(name, &pod).refused(TRY_AGAIN);
    assert!(said.contains("lease journal") || said.contains("lease store"), "{said}");
    assert!(!pod.ip("link").contains("eth0"));
    for _ in 0..2 {
        bed.node.runtime.del(name, &pod);
    }
}

#[test]
fn a_full_disk_stops_adds_and_nothing_else() {
    let _turn = turn();
    let mut bed = Bed::new("disk");
    let ping = bed.traffic();
    let third = bed.cluster.sandbox("third");
    bed.node.attach("third", &third);
    let ballast = bed.state.fill();
    // What is left of the journal's last page takes a few records more, and then a few short ones.
    for note in [3000, 0] {
        let refused = (0..60).find_map(|number| bed.lease(&format!("f{note}-{number}"), note).err());
        let code = refused.map(|error| match error {
            ClientError::Refused(failure) => u64::from(failure.code),
            other => panic!("{other}"),
        });
        assert_eq!(code, Some(TRY_AGAIN));
    }
    refuses_adds_and_lets_go(&bed, "late");
    bed.node.runtime.del("third", &third);
    assert!(!third.ip("link").contains("eth0"), "the pod's interface goes, whatever the disk says");
    let problems = bed.node.daemon().status().problems;
    assert!(problems.iter().any(|one| one.contains("lease")), "{problems:?}");
    std::fs::remove_file(ballast).expect("it is there");
    let after = bed.cluster.sandbox("after");
    bed.add("after", &after).must();
    ping.lost_nothing();
    let before = leased(&bed.node);
    assert!(!before.iter().any(|(container, _)| ["third", "late"].contains(&&**container)), "{before:?}");
    bed.node.kill();
    bed.node.start_again();
    let after: Vec<_> = leased(&bed.node).into_iter().filter(|(container, _)| !container.starts_with('f')).collect();
    let before: Vec<_> = before.into_iter().filter(|(container, _)| !container.starts_with('f')).collect();
    assert_eq!(after, before, "what was acknowledged is on the disk");
}

fn leased(node: &WeftNode) -> Vec<(String, std::net::IpAddr)> {
    let mut all: Vec<_> =
        node.daemon().leases().into_iter().map(|lease| (lease.key.container, lease.address)).collect();
    all.sort();
    all
}

/// Has some system calls of a node's weftd fail or wait, until it goes.
struct Injected(Background);

impl Injected {
    fn new(node: &WeftNode, what: &str) -> Injected {
        let log = node.runtime.state_dir.with_extension("strace");
        let mut command = Command::new("strace");
        let calls = what.split(':').next().unwrap_or_default();
        command.args(["-f", "-p", &node.daemon().pid.to_string(), "-e", &format!("trace={calls}")]);
        command.args(["-e", &format!("inject={what}"), "-o"]).arg(&log);
        let injected = Injected(Background::start(command));
        let pid = node.daemon().pid;
        let traced = || {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
        };
        eventually("weftd is traced", Duration::from_secs(10), traced);
        injected
    }
}

impl Drop for Injected {
    fn drop(&mut self) {
        // So that it lets go of weftd in good order.
        if let Some(pid) = i32::try_from(self.0.pid()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let ended = Instant::now() + Duration::from_secs(5);
        while !self.0.has_ended() && Instant::now() < ended {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn a_disk_that_fails_or_is_slow_holds_up_adds_and_nothing_else() {
    let _turn = turn();
    need(&[("strace", "strace")]);
    let mut bed = Bed::new("eio");
    let ping = bed.traffic();
    let injected = Injected::new(&bed.node, "fdatasync,fsync:delay_enter=1s");
    let pod = bed.cluster.sandbox("slow");
    let started = Instant::now();
    bed.add("slow", &pod).must();
    assert!(started.elapsed() > Duration::from_millis(900), "an ADD is durable before it is answered");
    drop(injected);
    let mut written = Vec::new();
    // As a file system that has been made read-only says it, and a disk that is broken.
    for (number, error) in ["EROFS", "EIO"].into_iter().enumerate() {
        let injected = Injected::new(&bed.node, &format!("pwrite64:error={error}"));
        refuses_adds_and_lets_go(&bed, &format!("unwritten{number}"));
        drop(injected);
        let name = format!("written{number}");
        written.push(bed.cluster.sandbox(&name));
        bed.add(&name, &written[number]).must();
    }
    let before = leased(&bed.node);
    let injected = Injected::new(&bed.node, "fdatasync,fsync:error=EIO");
    refuses_adds_and_lets_go(&bed, "unsynced");
    drop(injected);
    ping.lost_nothing();
    bed.node.kill();
    bed.node.start_again();
    assert_eq!(leased(&bed.node), before);
    bed.node.daemon().assert_conserved();
}

#[test]
fn without_descriptors_adds_are_told_to_try_again_and_pods_can_go() {
    let _turn = turn();
    let bed = Bed::new("fds");
    let ping = bed.traffic();
    let daemon = bed.node.daemon();
    let pid = Pid::from_raw(daemon.pid.try_into().expect("a process id")).expect("it is not 0");
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", pid.as_raw_nonzero())).expect("it lives");
    let line = limits.lines().find(|line| line.starts_with("Max open files")).expect("the kernel says it");
    let [current, maximum] = [3, 4].map(|at| line.split_whitespace().nth(at).and_then(|word| word.parse().ok()));
    let usual = Rlimit { current, maximum };
    let limit = |current: Option<u64>| {
        prlimit(Some(pid), Resource::Nofile, Rlimit { current, maximum: usual.maximum }).expect("root may set it");
    };
    let pod = bed.cluster.sandbox("pod");
    let (mut refused, mut made) = (0, 0);
    // Who measures or asks has a connection; how much else is open depends on the machine.
    let at_rest = daemon.descriptors() + 4;
    for room in 0..16 {
        let name = format!("p{room}");
        limit(usual.current);
        eventually("earlier clients are gone", Duration::from_secs(5), || daemon.descriptors() <= at_rest);
        limit(Some(daemon.limit_with_room(room)));
        let answer = bed.add(&name, &pod);
        if answer.success {
            made += 1;
        } else {
            answer.refused(TRY_AGAIN);
            refused += 1;
            assert!(!pod.ip("link").contains("eth0"), "with room for {room}");
        }
        bed.node.runtime.del(&name, &pod);
        limit(usual.current);
        // What could not be done at once is done before the next ADD.
        bed.add("again", &pod).must();
        bed.node.runtime.del("again", &pod);
        assert_eq!(leased(&bed.node).len(), 4, "with room for {room}");
    }
    assert!(refused >= 3 && made >= 1, "{refused} refused, {made} made");
    ping.lost_nothing();
    daemon.assert_conserved();
}

/// How long a client waits for an answer, at best of some.
fn answered_within(node: &WeftNode) -> Duration {
    let ask = || {
        let started = Instant::now();
        let _: Empty = node.daemon().ask(&Request::Ready);
        started.elapsed()
    };
    (0..5).map(|_| ask()).min().expect("there were some")
}

#[test]
fn clients_that_flood_dribble_or_never_end_keep_nobody_waiting() {
    let _turn = turn();
    raise_descriptor_limit(11_000);
    let cluster = Cluster::new("api");
    let node = cluster.weft_node(1, "routed", "");
    let socket = node.runtime.socket.clone();
    let quick = |what: &str| {
        eventually(what, Duration::from_secs(30), || answered_within(&node) < Duration::from_millis(50));
    };
    let before = (node.daemon().resident_kib(), node.daemon().descriptors());
    let connect = || UnixStream::connect(&socket).expect("the socket takes clients");
    let silent: Vec<UnixStream> = (0..10_000).map(|_| connect()).collect();
    quick("beside ten thousand silent clients");
    drop(silent);
    let half: Vec<UnixStream> = (0..200)
        .map(|_| {
            let mut client = connect();
            // Whoever was displaced meanwhile is told so.
            let _ = client.write_all(b"{\"version\":1,\"op\":\"re");
            client
        })
        .collect();
    quick("beside two hundred half requests");
    drop(half);
    let mut endless = connect();
    endless.set_write_timeout(Some(Duration::from_secs(5))).expect("a timeout can be set");
    let sent = (0..4096).take_while(|_| endless.write_all(&[b'x'; 16 << 10]).is_ok()).count();
    assert!(sent < 1024, "{sent} times 16 KiB were taken of a line that never ends");
    quick("after a line that never ends");
    let long = format!("{{\"version\":1,\"op\":\"del\",\"network\":\"{}\"", "n".repeat(60_000));
    for bytes in
        [long.as_bytes(), b"\xff\xfe\n", b"[[[[[[[[\n", b"{\"version\":4294967296,\"op\":\"ready\"}\n", b"\n\n\n"]
    {
        let mut client = connect();
        client.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout can be set");
        let _ = client.write_all(bytes).and_then(|()| client.shutdown(std::net::Shutdown::Write));
        let _ = client.read_to_end(&mut Vec::new());
    }
    quick("after lines that are none");
    eventually("descriptors come back", Duration::from_secs(10), || node.daemon().descriptors() <= before.1 + 4);
    let grown = node.daemon().resident_kib().saturating_sub(before.0);
    assert!(grown < 64 << 10, "weftd has grown by {grown} KiB");
    assert!(node.daemon().is_alive());
}

#[test]
fn who_is_not_root_is_refused_even_where_the_socket_is_open_to_all() {
    let _turn = turn();
    let cluster = Cluster::new("uid");
    let node = cluster.weft_node(1, "routed", "");
    let socket = &node.runtime.socket;
    assert_eq!(std::fs::metadata(socket).expect("it is there").mode() & 0o777, 0o600);
    let open = |path: &Path, mode: u32| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("it is ours");
    };
    open(cluster.folder.path(), 0o755);
    // A copy that everybody may execute, wherever the build is.
    let program = cluster.folder.path().join("weft");
    std::fs::copy(binary("weft"), &program).expect("the folder is writable");
    let status = || {
        let mut command = Command::new(&program);
        command.arg("--socket").arg(socket).arg("status").uid(65_534).gid(65_534);
        run(command)
    };
    let said = status();
    assert!(!said.success && said.err.contains("root"), "{}{}", said.out, said.err);
    open(socket, 0o666);
    let said = status();
    assert!(!said.success && said.err.contains("65534"), "{}{}", said.out, said.err);
}
