//! The requests, and the answers to them; what people look at is in `view`.

mod view;

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

pub use view::*;

/// One line from a client.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Envelope {
    /// [`crate::VERSION`] of the sender.
    pub version: u32,
    /// What is asked.
    #[serde(flatten)]
    pub request: Request,
}

/// What can be asked of the daemon.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Request {
    /// CNI ADD. Carries the namespace's descriptor. Answer: [`Attached`].
    Add(Attach),
    /// The first half of an ADD for a plugin that asks for addresses from inside the pod, by DHCP: makes the interface, whose port is open
    /// for the DHCP client alone. Carries the namespace's descriptor. Answer: [`Attached`] without addresses. Undone by [`Request::Del`].
    Prepare(Attach),
    /// The second half: the addresses have come, in [`Attach::given`], and the port opens. Carries the namespace's descriptor. Answer: [`Attached`].
    /// If it fails, the interface is as it was before.
    Complete(Attach),
    /// CNI DEL. Repeatable; an attachment that is not known is success. Answer: [`Empty`].
    Del(AttachmentKey),
    /// CNI CHECK. Carries the namespace's descriptor. Answer: [`Empty`] or an error that says what is missing.
    Check(Check),
    /// CNI GC: frees every attachment of `network` that is not listed. Answer: [`Collected`].
    Gc(Gc),
    /// Addresses for a plugin that asks weft-cni for them and makes the interface itself. What is said about an interface
    /// is not looked at; a descriptor is optional. Answer: [`Attached`] with addresses alone. Freed by [`Request::Del`].
    Lease(Attach),
    /// Whether such addresses are still leased. Answer: [`Empty`] or an error that says what is missing.
    CheckLease(Check),
    /// Answer: [`Found`].
    Find(AttachmentKey),
    /// CNI STATUS: can an ADD be served now? Answer: [`Empty`] or error 50 / 51.
    Ready,
    /// The daemon's state, problems first. Answer: [`Status`].
    Status,
    /// Answer: a list of [`PortInfo`].
    Ports,
    /// Answer: a list of [`RouteInfo`].
    Routes,
    /// Answer: a list of [`FdbInfo`].
    Fdb,
    /// Answer: a list of [`NeighbourInfo`].
    Neigh,
    /// Answer: a list of [`FlowInfo`].
    Flows,
    /// What leaves the cluster in the node's name. Answer: a list of [`NatInfo`].
    Nat,
    /// Answer: a list of [`LeaseInfo`].
    Leases,
    /// Answer: a list of [`DropInfo`].
    Drops,
    /// Answer: a list of [`NodeInfo`].
    Nodes,
    /// Gives this node's ranges back, for it goes for good; refused while pods are attached. Answer: [`Empty`].
    Leave,
    /// Keeps an address from being given. Answer: [`Empty`]. What undoes it is [`Request::Del`] of its record.
    Reserve(Reserve),
    /// Reads the configuration file again. Answer: [`Empty`], or an error with line and key; the old one stays in force.
    Reload,
}

impl Request {
    /// Whether a descriptor may come with it.
    pub(crate) fn has_descriptor(&self) -> bool {
        match self {
            Self::Add(_) | Self::Prepare(_) | Self::Complete(_) | Self::Lease(_) | Self::Check(_) | Self::Del(_) => {
                true
            }
            Self::Gc(_) | Self::CheckLease(_) | Self::Find(_) | Self::Ready | Self::Status | Self::Ports => false,
            Self::Routes | Self::Fdb | Self::Neigh | Self::Flows | Self::Leases | Self::Drops | Self::Nodes => false,
            Self::Leave | Self::Reserve(_) | Self::Reload | Self::Nat => false,
        }
    }
}

/// One line from the daemon.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer<T> {
    /// It was done.
    Ok(T),
    /// It was not done, and why.
    Error(Failure),
}

/// Why something was not done, in CNI's terms.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// A CNI error code (see [`code`]).
    pub code: u32,
    /// One line: what happened, to what.
    pub msg: String,
    /// What to do about it; may be empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}

impl Failure {
    /// A failure without details.
    pub fn new(code: u32, msg: impl Into<String>) -> Failure {
        Failure { code, msg: msg.into(), details: String::new() }
    }

    /// The same, with what to do about it.
    #[must_use]
    pub fn with_details(self, details: impl Into<String>) -> Failure {
        Failure { details: details.into(), ..self }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.msg)?;
        if self.details.is_empty() { Ok(()) } else { write!(f, " ({})", self.details) }
    }
}

impl std::error::Error for Failure {}

/// CNI's error codes, and ours from 100 on.
pub mod code {
    /// The CNI version is not supported.
    pub const VERSION: u32 = 1;
    /// A field of the configuration is not supported.
    pub const UNSUPPORTED_FIELD: u32 = 2;
    /// The container is unknown or does not exist.
    pub const UNKNOWN_CONTAINER: u32 = 3;
    /// An environment variable is missing or invalid; the message names it.
    pub const ENVIRONMENT: u32 = 4;
    /// Reading or writing failed.
    pub const IO: u32 = 5;
    /// The input is not valid JSON.
    pub const DECODE: u32 = 6;
    /// The network configuration is invalid.
    pub const CONFIG: u32 = 7;
    /// Try again later.
    pub const TRY_AGAIN: u32 = 11;
    /// STATUS: the plugin cannot serve ADD.
    pub const NOT_AVAILABLE: u32 = 50;
    /// STATUS: not available, and existing containers have limited connectivity.
    pub const LIMITED: u32 = 51;
    /// The pool has no free address.
    pub const EXHAUSTED: u32 = 100;
    /// The attachment exists already.
    pub const EXISTS: u32 = 101;
    /// A requested address cannot be given.
    pub const ADDRESS: u32 = 102;
    /// CHECK found something missing or different.
    pub const CHECK: u32 = 103;
    /// The network namespace cannot be used.
    pub const NETNS: u32 = 104;
    /// A bug or an unexpected refusal by the kernel.
    pub const INTERNAL: u32 = 105;
    /// Not a request that this daemon knows.
    pub const REQUEST: u32 = 106;
    /// A plugin that was asked for addresses failed, and did not say how.
    pub const DELEGATE: u32 = 107;
}

