//! The port over rings in plain memory, at whose other end the test plays the kernel.

use std::sync::Arc;

use arc_swap::ArcSwap;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use weft_encap::mac::Mac;
use weft_encap::offload::Offload;

use super::channel::Channel;
use super::outer::NextHop;
use super::programs::Tunnel;
use super::*;
use crate::drop_reason::DropReason;
use crate::frame::Frame;
use crate::pool::{CHUNK, Pool};
use crate::port::memory::{MemoryPort, Wire};
use crate::port::sys::ring::{Consumer, Layout, Memory, Producer};
use crate::port::sys::xsk::{Abilities, Descriptor, METADATA_LEN, Rings};
use crate::port::{Batch, Port, PortId, Queue, Received, sample};
use crate::stats::Stats;

const ID: PortId = PortId(1);
const OTHER: PortId = PortId(0);
/// Where AF_XDP puts a received frame in its chunk.
const XDP_HEADROOM: u64 = 256;

/// The other ends of the rings.
struct Kernel {
    fill: Consumer<u64>,
    completion: Producer<u64>,
    receive: Producer<Descriptor>,
    transmit: Consumer<Descriptor>,
}

fn rings(size: u32) -> (Rings, Kernel) {
    let memory = || Arc::new(Memory::plain(Layout::PLAIN.len::<Descriptor>(size)).unwrap());
    let [fill, completion, receive, transmit] = [memory(), memory(), memory(), memory()];
    let ours = Rings {
        fill: Producer::new(Arc::clone(&fill), Layout::PLAIN, size).unwrap(),
        completion: Consumer::new(Arc::clone(&completion), Layout::PLAIN, size).unwrap(),
        receive: Consumer::new(Arc::clone(&receive), Layout::PLAIN, size).unwrap(),
        transmit: Producer::new(Arc::clone(&transmit), Layout::PLAIN, size).unwrap(),
    };
    let kernel = Kernel {
        fill: Consumer::new(fill, Layout::PLAIN, size).unwrap(),
        completion: Producer::new(completion, Layout::PLAIN, size).unwrap(),
        receive: Producer::new(receive, Layout::PLAIN, size).unwrap(),
        transmit: Consumer::new(transmit, Layout::PLAIN, size).unwrap(),
    };
    (ours, kernel)
}

fn port(pool: &Pool, size: u32, checksum: bool) -> (XdpPort, Kernel) {
    let (ours, kernel) = rings(size);
    let (fd, _other) = socketpair(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::NONBLOCK, None).unwrap();
    let channel = Channel::over(ours, fd, Abilities { checksum, pieces: true }, pool, ID);
    (XdpPort::over(channel), kernel)
}

impl Kernel {
    /// Receives a frame, if there are chunks for it and places.
    fn deliver(&mut self, pool: &Pool, bytes: &[u8]) -> bool {
        let pieces = bytes.chunks(IN_ONE);
        let count = pieces.len() as u32;
        if self.receive.room(count) < count || self.fill.available() < count {
            return false;
        }
        for (index, piece) in (1..).zip(pieces) {
            let address = self.fill.pop().unwrap() + XDP_HEADROOM;
            pool.arena().poke(address, piece);
            let descriptor = Descriptor::plain(address, piece.len());
            assert!(self.receive.push(if index < count { descriptor.with_more() } else { descriptor }));
        }
        self.fill.release();
        self.receive.submit();
        true
    }

    /// Sends a frame: what it was, and the metadata before it.
    fn send(&mut self, pool: &Pool) -> Option<(Vec<u8>, Option<Vec<u8>>)> {
        let (mut bytes, mut metadata) = (Vec::new(), None);
        loop {
            let descriptor = self.transmit.pop()?;
            bytes.extend(pool.arena().peek(descriptor.address, descriptor.len as usize));
            if descriptor.has_metadata() {
                metadata = Some(pool.arena().peek(descriptor.address - METADATA_LEN as u64, METADATA_LEN));
            }
            assert!(self.completion.push(descriptor.address));
            self.transmit.release();
            self.completion.submit();
            if !descriptor.is_continued() {
                return Some((bytes, metadata));
            }
        }
    }
}

