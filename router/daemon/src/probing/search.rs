//! How much a path carries: found by asking for many sizes at once.
//!
//! A round is a volley of questions of different lengths; the longest that was answered is the new lower end, the shortest that was not is
//! the new upper end, and the next round asks for sizes between them. The first round asks for the sizes that paths have most often, so
//! one round trip says what is needed to go on, and two or three more what is exact. Each size is asked for a few times in a round, since one
//! packet may be lost for any reason; and more often, the more is lost of what is short enough.

use std::time::Duration;

use weft_router::Instant;

/// MTUs that paths have: Ethernet with and without jumbo frames, less the headers of what packets are often wrapped in.
const USUAL: [u32; 24] = [
    9216, 9000, 8950, 8192, 6000, 4352, 3000, 2048, 1550, 1500, 1492, 1480, 1476, 1462, 1450, 1436, 1420, 1412, 1400,
    1380, 1350, 1300, 1280, 576,
];
/// Sizes between the two ends that a later round asks for.
const BETWEEN: u32 = 8;
/// How often a size is asked for in a round, if the path loses nothing.
const TIMES: u32 = 3;
/// If it does, so often that all of them are lost by chance with no more than this probability, within a limit.
const CHANCE: f64 = 1e-5;
const MOST_TIMES: u32 = 20;
/// The same where nothing that is short enough was lost so far.
const SMALL_CHANCE: f64 = 1e-2;
/// Rounds in all: each divides what is left by nine, so that this is enough for any path.
const ROUNDS: u32 = 7;

/// A search under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Search {
    /// The longest that is known to arrive; 0 if none is.
    low: u32,
    /// Whether it began without anything that is known to arrive.
    is_for_less: bool,
    /// The shortest that is known not to.
    high: u32,
    /// What was asked for in this round, and whether it was answered.
    asked: Vec<(u32, bool)>,
    /// Questions of the rounds before that were short enough, and how many of them were answered.
    short: (u32, u32),
    /// When the round is to be asked for the next time, and how often it was.
    next: Instant,
    times: u32,
    rounds: u32,
    /// When the last answer came.
    heard: Option<Instant>,
}

/// How a search goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing is to be done before that.
    Wait(Instant),
    /// These are to be asked for: see [`Search::unanswered`].
    Ask,
    /// The longest packet that arrives has this length; none was answered at all if it is 0.
    Found(u32),
}

impl Search {
    /// Looks for the longest packet that arrives, above `low` (which does, or is 0 if nobody knows) and up to `most`; `overhead` is what is
    /// wrapped around each.
    pub fn new(low: u32, least: u32, most: u32, overhead: u32, now: Instant) -> Search {
        let usual = USUAL.iter().map(|mtu| mtu.saturating_sub(overhead));
        let mut sizes: Vec<u32> = usual.filter(|size| (least.max(low + 1)..most).contains(size)).collect();
        sizes.push(most);
        if low == 0 && least < most {
            sizes.push(least);
        }
        Search { high: most + 1, is_for_less: low == 0, ..Search::round(low, sizes, now) }
    }

    fn round(low: u32, mut sizes: Vec<u32>, now: Instant) -> Search {
        sizes.sort_unstable();
        sizes.dedup();
        let asked = sizes.into_iter().map(|size| (size, false)).collect();
        Search { low, is_for_less: false, high: 0, asked, short: (0, 0), next: now, times: 0, rounds: 1, heard: None }
    }

    /// A packet of this length arrived.
    pub fn answered(&mut self, size: u32, now: Instant) {
        if let Some((_, answered)) = self.asked.iter_mut().find(|(asked, _)| *asked == size) {
            *answered = true;
            self.heard = Some(now);
        }
        self.low = self.low.max(size);
    }

    /// Whether it looks for what still gets through, and not for what does by now.
    pub fn is_for_less(&self) -> bool {
        self.is_for_less
    }

    /// The longest packet that is known to arrive, so far.
    pub fn low(&self) -> u32 {
        self.low
    }

    /// Whether longer ones than that were asked for so often that they do not arrive, and not by chance.
    pub fn is_tried(&self) -> bool {
        self.rounds > 1 || self.unanswered().count() as u32 * self.times >= self.lost_by_chance()
    }

