//! Veths whose host ends lead to AF_XDP sockets.
//!
//! A TAP ends with the process that has its descriptor; a veth would stay, with nobody behind it. So the host ends lie in a network
//! namespace of weftd's own, which has no name and ends with weftd however that ends: the kernel then removes them, and the
//! pods' ends with them. Nothing of it is seen on the node, and nothing is left to be cleaned up.
//!
//! A veth that goes with its pod's namespace makes no AF_XDP socket readable, so the kernel's notices of removed interfaces are followed.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use anyhow::Context;
use rustix::io::Errno;
use weft_router::Router;
use weft_router::port::Capabilities;
use weft_router::port::sys::namespace::new_network;
use weft_router::port::xdp;

use super::namespace::enter;
use crate::netlink::{LinkChange, Netlink, VethPair};

/// MTU of host ends, the largest that a veth has. A pod that takes its own to be larger than it is shall hear so from its gateway,
/// and see its frames counted; the host end's MTU would end them unseen.
const HOST_MTU: u32 = 65_535;

/// Numbers of host ends begin here: behind those that the kernel gives by itself.
const FIRST: u32 = 1 << 12;
/// How often another number is taken for a host end if one is in use.
const DRAWS: u32 = 16;

/// Where host ends lie.
pub struct Veths {
    namespace: OwnedFd,
    /// Of that namespace, wherever it is used.
    netlink: Mutex<Netlink>,
    /// Whether an interface there says nothing by itself when it comes up.
    is_silent: bool,
    next: AtomicU32,
    /// A veth of nobody's, see [`Veths::keep_ready`].
    idle: u32,
    ready: OnceLock<()>,
    /// What the kernel does with frames for AF_XDP.
    pub capabilities: Capabilities,
}

/// A pod's veth. It goes when this goes.
#[derive(Debug)]
pub struct Veth {
    veths: Arc<Veths>,
    index: u32,
}

impl Veths {
    /// Makes the namespace, and tries AF_XDP with frames of up to this MTU. `removed` is told the number of a veth that has gone, and nothing
    /// if any may have.
    ///
    /// # Errors
    /// Why AF_XDP cannot be used.
    pub fn start(mtu: u32, workers: u32, removed: Sender<Option<u32>>) -> anyhow::Result<Arc<Veths>> {
        let namespace = new_network().context("cannot make a network namespace (CAP_SYS_ADMIN)")?;
        let inside = || {
            let (mut netlink, mut links) = (Netlink::open()?, Netlink::follow_links()?);
            let probed = probe(mtu)?;
            let is_silent = fs::write("/proc/sys/net/ipv6/conf/default/addr_gen_mode", "1").is_ok();
            let idle = add_idle(&mut netlink, mtu, workers).context("cannot make a veth")?;
            let follow = move || while links.await_removal().is_ok_and(|index| removed.send(index).is_ok()) {};
            Ok::<_, anyhow::Error>((netlink, is_silent, idle, probed, follow))
        };
        let made = enter(namespace.as_fd(), || Ok(inside())).context("cannot enter a network namespace")?;
        let (netlink, is_silent, idle, capabilities, follow) = made?;
        let thread = std::thread::Builder::new().name("weft-veths".into()).stack_size(256 << 10);
        thread.spawn(follow).context("cannot start a thread (ulimit -u)")?;
        let (netlink, next, ready) = (Mutex::new(netlink), AtomicU32::new(FIRST), OnceLock::new());
        Ok(Arc::new(Veths { namespace, netlink, is_silent, next, idle, ready, capabilities }))
    }

    /// Has the workers keep for good what is dear to set up, from the first pod on: see [`Router::keep_veths`].
    pub fn keep_ready(&self, router: &Router) {
        self.ready.get_or_init(|| {
            if let Err(error) = self.enter(|| Ok(router.keep_veths(self.idle))).and_then(|kept| kept) {
                tracing::warn!(%error, "pods by AF_XDP are attached slowly");
            }
        });
    }

