//! A node without devices: the forwarder, its tables, and memory for frames.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use weft_encap::mac::Mac;
use weft_encap::offload::Offload;
use weft_encap::vxlan::{Vni, VxlanHeader};
use weft_encap::zerocopy::IntoBytes;
use weft_router::bridge::Fdb;
use weft_router::forward::{Forwarder, Memory};
use weft_router::frame::{Body, Frame, Outer};
use weft_router::pace::Limits;
use weft_router::pool::Pool;
use weft_router::port::sys::arena::Super;
use weft_router::port::{Batch, Outbox, PortId};
use weft_router::tables::{Dhcp, Gateway, Mode, Node, NodeId, Pod, Tables, Via};
use weft_router::{Instant, RouterConfig};

use crate::cpu_time::{clock_cost, cpu_time};
use crate::frames::{Ends, TCP_HEADERS};
use crate::ring::{self, RingPort, Worker};

/// Pods of the node; ports 1 and up.
pub const PODS: u16 = 100;
/// Frames in the rings at once: what is measured together.
pub const RING: u64 = 512;
/// Other nodes of the cluster.
pub const NODES: u16 = 500;
/// The one of them that the frames here come from and go to.
pub const FAR: NodeId = NodeId(NODES / 2);

const UNDERLAY: PortId = PortId(0);
const GATEWAY: Mac = Mac([0x02, 0, 0, 0, 0, 1]);
const VTEP: Mac = Mac([0x02, 0, 0, 0, 1, 0]);
/// VXLAN network identifier: that of [`Tables::empty`].
const VNI: u32 = 1;

/// What passes between two ringfuls: about as long as it takes to forward one.
const STEP: Duration = Duration::from_micros(16);

/// The node. See the module's essay.
pub struct Bed {
    worker: Worker,
    ports: Vec<RingPort>,
    tables: Arc<Tables>,
    /// What every frame with a body has in it.
    payload: Super,
    now: Instant,
}

/// A frame to be made again and again.
pub struct Template {
    /// Its head, tunnel header included.
    head: Vec<u8>,
    /// Bytes of payload behind it.
    body: usize,
    offload: Offload,
    outer: Option<Outer>,
    ingress: PortId,
}

impl Template {
    /// A frame that pod 1 sends.
    pub fn from_pod(bytes: &[u8], offload: Offload) -> Template {
        Template::new(&[], bytes, offload, None, PortId(1))
    }

    /// A frame that the node [`FAR`] sends through the tunnel.
    pub fn from_node(bytes: &[u8], offload: Offload) -> Template {
        let vni = Vni::new(VNI).expect("it fits 24 bits");
        let outer = Outer::vxlan(node_underlay(FAR));
        Template::new(VxlanHeader::new(vni).as_bytes(), bytes, offload, Some(outer), UNDERLAY)
    }

    fn new(tunnel: &[u8], bytes: &[u8], offload: Offload, outer: Option<Outer>, ingress: PortId) -> Template {
        // A superframe's payload lies in a body, as behind a TAP.
        let (head, body) = if offload.gso.is_some() { bytes.split_at(TCP_HEADERS) } else { (bytes, &[][..]) };
        Template { head: [tunnel, head].concat(), body: body.len(), offload, outer, ingress }
    }
}

impl Bed {
    /// A node that learns by itself.
    pub fn new(tables: Arc<Tables>, config: &RouterConfig) -> Bed {
        Bed::sharing(tables, Arc::new(Fdb::new(config.fdb_limit, config.fdb_age, config.seed)), config)
    }

    /// One worker of several, which share tables and learned MACs.
    pub fn sharing(tables: Arc<Tables>, fdb: Arc<Fdb>, config: &RouterConfig) -> Bed {
        let pool = Pool::new(2 * RING as u32, 1).expect("there is memory for buffers");
        let payload = pool.large().expect("one is free");
        let forwarder = Forwarder::sharing(Memory { fdb, ..Memory::new(config) }, config);
        let worker = Worker { forwarder, pool, out: Outbox::new(), batch: Batch::new() };
        let ports = (0..=PODS).map(|id| RingPort::new(PortId(id))).collect();
        Bed { worker, ports, tables, payload, now: START }
    }

