//! A network namespace of one's own.
//!
//! It has no name and no file: it lives as long as somebody has its descriptor or a socket in it, and what devices are in it go with it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::thread;

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Makes one. The calling thread stays where it is.
///
/// # Errors
/// The kernel's: `EPERM` without CAP_SYS_ADMIN, `ENOSPC` if there are too many.
pub fn new_network() -> io::Result<OwnedFd> {
    let make = || {
        // SAFETY: unshare(2) with other flags can take the descriptors from under other threads, or split what they believe to be one
        // filesystem; this one moves the calling thread, which ends right after, to another network namespace and does nothing else.
        // rustix has no safe form of it.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
        Ok(File::open("/proc/thread-self/ns/net")?.into())
    };
    let thread = thread::Builder::new().name("weft-netns".into()).stack_size(64 << 10).spawn(make)?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that made a network namespace panicked")))
}
