//! Buffer memory: two regions of equal-sized buffers, handed out as owning handles.
//!
//! A [`Chunk`] has one owner, as a `Box` has: dropping it gives the buffer back. A [`Super`] may be shared
//! for reading by a count; it can be written only while it has one owner. Both keep the
//! region alive, so a handle can outlive the [`Arena`] that made it. Nothing here is `Send`: buffers stay on
//! their worker's thread, so counts and free lists need no atomics.
//!
//! Beside each chunk, in a place of its own, stands what is known of the frame in it ([`Meta`]), while the chunk has a handle. So a
//! frame that moves is 16 bytes that move: a struct that was written field by field a moment ago is slow to copy, as the
//! processor cannot forward several small stores to one wide load.
//!
//! This is unsafe because a `Box` per buffer would go through the allocator for each frame, and because the chunks
//! must lie in one region for AF_XDP (a UMEM).

use std::cell::{Cell, RefCell, UnsafeCell};
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::frame::Meta;

struct Region {
    base: NonNull<u8>,
    /// Bytes of the mapping.
    len: usize,
    is_huge: bool,
    size: usize,
    count: u32,
    free: RefCell<Vec<u32>>,
    shares: Box<[Cell<u32>]>,
    abandoned: RefCell<Vec<Abandoned>>,
    /// One for each chunk, none for super buffers. Initialised while the chunk has a handle, whose it is.
    metas: Box<[UnsafeCell<MaybeUninit<Meta>>]>,
}

/// Buffers that a device had when it went, and whether the kernel has let go of them.
struct Abandoned {
    indexes: Vec<u32>,
    released: Arc<AtomicBool>,
}

/// Bytes of a huge page, the smaller kind that x86-64 and aarch64 have both.
const HUGE: usize = 2 << 20;

/// Maps memory of zeros: its address and length.
fn map(len: usize, flags: MapFlags) -> Result<(NonNull<u8>, usize), Errno> {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: an anonymous private mapping at an address of the kernel's choice aliases nothing. It cannot be
    // avoided: this memory is handed to the kernel as a whole later, and stays untouched until first use.
    let base = unsafe { mmap_anonymous(std::ptr::null_mut(), len, access, MapFlags::PRIVATE | flags)? };
    Ok((NonNull::new(base.cast()).expect("mmap never returns null on success"), len))
}

/// The same in huge pages, all of them there already: one that the kernel could not give when it is touched would end the
/// process, where the administrator has reserved some and a control group allows none.
fn map_huge(len: usize) -> Result<(NonNull<u8>, usize), Errno> {
    let (base, len) = map(len.next_multiple_of(HUGE), MapFlags::HUGETLB | MapFlags::HUGE_2MB)?;
    // SAFETY: the range is the mapping of just now, to which nothing refers yet; the advice makes its pages be there.
    let result = unsafe { madvise(base.as_ptr().cast(), len, Advice::LinuxPopulateWrite) };
    result.map(|()| (base, len)).inspect_err(|_| {
        // SAFETY: as above; a failure leaks address space, nothing more.
        let _ = unsafe { munmap(base.as_ptr().cast(), len) };
    })
}

impl Region {
    fn new(size: usize, count: u32, metas: u32, wants_huge: bool) -> std::io::Result<Rc<Region>> {
        let bytes = (size * count as usize).max(1);
        let huge = if wants_huge { map_huge(bytes).ok() } else { None };
        let is_huge = huge.is_some();
        let (base, len) = huge.map_or_else(|| map(bytes, MapFlags::empty()), Ok)?;
        // The lowest numbers are on top: a quiet worker touches few pages.
        let free = RefCell::new((0..count).rev().collect());
        let shares = (0..count).map(|_| Cell::new(0)).collect();
        let metas = Box::new_uninit_slice(metas as usize);
        // SAFETY: cells of what may be uninitialised need no initialisation. Filling them would touch memory that may never
        // be used.
        let metas: Box<[UnsafeCell<MaybeUninit<Meta>>]> = unsafe { metas.assume_init() };
        Ok(Rc::new(Region { base, len, is_huge, size, count, free, shares, abandoned: RefCell::default(), metas }))
    }

