//! The configuration file: one TOML document, checked as a whole.
//!
//! [`Config::read`] answers with a configuration that is valid by construction or with *everything* that is wrong,
//! each with line and key. It reads nothing but its arguments: what the machine looks like comes in as [`Host`].
//!
//! ```toml
//! node = "n1"
//! mode = "routed"                                   # or "bridged"
//! ranges = ["10.244.1.0/24", "fd00:10:244:1::/64"]  # what this node gives to pods
//!
//! [underlay]
//! address = "10.200.0.1"
//!
//! [[peers]]
//! name = "n2"
//! underlay = "10.200.0.2"
//! ranges = ["10.244.2.0/24", "fd00:10:244:2::/64"]
//! ```
//!
//! Optional: `workers` (by the number of CPUs, see [`default_workers`]), `port` (`"tap"`), `vni` (1), `mtu` (the underlay's less the encapsulation), `socket`, `state_dir`, `gateway` (routed: the
//! first address of the first range of each family; bridged: of the segment), `gateway_mac`, `vtep_mac` (made of node
//! name and underlay address), `segment` (bridged only, and needed there: the on-link prefixes), `underlay.port` (8472),
//! `underlay.device`, `underlay.kind` (`"udp"`), `underlay.vlan`, `underlay.encapsulation` (`"vxlan"`), `underlay.cross_subnet` (false),
//! `underlay.geneve_port` (6081), `peers.encapsulation`, `host_port` (`"weft0"`; another name, or `false` for none),
//! `peers.vtep_mac` (for kernel VXLAN peers), `[routes]` ([`Routes`]), `[masquerade]` ([`Masquerade`]), `[limits]`, `[leases]`, `[cni]`, `metrics.listen` (nothing is served without it), `[log]`.
//! With `[etcd]` ([`source`]) or `[kubernetes]` ([`kubernetes`]) ranges and peers come from there, and `underlay.address` is what the
//! source says, or the machine's main one, unless given.

pub mod check;
mod cni;
pub mod encapsulation;
pub mod kubernetes;
mod leases;
mod masquerade;
mod mtu;
pub mod reader;
pub mod routes;
mod seen;
pub mod source;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use weft_encap::format::Format;
use weft_encap::mac::Mac;
use weft_encap::vxlan::Vni;
use weft_router::tables::{Gateway, Mode};
use weft_router::{RouterConfig, snat};

use super::host::Host;
pub use cni::Cni;
pub use encapsulation::Encapsulation;
use kubernetes::DraftKubernetes;
pub use leases::Leases;
pub use masquerade::Masquerade;
use reader::{At, Problem, Reader, Section, Switch, TEXT};
pub use routes::Routes;
use source::{DraftEtcd, SourceConfig};

/// The UDP port of VXLAN as Linux and Flannel use it.
const DEFAULT_PORT: u16 = 8472;
/// What the host port is called unless configured.
const DEFAULT_HOST_PORT: &str = "weft0";
/// Where leases are kept unless configured.
const DEFAULT_STATE_DIR: &str = "/var/lib/weft";

/// IEEE 802.1Q: 0 is no VLAN, 4095 is reserved.
const MAX_VLAN: u16 = 4094;

/// Most workers: more than any node has CPUs to spare.
const MAX_WORKERS: usize = 64;

/// Most small buffers of a worker: 2 GiB.
const MAX_CHUNKS: u32 = 1 << 20;

/// Small buffers of each worker where veths are the rule: each holds some for the kernel to receive into, and a node has up to 110
/// pods unless the kubelet is told otherwise.
const XDP_CHUNKS: u32 = 16_384;

/// How many workers a node with so many CPUs has unless configured: one, or a quarter of the CPUs if that is more, up to eight. The pods
/// themselves, whose work is the larger part, need the others.
pub fn default_workers(cpus: usize) -> usize {
    (cpus / 4).clamp(1, 8)
}

/// What a pod gets as a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortKind {
    /// A TAP.
    Tap,
    /// A veth that leads to AF_XDP sockets.
    Xdp,
    /// What suits the node.
    Auto,
}

impl PortKind {
    /// How it is written.
    pub const FORM: &str = "one of \"tap\", \"xdp\", \"auto\"";
}

impl std::str::FromStr for PortKind {
    type Err = ();
    fn from_str(text: &str) -> Result<PortKind, ()> {
        match text {
            "tap" => Ok(PortKind::Tap),
            "xdp" => Ok(PortKind::Xdp),
            "auto" => Ok(PortKind::Auto),
            _ => Err(()),
        }
    }
}

