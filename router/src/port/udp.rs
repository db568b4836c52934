//! The UDP underlay: tunnel packets (VXLAN's or Geneve's) through sockets of the host's kernel, superframes included.
//!
//! [`Underlay`] is the [`Sockets`] of all workers: for each of them one that receives on the tunnel's port, and several that
//! send, each from a source port of its own, so that flows spread over the paths and queues of the network between nodes. Among
//! the sockets that receive, the kernel chooses by addresses and ports (`SO_REUSEPORT`), so a flow stays with one worker; for that they
//! must all be there before the first packet. [`UdpPort`] is one worker's sockets as a port. Frames carry [`crate::frame::Outer`], and their
//! bytes begin at the tunnel header.
//!
//! * In: one call takes one datagram or a train of up to 128 that the kernel merged (`UDP_GRO`). Trains are
//!   parted into runs that TCP's and UDP's own rules allow to be merged, each of which becomes one superframe without
//!   its payload being copied.
//! * Out: superframes are cut here, headers from one template and payload in place, and handed to the kernel as one
//!   message with `UDP_SEGMENT`; so are consecutive small frames of the same length.
//!
//! The outer UDP checksum is the kernel's business and always on: packets without one are never merged by a receiver.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::sockopt;
use socket2::{Domain, Protocol, SockAddr, SockFilter, Socket, Type};
use weft_encap::format::Format;

use crate::frame::Frame;
use crate::pool::Pool;
use crate::port::sys::message;
use crate::port::{Batch, Capabilities, Port, PortId, Queue, Received};
use crate::stats::Stats;

mod receive;
pub(super) mod transmit;

/// Length of the tunnel header that frames of this port begin with; received ones of Geneve's may have options behind it.
pub const TUNNEL_HEADER: usize = weft_encap::vxlan::VXLAN_LEN;

/// Socket buffers: the default holds about three superframes.
pub(super) const SOCKET_BUFFER: usize = 16 << 20;

/// Sockets of the underlay, bound and ready. See the module's essay.
#[derive(Debug)]
pub struct Underlay {
    local: SocketAddr,
    sockets: Vec<Sockets>,
}

/// One worker's sockets of the underlay.
#[derive(Debug)]
pub struct Sockets {
    format: Format,
    peer_port: u16,
    receive: OwnedFd,
    transmit: Vec<OwnedFd>,
    fragmenting: OwnedFd,
}

impl Underlay {
    /// Opens, in the current namespace, the socket that receives at `local` and as many that send from its address, for one worker.
    ///
    /// # Errors
    /// The kernel's: `EADDRINUSE` if the port is taken (by a VXLAN device, for example), `ENOPROTOOPT` if the kernel does not know
    /// `UDP_GRO`. An address that this node does not have yet is none: the sockets work as soon as it has.
    pub fn open(local: SocketAddr, transmit_sockets: usize) -> io::Result<Underlay> {
        Underlay::open_for(1, local, transmit_sockets)
    }

    /// The same for several workers.
    ///
    /// # Errors
    /// As for [`Underlay::open`].
    pub fn open_for(workers: usize, local: SocketAddr, transmit_sockets: usize) -> io::Result<Underlay> {
        let first = open_receive(local, false)?;
        let local = first.local_addr()?.as_socket().unwrap_or(local);
        // Only after the first has bound: among those that allow it from the beginning would also be another weftd's.
        first.set_reuse_port(true)?;
        let others = (1..workers).map(|_| open_receive(local, true));
        Underlay::of(local, std::iter::once(Ok(first)).chain(others), transmit_sockets)
    }

    /// The same beside sockets that this process has there already, to take their place.
    ///
    /// # Errors
    /// As for [`Underlay::open`].
    pub fn open_beside(workers: usize, local: SocketAddr, transmit_sockets: usize) -> io::Result<Underlay> {
        Underlay::of(local, (0..workers).map(|_| open_receive(local, true)), transmit_sockets)
    }

