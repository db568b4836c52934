//! ICMP echo from inside a pod, to many targets at once.
//!
//! The peer half ([`run`]) sends through raw sockets, one thread for each IP version, and repeats what was not answered
//! until its deadline. An answer belongs to the request with the same identifier and sequence number; a sequence
//! number is used once. ICMP errors about our requests are kept as the reason why a target is silent. `ping` itself
//! would be one process for each pair, and need not be installed.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::peer::Peer;

/// How long to wait for more answers before the next round of requests.
const ROUND: Duration = Duration::from_millis(100);
/// The pause between the measured requests to one target.
const PACE: Duration = Duration::from_millis(1);
/// Requests sent without reading in between; an answer each must fit a default socket buffer.
const BURST: usize = 64;

/// What to do; the input of the peer.
#[derive(Debug, Serialize, Deserialize)]
pub struct Job {
    /// Whom to reach.
    pub targets: Vec<IpAddr>,
    /// How many answers make a round-trip time.
    pub count: u32,
    /// How long it may take in all, in seconds.
    pub within: f64,
}

/// How it went for one target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Echo {
    /// The target.
    pub target: IpAddr,
    /// Median of the round-trip times in microseconds; absent if the target stayed silent.
    pub rtt: Option<f64>,
    /// What else was heard about it.
    pub reason: Option<String>,
}

/// Runs a job inside a pod's namespace.
pub fn ping(netns: &str, job: &Job) -> Result<Vec<Echo>> {
    let mut peer = Peer::start(netns, &["ping".to_owned()], &serde_json::to_vec(job)?)?;
    peer.hear(Instant::now() + Duration::from_secs_f64(job.within) + Duration::from_secs(5))
}

/// The peer: reads a job from stdin and writes the echoes to stdout.
pub fn run() -> Result<()> {
    let mut input = Vec::new();
    std::io::stdin().read_to_end(&mut input)?;
    let job: Job = serde_json::from_slice(&input).context("the job on stdin is not valid")?;
    let deadline = Instant::now() + Duration::from_secs_f64(job.within.clamp(0.0, 3600.0));
    let family = |v4: bool| {
        let targets: Vec<IpAddr> = job.targets.iter().copied().filter(|target| target.is_ipv4() == v4).collect();
        thread::spawn(move || Pinger::run(targets, v4, job.count, deadline))
    };
    let threads = [family(true), family(false)];
    let mut echoes = Vec::new();
    for thread in threads {
        echoes.extend(thread.join().expect("a pinger does not panic")?);
    }
    let mut line = serde_json::to_vec(&echoes)?;
    line.push(b'\n');
    std::io::stdout().write_all(&line)?;
    Ok(())
}

struct Pinger {
    socket: Socket,
    v4: bool,
    identifier: u16,
    targets: Vec<Target>,
    /// What each sequence number was used for.
    sent: Vec<(usize, Instant)>,
}

struct Target {
    address: IpAddr,
    rtts: Vec<f64>,
    reason: Option<String>,
}

/// A message that is about one of our requests.
#[derive(Debug, PartialEq, Eq)]
enum Heard {
    Answer { sequence: u16 },
    Trouble { sequence: u16, what: String },
}

impl Pinger {
    fn run(targets: Vec<IpAddr>, v4: bool, count: u32, deadline: Instant) -> Result<Vec<Echo>> {
        if targets.is_empty() {
            return Ok(Vec::new());
        }
        let mut pinger = Pinger::new(targets, v4)?;
        pinger.reach_all(deadline);
        if count > 1 {
            pinger.measure(count, deadline);
        }
        Ok(pinger.targets.into_iter().map(Target::into_echo).collect())
    }

    fn new(targets: Vec<IpAddr>, v4: bool) -> Result<Pinger> {
        let (domain, protocol) = if v4 { (Domain::IPV4, Protocol::ICMPV4) } else { (Domain::IPV6, Protocol::ICMPV6) };
        let socket = Socket::new(domain, Type::RAW, Some(protocol)).context("cannot open a raw socket")?;
        let _ = socket.set_recv_buffer_size(4 << 20);
        let targets = targets.into_iter().map(|address| Target { address, rtts: Vec::new(), reason: None }).collect();
        let identifier = std::process::id() as u16;
        Ok(Pinger { socket, v4, identifier, targets, sent: Vec::new() })
    }

    /// Sends to every target that has not answered, round after round.
    fn reach_all(&mut self, deadline: Instant) {
        while Instant::now() < deadline && self.sent.len() < usize::from(u16::MAX) {
            let silent: Vec<usize> =
                (0..self.targets.len()).filter(|index| self.targets[*index].rtts.is_empty()).collect();
            if silent.is_empty() {
                break;
            }
            for burst in silent.chunks(BURST) {
                burst.iter().for_each(|index| self.send(*index));
                self.listen(Instant::now(), |_| false);
            }
            self.listen((Instant::now() + ROUND).min(deadline), |pinger| {
                silent.iter().all(|index| !pinger.targets[*index].rtts.is_empty())
            });
        }
    }

