//! The search: which rate to try next, and what follows from a trial.
//!
//! It knows nothing of frames: a trial is a function from a rate to what was counted. First everything is offered that can
//! be; then each limit is looked for near what arrived of that, and found by halving the range between the highest rate that passed
//! and the lowest that failed, trials for one limit serving the other as well. A rate that fails gets a second try, since
//! a machine that pauses for a millisecond loses frames which the path would have carried; one that fails twice, or by far, has
//! failed. Each limit has its share of the trials, so that the second is not zero only because the first took them all.

use anyhow::Result;

use super::{Limits, Rate, Trial};

/// Below this a path carries nothing worth searching for.
const LEAST_PPS: f64 = 1_000.0;
/// A trial that offered less than this part of what it was asked for shows the generator's limit.
const FULLY: f64 = 0.97;
/// Where the search begins: just below what arrived when too much was offered.
const FIRST_GUESS: f64 = 0.98;
/// How much more is tried if that passes; twice as much more each time that passes too.
const FIRST_STEP: f64 = 0.08;
/// No pause of the machine's costs a trial this part of its frames.
const HICCUP: f64 = 0.05;
/// The first limit may take this part of the trials.
const FIRST_SHARE: f64 = 0.6;

/// Finds a path's rates.
pub fn search(limits: &Limits, trial: &mut dyn FnMut(Option<f64>) -> Result<Trial>) -> Result<Rate> {
    let mut search = Search { limits, trial, trials: Vec::new() };
    let full = search.run(None)?;
    let share = (limits.trials as f64 * FIRST_SHARE) as usize;
    let pdr_pps = search.highest(limits.partial, share)?;
    let ndr_pps = search.highest(0.0, limits.trials)?;
    let trials = search.trials;
    let calm = |trial: &&Trial| trial.loss() <= limits.partial;
    Ok(Rate {
        ndr_pps,
        pdr_pps,
        offered_max_pps: full.offered_pps(),
        received_max_pps: full.received_pps(),
        reordered: trials.iter().filter(calm).map(|trial| trial.reordered).sum(),
        duplicated: trials.iter().map(|trial| trial.duplicated).sum(),
        generic_sink: false,
        trials,
    })
}

struct Search<'a> {
    limits: &'a Limits,
    trial: &'a mut dyn FnMut(Option<f64>) -> Result<Trial>,
    trials: Vec<Trial>,
}

impl Search<'_> {
    fn run(&mut self, asked: Option<f64>) -> Result<Trial> {
        let trial = (self.trial)(asked)?;
        self.trials.push(trial);
        Ok(trial)
    }

    /// The highest rate at which no more than this part is lost, as well as it is known when there were so many trials.
    fn highest(&mut self, tolerance: f64, trials: usize) -> Result<f64> {
        let full = self.trials[0];
        let passed = self.trials.iter().filter(|trial| trial.loss() <= tolerance);
        let mut low = passed.map(Trial::offered_pps).fold(0.0, f64::max);
        // A rate that passed later lies below `low`.
        let failed = self.trials.iter().filter(|trial| self.has_failed(trial, tolerance)).map(rate);
        let mut high = failed.filter(|rate| *rate > low).fold(full.offered_pps(), f64::min);
        let mut guess = Some(full.received_pps() * FIRST_GUESS);
        let mut step = FIRST_STEP;
        while high - low > self.limits.resolution * high && high > LEAST_PPS && self.trials.len() < trials {
            let inside = |rate: &f64| *rate > low && *rate < high;
            let further = if low > 0.0 { low * (1.0 + step) } else { f64::INFINITY };
            let asked = guess.take().filter(inside).unwrap_or(f64::midpoint(low, high).min(further));
            let mut trial = self.run(Some(asked))?;
            if trial.loss() > tolerance && trial.loss() <= HICCUP && self.trials.len() < trials {
                trial = self.run(Some(asked))?;
            }
            if trial.loss() > tolerance {
                (high, step) = (asked, f64::INFINITY);
            } else {
                (low, step) = (low.max(trial.offered_pps()), step * 2.0);
                if trial.offered_pps() < asked * FULLY {
                    // Everything that could be offered at this rate was carried; more was never seen.
                    break;
                }
            }
        }
        Ok(low)
    }

    /// Whether the rate of this trial need not be tried again.
    fn has_failed(&self, trial: &Trial, tolerance: f64) -> bool {
        let again = self.trials.iter().filter(|other| other.asked_pps == trial.asked_pps).count();
        trial.loss() > tolerance && (trial.loss() > HICCUP || again > 1)
    }
}