    fn of(
        local: SocketAddr,
        receiving: impl Iterator<Item = io::Result<Socket>>,
        transmit_sockets: usize,
    ) -> io::Result<Underlay> {
        let sockets = receiving.map(|receive| {
            let receive = receive?.into();
            let transmit = (0..transmit_sockets.max(1)).map(|_| open_transmit(local).map(OwnedFd::from));
            Ok(Sockets {
                format: Format::Vxlan,
                peer_port: local.port(),
                receive,
                transmit: transmit.collect::<io::Result<_>>()?,
                fragmenting: open_fragmenting(local)?.into(),
            })
        });
        Ok(Underlay { local, sockets: sockets.collect::<io::Result<_>>()? })
    }

    /// The same for what is wrapped in another format, Geneve, than in VXLAN.
    #[must_use]
    pub fn carrying(mut self, format: Format) -> Underlay {
        self.sockets.iter_mut().for_each(|sockets| sockets.format = format);
        self
    }

    /// Where it receives. Peers are reached at the same port.
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// The sockets, for one worker each.
    pub fn into_sockets(self) -> Vec<Sockets> {
        self.sockets
    }
}

/// A socket that receives at `local`, alone or beside others.
fn open_receive(local: SocketAddr, shared: bool) -> io::Result<Socket> {
    let socket = open(local, shared)?;
    message::set_receive_options(&socket)?;
    match local {
        SocketAddr::V4(_) => socket.set_recv_tos_v4(true)?,
        SocketAddr::V6(_) => socket.set_recv_tclass_v6(true)?,
    }
    force_receive_buffer(&socket)?;
    Ok(socket)
}

fn open(local: SocketAddr, shared: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(local), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    // "Probe" neither fragments, which the default does silently, nor believes a path MTU that anyone may have claimed.
    match local {
        SocketAddr::V4(_) => sockopt::set_ip_mtu_discover(&socket, sockopt::Ipv4PathMtuDiscovery::PROBE)?,
        SocketAddr::V6(_) => {
            socket.set_only_v6(true)?;
            sockopt::set_ipv6_mtu_discover(&socket, sockopt::Ipv6PathMtuDiscovery::PROBE)?;
        }
    }
    bind_early(&socket, local)?;
    socket.set_reuse_port(shared)?;
    socket.bind(&SockAddr::from(local))?;
    Ok(socket)
}

/// Lets a socket be bound to an address that this machine does not have yet, or not at the moment: it works as soon as it has.
pub(super) fn bind_early(socket: &Socket, local: SocketAddr) -> io::Result<()> {
    match local {
        SocketAddr::V4(_) => socket.set_freebind_v4(true),
        SocketAddr::V6(_) => socket.set_freebind_v6(true),
    }
}

/// A socket with a source port of the kernel's choice, that takes nothing in.
fn open_transmit(mut local: SocketAddr) -> io::Result<Socket> {
    local.set_port(0);
    let socket = open(local, false)?;
    let drop_all = SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, 0);
    socket.attach_filter(&[drop_all])?;
    let forced = sockopt::set_socket_send_buffer_size_force(&socket, SOCKET_BUFFER);
    forced.or_else(|_| sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER))?;
    Ok(socket)
}

fn open_fragmenting(local: SocketAddr) -> io::Result<Socket> {
    let socket = open_transmit(local)?;
    allow_fragments(&socket, local.is_ipv4())?;
    Ok(socket)
}

/// What a socket sends may go in fragments from now on: made here where a path's own length demands it, and by routers of IPv4.
pub(super) fn allow_fragments(socket: &Socket, is_v4: bool) -> io::Result<()> {
    if is_v4 {
        return Ok(sockopt::set_ip_mtu_discover(socket, sockopt::Ipv4PathMtuDiscovery::DONT)?);
    }
    sockopt::set_ipv6_mtu_discover(socket, sockopt::Ipv6PathMtuDiscovery::DONT)?;
    // No router fragments IPv6, and each path carries what RFC 8200, section 5, says at least.
    message::set_fragment_size_v6(socket)
}

