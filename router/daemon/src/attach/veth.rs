//! Veths whose host ends lead to AF_XDP sockets.
//!
//! A TAP ends with the process that has its descriptor; a veth would stay, with nobody behind it. So the host ends lie in a network
//! namespace of weftd's own, which has no name and ends with weftd however that ends: the kernel then removes them, and the
//! pods' ends with them. Nothing of it is seen on the node, and nothing is left to be cleaned up.
//!
//! A veth that goes with its pod's namespace makes no AF_XDP socket readable, so the kernel's notices of removed interfaces are followed.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::Sender;

use anyhow::Context;
use rustix::io::Errno;
use weft_router::port::Capabilities;
use weft_router::port::sys::namespace::new_network;
use weft_router::port::xdp;

use super::namespace::enter;
use crate::netlink::{Netlink, VethPair};

/// MTU of host ends, the largest that a veth has. A pod that takes its own to be larger than it is shall hear so from its gateway,
/// and see its frames counted; the host end's MTU would end them unseen.
const HOST_MTU: u32 = 65_535;

/// Where host ends lie.
#[derive(Debug)]
pub struct Veths {
    namespace: OwnedFd,
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
    /// Makes the namespace, and tries AF_XDP with frames of up to this MTU. `removed` is told whenever a veth may have gone.
    ///
    /// # Errors
    /// Why AF_XDP cannot be used.
    pub fn start(mtu: u32, removed: Sender<()>) -> anyhow::Result<Arc<Veths>> {
        let namespace = new_network().context("cannot make a network namespace (CAP_SYS_ADMIN)")?;
        let capabilities =
            enter(namespace.as_fd(), || Ok(probe(mtu))).context("cannot enter a network namespace")??;
        let mut links =
            enter(namespace.as_fd(), Netlink::follow_links).context("cannot follow the interfaces of a namespace")?;
        let follow = move || while links.await_removal().is_ok() && removed.send(()).is_ok() {};
        let thread = std::thread::Builder::new().name("weft-veths".into()).stack_size(256 << 10);
        thread.spawn(follow).context("cannot start a thread (ulimit -u)")?;
        Ok(Arc::new(Veths { namespace, capabilities }))
    }

    /// The numbers of the host ends that are there.
    ///
    /// # Errors
    /// The kernel's.
    pub fn present(&self) -> io::Result<BTreeSet<u32>> {
        let links = self.enter(|| Netlink::open()?.links())?;
        Ok(links.into_iter().map(|link| link.index).collect())
    }

    /// Makes a veth with that name at both ends, one of them in the pod and down.
    ///
    /// # Errors
    /// The kernel's.
    pub fn make(self: &Arc<Veths>, name: &str, pod: BorrowedFd<'_>, mtu: u32, queues: u32) -> io::Result<Veth> {
        let pair = VethPair { names: [name, name], mtus: [HOST_MTU, mtu], pod: Some(pod), queues };
        let index = self.enter(|| {
            let mut netlink = Netlink::open()?;
            netlink.add_veth(pair)?;
            Ok(netlink.link(name)?.ok_or(Errno::NODEV)?.index)
        })?;
        let veth = Veth { veths: Arc::clone(self), index };
        veth.enter(|index| Netlink::open()?.set_up_silently(index))?;
        Ok(veth)
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

    /// Runs `work` where the host end is, with its number there.
    pub fn enter<T: Send>(&self, work: impl FnOnce(u32) -> io::Result<T> + Send) -> io::Result<T> {
        self.veths.enter(|| work(self.index))
    }
}

impl Drop for Veth {
    fn drop(&mut self) {
        if let Err(error) = self.enter(|index| Netlink::open()?.delete_link(index)) {
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
    let names = ["probe0", "probe1"];
    let mut netlink = Netlink::open().context("cannot open a netlink socket")?;
    netlink
        .add_veth(VethPair { names, mtus: [mtu; 2], pod: None, queues: 1 })
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
