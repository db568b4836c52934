//! The UDP underlay: tunnel packets through sockets of the host's kernel, superframes included.
//!
//! [`Underlay`] is the sockets: one that receives on the tunnel's port, and several that send, each from a source port of
//! its own, so that flows spread over the paths and queues of the network between nodes. [`UdpPort`] is
//! the underlay as a port of the worker. Frames carry [`crate::frame::Outer`], and their bytes begin at the tunnel header.
//!
//! * In ([`receive`]): one call takes one datagram or a train of up to 128 that the kernel merged (`UDP_GRO`). Trains are
//!   parted into runs that TCP's and UDP's own rules allow to be merged, each of which becomes one superframe without
//!   its payload being copied.
//! * Out ([`transmit`]): superframes are cut here, headers from one template and payload in place, and handed to the kernel as one
//!   message with `UDP_SEGMENT`; so are consecutive small frames of the same length.
//!
//! The outer UDP checksum is the kernel's business and always on: packets without one are never merged by a receiver.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::sockopt;
use socket2::{Domain, Protocol, SockAddr, SockFilter, Socket, Type};

use crate::pool::Pool;
use crate::port::sys::message;
use crate::port::{Batch, Capabilities, Port, PortId, Queue, Received};
use crate::stats::Stats;

mod receive;
mod transmit;

/// Length of the tunnel header that frames of this port begin with.
pub const TUNNEL_HEADER: usize = weft_encap::vxlan::VXLAN_LEN;

/// Socket buffers: the default holds about three superframes.
const SOCKET_BUFFER: usize = 16 << 20;

/// Sockets of the underlay, bound and ready. See the module's essay.
#[derive(Debug)]
pub struct Underlay {
    local: SocketAddr,
    receive: OwnedFd,
    transmit: Vec<OwnedFd>,
}

impl Underlay {
    /// Opens, in the current namespace, the socket that receives at `local` and as many that send from its address.
    ///
    /// # Errors
    /// The kernel's: `EADDRINUSE` if the port is taken (by a VXLAN device, for example), `EADDRNOTAVAIL` if the address is not
    /// this node's, `ENOPROTOOPT` if the kernel does not know `UDP_GRO`.
    pub fn open(local: SocketAddr, transmit_sockets: usize) -> io::Result<Underlay> {
        let receive = open(local)?;
        message::set_receive_options(&receive)?;
        match local {
            SocketAddr::V4(_) => receive.set_recv_tos_v4(true)?,
            SocketAddr::V6(_) => receive.set_recv_tclass_v6(true)?,
        }
        force_receive_buffer(&receive)?;
        let bound = receive.local_addr()?.as_socket().unwrap_or(local);
        let transmit = (0..transmit_sockets.max(1)).map(|_| open_transmit(local).map(OwnedFd::from));
        let transmit = transmit.collect::<io::Result<_>>()?;
        Ok(Underlay { local: bound, receive: receive.into(), transmit })
    }

    /// Where it receives. Peers are reached at the same port.
    pub fn local(&self) -> SocketAddr {
        self.local
    }
}

fn open(local: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(local), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    // "Probe" neither fragments, which the default does silently, nor believes a path MTU that anyone may have claimed.
    match local {
        SocketAddr::V4(_) => sockopt::set_ip_mtu_discover(&socket, sockopt::Ipv4PathMtuDiscovery::PROBE)?,
        SocketAddr::V6(_) => {
            socket.set_only_v6(true)?;
            sockopt::set_ipv6_mtu_discover(&socket, sockopt::Ipv6PathMtuDiscovery::PROBE)?;
        }
    }
    socket.bind(&SockAddr::from(local))?;
    Ok(socket)
}

/// A socket with a source port of the kernel's choice, that takes nothing in.
fn open_transmit(mut local: SocketAddr) -> io::Result<Socket> {
    local.set_port(0);
    let socket = open(local)?;
    let drop_all = SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, 0);
    socket.attach_filter(&[drop_all])?;
    let forced = sockopt::set_socket_send_buffer_size_force(&socket, SOCKET_BUFFER);
    forced.or_else(|_| sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER))?;
    Ok(socket)
}

/// Beyond the administrator's limit if we may, up to it otherwise.
fn force_receive_buffer(socket: &Socket) -> Result<(), Errno> {
    sockopt::set_socket_recv_buffer_size_force(socket, SOCKET_BUFFER)
        .or_else(|_| sockopt::set_socket_recv_buffer_size(socket, SOCKET_BUFFER))
}

/// An [`Underlay`] as a port.
pub struct UdpPort {
    socket: OwnedFd,
    receiver: receive::Receiver,
    sender: transmit::Sender,
}

impl UdpPort {
    /// A port of that number. A packet inside the tunnel has at most `tunnel_mtu` bytes, its Ethernet header not
    /// counted.
    pub fn new(underlay: Underlay, id: PortId, tunnel_mtu: u32) -> UdpPort {
        let Underlay { local, receive, transmit } = underlay;
        UdpPort {
            socket: receive,
            receiver: receive::Receiver::new(id, tunnel_mtu),
            sender: transmit::Sender::new(id, local.port(), transmit),
        }
    }
}

impl Port for UdpPort {
    fn receive(&mut self, pool: &Pool, batch: &mut Batch, stats: &mut Stats) -> io::Result<Received> {
        self.receiver.receive(&self.socket, pool, batch, stats)
    }

    fn transmit(&mut self, queue: &mut Queue, stats: &mut Stats) -> io::Result<()> {
        self.sender.transmit(queue, stats)
    }

    fn readable(&self) -> Option<BorrowedFd<'_>> {
        Some(self.socket.as_fd())
    }

    /// Everything is cut and summed by this port itself; what it says is whether the kernel takes many datagrams as one.
    fn capabilities(&self) -> Capabilities {
        Capabilities { udp: self.sender.segments(), ..Capabilities::default() }
    }

    fn set_tunnel_mtu(&mut self, mtu: u32) {
        self.receiver.tunnel_mtu = mtu;
    }

    fn kind(&self) -> &'static str {
        "udp"
    }
}
