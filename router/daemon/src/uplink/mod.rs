//! The underlay's device: whether the tunnel goes by AF_XDP or by UDP, and why.
//!
//! [`UnderlayKind::Udp`] is a socket of the kernel's, which works everywhere. [`UnderlayKind::Xdp`] puts a program on the device that has the
//! underlay's address: it takes the tunnel's packets and leaves all others to the kernel. [`UnderlayKind::Auto`] is the latter where it is
//! faster, which is where the device's driver hands frames over without copying them; elsewhere the kernel's trains of
//! datagrams are. AF_XDP is tried before it is relied upon, first on a veth of its own (does the kernel do it?), then on the
//! device itself. Whatever is in its way, the tunnel goes by UDP then, and `weft status` says what it was. The UDP socket is there
//! in either case: see [`XdpUnderlay`](weft_router::port::xdp::XdpUnderlay).
//!
//! The address may change while weftd runs ([`Uplink::rebind`]), or be late, or be away for a while: sockets are bound to it all the same, and
//! work when it is there. So is the device, which is tried again when it has come ([`Uplink::device_found`]).

mod follow;
mod hops;
mod tunnels;
mod wrapping;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use anyhow::{Context, bail};
use weft_encap::format::Format;
use weft_encap::mac::Mac;
use weft_router::port::sys::namespace::new_network;
use weft_router::port::udp::Underlay;
use weft_router::port::xdp::programs::Tunnel;
use weft_router::port::xdp::{self, OpenUplink};
use weft_router::tables::LEAST_V6;
use weft_router::{Device, Router};

use crate::attach::namespace::enter;
use crate::attach::veth;
use crate::control::config::{self, Config, UnderlayKind};
use crate::control::desired::UNDERLAY;
use crate::netlink::Netlink;
use crate::netlink::paths::Detailed;
use crate::node;
pub use tunnels::Tunnels;
pub use wrapping::Wrapping;

use follow::{Followed, Subject};
use hops::Way;

/// Sockets of each worker that send to other nodes, each from a source port of its own, so that flows spread over paths, queues and
/// the other node's workers.
const TRANSMIT_SOCKETS: usize = 16;
/// What of AF_XDP is used came with this version.
const NEEDED: (u32, u32) = (5, 10);

/// The underlay as it was opened.
pub struct Uplink {
    configured: UnderlayKind,
    /// Told when path MTUs change.
    listener: OnceLock<follow::Listener>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// What it is; if it is not what was asked for, why.
    outcome: Result<Arc<Chosen>, String>,
    /// Whether that is because no device has the address.
    is_late: bool,
    /// Formats beside VXLAN that could not be opened, and why.
    refused: Vec<(Format, String)>,
    /// Why sockets are where they were, and not where they should be.
    stuck: Option<String>,
    /// The nodes whose ways are followed.
    nodes: Vec<IpAddr>,
}

/// An uplink in use.
#[derive(Debug)]
struct Chosen {
    name: String,
    shown: String,
    /// The device that has the address.
    device: u32,
    follower: Followed,
}

impl fmt::Debug for Uplink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uplink").field("state", &self.lock()).finish_non_exhaustive()
    }
}

impl Uplink {
    /// Opens the underlay and gives it to the workers. The sockets come first and the device in their place, so that at no time there is
    /// neither.
    ///
    /// # Errors
    /// Not even the UDP sockets could be opened, or the data plane takes nothing.
    pub fn open(config: &config::Underlay, tunnels: Tunnels, router: &Router) -> anyhow::Result<Uplink> {
        let refused = tunnels.hand_over(router)?;
        let underlay = open(config, router.workers())?;
        router.add_port(UNDERLAY, Device::Underlay(underlay)).context("the data plane cannot use the underlay")?;
        let (outcome, nodes) = (Err(String::new()), Vec::new());
        let state = State { outcome, is_late: false, refused, stuck: None, nodes };
        let uplink = Uplink { configured: config.kind, listener: OnceLock::new(), state: Mutex::new(state) };
        uplink.leave_kernel(config, router)?;
        Ok(uplink)
    }

