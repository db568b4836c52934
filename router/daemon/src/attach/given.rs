//! What a request brings along that is otherwise chosen here: addresses of another IPAM plugin, and routes.
//!
//! Another plugin's addresses are entered into the lease store like our own, each as a set of one: so no two pods of this node
//! have the same one, whoever gave it, and all that rests on leases (checks, clean-up, views) holds for them. They must be
//! ones that can work: in routed mode of this node's ranges, since other nodes send elsewhere what is outside of them, and by its
//! gateway; in bridged mode of the segment.

use std::net::IpAddr;

use ipnet::IpNet;
use weft_api::{Attach, AttachedAddress, AttachedRoute, Failure, code};
use weft_ipam::{Range, RangeSet};
use weft_router::tables::Mode;

use super::addresses;
use super::pod::{Interface, unspecified_like};
use crate::control::config::Config;
use crate::netlink::Route;

/// Routes that one attachment may ask for.
const MAX_ROUTES: usize = 256;

/// The addresses that came with a request, each with its gateway, which is the unspecified address if it has none.
pub fn addresses(request: &Attach) -> Result<Vec<(IpNet, IpAddr)>, Failure> {
    let parse = |given: &AttachedAddress| {
        let net: IpNet = given.address.parse().map_err(|_| {
            refuse(code::CONFIG, format!("the IPAM plugin gave {:?}, which is no address with a prefix", given.address))
        })?;
        let gateway = given.gateway.to_canonical();
        if gateway.is_ipv4() != net.addr().is_ipv4() && !gateway.is_unspecified() {
            return Err(refuse(
                code::CONFIG,
                format!("the IPAM plugin gave {net} with a gateway {gateway} of the other family"),
            ));
        }
        Ok((net, if gateway.is_unspecified() { unspecified_like(net.addr()) } else { gateway }))
    };
    request.given.iter().map(parse).collect()
}

/// A set for each of these addresses, which has no other.
pub fn sets(config: &Config, given: &[(IpNet, IpAddr)]) -> Result<Vec<RangeSet>, Failure> {
    given.iter().map(|(net, gateway)| set(config, net.addr(), *gateway)).collect()
}

fn set(config: &Config, address: IpAddr, gateway: IpAddr) -> Result<RangeSet, Failure> {
    let own = config.gateway_for(address);
    let (within, whose) = match config.mode {
        Mode::Routed => (&config.ranges, "this node's ranges"),
        Mode::Bridged => (&config.segment, "the segment"),
    };
    let Some(net) = within.iter().find(|net| net.contains(&address)) else {
        let all: Vec<String> = within.iter().map(IpNet::to_string).collect();
        return Err(refuse(
            code::ADDRESS,
            format!(
                "the IPAM plugin gave {address}, which is not in {whose} ({}): nobody could reach it",
                all.join(", ")
            ),
        ));
    };
    let by_us = gateway.is_unspecified() || Some(gateway) == own;
    if !by_us && (config.mode == Mode::Routed || !net.contains(&gateway)) {
        let is = own.map_or("none of this family".to_owned(), |own| own.to_string());
        return Err(refuse(
            code::ADDRESS,
            format!("the IPAM plugin gave the gateway {gateway}; the gateway of this node is {is}"),
        ));
    }
    let range = Range::new(*net, Some(address), Some(address), own);
    // The network's own and the broadcast address are moved to their neighbours, or none is left.
    range.ok().filter(|range| range.start() == address).map(RangeSet::from).ok_or_else(|| {
        refuse(code::ADDRESS, format!("the IPAM plugin gave {address}, which is {net}'s network or broadcast address"))
    })
}

/// The routes that an interface shall have.
pub fn routes(asked: Option<&[AttachedRoute]>, interface: &Interface) -> Result<Vec<Route>, Failure> {
    let Some(asked) = asked else { return Ok(interface.default_routes()) };
    if asked.len() > MAX_ROUTES {
        return Err(refuse(code::CONFIG, format!("{} routes are asked for; {MAX_ROUTES} are the limit", asked.len())));
    }
    asked.iter().map(|route| parse_route(route, interface)).collect()
}

