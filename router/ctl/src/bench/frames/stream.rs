//! A stream between two ends: programs in place, and one trial after the other.
//!
//! The sink is attached by a link and goes with its descriptor, however this process ends. The generator is not attached
//! at all: a thread that has entered the sender's namespace runs it until the trial is over.

use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::thread::{CpuSet, LinkNameSpaceType, move_into_link_name_space, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};
use weft_router::port::sys::bpf::{Link, Map, MapKind, Mode, Program};

use super::device::{Device, Napi};
use super::programs::{self, FRACTIONS, Headers, generator, sink};
use super::{BURST, Ends, FLOWS, Mix, Trial};
use crate::lab::net;

/// Runs of the generator that are timed, none of which sends.
const TIMED: u32 = 1 << 16;
/// Runs in one call are enough for a trial even if each is this part shorter than it was when it was timed.
const MARGIN: f64 = 1.25;
/// Runs between which the kernel passes frames on.
const BATCH: u32 = 64;
/// Each flow's first frames are sent at this rate and not counted: paths do more work for them.
const WARM_UP_PPS: f64 = 50_000.0;
const WARM_UP: Duration = Duration::from_millis(12);
/// A trial has ended when nothing has arrived for so long.
const QUIET: Duration = Duration::from_millis(20);
/// And at last after this.
const PATIENCE: Duration = Duration::from_millis(500);

/// A stream. See the module's essay.
pub struct Stream {
    from: (String, String),
    cpu: usize,
    template: Vec<u8>,
    generator: Program,
    generator_state: Map,
    sink_state: Map,
    /// What a run takes that sends nothing.
    idle: Duration,
    tag: u16,
    generic_sink: bool,
    // Dropped in this order: nothing is received any more, then NAPI goes.
    link: Link,
    napi: Napi,
}

impl Stream {
    /// Puts everything in place.
    pub fn prepare(ends: &Ends, mix: Mix) -> Result<Stream> {
        let (from, to) = (&ends.from, &ends.to);
        let sender = Device::look(&from.netns, &from.device)?;
        let receiver = Device::look(&to.netns, &to.device)?;
        sender.check_up(&from.netns)?;
        receiver.check_up(&to.netns)?;
        let target = ends.gateway.map_or_else(|| receiver.mac(), Ok)?;
        let headers = Headers { macs: (sender.mac()?, target), addresses: (from.address, to.address) };
        let sizes = programs::sizes(mix, sender.mtu);
        let sink_state = Map::create(MapKind::Array, "weft_sink", 4, sink::WORDS * 8, 1)?;
        let (link, generic_sink) = attach_sink(&to.netns, receiver.ifindex, &sink_state)?;
        let napi = Napi::ensure(&from.netns, &sender)?;
        let generator_state = Map::create(MapKind::Array, "weft_generator", 4, generator::WORDS * 8, 1)?;
        let program = programs::generate(&generator_state, &headers, sizes, sender.ifindex);
        let largest = sizes.into_iter().max().unwrap_or_default();
        let mut stream = Stream {
            from: (from.netns.clone(), from.device.clone()),
            cpu: ends.cpu.unwrap_or_else(last_cpu),
            template: programs::frame(&headers, largest),
            generator: Program::load("weft_generator", &program)?,
            generator_state,
            sink_state,
            idle: Duration::ZERO,
            tag: 0,
            generic_sink,
            link,
            napi,
        };
        stream.idle = stream.generating(|stream| stream.time_idle())?;
        Ok(stream)
    }

    /// Whether the sink had to be attached in generic mode.
    pub fn is_sink_generic(&self) -> bool {
        self.generic_sink
    }

    /// Offers frames and counts what arrives.
    pub fn trial(&mut self, asked_pps: Option<f64>, length: Duration) -> Result<Trial> {
        self.send(Some(WARM_UP_PPS), WARM_UP)?;
        self.settle();
        let before = self.taken()?;
        let (sent, seconds) = self.send(asked_pps, length)?;
        self.settle();
        let taken = self.taken()?.saturating_sub(before);
        let counted = self.counted()?;
        let [received, late, duplicated] = [sink::RECEIVED, sink::LATE, sink::DUPLICATED].map(|at| word(&counted, at));
        if sent > 0 && received == 0 {
            bail!("{sent} frames were sent from {} and {taken} were taken by the path, but none arrived", self.from.0);
        }
        let received = received - duplicated;
        let lost = sent.saturating_sub(received);
        // The device counts other traffic of the pod too, so at most what is missing was refused.
        let refused = sent.saturating_sub(taken).min(lost);
        let reordered = late - duplicated;
        Ok(Trial { asked_pps, seconds, sent, refused, received, reordered, duplicated })
    }

    /// Takes everything away.
    pub fn finish(self) -> Result<()> {
        drop(self.link);
        self.napi.restore()
    }