fn receive(port: &mut XdpPort, pool: &Pool, stats: &mut Stats) -> (Vec<Frame>, Received) {
    let mut batch = Batch::new();
    let received = port.receive(pool, &mut batch, stats).unwrap();
    (batch.drain(..).collect(), received)
}

fn frame(bytes: &[u8], offload: Offload, pool: &Pool, stats: &mut Stats) -> Frame {
    let mut frame = Frame::from_bytes(bytes, OTHER, pool).unwrap();
    frame.offload = offload;
    stats.received(&frame);
    frame
}

#[test]
fn a_received_frame_keeps_its_bytes_and_says_that_its_checksum_is_partial() {
    let pool = Pool::new(512, 4).unwrap();
    let (mut port, mut kernel) = port(&pool, 256, true);
    let mut stats = Stats::default();
    let (tcp, _) = sample::tcp4(1_400, 0);
    let mut finished = sample::udp4(18, 0).0;
    finished.offload.partial.take().unwrap().fill(&mut finished.bytes, []).unwrap();
    assert!(kernel.deliver(&pool, &tcp.bytes) && kernel.deliver(&pool, &finished.bytes));
    let (frames, received) = receive(&mut port, &pool, &mut stats);
    assert_eq!(received, Received::Drained);
    for (frame, packet) in frames.iter().zip([&tcp, &finished]) {
        assert_eq!((frame.to_vec(), frame.offload, frame.ingress()), (packet.bytes.clone(), packet.offload, ID));
    }
    assert_eq!((frames.len(), stats.of(ID).received), (2, 2));
    let held = pool.free().0;
    drop(frames);
    assert_eq!(pool.free().0, held + 2);
}

#[test]
fn a_partial_checksum_is_handed_on_or_filled_in() {
    for (metadata, packet) in
        [(true, sample::tcp4(1_000, 0)), (false, sample::tcp4(1_000, 0)), (true, sample::udp4(9, 0))]
    {
        let pool = Pool::new(512, 4).unwrap();
        let (mut port, mut kernel) = port(&pool, 256, metadata);
        assert_eq!(port.capabilities().partial_checksum, metadata);
        let mut stats = Stats::default();
        let (packet, payload) = packet;
        let partial = packet.offload.partial.unwrap();
        let mut queue = Queue::from([frame(&packet.bytes, packet.offload, &pool, &mut stats)]);
        port.transmit(&mut queue, &mut stats).unwrap();
        let (mut sent, told) = kernel.send(&pool).unwrap();
        assert_eq!(told.is_some(), metadata);
        if let Some(told) = told {
            assert_eq!(sent, packet.bytes, "the kernel completes it");
            let number = |at: usize| u16::from_ne_bytes([told[at], told[at + 1]]);
            assert_eq!((told[0], number(8), number(10)), (2, partial.start, partial.offset));
            partial.fill(&mut sent, []).unwrap();
        }
        assert_eq!(sample::verified_payload(&sent), payload);
        assert_eq!((stats.of(OTHER).sent, stats.of(OTHER).in_flight(), stats.of(ID).out), (1, 0, 1));
        assert_eq!(port.lent().1, 1);
        port.transmit(&mut queue, &mut stats).unwrap();
        assert_eq!(port.lent().1, 0, "what was sent comes back");
    }
}

#[test]
fn a_superframe_is_cut_and_summed() {
    let pool = Pool::new(512, 4).unwrap();
    let (mut port, mut kernel) = port(&pool, 256, true);
    let mut stats = Stats::default();
    let (packet, payload) = sample::tcp4(10_000, 1448);
    let mut queue = Queue::from([frame(&packet.bytes, packet.offload, &pool, &mut stats)]);
    port.transmit(&mut queue, &mut stats).unwrap();
    let segments: Vec<Vec<u8>> = std::iter::from_fn(|| kernel.send(&pool)).map(|(bytes, _)| bytes).collect();
    assert_eq!(segments.len(), 7);
    let received: Vec<u8> = segments.iter().flat_map(|segment| sample::verified_payload(segment)).collect();
    assert_eq!(received, payload);
    assert_eq!((stats.of(OTHER).sent, stats.of(OTHER).splits, stats.of(OTHER).in_flight()), (7, 6, 0));
}

