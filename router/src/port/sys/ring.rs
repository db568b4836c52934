//! Rings between this program and the kernel: one writes, the other reads, neither waits.
//!
//! A ring is memory with two counters and a power of two of entries. The producer counts what it has written, the
//! consumer what it has read; both counters run on for ever and wrap. An entry belongs to the producer until its counter passes it
//! (stored with *release*, so that the entry is there before), and to the consumer (which loads with *acquire*) until its counter
//! does. Each side keeps copies of both counters and touches shared memory once per batch.
//!
//! What the other side writes is not trusted: it can make an entry wrong, but not a count larger than the ring.
//! Rings can lie in plain memory, so all of this is tested without a kernel.
//!
//! Read first: <https://docs.kernel.org/networking/af_xdp.html#rings>.

use std::io;
use std::marker::PhantomData;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// `XDP_RING_NEED_WAKEUP`: <https://elixir.bootlin.com/linux/v6.18/A/ident/XDP_RING_NEED_WAKEUP>.
const NEED_WAKEUP: u32 = 1;

/// Memory that rings lie in.
#[derive(Debug)]
pub struct Memory {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: it is a mapping that belongs to nobody else in this process, and it can be unmapped by any thread.
unsafe impl Send for Memory {}
// SAFETY: a `&Memory` gives access through [`Producer`] and [`Consumer`] only, which use atomics and volatile accesses.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps `len` bytes of a ring that the kernel has made at `offset` of a descriptor.
    ///
    /// # Errors
    /// The kernel's.
    pub fn map(fd: impl AsFd, offset: u64, len: usize) -> io::Result<Memory> {
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: a mapping at an address of the kernel's choice aliases nothing of ours. No safe wrapper of mmap exists.
        let base = unsafe { mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags, fd, offset)? };
        Ok(Memory { base: NonNull::new(base.cast()).expect("mmap never returns null on success"), len })
    }

    /// Zeros, for both ends of a ring within this process.
    ///
    /// # Errors
    /// The kernel's.
    pub fn plain(len: usize) -> io::Result<Memory> {
        // SAFETY: as in `map`.
        let base = unsafe {
            mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)?
        };
        Ok(Memory { base: NonNull::new(base.cast()).expect("mmap never returns null on success"), len })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: base and length are those of the mapping, and every ring in it holds an `Arc` of this.
        unsafe {
            let _ = munmap(self.base.as_ptr().cast(), self.len);
        }
    }
}

/// Where the parts of a ring lie in its memory, in bytes.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The producer's counter.
    pub producer: usize,
    /// The consumer's counter.
    pub consumer: usize,
    /// Flags.
    pub flags: usize,
    /// The first entry.
    pub entries: usize,
}

impl Layout {
    /// A layout with each part on a cache line of its own.
    pub const PLAIN: Layout = Layout { producer: 0, consumer: 64, flags: 128, entries: 192 };

    /// Bytes of memory for a ring of `size` entries.
    pub fn len<T>(&self, size: u32) -> usize {
        self.entries + size as usize * size_of::<T>()
    }
}

/// What a ring holds: any bytes are one.
pub trait Entry: Copy + FromBytes + IntoBytes + Immutable {}
impl<T: Copy + FromBytes + IntoBytes + Immutable> Entry for T {}

#[derive(Debug)]
struct Ring<T> {
    memory: Arc<Memory>,
    layout: Layout,
    mask: u32,
    entry: PhantomData<T>,
}

impl<T: Entry> Ring<T> {
    fn new(memory: Arc<Memory>, layout: Layout, size: u32) -> io::Result<Ring<T>> {
        let aligned = [layout.producer, layout.consumer, layout.flags].iter().all(|at| at.is_multiple_of(4))
            && layout.entries.is_multiple_of(align_of::<T>());
        let inside = [layout.producer, layout.consumer, layout.flags].iter().all(|at| at + 4 <= memory.len)
            && layout.len::<T>(size) <= memory.len;
        if !size.is_power_of_two() || !aligned || !inside {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a ring does not lie in its memory"));
        }
        Ok(Ring { memory, layout, mask: size - 1, entry: PhantomData })
    }

    fn counter(&self, at: usize) -> &AtomicU32 {
        // SAFETY: `new` checked that four aligned bytes lie there, which stay mapped while `self` is borrowed; any bits
        // are a valid `AtomicU32`, and nobody accesses these bytes otherwise than atomically. There is no safe view of a mapping.
        unsafe { AtomicU32::from_ptr(self.memory.base.as_ptr().add(at).cast()) }
    }

    fn producer(&self) -> &AtomicU32 {
        self.counter(self.layout.producer)
    }

