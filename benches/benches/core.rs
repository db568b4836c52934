//! Frames through the forwarder: decide, rewrite, emit, and free. No device, no kernel.
#![allow(missing_docs, reason = "criterion's macros make public functions")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use weft_benches::CpuTime;
use weft_benches::frames::{superframe, udp};
use weft_benches::node::{Bed, Template};
use weft_encap::offload::Offload;

/// Bytes of a small frame, as the kernel shows it: without the frame check sequence.
const SMALL: usize = 60;
/// Segments of a large superframe.
const SEGMENTS: usize = 44;

fn known_flow(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("frame");
    group.throughput(Throughput::Elements(1));
    let bed = Bed::new();
    let plain = Offload::default();
    let ways: [(&str, Template); 3] = [
        ("pod to pod", Bed::from_pod(udp(Bed::neighbours(), 1000, SMALL), plain)),
        ("pod to node", Bed::from_pod(udp(Bed::outwards(), 1000, SMALL), plain)),
        ("node to pod", bed.from_node(&udp(Bed::inwards(), 1000, SMALL), plain)),
    ];
    for (name, template) in &ways {
        let mut bed = Bed::new();
        group.bench_function(BenchmarkId::new("small", name), |b| {
            b.iter_custom(|count| bed.time(count, false, std::iter::repeat(template)))
        });
    }
    let (bytes, offload) = superframe(Bed::neighbours(), SEGMENTS);
    let template = Bed::from_pod(bytes, offload);
    let mut bed = Bed::new();
    group.bench_function(BenchmarkId::new("superframe", "pod to pod"), |b| {
        b.iter_custom(|count| bed.time(count, false, std::iter::repeat(&template)))
    });
    let (bytes, offload) = superframe(Bed::outwards(), SEGMENTS);
    let template = Bed::from_pod(bytes, offload);
    let mut bed = Bed::new();
    group.bench_function(BenchmarkId::new("superframe", "pod to node"), |b| {
        b.iter_custom(|count| bed.time(count, false, std::iter::repeat(&template)))
    });
    group.finish();
}

/// The slow path: every frame opens a flow; and what a frame costs that ends here.
fn first_packet(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("frame");
    group.throughput(Throughput::Elements(1));
    let templates: Vec<Template> =
        (0..=u16::MAX).map(|port| Bed::from_pod(udp(Bed::outwards(), port, SMALL), Offload::default())).collect();
    let mut bed = Bed::forgetful();
    let mut turn = templates.iter().cycle();
    group.bench_function(BenchmarkId::new("small, first packet", "pod to node"), |b| {
        b.iter_custom(|count| bed.time(count, false, &mut turn))
    });
    let mut spoofed = Bed::neighbours();
    spoofed.src = [10, 9, 9, 9].into();
    let template = Bed::from_pod(udp(spoofed, 1000, SMALL), Offload::default());
    let mut bed = Bed::new();
    group.bench_function(BenchmarkId::new("small, refused", "spoofed source"), |b| {
        b.iter_custom(|count| bed.time(count, true, std::iter::repeat(&template)))
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().with_measurement(CpuTime).without_plots();
    targets = known_flow, first_packet
}
criterion_main!(benches);