#[test]
fn a_full_ring_leaves_the_queue_and_what_does_not_fit_a_chunk_ends_by_name() {
    let pool = Pool::new(512, 4).unwrap();
    let (mut port, mut kernel) = port(&pool, 4, true);
    let mut stats = Stats::default();
    let packet = sample::udp4(18, 0).0;
    let mut queue: Queue = (0..6).map(|_| frame(&packet.bytes, packet.offload, &pool, &mut stats)).collect();
    port.transmit(&mut queue, &mut stats).unwrap();
    assert_eq!((queue.len(), stats.of(OTHER).sent), (2, 4));
    while kernel.send(&pool).is_some() {}
    queue.push_back(frame(&vec![7; 40_000], Offload::default(), &pool, &mut stats));
    let (large, _) = sample::tcp4(10_000, 1448);
    queue.push_back(frame(&large.bytes, large.offload, &pool, &mut stats));
    port.transmit(&mut queue, &mut stats).unwrap();
    let dropped = stats.of(OTHER).dropped;
    assert_eq!(dropped[DropReason::DeviceRefused as usize], 1);
    assert_eq!(dropped[DropReason::Unsegmentable as usize], 1, "seven places this ring never has at once");
    assert_eq!((queue.len(), stats.of(OTHER).in_flight(), stats.of(OTHER).sent), (0, 0, 6));
}

#[test]
fn a_jumbo_frame_takes_several_chunks_both_ways() {
    for len in [IN_ONE, IN_ONE + 1, 9_000] {
        let pool = Pool::new(512, 4).unwrap();
        let (mut port, mut kernel) = port(&pool, 256, true);
        let mut stats = Stats::default();
        let (packet, _) = sample::udp4(len - 42, 0);
        assert!(kernel.deliver(&pool, &packet.bytes));
        let (frames, received) = receive(&mut port, &pool, &mut stats);
        assert_eq!((frames.len(), received), (1, Received::Drained));
        assert_eq!((frames[0].to_vec(), frames[0].offload), (packet.bytes.clone(), packet.offload));
        let mut queue: Queue = frames.into();
        port.transmit(&mut queue, &mut stats).unwrap();
        let (sent, told) = kernel.send(&pool).unwrap();
        assert_eq!((sent, told.is_some(), kernel.send(&pool)), (packet.bytes, true, None));
        port.transmit(&mut queue, &mut stats).unwrap();
        assert_eq!((stats.of(ID).in_flight(), port.lent().1, pool.free().1), (0, 0, 4));
    }
}

#[test]
fn a_jumbo_frame_without_buffer_or_with_a_wrong_piece_ends_as_a_whole() {
    let pool = Pool::new(512, 1).unwrap();
    let (mut port, mut kernel) = port(&pool, 256, true);
    let mut stats = Stats::default();
    let (packet, _) = sample::udp4(5_000, 0);
    let (small, _) = sample::udp4(18, 0);
    let large = pool.large().unwrap();
    assert!(kernel.deliver(&pool, &packet.bytes) && kernel.deliver(&pool, &small.bytes));
    assert_eq!(receive(&mut port, &pool, &mut stats).0.len(), 1, "the next frame is not lost");
    drop(large);
    let [first, last] = [kernel.fill.pop().unwrap(), kernel.fill.pop().unwrap()];
    for descriptor in [
        Descriptor::plain(first, 60).with_more(),
        Descriptor::plain(first, 60).with_more(),
        Descriptor::plain(last, 60),
    ] {
        assert!(kernel.receive.push(descriptor));
    }
    kernel.receive.submit();
    assert!(receive(&mut port, &pool, &mut stats).0.is_empty());
    // And one that never ends.
    let cut = kernel.fill.pop().unwrap();
    assert!(kernel.receive.push(Descriptor::plain(cut, 60).with_more()));
    kernel.receive.submit();
    assert!(receive(&mut port, &pool, &mut stats).0.is_empty());
    let dropped = stats.of(ID).dropped;
    assert_eq!((dropped[DropReason::NoBuffer as usize], dropped[DropReason::BadDescriptor as usize]), (1, 2));
    assert_eq!((stats.of(ID).received, pool.free().1), (4, 1));
    drop(port);
    settle(&pool, 512);
}

