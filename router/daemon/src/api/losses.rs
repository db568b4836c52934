//! Losses of the last while, for `weft status`.
//!
//! Counters only grow, so that a burst of long ago would be a problem for ever. Housekeeping keeps a few [`Sample`]s of
//! them, and what `status` reports is the growth since the oldest one. A port that was removed takes its counters along.

use std::collections::VecDeque;
use std::fs;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use weft_router::stats::PortStats;
use weft_router::{DropReason, PortId, Snapshot};

use crate::control::config::{Config, Underlay};

/// How many samples are kept, one for each housekeeping: what is older is forgotten.
const KEPT: usize = 4;
/// Losses below one in so many frames are everyday life: a scan, a pod that was just deleted.
const WORTH_TELLING: u64 = 1000;

/// The counters at one moment.
#[derive(Debug, Clone)]
pub struct Sample {
    at: Instant,
    ports: Vec<(PortId, PortStats)>,
    socket_drops: u64,
}

/// The latest samples, the oldest first.
#[derive(Debug, Default)]
pub struct Samples(VecDeque<Sample>);

impl Sample {
    /// The counters now.
    pub fn take(snapshot: &Snapshot, underlay: &Underlay) -> Sample {
        let ports = snapshot.ports.iter().map(|port| (port.id, port.stats)).collect();
        Sample { at: Instant::now(), ports, socket_drops: dropped_by_kernel(underlay) }
    }

    /// By how much a counter of all ports has grown since `before`. A port that was not there then began at zero.
    fn growth(&self, before: Option<&Sample>, counter: impl Fn(&PortStats) -> u64) -> u64 {
        let base = |id| before?.ports.iter().find(|(port, _)| *port == id).map(|(_, stats)| counter(stats));
        let grown = |(id, stats): &(PortId, PortStats)| {
            let now = counter(stats);
            // Less than before: the number was given to another port since.
            base(*id).filter(|base| *base <= now).map_or(now, |base| now - base)
        };
        self.ports.iter().map(grown).sum()
    }
}

impl Samples {
    /// Keeps `sample` and forgets the oldest.
    pub fn push(&mut self, sample: Sample) {
        while self.0.len() >= KEPT {
            self.0.pop_front();
        }
        self.0.push_back(sample);
    }

    /// What was lost from the oldest sample to `now`, in words; without a sample, since `started`.
    pub fn problems(&self, now: &Sample, started: Instant, config: &Config) -> Vec<String> {
        let before = self.0.front();
        let period = now.at.saturating_duration_since(before.map_or(started, |sample| sample.at));
        let period = period.max(Duration::from_secs(1)).as_secs();
        let mut all = lost_here(now, before, period);
        all.extend(lost_before(now, before, period, config.underlay.address));
        all
    }
}

/// Losses by reason over all ports, where they are more than a trickle.
fn lost_here(now: &Sample, before: Option<&Sample>, period: u64) -> Vec<String> {
    let received = now.growth(before, |stats| stats.received);
    let losses = DropReason::ALL.iter().filter(|reason| reason.is_loss());
    let counted = losses.map(|reason| (reason, now.growth(before, |stats| stats.dropped[*reason as usize])));
    let told = |(reason, count): (&DropReason, u64)| {
        format!(
            "in the last {period} s {count} frames ended as {}: {}; see which ports with `weft drops`",
            reason.name(),
            reason.meaning()
        )
    };
    counted.filter(|(_, count)| count.saturating_mul(WORTH_TELLING) > received && *count > 0).map(told).collect()
}

/// What the kernel dropped because the underlay's socket was full.
fn lost_before(now: &Sample, before: Option<&Sample>, period: u64, address: IpAddr) -> Option<String> {
    let drops = now.socket_drops.saturating_sub(before.map_or(0, |sample| sample.socket_drops));
    (drops > 0).then(|| {
        format!(
            "in the last {period} s the kernel dropped {drops} datagrams for {address} because the socket's buffer was \
             full (RcvbufErrors): weftd had too little CPU for a while"
        )
    })
}

