//! The system calls that need `unsafe`: asking a namespace's descriptor for its kind, and setting `lo` up.

use std::ffi::{c_int, c_short, c_void};
use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Updater, ioctl, opcode};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// `CLONE_NEWNET` of `linux/sched.h`: how the kernel names the kind "network namespace".
const CLONE_NEWNET: c_int = 0x4000_0000;

/// `NS_GET_NSTYPE` of `linux/nsfs.h`; see ioctl_nsfs(2).
struct NamespaceKind;

// SAFETY: NS_GET_NSTYPE takes no argument and writes no memory; its result is the return value.
unsafe impl Ioctl for NamespaceKind {
    type Output = IoctlOutput;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::none(0xb7, 0x3)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> Result<Self::Output, Errno> {
        Ok(output)
    }
}

/// Whether the descriptor, which must be one of nsfs, is of a network namespace.
pub fn is_network_namespace(descriptor: impl AsFd) -> Result<bool, Errno> {
    // SAFETY: the request is described above, and on descriptors that are not of a namespace the caller does not ask.
    let kind = unsafe { ioctl(descriptor, NamespaceKind) }?;
    Ok(kind == CLONE_NEWNET)
}

/// `SIOCGIFFLAGS` and `SIOCSIFFLAGS` of `linux/sockios.h`; see netdevice(7).
const GET_FLAGS: Opcode = 0x8913;
const SET_FLAGS: Opcode = 0x8914;

/// `IFF_UP` of `linux/if.h`.
const UP: c_short = 1;

/// `struct ifreq` of `linux/if.h`, with the member of its union that is wanted here.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: c_short,
    /// The union's largest member takes 24 bytes.
    rest: [u8; 22],
}

/// Sets `lo` of the thread's network namespace up, or down.
pub fn set_loopback(up: bool) -> Result<(), Errno> {
    let socket = any_socket()?;
    let mut lo = loopback_flags(&socket)?;
    lo.flags = if up { lo.flags | UP } else { lo.flags & !UP };
    // SAFETY: SIOCSIFFLAGS reads an ifreq, whose size and layout InterfaceRequest has, and no more.
    unsafe { ioctl(&socket, Updater::<SET_FLAGS, InterfaceRequest>::new(&mut lo)) }
}

/// Whether `lo` of the thread's network namespace is up.
pub fn is_loopback_up() -> Result<bool, Errno> {
    Ok(loopback_flags(&any_socket()?)?.flags & UP != 0)
}

fn any_socket() -> Result<std::os::fd::OwnedFd, Errno> {
    socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
}

fn loopback_flags(socket: impl AsFd) -> Result<InterfaceRequest, Errno> {
    let mut lo = InterfaceRequest { name: [0; 16], flags: 0, rest: [0; 22] };
    lo.name[..2].copy_from_slice(b"lo");
    // SAFETY: SIOCGIFFLAGS reads the name of an ifreq, and writes into its union, all of which InterfaceRequest has.
    unsafe { ioctl(socket, Updater::<GET_FLAGS, InterfaceRequest>::new(&mut lo)) }?;
    Ok(lo)
}
