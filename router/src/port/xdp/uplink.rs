//! Opening an uplink for all workers, or saying why that cannot be.
//!
//! The program comes first: it is what a driver may refuse, and without a socket it passes everything to the kernel. Then frames
//! are sent, the smallest and the longest, to the device's own MAC, so that no one else takes them. Then each queue gets a socket;
//! queues go to the workers in turn, a few to each. What comes by a queue without one, and what a worker without one sends, takes the
//! kernel's way. Zero copy is asked for first: all sockets of a worker's memory must ask alike, so it is registered once more for that.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use weft_encap::mac::Mac;

use super::channel::{Steering, XdpDevice};
use super::port::XdpPort;
use super::probe::{frame, pattern};
use super::programs::Tunnel;
use crate::pool::Pool;
use crate::port::sys::bpf::Mode;
use crate::port::sys::xsk::Umem;
use crate::port::{Port, PortId, Queue};
use crate::stats::Stats;

/// Most queues of a worker: each holds chunks of its memory.
const QUEUES: usize = 8;
/// How long a frame may take until it is on the wire.
const PATIENCE: Duration = Duration::from_secs(1);

/// A device that leads to other nodes.
#[derive(Clone, Debug)]
pub struct Uplink {
    /// Its number in the calling thread's network namespace.
    pub interface: u32,
    /// Its MAC.
    pub mac: Mac,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it has carrier: without, nothing can be sent to try it.
    pub carrier: bool,
}

/// An uplink with program and sockets, not yet in use.
#[derive(Debug)]
pub struct OpenUplink {
    /// Each worker's queues.
    pub(crate) devices: Vec<Vec<XdpDevice>>,
    /// What the program takes.
    pub(crate) tunnel: Tunnel,
    /// Whether frames are not copied.
    pub zero_copy: bool,
    /// How many queues have a socket.
    pub queues: usize,
}

impl OpenUplink {
    /// Opens it for workers with these chunks.
    ///
    /// # Errors
    /// What the kernel or the driver refused, in words.
    pub fn open(uplink: &Uplink, tunnel: Tunnel, workers: &[Umem]) -> io::Result<OpenUplink> {
        let most = workers.len() * QUEUES;
        let steering = Steering::attach(uplink.interface, most as u32, &tunnel, Mode::Native);
        let steering = Arc::new(steering.map_err(io::Error::other)?);
        if uplink.carrier {
            try_to_send(uplink)?;
        }
        let open = |zero_copy| open_queues(uplink, workers, zero_copy, &steering);
        let (devices, zero_copy) = match open(true) {
            Ok(devices) => (devices, true),
            // It is an offer of the driver's; whatever is wrong otherwise is told by the second attempt.
            Err(_) => (open(false)?, false),
        };
        let queues = devices.iter().map(Vec::len).sum();
        Ok(OpenUplink { devices, tunnel, zero_copy, queues })
    }

    /// How many workers have a queue.
    pub fn workers(&self) -> usize {
        self.devices.iter().filter(|queues| !queues.is_empty()).count()
    }
}

fn open_queues(
    uplink: &Uplink,
    workers: &[Umem],
    zero_copy: bool,
    steering: &Arc<Steering>,
) -> io::Result<Vec<Vec<XdpDevice>>> {
    let umems: Vec<Umem> = workers.iter().map(|umem| if zero_copy { umem.apart() } else { umem.clone() }).collect();
    let mut devices: Vec<Vec<XdpDevice>> = umems.iter().map(|_| Vec::new()).collect();
    for queue in 0..umems.len() * QUEUES {
        let worker = queue % umems.len();
        match XdpDevice::open_uplink(uplink.interface, queue as u32, &umems[worker], zero_copy, steering) {
            Ok(device) => devices[worker].push(device),
            // There are no more.
            Err(error) if queue > 0 && Errno::from_io_error(&error) == Some(Errno::INVAL) => break,
            Err(error) => {
                return Err(io::Error::new(
                    error.kind(),
                    format!("cannot open an AF_XDP socket on queue {queue}: {error}"),
                ));
            }
        }
    }
    Ok(devices)
}

/// Sends the smallest and the longest frame from the device to itself, as far as that goes.
fn try_to_send(uplink: &Uplink) -> io::Result<()> {
    let pool = Pool::new(256, 2)?;
    let device = XdpDevice::open_sender(uplink.interface, 0, &Umem::of(pool.arena()))
        .map_err(|error| io::Error::new(error.kind(), format!("cannot open an AF_XDP socket: {error}")))?;
    let mut port = XdpPort::new(device, &pool, PortId(1))?;
    for len in [60, 14 + uplink.mtu as usize] {
        let bytes = pattern(len, uplink.mac, uplink.mac);
        let mut queue = Queue::from([frame(&pool, &bytes).ok_or(Errno::NOBUFS)?]);
        let mut stats = Stats::default();
        let deadline = Instant::now() + PATIENCE;
        loop {
            port.transmit(&mut queue, &mut stats)?;
            if queue.is_empty() && port.lent().1 == 0 {
                break;
            }
            if Instant::now() > deadline {
                return Err(io::Error::new(io::ErrorKind::TimedOut, format!("a frame of {len} bytes was not sent")));
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        // The frame came from nowhere.
        if stats.of(PortId(0)).sent == 0 {
            let what = format!("a frame of {len} bytes, as long as the MTU allows, cannot be sent");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
    }
    Ok(())
}