    /// One request at a time, so that the times are those of an idle network.
    fn measure(&mut self, count: u32, deadline: Instant) {
        for index in 0..self.targets.len() {
            if self.targets[index].rtts.is_empty() {
                continue;
            }
            // The first answer includes the resolution of neighbours and does not count.
            self.targets[index].rtts.truncate(1);
            for _ in 0..count {
                if Instant::now() >= deadline || self.sent.len() >= usize::from(u16::MAX) {
                    break;
                }
                let before = self.targets[index].rtts.len();
                thread::sleep(PACE);
                self.send(index);
                let patience = (Instant::now() + ROUND).min(deadline);
                self.listen(patience, |pinger| pinger.targets[index].rtts.len() > before);
            }
            if self.targets[index].rtts.len() > 1 {
                self.targets[index].rtts.remove(0);
            }
        }
    }

    fn send(&mut self, index: usize) {
        let Ok(sequence) = u16::try_from(self.sent.len()) else { return };
        let request = echo_request(self.v4, self.identifier, sequence);
        let address = SockAddr::from(SocketAddr::new(self.targets[index].address, 0));
        self.sent.push((index, Instant::now()));
        if let Err(error) = self.socket.send_to(&request, &address) {
            self.targets[index].reason = Some(format!("the pod's kernel says: {error}"));
        }
    }

    /// Takes what has come in, until `enough` or the deadline; one look at least.
    fn listen(&mut self, until: Instant, enough: impl Fn(&Pinger) -> bool) {
        let mut buffer = [0; 2048];
        loop {
            // A timeout of zero means none at all to the kernel.
            let patience = until.saturating_duration_since(Instant::now()).max(Duration::from_micros(1));
            if self.socket.set_read_timeout(Some(patience)).is_err() {
                return;
            }
            match (&self.socket).read(&mut buffer) {
                Ok(length) => self.take(&buffer[..length]),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
            if enough(self) {
                return;
            }
        }
    }

    fn take(&mut self, packet: &[u8]) {
        match parse(self.v4, packet, self.identifier) {
            Some(Heard::Answer { sequence }) => {
                if let Some((index, sent)) = self.sent.get(usize::from(sequence)) {
                    self.targets[*index].rtts.push(sent.elapsed().as_secs_f64() * 1e6);
                }
            }
            Some(Heard::Trouble { sequence, what }) => {
                if let Some((index, _)) = self.sent.get(usize::from(sequence)) {
                    self.targets[*index].reason = Some(what);
                }
            }
            None => {}
        }
    }
}

impl Target {
    fn into_echo(mut self) -> Echo {
        self.rtts.sort_by(f64::total_cmp);
        let rtt = self.rtts.get(self.rtts.len() / 2).copied();
        Echo { target: self.address, rtt, reason: self.reason }
    }
}

/// RFC 792, page 14, and RFC 4443, section 4.1: type, code, checksum, identifier, sequence number, data.
fn echo_request(v4: bool, identifier: u16, sequence: u16) -> Vec<u8> {
    let kind = if v4 { 8 } else { 128 };
    let mut message = vec![kind, 0, 0, 0];
    message.extend(identifier.to_be_bytes());
    message.extend(sequence.to_be_bytes());
    message.extend((0..48).map(|byte| byte as u8));
    if v4 {
        // The kernel fills in the checksum of ICMPv6 only (RFC 3542, section 3.1).
        let checksum = checksum(&message).to_be_bytes();
        message[2..4].copy_from_slice(&checksum);
    }
    message
}

fn checksum(message: &[u8]) -> u16 {
    let words = message.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low)));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !(((folded & 0xffff) + (folded >> 16)) as u16)
}

fn parse(v4: bool, packet: &[u8], identifier: u16) -> Option<Heard> {
    // A raw IPv4 socket delivers the IP header as well, an IPv6 one does not.
    let source = if v4 { Some(IpAddr::from(<[u8; 4]>::try_from(packet.get(12..16)?).ok()?)) } else { None };
    let message = if v4 { after_ipv4(packet)? } else { packet };
    let (kind, code) = (*message.first()?, *message.get(1)?);
    if kind == if v4 { 0 } else { 129 } {
        return Some(Heard::Answer { sequence: sequence(message, identifier)? });
    }
    let quoted = message.get(8..)?;
    let request = if v4 { after_ipv4(quoted)? } else { quoted.get(40..)? };
    if *request.first()? != if v4 { 8 } else { 128 } {
        return None;
    }
    let what = trouble(v4, kind, code)?;
    let what = source.map_or(format!("a router says: {what}"), |source| format!("{source} says: {what}"));
    Some(Heard::Trouble { sequence: sequence(request, identifier)?, what })
}