fn parse_route(asked: &AttachedRoute, interface: &Interface) -> Result<Route, Failure> {
    let wrong = |why: &str| refuse(code::CONFIG, format!("the route to {:?} cannot be made: {why}", asked.destination));
    let destination: IpNet = asked.destination.parse().map_err(|_| wrong("that is no prefix"))?;
    let destination = destination.trunc();
    let v4 = destination.addr().is_ipv4();
    let gateway = match asked.gateway.to_canonical() {
        gateway if gateway.is_unspecified() => interface.gateway(v4),
        gateway if gateway.is_ipv4() == v4 => Some(gateway),
        _ => return Err(wrong("its gateway is of the other family")),
    };
    // A scope other than the universe's is of routes that stay on the link.
    let gateway = if asked.scope.is_some_and(|scope| scope > 0) { None } else { gateway };
    let AttachedRoute { mtu, advmss, priority, scope, .. } = *asked;
    let route = interface.route(destination, gateway);
    Ok(Route { mtu, advmss, priority, scope, table: asked.table.unwrap_or(route.table), ..route })
}

/// A route as the protocol has it.
pub fn told(route: &Route) -> AttachedRoute {
    let Route { mtu, advmss, priority, scope, .. } = *route;
    let table = Some(route.table).filter(|table| *table != Route::new(route.destination).table);
    let gateway = route.gateway.unwrap_or_else(|| unspecified_like(route.destination.addr()));
    AttachedRoute { mtu, advmss, priority, table, scope, ..AttachedRoute::new(route.destination.to_string(), gateway) }
}

/// Ranges of a request for addresses without a port, and the pool that they belong to.
///
/// Without ranges, or inside the node's own, an address is one of the node's, and no pod has it. Other ranges are those of a network
/// that has nothing to do with the pods', and a pool of their own.
pub fn lease_only(config: &Config, request: &Attach) -> Result<(Vec<RangeSet>, String), Failure> {
    if request.ranges.is_empty() {
        return Ok((addresses::sets(config, request)?, String::new()));
    }
    let wrong = |error: &weft_ipam::RangeError| refuse(code::CONFIG, error.to_string());
    let mut sets = Vec::new();
    for set in &request.ranges {
        let parse = |asked: &weft_api::Range| {
            let subnet: IpNet =
                asked.subnet.parse().map_err(|_| refuse(code::CONFIG, format!("{:?} is no prefix", asked.subnet)))?;
            Range::new(subnet, asked.range_start, asked.range_end, asked.gateway).map_err(|error| wrong(&error))
        };
        let ranges = set.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
        sets.push(RangeSet::new(ranges).map_err(|error| wrong(&error))?);
    }
    let theirs = || sets.iter().flat_map(RangeSet::ranges);
    let own: Vec<&IpNet> = config.ranges.iter().chain(&config.segment).collect();
    let inside =
        |range: &Range| config.ranges.iter().any(|own| own.contains(&range.start()) && own.contains(&range.end()));
    let touches = |range: &Range| {
        let same = |own: &&&IpNet| own.addr().is_ipv4() == range.start().is_ipv4();
        own.iter().filter(same).any(|own| own.network() <= range.end() && range.start() <= own.broadcast())
    };
    if theirs().all(inside) {
        return Ok((sets, String::new()));
    }
    match theirs().find(|range| touches(range)) {
        Some(range) => Err(refuse(
            code::CONFIG,
            format!(
                "{range} is partly of the pods' own addresses: take a range inside of this node's, or one apart from all"
            ),
        )),
        None => Ok((sets, request.key.network.clone())),
    }
}

