//! CPU time of the thread as criterion's measurement.
//!
//! Wall time counts whatever else runs on the machine. CPU time does not, though it still suffers from caches that others
//! fill and from a clock rate that changes; so numbers are compared within one run only.
//!
//! Data planes are compared by clocks per packet, which are clocks of the processor's time stamp counter. CPU time is
//! converted to them by the counter's rate.

use std::sync::OnceLock;
use std::time::Duration;

use criterion::Throughput;
use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use rustix::time::{ClockId, clock_gettime};

use crate::sys::time_stamp;

/// The measurement.
#[derive(Copy, Clone, Debug, Default)]
pub struct CpuTime;

/// How long the rate of the time stamp counter is measured: so long that reading two clocks does not matter.
const RATE_WINDOW: Duration = Duration::from_millis(50);

/// CPU time that this thread has used.
pub fn cpu_time() -> Duration {
    read(ClockId::ThreadCPUTime)
}

/// What two readings with nothing between them are apart: the median of many.
pub fn clock_cost() -> Duration {
    static COST: OnceLock<Duration> = OnceLock::new();
    *COST.get_or_init(|| {
        let mut costs: Vec<Duration> = std::iter::repeat_with(|| {
            let start = cpu_time();
            cpu_time() - start
        })
        .take(1001)
        .collect();
        costs.sort();
        costs[costs.len() / 2]
    })
}

/// Clocks of the time stamp counter in a nanosecond; `None` if the processor has no such counter.
pub fn clocks_per_nanosecond() -> Option<f64> {
    static RATE: OnceLock<Option<f64>> = OnceLock::new();
    *RATE.get_or_init(|| {
        let (start, first) = (read(ClockId::MonotonicRaw), time_stamp()?);
        std::thread::sleep(RATE_WINDOW);
        let (end, last) = (read(ClockId::MonotonicRaw), time_stamp()?);
        Some((last - first) as f64 / (end - start).as_nanos() as f64)
    })
}

fn read(clock: ClockId) -> Duration {
    let now = clock_gettime(clock);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
}

impl Measurement for CpuTime {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        cpu_time()
    }

    fn end(&self, start: Duration) -> Duration {
        cpu_time() - start
    }

    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        *a + *b
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        WallTime.to_f64(value)
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        &Clocks
    }
}

/// Wall time's formats, except that what counts elements is told in clocks for each of them.
struct Clocks;

impl ValueFormatter for Clocks {
    fn format_throughput(&self, throughput: &Throughput, nanoseconds: f64) -> String {
        match (throughput, clocks_per_nanosecond()) {
            (Throughput::Elements(count), Some(rate)) => {
                format!("{:.1} clocks each", nanoseconds * rate / *count as f64)
            }
            _ => WallTime.formatter().format_throughput(throughput, nanoseconds),
        }
    }

    fn scale_values(&self, typical: f64, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_values(typical, values)
    }

    fn scale_throughputs(&self, typical: f64, throughput: &Throughput, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_throughputs(typical, throughput, values)
    }

    fn scale_for_machines(&self, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_for_machines(values)
    }
}
