//! Datagrams as fast as they go: numbered, of several flows at once, and a receiver that sees whether one was overtaken.
//!
//! What is lost is not counted against anyone: a flood is meant to be more than can be forwarded.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::netns::Netns;
use crate::sys;

/// Bytes of a datagram's number, at its front.
const NUMBER: usize = 8;
/// Payload of a UDP datagram over IPv4 whose Ethernet frame has 64 bytes, check sequence included.
pub const SMALL: usize = 18;

/// What the datagrams of a flow look like.
#[derive(Copy, Clone, Debug)]
pub struct Shape {
    /// Bytes of payload of each.
    pub size: usize,
    /// How many the kernel is given at once; more than one leave the pod as a superframe.
    pub train: usize,
}

/// Flows that are being sent.
pub struct Flood {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Flood {
    /// Sends flows of these shapes from one namespace to one address, in turns, each once between two pauses.
    #[track_caller]
    pub fn start(from: &Netns, target: SocketAddr, shapes: &[Shape], pause: Duration) -> Flood {
        let any: IpAddr = if target.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let flow = |shape: &Shape| {
            let socket = UdpSocket::bind(SocketAddr::new(any, 0)).expect("a port is free");
            if shape.train > 1 {
                sys::segment(&socket, shape.size).expect("the kernel cuts trains of datagrams (UDP_SEGMENT)");
            }
            (socket, *shape)
        };
        let flows: Vec<_> = from.inside(|| shapes.iter().map(flow).collect());
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut number = 0u64;
            while !stopped.load(Ordering::Relaxed) {
                for (socket, shape) in &flows {
                    // Not sent is as good as lost.
                    let _ = socket.send_to(&train(shape, number), target);
                }
                number += 128;
                if !pause.is_zero() {
                    thread::sleep(pause);
                }
            }
            number / 128 * flows.iter().map(|(_, shape)| shape.train as u64).sum::<u64>()
        });
        Flood { stop, thread }
    }

    /// Ends it. Returns how many datagrams it has tried to send.
    #[track_caller]
    pub fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("a flood does not fail")
    }
}

fn train(shape: &Shape, first: u64) -> Vec<u8> {
    let mut bytes = vec![0; shape.size * shape.train];
    for (number, datagram) in (first..).zip(bytes.chunks_mut(shape.size)) {
        datagram[..NUMBER].copy_from_slice(&number.to_be_bytes());
    }
    bytes
}

/// What a receiver has seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// Datagrams of each flow.
    pub flows: BTreeMap<SocketAddr, u64>,
    /// Datagrams that came behind one of their flow with a higher number.
    pub overtaken: u64,
    /// Datagrams that came behind themselves.
    pub repeated: u64,
}

/// A receiver at work.
pub struct Receiver {
    /// Where it listens.
    pub address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Seen>,
}

impl Receiver {
    /// Listens on an address of a namespace.
    #[track_caller]
    pub fn start(at: &Netns, address: IpAddr) -> Receiver {
        let socket = at.inside(|| UdpSocket::bind(SocketAddr::new(address, 0)).expect("the pod has the address"));
        socket.set_read_timeout(Some(Duration::from_millis(300))).expect("a timeout can be set");
        let address = socket.local_addr().expect("it is bound");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        Receiver { address, stop, thread: thread::spawn(move || receive(&socket, &stopped)) }
    }

    /// Waits until nothing comes any more, and says what came.
    #[track_caller]
    pub fn stop(self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("a receiver does not fail")
    }
}

fn receive(socket: &UdpSocket, stop: &AtomicBool) -> Seen {
    let (mut seen, mut last) = (Seen::default(), BTreeMap::<SocketAddr, u64>::new());
    let mut buffer = [0; 2048];
    loop {
        let Ok((len, flow)) = socket.recv_from(&mut buffer) else {
            if stop.load(Ordering::Relaxed) {
                return seen;
            }
            continue;
        };
        let number = buffer[..len].first_chunk().map(|number| u64::from_be_bytes(*number));
        let number = number.expect("only numbered datagrams are sent here");
        *seen.flows.entry(flow).or_default() += 1;
        let before = last.entry(flow).or_insert(0);
        seen.overtaken += u64::from(number < *before);
        seen.repeated += u64::from(number == *before && seen.flows[&flow] > 1);
        *before = number.max(*before);
    }
}
