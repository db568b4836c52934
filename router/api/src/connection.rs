//! Lines over a unix socket, each with at most one descriptor: what both sides of the protocol share.
//!
//! A [`Connection`] is blocking and every operation takes a deadline, so that neither a silent nor a
//! dribbling peer can hold a thread for longer than its owner chose. It asks the kernel not to block
//! (`MSG_DONTWAIT`) and polls, so it works on any stream socket, whether `O_NONBLOCK` is set or not: an async
//! daemon can hand the accepted socket to a blocking thread as it is.
//!
//! What is accepted from the wire: UTF-8 is left to the JSON parser; a line ends with `\n` and is no longer
//! than the limit, which is checked while the bytes arrive, and memory grows only with bytes that came.
//! A descriptor must come with a read that begins where a line begins and that holds nothing of a later line,
//! which a client that waits for its answers fulfils (see unix(7): the kernel ends a read after data that carried
//! descriptors). Otherwise it could be taken for another line's. Descriptors are close-on-exec from the start, and those
//! beyond the first are closed.
//!
//! After an error the place in the stream is lost: drop the connection.

use std::fmt;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

use crate::{Answer, Envelope, Failure, MAX_LINE, Request, VERSION, code};

/// The longest request a daemon should accept, in bytes: a GC that lists some ten thousand attachments.
pub const MAX_REQUEST: usize = 4 * 1024 * 1024;

/// Bytes asked for in one read.
const CHUNK: usize = 64 * 1024;

/// Descriptors received in one read before the kernel closes the rest by itself.
const DESCRIPTORS: usize = 4;

/// A stream of lines in both directions.
#[derive(Debug)]
pub struct Connection {
    socket: UnixStream,
    limit: usize,
    /// Bytes of the current line, and of later ones if the peer sent them early.
    received: Vec<u8>,
    /// How much of `received` is known to hold no newline.
    scanned: usize,
    descriptor: Option<OwnedFd>,
}

/// A line that came, without its newline.
#[derive(Debug)]
pub struct Line {
    /// The line.
    pub bytes: Vec<u8>,
    /// The descriptor that came with it.
    pub descriptor: Option<OwnedFd>,
}

/// A request that came.
#[derive(Debug)]
pub struct Incoming {
    /// What is asked.
    pub request: Request,
    /// The namespace, for requests that carry one; `None` if the client sent none.
    pub descriptor: Option<OwnedFd>,
}

/// Why a line could not be received or sent.
#[derive(Debug)]
pub enum LineError {
    /// The deadline passed. With `began`, in the middle of a line.
    TimedOut {
        /// Whether a part of the line had been transferred.
        began: bool,
    },
    /// The peer closed the connection in the middle of a line.
    Cut,
    /// The line is longer than the limit, which is given in bytes.
    TooLong(usize),
    /// A descriptor came where it cannot be told which line it belongs to.
    Misplaced,
    /// The socket failed.
    Io(std::io::Error),
}

impl fmt::Display for LineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TimedOut { began: false } => f.write_str("nothing came before the deadline"),
            Self::TimedOut { began: true } => f.write_str("the deadline passed in the middle of a line"),
            Self::Cut => f.write_str("the peer closed the connection in the middle of a line"),
            Self::TooLong(limit) => write!(f, "the line is longer than the limit of {limit} bytes"),
            Self::Misplaced => f.write_str("a descriptor came in the middle of a line or with two lines at once"),
            Self::Io(error) => write!(f, "the socket failed: {error}"),
        }
    }
}

impl std::error::Error for LineError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io(error) => Some(error),
            _ => None,
        }
    }
}

impl From<Errno> for LineError {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

impl Connection {
    /// A connection over `socket` that accepts lines of up to `limit` bytes (at most [`MAX_LINE`]), the newline included.
    pub fn new(socket: UnixStream, limit: usize) -> Connection {
        Connection { socket, limit: limit.min(MAX_LINE), received: Vec::new(), scanned: 0, descriptor: None }
    }

    /// The socket, to ask for the peer's credentials or to shut it down from another thread.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Receives one line; `None` when the peer closed the connection between two lines.
    pub fn receive(&mut self, deadline: Instant) -> Result<Option<Line>, LineError> {
        loop {
            if let Some(line) = self.take_line()? {
                return Ok(Some(line));
            }
            if !self.wait(PollFlags::IN, deadline)? {
                return Err(LineError::TimedOut { began: !self.received.is_empty() });
            }
            match self.read()? {
                Some(0) if self.received.is_empty() => return Ok(None),
                Some(0) => return Err(LineError::Cut),
                Some(_) | None => {}
            }
        }
    }

    /// Sends one answer.
    pub fn answer<T: Serialize>(&mut self, answer: &Answer<T>, deadline: Instant) -> Result<(), LineError> {
        self.send(&Reply::encode(answer)?, None, deadline)
    }

    /// Sends one request.
    pub fn ask(
        &mut self,
        request: &Request,
        descriptor: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<(), LineError> {
        #[derive(Serialize)]
        struct Outgoing<'a> {
            version: u32,
            #[serde(flatten)]
            request: &'a Request,
        }
        let line = serde_json::to_vec(&Outgoing { version: VERSION, request });
        self.send(&line.map_err(|error| LineError::Io(error.into()))?, descriptor, deadline)
    }

