//! `weft ipam` as an operator uses it, on stores of its own and without weftd.

#![expect(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use weft_ipam::Store;

/// `weft ipam`, with a state folder and without anybody who listens.
fn ipam(state: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weft"));
    command.args(["--socket", "/nonexistent/weftd.sock", "ipam"]).args(args).arg("--state-dir").arg(state);
    command.env("NO_COLOR", "1").output().unwrap()
}

fn done(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn refused(output: &Output, code: i32) -> String {
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    String::from_utf8([output.stdout.clone(), output.stderr.clone()].concat()).unwrap()
}

/// What host-local leaves: two pods, one of them dual-stack, one known by its id alone, and a file that a crash emptied.
fn network(folder: &Path) -> std::path::PathBuf {
    let network = folder.join("networks/pods");
    fs::create_dir_all(&network).unwrap();
    let files = [
        ("10.9.0.2", "aaaa\r\neth0"),
        ("fd00:9::2", "aaaa\r\neth0"),
        ("10.9.0.3", "bbbb"),
        ("10.9.0.4", ""),
        ("last_reserved_ip.0", "10.9.0.4"),
        ("last_reserved_ip.1", "fd00:9::2"),
        ("lock", ""),
    ];
    for (name, content) in files {
        fs::write(network.join(name), content).unwrap();
    }
    network
}

#[test]
fn a_folder_of_host_locals_is_taken_over_once_and_given_back_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let (state, network) = (folder.path().join("state"), network(folder.path()));
    fs::create_dir(&state).unwrap();
    let said = done(&ipam(&state, &["import", network.to_str().unwrap()]));
    assert!(
        said.starts_with("pods: 4 addresses of 2 attachments\n") && said.contains("1 addresses have files without"),
        "{said}"
    );
    // Once more changes nothing, also by the folder above.
    let above = network.parent().unwrap();
    let said = done(&ipam(&state, &["import", above.to_str().unwrap()]));
    assert!(said.contains("3 of them were here already"), "{said}");

    let listed = done(&ipam(&state, &["ls"]));
    assert_eq!(listed.lines().count(), 4, "{listed}");
    let json: serde_json::Value = serde_json::from_str(&done(&ipam(&state, &["ls", "--json"]))).unwrap();
    assert_eq!(json[0]["addresses"], serde_json::json!(["10.9.0.2", "fd00:9::2"]));
    let shown = done(&ipam(&state, &["show", "10.9.0.2"]));
    assert!(shown.contains("aaaa") && shown.contains("pods"), "{shown}");
    refused(&ipam(&state, &["show", "10.9.0.77"]), 1);

    let back = folder.path().join("back");
    done(&ipam(&state, &["export", back.to_str().unwrap()]));
    let names = |folder: &Path| {
        let mut all: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name()).collect();
        all.sort();
        all
    };
    assert_eq!(names(&back), names(&network));
    for name in names(&network) {
        assert_eq!(fs::read(back.join(&name)).unwrap(), fs::read(network.join(&name)).unwrap(), "{name:?}");
    }
}

#[test]
fn what_contradicts_the_store_is_not_taken_over_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let (state, network) = (folder.path().join("state"), network(folder.path()));
    drop(Store::open(state.join("leases")).unwrap());
    done(&ipam(&state, &["reserve", "10.9.0.3", "--note", "a printer"]));
    let said = refused(&ipam(&state, &["import", network.to_str().unwrap()]), 1);
    assert!(said.contains("10.9.0.3 of pods/bbbb/ is leased to /reserved/10.9.0.3"), "{said}");
    let listed = done(&ipam(&state, &["ls"]));
    assert!(listed.lines().count() == 2 && listed.contains("a printer"), "{listed}");
    done(&ipam(&state, &["release", "10.9.0.3"]));
    done(&ipam(&state, &["import", network.to_str().unwrap()]));
}

#[test]
fn damage_is_said_repaired_when_asked_and_not_while_weftd_has_the_store() {
    let folder = tempfile::tempdir().unwrap();
    let (state, network) = (folder.path().join("state"), network(folder.path()));
    assert!(done(&ipam(&state, &["fsck"])).contains("no lease journal"));
    let store = Store::open(state.join("leases")).unwrap();
    for number in 0..9 {
        done_reserving(&store, number);
    }
    let said = refused(&ipam(&state, &["import", network.to_str().unwrap()]), 1);
    assert!(said.contains("stop weftd first") && said.contains(&std::process::id().to_string()), "{said}");
    assert!(done(&ipam(&state, &["fsck"])).contains("is sound"), "looking needs no lock");
    refused(&ipam(&state, &["fsck", "--repair"]), 1);
    let length = usize::try_from(store.journal_len()).unwrap();
    drop(store);

    let journal = state.join("leases").join(weft_ipam::JOURNAL_FILE);
    let mut bytes = fs::read(&journal).unwrap();
    bytes[length / 2] ^= 1;
    fs::write(&journal, &bytes).unwrap();
    let said = refused(&ipam(&state, &["ls"]), 1);
    assert!(said.contains("weft ipam fsck"), "{said}");
    let said = refused(&ipam(&state, &["fsck"]), 3);
    assert!(said.contains("DAMAGE") && said.contains("nothing was changed"), "{said}");
    assert_eq!(fs::read(&journal).unwrap(), bytes);
    let json: serde_json::Value = serde_json::from_slice(&ipam(&state, &["fsck", "--json"]).stdout).unwrap();
    assert_eq!((&json["sound"], &json["missing_changes"]), (&false.into(), &1.into()));
    assert!(done(&ipam(&state, &["fsck", "--repair"])).contains("repaired"));
    assert!(done(&ipam(&state, &["fsck"])).contains("is sound"));
    assert!(done(&ipam(&state, &["ls"])).lines().count() >= 9);
}

fn done_reserving(store: &Store, number: u8) {
    let address = [10, 9, 0, 10 + number].into();
    store.adopt(weft_ipam::reserved_owner(address), &[address], weft_ipam::Facts::default()).unwrap();
}
