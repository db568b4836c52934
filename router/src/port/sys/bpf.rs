//! `bpf(2)`: loading programs and maps, attaching to a device, running a program on frames.
//!
//! Programs are instructions written out in Rust ([`Assembler`](crate::port::xdp::Assembler)), so neither a C compiler nor
//! an object file is needed. A program is attached by a *link*: it is detached when the link's descriptor is closed, be
//! it by a crash, so nothing is ever left behind. The kernel refuses to replace another's program (`EBUSY`), and so do we.
//!
//! Numbers and layouts are those of `include/uapi/linux/bpf.h`. System headers may be older than the kernel, so they
//! are written out here; each links to its definition in Linux 6.18.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use zerocopy::{Immutable, IntoBytes};

/// `enum bpf_cmd`: <https://elixir.bootlin.com/linux/v6.18/A/ident/bpf_cmd>.
#[derive(Copy, Clone, Debug)]
enum Command {
    MapCreate = 0,
    MapLookup = 1,
    MapUpdate = 2,
    MapDelete = 3,
    ProgramLoad = 5,
    ProgramTestRun = 10,
    LinkCreate = 28,
}

/// `BPF_PROG_TYPE_XDP`: <https://elixir.bootlin.com/linux/v6.18/A/ident/BPF_PROG_TYPE_XDP>.
const PROGRAM_TYPE_XDP: u32 = 6;
/// `BPF_XDP` of `enum bpf_attach_type`: <https://elixir.bootlin.com/linux/v6.18/A/ident/BPF_XDP>.
const ATTACH_XDP: u32 = 37;
/// `BPF_PROG_TYPE_SCHED_CLS`: <https://elixir.bootlin.com/linux/v6.18/A/ident/BPF_PROG_TYPE_SCHED_CLS>.
const PROGRAM_TYPE_TC: u32 = 3;
/// `BPF_TCX_INGRESS` of `enum bpf_attach_type`: <https://elixir.bootlin.com/linux/v6.18/A/ident/BPF_TCX_INGRESS>.
const ATTACH_TCX: u32 = 46;
/// `BPF_TCX_EGRESS`: <https://elixir.bootlin.com/linux/v6.18/A/ident/BPF_TCX_EGRESS>.
const ATTACH_TCX_EGRESS: u32 = 47;
/// <https://elixir.bootlin.com/linux/v6.18/A/ident/BPF_F_XDP_HAS_FRAGS>.
const HAS_FRAGS: u32 = 1 << 5;
/// <https://elixir.bootlin.com/linux/v6.18/A/ident/BPF_F_TEST_XDP_LIVE_FRAMES>.
const LIVE_FRAMES: u32 = 1 << 1;
/// Length of a name, its final zero included: <https://elixir.bootlin.com/linux/v6.18/A/ident/BPF_OBJ_NAME_LEN>.
const NAME: usize = 16;
/// What is kept of the verifier's log.
const LOG: usize = 1 << 20;
/// Our programs may be used under either, and some helpers ask for the latter.
const LICENSE: &[u8] = b"Dual MIT/GPL\0";

/// One instruction, as the kernel reads it: <https://elixir.bootlin.com/linux/v6.18/A/ident/bpf_insn>.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, IntoBytes, Immutable)]
#[repr(C)]
pub struct Instruction {
    /// Class, size or operation, and mode.
    pub code: u8,
    /// Destination in the low half, source in the high half (on little-endian machines).
    pub registers: u8,
    /// Of a jump in instructions, of a memory access in bytes.
    pub offset: i16,
    /// An operand.
    pub immediate: i32,
}

/// What went wrong.
#[derive(Debug)]
pub enum BpfError {
    /// The kernel refused a call.
    Refused {
        /// What was to be done, and to what.
        what: String,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The verifier does not take the program. A bug here, or a kernel that lacks a feature.
    Rejected {
        /// The program's name.
        program: String,
        /// The kernel's reason.
        source: io::Error,
        /// The end of what the verifier says, which is where the reason stands.
        log: String,
    },
}

impl BpfError {
    /// The kernel's reason.
    pub fn io(&self) -> &io::Error {
        match self {
            BpfError::Refused { source, .. } | BpfError::Rejected { source, .. } => source,
        }
    }

