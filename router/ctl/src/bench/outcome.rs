//! What was measured, turn by turn, and what follows from it: medians, spreads, ratios.
//!
//! A ratio is formed within a turn, from two measurements that were taken one right after the other, and the median is
//! that of the ratios: what slows the machine for a while slows both and cancels. Spread is the least and the greatest
//! of the turns. The structures below are what `--json` writes; the names of their fields are an interface.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::contender::Contender;
use super::machine::Machine;
use super::measure::Figures;
use super::task::{Figure, Task};

/// Why a path has no figure of its own though its task was done.
const NO_ROUTER: &str = "it has no process of its own";

/// The version of the file.
pub const VERSION: u32 = 1;

/// Everything that a run found out.
#[derive(Debug, Serialize)]
pub struct Outcome {
    /// Of this structure.
    pub version: u32,
    /// Of Weft.
    pub weft: &'static str,
    /// `short` or `full`.
    pub mode: &'static str,
    /// What it ran on.
    pub machine: Machine,
    /// Workers that each weftd was told to have.
    pub workers: Option<u8>,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// Seconds between the requests of a ping-pong with pauses.
    pub pause: f64,
    /// The data paths.
    pub paths: Vec<Path>,
    /// The figures.
    pub rows: Vec<Row>,
    /// What was tried and failed.
    pub failures: Vec<Failure>,
}

/// A measurement that failed. It is not tried again in the run.
#[derive(Debug, Clone, Serialize)]
pub struct Failure {
    /// Which task.
    pub task: String,
    /// On which data path.
    pub path: &'static str,
    /// In which turn, counted from 1.
    pub turn: usize,
    /// Why.
    pub reason: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {}, turn {}: {}", self.task, self.path, self.turn, self.reason)
    }
}

/// A data path.
#[derive(Debug, Clone, Serialize)]
pub struct Path {
    /// Its name.
    pub id: &'static str,
    /// Its name for people.
    pub label: &'static str,
    /// Why it could not be built, if so.
    pub not_measured: Option<String>,
    #[serde(skip)]
    pub contender: &'static Contender,
}

/// One figure, on all data paths.
#[derive(Debug, Serialize)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// What it is, for people.
    pub label: String,
    /// `same`: two pods of a node; `two`: pods of two nodes.
    pub layout: &'static str,
    /// What it counts.
    pub unit: &'static str,
    /// Whether more of it is better.
    pub more_is_better: bool,
    /// On each data path.
    pub results: Vec<Measured>,
    /// Weft's divided by the others'.
    pub ratios: Vec<Ratio>,
    #[serde(skip)]
    pub figure: Figure,
    #[serde(skip)]
    pub task: String,
}

/// A figure on a data path.
#[derive(Debug, Serialize)]
pub struct Measured {
    /// The data path.
    pub path: &'static str,
    /// Its summary, if it was measured.
    #[serde(flatten)]
    pub summary: Option<Summary>,
    /// Why it was not, otherwise.
    pub not_measured: Option<String>,
}

/// Weft's figure divided by another data path's.
#[derive(Debug, Serialize)]
pub struct Ratio {
    /// Which Weft.
    pub path: &'static str,
    /// Which other.
    pub to: &'static str,
    /// Over the turns.
    #[serde(flatten)]
    pub summary: Summary,
}

/// Several values of one thing.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// The middle one, or the mean of the middle two.
    pub median: f64,
    /// The least.
    pub low: f64,
    /// The greatest.
    pub high: f64,
    /// All, turn by turn.
    pub values: Vec<f64>,
}

impl Summary {
    /// Of these; none if there are none.
    pub fn of(values: Vec<f64>) -> Option<Summary> {
        let mut sorted = values.clone();
        sorted.sort_by(f64::total_cmp);
        let (low, high) = (*sorted.first()?, *sorted.last()?);
        let (lower, upper) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        Some(Summary { median: f64::midpoint(lower, upper), low, high, values })
    }
}

/// What was measured so far. Tasks and data paths are known by their places in the lists of the run.
#[derive(Debug, Default)]
pub struct Samples {
    /// By task, figure and data path; then by turn.
    values: BTreeMap<(usize, usize, usize), BTreeMap<usize, f64>>,
    /// Why a task is not measured on a data path, or no longer.
    reasons: BTreeMap<(usize, usize), String>,
    failures: Vec<Failure>,
}

