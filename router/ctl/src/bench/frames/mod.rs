//! Frames per second: how many a path carries, found by offering it more and less.
//!
//! A program of ours, run by the kernel on frames of its own (`BPF_F_TEST_XDP_LIVE_FRAMES`), sends a stream out of one pod's
//! device; another, on the other pod's device, counts what arrives and ends it there. Neither goes through a socket, so
//! both are faster than any path between them, and both are the same for every path: TAPs and veths, Weft and the kernel.
//!
//! Words, after RFC 2544 and RFC 9004: *NDR* is the highest rate without any loss, *PDR* the highest at which less than
//! a given part is lost. Frame sizes count the frame check sequence, as they do there: a 64-byte frame has 60 bytes in memory.
//! The stream is UDP over IPv4 in [`FLOWS`] flows; each frame holds its number, so that loss, reordering inside a flow
//! and duplicates are told apart. What the sender's own device refused, because the path did not take frames out of its
//! ring fast enough, counts as loss, and is told apart too: it never entered the path.
//!
//! The generator keeps one CPU busy, whatever the rate. It paces by the clock, frame by frame, and never catches up with more
//! than [`BURST`] frames: if it was kept from sending, less was offered, and the trial says so.

mod device;
mod programs;
mod search;
mod stream;
#[cfg(test)]
mod tests;

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use stream::Stream;

/// Flows of a stream; they differ in their source port.
pub const FLOWS: u64 = 256;

/// Most frames that are sent back to back because they are late.
pub const BURST: u64 = 64;

/// One end of a path: a pod's device.
#[derive(Debug, Clone)]
pub struct End {
    /// Name of the pod's network namespace, as `ip netns` knows it.
    pub netns: String,
    /// Name of the device in there: a TAP or a veth. It has to be up.
    pub device: String,
    /// The pod's address.
    pub address: Ipv4Addr,
}

/// A path's two ends. The path must know the receiver already: its MAC learned, its neighbour entry made, by a ping.
#[derive(Debug, Clone)]
pub struct Ends {
    /// Who sends.
    pub from: End,
    /// Who receives.
    pub to: End,
    /// The MAC that frames are sent to, if it is not the receiver's own: that of the sender's gateway.
    pub gateway: Option<[u8; 6]>,
    /// The CPU that the generator keeps; if none is given, the last one.
    pub cpu: Option<usize>,
}

/// Which sizes are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Mix {
    /// Frames of one size, at least 64 bytes with the frame check sequence.
    Size(u16),
    /// Of twelve frames seven of 64, four of 570 and one of 1518 bytes, or as much as the sender's MTU allows.
    Imix,
}

impl Mix {
    /// The smallest frames that Ethernet has.
    pub const SMALL: Mix = Mix::Size(64);
}

/// How long to search, and how closely.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How long a trial offers frames.
    pub trial: Duration,
    /// Most trials in all.
    pub trials: usize,
    /// A search ends when the rate is known to this part of it.
    pub resolution: f64,
    /// What part may be lost at the PDR.
    pub partial: f64,
}

impl Limits {
    /// About eight seconds.
    pub const SHORT: Limits =
        Limits { trial: Duration::from_millis(300), trials: 16, resolution: 0.04, partial: 0.005 };
    /// About thirty seconds.
    pub const FULL: Limits = Limits { trial: Duration::from_secs(1), trials: 24, resolution: 0.02, partial: 0.005 };
}

/// What one trial counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Trial {
    /// Frames a second that the generator was asked for; `None`: all it can.
    pub asked_pps: Option<f64>,
    /// How long it sent.
    pub seconds: f64,
    /// Frames it gave to the sender's device.
    pub sent: u64,
    /// Of those, frames the device had no room for. They never entered the path.
    pub refused: u64,
    /// Frames that arrived.
    pub received: u64,
    /// Of those, frames that came after a later one of their flow.
    pub reordered: u64,
    /// Frames that came a second time right after the first. They are not among those received.
    pub duplicated: u64,
}

impl Trial {
    /// Frames a second that were offered to the path.
    pub fn offered_pps(&self) -> f64 {
        if self.seconds > 0.0 { self.sent as f64 / self.seconds } else { 0.0 }
    }

    /// Frames a second that arrived.
    pub fn received_pps(&self) -> f64 {
        if self.seconds > 0.0 { self.received as f64 / self.seconds } else { 0.0 }
    }

    /// Frames that did not arrive, refused ones included.
    pub fn lost(&self) -> u64 {
        self.sent.saturating_sub(self.received)
    }

    /// What part was lost.
    pub fn loss(&self) -> f64 {
        if self.sent > 0 { self.lost() as f64 / self.sent as f64 } else { 0.0 }
    }
}

/// What a path carries.
#[derive(Debug, Clone, Serialize)]
pub struct Rate {
    /// Highest rate at which nothing was lost; 0 if something always was.
    pub ndr_pps: f64,
    /// Highest rate at which less than [`Limits::partial`] was lost.
    pub pdr_pps: f64,
    /// The most the generator could offer. If NDR and PDR are as high, the generator was the limit, or it shares its CPU with
    /// the path, as with paths inside the kernel.
    pub offered_max_pps: f64,
    /// What arrived when that much was offered.
    pub received_max_pps: f64,
    /// Frames out of order in all trials without overload (at or below the PDR).
    pub reordered: u64,
    /// Frames that came twice, in all trials.
    pub duplicated: u64,
    /// Whether the sink had to run in generic mode, which costs more: the driver has no XDP, or the MTU is too large for it.
    pub generic_sink: bool,
    /// All trials, in the order in which they were made.
    pub trials: Vec<Trial>,
}

/// Finds out how many frames a second a path carries.
///
/// What is changed for it (a program on the receiver's device, GRO on the peer of the sender's veth) is changed back.
///
/// # Errors
/// A device is missing or down; no frame arrives at all; the kernel refuses the programs; the user interrupts.
pub fn search(ends: &Ends, mix: Mix, limits: &Limits) -> Result<Rate> {
    let mut stream = Stream::prepare(ends, mix)?;
    let mut rate = search::search(limits, &mut |asked| {
        crate::interrupt::check()?;
        stream.trial(asked, limits.trial)
    })?;
    rate.generic_sink = stream.is_sink_generic();
    stream.finish()?;
    Ok(rate)
}

/// A single trial: at `asked` frames a second, or as many as can be.
#[cfg(test)]
fn offer(ends: &Ends, mix: Mix, asked: Option<f64>, length: Duration) -> Result<Trial> {
    let mut stream = Stream::prepare(ends, mix)?;
    let trial = stream.trial(asked, length)?;
    stream.finish()?;
    Ok(trial)
}