    /// The numbers of the host ends that are there.
    ///
    /// # Errors
    /// The kernel's.
    pub fn present(&self) -> io::Result<BTreeSet<u32>> {
        let links = self.netlink().links()?;
        Ok(links.into_iter().map(|link| link.index).collect())
    }

    /// Makes a veth, one end of it in the pod, complete and down.
    ///
    /// # Errors
    /// The kernel's; `EEXIST`: the pod has such an interface.
    pub fn make(self: &Arc<Veths>, pod: LinkChange<'_>, queues: u32) -> io::Result<Veth> {
        let mut netlink = self.netlink();
        for _ in 0..DRAWS {
            let index = FIRST.max(self.next.fetch_add(1, Ordering::Relaxed) & i32::MAX as u32);
            let name = format!("pod{index}");
            match netlink.add_veth(VethPair { name: &name, index, mtu: HOST_MTU, up: self.is_silent, pod, queues }) {
                Err(error) if Errno::from_io_error(&error) == Some(Errno::BUSY) => continue,
                made => made?,
            }
            let veth = Veth { veths: Arc::clone(self), index };
            let up = if self.is_silent { Ok(()) } else { netlink.set_up_silently(index) };
            drop(netlink);
            return up.map(|()| veth);
        }
        Err(Errno::BUSY.into())
    }

    fn netlink(&self) -> MutexGuard<'_, Netlink> {
        self.netlink.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        enter(self.namespace.as_fd(), work)
    }
}

impl Veth {
    /// Its number where it is.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// See [`Veths::keep_ready`].
    pub fn keep_ready(&self, router: &Router) {
        self.veths.keep_ready(router);
    }

    /// Runs `work` where the host end is, with its number there.
    pub fn enter<T: Send>(&self, work: impl FnOnce(u32) -> io::Result<T> + Send) -> io::Result<T> {
        self.veths.enter(|| work(self.index))
    }
}

/// A veth like those of pods, both of whose ends are here.
fn add_idle(netlink: &mut Netlink, mtu: u32, queues: u32) -> io::Result<u32> {
    let pod = LinkChange { name: Some("idle1"), mtu: Some(mtu), ..LinkChange::default() };
    netlink.add_veth(VethPair { name: "idle0", index: 0, mtu: HOST_MTU, up: false, pod, queues })?;
    let index = netlink.link("idle0")?.ok_or(Errno::NODEV)?.index;
    netlink.set_up_silently(index)?;
    Ok(index)
}

impl std::fmt::Debug for Veths {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Veths").field("capabilities", &self.capabilities).finish_non_exhaustive()
    }
}

impl Drop for Veth {
    fn drop(&mut self) {
        if let Err(error) = self.veths.netlink().delete_link(self.index) {
            tracing::warn!(%error, "a pod's veth could not be removed; it goes with the pod's namespace");
        }
    }
}

/// With a longer MTU nothing more is learned about the kernel.
pub const MAX_PROBED: u32 = 1500;

/// Tries a veth, both of whose ends are here.
///
/// # Errors
/// What does not work.
pub fn probe(mtu: u32) -> anyhow::Result<Capabilities> {
    let mut netlink = Netlink::open().context("cannot open a netlink socket")?;
    let names = ["probe0", "probe1"];
    let pod = LinkChange { name: Some(names[1]), mtu: Some(mtu), ..LinkChange::default() };
    netlink
        .add_veth(VethPair { name: names[0], index: 0, mtu, up: false, pod, queues: 1 })
        .context("cannot make a veth (kernel module veth)")?;
    let ends = names.map(|name| -> anyhow::Result<u32> {
        let index = netlink.link(name)?.context("the veth is gone")?.index;
        netlink.set_up_silently(index)?;
        Ok(index)
    });
    let [one, two] = ends;
    let ends = [one?, two?];
    let probed = xdp::probe(ends, mtu).context(
        "AF_XDP was tried on a veth (it takes CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN, and CAP_IPC_LOCK or a large `ulimit -l`)",
    );
    netlink.delete_link(ends[0]).context("cannot remove the veth that AF_XDP was tried on")?;
    probed
}
