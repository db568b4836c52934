//! Who is being served: a bounded number of clients.
//!
//! A client is *idle* until a whole request of its has come, and again after its answer. When all slots are taken, a new
//! client displaces the idle one that has been so for longest, whose connection is shut down.

use std::collections::BTreeMap;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// All slots.
#[derive(Debug)]
pub struct Slots {
    limit: usize,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    clock: u64,
    taken: BTreeMap<u64, Client>,
    closed: bool,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    /// Since when it has been idle, in counts of the clock; `None` while it is served.
    idle: Option<u64>,
}

/// One client's slot; free again when it is dropped.
#[derive(Debug)]
pub struct Slot {
    slots: Arc<Slots>,
    number: u64,
}

impl Slots {
    /// So many.
    pub fn new(limit: usize) -> Slots {
        Slots { limit, inner: Mutex::default() }
    }

    /// Whether the next client would get a slot.
    pub fn has_room(&self) -> bool {
        let inner = self.lock();
        inner.taken.len() < self.limit || inner.taken.values().any(|client| client.idle.is_some())
    }

    /// A slot for the client behind `stream`; `None` if all are taken by clients that are being served.
    pub fn take(self: &Arc<Slots>, stream: &UnixStream) -> Option<Slot> {
        let stream = stream.try_clone().ok()?;
        let mut inner = self.lock();
        if inner.taken.len() >= self.limit {
            let idle = inner.taken.iter().filter_map(|(number, client)| Some((client.idle?, *number)));
            let (_, longest) = idle.min()?;
            if let Some(displaced) = inner.taken.remove(&longest) {
                // Its thread sees the end of the stream; that it is gone already is as good.
                let _ = displaced.stream.shutdown(Shutdown::Both);
            }
        }
        inner.clock += 1;
        let number = inner.clock;
        inner.taken.insert(number, Client { stream, idle: Some(number) });
        Some(Slot { slots: Arc::clone(self), number })
    }

    /// Ends the connections of all idle clients, and lets those that are being served end after their answer.
    pub fn close(&self) {
        let mut inner = self.lock();
        inner.closed = true;
        for client in inner.taken.values().filter(|client| client.idle.is_some()) {
            let _ = client.stream.shutdown(Shutdown::Both);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    /// Its client has been answered, or has not asked yet. `false`: it shall not ask any more.
    pub fn idle(&self) -> bool {
        let mut inner = self.slots.lock();
        inner.clock += 1;
        let now = inner.clock;
        if let Some(client) = inner.taken.get_mut(&self.number) {
            client.idle = Some(now);
        }
        !inner.closed
    }

    /// Its client has asked something. `false`: it was displaced, and cannot be answered.
    pub fn working(&self) -> bool {
        let mut inner = self.slots.lock();
        let client = inner.taken.get_mut(&self.number);
        client.map(|client| client.idle = None).is_some()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.lock().taken.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn the_client_that_was_silent_for_longest_makes_room() {
        let slots = Arc::new(Slots::new(2));
        let (first, mut first_peer) = UnixStream::pair().unwrap();
        let (second, _second_peer) = UnixStream::pair().unwrap();
        let (third, _third_peer) = UnixStream::pair().unwrap();
        let first_slot = slots.take(&first).unwrap();
        let second_slot = slots.take(&second).unwrap();
        assert!(first_slot.idle());
        assert!(second_slot.working());
        let third_slot = slots.take(&third).unwrap();
        assert!(!first_slot.working(), "it was displaced");
        assert_eq!(first_peer.read(&mut [0]).unwrap(), 0);
        assert!(third_slot.working());
        assert!(!slots.has_room() && slots.take(&first).is_none(), "all are being served");
        drop(second_slot);
        assert!(slots.take(&first).is_some());
    }

    #[test]
    fn closing_ends_silent_clients_at_once_and_others_after_their_answer() {
        let slots = Arc::new(Slots::new(2));
        let (silent, mut silent_peer) = UnixStream::pair().unwrap();
        let (served, mut served_peer) = UnixStream::pair().unwrap();
        let (_silent_slot, served_slot) = (slots.take(&silent).unwrap(), slots.take(&served).unwrap());
        assert!(served_slot.working());
        slots.close();
        assert_eq!(silent_peer.read(&mut [0]).unwrap(), 0);
        served_peer.set_nonblocking(true).unwrap();
        assert!(served_peer.read(&mut [0]).is_err(), "its answer is still to come");
        assert!(!served_slot.idle());
    }
}
