//! Network namespaces: making them, running programs and code inside, removing them whatever happens.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::command::{Said, run};
use weft_router::port::sys::namespace::new_network;

/// A namespace by name; it may belong to somebody else, e.g. to a lab.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Netns(pub String);

impl Netns {
    /// Its file.
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.0)
    }

    /// Whether it is there.
    pub fn exists(&self) -> bool {
        self.path().exists()
    }

    /// A program to be run inside.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0, program]);
        command
    }

    /// Runs a command line inside; words are separated by white space.
    #[track_caller]
    pub fn exec(&self, line: &str) -> Said {
        let mut words = line.split_whitespace();
        let mut command = self.command(words.next().expect("a program"));
        command.args(words);
        run(command)
    }

    /// Writes one of its settings, a path below `/proc/sys`.
    #[track_caller]
    pub fn set(&self, setting: &str, value: &str) {
        let written = self.inside(|| std::fs::write(Path::new("/proc/sys").join(setting), value));
        written.unwrap_or_else(|error| panic!("{setting} of {}: {error}", self.0));
    }

    /// Runs `ip` on it; fails if that fails.
    #[track_caller]
    pub fn ip(&self, line: &str) -> String {
        let mut command = Command::new("ip");
        command.args(["-n", &self.0]).args(line.split_whitespace());
        run(command).must()
    }

    /// Runs many lines of `ip` on it, by one process; lines that fail are passed over.
    #[track_caller]
    pub fn ip_batch(&self, lines: &str) {
        let mut command = Command::new("ip");
        command.args(["-n", &self.0, "-force", "-batch", "-"]);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut ip = command.spawn().expect("ip is installed");
        ip.stdin.take().expect("it is piped").write_all(lines.as_bytes()).expect("it reads");
        ip.wait().expect("it ends");
    }

    /// Runs code inside, on a thread of its own: sockets that it makes belong to the namespace, wherever they are used.
    pub fn inside<T: Send>(&self, code: impl FnOnce() -> T + Send) -> T {
        let file = File::open(self.path()).unwrap_or_else(|error| panic!("cannot open namespace {}: {error}", self.0));
        thread::scope(|scope| {
            let inside = scope.spawn(move || {
                move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                    .expect("root may enter a namespace");
                code()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Device and inode: which namespace it is, whatever its name.
    pub fn identity(&self) -> Option<(u64, u64)> {
        let stat = rustix::fs::stat(self.path()).ok()?;
        Some((stat.st_dev, stat.st_ino))
    }
}

/// A namespace of this test; it goes when this goes.
#[derive(Debug)]
pub struct OwnNetns(Netns);

impl OwnNetns {
    /// Makes one, its loopback up. The name gets the prefix `weft-` and must be unique.
    #[track_caller]
    pub fn new(name: &str) -> OwnNetns {
        let netns = Netns(format!("weft-{name}"));
        let mut command = Command::new("ip");
        command.args(["netns", "add", &netns.0]);
        run(command).must();
        let own = OwnNetns(netns);
        own.ip("link set lo up");
        own
    }
}

impl std::ops::Deref for OwnNetns {
    type Target = Netns;

    fn deref(&self) -> &Netns {
        &self.0
    }
}

impl Drop for OwnNetns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0.0]).output();
    }
}

/// A namespace without a name, as some runtimes have them; it goes when this goes.
#[derive(Debug)]
pub struct Nameless(OwnedFd);

impl Nameless {
    /// Makes one.
    #[track_caller]
    pub fn new() -> Nameless {
        Nameless(new_network().expect("root may make a namespace"))
    }

    /// A path to it for other processes, while this one lives.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()))
    }

    /// Runs a command line inside; words are separated by white space.
    #[track_caller]
    pub fn exec(&self, line: &str) -> Said {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).args(line.split_whitespace());
        run(command)
    }
}

impl Default for Nameless {
    fn default() -> Nameless {
        Nameless::new()
    }
}