/// Beyond the administrator's limit if we may, up to it otherwise.
pub(super) fn force_receive_buffer(socket: &Socket) -> Result<(), Errno> {
    sockopt::set_socket_recv_buffer_size_force(socket, SOCKET_BUFFER)
        .or_else(|_| sockopt::set_socket_recv_buffer_size(socket, SOCKET_BUFFER))
}

/// A worker's sockets for packets that are too long for the path to their node and have to get there all the same: IPv6 inside
/// the tunnel demands 1280 bytes of any path (RFC 8200, section 5), and what is behind the tunnel cannot know why. The packet then
/// goes in fragments, as RFC 2473, section 7, has tunnels do; the kernel of the receiving node puts it together.
pub(super) struct Fragmenting {
    sender: transmit::Sender,
    aside: Queue,
}

impl Fragmenting {
    pub(super) fn new(sender: transmit::Sender) -> Fragmenting {
        Fragmenting { sender, aside: Queue::new() }
    }

    /// Sends what of the queue has to go in fragments, superframes cut, and leaves the rest.
    pub(super) fn transmit(&mut self, queue: &mut Queue, stats: &mut Stats) -> io::Result<()> {
        let is_long = |frame: &Frame| !frame.is_probe && frame.outer.is_some_and(|outer| outer.in_fragments);
        if !queue.iter().any(is_long) {
            return Ok(());
        }
        for _ in 0..queue.len() {
            let frame = queue.pop_front().expect("it is as long as that");
            if is_long(&frame) { self.aside.push_back(frame) } else { queue.push_back(frame) }
        }
        let sent = self.sender.transmit(&mut self.aside, stats);
        // What a broken socket leaves is the caller's to end.
        queue.extend(self.aside.drain(..));
        sent
    }
}

/// One worker's [`Sockets`] as a port.
pub struct UdpPort {
    socket: OwnedFd,
    receiver: receive::Receiver,
    sender: transmit::Sender,
    fragmenting: Fragmenting,
}

impl UdpPort {
    /// A port of that number. A packet inside the tunnel has at most `tunnel_mtu` bytes, its Ethernet header not
    /// counted.
    pub fn new(sockets: Sockets, id: PortId, tunnel_mtu: u32) -> UdpPort {
        let Sockets { format, peer_port, receive, transmit, fragmenting } = sockets;
        UdpPort {
            socket: receive,
            receiver: receive::Receiver::new(id, format, tunnel_mtu),
            sender: transmit::Sender::new(id, peer_port, transmit),
            fragmenting: Fragmenting::new(transmit::Sender::single(id, peer_port, fragmenting)),
        }
    }
}

impl Port for UdpPort {
    fn receive(&mut self, pool: &Pool, batch: &mut Batch, stats: &mut Stats) -> io::Result<Received> {
        self.receiver.receive(&self.socket, pool, batch, stats)
    }

