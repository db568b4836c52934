//! The data-plane core without devices: frames go in as bytes and come out as bytes.
//!
//! [`Memory`] stands where the worker stands. It counts what leaves as the worker's ports do, and checks after each frame
//! what must hold always: conservation, and that every buffer is back in the pool.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use weft_encap::mac::Mac;
use weft_encap::offload::Offload;
use weft_encap::vxlan::Vni;
use weft_router::forward::Forwarder;
use weft_router::frame::{Body, Frame, Outer};
use weft_router::gather::gather;
use weft_router::pace::Limits;
use weft_router::pool::Pool;
use weft_router::port::memory::Packet;
use weft_router::port::{Batch, Outbox};
use weft_router::stats::PortStats;
use weft_router::tables::{Dhcp, Gateway, Mode, Node, NodeId, Pod, Via};
use weft_router::{DropReason, Instant, PortId, RouterConfig, Tables};

/// The port to the other nodes in [`tables`].
pub const UNDERLAY: PortId = PortId(0);
/// How many pods [`tables`] has, at ports 1 and up.
pub const PODS: u16 = 3;
/// How many other nodes.
pub const NODES: u16 = 2;
/// The gateway's MAC in [`tables`].
pub const GATEWAY: Mac = Mac([2, 0xee, 0, 0, 0, 1]);
/// The node's own inner MAC in [`tables`].
pub const VTEP: Mac = Mac([2, 0xdd, 0, 0, 0, 1]);
/// The gateway's IPv4 address.
pub const GATEWAY4: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 1);
/// The gateway's IPv6 address.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, 1);

/// A pod's MAC, by its port.
pub fn pod_mac(port: u16) -> Mac {
    Mac([2, 0, 0, 0, 1, port as u8])
}

/// A pod's IPv4 address, by its port.
pub fn pod4(port: u16) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, 1, 10 + port as u8)
}

/// A pod's IPv6 address, by its port.
pub fn pod6(port: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, 0x10 + port)
}

/// The underlay address of a node, counted from 0.
pub fn node_underlay(node: u16) -> IpAddr {
    Ipv4Addr::new(10, 200, 0, 2 + node as u8).into()
}

/// The inner MAC of a node.
pub fn node_vtep(node: u16) -> Mac {
    Mac([2, 0xdd, 0, 0, 0, 2 + node as u8])
}

/// MAC of a pod on a node.
pub fn remote_mac(node: u16, pod: u16) -> Mac {
    Mac([2, 0, 0, 0, 2 + node as u8, pod as u8])
}

/// IPv4 address of a pod on a node.
pub fn remote4(node: u16, pod: u16) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, 2 + node as u8, 10 + pod as u8)
}

/// IPv6 address of a pod on a node.
pub fn remote6(node: u16, pod: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0x244, 2 + node, 0, 0, 0, 0x10 + pod)
}

/// Tables of a node with [`PODS`] pods and [`NODES`] others.
pub fn tables(mode: Mode) -> Tables {
    let mut tables = Tables::empty(Gateway { mac: GATEWAY, ipv4: Some(GATEWAY4), ipv6: Some(GATEWAY6) });
    tables.epoch = 1;
    tables.mode = mode;
    tables.vni = Vni::new(1).expect("1 fits");
    tables.vtep_mac = VTEP;
    tables.tunnel_mtu = 1450;
    tables.add_underlay(UNDERLAY);
    for node in 0..NODES {
        let ranges = [format!("10.244.{}.0/24", 2 + node), format!("fd00:10:244:{}::/64", 2 + node)];
        let ranges = ranges.map(|range| range.parse().expect("a prefix")).to_vec();
        tables.add_node(NodeId(node), Node::new(node_underlay(node), node_vtep(node), ranges));
    }
    tables.add_route("10.244.1.0/24".parse().expect("a prefix"), Via::Local);
    tables.add_route("fd00:10:244:1::/64".parse().expect("a prefix"), Via::Local);
    for port in 1..=PODS {
        let pod = Pod {
            mac: pod_mac(port),
            ipv4: vec![pod4(port)],
            ipv6: vec![pod6(port)],
            mtu: 1450,
            limits: Limits::default(),
            dhcp: Dhcp::default(),
        };
        tables.add_pod(PortId(port), pod);
    }
    tables
}

/// A frame to be forwarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input {
    /// The port by which it comes in.
    pub port: PortId,
    /// Its bytes; from the underlay, the tunnel header first.
    pub bytes: Vec<u8>,
    /// What is still to be done to it.
    pub offload: Offload,
    /// Who sent it, if it is from the underlay.
    pub outer: Option<Outer>,
    /// How many bytes lie in the frame's head at most; the rest is its body.
    pub head: usize,
}

impl Input {
    /// From a pod.
    pub fn pod(port: u16, bytes: Vec<u8>) -> Input {
        Input { port: PortId(port), bytes, offload: Offload::default(), outer: None, head: usize::MAX }
    }

    /// From any address in the underlay, behind any tunnel header.
    pub fn underlay(peer: IpAddr, tunnel: [u8; 8], inner: &[u8]) -> Input {
        let bytes = [&tunnel[..], inner].concat();
        Input { outer: Some(Outer::vxlan(peer)), ..Input::pod(0, bytes) }
    }

    /// From a member node.
    pub fn node(node: u16, inner: &[u8]) -> Input {
        Input::underlay(node_underlay(node), crate::frames::vxlan(1), inner)
    }
}

