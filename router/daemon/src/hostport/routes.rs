//! The kernel's routes into the pod network.
//!
//! In routed mode one for each range of this node and of its peers, by the gateway: a packet's way is then the router's to find, and the
//! kernel asks for one MAC only. In bridged mode the segment is on-link, as it is for pods. Each names the host port's address as
//! source, so that what this node sends by itself comes from a range of its own, which peers insist on.
//!
//! Routes of others are never replaced. One that takes packets for pods elsewhere is reported.

use std::io;
use std::net::IpAddr;

use rustix::io::Errno;
use weft_router::tables::Mode;

use crate::control::config::Config;
use crate::netlink::Netlink;
use crate::netlink::routes::{KernelRoute, PROTOCOL};

/// Problems of this kind that are told one by one.
const SHOWN: usize = 3;

/// The routes that there shall be, by the interface of this number with these addresses.
pub fn wanted(config: &Config, addresses: &[IpAddr], index: u32) -> Vec<KernelRoute> {
    let peers = config.peers.iter().flat_map(|peer| &peer.ranges);
    let destinations: Vec<_> = match config.mode {
        Mode::Routed => config.ranges.iter().chain(&config.former).chain(peers).collect(),
        Mode::Bridged => config.segment.iter().collect(),
    };
    let mut all: Vec<KernelRoute> = Vec::new();
    for destination in destinations {
        let same_family = |address: &&IpAddr| address.is_ipv4() == destination.addr().is_ipv4();
        // A family that this node has no range of it cannot speak.
        let Some(source) = addresses.iter().find(same_family) else { continue };
        let gateway = match config.mode {
            Mode::Routed => config.gateway_for(*source),
            Mode::Bridged => None,
        };
        let destination = destination.trunc();
        all.push(KernelRoute { destination, gateway, device: Some(index), source: Some(*source), protocol: PROTOCOL });
    }
    all.sort();
    all.dedup();
    all
}

/// Makes the routes that are missing, and takes away those of ours that are not wanted any more. Notes in `problems` what is in the way.
pub fn set(
    netlink: &mut Netlink,
    index: u32,
    wanted: &[KernelRoute],
    name: &str,
    problems: &mut Vec<String>,
) -> io::Result<()> {
    let there = netlink.main_routes()?;
    let mut in_the_way = Vec::new();
    for route in wanted.iter().filter(|route| !there.contains(route)) {
        // One of ours with another source or gateway would be in the way of the new one.
        let old = |other: &&KernelRoute| is_ours(other, index) && other.destination == route.destination;
        for old in there.iter().filter(old) {
            netlink.delete_route(old)?;
        }
        match netlink.add_main_route(route) {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::EXIST) => {}
            result => result?,
        }
    }
    let destinations: std::collections::BTreeSet<_> = wanted.iter().map(|route| route.destination).collect();
    for route in there.iter().filter(|route| is_ours(route, index) && !destinations.contains(&route.destination)) {
        netlink.delete_route(route)?;
    }
    for route in there.iter().filter(|route| route.device != Some(index)) {
        if wanted.iter().any(|wanted| wanted.destination.contains(&route.destination)) {
            in_the_way.push(route);
        }
    }
    problems.extend(in_the_way.iter().take(SHOWN).map(|route| describe(route, name)));
    if in_the_way.len() > SHOWN {
        problems.push(format!("{} more such routes are not {name}'s", in_the_way.len() - SHOWN));
    }
    Ok(())
}

fn is_ours(route: &KernelRoute, index: u32) -> bool {
    route.protocol == PROTOCOL && route.device == Some(index)
}

fn describe(route: &KernelRoute, name: &str) -> String {
    let by = match (route.gateway, route.device) {
        (Some(gateway), _) => format!("by {gateway}"),
        (None, Some(device)) => format!("by interface {device}"),
        (None, None) => "nowhere or several ways".to_owned(),
    };
    format!(
        "this machine has a route of its own to {}, {by}, so what it sends to pods there does not go by {name}: remove that route \
         (ip route show {}), or choose other ranges",
        route.destination, route.destination
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::host::Host;

    fn lines(mode: &str, addresses: &[&str]) -> Vec<String> {
        let text = format!(
            "node = \"n1\"\n{mode}\nmtu = 1450\nranges = [\"10.244.1.0/24\", \"fd00:10:244:1::/64\"]\n[underlay]\naddress = \
             \"10.200.0.1\"\n[[peers]]\nname = \"n2\"\nunderlay = \"10.200.0.2\"\nranges = [\"10.244.2.0/24\", \
             \"fd00:10:244:2::/64\"]"
        );
        let config = Config::read(&text, &Host::default()).unwrap().config;
        let addresses: Vec<IpAddr> = addresses.iter().map(|address| address.parse().unwrap()).collect();
        let line = |route: KernelRoute| {
            let by = route.gateway.map_or("on-link".to_owned(), |gateway| format!("by {gateway}"));
            format!("{} {by} from {}", route.destination, route.source.unwrap())
        };
        wanted(&config, &addresses, 7).into_iter().map(line).collect()
    }

    #[test]
    fn in_routed_mode_each_range_is_reached_by_the_gateway() {
        assert_eq!(
            lines("mode = \"routed\"", &["10.244.1.254", "fd00:10:244:1::fe"]),
            [
                "10.244.1.0/24 by 10.244.1.1 from 10.244.1.254",
                "10.244.2.0/24 by 10.244.1.1 from 10.244.1.254",
                "fd00:10:244:1::/64 by fd00:10:244:1::1 from fd00:10:244:1::fe",
                "fd00:10:244:2::/64 by fd00:10:244:1::1 from fd00:10:244:1::fe",
            ]
        );
        assert_eq!(lines("mode = \"routed\"", &["10.244.1.254"]).len(), 2);
    }

    #[test]
    fn in_bridged_mode_the_segment_is_on_link() {
        let mode = "mode = \"bridged\"\nsegment = [\"10.244.0.0/16\", \"fd00:10:244::/48\"]";
        assert_eq!(
            lines(mode, &["10.244.1.254", "fd00:10:244:1::fe"]),
            ["10.244.0.0/16 on-link from 10.244.1.254", "fd00:10:244::/48 on-link from fd00:10:244:1::fe"]
        );
    }
}
