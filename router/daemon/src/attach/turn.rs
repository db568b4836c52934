//! One request at a time for each attachment: a DEL that races an ADD of the same pod comes after it or before it.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, PoisonError};

use weft_api::AttachmentKey;

/// Who is being worked on.
#[derive(Debug, Default)]
pub struct Turns {
    busy: Mutex<BTreeSet<AttachmentKey>>,
    changed: Condvar,
}

/// The right to change one attachment; ends when it is dropped.
#[derive(Debug)]
pub struct Turn<'a> {
    turns: &'a Turns,
    key: AttachmentKey,
}

impl Turns {
    /// Waits until nobody else works on `key`.
    pub fn take(&self, key: &AttachmentKey) -> Turn<'_> {
        let busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        let mut busy = self.changed.wait_while(busy, |busy| busy.contains(key)).unwrap_or_else(PoisonError::into_inner);
        busy.insert(key.clone());
        Turn { turns: self, key: key.clone() }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.turns.busy.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
        self.turns.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    fn key(container: &str) -> AttachmentKey {
        AttachmentKey { network: "pods".into(), container: container.into(), ifname: "eth0".into() }
    }

    #[test]
    fn the_same_attachment_waits_and_another_does_not() {
        let turns = Turns::default();
        let inside = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let _turn = turns.take(&key("a"));
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
            let _a = turns.take(&key("b"));
            let _other = turns.take(&key("c"));
        });
        assert!(turns.busy.lock().unwrap().is_empty());
    }
}
