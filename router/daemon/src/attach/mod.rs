//! Attaching pods: ADD, DEL, CHECK and GC.
//!
//! ```text
//! names, namespace checked → addresses chosen → device made in the pod and set up there → tables say who is behind the port
//!     → port given to the workers → lease durable → answer
//! ```
//!
//! A veth ([`device`]) is given to the workers before its end in the pod is set up, for the pod's kernel speaks as soon as it is.
//!
//! Each step has an undo, and [`Attempt`] runs what was reached in reverse if the next step fails: a failed ADD leaves
//! no lease, device or port. The namespace's descriptor is closed at the end of the request, for an open one keeps
//! the namespace alive. Requests for different attachments run side by side, for the same one in turn ([`turn`]).

pub mod addresses;
pub mod census;
pub mod check;
pub mod device;
pub mod dhcp;
pub mod given;
pub mod namespace;
pub mod only_lease;
pub mod pod;
pub mod promised;
pub mod reconcile;
pub mod reserve;
pub mod tombstone;
pub mod turn;
pub mod veth;
pub mod watch;

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::SystemTime;

use weft_api::{Attach, Attached, AttachedAddress, AttachmentKey, Bandwidth, Collected, Failure, Found, Gc, code};
use weft_encap::mac::Mac;
use weft_ipam::{Facts, LeaseError, Owner};
use weft_router::pace::{Limit, Limits};
use weft_router::tables::Pod;
use weft_router::{Device, PortId, RouterError};

use crate::control::config::{Config, PortKind};
use crate::control::derive;
use crate::node::{Attachment, Node, since_boot};
use crate::shortage::is_shortage;
use device::Chosen;
use namespace::{Namespace, travel};
use pod::{Interface, Raw};
use promised::Asking;
use veth::{Veth, Veths};

/// Longest network name and container id in bytes. Runtimes use 64 digits; anything much longer is no id.
const MAX_NAME: usize = 1024;
/// `IFNAMSIZ` less the terminating zero.
const MAX_IFNAME: usize = 15;
/// How often a device name or MAC is drawn again if it is taken.
const DRAWS: usize = 16;

/// CNI ADD.
pub fn add(node: &Node, request: &Attach, fd: Option<OwnedFd>) -> Result<Attached, Failure> {
    let (asking, writing) = promised::ends();
    let made = travel(move || add_travelling(node, request, fd, asking), || writing.serve(&node.store));
    made.unwrap_or_else(|error| {
        Err(Failure::new(code::TRY_AGAIN, format!("cannot work in the pod's network namespace: {error}")))
    })
}

fn add_travelling(node: &Node, request: &Attach, fd: Option<OwnedFd>, asking: Asking) -> Result<Attached, Failure> {
    check_key(&request.key)?;
    let mac = request.mac.as_deref().map(parse_mac).transpose()?;
    let kind = request.port.as_deref().map(parse_port).transpose()?;
    let namespace = Namespace::check(fd, &request.netns)?;
    tombstone::honour_all(node);
    let _turn = node.turns.take(&request.key);
    refuse_known(node, &request.key)?;
    let mut attempt = Attempt::new(node, &request.key);
    let mut interface = attempt.lease(request, mac, &namespace, asking)?;
    attempt.open(kind, &namespace, &request.netns, &mut interface)?;
    attempt.settle()?;
    attempt.finish();
    tracing::info!(
        network = request.key.network, container = request.key.container, ifname = request.key.ifname,
        mac = %interface.mac, addresses = ?interface.addresses.iter().map(|(net, _)| net).collect::<Vec<_>>(),
        "attached"
    );
    Ok(attached(&interface))
}

/// An attachment that has a port is another ADD's.
fn refuse_known(node: &Node, key: &AttachmentKey) -> Result<(), Failure> {
    if !node.state().attachments.contains_key(key) {
        return Ok(());
    }
    let msg = format!("container {} is attached by {} already", key.container, key.ifname);
    Err(Failure::new(code::EXISTS, msg).with_details("DEL comes before another ADD"))
}

/// Whether the attachment has a lease or a port.
pub fn find(node: &Node, key: &AttachmentKey) -> Found {
    tombstone::honour_all(node);
    let state = node.state();
    Found { attached: state.attachments.contains_key(key) || node.store.get(&owner(key)).is_some() }
}

