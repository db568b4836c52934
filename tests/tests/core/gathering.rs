//! Random streams through gathering, the whole forwarder and the segmentation behind it: the far end gets what it would get if each segment had
//! gone alone.

use std::collections::HashMap;

use weft_router::PortId;
use weft_router::pool::Pool;
use weft_router::port::BATCH;
use weft_router::port::memory::Packet;
use weft_router::tables::Mode;
use weft_tests::gathering::{self, RECORD, Stream, assert_same, check, cut, packets};
use weft_tests::memory::{Input, Memory, Output, UNDERLAY, tables};
use weft_tests::random::Random;

/// How many vectors of each kind.
const VECTORS: usize = 2_000;

/// Bytes that describe a vector. In a `wild` one anything may happen at any packet; otherwise most streams go on undisturbed.
fn description(random: &mut Random, from_nodes: bool, wild: bool) -> Vec<u8> {
    let mut bytes = vec![u8::from(from_nodes)];
    let streams = 1 + random.below(8);
    for _ in 0..1 + random.below(BATCH) {
        let mut record = [0; RECORD];
        random.fill(&mut record);
        record[0] = record[0] & !7 | random.below(streams) as u8;
        if !wild && !random.once_in(8) {
            // Of the size of its stream, in its place, with sums that are right.
            record[0] &= 15;
            record[1] |= 0x80;
            (record[3], record[5]) = (255, 128);
        }
        bytes.extend(record);
    }
    bytes
}

#[test]
fn what_was_gathered_is_cut_into_what_came_whatever_came() {
    let mut random = Random::new(0x6a7e);
    let (mut came, mut merged) = (0, 0);
    for number in 0..2 * VECTORS {
        let vector = packets(&description(&mut random, number % 2 == 0, number % 3 == 0));
        came += vector.len() as u64;
        merged += check(&vector);
    }
    // Were nothing merged, all would be well and nothing shown.
    assert!(merged > came / 4, "only {merged} of {came} packets were merged");
}

/// Per port and stream, in order: the segments that the far end gets.
type Arrived = HashMap<(PortId, Stream), Vec<Packet>>;

fn arrived(outputs: Vec<Output>, pool: &Pool, arrived: &mut Arrived) {
    for Output { port, bytes, offload, outer } in outputs {
        for segment in cut(&Packet { bytes, offload, outer }, pool) {
            // ICMP errors are not told apart: one about a superframe stands for those about its segments.
            if let Some(stream) = gathering::stream(&segment) {
                arrived.entry((port, stream)).or_default().push(segment);
            }
        }
    }
}

fn compare(mode: Mode, from_nodes: bool, seed: u64) {
    let mut random = Random::new(seed);
    let port = if from_nodes { UNDERLAY } else { PortId(1) };
    let (mut together, mut alone) = (Memory::new(tables(mode)), Memory::new(tables(mode)));
    let (mut delivered, pool) = (0, Pool::new(8, 8).unwrap());
    for number in 0..VECTORS {
        let vector = packets(&description(&mut random, from_nodes, number % 3 == 0));
        let (mut actual, mut expected) = (Arrived::new(), Arrived::new());
        arrived(together.feed_together(port, &vector), &pool, &mut actual);
        for Packet { bytes, offload, outer } in vector {
            let input = Input { port, bytes, offload, outer, head: usize::MAX };
            arrived(alone.feed(&input).sent, &pool, &mut expected);
        }
        for (stream, expected) in &expected {
            let actual = actual.remove(stream).unwrap_or_default();
            assert_eq!(actual.len(), expected.len(), "packets of {stream:?} in vector {number} of seed {seed:#x}");
            actual.iter().zip(expected).for_each(|(actual, expected)| assert_same(actual, expected));
            delivered += actual.len() as u64;
        }
        assert!(actual.is_empty(), "made out of nothing in vector {number} of seed {seed:#x}: {actual:02x?}");
    }
    let stats = together.stats(port);
    assert!(stats.merged > stats.received / 5, "only {} of {} were merged", stats.merged, stats.received);
    assert!(delivered > stats.received / 2, "only {delivered} of {} were delivered", stats.received);
}

#[test]
fn the_far_end_gets_the_same_with_and_without_gathering_in_routed_mode() {
    compare(Mode::Routed, false, 0x9a01);
    compare(Mode::Routed, true, 0x9a02);
}

#[test]
fn the_far_end_gets_the_same_with_and_without_gathering_in_bridged_mode() {
    compare(Mode::Bridged, false, 0x9b01);
    compare(Mode::Bridged, true, 0x9b02);
}

#[test]
fn a_vector_of_each_stream_undisturbed_is_one_superframe_each() {
    for from_nodes in [false, true] {
        for streams in 1..=4u8 {
            let record = |number: u8| [number % streams, 0x80, 0, 255, 0, 128, 0, 0];
            let bytes: Vec<u8> = [from_nodes as u8].into_iter().chain((0..40).flat_map(record)).collect();
            assert_eq!(check(&packets(&bytes)), 40 - u64::from(streams), "{streams} streams");
        }
    }
}
