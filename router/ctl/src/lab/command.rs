//! Running other programs: with a deadline, and with errors that can be acted upon.
//!
//! Each child is the leader of a process group of its own, so that a Ctrl-C on the terminal reaches this program only
//! and clean-up can still run `ip`. What builds a lab carries a mark of that lab in its environment, so that it is found
//! and ended even if this program is killed before it has ended ([`process::MARK`]). Waiting ends at the deadline or, unless the command is part of clean-up,
//! when the user interrupts; the child is killed then.

use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::process;
use crate::interrupt;
use crate::output::plain;

/// How long a command has, unless told otherwise.
const PATIENCE: Duration = Duration::from_secs(20);
/// What an error quotes of a program's output, in characters.
const QUOTED: usize = 2000;

/// A program to be run.
pub struct Run {
    program: OsString,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    clear_env: bool,
    lab: Option<String>,
    input: Vec<u8>,
    patience: Duration,
    uninterrupted: bool,
}

/// What a program that has ended left behind.
pub struct Ended {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl Run {
    /// The program, without arguments.
    pub fn new(program: impl AsRef<OsStr>) -> Run {
        Run {
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            env: Vec::new(),
            clear_env: false,
            lab: None,
            input: Vec::new(),
            patience: PATIENCE,
            uninterrupted: false,
        }
    }

    /// `ip` with these arguments, separated by white space.
    pub fn ip(args: &str) -> Run {
        Run::new("ip").args(args.split_whitespace())
    }