    fn transmit(&mut self, queue: &mut Queue, stats: &mut Stats) -> io::Result<()> {
        self.fragmenting.transmit(queue, stats)?;
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

    fn gathers(&self) -> bool {
        true
    }

    fn kind(&self) -> &'static str {
        "udp"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drop_reason::DropReason;
    use crate::frame::{Frame, Outer};
    use crate::port::BATCH;
    use crate::port::memory::Packet;
    use crate::port::sample;
    use std::net::{IpAddr, Ipv4Addr, UdpSocket};
    use std::time::{Duration, Instant};

    const SENDER: PortId = PortId(1);
    const RECEIVER: PortId = PortId(2);

    struct Nodes {
        pool: Pool,
        sender: UdpPort,
        receiver: UdpPort,
        to: IpAddr,
        stats: Stats,
        queue: Queue,
    }

    /// Two nodes on the loopback device, of which one sends to the other.
    fn nodes() -> Nodes {
        let underlay = Underlay::open("127.0.0.1:0".parse().unwrap(), 4).unwrap();
        let to = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));
        let other = Underlay::open(SocketAddr::new(to, underlay.local().port()), 4).unwrap();
        Nodes {
            pool: Pool::new(512, 64).unwrap(),
            sender: UdpPort::new(underlay.into_sockets().remove(0), SENDER, 1450),
            receiver: UdpPort::new(other.into_sockets().remove(0), RECEIVER, 1450),
            to,
            stats: Stats::default(),
            queue: Queue::new(),
        }
    }

    impl Nodes {
        /// Queues a frame of port 9.
        fn push(&mut self, inner: &Packet, entropy: u16) {
            let packet = sample::tunnelled(inner);
            let mut frame = Frame::from_bytes(&packet.bytes, PortId(9), &self.pool).unwrap();
            frame.offload = packet.offload;
            frame.outer = Some(Outer { entropy, ..Outer::vxlan(self.to) });
            self.stats.received(&frame);
            self.queue.push_back(frame);
        }

        fn transmit(&mut self) {
            self.sender.transmit(&mut self.queue, &mut self.stats).unwrap();
            assert!(self.queue.is_empty());
            assert_eq!(self.stats.of(PortId(9)).in_flight(), 0);
        }

        /// Receives until as many frames, the merged ones counted, are there.
        fn receive(&mut self, count: u64) -> Vec<Frame> {
            let (mut frames, started) = (Vec::new(), Instant::now());
            while self.stats.of(RECEIVER).received < count {
                assert!(started.elapsed() < Duration::from_secs(5), "{:?}", self.stats.of(RECEIVER));
                let mut batch = Batch::new();
                self.receiver.receive(&self.pool, &mut batch, &mut self.stats).unwrap();
                frames.extend(batch);
            }
            frames
        }
    }

    #[test]
    fn flows_spread_over_workers_and_each_stays_with_one() {
        const FLOWS: u16 = 64;
        let mut nodes = nodes();
        let at = SocketAddr::new("127.0.0.4".parse().unwrap(), nodes.sender.sender.peer_port());
        let workers = Underlay::open_for(2, at, 1).unwrap().into_sockets();
        let mut workers: Vec<UdpPort> = workers.into_iter().map(|half| UdpPort::new(half, RECEIVER, 1450)).collect();
        let sockets = Underlay::open("127.0.0.1:0".parse().unwrap(), FLOWS.into()).unwrap().into_sockets().remove(0);
        nodes.sender = UdpPort::new(Sockets { peer_port: at.port(), ..sockets }, SENDER, 1450);
        nodes.to = at.ip();
        let mut worker_of: Vec<Vec<usize>> = vec![Vec::new(); FLOWS.into()];
        for _ in 0..3 {
            (0..FLOWS).for_each(|flow| nodes.push(&sample::udp4(100 + usize::from(flow), 0).0, flow));
            nodes.transmit();
        }
        let (mut arrived, started) = (0, Instant::now());
        while arrived < 3 * u32::from(FLOWS) {
            assert!(started.elapsed() < Duration::from_secs(5), "only {arrived} arrived");
            for (number, worker) in workers.iter_mut().enumerate() {
                let mut batch = Batch::new();
                worker.receive(&nodes.pool, &mut batch, &mut nodes.stats).unwrap();
                for frame in batch {
                    let len = sample::verified_payload(&frame.to_vec()[TUNNEL_HEADER..]).len();
                    worker_of[len - 100].push(number);
                    arrived += 1;
                }
            }
        }
        assert!(worker_of.iter().all(|seen| seen.len() == 3 && seen.iter().all(|worker| *worker == seen[0])));
        // All 64 with one of them is as likely as winning the lottery twice.
        assert!((0..2).all(|worker| worker_of.iter().any(|seen| seen[0] == worker)));
    }

    #[test]
    fn a_port_in_use_is_refused_also_for_several_workers() {
        let at = "127.0.0.5:0".parse().unwrap();
        for (first, second) in [(1, 1), (1, 2), (2, 1), (2, 2)] {
            let underlay = Underlay::open_for(first, at, 1).unwrap();
            let error = Underlay::open_for(second, underlay.local(), 1).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{first} {second}");
        }
    }

    #[test]
    fn an_address_that_this_machine_does_not_have_yet_can_be_bound_and_one_in_use_be_taken_over() {
        let early = Underlay::open("192.0.2.77:0".parse().unwrap(), 1).unwrap();
        Underlay::open_beside(1, early.local(), 1).unwrap();
        let v6 = Underlay::open("[2001:db8::77]:0".parse().unwrap(), 1).unwrap();
        assert_eq!(Underlay::open(v6.local(), 1).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn a_superframe_arrives_as_one_again() {
        let mut nodes = nodes();
        for (packet, payload) in [sample::tcp4(30_000, 1398), sample::tcp6(30_000, 1378), sample::udp4(30_000, 1400)] {
            nodes.push(&packet, 3);
            nodes.transmit();
            let segments = payload.len().div_ceil(packet.offload.gso.unwrap().size.into()) as u64;
            assert_eq!(nodes.stats.of(PortId(9)).sent, segments);
            let frames = nodes.receive(segments);
            let merged: Vec<u8> =
                frames.iter().flat_map(|frame| frame.to_vec()[frame.head().len()..].to_vec()).collect();
            assert_eq!(merged, payload);
            assert_eq!(frames.len(), 1, "the loopback device passes the train whole");
            assert_eq!(frames[0].offload.gso, packet.offload.gso);
            assert_eq!(frames[0].offload.partial, packet.offload.partial);
            assert_eq!(frames[0].to_vec(), sample::tunnelled(&packet).bytes);
            assert_eq!(frames[0].outer.unwrap().peer, IpAddr::V4(Ipv4Addr::LOCALHOST));
            nodes.stats = Stats::default();
        }
    }

    #[test]
    fn two_superframes_of_more_than_one_message_arrive_in_order() {
        let mut nodes = nodes();
        let (packet, payload) = sample::tcp4(65_400, 536);
        nodes.push(&packet, 3);
        nodes.push(&packet, 3);
        nodes.transmit();
        let frames = nodes.receive(2 * 123);
        let bytes: Vec<u8> = frames.iter().flat_map(|frame| frame.to_vec()[TUNNEL_HEADER + 54..].to_vec()).collect();
        assert_eq!(bytes, [&payload[..], &payload[..]].concat());
        assert_eq!(nodes.stats.of(RECEIVER).in_flight(), frames.len() as i64);
    }

    #[test]
    fn a_train_whose_last_frame_is_short_may_fill_the_buffer() {
        let mut nodes = nodes();
        // 44 full segments and one of a byte: with a last one of full length they would not fit a super buffer.
        let (packet, payload) = sample::tcp4(44 * 1_425 + 1, 1_425);
        nodes.push(&packet, 0);
        nodes.transmit();
        let frames = nodes.receive(45);
        assert_eq!(frames.len(), 1);
        assert_eq!(frames[0].to_vec()[TUNNEL_HEADER + 54..], payload);
    }

    #[test]
    fn frames_of_all_sizes_arrive_summed_and_in_order_per_flow() {
        let mut nodes = nodes();
        let lengths: Vec<usize> = (0..200).map(|index| [100, 100, 1400, 3, 0, 1400, 1400, 99][index % 8]).collect();
        for (index, len) in lengths.iter().enumerate() {
            nodes.push(&sample::udp4(*len, 0).0, index as u16 / 50);
        }
        nodes.transmit();
        assert_eq!(nodes.stats.of(PortId(9)).splits, 0);
        let frames = nodes.receive(200);
        let mut arrived: Vec<usize> = Vec::new();
        for frame in &frames {
            let bytes = frame.to_vec();
            match frame.offload.gso {
                None => arrived.push(sample::verified_payload(&bytes[TUNNEL_HEADER..]).len()),
                // Equal datagrams of one flow that followed one another.
                Some(gso) => {
                    let payload = &bytes[TUNNEL_HEADER + usize::from(gso.header_len)..];
                    payload.chunks(gso.size.into()).for_each(|chunk| arrived.push(chunk.len()));
                }
            }
        }
        assert_eq!(arrived.len(), 200);
        let mut sorted = (arrived, lengths);
        sorted.0.sort_unstable();
        sorted.1.sort_unstable();
        assert_eq!(sorted.0, sorted.1);
        drop(frames);
        nodes.receiver.receiver.forget();
        assert_eq!(nodes.pool.free(), (512, 64));
    }

    #[test]
    fn frames_that_do_not_fit_a_batch_wait_for_the_next() {
        let mut nodes = nodes();
        // Every second one belongs to another flow, so nothing is merged, but all are sent as one train.
        let mut packets = [sample::udp4(500, 0).0, sample::udp4(500, 0).0];
        packets[1].bytes[34] ^= 1;
        for index in 0..120 {
            nodes.push(&packets[index % 2], 0);
        }
        nodes.transmit();
        let frames = nodes.receive(120);
        assert_eq!(frames.len(), 120);
        assert!(frames.len() > BATCH);
    }

    #[test]
    fn without_buffers_datagrams_are_counted_and_taken() {
        let mut nodes = nodes();
        nodes.push(&sample::tcp4(30_000, 1398).0, 0);
        nodes.transmit();
        let all: Vec<_> = std::iter::from_fn(|| nodes.pool.large()).collect();
        let frames = nodes.receive(22);
        assert!(frames.is_empty());
        assert_eq!(nodes.stats.of(RECEIVER).dropped[DropReason::NoBuffer as usize], 22);
        drop(all);
    }

    #[test]
    fn an_oversize_segment_is_dropped_by_name_and_the_socket_still_segments() {
        let mut nodes = nodes();
        // The loopback device takes 65,536 bytes, a datagram 65,507.
        nodes.push(&sample::udp4(65_480, 0).0, 0);
        nodes.push(&sample::udp4(1_000, 0).0, 0);
        nodes.transmit();
        let counted = nodes.stats.of(PortId(9));
        assert_eq!((counted.sent, counted.dropped[DropReason::UnderlayMtu as usize]), (1, 1));
        assert!(nodes.sender.capabilities().udp);
    }

    #[test]
    fn a_node_that_cannot_be_reached_ends_its_frames_only() {
        let mut nodes = nodes();
        let reachable = nodes.to;
        nodes.push(&sample::udp4(10, 0).0, 0);
        // A socket bound to the loopback device's address cannot send to the outside.
        nodes.to = "192.0.2.1".parse().unwrap();
        nodes.push(&sample::tcp4(3_000, 1398).0, 0);
        nodes.to = reachable;
        nodes.push(&sample::udp4(11, 0).0, 0);
        nodes.transmit();
        let counted = nodes.stats.of(PortId(9));
        assert_eq!((counted.sent, counted.dropped[DropReason::UnderlayUnreachable as usize]), (2, 3));
        assert_eq!(nodes.receive(2).len(), 2);
    }

    #[test]
    fn a_socket_for_which_the_kernel_does_not_segment_sends_one_by_one_and_remembers() {
        let mut nodes = nodes();
        // The kernel refuses to segment for a socket without checksums, with EINVAL.
        nodes.sender.sender.without_checksums();
        let (packet, payload) = sample::tcp4(30_000, 1398);
        for _ in 0..2 {
            nodes.push(&packet, 1);
            nodes.push(&sample::udp4(100, 0).0, 1);
            nodes.transmit();
        }
        assert_eq!(nodes.stats.of(PortId(9)).sent, 2 * 23);
        assert!(!nodes.sender.capabilities().udp);
        let frames = nodes.receive(2 * 23);
        let arrived = frames.iter().flat_map(|frame| sample::verified_payload(&frame.to_vec()[TUNNEL_HEADER..]));
        let small = sample::payload(100);
        assert_eq!(arrived.collect::<Vec<u8>>(), [&payload[..], &small, &payload, &small].concat());
    }

    #[test]
    fn what_the_kernel_dropped_for_want_of_room_is_shown_apart() {
        let mut nodes = nodes();
        let (packet, _) = sample::tcp4(60_000, 1398);
        for _ in 0..2_000 {
            nodes.push(&packet, 0);
            nodes.transmit();
        }
        let mut batch = Batch::new();
        while nodes.receiver.receive(&nodes.pool, &mut batch, &mut nodes.stats).unwrap() == Received::More {
            batch.clear();
        }
        batch.clear();
        let received = nodes.stats.of(RECEIVER).received;
        assert!(received < 2_000 * 43, "everything fitted, so nothing was tested");
        nodes.push(&sample::udp4(10, 0).0, 0);
        nodes.transmit();
        nodes.receive(received + 1);
        assert!(nodes.stats.of(RECEIVER).overruns > 0);
    }

    /// What a kernel's VXLAN device behind a veth sends.
    fn receive_as_sent(nodes: &mut Nodes, inner: &Packet) -> Frame {
        let socket = UdpSocket::bind("127.0.0.3:0").unwrap();
        let to = SocketAddr::new(nodes.to, nodes.sender.sender.peer_port());
        socket.send_to(&sample::tunnelled(inner).bytes, to).unwrap();
        let count = nodes.stats.of(RECEIVER).received + 1;
        nodes.receive(count).remove(0)
    }

    #[test]
    fn a_partial_checksum_that_arrives_is_recognised_and_a_complete_one_is_not() {
        let mut nodes = nodes();
        for inner in [sample::tcp4(100, 0).0, sample::udp4(1_000, 0).0] {
            let frame = receive_as_sent(&mut nodes, &inner);
            assert_eq!(frame.offload, inner.offload);
        }
        let mut frame = Frame::from_bytes(&sample::udp4(1_000, 0).0.bytes, PortId(0), &nodes.pool).unwrap();
        frame.offload = sample::udp4(1_000, 0).0.offload;
        crate::port::software::fill_checksum(&mut frame, 0).unwrap();
        let inner = Packet { bytes: frame.to_vec(), ..Packet::default() };
        let frame = receive_as_sent(&mut nodes, &inner);
        assert_eq!(frame.offload.partial, None);
        assert!(frame.offload.verified);
    }

    #[test]
    fn a_superframe_that_was_never_cut_is_cut_at_the_tunnels_mtu() {
        let mut nodes = nodes();
        for (packet, size) in [(sample::tcp4(30_000, 0).0, 1450 - 40), (sample::tcp6(30_000, 0).0, 1450 - 60)] {
            let frame = receive_as_sent(&mut nodes, &packet);
            assert_eq!(frame.to_vec(), sample::tunnelled(&packet).bytes);
            assert_eq!(frame.offload.partial, packet.offload.partial);
            assert_eq!(frame.offload.gso.unwrap().size, size);
            assert_eq!(frame.merged(), 0);
        }
    }

    #[test]
    fn datagrams_too_short_for_anything_become_frames_to_be_refused() {
        let mut nodes = nodes();
        let socket = UdpSocket::bind("127.0.0.3:0").unwrap();
        let to = SocketAddr::new(nodes.to, nodes.sender.sender.peer_port());
        for len in 0..60 {
            socket.send_to(&vec![0; len], to).unwrap();
        }
        let frames = nodes.receive(60);
        assert_eq!(frames.len(), 59);
        assert_eq!(nodes.stats.of(RECEIVER).dropped[DropReason::TooShort as usize], 1);
    }
}
