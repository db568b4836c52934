//! Ending processes, and never the wrong one.
//!
//! A process is known by its id *and* the time it started, so that an id which the kernel has given to another
//! process since is not mistaken for it. Signals go through a pidfd that is opened first and checked
//! afterwards: what was checked is what is signalled.
//!
//! A process that nobody could record, because whoever started it was killed, is known by its environment: [`MARK`]
//! holds the lab's name and the identity of the process that was building it, so nobody has it by chance.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, pidfd_send_signal, waitpid};
use serde::{Deserialize, Serialize};

/// How long a process has to end after it was asked to, and again after it was killed.
const GRACE: Duration = Duration::from_secs(3);

/// A process that was started here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// When it started, in clock ticks since boot (field 22 of proc_pid_stat(5)).
    pub start_time: u64,
    /// What it is, for people.
    pub what: String,
}

/// The variable that marks what was started to build a lab.
pub const MARK: &str = "WEFT_LAB";

/// Its value for what `creator` starts to build a lab.
pub fn mark(lab: &str, creator: &Process) -> String {
    format!("{lab}:{}:{}", creator.pid, creator.start_time)
}

/// This process.
pub fn own() -> Result<Process> {
    Process::identify(std::process::id(), "weft lab")
}

/// A network namespace, whatever its name: device and inode of its file in nsfs.
pub type NetnsId = (u64, u64);

impl Process {
    /// Takes down the identity of a running process.
    pub fn identify(pid: u32, what: &str) -> Result<Process> {
        let start_time = start_time(pid).with_context(|| format!("{what} (pid {pid}) has ended already"))?;
        Ok(Process { pid, start_time, what: what.to_owned() })
    }

    /// Whether it still runs. A zombie does not.
    pub fn is_alive(&self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }

    /// Sends it a signal, and nobody else.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        match open(self.pid).filter(|_| self.is_alive()) {
            Some(fd) => send(self.pid, &fd, signal),
            None => bail!("{} (pid {}) has ended", self.what, self.pid),
        }
    }
}

/// Ends processes of ours: asks, waits, kills, waits.
pub fn end_recorded(processes: &[Process]) -> Result<()> {
    let open = |process: &Process| {
        let fd = open(process.pid)?;
        process.is_alive().then_some((process.pid, fd))
    };
    end(|| processes.iter().filter_map(open).collect())
}

/// Ends every process that `creator` has started to build a lab.
pub fn end_marked(lab: &str, creator: &Process) -> Result<()> {
    let variable = format!("{MARK}={}", mark(lab, creator)).into_bytes();
    let is_marked = |pid: u32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|entry| entry == variable)
    };
    end(|| all_pids().filter_map(|pid| open_if(pid, || is_marked(pid))).collect())
}

/// Ends every process that lives in one of these namespaces.
pub fn end_inside(namespaces: &BTreeSet<NetnsId>) -> Result<()> {
    // A namespace file can be another name for the machine's own namespace; all of its processes are not ours.
    let own = [netns_id(Path::new("/proc/self/ns/net")), netns_id(Path::new("/proc/1/ns/net"))];
    let namespaces: BTreeSet<NetnsId> = namespaces.iter().filter(|id| !own.contains(&Some(**id))).copied().collect();
    if namespaces.is_empty() {
        return Ok(());
    }
    end(|| all_pids().filter_map(|pid| open_if(pid, || is_inside(pid, &namespaces))).collect())
}

/// The namespace that a file stands for.
pub fn netns_id(path: &Path) -> Option<NetnsId> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Identifies this boot: process ids and start times mean nothing in another.
pub fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    Ok(fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?.trim().to_owned())
}