    /// Binds all that leads to other nodes and comes from them anew, for this node has another address among them. Everything is opened before
    /// anything takes the place of another.
    ///
    /// # Errors
    /// What could not be opened; nothing has changed then.
    pub fn rebind(&self, config: &config::Underlay, router: &Router) -> anyhow::Result<()> {
        let underlay = open(config, router.workers())?;
        let tunnels = tunnels::open_all(config, router.workers())?;
        router.replace_port(UNDERLAY, Device::Underlay(underlay)).context("the data plane cannot use the underlay")?;
        for (port, device) in tunnels {
            router.replace_port(port, device)?;
        }
        self.forget_device();
        self.leave_kernel(config, router)
    }

    /// The device of this number has the underlay's address: tries again to go by it, if it was missing, or is another one than before.
    pub fn device_found(&self, index: u32, config: &config::Underlay, router: &Router) {
        let is_other = {
            let state = self.lock();
            state.outcome.as_ref().map_or(state.is_late, |chosen| chosen.device != index)
        };
        if self.configured == UnderlayKind::Udp || !is_other {
            return;
        }
        let again = open_beside(config, router.workers())
            .and_then(|underlay| Ok(router.replace_port(UNDERLAY, Device::Underlay(underlay))?))
            .and_then(|()| {
                self.forget_device();
                self.leave_kernel(config, router)
            });
        if let Err(error) = again {
            tracing::warn!("{error:#}");
        }
    }

    /// Has the tunnel go by AF_XDP, if that is what was asked for and can be: else it stays with the sockets that are open.
    fn leave_kernel(&self, config: &config::Underlay, router: &Router) -> anyhow::Result<()> {
        let chosen = match config.kind {
            UnderlayKind::Udp => Err(anyhow::Error::msg("")),
            _ => go_by_device(config, router),
        };
        let chosen = match chosen {
            Ok(chosen) => {
                tracing::info!("underlay: {}", chosen.shown);
                if let Some(listener) = self.listener.get() {
                    chosen.follower.on_path_mtu(Arc::clone(listener));
                }
                Ok(Arc::new(chosen))
            }
            Err(error) => Err(error),
        };
        let mut state = self.lock();
        state.is_late = chosen.as_ref().err().is_some_and(|error| error.is::<NoDevice>());
        state.outcome = chosen.map_err(|error| format!("{error:#}"));
        if let Ok(chosen) = &state.outcome {
            chosen.follower.set_nodes(state.nodes.iter().copied());
        }
        drop(state);
        match (self.problem(), &self.lock().outcome) {
            (Some(problem), _) => tracing::warn!("{problem}"),
            (None, Err(why)) if !why.is_empty() => tracing::info!("underlay: udp (auto: {why})"),
            _ => {}
        }
        Ok(())
    }

    fn forget_device(&self) {
        let before = std::mem::replace(&mut self.lock().outcome, Err(String::new()));
        drop(before);
    }

    /// Why sockets are not where they should be; `None` when they are.
    pub fn set_stuck(&self, why: Option<String>) {
        if let Some(why) = why.as_ref().filter(|why| self.lock().stuck.as_ref() != Some(why)) {
            tracing::error!("{why}");
        }
        self.lock().stuck = why;
    }

    /// Whether sockets are not where they should be.
    pub fn is_stuck(&self) -> bool {
        self.lock().stuck.is_some()
    }

