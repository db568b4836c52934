//! A place where frames enter and leave the router.
//!
//! A port moves frames in batches and never blocks. `Err` from a port means that the *port* is broken (its device
//! or namespace is gone: `EBADF`, `EBADFD`, `ENXIO`); anything else ends one frame, by name. Ports state what they
//! can take ([`Capabilities`]); what a port cannot take, it does itself on the way out: checksums,
//! segmentation. Nothing is computed that can be handed on.

use std::collections::VecDeque;
use std::io;
use std::ops::{Deref, DerefMut, RangeFull};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::vec::Drain;

use rustix::io::Errno;
use weft_encap::offload::{GsoKind, Offload};

use crate::frame::Frame;
use crate::pool::Pool;
use crate::stats::Stats;

pub mod memory;
mod outbox;
pub mod packet;
pub mod raw;
#[cfg(test)]
pub(crate) mod sample;
pub(crate) mod software;
pub mod sys;
pub mod tap;
pub mod tcx;
pub mod udp;
pub mod xdp;

pub use outbox::Outbox;

/// Number of a port. Small and dense: counters and queues are indexed by it.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortId(pub u16);

impl PortId {
    /// For indexing.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl std::fmt::Display for PortId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Most frames in a vector.
pub const BATCH: usize = 64;

/// Most bytes in a vector; a vector of superframes ends earlier than one of small frames.
pub const BATCH_BYTES: usize = 1024 * 1024;

/// Frames received together, at most [`BATCH`]. Its memory is made once and used again.
pub struct Batch {
    frames: Vec<Frame>,
    most_frames: usize,
    most_bytes: usize,
}

/// What a frame has at least, where bytes are counted and frames are to be limited.
const USUAL_FRAME: usize = 1500;

impl Default for Batch {
    fn default() -> Batch {
        Batch { frames: Vec::new(), most_frames: BATCH, most_bytes: BATCH_BYTES }
    }
}

impl Batch {
    /// An empty one.
    pub fn new() -> Batch {
        Batch { frames: Vec::with_capacity(BATCH), ..Batch::default() }
    }

    /// Is to take about so many bytes at most, instead of [`BATCH_BYTES`].
    pub fn limit(&mut self, bytes: usize) {
        self.most_bytes = bytes.clamp(1, BATCH_BYTES);
        self.most_frames = bytes.div_ceil(USUAL_FRAME).clamp(1, BATCH);
    }

    /// How many bytes it is to take, about.
    pub fn most_bytes(&self) -> usize {
        self.most_bytes
    }

    /// Appends a frame. Whoever fills a batch asks [`Batch::is_full`] before.
    pub fn push(&mut self, frame: Frame) {
        debug_assert!(!self.is_full());
        self.frames.push(frame);
    }

    /// Whether no more frames shall be added.
    pub fn is_full(&self) -> bool {
        self.frames.len() >= self.most_frames
    }

    /// How many more frames it takes.
    pub fn room(&self) -> usize {
        self.most_frames.saturating_sub(self.frames.len())
    }

    /// Takes all frames out, first to last.
    pub fn drain(&mut self, all: RangeFull) -> Drain<'_, Frame> {
        self.frames.drain(all)
    }

    /// Keeps the first `len` frames, and gives the others back.
    pub fn truncate(&mut self, len: usize) {
        self.frames.truncate(len);
    }

    /// Gives all frames back.
    pub fn clear(&mut self) {
        self.frames.clear();
    }
}

impl DerefMut for Batch {
    fn deref_mut(&mut self) -> &mut [Frame] {
        &mut self.frames
    }
}

impl IntoIterator for Batch {
    type Item = Frame;
    type IntoIter = std::vec::IntoIter<Frame>;
    fn into_iter(self) -> Self::IntoIter {
        self.frames.into_iter()
    }
}

impl Deref for Batch {
    type Target = [Frame];
    fn deref(&self) -> &[Frame] {
        &self.frames
    }
}

/// Most frames that wait for a port within one round of the worker; what is over that is dropped as `QueueFull`.
pub const QUEUE: usize = 1024;

