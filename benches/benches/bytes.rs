//! What is done to bytes: summing them, cutting superframes, merging segments.
#![allow(missing_docs, reason = "criterion's macros make public functions")]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use weft_benches::CpuTime;
use weft_benches::payload::{Cut, Merge};
use weft_encap::checksum;

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

fn superframes(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("superframe");
    let (cut, merge) = (Cut::default(), Merge::default());
    group.throughput(Throughput::Bytes(cut.bytes() as u64));
    group.bench_function("cut", |b| b.iter(|| cut.run()));
    group.throughput(Throughput::Bytes(merge.bytes() as u64));
    group.bench_function("merge", |b| b.iter(|| merge.run()));
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().with_measurement(CpuTime).without_plots();
    targets = sums, superframes
}
criterion_main!(benches);