    fn consumer(&self) -> &AtomicU32 {
        self.counter(self.layout.consumer)
    }

    fn slot(&self, index: u32) -> *mut T {
        // SAFETY: `new` checked that all entries lie in the memory, aligned, and the mask keeps the index below their number.
        unsafe { self.memory.base.as_ptr().add(self.layout.entries).cast::<T>().add((index & self.mask) as usize) }
    }

    fn read(&self, index: u32) -> T {
        // SAFETY: the slot is valid and aligned, and any bytes are a `T`. Volatile, since the other side may break the
        // protocol and write meanwhile: then the value is any bytes, read once.
        unsafe { self.slot(index).read_volatile() }
    }

    fn write(&self, index: u32, entry: T) {
        // SAFETY: the slot is valid and aligned, and this process has one producer of the ring, borrowed mutably.
        unsafe { self.slot(index).write_volatile(entry) }
    }

    fn size(&self) -> u32 {
        self.mask + 1
    }
}

/// The end that writes.
#[derive(Debug)]
pub struct Producer<T> {
    ring: Ring<T>,
    /// What was written, whether the other side has been told or not.
    written: u32,
    /// What the other side had read when it was last looked at.
    read: u32,
}

impl<T: Entry> Producer<T> {
    /// The writing end of a ring of `size` entries.
    ///
    /// # Errors
    /// `InvalidInput` if it does not lie in the memory, or the size is no power of two.
    pub fn new(memory: Arc<Memory>, layout: Layout, size: u32) -> io::Result<Producer<T>> {
        let ring = Ring::new(memory, layout, size)?;
        let written = ring.producer().load(Ordering::Relaxed);
        let read = ring.consumer().load(Ordering::Acquire);
        Ok(Producer { ring, written, read })
    }

    /// How many entries can be written. Looks at the other side only if it seems to be less than `wanted`.
    pub fn room(&mut self, wanted: u32) -> u32 {
        if self.known_room() < wanted {
            self.read = self.ring.consumer().load(Ordering::Acquire);
        }
        self.known_room()
    }

    fn known_room(&self) -> u32 {
        // A consumer that claims to have read what was not written yet is taken for one that has read nothing.
        self.ring.size().saturating_sub(self.written.wrapping_sub(self.read))
    }

    /// Writes an entry, which the other side sees after [`Producer::submit`]. `false` if the ring is full.
    #[must_use]
    pub fn push(&mut self, entry: T) -> bool {
        if self.room(1) == 0 {
            return false;
        }
        self.ring.write(self.written, entry);
        self.written = self.written.wrapping_add(1);
        true
    }

    /// Lets the other side see what was written.
    pub fn submit(&mut self) {
        self.ring.producer().store(self.written, Ordering::Release);
    }

    /// How many entries were written and not read yet.
    pub fn unread(&mut self) -> u32 {
        self.read = self.ring.consumer().load(Ordering::Acquire);
        self.written.wrapping_sub(self.read).min(self.ring.size())
    }

    /// Whether the other side has to be woken to go on.
    pub fn needs_wakeup(&self) -> bool {
        self.ring.counter(self.ring.layout.flags).load(Ordering::Relaxed) & NEED_WAKEUP != 0
    }

    /// How many entries it can hold.
    pub fn size(&self) -> u32 {
        self.ring.size()
    }
}

/// The end that reads.
#[derive(Debug)]
pub struct Consumer<T> {
    ring: Ring<T>,
    /// What the other side had written when it was last looked at.
    written: u32,
    /// What was read, whether the other side has been told or not.
    read: u32,
}

impl<T: Entry> Consumer<T> {
    /// The reading end of a ring of `size` entries.
    ///
    /// # Errors
    /// `InvalidInput` if it does not lie in the memory, or the size is no power of two.
    pub fn new(memory: Arc<Memory>, layout: Layout, size: u32) -> io::Result<Consumer<T>> {
        let ring = Ring::new(memory, layout, size)?;
        let read = ring.consumer().load(Ordering::Relaxed);
        let written = ring.producer().load(Ordering::Acquire);
        Ok(Consumer { ring, written, read })
    }

    /// How many entries can be read. Looks at the other side only if none is known of.
    pub fn available(&mut self) -> u32 {
        if self.written == self.read {
            self.written = self.ring.producer().load(Ordering::Acquire);
        }
        let available = self.written.wrapping_sub(self.read);
        // A producer that claims more than the ring can hold is not believed at all.
        if available > self.ring.size() { 0 } else { available }
    }

    /// Reads an entry, whose place the other side gets back after [`Consumer::release`].
    pub fn pop(&mut self) -> Option<T> {
        if self.available() == 0 {
            return None;
        }
        let entry = self.ring.read(self.read);
        self.read = self.read.wrapping_add(1);
        Some(entry)
    }

