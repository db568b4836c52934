//! The API: clients on the unix socket, each on a blocking thread of its own.
//!
//! Limits, because every client is a stranger: only root and weftd's own user are served; at most [`MAX_CONNECTIONS`] at
//! once, where a new client displaces the one that has been silent for longest; a request must arrive whole, and its answer be
//! taken, within [`DEADLINE`]. A client that only sits there costs others nothing.

pub mod losses;
pub mod show;
pub mod slots;
pub mod socket;
pub mod status;
pub mod waiting;

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::oneshot;
use tokio::task;
use weft_api::{Answer, Attach, Attached, Connection, Empty, Failure, Incoming, LineError, MAX_REQUEST, Request, code};

use crate::attach;
use crate::control::source::Order;
use crate::node::Node;
use crate::shortage;
use slots::{Slot, Slots};
use socket::Arrived;

/// Clients at once.
pub const MAX_CONNECTIONS: usize = 128;
/// How long a client may be silent, dribble, or not take its answer.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// How long requests under way may take when weftd stops.
pub const GRACE: Duration = Duration::from_secs(5);

/// Serves clients.
pub struct Server {
    node: Arc<Node>,
    slots: Arc<Slots>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.slots.close();
    }
}

impl Server {
    /// Serves them with `node`.
    pub fn new(node: Arc<Node>) -> Server {
        Server { node, slots: Arc::new(Slots::new(MAX_CONNECTIONS)) }
    }