    fn is_about_attaching(&self) -> bool {
        matches!(self, BpfError::Refused { what, .. } if what.starts_with("attach "))
    }
}

impl fmt::Display for BpfError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BpfError::Refused { what, source } => write!(f, "cannot {what}: {source}")?,
            BpfError::Rejected { program, source, log } => {
                write!(f, "the kernel does not take the program {program}: {source}")?;
                if !log.is_empty() {
                    write!(f, "; the verifier says: {log}")?;
                }
            }
        }
        let advice = match self.io().raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => "run as root, or with CAP_BPF and CAP_NET_ADMIN",
            Some(libc::ENOSYS) => "this kernel has no BPF (CONFIG_BPF_SYSCALL), or a seccomp filter forbids it",
            Some(libc::EBUSY) => {
                "another program is attached there and is left alone; `bpftool net` or `ip link show` names it"
            }
            Some(libc::EOPNOTSUPP) => "the driver has no XDP, or an offload such as LRO is in its way (`ethtool -k`)",
            Some(libc::EINVAL | libc::ERANGE | libc::ENOMEM) if self.is_about_attaching() => {
                "the device is gone, or its driver refuses it for an MTU, a number of queues (`ethtool -L`) or an offload: the kernel's \
                 log says which"
            }
            _ => return Ok(()),
        };
        write!(f, " ({advice})")
    }
}

impl std::error::Error for BpfError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(self.io())
    }
}

/// Kinds of maps: <https://elixir.bootlin.com/linux/v6.18/A/ident/bpf_map_type>.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum MapKind {
    /// Values by key.
    Hash = 1,
    /// Values by number; a program can address one directly.
    Array = 2,
    /// AF_XDP sockets by number.
    Xsk = 17,
}

/// A map.
#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
    key_size: usize,
    value_size: usize,
}

impl Map {
    /// Makes a map of `entries` values. Keys of an array or an XSKMAP, and values of the latter, have 4 bytes.
    ///
    /// # Errors
    /// [`BpfError::Refused`]: not permitted, or the kernel does not know the kind.
    pub fn create(kind: MapKind, name: &str, key: usize, value: usize, entries: u32) -> Result<Map, BpfError> {
        let attributes = MapCreate {
            kind: kind as u32,
            key_size: key as u32,
            value_size: value as u32,
            entries,
            name: object_name(name),
            ..MapCreate::default()
        };
        let fd =
            call_fd(Command::MapCreate, &attributes).map_err(|source| refused(format!("make map {name}"), source))?;
        Ok(Map { fd, key_size: key, value_size: value })
    }

    /// Sets a value.
    ///
    /// # Errors
    /// [`BpfError::Refused`]: no such number, or no room.
    ///
    /// # Panics
    /// If key or value have another length than was said on creation.
    pub fn update(&self, key: &[u8], value: &[u8]) -> Result<(), BpfError> {
        assert_eq!((key.len(), value.len()), (self.key_size, self.value_size), "a map's sizes are fixed");
        let attributes =
            Element { map: self.fd_number(), key: address(key), value: address(value), ..Element::default() };
        self.call(Command::MapUpdate, &attributes)
    }

    /// Reads a value.
    ///
    /// # Errors
    /// [`BpfError::Refused`]: there is none.
    ///
    /// # Panics
    /// If key or value have another length than was said on creation.
    pub fn lookup(&self, key: &[u8], value: &mut [u8]) -> Result<(), BpfError> {
        assert_eq!((key.len(), value.len()), (self.key_size, self.value_size), "a map's sizes are fixed");
        let value = value.as_mut_ptr() as u64;
        let attributes = Element { map: self.fd_number(), key: address(key), value, ..Element::default() };
        self.call(Command::MapLookup, &attributes)
    }