/// How the tunnel's packets leave and enter the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnderlayKind {
    /// By sockets of the kernel.
    Udp,
    /// By AF_XDP sockets on the device.
    Xdp,
    /// By what is faster on that device.
    Auto,
}

impl UnderlayKind {
    /// How it is written.
    pub const FORM: &str = "one of \"udp\", \"xdp\", \"auto\"";
}

impl std::str::FromStr for UnderlayKind {
    type Err = ();
    fn from_str(text: &str) -> Result<UnderlayKind, ()> {
        match text {
            "udp" => Ok(UnderlayKind::Udp),
            "xdp" => Ok(UnderlayKind::Xdp),
            "auto" => Ok(UnderlayKind::Auto),
            _ => Err(()),
        }
    }
}

/// A valid configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// This node's name.
    pub node: String,
    /// How pods of different nodes see each other.
    pub mode: Mode,
    /// Threads of the data plane; by the number of CPUs unless given.
    pub workers: Option<usize>,
    /// What pods get as devices.
    pub port: PortKind,
    /// The name of this node's own interface in the pod network; `None` if there shall be none.
    pub host_port: Option<String>,
    /// VXLAN network identifier.
    pub vni: Vni,
    /// MTU of pods in bytes.
    pub mtu: u32,
    /// Whether the file says it. Otherwise it follows the underlay's device.
    pub mtu_is_given: bool,
    /// Where the API listens.
    pub socket: PathBuf,
    /// Where leases and tombstones are kept.
    pub state_dir: PathBuf,
    /// Where ranges and peers come from.
    pub source: SourceConfig,
    /// What this node gives to pods.
    pub ranges: Vec<IpNet>,
    /// What it gave to pods before the source gave it other ranges, and some still have.
    pub former: Vec<IpNet>,
    /// Bridged mode: what is on-link for pods. Empty in routed mode.
    pub segment: Vec<IpNet>,
    /// The router as pods see it.
    pub gateway: Gateway,
    /// Inner MAC of this node.
    pub vtep_mac: Mac,
    /// The network between nodes.
    pub underlay: Underlay,
    /// The other nodes.
    pub peers: Vec<Peer>,
    /// Which routes of a routing daemon are followed.
    pub routes: Routes,
    /// How packets of pods leave the cluster in the node's name, if they do.
    pub masquerade: Option<Masquerade>,
    /// Sizes and limits of the data plane.
    pub limits: Limits,
    /// Where metrics and probes are served, if they are.
    pub metrics: Option<SocketAddr>,
    /// What holds for the addresses that this node gives.
    pub leases: Leases,
    /// What the container runtime is told.
    pub cni: Cni,
    /// What is logged.
    pub log: Log,
}

/// The network between nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Underlay {
    /// This node's address in it.
    pub address: IpAddr,
    /// Whether the file says so.
    pub is_given: bool,
    /// UDP port of VXLAN.
    pub port: u16,
    /// UDP port of Geneve.
    pub geneve_port: u16,
    /// What packets to other nodes are wrapped in, unless their entry says otherwise.
    pub encapsulation: Encapsulation,
    /// Whether that is for nodes of other subnets only.
    pub cross_subnet: bool,
    /// The subnet of its address, if this machine has it.
    pub subnet: Option<IpNet>,
    /// What this node takes in: all that the layout can use, less what the kernel refused.
    pub formats: Vec<Format>,
    /// How its packets leave and enter the node.
    pub kind: UnderlayKind,
    /// The VLAN tag that frames by AF_XDP have, if the device is not a VLAN of the kernel's itself.
    pub vlan: Option<u16>,
    /// The device, if it was named.
    pub device: Option<String>,
    /// MTU of the device in bytes; if there is no such device yet, what the pods' MTU needs, or the usual one.
    pub mtu: u32,
    /// How much of it encapsulation takes at most.
    pub overhead: u32,
}

/// Another node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// Its underlay address.
    pub underlay: IpAddr,
    /// Its other addresses, as far as they are known: its kernel may answer pods from them.
    pub addresses: Vec<IpAddr>,
    /// What it gives to its pods.
    pub ranges: Vec<IpNet>,
    /// Its inner MAC.
    pub vtep_mac: Mac,
    /// What packets to it are wrapped in, if the file says so.
    pub encapsulation: Option<Encapsulation>,
    /// What it takes in, if it says so: see [`Underlay::word`].
    pub accepts: Option<Vec<String>>,
}

