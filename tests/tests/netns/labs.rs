//! `weft lab` itself: nothing stays behind, and labs do not get into each other's way.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use weft_tests::command::{Background, eventually, run, shell};
use weft_tests::lab::Lab;
use weft_tests::machine::{binary, turn, unique};

/// What a lab is made of that could stay behind.
#[track_caller]
fn nothing_is_left(lab: &Lab) {
    let netns: Vec<String> = std::fs::read_dir("/run/netns")
        .map(|folder| folder.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default();
    let left: Vec<_> = netns.iter().filter(|name| name.contains(&lab.name)).collect();
    assert!(left.is_empty(), "namespaces: {left:?}");
    for node in &lab.nodes {
        eventually("weftd has ended", Duration::from_secs(2), || !node.daemon().is_alive());
        assert!(!node.socket.exists(), "{} is left", node.socket.display());
    }
    assert!(!Path::new("/run/weft/lab").join(&lab.name).exists(), "the lab's folder is left");
    let processes = run(shell("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0\\n' '  ' || true")).out;
    assert!(!processes.contains(&format!("/lab/{}/", lab.name)), "processes are left: {processes}");
}

fn interfaces() -> String {
    run(shell("ip -o link show | sed 's/ mtu.*//' | sort; ip route show")).must()
}

#[test]
fn down_leaves_nothing_and_can_be_said_twice() {
    let _turn = turn();
    let before = interfaces();
    let lab = Lab::up("x", 2, 2, "routed", &[]);
    lab.down();
    nothing_is_left(&lab);
    lab.down();
    assert_eq!(interfaces(), before);
}

#[test]
fn down_leaves_nothing_after_daemons_were_killed_and_pods_deleted() {
    let _turn = turn();
    let before = interfaces();
    let lab = Lab::up("y", 2, 2, "bridged", &[]);
    lab.daemon(1).signal(rustix::process::Signal::KILL);
    lab.daemon(2).signal(rustix::process::Signal::STOP);
    run(shell(&format!("ip netns del {}", lab.pod(2, 1).netns))).must();
    lab.down();
    nothing_is_left(&lab);
    assert_eq!(interfaces(), before);
}

/// A folder with an `ip` that makes a namespace after so many seconds only.
#[test]
fn a_lab_whose_nodes_know_each_other_by_etcd_works_and_leaves_nothing() {
    let _turn = turn();
    let before = interfaces();
    for mode in ["routed", "bridged"] {
        // Every pod reaches every other, or `up` fails.
        let lab = Lab::up("e", 3, 2, mode, &["--source", "etcd"]);
        for node in 1..=3 {
            let status = lab.daemon(node).status();
            // A node may be sent to before it has heard of who sends.
            let problems = status.problems.iter().filter(|problem| !problem.contains("ended as NotMember"));
            assert_eq!((status.peers, problems.count()), (2, 0), "{:?}", status.problems);
            assert!(status.source.starts_with("etcd"), "{}", status.source);
        }
        lab.assert_conserved();
        lab.down();
        nothing_is_left(&lab);
    }
    assert_eq!(interfaces(), before);
}

fn slow_ip(seconds: u32) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let real = run(shell("command -v ip")).must();
    let script = format!(
        "#!/bin/sh\n[ \"$1 $2\" = 'netns add' ] && {{ echo \"$3\" >>{}/asked; sleep {seconds}; }}\nexec {} \"$@\"\n",
        folder.path().display(),
        real.trim()
    );
    let path = folder.path().join("ip");
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    folder
}

#[test]
fn down_leaves_nothing_when_up_was_killed_in_the_middle_of_a_step() {
    let _turn = turn();
    let name = unique("q");
    let record = Path::new("/run/weft/lab").join(&name);
    let slow = slow_ip(2);
    let weft = |action: &str| {
        let mut command = std::process::Command::new(binary("weft"));
        command.args(["lab", action, "--name", &name]);
        command
    };
    let mut up = weft("up");
    up.env("PATH", format!("{}:{}", slow.path().display(), std::env::var("PATH").unwrap()));
    up.env("WEFT_BIN_DIR", binary("weftd").parent().unwrap());
    let mut up = Background::start(up);
    let asked = || std::fs::read_to_string(slow.path().join("asked")).unwrap_or_default();
    eventually("the first namespace is asked for", Duration::from_secs(10), || asked().contains(&name));
    let pid = rustix::process::Pid::from_raw(i32::try_from(up.pid()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    eventually("a killed `weft lab up` is gone", Duration::from_secs(5), || up.has_ended());
    assert!(record.exists(), "up was to be killed with its record written");
    run(weft("down")).must();
    // Longer than the step would have taken.
    std::thread::sleep(Duration::from_millis(2500));
    let left = run(shell(&format!("ls /run/netns | grep {name} || true"))).must();
    for netns in left.split_whitespace() {
        run(shell(&format!("ip netns del {netns}"))).must();
    }
    assert_eq!(left, "", "{} was asked for", asked());
    assert!(!record.exists(), "the lab's folder is left");
}

#[test]
fn labs_with_different_names_run_side_by_side() {
    let _turn = turn();
    let (one, two) = (Lab::up("one", 2, 1, "routed", &[]), Lab::up("two", 2, 1, "bridged", &[]));
    for lab in [&one, &two] {
        lab.pod(1, 1).netns().exec(&format!("ping -n -c 1 -W 2 {}", lab.pod(2, 1).ipv4)).must();
    }
    one.down();
    nothing_is_left(&one);
    two.pod(1, 1).netns().exec(&format!("ping -n -c 1 -W 2 {}", two.pod(2, 1).ipv4)).must();
    let listed: serde_json::Value = serde_json::from_str(&two.weft(&["lab", "ls", "--json"]).must()).unwrap();
    let names: Vec<_> = listed.as_array().unwrap().iter().filter_map(|lab| lab["name"].as_str()).collect();
    assert!(names.contains(&two.name.as_str()) && !names.contains(&one.name.as_str()), "{names:?}");
}

#[test]
fn a_name_that_is_taken_is_refused_and_what_has_it_goes_on() {
    let _turn = turn();
    let lab = Lab::up("z", 1, 1, "routed", &[]);
    let second = lab.weft(&["lab", "up", "--name", &lab.name, "--nodes", "1", "--pods", "1"]);
    assert!(!second.success && second.err.contains(&lab.name), "{}", second.err);
    lab.pod(1, 1).netns().exec(&format!("ping -n -c 1 -W 2 {}", lab.pod(1, 1).gateway4)).must();
}

#[test]
fn every_view_of_the_command_line_is_json_when_asked() {
    let _turn = turn();
    let lab = Lab::up("v", 2, 1, "bridged", &[]);
    let socket = lab.nodes[0].socket.to_str().unwrap();
    for view in ["status", "ports", "routes", "fdb", "neigh", "flows", "leases", "drops", "nodes"] {
        let json = lab.weft(&["--socket", socket, view, "--json"]).must();
        serde_json::from_str::<serde_json::Value>(&json).unwrap_or_else(|error| panic!("{view}: {error}: {json}"));
        assert!(!lab.weft(&["--socket", socket, view]).must().trim().is_empty(), "{view}");
    }
}
