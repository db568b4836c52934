//! Traffic with a verdict: streams whose hash is compared, datagrams that are counted.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Stdio};
use std::thread;
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::command::eventually;
use crate::netns::Netns;
use crate::random::Random;

const PIECE: usize = 256 << 10;
const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until an address answers: the end of the set-up of what was built by hand. The kernel announces and checks
/// its addresses in its own time, and a frame may be lost to that; what a test asserts begins afterwards.
#[track_caller]
pub fn await_answer(from: &Netns, address: IpAddr) {
    let family = if address.is_ipv4() { "-4" } else { "-6" };
    let ping = || from.exec(&format!("ping {family} -n -q -c 1 -W 1 {address}")).success;
    eventually(&format!("{address} answers {} once all is set up", from.0), Duration::from_secs(10), ping);
}

/// Sends a stream of so many random bytes from one namespace to an address in another, over TCP, and compares their SHA-256.
#[track_caller]
pub fn transfer(from: &Netns, to: &Netns, address: IpAddr, bytes: u64) {
    let listener = to.inside(|| TcpListener::bind(SocketAddr::new(address, 0)).expect("the pod has the address"));
    let port = listener.local_addr().expect("it is bound").port();
    transfer_by(from, address, port, listener, bytes);
}

/// The same, to whoever listens behind an address and port.
#[track_caller]
pub fn transfer_by(from: &Netns, address: IpAddr, port: u16, listener: TcpListener, bytes: u64) {
    let target = SocketAddr::new(address, port);
    let receiver = thread::spawn(move || {
        let (stream, _) = listener.accept().expect("somebody connects");
        receive(stream)
    });
    let stream = from
        .inside(|| TcpStream::connect_timeout(&target, PATIENCE))
        .unwrap_or_else(|error| panic!("{target}: {error}"));
    let sent = send(stream, bytes);
    let (received, count) = receiver.join().expect("the receiver ends");
    assert_eq!(count, bytes, "bytes from {} to {address}", from.0);
    assert_eq!(received, sent, "SHA-256 of {bytes} bytes from {} to {address}", from.0);
}

/// What a web server says, asked from a namespace.
///
/// # Errors
/// It does not answer.
pub fn fetch(from: &Netns, server: SocketAddr) -> std::io::Result<String> {
    let patience = Duration::from_secs(3);
    let mut stream = from.inside(|| TcpStream::connect_timeout(&server, patience))?;
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.trim().to_owned());
    body.ok_or_else(|| std::io::Error::other(answer))
}

fn send(mut stream: TcpStream, bytes: u64) -> [u8; 32] {
    stream.set_write_timeout(Some(PATIENCE)).expect("a timeout can be set");
    let (mut hash, mut left) = (Sha256::new(), bytes);
    let mut random = Random::new(bytes);
    let mut piece = vec![0; PIECE];
    while left > 0 {
        random.fill(&mut piece);
        let len = left.min(PIECE as u64) as usize;
        hash.update(&piece[..len]);
        stream.write_all(&piece[..len]).expect("the stream goes on");
        left -= len as u64;
    }
    hash.finalize().into()
}

fn receive(mut stream: TcpStream) -> ([u8; 32], u64) {
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout can be set");
    let (mut hash, mut count) = (Sha256::new(), 0);
    let mut piece = vec![0; PIECE];
    loop {
        match stream.read(&mut piece).expect("the stream goes on") {
            0 => return (hash.finalize().into(), count),
            len => {
                hash.update(&piece[..len]);
                count += len as u64;
            }
        }
    }
}

/// Sends datagrams of these sizes one by one, each when the one before has come back from an echo at the other end.
#[track_caller]
pub fn echo_datagrams(from: &Netns, to: &Netns, address: IpAddr, sizes: &[usize]) {
    let server = to.inside(|| UdpSocket::bind(SocketAddr::new(address, 0)).expect("the pod has the address"));
    let port = server.local_addr().expect("it is bound").port();
    echo_datagrams_by(from, address, port, server, sizes);
}

