//! A large slice of zeros whose memory is used when it is touched.
//!
//! A vector of zeros whose elements are aligned to cache lines is filled, and so takes all of its memory at once; a table
//! for many flows on a node with few would cost megabytes for nothing. Pages from the kernel are zero, aligned, and nobody's until
//! they are written.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use zerocopy::FromZeros;

/// The slice. See the module's essay.
pub struct Lazy<T> {
    base: NonNull<T>,
    len: usize,
}

// SAFETY: it owns its memory as a `Vec` does, so it may go wherever its elements may. A raw pointer hides that from the
// compiler.
unsafe impl<T: Send> Send for Lazy<T> {}
// SAFETY: a `&Lazy` gives `&T` alone, as a shared slice does.
unsafe impl<T: Sync> Sync for Lazy<T> {}

impl<T: FromZeros> Lazy<T> {
    /// `len` elements of zeros.
    ///
    /// # Panics
    /// If they do not fit into the address space, or are aligned to more than a page.
    pub fn zeroed(len: usize) -> Lazy<T> {
        assert!(align_of::<T>() <= 4096);
        let bytes = size_of::<T>().checked_mul(len).expect("the length fits into memory").max(1);
        // SAFETY: an anonymous private mapping at an address of the kernel's choice aliases nothing. There is no safe way to
        // have memory that is zero and not yet used.
        let base = unsafe {
            mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
        };
        let base = base.expect("the kernel has address space to give").cast::<T>();
        Lazy { base: NonNull::new(base).expect("mmap never returns null on success"), len }
    }
}

impl<T> Deref for Lazy<T> {
    type Target = [T];
    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: the mapping holds `len` elements, aligned as a page is, and zeros are valid for `T`, which `zeroed` asked for.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Lazy<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `&mut self` makes the borrow exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }
}

impl<T> Drop for Lazy<T> {
    fn drop(&mut self) {
        // SAFETY: `base` and the length are those of the mapping made in `zeroed`. What implements `FromZeros` may own
        // something only by a bug of its own, so nothing but the memory is given back.
        unsafe {
            let _ = munmap(self.base.as_ptr().cast(), (size_of::<T>() * self.len).max(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_never_written_is_zero_and_what_was_written_stays() {
        let mut slice = Lazy::<u64>::zeroed(1 << 20);
        assert_eq!((slice.len(), slice[0], slice[(1 << 20) - 1]), (1 << 20, 0, 0));
        slice[77] = 7;
        assert_eq!((slice[76], slice[77], slice[78]), (0, 7, 0));
        assert!(Lazy::<u64>::zeroed(0).is_empty());
    }
}
