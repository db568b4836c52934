//! From the Nodes to the cluster: which of them is this node, what its ranges are, and who the others are. Pure.
//!
//! Nodes are senior by the time at which they were made, then by UID: of two that claim the same address or range the older keeps it,
//! on every node alike, and the other one is told so. A Node whose weftd has spoken goes before those that have none (yet): a Node
//! without one may stand for anything.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::objects::{Announced, Node};
use crate::control::cluster::{Cluster, MAX_PROBLEMS, Record, admit, mode_name, read_range, shortened};
use crate::control::config::Config;

/// What this node's weftd says, if it is of this identity.
pub fn announcement(local: &Config, identity: &str, former: &[IpNet]) -> Announced {
    Announced {
        identity: identity.to_owned(),
        underlay: local.underlay.address.to_string(),
        encapsulation: local.underlay.encapsulation.name().into(),
        accepts: local.underlay.accepted(),
        vni: local.vni.get(),
        port: local.underlay.port,
        mode: mode_name(local.mode).into(),
        vtep_mac: local.vtep_mac.to_string(),
        mtu: local.mtu,
        former: former.iter().map(ToString::to_string).collect(),
    }
}

/// Which of a Node's addresses is this machine's in the underlay, unless its configuration says: the operator's word, else the first
/// internal one.
pub fn address_of(node: &Node) -> Option<IpAddr> {
    let said = node.underlay.iter().chain(&node.addresses);
    said.filter_map(|text| text.trim().parse::<IpAddr>().ok()).map(|address| address.to_canonical()).next()
}

/// This machine's address as its Node has it, unless the configuration says it: the operator's word, else the internal one in use, if the Node
/// still has that, else the first one of its family.
pub fn address_said(local: &Config, node: &Node) -> Option<IpAddr> {
    let now = local.underlay.address;
    if local.underlay.is_given {
        return None;
    }
    if node.underlay.is_some() {
        return address_of(node).filter(|said| said.is_ipv4() == now.is_ipv4());
    }
    let all = || node.addresses.iter().filter_map(|text| text.trim().parse::<IpAddr>().ok()).map(|a| a.to_canonical());
    all().find(|said| *said == now).or_else(|| all().find(|said| said.is_ipv4() == now.is_ipv4()))
}

/// The cluster as these Nodes make it, and what keeps this node from its part in it.
pub fn cluster(local: &Config, nodes: &BTreeMap<String, Result<Node, String>>) -> (Cluster, Option<String>) {
    let mut all: Vec<&Node> = nodes.values().flatten().collect();
    all.sort_by_key(|node| (node.announced.is_none(), &node.made, &node.uid));
    let (ranges, trouble) = own(local, nodes.get(&local.node), &all);
    let v4 = local.underlay.address.is_ipv4();
    let mut unreadable: Vec<String> = nodes
        .iter()
        .filter(|(name, _)| **name != local.node)
        .filter_map(|(name, node)| {
            let why = match node {
                Err(why) => why,
                Ok(node) => node.announced.as_ref()?.as_ref().err()?,
            };
            Some(format!("the node {:?} is left out: {why}", shortened(name)))
        })
        .collect();
    let mut former = Former::of(nodes);
    let others = all.iter().filter(|node| node.name != local.node).filter_map(|node| {
        let mut record = record(node, v4)?;
        record.ranges.extend(former.admit(node));
        Some(record)
    });
    let mut cluster = admit(local, ranges, others);
    let more = unreadable.len().saturating_sub(MAX_PROBLEMS);
    unreadable.truncate(MAX_PROBLEMS);
    unreadable.extend((more > 0).then(|| format!("{more} more nodes are left out")));
    cluster.problems.extend(unreadable);
    (cluster, trouble)
}

/// What a Node says about itself; `None` if it is no member (yet).
fn record(node: &Node, v4: bool) -> Option<Record> {
    if node.ranges.is_empty() {
        return None;
    }
    let (name, ranges, addresses) = (node.name.clone(), node.ranges.clone(), node.addresses.clone());
    let record = Record { name, ranges, addresses, ..Record::default() };
    match &node.announced {
        Some(Err(_)) => None,
        Some(Ok(announced)) => Some(Record {
            underlay: announced.underlay.clone(),
            vtep_mac: Some(announced.vtep_mac.clone()),
            mode: Some(announced.mode.clone()),
            vni: Some(announced.vni),
            port: Some(announced.port),
            accepts: (!announced.accepts.is_empty()).then(|| announced.accepts.clone()),
            ..record
        }),
        None => {
            let said = node.underlay.iter().chain(&node.addresses);
            let of_family = |text: &&String| {
                text.trim().parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_ipv4() == v4)
            };
            let underlay = said.clone().find(of_family).or(said.clone().next())?;
            Some(Record { underlay: underlay.trim().to_owned(), ..record })
        }
    }
}

/// Ranges that nodes had, and say that their pods still need. A Node that has one of them by its spec goes before.
struct Former {
    taken: Vec<IpNet>,
    left: usize,
}

