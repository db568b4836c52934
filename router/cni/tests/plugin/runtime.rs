//! A container runtime: it executes the plugin and reads what it says.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// The binary under test.
pub const PLUGIN: &str = env!("CARGO_BIN_EXE_weft-cni");

/// An answer that waits for nobody comes within this time.
const QUICK: Duration = Duration::from_millis(100);

/// One execution of the plugin.
#[derive(Clone)]
pub struct Call {
    program: Vec<String>,
    environment: BTreeMap<OsString, OsString>,
    input: Vec<u8>,
}

/// What came of it.
pub struct Outcome {
    pub success: bool,
    /// Standard output: nothing or one JSON document.
    pub output: Option<Value>,
    pub elapsed: Duration,
}

impl Call {
    /// A call of `command` for container `c1`, interface `eth0`, with an empty configuration.
    pub fn new(command: &str) -> Call {
        let call = Call { program: vec![PLUGIN.to_owned()], environment: BTreeMap::new(), input: Vec::new() };
        call.set("CNI_COMMAND", command)
            .set("CNI_CONTAINERID", "c1")
            .set("CNI_IFNAME", "eth0")
            .set("CNI_PATH", "/opt/cni/bin")
    }

    /// Runs the plugin through another program.
    pub fn through(mut self, program: &[&str]) -> Call {
        self.program.splice(0..0, program.iter().map(|&part| part.to_owned()));
        self.set("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
    }

    pub fn set(mut self, name: &str, value: impl AsRef<OsStr>) -> Call {
        self.environment.insert(name.into(), value.as_ref().to_owned());
        self
    }

    pub fn unset(mut self, name: &str) -> Call {
        self.environment.remove(OsStr::new(name));
        self
    }

    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Call {
        self.input = input.into();
        self
    }

    pub fn config(self, config: &Value) -> Call {
        self.input(config.to_string())
    }

    pub fn run(&self) -> Outcome {
        let start = Instant::now();
        let mut child = self.command().stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = self.input.clone();
        // The plugin may stop reading early, which is no failure of the test.
        let writer = thread::spawn(move || drop(stdin.write_all(&input)));
        let output = child.wait_with_output().unwrap();
        let outcome = Outcome::of(output, start.elapsed());
        writer.join().unwrap();
        outcome
    }

    /// Runs with a file as standard input.
    pub fn run_from(&self, input: File) -> Outcome {
        let start = Instant::now();
        let output = self.command().stdin(input).output().unwrap();
        Outcome::of(output, start.elapsed())
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program[0]);
        command.args(&self.program[1..]).env_clear().envs(&self.environment);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }
}

impl Outcome {
    fn of(output: std::process::Output, elapsed: Duration) -> Outcome {
        let text = String::from_utf8(output.stdout).expect("standard output is UTF-8");
        let parse = |text: &str| serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
        let code = output.status.code().unwrap_or_else(|| panic!("{}: {text}", output.status));
        assert!(code == 0 || code == 1, "exit code {code}: {text}");
        Outcome { success: code == 0, output: (!text.is_empty()).then(|| parse(&text)), elapsed }
    }

    /// It succeeded with a result.
    #[track_caller]
    pub fn result(self) -> Value {
        assert!(self.success, "{:?}", self.output);
        self.output.expect("a result on standard output")
    }

    /// It succeeded and said nothing.
    #[track_caller]
    pub fn silent(self) {
        assert!(self.success && self.output.is_none(), "{:?}", self.output);
    }

    /// It failed with `code`; returns message and details.
    #[track_caller]
    pub fn error(self, code: u32) -> String {
        let error = self.output.expect("an error object on standard output");
        assert!(!self.success, "exit code 0 with {error}");
        assert_eq!(error["code"], code, "{error}");
        assert!(error["cniVersion"].is_string() && error["msg"].is_string(), "{error}");
        for key in error.as_object().unwrap().keys() {
            assert!(["cniVersion", "code", "msg", "details"].contains(&key.as_str()), "{error}");
        }
        assert!(error.to_string().len() < 1000, "{error}");
        format!("{} {}", error["msg"].as_str().unwrap(), error["details"].as_str().unwrap_or_default())
    }
}

/// Runs until one answer came quickly: on a busy machine a single one may be late through no fault of the plugin.
#[track_caller]
pub fn quickly(run: impl Fn() -> Outcome) -> Outcome {
    let mut elapsed = Vec::new();
    for _ in 0..20 {
        let outcome = run();
        if outcome.elapsed < QUICK {
            return outcome;
        }
        elapsed.push(outcome.elapsed);
    }
    panic!("no answer came within {QUICK:?}: {elapsed:?}");
}

/// A configuration of network `pods` with `keys` besides; a key that is `null` is taken out.
pub fn config(version: &str, keys: Value) -> Value {
    let mut config = json!({ "cniVersion": version, "name": "pods", "type": "weft-cni" });
    let object = config.as_object_mut().unwrap();
    object.extend(keys.as_object().unwrap().clone());
    object.retain(|_, value| !value.is_null());
    config
}
