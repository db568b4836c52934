//! The command line as a user or a script meets it: exit codes, what goes to stdout and what to stderr.

#![expect(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};
use std::thread::{self, JoinHandle};

fn weft(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_weft")).args(args).env("NO_COLOR", "1").output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A daemon that gives the same answer to one question.
fn daemon(socket: &Path, answer: &str) -> JoinHandle<String> {
    let listener = UnixListener::bind(socket).unwrap();
    let answer = format!("{answer}\n");
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut question = String::new();
        BufReader::new(&stream).read_line(&mut question).unwrap();
        stream.write_all(answer.as_bytes()).unwrap();
        question
    })
}

fn ask(args: &[&str], answer: &str) -> (Output, String) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("weftd.sock");
    let daemon = daemon(&socket, answer);
    let socket = socket.to_str().unwrap().to_owned();
    let output = weft(&[&["--socket", &socket], args].concat());
    (output, daemon.join().unwrap())
}

const STATUS: &str = r#"{"version":1,"ok":{"problems":[PROBLEMS],"node":"n1","version":"0.1.0","pid":7,"uptime":1.5,
"mode":"routed","ranges":["10.244.1.0/24"],"gateways":["10.244.1.1"],"gateway_mac":"02:00:00:00:00:01",
"vtep_mac":"02:00:00:00:00:02","underlay":"10.200.0.1:8472","underlay_kind":"udp","vni":1,"mtu":1450,"underlay_mtu":1500,
"pods":0,"peers":0,"leases":[],"epoch":1,"counters":{"received":0,"received_bytes":0,"created":0,"sent":0,
"sent_bytes":0,"dropped":0,"merged":0}}}"#;

fn status(problems: &str) -> String {
    STATUS.replace("PROBLEMS", problems).replace('\n', "")
}

#[test]
fn a_wrong_command_line_exits_with_2() {
    for args in [
        &["frobnicate"][..],
        &[],
        &["status", "--nonsense"],
        &["lab", "up", "--nodes", "0"],
        &["lab", "up", "--nodes", "17"],
        &["lab", "up", "--pods", "65"],
        &["lab", "up", "--mtu", "100"],
        &["lab", "up", "--mode", "magic"],
        &["lab", "up", "--name", "../etc"],
        &["lab", "down", "--name", "a/b"],
        &["lab", "down", "--all", "--name", "x"],
        &["lab", "exec", "n1"],
        &["bench", "--paths", "magic"],
        &["bench", "--full", "--smoke"],
    ] {
        let output = weft(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", text(&output.stderr));
        assert!(output.stdout.is_empty(), "{args:?}");
        assert!(!output.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn the_help_documents_the_exit_codes_and_hides_what_is_internal() {
    let output = weft(&["--help"]);
    assert_eq!(output.status.code(), Some(0));
    let help = text(&output.stdout);
    assert!(help.contains("3 `weft status`") && help.contains("found problems"), "{help}");
    assert!(!help.contains("lab-peer") && !help.contains("bench-peer"), "{help}");
}

#[test]
fn a_daemon_that_is_not_there_is_named_with_exit_code_1() {
    let output = weft(&["--socket", "/nonexistent/weftd.sock", "status"]);
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(error.contains("/nonexistent/weftd.sock") && error.contains("is weftd running?"), "{error}");
}

#[test]
fn status_exits_with_0_if_all_is_well_and_with_3_if_not() {
    let (output, question) = ask(&["status"], &status(""));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(text(&output.stdout).starts_with("all is well\n"));
    assert!(question.contains(r#""op":"status""#), "{question}");

    let (output, _) = ask(&["status"], &status(r#""peer n2 is silent""#));
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stdout).starts_with("PROBLEM  peer n2 is silent\n"));

    let (output, _) = ask(&["status", "--json"], &status(r#""peer n2 is silent""#));
    assert_eq!(output.status.code(), Some(3));
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["problems"][0], "peer n2 is silent");
}

#[test]
fn a_list_is_a_table_or_the_daemons_own_json() {
    let answer = r#"{"version":1,"ok":[{"destination":"10.244.2.0/24","via":"n2","underlay":"10.200.0.2"}]}"#;
    let (output, question) = ask(&["routes"], answer);
    assert_eq!(text(&output.stdout), "destination    via  underlay\n10.244.2.0/24  n2   10.200.0.2\n");
    assert!(question.contains(r#""op":"routes""#), "{question}");
    let (output, _) = ask(&["routes", "--json"], answer);
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value[0]["underlay"], "10.200.0.2");
}

#[test]
fn a_refusal_is_told_in_the_daemons_words() {
    let (output, _) =
        ask(&["reload"], r#"{"version":1,"error":{"code":7,"msg":"weftd.toml, line 3: vni","details":""}}"#);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("weftd.toml, line 3: vni"));
}

#[test]
fn an_answer_that_makes_no_sense_is_an_error_and_no_panic() {
    for answer in ["", "nonsense", r#"{"version":1,"ok":7}"#, r#"{"version":99,"ok":[]}"#, r#"{"version":1}"#] {
        let (output, _) = ask(&["ports"], answer);
        assert_eq!(output.status.code(), Some(1), "{answer:?}");
        assert!(!text(&output.stderr).contains("panicked"), "{answer:?}");
    }
}

#[test]
fn a_lab_without_programs_says_which_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let name = format!("t{}", std::process::id());
    let output = weft(&["lab", "up", "--name", &name, "--bin-dir", folder.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    // As an ordinary user one is told that first.
    assert!(error.contains("weftd is missing; build it") || error.contains("needs root"), "{error}");
    assert!(!Path::new("/run/weft/lab").join(&name).exists());
}
