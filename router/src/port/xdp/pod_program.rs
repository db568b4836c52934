//! One program for the devices of many pods, all of them in one namespace.
//!
//! A program that nobody has attached before goes into the kernel's table of XDP programs (the dispatcher,
//! <https://elixir.bootlin.com/linux/v6.18/A/ident/bpf_dispatcher_change_prog>), and each change of that table is followed by a grace
//! period of RCU, as is the removal of a program that nobody has any more: several ticks of the kernel's clock, in which a pod waits
//! for its network. A program that is there already changes nothing. So it is one for all, which tells devices apart by their
//! interfaces' numbers, and there is always one that has it ([`PodProgram::keep`]).

use std::collections::HashSet;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::programs;
use crate::port::sys::bpf::{BpfError, Link, Map, MapKind, Mode, Program};
use crate::port::sys::xsk::Socket;

/// The program, and the sockets that it finds.
#[derive(Debug)]
pub struct PodProgram {
    program: Program,
    sockets: Map,
    taken: Mutex<HashSet<u32>>,
}

impl PodProgram {
    /// Sockets at once. Interfaces get higher and higher numbers; two of them meet at one place only if one lives while so many
    /// come and go.
    const PLACES: u32 = 1 << 16;

    /// Loads it.
    ///
    /// # Errors
    /// [`BpfError::Refused`]: not permitted.
    pub fn load() -> Result<PodProgram, BpfError> {
        let sockets = Map::create(MapKind::Xsk, "weft_pods", 4, 4, PodProgram::PLACES)?;
        let program = Program::load("weft_pods", &programs::pods(&sockets, PodProgram::PLACES))?;
        Ok(PodProgram { program, sockets, taken: Mutex::default() })
    }

    /// Has every frame of a pod's device go to `socket`; none if another device has its place.
    pub(super) fn lead(self: &Arc<PodProgram>, interface: u32, socket: &Socket) -> Result<Option<PodLead>, BpfError> {
        let place = interface % PodProgram::PLACES;
        if !self.places().insert(place) {
            return Ok(None);
        }
        let place = Place { of: Arc::clone(self), place };
        self.sockets.update(&place.place.to_ne_bytes(), &socket.as_fd().as_raw_fd().to_ne_bytes())?;
        Ok(Some(PodLead { _link: self.program.attach(interface, Mode::Native)?, _place: place }))
    }

    /// Attaches it to a device of nobody's, so that it stays in the kernel's table while pods come and go.
    ///
    /// # Errors
    /// As for a pod's device.
    pub fn keep(&self, interface: u32) -> Result<KeptProgram, BpfError> {
        Ok(KeptProgram { _link: self.program.attach(interface, Mode::Native)? })
    }

    fn places(&self) -> MutexGuard<'_, HashSet<u32>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An attachment of a [`PodProgram`] that leads nowhere.
#[derive(Debug)]
pub struct KeptProgram {
    _link: Link,
}

/// A device's place among the sockets of a [`PodProgram`].
#[derive(Debug)]
struct Place {
    of: Arc<PodProgram>,
    place: u32,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.of.places();
        // A socket that has been closed has left already.
        let _ = self.of.sockets.remove(&self.place.to_ne_bytes());
        taken.remove(&self.place);
    }
}

/// A device that has a [`PodProgram`]; it loses it when this goes.
#[derive(Debug)]
pub(super) struct PodLead {
    // Detached when it is dropped, before its place is free.
    _link: Link,
    _place: Place,
}