    /// A program inside a network namespace. `ip` replaces itself with it, so the process is the program's.
    pub fn inside(netns: &str, program: impl AsRef<OsStr>) -> Run {
        Run::ip(&format!("netns exec {netns}")).arg(program)
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Run {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Run {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Gives the program this environment and nothing else.
    pub fn only_env<V: AsRef<OsStr>>(mut self, env: impl IntoIterator<Item = (&'static str, V)>) -> Run {
        self.env = env.into_iter().map(|(name, value)| (name.into(), value.as_ref().to_owned())).collect();
        self.clear_env = true;
        self
    }

    /// Adds a variable to the program's environment.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Run {
        self.env.push((name.into(), value.as_ref().to_owned()));
        self
    }

    /// Marks the program as part of building a lab, and whatever it starts.
    pub fn building(mut self, lab: &str) -> Run {
        self.lab = Some(lab.to_owned());
        self
    }

    /// What the program reads from its standard input.
    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Run {
        self.input = input.into();
        self
    }

    /// How long the program may take.
    pub fn within(mut self, patience: Duration) -> Run {
        self.patience = patience;
        self
    }

    /// Part of a clean-up: goes on when the user interrupts.
    pub fn uninterrupted(mut self) -> Run {
        self.uninterrupted = true;
        self
    }

    /// Runs it; an exit code other than 0 is an error that quotes the program.
    pub fn succeed(self) -> Result<Vec<u8>> {
        let shown = self.shown();
        let ended = self.wait()?;
        if !ended.status.success() {
            let said = if ended.stderr.is_empty() { &ended.stdout } else { &ended.stderr };
            bail!("`{shown}` failed ({}): {}", ended.status, quote(said));
        }
        Ok(ended.stdout)
    }

    /// Runs it to its end, however it ends.
    pub fn wait(self) -> Result<Ended> {
        let shown = self.shown();
        let deadline = Instant::now() + self.patience;
        let mut child = self.spawn(Stdio::piped())?;
        let stdout = drain(child.stdout.take());
        let stderr = drain(child.stderr.take());
        let status = self.reap(&mut child, deadline);
        if status.is_err() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let status = status.with_context(|| format!("while waiting for `{shown}`"))?;
        Ok(Ended { status, stdout: collect(stdout), stderr: collect(stderr) })
    }

    /// Starts it and hands it over, with its standard output piped and its standard error as given.
    pub fn spawn(&self, stderr: Stdio) -> Result<Child> {
        let mut command = self.command()?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(stderr);
        let mut child = command.spawn().map_err(|error| self.unstartable(&error))?;
        let stdin = child.stdin.take();
        let input = self.input.clone();
        // A program that does not read its input must not block us; one that has ended makes the write fail, and says
        // why by its exit code. Small inputs fit the pipe, so no thread is spent on them.
        let feed = move || stdin.map(|mut stdin| stdin.write_all(&input));
        if self.input.len() <= 4096 {
            feed();
        } else {
            thread::spawn(feed);
        }
        Ok(child)
    }

    /// Starts a program that outlives this one and writes to `log` only.
    pub fn spawn_detached(&self, log: Stdio) -> Result<Child> {
        let mut command = self.command()?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        command.spawn().map_err(|error| self.unstartable(&error))
    }

    fn command(&self) -> Result<Command> {
        let mut command = Command::new(&self.program);
        if self.clear_env {
            command.env_clear();
        }
        command.args(&self.args).envs(self.env.iter().map(|(name, value)| (name, value))).process_group(0);
        if let Some(lab) = &self.lab {
            command.env(process::MARK, process::mark(lab, &process::own()?));
        }
        Ok(command)
    }

    fn unstartable(&self, error: &std::io::Error) -> anyhow::Error {
        if self.program == "ip" && error.kind() == std::io::ErrorKind::NotFound {
            return anyhow!("the program `ip` is missing; install it with `apt-get install iproute2`");
        }
        anyhow!("cannot start `{}`: {error}", self.shown())
    }

    fn reap(&self, child: &mut Child, deadline: Instant) -> Result<ExitStatus> {
        let mut pause = Duration::from_micros(200);
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            if !self.uninterrupted {
                interrupt::check()?;
            }
            if Instant::now() >= deadline {
                bail!("it did not end within {:?} and was killed", self.patience);
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        }
    }

    fn shown(&self) -> String {
        let words = std::iter::once(&self.program).chain(&self.args).map(|word| word.to_string_lossy());
        plain(&words.collect::<Vec<_>>().join(" "))
    }
}

/// A program's output for an error: trimmed, cut, without control characters.
pub fn quote(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let lines: Vec<String> = text.trim().lines().map(plain).collect();
    let text = lines.join(" | ");
    if text.is_empty() {
        return "it said nothing".to_owned();
    }
    text.chars().take(QUOTED).collect()
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

fn collect(reader: JoinHandle<Vec<u8>>) -> Vec<u8> {
    reader.join().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_quotes_the_command_and_what_it_said() {
        let error = Run::new("sh").args(["-c", "echo some\x1b trouble >&2; exit 3"]).succeed().unwrap_err().to_string();
        assert!(error.contains("`sh -c") && error.contains("exit status: 3"), "{error}");
        assert!(error.contains("some\u{fffd} trouble") && !error.contains('\x1b'), "{error}");
    }

    #[test]
    fn input_environment_and_output_pass() {
        let run = Run::new("/bin/sh").args(["-c", "cat; echo $WEFT_X$HOME"]).input("in:").only_env([("WEFT_X", "y")]);
        assert_eq!(run.succeed().unwrap(), b"in:y\n");
    }

    #[test]
    fn large_input_and_output_do_not_block_each_other() {
        let input = vec![b'x'; 1 << 20];
        assert_eq!(Run::new("cat").input(input.clone()).succeed().unwrap(), input);
    }

    #[test]
    fn a_program_that_does_not_end_is_killed_at_the_deadline() {
        let started = Instant::now();
        let run = Run::new("sleep").arg("60").within(Duration::from_millis(50));
        let error = format!("{:#}", run.succeed().unwrap_err());
        assert!(error.contains("did not end within"), "{error}");
        assert!(started.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = Run::new("/nonexistent/weft-x").succeed().unwrap_err().to_string();
        assert!(error.contains("cannot start `/nonexistent/weft-x`"), "{error}");
        let error = Run::ip("link").unstartable(&std::io::ErrorKind::NotFound.into()).to_string();
        assert!(error.contains("apt-get install iproute2"), "{error}");
    }
}