    fn take(&self) -> Option<u32> {
        let popped = self.free.borrow_mut().pop();
        let index = popped.or_else(|| {
            self.collect();
            self.free.borrow_mut().pop()
        })?;
        self.shares[index as usize].set(1);
        Some(index)
    }

    /// Frees what was abandoned and has been released since.
    fn collect(&self) {
        let released = |abandoned: &mut Abandoned| abandoned.released.load(Ordering::Acquire);
        let ripe: Vec<Abandoned> = self.abandoned.borrow_mut().extract_if(.., released).collect();
        ripe.iter().flat_map(|abandoned| &abandoned.indexes).for_each(|&index| self.release(index));
    }

    /// Gives up one share; the last one frees the buffer.
    fn release(&self, index: u32) {
        let shares = &self.shares[index as usize];
        let left = shares.get() - 1;
        shares.set(left);
        if left == 0 {
            self.free.borrow_mut().push(index);
        }
    }

    fn pointer(&self, index: u32) -> *mut u8 {
        debug_assert!(index < self.count);
        // SAFETY: `index` is below `count`, so the offset stays inside the mapping. Indexing a slice instead
        // would need one `&mut` over all buffers, which many handles cannot hold.
        unsafe { self.base.as_ptr().add(index as usize * self.size) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: `base` and the length are those of the mapping made in `new`, and every handle holds an `Rc` of
        // this region, so none is left. A failure leaks memory, nothing more.
        unsafe {
            let _ = munmap(self.base.as_ptr().cast(), self.len);
        }
    }
}

/// A small buffer with one owner.
pub struct Chunk {
    region: Rc<Region>,
    index: u32,
}

impl Chunk {
    /// The handle of a chunk that was taken and has none.
    fn new(region: &Rc<Region>, index: u32) -> Chunk {
        let cell = &region.metas[index as usize];
        // SAFETY: the chunk has no handle, so nothing refers to what the cell holds, nor is it initialised.
        unsafe { (*cell.get()).write(Meta::default()) };
        Chunk { region: Rc::clone(region), index }
    }

    #[inline(always)]
    fn cell(&self) -> *mut MaybeUninit<Meta> {
        // SAFETY: `new` has indexed this cell. It is asked for some ten times for each frame.
        unsafe { self.region.metas.get_unchecked(self.index as usize).get() }
    }

    /// What is known of the frame in it.
    #[inline(always)]
    pub fn meta(&self) -> &Meta {
        // SAFETY: it is initialised while this handle lives, and written only through `&mut self` of this, the only handle.
        unsafe { (*self.cell()).assume_init_ref() }
    }

    /// The same, for writing.
    #[inline(always)]
    pub fn meta_mut(&mut self) -> &mut Meta {
        self.parts_mut().0
    }

    /// What is known of the frame in it, and the bytes, both for writing.
    #[inline(always)]
    pub fn parts_mut(&mut self) -> (&mut Meta, &mut [u8]) {
        // SAFETY: as in `meta` and `deref`: `&mut self` makes both borrows exclusive, and they are of different memory.
        unsafe {
            let bytes = std::slice::from_raw_parts_mut(self.region.pointer(self.index), self.region.size);
            ((*self.cell()).assume_init_mut(), bytes)
        }
    }

    /// Its number in the arena, from zero; stable while it lives.
    pub fn index(&self) -> u32 {
        self.index
    }
}

impl Deref for Chunk {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the buffer is `size` initialised bytes (zeroed by mmap), and only this handle refers to it, because
        // an index is on the free list or in exactly one `Chunk`.
        unsafe { std::slice::from_raw_parts(self.region.pointer(self.index), self.region.size) }
    }
}

impl DerefMut for Chunk {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.parts_mut().1
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: this is the only handle, `new` has initialised the cell, and nobody reads it after this.
        unsafe { (*self.cell()).assume_init_drop() };
        self.region.release(self.index);
    }
}

