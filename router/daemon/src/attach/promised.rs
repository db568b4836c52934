//! A lease that is on its way to the disk while the pod's device is made.
//!
//! Either takes as long as the other, and neither needs the other before the ADD is answered: weftd's end in between takes the device along,
//! so no address is in use that the next start would not know of. The thread that has the request writes; the one that makes the device
//! ([`super::namespace::travel`]) asks for that, and waits for the outcome before it says that it is done.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use weft_api::{Failure, code};
use weft_ipam::{Begun, LeaseError, Record, Store};

use super::refusal;

type Outcome = Result<Arc<Record>, LeaseError>;

/// The asking end.
#[derive(Debug)]
pub struct Asking {
    begun: Sender<Begun>,
    outcomes: Receiver<Outcome>,
}

/// The end that writes.
#[derive(Debug)]
pub struct Writing {
    begun: Receiver<Begun>,
    outcomes: Sender<Outcome>,
}

/// Both.
pub fn ends() -> (Asking, Writing) {
    let (ask, asked) = mpsc::channel();
    let (tell, told) = mpsc::channel();
    (Asking { begun: ask, outcomes: told }, Writing { begun: asked, outcomes: tell })
}

impl Asking {
    /// Has a lease written.
    pub fn begin(&self, begun: Begun) {
        // Whoever writes stays until this end goes.
        let _ = self.begun.send(begun);
    }

    /// Waits until it is, or is not.
    pub fn outcome(&self) -> Result<(), Failure> {
        match self.outcomes.recv() {
            Ok(outcome) => outcome.map(drop).map_err(|error| refusal(&error)),
            Err(_) => Err(Failure::new(code::INTERNAL, "the lease could not be written: see weftd's log")),
        }
    }
}

impl Writing {
    /// Writes what is asked for, until the other end goes.
    pub fn serve(self, store: &Store) {
        for begun in self.begun {
            let _ = self.outcomes.send(store.finish(begun));
        }
    }
}