fn after_ipv4(packet: &[u8]) -> Option<&[u8]> {
    packet.get(usize::from(packet.first()? & 0x0f) * 4..)
}

fn sequence(message: &[u8], identifier: u16) -> Option<u16> {
    let number = |at: usize| Some(u16::from_be_bytes([*message.get(at)?, *message.get(at + 1)?]));
    if number(4)? == identifier { number(6) } else { None }
}

/// The names of ICMP errors: RFC 792 and RFC 1812, RFC 4443.
fn trouble(v4: bool, kind: u8, code: u8) -> Option<String> {
    let name = match (v4, kind, code) {
        (true, 3, 0) | (false, 1, 0) => "no route to the destination",
        (true, 3, 1) | (false, 1, 3) => "the host is unreachable",
        (true, 3, 2) | (true, 3, 3) | (false, 1, 4) => "the port or protocol is unreachable",
        (true, 3, 4) | (false, 2, _) => "the packet is too big",
        (true, 3, 9 | 10 | 13) | (false, 1, 1) => "administratively prohibited",
        (true, 11, _) | (false, 3, _) => "the hop limit was reached",
        (true, 3 | 12, _) | (false, 1 | 4, _) => return Some(format!("ICMP error, type {kind} code {code}")),
        _ => return None,
    };
    Some(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ipv4(payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 1, 0, 0, 10, 244, 1, 1, 10, 244, 1, 2];
        packet.extend(payload);
        packet
    }

    fn answered(v4: bool, mut request: Vec<u8>) -> Vec<u8> {
        request[0] = if v4 { 0 } else { 129 };
        request
    }

    #[test]
    fn an_answer_is_matched_by_identifier_and_sequence() {
        let answer = answered(true, echo_request(true, 7, 300));
        assert_eq!(parse(true, &ipv4(&answer), 7), Some(Heard::Answer { sequence: 300 }));
        assert_eq!(parse(true, &ipv4(&answer), 8), None);
        let answer = answered(false, echo_request(false, 7, 301));
        assert_eq!(parse(false, &answer, 7), Some(Heard::Answer { sequence: 301 }));
    }

    #[test]
    fn a_request_by_somebody_else_is_no_answer() {
        assert_eq!(parse(true, &ipv4(&echo_request(true, 7, 1)), 7), None);
        assert_eq!(parse(false, &echo_request(false, 7, 1), 7), None);
    }

    #[test]
    fn an_error_about_our_request_becomes_a_reason() {
        let quoted = ipv4(&echo_request(true, 7, 5));
        let error = [&[3, 1, 0, 0, 0, 0, 0, 0], quoted.as_slice()].concat();
        let what = "10.244.1.1 says: the host is unreachable".to_owned();
        assert_eq!(parse(true, &ipv4(&error), 7), Some(Heard::Trouble { sequence: 5, what }));

        let quoted = [&[0x60; 40], echo_request(false, 7, 6).as_slice()].concat();
        let error = [&[1, 0, 0, 0, 0, 0, 0, 0], quoted.as_slice()].concat();
        let what = "a router says: no route to the destination".to_owned();
        assert_eq!(parse(false, &error, 7), Some(Heard::Trouble { sequence: 6, what }));
    }

    #[test]
    fn a_packet_cut_at_any_byte_is_no_panic() {
        let quoted = ipv4(&echo_request(true, 7, 5));
        let v4 = ipv4(&[&[3, 1, 0, 0, 0, 0, 0, 0], quoted.as_slice()].concat());
        let v6 = [&[1, 0, 0, 0, 0, 0, 0, 0], [0x60; 40].as_slice(), &echo_request(false, 7, 6)].concat();
        for length in 0..v4.len() {
            let _ = parse(true, &v4[..length], 7);
        }
        for length in 0..v6.len() {
            let _ = parse(false, &v6[..length], 7);
        }
    }

    #[test]
    fn the_checksum_of_a_message_with_its_checksum_is_zero() {
        assert_eq!(checksum(&echo_request(true, 0xabcd, 0x1234)), 0);
    }

    #[test]
    fn loopback_answers_over_both_versions() {
        for target in ["127.0.0.1", "::1"] {
            let target: IpAddr = target.parse().unwrap();
            let deadline = Instant::now() + Duration::from_secs(5);
            let echoes = Pinger::run(vec![target], target.is_ipv4(), 3, deadline)
                .expect("this test needs CAP_NET_RAW: run it as root, `sudo -E cargo test -p weft-ctl`");
            assert!(echoes[0].rtt.is_some(), "{echoes:?}");
        }
    }
}
