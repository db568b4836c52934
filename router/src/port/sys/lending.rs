//! Chunks lent to the kernel, and what comes back: one owner at any time.
//!
//! The kernel gets a chunk's number by a ring and gives it back by another. This keeps account of which chunks it has
//! and for what; a number that comes back is believed only if it was lent, for that purpose, and not given back since. So a
//! descriptor is checked once, in release builds too, where it becomes a [`Chunk`]: one that lies outside of the region, straddles
//! a chunk, or names one that the kernel does not have makes no handle, and no second owner.
//!
//! For receiving, a chunk without handle is lent. For transmitting, the kernel reads what a handle still refers to;
//! the handle may go meanwhile, and the chunk is free when the kernel is done too.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::arena::{Arena, Chunk, Chunks};

/// What the kernel has a chunk for.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Use {
    None,
    Receive,
    Transmit,
}

/// Why something that came back is not believed.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// It lies outside of the region.
    Outside,
    /// The chunk is not lent for this purpose, or came back before.
    NotLent,
    /// The chunk is right, and is taken back, but the bytes do not lie in it.
    Straddles,
}

/// The account. See the module's essay.
pub struct Lender {
    chunks: Chunks,
    size: usize,
    uses: Box<[Use]>,
    receiving: u32,
    transmitting: u32,
}

impl Lender {
    /// Nothing is lent.
    pub fn new(arena: &Arena) -> Lender {
        let chunks = arena.chunks();
        let (_, size, count) = chunks.area();
        Lender { chunks, size, uses: vec![Use::None; count as usize].into(), receiving: 0, transmitting: 0 }
    }

    /// How many chunks there are.
    pub fn count(&self) -> usize {
        self.uses.len()
    }

    /// What part of the chunks is free, from 0 to 1.
    pub fn free(&self) -> f32 {
        self.chunks.free() as f32 / self.uses.len() as f32
    }

    /// A free chunk for us.
    pub fn chunk(&self) -> Option<Chunk> {
        self.chunks.take().map(|index| self.chunks.adopt(index))
    }

    /// Lends a free chunk to be received into. Returns its address in the region; `None` if none is free.
    pub fn lend_empty(&mut self) -> Option<u64> {
        let index = self.chunks.take()?;
        debug_assert_eq!(self.uses[index as usize], Use::None);
        self.uses[index as usize] = Use::Receive;
        self.receiving += 1;
        Some(index as u64 * self.size as u64)
    }

    /// Takes a received frame back: its chunk, and where it begins in there.
    ///
    /// # Errors
    /// See [`Wrong`]. Whatever it is, no chunk gets a second owner.
    pub fn received(&mut self, address: u64, len: u32) -> Result<(Chunk, usize), Wrong> {
        let (index, start) = self.back(address, Use::Receive)?;
        self.receiving -= 1;
        let chunk = self.chunks.adopt(index);
        if start + len as usize > self.size {
            return Err(Wrong::Straddles);
        }
        Ok((chunk, start))
    }

    /// Lends bytes of a chunk to be read, until they come back by [`Lender::transmitted`]. Until then nobody may write to
    /// the chunk. Returns their address; `None` if the chunk is of another arena or lent already, or they do not lie in it.
    pub fn lend_filled(&mut self, chunk: &Chunk, start: usize, len: usize) -> Option<u64> {
        if start + len > self.size || self.uses.get(chunk.index() as usize) != Some(&Use::None) {
            return None;
        }
        let index = self.chunks.hold(chunk)?;
        self.uses[index as usize] = Use::Transmit;
        self.transmitting += 1;
        Some(index as u64 * self.size as u64 + start as u64)
    }

    /// Takes back what was transmitted.
    ///
    /// # Errors
    /// See [`Wrong`].
    pub fn transmitted(&mut self, address: u64) -> Result<(), Wrong> {
        let (index, _) = self.back(address, Use::Transmit)?;
        self.transmitting -= 1;
        self.chunks.release(index);
        Ok(())
    }

    /// How many chunks the kernel has, to receive into and to transmit.
    pub fn lent(&self) -> (u32, u32) {
        (self.receiving, self.transmitting)
    }

