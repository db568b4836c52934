//! The host port: this node's own interface in the pod network, `weft0` unless configured otherwise.
//!
//! It is a TAP in weftd's own network namespace, which in a cluster is the node's. By it the node reaches its pods and those of other
//! nodes, and pods reach the node and whatever the node's kernel routes. To the router it is a port like a pod's, except
//! that it may send from any address, and gets what no table knows ([`weft_router::tables::Role::Host`]).
//!
//! The kernel's side of it is **kept**: [`HostPort::keep`] compares what is with what shall be (device, name, MAC, MTU, addresses,
//! routes) and puts right what differs. It runs at the start, after each change of the configuration, and whenever netlink tells of a
//! change that may concern it ([`watch`]). What it cannot put right, because somebody else's route is in the way,
//! it leaves alone, and `weft status` says so. All of it is bound to the device, and the device to weftd, and ends with it; but for
//! what answers for pods meanwhile ([`routes`]), which [`forget`] takes away.
//!
//! [`address`] chooses the addresses, [`link`] makes the interface what it shall be, [`routes`] knows the routes,
//! [`forwarding`] what the node's own settings forbid.

mod address;
pub mod forwarding;
mod link;
mod routes;
pub mod watch;

use std::io;
use std::net::IpAddr;
use std::sync::mpsc::Sender;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use ipnet::IpNet;
use weft_encap::mac::Mac;
use weft_router::pace::Limits;
use weft_router::port::tap::Tap;
use weft_router::tables::{Dhcp, Pod};
use weft_router::{Device, RouterError};

pub use address::owner;
pub use routes::forget;

use crate::control::config::Config;
use crate::control::derive;
use crate::control::desired::HOST;
use crate::netlink::Netlink;
use crate::netlink::routes::{Change, KernelRoute};
use crate::node::Node;

/// The host port's state. See the module's essay.
#[derive(Debug)]
pub struct HostPort {
    /// Tells whoever keeps it that there may be something to do.
    kicks: Sender<()>,
    /// One at a time puts things right.
    keeping: Mutex<()>,
    /// The MAC that it was made with first.
    mac: OnceLock<Mac>,
    state: Mutex<State>,
}

/// What is there, as of the last look.
#[derive(Debug, Clone, Default)]
pub struct State {
    /// Its device.
    device: Option<Made>,
    /// The routes that lead to it.
    pub routes: Vec<KernelRoute>,
    /// What is wrong, and what to do.
    pub problems: Vec<String>,
}

/// The device that weftd made.
#[derive(Debug, Clone)]
struct Made {
    index: u32,
    /// The addresses that it was given.
    addresses: Vec<IpNet>,
}

/// What shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wanted {
    name: String,
    mac: Mac,
    mtu: u32,
    addresses: Vec<IpNet>,
    /// Whether answers from outside come by it.
    brings_back: bool,
}

impl HostPort {
    /// A host port that nobody has made yet. `kicks` reaches whoever keeps it.
    pub fn new(kicks: Sender<()>) -> HostPort {
        HostPort { kicks, keeping: Mutex::default(), mac: OnceLock::new(), state: Mutex::default() }
    }

    /// Its interface's number, while there is one.
    pub fn interface(&self) -> Option<u32> {
        self.lock().device.as_ref().map(|device| device.index)
    }

    /// Has it looked after soon.
    pub fn kick(&self) {
        // Nobody keeps it any more when weftd ends.
        let _ = self.kicks.send(());
    }

    /// What is there, as of the last look.
    pub fn state(&self) -> State {
        self.lock().clone()
    }

    /// Whether a change of the kernel's may concern it.
    fn concerns(&self, change: Change) -> bool {
        let state = self.lock();
        match change {
            Change::Much => true,
            Change::Interface(index) => state.device.as_ref().is_none_or(|device| device.index == index),
            Change::Route(to) => {
                state.routes.iter().any(|route| route.destination.contains(&to) || to.contains(&route.destination))
            }
        }
    }

    /// Its device does not work any more.
    pub fn lost(&self) {
        self.lock().device = None;
        self.kick();
    }

