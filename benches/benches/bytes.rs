//! What is done to bytes: summing them, cutting superframes, merging segments.
#![allow(missing_docs, reason = "criterion's macros make public functions")]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use weft_benches::CpuTime;
use weft_benches::frames::{MSS, TCP_HEADERS, segment, superframe};
use weft_benches::node::Bed;
use weft_encap::checksum::{self, Sum};
use weft_encap::coalesce;
use weft_encap::eth::ETH_LEN;
use weft_encap::segment::Segments;
use weft_encap::vxlan::{VXLAN_LEN, Vni, VxlanHeader};
use weft_encap::zerocopy::IntoBytes;

/// Segments of a large superframe.
const SEGMENTS: usize = 44;

fn sums(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("checksum");
    for len in [20, 64, 1460, 65_535] {
        let bytes = vec![0x5a; len];
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(BenchmarkId::new("whole", len), |b| b.iter(|| checksum::sum(black_box(&bytes))));
    }
    group.throughput(Throughput::Elements(1));
    group.bench_function("delta", |b| {
        b.iter(|| checksum::adjust(black_box(0x1234), black_box(0x4011), black_box(0x3f11)))
    });
    group.finish();
}

/// Headers for every segment of a superframe, and the sum of its payload; the payload itself is not copied.
fn segmentation(c: &mut Criterion<CpuTime>) {
    let (bytes, offload) = superframe(Bed::outwards(), SEGMENTS);
    let gso = offload.gso.expect("it is a superframe");
    let (head, payload) = bytes.split_at(TCP_HEADERS);
    let mut group = c.benchmark_group("superframe");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("cut", |b| {
        let mut headers = [0; TCP_HEADERS];
        b.iter(|| {
            let segments =
                Segments::plan(black_box(head), ETH_LEN, ETH_LEN + 20, payload.len(), &gso).expect("it is sound");
            for index in 0..segments.count() {
                let mut sum = Sum::new();
                sum.add(&payload[segments.payload(index)]);
                segments.write(index, head, sum.fold(), &mut headers);
                black_box(&headers);
            }
            segments.count()
        })
    });
    group.finish();
}

/// A train of tunnel packets as `UDP_GRO` hands it over: every checksum verified, one header for all.
fn coalescing(c: &mut Criterion<CpuTime>) {
    let tunnel = VxlanHeader::new(Vni::new(1).expect("1 fits 24 bits"));
    let mut train = Vec::new();
    for index in 0..SEGMENTS as u32 {
        train.extend_from_slice(tunnel.as_bytes());
        let mut frame = segment(Bed::inwards(), 1 + index * u32::from(MSS), MSS.into());
        // IPv4's id counts up from segment to segment, as a sender's does.
        let id = index as u16;
        let (old, check) = (u16::from_be_bytes([frame[18], frame[19]]), u16::from_be_bytes([frame[24], frame[25]]));
        frame[18..20].copy_from_slice(&id.to_be_bytes());
        frame[24..26].copy_from_slice(&checksum::adjust(check, old, id).to_be_bytes());
        train.extend_from_slice(&frame);
    }
    let stride = train.len() / SEGMENTS;
    assert_eq!(coalesce::run(&train, stride, VXLAN_LEN).frames, SEGMENTS, "the train is one run");
    let mut group = c.benchmark_group("superframe");
    group.throughput(Throughput::Bytes(train.len() as u64));
    group.bench_function("merge", |b| {
        let mut head = [0; TCP_HEADERS];
        b.iter(|| {
            let run = coalesce::run(black_box(&train), stride, VXLAN_LEN);
            head.copy_from_slice(&train[VXLAN_LEN..VXLAN_LEN + TCP_HEADERS]);
            coalesce::finish(&mut head, &run)
        })
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().with_measurement(CpuTime).without_plots();
    targets = sums, segmentation, coalescing
}
criterion_main!(benches);
