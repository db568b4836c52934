//! Bulk TCP between two pods: for its rate, and for its content.
//!
//! A transfer is one stream from a sending peer to a receiving peer, measured by the receiver from its first byte to
//! its last. For the rate the sender repeats one block until its time is up. For the content it sends
//! pseudo-random bytes, and both sides hash what they sent or received with SHA-256; hashing costs more than
//! forwarding, so the two are never mixed. Congestion control is cubic on both sides, whatever the machine prefers,
//! since others behave differently on the two paths that are compared.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use socket2::{Domain, Protocol, Socket, Type};

use super::peer::Peer;

/// Bytes in one write and at most in one read.
const BLOCK: usize = 256 * 1024;
/// How much longer than the sender the receiver waits.
const MARGIN: Duration = Duration::from_secs(2);
/// Where the pseudo-random stream starts.
const SEED: u64 = 0x5765_6674_2064_656d;

/// What the receiving peer is told.
#[derive(Debug, Args)]
pub struct Receive {
    /// The address to listen at; the kernel chooses the port.
    #[arg(long)]
    listen: IpAddr,
    /// Hash what comes.
    #[arg(long)]
    hash: bool,
    /// Give up after this many seconds.
    #[arg(long)]
    within: f64,
}

/// What the sending peer is told.
#[derive(Debug, Args)]
pub struct Send {
    /// Where to.
    #[arg(long)]
    to: SocketAddr,
    /// Send pseudo-random bytes, this many, and hash them.
    #[arg(long, conflicts_with = "seconds")]
    bytes: Option<u64>,
    /// Send for so long.
    #[arg(long)]
    seconds: Option<f64>,
    /// Give up after this many seconds.
    #[arg(long)]
    within: f64,
}

/// Who sends to whom.
#[derive(Debug, Clone, Copy)]
pub struct Way<'a> {
    /// The sender's namespace.
    pub from: &'a str,
    /// The receiver's namespace.
    pub to: &'a str,
    /// The receiver's address.
    pub address: IpAddr,
}

/// What a side counted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tally {
    /// Bytes sent or received.
    pub bytes: u64,
    /// From the first to the last.
    pub seconds: f64,
    /// Their SHA-256 in hexadecimal digits, if it was asked for.
    pub sha256: Option<String>,
}

/// A transfer that was checked.
#[derive(Debug)]
pub struct Checked {
    /// What was sent.
    pub sent: Tally,
    /// What was received.
    pub received: Tally,
}

#[derive(Serialize, Deserialize)]
struct Listening {
    listening: SocketAddr,
}

impl Tally {
    /// Gigabits per second.
    pub fn gbps(&self) -> f64 {
        if self.seconds > 0.0 { self.bytes as f64 * 8.0 / self.seconds / 1e9 } else { 0.0 }
    }
}

impl Checked {
    /// Whether what was received is what was sent.
    pub fn is_right(&self) -> bool {
        self.received.bytes == self.sent.bytes
            && self.received.sha256.is_some()
            && self.received.sha256 == self.sent.sha256
    }
}

/// Measures the rate of one stream for `length`; in Gb/s.
pub fn rate(way: Way, length: Duration) -> Result<f64> {
    let within = length * 2 + MARGIN;
    let outcome = run(way, &["--seconds".to_owned(), length.as_secs_f64().to_string()], false, within)?;
    if outcome.received.bytes != outcome.sent.bytes {
        bail!("{} bytes were sent, {} came", outcome.sent.bytes, outcome.received.bytes);
    }
    Ok(outcome.received.gbps())
}

/// Sends `bytes` bytes and hashes them on both sides.
pub fn checked(way: Way, bytes: u64, within: Duration) -> Result<Checked> {
    run(way, &["--bytes".to_owned(), bytes.to_string()], true, within)
}

