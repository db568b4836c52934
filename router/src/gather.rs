//! Makes superframes of TCP segments that came one by one.
//!
//! A pod whose stack does not segment late (`tso off`), or an underlay whose NIC or kernel merges nothing, hands over a stream in
//! frames of one segment. Everything behind here costs as much for one segment as for forty, and so does the
//! receiving pod's stack; copying a segment's payload costs a fortieth of that. So what lies in one vector is merged, by the
//! rules of [`weft_encap::coalesce`]. Nothing waits for a frame that may come.
//!
//! A few streams are merged at once. A frame joins the superframe that its stream has open, ahead of other streams'
//! frames, never ahead of its own stream's.

use arrayvec::ArrayVec;
use weft_encap::coalesce::{self, Merger};
use weft_encap::eth::{ETHERTYPE_IPV4, ETHERTYPE_IPV6};
use weft_encap::ip;
use weft_encap::offload::Partial;

use crate::frame::{Body, Frame, Super};
use crate::pool::Pool;
use crate::port::Batch;
use crate::stats::Stats;

/// Streams that are merged at once.
const OPEN: usize = 4;

/// Shorter frames are left alone: to merge them saves little, and most are acknowledgements, which must not be merged.
const SHORTEST: usize = 512;

/// A superframe in the making.
struct Open {
    /// Where in the batch its first frame is.
    at: usize,
    merger: Merger,
    /// The payload of all frames but the first.
    payload: Option<Super>,
    len: usize,
}

/// Merges what belongs together. The frames were counted as received; those that vanish are counted as merged.
pub fn gather(batch: &mut Batch, pool: &Pool, stats: &mut Stats) {
    if !batch.windows(2).any(|pair| is_segment(&pair[0]) && is_segment(&pair[1])) {
        return;
    }
    let mut open = ArrayVec::<Open, OPEN>::new();
    let mut kept = 0;
    for index in 0..batch.len() {
        if open.iter_mut().any(|open| open.join(batch, index, pool)) {
            stats.port(batch[index].ingress()).merged += 1;
            continue;
        }
        // What did not join ends its stream's superframe: nothing that follows may overtake it.
        while let Some(place) = open.iter().position(|open| may_be_one_stream(&batch[open.at], &batch[index])) {
            open.remove(place).close(batch);
        }
        batch.swap(kept, index);
        if let Some(merger) = begin(&batch[kept]) {
            if open.is_full() {
                open.remove(0).close(batch);
            }
            open.push(Open { at: kept, merger, payload: None, len: 0 });
        }
        kept += 1;
    }
    open.into_iter().for_each(|open| open.close(batch));
    batch.truncate(kept);
}

impl Open {
    /// Takes the payload of a frame in, if it continues this stream.
    fn join(&mut self, batch: &Batch, index: usize, pool: &Pool) -> bool {
        let (first, next) = (&batch[self.at], &batch[index]);
        if !is_segment(next) || !same_way(first, next) {
            return false;
        }
        let (Some(first_bytes), Some(bytes)) = (inner(first), inner(next)) else { return false };
        let mut merger = self.merger;
        let Some(range) = merger.push(first_bytes, bytes, partial(next)) else { return false };
        let payload = &bytes[range];
        if self.payload.is_none() {
            self.payload = pool.large();
        }
        let room = self.payload.as_mut().and_then(Super::bytes_mut);
        let Some(room) = room.and_then(|room| room.get_mut(self.len..self.len + payload.len())) else { return false };
        room.copy_from_slice(payload);
        self.len += payload.len();
        self.merger = merger;
        true
    }

    /// Makes the first frame the superframe.
    fn close(self, batch: &mut Batch) {
        let (frame, run) = (&mut batch[self.at], self.merger.run());
        let Some(payload) = self.payload.filter(|_| run.frames > 1) else { return };
        let base = frame.base();
        // Padding would lie between the payloads.
        frame.truncate(base + run.header_len + run.first_payload);
        frame.offload = coalesce::finish(&mut frame.head_mut()[base..], run);
        frame.attach(Body::one(payload, 0, self.len));
    }
}

fn inner(frame: &Frame) -> Option<&[u8]> {
    frame.head().get(frame.base()..)
}

fn partial(frame: &Frame) -> Option<Partial> {
    frame.offload.partial
}

