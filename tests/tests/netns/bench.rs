//! `weft bench`: every row is there and makes sense, what cannot be measured says why, and nothing stays behind.
//!
//! The figures themselves mean nothing here: each is taken once, in the briefest way.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use weft_tests::command::{Background, Said, eventually, run, run_with, shell};
use weft_tests::machine::{binaries, binary, find, turn, unique};

const PATIENCE: Duration = Duration::from_secs(240);

fn bench(name: &str, args: &[&str]) -> Command {
    let mut command = thorough(name, args);
    command.arg("--smoke");
    command
}

/// A run that takes minutes.
fn thorough(name: &str, args: &[&str]) -> Command {
    let mut command = Command::new(binary("weft"));
    command.args(["bench", "--name", name]).args(args).env("WEFT_BIN_DIR", binaries());
    command
}

fn measured(said: Said) -> Value {
    serde_json::from_str(&said.must()).expect("weft bench --json - prints JSON and nothing else")
}

fn namespaces(name: &str) -> Vec<String> {
    let folder = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
    folder.map(|entry| entry.file_name().to_string_lossy().into_owned()).filter(|netns| netns.contains(name)).collect()
}

#[track_caller]
fn nothing_is_left(name: &str) {
    assert_eq!(namespaces(name), [""; 0]);
    let labs = std::fs::read_dir("/run/weft/lab").into_iter().flatten().flatten();
    let labs: Vec<_> = labs.filter(|lab| lab.file_name().to_string_lossy().starts_with(name)).collect();
    assert!(labs.is_empty(), "{labs:?}");
    let processes = run(shell("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0\\n' '  ' || true")).out;
    assert!(!processes.contains(&format!("/lab/{name}-")), "processes are left: {processes}");
}

/// The rows that there have to be.
fn expected() -> Vec<String> {
    let mut names = Vec::new();
    for layout in ["same", "two"] {
        for streams in [1, 4, 16] {
            for rest in ["", "-reverse", "-plain", "-reverse-plain"] {
                names.push(format!("{layout}-tcp-{streams}{rest}"));
            }
        }
        for links in ["", "-plain"] {
            names.extend(["cpu", "router-cpu"].map(|cpu| format!("{layout}-tcp-1{links}-{cpu}")));
        }
        for pace in ["rtt", "rtt-paused", "rtt-load"] {
            names.extend(["p50", "p99", "p99.9"].map(|rank| format!("{layout}-{pace}-{rank}")));
        }
        names.push(format!("{layout}-connections"));
        for sizes in ["64", "imix"] {
            names.extend(["ndr", "pdr"].map(|rate| format!("{layout}-frames-{sizes}-{rate}")));
        }
    }
    names.push("memory".to_owned());
    names
}

fn row<'a>(outcome: &'a Value, name: &str) -> &'a Value {
    let rows = outcome["rows"].as_array().expect("there are rows");
    rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("there is no row {name}"))
}

fn result<'a>(row: &'a Value, path: &str) -> &'a Value {
    let results = row["results"].as_array().expect("a row has results");
    results.iter().find(|result| result["path"] == path).unwrap_or_else(|| panic!("nothing about {path} in {row}"))
}

fn ratio(row: &Value, to: &str) -> f64 {
    let ratios = row["ratios"].as_array().expect("a row has ratios");
    let ratio = ratios.iter().find(|ratio| ratio["to"] == to).unwrap_or_else(|| panic!("no ratio to {to} in {row}"));
    ratio["median"].as_f64().unwrap_or_else(|| panic!("{row}"))
}

