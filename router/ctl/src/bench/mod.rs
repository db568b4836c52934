//! `weft bench`: Weft beside other data paths, on the same machine in the same run.
//!
//! Each data path ([`contender`]) is built in namespaces in the same layout, two nodes with two pods each and the same
//! MTUs ([`bed`]; the kernel's and Weft's by the lab, the others' by [`ovs`] and [`testpmd`]). Each task ([`task`]) is done on one
//! after the other, in turns ([`schedule`], [`measure`]), by `iperf3` for bulk ([`iperf`]) and by programs of our own for
//! round trips and connections ([`programs`]), by programs in the kernel for single frames ([`frames`]), and as a container runtime does
//! for the pods' attaching ([`attach`]). What comes of it are medians, spreads and, above all, ratios within the
//! run ([`outcome`]), as a table ([`report`]), a file and a picture ([`chart`]).
//!
//! A path that cannot be built here is named, with the reason and what helps. Nothing is left behind, however the run
//! ends; if it is killed, the next run removes what it left.

mod attach;
mod bed;
mod chart;
mod contender;
mod frames;
mod iperf;
mod machine;
mod measure;
mod outcome;
mod ovs;
mod programs;
mod report;
mod schedule;
mod task;
mod testpmd;
mod usage;

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::lab::up::Programs;
use crate::lab::{self, plan};
use crate::output::{self, Style};
use bed::Bed;
use contender::{CONTENDERS, Contender};
use machine::Machine;
use outcome::{Outcome, Path};
use schedule::Run;
use task::{Mode, Task};

pub use programs::{Program, run as run_program};

/// What to measure.
#[derive(Debug, Args)]
pub struct Bench {
    /// All rows, five turns of each, in under twenty minutes; otherwise those that matter most, in under three.
    #[arg(long)]
    full: bool,
    /// Each row once and as briefly as can be, to see that it works; the figures mean nothing.
    #[arg(long, hide = true, conflicts_with = "full")]
    smoke: bool,
    /// Only these rows: a whole name, or a part that many have, e.g. same-tcp.
    #[arg(long, value_name = "ROW", num_args = 1.., value_delimiter = ',')]
    only: Vec<String>,
    /// Only these data paths.
    #[arg(long, value_name = "PATH", num_args = 1.., value_delimiter = ',', value_parser = path_names())]
    paths: Vec<String>,
    /// Workers of each node's weftd; as many as it chooses unless given.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=i64::from(plan::MAX_WORKERS)))]
    workers: Option<u8>,
    /// Write everything that was measured to this file, as JSON; `-` is the standard output, then without a table.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw a chart into this file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// What the names of the labs that are built begin with.
    #[arg(long, hide = true, default_value = "bench")]
    name: String,
    #[command(flatten)]
    binaries: lab::Binaries,
}

/// Measures, and shows what came of it.
pub fn run(args: &Bench) -> Result<()> {
    let started = Instant::now();
    lab::prepare()?;
    for program in ["iperf3", "ethtool"] {
        if !is_installed(program) {
            bail!("the program `{program}` is missing; install it with `apt-get install {program}`");
        }
    }
    let tasks = args.tasks()?;
    args.check_files()?;
    let programs = args.binaries.find()?;
    plan::check_name(&args.name)?;
    let machine = Machine::look()?;
    if let Some(warning) = machine.warning() {
        output::complain(&warning);
    }
    let (paths, beds) = build_all(args, &programs)?;
    let mut run = Run::new(args.mode(), &tasks, &paths, beds, started);
    run.all()?;
    let (samples, beds) = run.finish();
    let removed: Vec<Result<()>> = beds.into_iter().map(Bed::remove).collect();
    let rows = samples.rows(&tasks, &paths);
    let outcome = Outcome {
        version: outcome::VERSION,
        weft: env!("CARGO_PKG_VERSION"),
        mode: args.mode().name(),
        machine,
        seconds: started.elapsed().as_secs_f64(),
        workers: args.workers,
        pause: args.mode().pause().as_secs_f64(),
        failures: samples.into_failures(),
        paths,
        rows,
    };
    show(args, &outcome)?;
    removed.into_iter().collect::<Result<()>>()?;
    complain_about_failures(&outcome)
}

impl Bench {
    fn mode(&self) -> Mode {
        match (self.full, self.smoke) {
            (true, _) => Mode::Full,
            (_, true) => Mode::Smoke,
            _ => Mode::Short,
        }
    }

