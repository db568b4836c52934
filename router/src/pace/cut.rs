//! Superframes towards a slow pod go as the packets that they stand for.
//!
//! At a low rate one superframe keeps a bucket busy for half a second, and a queue of a tenth of a second holds none: whole
//! superframes would be lost, each a large part of what its sender has under way, and TCP waits for its timers. As packets they fit
//! the queue, leave it evenly, and only what is too much ends. Linux's `tbf` does the same. What is too much to wait is not cut
//! before it ends, and nothing is cut when buffers are short.

use crate::frame::Frame;
use crate::pace::{Bucket, cost};
use crate::pool::{HEAD_ROOM_FOR_FRAME, Pool};
use crate::port::Queue;
use crate::port::software::{Cut, HEADERS};
use crate::stats::Stats;
use crate::time::Instant;

/// Packets that a superframe is cut into at most.
const MOST: usize = 64;

/// Cuts what is coarse for `limit`, as far as the queue can hold it. `spare` chunks are left to others.
pub fn to_packets(queue: &mut Queue, limit: &Bucket, now: Instant, pool: &Pool, spare: usize, stats: &mut Stats) {
    if !queue.iter().any(|frame| limit.is_coarse(frame)) {
        return;
    }
    let room = limit.queue().saturating_add(limit.room(now) as u64);
    let mut bytes = 0_u64;
    for _ in 0..queue.len() {
        let Some(frame) = queue.pop_front() else { return };
        let waits = bytes < room && pool.free().0 > spare + MOST;
        bytes = bytes.saturating_add(cost(&frame));
        let packets = if waits && limit.is_coarse(&frame) { cut(&frame, pool, queue) } else { 0 };
        match packets {
            0 => queue.push_back(frame),
            packets => stats.port(frame.ingress()).splits += packets - 1,
        }
    }
}

/// Appends the packets that a superframe stands for. Returns how many; 0 if it stays whole.
fn cut(frame: &Frame, pool: &Pool, queue: &mut Queue) -> u64 {
    let Ok(cut) = Cut::new(frame, 0) else { return 0 };
    let (before, count) = (queue.len(), cut.count());
    if count > MOST || cut.len(0) > HEAD_ROOM_FOR_FRAME {
        return 0;
    }
    let mut bytes = [0; HEAD_ROOM_FOR_FRAME];
    for index in 0..count {
        let mut end = cut.write(index, &mut bytes[..HEADERS]);
        for piece in cut.payload(index) {
            bytes[end..end + piece.len()].copy_from_slice(piece);
            end += piece.len();
        }
        let Some(packet) = Frame::from_bytes(&bytes[..end], frame.ingress(), pool) else {
            queue.truncate(before);
            return 0;
        };
        queue.push_back(packet);
    }
    count as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pace::Limit;
    use crate::port::{PortId, sample};

    const NOW: Instant = Instant(1_000_000_000_000);

    fn superframe(pool: &Pool, len: usize) -> Frame {
        let packet = sample::tcp4(len, 1400).0;
        let mut frame = Frame::from_bytes(&packet.bytes, PortId(1), pool).unwrap();
        frame.offload = packet.offload;
        frame
    }

    /// How long the frames are that are left of some superframes, at this rate.
    fn left(rate: u64, superframes: usize, chunks: u32) -> Vec<usize> {
        let pool = Pool::new(chunks, 16).unwrap();
        let limit = Bucket::new(Limit { rate, burst: 0 });
        let (mut queue, mut stats) = (Queue::new(), Stats::default());
        for _ in 0..superframes {
            let frame = superframe(&pool, 56_000);
            stats.received(&frame);
            queue.push_back(frame);
        }
        to_packets(&mut queue, &limit, NOW, &pool, 100, &mut stats);
        assert_eq!(stats.of(PortId(1)).in_flight(), queue.len() as i64);
        let lengths = queue.iter().map(|frame| frame.len()).collect();
        drop(queue);
        assert_eq!(pool.free(), (chunks as usize, 16));
        lengths
    }

    #[test]
    fn at_a_low_rate_what_fits_the_queue_is_cut_and_the_rest_is_left_to_end_whole() {
        let (packet, whole) = (1454, 56_054);
        assert_eq!(left(1_000_000_000, 3, 1024), [whole; 3]);
        assert_eq!(left(10_000_000, 1, 1024), [packet; 40]);
        // 128 KiB and a burst of 50 ms are two superframes and a part of another.
        let lengths = left(1_000_000, 5, 1024);
        assert_eq!(lengths[..120], [packet; 120]);
        assert_eq!(lengths[120..], [whole; 2]);
    }

    #[test]
    fn where_buffers_are_short_nothing_is_cut() {
        assert_eq!(left(1_000_000, 2, 165), [56_054; 2]);
    }

    #[test]
    fn the_packets_are_what_a_device_would_have_made_of_it() {
        let pool = Pool::new(256, 4).unwrap();
        let frame = superframe(&pool, 5000);
        let mut queue = Queue::new();
        assert_eq!(cut(&frame, &pool, &mut queue), 4);
        let plan = Cut::new(&frame, 0).unwrap();
        for (index, packet) in queue.iter().enumerate() {
            let mut expected = vec![0; 54];
            plan.write(index, &mut expected);
            plan.payload(index).for_each(|piece| expected.extend_from_slice(piece));
            assert_eq!((packet.to_vec(), packet.offload), (expected, weft_encap::offload::Offload::default()));
        }
    }
}
