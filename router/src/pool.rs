//! Where frames get their buffers.
//!
//! Two classes: chunks of [`CHUNK`] bytes hold a frame's headers (and all of a small frame), super buffers of [`SUPER`]
//! bytes hold the payload of superframes. The first byte of a frame varies from chunk to chunk ("colouring"), since chunks
//! lie at a power of two and the headers of a batch would otherwise share a few sets of the L1 cache.

use std::io;

use crate::port::sys::arena::{Arena, Chunk, Super};

/// Bytes of a chunk; also the chunk size of an AF_XDP UMEM.
pub const CHUNK: usize = 2048;

/// Bytes of a super buffer: the largest UDP datagram or TAP frame, and a line so that buffers do not share sets.
pub const SUPER: usize = 65_536 + 128;

/// Room before the first byte of a received frame, for a virtio header and for encapsulation.
pub const HEADROOM: usize = 128;

/// How many bytes of a received frame are sure to fit in its chunk.
pub const HEAD_ROOM_FOR_FRAME: usize = CHUNK - HEADROOM - (COLOURS - 1) * COLOUR;

const COLOURS: usize = 4;
const COLOUR: usize = 64;

/// The buffers of one worker.
pub struct Pool {
    arena: Arena,
}

impl Pool {
    /// A pool of so many chunks and super buffers. Memory is touched only when used.
    ///
    /// # Errors
    /// The kernel's, if it refuses the mapping.
    pub fn new(chunks: u32, supers: u32) -> io::Result<Pool> {
        Ok(Pool { arena: Arena::new(CHUNK, chunks, SUPER, supers)? })
    }

    /// The same with its chunks in huge pages, if there are as many. Those are all there at once, so this is for what the kernel keeps
    /// in memory anyway, for AF_XDP.
    ///
    /// # Errors
    /// The kernel's, if it refuses the mapping.
    pub fn in_huge_pages(chunks: u32, supers: u32) -> io::Result<Pool> {
        Ok(Pool { arena: Arena::with(CHUNK, chunks, SUPER, supers, true)? })
    }

    /// A free chunk, and the offset at which a frame's first byte should lie in it.
    pub fn chunk(&self) -> Option<(Chunk, usize)> {
        let chunk = self.arena.chunk()?;
        let start = HEADROOM + (chunk.index() as usize % COLOURS) * COLOUR;
        Some((chunk, start))
    }

    /// A free super buffer.
    pub fn large(&self) -> Option<Super> {
        self.arena.large()
    }

    /// Its memory, for devices that are lent buffers.
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    /// How many chunks and super buffers are free.
    pub fn free(&self) -> (usize, usize) {
        self.arena.free()
    }
}
