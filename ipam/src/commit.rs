//! Writing for many at once.
//!
//! Whoever wants something written leaves it with a ticket, and waits until the ticket is settled. The first who finds nobody writing does it:
//! takes what has gathered, as much as one frame holds, the pending releases first; writes and syncs it with no lock held but the
//! journal's; then enters it in memory and wakes the others. Since that is one frame, a crash leaves all of it or nothing, and what is promised of one
//! change ([`crate::Store`]) holds for each of many.

use std::sync::{MutexGuard, PoisonError};

use crate::codec;
use crate::error::StoreError;
use crate::journal::{Journal, MAX_PAYLOAD};
use crate::store::{Change, Memory, Store, Waiting};

/// What one frame takes.
struct Batch {
    payload: Vec<u8>,
    /// How many of the pending releases are in it.
    releases: usize,
    waiting: Vec<Waiting>,
}

/// Ends the commit, also if it panics.
struct Committing<'a>(&'a Store);

impl Drop for Committing<'_> {
    fn drop(&mut self) {
        self.0.memory().committing = false;
        self.0.settled.notify_all();
    }
}

impl Store {
    /// Waits until `ticket` is settled, writing what has gathered if nobody else does.
    pub(crate) fn settle<'a>(&'a self, mut memory: MutexGuard<'a, Memory>, ticket: u64) -> Result<(), StoreError> {
        loop {
            if let Some(result) = memory.done.remove(&ticket) {
                return result;
            }
            memory = self.next_commit(memory);
        }
    }

    /// Waits for the end of the commit that is under way, or makes one.
    pub(crate) fn next_commit<'a>(&'a self, mut memory: MutexGuard<'a, Memory>) -> MutexGuard<'a, Memory> {
        if memory.committing {
            return self.settled.wait(memory).unwrap_or_else(PoisonError::into_inner);
        }
        memory.committing = true;
        drop(memory);
        let committing = Committing(self);
        self.commit();
        drop(committing);
        self.memory()
    }

    /// Rewrites the journal with nothing but what is true now. Done by itself when the journal has grown.
    pub fn compact(&self) -> Result<(), StoreError> {
        let mut memory = self.memory();
        while memory.committing {
            memory = self.settled.wait(memory).unwrap_or_else(PoisonError::into_inner);
        }
        memory.committing = true;
        drop(memory);
        let _committing = Committing(self);
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        self.compact_now(&mut journal)
    }

    fn commit(&self) {
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        // Before anything is gathered: what a compaction makes durable must not be written once more.
        let room = if journal.nearly_full() { self.compact_now(&mut journal) } else { Ok(()) };
        let batch = Batch::gather(&mut self.memory());
        let written =
            room.and_then(|()| if batch.payload.is_empty() { Ok(()) } else { journal.append(&batch.payload) });
        let mut memory = self.memory();
        memory.counts.commits += 1;
        memory.note(&journal, &written);
        memory.apply(batch, &written);
        drop(memory);
        self.settled.notify_all();
        // Housekeeping: what was asked for is done, so a failure only shows in `trouble`.
        if journal.compaction_is_due() {
            let _ = self.compact_now(&mut journal);
        }
    }

    /// To be called by whoever commits.
    fn compact_now(&self, journal: &mut Journal) -> Result<(), StoreError> {
        let (leases, released) = {
            let memory = self.memory();
            (memory.leases.clone(), memory.pending.len())
        };
        let compacted = journal.compact(&leases);
        let mut memory = self.memory();
        memory.note(journal, &compacted);
        if compacted.is_ok() {
            // What had been released is not in the new journal: that is durable. What is on its way comes after it.
            memory.let_go(released, &Ok(()));
        }
        compacted
    }
}

impl Batch {
    fn gather(memory: &mut Memory) -> Batch {
        let mut batch = Batch { payload: Vec::new(), releases: 0, waiting: Vec::new() };
        for released in &memory.pending {
            let before = batch.payload.len();
            codec::put_release(&mut batch.payload, &released.record.owner, released.since);
            if batch.payload.len() > MAX_PAYLOAD {
                batch.payload.truncate(before);
                return batch;
            }
            batch.releases += 1;
        }
        while let Some(next) = memory.waiting.front() {
            if batch.payload.len() + next.payload.len() > MAX_PAYLOAD {
                break;
            }
            batch.payload.extend(&next.payload);
            batch.waiting.extend(memory.waiting.pop_front());
        }
        batch
    }
}

impl Memory {
    fn note(&mut self, journal: &Journal, done: &Result<(), StoreError>) {
        self.counts.failed += u64::from(done.is_err());
        self.trouble = done.as_ref().err().map(ToString::to_string);
        self.poisoned = journal.poisoned().map(str::to_owned);
        self.journal_len = journal.len();
    }

    /// Enters what was written, or undoes what was not.
    fn apply(&mut self, batch: Batch, written: &Result<(), StoreError>) {
        self.let_go(batch.releases, written);
        for Waiting { ticket, change, .. } in batch.waiting {
            match (change, written) {
                (Change::Lease(record), written) => {
                    self.arriving.remove(&record.owner);
                    match written {
                        Ok(()) => {
                            self.counts.leased += 1;
                            self.leases.enter(record);
                        }
                        Err(_) => self.leases.free(&record),
                    }
                }
                (Change::Round { pool, last }, Ok(())) => self.leases.set_round(&pool, last, last),
                (Change::Boot { id, now }, Ok(())) => self.leases.begin_boot(&id, now),
                (Change::Round { .. } | Change::Boot { .. }, Err(_)) => {}
            }
            self.done.insert(ticket, again(written));
        }
    }

    /// The first pending releases are durable, or were tried in vain.
    fn let_go(&mut self, count: usize, written: &Result<(), StoreError>) {
        for released in self.pending.iter_mut().take(count) {
            if let Some(ticket) = released.ticket.take() {
                self.done.insert(ticket, again(written));
            }
        }
        if written.is_ok() {
            for released in self.pending.drain(..count) {
                self.leases.lay_to_rest(&released.record, released.since);
            }
        }
    }
}

fn again(result: &Result<(), StoreError>) -> Result<(), StoreError> {
    result.as_ref().map_err(StoreError::again).copied()
}
