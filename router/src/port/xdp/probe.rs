//! Whether AF_XDP works here: frames are sent through a veth both of whose ends lead to sockets, the smallest and the largest, each way.

use std::io;
use std::time::{Duration, Instant};

use weft_encap::mac::Mac;

use super::channel::{ROOM, XdpDevice};
use super::port::XdpPort;
use crate::frame::{Body, Frame};
use crate::pool::Pool;
use crate::port::sys::xsk::Umem;
use crate::port::{Batch, Capabilities, Port, PortId, Queue};
use crate::stats::Stats;

/// How long a frame may take through a device that does nothing but hand it over.
const PATIENCE: Duration = Duration::from_secs(1);
/// The smallest frame of Ethernet, without its check sequence.
const SMALLEST: usize = 60;
const HEADER: usize = 14;
/// IEEE 802's local experimental type 1: nobody else understands it.
const EXPERIMENTAL: [u8; 2] = [0x88, 0xb5];

/// Tries the two ends of a veth, by their numbers in the calling thread's namespace. They are up and have this MTU. Returns what the
/// kernel does with frames.
///
/// # Errors
/// The kernel's, with what it refused; `TimedOut` if a frame did not arrive, `InvalidData` if it arrived changed.
pub fn probe(ends: [u32; 2], mtu: u32) -> io::Result<Capabilities> {
    let pool = Pool::new(1024, 4)?;
    let umem = Umem::of(pool.arena());
    let open = |end: u32, number| XdpPort::new(XdpDevice::open(end, &umem)?, &pool, PortId(number));
    let (mut one, mut two) = (open(ends[0], 1)?, open(ends[1], 2)?);
    for len in [SMALLEST, HEADER + mtu as usize] {
        let bytes = pattern(len, Mac::BROADCAST, Mac([2, 0, 0, 0, 0, 1]));
        pass(&pool, &bytes, &mut one, &mut two)?;
        pass(&pool, &bytes, &mut two, &mut one)?;
    }
    Ok(one.capabilities())
}

/// A frame that is nobody's protocol.
pub(super) fn pattern(len: usize, to: Mac, from: Mac) -> Vec<u8> {
    let header = [&to.0[..], &from.0, &EXPERIMENTAL].concat();
    header.into_iter().chain((0..=250).cycle()).take(len).collect()
}

fn pass(pool: &Pool, bytes: &[u8], from: &mut XdpPort, to: &mut XdpPort) -> io::Result<()> {
    let no_buffer = || io::Error::new(io::ErrorKind::OutOfMemory, "no buffer is free");
    let (mut stats, mut batch) = (Stats::default(), Batch::new());
    let mut queue = Queue::from([frame(pool, bytes).ok_or_else(no_buffer)?]);
    let deadline = Instant::now() + PATIENCE;
    loop {
        from.transmit(&mut queue, &mut stats)?;
        to.receive(pool, &mut batch, &mut stats)?;
        for received in batch.drain(..).map(|frame| frame.to_vec()) {
            if received == bytes {
                return Ok(());
            }
            if received.get(12..HEADER) == Some(&EXPERIMENTAL) {
                let what = format!("a frame of {} bytes arrived changed", bytes.len());
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
        }
        if Instant::now() > deadline {
            let what = format!("a frame of {} bytes did not arrive", bytes.len());
            return Err(io::Error::new(io::ErrorKind::TimedOut, what));
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// These bytes as a frame that was received from nowhere.
pub(super) fn frame(pool: &Pool, bytes: &[u8]) -> Option<Frame> {
    let (mut chunk, start) = pool.chunk()?;
    let (head, rest) = bytes.split_at(bytes.len().min(ROOM / 2));
    chunk[start..start + head.len()].copy_from_slice(head);
    let frame = Frame::new(chunk, start, head.len(), PortId(0));
    if rest.is_empty() {
        return Some(frame);
    }
    let mut large = pool.large()?;
    large.bytes_mut()?.get_mut(..rest.len())?.copy_from_slice(rest);
    Some(frame.with_body(Body::one(large, 0, rest.len()), 0))
}
