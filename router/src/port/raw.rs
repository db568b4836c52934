//! The underlay of formats that lie directly in IP: GRE, and IP in IP, through raw sockets of the host's kernel.
//!
//! A [`RawTunnel`] has one socket for each IP protocol of its format that receives, and for each worker as many that send. The kernel gives
//! every raw socket a copy of each packet of its protocol, so one worker receives; another one takes over should that one end. Beside
//! our tunnel the node may have others of the same protocol: their packets come here too, and end as `NotMember`.
//!
//! The kernel cuts nothing for such sockets. Superframes of TCP leave whole by a way beside them, where the kernel has what it takes
//! ([`wrapper`]); others are cut here, and their segments sent by as few calls as possible, as over UDP.
//! What comes in comes packet by packet, unless the device's receive offload has merged inner segments, which is recognised by their
//! checksum, and is merged by [`crate::gather`]. Path MTUs that a router claims are not believed, and nothing is fragmented but what has
//! to get there by a way that is too narrow for it (RFC 2473, section 7).
//!
//! Frames look as [`crate::tunnel`] has them: what carries IP alone gets an Ethernet header behind the tunnel header when it comes in, with
//! MACs of nobody, and loses it when it leaves.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::sockopt;
use socket2::{Domain, Protocol, SockAddr, SockFilter, Socket, Type};
use weft_encap::format::Format;
use weft_encap::ip;

use crate::pool::Pool;
use crate::port::sys::message;
use crate::port::udp::{Fragmenting, SOCKET_BUFFER, allow_fragments, bind_early, force_receive_buffer, transmit};
use crate::port::{Batch, Capabilities, Port, PortId, Queue, Received, is_broken};
use crate::stats::Stats;

mod receive;
mod whole;
pub mod wrapper;

pub use receive::dress;
use whole::Whole;
use wrapper::{Wrapper, WrapperPlace};

/// The sockets of a format, for all workers.
#[derive(Debug)]
pub struct RawTunnel {
    format: Format,
    local: IpAddr,
    receiving: Arc<Receiving>,
    /// For each worker those of each protocol.
    sending: Vec<Sending>,
    wrapper: WrapperPlace,
}

/// A worker's sockets that send, one for each protocol.
#[derive(Debug)]
pub(crate) struct Sending {
    whole: Vec<OwnedFd>,
    /// For what may go in fragments.
    fragmenting: Vec<OwnedFd>,
}

/// The sockets that receive, one for each protocol.
#[derive(Debug)]
pub(crate) struct Receiving {
    sockets: Vec<OwnedFd>,
    /// Readable if one of them is.
    readable: OwnedFd,
    outer_is_v4: bool,
}

impl RawTunnel {
    /// Opens, in the current namespace, the sockets for packets to and from this address. GRE's two formats have the same ones.
    ///
    /// # Errors
    /// `InvalidInput` for a format that lies in UDP; the kernel's: `EPERM` without `CAP_NET_RAW`.
    pub fn open(format: Format, workers: usize, local: IpAddr) -> io::Result<RawTunnel> {
        let protocols = protocols(format).ok_or(io::ErrorKind::InvalidInput)?;
        let sockets = protocols.iter().map(|protocol| open_receiving(local, *protocol).map(OwnedFd::from));
        let sockets: Vec<OwnedFd> = sockets.collect::<io::Result<_>>()?;
        let readable = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for fd in &sockets {
            epoll::add(&readable, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        }
        let sending = (0..workers).map(|_| open_all_sending(local, protocols));
        let sending = sending.collect::<io::Result<_>>()?;
        let receiving = Arc::new(Receiving { sockets, readable, outer_is_v4: local.is_ipv4() });
        Ok(RawTunnel { format, local, receiving, sending, wrapper: WrapperPlace::default() })
    }

    /// Superframes leave by what is put there.
    #[must_use]
    pub fn with_wrapper(self, wrapper: WrapperPlace) -> RawTunnel {
        RawTunnel { wrapper, ..self }
    }

    /// How many workers it is for.
    pub fn workers(&self) -> usize {
        self.sending.len()
    }

    /// What each worker gets.
    pub(crate) fn into_halves(self) -> impl Iterator<Item = RawHalf> {
        let RawTunnel { format, local, receiving, sending, wrapper } = self;
        sending.into_iter().map(move |sending| RawHalf {
            format,
            local,
            receiving: Arc::clone(&receiving),
            sending,
            wrapper: Arc::clone(&wrapper),
        })
    }
}

/// What one worker gets of a [`RawTunnel`].
pub(crate) struct RawHalf {
    format: Format,
    local: IpAddr,
    receiving: Arc<Receiving>,
    sending: Sending,
    wrapper: WrapperPlace,
}

/// The IP protocols of a format: that of packets with IPv4 inside, and, if it is another one, that of those with IPv6.
fn protocols(format: Format) -> Option<&'static [u8]> {
    match format {
        Format::Vxlan | Format::Geneve => None,
        Format::Gre | Format::Gretap => Some(&[ip::GRE]),
        Format::Ipip => Some(&[ip::IPIP, ip::IPV6]),
    }
}

