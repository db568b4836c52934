//! What changes on the underlay's device while weftd runs: its MTU, and with it that of pods, unless the configuration says it.
//!
//! Tables follow at once, the host port's interface and the pods' devices right after. A wider device does not make the ways behind it wider: each
//! keeps what was measured until more was. What a pod's kernel has remembered of a way that carries more by now, it is made to forget,
//! for it would believe in it for minutes, and nothing that it is told by ICMP makes a path wider.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use weft_api::AttachmentKey;
use weft_router::port::sys::namespace as kernel;

use super::Node;
use crate::attach::namespace::enter;
use crate::attach::{owner, pod::Interface};
use crate::control::config::Config;
use crate::control::config::check::MAX_MTU;
use crate::netlink::{LinkChange, Netlink};
use crate::sysctl;

/// The least that pods are given: what IPv6 demands.
const LEAST: u32 = weft_router::tables::LEAST_V6;

impl Node {
    /// The interface of this number may be the underlay's device, which may have another MTU by now; `None`: any of them.
    pub fn follow_uplink(&self, index: Option<u32>) {
        let known = self.uplink_index.load(Ordering::Relaxed);
        // Interfaces of others come and go all the time.
        if index.is_some_and(|index| known != 0 && index != known) {
            return;
        }
        let address = self.state().desired.config.underlay.address;
        let Ok(host) = Netlink::open().and_then(|mut netlink| netlink.host()) else { return };
        let device = host.holder_of(address);
        self.uplink_index.store(device.map_or(0, |device| device.index), Ordering::Relaxed);
        let Some(device) = device else { return };
        let _reloading = self.reloading.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.state();
        let before = Arc::clone(&state.desired.config);
        if before.underlay.mtu == device.mtu || before.underlay.address != address {
            return;
        }
        let change = |config: &Config| {
            let mut config = config.clone();
            (config.mtu, config.underlay.mtu) = (mtu_of(&before, device.mtu), device.mtu);
            Arc::new(config)
        };
        let desired = state.desired.reconfigured(change(&before));
        let local = change(&state.local);
        state.local = local;
        let after = desired.config.mtu;
        self.put_in_force(&mut state, desired);
        drop(state);
        tracing::info!(device = device.name, mtu = device.mtu, pods = after, "the underlay's device has another MTU");
        self.probing.try_rise();
        self.host.kick();
        if before.mtu != after {
            self.resize_pods(before.mtu, after);
        }
    }

    /// Gives pods' devices another MTU, where nobody else has changed it.
    fn resize_pods(&self, before: u32, after: u32) {
        for (key, mut interface, is_tap) in self.interfaces() {
            // The far end of a veth would drop what is longer.
            if interface.mtu != before || after > before && !is_tap {
                continue;
            }
            let done = self.inside(&key, || set_mtu(&interface.name, before, after));
            match done {
                Some(Ok(())) => {
                    interface.mtu = after;
                    self.change(&key, &interface);
                }
                Some(Err(error)) => {
                    tracing::warn!(container = key.container, %error, "the pod's device keeps its MTU until the pod is made anew");
                }
                None => tracing::debug!(container = key.container, "the pod's namespace cannot be entered"),
            }
        }
    }

    /// Has pods forget what they remember of paths.
    pub fn forget_paths_in_pods(&self) {
        for (key, interface, _) in self.interfaces() {
            if let Some(Err(error)) = self.inside(&key, || forget_paths(&interface)) {
                tracing::debug!(container = key.container, %error, "the pod believes in narrow paths until that is too long ago");
            }
        }
    }

    fn interfaces(&self) -> Vec<(AttachmentKey, Interface, bool)> {
        let state = self.state();
        let all = state.attachments.iter();
        all.map(|(key, attachment)| (key.clone(), attachment.interface.clone(), attachment.veth.is_none())).collect()
    }

    /// Does something inside of a pod's namespace; `None` if that cannot be found, as before Linux 6.18.
    fn inside<T: Send>(
        &self,
        key: &AttachmentKey,
        work: impl FnOnce() -> io::Result<T> + Send,
    ) -> Option<io::Result<T>> {
        let record = self.store.get(&owner(key))?;
        let netns = record.facts.netns?;
        let namespace: OwnedFd = kernel::open(netns.cookie, u32::try_from(netns.inode).ok()?).ok()??;
        Some(enter(namespace.as_fd(), work))
    }
}

/// What a device with that MTU leaves for pods, if the configuration does not say it.
fn mtu_of(config: &Config, device: u32) -> u32 {
    let overhead = config.underlay.mtu.saturating_sub(config.mtu);
    if config.mtu_is_given { config.mtu } else { device.saturating_sub(overhead).clamp(LEAST, MAX_MTU) }
}

fn set_mtu(name: &str, before: u32, after: u32) -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    let link = netlink.link(name)?.ok_or(io::ErrorKind::NotFound)?;
    if link.mtu == before {
        netlink.change_link(link.index, LinkChange { mtu: Some(after), ..LinkChange::default() })?;
    }
    Ok(())
}

/// For IPv4 the kernel has a file for that; what it remembers of IPv6 stands by the route, and goes with it.
fn forget_paths(interface: &Interface) -> io::Result<()> {
    sysctl::trigger("ipv4/route/flush")?;
    let mut netlink = Netlink::open()?;
    let link = netlink.link(&interface.name)?.ok_or(io::ErrorKind::NotFound)?;
    let v6 = interface.routes.iter().filter(|route| route.destination.addr().is_ipv6());
    v6.into_iter().try_for_each(|route| netlink.replace_route(link.index, route))
}
