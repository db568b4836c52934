//! The container image, and weftd in it with the rights that the DaemonSet gives it.

use std::process::Command;

use weft_tests::command::run;
use weft_tests::container;
use weft_tests::lab::Lab;
use weft_tests::machine::{binary, turn};

#[test]
fn the_configuration_of_the_manifests_is_valid() {
    let file = tempfile::NamedTempFile::new().expect("there is a folder for temporary files");
    std::fs::write(file.path(), container::configuration()).expect("it was just made");
    let mut check = Command::new(binary("weftd"));
    check.args(["--check", "--config"]).arg(file.path()).env("NODE_NAME", "n1");
    check.env("KUBERNETES_SERVICE_HOST", "10.96.0.1").env("KUBERNETES_SERVICE_PORT", "443");
    run(check).must();
}

#[test]
fn weftd_works_in_a_container_with_the_rights_of_the_manifest() {
    let _turn = turn();
    let wrapped = container::wrap();
    let files = container::files(&wrapped);
    for program in ["usr/local/bin/weftd", "usr/local/bin/weft", "usr/local/bin/weft-cni"] {
        assert!(files.iter().any(|file| file.trim_start_matches("./") == program), "{program} is missing: {files:?}");
    }
    let shells: Vec<_> = files.iter().filter(|file| file.ends_with("/sh") || file.ends_with("/busybox")).collect();
    assert!(shells.is_empty(), "there is nothing to execute but ours: {shells:?}");

    let programs = wrapped.programs();
    for (suffix, port) in [("boxt", "tap"), ("boxx", "xdp")] {
        // It is up when every pod has reached every other.
        let lab = Lab::up(suffix, 2, 2, "routed", &["--port", port, "--bin-dir", &programs.to_string_lossy()]);
        for node in 1..=2 {
            let status = lab.daemon(node).status();
            assert_eq!(status.problems, Vec::<String>::new());
        }
        assert_eq!(confined(), 2, "each node's weftd has the runtime's filter of system calls, and not all rights");
        lab.assert_conserved();
        lab.down();
    }
}

/// How many weftd run with a filter of system calls and without the right to load kernel modules.
fn confined() -> usize {
    const MODULES: u64 = 1 << 16;
    let processes = std::fs::read_dir("/proc").expect("there is /proc").filter_map(Result::ok);
    let states = processes.filter_map(|entry| std::fs::read_to_string(entry.path().join("status")).ok());
    let value = |state: &str, key: &str| {
        let line = state.lines().find_map(|line| line.strip_prefix(key))?;
        Some(line.trim().to_owned())
    };
    let is_confined = |state: &String| {
        let rights = value(state, "CapEff:").and_then(|rights| u64::from_str_radix(&rights, 16).ok());
        value(state, "Name:").as_deref() == Some("weftd")
            && value(state, "Seccomp:").as_deref() == Some("2")
            && rights.is_some_and(|rights| rights & MODULES == 0)
    };
    states.filter(is_confined).count()
}
