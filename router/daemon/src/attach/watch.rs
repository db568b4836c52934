//! Namespaces that live as long as our descriptors, and noticing when nobody else wants them.
//!
//! A TAP that is made in the pod's namespace takes a fiftieth of the time of one that is moved there, but its descriptor keeps the namespace
//! alive: after `ip netns delete` both would stay for ever. So it is made there only where the end of the namespace can be noticed in another
//! way, and then it is closed:
//!
//! - Runtimes give a namespace a name by mounting it. If the path of the request leads to such a mount, here as well as where the runtime
//!   is, its umount is seen here too: the kernel wakes whoever polls `/proc/self/mountinfo`. A path through `/proc/PID` is no such
//!   mount, nor is a descriptor; those TAPs are moved.
//! - A namespace without a mount lives on while a process is in it. If there is one, it is followed by its pidfd, and looked for again when it
//!   ends. For this weftd must see all processes; in a container with processes of its own, TAPs are moved.
//!
//! What else may keep a namespace alive, a descriptor that somebody holds or a mount that only others see, is nobody's pod any more.
//! A mount may be away for a moment, or come back at another path: the second look decides, a little later. How often is looked is bounded by
//! what a look costs, so that a node on which mounts come and go all the time does not pay for it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxAttributes, StatxFlags, fstat, openat2, statx};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use weft_api::AttachmentKey;
use weft_router::PortId;

use super::namespace::Namespace;
use crate::node::Node;

/// How long a mount may be away.
const MOMENT: Duration = Duration::from_millis(20);
/// A look is followed by a pause of so many times what it took.
const PAUSE: u32 = 50;
/// How often is looked again for a process that may have left a namespace without ending.
const SLOWLY: Duration = Duration::from_secs(10);
/// `PROC_PID_INIT_INO`: <https://elixir.bootlin.com/linux/v6.18/A/ident/PROC_PID_INIT_INO>.
const ALL_PROCESSES: &str = "pid:[4026531836]";

/// Where a namespace is mounted, and which it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    path: PathBuf,
    id: (u64, u64),
}

/// The namespaces.
#[derive(Debug)]
pub struct Watch {
    /// Whether all processes are seen here.
    sees_all: bool,
    kept: Mutex<BTreeMap<PortId, Kept>>,
    /// Wakes the thread.
    waker: Option<(UnixStream, Mutex<Option<UnixStream>>)>,
}

#[derive(Debug, Clone)]
struct Kept {
    key: AttachmentKey,
    place: Place,
    /// Since when its mount is away.
    away: Option<Instant>,
    /// A process that is in it, though it is not mounted.
    inside: Option<Arc<OwnedFd>>,
}

/// Who is in a namespace.
enum Inside {
    Nobody,
    Process(Arc<OwnedFd>),
    /// There may be somebody: not all could be looked at.
    Unknown,
}

impl Watch {
    /// None yet.
    pub fn new() -> Watch {
        let all = fs::read_link("/proc/self/ns/pid").is_ok_and(|id| id.as_os_str() == ALL_PROCESSES);
        let sees_all = all && !matches!(inside((0, 0)), Inside::Unknown);
        let waker = UnixStream::pair().and_then(|(ours, theirs)| {
            ours.set_nonblocking(true)?;
            theirs.set_nonblocking(true)?;
            Ok((ours, Mutex::new(Some(theirs))))
        });
        Watch { sees_all, kept: Mutex::default(), waker: waker.ok() }
    }

    /// Where the end of `namespace`, which the runtime calls `path`, would be noticed; `None` if it would not.
    pub fn place(&self, namespace: &Namespace, path: &str) -> Option<Place> {
        let stat = fstat(namespace.as_fd()).ok()?;
        let place = Place { path: path.into(), id: (stat.st_dev, stat.st_ino) };
        let works = self.sees_all && self.waker.is_some() && place.path.is_absolute();
        (works && place.is_mounted()).then_some(place)
    }

    /// Closes this port when its namespace is given up.
    pub fn keep(&self, key: &AttachmentKey, port: PortId, place: Place) {
        let is_mounted = {
            let mut all = self.lock();
            all.insert(port, Kept { key: key.clone(), place: place.clone(), away: None, inside: None });
            place.is_mounted()
        };
        if !is_mounted {
            self.wake();
        }
    }

    /// The port is gone.
    pub fn forget(&self, port: PortId) {
        self.lock().remove(&port);
    }