/// CNI DEL. What is not there is as good as freed.
pub fn del(node: &Node, key: &AttachmentKey) {
    let _turn = node.turns.take(key);
    if free(node, key) {
        tracing::info!(network = key.network, container = key.container, ifname = key.ifname, "detached");
    }
}

/// Frees what was given, unless that has been done since, and the attachment is another ADD's; whether it did.
pub fn take_back(node: &Node, key: &AttachmentKey, given: &Attached) -> bool {
    let _turn = node.turns.take(key);
    let has_port = node.state().attachments.get(key).is_some_and(|now| now.interface.mac.to_string() == given.mac);
    let has_lease = node.store.get(&owner(key)).is_some_and(|record| {
        let mac = record.facts.mac.map_or_else(String::new, |mac| Mac(mac).to_string());
        let addresses = record.leases.iter().map(|lease| lease.cidr().to_string());
        mac == given.mac && addresses.eq(given.addresses.iter().map(|given| given.address.clone()))
    });
    (has_port || has_lease) && free(node, key)
}

/// Port, tables, lease, in this order; whether there was any of them. To be called in the attachment's turn.
fn free(node: &Node, key: &AttachmentKey) -> bool {
    let had_port = node.detach(key);
    let owner = owner(key);
    let had_lease = node.store.release(&owner, since_boot()).is_some();
    // What another program wrote down without an interface is whatever interface the pod has.
    let had_foreign = node.store.release(&Owner { ifname: String::new(), ..owner }, since_boot()).is_some();
    had_port || had_lease || had_foreign
}

/// CNI GC.
pub fn collect(node: &Node, request: &Gc) -> Collected {
    let valid: BTreeSet<(&str, &str)> =
        request.valid.iter().map(|(container, ifname)| (container.as_str(), ifname.as_str())).collect();
    let stale: Vec<AttachmentKey> = {
        let leased = node.store.records();
        let leased = leased.iter().map(|record| key_of(&record.owner));
        let all: BTreeSet<AttachmentKey> = leased.chain(node.state().attachments.keys().cloned()).collect();
        let containers: BTreeSet<&str> = valid.iter().map(|(container, _)| *container).collect();
        let stays = |key: &AttachmentKey| match key.ifname.as_str() {
            "" => containers.contains(key.container.as_str()),
            ifname => valid.contains(&(key.container.as_str(), ifname)),
        };
        all.into_iter().filter(|key| key.network == request.network && !stays(key)).collect()
    };
    let freed = stale.into_iter().filter(|key| {
        let _turn = node.turns.take(key);
        free(node, key)
    });
    Collected { freed: freed.collect() }
}

/// What an ADD has done so far; undone when it is dropped before [`Attempt::finish`].
struct Attempt<'a> {
    node: &'a Node,
    key: &'a AttachmentKey,
    leased: bool,
    /// Who writes the lease, as long as it is not known whether that is durable.
    asking: Option<Asking>,
    port: Option<PortId>,
}