    fn chosen(&self) -> Option<Arc<Chosen>> {
        self.lock().outcome.as_ref().ok().map(Arc::clone)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whole values are put in; none is changed in steps.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows the ways to these nodes from now on.
    pub fn set_nodes(&self, nodes: impl Iterator<Item = IpAddr>) {
        let mut state = self.lock();
        state.nodes = nodes.collect();
        if let Ok(chosen) = &state.outcome {
            chosen.follower.set_nodes(state.nodes.iter().copied());
        }
    }

    /// How long packets to nodes may be, where routers on the way said so.
    pub fn path_mtus(&self) -> BTreeMap<IpAddr, u32> {
        self.chosen().map(|chosen| chosen.follower.path_mtus()).unwrap_or_default()
    }

    /// How long packets to nodes may be, as was measured: that holds, whatever routers said.
    pub fn measured(&self, all: &BTreeMap<IpAddr, u32>) {
        if let Some(chosen) = self.chosen() {
            chosen.follower.measured(all.clone());
        }
    }

    /// Has that be told of. The first one stays.
    pub fn on_path_mtu(&self, listener: impl Fn() + Send + Sync + 'static) {
        let listener = self.listener.get_or_init(|| Arc::new(listener));
        if let Some(chosen) = self.chosen() {
            chosen.follower.on_path_mtu(Arc::clone(listener));
        }
    }

    /// What is to be known beside the kind of the port that the workers have, `kind`.
    pub fn shown(&self, kind: &str) -> String {
        match &self.lock().outcome {
            Ok(chosen) if kind == "xdp" => chosen.shown.clone(),
            Ok(_) => kind.to_owned(),
            Err(why) if self.configured == UnderlayKind::Auto => format!("{kind} (auto: {why})"),
            Err(_) => kind.to_owned(),
        }
    }

    /// Why the tunnel does not go by what was configured.
    pub fn problem(&self) -> Option<String> {
        let state = self.lock();
        match &state.outcome {
            _ if state.stuck.is_some() => state.stuck.clone(),
            // It is about to be known.
            Err(why) if why.is_empty() => None,
            Err(why) if state.is_late && self.configured == UnderlayKind::Xdp => {
                Some(format!("the tunnel goes by UDP, for {why}: it goes by AF_XDP when there is one"))
            }
            Err(why) if self.configured == UnderlayKind::Xdp => Some(format!(
                "the tunnel goes by UDP, for AF_XDP cannot be used on the underlay's device: {why}; put that right and restart weftd, \
                 or write underlay.kind = \"udp\""
            )),
            _ => None,
        }
    }

    /// The same for an uplink that broke since: then the workers' port is of another kind.
    pub fn problem_of(&self, kind: &str) -> Option<String> {
        match self.chosen() {
            Some(chosen) if kind != "xdp" => Some(format!(
                "the uplink {} has gone: the tunnel goes by UDP until there is a device with the underlay's address again",
                chosen.name
            )),
            _ => self.problem(),
        }
    }

    /// What is wrong with the ways to nodes.
    pub fn path_problems(&self, name: impl Fn(IpAddr) -> Option<String>) -> Vec<String> {
        let narrow = self.path_mtus().into_iter().filter(|(node, mtu)| needs_fragments(*node, *mtu));
        let told = |(node, mtu): (IpAddr, u32)| {
            let name = name(node)?;
            let needed = LEAST_V6 + Format::Vxlan.overhead(node.is_ipv4());
            Some(format!(
                "the path to {name} ({node}) carries packets of {mtu} bytes only, and pods may send what takes {needed}: longer ones go in \
                 fragments, which is slow and which firewalls may drop; raise the MTU of what is on that path"
            ))
        };
        narrow.filter_map(told).collect()
    }

    /// To which peers packets go by another tunnel than they should, by reason.
    pub fn tunnel_problems(&self, config: &Config) -> Vec<String> {
        let mut by_reason: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        for peer in &config.peers {
            if let (_, Some(why)) = config.encapsulation_to(peer) {
                by_reason.entry(why).or_default().push(&peer.name);
            }
        }
        let state = self.lock();
        let refused = |why: &str| {
            let found = state
                .refused
                .iter()
                .find(|(format, _)| why.ends_with(&format!("open {}", config.underlay.word(*format))));
            found.map_or(String::new(), |(_, error)| format!(": {error}"))
        };
        let told = |(why, peers): (String, Vec<&str>)| {
            let more = if peers.len() > 1 { format!(" and {} more nodes", peers.len() - 1) } else { String::new() };
            format!("packets to {}{more} go by VXLAN, for {why}{}", peers[0], refused(&why))
        };
        by_reason.into_iter().map(told).collect()
    }

    /// How frames to a node leave.
    pub fn way(&self, node: IpAddr) -> String {
        let Some(chosen) = self.chosen() else { return "udp".into() };
        match chosen.follower.way(node) {
            Some(Way::Uplink) => match chosen.follower.path_mtus().get(&node) {
                None => "xdp".into(),
                Some(mtu) if needs_fragments(node, *mtu) => {
                    format!("xdp, packets of {mtu} bytes at most, longer ones in fragments")
                }
                Some(mtu) => format!("xdp, packets of {mtu} bytes at most"),
            },
            Some(Way::Unresolved(next)) => format!("udp: the MAC of {next} is not known"),
            Some(Way::Elsewhere(device)) => format!("udp: its route leaves by {}", name_of(device)),
            Some(Way::NoRoute) => "udp: there is no route".into(),
            Some(Way::NoUplink) => format!("udp: {} is down", chosen.name),
            None => "udp".into(),
        }
    }
}

/// Whether packets of pods may be longer than a path with this MTU carries: they are never asked for less than the floor.
fn needs_fragments(node: IpAddr, mtu: u32) -> bool {
    mtu < LEAST_V6 + Format::Vxlan.overhead(node.is_ipv4())
}

fn name_of(device: u32) -> String {
    let found = Netlink::open().and_then(|mut netlink| netlink.detailed(device));
    found.ok().flatten().map_or_else(|| format!("device {device}"), |found| found.link.name)
}

/// The sockets of the underlay.
fn open(config: &config::Underlay, workers: usize) -> anyhow::Result<Underlay> {
    let local = SocketAddr::new(config.address, config.port);
    Underlay::open_for(workers, local, TRANSMIT_SOCKETS).with_context(|| {
        format!(
            "cannot open the underlay at {local}: no VXLAN device or other program may use the port (ss -ulnp; underlay.port)"
        )
    })
}

/// The same in the place of those that are there.
fn open_beside(config: &config::Underlay, workers: usize) -> anyhow::Result<Underlay> {
    let local = SocketAddr::new(config.address, config.port);
    Underlay::open_beside(workers, local, TRANSMIT_SOCKETS)
        .with_context(|| format!("cannot open the underlay at {local} again"))
}

/// Puts an uplink in the place of the sockets.
fn go_by_device(config: &config::Underlay, router: &Router) -> anyhow::Result<Chosen> {
    let (uplink, chosen) = prepare(config, router)?;
    let underlay = open_beside(config, router.workers())?;
    let hops = chosen.follower.hops();
    if let Err(error) = router.replace_port(UNDERLAY, Device::Uplink { underlay, uplink, hops }) {
        // Some of the workers may have it.
        router.replace_port(UNDERLAY, Device::Underlay(open_beside(config, router.workers())?))?;
        return Err(error.into());
    }
    Ok(chosen)
}

/// No device has the underlay's address.
#[derive(Debug)]
struct NoDevice(IpAddr);

impl fmt::Display for NoDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no device has the address {}", self.0)
    }
}

