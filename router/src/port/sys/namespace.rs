//! Network namespaces: one of one's own, and what tells one from all others.
//!
//! One's own ([`new_network`]) has no name and no file: it lives as long as somebody has its descriptor or a socket in it, and what devices
//! are in it go with it. Any namespace has a cookie, a number that the kernel gives to no other until the next boot. Paths and inodes, on the
//! other hand, are given away again.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// `FD_NSFS_ROOT`: <https://elixir.bootlin.com/linux/v6.18/A/ident/FD_NSFS_ROOT>.
const NSFS_ROOT: libc::c_int = -10003;
/// `FILEID_NSFS`: <https://elixir.bootlin.com/linux/v6.18/A/ident/FILEID_NSFS>.
const FILEID_NSFS: libc::c_int = 0xf1;

/// `struct file_handle` with a `struct nsfs_file_handle` in it:
/// <https://elixir.bootlin.com/linux/v6.18/A/ident/nsfs_file_handle>.
#[repr(C)]
struct Handle {
    bytes: libc::c_uint,
    kind: libc::c_int,
    cookie: [u32; 2],
    namespace_kind: u32,
    inode: u32,
}

/// The cookie of the calling thread's network namespace.
///
/// # Errors
/// The kernel's: `ENOPROTOOPT` before Linux 5.14.
pub fn cookie() -> io::Result<u64> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: getsockopt(2) writes at most `length` bytes to the option's place and to `length`, both of which are ours and live. rustix
    // does not know this option.
    let failed = unsafe {
        let place = std::ptr::from_mut(&mut cookie).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_NETNS_COOKIE, place, &raw mut length) != 0
    };
    if failed { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}

/// Whether the network namespace with this cookie, whose file has this inode, still lives. Needs the right to enter it, without which it looks
/// as if it were gone.
///
/// # Errors
/// The kernel's: `EBADF` before Linux 6.18, which cannot tell; `EPERM` where a container may not ask.
pub fn lives(cookie: u64, inode: u32) -> io::Result<bool> {
    open(cookie, inode).map(|opened| opened.is_some())
}

/// Opens it; `None` if it does not live any more.
///
/// # Errors
/// As for [`lives`].
pub fn open(cookie: u64, inode: u32) -> io::Result<Option<OwnedFd>> {
    let mut handle = Handle {
        bytes: (size_of::<Handle>() - 2 * size_of::<u32>()) as libc::c_uint,
        kind: FILEID_NSFS,
        cookie: zerocopy::transmute!(cookie),
        namespace_kind: libc::CLONE_NEWNET as u32,
        inode,
    };
    // SAFETY: open_by_handle_at(2) reads `bytes` bytes behind the first two fields, which are there, laid out as the kernel has them. What it
    // returns is a new descriptor that nobody else has. rustix does not know this call.
    let opened = unsafe {
        let fd = libc::open_by_handle_at(NSFS_ROOT, (&raw mut handle).cast(), libc::O_RDONLY | libc::O_CLOEXEC);
        (fd >= 0).then(|| OwnedFd::from_raw_fd(fd))
    };
    match opened.ok_or_else(io::Error::last_os_error) {
        Ok(opened) => Ok(Some(opened)),
        Err(error) if error.raw_os_error() == Some(libc::ESTALE) => Ok(None),
        Err(error) => Err(error),
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn own() -> (u64, u32) {
        (cookie().unwrap(), File::open("/proc/thread-self/ns/net").unwrap().metadata().unwrap().ino() as u32)
    }

    #[test]
    fn each_namespace_has_a_cookie_of_its_own() {
        let [first, second] = [(), ()].map(|()| {
            let inside = || {
                // SAFETY: as above.
                unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
                (own(), lives(own().0, own().1))
            };
            thread::spawn(inside).join().unwrap()
        });
        assert!(first.0.0 != second.0.0 && first.0.0 != own().0);
        assert_eq!(own(), own());
        // Where the kernel can tell at all, it tells the living from the dead.
        match (first.1, lives(own().0, own().1)) {
            (Ok(alive), Ok(mine)) => assert!(alive && mine),
            (Err(_), Err(error)) => assert_eq!(error.raw_os_error(), Some(libc::EBADF), "{error}"),
            other => panic!("{other:?}"),
        }
        if lives(own().0, own().1).is_ok() {
            assert!(!lives(own().0 ^ 1 << 62, own().1).unwrap());
            let gone = || !lives(first.0.0, first.0.1).unwrap();
            assert!((0..6000).any(|_| gone() || {
                thread::sleep(std::time::Duration::from_millis(10));
                false
            }));
        }
    }
}