impl<'a> Attempt<'a> {
    fn new(node: &'a Node, key: &'a AttachmentKey) -> Attempt<'a> {
        Attempt { node, key, leased: false, asking: None, port: None }
    }

    /// Begins to lease the addresses, which has to be settled.
    fn lease(
        &mut self,
        request: &Attach,
        mac: Option<Mac>,
        namespace: &Namespace,
        asking: Asking,
    ) -> Result<Interface, Failure> {
        let netns = self.node.census.describe(namespace);
        let config = Arc::clone(&self.node.state().desired.config);
        let mtu = choose_mtu(&config, request.mtu)?;
        let mac = choose_mac(self.node, &config, mac)?;
        let given = given::addresses(request)?;
        let (sets, requested) = match given.as_slice() {
            [] => (addresses::sets(&config, request)?, request.requested.clone()),
            given => (given::sets(&config, given)?, given.iter().map(|(net, _)| net.addr()).collect()),
        };
        let facts = facts(self.node, request, mac, netns);
        let begun = self.node.store.begin(&owner(self.key), &sets, &requested, facts, since_boot());
        let begun = begun.map_err(|error| refusal(&error))?;
        let leased = begun.record().leases.iter().map(|lease| (lease.cidr(), lease.gateway));
        let addresses = if given.is_empty() { leased.collect() } else { given };
        asking.begin(begun);
        self.asking = Some(asking);
        let mut interface = Interface {
            name: self.key.ifname.clone(),
            mac,
            mtu,
            addresses,
            routes: Vec::new(),
            bandwidth: request.bandwidth.unwrap_or_default(),
            dhcp: dhcp::granted(&request.trusted)?,
        };
        interface.routes = given::routes(request.routes.as_deref(), &interface)?;
        Ok(interface)
    }

    /// Waits until the lease is durable.
    fn settle(&mut self) -> Result<(), Failure> {
        let Some(asking) = self.asking.take() else { return Ok(()) };
        asking.outcome()?;
        self.leased = true;
        Ok(())
    }

    /// Makes the pod's device. Where any kind will do and the chosen one fails, though it worked when it was tried, the other one is made;
    /// if that fails too, the first failure is the one to be told.
    fn open(
        &mut self,
        kind: Option<PortKind>,
        namespace: &Namespace,
        netns: &str,
        interface: &mut Interface,
    ) -> Result<(), Failure> {
        let devices = &self.node.devices;
        if let Chosen::Veth(veths) = devices.choose(kind)? {
            return self.open_veth(&veths, namespace, interface);
        }
        let Err(failure) = self.open_tap(namespace, netns, interface) else { return Ok(()) };
        let Some(veths) = devices.instead_of_tap(kind) else { return Err(failure) };
        self.undo_port();
        self.open_veth(&veths, namespace, interface).map_err(|_| failure.clone())?;
        tracing::warn!(%failure, "a pod has an AF_XDP port, since no TAP could be made for it");
        Ok(())
    }

    fn undo_port(&mut self) {
        if self.port.take().is_some() {
            self.node.detach(self.key);
        }
    }

    fn open_tap(&mut self, namespace: &Namespace, netns: &str, interface: &mut Interface) -> Result<(), Failure> {
        let place = self.node.watch.place(namespace, netns);
        let tap = device::make_tap(namespace, place.is_some(), interface)?;
        let port = self.enter(interface, None)?;
        self.node.router.add_port(port, Device::Tap(tap)).map_err(|error| refused(&error))?;
        if let Some(place) = place {
            self.node.watch.keep(self.key, port, place);
        }
        Ok(())
    }

    fn open_veth(
        &mut self,
        veths: &Arc<Veths>,
        namespace: &Namespace,
        interface: &mut Interface,
    ) -> Result<(), Failure> {
        let veth = Arc::new(self.node.devices.make_veth(veths, namespace, interface)?);
        let port = self.enter(interface, Some(Arc::clone(&veth)))?;
        device::open_veth(&self.node.router, port, &veth).map_err(|error| refused(&error))?;
        let name = interface.name.clone();
        device::set_up(namespace, Raw { name: &name, is_complete: true }, interface)?;
        if let Some(attachment) = self.node.state().attachments.get_mut(self.key) {
            attachment.interface.routes.clone_from(&interface.routes);
        }
        Ok(())
    }

    /// Says in the tables who is behind a port, which is then given to the workers. In this order an event about the port always
    /// finds its attachment.
    fn enter(&mut self, interface: &Interface, veth: Option<Arc<Veth>>) -> Result<PortId, Failure> {
        let port = self.node.attach(self.key, interface.clone(), veth).ok_or_else(|| Failure {
            code: code::EXHAUSTED,
            msg: "every port number of this node is in use".into(),
            details: "remove pods from this node".into(),
        })?;
        self.port = Some(port);
        Ok(port)
    }

    fn finish(mut self) {
        (self.leased, self.port) = (false, None);
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        self.undo_port();
        // What cannot be written is no lease.
        let _ = self.settle();
        if self.leased {
            self.node.store.release(&owner(self.key), since_boot());
        }
    }
}

/// What is written down beside a pod's addresses.
fn facts(node: &Node, request: &Attach, mac: Mac, netns: Option<weft_ipam::Netns>) -> Facts {
    let boot = node.census.boot().to_owned();
    Facts { pool: String::new(), time: seconds(), mac: Some(mac.0), boot, netns, labels: request.labels.clone() }
}

/// Seconds since 1970, for people.
fn seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    // Up to 256 bytes come whole; before the kernel's generator is ready, this waits.
    rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())?;
    Ok(bytes)
}

