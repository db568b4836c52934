//! Conversations on reserved ports that are not pods': those of the node's programs, and of whoever its kernel translates.
//!
//! The kernel does not ask whose ports are reserved. What came back and is nobody's here is the kernel's, so a pod's session must not look
//! the same from outside: its answers would go to the pod (CVE-2021-3773 is about that). What is remembered is a fingerprint made with a
//! secret, in a table of fixed size, where a newer one replaces an older one. Outsiders can have entries made by sending what is not
//! asked for; whoever chooses ports therefore believes only so many towards one destination.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use weft_encap::ip;
use zerocopy::FromZeros;

use crate::flow::{FlowKey, Seed};
use crate::time::Instant;

const CELLS: usize = 8192;
/// As long as sessions of pods are kept at most.
const PATIENCE_TCP: Duration = Duration::from_secs(7440);
const PATIENCE: Duration = Duration::from_secs(300);

/// The table: of each word the upper half is a fingerprint, the lower one when it was seen, in seconds.
pub(super) struct Strangers {
    cells: Vec<AtomicU64>,
}

impl Strangers {
    pub(super) fn new() -> Strangers {
        Strangers { cells: AtomicU64::new_vec_zeroed(CELLS).expect("64 KiB can be had") }
    }

    /// A packet of this flow came back and was the kernel's.
    pub(super) fn note(&self, flow: &FlowKey, seed: &Seed, now: Instant) {
        let (cell, print) = self.place(flow, seed);
        cell.store(print | u64::from(now.seconds()), Relaxed);
    }

    /// Whether this flow was the kernel's a while ago.
    pub(super) fn know(&self, flow: &FlowKey, seed: &Seed, now: Instant) -> bool {
        let (cell, print) = self.place(flow, seed);
        let word = cell.load(Relaxed);
        let patience = if flow.protocol() == ip::TCP { PATIENCE_TCP } else { PATIENCE };
        word & UPPER == print && u64::from(now.seconds().saturating_sub(word as u32)) <= patience.as_secs()
    }

    fn place(&self, flow: &FlowKey, seed: &Seed) -> (&AtomicU64, u64) {
        let hash = flow.hash(seed);
        // A cell of zeros is nobody's.
        (&self.cells[hash as usize % CELLS], (hash & UPPER) | 1 << 63)
    }
}

const UPPER: u64 = !0 << 32;