impl Samples {
    /// Takes down what came of a task on a data path.
    pub fn add(&mut self, task: usize, path: usize, turn: usize, figures: Figures) {
        for (figure, value) in figures.into_iter().enumerate() {
            if let Some(value) = value.filter(|value| value.is_finite()) {
                self.values.entry((task, figure, path)).or_default().insert(turn, value);
            }
        }
    }

    /// Takes down why there is no value. The first reason stays.
    pub fn refuse(&mut self, task: usize, path: usize, reason: String) {
        self.reasons.entry((task, path)).or_insert(reason);
    }

    /// Takes down that a measurement failed; there will be no other.
    pub fn fail(&mut self, failure: Failure, task: usize, path: usize) {
        self.refuse(task, path, format!("failed: {}", failure.reason));
        self.failures.push(failure);
    }

    /// Those that failed.
    pub fn into_failures(self) -> Vec<Failure> {
        self.failures
    }

    /// Whether there is such a reason.
    pub fn is_refused(&self, task: usize, path: usize) -> bool {
        self.reasons.contains_key(&(task, path))
    }

    /// Whether there is a value of the task.
    pub fn has(&self, task: usize, path: usize) -> bool {
        self.values.range((task, 0, 0)..(task + 1, 0, 0)).any(|((_, _, of), _)| *of == path)
    }

    /// The rows.
    pub fn rows(&self, tasks: &[Task], paths: &[Path]) -> Vec<Row> {
        let mut rows = Vec::new();
        for (number, task) in tasks.iter().enumerate() {
            for (place, figure) in task.figures().iter().enumerate() {
                rows.push(self.row((number, task), (place, figure), paths));
            }
        }
        rows
    }

    fn row(&self, (task_number, task): (usize, &Task), (place, figure): (usize, &Figure), paths: &[Path]) -> Row {
        let turns = |path| self.values.get(&(task_number, place, path));
        let measured = |(index, path): (usize, &Path)| {
            let summary = turns(index).and_then(|turns| Summary::of(turns.values().copied().collect()));
            let reason = || {
                let told = path.not_measured.as_ref().or_else(|| self.reasons.get(&(task_number, index)));
                told.cloned().unwrap_or_else(|| NO_ROUTER.to_owned())
            };
            let not_measured = summary.is_none().then(reason);
            Measured { path: path.id, summary, not_measured }
        };
        let mut ratios = Vec::new();
        let wefts = paths.iter().enumerate().filter(|(_, path)| figure.is_compared && path.contender.is_weft());
        for (weft, path) in wefts {
            for (other, to) in paths.iter().enumerate().filter(|(_, path)| !path.contender.is_weft()) {
                let summary = turns(weft).zip(turns(other)).and_then(|(above, below)| quotients(above, below));
                ratios.extend(summary.map(|summary| Ratio { path: path.id, to: to.id, summary }));
            }
        }
        let label = match (task.label(), figure.label) {
            (label, "") => label,
            (label, part) => format!("{label}, {part}"),
        };
        Row {
            name: format!("{}{}", task.name(), figure.suffix),
            label,
            layout: task.layout.name(),
            unit: figure.unit,
            more_is_better: figure.more_is_better,
            results: paths.iter().enumerate().map(measured).collect(),
            ratios,
            figure: *figure,
            task: task.name(),
        }
    }
}

/// The ratios of those turns in which both were measured.
fn quotients(above: &BTreeMap<usize, f64>, below: &BTreeMap<usize, f64>) -> Option<Summary> {
    let quotient =
        |(turn, value): (&usize, &f64)| below.get(turn).filter(|below| **below > 0.0).map(|below| value / below);
    Summary::of(above.iter().filter_map(quotient).collect())
}

#[cfg(test)]
pub mod tests {
    use super::super::contender::CONTENDERS;
    use super::super::task::{Layout, Links, What};
    use super::*;

