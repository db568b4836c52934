//! Out of which ranges an attachment gets its addresses.
//!
//! By default one address of each family that the node has ranges of. A request may narrow that (host-local's `ranges`), but
//! not leave it: an address outside the node's own ranges is one that other nodes send elsewhere. The one exception
//! is bridged mode, where a pod may ask for a certain address of the segment, and so keep the one it had on another node.

use std::net::IpAddr;

use ipnet::IpNet;
use weft_api::{Attach, Failure, code};
use weft_ipam::{Range, RangeError, RangeSet};
use weft_router::tables::Mode;

use crate::control::config::Config;

/// One set for each address that the attachment gets.
pub fn sets(config: &Config, request: &Attach) -> Result<Vec<RangeSet>, Failure> {
    if request.ranges.is_empty() {
        let own = own(config).map_err(|error| invalid(&error))?;
        return with_kept(config, own, &request.requested).map_err(|error| invalid(&error));
    }
    request.ranges.iter().map(|set| narrowed(config, set)).collect()
}

/// The node's own sets: one of each family, in the order of the ranges. The first address of a pod is the one that Kubernetes, where
/// the order comes from, takes for its main one.
pub fn own(config: &Config) -> Result<Vec<RangeSet>, RangeError> {
    let mut sets = Vec::new();
    let first = config.ranges.first().is_none_or(|range| range.addr().is_ipv4());
    for v4 in [first, !first] {
        let ranges = config.ranges.iter().filter(|range| range.addr().is_ipv4() == v4);
        let ranges: Vec<Range> = ranges.map(|range| own_range(config, *range)).collect::<Result<_, _>>()?;
        if !ranges.is_empty() {
            sets.push(RangeSet::new(ranges)?);
        }
    }
    Ok(sets)
}

/// One of the node's ranges as the lease store knows it: with the prefix that pods see, and the gateway.
pub fn own_range(config: &Config, range: IpNet) -> Result<Range, RangeError> {
    let gateway = config.gateway_for(range.addr());
    let segment = config.segment.iter().find(|segment| segment.contains(&range));
    match segment {
        Some(segment) if config.mode == Mode::Bridged => {
            let part = Range::whole(range)?;
            Range::new(*segment, Some(part.start()), Some(part.end()), gateway)
        }
        _ => Range::new(range, None, None, gateway),
    }
}

/// Bridged mode: a requested address of another node's range takes the place of its family's set.
fn with_kept(config: &Config, mut sets: Vec<RangeSet>, requested: &[IpAddr]) -> Result<Vec<RangeSet>, RangeError> {
    for address in requested.iter().map(IpAddr::to_canonical) {
        if sets.iter().any(|set| set.range_of(address).is_some()) {
            continue;
        }
        let Some(segment) = config.segment.iter().find(|segment| segment.contains(&address)) else { continue };
        let kept = Range::new(*segment, Some(address), Some(address), config.gateway_for(address))?;
        // Network and broadcast address are moved to their neighbours; those were not asked for.
        if kept.start() != address {
            continue;
        }
        let family = |set: &RangeSet| set.ranges()[0].start().is_ipv4() == address.is_ipv4();
        match sets.iter_mut().find(|set| family(set)) {
            Some(set) => *set = kept.into(),
            None => sets.push(kept.into()),
        }
    }
    Ok(sets)
}

fn narrowed(config: &Config, set: &[weft_api::Range]) -> Result<RangeSet, Failure> {
    let own: Vec<Range> =
        own(config).map_err(|error| invalid(&error))?.iter().flat_map(|set| set.ranges().to_vec()).collect();
    let mut ranges = Vec::new();
    for asked in set {
        let subnet: IpNet = asked.subnet.parse().map_err(|_| refuse(format!("{:?} is no prefix", asked.subnet)))?;
        let gateway = config.gateway_for(subnet.addr());
        if asked.gateway.is_some_and(|asked| Some(asked.to_canonical()) != gateway) {
            let is = gateway.map_or("none of this family".to_owned(), |gateway| gateway.to_string());
            return Err(refuse(format!("the gateway of this node is {is}, not {:?}", asked.gateway)));
        }
        let range = Range::new(subnet, asked.range_start, asked.range_end, gateway).map_err(|error| invalid(&error))?;
        if !own.iter().any(|own| own.contains(range.start()) && own.contains(range.end())) {
            let all: Vec<String> = own.iter().map(Range::to_string).collect();
            return Err(refuse(format!("{range} is not inside this node's ranges, {}", all.join(", "))));
        }
        ranges.push(range);
    }
    RangeSet::new(ranges).map_err(|error| invalid(&error))
}

