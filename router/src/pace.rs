//! How much a pod may send and receive: a token bucket for each direction of its port.
//!
//! What is charged is what would go on a wire: the IP packets that a frame stands for, each with its headers, so a superframe costs as much
//! as its segments. A bucket is one word, the time at which all that passed is paid for; so workers share it without locks, and an idle one
//! needs no upkeep. Whatever was let through may overdraw it by one frame, which is paid for before the next one.
//!
//! Linux's `tbf` also counts the Ethernet headers, 14 bytes of each packet.
//!
//! From a pod nothing is read that is over the limit: its own queue fills, and its kernel slows down who sends. Towards a pod there is a
//! short queue, and what does not fit ends here; at low rates superframes are cut before they wait ([`cut`]). See [`crate::worker`].

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use crate::frame::Frame;
use crate::packet::L3;
use crate::time::Instant;

pub mod cut;

/// What passes at least after a pause, whatever the burst: a worker sleeps by the millisecond, and may be kept waiting for some.
const LEAST_DEPTH: Duration = Duration::from_millis(20);
/// What passes after a pause if nothing was said about it.
const USUAL_DEPTH: Duration = Duration::from_millis(50);
/// So much is queued towards a pod, as time at its rate, and as bytes within these bounds.
const QUEUE_TIME: Duration = Duration::from_millis(100);
const QUEUE_BYTES: std::ops::RangeInclusive<u64> = 128 << 10..=2 << 20;

/// A rate, and how much may pass at once after a pause.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Limit {
    /// In bits per second; not zero.
    pub rate: u64,
    /// In bits; zero for what suits the rate.
    pub burst: u64,
}

/// What a pod may send and receive. Clones share their buckets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// What it receives.
    pub to: Option<Arc<Bucket>>,
    /// What it sends.
    pub from: Option<Arc<Bucket>>,
}

/// A token bucket. See the module's essay.
#[derive(Debug)]
pub struct Bucket {
    limit: Limit,
    /// Nanoseconds of its rate that may pass at once.
    depth: u64,
    /// When all that passed is paid for.
    paid_at: AtomicU64,
}

impl Limits {
    /// Full buckets.
    pub fn new(to: Option<Limit>, from: Option<Limit>) -> Limits {
        let bucket = |limit: Option<Limit>| limit.map(|limit| Arc::new(Bucket::new(limit)));
        Limits { to: bucket(to), from: bucket(from) }
    }
}

impl PartialEq for Bucket {
    fn eq(&self, other: &Bucket) -> bool {
        self.limit == other.limit
    }
}

impl Eq for Bucket {}

impl Bucket {
    /// A full bucket.
    pub fn new(limit: Limit) -> Bucket {
        let limit = Limit { rate: limit.rate.max(1), ..limit };
        let usual = if limit.burst == 0 { USUAL_DEPTH } else { LEAST_DEPTH };
        let burst = u128::from(limit.burst) * u128::from(SECOND) / u128::from(limit.rate);
        let depth = u64::try_from(burst).unwrap_or(u64::MAX).clamp(usual.as_nanos() as u64, LONGEST);
        Bucket { limit, depth, paid_at: AtomicU64::new(0) }
    }

    /// What it was made for.
    pub fn limit(&self) -> Limit {
        self.limit
    }

    /// Whether a frame may pass.
    pub fn allows(&self, now: Instant) -> bool {
        self.paid_at.load(Relaxed) <= now.0
    }

    /// When the next frame may pass.
    pub fn due(&self) -> Instant {
        Instant(self.paid_at.load(Relaxed))
    }

    /// So many bytes may pass now before it is overdrawn; one at least if any.
    pub fn room(&self, now: Instant) -> usize {
        let credit = now.0.saturating_sub(self.paid_at.load(Relaxed)).min(self.depth);
        let bytes = u128::from(credit) * u128::from(self.limit.rate) / u128::from(8 * SECOND);
        usize::try_from(bytes).unwrap_or(usize::MAX).max(1)
    }

    /// So many bytes have passed.
    pub fn charge(&self, bytes: u64, now: Instant) {
        let cost = self.time(bytes);
        let pay = |paid_at: u64| Some(paid_at.max(now.0.saturating_sub(self.depth)).saturating_add(cost));
        // The closure never declines.
        let _ = self.paid_at.fetch_update(Relaxed, Relaxed, pay);
    }

