//! A pod's network namespace: is it one, and working inside it.
//!
//! The descriptor came from outside, so it is looked at before anything is done with it: it must be a network
//! namespace, and neither weftd's own nor that of process 1. Work inside is done on a thread of its own that enters the namespace
//! and ends afterwards: a thread that has been elsewhere never goes back to a pool. What has to be done in several namespaces is done on one
//! such thread, which comes home in between ([`travel`]).

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::thread;

use rustix::fs::{fstat, fstatfs};
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use weft_api::{Failure, code};
use weft_ipam::Netns;
use weft_router::port::sys::namespace::cookie;

use super::census;
use crate::shortage::{ADVICE, is_shortage};

/// `NSFS_MAGIC`, <https://github.com/torvalds/linux/blob/v6.12/include/uapi/linux/magic.h#L94>.
const NSFS_MAGIC: u64 = 0x6e73_6673;

/// A pod's network namespace, checked.
#[derive(Debug)]
pub struct Namespace {
    fd: OwnedFd,
    /// What tells it from others; `None` if this kernel does not say.
    netns: Option<Netns>,
}

impl Namespace {
    /// Checks what came with a request. `path` is what the runtime called it, for messages.
    pub fn check(fd: Option<OwnedFd>, path: &str) -> Result<Namespace, Failure> {
        let refuse = |what: String| failure(path, what);
        let fd = fd.ok_or_else(|| refuse("no descriptor came with the request".into()))?;
        let unseen = |what: &str, error: io::Error| {
            let passes = is_shortage(&error);
            let failure = refuse(format!("{what}: {error}"));
            if passes { Failure { code: code::TRY_AGAIN, details: ADVICE.into(), ..failure } } else { failure }
        };
        let kernel = |error: Errno| unseen("it cannot be looked at", error.into());
        if u64::try_from(fstatfs(&fd).map_err(kernel)?.f_type).ok() != Some(NSFS_MAGIC) {
            return Err(refuse("it is not a namespace".into()));
        }
        let identity = identity(&fd).map_err(kernel)?;
        let own = of_process("thread-self").map_err(|error| unseen("it cannot be told from weftd's", error))?;
        // Without permission to look at process 1 its namespace cannot be ours to configure either.
        let first = match of_process("1") {
            Err(error) if is_shortage(&error) => return Err(unseen("it cannot be told from process 1's", error)),
            first => first.ok(),
        };
        for (whose, other) in [("weftd's own", Some(own)), ("that of process 1", first)] {
            if other.as_ref() == Some(&identity) {
                return Err(refuse(format!("it is {whose}; a pod needs one of its own")));
            }
        }
        // Only entering tells the kinds of namespaces apart without an ioctl; the thread that does it is thrown away.
        match enter(fd.as_fd(), || Ok(cookie().ok())) {
            Ok(cookie) => {
                let inode = census::inode(fd.as_fd()).map_err(kernel)?;
                Ok(Namespace { fd, netns: cookie.map(|cookie| Netns { cookie, inode, number: None }) })
            }
            Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => {
                Err(refuse("it is a namespace, but not a network namespace".into()))
            }
            Err(error) => Err(unseen("it cannot be entered", error)),
        }
    }

    /// What tells it from others, also later; `None` if this kernel does not say.
    pub fn netns(&self) -> Option<Netns> {
        self.netns
    }

    /// Runs `work` on a thread inside the namespace and waits for it.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        enter(self.fd.as_fd(), work)
    }
}

thread_local! {
    /// Where a thread that travels comes from; nothing on others.
    static HOME: RefCell<Option<Rc<OwnedFd>>> = const { RefCell::new(None) };
}

/// Runs `work` on a thread that enters namespaces by itself, and `meanwhile` on this one.
///
/// # Errors
/// No thread can be had.
pub fn travel<T: Send>(work: impl FnOnce() -> T + Send, meanwhile: impl FnOnce()) -> io::Result<T> {
    let on_the_way = || {
        let home = File::open("/proc/thread-self/ns/net").ok().map(|file| Rc::new(OwnedFd::from(file)));
        HOME.set(home);
        work()
    };
    thread::scope(|scope| {
        let thread = thread_of_pod().spawn_scoped(scope, on_the_way)?;
        meanwhile();
        thread.join().map_err(|_| io::Error::other("the thread that works in namespaces panicked"))
    })
}

/// Runs `work` inside a network namespace and waits for it: on this thread if it travels, and otherwise on another.
pub fn enter<T: Send>(namespace: BorrowedFd<'_>, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    if let Some(home) = HOME.with_borrow(Option::clone) {
        let away = Away(home);
        move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))?;
        let done = work();
        drop(away);
        // Whoever could not come home does nothing more that has to be done there.
        let is_home = HOME.with_borrow(Option::is_some);
        return if is_home { done } else { Err(io::Error::other("there is no way back from the namespace")) };
    }
    let inside = || {
        move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))?;
        work()
    };
    thread::scope(|scope| {
        let thread = thread_of_pod().spawn_scoped(scope, inside)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
    })
}

fn thread_of_pod() -> thread::Builder {
    thread::Builder::new().name("weft-pod".into()).stack_size(512 * 1024)
}

/// A thread that is somewhere else; it comes home when this goes.
struct Away(Rc<OwnedFd>);

impl Drop for Away {
    fn drop(&mut self) {
        if move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network)).is_err() {
            HOME.set(None);
        }
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn failure(path: &str, what: String) -> Failure {
    Failure {
        code: code::NETNS,
        msg: format!("network namespace {path:?}: {what}"),
        details: "CNI_NETNS must name the network namespace of the pod's sandbox".into(),
    }
}

/// What tells a process's network namespace from others now.
fn of_process(process: &str) -> io::Result<String> {
    let file = File::open(format!("/proc/{process}/ns/net"))?;
    Ok(identity(&file.into())?)
}

fn identity(fd: &OwnedFd) -> rustix::io::Result<String> {
    let stat = fstat(fd)?;
    Ok(format!("{}:{}", stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(fd: Option<OwnedFd>) -> String {
        let failure = Namespace::check(fd, "/x").unwrap_err();
        assert_eq!(failure.code, code::NETNS);
        failure.msg
    }

    #[test]
    fn what_is_no_pods_namespace_is_refused_by_name() {
        let open = |path: &str| Some(OwnedFd::from(File::open(path).unwrap()));
        assert!(message(None).contains("no descriptor"));
        assert!(message(open("/etc/passwd")).contains("not a namespace"));
        assert!(message(open("/")).contains("not a namespace"));
        assert!(message(open("/proc/self/ns/mnt")).contains("not a network namespace"));
        assert!(message(open("/proc/self/ns/net")).contains("weftd's own"));
    }
}
