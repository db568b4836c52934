//! What the benchmark runs inside pods: `weft bench-peer …`.
//!
//! Two pairs of programs, each a server that says where it listens and a client that says what it measured, as a line
//! of JSON. They block in their system calls as ordinary programs do, and are not tied to processors: on which ones
//! the two ends ran decides much of a round trip, so the answer carries the server's. All end by themselves.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use rustix::thread::sched_getcpu;
use serde::{Deserialize, Serialize};

use crate::lab::peer::Peer;

/// Bytes of a request and of its answer.
const PAYLOAD: usize = 64;
/// When a request counts as lost.
const LOST: Duration = Duration::from_secs(1);
/// How long a first answer may take: neighbours are resolved, a daemon that was stopped looks around.
const REACH: Duration = Duration::from_secs(5);
/// How often a request is repeated meanwhile.
const AGAIN: Duration = Duration::from_millis(100);
/// How long a program may run beyond what it was asked for.
const MARGIN: Duration = Duration::from_secs(10);
/// Most round trips that are remembered.
const MOST: usize = 1 << 20;

/// What is run inside a pod.
#[derive(Debug, Subcommand)]
pub enum Program {
    /// Answer datagrams.
    Echo(Serve),
    /// Ping-pong with `echo`.
    Ping(Ping),
    /// Accept connections, and close them.
    Accept(Serve),
    /// Connect to `accept`, again and again.
    Connect(Connect),
}

/// What a server is told.
#[derive(Debug, Args)]
pub struct Serve {
    /// The address to listen at; the kernel chooses the port.
    #[arg(long)]
    listen: IpAddr,
    /// End after this many seconds.
    #[arg(long)]
    within: f64,
}

/// What the client of `echo` is told.
#[derive(Debug, Args)]
pub struct Ping {
    /// Where to.
    #[arg(long)]
    to: SocketAddr,
    /// For how many seconds.
    #[arg(long)]
    seconds: f64,
    /// Seconds between the start of one request and of the next; 0 in a closed loop.
    #[arg(long)]
    pause: f64,
    /// Seconds to wait before the first.
    #[arg(long)]
    delay: f64,
}

/// What the client of `accept` is told.
#[derive(Debug, Args)]
pub struct Connect {
    /// Where to.
    #[arg(long)]
    to: SocketAddr,
    /// For how many seconds.
    #[arg(long)]
    seconds: f64,
}

/// Where a server listens.
#[derive(Debug, Serialize, Deserialize)]
pub struct Listening {
    /// There.
    pub listening: SocketAddr,
}

/// What a ping-pong was like. Times in microseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RoundTrips {
    /// Requests that were answered.
    pub answered: usize,
    /// Requests that were not.
    pub lost: usize,
    /// Median.
    pub p50: f64,
    /// 99 of a hundred take no longer.
    pub p99: f64,
    /// 999 of a thousand take no longer.
    pub p999: f64,
    /// Percent of the requests that were sent from the processor that the server answered from.
    pub one_cpu: f64,
}

/// What a round of connections was like.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Connected {
    /// Connections made and ended.
    pub connections: u64,
    /// The time it took, in seconds.
    pub seconds: f64,
}

/// Does what the command line says.
pub fn run(program: Program) -> Result<()> {
    match program {
        Program::Echo(args) => echo(&args),
        Program::Ping(args) => ping(&args),
        Program::Accept(args) => accept(&args),
        Program::Connect(args) => connect(&args),
    }
}

/// Starts a server of ours in a namespace.
pub fn serve(netns: &str, program: &str, listen: Ipv4Addr, within: Duration) -> Result<(Peer, SocketAddr)> {
    let within = (within + MARGIN).as_secs_f64().to_string();
    let args = [program, "--listen", &listen.to_string(), "--within", &within].map(str::to_owned);
    let mut peer = Peer::start_as("bench-peer", netns, &args, b"")?;
    let Listening { listening } = peer.hear(Instant::now() + MARGIN)?;
    Ok((peer, listening))
}

/// Starts a client of ours in a namespace.
pub fn client(netns: &str, program: &str, to: SocketAddr, rest: &[(&str, Duration)]) -> Result<Peer> {
    let mut args = vec![program.to_owned(), "--to".to_owned(), to.to_string()];
    for (name, value) in rest {
        args.extend([format!("--{name}"), value.as_secs_f64().to_string()]);
    }
    Peer::start_as("bench-peer", netns, &args, b"")
}

