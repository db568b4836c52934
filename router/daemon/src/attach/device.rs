//! A pod's device: which kind it gets, and making it.
//!
//! A [`PortKind::Tap`] is a TAP. It hands over whole superframes, which makes it the faster one for bulk TCP. A [`PortKind::Xdp`] is a veth whose
//! host end leads to AF_XDP sockets, which costs fewer system calls for each small packet. [`PortKind::Auto`] is a TAP
//! wherever TAPs can be made, and otherwise a veth, if AF_XDP works. Both are tried before they are relied upon: the first when weftd starts or when a
//! pod first asks for it, and what came of it holds until weftd is started again.

use std::io;
use std::os::fd::AsFd;
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};

use rustix::io::Errno;
use weft_api::{Failure, code};
use weft_router::port::tap::Tap;
use weft_router::{Device, PortId, Router, RouterError};

use super::namespace::Namespace;
use super::pod::{self, Interface, Raw, SetUpError};
use super::veth::{Veth, Veths};
use super::{DRAWS, random};
use crate::control::config::PortKind;
use crate::netlink::{LinkChange, Netlink, Route};
use crate::shortage::{ADVICE, is_shortage};

/// The kinds of devices of this node.
#[derive(Debug)]
pub struct Devices {
    configured: PortKind,
    mtu: u32,
    /// How many workers a veth is made for.
    workers: u32,
    removed: Sender<Option<u32>>,
    tap: OnceLock<Result<(), String>>,
    veths: OnceLock<Result<Arc<Veths>, String>>,
}

/// A device of either kind.
#[derive(Debug)]
pub enum Chosen {
    /// A TAP.
    Tap,
    /// A veth.
    Veth(Arc<Veths>),
}

impl Devices {
    /// For a node where `configured` is the rule. Tries what that needs. `removed` is told the number of a veth that has gone, and nothing
    /// if any may have.
    pub fn new(configured: PortKind, mtu: u32, workers: usize, removed: Sender<Option<u32>>) -> Devices {
        let workers = u32::try_from(workers).unwrap_or(u32::MAX);
        let devices = Devices { configured, mtu, workers, removed, tap: OnceLock::new(), veths: OnceLock::new() };
        match (configured, devices.choose(None)) {
            (PortKind::Tap, _) => {}
            (_, Ok(_)) => tracing::info!("pods' ports: {}", devices.shown()),
            (_, Err(failure)) => tracing::error!("{failure}"),
        }
        devices
    }

    /// The kind for a pod that asks for `asked`.
    ///
    /// # Errors
    /// It cannot be had, and why.
    pub fn choose(&self, asked: Option<PortKind>) -> Result<Chosen, Failure> {
        let kind = asked.unwrap_or(self.configured);
        match kind {
            PortKind::Tap => return Ok(Chosen::Tap),
            PortKind::Auto if self.tap().is_ok() => return Ok(Chosen::Tap),
            PortKind::Auto | PortKind::Xdp => {}
        }
        self.veths().map(|veths| Chosen::Veth(Arc::clone(veths))).map_err(|why| Failure {
            code: code::NOT_AVAILABLE,
            msg: match self.tap() {
                Err(tap) if kind == PortKind::Auto => {
                    format!("no TAP can be made ({tap}), nor can AF_XDP be used: {why}")
                }
                _ => format!("AF_XDP ports cannot be used: {why}"),
            },
            details: "put that right and restart weftd, or write port = \"tap\"".into(),
        })
    }

    /// What a pod that asks for `asked` may have after no TAP could be made for it.
    pub fn instead_of_tap(&self, asked: Option<PortKind>) -> Option<Arc<Veths>> {
        match asked.unwrap_or(self.configured) {
            PortKind::Auto => self.veths().ok().map(Arc::clone),
            PortKind::Tap | PortKind::Xdp => None,
        }
    }

    /// What pods get unless they ask for something, and why.
    pub fn shown(&self) -> String {
        match (self.configured, self.choose(None)) {
            (PortKind::Tap, _) => "tap".into(),
            (PortKind::Auto, Ok(Chosen::Tap)) => "tap (auto)".into(),
            (PortKind::Auto, Ok(Chosen::Veth(veths))) => {
                let why = self.tap().err().map(String::as_str).unwrap_or_default();
                format!("xdp, offloads: {} (auto: no TAP can be made: {why})", veths.capabilities)
            }
            (_, Ok(Chosen::Veth(veths))) => format!("xdp, offloads: {}", veths.capabilities),
            (_, Ok(Chosen::Tap) | Err(_)) => "none".into(),
        }
    }

    fn tap(&self) -> Result<&(), &String> {
        self.tap.get_or_init(|| create_tap().map(drop).map_err(|error| error.to_string())).as_ref()
    }

    fn veths(&self) -> Result<&Arc<Veths>, &String> {
        let start = || Veths::start(self.mtu, self.workers, self.removed.clone()).map_err(|error| format!("{error:#}"));
        self.veths.get_or_init(start).as_ref()
    }

    /// The veths, if there ever was one.
    pub fn started(&self) -> Option<&Arc<Veths>> {
        self.veths.get()?.as_ref().ok()
    }

