//! Where a frame goes and what is rewritten on the way: the decision.
//!
//! A [`Path`] is a value: it says everything that will happen to a frame and changes nothing. What has to be remembered when
//! the frame really goes that way is a [`Commit`].

use std::net::{IpAddr, Ipv6Addr};

use weft_encap::mac::Mac;

use crate::flow::{FlowKey, Signature};
use crate::port::PortId;
use crate::tables::NodeId;

/// Who sent a frame.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Sender {
    /// Whoever is behind this port: a pod, or this node itself.
    Port(PortId),
    /// Another node.
    Node(NodeId),
}

/// The next thing on a path.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Hop {
    /// A port: a pod's, or this node's own.
    Port(PortId),
    /// Another node, through the tunnel.
    Node(NodeId),
    /// Everyone in the segment but the sender.
    Flood {
        /// Whether copies go to local pods.
        ports: bool,
        /// Whether copies go to the other nodes.
        nodes: bool,
    },
    /// Back to the sender: the answer to a question about a neighbour.
    Reply(Reply),
    /// The router's own stack: pings to the gateway.
    Gateway,
    /// The router itself: another node's question about the way between the two, or its answer to one.
    Probe,
}

/// The answer to a question about a neighbour.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// ARP reply: the asked address is at this MAC.
    Arp(Mac),
    /// Neighbour advertisement.
    Advertisement {
        /// The asked address.
        target: Ipv6Addr,
        /// Its MAC.
        mac: Mac,
        /// Whether the target is a router, that is, the gateway.
        router: bool,
    },
}

/// What is rewritten in the frame's headers.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// New destination and source MAC, and TTL less one: the packet is routed. `None`: it is bridged, and not a byte changes.
    pub routed: Option<Macs>,
    /// Largest packet in bytes, L3 header included, that the hop takes.
    pub mtu: u32,
    /// Address and port of one side, and those that an ICMP error quotes, become others.
    pub translation: Option<Translation>,
}

impl Rewrite {
    /// Nothing is rewritten.
    pub fn bridged(mtu: u32) -> Rewrite {
        Rewrite { routed: None, mtu, translation: None }
    }

    /// New MACs, and a TTL less one.
    pub fn routed(macs: Macs, mtu: u32) -> Rewrite {
        Rewrite { routed: Some(macs), ..Rewrite::bridged(mtu) }
    }
}

/// Which address and port of a packet are replaced.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Side {
    /// The source: it leaves the cluster.
    Source,
    /// The destination: it is an answer.
    Destination,
}

/// The place of a translated conversation, and which of those that had it.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Handle {
    /// Its number.
    pub slot: u32,
    /// Its version; odd.
    pub version: u32,
}

/// What becomes of one side of a packet.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Which one.
    pub side: Side,
    /// Its new address.
    pub address: IpAddr,
    /// Its new port, or the identifier of a ping.
    pub port: u16,
    /// The conversation.
    pub handle: Handle,
}

/// Destination and source MAC.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Macs {
    /// Destination.
    pub dst: Mac,
    /// Source.
    pub src: Mac,
}

/// The decision about a frame.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Path {
    /// Where it goes.
    pub hop: Hop,
    /// What changes on the way.
    pub rewrite: Rewrite,
    /// A hash of the flow, for the outer source port.
    pub entropy: u16,
}

impl Path {
    /// A path on which the frame is not changed and of which no MTU is known.
    pub fn unchanged(hop: Hop) -> Path {
        Path { hop, rewrite: Rewrite::bridged(u32::MAX), entropy: 0 }
    }
}

/// What must be remembered once a frame took its path.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Commit {
    /// The sender's MAC was seen at this node.
    pub learn: Option<(Mac, NodeId)>,
    /// So many copies are charged to the ingress port's budget.
    pub copies: u32,
    /// What becomes of the flow cache.
    pub flow: FlowCommit,
    /// What it says about where its conversation began.
    pub entrance: Entrance,
    /// What becomes of the sessions of those that leave the cluster.
    pub masquerade: MasqueradeCommit,
}

/// What becomes of the sessions of those that leave the cluster.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub enum MasqueradeCommit {
    /// Nothing.
    #[default]
    None,
    /// One is opened, unless there is one by then.
    Open {
        /// As the pod sends it.
        inside: FlowKey,
        /// The node's address that it leaves as.
        outside: IpAddr,
        /// It does not leave, but goes to the outer port of another pod of this node.
        turns: bool,
    },
    /// A known one goes to the outer port of another pod of this node.
    Turn,
    /// Somebody else has this conversation, which is seen from the node: the kernel, or whoever it translates.
    Stranger(FlowKey),
}

/// Where a conversation began, as far as a packet of it says: by the host port, whose replies have to go back by it, or elsewhere. The
/// flow is the one that opened it.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub enum Entrance {
    /// It says nothing.
    #[default]
    Unknown,
    /// The host port brought the packet.
    Host {
        /// Whose it is.
        opening: FlowKey,
        /// Whether it opens a connection.
        first: bool,
    },
    /// It is a reply, which goes back by the host port.
    Reply(FlowKey),
    /// It was brought by the host port earlier, and begins anew elsewhere.
    Elsewhere(FlowKey),
}

/// What a flow's path has to do with the host port.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub enum Tie {
    /// Nothing, and that stays so.
    #[default]
    None,
    /// The host port brought it, and what is said in reply goes back by it.
    Brought,
    /// It is such a reply.
    Returns,
    /// Nothing, until the host port brings a packet of the same conversation.
    Free,
}

/// A look-up in the FDB that can be checked again later.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Learned {
    /// Where the MAC is.
    pub node: NodeId,
    /// Its place in the FDB.
    pub(crate) slot: u32,
    /// What stood there.
    pub(crate) word: u64,
}

/// What is remembered of a flow's first packet.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Where it went.
    pub path: Path,
    /// The learned MAC that this rests on, if it does.
    pub learned: Option<Learned>,
    /// Its frames teach the FDB where their source MAC is.
    pub teaches: bool,
    /// Epoch of the tables by which it was decided.
    pub epoch: u64,
    /// The FDB's version before it was asked.
    pub fdb_version: u64,
    /// What it has to do with the host port.
    pub tie: Tie,
    /// The version of what the host port brought, before that was asked.
    pub returns_version: u32,
}

/// What becomes of the flow cache.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub enum FlowCommit {
    /// Nothing: the frame belongs to no flow.
    #[default]
    None,
    /// A known flow was seen again; the slot of its entry.
    Seen(usize),
    /// A new flow, or one whose entry was stale; with its hash.
    Open(Signature, u64, Verdict),
}
