//! Lines over a unix socket, each with at most one descriptor: what both sides of the protocol share.
//!
//! A [`Connection`] is blocking and every operation takes a deadline, so that neither a silent nor a dribbling peer
//! can hold a thread for longer than its owner chose. It asks the kernel not to block (`MSG_DONTWAIT`) and polls,
//! so it works on any stream socket, whether `O_NONBLOCK` is set or not: an async daemon can hand the accepted
//! socket to a blocking thread as it is.
//!
//! What is accepted from the wire: UTF-8 is left to the JSON parser; a line ends with `\n` and is no longer than
//! the limit, which is checked while the bytes arrive, and memory grows only with bytes that came. A descriptor
//! must come with a read that begins where a line begins and that holds nothing of a later line, which a client
//! that waits for its answers fulfils (see unix(7): the kernel ends a read after data that carried descriptors).
//! Otherwise it could be taken for another line's. Descriptors are close-on-exec from the start, and those beyond
//! the first are closed.
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
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
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
    /// A descriptor was sent that this process could not take.
    untaken: bool,
}

/// A line that came, without its newline.
#[derive(Debug)]
pub struct Line {
    /// The line.
    pub bytes: Vec<u8>,
    /// The descriptor that came with it.
    pub descriptor: Option<OwnedFd>,
    /// Whether one came that could not be taken, because this process has as many files open as it may.
    pub untaken: bool,
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
    /// Whether the peer has closed its end, so that nobody waits for an answer.
    pub fn is_abandoned(&self) -> bool {
        let mut polled = [PollFd::new(&self.socket, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut polled, Some(&now)).is_ok() && polled[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }

    /// A connection over `socket` that accepts lines of up to `limit` bytes (at most [`MAX_LINE`]), the newline included.
    pub fn new(socket: UnixStream, limit: usize) -> Connection {
        Connection {
            socket,
            limit: limit.min(MAX_LINE),
            received: Vec::new(),
            scanned: 0,
            descriptor: None,
            untaken: false,
        }
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
        let untaken = std::mem::take(&mut self.untaken);
        Ok(Some(Line { bytes, descriptor: self.descriptor.take(), untaken }))
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
            // scm_detach_fds, https://github.com/torvalds/linux/blob/v6.12/net/core/scm.c#L362
            Ok(message) => self.untaken |= message.flags.contains(ReturnFlags::CTRUNC),
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
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let refuse = |code, msg| {
            let details = "install weftd, weft-cni and weft of the same release".to_owned();
            Failure { code, msg, details }
        };
        let unreadable = |error: serde_json::Error| {
            let code = if error.is_data() { code::REQUEST } else { code::DECODE };
            refuse(code, format!("the request cannot be read: {error}"))
        };
        // The version first: requests of another version may have another shape.
        let Versioned { version } = serde_json::from_slice(&self.bytes).map_err(unreadable)?;
        if version != VERSION {
            let msg = format!("the request is of protocol version {version}, weftd speaks {VERSION}");
            return Err(refuse(code::REQUEST, msg));
        }
        let envelope: Envelope = serde_json::from_slice(&self.bytes).map_err(unreadable)?;
        let wanted = envelope.request.has_descriptor();
        let needed = wanted && !matches!(envelope.request, Request::Del(_));
        if needed && self.untaken && self.descriptor.is_none() {
            let msg =
                "the descriptor of the network namespace could not be taken: weftd has as many files open as it may";
            return Err(
                Failure::new(code::TRY_AGAIN, msg).with_details("raise weftd's limit of open files (LimitNOFILE=)")
            );
        }
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

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;
    use std::thread;

    use super::*;
    use crate::{AttachmentKey, Check, Empty};

    fn pair(limit: usize) -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Connection::new(ours, limit), theirs)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    fn key() -> AttachmentKey {
        AttachmentKey { network: "pods".into(), container: "c1".into(), ifname: "eth0".into() }
    }

    #[test]
    fn lines_come_one_by_one_and_then_the_end() {
        let (mut connection, mut peer) = pair(MAX_LINE);
        peer.write_all(b"one\ntwo\n\nfour\n").unwrap();
        drop(peer);
        for expected in [&b"one"[..], b"two", b"", b"four"] {
            let line = connection.receive(soon()).unwrap().unwrap();
            assert_eq!(line.bytes, expected);
            assert!(line.descriptor.is_none());
        }
        assert!(connection.receive(soon()).unwrap().is_none());
    }

    #[test]
    fn a_descriptor_arrives_with_its_line_and_is_close_on_exec() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut sender, mut receiver) = (Connection::new(ours, MAX_LINE), Connection::new(theirs, MAX_LINE));
        let (read_end, write_end) = rustix::pipe::pipe().unwrap();
        let long = vec![b'x'; 3 * 1024 * 1024];
        let writer = thread::spawn(move || {
            sender.send(b"before", None, soon()).unwrap();
            sender.receive(soon()).unwrap().unwrap();
            sender.send(&long, Some(read_end.as_fd()), soon()).unwrap();
            sender.receive(soon()).unwrap().unwrap();
            sender.send(b"after", None, soon()).unwrap();
        });
        assert!(receiver.receive(soon()).unwrap().unwrap().descriptor.is_none());
        receiver.send(b"ok", None, soon()).unwrap();
        let line = receiver.receive(soon()).unwrap().unwrap();
        assert_eq!(line.bytes.len(), 3 * 1024 * 1024);
        let descriptor = line.descriptor.unwrap();
        assert!(rustix::io::fcntl_getfd(&descriptor).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        receiver.send(b"ok", None, soon()).unwrap();
        assert!(receiver.receive(soon()).unwrap().unwrap().descriptor.is_none());
        writer.join().unwrap();

        File::from(write_end).write_all(b"through the pipe").unwrap();
        let mut text = String::new();
        File::from(descriptor).read_to_string(&mut text).unwrap();
        assert_eq!(text, "through the pipe");
    }

    fn send_descriptors(socket: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        let sent = sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
        assert_eq!(sent, bytes.len());
    }

    /// How many of the pipes still have a reader: one without reports an error at its write end.
    fn open_readers(write_ends: &[OwnedFd]) -> usize {
        let closed = |end: &&OwnedFd| {
            let mut polled = [PollFd::new(*end, PollFlags::empty())];
            poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
            polled[0].revents().contains(PollFlags::ERR)
        };
        write_ends.len() - write_ends.iter().filter(closed).count()
    }

    fn send_pipes(socket: &UnixStream, bytes: &[u8], count: usize) -> Vec<OwnedFd> {
        let (read_ends, write_ends): (Vec<_>, Vec<_>) = (0..count).map(|_| rustix::pipe::pipe().unwrap()).unzip();
        let borrowed: Vec<_> = read_ends.iter().map(AsFd::as_fd).collect();
        send_descriptors(socket, bytes, &borrowed);
        write_ends
    }

    #[test]
    fn descriptors_beyond_the_first_are_closed() {
        for count in [2, DESCRIPTORS, DESCRIPTORS + 1, 16] {
            let (mut connection, peer) = pair(MAX_LINE);
            let write_ends = send_pipes(&peer, b"line\n", count);
            let line = connection.receive(soon()).unwrap().unwrap();
            assert!(line.descriptor.is_some(), "{count}");
            assert_eq!(open_readers(&write_ends), 1, "{count}");
            drop(line);
            assert_eq!(open_readers(&write_ends), 0, "{count}");
        }
    }

    #[test]
    fn a_descriptor_that_could_belong_to_another_line_is_refused_and_closed() {
        for (before, with) in [(&b""[..], &b"one\ntwo\n"[..]), (b"", b"one\ntw"), (b"whole\n", b"next\n")] {
            let (mut connection, mut peer) = pair(MAX_LINE);
            peer.write_all(before).unwrap();
            let write_ends = send_pipes(&peer, with, 1);
            let error = connection.receive(soon()).unwrap_err();
            assert!(matches!(error, LineError::Misplaced), "{error}");
            assert_eq!(open_readers(&write_ends), 0);
        }
    }

    #[test]
    fn a_descriptor_that_comes_after_the_start_of_its_line_is_refused_and_closed() {
        let (mut connection, mut peer) = pair(MAX_LINE);
        peer.write_all(b"half").unwrap();
        let error = connection.receive(Instant::now()).unwrap_err();
        assert!(matches!(error, LineError::TimedOut { began: true }), "{error}");
        let write_ends = send_pipes(&peer, b" line\n", 1);
        assert!(matches!(connection.receive(soon()).unwrap_err(), LineError::Misplaced));
        assert_eq!(open_readers(&write_ends), 0);
    }

    #[test]
    fn a_descriptor_that_the_request_has_no_use_for_is_closed() {
        let (mut connection, peer) = pair(MAX_LINE);
        let write_ends = send_pipes(&peer, b"{\"version\":1,\"op\":\"status\"}\n", 1);
        let incoming = connection.receive(soon()).unwrap().unwrap().request().unwrap();
        assert!(matches!(incoming.request, Request::Status));
        assert!(incoming.descriptor.is_none());
        assert_eq!(open_readers(&write_ends), 0);
    }

    #[test]
    fn a_line_may_be_as_long_as_the_limit_and_no_longer() {
        let (mut connection, mut peer) = pair(8);
        peer.write_all(b"1234567\n12345678\n").unwrap();
        assert_eq!(connection.receive(soon()).unwrap().unwrap().bytes, b"1234567");
        assert!(matches!(connection.receive(soon()).unwrap_err(), LineError::TooLong(8)));
    }

    #[test]
    fn an_endless_line_is_refused_at_the_limit_without_a_newline() {
        let (mut connection, mut peer) = pair(100_000);
        let writer = thread::spawn(move || while peer.write_all(&[b'x'; 4096]).is_ok() {});
        assert!(matches!(connection.receive(soon()).unwrap_err(), LineError::TooLong(100_000)));
        assert!(connection.received.len() <= 100_000 + CHUNK);
        drop(connection);
        writer.join().unwrap();
    }

    #[test]
    fn half_a_line_and_then_the_end_is_an_error() {
        let (mut connection, mut peer) = pair(MAX_LINE);
        peer.write_all(b"{\"version\":1,").unwrap();
        drop(peer);
        assert!(matches!(connection.receive(soon()).unwrap_err(), LineError::Cut));
    }

    #[test]
    fn a_peer_that_says_nothing_or_dribbles_meets_the_deadline() {
        let (mut connection, mut peer) = pair(MAX_LINE);
        let start = Instant::now();
        let error = connection.receive(start + Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, LineError::TimedOut { began: false }), "{error}");
        assert!(start.elapsed() >= Duration::from_millis(50));

        let writer = thread::spawn(move || {
            while peer.write_all(b"x").is_ok() {
                thread::sleep(Duration::from_millis(5));
            }
        });
        let start = Instant::now();
        let error = connection.receive(start + Duration::from_millis(100)).unwrap_err();
        assert!(matches!(error, LineError::TimedOut { began: true }), "{error}");
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        drop(connection);
        writer.join().unwrap();
    }

