//! One translated conversation, as frames see it: words that are read and written without a lock.
//!
//! What does not change while a session lives (who, and as whom) is written before its version is, and read together with the version on
//! both sides of it: an odd version is that of a session that lives, and a handle with another version is stale. What frames change, when
//! it was used last and how far a TCP connection has come, are single words of their own.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU32, AtomicU64, fence};
use std::time::Duration;

use weft_encap::{ip, tcp};
use zerocopy::FromZeros;

use crate::flow::FlowKey;
use crate::path::{Handle, Side, Translation};
use crate::time::Instant;

/// The other side has answered.
pub(super) const ANSWERED: u32 = 1;
/// And the pod has gone on since: the connection is established.
pub(super) const CONFIRMED: u32 = 2;
const FIN_OUT: u32 = 4;
const FIN_IN: u32 = 8;
/// Somebody has reset it, and nothing followed.
const RESET: u32 = 16;

/// Times are written only when they have grown by this, so that busy sessions are read by all workers and written by none.
const FRESH: u32 = 2;

/// See the module's essay. The first cache line is what frames need.
#[derive(FromZeros)]
#[repr(C, align(64))]
pub(super) struct Slot {
    version: AtomicU32,
    used: AtomicU32,
    state: AtomicU32,
    /// The pod's port in the upper half, the reserved one in the lower.
    ports: AtomicU32,
    inside: [AtomicU64; 2],
    outside: [AtomicU64; 2],
    remote: [AtomicU64; 2],
    /// The other side's port, and the protocol above it.
    far: AtomicU32,
    /// When it was opened.
    opened: AtomicU32,
}

/// What a session is about.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) struct Ends {
    pub(super) protocol: u8,
    pub(super) inside: (IpAddr, u16),
    pub(super) outside: (IpAddr, u16),
    pub(super) remote: (IpAddr, u16),
}

impl Ends {
    /// The flow as the pod sends it.
    pub(super) fn inside_key(&self) -> FlowKey {
        FlowKey::between(self.protocol, self.inside, self.far(self.inside.1))
    }

    /// The same as the other side gets it.
    pub(super) fn outside_key(&self) -> FlowKey {
        FlowKey::between(self.protocol, self.outside, self.far(self.outside.1))
    }

    /// A ping's two ports are both its identifier.
    fn far(&self, near: u16) -> (IpAddr, u16) {
        if is_ping(self.protocol) { (self.remote.0, near) } else { self.remote }
    }
}

/// Whether conversations of this protocol are told apart by an identifier.
pub(super) fn is_ping(protocol: u8) -> bool {
    protocol == ip::ICMP || protocol == ip::ICMPV6
}

impl Slot {
    /// Begins a session here. To be called by one thread at a time.
    pub(super) fn begin(&self, ends: &Ends, now: Instant) -> u32 {
        store(&self.inside, ends.inside.0);
        store(&self.outside, ends.outside.0);
        store(&self.remote, ends.remote.0);
        self.ports.store(u32::from(ends.inside.1) << 16 | u32::from(ends.outside.1), Relaxed);
        self.far.store(u32::from(ends.protocol) << 16 | u32::from(ends.remote.1), Relaxed);
        self.state.store(0, Relaxed);
        self.used.store(now.seconds(), Relaxed);
        self.opened.store(now.seconds(), Relaxed);
        let version = self.version.load(Relaxed).wrapping_add(1) | 1;
        self.version.store(version, Release);
        version
    }

    /// Ends it. To be called by one thread at a time.
    pub(super) fn end(&self) {
        let version = self.version.load(Relaxed);
        self.version.store(version.wrapping_add(version & 1), Release);
        // What `begin` writes next must not be seen under the old version.
        fence(Release);
    }

    /// Its version, if it lives.
    pub(super) fn alive(&self) -> Option<u32> {
        Some(self.version.load(Acquire)).filter(|version| version & 1 == 1)
    }

    /// What it is about, if it is still that session.
    pub(super) fn ends(&self, version: u32) -> Option<Ends> {
        self.read(version, || {
            let (ports, far) = (self.ports.load(Relaxed), self.far.load(Relaxed));
            Ends {
                protocol: (far >> 16) as u8,
                inside: (load(&self.inside), (ports >> 16) as u16),
                outside: (load(&self.outside), ports as u16),
                remote: (load(&self.remote), far as u16),
            }
        })
    }