fn end(find: impl Fn() -> Vec<(u32, OwnedFd)>) -> Result<()> {
    for signal in [Signal::TERM, Signal::KILL] {
        let deadline = Instant::now() + GRACE;
        let mut pause = Duration::from_millis(1);
        let mut signalled = BTreeSet::new();
        loop {
            let found = find();
            if found.is_empty() {
                return Ok(());
            }
            for (pid, fd) in &found {
                // Each is asked once; one that appears meanwhile (a fork) is asked as well.
                if signalled.insert(*pid) {
                    send(*pid, fd, signal)?;
                }
            }
            if Instant::now() >= deadline {
                break;
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }
    let left: Vec<String> = find().iter().map(|(pid, _)| pid.to_string()).collect();
    if left.is_empty() {
        return Ok(());
    }
    bail!("processes {} do not end, even killed; see `ps -o pid,stat,wchan,cmd -p {}`", left.join(" "), left.join(","))
}

fn send(pid: u32, fd: &OwnedFd, signal: Signal) -> Result<()> {
    match pidfd_send_signal(fd, signal) {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(errno) => Err(errno).with_context(|| format!("cannot signal process {pid}")),
    }
}

fn open(pid: u32) -> Option<OwnedFd> {
    pidfd_open(to_pid(pid)?, PidfdFlags::empty()).ok()
}

fn is_inside(pid: u32, namespaces: &BTreeSet<NetnsId>) -> bool {
    netns_id(Path::new(&format!("/proc/{pid}/ns/net"))).is_some_and(|id| namespaces.contains(&id))
}

/// The process if it is one of those that are meant, and not this one.
fn open_if(pid: u32, is_meant: impl Fn() -> bool) -> Option<(u32, OwnedFd)> {
    if pid == std::process::id() || !is_meant() {
        return None;
    }
    let fd = open(pid)?;
    (is_meant() && start_time(pid).is_some()).then_some((pid, fd))
}

fn all_pids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// When a process started; `None` if it has ended, even if its parent has not heard of that yet.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (state, start_time) = parse_stat(&stat)?;
    if matches!(state, 'Z' | 'X') {
        reap(pid);
        return None;
    }
    Some(start_time)
}

/// If the zombie is a child of ours, nobody else will.
fn reap(pid: u32) {
    if let Some(pid) = to_pid(pid) {
        let _ = waitpid(Some(pid), WaitOptions::NOHANG);
    }
}

fn to_pid(pid: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(pid).ok()?)
}

/// State and start time out of `/proc/PID/stat`. The second field is the program's name in brackets, and may hold
/// brackets and spaces itself.
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let rest = &stat[stat.rfind(')')? + 1..];
    let mut fields = rest.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_program_name_full_of_brackets_does_not_confuse() {
        let line = "4242 (a) R (b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 987654 20 21\n";
        assert_eq!(parse_stat(line), Some(('S', 987_654)));
        for bad in ["", "1 (x", "1 (x) ", "1 (x) S 1 2", "no brackets"] {
            assert_eq!(parse_stat(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_recorded_process_is_ended_and_reaped() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::identify(child.id(), "sleep").unwrap();
        assert!(process.is_alive());
        end_recorded(std::slice::from_ref(&process)).unwrap();
        assert!(!process.is_alive());
        assert!(Process::identify(child.id(), "sleep").is_err());
        end_recorded(&[process]).unwrap();
        child.wait().expect_err("it was reaped already");
    }

    #[test]
    fn a_process_that_ignores_the_request_is_killed() {
        let script = "trap '' TERM; echo; while :; do sleep 0.05; done";
        let mut child = Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap();
        let mut byte = [0];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut byte).unwrap();
        let process = Process::identify(child.id(), "sh").unwrap();
        end_recorded(std::slice::from_ref(&process)).unwrap();
        assert!(!process.is_alive());
        let _ = child.wait();
    }

    #[test]
    fn a_recycled_id_is_not_the_process() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let mut other = Process::identify(child.id(), "sleep").unwrap();
        other.start_time -= 1;
        assert!(!other.is_alive());
        end_recorded(&[other]).unwrap();
        assert!(child.try_wait().unwrap().is_none(), "the other process must live");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn the_machines_own_namespace_is_never_cleared() {
        let own = netns_id(Path::new("/proc/self/ns/net")).unwrap();
        end_inside(&BTreeSet::from([own])).unwrap();
        assert!(open_if(std::process::id(), || true).is_none());
    }

    #[test]
    fn only_what_was_started_for_that_very_lab_is_ended() {
        let lab = format!("t{}", std::process::id());
        let creator = own().unwrap();
        let earlier = Process { start_time: creator.start_time - 1, ..creator.clone() };
        let marks = [mark(&lab, &creator), mark(&format!("{lab}x"), &creator), mark(&lab, &earlier), lab.clone()];
        let start = |mark: &String| Command::new("sleep").arg("60").env(MARK, mark).spawn().unwrap();
        let mut children: Vec<_> = marks.iter().map(start).collect();
        let running = |children: &mut [std::process::Child]| -> Vec<bool> {
            children.iter_mut().map(|child| Process::identify(child.id(), "sleep").is_ok()).collect()
        };
        assert_eq!(running(&mut children), [true; 4]);
        end_marked(&lab, &creator).unwrap();
        assert_eq!(running(&mut children), [false, true, true, true]);
        for child in &mut children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
