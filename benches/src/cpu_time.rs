//! CPU time of the thread as criterion's measurement.
//!
//! Wall time counts whatever else runs on the machine. CPU time does not, though it still suffers from caches that others
//! fill and from a clock rate that changes; so numbers are compared within one run only.

use std::sync::OnceLock;
use std::time::Duration;

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use rustix::time::{ClockId, clock_gettime};

/// The measurement.
#[derive(Copy, Clone, Debug, Default)]
pub struct CpuTime;

/// CPU time that this thread has used.
pub fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
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
        WallTime.formatter()
    }
}
