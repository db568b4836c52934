//! Frames through the forwarder: decide, rewrite, emit, and free. No device, no kernel.
#![allow(missing_docs, reason = "criterion's macros make public functions")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use weft_benches::{CpuTime, cases};

fn frames(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("core");
    group.throughput(Throughput::Elements(1));
    for (name, case) in cases::ALL {
        // Made where it is needed, for a run of a few of them.
        let mut made = None;
        group.bench_function(*name, |b| {
            let case = made.get_or_insert_with(|| {
                let mut case = case();
                case.warm_up();
                case
            });
            b.iter_custom(|count| case.time(count));
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().with_measurement(CpuTime).without_plots();
    targets = frames
}
criterion_main!(benches);
