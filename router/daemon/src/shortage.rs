//! Failures that pass: this process, or the machine, has no descriptor or no memory left at the moment.
//!
//! Whoever asked for something is told to try again (CNI's code 11). Nothing is decided by what could not be looked at.

use std::io;

use rustix::io::Errno;

/// Whether an error says so.
pub fn is_shortage(error: &io::Error) -> bool {
    let no_memory = error.kind() == io::ErrorKind::OutOfMemory;
    no_memory || matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS))
}

/// What to do about it.
pub const ADVICE: &str = "try again; if it stays so, raise weftd's limits of open files (LimitNOFILE=) and memory";