    /// Makes a veth, one end of it in the pod, complete and still down.
    ///
    /// # Errors
    /// The interface's name is taken, or the kernel refuses.
    pub fn make_veth(&self, veths: &Arc<Veths>, namespace: &Namespace, interface: &Interface) -> Result<Veth, Failure> {
        let pod = LinkChange { namespace: Some(namespace.as_fd()), ..interface.change() };
        veths.make(pod, self.workers).map_err(|error| match Errno::from_io_error(&error) {
            Some(Errno::EXIST) => exists(interface),
            _ => kernel("make a veth into the pod's network namespace", &error),
        })
    }
}

/// Gives a veth to the workers.
///
/// # Errors
/// Those of [`Router::add_port`].
pub fn open_veth(router: &Router, port: PortId, veth: &Veth) -> Result<(), RouterError> {
    veth.keep_ready(router);
    let added = veth.enter(|index| Ok(router.add_port(port, Device::Veth(index))));
    added.unwrap_or_else(|error| Err(RouterError::Device(error)))
}

/// Makes a TAP that is the pod's interface. If the pod's namespace is to be `watched`, so that somebody notices when it is given up, it
/// is made there; otherwise here, and moved, which takes the kernel much longer: a descriptor opened there keeps the namespace alive.
/// Dropping the TAP is the undo, wherever the device is.
///
/// # Errors
/// What the kernel refuses, and what to do.
pub fn make_tap(namespace: &Namespace, watched: bool, interface: &mut Interface) -> Result<Tap, Failure> {
    if watched {
        let name = interface.name.clone();
        let made = namespace.enter(|| {
            // The kernel would take a TAP of that name for the one that is meant.
            if pod::index_of(&name)?.is_some() {
                return Err(Errno::EXIST.into());
            }
            let tap = Tap::create(&name)?;
            Ok((tap, pod::set_up(Raw { name: &name, is_complete: false }, &*interface)))
        });
        let (tap, set_up) = made.map_err(|error| match Errno::from_io_error(&error) {
            Some(Errno::EXIST | Errno::BUSY) => exists(interface),
            _ => kernel("make a TAP device in the pod's network namespace", &error),
        })?;
        return made_with(set_up, interface).map(|()| tap);
    }
    let tap = create_tap().map_err(|error| kernel("make a TAP device", &error))?;
    let name = tap.name().to_owned();
    let moved = (|| {
        let mut netlink = Netlink::open()?;
        let index = pod::index_of(&name)?.ok_or(Errno::NODEV)?;
        netlink.change_link(index, LinkChange { namespace: Some(namespace.as_fd()), ..LinkChange::default() })
    })();
    moved.map_err(|error| kernel("move the TAP device into the pod's network namespace", &error))?;
    set_up(namespace, Raw { name: &name, is_complete: false }, interface).map(|()| tap)
}

/// Makes the device `raw`, which is in the pod, what it shall be.
///
/// # Errors
/// The interface's name is taken, or the kernel refuses.
pub fn set_up(namespace: &Namespace, raw: Raw<'_>, interface: &mut Interface) -> Result<(), Failure> {
    let set_up = namespace.enter(|| Ok(pod::set_up(raw, &*interface)));
    made_with(set_up.map_err(|error| kernel("enter the pod's network namespace", &error))?, interface)
}

/// Gives an interface that was made without addresses those that it has by now.
///
/// # Errors
/// The kernel refuses.
pub fn complete(namespace: &Namespace, interface: &mut Interface) -> Result<(), Failure> {
    let completed = namespace.enter(|| Ok(pod::complete(&*interface)));
    made_with(completed.map_err(|error| kernel("enter the pod's network namespace", &error))?, interface)
}

fn made_with(set_up: Result<Vec<Route>, SetUpError>, interface: &mut Interface) -> Result<(), Failure> {
    match set_up {
        Ok(routes) => {
            interface.routes = routes;
            Ok(())
        }
        Err(SetUpError::Exists) => Err(exists(interface)),
        Err(SetUpError::Step(what, error)) => Err(kernel(&format!("{what} in the pod"), &error)),
    }
}

fn exists(interface: &Interface) -> Failure {
    Failure {
        code: code::EXISTS,
        msg: format!("the pod has an interface {} already", interface.name),
        details: "DEL comes before another ADD; or choose another CNI_IFNAME".into(),
    }
}

fn kernel(what: &str, error: &io::Error) -> Failure {
    let passes = is_shortage(error);
    Failure {
        code: if passes { code::TRY_AGAIN } else { code::INTERNAL },
        msg: format!("cannot {what}: {error}"),
        details: match Errno::from_io_error(error) {
            _ if passes => ADVICE.into(),
            Some(Errno::PERM) => "weftd needs CAP_NET_ADMIN and CAP_SYS_ADMIN".into(),
            Some(Errno::NOENT | Errno::NODEV) => "load the kernel module tun and provide /dev/net/tun".into(),
            Some(Errno::OPNOTSUPP) => "load the kernel module veth".into(),
            _ => String::new(),
        },
    }
}

/// A TAP of a random name, which no other ADD and no user has.
fn create_tap() -> io::Result<Tap> {
    for _ in 0..DRAWS {
        match Tap::create(&random_name()?) {
            Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::BUSY | Errno::EXIST)) => {}
            made => return made,
        }
    }
    Err(Errno::EXIST.into())
}

fn random_name() -> io::Result<String> {
    let [a, b, c, d] = random()?;
    Ok(format!("weft{a:02x}{b:02x}{c:02x}{d:02x}"))
}