    /// What becomes of a packet of it, if it is still that session.
    #[inline(always)]
    pub(super) fn translation(&self, handle: Handle, side: Side) -> Option<Translation> {
        self.read(handle.version, || {
            let ports = self.ports.load(Relaxed);
            let (address, port) = match side {
                Side::Source => (load(&self.outside), ports as u16),
                Side::Destination => (load(&self.inside), (ports >> 16) as u16),
            };
            Translation { side, address, port, handle }
        })
    }

    #[inline(always)]
    fn read<T>(&self, version: u32, read: impl FnOnce() -> T) -> Option<T> {
        if self.version.load(Acquire) != version || version & 1 == 0 {
            return None;
        }
        let found = read();
        fence(Acquire);
        (self.version.load(Relaxed) == version).then_some(found)
    }

    /// A packet of it passed; `flags` are TCP's.
    #[inline(always)]
    pub(super) fn pass(&self, side: Side, flags: u8, now: Instant) {
        let old = self.state.load(Relaxed);
        let new = advance(old, side, flags);
        if new != old {
            self.state.store(new, Relaxed);
        }
        if now.seconds().saturating_sub(self.used.load(Relaxed)) >= FRESH || new != old {
            self.used.store(now.seconds(), Relaxed);
        }
    }

    pub(super) fn state(&self) -> u32 {
        self.state.load(Relaxed)
    }

    /// How long nothing has passed, in seconds.
    pub(super) fn idle(&self, now: Instant) -> u32 {
        now.seconds().saturating_sub(self.used.load(Relaxed))
    }

    /// How long it is, in seconds.
    pub(super) fn age(&self, now: Instant) -> u32 {
        now.seconds().saturating_sub(self.opened.load(Relaxed))
    }

    /// Whether it has been silent for longer than its kind is kept.
    pub(super) fn is_old(&self, now: Instant) -> bool {
        let protocol = (self.far.load(Relaxed) >> 16) as u8;
        u64::from(self.idle(now)) > patience(protocol, self.state()).as_secs()
    }

    /// Whether it is over, but for what may still be under way.
    pub(super) fn is_over(&self) -> bool {
        is_over(self.state())
    }
}

fn is_over(state: u32) -> bool {
    state & RESET != 0 || state & (FIN_OUT | FIN_IN) == FIN_OUT | FIN_IN
}

/// How far a session has come after one more packet.
#[inline(always)]
fn advance(old: u32, side: Side, flags: u8) -> u32 {
    let (fin, seen) = match side {
        // A connection that begins anew on the same ports.
        Side::Source if flags & tcp::SYN != 0 && is_over(old) => return 0,
        Side::Source if old & ANSWERED != 0 => (FIN_OUT, CONFIRMED),
        Side::Source => (FIN_OUT, 0),
        Side::Destination => (FIN_IN, ANSWERED),
    };
    let fin = if flags & tcp::FIN != 0 { fin } else { 0 };
    // A reset that was a lie is followed by more.
    if flags & tcp::RST != 0 { old | seen | RESET } else { (old | seen | fin) & !RESET }
}

/// How long a session is kept without packets. RFC 5382, REQ-5: two hours and four minutes if established, four minutes if not; RFC 4787,
/// REQ-5: two minutes at least, five recommended; RFC 5508, REQ-2: a minute. What is over is kept as long as Linux does.
pub(super) fn patience(protocol: u8, state: u32) -> Duration {
    Duration::from_secs(match protocol {
        ip::TCP if state & RESET != 0 => 10,
        ip::TCP if is_over(state) => 120,
        ip::TCP if state & (FIN_IN | FIN_OUT) != 0 || state & CONFIRMED == 0 => 240,
        ip::TCP => 7440,
        ip::UDP if state & ANSWERED != 0 => 300,
        ip::UDP => 120,
        _ => 60,
    })
}

fn store(words: &[AtomicU64; 2], address: IpAddr) {
    let bits = match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
        IpAddr::V6(address) => address.to_bits(),
    };
    words[0].store((bits >> 64) as u64, Relaxed);
    words[1].store(bits as u64, Relaxed);
}

#[inline(always)]
fn load(words: &[AtomicU64; 2]) -> IpAddr {
    let bits = u128::from(words[0].load(Relaxed)) << 64 | u128::from(words[1].load(Relaxed));
    Ipv6Addr::from_bits(bits).to_canonical()
}
