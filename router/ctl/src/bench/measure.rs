//! Taking one measurement of one data path.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::attach;
use super::bed::{Bed, Ends};
use super::frames::{self, Mix};
use super::iperf::Bulk;
use super::programs::{self, Connected, RoundTrips};
use super::task::{Lengths, Pace, Sizes, Task, What};
use super::usage::{self, Usage};
use crate::lab::peer::Peer;

/// How long a stream runs before anything is measured beside it.
const LOAD_FIRST: Duration = Duration::from_millis(200);

/// The figures of a task, in the order of [`Task::figures`]. One that has no meaning on this data path is absent.
pub type Figures = Vec<Option<f64>>;

/// Does a task on a bed that is awake.
pub fn measure(task: &Task, bed: &Bed, lengths: &Lengths) -> Result<Figures> {
    let ends = bed.ends(task.layout);
    match task.what {
        What::Tcp { streams, reverse } => {
            let pids = bed.pids(task.layout);
            bulk(&ends, &pids, Bulk { streams, reverse, seconds: lengths.tcp_seconds }).map(|mut figures| {
                figures.truncate(task.figures().len());
                figures
            })
        }
        What::RoundTrip(Pace::ClosedLoop) => PingPong::start(&ends, lengths.round, None)?.figures(),
        What::RoundTrip(Pace::Paused) => paused(&[(bed, task)], lengths).pop().unwrap_or_else(|| bail!("no bed")),
        What::RoundTrip(Pace::UnderLoad) => under_load(&ends, lengths.round),
        What::Connections => connections(&ends, lengths.round),
        What::Frames(sizes) => frames(bed, task, sizes, &lengths.search),
        What::Memory => memory(bed, task),
        What::Attach => attach::attach(bed, lengths.pods),
    }
}

/// Lets all of these beds have a ping-pong with pauses at the same time, each in the pauses of the others.
pub fn paused(beds: &[(&Bed, &Task)], lengths: &Lengths) -> Vec<Result<Figures>> {
    let length = lengths.pause * lengths.paused_count;
    let share = lengths.pause / u32::try_from(beds.len().max(1)).unwrap_or(u32::MAX);
    let start = |(index, (bed, task)): (usize, &(&Bed, &Task))| {
        let delay = share * u32::try_from(index).unwrap_or(0);
        PingPong::start(&bed.ends(task.layout), length, Some(Pauses { pause: lengths.pause, delay }))
    };
    let started: Vec<Result<PingPong>> = beds.iter().enumerate().map(start).collect();
    started.into_iter().map(|ping_pong| ping_pong?.figures()).collect()
}

fn bulk(ends: &Ends, pids: &[u32], bulk: Bulk) -> Result<Figures> {
    let before = Usage::now(pids)?;
    let arrived = bulk.run(&ends.from, &ends.to)?;
    let used = Usage::now(pids)?.since(before);
    let gigabytes = arrived.bytes / 1e9;
    let routers = (!pids.is_empty()).then_some(used.processes / gigabytes);
    Ok(vec![Some(arrived.gbps), Some(used.machine / gigabytes), routers])
}

struct Pauses {
    pause: Duration,
    delay: Duration,
}

/// A ping-pong that runs.
struct PingPong {
    _server: Peer,
    client: Peer,
    length: Duration,
}

impl PingPong {
    fn start(ends: &Ends, length: Duration, pauses: Option<Pauses>) -> Result<PingPong> {
        let pauses = pauses.unwrap_or(Pauses { pause: Duration::ZERO, delay: Duration::ZERO });
        let in_all = length + pauses.delay;
        let (server, to) = programs::serve(&ends.to.netns, "echo", ends.to.address, in_all)?;
        let rest = [("seconds", length), ("pause", pauses.pause), ("delay", pauses.delay)];
        let client = programs::client(&ends.from.netns, "ping", to, &rest)?;
        Ok(PingPong { _server: server, client, length: in_all })
    }

    fn figures(mut self) -> Result<Figures> {
        let trips: RoundTrips = self.client.hear(programs::deadline(self.length))?;
        if trips.lost > trips.answered {
            bail!("{} of {} requests were lost", trips.lost, trips.lost + trips.answered);
        }
        Ok(vec![Some(trips.p50), Some(trips.p99), Some(trips.p999), Some(trips.one_cpu)])
    }
}

fn under_load(ends: &Ends, length: Duration) -> Result<Figures> {
    // It is ended when it is no longer needed; until then it must not end by itself, however slow the machine is.
    let seconds = u32::try_from(length.as_secs()).unwrap_or(u32::MAX - 10) + 10;
    let bulk = Bulk { streams: 1, reverse: false, seconds: Some(seconds) };
    let mut load = bulk.start(&ends.from, &ends.to)?;
    thread::sleep(LOAD_FIRST);
    let figures = PingPong::start(ends, length, None).and_then(PingPong::figures);
    load.check().context("the stream that was to run beside it")?;
    figures
}

fn connections(ends: &Ends, length: Duration) -> Result<Figures> {
    let (_server, to) = programs::serve(&ends.to.netns, "accept", ends.to.address, length)?;
    let mut client = programs::client(&ends.from.netns, "connect", to, &[("seconds", length)])?;
    let connected: Connected = client.hear(programs::deadline(length))?;
    Ok(vec![Some(connected.connections as f64 / connected.seconds)])
}

fn frames(bed: &Bed, task: &Task, sizes: Sizes, limits: &frames::Limits) -> Result<Figures> {
    // Whatever is learned on the way is learned by this, and neighbours are resolved.
    bed.check(task.layout)?;
    let mix = match sizes {
        Sizes::Small => Mix::SMALL,
        Sizes::Imix => Mix::Imix,
    };
    let rate = frames::search(&bed.frame_ends(task.layout)?, mix, limits)?;
    // What carries all carries nearly all, whichever of the two searches was cut short.
    let pdr_pps = rate.pdr_pps.max(rate.ndr_pps);
    let millions = [rate.ndr_pps, pdr_pps, rate.offered_max_pps].map(|pps| Some(pps / 1e6));
    Ok(millions.into_iter().chain([Some(rate.reordered as f64)]).collect())
}

fn memory(bed: &Bed, task: &Task) -> Result<Figures> {
    let pids = bed.pids(task.layout);
    let pid = pids.first().context("it has no process of its own")?;
    Ok(vec![Some(usage::resident(*pid)? as f64 / f64::from(1 << 20))])
}