/// The MAC that was asked for, or a random one; nobody else's on this node.
fn choose_mac(node: &Node, config: &Config, asked: Option<Mac>) -> Result<Mac, Failure> {
    let taken = |mac: Mac| {
        [config.gateway.mac, config.vtep_mac].contains(&mac)
            || config.peers.iter().any(|peer| peer.vtep_mac == mac)
            || node.store.read(|leases| leases.has_mac(mac.0))
            || node.router.tables().macs.contains_key(&mac)
    };
    match asked {
        Some(mac) if taken(mac) => Err(Failure {
            code: code::ADDRESS,
            msg: format!("the requested MAC {mac} is in use"),
            details: "ask for another one, or for none".into(),
        }),
        Some(mac) => Ok(mac),
        None => {
            let draw = || random().ok().map(derive::local_unicast).filter(|mac| !taken(*mac));
            (0..DRAWS).find_map(|_| draw()).ok_or_else(|| Failure {
                code: code::TRY_AGAIN,
                msg: "no random MAC could be drawn".into(),
                details: String::new(),
            })
        }
    }
}

fn refused(error: &RouterError) -> Failure {
    let no_memory = matches!(error, RouterError::Device(error) if error.kind() == io::ErrorKind::OutOfMemory);
    let passes = matches!(error, RouterError::Device(error) if is_shortage(error));
    Failure {
        code: if passes { code::TRY_AGAIN } else { code::INTERNAL },
        msg: format!("the data plane refused the device: {error}"),
        details: if no_memory { "raise limits.chunks in weftd's configuration" } else { "see weftd's log" }.into(),
    }
}

fn parse_port(text: &str) -> Result<PortKind, Failure> {
    text.parse().map_err(|()| Failure {
        code: code::CONFIG,
        msg: format!("the requested port {text:?} is not known"),
        details: format!("write {}", PortKind::FORM),
    })
}

fn choose_mtu(config: &Config, asked: Option<u32>) -> Result<u32, Failure> {
    let least = if config.gateway.ipv6.is_some() { 1280 } else { 576 };
    match asked {
        Some(mtu) if !(least..=config.mtu).contains(&mtu) => Err(Failure {
            code: code::CONFIG,
            msg: format!("the requested MTU {mtu} is not from {least} to {}", config.mtu),
            details: "the upper limit is the key mtu of weftd's configuration".into(),
        }),
        asked => Ok(asked.unwrap_or(config.mtu)),
    }
}

fn parse_mac(text: &str) -> Result<Mac, Failure> {
    let refuse = |what: &str| Failure {
        code: code::CONFIG,
        msg: format!("the requested MAC {text:?} is {what}"),
        details: "write a unicast address such as 0a:00:00:12:34:56".into(),
    };
    let mac: Mac = text.parse().map_err(|_| refuse("no MAC address"))?;
    if mac.is_unicast() { Ok(mac) } else { Err(refuse("not a unicast address")) }
}

fn check_key(key: &AttachmentKey) -> Result<(), Failure> {
    let refuse = |variable: &str, what: &str| {
        let msg = format!("{variable} {what}");
        Err(Failure { code: code::ENVIRONMENT, msg, details: String::new() })
    };
    for (variable, value) in [("the network's name", &key.network), ("CNI_CONTAINERID", &key.container)] {
        if value.is_empty() || value.len() > MAX_NAME || value.chars().any(char::is_control) {
            return refuse(variable, "is empty, too long or has control characters");
        }
    }
    // dev_valid_name, https://github.com/torvalds/linux/blob/v6.12/net/core/dev.c#L1050; and % would be a pattern.
    let bad = |c: char| c == '/' || c == ':' || c == '%' || c.is_whitespace() || c.is_control();
    let name = &key.ifname;
    if name.is_empty() || name.len() > MAX_IFNAME || name == "." || name == ".." || name.chars().any(bad) {
        return refuse("CNI_IFNAME", "is no name for an interface");
    }
    if ["lo", "all", "default"].contains(&name.as_str()) {
        return refuse("CNI_IFNAME", "is a name that the kernel uses itself");
    }
    Ok(())
}