/// Nothing to say.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Empty {}

/// What identifies an attachment.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AttachmentKey {
    /// Name of the network, from the CNI configuration.
    pub network: String,
    /// The runtime's container id.
    pub container: String,
    /// Name of the interface in the pod.
    pub ifname: String,
}

/// A request to attach a pod.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Attach {
    /// Which attachment.
    #[serde(flatten)]
    pub key: AttachmentKey,
    /// `CNI_NETNS` as the runtime gave it; for messages only, the descriptor is what counts.
    pub netns: String,
    /// Addresses that were asked for, in order of precedence; each must be given or the ADD fails.
    #[serde(default)]
    pub requested: Vec<IpAddr>,
    /// Address ranges that go before the node's own: one inner list per range set.
    #[serde(default)]
    pub ranges: Vec<Vec<Range>>,
    /// A MAC that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// An MTU that was asked for; the node's if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// The kind of port that was asked for: `tap`, `xdp` or `auto`; the node's if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<String>,
    /// Limits on the pod's traffic; none if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Bandwidth>,
    /// Addresses that another IPAM plugin gave: none are chosen then, and these are given or the ADD fails. A gateway that it did
    /// not say is the unspecified address.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub given: Vec<AttachedAddress>,
    /// The routes to make, where those without a gateway go by that of the first address of their family. If absent, a default
    /// route by each family's gateway. A route that the pod has already stays as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routes: Option<Vec<AttachedRoute>>,
    /// What the pod is trusted with: `dhcp`, to answer as a DHCP server. The answer names what was granted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trusted: Vec<String>,
    /// `K8S_POD_NAMESPACE`, `K8S_POD_NAME`, `K8S_POD_UID` and the like, for people.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// Limits on a pod's traffic, in the terms of CNI's capability `bandwidth`: rates in bit/s, bursts in bits. A rate of 0 is
/// no limit; a burst of 0 is left to the daemon.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Bandwidth {
    /// Towards the pod.
    #[serde(default)]
    pub ingress_rate: u64,
    /// Towards the pod.
    #[serde(default)]
    pub ingress_burst: u64,
    /// From the pod.
    #[serde(default)]
    pub egress_rate: u64,
    /// From the pod.
    #[serde(default)]
    pub egress_burst: u64,
}

/// One range of addresses, as in host-local's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Range {
    /// The on-link prefix, CIDR.
    pub subnet: String,
    /// First address to give.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range_start: Option<IpAddr>,
    /// Last address to give.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range_end: Option<IpAddr>,
    /// The gateway, never given; the first address of the subnet if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
}

/// What an ADD made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// Name of the interface in the pod.
    pub ifname: String,
    /// Its MAC.
    pub mac: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its addresses.
    pub addresses: Vec<AttachedAddress>,
    /// Routes made in the pod.
    pub routes: Vec<AttachedRoute>,
    /// What the pod is trusted with. A daemon that knows nothing of trust says nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trusted: Vec<String>,
}

/// One address of an attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachedAddress {
    /// Address and on-link prefix length, e.g. `10.244.1.2/24`.
    pub address: String,
    /// The gateway for it; the unspecified address if it has none.
    pub gateway: IpAddr,
}

/// One route of an attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachedRoute {
    /// Destination in CIDR form, e.g. `0.0.0.0/0`.
    pub destination: String,
    /// Next hop; the unspecified address if none was said.
    pub gateway: IpAddr,
    /// MTU along it, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// The largest segment that TCP announces along it, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advmss: Option<u32>,
    /// Its priority, the metric; the lower, the sooner it is taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u32>,
    /// The number of its table; the main one if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<u32>,
    /// Its scope, as Linux numbers them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<u8>,
}

impl AttachedRoute {
    /// A route in the main table with nothing special.
    pub fn new(destination: impl Into<String>, gateway: IpAddr) -> AttachedRoute {
        let destination = destination.into();
        AttachedRoute { destination, gateway, mtu: None, advmss: None, priority: None, table: None, scope: None }
    }
}

/// A request to compare an attachment with what was made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Check {
    /// Which attachment.
    #[serde(flatten)]
    pub key: AttachmentKey,
    /// What the runtime believes to be there (from `prevResult`); absent if it gave none. What its result did not say
    /// is 0 in [`Attached::mtu`], empty in [`Attached::mac`] and the unspecified address in [`AttachedAddress::gateway`];
    /// its routes are those of the whole chain of plugins, so routes of others may be among them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected: Option<Attached>,
}

/// A request to keep an address from being given.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Reserve {
    /// The address.
    pub address: IpAddr,
    /// What for; may be empty.
    #[serde(default)]
    pub note: String,
}

/// A request to free what is not listed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Gc {
    /// Only attachments of this network are touched.
    pub network: String,
    /// The attachments that stay: (container id, ifname).
    pub valid: Vec<(String, String)>,
}

/// Whether an attachment is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// It has a lease or a port.
    pub attached: bool,
}

/// What a GC freed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Collected {
    /// The attachments that went.
    pub freed: Vec<AttachmentKey>,
}