impl std::error::Error for NoDevice {}

/// The device with the underlay's address, and the one that its frames enter by.
struct Found {
    way: Detailed,
    under: Detailed,
    vlan: Option<u16>,
}

/// Opens the uplink, or says why not.
fn prepare(config: &config::Underlay, router: &Router) -> anyhow::Result<(OpenUplink, Chosen)> {
    check_kernel()?;
    let mut netlink = Netlink::open().context("cannot open a netlink socket")?;
    let found = find(config, &mut netlink)?;
    let (name, link) = (found.under.link.name.clone(), &found.under.link);
    check_device(config.kind, &found)?;
    let namespace = new_network().context("cannot make a network namespace to try AF_XDP in (CAP_SYS_ADMIN)")?;
    enter(namespace.as_fd(), || Ok(veth::probe(link.mtu.min(veth::MAX_PROBED))))
        .context("cannot enter a network namespace")??;
    let uplink = xdp::Uplink {
        interface: link.index,
        mac: link.mac.unwrap_or(Mac::ZERO),
        mtu: link.mtu,
        carrier: link.up && link.carrier,
    };
    let tunnel =
        Tunnel { addresses: vec![config.address], port: config.port, vlan: found.vlan, secret: node::random_seed()? };
    let opened = router.open_uplink(&uplink, tunnel.clone()).with_context(|| name.clone())?;
    if config.kind == UnderlayKind::Auto && !opened.zero_copy {
        bail!("the driver of {name} copies frames for AF_XDP, and then UDP is faster");
    }
    let subject =
        Subject { tunnel, address: config.address, device: found.way.link.index, uplink: link.index, vlan: found.vlan };
    let follower = Followed::start(subject)?;
    let shown = shown(&name, found.vlan, &opened, router.workers());
    Ok((opened, Chosen { name, shown, device: found.way.link.index, follower }))
}