    /// Sends `line`, which must not contain a newline, with `descriptor` beside its first byte.
    pub fn send(
        &mut self,
        line: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<(), LineError> {
        debug_assert!(!line.contains(&b'\n'), "JSON as serde_json writes it is one line");
        if line.len() >= MAX_LINE {
            return Err(LineError::TooLong(MAX_LINE));
        }
        let mut sent = 0;
        while sent <= line.len() {
            let parts = [IoSlice::new(&line[sent..]), IoSlice::new(b"\n")];
            match send_parts(self.socket.as_fd(), &parts, descriptor.filter(|_| sent == 0)) {
                Ok(count) => sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !self.wait(PollFlags::OUT, deadline)? {
                        return Err(LineError::TimedOut { began: sent > 0 });
                    }
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Takes a whole line out of what was received.
    fn take_line(&mut self) -> Result<Option<Line>, LineError> {
        let end = self.received[self.scanned..].iter().position(|&byte| byte == b'\n').map(|at| self.scanned + at);
        self.scanned = self.received.len();
        let Some(end) = end else {
            return if self.received.len() >= self.limit { Err(LineError::TooLong(self.limit)) } else { Ok(None) };
        };
        if end >= self.limit {
            return Err(LineError::TooLong(self.limit));
        }
        let later = self.received.split_off(end + 1);
        let mut bytes = std::mem::replace(&mut self.received, later);
        bytes.truncate(end);
        self.scanned = 0;
        Ok(Some(Line { bytes, descriptor: self.descriptor.take() }))
    }

    /// Waits until the socket is ready (`true`) or the deadline has passed (`false`).
    fn wait(&self, events: PollFlags, deadline: Instant) -> Result<bool, LineError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut polled = [PollFd::new(&self.socket, events)];
            match poll(&mut polled, Some(&timespec(left))) {
                Ok(0) if left.is_zero() => return Ok(false),
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(true),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Reads once: the number of bytes, 0 at the end of the stream, `None` if there was nothing after all.
    fn read(&mut self) -> Result<Option<usize>, LineError> {
        let start = self.received.len();
        self.received.resize(start + CHUNK, 0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let result = recvmsg(&self.socket, &mut [IoSliceMut::new(&mut self.received[start..])], &mut control, flags);
        let count = result.as_ref().map_or(0, |message| message.bytes);
        self.received.truncate(start + count);
        match result {
            Ok(_) => {}
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(Errno::CONNRESET) => return Ok(Some(0)),
            Err(errno) => return Err(errno.into()),
        }
        if let Some(descriptor) = first_descriptor(&mut control) {
            let newline = self.received.iter().position(|&byte| byte == b'\n');
            if start != 0 || newline.is_some_and(|at| at + 1 != self.received.len()) {
                return Err(LineError::Misplaced);
            }
            self.descriptor = Some(descriptor);
        }
        Ok(Some(count))
    }
}

impl Line {
    /// Reads the line as a request. A descriptor that the request has no use for is closed.
    ///
    /// The failure is what to answer; the connection can go on.
    pub fn request(self) -> Result<Incoming, Failure> {
        let envelope: Envelope = serde_json::from_slice(&self.bytes).map_err(|error| Failure {
            code: if error.is_data() { code::REQUEST } else { code::DECODE },
            msg: format!("the request cannot be read: {error}"),
            details: "install weftd, weft-cni and weft of the same release".to_owned(),
        })?;
        if envelope.version != VERSION {
            return Err(Failure {
                code: code::REQUEST,
                msg: format!("the request is of protocol version {}, weftd speaks {VERSION}", envelope.version),
                details: "install weftd, weft-cni and weft of the same release".to_owned(),
            });
        }
        let wanted = matches!(envelope.request, Request::Add(_) | Request::Check(_) | Request::Del(_));
        Ok(Incoming { request: envelope.request, descriptor: self.descriptor.filter(|_| wanted) })
    }
}

/// An answer as it stands on the wire: `{"version":1,"ok":…}` or `{"version":1,"error":{…}}`.
#[derive(Serialize, Deserialize)]
pub(crate) struct Reply<T> {
    pub(crate) version: u32,
    #[serde(default = "Option::default", skip_serializing_if = "Option::is_none")]
    pub(crate) ok: Option<T>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<Failure>,
}

impl<T: Serialize> Reply<T> {
    /// The answer's line, without newline.
    fn encode(answer: &Answer<T>) -> Result<Vec<u8>, LineError> {
        let reply = match answer {
            Answer::Ok(value) => Reply { version: VERSION, ok: Some(value), error: None },
            Answer::Error(failure) => Reply { version: VERSION, ok: None, error: Some(failure.clone()) },
        };
        serde_json::to_vec(&reply).map_err(|error| LineError::Io(error.into()))
    }
}

fn send_parts(
    socket: BorrowedFd<'_>,
    parts: &[IoSlice<'_>],
    descriptor: Option<BorrowedFd<'_>>,
) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.as_slice();
    if !descriptors.is_empty() {
        let fits = control.push(SendAncillaryMessage::ScmRights(descriptors));
        debug_assert!(fits, "the space is measured for one descriptor");
    }
    sendmsg(socket, parts, &mut control, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
}

/// The first descriptor of what came; the others are closed here.
fn first_descriptor(control: &mut RecvAncillaryBuffer<'_>) -> Option<OwnedFd> {
    let rights = |message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    };
    let mut all: Vec<OwnedFd> = control.drain().filter_map(rights).flatten().collect();
    (!all.is_empty()).then(|| all.swap_remove(0))
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}