impl Former {
    /// So many are looked at in a cluster: such a range is a rare thing that passes.
    const MAX: usize = 256;

    fn of(nodes: &BTreeMap<String, Result<Node, String>>) -> Former {
        let says = |node: &&Node| matches!(&node.announced, Some(Ok(said)) if !said.former.is_empty());
        // Most clusters have none: nothing is collected then.
        let taken = match nodes.values().flatten().any(|node| says(&node)) {
            false => Vec::new(),
            true => {
                nodes.values().flatten().flat_map(|node| &node.ranges).filter_map(|text| text.parse().ok()).collect()
            }
        };
        Former { taken, left: Former::MAX }
    }

    fn admit(&mut self, node: &Node) -> Vec<String> {
        let Some(Ok(said)) = &node.announced else { return Vec::new() };
        let mut admitted = Vec::new();
        for text in &said.former {
            let Ok(range) = text.parse::<IpNet>() else { continue };
            let is_taken = self.taken.iter().any(|other| other.contains(&range) || range.contains(other));
            if is_taken || self.left == 0 {
                continue;
            }
            self.left -= 1;
            self.taken.push(range);
            admitted.push(text.clone());
        }
        admitted
    }
}

/// This node's ranges, in the order of `podCIDRs`, or what is wrong.
fn own(local: &Config, node: Option<&Result<Node, String>>, all: &[&Node]) -> (Vec<IpNet>, Option<String>) {
    let fail = |why: String| (Vec::new(), Some(why));
    let name = &local.node;
    let node = match node {
        None => {
            return fail(format!(
                "the cluster has no Node {name:?}: is that this machine's name there (`node`, or NODE_NAME), and does its kubelet run?"
            ));
        }
        Some(Err(why)) => return fail(format!("the Node {name:?} is of no use: {why}")),
        Some(Ok(node)) => node,
    };
    if node.ranges.is_empty() {
        return fail(format!(
            "the Node {name:?} has no podCIDRs: kube-controller-manager gives them with --allocate-node-cidrs=true and --cluster-cidr \
             (kubeadm: --pod-network-cidr, or networking.podSubnet)"
        ));
    }
    let mut ranges: Vec<IpNet> = Vec::new();
    for text in &node.ranges {
        let range = match read_range(local, text) {
            Ok(range) => range,
            Err(why) => return fail(format!("the podCIDRs of the Node {name:?} are of no use: {why}")),
        };
        if let Some((senior, theirs)) = senior_with(range, node, all) {
            return fail(format!(
                "the range {range} of the Node {name:?} overlaps {theirs} of {:?}, which had it first: delete and register one of them again",
                shortened(&senior.name)
            ));
        }
        if ranges.iter().any(|other| other.contains(&range) || range.contains(other)) {
            return fail(format!("the podCIDRs of the Node {name:?} overlap: {}", node.ranges.join(", ")));
        }
        ranges.push(range);
    }
    let moved = address_said(local, node).filter(|now| *now != local.underlay.address);
    let trouble = moved.map(|now| {
        format!(
            "the Node {name:?} has the address {now}, but weftd uses {}: it follows as soon as this machine has the other one",
            local.underlay.address
        )
    });
    (ranges, trouble)
}

