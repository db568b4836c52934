//! Programs of ours that run inside a pod's namespace: `weft lab-peer …`.
//!
//! A namespace is a property of a thread, so what must happen inside one happens in a process of its own, which `ip
//! netns exec` puts there. Such a peer says what it has to say as lines of JSON on stdout, and ends by itself at a
//! deadline it is given, so that nothing is left running even if this program is killed.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::de::DeserializeOwned;

use super::command::{Run, quote};
use crate::interrupt;

/// How often a wait looks whether the user wants to stop.
const LOOK: Duration = Duration::from_millis(50);

/// A peer that runs. It is ended when this is dropped.
pub struct Peer {
    child: Child,
    lines: Receiver<String>,
    complaints: Receiver<Vec<u8>>,
    netns: String,
}

impl Peer {
    /// Starts `weft lab-peer` with these arguments and this input in a namespace.
    pub fn start(netns: &str, args: &[String], input: &[u8]) -> Result<Peer> {
        Peer::start_as("lab-peer", netns, args, input)
    }

    /// Starts another of the hidden subcommands.
    pub fn start_as(subcommand: &str, netns: &str, args: &[String], input: &[u8]) -> Result<Peer> {
        let run = Run::inside(netns, own_path()?).arg(subcommand).args(args).input(input);
        let mut child = run.spawn(Stdio::piped())?;
        let (lines_in, lines) = channel();
        let (complaints_in, complaints) = channel();
        let stdout = child.stdout.take();
        let stderr = child.stderr.take();
        thread::spawn(move || {
            let lines = stdout.into_iter().flat_map(|stdout| BufReader::new(stdout).lines()).map_while(Result::ok);
            lines.for_each(|line| drop(lines_in.send(line)));
        });
        thread::spawn(move || {
            let mut all = Vec::new();
            let _ = stderr.map(|mut stderr| stderr.read_to_end(&mut all));
            let _ = complaints_in.send(all);
        });
        Ok(Peer { child, lines, complaints, netns: netns.to_owned() })
    }

    /// The next thing it says.
    pub fn hear<T: DeserializeOwned>(&mut self, deadline: Instant) -> Result<T> {
        let line = self.line(deadline)?;
        serde_json::from_str(&line)
            .with_context(|| format!("what ran in {} said {:?}", self.netns, quote(line.as_bytes())))
    }

    fn line(&mut self, deadline: Instant) -> Result<String> {
        loop {
            interrupt::check()?;
            match self.lines.recv_timeout(LOOK) {
                Ok(line) => return Ok(line),
                Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
                Err(RecvTimeoutError::Timeout) => bail!("what ran in {} did not end in time", self.netns),
                Err(RecvTimeoutError::Disconnected) => return Err(self.complaint()),
            }
        }
    }

    fn complaint(&self) -> anyhow::Error {
        let said = self.complaints.recv_timeout(Duration::from_secs(1)).unwrap_or_default();
        anyhow!("what ran in {} failed: {}", self.netns, quote(&said))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The file of this program, which stays valid while it runs even if it is replaced meanwhile.
pub fn own_path() -> Result<PathBuf> {
    std::env::current_exe().context("cannot find the file of this program")
}