#[test]
fn a_chunk_of_another_worker_is_copied() {
    let (pool, other) = (Pool::new(512, 4).unwrap(), Pool::new(8, 4).unwrap());
    let (mut port, mut kernel) = port(&pool, 256, true);
    let mut stats = Stats::default();
    let packet = sample::tcp6(900, 0).0;
    let mut queue = Queue::from([frame(&packet.bytes, packet.offload, &other, &mut stats)]);
    port.transmit(&mut queue, &mut stats).unwrap();
    assert_eq!(other.free().0, 8);
    let (sent, told) = kernel.send(&pool).unwrap();
    assert_eq!((sent, told.is_some()), (packet.bytes, true));
}

#[test]
fn descriptors_that_are_wrong_are_counted_and_cost_nothing() {
    let pool = Pool::new(512, 4).unwrap();
    let (mut port, mut kernel) = port(&pool, 256, true);
    let mut stats = Stats::default();
    let good = sample::udp4(18, 0).0;
    assert!(kernel.deliver(&pool, &good.bytes));
    let lent = kernel.fill.pop().unwrap();
    let wrong = [
        Descriptor::plain(512 * CHUNK as u64, 60),
        Descriptor::plain(u64::MAX, 60),
        Descriptor::plain(lent + CHUNK as u64 - 10, 11),
        Descriptor::plain(lent + XDP_HEADROOM, 60),
        Descriptor::plain(511 * CHUNK as u64, 60),
        Descriptor { address: lent, len: u32::MAX, options: u32::MAX },
    ];
    wrong.into_iter().for_each(|descriptor| assert!(kernel.receive.push(descriptor)));
    kernel.receive.submit();
    // Nor is anything believed that was never sent.
    [0, 7, u64::MAX, lent].into_iter().for_each(|address| assert!(kernel.completion.push(address)));
    kernel.completion.submit();
    port.transmit(&mut Queue::new(), &mut stats).unwrap();
    let (frames, _) = receive(&mut port, &pool, &mut stats);
    assert_eq!(frames.len(), 1);
    assert_eq!(stats.of(ID).dropped[DropReason::BadDescriptor as usize], wrong.len() as u64);
    drop(frames);
    drop(port);
    settle(&pool, 512);
}

/// An underlay without next hops, the kernel of its device, and what goes the kernel's way.
fn underlay(pool: &Pool, checksum: bool) -> (XdpUnderlay, Arc<ArcSwap<Hops>>, Kernel, Wire) {
    let (ours, kernel) = rings(256);
    let (fd, _other) = socketpair(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::NONBLOCK, None).unwrap();
    let channel = Channel::over(ours, fd, Abilities { checksum, pieces: true }, pool, ID);
    let aside = MemoryPort::new(ID);
    let (wire, hops) = (aside.outbox(), Arc::new(ArcSwap::from_pointee(Hops::default())));
    let tunnel = Tunnel { addresses: vec!["127.0.0.1".parse().unwrap()], port: 8472, vlan: None, secret: 7 };
    let port = XdpUnderlay::over(vec![channel], tunnel, Arc::clone(&hops), KernelWay::new(Box::new(aside))).unwrap();
    (port, hops, kernel, wire)
}