/// An older Node that has some of a range.
fn senior_with<'a>(range: IpNet, node: &Node, all: &[&'a Node]) -> Option<(&'a Node, IpNet)> {
    let seniors =
        all.iter().filter(|other| other.announced.is_some() && (&other.made, &other.uid) < (&node.made, &node.uid));
    seniors.flat_map(|other| other.ranges.iter().map(move |text| (*other, text))).find_map(|(other, text)| {
        let theirs: IpNet = text.parse().ok()?;
        (theirs.contains(&range) || range.contains(&theirs)).then_some((other, theirs))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::host::Host;

    fn local() -> Config {
        let text = "node = \"n1\"\nmode = \"routed\"\nmtu = 1450\n[underlay]\naddress = \"10.200.0.1\"\n[kubernetes]\n";
        Config::read(text, &Host::default()).unwrap().config
    }

    fn node(number: u8) -> Node {
        Node {
            name: format!("n{number}"),
            uid: format!("uid-{number}"),
            made: format!("2026-01-01T00:00:0{number}Z"),
            ranges: vec![format!("10.244.{number}.0/24"), format!("fd00:10:244:{number}::/64")],
            addresses: vec![format!("10.200.0.{number}"), format!("fd00:200::{number}")],
            ..Node::default()
        }
    }

    fn spoken(number: u8) -> Node {
        let mut said = announcement(&local(), &format!("{number}"), &[]);
        said.underlay = format!("10.200.0.{number}");
        said.vtep_mac = format!("02:00:00:00:00:0{number}");
        Node { announced: Some(Ok(said)), ..node(number) }
    }

    fn of(nodes: impl IntoIterator<Item = Node>) -> BTreeMap<String, Result<Node, String>> {
        nodes.into_iter().map(|node| (node.name.clone(), Ok(node))).collect()
    }

    fn names(cluster: &Cluster) -> Vec<&str> {
        cluster.peers.iter().map(|peer| peer.name.as_str()).collect()
    }

    #[test]
    fn nodes_become_peers_by_what_they_say_or_by_their_internal_address() {
        let mut quiet = node(3);
        quiet.addresses.reverse();
        let (cluster, trouble) =
            cluster(&local(), &of([node(1), spoken(2), quiet, Node { ranges: Vec::new(), ..node(4) }]));
        assert_eq!((trouble, names(&cluster)), (None, vec!["n2", "n3"]));
        assert_eq!(
            cluster.ranges.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["10.244.1.0/24", "fd00:10:244:1::/64"]
        );
        assert_eq!(cluster.peers[0].vtep_mac.to_string(), "02:00:00:00:00:02");
        assert_eq!(cluster.peers[1].underlay.to_string(), "10.200.0.3");
        assert!(cluster.problems.is_empty());
    }

    #[test]
    fn ranges_keep_their_order() {
        let mut own = node(1);
        own.ranges.reverse();
        let (cluster, _) = cluster(&local(), &of([own]));
        assert_eq!(cluster.ranges[0].to_string(), "fd00:10:244:1::/64");
    }

    #[test]
    fn what_keeps_this_node_from_its_part_is_said() {
        type Spoil = fn(&mut Node);
        let cases: [(Spoil, &str); 5] = [
            (|node| node.ranges.clear(), "--allocate-node-cidrs"),
            (|node| node.ranges[0] = "10.244.1".into(), "no prefix"),
            (|node| node.ranges[1] = "10.244.1.128/25".into(), "overlap"),
            (|node| node.ranges[0] = "10.200.0.0/16".into(), "this node's own address"),
            (|node| node.name = "n9".into(), "no Node \"n1\""),
        ];
        for (spoil, why) in cases {
            let mut own = node(1);
            spoil(&mut own);
            let (cluster, trouble) = cluster(&local(), &of([own, node(2)]));
            assert!(cluster.ranges.is_empty() && names(&cluster).contains(&"n2"), "{why}");
            assert!(trouble.as_ref().is_some_and(|trouble| trouble.contains(why)), "{trouble:?}");
        }
    }

    #[test]
    fn of_two_with_one_range_or_address_the_older_keeps_it() {
        let mut young = spoken(2);
        young.ranges = node(1).ranges;
        let (senior, trouble) = cluster(&local(), &of([node(1), young.clone()]));
        assert_eq!((senior.ranges.len(), trouble, names(&senior)), (2, None, vec![]));
        assert!(senior.problems[0].contains("overlaps"), "{:?}", senior.problems);
        young.made = "2025-01-01T00:00:00Z".into();
        let (junior, trouble) = cluster(&local(), &of([node(1), young]));
        assert!(junior.ranges.is_empty() && trouble.unwrap().contains("which had it first"));
        let mut same = spoken(3);
        same.announced = spoken(2).announced;
        let (third, _) = cluster(&local(), &of([node(1), spoken(2), same]));
        assert_eq!(names(&third), ["n2"]);
        assert!(third.problems[0].contains("10.200.0.2 is the address of n2"), "{:?}", third.problems);
    }

    #[test]
    fn what_cannot_be_read_denies_itself_alone() {
        let mut nodes = of([node(1), spoken(2), Node { announced: Some(Err("absurd".into())), ..node(3) }]);
        nodes.insert("n4".into(), Err("it cannot be read".into()));
        let (cluster, trouble) = cluster(&local(), &nodes);
        assert_eq!((trouble, names(&cluster)), (None, vec!["n2"]));
        assert_eq!(cluster.problems.len(), 2, "{:?}", cluster.problems);
    }

    #[test]
    fn former_ranges_are_a_peers_unless_they_are_somebody_elses() {
        let mut moved = spoken(2);
        if let Some(Ok(said)) = &mut moved.announced {
            said.former = vec!["10.244.22.0/24".into(), "10.244.3.0/24".into(), "nonsense".into()];
        }
        let (cluster, _) = cluster(&local(), &of([node(1), moved, spoken(3)]));
        assert_eq!(names(&cluster), ["n2", "n3"]);
        let ranges: Vec<String> = cluster.peers[0].ranges.iter().map(ToString::to_string).collect();
        assert_eq!(ranges, ["10.244.2.0/24", "fd00:10:244:2::/64", "10.244.22.0/24"]);
    }

    #[test]
    fn an_address_that_changed_is_said() {
        let mut found = local();
        found.underlay.is_given = false;
        let moved = Node { addresses: vec!["10.200.0.77".into()], ..node(1) };
        let (cluster, trouble) = cluster(&found, &of([moved]));
        assert_eq!(cluster.ranges.len(), 2);
        assert!(trouble.unwrap().contains("10.200.0.77"));
    }
}