fn run(way: Way, what: &[String], hash: bool, within: Duration) -> Result<Checked> {
    let describe = || format!("the transfer from {} to {} ({}) failed", way.from, way.to, way.address);
    let deadline = Instant::now() + within + MARGIN;
    let seconds = |duration: Duration| ["--within".to_owned(), duration.as_secs_f64().to_string()];
    let mut receive = vec!["receive".to_owned(), "--listen".to_owned(), way.address.to_string()];
    receive.extend(seconds(within + MARGIN));
    receive.extend(hash.then(|| "--hash".to_owned()));
    let mut receiver = Peer::start(way.to, &receive, b"")?;
    let Listening { listening } = receiver.hear(deadline).with_context(describe)?;
    let mut send = vec!["send".to_owned(), "--to".to_owned(), listening.to_string()];
    send.extend(seconds(within));
    send.extend_from_slice(what);
    let mut sender = Peer::start(way.from, &send, b"")?;
    let sent = sender.hear(deadline).with_context(describe)?;
    let received = receiver.hear(deadline).with_context(describe)?;
    Ok(Checked { sent, received })
}

/// The receiving peer.
pub fn receive(args: &Receive) -> Result<()> {
    let deadline = Instant::now() + limit(args.within);
    let listener = socket(args.listen)?;
    let address = SocketAddr::new(args.listen, 0);
    listener.bind(&address.into()).with_context(|| format!("cannot listen at {}", args.listen))?;
    listener.listen(1)?;
    let listening = listener.local_addr()?.as_socket().context("the listener has no address")?;
    say(&Listening { listening })?;
    // On Linux a listener's read timeout bounds accept.
    listener.set_read_timeout(Some(limit(args.within)))?;
    let (stream, _) = listener.accept().context("nobody connected")?;
    say(&absorb(stream.into(), args.hash, deadline)?)
}

fn absorb(mut stream: TcpStream, hash: bool, deadline: Instant) -> Result<Tally> {
    let mut buffer = vec![0; BLOCK];
    let mut hasher = hash.then(Sha256::new);
    let mut bytes = 0;
    let mut first: Option<Instant> = None;
    loop {
        let left = remaining(deadline).with_context(|| format!("it was too slow: {bytes} bytes came in time"))?;
        stream.set_read_timeout(Some(left))?;
        let count = match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => continue,
            Err(error) => return Err(error).with_context(|| format!("the stream broke after {bytes} bytes")),
        };
        first.get_or_insert_with(Instant::now);
        bytes += count as u64;
        if let Some(hasher) = &mut hasher {
            hasher.update(&buffer[..count]);
        }
    }
    let seconds = first.map_or(0.0, |first| first.elapsed().as_secs_f64());
    Ok(Tally { bytes, seconds, sha256: hasher.map(digest) })
}

/// The sending peer.
pub fn send(args: &Send) -> Result<()> {
    let deadline = Instant::now() + limit(args.within);
    let socket = socket(args.to.ip())?;
    socket
        .connect_timeout(&args.to.into(), limit(args.within))
        .with_context(|| format!("cannot connect to {}", args.to))?;
    let stream = TcpStream::from(socket);
    let tally = match args.bytes {
        Some(bytes) => send_bytes(stream, bytes, deadline),
        None => send_for(stream, limit(args.seconds.unwrap_or(1.0)), deadline),
    }?;
    say(&tally)
}

fn send_for(mut stream: TcpStream, length: Duration, deadline: Instant) -> Result<Tally> {
    let mut block = vec![0; BLOCK];
    Stream::new(SEED).fill(&mut block);
    let started = Instant::now();
    let mut bytes = 0;
    while started.elapsed() < length {
        send_block(&mut stream, &block, deadline, bytes)?;
        bytes += BLOCK as u64;
    }
    finish(&stream)?;
    Ok(Tally { bytes, seconds: started.elapsed().as_secs_f64(), sha256: None })
}

fn send_bytes(mut stream: TcpStream, bytes: u64, deadline: Instant) -> Result<Tally> {
    let mut block = vec![0; BLOCK];
    let mut source = Stream::new(SEED);
    let mut hasher = Sha256::new();
    let started = Instant::now();
    let mut done = 0;
    while done < bytes {
        let length = usize::try_from(bytes - done).map_or(BLOCK, |left| left.min(BLOCK));
        source.fill(&mut block[..length]);
        hasher.update(&block[..length]);
        send_block(&mut stream, &block[..length], deadline, done)?;
        done += length as u64;
    }
    finish(&stream)?;
    Ok(Tally { bytes, seconds: started.elapsed().as_secs_f64(), sha256: Some(digest(hasher)) })
}