#[test]
fn every_row_is_there_for_every_path_and_nothing_is_left_behind() {
    let _turn = turn();
    assert!(find("ovs-vswitchd").is_some(), "ovs-vswitchd is missing: `apt-get install openvswitch-switch`");
    let name = unique("m");
    let chart = tempfile::tempdir().unwrap();
    let svg = chart.path().join("chart.svg");
    let args = ["--json", "-", "--svg", svg.to_str().unwrap()];
    let outcome = measured(run_with(bench(&name, &args), &[], PATIENCE));
    nothing_is_left(&name);

    let paths: Vec<_> = outcome["paths"].as_array().unwrap().iter().map(|path| path["id"].as_str().unwrap()).collect();
    let wrapped = ["weft-geneve", "weft-gre", "weft-ipip", "weft-host-gw"];
    let [first, last] = [["weft", "kernel", "weft-xdp"], ["ovs-xdp", "ovs-packet", "testpmd"]];
    assert_eq!(paths, [&first[..], &wrapped, &["kernel-routes", "weft-out"], &last].concat());
    // DPDK is two hundred packages, too much for a yardstick; `make bench` installs them.
    let has_testpmd = find("dpdk-testpmd").is_some();
    for path in outcome["paths"].as_array().unwrap() {
        if path["id"] == "testpmd" && !has_testpmd {
            assert!(path["not_measured"].as_str().unwrap().contains("apt-get install dpdk-dev"), "{path}");
        } else {
            assert_eq!(path["not_measured"], Value::Null, "this kernel and this machine have all others: {path}");
        }
    }
    assert!(outcome["machine"]["cpus"].as_u64().unwrap() >= 1 && outcome["machine"]["kernel"].is_string());
    for name in expected() {
        let row = row(&outcome, &name);
        for path in &paths {
            let result = result(row, path);
            match result["median"].as_f64() {
                Some(median) => assert!(median.is_finite() && median >= 0.0, "{name}: {result}"),
                // On which paths a row has no meaning is the business of the next lines.
                None => assert!(result["not_measured"].as_str().is_some_and(|why| !why.is_empty()), "{name}: {result}"),
            }
        }
        assert!(result(row, "weft")["median"].is_f64(), "{name} on weft: {row}");
        if name != "memory" && !name.contains("router-cpu") {
            assert!(result(row, "kernel")["median"].is_f64(), "{name} on the kernel: {row}");
        }
        if !name.contains("plain") {
            for path in ["weft-xdp", "ovs-xdp", "ovs-packet"] {
                assert!(result(row, path)["median"].is_f64(), "{name} on {path}: {row}");
            }
        }
        if name.starts_with("same-frames") {
            assert_eq!(result(row, "testpmd")["median"].is_f64(), has_testpmd, "{name}: {row}");
        }
        // A search that is as brief as this one may find no rate at all.
        if name.contains("tcp") && !name.contains("cpu") || name.contains("rtt") || name.contains("connections") {
            let ratio = ratio(row, "kernel");
            assert!(ratio.is_finite() && ratio > 0.0, "{name}: {ratio}");
        }
    }
    let stream = row(&outcome, "two-tcp-1");
    for path in wrapped.into_iter().chain(["kernel-routes"]) {
        assert!(result(stream, path)["median"].as_f64().is_some_and(|median| median > 0.0), "{path}: {stream}");
    }
    for name in ["out-tcp-1", "out-tcp-1-reverse"] {
        let row = row(&outcome, name);
        for path in ["weft-out", "kernel"] {
            assert!(result(row, path)["median"].as_f64().is_some_and(|median| median > 0.0), "{path}: {row}");
        }
        assert!(ratio(row, "kernel") > 0.0, "{row}");
    }
    let svg = std::fs::read_to_string(&svg).unwrap();
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>") && svg.contains("TCP, 1 stream"));
}

#[test]
fn a_path_that_cannot_be_built_says_what_to_install() {
    let _turn = turn();
    let name = unique("w");
    let programs = tempfile::tempdir().unwrap();
    for program in ["ip", "bridge", "ethtool", "iperf3", "sh", "tee"] {
        let path = find(program).unwrap_or_else(|| panic!("{program} is missing"));
        std::os::unix::fs::symlink(path, programs.path().join(program)).unwrap();
    }
    let args = ["--json", "-", "--paths", "kernel", "ovs-packet", "--only", "same-connections"];
    let mut command = bench(&name, &args);
    command.env("PATH", programs.path());
    let outcome = measured(run_with(command, &[], PATIENCE));
    let row = row(&outcome, "same-connections");
    assert!(result(row, "kernel")["median"].as_f64().unwrap() > 0.0);
    let why = result(row, "ovs-packet")["not_measured"].as_str().unwrap();
    assert!(why.contains("apt-get install openvswitch-switch"), "{why}");
    nothing_is_left(&name);
}

/// A run that is under way, with all its labs built.
fn under_way(name: &str) -> Background {
    let run = Background::start(thorough(name, &["--paths", "weft", "kernel", "--only", "tcp"]));
    let last = format!("weft-{name}-kernel-n2-p2");
    eventually("the last lab is being built", Duration::from_secs(30), || Path::new("/run/netns").join(&last).exists());
    std::thread::sleep(Duration::from_millis(1500));
    run
}

#[test]
fn an_interrupted_run_leaves_nothing() {
    let _turn = turn();
    let name = unique("i");
    let mut bench = under_way(&name);
    assert!(!bench.has_ended(), "it was to be interrupted");
    run(shell(&format!("kill -INT {}", bench.pid()))).must();
    eventually("it ends", Duration::from_secs(20), || bench.has_ended());
    nothing_is_left(&name);
}

#[test]
fn what_a_killed_run_left_is_removed_by_the_next() {
    let _turn = turn();
    let name = unique("k");
    let bench_run = under_way(&name);
    drop(bench_run);
    assert!(!namespaces(&name).is_empty(), "it was killed before it could clear up");
    let args = ["--paths", "kernel", "--only", "two-connections", "--json", "-"];
    let outcome = measured(run_with(bench(&name, &args), &[], PATIENCE));
    assert!(result(row(&outcome, "two-connections"), "kernel")["median"].as_f64().unwrap() > 0.0);
    nothing_is_left(&name);
}