    /// Whether a frame is a superframe that overdraws the bucket by more than what passes after a pause at least.
    pub fn is_coarse(&self, frame: &Frame) -> bool {
        frame.offload.gso.is_some() && self.time(cost(frame)) > LEAST_DEPTH.as_nanos() as u64
    }

    /// How long so many bytes take at its rate, in nanoseconds.
    fn time(&self, bytes: u64) -> u64 {
        let cost = u128::from(bytes) * u128::from(8 * SECOND) / u128::from(self.limit.rate);
        u64::try_from(cost).unwrap_or(u64::MAX).min(LONGEST)
    }

    /// How many bytes may wait for it.
    pub fn queue(&self) -> u64 {
        let bytes = u128::from(self.limit.rate) * QUEUE_TIME.as_nanos() / u128::from(8 * SECOND);
        u64::try_from(bytes).unwrap_or(u64::MAX).clamp(*QUEUE_BYTES.start(), *QUEUE_BYTES.end())
    }
}

const SECOND: u64 = 1_000_000_000;
/// No bucket is deeper, and no frame dearer, than an hour.
const LONGEST: u64 = 3600 * SECOND;

/// What a frame costs: bytes of the IP packets that it stands for.
pub fn cost(frame: &Frame) -> u64 {
    let packet = frame.len().saturating_sub(L3) as u64;
    let Some(gso) = frame.offload.gso else { return packet };
    let headers = u64::from(gso.header_len).saturating_sub(L3 as u64);
    let payload = packet.saturating_sub(headers);
    let segments = payload.div_ceil(u64::from(gso.size.max(1))).max(1);
    payload + segments * headers
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::Pool;
    use crate::port::{PortId, sample};

    const START: Instant = Instant(1_000_000_000_000);

    /// Bytes that pass within a time, if somebody always has another frame of this length.
    fn passes(bucket: &Bucket, frame: u64, from: Instant, time: Duration) -> u64 {
        let (mut now, mut passed) = (from, 0);
        while now.since(from) < time {
            if bucket.allows(now) {
                bucket.charge(frame, now);
                passed += frame;
            } else {
                // A worker comes a little late.
                now = bucket.due() + Duration::from_micros(700);
            }
        }
        passed
    }

    #[test]
    fn the_rate_is_kept_for_all_rates_and_sizes_of_frames() {
        for rate in [1_000_000, 10_000_000, 1_000_000_000, 5_000_000_000_u64] {
            for frame in [100, 1436, 65_226] {
                let bucket = Bucket::new(Limit { rate, burst: 1 });
                bucket.charge(rate, START);
                let start = bucket.due();
                let passed = passes(&bucket, frame, start, Duration::from_secs(20)) as f64;
                let allowed = rate as f64 * 20.0 / 8.0;
                assert!((passed / allowed - 1.0).abs() < 0.02, "{rate} bit/s, {frame} bytes: {passed} of {allowed}");
            }
        }
    }

    #[test]
    fn after_a_pause_a_burst_passes_at_once() {
        let bucket = Bucket::new(Limit { rate: 8_000_000, burst: 16_000_000 });
        assert_eq!(bucket.room(START), 2_000_000);
        let mut passed = 0;
        while bucket.allows(START) {
            bucket.charge(1000, START);
            passed += 1000;
        }
        assert!((2_000_000..=2_001_000).contains(&passed), "{passed}");
        // What is not used does not grow.
        let later = START + Duration::from_secs(1000);
        assert_eq!(bucket.room(later), 2_000_000);
    }

    #[test]
    fn a_superframe_costs_what_its_segments_cost() {
        let pool = Pool::new(8, 8).unwrap();
        let (packet, payload) = sample::tcp4(14_480, 1448);
        let mut frame = Frame::from_bytes(&packet.bytes, PortId(1), &pool).unwrap();
        assert_eq!(cost(&frame), packet.bytes.len() as u64 - 14);
        frame.offload = packet.offload;
        let headers = u64::from(frame.offload.gso.unwrap().header_len) - 14;
        assert_eq!(cost(&frame), payload.len() as u64 + 10 * headers);
    }

    #[test]
    fn extreme_numbers_do_no_harm() {
        for (rate, burst) in [(0, 0), (u64::MAX, u64::MAX), (1, u64::MAX), (u64::MAX, 1)] {
            let bucket = Bucket::new(Limit { rate, burst });
            bucket.charge(u64::MAX, START);
            assert!(bucket.room(START) >= 1 && bucket.queue() > 0);
            assert!(bucket.allows(START + Duration::from_secs(8000)));
        }
    }
}