    /// Ends the account. What is still lent is free when `released` is set, which says that the kernel uses nothing of it any more.
    pub fn abandon(&mut self, released: Arc<AtomicBool>) {
        let mut indexes = Vec::new();
        for (index, lent) in self.uses.iter_mut().enumerate() {
            if std::mem::replace(lent, Use::None) != Use::None {
                indexes.push(index as u32);
            }
        }
        self.chunks.abandon(indexes, released);
        (self.receiving, self.transmitting) = (0, 0);
    }

    /// The number of the chunk at an address that came back, and the offset in there.
    fn back(&mut self, address: u64, from: Use) -> Result<(u32, usize), Wrong> {
        let (number, start) = (address / self.size as u64, address % self.size as u64);
        let index = usize::try_from(number).map_err(|_| Wrong::Outside)?;
        let lent = self.uses.get_mut(index).ok_or(Wrong::Outside)?;
        if *lent != from {
            return Err(Wrong::NotLent);
        }
        *lent = Use::None;
        Ok((index as u32, start as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    const SIZE: u64 = 2048;

    fn lender(count: u32) -> (Arena, Lender) {
        let arena = Arena::new(SIZE as usize, count, 4096, 1).unwrap();
        let lender = Lender::new(&arena);
        (arena, lender)
    }

    #[test]
    fn a_chunk_that_is_lent_is_not_free_and_comes_back_once() {
        let (arena, mut lender) = lender(2);
        let address = lender.lend_empty().unwrap();
        assert_eq!((arena.free().0, lender.lent()), (1, (1, 0)));
        let (chunk, start) = lender.received(address + 256, 60).unwrap();
        assert_eq!((start, u64::from(chunk.index()) * SIZE), (256, address));
        assert_eq!(lender.received(address + 256, 60).err(), Some(Wrong::NotLent), "twice");
        drop(chunk);
        assert_eq!((arena.free().0, lender.lent()), (2, (0, 0)));
    }

    #[test]
    fn descriptors_out_of_range_straddling_or_not_lent_make_no_handle() {
        let (arena, mut lender) = lender(4);
        let address = lender.lend_empty().unwrap();
        assert_eq!(lender.received(4 * SIZE, 60).err(), Some(Wrong::Outside));
        assert_eq!(lender.received(u64::MAX, u32::MAX).err(), Some(Wrong::Outside));
        assert_eq!(lender.received(address + SIZE, 60).err(), Some(Wrong::NotLent), "a neighbour");
        assert_eq!(lender.transmitted(address).err(), Some(Wrong::NotLent), "lent for the other purpose");
        assert_eq!(lender.received(address + SIZE - 10, 11).err(), Some(Wrong::Straddles));
        assert_eq!((arena.free().0, lender.lent()), (4, (0, 0)), "the chunk itself is not lost");
        let address = lender.lend_empty().unwrap();
        assert_eq!(lender.received(address + SIZE - 10, u32::MAX).err(), Some(Wrong::Straddles));
        assert_eq!(arena.free().0, 4);
    }

    #[test]
    fn what_is_being_transmitted_is_free_when_both_are_done_with_it() {
        let (arena, mut lender) = lender(2);
        for handle_first in [true, false] {
            let chunk = arena.chunk().unwrap();
            let address = lender.lend_filled(&chunk, 300, 60).unwrap();
            assert!(lender.lend_filled(&chunk, 300, 60).is_none(), "twice");
            if handle_first {
                drop(chunk);
                assert_eq!(arena.free().0, 1);
                lender.transmitted(address).unwrap();
            } else {
                lender.transmitted(address).unwrap();
                assert_eq!(arena.free().0, 1);
                drop(chunk);
            }
            assert_eq!((arena.free().0, lender.lent()), (2, (0, 0)));
            assert_eq!(lender.transmitted(address).err(), Some(Wrong::NotLent));
        }
    }

    #[test]
    fn a_chunk_of_another_arena_and_bytes_outside_of_it_are_not_lent() {
        let (arena, mut lender) = lender(1);
        let (other, _) = super::tests::lender(1);
        assert!(lender.lend_filled(&other.chunk().unwrap(), 0, 60).is_none());
        let chunk = arena.chunk().unwrap();
        assert!(lender.lend_filled(&chunk, 2000, 60).is_none());
        assert!(lender.lend_filled(&chunk, 1988, 60).is_some());
    }

    /// The kernel's own test of AF_XDP tries these on the transmit ring (`testapp_invalid_desc` of its selftest `xskxceiver`); here they
    /// come back by the receive ring, over chunks that are all lent.
    #[test]
    fn the_kernels_own_odd_descriptors_are_judged_by_where_they_lie() {
        const LEAST: u64 = 64;
        let (arena, mut lender) = lender(8);
        let end = 8 * SIZE;
        for (address, len, expected) in [
            (0, LEAST, Ok(())),
            (0_u64.wrapping_sub(2), LEAST, Err(Wrong::Outside)),
            (0, SIZE + 1, Err(Wrong::Straddles)),
            (0, u64::from(u32::MAX), Err(Wrong::Straddles)),
            (end - LEAST - 2 * SIZE, LEAST, Ok(())),
            (end - LEAST, LEAST, Ok(())),
            (end, LEAST, Err(Wrong::Outside)),
            (end - LEAST / 2, LEAST, Err(Wrong::Straddles)),
            (0x1000 - LEAST / 2, LEAST, Err(Wrong::Straddles)),
            (0x800 - LEAST / 2, LEAST, Err(Wrong::Straddles)),
            (0, 0, Ok(())),
        ] {
            while lender.lend_empty().is_some() {}
            let judged = lender.received(address, len as u32).map(drop);
            assert_eq!(judged, expected, "{address:#x}, {len} bytes");
            let back = u32::from(expected != Err(Wrong::Outside));
            assert_eq!((arena.free().0 as u32, lender.lent()), (back, (8 - back, 0)));
        }
    }

    #[test]
    fn random_descriptors_are_judged_as_a_plain_account_judges_them() {
        const COUNT: u64 = 32;
        let (arena, mut lender) = lender(COUNT as u32);
        let mut plain = std::collections::BTreeMap::new();
        let mut random = 7_u64;
        let mut next = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 24) % below
        };
        for _ in 0..1_000_000 {
            // Some beyond the end, and some far beyond.
            let address = next((COUNT + 2) * SIZE).wrapping_mul(if next(50) == 0 { 1 << 30 } else { 1 });
            let (chunk, len) = (address / SIZE, next(300) * next(12));
            match next(4) {
                0 => drop(lender.lend_empty().map(|address| plain.insert(address / SIZE, Use::Receive))),
                1 => {
                    let filled = arena.chunk().and_then(|chunk| lender.lend_filled(&chunk, 10, 60));
                    filled.map(|address| plain.insert(address / SIZE, Use::Transmit));
                }
                2 => {
                    let was = plain.get(&chunk) == Some(&Use::Receive);
                    let fits = address % SIZE + len <= SIZE;
                    let received = lender.received(address, len as u32).map(drop);
                    assert_eq!(received.is_ok(), was && fits, "{address:#x}, {len} bytes");
                    assert_eq!(received == Err(Wrong::Outside), chunk >= COUNT);
                    was.then(|| plain.remove(&chunk));
                }
                _ => {
                    let was = plain.get(&chunk) == Some(&Use::Transmit);
                    assert_eq!(lender.transmitted(address).is_ok(), was, "{address:#x}");
                    was.then(|| plain.remove(&chunk));
                }
            }
            let (receiving, transmitting) = lender.lent();
            assert_eq!(plain.len(), (receiving + transmitting) as usize);
            assert_eq!(arena.free().0, COUNT as usize - plain.len());
        }
    }

    #[test]
    fn what_a_closed_device_had_is_free_again() {
        let (arena, mut lender) = lender(8);
        let chunk = arena.chunk().unwrap();
        lender.lend_filled(&chunk, 0, 60).unwrap();
        drop(chunk);
        for _ in 0..5 {
            lender.lend_empty().unwrap();
        }
        assert_eq!((arena.free().0, lender.lent()), (2, (5, 1)));
        let released = Arc::new(AtomicBool::new(false));
        lender.abandon(Arc::clone(&released));
        assert_eq!((arena.free().0, lender.lent()), (2, (0, 0)));
        released.store(true, Ordering::Release);
        assert_eq!(arena.free().0, 8);
    }
}
