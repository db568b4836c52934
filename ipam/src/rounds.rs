//! Where the round-robin of each set stands. Losing one costs nothing but the order, so old ones are forgotten.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::range::RangeSet;

const MAX_ROUNDS: usize = 1024;

#[derive(Debug, Clone, Default)]
pub(crate) struct Rounds {
    /// Pool, set → (address last given, when in counts of `used`).
    last: HashMap<(String, IpAddr), (IpAddr, u64)>,
    used: u64,
}

impl Rounds {
    /// The address last given from `set`. A round that another program left knows no set: it is of the one that it lies in.
    pub(crate) fn last_given(&self, pool: &str, set: &RangeSet) -> Option<IpAddr> {
        if let Some((last, _)) = self.last.get(&(pool.to_owned(), set.key())) {
            return Some(*last);
        }
        let of_nobody = |((of, key), (last, _)): &(&(String, IpAddr), &(IpAddr, u64))| of == pool && key == last;
        self.last.iter().filter(of_nobody).map(|(_, (last, _))| *last).find(|last| set.range_of(*last).is_some())
    }

    /// Remembers that `last` was the last one given from `set`; a round of no known set has itself as set.
    pub(crate) fn set(&mut self, pool: &str, set: IpAddr, last: IpAddr) {
        self.used += 1;
        self.last.insert((pool.to_owned(), set), (last, self.used));
        if self.last.len() > MAX_ROUNDS
            && let Some(oldest) = self.last.iter().min_by_key(|(_, (_, used))| *used).map(|(key, _)| key.clone())
        {
            self.last.remove(&oldest);
        }
    }

    /// (pool, set, address last given), least recently used first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, IpAddr, IpAddr)> {
        let mut rounds: Vec<_> = self.last.iter().collect();
        rounds.sort_unstable_by_key(|(_, (_, used))| *used);
        rounds.into_iter().map(|((pool, set), (last, _))| (pool.as_str(), *set, *last))
    }
}