    /// An error if a file cannot be written: better now than in twenty minutes.
    fn check_files(&self) -> Result<()> {
        for path in [&self.json, &self.svg].into_iter().flatten().filter(|path| path.as_os_str() != "-") {
            let file = fs::OpenOptions::new().create(true).append(true).open(path);
            file.with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    fn contenders(&self) -> Vec<&'static Contender> {
        let is_meant =
            |contender: &&Contender| self.paths.is_empty() || self.paths.iter().any(|path| path == contender.id);
        CONTENDERS.iter().filter(is_meant).collect()
    }

    fn tasks(&self) -> Result<Vec<Task>> {
        let tasks: Vec<Task> = Task::all().into_iter().filter(|task| is_meant(task, &self.only)).collect();
        if tasks.is_empty() {
            let all: Vec<String> = Task::all().iter().map(Task::name).collect();
            bail!("no row has {} in its name; there are {}", self.only.join(" or "), all.join(" "));
        }
        Ok(tasks)
    }
}

/// Whether somebody who asks for these rows means a task. The whole name of one does not mean others that contain it.
fn is_meant(task: &Task, only: &[String]) -> bool {
    let is_whole = |wanted: &String| Task::all().iter().any(|task| task.rows().any(|row| row == *wanted));
    let is_wanted = |row: &String| {
        only.iter().any(|wanted| if is_whole(wanted) { row == wanted } else { row.contains(wanted.as_str()) })
    };
    only.is_empty() || task.rows().any(|row| is_wanted(&row))
}

/// Builds what can be built; says of each other path why it cannot.
fn build_all(args: &Bench, programs: &Programs) -> Result<(Vec<Path>, Vec<Option<Bed>>)> {
    for contender in &CONTENDERS {
        bed::remove_abandoned(&bed::lab_name(&args.name, contender))?;
    }
    let (mut paths, mut beds) = (Vec::new(), Vec::new());
    for contender in args.contenders() {
        let (bed, reason) = match bed::missing(contender) {
            Some(reason) => (None, Some(reason)),
            None => {
                output::progress(&format!("building: {}", contender.label));
                match Bed::build(contender, &args.name, programs, args.workers) {
                    Ok(bed) => (Some(bed), None),
                    // Without the kernel's or our own path there is nothing to compare.
                    Err(error) if contender.is_dispensable() => {
                        crate::interrupt::check()?;
                        (None, Some(format!("{error:#}")))
                    }
                    Err(error) => return Err(error).with_context(|| format!("cannot build {}", contender.label)),
                }
            }
        };
        beds.push(bed);
        paths.push(Path { id: contender.id, label: contender.label, not_measured: reason, contender });
    }
    Ok((paths, beds))
}

fn show(args: &Bench, outcome: &Outcome) -> Result<()> {
    let write = |path: &PathBuf, text: String| {
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    if let Some(path) = &args.svg {
        write(path, chart::render(outcome))?;
    }
    match &args.json {
        Some(path) if path.as_os_str() == "-" => return output::print_json(outcome),
        Some(path) => write(path, serde_json::to_string_pretty(outcome)? + "\n")?,
        None => {}
    }
    output::print(&report::render(outcome, Style::stdout()))
}

/// A measurement that failed on a path that was built is an error, after all others were shown.
fn complain_about_failures(outcome: &Outcome) -> Result<()> {
    if outcome.failures.is_empty() {
        return Ok(());
    }
    let failures: Vec<String> = outcome.failures.iter().map(ToString::to_string).collect();
    bail!("not all could be measured:\n  {}", failures.join("\n  "))
}

/// Whether a program is where programs are looked for.
fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

fn path_names() -> clap::builder::PossibleValuesParser {
    CONTENDERS.map(|contender| contender.id).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_name_means_one_row_and_a_part_means_all_that_have_it() {
        let meant = |only: &str| -> Vec<String> {
            let only = [only.to_owned()];
            Task::all().iter().filter(|task| is_meant(task, &only)).map(Task::name).collect()
        };
        assert_eq!(meant("same-tcp-1"), ["same-tcp-1"]);
        assert_eq!(meant("two-rtt-p50"), ["two-rtt"]);
        assert_eq!(meant("same-tcp").len(), 12);
        assert!(meant("nonsense").is_empty());
        assert!(Task::all().iter().all(|task| is_meant(task, &[])));
    }
}