    #[test]
    fn a_peer_that_does_not_read_meets_the_deadline() {
        let (mut connection, peer) = pair(MAX_LINE);
        let error = connection.send(&vec![b'x'; MAX_LINE / 2], None, Instant::now() + Duration::from_millis(50));
        assert!(matches!(error.unwrap_err(), LineError::TimedOut { began: true }));
        drop(peer);
    }

    #[test]
    fn a_peer_that_went_away_is_an_error_and_not_a_signal() {
        let (mut connection, peer) = pair(MAX_LINE);
        drop(peer);
        assert!(matches!(connection.send(b"line", None, soon()).unwrap_err(), LineError::Io(_)));
    }

    #[test]
    fn a_nonblocking_socket_serves_as_well() {
        let (mut connection, mut peer) = pair(MAX_LINE);
        connection.socket().set_nonblocking(true).unwrap();
        let writer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            peer.write_all(b"late\n").unwrap();
            peer
        });
        assert_eq!(connection.receive(soon()).unwrap().unwrap().bytes, b"late");
        writer.join().unwrap();
    }

    #[test]
    fn garbage_is_answered_with_a_code_and_the_connection_goes_on() {
        let deep = format!("{{\"version\":1,\"op\":\"add\",\"x\":{}", "[".repeat(100_000));
        let cases = [
            ("", code::DECODE),
            ("\0\0", code::DECODE),
            ("{\"version\":1,", code::DECODE),
            (&deep, code::DECODE),
            ("[]", code::REQUEST),
            ("{\"op\":\"status\"}", code::REQUEST),
            ("{\"version\":2,\"op\":\"status\"}", code::REQUEST),
            ("{\"version\":1,\"op\":\"explode\"}", code::REQUEST),
            ("{\"version\":1,\"op\":\"add\",\"network\":7}", code::REQUEST),
        ];
        let (mut connection, mut peer) = pair(MAX_LINE);
        for (text, expected) in cases {
            peer.write_all(text.as_bytes()).unwrap();
            peer.write_all(b"\n").unwrap();
            let failure = connection.receive(soon()).unwrap().unwrap().request().unwrap_err();
            assert_eq!(failure.code, expected, "{failure:?}");
            assert!(failure.msg.len() < 500, "{failure:?}");
        }
        peer.write_all(b"{\"version\":1,\"op\":\"status\",\"later\":[1]}\n").unwrap();
        assert!(connection.receive(soon()).unwrap().unwrap().request().is_ok());
    }

    #[test]
    fn requests_and_answers_look_on_the_wire_as_documented() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut connection = Connection::new(ours, MAX_LINE);
        connection.ask(&Request::Del(key()), None, soon()).unwrap();
        connection.answer(&Answer::Ok(Empty {}), soon()).unwrap();
        let failure = Failure { code: 100, msg: "full".into(), details: String::new() };
        connection.answer(&Answer::<Empty>::Error(failure), soon()).unwrap();
        drop(connection);
        let mut text = String::new();
        theirs.read_to_string(&mut text).unwrap();
        let expected = concat!(
            r#"{"version":1,"op":"del","network":"pods","container":"c1","ifname":"eth0"}"#,
            "\n",
            r#"{"version":1,"ok":{}}"#,
            "\n",
            r#"{"version":1,"error":{"code":100,"msg":"full"}}"#,
            "\n",
        );
        assert_eq!(text, expected);
    }

    #[test]
    fn a_request_with_its_descriptor_makes_the_round_trip() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut client, mut server) = (Connection::new(ours, MAX_LINE), Connection::new(theirs, MAX_REQUEST));
        let file = File::open("/proc/self/ns/net").unwrap();
        let sent = Request::Check(Check { key: key(), expected: None });
        client.ask(&sent, Some(file.as_fd()), soon()).unwrap();
        let incoming = server.receive(soon()).unwrap().unwrap().request().unwrap();
        assert!(matches!(incoming.request, Request::Check(check) if check.key == key()));
        let received = incoming.descriptor.unwrap();
        assert_ne!(received.as_raw_fd(), file.as_raw_fd());
        let (a, b) = (rustix::fs::fstat(&received).unwrap(), rustix::fs::fstat(&file).unwrap());
        assert_eq!((a.st_dev, a.st_ino), (b.st_dev, b.st_ino));
    }
}
