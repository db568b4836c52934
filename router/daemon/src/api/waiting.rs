//! The API before the node is known: a source has not said yet what this node's ranges are.
//!
//! Whoever asks is told why nothing can be done yet, in the terms that a runtime understands: ADD is to be tried again, STATUS says that
//! the network is not ready. A DEL is not answered at all, so the plugin leaves a tombstone as if weftd were away, and the pod can go.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;
use tokio::task;
use weft_api::{Answer, Connection, Empty, Failure, MAX_REQUEST, Request, code};

use super::slots::Slots;
use super::socket::Arrived;
use super::{DEADLINE, MAX_CONNECTIONS, busy, check_user, refuse};
use crate::control::source::View;

/// Answers clients while there is no node.
pub struct Waiting {
    views: watch::Receiver<View>,
    slots: Arc<Slots>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.slots.close();
    }
}

impl Waiting {
    /// For what these views lack.
    pub fn new(views: watch::Receiver<View>) -> Waiting {
        Waiting { views, slots: Arc::new(Slots::new(MAX_CONNECTIONS)) }
    }

    /// Answers one request of a client.
    pub fn serve(&self, arrived: Arrived) {
        let Arrived { stream, uid, last } = arrived;
        if let Err(failure) = check_user(uid) {
            return refuse(stream, failure);
        }
        if last {
            return refuse(stream, busy());
        }
        let Some(slot) = self.slots.take(&stream) else { return refuse(stream, busy()) };
        let trouble = self.views.borrow().trouble.clone();
        drop(task::spawn_blocking(move || {
            let _slot = slot;
            let mut connection = Connection::new(stream, MAX_REQUEST);
            let Ok(Some(line)) = connection.receive(Instant::now() + DEADLINE) else { return };
            let code = match line.request().map(|incoming| incoming.request) {
                Ok(Request::Del(_)) => return,
                Ok(Request::Ready) => code::NOT_AVAILABLE,
                _ => code::TRY_AGAIN,
            };
            // Whoever does not take the answer asks again.
            let _ = connection.answer(&Answer::<Empty>::Error(why(code, trouble)), Instant::now() + DEADLINE);
        }));
    }
}

fn why(code: u32, trouble: Option<String>) -> Failure {
    let why = trouble.unwrap_or_else(|| "its source has not answered yet".into());
    Failure::new(code, format!("this node does not know its ranges yet: {why}"))
        .with_details("weftd goes on by itself as soon as it does")
}
