//! Raw frames on an interface: what no well-behaved stack would send, and what is really on the wire.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, sockopt};

use crate::netns::Netns;
use crate::sys;

/// Room for the frames of a busy second, in bytes.
const BUFFER: usize = 32 << 20;

/// How long an interface may have no room.
const CONGESTED: Duration = Duration::from_secs(5);

/// An interface, open for raw frames.
pub struct Wire {
    socket: OwnedFd,
    has_tags: bool,
}

impl Wire {
    /// Opens an interface of a namespace.
    #[track_caller]
    pub fn open(netns: &Netns, ifname: &str) -> Wire {
        let json = netns.ip(&format!("-j link show dev {ifname}"));
        let links: serde_json::Value = serde_json::from_str(&json).expect("iproute2 writes JSON");
        let index = links[0]["ifindex"].as_u64().expect("an interface has an index") as u32;
        let socket = netns.inside(|| sys::packet_socket(index)).expect("root may open a packet socket");
        let _ = sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER);
        Wire { socket, has_tags: false }
    }

    /// Opens it so that VLAN tags are where they are on a wire: the kernel takes the outermost one off before it shows a frame.
    #[track_caller]
    pub fn with_tags(netns: &Netns, ifname: &str) -> Wire {
        let wire = Wire::open(netns, ifname);
        sys::tell_tags(&wire.socket).expect("packet sockets tell tags");
        Wire { has_tags: true, ..wire }
    }

    /// Opens it so that virtio's header stands before each frame, in both directions.
    #[track_caller]
    pub fn with_virtio_headers(netns: &Netns, ifname: &str) -> Wire {
        let wire = Wire::open(netns, ifname);
        sys::virtio_headers(&wire.socket).expect("packet sockets of this kernel can have virtio's header");
        wire
    }

    /// The same, to receive only what comes in there.
    #[track_caller]
    pub fn of_incoming(netns: &Netns, ifname: &str) -> Wire {
        let wire = Wire::with_virtio_headers(netns, ifname);
        sys::ignore_outgoing(&wire.socket).expect("packet sockets of this kernel can be told so");
        wire
    }

    /// Sends a frame, once; `false` if the kernel refuses it.
    pub fn offer(&self, frame: &[u8]) -> bool {
        rustix::net::send(&self.socket, frame, SendFlags::empty()).is_ok()
    }

    /// Sends a frame; `false` if the interface would not take it (it is shorter than an Ethernet header, or longer than the MTU allows).
    #[track_caller]
    pub fn send(&self, frame: &[u8]) -> bool {
        let deadline = Instant::now() + CONGESTED;
        loop {
            match rustix::net::send(&self.socket, frame, SendFlags::empty()) {
                Ok(_) => return true,
                // A device whose other end refuses the frame says the same.
                Err(Errno::AGAIN | Errno::NOBUFS) => {
                    assert!(Instant::now() < deadline, "no room for a frame of {} bytes in {CONGESTED:?}", frame.len());
                    std::thread::sleep(Duration::from_micros(200));
                }
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }

    /// The next frame that passes, in or out; `None` after `patience`.
    pub fn next(&self, patience: Duration) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 70_000];
        let deadline = Instant::now() + patience;
        loop {
            match self.receive(&mut buffer) {
                Ok((len, tag)) => {
                    buffer.truncate(len);
                    let tag = tag.into_iter().flatten().flat_map(u16::to_be_bytes);
                    buffer.splice(12..12, tag);
                    return Some(buffer);
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => panic!("cannot receive: {error}"),
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let _ = poll(&mut [PollFd::new(&self.socket.as_fd(), PollFlags::IN)], Some(&left));
        }
    }

    fn receive(&self, buffer: &mut [u8]) -> Result<(usize, Option<[u16; 2]>), Errno> {
        if self.has_tags {
            let received = sys::receive_tagged(&self.socket, buffer);
            return received.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO));
        }
        rustix::net::recv(&self.socket, buffer, rustix::net::RecvFlags::empty()).map(|(_, len)| (len, None))
    }

    /// All frames that pass within a time.
    pub fn collect(&self, time: Duration) -> Vec<Vec<u8>> {
        let deadline = Instant::now() + time;
        std::iter::from_fn(|| self.next(deadline.saturating_duration_since(Instant::now()))).collect()
    }

    /// The first frame that passes and is like this.
    pub fn find(&self, patience: Duration, mut is_it: impl FnMut(&[u8]) -> bool) -> Option<Vec<u8>> {
        let deadline = Instant::now() + patience;
        std::iter::from_fn(|| self.next(deadline.saturating_duration_since(Instant::now()))).find(|frame| is_it(frame))
    }
}
