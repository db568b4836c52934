//! Reaching weftd, which may be starting.
//!
//! A node boots, or weftd is upgraded, while the runtime goes on: a command that cannot do without the daemon tries
//! for a while before it gives up, and then says what failed and where to look. A daemon that was reached but gives
//! no answer is not asked again: what it did with the request is not known, and the runtime undoes a failed ADD
//! with a DEL.

use std::io::ErrorKind;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use weft_api::{Client, ClientError, Failure, Request, code};

/// How long the daemon may take for one answer. An ADD waits for netlink and for the disk.
pub const ANSWER: Duration = Duration::from_secs(30);

/// How long between two tries.
const PAUSE: Duration = Duration::from_millis(50);

/// Asks the daemon at `socket`, waits for up to `wait` until it is there, and then for up to `answer` until it answers.
pub fn ask<T: DeserializeOwned>(
    socket: &Path,
    wait: Duration,
    answer: Duration,
    request: &Request,
    descriptor: Option<BorrowedFd<'_>>,
) -> Result<T, ClientError> {
    let mut client = reach(socket, wait, answer)?;
    match descriptor {
        Some(descriptor) => client.call_with_fd(request, descriptor),
        None => client.call(request),
    }
}

/// How a daemon that did not do what was asked is told to the runtime.
pub fn failure(error: ClientError) -> Failure {
    match error {
        ClientError::Refused(failure) => failure,
        other => Failure::new(code::TRY_AGAIN, other.to_string())
            .with_details("see `systemctl status weftd` or the log of weftd's pod on this node; then try again"),
    }
}

fn reach(socket: &Path, wait: Duration, answer: Duration) -> Result<Client, ClientError> {
    let deadline = Instant::now() + wait;
    loop {
        match Client::connect(socket, answer) {
            Err(ClientError::Unreachable { source, .. }) if passes(source.kind()) && Instant::now() < deadline => {
                std::thread::sleep(PAUSE.min(deadline.saturating_duration_since(Instant::now())));
            }
            other => return other,
        }
    }
}

/// Whether the reason is one that a daemon's start ends.
fn passes(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::NotFound | ErrorKind::ConnectionRefused)
}