    /// Removes a value.
    ///
    /// # Errors
    /// [`BpfError::Refused`]: there is none.
    ///
    /// # Panics
    /// If the key has another length than was said on creation.
    pub fn remove(&self, key: &[u8]) -> Result<(), BpfError> {
        assert_eq!(key.len(), self.key_size, "a map's sizes are fixed");
        let attributes = Element { map: self.fd_number(), key: address(key), ..Element::default() };
        self.call(Command::MapDelete, &attributes)
    }

    fn call(&self, command: Command, attributes: &Element) -> Result<(), BpfError> {
        match call(command, attributes) {
            Ok(_) => Ok(()),
            Err(source) => Err(refused(format!("do {command:?} on a map"), source)),
        }
    }

    fn fd_number(&self) -> u32 {
        self.fd.as_raw_fd() as u32
    }
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// How a program is attached.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// By the driver, before the kernel makes a packet of the frame: `XDP_FLAGS_DRV_MODE`,
    /// <https://elixir.bootlin.com/linux/v6.18/A/ident/XDP_FLAGS_DRV_MODE>.
    Native = 1 << 2,
    /// By the stack, on every device: `XDP_FLAGS_SKB_MODE`, <https://elixir.bootlin.com/linux/v6.18/A/ident/XDP_FLAGS_SKB_MODE>.
    Generic = 1 << 1,
}

/// A program attached to a device, for as long as this lives.
#[derive(Debug)]
pub struct Link {
    _fd: OwnedFd,
}

/// A program for devices.
#[derive(Debug)]
pub struct Program {
    fd: OwnedFd,
    name: String,
}

impl Program {
    /// Loads a program.
    ///
    /// # Errors
    /// [`BpfError::Rejected`] with the verifier's log; [`BpfError::Refused`] if loading is not permitted at all.
    pub fn load(name: &str, instructions: &[Instruction]) -> Result<Program, BpfError> {
        // None of our programs looks behind a frame's first piece, so all of them take frames of several.
        Program::load_as((PROGRAM_TYPE_XDP, ATTACH_XDP, HAS_FRAGS), name, instructions)
    }

    /// Loads a program that gets what a device received, or is to send, as the kernel's own buffers.
    ///
    /// # Errors
    /// As for [`Program::load`].
    pub fn load_tc(name: &str, instructions: &[Instruction]) -> Result<Program, BpfError> {
        Program::load_as((PROGRAM_TYPE_TC, ATTACH_TCX, 0), name, instructions)
    }

    fn load_as(
        (kind, expected_attach_type, flags): (u32, u32, u32),
        name: &str,
        instructions: &[Instruction],
    ) -> Result<Program, BpfError> {
        let mut attributes = ProgramLoad {
            kind,
            count: instructions.len() as u32,
            instructions: instructions.as_ptr() as u64,
            license: address(LICENSE),
            name: object_name(name),
            expected_attach_type,
            flags,
            ..ProgramLoad::default()
        };
        let name = name.to_owned();
        let source = match call_fd(Command::ProgramLoad, &attributes) {
            Ok(fd) => return Ok(Program { fd, name }),
            Err(source) if source.raw_os_error() == Some(libc::EPERM) => {
                return Err(refused(format!("load the program {name}"), source));
            }
            Err(source) => source,
        };
        // Only a program that was rejected is worth a log, and the second attempt says why.
        let mut log = vec![0; LOG];
        (attributes.log_level, attributes.log_size) = (1, LOG as u32);
        attributes.log = log.as_mut_ptr() as u64;
        match call_fd(Command::ProgramLoad, &attributes) {
            Ok(fd) => Ok(Program { fd, name }),
            Err(_) => Err(BpfError::Rejected { program: name, source, log: last_lines(&log) }),
        }
    }

    /// Attaches it to a device of the calling thread's network namespace.
    ///
    /// # Errors
    /// [`BpfError::Refused`]: `EBUSY` if something is attached there, `EOPNOTSUPP` or `EINVAL` if the driver cannot,
    /// `ENODEV` if there is no such device.
    pub fn attach(&self, interface: u32, mode: Mode) -> Result<Link, BpfError> {
        let attributes = LinkCreate {
            program: self.fd.as_raw_fd() as u32,
            interface,
            attach_type: ATTACH_XDP,
            flags: mode as u32,
            ..LinkCreate::default()
        };
        let fd = call_fd(Command::LinkCreate, &attributes).map_err(|source| {
            refused(format!("attach the program {} to interface {interface} ({mode:?} mode)", self.name), source)
        })?;
        Ok(Link { _fd: fd })
    }

