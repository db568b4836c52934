//! The addresses of one family that are taken, as runs.
//!
//! A run is a first and a last address with everything between them taken; runs never touch each other. So the
//! first free address from any point on is one look-up away, in a full /16 as in a /64 with three leases, and the
//! memory is bounded by the number of leases, not by the size of the range.

use std::collections::BTreeMap;

/// First → last address of each run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Taken(BTreeMap<u128, u128>);

impl Taken {
    /// Takes `n`; false if it was taken.
    pub(crate) fn insert(&mut self, n: u128) -> bool {
        let before = self.0.range(..=n).next_back().map(|(&first, &last)| (first, last));
        if before.is_some_and(|(_, last)| last >= n) {
            return false;
        }
        let last = n.checked_add(1).and_then(|next| self.0.remove(&next)).unwrap_or(n);
        let first = before.filter(|&(_, end)| end.checked_add(1) == Some(n)).map_or(n, |(first, _)| first);
        self.0.insert(first, last);
        true
    }

    /// Gives `n` back; false if it was free.
    pub(crate) fn remove(&mut self, n: u128) -> bool {
        let Some((first, last)) = self.run_at(n) else { return false };
        self.0.remove(&first);
        if first < n {
            self.0.insert(first, n - 1);
        }
        if n < last {
            self.0.insert(n + 1, last);
        }
        true
    }

    /// The first free one from `from` to `to`, both included.
    pub(crate) fn first_free(&self, from: u128, to: u128) -> Option<u128> {
        let free = match self.run_at(from) {
            Some((_, last)) => last.checked_add(1)?,
            None => from,
        };
        (free <= to).then_some(free)
    }

    /// Whether none is taken.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many are taken from `from` to `to`, both included; saturates at `u64::MAX`.
    pub(crate) fn count(&self, from: u128, to: u128) -> u64 {
        let partly = self.run_at(from).filter(|&(first, _)| first < from).map(|(_, last)| (from, last));
        let whole = self.0.range(from..=to).map(|(&first, &last)| (first, last));
        let count = partly
            .into_iter()
            .chain(whole)
            .fold(0_u128, |sum, (first, last)| sum.saturating_add(last.min(to) - first).saturating_add(1));
        u64::try_from(count).unwrap_or(u64::MAX)
    }

    fn run_at(&self, n: u128) -> Option<(u128, u128)> {
        let (&first, &last) = self.0.range(..=n).next_back()?;
        (last >= n).then_some((first, last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_ends_of_the_number_space_are_no_special_case() {
        let mut taken = Taken::default();
        assert!(taken.insert(u128::MAX));
        assert!(taken.insert(0));
        assert_eq!(taken.first_free(u128::MAX, u128::MAX), None);
        assert_eq!(taken.first_free(0, u128::MAX), Some(1));
        assert_eq!(taken.count(0, u128::MAX), 2);
        assert!(taken.remove(u128::MAX));
        assert!(!taken.remove(u128::MAX));
    }

    proptest! {
        #[test]
        fn runs_agree_with_a_plain_set(steps in prop::collection::vec((any::<bool>(), 0_u128..40), 0..300)) {
            let (mut taken, mut model) = (Taken::default(), BTreeSet::new());
            for (take, n) in steps {
                if take {
                    prop_assert_eq!(taken.insert(n), model.insert(n));
                } else {
                    prop_assert_eq!(taken.remove(n), model.remove(&n));
                }
                prop_assert_eq!(taken.run_at(n).is_some(), model.contains(&n));
                prop_assert_eq!(taken.first_free(n, 35), (n..=35).find(|x| !model.contains(x)));
                if n <= 30 {
                    prop_assert_eq!(taken.count(n, 30), model.range(n..=30).count() as u64);
                }
                let runs: Vec<_> = taken.0.iter().collect();
                prop_assert!(runs.windows(2).all(|w| *w[0].1 + 1 < *w[1].0), "runs touch: {:?}", runs);
            }
        }
    }
}
