//! Which devices the kernel tells of, and which the worker looks at itself.
//!
//! A device that stands in the poller costs the kernel something for each frame: when one comes, the poller is told. And an AF_XDP socket
//! tells it for each frame that was sent, too, for whoever waits on the socket may be waiting for room: a tenth of what sending a
//! small frame costs. So while a worker has more to do than it can, devices that are busy and whose rings can be looked at
//! without the kernel (`Port::peek`) leave the poller, and are looked at once in each round. All come back before the
//! thread sleeps, and now and then in between, for only the poller knows that a device is gone.

use mio::Token;
use mio::unix::SourceFd;
use std::os::fd::AsRawFd;

use super::Worker;
use super::ports::watch;
use crate::control::PortEnd;
use crate::port::{BATCH, PortId};

/// Rounds without sleep after which busy ports leave the poller.
const PATIENCE: u32 = 4;
/// Rounds without sleep after which they come back for one.
const STRETCH: u32 = 256;
/// Frames of a round that make a port a busy one.
const BUSY: usize = BATCH / 4;

/// Where the ports are. See the module's essay.
#[derive(Debug, Default)]
pub(super) struct Attention {
    /// Rounds since the thread slept.
    rounds: u32,
    /// Busy ports that are in the poller.
    busy: Vec<PortId>,
    /// Ports that are not.
    away: Vec<PortId>,
}

impl Attention {
    /// A port was given or has received so many frames at once. `can_peek`: its rings can be looked at.
    pub fn note(&mut self, id: PortId, frames: usize, can_peek: bool) {
        if can_peek && frames >= BUSY && !self.busy.contains(&id) && !self.away.contains(&id) {
            self.busy.push(id);
        }
    }

    /// A port is no more.
    pub fn forget(&mut self, id: PortId) {
        self.busy.retain(|busy| *busy != id);
        self.away.retain(|away| *away != id);
    }
}

impl Worker {
    /// Before each look at the poller: sees to it that nothing is missed, however long that takes.
    pub(super) fn attend(&mut self) {
        self.attention.rounds += 1;
        if self.ready.is_empty() || self.attention.rounds >= STRETCH {
            return self.return_all();
        }
        if self.attention.rounds >= PATIENCE {
            for id in std::mem::take(&mut self.attention.busy) {
                self.leave(id);
            }
        }
        for index in 0..self.attention.away.len() {
            let id = self.attention.away[index];
            let port = self.ports.get_mut(id.index()).and_then(Option::as_mut).and_then(|slot| slot.port.as_mut());
            if port.is_some_and(|port| port.peek() == Some(true)) {
                self.mark_ready(id);
            }
        }
    }

    fn leave(&mut self, id: PortId) {
        let slot = self.ports.get_mut(id.index()).and_then(Option::as_mut);
        let Some(port) = slot.and_then(|slot| slot.port.as_mut()) else { return };
        if !port.watch(false) {
            let Some(fd) = port.readable() else { return };
            if self.poll.registry().deregister(&mut SourceFd(&fd.as_raw_fd())).is_err() {
                return;
            }
        }
        self.attention.away.push(id);
    }

    /// What came meanwhile is told by the poller at once.
    fn return_all(&mut self) {
        self.attention.rounds = 0;
        self.attention.busy.clear();
        for id in std::mem::take(&mut self.attention.away) {
            let slot = self.ports.get_mut(id.index()).and_then(Option::as_mut);
            let Some(port) = slot.and_then(|slot| slot.port.as_mut()) else { continue };
            if !port.watch(true) && watch(&self.poll, id, &**port).is_err() {
                self.gone(id, PortEnd::Device);
            }
        }
    }

    /// The poller has told of something.
    pub(super) fn told(&mut self, token: Token) {
        self.mark_ready(PortId(token.0 as u16));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_busy_ports_that_can_be_looked_at_are_noted_and_once() {
        let mut attention = Attention::default();
        attention.note(PortId(3), BUSY - 1, true);
        attention.note(PortId(4), BUSY, false);
        assert!(attention.busy.is_empty());
        attention.note(PortId(5), BUSY, true);
        attention.note(PortId(5), BATCH, true);
        assert_eq!(attention.busy, [PortId(5)]);
        attention.away.push(PortId(6));
        attention.note(PortId(6), BATCH, true);
        assert_eq!(attention.busy, [PortId(5)]);
        attention.forget(PortId(5));
        attention.forget(PortId(6));
        assert!(attention.busy.is_empty() && attention.away.is_empty());
    }
}