fn send_block(stream: &mut TcpStream, block: &[u8], deadline: Instant, done: u64) -> Result<()> {
    let late = || format!("it was too slow: {done} bytes were sent in time");
    stream.set_write_timeout(Some(remaining(deadline).with_context(late)?))?;
    stream.write_all(block).with_context(|| format!("the stream broke after {done} bytes"))
}

fn finish(stream: &TcpStream) -> Result<()> {
    stream.shutdown(std::net::Shutdown::Write).context("cannot end the stream")
}

fn socket(address: IpAddr) -> Result<Socket> {
    let domain = if address.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP)).context("cannot open a TCP socket")?;
    socket.set_tcp_congestion(b"cubic").context("cannot set TCP congestion control to cubic")?;
    Ok(socket)
}

fn say(what: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    let mut out = std::io::stdout().lock();
    out.write_all(&line)?;
    Ok(out.flush()?)
}

fn limit(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds.clamp(0.01, 3600.0))
}

fn remaining(deadline: Instant) -> Option<Duration> {
    Some(deadline.saturating_duration_since(Instant::now())).filter(|left| !left.is_zero())
}

fn digest(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Pseudo-random bytes: SplitMix64, eight at a time.
struct Stream {
    state: u64,
}

impl Stream {
    fn new(seed: u64) -> Stream {
        Stream { state: seed }
    }

    fn fill(&mut self, block: &mut [u8]) {
        for chunk in block.chunks_mut(8) {
            let word = self.next().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (sender, listener.accept().unwrap().0)
    }

    #[test]
    fn both_sides_agree_on_bytes_and_hash() {
        let (sender, receiver) = pair();
        let bytes = 3 * BLOCK as u64 + 17;
        let receiver = thread::spawn(move || absorb(receiver, true, Instant::now() + LONG).unwrap());
        let sent = send_bytes(sender, bytes, Instant::now() + LONG).unwrap();
        let outcome = Checked { sent, received: receiver.join().unwrap() };
        assert_eq!(outcome.received.bytes, bytes);
        assert!(outcome.is_right(), "{outcome:?}");
    }

    #[test]
    fn a_changed_byte_or_a_missing_hash_is_not_right() {
        let tally = |hash: Option<&str>, bytes| Tally { bytes, seconds: 1.0, sha256: hash.map(str::to_owned) };
        let checked = |a, b| Checked { sent: a, received: b }.is_right();
        assert!(checked(tally(Some("a"), 5), tally(Some("a"), 5)));
        assert!(!checked(tally(Some("a"), 5), tally(Some("b"), 5)));
        assert!(!checked(tally(Some("a"), 5), tally(Some("a"), 4)));
        assert!(!checked(tally(None, 5), tally(None, 5)));
    }

    #[test]
    fn a_stream_that_stands_still_ends_at_the_deadline() {
        let (_sender, receiver) = pair();
        let error = absorb(receiver, false, Instant::now() + Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("too slow"), "{error:#}");
        let (sender, _receiver) = pair();
        let error = send_bytes(sender, 1 << 40, Instant::now() + Duration::from_millis(200)).unwrap_err();
        assert!(format!("{error:#}").contains("bytes"), "{error:#}");
    }

    #[test]
    fn the_pseudo_random_stream_is_the_published_one() {
        // SplitMix64 from seed 1234567: the reference values of its author's test.
        let mut stream = Stream::new(1_234_567);
        assert_eq!([stream.next(), stream.next()], [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]);
    }

    #[test]
    fn the_stream_does_not_depend_on_the_size_of_blocks_of_words() {
        let (mut whole, mut parts) = ([0; 64], [0; 64]);
        Stream::new(1).fill(&mut whole);
        let mut stream = Stream::new(1);
        parts.chunks_mut(16).for_each(|part| stream.fill(part));
        assert_eq!(whole, parts);
    }

    #[test]
    fn rates_are_in_gigabits() {
        let tally = Tally { bytes: 125_000_000, seconds: 1.0, sha256: None };
        assert!((tally.gbps() - 1.0).abs() < 1e-9);
    }
}
