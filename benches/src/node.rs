//! A node without devices: the forwarder, its tables, and memory for frames.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use weft_encap::mac::Mac;
use weft_encap::offload::Offload;
use weft_encap::vxlan::VxlanHeader;
use weft_encap::zerocopy::IntoBytes;
use weft_router::forward::Forwarder;
use weft_router::frame::{Frame, Outer};
use weft_router::pool::Pool;
use weft_router::port::{Batch, Outbox, PortId};
use weft_router::tables::{Gateway, Node, NodeId, Pod, Tables, Via};
use weft_router::{Instant, RouterConfig};

use crate::cpu_time::{clock_cost, cpu_time};
use crate::frames::Ends;
use crate::ring::{self, RingPort, Worker};

/// Pods of the node; ports 1 and up.
pub const PODS: u16 = 100;
/// Frames in the rings at once: what is measured together.
pub const RING: u64 = 512;
/// Other nodes of the cluster.
pub const NODES: u16 = 500;

const UNDERLAY: PortId = PortId(0);
const GATEWAY: Mac = Mac([0x02, 0, 0, 0, 0, 1]);
const VTEP: Mac = Mac([0x02, 0, 0, 0, 1, 0]);

/// The node. See the module's essay.
pub struct Bed {
    worker: Worker,
    ports: Vec<RingPort>,
    tables: Tables,
    now: Instant,
}

/// A frame to be made again and again.
pub struct Template {
    /// Its bytes, tunnel header included.
    pub bytes: Vec<u8>,
    /// What is still to be done to it.
    pub offload: Offload,
    /// Who sent it, if another node did.
    pub outer: Option<Outer>,
    /// By which port it comes in.
    pub ingress: PortId,
}

impl Default for Bed {
    fn default() -> Bed {
        Bed::new()
    }
}

impl Bed {
    /// A node in routed mode.
    pub fn new() -> Bed {
        Bed::with_config(&RouterConfig::default())
    }

    /// The same with a flow cache that is small beside 65,536 flows in turn: each is a first packet.
    pub fn forgetful() -> Bed {
        Bed::with_config(&RouterConfig { flows: 1024, ..RouterConfig::default() })
    }

    fn with_config(config: &RouterConfig) -> Bed {
        let mut tables = Tables::empty(Gateway { mac: GATEWAY, ipv4: Some(Ipv4Addr::new(10, 1, 0, 1)), ipv6: None });
        tables.epoch = 1;
        tables.vtep_mac = VTEP;
        tables.add_underlay(UNDERLAY);
        for number in 1..=PODS {
            let pod = Pod { mac: pod_mac(number), ipv4: vec![pod_address(number)], ipv6: Vec::new(), mtu: 1450 };
            tables.add_pod(PortId(number), pod);
        }
        tables.add_route("10.1.0.0/24".parse().expect("a prefix"), Via::Local);
        for number in 0..NODES {
            let range = format!("{}/24", node_range(number)).parse().expect("a prefix");
            let node = Node { underlay: node_underlay(number), vtep_mac: VTEP, ranges: vec![range] };
            tables.add_node(NodeId(number), node);
        }
        let pool = Pool::new(2 * RING as u32, 128).expect("there is memory for buffers");
        let worker = Worker { forwarder: Forwarder::new(config), pool, out: Outbox::new(), batch: Batch::new() };
        let ports = (0..=PODS).map(|id| RingPort::new(PortId(id))).collect();
        Bed { worker, ports, tables, now: Instant(1 << 40) }
    }

    /// From one pod to another of this node, by MAC.
    pub fn neighbours() -> Ends {
        Ends { src_mac: pod_mac(1), dst_mac: pod_mac(2), src: pod_address(1), dst: pod_address(2) }
    }

    /// From a pod to one of another node, by the gateway.
    pub fn outwards() -> Ends {
        let [a, b, c, _] = node_range(NODES / 2).octets();
        Ends { src_mac: pod_mac(1), dst_mac: GATEWAY, src: pod_address(1), dst: Ipv4Addr::new(a, b, c, 2) }
    }

    /// The other way round, as it comes out of the tunnel.
    pub fn inwards() -> Ends {
        let out = Bed::outwards();
        Ends { src_mac: VTEP, dst_mac: VTEP, src: out.dst, dst: out.src }
    }

    /// A frame that pod 1 sends.
    pub fn from_pod(bytes: Vec<u8>, offload: Offload) -> Template {
        Template { bytes, offload, outer: None, ingress: PortId(1) }
    }

    /// A frame that the node behind [`Bed::inwards`] sends through the tunnel.
    pub fn from_node(&self, bytes: &[u8], offload: Offload) -> Template {
        let bytes = [VxlanHeader::new(self.tables.vni).as_bytes(), bytes].concat();
        let outer = Outer { peer: node_underlay(NODES / 2), entropy: 0, tos: 0 };
        Template { bytes, offload, outer: Some(outer), ingress: UNDERLAY }
    }

    /// Takes `count` frames from receive ring to transmit ring (see [`crate::ring`]), of which the rings hold [`RING`] at once: those
    /// of `templates` in turn. `measured` is called for each ringful with the work that is meant; making the packets is
    /// outside of it.
    ///
    /// # Panics
    /// If a frame is dropped: then something else was measured than meant. With `drops`, if one is not.
    pub fn forward<'t>(
        &mut self,
        count: u64,
        drops: bool,
        mut templates: impl Iterator<Item = &'t Template>,
        mut measured: impl FnMut(&mut dyn FnMut()),
    ) {
        let mut done = 0;
        while done < count {
            let size = (count - done).min(RING);
            for _ in 0..size {
                let template = templates.next().expect("templates come without end");
                let frame = self.frame(template);
                self.ports[template.ingress.index()].rx.push(frame);
            }
            self.ports.iter_mut().for_each(|port| port.rx.reverse());
            measured(&mut || ring::run(&mut self.ports, &mut self.worker, &self.tables, self.now));
            let left: u64 = self.ports.iter().map(|port| port.tx.len() as u64).sum();
            assert_eq!(left, if drops { 0 } else { size }, "frames that left, of {size}");
            self.ports.iter_mut().for_each(|port| port.tx.clear());
            done += size;
        }
    }

    /// CPU time of that, without what it costs to read the clock.
    pub fn time<'t>(&mut self, count: u64, drops: bool, templates: impl Iterator<Item = &'t Template>) -> Duration {
        let (mut spent, mut readings) = (Duration::ZERO, 0);
        self.forward(count, drops, templates, |work| {
            let start = cpu_time();
            work();
            spent += cpu_time() - start;
            readings += 1;
        });
        spent.saturating_sub(clock_cost() * readings)
    }

    fn frame(&self, template: &Template) -> Frame {
        let pool = &self.worker.pool;
        let mut frame = Frame::from_bytes(&template.bytes, template.ingress, pool).expect("a buffer is free");
        frame.offload = template.offload;
        frame.outer = template.outer;
        frame
    }
}

fn pod_mac(number: u16) -> Mac {
    let [high, low] = number.to_be_bytes();
    Mac([0x02, 0, 0, 1, high, low])
}

fn pod_address(number: u16) -> Ipv4Addr {
    Ipv4Addr::new(10, 1, 0, number as u8 + 1)
}

fn node_range(number: u16) -> Ipv4Addr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(10, 2 + high, low, 0)
}

fn node_underlay(number: u16) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(192, 168, high, low).into()
}