/// Frames that wait to be sent by one port.
pub type Queue = VecDeque<Frame>;

/// What a port takes on transmit without work of ours.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Frames with a checksum still to be filled in.
    pub partial_checksum: bool,
    /// TCP over IPv4 superframes.
    pub tcp4: bool,
    /// TCP over IPv6 superframes.
    pub tcp6: bool,
    /// UDP superframes.
    pub udp: bool,
}

impl Capabilities {
    /// Whether a frame with this much left to do can be handed on as it is.
    pub fn take(&self, offload: &Offload) -> bool {
        let segmented = offload.gso.is_none_or(|gso| match gso.kind {
            GsoKind::Tcp4 => self.tcp4,
            GsoKind::Tcp6 => self.tcp6,
            GsoKind::Udp => self.udp,
        });
        segmented && (self.partial_checksum || offload.partial.is_none())
    }
}

impl std::fmt::Display for Capabilities {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names = [(self.partial_checksum, "csum"), (self.tcp4, "tso4"), (self.tcp6, "tso6"), (self.udp, "uso")];
        let mut first = true;
        for (_, name) in names.iter().filter(|(has, _)| *has) {
            write!(f, "{}{name}", if first { "" } else { " " })?;
            first = false;
        }
        if first { f.write_str("none") } else { Ok(()) }
    }
}

/// Whether a port may have more to give.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Received {
    /// The device is empty: wait until it is readable again.
    Drained,
    /// The batch is full (or the budget used up): ask again.
    More,
}

/// A place where frames enter and leave the router.
pub trait Port {
    /// Moves received frames into `batch` until it holds [`BATCH`] frames or about [`BATCH_BYTES`], or the device is
    /// empty. Counts each frame it takes ([`Stats::received`]), and each that it could not take ([`Stats::lost`]). Never blocks.
    ///
    /// # Errors
    /// The port is broken and will not work again.
    fn receive(&mut self, pool: &Pool, batch: &mut Batch, stats: &mut Stats) -> io::Result<Received>;

    /// Sends the frames of `queue` from its front, and counts each as sent ([`Stats::sent`]) or dropped. What is still there on return was
    /// not sent because the device is busy. Never blocks.
    ///
    /// # Errors
    /// The port is broken and will not work again; the rest of `queue` is the caller's to drop.
    fn transmit(&mut self, queue: &mut Queue, stats: &mut Stats) -> io::Result<()>;

    /// The descriptor whose readiness means that [`Port::receive`] has something to give; a port without one is asked
    /// by whoever drives it.
    fn readable(&self) -> Option<BorrowedFd<'_>>;

    /// Whether there may be something to receive, as far as that is seen without asking the kernel. `None` if it is not.
    fn peek(&mut self) -> Option<bool> {
        None
    }

    /// Has [`Port::readable`] tell of the frames of a port that can be looked at, or not any more. `false` if whoever polls that
    /// descriptor has to see to it.
    fn watch(&mut self, _on: bool) -> bool {
        false
    }

    /// Has a port that only sent receive, too: the worker that received from this device is gone.
    fn receive_too(&mut self) {}

    /// Enters what the kernel has counted and tells only who asks.
    fn count(&mut self, _stats: &mut Stats) {}

    /// What it takes on transmit.
    fn capabilities(&self) -> Capabilities;

    /// Says how long a packet inside the tunnel may be; of interest to the underlay alone.
    fn set_tunnel_mtu(&mut self, _mtu: u32) {}

    /// Whether segments that it receives one by one are worth merging (see [`crate::gather`]).
    fn gathers(&self) -> bool {
        false
    }

    /// Ends the port and hands out the device whose closing takes the kernel long, for somebody else to close.
    fn retire(self: Box<Self>) -> Option<OwnedFd> {
        None
    }

    /// `tap`, `xdp`, `udp`, `packet`, `memory`.
    fn kind(&self) -> &'static str;
}

/// Whether an error means that the port itself is gone. Everything else ends one frame.
pub(crate) fn is_broken(error: Errno) -> bool {
    matches!(error, Errno::BADF | Errno::BADFD | Errno::NXIO)
}
