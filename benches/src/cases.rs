//! The kinds of frames that are timed, and whose instructions and allocations are counted.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use weft_encap::arp::Arp;
use weft_encap::mac::Mac;
use weft_encap::offload::Offload;
use weft_encap::zerocopy::IntoBytes;
use weft_router::RouterConfig;
use weft_router::bridge::Fdb;
use weft_router::tables::Mode;

use crate::frames::{Ends, superframe, udp};
use crate::node::Family::{V4, V6};
use crate::node::{self, Bed, FAR, NODES, START, Template};

/// Flows among which frames alternate.
pub const FLOWS: u16 = 256;
/// Segments of a large superframe.
pub const SEGMENTS: usize = 44;

/// Flows of which the cache has forgotten each when its turn comes, and the cache's size.
const MANY_FLOWS: u16 = 16_384;
const FEW_ENTRIES: usize = 1024;

/// Frames of one kind, and a node that forwards them.
pub struct Case {
    bed: Bed,
    templates: Vec<Template>,
    /// Frames that leave for each that comes in.
    leaves: u64,
    turn: usize,
}

/// A name, and what it stands for.
pub type Named = (&'static str, fn() -> Case);

/// All kinds.
pub const ALL: &[Named] = &[
    ("switch/IPv4", || pod_sends(node::neighbours(V4))),
    ("switch/IPv6", || pod_sends(node::neighbours(V6))),
    ("switch/superframe", || superframes(node::neighbours(V4), Template::from_pod)),
    ("switch/first packet", || first_packets(node::neighbours(V4), Template::from_pod)),
    ("encapsulate/IPv4", || pod_sends(node::outwards(V4))),
    ("encapsulate/IPv6", || pod_sends(node::outwards(V6))),
    ("encapsulate/superframe", || superframes(node::outwards(V4), Template::from_pod)),
    ("encapsulate/first packet", || first_packets(node::outwards(V4), Template::from_pod)),
    ("encapsulate/bridged", || Case::new(bridged(), small(node::across(7), FLOWS, Template::from_pod), 1)),
    ("decapsulate/IPv4", || node_sends(node::inwards(V4))),
    ("decapsulate/IPv6", || node_sends(node::inwards(V6))),
    ("decapsulate/superframe", || superframes(node::inwards(V4), Template::from_node)),
    ("decapsulate/first packet", || first_packets(node::inwards(V4), Template::from_node)),
    ("decapsulate/bridged", || Case::new(bridged(), small(node::back(7), FLOWS, Template::from_node), 1)),
    ("end/refused", refused),
    ("end/answered", answered),
    ("flood/99 pods", flooded),
];

impl Case {
    /// Frames like `templates`, in turn; for each that comes in, so many leave.
    fn new(bed: Bed, templates: Vec<Template>, leaves: u64) -> Case {
        Case { bed, templates, leaves, turn: 0 }
    }

    /// Sends each flow once, so that what can be known is known and memory has been asked for.
    pub fn warm_up(&mut self) {
        let rounds = (FLOWS as usize * 4 / self.templates.len()).max(1);
        self.forward((rounds * self.templates.len()) as u64, |work| work());
    }

    /// See [`Bed::forward`].
    pub fn forward(&mut self, count: u64, measured: impl FnMut(&mut dyn FnMut())) {
        let turn = self.turn;
        self.turn = (turn + count as usize) % self.templates.len();
        let templates = self.templates.iter().cycle().skip(turn);
        self.bed.forward(count, self.leaves, templates, measured);
    }

    /// See [`Bed::time`].
    pub fn time(&mut self, count: u64) -> Duration {
        let turn = self.turn;
        self.turn = (turn + count as usize) % self.templates.len();
        let templates = self.templates.iter().cycle().skip(turn);
        self.bed.time(count, self.leaves, templates)
    }
}

/// Datagrams in the smallest frames, one for each of some flows.
pub fn small(ends: Ends, flows: u16, sent: fn(&[u8], Offload) -> Template) -> Vec<Template> {
    (0..flows).map(|flow| sent(&udp(ends, 1000 + flow), Offload::default())).collect()
}

fn routed() -> Bed {
    Bed::new(Arc::new(node::tables(Mode::Routed, NODES)), &RouterConfig::default())
}

/// A node in one segment with the others, that knows where one of their pods is.
fn bridged() -> Bed {
    let config = RouterConfig::default();
    let fdb = Arc::new(Fdb::new(config.fdb_limit, config.fdb_age, config.seed));
    fdb.learn(node::far_mac(7), FAR, START);
    Bed::sharing(Arc::new(node::tables(Mode::Bridged, NODES)), fdb, &config)
}

fn pod_sends(ends: Ends) -> Case {
    Case::new(routed(), small(ends, FLOWS, Template::from_pod), 1)
}

fn node_sends(ends: Ends) -> Case {
    Case::new(routed(), small(ends, FLOWS, Template::from_node), 1)
}

fn superframes(ends: Ends, sent: fn(&[u8], Offload) -> Template) -> Case {
    let template = |flow| {
        let (bytes, offload) = superframe(ends, 1000 + flow, SEGMENTS);
        sent(&bytes, offload)
    };
    Case::new(routed(), (0..FLOWS).map(template).collect(), 1)
}

/// Every frame opens a flow.
fn first_packets(ends: Ends, sent: fn(&[u8], Offload) -> Template) -> Case {
    let config = RouterConfig { flows: FEW_ENTRIES, ..RouterConfig::default() };
    let bed = Bed::new(Arc::new(node::tables(Mode::Routed, NODES)), &config);
    Case::new(bed, small(ends, MANY_FLOWS, sent), 1)
}

/// A pod speaks as somebody else.
fn refused() -> Case {
    let ends = Ends { src: Ipv4Addr::new(10, 9, 9, 9).into(), ..node::neighbours(V4) };
    Case::new(routed(), small(ends, FLOWS, Template::from_pod), 0)
}

/// A pod asks for the gateway's MAC.
fn answered() -> Case {
    Case::new(routed(), vec![question(Ipv4Addr::new(10, 1, 0, 1))], 1)
}

/// A pod asks for an address that nobody has: all pods of the node are asked.
fn flooded() -> Case {
    let config = RouterConfig { flood_rate: u32::MAX, ..RouterConfig::default() };
    let bed = Bed::new(Arc::new(node::tables(Mode::Routed, NODES)), &config);
    Case::new(bed, vec![question(Ipv4Addr::new(10, 1, 0, 250))], u64::from(node::PODS) - 1)
}

fn question(target: Ipv4Addr) -> Template {
    let ends = node::neighbours(V4);
    let std::net::IpAddr::V4(src) = ends.src else { panic!("{} is no IPv4 address", ends.src) };
    let arp = Arp::request(ends.src_mac, src, target);
    let mut bytes = [&Mac::BROADCAST.0[..], &ends.src_mac.0, &[0x08, 0x06], arp.as_bytes()].concat();
    bytes.resize(crate::frames::SMALL, 0);
    Template::from_pod(&bytes, Offload::default())
}
