//! Whose the later fragments of a datagram are: only the first one has ports (RFC 4787, section 11).
//!
//! Fragments are passed on as they come, and none is kept: a later one that comes before the first has no session yet, and ends. What is
//! remembered of a first fragment is forgotten with the last one, or after a while; of one pod's there are few at a time, and when all are
//! taken the oldest goes.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Duration;

use crate::packet::Ip;
use crate::path::Translation;
use crate::tables::ExactMap;
use crate::time::Instant;

/// Datagrams of which fragments are under way, for each worker and for each pod.
const LIMIT: usize = 2048;
const PER_POD: u8 = 64;
/// RFC 8200, section 4.5, gives up after a minute; what comes so late is of no use to most.
const PATIENCE: Duration = Duration::from_secs(15);

#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
struct Datagram {
    src: IpAddr,
    dst: IpAddr,
    id: u32,
    protocol: u8,
}

struct Entry {
    translation: Translation,
    pod: IpAddr,
    since: Instant,
}

/// The datagrams of which fragments are under way.
#[derive(Default)]
pub struct Pieces {
    known: ExactMap<Datagram, Entry>,
    per_pod: ExactMap<IpAddr, u8>,
    order: VecDeque<(Instant, Datagram)>,
}

impl Pieces {
    /// The first fragment passed, and the others shall go as it did. `pod` is whose it is.
    pub fn open(&mut self, ip: &Ip, pod: IpAddr, translation: Translation, now: Instant) {
        let Some((datagram, false)) = datagram(ip) else { return };
        while let Some((since, oldest)) = self.order.front().copied()
            && (now.since(since) > PATIENCE || self.order.len() >= LIMIT)
        {
            self.order.pop_front();
            if self.known.get(&oldest).is_some_and(|entry| entry.since == since) {
                self.forget(&oldest);
            }
        }
        self.forget(&datagram);
        let count = self.per_pod.entry(pod).or_insert(0);
        if *count >= PER_POD {
            return;
        }
        *count += 1;
        self.known.insert(datagram, Entry { translation, pod, since: now });
        self.order.push_back((now, datagram));
    }

    /// How the first fragment of the datagram went that this one is a later piece of.
    pub fn find(&self, ip: &Ip, now: Instant) -> Option<Translation> {
        let (datagram, _) = datagram(ip)?;
        self.known.get(&datagram).filter(|entry| now.since(entry.since) <= PATIENCE).map(|entry| entry.translation)
    }

    /// A later fragment passed.
    pub fn pass(&mut self, ip: &Ip) {
        if let Some((datagram, true)) = datagram(ip) {
            self.forget(&datagram);
        }
    }

    fn forget(&mut self, datagram: &Datagram) {
        let Some(entry) = self.known.remove(datagram) else { return };
        if let Some(count) = self.per_pod.get_mut(&entry.pod) {
            *count -= 1;
            if *count == 0 {
                self.per_pod.remove(&entry.pod);
            }
        }
    }
}

/// The datagram, and whether this is its last piece.
fn datagram(ip: &Ip) -> Option<(Datagram, bool)> {
    let (id, last) = ip.piece?;
    Some((Datagram { src: ip.src, dst: ip.dst, id, protocol: ip.protocol }, last))
}