fn invalid(error: &RangeError) -> Failure {
    refuse(error.to_string())
}

fn refuse(msg: String) -> Failure {
    Failure { code: code::CONFIG, msg, details: "change the ranges in the network's CNI configuration".into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::host::Host;

    fn config(mode: &str) -> Config {
        let text = format!(
            "node = \"n1\"\n{mode}\nmtu = 1450\nranges = [\"10.244.1.0/24\", \"10.244.9.0/24\", \"fd00:10:244:1::/64\"]\n\
             [underlay]\naddress = \"10.200.0.1\""
        );
        Config::read(&text, &Host::default()).unwrap().config
    }

    fn routed() -> Config {
        config("mode = \"routed\"")
    }

    fn bridged() -> Config {
        config("mode = \"bridged\"\nsegment = [\"10.244.0.0/16\", \"fd00:10:244::/48\"]")
    }

    fn request(requested: &[&str], ranges: Vec<Vec<weft_api::Range>>) -> Attach {
        Attach {
            key: weft_api::AttachmentKey { network: "pods".into(), container: "c1".into(), ifname: "eth0".into() },
            netns: String::new(),
            requested: requested.iter().map(|address| address.parse().unwrap()).collect(),
            ranges,
            mac: None,
            mtu: None,
            port: None,
            bandwidth: None,
            given: Vec::new(),
            routes: None,
            trusted: Vec::new(),
            labels: std::collections::BTreeMap::new(),
        }
    }

    fn text(sets: &[RangeSet]) -> Vec<String> {
        let range = |range: &Range| format!("{range} by {}", range.gateway());
        sets.iter().map(|set| set.ranges().iter().map(range).collect::<Vec<_>>().join(" + ")).collect()
    }

    #[test]
    fn a_family_is_a_set_and_all_its_ranges_share_the_gateway() {
        assert_eq!(
            text(&sets(&routed(), &request(&[], vec![])).unwrap()),
            ["10.244.1.0/24 by 10.244.1.1 + 10.244.9.0/24 by 10.244.1.1", "fd00:10:244:1::/64 by fd00:10:244:1::1"]
        );
        assert_eq!(
            text(&sets(&bridged(), &request(&[], vec![])).unwrap())[0],
            "10.244.0.0/16 (10.244.1.1 to 10.244.1.254) by 10.244.0.1 + \
             10.244.0.0/16 (10.244.9.1 to 10.244.9.254) by 10.244.0.1"
        );
    }

    #[test]
    fn in_bridged_mode_a_pod_keeps_an_address_of_another_nodes_range() {
        let sets = |config: &Config| sets(config, &request(&["10.244.2.7"], vec![])).unwrap();
        assert_eq!(text(&sets(&bridged()))[0], "10.244.0.0/16 (10.244.2.7 to 10.244.2.7) by 10.244.0.1");
        assert!(text(&sets(&routed()))[0].starts_with("10.244.1.0/24"), "in routed mode the store refuses it");
    }

    #[test]
    fn a_request_may_narrow_the_nodes_ranges_but_not_leave_them() {
        let range = |subnet: &str, start: Option<&str>, gateway: Option<&str>| weft_api::Range {
            subnet: subnet.into(),
            range_start: start.map(|address| address.parse().unwrap()),
            range_end: None,
            gateway: gateway.map(|address| address.parse().unwrap()),
        };
        let ask = |ranges| sets(&routed(), &request(&[], vec![vec![ranges]]));
        let narrow = ask(range("10.244.1.0/24", Some("10.244.1.100"), Some("10.244.1.1"))).unwrap();
        assert_eq!(text(&narrow), ["10.244.1.0/24 (10.244.1.100 to 10.244.1.254) by 10.244.1.1"]);
        for (asked, expected) in [
            (range("10.245.1.0/24", None, None), "not inside this node's ranges"),
            (range("10.244.1.0/24", None, Some("10.244.1.9")), "the gateway of this node is 10.244.1.1"),
            (range("10.244.1.0", None, None), "no prefix"),
            (range("10.244.1.0/31", None, None), "too small"),
        ] {
            let failure = ask(asked).unwrap_err();
            assert_eq!(failure.code, code::CONFIG);
            assert!(failure.msg.contains(expected), "{}", failure.msg);
        }
    }
}