    fn wake(&self) {
        // One that is full has woken the thread already.
        let _ = self.waker.as_ref().map(|(waker, _)| (&mut &*waker).write(&[0]));
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PortId, Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at all. Returns what was given up, and when to look again although nothing has happened.
    fn look(&self, now: Instant) -> (Vec<(PortId, AttachmentKey)>, Option<Duration>) {
        let all = self.lock().clone();
        let (mut given_up, mut again) = (Vec::new(), None);
        let mut soon = |when: Duration| again = Some(again.map_or(when, |other: Duration| other.min(when)));
        let mut mounts = None;
        for (port, mut kept) in all {
            let was_away = kept.away.is_some();
            if kept.place.is_mounted() || kept.place.follow(mounts.get_or_insert_with(mounted_namespaces)) {
                (kept.away, kept.inside) = (None, None);
            } else if now.duration_since(*kept.away.get_or_insert(now)) < MOMENT {
                soon(MOMENT);
            } else {
                kept.inside = None;
                match inside(kept.place.id) {
                    Inside::Nobody => given_up.push((port, kept.key.clone())),
                    Inside::Process(process) => {
                        kept.inside = Some(process);
                        soon(SLOWLY);
                    }
                    Inside::Unknown => soon(SLOWLY),
                }
            }
            if was_away || kept.away.is_some() {
                // The port may have gone, and its number been given to another pod.
                let mut all = self.lock();
                if all.get(&port).is_some_and(|now| now.key == kept.key && now.place.id == kept.place.id) {
                    all.insert(port, kept);
                }
            }
        }
        (given_up, again)
    }
}

impl Default for Watch {
    fn default() -> Self {
        Watch::new()
    }
}

impl Place {
    /// Whether the namespace is what is mounted at the path.
    fn is_mounted(&self) -> bool {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let opened = openat2(rustix::fs::CWD, &self.path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS);
        opened.is_ok_and(|file| {
            let same = fstat(&file).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == self.id);
            let status = statx(&file, "", AtFlags::EMPTY_PATH, StatxFlags::empty());
            same && status.is_ok_and(|status| status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
        })
    }

    /// Finds it at another path.
    fn follow(&mut self, mounts: &[(u64, PathBuf)]) -> bool {
        let found = mounts
            .iter()
            .filter(|(inode, _)| *inode == self.id.1)
            .map(|(_, path)| Place { path: path.clone(), id: self.id });
        let found = found.into_iter().find(Place::is_mounted);
        found.map(|place| *self = place).is_some()
    }
}

/// Inodes and paths of the namespaces that are mounted here.
fn mounted_namespaces() -> Vec<(u64, PathBuf)> {
    let text = fs::read("/proc/self/mountinfo").unwrap_or_default();
    text.split(|byte| *byte == b'\n').filter_map(mounted_namespace).collect()
}

/// One of them, from a line: number, parent, device, root, path and so on; see proc_pid_mountinfo(5).
fn mounted_namespace(line: &[u8]) -> Option<(u64, PathBuf)> {
    let mut fields = line.split(|byte| *byte == b' ').skip(3);
    let (root, path) = (fields.next()?, fields.next()?);
    let inode = std::str::from_utf8(root).ok()?.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()?;
    Some((inode, PathBuf::from(std::ffi::OsStr::from_bytes(&unescaped(path)))))
}

/// White space and backslashes stand there as three octal digits.
fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, others)) = rest.split_first() {
        let digits = others.get(..3).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        let escaped = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &others[3..] } else { others };
    }
    bytes
}

/// Who is in the namespace of that device and inode.
fn inside(id: (u64, u64)) -> Inside {
    // A process that is born while the list is read is on it or is the child of one that is: two readings see either.
    match inside_now(id) {
        Inside::Nobody => inside_now(id),
        found => found,
    }
}

fn inside_now(id: (u64, u64)) -> Inside {
    let wanted = format!("net:[{}]", id.1);
    let own = std::process::id();
    let mut unknown = false;
    let Ok(processes) = fs::read_dir("/proc") else { return Inside::Unknown };
    let numbers = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    // Process 1 may be out of reach; in a pod's namespace it is not.
    for number in numbers.filter(|number| ![1, own].contains(number)) {
        match has_thread_in(number, &wanted) {
            Ok(false) => {}
            Ok(true) => {
                let pid = i32::try_from(number).ok().and_then(Pid::from_raw);
                match pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())) {
                    Some(Ok(process)) => return Inside::Process(Arc::new(process)),
                    _ => unknown = true,
                }
            }
            Err(_) => unknown = true,
        }
    }
    if unknown { Inside::Unknown } else { Inside::Nobody }
}