    /// Takes `count` frames from receive ring to transmit ring (see [`crate::ring`]), of which the rings hold [`RING`] at once:
    /// those of `templates` in turn. `measured` is called for each ringful with the work that is meant; making the frames
    /// is outside of it.
    ///
    /// # Panics
    /// If not exactly `leaves` frames leave for each that comes: then something else was measured than meant.
    pub fn forward<'t>(
        &mut self,
        count: u64,
        leaves: u64,
        mut templates: impl Iterator<Item = &'t Template>,
        mut measured: impl FnMut(&mut dyn FnMut()),
    ) {
        let held = RING / leaves.max(1);
        let mut done = 0;
        while done < count {
            let size = (count - done).min(held);
            for _ in 0..size {
                let template = templates.next().expect("templates come without end");
                let frame = self.frame(template);
                self.ports[template.ingress.index()].rx.push(frame);
            }
            self.ports.iter_mut().for_each(|port| port.rx.reverse());
            measured(&mut || ring::run(&mut self.ports, &mut self.worker, &self.tables, self.now));
            let left: u64 = self.ports.iter().map(|port| port.tx.len() as u64).sum();
            assert_eq!(left, size * leaves, "frames that left, of {size}");
            self.ports.iter_mut().for_each(|port| port.tx.clear());
            self.now = self.now + STEP;
            done += size;
        }
    }

    /// CPU time of that, without what it costs to read the clock.
    pub fn time<'t>(&mut self, count: u64, leaves: u64, templates: impl Iterator<Item = &'t Template>) -> Duration {
        let (mut spent, mut readings) = (Duration::ZERO, 0);
        self.forward(count, leaves, templates, |work| {
            let start = cpu_time();
            work();
            spent += cpu_time() - start;
            readings += 1;
        });
        spent.saturating_sub(clock_cost() * readings)
    }

    fn frame(&self, template: &Template) -> Frame {
        let pool = &self.worker.pool;
        let mut frame = Frame::from_bytes(&template.head, template.ingress, pool).expect("a buffer is free");
        if template.body > 0 {
            frame = frame.with_body(Body::one(self.payload.share(), 0, template.body), 0);
        }
        (frame.offload, frame.outer) = (template.offload, template.outer);
        frame
    }
}

/// When each bed begins.
pub const START: Instant = Instant(1 << 40);

/// A node with its pods, and other nodes with a range of each family.
pub fn tables(mode: Mode, nodes: u16) -> Tables {
    let (ipv4, ipv6) = (Ipv4Addr::new(10, 1, 0, 1), Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 1));
    let mut tables = Tables::empty(Gateway { mac: GATEWAY, ipv4: Some(ipv4), ipv6: Some(ipv6) });
    (tables.epoch, tables.mode, tables.vtep_mac) = (1, mode, VTEP);
    tables.add_underlay(UNDERLAY);
    for number in 1..=PODS {
        let pod = Pod {
            mac: pod_mac(number),
            ipv4: vec![pod_v4(number)],
            ipv6: vec![pod_v6(number)],
            mtu: 1450,
            limits: Limits::default(),
            dhcp: Dhcp::default(),
        };
        tables.add_pod(PortId(number), pod);
    }
    for range in ["10.1.0.0/24", "fd00:1::/64"] {
        tables.add_route(range.parse().expect("a prefix"), Via::Local);
    }
    for id in (0..nodes).map(NodeId) {
        let ranges = [format!("{}/24", node_v4(id, 0)), format!("{}/64", node_v6(id, 0))];
        let ranges = ranges.map(|range| range.parse().expect("a prefix")).to_vec();
        tables.add_node(id, Node::new(node_underlay(id), VTEP, ranges));
    }
    tables
}

/// The family of a packet's addresses.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// From one pod to another of this node, by MAC.
pub fn neighbours(family: Family) -> Ends {
    let address = |number| match family {
        Family::V4 => pod_v4(number).into(),
        Family::V6 => pod_v6(number).into(),
    };
    Ends { src_mac: pod_mac(1), dst_mac: pod_mac(2), src: address(1), dst: address(2) }
}

/// From a pod to one of another node, by the gateway.
pub fn outwards(family: Family) -> Ends {
    let dst = match family {
        Family::V4 => node_v4(FAR, 2).into(),
        Family::V6 => node_v6(FAR, 2).into(),
    };
    Ends { dst_mac: GATEWAY, dst, ..neighbours(family) }
}

/// The other way round, as it comes out of the tunnel.
pub fn inwards(family: Family) -> Ends {
    let out = outwards(family);
    Ends { src_mac: VTEP, dst_mac: VTEP, src: out.dst, dst: out.src }
}

/// From a pod to one of another node in a bridged segment, which has this number there.
pub fn across(number: u32) -> Ends {
    let [_, a, b, c] = (number + 1).to_be_bytes();
    Ends { dst_mac: far_mac(number), dst: Ipv4Addr::new(11, a, b, c).into(), ..neighbours(Family::V4) }
}

/// The other way round, as it comes out of the tunnel.
pub fn back(number: u32) -> Ends {
    let out = across(number);
    Ends { src_mac: out.dst_mac, dst_mac: out.src_mac, src: out.dst, dst: out.src }
}

/// MAC of a pod of another node in a bridged segment.
pub fn far_mac(number: u32) -> Mac {
    let [a, b, c, d] = number.to_be_bytes();
    Mac([0x02, 0xff, a, b, c, d])
}

/// Underlay address of another node.
pub fn node_underlay(id: NodeId) -> IpAddr {
    let [high, low] = id.0.to_be_bytes();
    Ipv4Addr::new(192, 168, high, low).into()
}

fn pod_mac(number: u16) -> Mac {
    let [high, low] = number.to_be_bytes();
    Mac([0x02, 0, 0, 1, high, low])
}

fn pod_v4(number: u16) -> Ipv4Addr {
    Ipv4Addr::new(10, 1, 0, number as u8 + 1)
}

fn pod_v6(number: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 1, number)
}

fn node_v4(id: NodeId, host: u8) -> Ipv4Addr {
    let [high, low] = id.0.to_be_bytes();
    Ipv4Addr::new(10, 2 + high, low, host)
}

fn node_v6(id: NodeId, host: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 2, 0, id.0, 0, 0, 0, host)
}