    /// What is to be asked for again in this round. What is shorter than what arrived need not be.
    pub fn unanswered(&self) -> impl Iterator<Item = u32> + '_ {
        self.asked.iter().filter(|(size, answered)| !answered && *size > self.low).map(|(size, _)| *size)
    }

    /// What is to be done now. An answer that has not come `patience` after its question does not come.
    pub fn step(&mut self, now: Instant, patience: Duration) -> Step {
        let is_over = self.unanswered().next().is_none();
        if now < self.next && !is_over {
            return Step::Wait(self.next);
        }
        let times = self.times_needed();
        if self.times < times && !is_over {
            self.times += 1;
            // Once some have been heard, the others are behind by no more than that.
            self.next = now + patience / if self.times < times { 2 } else { 1 };
            return Step::Ask;
        }
        self.high = self.unanswered().min().unwrap_or(self.high).min(self.high);
        let gap = self.high.saturating_sub(self.low);
        if gap <= 1 || self.low == 0 || self.rounds >= ROUNDS {
            return Step::Found(self.low);
        }
        let points = BETWEEN.min(gap - 1);
        let sizes = (1..=points).map(|point| self.low + gap * point / (points + 1)).collect();
        let rounds = self.rounds + 1;
        let is_for_less = self.is_for_less;
        let short = self.short_ones();
        *self = Search { high: self.high, is_for_less, short, rounds, ..Search::round(self.low, sizes, now) };
        self.step(now, patience)
    }

    /// Of all questions so far, those that were no longer than what arrived, and how many of them were answered. Each is asked again until it, or
    /// a longer one, is answered.
    fn short_ones(&self) -> (u32, u32) {
        let short = self.asked.iter().filter(|(size, _)| *size <= self.low);
        let (asked, answered) = short.fold((0, 0), |(all, answered), (_, is)| (all + 1, answered + u32::from(*is)));
        (self.short.0 + asked, self.short.1 + answered)
    }

    /// How often what is not answered is to be asked for before it counts as too long.
    fn times_needed(&self) -> u32 {
        let (asked, answered) = self.short_ones();
        if asked == answered { TIMES } else { self.lost_by_chance().clamp(TIMES, MOST_TIMES) }
    }

    /// How many questions in a row are hardly lost by chance, as many of the short ones are.
    fn lost_by_chance(&self) -> u32 {
        let (asked, answered) = self.short_ones();
        // As if one more had been lost and one more answered, for few say little.
        let lost = f64::from(asked - answered + 1) / f64::from(asked + 2);
        let chance = if asked == answered { SMALL_CHANCE } else { CHANCE };
        (chance.ln() / lost.ln()).ceil() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_millis(30);

    /// Searches a path that carries `mtu`, whose answers take `rtt`, and where every n-th question is lost. Returns what was found, how many
    /// rounds it took and how many questions.
    fn search(low: u32, most: u32, mtu: u32, lossy: usize) -> (u32, u32, usize) {
        let mut now = Instant(1_000_000_000);
        let mut search = Search::new(low, 60, most, 50, now);
        let mut asked = 0;
        for _ in 0..1000 {
            match search.step(now, PATIENCE) {
                Step::Found(size) => return (size, search.rounds, asked),
                Step::Wait(until) => now = until,
                Step::Ask => {
                    for size in search.unanswered().collect::<Vec<_>>() {
                        asked += 1;
                        if size <= mtu && (lossy == 0 || asked % lossy != 0) {
                            search.answered(size, now);
                        }
                    }
                }
            }
        }
        panic!("it does not end");
    }

    #[test]
    fn every_path_is_measured_to_the_byte_in_a_few_rounds() {
        for most in [1450, 8950] {
            for mtu in (60..=most).step_by(7).chain([1414, 1450, most]) {
                let (found, rounds, asked) = search(0, most, mtu, 0);
                assert_eq!(found, mtu, "of {most}");
                assert!(rounds <= 5 && asked < 250, "{mtu} of {most}: {rounds} rounds, {asked} questions");
            }
        }
    }

    #[test]
    fn the_usual_sizes_are_found_in_two_rounds() {
        for mtu in [1350, 1362, 1370, 1400] {
            let now = Instant(5);
            let mut search = Search::new(0, 60, 1450, 50, now);
            assert_eq!(search.step(now, PATIENCE), Step::Ask);
            let all: Vec<u32> = search.unanswered().collect();
            all.iter().filter(|size| **size <= mtu).for_each(|size| search.answered(*size, now));
            assert_eq!(search.low(), all.iter().copied().filter(|size| *size <= mtu).max().unwrap());
            assert!(mtu - search.low() < 50, "{mtu}: one round trip says {}", search.low());
        }
    }

    #[test]
    fn a_path_that_became_wider_is_searched_above_what_it_carried() {
        assert_eq!(search(1350, 8950, 8950, 0).0, 8950);
        assert_eq!(search(1350, 1450, 1414, 0).0, 1414);
        assert_eq!(search(1350, 1450, 1350, 0).0, 1350);
    }

    #[test]
    fn a_question_that_is_lost_is_asked_again() {
        for lossy in 2..6 {
            let (found, ..) = search(0, 1450, 1450, lossy);
            assert_eq!(found, 1450, "every {lossy}th is lost");
        }
    }

    #[test]
    fn who_answers_nothing_is_given_up_after_one_round() {
        let (found, rounds, asked) = search(0, 1450, 0, 0);
        assert_eq!((found, rounds), (0, 1));
        assert!(asked < 60, "{asked}");
    }
}
