//! How long answers take, and how many do not come.
//!
//! An answer is late after some times the shortest of the last ones: a mean would follow those that wait for a neighbour to be found, or for
//! a CPU, and what is missing would then be missed much later. To be late has no consequence but that one asks again. Beside it, a running mean of what was lost.

use std::time::Duration;

/// Round trips that are remembered.
const KEPT: usize = 32;
/// An answer is late after so many times the shortest of so many.
const LATE: u32 = 4;
const RECENT: usize = 8;
/// An answer is never waited for longer.
const MOST: Duration = Duration::from_secs(5);
/// How much one outcome counts in the mean of losses.
const WEIGHT: f64 = 1.0 / 32.0;

/// See the module's essay.
#[derive(Debug, Clone, Default)]
pub struct Rtt {
    last: Vec<Duration>,
    at: usize,
    shortest: Option<Duration>,
    loss: f64,
}

impl Rtt {
    /// An answer came after that time; `late`, if it was counted as lost before.
    pub fn answered(&mut self, after: Duration, late: bool) {
        if late {
            // It is as if nothing had been lost.
            self.loss = ((self.loss - WEIGHT) / (1.0 - WEIGHT)).max(0.0);
        }
        self.loss -= self.loss * WEIGHT;
        if self.last.len() < KEPT {
            self.last.push(after);
        } else {
            self.last[self.at] = after;
        }
        self.at = (self.at + 1) % KEPT;
        let recent = (1..=RECENT.min(self.last.len())).map(|back| self.last[(self.at + KEPT - back) % KEPT]);
        self.shortest = recent.min();
    }

    /// An answer did not come.
    pub fn lost(&mut self) {
        self.loss += (1.0 - self.loss) * WEIGHT;
    }

    /// How long an answer may take before it is late.
    pub fn patience(&self) -> Duration {
        (self.shortest.unwrap_or_default() * LATE).min(MOST)
    }

    /// The part of the questions that was not answered lately, 0 to 1.
    pub fn loss(&self) -> f64 {
        self.loss
    }

    /// The last round trip.
    pub fn last(&self) -> Option<Duration> {
        let newest = (self.at + KEPT - 1) % KEPT;
        self.last.get(newest.min(self.last.len().saturating_sub(1))).copied()
    }

    /// Half of the last ones were shorter.
    pub fn median(&self) -> Option<Duration> {
        let mut sorted = self.last.clone();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn patience_follows_what_answers_take_at_least() {
        let mut rtt = Rtt::default();
        (0..50).for_each(|_| rtt.answered(10 * MS, false));
        assert_eq!((rtt.last(), rtt.median(), rtt.patience()), (Some(10 * MS), Some(10 * MS), 40 * MS));
        (0..7).for_each(|_| rtt.answered(2000 * MS, true));
        assert_eq!((rtt.last(), rtt.patience()), (Some(2000 * MS), 40 * MS), "a few say little");
        rtt.answered(1000 * MS, true);
        assert_eq!(rtt.patience(), 4000 * MS);
        rtt.answered(MS, false);
        assert_eq!(rtt.patience(), 4 * MS);
        (0..32).for_each(|_| rtt.answered(Duration::from_secs(100), true));
        assert_eq!(rtt.patience(), MOST);
    }

    #[test]
    fn what_is_lost_is_counted_and_what_was_only_late_is_not() {
        let mut rtt = Rtt::default();
        for number in 0..300 {
            if number % 4 == 0 { rtt.lost() } else { rtt.answered(MS, false) }
        }
        assert!((0.15..0.35).contains(&rtt.loss()), "{}", rtt.loss());
        for _ in 0..300 {
            rtt.lost();
            rtt.answered(MS, true);
        }
        assert!(rtt.loss() < 0.02, "{}", rtt.loss());
    }

    #[test]
    fn nothing_is_known_at_first() {
        let rtt = Rtt::default();
        assert_eq!((rtt.last(), rtt.median(), rtt.loss()), (None, None, 0.0));
    }
}
