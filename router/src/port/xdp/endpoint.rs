//! A socket's rings and its chunks as one thing: receiving and sending without the kernel, so to speak.
//!
//! Nothing here makes a system call; with rings in plain memory all of it runs in tests.
//!
//! A device holds chunks to receive into even while it is quiet, and what it holds nobody else has. The first devices of a worker hold
//! many, as a burst may come before the worker has woken up; the more devices there are, the less the next one holds, down to a few, so that
//! a thousand fit. A busy
//! device holds more only as long as half of the worker's chunks are free, and goes back to little when they become scarce.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::port::sys::arena::{Arena, Chunk};
use crate::port::sys::lending::{Lender, Wrong};
use crate::port::sys::xsk::{Descriptor, Rings};

/// Chunks that any device holds, to receive into, as long as there are enough: the fragments of the largest datagram at an MTU of 1500.
const LEAST: u32 = 64;
/// Below this part of all chunks being free there are not, and a new device holds a [`PORTION`] of the free ones.
const ENOUGH: f32 = 0.35;
/// See [`ENOUGH`].
const PORTION: f32 = 1.0 / 450.0;
/// With fewer no device works.
const FEWEST: u32 = 4;
/// A new device holds this part of those free chunks that are more than [`AMPLE`] of all.
const SHARE: f32 = 0.25;
/// See [`SHARE`]. Above [`PLENTY`], so that busy devices find what they need.
const AMPLE: f32 = 0.75;
/// What a device holds at least once it is busy.
const FIRST_STEP: u32 = 256;
/// After so many batches that needed a small part of what a device holds, it holds half as many.
const PATIENCE: u32 = 4096;

/// Above this part of all chunks being free, a device may hold more than a quiet one.
const PLENTY: f32 = 0.5;
/// Below this part it does not hold more for long.
const SCARCE: f32 = 0.25;

/// A frame that was received, or a part of one.
pub struct Piece {
    /// Where it lies.
    pub chunk: Chunk,
    /// Where it begins there.
    pub start: usize,
    /// Its length.
    pub len: usize,
}

/// Rings with their account. See the module's essay.
pub struct Endpoint {
    rings: Rings,
    lender: Lender,
    /// Chunks that the kernel should have to receive into. A burst has to fit; 2 KiB for each of thousands of quiet devices would
    /// be much.
    target: u32,
    /// What it holds while it is quiet, unless chunks are scarce.
    quiet: u32,
    easy: u32,
}

impl Endpoint {
    /// Takes the rings over. Their memory must be the arena's. Without `receives` the kernel gets no chunks to receive into.
    pub fn new(rings: Rings, arena: &Arena, receives: bool) -> Endpoint {
        let lender = Lender::new(arena);
        let (free, count) = (lender.free(), lender.count() as f32);
        let share = ((free - AMPLE) * SHARE * count) as u32;
        let least = if free > ENOUGH { LEAST } else { ((free * PORTION * count) as u32).clamp(FEWEST, LEAST) };
        let quiet = if receives { share.max(least).min(rings.fill.size()) } else { 0 };
        let mut endpoint = Endpoint { rings, lender, target: quiet, quiet, easy: 0 };
        endpoint.refill();
        endpoint
    }

    /// Takes what was received next, and says whether the one after it continues the frame. `None` if there is nothing.
    pub fn receive(&mut self) -> Option<(Result<Piece, Wrong>, bool)> {
        let descriptor = self.rings.receive.pop()?;
        let received = self.lender.received(descriptor.address, descriptor.len);
        let len = descriptor.len as usize;
        Some((received.map(|(chunk, start)| Piece { chunk, start, len }), descriptor.is_continued()))
    }

    /// Ends a batch of `count` received frames: the kernel gets places and chunks back.
    pub fn received(&mut self, count: usize) {
        if count > 0 {
            self.rings.receive.release();
        }
        let waiting = self.rings.receive.available();
        self.adapt(count as u32 + waiting);
        self.refill();
    }

    /// Whether there are frames to receive.
    pub fn has_more(&mut self) -> bool {
        self.rings.receive.available() > 0
    }

    /// A free chunk, to write a frame to.
    pub fn chunk(&self) -> Option<Chunk> {
        self.lender.chunk()
    }

    /// Entries of the transmit ring.
    pub fn ring(&self) -> u32 {
        self.rings.transmit.size()
    }

    /// How many frames can be sent. Looks at the kernel's side only if it seems to be less than `wanted`.
    pub fn room(&mut self, wanted: u32) -> u32 {
        self.rings.transmit.room(wanted)
    }

    /// Sends bytes of a chunk, if there is room and they can be lent: not, if the chunk is of another worker. `describe` adds what
    /// more there is to say.
    #[must_use]
    pub fn send(
        &mut self,
        chunk: &Chunk,
        start: usize,
        len: usize,
        describe: impl FnOnce(Descriptor) -> Descriptor,
    ) -> bool {
        if self.rings.transmit.room(1) == 0 {
            return false;
        }
        let Some(address) = self.lender.lend_filled(chunk, start, len) else { return false };
        let pushed = self.rings.transmit.push(describe(Descriptor::plain(address, len)));
        debug_assert!(pushed, "there was room");
        pushed
    }

    /// Lets the kernel see what was sent. Returns how much it has still to do.
    pub fn submit(&mut self) -> u32 {
        self.rings.transmit.submit();
        self.rings.transmit.unread()
    }

    /// Whether the kernel wants to be told that there is something to send.
    pub fn needs_wakeup(&self) -> bool {
        self.rings.transmit.needs_wakeup()
    }

    /// Takes chunks back whose frames were sent. Returns how many.
    pub fn complete(&mut self) -> usize {
        let mut count = 0;
        while let Some(address) = self.rings.completion.pop() {
            // One that is not believed has freed nothing.
            count += usize::from(self.lender.transmitted(address).is_ok());
        }
        self.rings.completion.release();
        count
    }

    /// How many chunks the kernel has, to receive into and to send.
    pub fn lent(&self) -> (u32, u32) {
        self.lender.lent()
    }

    /// Ends it. Its chunks are free when `released` is set, which says that the kernel uses none of them any more.
    pub fn abandon(&mut self, released: Arc<AtomicBool>) {
        self.lender.abandon(released);
    }

    /// Whether the kernel has nothing to receive into, because there was no free chunk. It will not call for more.
    pub fn is_starved(&self) -> bool {
        self.target > 0 && self.lender.lent().0 == 0
    }

    fn refill(&mut self) {
        let mut pushed = false;
        let target = if self.lender.free() < SCARCE { self.target.min(self.quiet).min(LEAST) } else { self.target };
        while self.lender.lent().0 < target && self.rings.fill.room(1) > 0 {
            let Some(address) = self.lender.lend_empty() else { break };
            pushed |= self.rings.fill.push(address);
        }
        if pushed {
            self.rings.fill.submit();
        }
    }

    /// Holds more chunks as soon as bursts come near to what is held, and fewer when they have not for long.
    fn adapt(&mut self, count: u32) {
        let most = self.rings.fill.size();
        if count * 4 > self.target && self.lender.free() > PLENTY {
            (self.target, self.easy) = ((self.target * 2).max(FIRST_STEP).min(most), 0);
        } else if count * 16 < self.target {
            self.easy += 1;
            if self.easy >= PATIENCE {
                (self.target, self.easy) = ((self.target / 2).max(self.quiet), 0);
            }
        }
    }
}