/// Sizes and limits of the data plane; see [`RouterConfig`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Learned MACs at most.
    pub fdb_limit: usize,
    /// Seconds for which a learned MAC is kept.
    pub fdb_age: u64,
    /// Flows in the cache.
    pub flows: usize,
    /// Conversations that the host port brought.
    pub host_flows: usize,
    /// Small buffers of each worker; by the kind of the pods' devices unless given.
    pub chunks: Option<u32>,
    /// Broadcast and multicast copies per second and port.
    pub flood_rate: u32,
    /// ICMP errors per second and port.
    pub icmp_rate: u32,
}

/// What is logged, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Log {
    /// From this level on.
    pub level: tracing::Level,
    /// As JSON lines.
    pub json: bool,
}

/// A configuration and what is odd about it.
#[derive(Debug)]
pub struct Checked {
    /// The configuration.
    pub config: Config,
    /// What is no error but should be known.
    pub warnings: Vec<Problem>,
}

/// Everything that is wrong with a configuration, by line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invalid(pub Vec<Problem>);

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self.0.iter().map(Problem::to_string).collect();
        f.write_str(&lines.join("\n"))
    }
}

impl std::error::Error for Invalid {}

impl Config {
    /// Reads and checks `text` against the machine that it is for.
    ///
    /// # Errors
    /// Everything that is wrong with it; if it is no TOML, that alone.
    pub fn read(text: &str, host: &Host) -> Result<Checked, Invalid> {
        let (mut reader, root) = Reader::new(text)?;
        let draft = Draft::read(&mut reader, root);
        let (config, warnings) = check::check(draft, &mut reader, host);
        match config {
            Some(config) if reader.problems.is_empty() => Ok(Checked { config, warnings }),
            _ => Err(reader.invalid()),
        }
    }

    /// The names of what differs between the two and cannot change while weftd runs.
    pub fn fixed_differences(&self, new: &Config) -> Vec<&'static str> {
        let fixed = [
            ("node", self.node != new.node),
            ("mode", self.mode != new.mode),
            ("workers", self.workers != new.workers),
            ("port", self.port != new.port),
            ("host_port", self.host_port != new.host_port),
            ("vni", self.vni != new.vni),
            ("socket", self.socket != new.socket),
            ("state_dir", self.state_dir != new.state_dir),
            (self.source.table(), self.source != new.source),
            ("segment", self.segment != new.segment),
            ("gateway", (self.gateway.ipv4, self.gateway.ipv6) != (new.gateway.ipv4, new.gateway.ipv6)),
            ("gateway_mac", self.gateway.mac != new.gateway.mac),
            ("vtep_mac", self.vtep_mac != new.vtep_mac && self.underlay.address == new.underlay.address),
            ("the family of underlay.address", self.underlay.address.is_ipv4() != new.underlay.address.is_ipv4()),
            ("underlay.port", self.underlay.port != new.underlay.port),
            ("underlay.geneve_port", self.underlay.geneve_port != new.underlay.geneve_port),
            ("underlay.kind", self.underlay.kind != new.underlay.kind),
            ("underlay.vlan", self.underlay.vlan != new.underlay.vlan),
            ("limits", self.limits != new.limits),
            ("masquerade's ports and sessions", self.snat_limits() != new.snat_limits()),
            ("metrics.listen", self.metrics != new.metrics),
            ("leases.boot_id", self.leases.boot_id != new.leases.boot_id),
            ("cni", self.cni != new.cni),
            ("log.format", self.log.json != new.log.json),
        ];
        fixed.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name).collect()
    }

    /// Sizes and limits of the data plane.
    pub fn sizes(&self) -> RouterConfig {
        let chunks = self.limits.chunks.or((self.port == PortKind::Xdp).then_some(XDP_CHUNKS));
        let huge_pages = self.port == PortKind::Xdp || self.underlay.kind == UnderlayKind::Xdp;
        let masquerade = self.snat_limits();
        RouterConfig { huge_pages, masquerade, ..Limits { chunks, ..self.limits }.into() }
    }

    fn snat_limits(&self) -> snat::Limits {
        self.masquerade.as_ref().map(|masquerade| masquerade.limits).unwrap_or_default()
    }

    /// The gateway of the family of `address`.
    pub fn gateway_for(&self, address: IpAddr) -> Option<IpAddr> {
        match address {
            IpAddr::V4(_) => self.gateway.ipv4.map(IpAddr::V4),
            IpAddr::V6(_) => self.gateway.ipv6.map(IpAddr::V6),
        }
    }
}

