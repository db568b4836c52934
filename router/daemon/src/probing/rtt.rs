//! How long answers take, and how many do not come.
//!
//! The estimate is TCP's (RFC 6298): a smoothed round trip and how much it varies. Beside it, the last round trips for
//! whoever looks, and a running mean of what was lost.

use std::time::Duration;

/// Round trips that are remembered.
const KEPT: usize = 32;
/// An answer is never waited for longer.
const MOST: Duration = Duration::from_secs(5);
/// How much one outcome counts in the mean of losses.
const WEIGHT: f64 = 1.0 / 32.0;

/// See the module's essay.
#[derive(Debug, Clone, Default)]
pub struct Rtt {
    smoothed: f64,
    varies: f64,
    last: Vec<Duration>,
    at: usize,
    loss: f64,
    any: bool,
}

impl Rtt {
    /// An answer came after that time; `late`, if it was counted as lost before.
    pub fn answered(&mut self, after: Duration, late: bool) {
        let sample = after.as_secs_f64();
        if self.any {
            self.varies += ((self.smoothed - sample).abs() - self.varies) / 4.0;
            self.smoothed += (sample - self.smoothed) / 8.0;
        } else {
            (self.smoothed, self.varies, self.any) = (sample, sample / 2.0, true);
        }
        if late {
            // It is as if nothing had been lost. The time is what is different now, and is believed at once.
            self.loss = ((self.loss - WEIGHT) / (1.0 - WEIGHT)).max(0.0);
            (self.smoothed, self.varies) = (self.smoothed.max(sample), self.varies.max(sample / 8.0));
        }
        self.loss -= self.loss * WEIGHT;
        if self.last.len() < KEPT {
            self.last.push(after);
        } else {
            self.last[self.at] = after;
        }
        self.at = (self.at + 1) % KEPT;
    }

    /// An answer did not come.
    pub fn lost(&mut self) {
        self.loss += (1.0 - self.loss) * WEIGHT;
    }

    /// How long an answer may take before it is late.
    pub fn patience(&self) -> Duration {
        Duration::from_secs_f64(self.smoothed + 4.0 * self.varies).min(MOST)
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
    fn patience_follows_what_answers_take() {
        let mut rtt = Rtt::default();
        (0..50).for_each(|_| rtt.answered(10 * MS, false));
        assert!((10 * MS..12 * MS).contains(&rtt.patience()), "{:?}", rtt.patience());
        assert_eq!((rtt.last(), rtt.median()), (Some(10 * MS), Some(10 * MS)));
        rtt.answered(2000 * MS, true);
        assert!(rtt.patience() > 2000 * MS && rtt.last() == Some(2000 * MS));
        (0..200).for_each(|_| rtt.answered(10 * MS, false));
        assert!(rtt.patience() < 40 * MS && rtt.median() == Some(10 * MS));
        rtt.answered(Duration::from_secs(100), true);
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