    /// Sends a stream with a tag of its own. Says how many frames, and for how many seconds.
    fn send(&mut self, asked_pps: Option<f64>, length: Duration) -> Result<(u64, f64)> {
        self.tag = self.tag.wrapping_add(1);
        let mut state = [0; sink::WORDS];
        state[sink::TAG as usize / 8] = self.tag.into();
        self.sink_state.update(&[0; 4], &bytes(&state))?;
        self.generating(|stream| stream.generate(asked_pps, length))?;
        let mut state = vec![0; generator::WORDS * 8];
        self.generator_state.lookup(&[0; 4], &mut state)?;
        let sent = word(&state, generator::SENT);
        // Whoever can send no more than at long intervals has not sent for all of the time.
        let last = word(&state, generator::LAST) as f64 / FRACTIONS / 1e9;
        let seconds = if asked_pps.is_some() { length.as_secs_f64() } else { last };
        Ok((sent, seconds))
    }

    /// Runs something on the generator's CPU in the sender's namespace.
    fn generating<T: Send>(&self, what: impl FnOnce(&Stream) -> Result<T> + Send) -> Result<T> {
        inside(&self.from.0, || {
            let mut cpus = CpuSet::new();
            cpus.set(self.cpu);
            sched_setaffinity(None, &cpus).with_context(|| format!("cannot keep to CPU {}", self.cpu))?;
            what(self)
        })
    }

    /// Sends at that rate for that long.
    fn generate(&self, asked_pps: Option<f64>, length: Duration) -> Result<()> {
        let interval = asked_pps.map_or(0.0, |pps| FRACTIONS * 1e9 / pps.max(1.0));
        self.command(interval, length, 0)?;
        // The kernel takes tens of milliseconds to begin and to end a call, when nothing is sent: one call has to be enough
        // for all. What is left of its runs when the time is over sends nothing and is soon over too.
        let runs = (length.as_secs_f64() / self.idle.as_secs_f64() * MARGIN) as u32;
        let mut state = vec![0; generator::WORDS * 8];
        loop {
            self.run(runs)?;
            self.generator_state.lookup(&[0; 4], &mut state)?;
            let start = Duration::from_nanos(word(&state, generator::START));
            if monotonic() >= start + length {
                return Ok(());
            }
        }
    }

    /// How long a run takes in which the next frame is not yet due.
    fn time_idle(&self) -> Result<Duration> {
        self.command(0.0, PATIENCE, u64::MAX)?;
        Ok(self.run(TIMED)?.max(Duration::from_nanos(1)))
    }

    fn command(&self, interval: f64, length: Duration, due: u64) -> Result<()> {
        let mut state = [0; generator::WORDS];
        let mut set = |at: i16, value: u64| state[at as usize / 8] = value;
        set(generator::DUE, due);
        set(generator::INTERVAL, interval as u64);
        set(generator::LENGTH, length.as_nanos() as u64);
        set(generator::LATE, (interval * BURST as f64) as u64);
        set(generator::TAG, self.tag.into());
        Ok(self.generator_state.update(&[0; 4], &bytes(&state))?)
    }

    /// Returns how long a run took, on the average.
    fn run(&self, runs: u32) -> Result<Duration> {
        match self.generator.run_live(&self.template, runs, BATCH) {
            Err(error) if error.io().kind() == std::io::ErrorKind::Interrupted => Ok(Duration::ZERO),
            result => result.context("frames cannot be generated (this needs Linux 5.18)"),
        }
    }

    /// Waits until nothing arrives any more.
    fn settle(&self) {
        let (started, mut last, mut since) = (monotonic(), 0, monotonic());
        while monotonic() - since < QUIET && monotonic() - started < PATIENCE {
            thread::sleep(QUIET / 10);
            let received = self.counted().map_or(0, |counted| word(&counted, sink::RECEIVED));
            if received != last {
                (last, since) = (received, monotonic());
            }
        }
    }

    fn counted(&self) -> Result<Vec<u8>> {
        let mut state = vec![0; sink::WORDS * 8];
        self.sink_state.lookup(&[0; 4], &mut state)?;
        Ok(state)
    }

    fn taken(&self) -> Result<u64> {
        Ok(Device::look(&self.from.0, &self.from.1)?.taken())
    }
}

/// Attaches the sink by the driver if it can, otherwise by the stack. Says whether it was the latter.
fn attach_sink(netns: &str, interface: u32, state: &Map) -> Result<(Link, bool)> {
    let program = Program::load("weft_sink", &programs::absorb(state))?;
    inside(netns, || match program.attach(interface, Mode::Native) {
        Ok(link) => Ok((link, false)),
        Err(error) if error.io().kind() == std::io::ErrorKind::ResourceBusy => Err(error.into()),
        Err(_) => Ok((program.attach(interface, Mode::Generic)?, true)),
    })
}

/// Runs something on a thread of its own in a namespace. The thread never goes back, and ends.
pub fn inside<T: Send>(netns: &str, what: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let path = net::path(netns);
    let file = std::fs::File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
    let work = || {
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
            .with_context(|| format!("cannot enter the network namespace {netns}"))?;
        what()
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("weft-frames".into()).spawn_scoped(scope, work)?;
        thread.join().unwrap_or_else(|_| bail!("a thread in {netns} panicked"))
    })
}

fn last_cpu() -> usize {
    thread::available_parallelism().map_or(0, |count| count.get() - 1)
}

/// The clock of the generator.
fn monotonic() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}

fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn word(state: &[u8], at: i16) -> u64 {
    let at = at as usize;
    u64::from_ne_bytes(state[at..at + 8].try_into().expect("eight bytes were asked for"))
}

const _: () = assert!(FLOWS.is_power_of_two() && FLOWS <= 256);
