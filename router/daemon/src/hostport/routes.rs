//! The kernel's routes into the pod network.
//!
//! In routed mode one for each range of this node and of its peers, by the gateway: a packet's way is then the router's to find, and the
//! kernel asks for one MAC only. In bridged mode the segment is on-link, as it is for pods. Each names the host port's address as
//! source, so that what this node sends by itself comes from a range of its own, which peers insist on. The ranges of a peer that is sent
//! packets as they are have a route by that peer: what comes from there comes by that interface, and a kernel that checks
//! for it (`rp_filter`) finds it right.
//!
//! Behind those of this node's own ranges stands one that leads nowhere. All others end with the host port, and so with weftd; this one
//! stays, so that packets for pods are answered as unreachable while weftd is away, instead of being sent back to a router
//! that would send them here again.
//!
//! Routes of others are never replaced. One that takes packets for pods elsewhere is reported.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use rustix::io::Errno;
use weft_router::tables::Mode;

use crate::control::config::{Config, Peer};
use crate::netlink::Netlink;
use crate::netlink::routes::{KernelRoute, PROTOCOL};

/// Problems of this kind that are told one by one.
const SHOWN: usize = 3;

/// The metric of the routes that lead nowhere: worse than what anybody else writes.
const LAST: u32 = 1 << 30;

/// The routes that there shall be, by the interface of this number with these addresses. `plain` says by which interface peers with such an
/// underlay address are sent packets as they are.
pub fn wanted(config: &Config, addresses: &[IpAddr], index: u32, plain: &BTreeMap<IpAddr, u32>) -> Vec<KernelRoute> {
    let own: Vec<IpNet> = match config.mode {
        Mode::Routed => config.ranges.iter().chain(&config.former).map(IpNet::trunc).collect(),
        Mode::Bridged => config.segment.iter().map(IpNet::trunc).collect(),
    };
    // A family that this node has no range of it cannot speak.
    let source = |to: IpNet| addresses.iter().find(|own| own.is_ipv4() == to.addr().is_ipv4()).copied();
    let unicast = |destination: IpNet, gateway, device| {
        let source = Some(source(destination)?);
        let (protocol, metric, unreachable) = (PROTOCOL, 0, false);
        Some(KernelRoute { destination, gateway, device: Some(device), source, protocol, metric, unreachable })
    };
    let by_gateway = |destination: IpNet| {
        let gateway = match config.mode {
            Mode::Routed => config.gateway_for(source(destination)?),
            Mode::Bridged => None,
        };
        unicast(destination, gateway, index)
    };
    let by_peer = |peer: &Peer, destination: IpNet| match plain.get(&peer.underlay) {
        // The kernel has no routes of IPv6 to a next hop of IPv4; the router needs its MAC alone.
        Some(device) if peer.underlay.is_ipv6() || destination.addr().is_ipv4() => {
            unicast(destination, Some(peer.underlay), *device)
        }
        _ => by_gateway(destination),
    };
    let nowhere = |route: &KernelRoute| KernelRoute {
        gateway: None,
        device: None,
        source: None,
        metric: LAST,
        unreachable: true,
        ..*route
    };
    let own: Vec<KernelRoute> = own.into_iter().filter_map(by_gateway).collect();
    let mut all: Vec<KernelRoute> = own.iter().map(nowhere).collect();
    all.extend(own);
    if config.mode == Mode::Routed {
        let ranges = config.peers.iter().flat_map(|peer| peer.ranges.iter().map(move |range| (peer, range.trunc())));
        all.extend(ranges.filter_map(|(peer, range)| by_peer(peer, range)));
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
        let old = |other: &&KernelRoute| {
            is_ours(other) && (other.destination, other.metric) == (route.destination, route.metric)
        };
        for old in there.iter().filter(old) {
            netlink.delete_route(old)?;
        }
        match netlink.add_main_route(route) {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::EXIST) => {}
            result => result?,
        }
    }
    let places: std::collections::BTreeSet<_> = wanted.iter().map(|route| (route.destination, route.metric)).collect();
    for route in there.iter().filter(|route| is_ours(route) && !places.contains(&(route.destination, route.metric))) {
        netlink.delete_route(route)?;
    }
    for route in there.iter().filter(|route| route.device != Some(index) && !is_ours(route)) {
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

/// Takes all routes of weftd's away.
pub fn forget() -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    let ours: Vec<KernelRoute> = netlink.main_routes()?.into_iter().filter(is_ours).collect();
    ours.iter().try_for_each(|route| netlink.delete_route(route))
}