#[test]
fn a_node_without_next_hop_is_reached_by_the_kernel_until_there_is_one() {
    for checksum in [true, false] {
        let pool = Pool::new(512, 4).unwrap();
        let (mut port, hops, mut kernel, aside) = underlay(&pool, checksum);
        let mut stats = Stats::default();
        let (inner, payload) = sample::tcp4(4_000, 1_300);
        let packet = sample::tunnelled(&inner);
        let mut send = |port: &mut XdpUnderlay| {
            let mut frame = frame(&packet.bytes, packet.offload, &pool, &mut stats);
            frame.outer = packet.outer;
            let mut queue = Queue::from([frame]);
            port.transmit(&mut queue, &mut stats).unwrap();
            assert!(queue.is_empty());
        };
        send(&mut port);
        assert_eq!((kernel.send(&pool), aside.borrow().len()), (None, 1));
        let hop = NextHop { source: Mac([2; 6]), target: Mac([4; 6]), vlan: Some(7), mtu: 1_500 };
        let peer = packet.outer.unwrap().peer;
        hops.store(Arc::new([(peer, hop.into())].into_iter().collect()));
        send(&mut port);
        hops.store(Arc::new([(peer, NextHop { mtu: 100, ..hop }.into())].into_iter().collect()));
        send(&mut port);
        let marks: Vec<bool> = aside.borrow().iter().map(|packet| packet.outer.unwrap().in_fragments).collect();
        assert_eq!(marks, [false, true], "what is too long for its way goes by the kernel, in fragments");
        // The other node: what was sent is what it gets.
        let there = Tunnel { addresses: vec![peer], port: 8472, vlan: None, secret: 7 };
        let mut received = Vec::new();
        while let Some((bytes, told)) = kernel.send(&pool) {
            assert_eq!(told.is_some(), checksum, "the outer checksum is the kernel's where it can");
            let mut frame = frame(&bytes, Offload::default(), &pool, &mut Stats::default());
            outer::read(&mut frame, &there).unwrap();
            assert_eq!(frame.to_vec()[..8], packet.bytes[..8]);
            received.extend(sample::verified_payload(&frame.to_vec()[8..]));
        }
        assert!(received == payload);
        let counted = stats.of(OTHER);
        assert_eq!(counted.in_flight(), 0, "{counted:?}");
    }
}

#[test]
fn what_is_no_packet_of_the_tunnel_ends_by_name() {
    let pool = Pool::new(512, 4).unwrap();
    let (mut port, _, mut kernel, _) = underlay(&pool, true);
    let mut stats = Stats::default();
    assert!(kernel.deliver(&pool, &sample::udp4(100, 0).0.bytes) && kernel.deliver(&pool, &[7; 20]));
    let mut batch = Batch::new();
    assert_eq!(port.receive(&pool, &mut batch, &mut stats).unwrap(), Received::More);
    assert_eq!(port.receive(&pool, &mut batch, &mut stats).unwrap(), Received::Drained);
    assert!(batch.is_empty());
    let counted = stats.of(ID);
    assert_eq!((counted.received, counted.dropped[DropReason::NotForUs as usize]), (2, 2));
}

#[test]
fn bursts_make_a_device_hold_more_chunks() {
    let pool = Pool::new(4096, 4).unwrap();
    let (mut port, mut kernel) = port(&pool, 2048, true);
    let mut stats = Stats::default();
    let packet = sample::udp4(18, 0).0;
    let quiet = port.lent().0;
    while kernel.deliver(&pool, &packet.bytes) {}
    let mut count = 0;
    loop {
        let (frames, received) = receive(&mut port, &pool, &mut stats);
        count += frames.len();
        if received == Received::Drained {
            break;
        }
    }
    assert_eq!(count, quiet as usize);
    assert!(port.lent().0 >= 4 * quiet, "{} chunks", port.lent().0);
    for _ in 0..40_000 {
        kernel.deliver(&pool, &packet.bytes);
        receive(&mut port, &pool, &mut stats);
    }
    assert_eq!(port.lent().0, quiet);
}

#[test]
fn the_first_devices_hold_many_chunks_and_a_hundred_leave_some() {
    let pool = Pool::new(16_384, 4).unwrap();
    let devices: Vec<_> = (0..110).map(|_| port(&pool, 2048, true)).collect();
    let lent: Vec<u32> = devices.iter().map(|(port, _)| port.lent().0).collect();
    assert_eq!((lent[0], lent[109]), (1024, 64));
    assert!(lent.is_sorted_by(|one, next| one >= next), "{lent:?}");
    assert!(pool.free().0 > 16_384 / 4, "{} are left", pool.free().0);
}