impl From<Limits> for RouterConfig {
    fn from(limits: Limits) -> RouterConfig {
        let defaults = RouterConfig::default();
        RouterConfig {
            fdb_limit: limits.fdb_limit,
            fdb_age: Duration::from_secs(limits.fdb_age),
            flows: limits.flows,
            host_flows: limits.host_flows,
            chunks: limits.chunks.unwrap_or(defaults.chunks),
            flood_rate: limits.flood_rate,
            icmp_rate: limits.icmp_rate,
            ..defaults
        }
    }
}

const PREFIX: &str = "a prefix such as 10.244.1.0/24 or fd00:10:244:1::/64";
const ADDRESS: &str = "an IPv4 or IPv6 address";
const MAC: &str = "a MAC address such as 0a:00:00:12:34:56";

/// What stands in the file: each value well-formed, nothing compared with anything yet.
struct Draft {
    node: Option<At<String>>,
    mode: Option<At<String>>,
    workers: Option<At<usize>>,
    port: Option<At<PortKind>>,
    host_port: Option<At<Switch>>,
    vni: Option<At<u32>>,
    mtu: Option<At<u32>>,
    socket: Option<At<PathBuf>>,
    state_dir: Option<At<PathBuf>>,
    etcd: Option<DraftEtcd>,
    kubernetes: Option<DraftKubernetes>,
    ranges: Vec<At<IpNet>>,
    segment: Vec<At<IpNet>>,
    gateway: Vec<At<IpAddr>>,
    gateway_mac: Option<At<Mac>>,
    vtep_mac: Option<At<Mac>>,
    underlay: Option<DraftUnderlay>,
    peers: Vec<DraftPeer>,
    routes: Routes,
    masquerade: Option<Masquerade>,
    limits: Limits,
    metrics: Option<At<SocketAddr>>,
    leases: Leases,
    cni: Cni,
    log: Log,
}

struct DraftUnderlay {
    section: reader::Place,
    address: Option<At<IpAddr>>,
    port: Option<At<u16>>,
    device: Option<At<String>>,
    kind: Option<At<UnderlayKind>>,
    vlan: Option<At<u16>>,
    encapsulation: Option<At<Encapsulation>>,
    cross_subnet: Option<At<bool>>,
    geneve_port: Option<At<u16>>,
}

struct DraftPeer {
    section: reader::Place,
    name: Option<At<String>>,
    underlay: Option<At<IpAddr>>,
    ranges: Vec<At<IpNet>>,
    vtep_mac: Option<At<Mac>>,
    encapsulation: Option<At<Encapsulation>>,
}

impl Draft {
    fn read<'t>(reader: &mut Reader<'t>, mut root: Section<'t>) -> Draft {
        let draft = Draft {
            node: reader.parsed(&mut root, "node", TEXT),
            mode: reader.parsed(&mut root, "mode", TEXT),
            workers: reader.number(&mut root, "workers", 1..=MAX_WORKERS),
            port: reader.parsed(&mut root, "port", PortKind::FORM),
            host_port: reader.switch(&mut root, "host_port", "the name of an interface, or false"),
            vni: reader.number(&mut root, "vni", 0..=Vni::MAX.get()),
            mtu: reader.number(&mut root, "mtu", 0..=u32::from(u16::MAX)),
            socket: reader.parsed(&mut root, "socket", "a path"),
            state_dir: reader.parsed(&mut root, "state_dir", "a path"),
            etcd: DraftEtcd::read(reader, &mut root),
            kubernetes: DraftKubernetes::read(reader, &mut root),
            ranges: reader.list(&mut root, "ranges", PREFIX),
            segment: reader.list(&mut root, "segment", PREFIX),
            gateway: reader.list(&mut root, "gateway", ADDRESS),
            gateway_mac: reader.parsed(&mut root, "gateway_mac", MAC),
            vtep_mac: reader.parsed(&mut root, "vtep_mac", MAC),
            underlay: DraftUnderlay::read(reader, &mut root),
            peers: DraftPeer::read_all(reader, &mut root),
            routes: Routes::read(reader, &mut root),
            masquerade: Masquerade::read(reader, &mut root),
            limits: Limits::read(reader, &mut root),
            metrics: read_metrics(reader, &mut root),
            leases: Leases::read(reader, &mut root),
            cni: Cni::read(reader, &mut root),
            log: Log::read(reader, &mut root),
        };
        reader.finish(root);
        draft
    }
}

