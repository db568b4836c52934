//! What changes under the underlay while weftd runs: this node's address in it, and its device's MTU, and with that the pods', unless the
//! configuration says it.
//!
//! Another address is one that a reload brings, or a source ([`View::address`](crate::control::source::View)), or the default route's interface
//! where nobody says one. All that leads to other nodes is bound to it anew ([`crate::uplink::Uplink::rebind`]), pods' ports are not touched, and
//! the source is told, so that the other nodes follow. An address that goes takes nothing with it: sockets stay bound to it, and work again
//! when it is back, unless there is another one by then.
//!
//! Tables follow at once, the host port's interface and the pods' devices right after. A wider device does not make the ways behind it wider: each
//! keeps what was measured until more was. What a pod's kernel has remembered of a way that carries more by now, it is made to forget,
//! for it would believe in it for minutes, and nothing that it is told by ICMP makes a path wider.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use weft_api::AttachmentKey;
use weft_router::port::sys::namespace as kernel;

use super::Node;
use crate::attach::namespace::enter;
use crate::attach::{owner, pod::Interface};
use crate::control::config::Config;
use crate::control::config::source::SourceConfig;
use crate::control::host::Host;
use crate::netlink::{LinkChange, Netlink};
use crate::sysctl;

impl Node {
    /// Something has changed on the interface of this number, or on any of them: it may be the underlay's device, or be about to become it.
    pub fn follow_uplink(&self, index: Option<u32>) {
        let known = self.uplink_index.load(Ordering::Relaxed);
        let is_settled = {
            let state = self.state();
            known != 0 && state.view.address.is_none_or(|said| said == state.local.underlay.address)
        };
        // Interfaces of others come and go all the time.
        if is_settled && index.is_some_and(|index| index != known) {
            return;
        }
        let looked = Netlink::open()
            .and_then(|mut netlink| Ok(Host { defaults: netlink.default_devices()?, ..netlink.host()? }));
        let Ok(host) = looked else { return };
        let _reloading = self.reloading.lock().unwrap_or_else(PoisonError::into_inner);
        self.follow_host(&host);
    }

    /// The machine looks like this. To be called while nothing is reloaded.
    fn follow_host(&self, host: &Host) {
        let (before, address) = {
            let state = self.state();
            (Arc::clone(&state.local), state.desired.config.address_on(host, state.view.address))
        };
        let after = before.seen_on(host, address);
        let has_moved = address != before.underlay.address;
        if has_moved && let Err(error) = self.rebind(&after) {
            return self.uplink.set_stuck(Some(format!(
                "this node's underlay address is {address}, but what leads to other nodes cannot be bound to it: {error:#}"
            )));
        }
        let device = host.holder_of(address);
        let known = self.uplink_index.swap(device.map_or(0, |device| device.index), Ordering::Relaxed);
        match device {
            Some(device) => self.uplink.device_found(device.index, &after.underlay, &self.router),
            None if known != 0 => {
                tracing::warn!(%address, "no interface has this node's underlay address any more: waiting for it");
            }
            None => {}
        }
        if after == *before {
            return;
        }
        self.put_seen(host, &before, after);
        if has_moved {
            self.keep_cluster();
        }
    }

    /// Binds the underlay to this configuration's address.
    ///
    /// # Errors
    /// It stays where it was.
    pub(super) fn rebind(&self, config: &Config) -> anyhow::Result<()> {
        self.uplink.rebind(&config.underlay, &self.router)?;
        self.uplink.set_stuck(None);
        tracing::info!(address = %config.underlay.address, "this node has another underlay address");
        Ok(())
    }

    /// What could not be bound to this node's address is tried again.
    pub fn review_uplink(&self) {
        if self.uplink.is_stuck() {
            self.follow_uplink(None);
        }
    }

    /// Puts what was found on the machine in force.
    fn put_seen(&self, host: &Host, before: &Config, after: Config) {
        let address = after.underlay.address;
        let after = Arc::new(after);
        let mut state = self.state();
        let desired = state.desired.reconfigured(Arc::new(state.desired.config.seen_on(host, address)));
        state.local = Arc::clone(&after);
        self.put_in_force(&mut state, desired);
        self.tell_facts(&state);
        drop(state);
        if before.underlay.mtu != after.underlay.mtu {
            let device = host.holder_of(address).map_or("", |device| &device.name);
            tracing::info!(device, mtu = after.underlay.mtu, pods = after.mtu, "the underlay's device has another MTU");
        }
        self.probing.try_rise();
        self.host.kick();
        if before.mtu != after.mtu {
            self.resize_pods(before.mtu, after.mtu);
        }
    }

    /// Has the source say what this node is now.
    pub(super) fn tell_facts(&self, state: &super::State) {
        if let Some(facts) = &self.facts {
            let changed = |known: &mut Arc<Config>| {
                let is_new = *known != state.local;
                known.clone_from(&state.local);
                is_new
            };
            facts.send_if_modified(changed);
        }
    }

    /// The address that a reload starts from, where the file says none.
    pub(super) fn known_address(&self) -> Option<IpAddr> {
        let local = Arc::clone(&self.state().local);
        (local.source != SourceConfig::File).then_some(local.underlay.address)
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