#[test]
fn no_device_starves_the_others() {
    let pool = Pool::new(2048, 4).unwrap();
    let mut devices: Vec<_> = (0..4).map(|_| port(&pool, 2048, true)).collect();
    let mut stats = Stats::default();
    let packet = sample::udp4(18, 0).0;
    for _ in 0..50 {
        for (port, kernel) in &mut devices {
            while kernel.deliver(&pool, &packet.bytes) {}
            while receive(port, &pool, &mut stats).1 == Received::More {}
        }
    }
    let lent: Vec<u32> = devices.iter().map(|(port, _)| port.lent().0).collect();
    assert!(lent.iter().all(|lent| *lent >= 256), "{lent:?}");
    assert!(pool.free().0 >= 512, "{} are left of {lent:?}", pool.free().0);
}

#[test]
fn a_device_without_chunks_asks_until_it_has_some() {
    let pool = Pool::new(130, 4).unwrap();
    let (mut port, mut kernel) = port(&pool, 256, true);
    let mut stats = Stats::default();
    let packet = sample::udp4(18, 0).0;
    while kernel.deliver(&pool, &packet.bytes) {}
    let mut held = Vec::new();
    while port.lent().0 > 0 || kernel.deliver(&pool, &packet.bytes) {
        held.extend(receive(&mut port, &pool, &mut stats).0);
        while kernel.deliver(&pool, &packet.bytes) {}
    }
    assert_eq!((held.len(), pool.free().0), (130, 0));
    let (none, received) = receive(&mut port, &pool, &mut stats);
    assert_eq!((none.len(), received), (0, Received::More));
    held.clear();
    assert_eq!(receive(&mut port, &pool, &mut stats).1, Received::Drained);
    assert!(kernel.deliver(&pool, &packet.bytes));
}

/// The port closes on a thread of its own.
fn settle(pool: &Pool, free: usize) {
    for _ in 0..1_000 {
        if pool.free().0 == free {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    panic!("{} of {free} chunks are free", pool.free().0);
}

/// Frames of the test of conservation, and the ports that share them, side by side.
const MANY: u64 = 10_000_000;
const PORTS: u64 = 8;

#[test]
fn however_much_ring_space_is_lost_no_frame_is_lost_without_a_count() {
    std::thread::scope(|scope| {
        (1..=PORTS).for_each(|seed| drop(scope.spawn(move || lose_ring_space(seed, MANY / PORTS))));
    });
}

/// Carries frames from a port to itself while the kernel has room, chunks and good descriptors by chance only.
fn lose_ring_space(seed: u64, many: u64) {
    let pool = Pool::new(1024, 4).unwrap();
    let (mut port, mut kernel) = port(&pool, 256, true);
    let mut stats = Stats::default();
    let packet = sample::udp4(18, 0).0;
    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (random >> 33) % below
    };
    let (mut queue, mut delivered, mut sent, mut wrong) = (Queue::new(), 0, 0, 0);
    while delivered < many {
        for _ in 0..next(100) {
            delivered += u64::from(kernel.deliver(&pool, &packet.bytes));
        }
        if next(50) == 0 && kernel.receive.push(Descriptor::plain(next(3_000) * 1_000, 60)) {
            // By chance this may name a chunk that is lent: then the kernel has one less, and it is ours again.
            kernel.receive.submit();
            wrong += 1;
        }
        queue.extend(receive(&mut port, &pool, &mut stats).0);
        if next(3) > 0 {
            port.transmit(&mut queue, &mut stats).unwrap();
        }
        if queue.len() > 300 {
            queue.drain(..).for_each(|frame| stats.drop(frame, DropReason::QueueFull));
        }
        for _ in 0..next(120) {
            sent += u64::from(kernel.send(&pool).is_some());
        }
    }
    while !queue.is_empty() || port.lent().1 > 0 {
        port.transmit(&mut queue, &mut stats).unwrap();
        sent += std::iter::from_fn(|| kernel.send(&pool)).count() as u64;
        queue.extend(receive(&mut port, &pool, &mut stats).0);
    }
    let counted = stats.of(ID);
    assert_eq!(counted.received, delivered + wrong);
    assert_eq!((counted.in_flight(), counted.sent), (0, sent), "{counted:?}");
    assert_eq!(pool.free().0 + port.lent().0 as usize, 1024);
    drop(port);
    settle(&pool, 1024);
}
