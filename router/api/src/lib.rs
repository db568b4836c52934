//! What `weftd`, `weft-cni` and `weft` say to each other.
//!
//! One request and one answer are a line of JSON each, over the daemon's unix socket ([`SOCKET`]). A connection may
//! carry several requests, one after the other. A request that names a network namespace ([`Request::Add`],
//! [`Request::Check`], optionally [`Request::Del`]) carries the namespace's descriptor as `SCM_RIGHTS` with the
//! first byte of its line, so that the daemon needs no shared mount.
//!
//! A request's line is `{"version":1,"op":"…",…}`, an answer's `{"version":1,"ok":…}` or
//! `{"version":1,"error":{…}}`. [`Client`] is the clients' side; a daemon receives with [`Connection::receive`] and
//! [`Line::request`] and answers with [`Connection::answer`], on a blocking thread per connection.
//!
//! The types here are plain: addresses are `std::net` types, MACs are strings (`aa:bb:cc:dd:ee:ff`), prefixes are
//! strings in CIDR form. Unknown fields are ignored in both directions, so that an old shim can talk to a new
//! daemon and the reverse; [`VERSION`] grows only when that does not suffice.

mod client;
mod connection;
#[cfg(feature = "folders")]
pub mod folders;
mod message;

pub use client::{Client, ClientError};
pub use connection::{Connection, Incoming, Line, LineError, MAX_REQUEST};
pub use message::*;

/// The version of this protocol, sent in each request and each answer.
pub const VERSION: u32 = 1;

/// Where the daemon listens unless told otherwise.
pub const SOCKET: &str = "/run/weft/weftd.sock";

/// The longest line either side accepts, in bytes, the newline included.
pub const MAX_LINE: usize = 16 * 1024 * 1024;