/// A large buffer that several frames may read.
pub struct Super {
    region: Rc<Region>,
    index: u32,
}

impl Super {
    /// Another owner of the same bytes.
    pub fn share(&self) -> Super {
        let shares = &self.region.shares[self.index as usize];
        shares.set(shares.get() + 1);
        Super { region: Rc::clone(&self.region), index: self.index }
    }

    /// The bytes for writing, if this is the only owner.
    pub fn bytes_mut(&mut self) -> Option<&mut [u8]> {
        if self.region.shares[self.index as usize].get() != 1 {
            return None;
        }
        // SAFETY: as for `Chunk`; the count says that no other handle refers to this buffer, and `&mut self` keeps
        // one from being made while the borrow lasts.
        Some(unsafe { std::slice::from_raw_parts_mut(self.region.pointer(self.index), self.region.size) })
    }
}

impl Deref for Super {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the buffer is initialised; it is written only through `bytes_mut`, which needs the only handle
        // mutably, so no `&mut` overlaps this borrow.
        unsafe { std::slice::from_raw_parts(self.region.pointer(self.index), self.region.size) }
    }
}

impl Drop for Super {
    fn drop(&mut self) {
        self.region.release(self.index);
    }
}

/// The chunks of an arena by number, for [`lending`](super::lending) them to the kernel: a chunk that is lent has no handle, or one that
/// is not written to.
#[derive(Clone)]
pub(super) struct Chunks(Rc<Region>);

impl Chunks {
    /// Takes a free chunk without making a handle.
    pub(super) fn take(&self) -> Option<u32> {
        self.0.take()
    }

    /// Makes the handle of a chunk that was taken. It must not have one.
    pub(super) fn adopt(&self, index: u32) -> Chunk {
        debug_assert_eq!(self.0.shares[index as usize].get(), 1);
        Chunk::new(&self.0, index)
    }

    /// Keeps a chunk from being free when its handle goes. `None` if it is of another arena.
    pub(super) fn hold(&self, chunk: &Chunk) -> Option<u32> {
        if !Rc::ptr_eq(&self.0, &chunk.region) {
            return None;
        }
        let shares = &self.0.shares[chunk.index as usize];
        shares.set(shares.get() + 1);
        Some(chunk.index)
    }

    /// Gives up what [`Chunks::take`] or [`Chunks::hold`] gave.
    pub(super) fn release(&self, index: u32) {
        self.0.release(index);
    }

    /// How many are free.
    pub(super) fn free(&self) -> usize {
        self.0.free.borrow().len()
    }

    /// Gives up all of these as soon as `released` is set, by whoever closes the device.
    pub(super) fn abandon(&self, indexes: Vec<u32>, released: Arc<AtomicBool>) {
        self.0.abandoned.borrow_mut().push(Abandoned { indexes, released });
    }

    /// Address of the first, bytes of each, and how many there are.
    pub(super) fn area(&self) -> (usize, usize, u32) {
        (self.0.base.as_ptr() as usize, self.0.size, self.0.count)
    }
}

/// The buffers of one worker.
pub struct Arena {
    chunks: Rc<Region>,
    supers: Rc<Region>,
}

impl Arena {
    /// Maps `chunks` buffers of `chunk_size` and `supers` buffers of `super_size` bytes; pages are used on first touch.
    ///
    /// # Errors
    /// The kernel's, if it refuses the mapping.
    pub fn new(chunk_size: usize, chunks: u32, super_size: usize, supers: u32) -> std::io::Result<Arena> {
        Arena::with(chunk_size, chunks, super_size, supers, false)
    }

    /// The same, with the chunks in huge pages if `wants_huge` and there are as many: then they are all there at once.
    ///
    /// # Errors
    /// The kernel's, if it refuses the mapping.
    pub fn with(
        chunk_size: usize,
        chunks: u32,
        super_size: usize,
        supers: u32,
        wants_huge: bool,
    ) -> std::io::Result<Arena> {
        let chunks = Region::new(chunk_size, chunks, chunks, wants_huge)?;
        Ok(Arena { chunks, supers: Region::new(super_size, supers, 0, false)? })
    }