    /// Attaches it behind what other programs are attached to a device's ingress, in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`BpfError::Refused`]: `ENODEV` if there is no such device, `EINVAL` on a kernel before 6.6.
    pub fn attach_tcx(&self, interface: u32) -> Result<Link, BpfError> {
        self.attach_as(ATTACH_TCX, interface, "receives")
    }

    /// The same for what the device sends.
    ///
    /// # Errors
    /// As for [`Program::attach_tcx`].
    pub fn attach_tcx_egress(&self, interface: u32) -> Result<Link, BpfError> {
        self.attach_as(ATTACH_TCX_EGRESS, interface, "sends")
    }

    fn attach_as(&self, attach_type: u32, interface: u32, does: &str) -> Result<Link, BpfError> {
        let program = self.fd.as_raw_fd() as u32;
        let attributes = LinkCreate { program, interface, attach_type, ..LinkCreate::default() };
        let fd = call_fd(Command::LinkCreate, &attributes).map_err(|source| {
            let what = format!("lead what interface {interface} {does} by the program {} (tcx, Linux 6.6)", self.name);
            refused(what, source)
        })?;
        Ok(Link { _fd: fd })
    }

    /// Runs it once on a frame; returns its verdict and the frame as it then is.
    ///
    /// # Errors
    /// [`BpfError::Refused`]: the frame is shorter than an Ethernet header or longer than a page allows.
    pub fn run(&self, frame: &[u8]) -> Result<(u32, Vec<u8>), BpfError> {
        let mut out = vec![0; frame.len() + NAME];
        let mut attributes = TestRun {
            program: self.fd.as_raw_fd() as u32,
            data_size_in: frame.len() as u32,
            data_size_out: out.len() as u32,
            data_in: address(frame),
            data_out: out.as_mut_ptr() as u64,
            repeat: 1,
            ..TestRun::default()
        };
        call_mut(Command::ProgramTestRun, &mut attributes)
            .map_err(|source| refused(format!("run the program {}", self.name), source))?;
        out.truncate(attributes.data_size_out as usize);
        Ok((attributes.verdict, out))
    }

    /// Runs it `repeat` times, `batch` at a time, each time on a real frame that begins as a copy of `frame`; what it
    /// redirects is sent. Devices are those of the calling thread's network namespace. Not before Linux 5.18. Returns how
    /// long one run took on the average, with all that the kernel did for it.
    ///
    /// A frame's memory is used again for later ones and keeps what was written to it, so the program has to write all
    /// that may have changed.
    ///
    /// # Errors
    /// [`BpfError::Refused`]; `EINTR` after a signal, when some runs may have happened.
    pub fn run_live(&self, frame: &[u8], repeat: u32, batch: u32) -> Result<Duration, BpfError> {
        let mut attributes = TestRun {
            program: self.fd.as_raw_fd() as u32,
            data_size_in: frame.len() as u32,
            data_in: address(frame),
            repeat,
            flags: LIVE_FRAMES,
            batch_size: batch,
            ..TestRun::default()
        };
        call_mut(Command::ProgramTestRun, &mut attributes)
            .map_err(|source| refused(format!("run the program {} on live frames", self.name), source))?;
        Ok(Duration::from_nanos(attributes.duration.into()))
    }
}

fn refused(what: String, source: io::Error) -> BpfError {
    BpfError::Refused { what, source }
}

fn address(bytes: &[u8]) -> u64 {
    bytes.as_ptr() as u64
}

/// A name as the kernel takes it: letters, digits, `_` and `.`, cut to its length.
fn object_name(name: &str) -> [u8; NAME] {
    let mut out = [0; NAME];
    for (to, from) in out[..NAME - 1].iter_mut().zip(name.bytes()) {
        *to = if from.is_ascii_alphanumeric() || from == b'.' { from } else { b'_' };
    }
    out
}

