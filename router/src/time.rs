//! Time as the core knows it: nanoseconds of a clock that never goes backwards and goes on while the machine sleeps.
//!
//! Nothing below the worker reads a clock; the worker reads `CLOCK_BOOTTIME` once per batch and passes it down.

use std::ops::Add;
use std::time::Duration;

/// Nanoseconds since an arbitrary start (in the daemon: since boot).
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(pub u64);

impl Instant {
    /// `CLOCK_BOOTTIME`, for the worker and for the daemon; the core gets it as an argument.
    pub fn boottime() -> Instant {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Instant(now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64)
    }

    /// How long ago `earlier` was; zero if it lies in the future.
    pub fn since(self, earlier: Instant) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// Whole seconds, for the compact timestamps of tables.
    pub fn seconds(self) -> u32 {
        (self.0 / 1_000_000_000) as u32
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;
    fn add(self, duration: Duration) -> Instant {
        Instant(self.0.saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }
}
