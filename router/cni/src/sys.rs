//! The one system call that needs `unsafe`: asking a namespace's descriptor for its kind.

use std::ffi::{c_int, c_void};
use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

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
