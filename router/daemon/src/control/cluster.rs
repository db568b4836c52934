//! The cluster as this node sees it: its own ranges, and the other nodes.
//!
//! A [`Source`](super::source::Source) delivers [`Record`]s, which anybody who may write to the engine can have written. [`admit`] makes
//! a [`Cluster`] of them, which is valid by construction: *one bad record denies itself* and is reported, the others hold. The order
//! of the records is their seniority. Whoever claims an address or a range that an earlier one has is denied, so a newcomer never
//! takes something away from a node that has it, and all nodes that see the same records decide alike.
//!
//! Pure: the same records give the same cluster.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use weft_encap::format::Format;
use weft_encap::mac::Mac;
use weft_router::tables::Mode;

use super::config::check::{gateway_v4, gateway_v6, is_name, special};
use super::config::encapsulation::MAX_ACCEPTED;
use super::config::{Config, Peer};
use super::derive;

/// Most problems that are kept word by word; the rest are counted.
pub const MAX_PROBLEMS: usize = 20;
/// Nodes are numbered with 16 bits, and some numbers wait for reuse.
pub const MAX_PEERS: usize = 60_000;
/// Ranges of one node: more than any has.
const MAX_RANGES: usize = 64;
/// Further addresses of one node that are looked at.
const MAX_ADDRESSES: usize = 8;

/// What a source says about a node, word by word.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its name.
    pub name: String,
    /// Its underlay address.
    pub underlay: String,
    /// What else it is known to be reached at. What is of no use of it is left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<String>,
    /// What it gives to its pods.
    pub ranges: Vec<String>,
    /// Its inner MAC, if it is not made of name and address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vtep_mac: Option<String>,
    /// `routed` or `bridged`, if it says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// VXLAN network identifier, if it says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vni: Option<u32>,
    /// UDP port of VXLAN, if it says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// What it takes in, if it says so; one that speaks of itself and does not takes in VXLAN alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accepts: Option<Vec<String>>,
}

/// The cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cluster {
    /// What this node gives to its pods.
    pub ranges: Vec<IpNet>,
    /// The other nodes, by name.
    pub peers: Vec<Peer>,
    /// What was denied, and why.
    pub problems: Vec<String>,
}

impl Cluster {
    /// Its peers as a source would tell of them.
    pub fn records(&self) -> impl Iterator<Item = Record> {
        self.peers.iter().map(|peer| Record {
            name: peer.name.clone(),
            underlay: peer.underlay.to_string(),
            addresses: peer.addresses.iter().map(ToString::to_string).collect(),
            ranges: peer.ranges.iter().map(ToString::to_string).collect(),
            vtep_mac: Some(peer.vtep_mac.to_string()),
            accepts: peer.accepts.clone(),
            ..Record::default()
        })
    }

    /// The configuration of a node in this cluster.
    pub fn join(&self, local: &Config) -> Config {
        let mut config = local.clone();
        config.ranges.clone_from(&self.ranges);
        config.peers.clone_from(&self.peers);
        let homes = if config.mode == Mode::Bridged { &config.segment } else { &config.ranges };
        config.gateway.ipv4 = config.gateway.ipv4.or(gateway_v4(homes));
        config.gateway.ipv6 = config.gateway.ipv6.or(gateway_v6(homes));
        config
    }
}

/// How a mode is written.
pub fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Routed => "routed",
        Mode::Bridged => "bridged",
    }
}

/// Makes the cluster of this node, whose own ranges are `ranges`, and of the other nodes' records, the senior ones first.
pub fn admit(local: &Config, ranges: Vec<IpNet>, others: impl IntoIterator<Item = Record>) -> Cluster {
    let mut door = Door::new(local, &ranges);
    let (mut peers, mut problems, mut more) = (Vec::new(), Vec::new(), 0);
    for record in others {
        match door.pass(&record) {
            Ok(peer) => peers.push(peer),
            Err(_) if problems.len() >= MAX_PROBLEMS => more += 1,
            // Names come from strangers: they must not reach a terminal as they are.
            Err(why) => problems.push(format!("the node {:?} is left out: {why}", shortened(&record.name))),
        }
    }
    if more > 0 {
        problems.push(format!("{more} more nodes are left out"));
    }
    peers.iter_mut().for_each(|peer| door.admit_addresses(peer));
    peers.sort_by(|one: &Peer, other| one.name.cmp(&other.name));
    Cluster { ranges, peers, problems }
}

