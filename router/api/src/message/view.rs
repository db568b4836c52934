//! What people look at: the answers of the views.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{AttachmentKey, Bandwidth};

/// The daemon's state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// What is wrong, each with what to do about it. Empty when all is well.
    pub problems: Vec<String>,
    /// This node's name.
    pub node: String,
    /// Version of weftd.
    pub version: String,
    /// Process id of weftd.
    pub pid: u32,
    /// Seconds since weftd started.
    pub uptime: f64,
    /// `routed` or `bridged`.
    pub mode: String,
    /// The ranges from which this node gives addresses.
    pub ranges: Vec<String>,
    /// The gateway's addresses.
    pub gateways: Vec<IpAddr>,
    /// The gateway's MAC, the same on every node.
    pub gateway_mac: String,
    /// This node's VTEP MAC: the inner destination MAC that a kernel VXLAN peer must use.
    pub vtep_mac: String,
    /// The underlay: local address and UDP port, e.g. `10.200.0.1:8472`.
    pub underlay: String,
    /// What the underlay uses and why, e.g. `udp with UDP_SEGMENT and UDP_GRO`.
    pub underlay_kind: String,
    /// Threads of the data plane; 0 if weftd is too old to say.
    #[serde(default)]
    pub workers: usize,
    /// What pods get as ports unless they ask for a kind, and why, e.g. `tap`; empty if weftd is too old to say.
    #[serde(default)]
    pub port: String,
    /// Where this node knows its ranges and peers from, e.g. `file`; empty if weftd is too old to say.
    #[serde(default)]
    pub source: String,
    /// This node's own interface in the pod network; absent if there is none, or if weftd is too old to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_port: Option<HostPortInfo>,
    /// How packets of pods leave the cluster in the node's name; none if they do not.
    #[serde(default)]
    pub masquerade: Option<MasqueradeInfo>,
    /// What other nodes are sent by unless their entries say otherwise, as in the configuration; nothing from a weftd that is too old to say.
    #[serde(default)]
    pub encapsulation: String,
    /// Network identifier of VXLAN and Geneve.
    pub vni: u32,
    /// MTU of pods in bytes.
    pub mtu: u32,
    /// MTU of the underlay in bytes.
    pub underlay_mtu: u32,
    /// Number of pods attached.
    pub pods: usize,
    /// Number of peers.
    pub peers: usize,
    /// Addresses leased, and how many there are to give, per range.
    pub leases: Vec<RangeUse>,
    /// Epoch of the tables in force.
    pub epoch: u64,
    /// Sums over all ports.
    pub counters: Counters,
    /// Buffers that hold no frame; absent if weftd is too old to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free: Option<FreeBuffers>,
}

/// This node's own interface in the pod network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPortInfo {
    /// Its name, e.g. `weft0`.
    pub ifname: String,
    /// Its MAC.
    pub mac: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Kernel routes that lead to it.
    pub routes: usize,
    /// The `rtm_protocol` that these carry.
    pub protocol: u8,
    /// Conversations that it brought, and whose replies have to go back by it.
    #[serde(default)]
    pub flows: usize,
    /// Such conversations that were forgotten to make room (`limits.host_flows`).
    #[serde(default)]
    pub evicted: u64,
}

/// How packets of pods leave the cluster in the node's name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MasqueradeInfo {
    /// The interfaces, each with the addresses that packets leave as.
    pub ways: Vec<String>,
    /// The reserved ports, first and last.
    pub ports: (u16, u16),
    /// Conversations.
    pub sessions: usize,
    /// How many there can be.
    pub limit: usize,
    /// Addresses of pods that have any.
    pub pods: usize,
    /// Ports that are taken where fewest are left: towards one destination for TCP, in all for UDP and pings.
    pub fullest: u32,
    /// Conversations of pods that had more than half of the ports that were ended for others.
    pub taken_back: u32,
}

/// A conversation that leaves the cluster in the node's name. Ports are the identifiers of pings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NatInfo {
    /// `tcp`, `udp` or `icmp`.
    pub protocol: String,
    /// The pod's address.
    pub inside: IpAddr,
    /// The pod's port.
    pub inside_port: u16,
    /// The node's address.
    pub outside: IpAddr,
    /// The reserved port.
    pub outside_port: u16,
    /// The other side's address.
    pub remote: IpAddr,
    /// The other side's port; 0 for pings.
    pub remote_port: u16,
    /// `open`, `unanswered`, or `over` while a TCP connection's port rests.
    pub state: String,
    /// Seconds since it began.
    pub age: f64,
    /// Seconds since its last packet.
    pub idle: f64,
}

/// Buffers of all workers that hold no frame. When nothing is in flight there are as many as ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreeBuffers {
    /// Small ones, for headers and short frames.
    pub chunks: usize,
    /// Large ones, for payload.
    pub supers: usize,
    /// How many workers have the small ones in huge pages.
    #[serde(default)]
    pub huge_pages: usize,
}

/// How full a range is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RangeUse {
    /// The range, CIDR.
    pub range: String,
    /// Addresses leased.
    pub leased: u64,
    /// Addresses that were freed and are given again only when nothing else is left; 0 if weftd is too old to say.
    #[serde(default)]
    pub resting: u64,
    /// Addresses that are never given, beside `size`; 0 if weftd is too old to say.
    #[serde(default)]
    pub reserved: u64,
    /// Addresses that can be leased in all; saturates at `u64::MAX`.
    pub size: u64,
}

