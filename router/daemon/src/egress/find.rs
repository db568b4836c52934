//! Where packets leave without a tunnel, of what the kernel says: pure, so that it can be tested without one.
//!
//! Three things are looked for. *Peers* on the same network as this node's underlay address, which can be handed packets as they are. *Learned*
//! routes, made by a routing daemon: pods' packets follow them. What the main table has beside them inside of their destinations,
//! and what is excepted, stays the kernel's ([`KERNEL`]), so that no packet goes elsewhere than where the kernel would send it. And, if
//! somebody translates pods' addresses, the whole table: where *outside* destinations are.
//!
//! A next hop counts while its device is up and its MAC is known. weftd's own routes lead back here and are not looked at.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
use weft_encap::mac::Mac;
use weft_router::path::Macs;
use weft_router::tables::{GroupId, MOST_HOPS, Ways};

use super::answers::is_public;
use crate::control::config::Routes;
use crate::netlink::follower::Neighbours;
use crate::netlink::routes::PROTOCOL;
use crate::netlink::table::{NextHop, TableRoute};

/// The group without next hops: what leads there is the kernel's to route.
pub const KERNEL: GroupId = GroupId(0);

/// Most groups of next hops.
const MAX_GROUPS: usize = 4096;
/// Most neighbours that are entered one by one where the outside is looked for.
const MAX_NEIGHBOURS: usize = 4096;
/// What the weights of a group's next hops add up to is in the order of this.
const MAX_WEIGHT: u16 = 16;

/// An interface that frames can leave by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its MAC.
    pub mac: Mac,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is up, with carrier.
    pub up: bool,
}

/// What is to be found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// This node's underlay address.
    pub underlay: IpAddr,
    /// The underlay addresses of nodes that shall get packets without a tunnel.
    pub peers: BTreeSet<IpAddr>,
    /// Which routes are followed.
    pub routes: Routes,
    /// Whether it is asked for the outside.
    pub outside: bool,
    /// The host port's name: what leads there leads back here.
    pub host_port: Option<String>,
}

/// What the kernel has told.
#[derive(Debug, Default)]
pub struct Known {
    /// Ethernet interfaces by number.
    pub devices: HashMap<u32, Device>,
    /// All addresses of this machine.
    pub addresses: Vec<(u32, IpNet)>,
    /// The main table.
    pub table: Vec<TableRoute>,
    /// All neighbours with a MAC.
    pub neighbours: Neighbours,
}

/// A next hop that can be sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hop {
    /// The device's number.
    pub device: u32,
    /// The MACs of frames.
    pub macs: Macs,
    /// The longest packet in bytes.
    pub mtu: u32,
    /// Its share.
    pub weight: u8,
}

/// What was found.
#[derive(Debug, Clone, Default)]
pub struct Found {
    /// Groups of next hops, by their numbers.
    pub groups: Vec<Vec<Hop>>,
    /// Where routes of a routing daemon lead.
    pub learned: Ways,
    /// Where the whole table leads.
    pub outside: Ways,
    /// Nodes on the same network: their device and group.
    pub peers: BTreeMap<IpAddr, (u32, GroupId)>,
    /// The interfaces that there are.
    pub devices: BTreeSet<u32>,
    /// Those that outside destinations are behind, a default route's first, with their MACs and addresses.
    pub ways: Vec<(u32, Mac, Vec<IpNet>)>,
    /// All addresses of this machine.
    pub own: Vec<IpAddr>,
    /// All that the groups may lead to.
    pub in_use: BTreeSet<(u32, IpAddr)>,
    /// What is wrong.
    pub problems: Vec<String>,
}

impl Known {
    /// Finds what is wanted.
    pub fn find(&self, wanted: &Wanted) -> Found {
        let mut finding = Finding { known: self, numbers: BTreeMap::new(), found: Found::default() };
        // Number 0 is `KERNEL`.
        finding.found.groups.push(Vec::new());
        finding.found.devices = self.devices.keys().copied().collect();
        finding.peers(wanted);
        let best = self.best();
        if best.len() > wanted.routes.limit {
            finding.found.problems.push(format!(
                "this machine's main table has {} routes, of which at most {} are followed: none is, and the kernel routes what pods \
                 send to them; raise routes.limit",
                best.len(),
                wanted.routes.limit
            ));
            return finding.found;
        }
        finding.learn(&best, wanted);
        if wanted.outside {
            finding.outside(&best);
        }
        finding.found
    }