fn is_ours(route: &KernelRoute) -> bool {
    route.protocol == PROTOCOL
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
        lines_with(mode, addresses, &[])
    }

    fn lines_with(mode: &str, addresses: &[&str], plain: &[(&str, u32)]) -> Vec<String> {
        let text = format!(
            "node = \"n1\"\n{mode}\nmtu = 1450\nranges = [\"10.244.1.0/24\", \"fd00:10:244:1::/64\"]\n[underlay]\naddress = \
             \"10.200.0.1\"\n[[peers]]\nname = \"n2\"\nunderlay = \"10.200.0.2\"\nranges = [\"10.244.2.0/24\", \
             \"fd00:10:244:2::/64\"]"
        );
        let config = Config::read(&text, &Host::default()).unwrap().config;
        let addresses: Vec<IpAddr> = addresses.iter().map(|address| address.parse().unwrap()).collect();
        let line = |route: KernelRoute| {
            let by = route.gateway.map_or("on-link".to_owned(), |gateway| format!("by {gateway}"));
            match route.source {
                Some(source) => format!("{} {by} from {source}", route.destination),
                None => format!("{} nowhere", route.destination),
            }
        };
        let plain = plain.iter().map(|(peer, device)| (peer.parse().unwrap(), *device)).collect();
        let all = wanted(&config, &addresses, 7, &plain);
        assert!(all.iter().all(|route| route.unreachable == (route.metric == LAST)));
        all.into_iter().map(line).collect()
    }

    #[test]
    fn in_routed_mode_each_range_is_reached_by_the_gateway() {
        assert_eq!(
            lines("mode = \"routed\"", &["10.244.1.254", "fd00:10:244:1::fe"]),
            [
                "10.244.1.0/24 nowhere",
                "10.244.1.0/24 by 10.244.1.1 from 10.244.1.254",
                "10.244.2.0/24 by 10.244.1.1 from 10.244.1.254",
                "fd00:10:244:1::/64 nowhere",
                "fd00:10:244:1::/64 by fd00:10:244:1::1 from fd00:10:244:1::fe",
                "fd00:10:244:2::/64 by fd00:10:244:1::1 from fd00:10:244:1::fe",
            ]
        );
        assert_eq!(lines("mode = \"routed\"", &["10.244.1.254"]).len(), 3);
    }

    #[test]
    fn a_peer_that_is_sent_packets_as_they_are_is_the_way_to_its_ranges() {
        let all = lines_with("mode = \"routed\"", &["10.244.1.254", "fd00:10:244:1::fe"], &[("10.200.0.2", 3)]);
        assert!(all.contains(&"10.244.2.0/24 by 10.200.0.2 from 10.244.1.254".into()), "{all:?}");
        assert!(all.contains(&"fd00:10:244:2::/64 by fd00:10:244:1::1 from fd00:10:244:1::fe".into()), "{all:?}");
    }

    #[test]
    fn in_bridged_mode_the_segment_is_on_link() {
        let mode = "mode = \"bridged\"\nsegment = [\"10.244.0.0/16\", \"fd00:10:244::/48\"]";
        assert_eq!(
            lines(mode, &["10.244.1.254", "fd00:10:244:1::fe"]),
            [
                "10.244.0.0/16 nowhere",
                "10.244.0.0/16 on-link from 10.244.1.254",
                "fd00:10:244::/48 nowhere",
                "fd00:10:244::/48 on-link from fd00:10:244:1::fe"
            ]
        );
    }
}