/// The conservation of frames: `received + created = sent + dropped + merged`, exactly, once the workers are idle.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Frames that came in.
    pub received: u64,
    /// Bytes that came in.
    pub received_bytes: u64,
    /// Copies, replies, errors and splits made here.
    pub created: u64,
    /// Frames that left, of those that came in by this port or were made because of them.
    pub sent: u64,
    /// Bytes of those.
    pub sent_bytes: u64,
    /// Frames that ended here, by name in `drops`.
    pub dropped: u64,
    /// Frames that became part of a superframe.
    pub merged: u64,
}

/// A port of the router.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortInfo {
    /// Its number.
    pub id: u32,
    /// `pod`, `underlay` or `host`.
    pub role: String,
    /// `tap`, `xdp`, `udp`, `memory`.
    pub kind: String,
    /// `up`, or why not.
    pub state: String,
    /// The pod's container id, the underlay's address, or `this node`.
    pub name: String,
    /// Name of the interface in the pod or of the host port; empty for the underlay.
    pub ifname: String,
    /// The MAC of that interface; empty for the underlay.
    pub mac: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// What the pod may send and receive; absent if that is not limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Bandwidth>,
    /// Offloads in use, e.g. `csum tso4 tso6 uso`.
    pub offloads: String,
    /// The worker that receives from it, counted from 0; absent if all do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<usize>,
    /// What entered by this port and what became of it.
    pub counters: Counters,
    /// Frames written out by this port, whoever sent them.
    pub out: u64,
    /// Bytes written out by this port.
    pub out_bytes: u64,
    /// Drops of frames that entered by this port, by name.
    pub drops: BTreeMap<String, u64>,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteInfo {
    /// Destination, CIDR.
    pub destination: String,
    /// `local`, `gateway`, `host` (this node's kernel) or the node's name.
    pub via: String,
    /// The node's underlay address, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub underlay: Option<IpAddr>,
}

/// An entry of the forwarding database.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FdbInfo {
    /// The MAC.
    pub mac: String,
    /// Where it is: `port 3` or `node n2`.
    pub at: String,
    /// `static` (a local pod or the gateway) or `learned`.
    pub kind: String,
    /// Seconds since it was last seen; 0 for static ones.
    pub age: f64,
}

/// A neighbour that the router answers for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NeighbourInfo {
    /// Its address.
    pub address: IpAddr,
    /// Its MAC.
    pub mac: String,
    /// `port 3` or `gateway`.
    pub at: String,
}

/// A flow in the cache, one direction.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FlowInfo {
    /// `tcp`, `udp`, `icmp`, or the protocol's number.
    pub protocol: String,
    /// Source address.
    pub source: IpAddr,
    /// Source port; 0 if the protocol has none.
    pub source_port: u16,
    /// Destination address.
    pub destination: IpAddr,
    /// Destination port; 0 if the protocol has none.
    pub destination_port: u16,
    /// Where it enters: `port 3` or `node n2`.
    pub from: String,
    /// Where it goes: `port 3` or `node n2`.
    pub to: String,
    /// Frames forwarded.
    pub frames: u64,
    /// Bytes forwarded.
    pub bytes: u64,
    /// Seconds since the last frame.
    pub age: f64,
}

/// A lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseInfo {
    /// The address.
    pub address: IpAddr,
    /// Whose it is.
    #[serde(flatten)]
    pub key: AttachmentKey,
    /// Whether a port serves it now.
    pub attached: bool,
}

/// A drop counter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropInfo {
    /// The port by which the frames entered.
    pub port: u32,
    /// That port's name.
    pub name: String,
    /// The reason's name.
    pub reason: String,
    /// What the reason means, in a sentence.
    pub meaning: String,
    /// Whether it is a loss to worry about (`false`: the frame ended here as it should, e.g. it was answered).
    pub is_loss: bool,
    /// How many frames.
    pub count: u64,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Its name.
    pub name: String,
    /// Its underlay address.
    pub underlay: IpAddr,
    /// The ranges whose addresses live there.
    pub ranges: Vec<String>,
    /// Its VTEP MAC.
    pub vtep_mac: String,
    /// Whether it is this node.
    pub local: bool,
    /// Frames sent to it.
    pub sent: u64,
    /// Frames received from it.
    pub received: u64,
    /// Seconds since the last frame from it; absent if there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_seen: Option<f64>,
    /// What frames to it are wrapped in: `vxlan`, `geneve`, `gre`, `gretap`, `ipip`; or `host-gw` if they are not.
    #[serde(default)]
    pub encapsulation: String,
    /// How frames to it leave: `udp`, `raw`, `uplink`, `xdp`; or why not by the latter.
    #[serde(default)]
    pub way: String,
    /// What asking it has shown; absent for this node, and if weftd is too old to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked: Option<WayInfo>,
}

/// The way to a node, as far as asking has shown.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WayInfo {
    /// `up`: it answers; `away`: it does not any more; `silent`: it never did, as who is no Weft; `unknown`: it was not asked, for
    /// pods have not spoken with it.
    pub state: String,
    /// Seconds since it is so.
    pub since: f64,
    /// The longest packet that pods send, in bytes.
    pub mtu: u32,
    /// The longest packet that arrives, as far as pods would send it; absent before there was an answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<u32>,
    /// The last round trip in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtt: Option<f64>,
    /// The median of the last 32.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtt_median: Option<f64>,
    /// The part of the questions that was lost lately, 0 to 1; absent before there was an answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// How often anything has changed.
    pub changes: u64,
    /// What the last change was, and why; empty if there was none.
    pub reason: String,
    /// Seconds since then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed: Option<f64>,
}