fn dropped_by_kernel(underlay: &Underlay) -> u64 {
    let file = if underlay.address.is_ipv4() { "/proc/thread-self/net/udp" } else { "/proc/thread-self/net/udp6" };
    fs::read_to_string(file).map_or(0, |text| socket_drops(&text, underlay.port))
}

/// The drops of all sockets on `port`, out of `/proc/net/udp`.
fn socket_drops(text: &str, port: u16) -> u64 {
    let drops = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let local = fields.get(1)?.rsplit(':').next()?;
        (u16::from_str_radix(local, 16).ok()? == port).then(|| fields.last()?.parse::<u64>().ok())?
    };
    text.lines().skip(1).filter_map(drops).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::host::Host;

    const LOSS: DropReason = DropReason::PortDown;

    fn config() -> Config {
        let text = "node = \"n1\"\nmode = \"routed\"\nmtu = 1450\nranges = [\"10.244.1.0/24\"]\n\
                    [underlay]\naddress = \"10.200.0.1\"\n";
        Config::read(text, &Host::default()).unwrap().config
    }

    /// One port's counters, `at` seconds after `start`.
    fn sample(start: Instant, at: u64, port: u16, received: u64, lost: u64, socket_drops: u64) -> Sample {
        let mut stats = PortStats { received, ..PortStats::default() };
        stats.dropped[LOSS as usize] = lost;
        Sample { at: start + Duration::from_secs(at), ports: vec![(PortId(port), stats)], socket_drops }
    }

    #[test]
    fn a_burst_is_a_problem_until_its_samples_are_forgotten() {
        assert!(LOSS.is_loss());
        let (start, config) = (Instant::now(), config());
        let mut samples = Samples::default();
        let burst = |at| sample(start, at, 2, 5000, 50, 7);
        let problems = samples.problems(&burst(5), start, &config);
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(
            problems[0].starts_with(&format!("in the last 5 s 50 frames ended as {}: ", LOSS.name())),
            "{problems:?}"
        );
        assert!(
            problems[1].starts_with("in the last 5 s the kernel dropped 7 datagrams for 10.200.0.1"),
            "{problems:?}"
        );
        samples.push(sample(start, 0, 2, 0, 0, 0));
        for at in 1..KEPT as u64 {
            samples.push(burst(at * 10));
            assert_eq!(samples.problems(&burst(at * 10 + 5), start, &config).len(), 2);
        }
        samples.push(burst(KEPT as u64 * 10));
        assert_eq!(samples.problems(&burst(45), start, &config), [""; 0]);
        let again = samples.problems(&sample(start, 45, 2, 5100, 51, 7), start, &config);
        assert!(again.len() == 1 && again[0].starts_with("in the last 35 s 1 frames"), "{again:?}");
    }

    #[test]
    fn a_trickle_is_none_and_a_port_that_left_hides_nothing() {
        let (start, config) = (Instant::now(), config());
        let mut samples = Samples::default();
        samples.push(sample(start, 0, 2, 1 << 20, 9000, 0));
        assert_eq!(samples.problems(&sample(start, 9, 2, (1 << 20) + 2000, 9001, 0), start, &config), [""; 0]);
        assert_eq!(samples.problems(&sample(start, 9, 3, 2000, 100, 0), start, &config).len(), 1);
        assert_eq!(samples.problems(&sample(start, 9, 2, 2000, 100, 0), start, &config).len(), 1);
    }

    #[test]
    fn drops_of_the_underlays_socket_are_read_from_proc() {
        let text = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n\
             2063: 0100C80A:2118 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 3404 2 0 17\n\
             2064: 0100C80A:2119 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 3405 2 0 4\n\
             garbage\n";
        assert_eq!(socket_drops(text, 0x2118), 17);
        assert_eq!(socket_drops(text, 53), 0);
    }
}