/// A socket that takes nothing in before it is bound, and sends no fragments.
fn open(local: IpAddr, protocol: u8) -> io::Result<Socket> {
    let address = SocketAddr::new(local, 0);
    let socket =
        Socket::new(Domain::for_address(address), Type::RAW.nonblocking(), Some(Protocol::from(i32::from(protocol))))?;
    let drop_all = SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, 0);
    socket.attach_filter(&[drop_all])?;
    // As for UDP: neither fragments, nor a path MTU that anyone may have claimed.
    match local {
        IpAddr::V4(_) => sockopt::set_ip_mtu_discover(&socket, sockopt::Ipv4PathMtuDiscovery::PROBE)?,
        IpAddr::V6(_) => sockopt::set_ipv6_mtu_discover(&socket, sockopt::Ipv6PathMtuDiscovery::PROBE)?,
    }
    bind_early(&socket, address)?;
    socket.bind(&SockAddr::from(address))?;
    Ok(socket)
}

fn open_receiving(local: IpAddr, protocol: u8) -> io::Result<Socket> {
    let socket = open(local, protocol)?;
    message::count_overruns(&socket)?;
    if local.is_ipv6() {
        socket.set_recv_tclass_v6(true)?;
    }
    force_receive_buffer(&socket)?;
    socket.detach_filter()?;
    Ok(socket)
}

fn open_all_sending(local: IpAddr, protocols: &[u8]) -> io::Result<Sending> {
    let all = |fragments: bool| -> io::Result<Vec<OwnedFd>> {
        let open = |protocol: &u8| {
            let socket = open_sending(local, *protocol)?;
            if fragments {
                allow_fragments(&socket, local.is_ipv4())?;
                if local.is_ipv6() {
                    message::learn_path_mtus_v6(&socket)?;
                }
            }
            Ok(OwnedFd::from(socket))
        };
        protocols.iter().map(open).collect()
    };
    Ok(Sending { whole: all(false)?, fragmenting: all(true)? })
}

fn open_sending(local: IpAddr, protocol: u8) -> io::Result<Socket> {
    let socket = open(local, protocol)?;
    let forced = sockopt::set_socket_send_buffer_size_force(&socket, SOCKET_BUFFER);
    forced.or_else(|_| sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER))?;
    Ok(socket)
}

/// One worker's part of a [`RawTunnel`] as a port.
pub struct RawPort {
    receiving: Arc<Receiving>,
    id: PortId,
    receives: bool,
    receiver: receive::Receiver,
    sender: transmit::Sender,
    fragmenting: Fragmenting,
    whole: Whole,
}

impl RawPort {
    /// A port of that number. It sends; whether it also receives is up to the caller, who sees to it that one port of a tunnel does.
    pub(crate) fn new(half: RawHalf, id: PortId, receives: bool, tunnel_mtu: u32) -> RawPort {
        let RawHalf { format, local, receiving, sending, wrapper } = half;
        let receiver = receive::Receiver::new(id, protocols(format).unwrap_or_default(), tunnel_mtu);
        let sender = transmit::Sender::raw(id, sending.whole);
        let fragmenting = Fragmenting::new(transmit::Sender::raw(id, sending.fragmenting));
        RawPort { receiving, id, receives, receiver, sender, fragmenting, whole: Whole::new(id, local, wrapper) }
    }

    /// Sends in the queue's order, superframes by the wrapper.
    fn send_whole(&mut self, wrapper: &Wrapper, queue: &mut Queue, stats: &mut Stats) -> io::Result<()> {
        // Most often all is small, and then neither a second queue nor the kernel's count is needed.
        if !queue.iter().any(|frame| self.whole.takes(frame)) {
            return self.sender.transmit(queue, stats);
        }
        while let Some(front) = queue.front() {
            let (sent, others) = match self.whole.takes(front) {
                true => match self.whole.send(wrapper, queue) {
                    Ok(sent) => (sent, 0),
                    Err(Errno::AGAIN) => break,
                    Err(error) if is_broken(error) => return Err(error.into()),
                    // It is cut here, then.
                    Err(_) => (0, 1),
                },
                false => (0, queue.iter().take_while(|frame| !self.whole.takes(frame)).count()),
            };
            queue.drain(..sent).for_each(|frame| stats.sent(frame, self.id, 1));
            if others > 0 {
                self.sender.transmit(&mut queue.drain(..others).collect(), stats)?;
            }
        }
        self.whole.count(stats);
        Ok(())
    }
}

impl Port for RawPort {
    fn receive(&mut self, pool: &Pool, batch: &mut Batch, stats: &mut Stats) -> io::Result<Received> {
        if !self.receives {
            return Ok(Received::Drained);
        }
        self.receiver.receive(&self.receiving, pool, batch, stats)
    }

    fn transmit(&mut self, queue: &mut Queue, stats: &mut Stats) -> io::Result<()> {
        self.fragmenting.transmit(queue, stats)?;
        match self.whole.wrapper() {
            Some(wrapper) => self.send_whole(&wrapper, queue, stats),
            None => self.sender.transmit(queue, stats),
        }
    }

    fn count(&mut self, stats: &mut Stats) {
        self.whole.count(stats);
    }

    fn readable(&self) -> Option<BorrowedFd<'_>> {
        self.receives.then(|| self.receiving.readable.as_fd())
    }

    fn receive_too(&mut self) {
        self.receives = true;
    }

    /// What does not leave whole by the wrapper is cut and summed by this port itself.
    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    fn set_tunnel_mtu(&mut self, mtu: u32) {
        self.receiver.tunnel_mtu = mtu;
    }

    fn gathers(&self) -> bool {
        true
    }

    fn kind(&self) -> &'static str {
        "raw"
    }
}