/// Whether a frame may be one segment among others: no superframe, all of it in its head, TCP.
fn is_segment(frame: &Frame) -> bool {
    let long = frame.len() >= SHORTEST && frame.body().is_none() && frame.offload.gso.is_none();
    long && inner(frame).is_some_and(|bytes| stream(bytes).is_some_and(|(protocol, _)| protocol == ip::TCP))
}

fn begin(frame: &Frame) -> Option<Merger> {
    let bytes = inner(frame).filter(|_| is_segment(frame))?;
    Merger::begin(bytes, partial(frame))
}

/// Whether two frames came from the same sender by the same tunnel.
fn same_way(first: &Frame, next: &Frame) -> bool {
    let tunnel = ..first.base();
    first.ingress() == next.ingress()
        && first.outer == next.outer
        && first.head().get(tunnel) == next.head().get(tunnel)
}

/// Whether to exchange two frames could exchange what one stream sent; also if that cannot be told.
fn may_be_one_stream(first: &Frame, next: &Frame) -> bool {
    let (first, next) = (inner(first).and_then(stream), inner(next).and_then(stream));
    first.is_none() || next.is_none() || first == next
}

/// Protocol, and the bytes that hold addresses and ports, of a plain TCP or UDP packet.
fn stream(bytes: &[u8]) -> Option<(u8, &[u8])> {
    let (protocol, stream) = match u16::from_be_bytes(*bytes.get(12..)?.first_chunk()?) {
        ETHERTYPE_IPV4 if bytes.get(14) == Some(&0x45) => (bytes.get(23)?, bytes.get(26..38)?),
        ETHERTYPE_IPV6 => (bytes.get(20)?, bytes.get(22..58)?),
        _ => return None,
    };
    matches!(*protocol, ip::TCP | ip::UDP).then_some((*protocol, stream))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use etherparse::PacketBuilder;
    use weft_encap::checksum;
    use weft_encap::offload::{GsoKind, Offload};

    use super::*;
    use crate::port::PortId;
    use crate::port::software::Cut;

    const PORT: PortId = PortId(2);

    /// A TCP segment of 1,000 bytes, all `fill`, at `seq` of the stream from this port, with IPv4 id `id`.
    fn segment(pool: &Pool, port: u16, seq: u32, id: u16, fill: u8) -> Frame {
        let (src, dst) = ([10, 0, 0, 1], [10, 0, 0, 2]);
        let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]).ipv4(src, dst, 64);
        let mut bytes = Vec::new();
        builder.tcp(port, 80, seq, 100).ack(7).write(&mut bytes, &[fill; 1000]).unwrap();
        bytes[18..20].copy_from_slice(&id.to_be_bytes());
        bytes[24..26].fill(0);
        let sum = checksum::ipv4_header(&bytes[14..34]);
        bytes[24..26].copy_from_slice(&sum.to_be_bytes());
        Frame::from_bytes(&bytes, PORT, pool).unwrap()
    }

    /// The same with a checksum that is still to be filled in.
    fn unfinished(mut frame: Frame) -> Frame {
        let (src, dst) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2));
        let sum = checksum::pseudo_v4(src, dst, ip::TCP, 1020).fold();
        frame.head_mut()[50..52].copy_from_slice(&sum.to_be_bytes());
        frame.offload.partial = Some(Partial { start: 34, offset: 16 });
        frame
    }

    fn gathered(frames: Vec<Frame>, pool: &Pool) -> (Vec<Frame>, u64) {
        let (mut batch, mut stats) = (Batch::new(), Stats::default());
        frames.into_iter().for_each(|frame| batch.push(frame));
        gather(&mut batch, pool, &mut stats);
        (batch.into_iter().collect(), stats.of(PORT).merged)
    }

    /// The frames that a superframe is cut into.
    fn cut(frame: &Frame) -> Vec<Vec<u8>> {
        let cut = Cut::new(frame, 0).unwrap();
        let one = |index| {
            let mut header = [0; 256];
            let len = cut.write(index, &mut header);
            let payload = cut.payload(index).flatten().copied().collect::<Vec<_>>();
            [&header[..len], &payload].concat()
        };
        (0..cut.count()).map(one).collect()
    }

    #[test]
    fn segments_in_a_row_become_a_superframe_that_cuts_into_what_they_were() {
        let pool = Pool::new(64, 8).unwrap();
        let frames: Vec<Frame> = (0..5).map(|n| segment(&pool, 1, 1000 * n, n as u16, n as u8)).collect();
        let before: Vec<Vec<u8>> = frames.iter().map(Frame::to_vec).collect();
        let (after, merged) = gathered(frames, &pool);
        assert_eq!((after.len(), merged), (1, 4));
        assert_eq!(after[0].offload.gso.map(|gso| (gso.kind, gso.size)), Some((GsoKind::Tcp4, 1000)));
        assert_eq!(cut(&after[0]), before);
        drop(after);
        assert_eq!(pool.free(), (64, 8));
    }

    #[test]
    fn a_checksum_that_is_still_to_be_filled_in_is_as_good_as_a_correct_one() {
        let pool = Pool::new(64, 8).unwrap();
        let whole: Vec<Vec<u8>> = (0..3).map(|n| segment(&pool, 1, 1000 * n, n as u16, 9).to_vec()).collect();
        let frames = (0..3).map(|n| unfinished(segment(&pool, 1, 1000 * n, n as u16, 9))).collect();
        let (after, merged) = gathered(frames, &pool);
        assert_eq!((after.len(), merged), (1, 2));
        assert_eq!(cut(&after[0]), whole);
    }

    #[test]
    fn a_wrong_checksum_joins_nothing_and_keeps_its_place() {
        let pool = Pool::new(64, 8).unwrap();
        let mut frames: Vec<Frame> = (0..4).map(|n| segment(&pool, 1, 1000 * n, n as u16, n as u8)).collect();
        frames[1].head_mut()[100] ^= 1;
        let wrong = frames[1].to_vec();
        let (after, merged) = gathered(frames, &pool);
        assert_eq!((after.len(), merged), (3, 1));
        assert_eq!(after[1].to_vec(), wrong);
        assert_eq!((after[0].offload, after[1].offload), (Offload::default(), Offload::default()));
        assert_eq!(cut(&after[2]).len(), 2);
    }

    #[test]
    fn streams_that_alternate_are_each_merged_and_none_is_reordered() {
        let pool = Pool::new(64, 8).unwrap();
        let frames =
            (0..12u32).map(|n| segment(&pool, 1 + (n % 3) as u16, 1000 * (n / 3), (n / 3) as u16, n as u8)).collect();
        let (after, merged) = gathered(frames, &pool);
        assert_eq!((after.len(), merged), (3, 9));
        for (stream, frame) in after.iter().enumerate() {
            let fills: Vec<u8> = cut(frame).iter().map(|segment| segment[60]).collect();
            assert_eq!(fills, [0, 3, 6, 9].map(|n| n + stream as u8));
        }
    }

    #[test]
    fn what_does_not_continue_a_stream_ends_its_superframe() {
        let pool = Pool::new(64, 8).unwrap();
        let order = [0, 1, 5, 2, 3];
        let frames = order.map(|n| segment(&pool, 1, 1000 * n, n as u16, n as u8)).into_iter().collect();
        let (after, merged) = gathered(frames, &pool);
        let all: Vec<u8> = after
            .iter()
            .flat_map(|frame| match frame.offload.gso {
                Some(_) => cut(frame).iter().map(|segment| segment[60]).collect(),
                None => vec![frame.head()[60]],
            })
            .collect();
        assert_eq!((all, merged), (vec![0, 1, 5, 2, 3], 2));
    }

    #[test]
    fn without_a_buffer_nothing_is_merged_and_nothing_lost() {
        let pool = Pool::new(64, 0).unwrap();
        let frames: Vec<Frame> = (0..3).map(|n| segment(&pool, 1, 1000 * n, n as u16, 1)).collect();
        let before: Vec<Vec<u8>> = frames.iter().map(Frame::to_vec).collect();
        let (after, merged) = gathered(frames, &pool);
        assert_eq!((after.iter().map(Frame::to_vec).collect::<Vec<_>>(), merged), (before, 0));
    }

    #[test]
    fn frames_of_different_nodes_stay_apart() {
        let pool = Pool::new(64, 8).unwrap();
        let from = |n: u32| {
            let mut frame = segment(&pool, 1, 1000 * n, n as u16, n as u8);
            frame.push(weft_encap::vxlan::VXLAN_LEN).unwrap().fill(0);
            let peer = Ipv4Addr::new(192, 0, 2, (n / 2) as u8).into();
            frame.outer = Some(crate::frame::Outer::vxlan(peer));
            frame
        };
        let (after, merged) = gathered((0..4).map(from).collect(), &pool);
        assert_eq!((after.len(), merged), (2, 2));
        assert!(after.iter().all(|frame| frame.offload.gso.is_some() && frame.outer.is_some()));
    }
}