fn read_metrics<'t>(reader: &mut Reader<'t>, root: &mut Section<'t>) -> Option<At<SocketAddr>> {
    let mut section = reader.table(root, "metrics")?;
    let listen = reader.parsed(&mut section, "listen", "an address and a port, such as 127.0.0.1:9474 or [::]:9474");
    reader.finish(section);
    listen
}

impl DraftUnderlay {
    fn read<'t>(reader: &mut Reader<'t>, root: &mut Section<'t>) -> Option<DraftUnderlay> {
        let mut section = reader.table(root, "underlay")?;
        let draft = DraftUnderlay {
            section: section.missing("address"),
            address: reader.parsed(&mut section, "address", ADDRESS),
            port: reader.number(&mut section, "port", 1..=u16::MAX),
            device: reader.parsed(&mut section, "device", TEXT),
            kind: reader.parsed(&mut section, "kind", UnderlayKind::FORM),
            vlan: reader.number(&mut section, "vlan", 1..=MAX_VLAN),
            encapsulation: reader.parsed(&mut section, "encapsulation", Encapsulation::FORM),
            cross_subnet: reader.boolean(&mut section, "cross_subnet"),
            geneve_port: reader.number(&mut section, "geneve_port", 1..=u16::MAX),
        };
        reader.finish(section);
        Some(draft)
    }
}

impl DraftPeer {
    fn read_all<'t>(reader: &mut Reader<'t>, root: &mut Section<'t>) -> Vec<DraftPeer> {
        let sections = reader.tables(root, "peers");
        let read = |mut section: Section<'t>| {
            let draft = DraftPeer {
                section: section.place.clone(),
                name: reader.parsed(&mut section, "name", TEXT),
                underlay: reader.parsed(&mut section, "underlay", ADDRESS),
                ranges: reader.list(&mut section, "ranges", PREFIX),
                vtep_mac: reader.parsed(&mut section, "vtep_mac", MAC),
                encapsulation: reader.parsed(&mut section, "encapsulation", Encapsulation::FORM),
            };
            reader.finish(section);
            draft
        };
        sections.into_iter().map(read).collect()
    }
}

impl Default for Limits {
    fn default() -> Limits {
        let defaults = RouterConfig::default();
        Limits {
            fdb_limit: defaults.fdb_limit,
            fdb_age: defaults.fdb_age.as_secs(),
            flows: defaults.flows,
            host_flows: defaults.host_flows,
            chunks: None,
            flood_rate: defaults.flood_rate,
            icmp_rate: defaults.icmp_rate,
        }
    }
}

impl Limits {
    fn read<'t>(reader: &mut Reader<'t>, root: &mut Section<'t>) -> Limits {
        let mut limits = Limits::default();
        let Some(mut section) = reader.table(root, "limits") else { return limits };
        let number = |found: Option<At<u32>>, default: u32| found.map_or(default, |found| found.value);
        let size = |found: Option<At<u32>>, default: usize| found.map_or(default, |found| found.value as usize);
        limits.fdb_limit = size(reader.number(&mut section, "fdb_limit", 16..=1 << 20), limits.fdb_limit);
        limits.fdb_age =
            reader.number(&mut section, "fdb_age", 1..=86_400).map_or(limits.fdb_age, |found: At<u64>| found.value);
        limits.flows = size(reader.number(&mut section, "flows", 64..=1 << 24), limits.flows);
        limits.host_flows = size(reader.number(&mut section, "host_flows", 64..=1 << 24), limits.host_flows);
        limits.chunks = reader.number(&mut section, "chunks", 1024..=MAX_CHUNKS).map(|found: At<u32>| found.value);
        limits.flood_rate = number(reader.number(&mut section, "flood_rate", 0..=u32::MAX), limits.flood_rate);
        limits.icmp_rate = number(reader.number(&mut section, "icmp_rate", 0..=u32::MAX), limits.icmp_rate);
        reader.finish(section);
        limits
    }
}

impl Log {
    fn read<'t>(reader: &mut Reader<'t>, root: &mut Section<'t>) -> Log {
        let mut log = Log { level: tracing::Level::INFO, json: false };
        let Some(mut section) = reader.table(root, "log") else { return log };
        if let Some(level) = reader.parsed(&mut section, "level", "one of error, warn, info, debug, trace") {
            log.level = level.value;
        }
        if let Some(format) = reader.parsed::<String>(&mut section, "format", TEXT) {
            match format.value.as_str() {
                "text" => log.json = false,
                "json" => log.json = true,
                other => reader.problem(&format.place, format!("{other:?} is neither \"text\" nor \"json\"")),
            }
        }
        reader.finish(section);
        log
    }
}

#[cfg(test)]
mod tests;
