//! How much each port may do of something per second: flood copies, ICMP errors.

use crate::port::PortId;
use crate::time::Instant;

/// How much each port may do of something: a token bucket, one second deep.
pub struct Budgets {
    rate: u32,
    buckets: Vec<Bucket>,
}

#[derive(Copy, Clone, Default)]
struct Bucket {
    /// When the bucket would be full again; time itself is the level, so an idle bucket needs no upkeep.
    full_at: Instant,
}

impl Budgets {
    /// `rate` per second and port.
    pub fn new(rate: u32) -> Budgets {
        Budgets { rate: rate.max(1), buckets: Vec::new() }
    }

    /// Whether a port still has room for `count`. A bucket with any room lets one charge through whole, so that a count
    /// above the rate is possible at all.
    pub fn allows(&self, port: PortId, now: Instant) -> bool {
        self.buckets.get(port.index()).is_none_or(|bucket| bucket.full_at.0 < now.0 + SECOND)
    }

    /// Charges `count` to a port.
    pub fn charge(&mut self, port: PortId, count: u32, now: Instant) {
        if port.index() >= self.buckets.len() {
            self.buckets.resize(port.index() + 1, Bucket::default());
        }
        let bucket = &mut self.buckets[port.index()];
        let cost = u64::from(count) * SECOND / u64::from(self.rate);
        // What was let through without asking, or whole though it was more than was left, costs a second at most.
        bucket.full_at = Instant((bucket.full_at.0.max(now.0) + cost).min(now.0 + 2 * SECOND));
    }
}

const SECOND: u64 = 1_000_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_allows_its_rate_and_recovers() {
        let mut budgets = Budgets::new(100);
        let mut passed = 0;
        for _ in 0..1000 {
            if budgets.allows(PortId(3), Instant(7)) {
                budgets.charge(PortId(3), 1, Instant(7));
                passed += 1;
            }
        }
        assert_eq!(passed, 100);
        assert!(budgets.allows(PortId(3), Instant(7 + SECOND / 10)));
        assert!(budgets.allows(PortId(4), Instant(7)));
    }
}