/// The same, to the server behind an address and port.
#[track_caller]
pub fn echo_datagrams_by(from: &Netns, address: IpAddr, port: u16, server: UdpSocket, sizes: &[usize]) {
    let target = SocketAddr::new(address, port);
    let any: IpAddr = if address.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let client = from.inside(|| UdpSocket::bind(SocketAddr::new(any, 0)).expect("any port is free"));
    client.connect(target).expect("there is a route");
    client.set_read_timeout(Some(Duration::from_secs(3))).expect("a timeout can be set");
    server.set_read_timeout(Some(Duration::from_secs(3))).expect("a timeout can be set");
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut buffer = vec![0; 65_536];
            for _ in sizes {
                let Ok((len, peer)) = server.recv_from(&mut buffer) else { return };
                let _ = server.send_to(&buffer[..len], peer);
            }
        });
        let mut random = Random::new(7);
        let mut buffer = vec![0; 65_536];
        for size in sizes {
            let datagram = random.bytes(*size);
            client.send(&datagram).unwrap_or_else(|error| panic!("{size} bytes to {target}: {error}"));
            let len = client.recv(&mut buffer).unwrap_or_else(|error| panic!("{size} bytes from {target}: {error}"));
            assert!(buffer[..len] == datagram, "{size} bytes came back changed from {target}");
        }
    });
}

/// Bits per second of one `iperf3` run; fails if it fails. `args` begin with what follows `-c ADDRESS`.
#[track_caller]
pub fn iperf3(from: &Netns, to: &Netns, address: IpAddr, args: &str) -> f64 {
    let mut server = to.command("iperf3");
    server.args(["-s", "-1", "-p", "5301"]);
    let _server = crate::command::Background::start(server);
    let mut last = String::new();
    for _ in 0..40 {
        thread::sleep(Duration::from_millis(100));
        let said = from.exec(&format!("iperf3 -J -p 5301 -c {address} {args}"));
        if said.success {
            let report: serde_json::Value = serde_json::from_str(&said.out).expect("iperf3 -J prints JSON");
            let end = &report["end"];
            let sum = if end["sum_received"].is_object() { &end["sum_received"] } else { &end["sum"] };
            return sum["bits_per_second"].as_f64().unwrap_or_else(|| panic!("no throughput in {report}"));
        }
        last = said.out;
        if !last.contains("refused") {
            break;
        }
    }
    panic!("iperf3 {args} from {} to {address}: {last}", from.0);
}

/// Pings that must all be answered: every 20 ms, for as long as the test goes on.
pub struct Pings(Child);

impl Pings {
    /// Begins.
    #[track_caller]
    pub fn start(from: &Netns, to: IpAddr) -> Pings {
        let mut command = from.command("ping");
        command.args(["-q", "-i", "0.02", "-W", "2", &to.to_string()]);
        Pings(command.stdout(Stdio::piped()).spawn().expect("ping is there"))
    }

    /// Ends them: at least so many were sent, and none was lost.
    #[track_caller]
    pub fn assert_none_lost(self, at_least: u64) {
        let pid = rustix::process::Pid::from_raw(self.0.id() as i32).expect("a process id is not zero");
        rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("it runs");
        let said = String::from_utf8(self.0.wait_with_output().expect("it ends").stdout).expect("text");
        let numbers: Vec<u64> = said
            .lines()
            .find(|line| line.contains("packets transmitted"))
            .unwrap_or_else(|| panic!("ping said: {said}"))
            .split(|c: char| !c.is_ascii_digit())
            .filter_map(|word| word.parse().ok())
            .collect();
        let (sent, received) = (numbers[0], numbers[1]);
        // The last one may be on its way when ping is told to end.
        assert!(sent >= at_least && sent - received <= 1, "{said}");
    }
}
