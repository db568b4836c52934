//! Turns: each task on each data path, one path right after the other, then all of it again.
//!
//! In every turn another path is the first. What would be begun after the time is up is left out, so that the promise
//! about the length holds on slow machines as well; what was measured by then counts.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::Result;

use super::bed::Bed;
use super::measure::{self, measure};
use super::outcome::{Failure, Path, Samples};
use super::task::{Mode, Pace, Task, What};
use crate::interrupt;

/// A run under way.
pub struct Run<'a> {
    mode: Mode,
    tasks: &'a [Task],
    paths: &'a [Path],
    /// For each path its bed, if it could be built.
    beds: Vec<Option<Bed>>,
    started: Instant,
    samples: Samples,
    progress: Progress,
}

impl<'a> Run<'a> {
    /// A run of these tasks on these beds, which began at `started`.
    pub fn new(mode: Mode, tasks: &'a [Task], paths: &'a [Path], beds: Vec<Option<Bed>>, started: Instant) -> Run<'a> {
        Run { mode, tasks, paths, beds, started, samples: Samples::default(), progress: Progress::new(started) }
    }

    /// All turns. Fails only if it is interrupted; a measurement that fails is a reason in the result.
    pub fn all(&mut self) -> Result<()> {
        let turns = |task: &Task| self.paths.iter().map(|path| self.mode.turns(task, path.contender)).max();
        let most = self.tasks.iter().filter_map(turns).max().unwrap_or(0);
        for turn in 0..most {
            for task in 0..self.tasks.len() {
                if self.started.elapsed() < self.mode.budget() {
                    self.one(turn, task)?;
                }
            }
        }
        self.progress.end();
        self.explain_gaps();
        Ok(())
    }

    /// What was measured, and the beds, to be removed.
    pub fn finish(self) -> (Samples, Vec<Bed>) {
        (self.samples, self.beds.into_iter().flatten().collect())
    }

    fn one(&mut self, turn: usize, task: usize) -> Result<()> {
        let count = self.paths.len();
        let due: Vec<usize> =
            (0..count).map(|place| (place + turn) % count).filter(|path| self.is_due(turn, task, *path)).collect();
        if self.tasks[task].what == What::RoundTrip(Pace::Paused) {
            // Those that use no processor meanwhile share their pauses.
            let (spinning, quiet): (Vec<usize>, Vec<usize>) =
                due.into_iter().partition(|path| self.paths[*path].contender.spins());
            for together in [quiet, spinning] {
                self.paused(turn, task, &together)?;
            }
            return Ok(());
        }
        for path in due {
            interrupt::check()?;
            self.progress.show(turn, &self.tasks[task].name(), self.paths[path].label);
            let lengths = self.mode.lengths(&self.tasks[task]);
            let (task_, bed) = (&self.tasks[task], self.beds[path].as_mut().expect("what is due has a bed"));
            let taken = bed.wake(task_.layout, task_.links).and_then(|()| measure(task_, bed, &lengths));
            let taken = bed.rest().and(taken);
            self.take(turn, task, path, taken)?;
        }
        Ok(())
    }

    fn paused(&mut self, turn: usize, task: usize, together: &[usize]) -> Result<()> {
        if together.is_empty() {
            return Ok(());
        }
        interrupt::check()?;
        let (what, lengths) = (&self.tasks[task], self.mode.lengths(&self.tasks[task]));
        let labels: Vec<&str> = together.iter().map(|path| self.paths[*path].label).collect();
        self.progress.show(turn, &what.name(), &labels.join(" and "));
        for path in together {
            let bed = self.beds[*path].as_mut().expect("what is due has a bed");
            bed.wake(what.layout, what.links)?;
        }
        let beds: Vec<(&Bed, &Task)> =
            together.iter().filter_map(|path| self.beds[*path].as_ref()).map(|bed| (bed, what)).collect();
        let taken = measure::paused(&beds, &lengths);
        beds.iter().try_for_each(|(bed, _)| bed.rest())?;
        for (path, taken) in together.iter().zip(taken) {
            self.take(turn, task, *path, taken)?;
        }
        Ok(())
    }

    fn take(&mut self, turn: usize, task: usize, path: usize, taken: Result<measure::Figures>) -> Result<()> {
        // An interrupt shows as a failure of whatever was under way.
        interrupt::check()?;
        match taken {
            Ok(figures) => self.samples.add(task, path, turn, figures),
            Err(error) => self.samples.fail(
                Failure {
                    task: self.tasks[task].name(),
                    path: self.paths[path].id,
                    turn: turn + 1,
                    reason: format!("{error:#}"),
                },
                task,
                path,
            ),
        }
        Ok(())
    }

    fn is_due(&self, turn: usize, task: usize, path: usize) -> bool {
        let contender = self.paths[path].contender;
        self.beds[path].is_some()
            && !self.samples.is_refused(task, path)
            && self.tasks[task].applies_to(contender).is_ok()
            && turn < self.mode.turns(&self.tasks[task], contender)
    }

    /// Says of each task that was not done on a data path why.
    fn explain_gaps(&mut self) {
        for (number, task) in self.tasks.iter().enumerate() {
            for (place, path) in self.paths.iter().enumerate() {
                if self.samples.has(number, place) {
                    continue;
                }
                let reason = match task.applies_to(path.contender) {
                    Err(reason) => reason,
                    Ok(()) if self.mode.turns(task, path.contender) == 0 => "only with --full",
                    Ok(()) => "the time was up",
                };
                self.samples.refuse(number, place, reason.to_owned());
            }
        }
    }
}

/// One line that says what is going on, on a terminal.
struct Progress {
    started: Instant,
    is_shown: bool,
}

impl Progress {
    fn new(started: Instant) -> Progress {
        Progress { started, is_shown: std::io::stderr().is_terminal() }
    }

    fn show(&self, turn: usize, task: &str, path: &str) {
        if self.is_shown {
            let line = format!("{}  turn {}: {task} on {path}", clock(self.started.elapsed()), turn + 1);
            let _ = write!(std::io::stderr().lock(), "\r\x1b[K{line}");
        }
    }

    fn end(&self) {
        if self.is_shown {
            let _ = write!(std::io::stderr().lock(), "\r\x1b[K");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}

fn clock(elapsed: Duration) -> String {
    format!("{:2}:{:02}", elapsed.as_secs() / 60, elapsed.as_secs() % 60)
}