/// The rate that a trial was about.
fn rate(trial: &Trial) -> f64 {
    trial.asked_pps.unwrap_or_else(|| trial.offered_pps())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { trials: 40, ..Limits::SHORT };

    /// A path that carries `capacity`, behind a generator that makes `most`.
    fn path(asked: Option<f64>, most: f64, capacity: f64, seconds: f64) -> Trial {
        let offered = asked.map_or(most, |asked| asked.min(most));
        let (sent, received) = ((offered * seconds) as u64, (offered.min(capacity) * seconds) as u64);
        Trial { asked_pps: asked, seconds, sent, received, ..Trial::default() }
    }

    #[test]
    fn both_limits_are_found_to_the_resolution() {
        let mut trials = 0;
        let rate = search(&LIMITS, &mut |asked| {
            trials += 1;
            Ok(path(asked, 2e6, 700_123.0, 0.3))
        })
        .unwrap();
        assert!((0.95..=1.0).contains(&(rate.ndr_pps / 700_123.0)), "{rate:?}");
        assert!((0.95..=1.006).contains(&(rate.pdr_pps / 700_123.0)), "{rate:?}");
        assert!(rate.pdr_pps >= rate.ndr_pps);
        assert_eq!((rate.offered_max_pps, rate.trials.len()), (2e6, trials));
        assert!(trials < 18, "{trials} trials for two limits that lie next to each other");
        assert!((rate.received_max_pps - 700_123.0).abs() < 10.0);
    }

    #[test]
    fn a_path_faster_than_the_generator_needs_one_trial() {
        let rate = search(&LIMITS, &mut |asked| Ok(path(asked, 1.5e6, 9e9, 0.3))).unwrap();
        assert_eq!((rate.ndr_pps, rate.pdr_pps, rate.trials.len()), (1.5e6, 1.5e6, 1));
    }

    #[test]
    fn a_hiccup_does_not_decide() {
        let mut count = 0;
        let rate = search(&LIMITS, &mut |asked| {
            count += 1;
            let mut trial = path(asked, 2e6, 1e6, 0.3);
            // Every second trial loses some, whatever its rate.
            trial.received -= if count % 2 == 0 { trial.received / 50 } else { 0 };
            Ok(trial)
        })
        .unwrap();
        assert!((0.95..=1.0).contains(&(rate.ndr_pps / 1e6)), "{rate:?}");
    }

    #[test]
    fn a_path_that_loses_a_little_at_any_high_rate_has_a_rate_without_loss_nevertheless() {
        // A short queue before a reader that pauses now and then: what it holds lasts longer at a lower rate.
        let limits = Limits { trials: 16, ..LIMITS };
        let rate = search(&limits, &mut |asked| {
            let mut trial = path(asked, 6e6, 0.42e6, 0.3);
            let pause = if trial.offered_pps() > 0.15e6 { 500 } else { 0 };
            trial.received = trial.received.min(trial.sent - pause);
            Ok(trial)
        })
        .unwrap();
        assert!((0.9..=1.0).contains(&(rate.pdr_pps / 0.42e6)), "{rate:?}");
        assert!((0.5..=1.0).contains(&(rate.ndr_pps / 0.15e6)), "{rate:?}");
        assert!(rate.trials.len() <= 16);
    }

    #[test]
    fn a_path_that_collapses_under_overload_is_searched_from_below() {
        let rate = search(&LIMITS, &mut |asked| {
            let mut trial = path(asked, 2e6, 1e6, 0.3);
            trial.received = if trial.lost() > 0 { trial.received / 10 } else { trial.received };
            Ok(trial)
        })
        .unwrap();
        assert!((0.95..=1.0).contains(&(rate.ndr_pps / 1e6)), "{rate:?}");
    }

    #[test]
    fn a_path_that_always_loses_has_no_rate_and_trials_are_bounded() {
        let mut count = 0;
        let limits = Limits { trials: 12, ..LIMITS };
        let rate = search(&limits, &mut |asked| {
            count += 1;
            let mut trial = path(asked, 2e6, 1e6, 0.3);
            trial.received /= 2;
            Ok(trial)
        })
        .unwrap();
        assert_eq!((rate.ndr_pps, rate.pdr_pps), (0.0, 0.0));
        assert!(count <= 12, "{count}");
    }

    #[test]
    fn reordering_counts_where_the_path_was_not_overloaded() {
        let rate = search(&LIMITS, &mut |asked| {
            let mut trial = path(asked, 2e6, 1e6, 0.3);
            trial.reordered = if trial.lost() > 0 { 1_000_000 } else { 1 };
            Ok(trial)
        })
        .unwrap();
        assert!((1..100).contains(&rate.reordered), "{}", rate.reordered);
    }

    #[test]
    fn an_error_ends_the_search() {
        let mut left = 2;
        let result = search(&LIMITS, &mut |asked| {
            left -= 1;
            anyhow::ensure!(left > 0, "the pod is gone");
            Ok(path(asked, 2e6, 1e6, 0.3))
        });
        assert!(result.unwrap_err().to_string().contains("gone"));
    }
}
