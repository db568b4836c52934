//! Buffer memory: two regions of equal-sized buffers, handed out as owning handles.
//!
//! A [`Chunk`] has one owner, as a `Box` has: dropping it gives the buffer back. A [`Super`] may be shared
//! for reading by a count; it can be written only while it has one owner. Both keep the
//! region alive, so a handle can outlive the [`Arena`] that made it. Nothing here is `Send`: buffers stay on
//! their worker's thread, so counts and free lists need no atomics.
//!
//! A chunk carries a note of the caller's type, which lies in a place of its own and never moves. Whoever keeps there what is
//! known of the chunk's content passes 16 bytes on, not the content's description: a struct that was written field
//! by field a moment ago is slow to copy, as the processor cannot forward several small stores to one wide load.
//!
//! This is unsafe because a `Box` per buffer would go through the allocator for each frame, and because the chunks
//! must lie in one region for AF_XDP (a UMEM).

use std::cell::{Cell, RefCell, UnsafeCell};
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::rc::Rc;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

struct Region<N> {
    base: NonNull<u8>,
    size: usize,
    count: u32,
    free: RefCell<Vec<u32>>,
    shares: Box<[Cell<u32>]>,
    /// A buffer's note is initialised while a handle refers to it. Memory is touched only when used.
    notes: Box<[UnsafeCell<MaybeUninit<N>>]>,
}

impl<N> Region<N> {
    /// Where a buffer's note is.
    #[inline(always)]
    fn note(&self, index: u32) -> *mut MaybeUninit<N> {
        debug_assert!(index < self.count);
        // SAFETY: there are `count` notes, and handles and the free list hold nothing but indexes below `count`; this is asked
        // some ten times for each frame.
        unsafe { self.notes.get_unchecked(index as usize).get() }
    }
}

impl<N: Default> Region<N> {
    fn new(size: usize, count: u32) -> std::io::Result<Rc<Region<N>>> {
        let bytes = size * count as usize;
        // SAFETY: an anonymous private mapping at an address of the kernel's choice aliases nothing. It cannot be
        // avoided: this memory is handed to the kernel as a whole later, and stays untouched until first use.
        let base = unsafe {
            mmap_anonymous(std::ptr::null_mut(), bytes.max(1), ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)?
        };
        let base = NonNull::new(base.cast::<u8>()).expect("mmap never returns null on success");
        // The lowest numbers are on top: a quiet worker touches few pages.
        let free = RefCell::new((0..count).rev().collect());
        let shares = (0..count).map(|_| Cell::new(0)).collect();
        let notes = Box::new_uninit_slice(count as usize);
        // SAFETY: a slice of cells that may be uninitialised needs no initialisation. Filling it instead would touch all of
        // its memory.
        let notes: Box<[UnsafeCell<MaybeUninit<N>>]> = unsafe { notes.assume_init() };
        Ok(Rc::new(Region { base, size, count, free, shares, notes }))
    }

    fn take(&self) -> Option<u32> {
        let index = self.free.borrow_mut().pop()?;
        self.shares[index as usize].set(1);
        // SAFETY: the index came from the free list, so no handle refers to this note; the cell is ours to write.
        unsafe { (*self.note(index)).write(N::default()) };
        Some(index)
    }
}

