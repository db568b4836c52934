//! The pod's network namespace: opened and proven to be one, and not the host's.
//!
//! `CNI_NETNS` is a path that somebody else wrote. It may name a FIFO (whose open would hang), a device (whose open
//! may act), a namespace of another kind, or the namespace of the node itself, in which an interface, an address
//! and a default route would cut the node off. So the path is first looked up without opening what is there
//! (`O_PATH`), then opened without blocking, and everything is asked of the descriptors, never of the path again.
//!
//! "The host's" are two: that of this process, which the runtime started on the node, and that of process 1. They
//! differ where a whole node lives in a namespace, as in a lab.

use std::os::fd::OwnedFd;

use rustix::fs::{FsWord, Mode, OFlags, Stat, fstat, fstatfs, open, stat};
use rustix::io::Errno;
use weft_api::Failure;

use crate::environment::invalid;
use crate::input::quoted;
use crate::sys;

/// `NSFS_MAGIC` of `linux/magic.h`: the file system that namespaces are files of.
const NSFS_MAGIC: FsWord = 0x6e73_6673;

/// The network namespace of this process.
const OWN: &str = "/proc/self/ns/net";

/// The network namespace of process 1.
const FIRST: &str = "/proc/1/ns/net";

/// Opens the namespace at `path`.
pub fn open_pod(path: &str) -> Result<OwnedFd, Failure> {
    let refuse = |why: &str| invalid("CNI_NETNS", &format!("{} {why}", quoted(path)));
    let failed = |errno: Errno| refuse(&format!("cannot be opened: {}", std::io::Error::from(errno)));

    let found = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
    let is_namespace = |descriptor: &OwnedFd| fstatfs(descriptor).map(|system| system.f_type == NSFS_MAGIC);
    if !is_namespace(&found).map_err(failed)? {
        return Err(refuse("is not a namespace"));
    }
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let descriptor = open(path, flags, Mode::empty()).map_err(failed)?;
    if !is_namespace(&descriptor).map_err(failed)? {
        return Err(refuse("is not a namespace"));
    }
    if !sys::is_network_namespace(&descriptor).map_err(failed)? {
        return Err(refuse("is a namespace, but not one of the network"));
    }
    if is_of_host(&descriptor).map_err(|errno| {
        let cause = std::io::Error::from(errno);
        refuse(&format!("cannot be told from the host's network namespace: {cause}; is /proc mounted?"))
    })? {
        return Err(refuse("is the host's own network namespace")
            .with_details("a pod of the host's network must not be attached; the runtime should not call CNI for it"));
    }
    Ok(descriptor)
}

fn is_of_host(descriptor: &OwnedFd) -> Result<bool, Errno> {
    let identity = |status: Stat| (status.st_dev, status.st_ino);
    let pod = identity(fstat(descriptor)?);
    if identity(stat(OWN)?) == pod {
        return Ok(true);
    }
    match stat(FIRST) {
        Ok(first) => Ok(identity(first) == pod),
        // Who may not look at process 1 could not have opened its namespace by that path either; the daemon, which
        // will act in the namespace, compares it with its own.
        Err(Errno::ACCESS | Errno::PERM) => Ok(false),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_network_namespace_of_a_pod_is_refused() {
        let cases = [
            ("/proc/self/ns/net", "host's"),
            // The host's as well, or not to be opened where process 1 is out of reach.
            ("/proc/1/ns/net", ""),
            ("/proc/self/ns/mnt", "not one of the network"),
            ("/proc/self/stat", "not a namespace"),
            ("/proc", "not a namespace"),
            ("/dev/null", "not a namespace"),
            ("/nonexistent/netns", "No such file"),
            ("/etc/passwd/x", "Not a directory"),
        ];
        for (path, why) in cases {
            let failure = open_pod(path).unwrap_err();
            assert_eq!(failure.code, weft_api::code::ENVIRONMENT);
            assert!(failure.msg.contains("CNI_NETNS") && failure.msg.contains(why), "{failure}");
        }
        assert!(open_pod(&"x/".repeat(100_000)).unwrap_err().msg.len() < 300);
        assert!(open_pod("a\0b").is_err());
    }
}