    /// Gives the places of what was read back.
    pub fn release(&mut self) {
        self.ring.consumer().store(self.read, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(size: u32, start: u32) -> (Producer<u64>, Consumer<u64>, Arc<Memory>) {
        let memory = Arc::new(Memory::plain(Layout::PLAIN.len::<u64>(size)).unwrap());
        let ring = Ring::<u64>::new(Arc::clone(&memory), Layout::PLAIN, size).unwrap();
        ring.producer().store(start, Ordering::Relaxed);
        ring.consumer().store(start, Ordering::Relaxed);
        let producer = Producer::new(Arc::clone(&memory), Layout::PLAIN, size).unwrap();
        (producer, Consumer::new(Arc::clone(&memory), Layout::PLAIN, size).unwrap(), memory)
    }

    #[test]
    fn entries_come_out_in_order_also_where_the_counters_wrap() {
        let (mut producer, mut consumer, _) = pair(8, u32::MAX - 5);
        for round in 0..10_u64 {
            assert_eq!(producer.room(8), 8);
            for entry in 0..7 {
                assert!(producer.push(round * 7 + entry));
            }
            assert_eq!(consumer.pop(), None, "nothing is seen before it is submitted");
            producer.submit();
            assert_eq!(consumer.available(), 7);
            let read: Vec<u64> = std::iter::from_fn(|| consumer.pop()).collect();
            assert_eq!(read, (round * 7..round * 7 + 7).collect::<Vec<_>>());
            assert_eq!(producer.room(8), 1, "places are given back by release");
            consumer.release();
        }
    }

    #[test]
    fn a_full_ring_takes_no_more_and_loses_nothing() {
        let (mut producer, mut consumer, _) = pair(4, 0);
        assert_eq!((0..6).filter(|&entry| producer.push(entry)).count(), 4);
        producer.submit();
        assert_eq!(producer.unread(), 4);
        assert_eq!(consumer.pop(), Some(0));
        consumer.release();
        assert!(producer.push(9) && !producer.push(10));
        producer.submit();
        let left: Vec<u64> = std::iter::from_fn(|| consumer.pop()).collect();
        assert_eq!(left, [1, 2, 3, 9]);
    }

    #[test]
    fn a_counter_that_lies_makes_no_entry() {
        let (mut producer, mut consumer, memory) = pair(4, 0);
        let ring = Ring::<u64>::new(memory, Layout::PLAIN, 4).unwrap();
        ring.producer().store(5, Ordering::Release);
        assert_eq!((consumer.available(), consumer.pop()), (0, None));
        ring.consumer().store(1_000, Ordering::Release);
        assert_eq!(producer.room(5), 0, "the other side cannot have read what was not written");
        assert!(!producer.push(1));
    }

    #[test]
    fn the_flag_asks_for_a_wakeup() {
        let (producer, _, memory) = pair(4, 0);
        assert!(!producer.needs_wakeup());
        let ring = Ring::<u64>::new(memory, Layout::PLAIN, 4).unwrap();
        ring.counter(Layout::PLAIN.flags).store(NEED_WAKEUP, Ordering::Relaxed);
        assert!(producer.needs_wakeup());
    }

    #[test]
    fn a_ring_lies_in_its_memory() {
        let memory = Arc::new(Memory::plain(4096).unwrap());
        let fits = |layout, size| Producer::<u64>::new(Arc::clone(&memory), layout, size).is_ok();
        assert!(fits(Layout::PLAIN, 256));
        assert!(!fits(Layout::PLAIN, 512) && !fits(Layout::PLAIN, 100) && !fits(Layout::PLAIN, 0));
        assert!(!fits(Layout { producer: 4094, ..Layout::PLAIN }, 4));
        assert!(!fits(Layout { consumer: 2, ..Layout::PLAIN }, 4));
        assert!(!fits(Layout { entries: 4, ..Layout::PLAIN }, 4));
    }

    #[test]
    fn two_threads_pass_every_entry_once_and_in_order() {
        const COUNT: u64 = 200_000;
        let (mut producer, mut consumer, _) = pair(64, u32::MAX - 100);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut next = 0;
                while next < COUNT {
                    while next < COUNT && producer.push(next) {
                        next += 1;
                    }
                    producer.submit();
                    std::thread::yield_now();
                }
            });
            let mut expected = 0;
            while expected < COUNT {
                while let Some(entry) = consumer.pop() {
                    assert_eq!(entry, expected);
                    expected += 1;
                }
                consumer.release();
                std::thread::yield_now();
            }
        });
    }
}