    /// Waits until a client can be taken in. Until then it waits in the socket's queue, with up to a few thousand others.
    pub async fn has_room(&self) {
        while !self.slots.has_room() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Takes a client in, or refuses it.
    pub async fn serve(&self, arrived: std::io::Result<Arrived>) {
        let Arrived { stream, uid, last } = match arrived {
            Ok(arrived) => arrived,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a client");
                // Out of descriptors: the client stays in the backlog, and trying again at once would spin.
                return tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        if let Err(failure) = check_user(uid) {
            return refuse(stream, failure);
        }
        if last {
            return refuse(stream, shortage());
        }
        match self.slots.take(&stream) {
            Some(slot) => {
                let node = Arc::clone(&self.node);
                drop(task::spawn_blocking(move || converse(&node, Connection::new(stream, MAX_REQUEST), &slot)));
            }
            None => refuse(stream, busy()),
        }
    }
}

fn busy() -> Failure {
    Failure {
        code: code::TRY_AGAIN,
        msg: format!("weftd is serving {MAX_CONNECTIONS} requests already"),
        details: "try again".into(),
    }
}

fn shortage() -> Failure {
    Failure::new(code::TRY_AGAIN, "weftd has as many files open as it may").with_details(shortage::ADVICE)
}

/// Without waiting: whoever does not take the answer at once does without.
fn refuse(stream: UnixStream, failure: Failure) {
    let _ = Connection::new(stream, MAX_REQUEST).answer(&Answer::<Empty>::Error(failure), Instant::now());
}

fn check_user(uid: u32) -> Result<(), Failure> {
    if uid == 0 || uid == rustix::process::geteuid().as_raw() {
        return Ok(());
    }
    tracing::warn!(uid, "refused a client of another user");
    Err(Failure {
        code: code::REQUEST,
        msg: format!("user {uid} may not talk to weftd"),
        details: "run it as root, or as the user that weftd runs as".into(),
    })
}

/// One client's requests, one after the other.
fn converse(node: &Node, mut connection: Connection, slot: &Slot) {
    while slot.idle() {
        let line = match connection.receive(Instant::now() + DEADLINE) {
            Ok(Some(line)) => line,
            Ok(None) | Err(LineError::TimedOut { .. } | LineError::Io(_) | LineError::Cut) => return,
            Err(error @ (LineError::TooLong(_) | LineError::Misplaced)) => {
                let failure = Failure { code: code::REQUEST, msg: error.to_string(), details: String::new() };
                return refuse_connection(&mut connection, failure);
            }
        };
        // A client that waited for too long has left, and a shim a tombstone: what it asked for is not wanted any more, and doing
        // it late could undo what came after it.
        if !slot.working() || connection.is_abandoned() {
            return;
        }
        let answered = match line.request() {
            Ok(incoming) => answer(node, &mut connection, incoming),
            Err(failure) => reply::<Empty>(&mut connection, Err(failure)),
        };
        if let Err(error) = answered {
            tracing::debug!(%error, "a client did not take its answer");
            return;
        }
    }
}

fn refuse_connection(connection: &mut Connection, failure: Failure) {
    let _ = reply::<Empty>(connection, Err(failure));
}

/// Does what is asked, and answers.
fn answer(node: &Node, connection: &mut Connection, incoming: Incoming) -> Result<(), LineError> {
    match incoming.request {
        Request::Add(request) => {
            let made = counted(node, "add", || attach::add(node, &request, incoming.descriptor));
            reply_or_free(node, connection, &request, made)
        }
        Request::Prepare(request) => {
            let made = counted(node, "prepare", || attach::dhcp::prepare(node, &request, incoming.descriptor));
            reply_or_free(node, connection, &request, made)
        }
        Request::Complete(request) => {
            let made = counted(node, "add", || attach::dhcp::complete(node, &request, incoming.descriptor));
            reply_or_free(node, connection, &request, made)
        }
        Request::Del(key) => {
            let deleted = counted(node, "del", || {
                attach::del(node, &key);
                Ok(Empty {})
            });
            reply(connection, deleted)
        }
        Request::Check(request) => {
            let check = || attach::check::check(node, &request, incoming.descriptor).map(|()| Empty {});
            reply(connection, counted(node, "check", check))
        }
        Request::Gc(request) => reply(connection, counted(node, "gc", || Ok(attach::collect(node, &request)))),
        Request::Lease(request) => {
            let made = counted(node, "add", || attach::only_lease::add(node, &request, incoming.descriptor));
            reply_or_free(node, connection, &request, made)
        }
        Request::CheckLease(request) => {
            let check = || attach::only_lease::check(node, &request).map(|()| Empty {});
            reply(connection, counted(node, "check", check))
        }
        Request::Find(key) => reply(connection, Ok(attach::find(node, &key))),
        Request::Ready => reply(connection, counted(node, "status", || status::ready(node).map(|()| Empty {}))),
        Request::Status => reply(connection, status::status(node)),
        Request::Ports => reply(connection, show::ports(node)),
        Request::Routes => reply(connection, Ok(show::routes(node))),
        Request::Fdb => reply(connection, show::fdb(node)),
        Request::Nat => reply(connection, Ok(show::nat(node))),
        Request::Neigh => reply(connection, Ok(show::neighbours(node))),
        Request::Flows => reply(connection, show::flows(node)),
        Request::Leases => reply(connection, Ok(show::leases(node))),
        Request::Drops => reply(connection, show::drops(node)),
        Request::Nodes => reply(connection, show::nodes(node)),
        Request::Leave => reply(connection, leave(node).map(|()| Empty {})),
        Request::Reserve(request) => reply(connection, attach::reserve::reserve(node, &request).map(|()| Empty {})),
        Request::Reload => reply(connection, node.reload().map(|()| Empty {})),
    }
}

/// Has the source give this node's ranges back.
fn leave(node: &Node) -> Result<(), Failure> {
    let pods = node.state().attachments.len();
    if pods > 0 {
        let msg = format!("{pods} pods are attached, and would lose their addresses");
        return Err(Failure::new(code::NOT_AVAILABLE, msg).with_details("drain the node first"));
    }
    let Some(orders) = &node.orders else {
        return Err(Failure::new(
            code::REQUEST,
            "this node's ranges stand in its file: there is nobody to give them back to",
        ));
    };
    let (answer, told) = oneshot::channel();
    let sent = orders.blocking_send(Order::Leave(answer)).is_ok();
    let left = if sent { told.blocking_recv().ok() } else { None };
    let left = left.unwrap_or_else(|| Err("the source does not answer".into()));
    left.map_err(|why| Failure::new(code::TRY_AGAIN, why).with_details("the ranges stay this node's"))
}

/// An attachment that nobody was told of would stay for ever: its runtime believes that there is none.
fn reply_or_free(
    node: &Node,
    connection: &mut Connection,
    request: &Attach,
    made: Result<Attached, Failure>,
) -> Result<(), LineError> {
    let given = made.as_ref().ok().cloned();
    let replied = if connection.is_abandoned() { Err(LineError::Cut) } else { reply(connection, made) };
    if let (Some(given), Err(_)) = (given, &replied)
        && attach::take_back(node, &request.key, &given)
    {
        tracing::warn!(
            container = request.key.container,
            ifname = request.key.ifname,
            "freed, for nobody took the answer"
        );
    }
    replied
}

/// Does one of CNI's operations, and notes how it ended.
fn counted<T>(node: &Node, operation: &'static str, act: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    let started = Instant::now();
    let result = act();
    node.requests.count(operation, result.as_ref().err().map_or(0, |failure| failure.code), started.elapsed());
    result
}

fn reply<T: Serialize>(connection: &mut Connection, result: Result<T, Failure>) -> Result<(), LineError> {
    let answer = match result {
        Ok(value) => Answer::Ok(value),
        Err(failure) => Answer::Error(failure),
    };
    connection.answer(&answer, Instant::now() + DEADLINE)
}