fn shown(name: &str, vlan: Option<u16>, opened: &OpenUplink, workers: usize) -> String {
    let copy = if opened.zero_copy { "zero copy" } else { "copied" };
    let tag = vlan.map(|vlan| format!(", VLAN {vlan}")).unwrap_or_default();
    let queues = match opened.queues {
        1 => "1 queue".to_owned(),
        count => format!("{count} queues"),
    };
    let served = opened.workers();
    let without = if served < workers { format!(" for {workers} workers, the others by UDP") } else { String::new() };
    format!("xdp on {name}{tag}, {queues}{without}, {copy}")
}

fn check_kernel() -> anyhow::Result<()> {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let (major, minor) = NEEDED;
    anyhow::ensure!(
        version >= NEEDED,
        "the kernel is {release}; AF_XDP as it is used here takes Linux {major}.{minor}"
    );
    Ok(())
}

fn find(config: &config::Underlay, netlink: &mut Netlink) -> anyhow::Result<Found> {
    let address = config.address;
    let addresses = netlink.addresses().context("cannot list this machine's addresses")?;
    let holder = addresses.iter().find(|(_, net)| net.addr() == address);
    let (index, _) = holder.ok_or(NoDevice(address))?;
    let mut detailed = |index: u32| -> anyhow::Result<Detailed> {
        let found = netlink.detailed(index).context("cannot ask for a device")?;
        Ok(found.ok_or(NoDevice(address))?)
    };
    let way = detailed(*index)?;
    let (under, tag) = match way.vlan {
        Some((under, tag)) => (detailed(under)?, Some(tag)),
        None => (way.clone(), None),
    };
    Ok(Found { way, under, vlan: tag.or(config.vlan) })
}

/// Refuses devices whose frames enter elsewhere, or where AF_XDP gains nothing.
fn check_device(kind: UnderlayKind, found: &Found) -> anyhow::Result<()> {
    let (name, under) = (&found.under.link.name, found.under.kind.as_deref());
    if found.under.link.mac.is_none() || found.under.link.mac == Some(Mac::ZERO) {
        bail!("{name} is no Ethernet device");
    }
    match under {
        None => Ok(()),
        Some("veth") if kind == UnderlayKind::Auto => bail!("{name} is a veth, where UDP is faster"),
        Some("veth") => Ok(()),
        Some(other) => bail!("{name} is a {other}, whose frames do not enter by queues of its own"),
    }
}