/// When a client that was asked for so much must have ended.
pub fn deadline(length: Duration) -> Instant {
    Instant::now() + length + REACH + MARGIN
}

fn echo(args: &Serve) -> Result<()> {
    let socket = UdpSocket::bind((args.listen, 0)).with_context(|| format!("cannot listen at {}", args.listen))?;
    end_after(args.within);
    say(&Listening { listening: socket.local_addr()? })?;
    let mut buffer = [0; 2 * PAYLOAD];
    loop {
        let (length, from) = match socket.recv_from(&mut buffer) {
            Ok(received) => received,
            // What an ICMP error about an earlier answer leaves behind.
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => continue,
            Err(error) => return Err(error).context("the socket broke"),
        };
        if length == PAYLOAD {
            buffer[8..16].copy_from_slice(&(sched_getcpu() as u64).to_be_bytes());
        }
        let _ = socket.send_to(&buffer[..length], from);
    }
}

fn ping(args: &Ping) -> Result<()> {
    let (length, pause) = (seconds(args.seconds)?, seconds(args.pause)?);
    end_after((length + REACH + MARGIN + seconds(args.delay)?).as_secs_f64());
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    socket.connect(args.to).with_context(|| format!("cannot reach {}", args.to))?;
    let mut pinger = Pinger { socket, next: 0, times: Vec::new(), lost: 0, together: 0 };
    pinger.reach(args.to)?;
    thread::sleep(seconds(args.delay)?);
    let end = Instant::now() + length;
    while Instant::now() < end && pinger.times.len() < MOST {
        let started = Instant::now();
        pinger.once(LOST)?;
        thread::sleep(pause.saturating_sub(started.elapsed()));
    }
    say(&pinger.summary()?)
}

struct Pinger {
    socket: UdpSocket,
    next: u64,
    times: Vec<f64>,
    lost: usize,
    together: usize,
}

impl Pinger {
    /// Asks until the first answer, which does not count.
    fn reach(&mut self, to: SocketAddr) -> Result<()> {
        let end = Instant::now() + REACH;
        while Instant::now() < end {
            if self.once(AGAIN)? {
                self.times.clear();
                (self.lost, self.together) = (0, 0);
                return Ok(());
            }
        }
        bail!("{to} does not answer within {} s", REACH.as_secs())
    }

    /// One request; whether it was answered.
    fn once(&mut self, patience: Duration) -> Result<bool> {
        self.next += 1;
        let mut buffer = [0; PAYLOAD];
        buffer[..8].copy_from_slice(&self.next.to_be_bytes());
        self.socket.set_read_timeout(Some(patience))?;
        let cpu = sched_getcpu() as u64;
        let started = Instant::now();
        let _ = self.socket.send(&buffer);
        while started.elapsed() < patience {
            match self.socket.recv(&mut buffer) {
                Ok(PAYLOAD) if buffer[..8] == self.next.to_be_bytes() => {
                    self.times.push(started.elapsed().as_secs_f64() * 1e6);
                    self.together += usize::from(buffer[8..16] == cpu.to_be_bytes());
                    return Ok(true);
                }
                // The answer to a request that was given up, or a hint that nobody listens yet.
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(error) => return Err(error).context("the socket broke"),
            }
        }
        self.lost += 1;
        Ok(false)
    }

    fn summary(mut self) -> Result<RoundTrips> {
        if self.times.is_empty() {
            bail!("none of {} requests was answered", self.lost);
        }
        self.times.sort_by(f64::total_cmp);
        Ok(RoundTrips {
            answered: self.times.len(),
            lost: self.lost,
            p50: rank(&self.times, 0.5),
            p99: rank(&self.times, 0.99),
            p999: rank(&self.times, 0.999),
            one_cpu: self.together as f64 * 100.0 / self.times.len() as f64,
        })
    }
}

