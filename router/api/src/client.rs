//! The blocking client: one connection to weftd, one request at a time.
//!
//! Each call has the whole timeout for itself, from the first byte written to the last byte read. A weftd that
//! accepts but never answers therefore costs the caller exactly that long. After any error but
//! [`ClientError::Refused`] the place in the stream is lost, and the client refuses further calls: connect again.

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
    /// Nobody listens at the socket, or not to this user.
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
                let advice = match source.kind() {
                    std::io::ErrorKind::PermissionDenied => "run this as root",
                    _ => "is weftd running?",
                };
                write!(f, "cannot reach weftd at {}: {source}; {advice}", path.display())
            }
            Self::TimedOut { path, after } => {
                write!(f, "weftd at {} did not answer within {after:?}", path.display())
            }
            Self::Protocol(what) => write!(f, "weftd's answer cannot be used: {what}"),
            Self::Refused(failure) => failure.fmt(f),
        }
    }
}

// Without `source`: the text has the cause in it, and whoever prints a chain of errors would print it twice.
impl std::error::Error for ClientError {}

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
        match connection.ask(request, fd, deadline) {
            // A daemon that refuses the request unread (too long, wrong user) answers and closes: what it said counts
            // for more than that it stopped listening.
            Ok(()) | Err(LineError::Io(_)) => {}
            Err(error) => return Err(self.failure(error)),
        }
        let silent = || ClientError::Protocol("weftd closed the connection without an answer".to_owned());
        let line = connection.receive(deadline).map_err(|error| self.failure(error))?.ok_or_else(silent)?;
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::thread::{self, JoinHandle};

    use super::*;
    use crate::{Answer, Empty, code};

    /// A daemon's socket in a folder of its own, which goes away with it.
    struct Socket {
        folder: PathBuf,
        path: PathBuf,
    }

    impl Socket {
        fn new(name: &str) -> Socket {
            let folder = std::env::temp_dir().join(format!("weft-t{}-{name}", std::process::id()));
            std::fs::create_dir(&folder).unwrap();
            let path = folder.join("socket");
            Socket { folder, path }
        }

        fn serve(&self, serve: impl FnOnce(UnixStream) + Send + 'static) -> JoinHandle<()> {
            let listener = UnixListener::bind(&self.path).unwrap();
            thread::spawn(move || serve(listener.accept().unwrap().0))
        }
    }

    impl Drop for Socket {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }

    const SECOND: Duration = Duration::from_secs(1);

    fn soon() -> Instant {
        Instant::now() + 10 * SECOND
    }

    #[test]
    fn several_calls_use_one_connection_and_a_refusal_does_not_end_it() {
        let socket = Socket::new("calls");
        let server = socket.serve(|stream| {
            let mut connection = Connection::new(stream, MAX_LINE);
            for number in 0..3 {
                let incoming = connection.receive(soon()).unwrap().unwrap().request().unwrap();
                assert!(matches!(incoming.request, Request::Ready));
                let failure = Failure { code: code::NOT_AVAILABLE, msg: "not yet".into(), details: "wait".into() };
                let answer = if number == 1 { Answer::Error(failure) } else { Answer::Ok(Empty {}) };
                connection.answer(&answer, soon()).unwrap();
            }
            assert!(connection.receive(soon()).unwrap().is_none());
        });
        let mut client = Client::connect(&socket.path, 5 * SECOND).unwrap();
        client.call::<Empty>(&Request::Ready).unwrap();
        let error = client.call::<Empty>(&Request::Ready).unwrap_err();
        assert!(matches!(&error, ClientError::Refused(failure) if failure.code == code::NOT_AVAILABLE));
        assert_eq!(error.to_string(), "not yet (wait)");
        client.call::<Empty>(&Request::Ready).unwrap();
        drop(client);
        server.join().unwrap();
    }

    #[test]
    fn an_absent_daemon_is_named_with_its_socket() {
        let socket = Socket::new("absent");
        let missing = Client::connect(&socket.path, SECOND).unwrap_err();
        assert!(matches!(missing, ClientError::Unreachable { .. }));
        let text = missing.to_string();
        assert!(
            text.contains("is weftd running?") && text.contains("weft-t") && text.contains("No such file"),
            "{text}"
        );

        drop(UnixListener::bind(&socket.path).unwrap());
        let stale = Client::connect(&socket.path, SECOND).unwrap_err();
        assert!(stale.to_string().contains("refused"), "{stale}");

        assert!(std::error::Error::source(&stale).is_none(), "its cause would be printed twice");

        let long = Client::connect(Path::new(&"x".repeat(200)), SECOND).unwrap_err();
        assert!(matches!(long, ClientError::Unreachable { .. }), "{long}");
    }

    #[test]
    fn whoever_may_not_reach_the_socket_is_told_to_be_root() {
        let source = std::io::Error::from(Errno::ACCESS);
        let text = ClientError::Unreachable { path: "/run/weft/weftd.sock".into(), source }.to_string();
        assert!(text.contains("ermission denied") && text.ends_with("; run this as root"), "{text}");
    }

    #[test]
    fn a_full_backlog_costs_the_timeout_and_no_more() {
        let socket = Socket::new("backlog");
        let _listener = UnixListener::bind(&socket.path).unwrap();
        rustix::net::listen(&_listener, 0).unwrap();
        let _first = Client::connect(&socket.path, SECOND).unwrap();
        let start = Instant::now();
        let error = Client::connect(&socket.path, Duration::from_millis(100)).unwrap_err();
        assert!(matches!(error, ClientError::TimedOut { .. }), "{error}");
        assert!(start.elapsed() < 5 * SECOND);
    }

    #[test]
    fn a_daemon_that_does_not_answer_costs_the_timeout_and_the_connection() {
        let socket = Socket::new("silent");
        let server = socket.serve(|mut stream| {
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            assert!(all.ends_with(b"\n"));
        });
        let mut client = Client::connect(&socket.path, Duration::from_millis(50)).unwrap();
        let error = client.call::<Empty>(&Request::Ready).unwrap_err();
        assert!(matches!(error, ClientError::TimedOut { .. }), "{error}");
        let error = client.call::<Empty>(&Request::Ready).unwrap_err();
        assert!(error.to_string().contains("earlier call"), "{error}");
        server.join().unwrap();
    }

    #[test]
    fn what_is_no_answer_is_a_protocol_error() {
        let cases = [
            ("", "without an answer"),
            ("{\"version\":1,\"ok\"", "middle of a line"),
            ("HTTP/1.1 400 Bad Request\n", "HTTP/1.1"),
            ("{\"version\":1}\n", "neither"),
            ("{\"version\":1,\"ok\":7}\n", "invalid type"),
            ("{\"version\":9,\"ok\":{}}\n", "version 9"),
        ];
        for (number, (text, expected)) in cases.into_iter().enumerate() {
            let socket = Socket::new(&format!("garbage{number}"));
            let server = socket.serve(move |mut stream| {
                let mut request = [0; 4096];
                assert!(stream.read(&mut request).unwrap() > 0);
                stream.write_all(text.as_bytes()).unwrap();
            });
            let mut client = Client::connect(&socket.path, 5 * SECOND).unwrap();
            let error = client.call::<Empty>(&Request::Ready).unwrap_err();
            assert!(matches!(error, ClientError::Protocol(_)), "{error}");
            assert!(error.to_string().contains(expected), "{error}");
            server.join().unwrap();
        }
    }

    #[test]
    fn a_refusal_of_an_unread_request_is_told() {
        let socket = Socket::new("unread");
        let server = socket.serve(|stream| {
            let mut connection = Connection::new(stream, MAX_LINE);
            let failure = Failure { code: code::REQUEST, msg: "too long".into(), details: String::new() };
            connection.answer(&Answer::<Empty>::Error(failure), soon()).unwrap();
        });
        let mut client = Client::connect(&socket.path, 5 * SECOND).unwrap();
        let valid = (0..100_000).map(|n| (format!("container-{n}"), "eth0".to_owned())).collect();
        let request = Request::Gc(crate::Gc { network: "pods".into(), valid });
        let error = client.call::<Empty>(&request).unwrap_err();
        assert!(matches!(error, ClientError::Refused(failure) if failure.msg == "too long"));
        server.join().unwrap();
    }
}
