//! How much each port may do of something per second: flood copies, ICMP errors.
//!
//! A port's frames enter by one worker, which has the whole budget; those of the underlay enter by all of them, and each has an
//! equal part.
//!
//! And how often each flow is told the same: [`Told`].

use crate::port::PortId;
use crate::time::Instant;

/// How much each port may do of something: a token bucket, one second deep.
pub struct Budgets {
    rate: u32,
    buckets: Vec<Bucket>,
}

#[derive(Copy, Clone)]
struct Bucket {
    /// When the bucket would be full again; time itself is the level, so an idle bucket needs no upkeep.
    full_at: Instant,
    /// How many workers have a part of it.
    parts: u32,
}

impl Default for Bucket {
    fn default() -> Bucket {
        Bucket { full_at: Instant(0), parts: 1 }
    }
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

    /// Starts a port's budget anew, as one that so many workers have an equal part of.
    pub fn open(&mut self, port: PortId, parts: u32) {
        *self.bucket(port) = Bucket { parts: parts.max(1), ..Bucket::default() };
    }

    /// Charges `count` to a port.
    pub fn charge(&mut self, port: PortId, count: u32, now: Instant) {
        let rate = u64::from(self.rate);
        let bucket = self.bucket(port);
        let cost = (u64::from(count) * SECOND).saturating_mul(bucket.parts.into()) / rate;
        // What was let through without asking, or whole though it was more than was left, costs a second at most.
        bucket.full_at = Instant(bucket.full_at.0.max(now.0).saturating_add(cost).min(now.0 + 2 * SECOND));
    }

    fn bucket(&mut self, port: PortId) -> &mut Bucket {
        if port.index() >= self.buckets.len() {
            self.buckets.resize(port.index() + 1, Bucket::default());
        }
        &mut self.buckets[port.index()]
    }
}

const SECOND: u64 = 1_000_000_000;

/// What flows were told lately, so that none is told the same twice within a second. It is a table of fixed size: two that meet in it are told
/// in turns, the oftener the less.
pub struct Told {
    cells: Vec<(u64, Instant)>,
}

impl Default for Told {
    fn default() -> Told {
        Told { cells: vec![(0, Instant(0)); 1024] }
    }
}

impl Told {
    /// Whether this is news; `what` is a hash of the flow and of what it is told.
    pub fn is_news(&mut self, what: u64, now: Instant) -> bool {
        let at = what as usize % self.cells.len();
        let (known, since) = self.cells[at];
        let news = known != what || now.0 >= since.0 + SECOND;
        if news {
            self.cells[at] = (what, now);
        }
        news
    }
}

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

    #[test]
    fn parts_of_a_budget_add_up_to_it_and_a_number_used_again_begins_anew() {
        let mut budgets = Budgets::new(100);
        let spend = |budgets: &mut Budgets| {
            let mut passed = 0;
            while budgets.allows(PortId(0), Instant(7)) && passed < 1000 {
                budgets.charge(PortId(0), 1, Instant(7));
                passed += 1;
            }
            passed
        };
        budgets.open(PortId(0), 4);
        assert_eq!((spend(&mut budgets), spend(&mut budgets)), (25, 0));
        budgets.open(PortId(0), 1);
        assert_eq!(spend(&mut budgets), 100);
        budgets.charge(PortId(0), u32::MAX, Instant(7));
        assert!(budgets.allows(PortId(0), Instant(7 + 2 * SECOND)));
    }
}