/// The nearest rank: the least of the values that this share of them does not exceed. Of few values, a high rank is the
/// worst.
fn rank(sorted: &[f64], share: f64) -> f64 {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

fn accept(args: &Serve) -> Result<()> {
    let listener = TcpListener::bind((args.listen, 0)).with_context(|| format!("cannot listen at {}", args.listen))?;
    end_after(args.within);
    say(&Listening { listening: listener.local_addr()? })?;
    loop {
        // Closed here first: so it is this side that keeps the address pair for a while, and the client never runs out
        // of ports.
        drop(listener.accept());
    }
}

fn connect(args: &Connect) -> Result<()> {
    let length = seconds(args.seconds)?;
    end_after((length + MARGIN).as_secs_f64());
    once_connected(args.to)?;
    let started = Instant::now();
    let mut connections = 0;
    while started.elapsed() < length {
        once_connected(args.to)?;
        connections += 1;
    }
    say(&Connected { connections, seconds: started.elapsed().as_secs_f64() })
}

fn once_connected(to: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect(to).with_context(|| format!("cannot connect to {to}"))?;
    let read = stream.read(&mut [0]).with_context(|| format!("the connection to {to} broke"))?;
    if read != 0 { bail!("{to} is not what it should be: it sent something") } else { Ok(()) }
}

/// A number of seconds from a command line.
fn seconds(number: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(number).with_context(|| format!("{number} is no number of seconds"))
}

/// Ends this program if it is still there then, whatever it waits for.
fn end_after(within: f64) {
    let within = Duration::from_secs_f64(within.clamp(0.0, 3600.0));
    thread::spawn(move || {
        thread::sleep(within);
        std::process::exit(1);
    });
}

fn say(what: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    let mut out = std::io::stdout().lock();
    out.write_all(&line)?;
    Ok(out.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_is_one_of_the_values() {
        let values: Vec<f64> = (1..=1000).map(f64::from).collect();
        let ranks = [0.0, 0.5, 0.99, 0.999, 1.0].map(|share| rank(&values, share) as u32);
        assert_eq!(ranks, [1, 500, 990, 999, 1000]);
        assert_eq!([0.5, 0.99, 0.999].map(|share| rank(&[3.0, 7.0], share) as u32), [3, 7, 7]);
    }

    fn echo_once_in(pause: Duration) -> SocketAddr {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = server.local_addr().unwrap();
        thread::spawn(move || {
            let mut buffer = [0; 256];
            while let Ok((length, from)) = server.recv_from(&mut buffer) {
                thread::sleep(pause);
                server.send_to(&buffer[..length], from).unwrap();
            }
        });
        address
    }

    fn pinger(to: SocketAddr) -> Pinger {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(to).unwrap();
        Pinger { socket, next: 0, times: Vec::new(), lost: 0, together: 0 }
    }

    #[test]
    fn a_round_trip_lasts_as_long_as_the_answer_takes() {
        let to = echo_once_in(Duration::from_millis(3));
        let mut pinger = pinger(to);
        pinger.reach(to).unwrap();
        (0..5).for_each(|_| assert!(pinger.once(LOST).unwrap()));
        let summary = pinger.summary().unwrap();
        assert_eq!((summary.answered, summary.lost), (5, 0));
        assert!(summary.p50 >= 3000.0 && summary.p999 >= summary.p50, "{summary:?}");
    }

    #[test]
    fn an_answer_that_comes_too_late_is_lost_and_not_taken_for_the_next() {
        let mut pinger = pinger(echo_once_in(Duration::from_millis(60)));
        assert!(!pinger.once(Duration::from_millis(20)).unwrap());
        assert!(pinger.once(LOST).unwrap());
        assert_eq!((pinger.lost, pinger.times.len()), (1, 1));
        assert!(pinger.times[0] >= 60_000.0, "{:?}", pinger.times);
    }

    #[test]
    fn silence_is_an_error_and_no_figure() {
        let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut pinger = pinger(silent.local_addr().unwrap());
        assert!(!pinger.once(Duration::from_millis(10)).unwrap());
        assert!(pinger.summary().unwrap_err().to_string().contains("none of 1 requests"));
    }

    #[test]
    fn connections_are_made_and_ended() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let server = thread::spawn(move || (0..3).for_each(|_| drop(listener.accept().unwrap())));
        (0..3).for_each(|_| once_connected(to).unwrap());
        server.join().unwrap();
        assert!(once_connected(to).is_err());
    }
}
