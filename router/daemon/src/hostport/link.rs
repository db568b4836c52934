//! The interface itself: name, MAC, MTU, addresses, and how the kernel behaves there.

use std::io;

use rustix::io::Errno;

use super::{Made, Wanted};
use crate::attach::pod;
use crate::netlink::{Link, LinkChange, Netlink};
use crate::sysctl;

/// As many segments as the kernel itself allows: <https://elixir.bootlin.com/linux/v6.18/A/ident/GSO_MAX_SEGS>.
const MOST_SEGMENTS: u32 = 65_535;

/// Makes the device what is wanted. Addresses that somebody else has given it stay.
pub fn set(netlink: &mut Netlink, device: &mut Made, wanted: &Wanted) -> io::Result<()> {
    let link = netlink.links()?.into_iter().find(|link| link.index == device.index).ok_or(io::ErrorKind::NotFound)?;
    if link.name != wanted.name {
        rename(netlink, &link, &wanted.name)?;
    }
    // What an uplink brings back has as many segments as the kernel merged, and is cut if that is too many. Others go on to nodes.
    let most = if wanted.brings_back { MOST_SEGMENTS } else { pod::gso_max_segments(wanted.mtu) };
    let change = LinkChange {
        mac: (link.mac != Some(wanted.mac)).then_some(wanted.mac),
        mtu: (link.mtu != wanted.mtu).then_some(wanted.mtu),
        gso_max_segments: (link.gso_max_segments != most).then_some(most),
        ..LinkChange::default()
    };
    if change.mac.is_some() || change.mtu.is_some() || change.gso_max_segments.is_some() {
        netlink.change_new_link(device.index, LinkChange { queue: Some(pod::QUEUE), ..change })?;
    }
    set_behaviour(wanted)?;
    if !link.up {
        netlink.change_link(device.index, LinkChange { up: true, ..LinkChange::default() })?;
    }
    set_addresses(netlink, device, wanted)
}

/// Older kernels rename an interface only while it is down.
fn rename(netlink: &mut Netlink, link: &Link, name: &str) -> io::Result<()> {
    tracing::warn!("{} was renamed to {}: it gets its name back", name, link.name);
    let change = LinkChange { name: Some(name), ..LinkChange::default() };
    match netlink.change_link(link.index, change) {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::BUSY) => {
            netlink.change_link(link.index, LinkChange { down: true, ..LinkChange::default() })?;
            netlink.change_link(link.index, change)?;
            netlink.change_link(link.index, LinkChange { up: true, ..LinkChange::default() })
        }
        result => result,
    }
}

fn set_addresses(netlink: &mut Netlink, device: &mut Made, wanted: &Wanted) -> io::Result<()> {
    let there: Vec<_> = netlink.addresses()?.into_iter().filter(|(at, _)| *at == device.index).collect();
    for address in wanted.addresses.iter().filter(|address| !there.contains(&(device.index, **address))) {
        netlink.add_bare_address(device.index, *address)?;
    }
    for address in device.addresses.iter().filter(|address| !wanted.addresses.contains(address)) {
        netlink.delete_address(device.index, *address)?;
    }
    device.addresses.clone_from(&wanted.addresses);
    Ok(())
}

/// As for a pod: no router advertisement changes anything, the link-local address is made of the MAC, and addresses can be used
/// at once. And no redirects: what comes by this interface and leaves by it again has been translated on the way, so
/// there is no shorter way.
fn set_behaviour(wanted: &Wanted) -> io::Result<()> {
    let has_ipv6 = wanted.addresses.iter().any(|address| address.addr().is_ipv6());
    pod::set_ipv6(&wanted.name, has_ipv6)?;
    pod::announce_when_up(&wanted.name);
    // Where /proc/sys is read-only the router still drops what redirects there are.
    let _ = sysctl::set(&format!("ipv4/conf/{}/send_redirects", wanted.name), "0");
    // What leaves in the node's name comes by this interface while the next hop's MAC is not known.
    let _ = sysctl::set(&format!("ipv4/conf/{}/accept_local", wanted.name), "1");
    // The larger of the two values holds: where all interfaces are strict, this one is loose, for what comes by it is from anywhere.
    let strict = |name: &str| {
        std::fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{name}/rp_filter"))
            .is_ok_and(|text| text.trim() == "1")
    };
    if strict("all") || strict(&wanted.name) {
        let _ = sysctl::set(&format!("ipv4/conf/{}/rp_filter", wanted.name), "2");
    }
    Ok(())
}