    /// Puts right what differs from what shall be. Returns whether all is well.
    pub fn keep(&self, node: &Node) -> bool {
        let _keeping = self.keeping.lock().unwrap_or_else(PoisonError::into_inner);
        let mut problems = Vec::new();
        if let Err(problem) = self.put_right(node, &mut problems) {
            problems.insert(0, problem);
        }
        let mut state = self.lock();
        for problem in problems.iter().filter(|problem| !state.problems.contains(problem)) {
            tracing::error!("{problem}");
        }
        if problems.is_empty() && !state.problems.is_empty() {
            tracing::info!("the host port is right again");
        }
        state.problems = problems;
        state.problems.is_empty()
    }

    fn put_right(&self, node: &Node, problems: &mut Vec<String>) -> Result<(), String> {
        let config = std::sync::Arc::clone(&node.state().desired.config);
        let Some(name) = &config.host_port else {
            address::release(node);
            return Ok(());
        };
        let failed = |what: &str, error: io::Error| format!("{name}, by which this node reaches pods: {what}: {error}");
        let leased = address::lease(node, &config).map_err(|problem| format!("{name} has no address: {problem}"))?;
        let wanted = Wanted {
            name: name.clone(),
            // Others know it: another underlay address does not change it.
            mac: *self.mac.get_or_init(|| derive::host_mac(&config.node, config.underlay.address)),
            mtu: config.mtu,
            brings_back: config.masquerade.is_some(),
            addresses: leased.iter().map(|address| on_interface(&config, *address)).collect(),
        };
        let mut netlink = Netlink::open().map_err(|error| failed("cannot talk to the kernel", error))?;
        let mut device = self.device(node, &mut netlink, &wanted).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => format!(
                "there is an interface {name} already that is not weftd's, so this node and its pods do not reach each other: \
                 remove or rename it, or choose another name by the key host_port"
            ),
            _ => failed("cannot make the interface", error),
        })?;
        node.set_host(Some(wanted.interface()));
        link::set(&mut netlink, &mut device, &wanted).map_err(|error| failed("cannot set up the interface", error))?;
        let index = device.index;
        self.lock().device = Some(device);
        node.host_made();
        let routes = routes::wanted(&config, &leased, index, &node.egress.plain(&config));
        // Known before they are made, so that what is told of them is not taken for somebody else's doing.
        self.lock().routes.clone_from(&routes);
        routes::set(&mut netlink, index, &routes, name, problems)
            .map_err(|error| failed("cannot set the routes", error))
    }

    /// The device, made anew if it is not there.
    fn device(&self, node: &Node, netlink: &mut Netlink, wanted: &Wanted) -> io::Result<Made> {
        let known = self.lock().device.clone();
        if let Some(device) = known {
            if netlink.links()?.iter().any(|link| link.index == device.index) {
                return Ok(device);
            }
            tracing::warn!("{} is gone: it is made anew", wanted.name);
        }
        node.remove_host();
        if netlink.link(&wanted.name)?.is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let tap = Tap::create(&wanted.name)?;
        let index = netlink.link(&wanted.name)?.ok_or(io::ErrorKind::NotFound)?.index;
        // In this order the port never forwards for nobody, and the first frames of the interface find it open.
        node.set_host(Some(wanted.interface()));
        node.router.add_port(HOST, Device::Tap(tap)).map_err(|error| match error {
            RouterError::Device(error) => error,
            RouterError::Stopped => io::Error::other(error.to_string()),
        })?;
        let device = Made { index, addresses: Vec::new() };
        self.lock().device = Some(device.clone());
        Ok(device)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whole values are put in; none is changed in steps.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wanted {
    /// As the router sees it.
    fn interface(&self) -> Pod {
        let mut pod = Pod {
            mac: self.mac,
            ipv4: Vec::new(),
            ipv6: Vec::new(),
            mtu: self.mtu,
            limits: Limits::default(),
            dhcp: Dhcp::default(),
        };
        for net in &self.addresses {
            match net.addr() {
                IpAddr::V4(address) => pod.ipv4.push(address),
                IpAddr::V6(address) => pod.ipv6.push(address),
            }
        }
        pod
    }
}

/// An address with the prefix that it has on the interface: the segment's, or its own alone.
fn on_interface(config: &Config, address: IpAddr) -> IpNet {
    let segment = config.segment.iter().find(|segment| segment.contains(&address));
    let whole = IpNet::from(address);
    segment.and_then(|segment| IpNet::new(address, segment.prefix_len()).ok()).unwrap_or(whole)
}