    /// Whether its chunks are in huge pages.
    pub fn is_huge(&self) -> bool {
        self.chunks.is_huge
    }

    /// A free chunk, with whatever bytes its last owner left.
    pub fn chunk(&self) -> Option<Chunk> {
        self.chunks.take().map(|index| Chunk::new(&self.chunks, index))
    }

    /// A free super buffer, with whatever bytes its last owner left.
    pub fn large(&self) -> Option<Super> {
        self.supers.take().map(|index| Super { region: Rc::clone(&self.supers), index })
    }

    /// The chunks by number.
    pub(super) fn chunks(&self) -> Chunks {
        Chunks(Rc::clone(&self.chunks))
    }

    /// How many chunks and super buffers are free.
    pub fn free(&self) -> (usize, usize) {
        self.chunks.collect();
        (self.chunks.free.borrow().len(), self.supers.free.borrow().len())
    }
}

#[cfg(test)]
impl Arena {
    /// What the kernel would read at an address of the chunks' region.
    pub(crate) fn peek(&self, address: u64, len: usize) -> Vec<u8> {
        (0..len).map(|at| self.chunks.byte(address as usize + at).get()).collect()
    }

    /// What the kernel would write there.
    pub(crate) fn poke(&self, address: u64, bytes: &[u8]) {
        bytes.iter().enumerate().for_each(|(at, byte)| self.chunks.byte(address as usize + at).set(*byte));
    }
}

#[cfg(test)]
impl Region {
    fn byte(&self, at: usize) -> &Cell<u8> {
        assert!(at < self.size * self.count as usize);
        // SAFETY: the byte lies in the mapping, which lives as long as `self`. Tests use this only for chunks that are
        // lent, to which nobody holds a reference meanwhile.
        unsafe { &*self.base.as_ptr().add(at).cast::<Cell<u8>>() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_chunk_is_given_out_again_and_no_chunk_twice() {
        let arena = Arena::new(2048, 2, 4096, 1).unwrap();
        let mut first = arena.chunk().unwrap();
        let mut second = arena.chunk().unwrap();
        assert!(arena.chunk().is_none());
        first.fill(1);
        second.fill(2);
        assert!(first.iter().all(|&byte| byte == 1));
        drop(first);
        assert!(arena.chunk().is_some());
        assert!(second.iter().all(|&byte| byte == 2));
    }

    #[test]
    fn a_shared_buffer_is_written_only_by_its_last_owner() {
        let arena = Arena::new(2048, 1, 4096, 1).unwrap();
        let mut one = arena.large().unwrap();
        let two = one.share();
        assert!(one.bytes_mut().is_none());
        drop(two);
        one.bytes_mut().unwrap()[0] = 7;
        assert_eq!(one[0], 7);
        assert_eq!(arena.free(), (1, 0));
        drop(one);
        assert_eq!(arena.free(), (1, 1));
    }

    #[test]
    fn what_was_abandoned_is_free_when_it_is_released() {
        let arena = Arena::new(2048, 3, 4096, 1).unwrap();
        let chunks = arena.chunks();
        let indexes = vec![chunks.take().unwrap(), chunks.take().unwrap()];
        let released = Arc::new(AtomicBool::new(false));
        chunks.abandon(indexes, Arc::clone(&released));
        let last = arena.chunk().unwrap();
        assert!(arena.chunk().is_none());
        released.store(true, Ordering::Release);
        let one = arena.chunk().unwrap();
        assert_eq!(arena.free().0, 1);
        drop((one, last));
        assert_eq!(arena.free().0, 3);
    }

    #[test]
    fn a_handle_outlives_its_arena() {
        let arena = Arena::new(2048, 1, 4096, 1).unwrap();
        let mut chunk = arena.chunk().unwrap();
        drop(arena);
        chunk[2047] = 9;
        assert_eq!(chunk[2047], 9);
    }
}