    /// The route that holds for each destination, but those of weftd.
    fn best(&self) -> BTreeMap<IpNet, &TableRoute> {
        let mut best: BTreeMap<IpNet, &TableRoute> = BTreeMap::new();
        for route in self.table.iter().filter(|route| route.protocol != PROTOCOL) {
            let holds = best.entry(route.destination.trunc()).or_insert(route);
            if route.metric < holds.metric {
                *holds = route;
            }
        }
        best
    }

    fn own(&self) -> impl Iterator<Item = IpNet> {
        self.addresses.iter().map(|(_, net)| IpNet::from(net.addr()))
    }
}

struct Finding<'a> {
    known: &'a Known,
    numbers: BTreeMap<(Vec<NextHop>, Option<u32>), GroupId>,
    found: Found,
}

impl Finding<'_> {
    /// A peer is on the same network if it has an address in the prefix that the underlay's address has on its device.
    fn peers(&mut self, wanted: &Wanted) {
        let at: Vec<(u32, IpNet)> =
            self.known.addresses.iter().filter(|(_, net)| net.addr() == wanted.underlay).copied().collect();
        for peer in &wanted.peers {
            let near = at.iter().find(|(device, net)| net.contains(peer) && self.known.devices.contains_key(device));
            let Some((device, _)) = near else { continue };
            let hop = NextHop { device: *device, via: Some(*peer), weight: 1 };
            let group = self.group(&[hop], None);
            self.found.peers.insert(*peer, (*device, group));
        }
    }

    fn learn(&mut self, best: &BTreeMap<IpNet, &TableRoute>, wanted: &Wanted) {
        let is_learned = |net: &IpNet, route: &TableRoute| {
            wanted.routes.take(route.protocol, *net) && route.hops.iter().any(|hop| hop.via.is_some())
        };
        for (net, route) in best.iter().filter(|(net, route)| is_learned(net, route)) {
            let group = self.group(&route.hops, route.mtu);
            self.found.learned.insert(*net, group);
        }
        let others = best.iter().filter(|(net, route)| !is_learned(net, route)).map(|(net, _)| *net);
        for net in others.chain(wanted.routes.except.iter().copied()).chain(self.known.own()) {
            if self.found.learned.find(net).is_some() {
                self.found.learned.insert(net, KERNEL);
            }
        }
    }

    /// Where a network is on the link itself, its neighbours are entered one by one.
    fn outside(&mut self, best: &BTreeMap<IpNet, &TableRoute>) {
        let mut on_link = Vec::new();
        for (net, route) in best {
            // What does not leave by a network that frames can be sent to is the kernel's.
            let elsewhere = !route.hops.iter().any(|hop| self.known.devices.contains_key(&hop.device));
            let group = match route.hops.as_slice() {
                _ if elsewhere => GroupId::NOT_OUTSIDE,
                hops if hops.iter().any(|hop| hop.via.is_some()) => self.group(hops, route.mtu),
                _ => KERNEL,
            };
            on_link.extend(route.hops.iter().filter(|hop| hop.via.is_none()).map(|hop| (hop.device, *net)));
            self.found.outside.insert(*net, group);
        }
        let is_near =
            |device: u32, address: &IpAddr| on_link.iter().any(|(at, net)| *at == device && net.contains(address));
        let mut near: Vec<(u32, IpAddr)> =
            self.known.neighbours.keys().filter(|(device, address)| is_near(*device, address)).copied().collect();
        near.sort_unstable();
        for (device, address) in near.into_iter().take(MAX_NEIGHBOURS) {
            let group = self.group(&[NextHop { device, via: Some(address), weight: 1 }], None);
            self.found.outside.insert(IpNet::from(address), group);
        }
        for net in self.known.own() {
            self.found.outside.insert(net, GroupId::NOT_OUTSIDE);
        }
        self.found.own = self.known.own().map(|net| net.addr()).collect();
        self.find_ways(best);
    }

    /// The interfaces that routes leave by.
    fn find_ways(&mut self, best: &BTreeMap<IpNet, &TableRoute>) {
        // A default route's prefix sorts before others.
        let hops = best.values().flat_map(|route| &route.hops).map(|hop| hop.device);
        let mut devices: Vec<u32> = Vec::new();
        for device in hops {
            if !devices.contains(&device) {
                devices.push(device);
            }
        }
        let known = self.known;
        let addresses = |device: u32| {
            let there = known.addresses.iter().filter(move |(at, _)| *at == device).map(|(_, net)| *net);
            there.filter(is_public).collect::<Vec<_>>()
        };
        let ways =
            devices.iter().filter_map(|device| Some((*device, known.devices.get(device)?.mac, addresses(*device))));
        self.found.ways = ways.filter(|(_, _, addresses)| !addresses.is_empty()).collect();
    }

    /// The number of a group; it does not depend on which of its members are known at the moment.
    fn group(&mut self, hops: &[NextHop], mtu: Option<u32>) -> GroupId {
        let mut members: Vec<NextHop> = hops.iter().filter(|hop| hop.via.is_some()).copied().collect();
        members.sort_unstable();
        members.truncate(MOST_HOPS);
        let key = (members, mtu);
        if let Some(number) = self.numbers.get(&key) {
            return *number;
        }
        if self.found.groups.len() >= MAX_GROUPS {
            return KERNEL;
        }
        let number = GroupId(self.found.groups.len() as u16);
        let heaviest = key.0.iter().map(|hop| hop.weight).max().unwrap_or(1);
        let known = key.0.iter().filter_map(|hop| self.hop(hop, mtu, heaviest)).collect();
        self.found.groups.push(known);
        let addresses = key.0.iter().filter_map(|hop| Some((hop.device, hop.via?)));
        self.found.in_use.extend(addresses.filter(|(device, _)| self.known.devices.contains_key(device)));
        self.numbers.insert(key, number);
        number
    }

    fn hop(&self, hop: &NextHop, mtu: Option<u32>, heaviest: u16) -> Option<Hop> {
        let device = self.known.devices.get(&hop.device).filter(|device| device.up)?;
        let (dst, _) = *self.known.neighbours.get(&(hop.device, hop.via?))?;
        let share = u32::from(hop.weight) * u32::from(MAX_WEIGHT.min(heaviest)) / u32::from(heaviest.max(1));
        Some(Hop {
            device: hop.device,
            macs: Macs { dst, src: device.mac },
            mtu: mtu.map_or(device.mtu, |mtu| mtu.min(device.mtu)),
            weight: share.clamp(1, MAX_WEIGHT.into()) as u8,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::paths::Neighbour;

    const BIRD: u8 = 12;
    const KERNEL_PROTOCOL: u8 = 2;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn mac(last: u8) -> Mac {
        Mac([2, 0, 0, 0, 0, last])
    }

    fn hop(device: u32, via: &str) -> NextHop {
        NextHop { device, via: Some(address(via)), weight: 1 }
    }

    fn route(destination: &str, protocol: u8, hops: &[NextHop]) -> TableRoute {
        TableRoute { destination: net(destination), metric: 32, protocol, hops: hops.to_vec(), mtu: None }
    }

    /// Two uplinks, a router at each.
    fn known(table: Vec<TableRoute>) -> Known {
        let device = |last| Device { mac: mac(last), mtu: 1500, up: true };
        let mut known = Known {
            devices: [(2, device(2)), (3, device(3))].into(),
            addresses: vec![(2, net("10.0.0.2/24")), (3, net("10.1.0.2/24")), (1, net("127.0.0.1/8"))],
            table,
            ..Known::default()
        };
        known.neighbours.insert((2, address("10.0.0.1")), (mac(0x11), false));
        known.neighbours.insert((3, address("10.1.0.1")), (mac(0x12), false));
        known
    }

    fn wanted() -> Wanted {
        let host_port = Some("weft0".into());
        let (peers, routes) = (BTreeSet::new(), Routes::default());
        Wanted { underlay: address("10.0.0.2"), peers, routes, outside: false, host_port }
    }

    /// The MACs that frames to an address go to.
    fn leads(found: &Found, ways: &Ways, to: &str) -> Option<Vec<u8>> {
        let group = ways.find(IpNet::from(address(to)))?;
        Some(found.groups[usize::from(group.0)].iter().map(|hop| hop.macs.dst.0[5]).collect())
    }

    fn both() -> Vec<NextHop> {
        vec![hop(2, "10.0.0.1"), hop(3, "10.1.0.1")]
    }

    #[test]
    fn routes_of_a_routing_daemon_are_followed_with_all_their_next_hops() {
        let known = known(vec![
            route("10.244.2.0/24", BIRD, &both()),
            route("10.244.3.0/24", BIRD, &[hop(3, "10.1.0.1")]),
            route("10.244.4.0/24", 4, &both()),
            route("10.244.5.0/24", PROTOCOL, &both()),
            route("0.0.0.0/0", BIRD, &both()),
        ]);
        let found = known.find(&wanted());
        let to = |to| leads(&found, &found.learned, to);
        assert_eq!(to("10.244.2.9"), Some(vec![0x11, 0x12]));
        assert_eq!(to("10.244.3.9"), Some(vec![0x12]));
        assert_eq!((to("10.244.4.9"), to("10.244.5.9"), to("192.0.2.1")), (None, None, None));
        let in_use: Vec<u32> = found.in_use.iter().map(|(device, _)| *device).collect();
        assert_eq!(in_use, [2, 3]);
    }

    #[test]
    fn a_next_hop_that_goes_leaves_the_group_and_the_numbers_stay() {
        let mut known = known(vec![route("10.244.2.0/24", BIRD, &both()), route("10.9.0.0/16", BIRD, &both()[..1])]);
        let before = known.find(&wanted());
        known.devices.get_mut(&2).unwrap().up = false;
        let after = known.find(&wanted());
        assert_eq!(leads(&after, &after.learned, "10.244.2.9"), Some(vec![0x12]));
        assert_eq!(
            leads(&after, &after.learned, "10.9.0.1"),
            Some(vec![]),
            "nobody is left: the kernel is to find out"
        );
        assert!(before.learned.all().eq(after.learned.all()));
        let gone = Neighbour { device: 3, address: address("10.1.0.1"), mac: None, is_stale: false };
        assert!(known.neighbours.take(gone) && !known.neighbours.take(gone));
        let after = known.find(&wanted());
        assert_eq!(leads(&after, &after.learned, "10.244.2.9"), Some(vec![]));
    }

    #[test]
    fn of_several_routes_the_one_with_the_least_metric_holds() {
        let better = TableRoute { metric: 5, ..route("10.244.2.0/24", 4, &both()) };
        let known = known(vec![route("10.244.2.0/24", BIRD, &both()), better]);
        let found = known.find(&wanted());
        assert_eq!(leads(&found, &found.learned, "10.244.2.9"), None, "a person wrote a better one");
    }

    #[test]
    fn what_the_kernel_has_inside_of_a_learned_destination_stays_the_kernels() {
        let direct = NextHop { device: 2, via: None, weight: 1 };
        let known = known(vec![
            route("10.0.0.0/8", BIRD, &both()),
            route("10.0.0.0/24", KERNEL_PROTOCOL, &[direct]),
            route("10.7.0.0/16", 4, &[]),
            route("10.244.0.0/16", BIRD, &both()),
        ]);
        let wanted = Wanted { routes: Routes { except: vec![net("10.96.0.0/12")], ..Routes::default() }, ..wanted() };
        let found = known.find(&wanted);
        let to = |to| leads(&found, &found.learned, to);
        for kernels in ["10.0.0.77", "10.7.1.1", "10.96.0.1", "10.1.0.2"] {
            assert_eq!(to(kernels), Some(vec![]), "{kernels}");
        }
        assert_eq!((to("10.244.9.9"), to("10.8.0.1")), (Some(vec![0x11, 0x12]), Some(vec![0x11, 0x12])));
    }

    #[test]
    fn only_what_is_wanted_is_followed() {
        let known = known(vec![route("10.244.2.0/24", BIRD, &both()), route("0.0.0.0/0", BIRD, &both())]);
        let to = |routes: Routes, to: &str| {
            let found = known.find(&Wanted { routes, ..wanted() });
            leads(&found, &found.learned, to).is_some()
        };
        let within = |net: IpNet| Routes { within: vec![net], ..Routes::default() };
        assert!(to(within(net("0.0.0.0/0")), "192.0.2.1") && to(within(net("10.244.0.0/16")), "10.244.2.1"));
        assert!(!to(within(net("10.244.0.0/16")), "192.0.2.1"));
        assert!(!to(Routes { protocols: vec![186], ..Routes::default() }, "10.244.2.1"));
        assert!(!to(Routes { except: vec![net("10.244.0.0/16")], ..Routes::default() }, "10.244.2.1"));
        assert!(!to(Routes { limit: 1, ..Routes::default() }, "10.244.2.1"));
        assert_eq!(
            known.find(&Wanted { routes: Routes { limit: 1, ..Routes::default() }, ..wanted() }).problems.len(),
            1
        );
    }

    #[test]
    fn a_peer_is_sent_to_plainly_only_on_the_underlays_own_network() {
        let mut known = known(Vec::new());
        let [near, other, far] = ["10.0.0.9", "10.1.0.9", "10.2.0.9"].map(address);
        let wanted = Wanted { peers: [near, other, far].into(), ..wanted() };
        let found = known.find(&wanted);
        assert_eq!(found.peers.keys().collect::<Vec<_>>(), [&near]);
        let (device, group) = found.peers[&near];
        assert_eq!((device, found.groups[usize::from(group.0)].len()), (2, 0), "its MAC is not known yet");
        assert_eq!(found.in_use, [(2, near)].into());
        known.neighbours.insert((2, near), (mac(0x99), true));
        let found = known.find(&wanted);
        let hop = found.groups[usize::from(group.0)][0];
        assert_eq!((hop.macs, hop.mtu), (Macs { dst: mac(0x99), src: mac(2) }, 1500));
    }

    #[test]
    fn weights_and_mtus_of_routes_count() {
        let hops = [NextHop { weight: 200, ..both()[0] }, NextHop { weight: 100, ..both()[1] }];
        let known = known(vec![TableRoute { mtu: Some(1400), ..route("10.244.2.0/24", BIRD, &hops) }]);
        let found = known.find(&wanted());
        let group = &found.groups[1];
        assert_eq!(group.iter().map(|hop| (hop.weight, hop.mtu)).collect::<Vec<_>>(), [(16, 1400), (8, 1400)]);
    }

    #[test]
    fn the_outside_is_the_whole_table_and_the_neighbours() {
        let direct = NextHop { device: 2, via: None, weight: 1 };
        let table = vec![route("0.0.0.0/0", 16, &both()[..1]), route("10.0.0.0/24", KERNEL_PROTOCOL, &[direct])];
        let known = known(table);
        let found = known.find(&Wanted { outside: true, ..wanted() });
        let to = |to| leads(&found, &found.outside, to);
        assert_eq!((to("192.0.2.1"), to("10.0.0.1")), (Some(vec![0x11]), Some(vec![0x11])));
        assert_eq!(to("10.0.0.8"), Some(vec![]), "unknown so far");
        assert_eq!(found.outside.find(net("10.0.0.2/32")), Some(GroupId::NOT_OUTSIDE), "this machine");
        assert_eq!(found.ways, [(2, mac(2), vec![net("10.0.0.2/24")])]);
        assert!(known.find(&wanted()).outside.all().next().is_none());
    }
}
