//! The blocking client: one connection to weftd, one request at a time.
//!
//! Each call has the whole timeout for itself, from the first byte written to the last byte read. A weftd that accepts
//! but never answers therefore costs the caller exactly that long. After any error but [`ClientError::Refused`] the
//! place in the stream is lost, and the client refuses further calls: connect again.

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::de::DeserializeOwned;

use crate::connection::Reply;
use crate::{Connection, Failure, LineError, MAX_LINE, Request, VERSION};

/// How long to wait before trying again when weftd's backlog is full.
const BACKLOG_PAUSE: Duration = Duration::from_millis(10);

/// A connection to weftd.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    timeout: Duration,
    /// `None` once the place in the stream is lost.
    connection: Option<Connection>,
}

/// Why a call did not succeed.
#[derive(Debug)]
pub enum ClientError {
    /// Nobody listens at the socket.
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// weftd did not answer within the timeout.
    TimedOut {
        /// The socket.
        path: PathBuf,
        /// The timeout.
        after: Duration,
    },
    /// What came is not an answer.
    Protocol(String),
    /// weftd answered that it was not done, and why.
    Refused(Failure),
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable { path, source } => {
                write!(f, "cannot reach weftd at {}: {source}; is weftd running?", path.display())
            }
            Self::TimedOut { path, after } => {
                write!(f, "weftd at {} did not answer within {after:?}", path.display())
            }
            Self::Protocol(what) => write!(f, "weftd's answer cannot be used: {what}"),
            Self::Refused(failure) if failure.details.is_empty() => f.write_str(&failure.msg),
            Self::Refused(failure) => write!(f, "{} ({})", failure.msg, failure.details),
        }
    }
}

impl std::error::Error for ClientError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Unreachable { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl Client {
    /// Connects to the daemon that listens at `path`. `timeout` holds for this and for each call.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Client, ClientError> {
        let deadline = Instant::now() + timeout;
        let socket = loop {
            match connect_once(path) {
                Ok(socket) => break socket,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if Instant::now() < deadline => std::thread::sleep(BACKLOG_PAUSE),
                Err(Errno::AGAIN) => return Err(ClientError::TimedOut { path: path.to_owned(), after: timeout }),
                Err(errno) => return Err(ClientError::Unreachable { path: path.to_owned(), source: errno.into() }),
            }
        };
        let connection = Connection::new(UnixStream::from(socket), MAX_LINE);
        Ok(Client { path: path.to_owned(), timeout, connection: Some(connection) })
    }

    /// Asks, and waits for the answer.
    pub fn call<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T, ClientError> {
        self.exchange(request, None)
    }

    /// Asks with a descriptor, and waits for the answer.
    pub fn call_with_fd<T: DeserializeOwned>(
        &mut self,
        request: &Request,
        fd: BorrowedFd<'_>,
    ) -> Result<T, ClientError> {
        self.exchange(request, Some(fd))
    }

    fn exchange<T: DeserializeOwned>(
        &mut self,
        request: &Request,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<T, ClientError> {
        let lost = || ClientError::Protocol("an earlier call on this connection failed".to_owned());
        let mut connection = self.connection.take().ok_or_else(lost)?;
        let deadline = Instant::now() + self.timeout;
        // A daemon that refuses the request unread (too long, wrong user) answers and closes: what it said counts for
        // more than that it stopped listening.
        let asked = connection.ask(request, fd, deadline);
        let line = match (asked, connection.receive(deadline)) {
            (_, Ok(Some(line))) => line,
            (Err(error), _) | (Ok(()), Err(error)) => return Err(self.failure(error)),
            (Ok(()), Ok(None)) => {
                return Err(ClientError::Protocol("weftd closed the connection without an answer".to_owned()));
            }
        };
        let reply: Reply<T> = serde_json::from_slice(&line.bytes).map_err(|error| unreadable(&line.bytes, &error))?;
        if reply.version != VERSION {
            return Err(ClientError::Protocol(format!(
                "it is of protocol version {}, this program speaks {VERSION}; install both of the same release",
                reply.version
            )));
        }
        self.connection = Some(connection);
        match (reply.ok, reply.error) {
            (_, Some(failure)) => Err(ClientError::Refused(failure)),
            (Some(value), None) => Ok(value),
            (None, None) => Err(ClientError::Protocol("it holds neither a result nor an error".to_owned())),
        }
    }

    fn failure(&self, error: LineError) -> ClientError {
        match error {
            LineError::TimedOut { .. } => ClientError::TimedOut { path: self.path.clone(), after: self.timeout },
            other => ClientError::Protocol(other.to_string()),
        }
    }
}

fn connect_once(path: &Path) -> Result<OwnedFd, Errno> {
    let address = SocketAddrUnix::new(path)?;
    // Non-blocking, because a connect to a full backlog otherwise waits without limit.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &address)?;
    Ok(socket)
}

fn unreadable(line: &[u8], error: &serde_json::Error) -> ClientError {
    let start = String::from_utf8_lossy(&line[..line.len().min(80)]);
    ClientError::Protocol(format!("{error}; it begins with {start:?}"))
}