fn refuse(code: u32, msg: String) -> Failure {
    Failure { code, msg, details: "change ipam in the network's CNI configuration".into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::host::Host;

    fn config(mode: &str) -> Config {
        let text = format!(
            "node = \"n1\"\n{mode}\nmtu = 1450\nranges = [\"10.244.1.0/24\", \"fd00:10:244:1::/64\"]\n[underlay]\naddress = \"10.200.0.1\""
        );
        Config::read(&text, &Host::default()).unwrap().config
    }

    fn routed() -> Config {
        config("mode = \"routed\"")
    }

    fn bridged() -> Config {
        config("mode = \"bridged\"\nsegment = [\"10.244.0.0/16\", \"fd00:10:244::/48\"]")
    }

    fn given(text: &str) -> (IpNet, IpAddr) {
        let (net, gateway) = text.split_once(' ').unwrap();
        (net.parse().unwrap(), gateway.parse().unwrap())
    }

    #[test]
    fn another_plugins_address_must_be_one_that_can_work() {
        for (config, good) in [
            (routed(), &["10.244.1.9/24 10.244.1.1", "10.244.1.9/32 0.0.0.0", "fd00:10:244:1::9/64 ::"][..]),
            (bridged(), &["10.244.7.9/16 10.244.0.1", "10.244.7.9/16 10.244.0.9", "fd00:10:244:7::9/48 ::"]),
        ] {
            for text in good {
                let sets = sets(&config, &[given(text)]).unwrap();
                let only = &sets[0].ranges()[0];
                assert_eq!((only.start(), only.end()), (given(text).0.addr(), given(text).0.addr()), "{text}");
            }
        }
        for (config, bad, why) in [
            (routed(), "10.244.2.9/24 0.0.0.0", "this node's ranges"),
            (routed(), "10.244.1.9/24 10.244.1.254", "the gateway of this node is 10.244.1.1"),
            (routed(), "10.244.1.0/32 0.0.0.0", "network or broadcast"),
            (routed(), "10.244.1.255/24 0.0.0.0", "network or broadcast"),
            (bridged(), "10.245.0.9/16 0.0.0.0", "the segment"),
            (bridged(), "10.244.7.9/16 10.245.0.9", "the gateway of this node"),
        ] {
            let failure = sets(&config, &[given(bad)]).unwrap_err();
            assert!(failure.code == code::ADDRESS && failure.msg.contains(why), "{bad}: {failure}");
        }
    }

    fn interface() -> Interface {
        Interface {
            name: "eth0".into(),
            mac: "0a:00:00:00:00:01".parse().unwrap(),
            mtu: 1450,
            addresses: vec![given("10.244.1.9/24 10.244.1.1"), given("fd00::9/64 ::")],
            routes: Vec::new(),
            bandwidth: weft_api::Bandwidth::default(),
            dhcp: weft_router::tables::Dhcp::default(),
        }
    }

    fn asked(destination: &str, gateway: &str) -> AttachedRoute {
        AttachedRoute::new(destination, gateway.parse().unwrap())
    }

    #[test]
    fn routes_that_are_asked_for_are_made_and_no_other() {
        let interface = interface();
        let shown = |asked: Option<&[AttachedRoute]>| -> Vec<String> {
            routes(asked, &interface).unwrap().iter().map(super::super::pod::shown).collect()
        };
        assert_eq!(shown(None), ["to 0.0.0.0/0 by 10.244.1.1"]);
        assert_eq!(shown(Some(&[])), [""; 0]);
        let some = [
            asked("10.0.0.0/8", "0.0.0.0"),
            asked("192.168.0.9/16", "10.244.1.7"),
            asked("fd01::/16", "::"),
            AttachedRoute { scope: Some(253), ..asked("10.9.0.0/16", "0.0.0.0") },
        ];
        let expected =
            ["to 10.0.0.0/8 by 10.244.1.1", "to 192.168.0.0/16 by 10.244.1.7", "to fd01::/16", "to 10.9.0.0/16"];
        assert_eq!(shown(Some(&some)), expected);
        for bad in [asked("10.0.0.0", "0.0.0.0"), asked("10.0.0.0/8", "fd00::1"), asked("x", "::")] {
            assert_eq!(routes(Some(&[bad]), &interface).unwrap_err().code, code::CONFIG);
        }
        assert_eq!(
            routes(Some(&vec![asked("10.0.0.0/8", "0.0.0.0"); 257]), &interface).unwrap_err().code,
            code::CONFIG
        );
    }

    #[test]
    fn a_network_of_its_own_has_a_pool_of_its_own() {
        let request = |subnets: &[&str]| {
            let range = |subnet: &&str| weft_api::Range {
                subnet: (*subnet).into(),
                range_start: None,
                range_end: None,
                gateway: None,
            };
            super::super::tests::attach(subnets.iter().map(|subnet| vec![range(subnet)]).collect())
        };
        let pool = |subnets: &[&str]| lease_only(&routed(), &request(subnets)).map(|(_, pool)| pool);
        assert_eq!(pool(&[]).unwrap(), "");
        assert_eq!(pool(&["10.244.1.128/25"]).unwrap(), "");
        assert_eq!(pool(&["172.16.0.0/24", "fd77::/64"]).unwrap(), "pods");
        for bad in [&["10.244.0.0/16"][..], &["172.16.0.0/24", "10.244.1.0/25"], &["x"], &["10.0.0.0/31"]] {
            assert_eq!(pool(bad).unwrap_err().code, code::CONFIG, "{bad:?}");
        }
    }
}