/// As much of a stranger's text as is shown.
pub fn shortened(text: &str) -> String {
    text.chars().take(64).collect()
}

/// What was admitted so far.
struct Door<'a> {
    local: &'a Config,
    names: HashSet<String>,
    addresses: HashMap<IpAddr, String>,
    /// By first address; prefixes are disjoint.
    ranges: BTreeMap<(bool, IpAddr), (IpNet, Arc<str>)>,
}

impl<'a> Door<'a> {
    fn new(local: &'a Config, own: &[IpNet]) -> Door<'a> {
        let mut door = Door { local, names: HashSet::new(), addresses: HashMap::new(), ranges: BTreeMap::new() };
        door.names.insert(local.node.clone());
        door.addresses.insert(local.underlay.address, "this node".into());
        door.enter_ranges(own, "this node");
        door
    }

    fn pass(&mut self, record: &Record) -> Result<Peer, String> {
        if self.names.len() > MAX_PEERS {
            return Err(format!("a node has at most {MAX_PEERS} peers"));
        }
        let peer = self.read(record)?;
        if self.names.contains(&peer.name) {
            return Err("another node has that name".into());
        }
        if let Some(owner) = self.addresses.get(&peer.underlay) {
            return Err(format!("{} is the address of {owner}", peer.underlay));
        }
        for (number, range) in peer.ranges.iter().enumerate() {
            if let Some((taken, owner)) = self.overlapped(range) {
                return Err(format!("its range {range} overlaps {taken} of {owner}"));
            }
            let twice = |other: &&IpNet| other.contains(range) || range.contains(*other);
            if let Some(other) = peer.ranges[..number].iter().find(twice) {
                return Err(format!("its ranges {other} and {range} overlap"));
            }
        }
        self.names.insert(peer.name.clone());
        self.addresses.insert(peer.underlay, peer.name.clone());
        self.enter_ranges(&peer.ranges, &peer.name);
        Ok(peer)
    }

    /// The record alone, with what it must have in common with this node.
    fn read(&self, record: &Record) -> Result<Peer, String> {
        if !is_name(&record.name) {
            return Err("that is no name".into());
        }
        let local = self.local;
        let differs = |what: &str, theirs: String, ours: String| Err(format!("its {what} is {theirs}, ours {ours}"));
        match record {
            Record { mode: Some(mode), .. } if mode != mode_name(local.mode) => {
                return differs("mode", shortened(mode), mode_name(local.mode).into());
            }
            Record { vni: Some(vni), .. } if *vni != local.vni.get() => {
                return differs("VNI", vni.to_string(), local.vni.get().to_string());
            }
            Record { port: Some(port), .. } if *port != local.underlay.port => {
                return differs("UDP port", port.to_string(), local.underlay.port.to_string());
            }
            _ => {}
        }
        let underlay = read_address(local, &record.underlay)?;
        if record.ranges.len() > MAX_RANGES {
            return Err(format!("it has more than {MAX_RANGES} ranges"));
        }
        let ranges =
            record.ranges.iter().map(|text| read_range(local, text)).collect::<Result<Vec<IpNet>, String>>()?;
        let vtep_mac = match &record.vtep_mac {
            None => derive::vtep_mac(&record.name, underlay),
            Some(text) => read_mac(local, text)?,
        };
        let addresses = record.addresses.iter().take(MAX_ADDRESSES).filter_map(|text| text.parse::<IpAddr>().ok());
        let addresses = addresses.map(|address| address.to_canonical()).collect();
        let accepts = record.accepts.clone().or(record.port.map(|_| vec![Format::Vxlan.to_string()]));
        let accepts = accepts.map(|words| words.iter().take(MAX_ACCEPTED).map(|word| shortened(word)).collect());
        Ok(Peer { name: record.name.clone(), underlay, addresses, ranges, vtep_mac, encapsulation: None, accepts })
    }

    /// Leaves a node those of its further addresses that nobody else has, when all have passed.
    fn admit_addresses(&mut self, peer: &mut Peer) {
        peer.addresses.retain(|address| {
            let free = special(*address).is_none() && self.overlapped(&IpNet::from(*address)).is_none();
            let free = free && !self.addresses.contains_key(address);
            if free {
                self.addresses.insert(*address, peer.name.clone());
            }
            free
        });
    }

    fn enter_ranges(&mut self, ranges: &[IpNet], owner: &str) {
        let owner: Arc<str> = owner.into();
        for range in ranges {
            self.ranges.insert((range.addr().is_ipv6(), range.network()), (*range, Arc::clone(&owner)));
        }
    }

    /// Prefixes nest or are disjoint, so only the last one before and the first one within can overlap.
    fn overlapped(&self, range: &IpNet) -> Option<&(IpNet, Arc<str>)> {
        let v6 = range.addr().is_ipv6();
        let before = self.ranges.range(..=(v6, range.network())).next_back().map(|(_, found)| found);
        let within = self.ranges.range((v6, range.network())..=(v6, range.broadcast())).next().map(|(_, found)| found);
        before.filter(|(other, _)| other.contains(range)).or(within)
    }
}

fn read_address(local: &Config, text: &str) -> Result<IpAddr, String> {
    let address: IpAddr = text.parse().map_err(|_| format!("{:?} is no address", shortened(text)))?;
    let address = address.to_canonical();
    if let Some(kind) = special(address) {
        return Err(format!("its address {address} is {kind}"));
    }
    if address.is_ipv4() != local.underlay.address.is_ipv4() {
        return Err(format!("its address {address} is not of the family of ours, {}", local.underlay.address));
    }
    Ok(address)
}

/// A range that pods of a node can have.
///
/// # Errors
/// Why they cannot.
pub fn read_range(local: &Config, text: &str) -> Result<IpNet, String> {
    let range: IpNet = text.parse().map_err(|_| format!("{:?} is no prefix", shortened(text)))?;
    if let Some(kind) = special(range.network()).or_else(|| special(range.broadcast())) {
        return Err(format!("its range {range} is {kind}"));
    }
    if let Err(error) = weft_ipam::Range::whole(range) {
        return Err(error.to_string());
    }
    if range.contains(&local.underlay.address) {
        return Err(format!("its range {range} has this node's own address in it"));
    }
    if local.mode == Mode::Bridged && !local.segment.iter().any(|segment| segment.contains(&range)) {
        return Err(format!("its range {range} is not inside the segment"));
    }
    Ok(range)
}

fn read_mac(local: &Config, text: &str) -> Result<Mac, String> {
    match text.parse::<Mac>() {
        Ok(mac) if mac.is_unicast() && mac != local.gateway.mac => Ok(mac),
        Ok(mac) => Err(format!("its MAC {mac} is a group's, or the gateway's")),
        Err(_) => Err(format!("{:?} is no MAC address", shortened(text))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::host::Host;

    fn local(mode: &str) -> Config {
        let text = format!(
            "node = \"n1\"\n{mode}\nmtu = 1450\n[underlay]\naddress = \"10.200.0.1\"\n[etcd]\n\
             endpoints = [\"http://10.200.0.9:2379\"]\nnetwork = [\"10.244.0.0/16\", \"fd00:10:244::/48\"]"
        );
        Config::read(&text, &Host::default()).unwrap().config
    }

    fn routed() -> Config {
        local("mode = \"routed\"")
    }

    fn record(number: u8) -> Record {
        Record {
            name: format!("n{number}"),
            underlay: format!("10.200.0.{number}"),
            ranges: vec![format!("10.244.{number}.0/24"), format!("fd00:10:244:{number}::/64")],
            ..Record::default()
        }
    }

    fn own() -> Vec<IpNet> {
        vec!["10.244.1.0/24".parse().unwrap(), "fd00:10:244:1::/64".parse().unwrap()]
    }

    fn names(cluster: &Cluster) -> Vec<&str> {
        cluster.peers.iter().map(|peer| peer.name.as_str()).collect()
    }

    #[test]
    fn a_bad_record_denies_itself_and_says_why() {
        type Spoil = fn(&mut Record);
        let cases: [(Spoil, &str); 15] = [
            (|r| r.name = "n 3\u{1b}[2J".into(), "that is no name"),
            (|r| r.name = "n1".into(), "another node has that name"),
            (|r| r.name = "n2".into(), "another node has that name"),
            (|r| r.underlay = "10.200.0".into(), "no address"),
            (|r| r.underlay = "127.0.0.1".into(), "is loopback"),
            (|r| r.underlay = "fd00::3".into(), "not of the family of ours"),
            (|r| r.underlay = "10.200.0.1".into(), "10.200.0.1 is the address of this node"),
            (|r| r.underlay = "::ffff:10.200.0.2".into(), "10.200.0.2 is the address of n2"),
            (|r| r.ranges[0] = "10.244.3.0".into(), "no prefix"),
            (|r| r.ranges[0] = "10.244.0.0/16".into(), "overlaps 10.244.1.0/24 of this node"),
            (|r| r.ranges[1] = "fd00:10:244:2:8000::/65".into(), "overlaps fd00:10:244:2::/64 of n2"),
            (|r| r.ranges[0] = "10.200.0.0/24".into(), "has this node's own address in it"),
            (|r| r.ranges = vec!["10.244.3.0/24".into(), "10.244.3.128/25".into()], "its ranges"),
            (|r| r.vtep_mac = Some("01:00:5e:00:00:01".into()), "is a group's"),
            (|r| r.vni = Some(7), "its VNI is 7, ours 1"),
        ];
        for (spoil, why) in cases {
            let mut bad = record(3);
            spoil(&mut bad);
            let cluster = admit(&routed(), own(), [record(2), bad, record(4)]);
            assert_eq!(names(&cluster), ["n2", "n4"], "{why}");
            assert_eq!(cluster.problems.len(), 1, "{:?}", cluster.problems);
            assert!(
                cluster.problems[0].contains(why) && !cluster.problems[0].contains('\u{1b}'),
                "{:?}",
                cluster.problems
            );
        }
    }

    #[test]
    fn the_senior_of_two_that_claim_the_same_keeps_it() {
        let other = Record { name: "n9".into(), underlay: "10.200.0.9".into(), ..record(3) };
        assert_eq!(names(&admit(&routed(), own(), [record(3), other.clone()])), ["n3"]);
        assert_eq!(names(&admit(&routed(), own(), [other, record(3)])), ["n9"]);
    }

    #[test]
    fn in_bridged_mode_ranges_lie_in_the_segment() {
        let config = local("mode = \"bridged\"\nsegment = [\"10.244.0.0/16\", \"fd00:10:244::/48\"]");
        let foreign = Record { ranges: vec!["10.245.3.0/24".into()], ..record(3) };
        let cluster = admit(&config, own(), [record(2), foreign]);
        assert_eq!(names(&cluster), ["n2"]);
        assert!(cluster.problems[0].contains("not inside the segment"), "{:?}", cluster.problems);
        let joined = cluster.join(&config);
        assert_eq!(joined.gateway.ipv4.unwrap().to_string(), "10.244.0.1");
    }

    #[test]
    fn a_node_that_joins_takes_the_first_address_of_its_range_as_gateway() {
        let joined = admit(&routed(), own(), [record(2)]).join(&routed());
        assert_eq!(joined.gateway.ipv4.unwrap().to_string(), "10.244.1.1");
        assert_eq!(joined.gateway.ipv6.unwrap().to_string(), "fd00:10:244:1::1");
        assert_eq!((joined.ranges.len(), joined.peers.len()), (2, 1));
        assert_eq!(joined.peers[0].vtep_mac, derive::vtep_mac("n2", "10.200.0.2".parse().unwrap()));
    }

    #[test]
    fn what_was_admitted_is_admitted_again() {
        let once = admit(&routed(), own(), [record(2), record(3)]);
        assert_eq!(admit(&routed(), own(), once.records()), once);
    }

    #[test]
    fn problems_are_counted_when_they_are_many() {
        let bad = (0..500).map(|_| Record { name: "x".repeat(10_000), ..Record::default() });
        let cluster = admit(&routed(), own(), bad);
        assert_eq!(cluster.problems.len(), MAX_PROBLEMS + 1);
        assert_eq!(cluster.problems[MAX_PROBLEMS], "480 more nodes are left out");
        assert!(cluster.problems[0].len() < 200);
    }
}