    /// A run with three turns of one task on Weft and the kernel, and none on the others.
    pub fn example() -> Outcome {
        let task = Task { what: What::Tcp { streams: 1, reverse: false }, layout: Layout::Same, links: Links::Whole };
        let path = |contender: &'static Contender| Path {
            id: contender.id,
            label: contender.label,
            not_measured: contender.is_guest().then(|| "there is no OVS: install it".to_owned()),
            contender,
        };
        let mut samples = Samples::default();
        for (turn, (weft, kernel)) in [(10.0, 20.0), (9.0, 10.0), (30.0, 40.0)].into_iter().enumerate() {
            samples.add(0, 0, turn, vec![Some(weft), Some(0.5), Some(0.25)]);
            samples.add(0, 1, turn, vec![Some(kernel), Some(0.25), None]);
        }
        let paths: Vec<Path> = CONTENDERS.iter().map(path).collect();
        let rows = samples.rows(&[task], &paths);
        let machine = Machine {
            cpu: "some CPU <fast>".into(),
            cpus: 2,
            kernel: "6.18".into(),
            load: 0.1,
            busy: 0.01,
            date: "2026-11-22T05:00:00Z".into(),
        };
        let failure = Failure { task: task.name(), path: "kernel", turn: 4, reason: "it broke".into() };
        samples.fail(failure, 0, 1);
        let failures = samples.into_failures();
        Outcome {
            version: VERSION,
            weft: "0",
            mode: "short",
            machine,
            workers: None,
            seconds: 100.0,
            pause: 0.1,
            paths,
            rows,
            failures,
        }
    }

    #[test]
    fn a_median_is_the_middle_and_the_spread_the_extremes() {
        let of =
            |values: &[f64]| Summary::of(values.to_vec()).map(|summary| (summary.median, summary.low, summary.high));
        assert_eq!(of(&[9.0, 1.0, 5.0]), Some((5.0, 1.0, 9.0)));
        assert_eq!(of(&[4.0, 2.0]), Some((3.0, 2.0, 4.0)));
        assert_eq!(of(&[]), None);
    }

    #[test]
    fn ratios_are_formed_within_a_turn() {
        let outcome = example();
        let row = &outcome.rows[0];
        assert_eq!(row.name, "same-tcp-1");
        let ratio = &row.ratios[0];
        assert_eq!((ratio.path, ratio.to, row.ratios.len()), ("weft", "kernel", 1));
        // 0.5, 0.9, 0.75; the ratio of the medians would be 0.5.
        assert!((ratio.summary.median - 0.75).abs() < 1e-9, "{ratio:?}");
    }

    #[test]
    fn a_turn_that_only_one_of_them_had_makes_no_ratio() {
        let turns = |values: &[(usize, f64)]| values.iter().copied().collect::<BTreeMap<_, _>>();
        let summary = quotients(&turns(&[(0, 1.0), (1, 8.0)]), &turns(&[(1, 2.0), (2, 1.0)])).unwrap();
        assert_eq!(summary.values, [4.0]);
        assert_eq!(quotients(&turns(&[(0, 1.0)]), &turns(&[(0, 0.0)])), None);
    }

    #[test]
    fn what_was_not_measured_says_why() {
        let outcome = example();
        let reason = |row: usize, path: usize| outcome.rows[row].results[path].not_measured.as_deref();
        assert_eq!(reason(0, 0), None);
        assert_eq!(reason(0, 3), Some("there is no OVS: install it"));
        assert_eq!(reason(2, 1), Some(NO_ROUTER));
    }

    #[test]
    fn the_file_has_the_agreed_shape() {
        let value = serde_json::to_value(example()).unwrap();
        assert_eq!(value["version"], 1);
        assert_eq!(value["machine"]["cpus"], 2);
        assert_eq!(value["paths"][3]["not_measured"], "there is no OVS: install it");
        let row = &value["rows"][0];
        assert_eq!(
            (&row["name"], &row["layout"], &row["unit"]),
            (&"same-tcp-1".into(), &"same".into(), &"Gb/s".into())
        );
        assert_eq!(row["results"][1]["median"], 20.0);
        assert_eq!(row["results"][1]["values"], serde_json::json!([20.0, 10.0, 40.0]));
        assert_eq!(row["results"][2]["median"], serde_json::Value::Null);
        assert_eq!((&row["ratios"][0]["to"], &row["ratios"][0]["low"]), (&"kernel".into(), &0.5.into()));
    }
}
