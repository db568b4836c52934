//! Addresses that were freed and are not given again yet.
//!
//! Whoever spoke to a pod remembers its address for a while: as a neighbour, in a connection, in a name server's cache. So a freed address
//! rests. Since when is kept by a clock that counts from the boot and is told by its id, which no change of date can hurry; after a boot
//! that clock starts again, and so does the rest. How long it takes is decided when an address is wanted, so that it can change.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

/// Most addresses that rest; of more, those that have rested longest stop. 2000 releases in each second of half a minute.
const MAX_RESTING: usize = 1 << 16;

#[derive(Debug, Clone, Default)]
pub(crate) struct Resting {
    /// (Since when, which of that moment) → pool, address.
    order: BTreeMap<(u64, u64), (Arc<str>, IpAddr)>,
    places: HashMap<(Arc<str>, IpAddr), (u64, u64)>,
    sequence: u64,
}

impl Resting {
    /// Lays an address to rest. Returns another one if there are too many.
    pub(crate) fn add(&mut self, pool: &str, address: IpAddr, since: u64) -> Option<(Arc<str>, IpAddr)> {
        let of: Arc<str> = pool.into();
        self.remove(pool, address);
        self.sequence += 1;
        let place = (since, self.sequence);
        self.order.insert(place, (Arc::clone(&of), address));
        self.places.insert((of, address), place);
        (self.order.len() > MAX_RESTING).then(|| self.pop()).flatten()
    }

    /// Ends the rest of an address; whether it rested.
    pub(crate) fn remove(&mut self, pool: &str, address: IpAddr) -> bool {
        let place = self.places.remove(&(pool.into(), address));
        place.is_some_and(|place| self.order.remove(&place).is_some())
    }

    /// Ends the rest of one that rests since `until` or longer, if there is one.
    pub(crate) fn pop_until(&mut self, until: u64) -> Option<(Arc<str>, IpAddr)> {
        let (&(since, _), _) = self.order.first_key_value()?;
        if since <= until { self.pop() } else { None }
    }

    fn pop(&mut self) -> Option<(Arc<str>, IpAddr)> {
        let (_, (pool, address)) = self.order.pop_first()?;
        self.places.remove(&(Arc::clone(&pool), address));
        Some((pool, address))
    }

    /// Whether the address rests.
    pub(crate) fn contains(&self, pool: &str, address: IpAddr) -> bool {
        self.places.contains_key(&(pool.into(), address))
    }

    /// Lets all of them rest anew from `now` on.
    pub(crate) fn restart(&mut self, now: u64) {
        let all: Vec<_> = std::mem::take(&mut self.order).into_values().collect();
        self.places.clear();
        for (pool, address) in all {
            self.add(&pool, address, now);
        }
    }

    /// (Pool, address, since when), those that have rested longest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, IpAddr, u64)> {
        self.order.iter().map(|((since, _), (pool, address))| (&**pool, *address, *since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(n: u32) -> IpAddr {
        std::net::Ipv4Addr::from(n).into()
    }

    #[test]
    fn they_end_in_the_order_in_which_they_began_and_not_before() {
        let mut resting = Resting::default();
        for (n, since) in [(1, 30), (2, 10), (3, 20), (2, 25)] {
            assert_eq!(resting.add("", ip(n), since), None);
        }
        assert!(resting.contains("", ip(2)) && !resting.contains("other", ip(2)));
        assert_eq!(resting.pop_until(19), None);
        assert_eq!(resting.pop_until(30), Some(("".into(), ip(3))));
        assert!(resting.remove("", ip(2)) && !resting.remove("", ip(2)));
        resting.restart(100);
        assert_eq!(resting.pop_until(99), None);
        assert_eq!(resting.pop_until(100), Some(("".into(), ip(1))));
        assert_eq!(resting.iter().count(), 0);
    }

    #[test]
    fn there_are_never_too_many() {
        let mut resting = Resting::default();
        for n in 0..MAX_RESTING as u32 {
            assert_eq!(resting.add("", ip(n), 5), None);
        }
        assert_eq!(resting.add("", ip(1 << 30), 5), Some(("".into(), ip(0))));
        assert_eq!((resting.order.len(), resting.places.len()), (MAX_RESTING, MAX_RESTING));
    }
}