/// A frame that left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// By which port.
    pub port: PortId,
    /// Its bytes; for the underlay, the tunnel header first.
    pub bytes: Vec<u8>,
    /// What is still to be done to it.
    pub offload: Offload,
    /// To whom, if it goes to the underlay.
    pub outer: Option<Outer>,
}

impl Output {
    /// The Ethernet frame, without the tunnel header.
    pub fn inner(&self) -> &[u8] {
        if self.outer.is_some() { &self.bytes[8..] } else { &self.bytes }
    }

    /// Its destination MAC.
    pub fn dst(&self) -> Mac {
        Mac(*self.inner().first_chunk().expect("a frame has an Ethernet header"))
    }

    /// Its source MAC.
    pub fn src(&self) -> Mac {
        Mac(*self.inner()[6..].first_chunk().expect("a frame has an Ethernet header"))
    }
}

/// What became of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// What left, ordered by port.
    pub sent: Vec<Output>,
    /// What ended, by name.
    pub ended: Vec<DropReason>,
}

/// The core. See the module's essay.
pub struct Memory {
    /// The forwarder itself.
    pub forwarder: Forwarder,
    /// Its tables.
    pub tables: Tables,
    /// The time it is given.
    pub now: Instant,
    pool: Pool,
    out: Outbox,
}

const CHUNKS: u32 = 256;
const SUPERS: u32 = 8;

impl Memory {
    /// A core that knows nothing yet, with a small flow cache so that its limits are met.
    pub fn new(tables: Tables) -> Memory {
        let config = RouterConfig { flows: 256, fdb_limit: 64, seed: 7, ..RouterConfig::default() };
        Memory::of(Forwarder::new(&config), tables)
    }

    /// One around this forwarder.
    pub fn of(forwarder: Forwarder, tables: Tables) -> Memory {
        let pool = Pool::new(CHUNKS, SUPERS).expect("there is memory for a small pool");
        Memory { forwarder, tables, now: Instant(1_000_000_000_000), pool, out: Outbox::new() }
    }

    /// Forwards one frame.
    pub fn feed(&mut self, input: &Input) -> Outcome {
        let before = self.forwarder.stats().of(input.port);
        let frame = self.frame(input);
        self.forwarder.stats().received(&frame);
        self.forwarder.forward(frame, &self.tables, self.now, &self.pool, &mut self.out);
        let sent = self.drain();
        let after = self.forwarder.stats().of(input.port);
        self.check(input, &after);
        Outcome { sent, ended: ended(&before, &after) }
    }

    /// Forwards what lies in one vector of a port, after segments of one stream were gathered, as the worker does.
    pub fn feed_together(&mut self, port: PortId, packets: &[Packet]) -> Vec<Output> {
        let mut batch = Batch::new();
        for packet in packets {
            let mut frame = Frame::from_bytes(&packet.bytes, port, &self.pool).expect("there are free buffers");
            (frame.offload, frame.outer) = (packet.offload, packet.outer);
            self.forwarder.stats().received(&frame);
            batch.push(frame);
        }
        gather(&mut batch, &self.pool, self.forwarder.stats());
        self.forwarder.forward_all(&mut batch.drain(..), &self.tables, self.now, &self.pool, &mut self.out);
        let sent = self.drain();
        let stats = self.forwarder.stats().of(port);
        assert_eq!(stats.in_flight(), 0, "frames are not conserved after {packets:?}");
        assert_eq!(self.pool.free(), (CHUNKS as usize, SUPERS as usize), "a buffer is lost after {packets:?}");
        sent
    }

    /// Counters of a port.
    pub fn stats(&mut self, port: PortId) -> PortStats {
        self.forwarder.stats().of(port)
    }

    fn frame(&self, input: &Input) -> Frame {
        let (mut chunk, start) = self.pool.chunk().expect("all buffers are free between two frames");
        let room = (chunk.len() - start).min(input.head);
        let (head, body) = input.bytes.split_at(input.bytes.len().min(room));
        chunk[start..start + head.len()].copy_from_slice(head);
        let mut frame = Frame::new(chunk, start, head.len(), input.port);
        if !body.is_empty() {
            let mut buffer = self.pool.large().expect("all buffers are free between two frames");
            buffer.bytes_mut().expect("a new buffer has one owner")[..body.len()].copy_from_slice(body);
            frame = frame.with_body(Body::one(buffer, 0, body.len()), 0);
        }
        frame.offload = input.offload;
        frame.outer = input.outer;
        frame
    }

    fn drain(&mut self) -> Vec<Output> {
        let mut sent = Vec::new();
        while let Some(port) = self.out.touched() {
            while let Some(frame) = self.out.queue(port).pop_front() {
                sent.push(Output { port, bytes: frame.to_vec(), offload: frame.offload, outer: frame.outer });
                self.forwarder.stats().sent(frame, port, 1);
            }
        }
        sent.sort_by_key(|output| (output.port, output.outer.map(|outer| outer.peer)));
        sent
    }

    fn check(&self, input: &Input, stats: &PortStats) {
        assert_eq!(stats.in_flight(), 0, "frames are not conserved after {input:?}");
        assert_eq!(self.pool.free(), (CHUNKS as usize, SUPERS as usize), "a buffer is lost after {input:?}");
    }
}

fn ended(before: &PortStats, after: &PortStats) -> Vec<DropReason> {
    let mut ended = Vec::new();
    for reason in DropReason::ALL {
        let count = after.dropped[*reason as usize] - before.dropped[*reason as usize];
        ended.extend((0..count).map(|_| *reason));
    }
    ended
}