/// The protocol's word for what the store refuses.
fn refusal(error: &LeaseError) -> Failure {
    let code = match error {
        LeaseError::Exists { .. } => code::EXISTS,
        LeaseError::NotInRange { .. }
        | LeaseError::Gateway { .. }
        | LeaseError::Reserved { .. }
        | LeaseError::Mac { .. }
        | LeaseError::Taken { .. } => code::ADDRESS,
        LeaseError::Exhausted { .. } | LeaseError::Full { .. } => code::EXHAUSTED,
        LeaseError::NoRanges | LeaseError::Overlap { .. } | LeaseError::TooLarge { .. } => code::CONFIG,
        LeaseError::Store(_) => code::TRY_AGAIN,
    };
    Failure { code, msg: error.to_string(), details: String::new() }
}

fn attached(interface: &Interface) -> Attached {
    let address =
        |(net, gateway): &(ipnet::IpNet, IpAddr)| AttachedAddress { address: net.to_string(), gateway: *gateway };
    Attached {
        ifname: interface.name.clone(),
        mac: interface.mac.to_string(),
        mtu: interface.mtu,
        addresses: interface.addresses.iter().map(address).collect(),
        routes: interface.routes.iter().map(given::told).collect(),
        trusted: dhcp::told(interface.dhcp),
    }
}

impl Attachment {
    /// What the data plane needs to know.
    pub fn pod(interface: &Interface) -> Pod {
        let mut pod = Pod {
            mac: interface.mac,
            ipv4: Vec::new(),
            ipv6: Vec::new(),
            mtu: interface.mtu,
            limits: limits(&interface.bandwidth),
            dhcp: interface.dhcp,
        };
        for (net, _) in &interface.addresses {
            match net.addr() {
                IpAddr::V4(address) => pod.ipv4.push(address),
                IpAddr::V6(address) => pod.ipv6.push(address),
            }
        }
        pod
    }
}

/// Full buckets. A rate of zero is no limit.
fn limits(bandwidth: &Bandwidth) -> Limits {
    let limit = |rate, burst| (rate > 0).then_some(Limit { rate, burst });
    Limits::new(
        limit(bandwidth.ingress_rate, bandwidth.ingress_burst),
        limit(bandwidth.egress_rate, bandwidth.egress_burst),
    )
}

/// The store's word for an attachment.
pub fn owner(key: &AttachmentKey) -> Owner {
    Owner { network: key.network.clone(), container: key.container.clone(), ifname: key.ifname.clone() }
}

/// The protocol's word for an owner.
pub fn key_of(owner: &Owner) -> AttachmentKey {
    AttachmentKey { network: owner.network.clone(), container: owner.container.clone(), ifname: owner.ifname.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A request of container `c1` for addresses of these ranges.
    pub fn attach(ranges: Vec<Vec<weft_api::Range>>) -> Attach {
        Attach {
            key: key("pods", "c1", "eth0"),
            netns: String::new(),
            requested: Vec::new(),
            ranges,
            mac: None,
            mtu: None,
            port: None,
            bandwidth: None,
            given: Vec::new(),
            routes: None,
            trusted: Vec::new(),
            labels: std::collections::BTreeMap::new(),
        }
    }

    fn key(network: &str, container: &str, ifname: &str) -> AttachmentKey {
        AttachmentKey { network: network.into(), container: container.into(), ifname: ifname.into() }
    }

    #[test]
    fn names_that_no_runtime_gives_are_refused() {
        assert_eq!(check_key(&key("pods", "c1", "eth0")), Ok(()));
        let long = "x".repeat(MAX_NAME + 1);
        let bad = [
            key("", "c1", "eth0"),
            key("pods", "", "eth0"),
            key("pods", &long, "eth0"),
            key("pods", "c\0", "eth0"),
            key("pods", "c1", ""),
            key("pods", "c1", ".."),
            key("pods", "c1", "../../x"),
            key("pods", "c1", "eth%d"),
            key("pods", "c1", "a b"),
            key("pods", "c1", "sixteencharacter"),
            key("pods", "c1", "lo"),
            key("pods", "c1", "all"),
        ];
        for key in bad {
            assert_eq!(check_key(&key).unwrap_err().code, code::ENVIRONMENT, "{key:?}");
        }
    }

    #[test]
    fn only_unicast_macs_can_be_asked_for() {
        assert!(parse_mac("0a:00:00:00:00:01").is_ok());
        for text in ["", "0a:00", "01:00:5e:00:00:01", "00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff"] {
            assert_eq!(parse_mac(text).unwrap_err().code, code::CONFIG, "{text}");
        }
    }
}