/// Whether one of the threads of a process is in that namespace. One that has ended is not.
fn has_thread_in(process: u32, namespace: &str) -> io::Result<bool> {
    let gone = |error: &io::Error| {
        let known = rustix::io::Errno::from_io_error(error);
        matches!(known, Some(rustix::io::Errno::NOENT | rustix::io::Errno::SRCH))
    };
    let threads = match fs::read_dir(format!("/proc/{process}/task")) {
        Err(error) if gone(&error) => return Ok(false),
        threads => threads?,
    };
    for thread in threads.flatten() {
        match fs::read_link(thread.path().join("ns/net")) {
            Ok(link) if link.as_os_str() == namespace => return Ok(true),
            Err(error) if !gone(&error) => return Err(error),
            Ok(_) | Err(_) => {}
        }
    }
    Ok(false)
}

/// Starts the thread that looks.
///
/// # Errors
/// No thread can be had.
pub fn start(node: &Arc<Node>) -> io::Result<()> {
    let waker = node.watch.waker.as_ref();
    let wakes = waker.and_then(|(_, wakes)| wakes.lock().unwrap_or_else(PoisonError::into_inner).take());
    let (Some(wakes), true) = (wakes, node.watch.sees_all) else { return Ok(()) };
    let node: Weak<Node> = Arc::downgrade(node);
    let mounts = fs::File::open(Path::new("/proc/self/mountinfo"))?;
    let follow = move || {
        let mut again = None;
        loop {
            let Some(watched) = node.upgrade().map(|node| node.watch.processes()) else { return };
            if let Err(error) = wait(&mounts, &wakes, &watched, again) {
                tracing::error!(%error, "given up namespaces are not noticed any more: restart weftd");
                return;
            }
            drop(watched);
            let Some(node) = node.upgrade() else { return };
            let started = Instant::now();
            let (given_up, soon) = node.watch.look(started);
            let pause = started.elapsed() * PAUSE;
            given_up.into_iter().for_each(|(port, key)| node.given_up(&key, port));
            drop(node);
            again = soon;
            thread::sleep(pause.min(soon.unwrap_or(SLOWLY)).min(SLOWLY));
        }
    };
    thread::Builder::new().name("weft-mounts".into()).stack_size(256 << 10).spawn(follow).map(drop)
}

impl Watch {
    fn processes(&self) -> Vec<Arc<OwnedFd>> {
        self.lock().values().filter_map(|kept| kept.inside.clone()).collect()
    }
}

/// Waits until a mount has changed, a process has ended, somebody wakes us, or for `longest`.
fn wait(
    mounts: &fs::File,
    wakes: &UnixStream,
    processes: &[Arc<OwnedFd>],
    longest: Option<Duration>,
) -> rustix::io::Result<()> {
    let mut polled = vec![PollFd::new(mounts, PollFlags::PRI | PollFlags::ERR), PollFd::new(wakes, PollFlags::IN)];
    polled.extend(processes.iter().map(|process| PollFd::new(process, PollFlags::IN)));
    let longest = longest.map(|longest| Timespec {
        tv_sec: i64::try_from(longest.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: longest.subsec_nanos().into(),
    });
    match poll(&mut polled, longest.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error),
    }
    while rustix::io::read(wakes, &mut [0; 64]).is_ok_and(|count| count > 0) {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_read_with_all_that_its_path_may_have() {
        let line = b"612 24 0:4 net:[4026532771] /run/netns/a\\040b\\134c rw shared:3 - nsfs nsfs rw";
        assert_eq!(mounted_namespace(line), Some((4_026_532_771, "/run/netns/a b\\c".into())));
        for other in [&b"25 1 0:4 / /proc rw - proc proc rw"[..], b"1 2 0:4 mnt:[7] /x rw - nsfs nsfs rw", b"", b"1 2"]
        {
            assert_eq!(mounted_namespace(other), None);
        }
    }

    #[test]
    fn a_path_by_descriptor_or_process_is_no_mount() {
        let own = fs::File::open("/proc/self/ns/net").unwrap();
        let stat = fstat(&own).unwrap();
        for path in ["/proc/self/ns/net", "/proc/thread-self/ns/net", "/etc/passwd", "/nonexistent"] {
            let place = Place { path: path.into(), id: (stat.st_dev, stat.st_ino) };
            assert!(!place.is_mounted(), "{path}");
        }
    }

    #[test]
    fn a_process_is_found_where_it_is_and_this_one_does_not_count() {
        let own = fs::File::open("/proc/self/ns/net").unwrap();
        let stat = fstat(&own).unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let found = has_thread_in(child.id(), &format!("net:[{}]", stat.st_ino)).unwrap();
        let elsewhere = has_thread_in(child.id(), "net:[1]").unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found && !elsewhere);
        assert!(!has_thread_in(child.id(), &format!("net:[{}]", stat.st_ino)).unwrap());
        assert!(!matches!(inside((0, 1)), Inside::Process(_)));
    }
}