impl<N> Region<N> {
    /// Gives up one share; the last one frees the buffer.
    fn release(&self, index: u32) {
        let shares = &self.shares[index as usize];
        let left = shares.get() - 1;
        shares.set(left);
        if left == 0 {
            // SAFETY: this was the last handle, and the note is initialised since `take`; it is not read again before the next
            // `take` writes it.
            unsafe { (*self.note(index)).assume_init_drop() };
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

impl<N> Drop for Region<N> {
    fn drop(&mut self) {
        // SAFETY: `base` and the length are those of the mapping made in `new`, and every handle holds an `Rc` of
        // this region, so none is left. A failure leaks memory, nothing more.
        unsafe {
            let _ = munmap(self.base.as_ptr().cast(), (self.size * self.count as usize).max(1));
        }
    }
}

/// A small buffer with one owner, and its note.
pub struct Chunk<N> {
    region: Rc<Region<N>>,
    index: u32,
}

impl<N> Chunk<N> {
    /// Its number in the arena, from zero; stable while it lives.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Its note.
    #[inline]
    pub fn note(&self) -> &N {
        // SAFETY: the note is initialised while a handle lives, and only this handle refers to it; it is written only through
        // `&mut self`.
        unsafe { (*self.region.note(self.index)).assume_init_ref() }
    }

    /// Its note, for writing.
    #[inline]
    pub fn note_mut(&mut self) -> &mut N {
        self.parts_mut().0
    }

    /// Its note and its bytes, both for writing.
    #[inline]
    pub fn parts_mut(&mut self) -> (&mut N, &mut [u8]) {
        // SAFETY: as in `note` and `deref`: `&mut self` makes both borrows exclusive, and they are of different memory.
        unsafe {
            let note = (*self.region.note(self.index)).assume_init_mut();
            (note, std::slice::from_raw_parts_mut(self.region.pointer(self.index), self.region.size))
        }
    }
}

impl<N> Deref for Chunk<N> {
    type Target = [u8];
    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: the buffer is `size` initialised bytes (zeroed by mmap), and only this handle refers to it, because
        // an index is on the free list or in exactly one `Chunk`.
        unsafe { std::slice::from_raw_parts(self.region.pointer(self.index), self.region.size) }
    }
}

impl<N> DerefMut for Chunk<N> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        self.parts_mut().1
    }
}

impl<N> Drop for Chunk<N> {
    #[inline]
    fn drop(&mut self) {
        self.region.release(self.index);
    }
}

/// A large buffer that several frames may read.
pub struct Super {
    region: Rc<Region<()>>,
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

/// The buffers of one worker; chunks have notes of type `N`.
pub struct Arena<N> {
    chunks: Rc<Region<N>>,
    supers: Rc<Region<()>>,
}

impl<N: Default> Arena<N> {
    /// Maps `chunks` buffers of `chunk_size` and `supers` buffers of `super_size` bytes; pages are used on first touch.
    ///
    /// # Errors
    /// The kernel's, if it refuses the mapping.
    pub fn new(chunk_size: usize, chunks: u32, super_size: usize, supers: u32) -> std::io::Result<Arena<N>> {
        Ok(Arena { chunks: Region::new(chunk_size, chunks)?, supers: Region::new(super_size, supers)? })
    }

    /// A free chunk, with whatever bytes its last owner left and a new note.
    pub fn chunk(&self) -> Option<Chunk<N>> {
        self.chunks.take().map(|index| Chunk { region: Rc::clone(&self.chunks), index })
    }

    /// A free super buffer, with whatever bytes its last owner left.
    pub fn large(&self) -> Option<Super> {
        self.supers.take().map(|index| Super { region: Rc::clone(&self.supers), index })
    }

    /// How many chunks and super buffers are free.
    pub fn free(&self) -> (usize, usize) {
        (self.chunks.free.borrow().len(), self.supers.free.borrow().len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_chunk_is_given_out_again_and_no_chunk_twice() {
        let arena = Arena::<u64>::new(2048, 2, 4096, 1).unwrap();
        let mut first = arena.chunk().unwrap();
        let mut second = arena.chunk().unwrap();
        assert!(arena.chunk().is_none());
        first.fill(1);
        second.fill(2);
        assert!(first.iter().all(|&byte| byte == 1));
        *first.note_mut() = 7;
        drop(first);
        assert_eq!(arena.chunk().map(|chunk| *chunk.note()), Some(0));
        assert!(second.iter().all(|&byte| byte == 2));
    }

    #[test]
    fn a_shared_buffer_is_written_only_by_its_last_owner() {
        let arena = Arena::<u64>::new(2048, 1, 4096, 1).unwrap();
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
    fn a_handle_outlives_its_arena() {
        let arena = Arena::<u64>::new(2048, 1, 4096, 1).unwrap();
        let mut chunk = arena.chunk().unwrap();
        drop(arena);
        chunk[2047] = 9;
        assert_eq!(chunk[2047], 9);
    }
}
