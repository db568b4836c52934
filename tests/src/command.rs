//! Running programs, with a deadline.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long a program has unless told otherwise.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What a program said, and how it ended.
#[derive(Debug)]
pub struct Said {
    /// Whether its exit code was 0.
    pub success: bool,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
    /// How long it ran.
    pub elapsed: Duration,
    shown: String,
}

impl Said {
    /// Its standard output; fails unless the program succeeded.
    #[track_caller]
    pub fn must(self) -> String {
        assert!(self.success, "`{}` failed:\n{}\n{}", self.shown, self.out.trim(), self.err.trim());
        self.out
    }
}

/// Runs a program to its end.
#[track_caller]
pub fn run(command: Command) -> Said {
    run_with(command, &[], PATIENCE)
}

/// Runs a program that reads `input`, to its end or to the deadline.
#[track_caller]
pub fn run_with(mut command: Command, input: &[u8], patience: Duration) -> Said {
    let shown = shown(&command);
    let started = Instant::now();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot start `{shown}`: {error}"));
    let mut stdin = child.stdin.take().expect("it is piped");
    let (out, err) = (drain(child.stdout.take()), drain(child.stderr.take()));
    let input = input.to_vec();
    // The program may end, or close its input, before it has read all: its exit code tells.
    let writer = thread::spawn(move || drop(stdin.write_all(&input)));
    let success = wait(&mut child, started + patience).unwrap_or_else(|| {
        let _ = child.kill();
        let _ = child.wait();
        panic!("`{shown}` did not end within {patience:?}");
    });
    let _ = writer.join();
    let text = |reader: JoinHandle<Vec<u8>>| String::from_utf8_lossy(&reader.join().unwrap_or_default()).into_owned();
    Said { success, out: text(out), err: text(err), elapsed: started.elapsed(), shown }
}

/// A program in the background; it is killed when this goes.
pub struct Background(Child);

impl Background {
    /// Starts it, with its output thrown away.
    #[track_caller]
    pub fn start(mut command: Command) -> Background {
        let shown = shown(&command);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Background(command.spawn().unwrap_or_else(|error| panic!("cannot start `{shown}`: {error}")))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.0.try_wait().is_ok_and(|status| status.is_some())
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `sh -c` with a script.
pub fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-ec", script]);
    command
}

/// Asks again and again until it is so. Fails with `what` after `patience`.
#[track_caller]
pub fn eventually(what: &str, patience: Duration, mut is_so: impl FnMut() -> bool) -> Duration {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < patience, "not within {patience:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
    started.elapsed()
}

fn wait(child: &mut Child, deadline: Instant) -> Option<bool> {
    loop {
        match child.try_wait().expect("a child can be waited for") {
            Some(status) => return Some(status.success()),
            None if Instant::now() >= deadline => return None,
            None => thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn drain(stream: Option<impl Read + Send + 'static>) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut all = Vec::new();
        if let Some(mut stream) = stream {
            let _ = stream.read_to_end(&mut all);
        }
        all
    })
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}