/// The last lines of a log that ends at its first zero.
fn last_lines(log: &[u8]) -> String {
    let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
    let text = String::from_utf8_lossy(&log[..end]);
    let lines: Vec<&str> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

// The parts of `union bpf_attr` that are used, each up to its last field that is:
// <https://elixir.bootlin.com/linux/v6.18/A/ident/bpf_attr>.

#[derive(Default)]
#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
    flags: u32,
    inner_map: u32,
    numa_node: u32,
    name: [u8; NAME],
    padding: u32,
}

#[derive(Default)]
#[repr(C)]
struct Element {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[derive(Default)]
#[repr(C)]
struct ProgramLoad {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; NAME],
    interface: u32,
    expected_attach_type: u32,
}

#[derive(Default)]
#[repr(C)]
struct LinkCreate {
    program: u32,
    interface: u32,
    attach_type: u32,
    flags: u32,
    padding: [u64; 4],
}

#[derive(Default)]
#[repr(C)]
struct TestRun {
    program: u32,
    verdict: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_size_in: u32,
    context_size_out: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    padding: u32,
}

/// Attributes of one command. All are numbers without implicit padding.
trait Attributes {}
impl Attributes for MapCreate {}
impl Attributes for Element {}
impl Attributes for ProgramLoad {}
impl Attributes for LinkCreate {}
impl Attributes for TestRun {}

const _: () = assert!(size_of::<MapCreate>() == 48 && size_of::<Element>() == 32 && size_of::<ProgramLoad>() == 72);
const _: () = assert!(size_of::<LinkCreate>() == 48 && size_of::<TestRun>() == 80 && size_of::<Instruction>() == 8);

fn call_fd<A: Attributes>(command: Command, attributes: &A) -> io::Result<OwnedFd> {
    let fd = call(command, attributes)?;
    // SAFETY: the commands that come here (making a map, a program, a link) return a new descriptor, which nobody else
    // owns. The call is made by number, so no safe wrapper can say so.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn call<A: Attributes>(command: Command, attributes: &A) -> io::Result<RawFd> {
    // SAFETY: the kernel reads `size_of::<A>()` bytes of attributes. Those it is called with here hold addresses and lengths
    // of slices that the callers borrow until the call returns; buffers that are written (a value, a log) are borrowed
    // mutably by them. No crate here wraps bpf(2).
    let result = unsafe { libc::syscall(libc::SYS_bpf, command as i32, attributes, size_of::<A>()) };
    RawFd::try_from(result).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)
}

fn call_mut<A: Attributes>(command: Command, attributes: &mut A) -> io::Result<RawFd> {
    // SAFETY: as in `call`; the kernel also writes results into the attributes themselves, which are borrowed mutably.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command as i32, &raw mut *attributes, size_of::<A>()) };
    RawFd::try_from(result).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_becomes_what_the_kernel_takes() {
        assert_eq!(&object_name("weft-a.b"), b"weft_a.b\0\0\0\0\0\0\0\0");
        assert_eq!(&object_name("0123456789abcdefgh"), b"0123456789abcde\0");
    }

    #[test]
    fn an_error_ends_in_what_to_do() {
        let error = |code| refused("load the program x".into(), io::Error::from_raw_os_error(code)).to_string();
        assert!(error(libc::EPERM).ends_with("(run as root, or with CAP_BPF and CAP_NET_ADMIN)"));
        assert!(error(libc::EBUSY).contains("is left alone"));
        assert!(error(libc::EINVAL).starts_with("cannot load the program x: Invalid argument"));
    }

    #[test]
    fn of_a_log_the_end_is_kept() {
        let log: String = (0..40).map(|line| format!("line {line}\n")).collect();
        let mut bytes = log.into_bytes();
        bytes.extend([0, b'x', b'y']);
        let kept = last_lines(&bytes);
        assert!(kept.starts_with("line 28\n") && kept.ends_with("line 39"), "{kept}");
    }
}
