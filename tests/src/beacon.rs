//! Somebody who asks all the time, and notes which of the questions were answered: how long nothing passed, and what passed meanwhile.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::netns::Netns;

/// Between two questions.
const EACH: Duration = Duration::from_millis(5);
/// How long the threads sleep at most before they look whether they shall end.
const LOOK: Duration = Duration::from_millis(50);

/// Questions by UDP, one every moment; they end when this goes.
pub struct Beacon {
    ended: Arc<AtomicBool>,
    asked: Arc<Mutex<Vec<Instant>>>,
    /// The numbers of those that were answered, and when.
    answered: Arc<Mutex<BTreeMap<u32, Instant>>>,
}

impl Beacon {
    /// Begins: from one pod to an address of another.
    #[track_caller]
    pub fn start(from: &Netns, to: &Netns, address: IpAddr) -> Beacon {
        let open = |address: SocketAddr| {
            let socket = UdpSocket::bind(address).expect("the pod has the address");
            socket.set_read_timeout(Some(LOOK)).expect("a timeout can be set");
            socket
        };
        let server = to.inside(|| open(SocketAddr::new(address, 0)));
        let target = server.local_addr().expect("it is bound");
        let any: IpAddr = if address.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
        let client = from.inside(|| open(SocketAddr::new(any, 0)));
        let beacon = Beacon { ended: Arc::default(), asked: Arc::default(), answered: Arc::default() };
        let runs = |ended: &Arc<AtomicBool>| {
            let ended = Arc::clone(ended);
            move || !ended.load(Ordering::Relaxed)
        };
        let is_on = runs(&beacon.ended);
        thread::spawn(move || {
            let mut bytes = [0; 64];
            while is_on() {
                if let Ok((len, peer)) = server.recv_from(&mut bytes) {
                    let _ = server.send_to(&bytes[..len], peer);
                }
            }
        });
        let (is_on, asking, asked) =
            (runs(&beacon.ended), client.try_clone().expect("a descriptor is free"), Arc::clone(&beacon.asked));
        thread::spawn(move || {
            while is_on() {
                let number = {
                    let mut asked = lock(&asked);
                    asked.push(Instant::now());
                    asked.len() as u32 - 1
                };
                // A machine without a way refuses.
                let _ = asking.send_to(&number.to_be_bytes(), target);
                thread::sleep(EACH);
            }
        });
        let (is_on, answered) = (runs(&beacon.ended), Arc::clone(&beacon.answered));
        thread::spawn(move || {
            let mut bytes = [0; 64];
            while is_on() {
                if let Ok(4) = client.recv(&mut bytes) {
                    let number = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                    lock(&answered).entry(number).or_insert_with(Instant::now);
                }
            }
        });
        beacon
    }

    /// Waits until a question is answered that was asked after `since`: how long after that the answer came.
    #[track_caller]
    pub fn await_back(&self, since: Instant, patience: Duration) -> Duration {
        loop {
            let first = lock(&self.asked).partition_point(|asked| *asked <= since) as u32;
            if let Some((_, at)) = lock(&self.answered).range(first..).next() {
                return *at - since;
            }
            assert!(since.elapsed() < patience, "no question is answered within {patience:?}");
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// How many questions were asked between two moments, and how many of them were answered.
    pub fn count(&self, from: Instant, until: Instant) -> (usize, usize) {
        let range = {
            let asked = lock(&self.asked);
            asked.partition_point(|at| *at < from) as u32..asked.partition_point(|at| *at < until) as u32
        };
        (range.len(), lock(&self.answered).range(range).count())
    }
}

impl Drop for Beacon {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A TCP connection whose other end says all again.
pub struct Talk(TcpStream);

impl Talk {
    /// Connects one pod with an address of another.
    #[track_caller]
    pub fn start(from: &Netns, to: &Netns, address: IpAddr) -> Talk {
        let listener = to.inside(|| TcpListener::bind(SocketAddr::new(address, 0)).expect("the pod has the address"));
        let target = listener.local_addr().expect("it is bound");
        thread::spawn(move || {
            let Ok((mut stream, _)) = listener.accept() else { return };
            let mut bytes = vec![0; 64 << 10];
            while let Ok(len @ 1..) = stream.read(&mut bytes) {
                if stream.write_all(&bytes[..len]).is_err() {
                    return;
                }
            }
        });
        let stream = from.inside(|| TcpStream::connect(target)).expect("it listens");
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout can be set");
        Talk(stream)
    }

    /// Says something, and hears it.
    #[track_caller]
    pub fn goes_on(&mut self) {
        let said: Vec<u8> = (0..20_000_u32).map(|number| (number % 251) as u8).collect();
        self.0.write_all(&said).expect("the connection is there");
        let mut heard = vec![0; said.len()];
        self.0.read_exact(&mut heard).expect("the connection is there");
        assert!(heard == said, "something else came back");
    }
}
