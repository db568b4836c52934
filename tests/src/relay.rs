//! A network between two nodes that loses, delays and parts, as it is told: what `tc netem` does, for kernels without it.
//!
//! A [`Relay`] takes the ends of the two nodes' uplinks off the underlay's bridge and carries frames between them itself, by packet sockets. Frames
//! have virtio's header, so that superframes stay whole and checksums that nobody has filled in stay so; what is lost is lost whole.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::cluster::Cluster;
use crate::random::Random;
use crate::wire::Wire;

/// What a direction keeps at most, in frames; what is beyond that is lost, as on any link.
const KEPT: usize = 20_000;
/// How long the threads sleep at most before they look whether they shall end.
const LOOK: Duration = Duration::from_millis(20);

/// What becomes of frames, in each direction. By default they pass.
#[derive(Clone, Copy, Debug, Default)]
pub struct Weather {
    /// Of a hundred frames so many are lost.
    pub loss: u32,
    /// How long each of them takes.
    pub delay: Duration,
    /// Up to so much longer, each by itself: they overtake each other.
    pub jitter: Duration,
    /// None passes.
    pub is_parted: bool,
}

/// The network between; it ends when this goes.
pub struct Relay {
    weather: Arc<Mutex<Weather>>,
    ended: Arc<AtomicBool>,
}

impl Relay {
    /// Between these two nodes.
    #[track_caller]
    pub fn between(cluster: &Cluster, nodes: [u8; 2]) -> Relay {
        let relay = Relay { weather: Arc::default(), ended: Arc::default() };
        let wires = nodes.map(|number| {
            let name = format!("n{number}");
            cluster.underlay().ip(&format!("link set {name} nomaster"));
            Arc::new(Wire::of_incoming(cluster.underlay(), &name))
        });
        for (from, to) in [(0, 1), (1, 0)] {
            let direction = Direction {
                from: Arc::clone(&wires[from]),
                to: Arc::clone(&wires[to]),
                weather: Arc::clone(&relay.weather),
                ended: Arc::clone(&relay.ended),
                random: Random::new(from as u64 + 1),
                waiting: BTreeMap::new(),
            };
            thread::spawn(move || direction.run());
        }
        relay
    }

    /// From now on.
    pub fn set(&self, weather: Weather) {
        *lock(&self.weather) = weather;
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

struct Direction {
    from: Arc<Wire>,
    to: Arc<Wire>,
    weather: Arc<Mutex<Weather>>,
    ended: Arc<AtomicBool>,
    random: Random,
    /// By the time at which they arrive, and a number of their own.
    waiting: BTreeMap<(Instant, u64), Vec<u8>>,
}

impl Direction {
    fn run(mut self) {
        let mut number = 0;
        while !self.ended.load(Ordering::Relaxed) {
            let due = self.waiting.keys().next().map(|(due, _)| due.saturating_duration_since(Instant::now()));
            if let Some(frame) = self.from.next(due.map_or(LOOK, |due| due.min(LOOK))) {
                number += 1;
                self.take(frame, number);
            }
            let now = Instant::now();
            while let Some(entry) = self.waiting.first_entry().filter(|entry| entry.key().0 <= now) {
                // An interface that is down takes nothing.
                self.to.offer(&entry.remove());
            }
        }
    }

    fn take(&mut self, frame: Vec<u8>, number: u64) {
        let weather = *lock(&self.weather);
        let is_lost = weather.is_parted || self.random.below(100) < weather.loss as usize;
        if is_lost || self.waiting.len() >= KEPT {
            return;
        }
        let jitter = weather.jitter.mul_f64(self.random.below(1000) as f64 / 1000.0);
        self.waiting.insert((Instant::now() + weather.delay + jitter, number), frame);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
