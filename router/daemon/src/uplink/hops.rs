//! Where each node is reached, of what the kernel says: pure, so that it can be tested without one.
//!
//! A node whose route leaves by the uplink, to a next hop with a known MAC, has a hop of the data plane. All others go the kernel's way, and
//! [`Way`] says why.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use weft_encap::mac::Mac;
use weft_router::port::xdp::Hops;
use weft_router::port::xdp::outer::NextHop;

use crate::netlink::follower::Neighbours;
use crate::netlink::paths::{Change, Route};

/// How frames to a node leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// By the uplink.
    Uplink,
    /// By the kernel, which does not know the MAC of the next hop (yet).
    Unresolved(IpAddr),
    /// By the kernel, for the route leaves by the device of this number.
    Elsewhere(u32),
    /// By the kernel, which has no route.
    NoRoute,
    /// By the kernel, for the uplink is gone, or down.
    NoUplink,
}

/// The device that leads to other nodes, as it is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// By which routes leave: the uplink, or the VLAN that stands on it.
    pub index: u32,
    /// Its MAC.
    pub mac: Mac,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// The tag of its frames.
    pub vlan: Option<u16>,
}

/// What the kernel has told.
#[derive(Debug, Default)]
pub struct Known {
    /// The uplink; none while it is gone or down.
    pub device: Option<Device>,
    /// The route to each node that has one.
    pub routes: BTreeMap<IpAddr, Option<Route>>,
    /// All neighbours with a MAC.
    pub neighbours: Neighbours,
    /// The longest packet to a node, where that is shorter than the device's.
    pub path_mtu: HashMap<IpAddr, u32>,
}

impl Known {
    /// Takes changes in. Says whether routes have to be asked for again, and whether a way may have changed.
    pub fn take_all(&mut self, changes: &[Change]) -> (bool, bool) {
        let mut changed = false;
        for change in changes {
            if let Change::Neighbour(neighbour) = change {
                changed |= self.neighbours.take(*neighbour);
            }
        }
        (changes.iter().any(|change| !matches!(change, Change::Neighbour(_))), changed)
    }

    /// How frames to each node leave.
    pub fn ways(&self) -> BTreeMap<IpAddr, Way> {
        self.routes.iter().map(|(node, route)| (*node, self.way(*node, *route).0)).collect()
    }

    /// The next hops of those that leave by the uplink.
    pub fn hops(&self) -> Hops {
        let hop = |(node, route): (&IpAddr, &Option<Route>)| Some((*node, self.way(*node, *route).1?.into()));
        self.routes.iter().filter_map(hop).collect()
    }

    /// How long packets to a node may be, where that is less than the device allows.
    pub fn narrow(&self) -> BTreeMap<IpAddr, u32> {
        let mtu = |(node, route): (&IpAddr, &Option<Route>)| Some((*node, self.way(*node, *route).1?.mtu));
        let most = self.device.map_or(0, |device| device.mtu);
        self.routes.iter().filter_map(mtu).filter(|(_, mtu)| *mtu < most).collect()
    }

    /// The next hop towards a node that leaves by the uplink, as the neighbour tables have it.
    pub fn neighbour_of(&self, node: IpAddr) -> Option<((u32, IpAddr), bool)> {
        let route = (*self.routes.get(&node)?)?;
        let key = (route.device, route.via.unwrap_or(node));
        self.neighbours.get(&key).map(|(_, is_stale)| (key, *is_stale))
    }

    fn way(&self, node: IpAddr, route: Option<Route>) -> (Way, Option<NextHop>) {
        let Some(device) = self.device else { return (Way::NoUplink, None) };
        let Some(route) = route else { return (Way::NoRoute, None) };
        if route.device != device.index {
            return (Way::Elsewhere(route.device), None);
        }
        let next = route.via.unwrap_or(node);
        let Some((target, _)) = self.neighbours.get(&(device.index, next)) else {
            return (Way::Unresolved(next), None);
        };
        let mtus = [Some(device.mtu), route.mtu, self.path_mtu.get(&node).copied()];
        let mtu = mtus.into_iter().flatten().min().unwrap_or(device.mtu);
        (Way::Uplink, Some(NextHop { source: device.mac, target: *target, vlan: device.vlan, mtu }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::paths::Neighbour;

    const UPLINK: u32 = 3;
    const NEAR: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));
    const FAR: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 9, 0, 2));
    const ROUTER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));

    fn mac(last: u8) -> Mac {
        Mac([2, 0, 0, 0, 0, last])
    }

    fn neighbour(address: IpAddr, mac: Option<Mac>) -> Neighbour {
        Neighbour { device: UPLINK, address, mac, is_stale: false }
    }

    fn known() -> Known {
        let route = |via| Some(Route { device: UPLINK, via, mtu: None });
        Known {
            device: Some(Device { index: UPLINK, mac: mac(9), mtu: 1500, vlan: Some(5) }),
            routes: [(NEAR, route(None)), (FAR, route(Some(ROUTER)))].into(),
            ..Known::default()
        }
    }

    fn ways(known: &Known) -> [Way; 2] {
        let ways = known.ways();
        assert_eq!(known.hops().len(), ways.values().filter(|way| **way == Way::Uplink).count());
        [ways[&NEAR], ways[&FAR]]
    }

    #[test]
    fn a_neighbour_is_sent_to_directly_and_others_by_their_router() {
        let mut known = known();
        assert_eq!(ways(&known), [Way::Unresolved(NEAR), Way::Unresolved(ROUTER)]);
        assert!(
            known.neighbours.take(neighbour(NEAR, Some(mac(2))))
                && known.neighbours.take(neighbour(ROUTER, Some(mac(1))))
        );
        assert!(!known.neighbours.take(neighbour(NEAR, Some(mac(2)))), "that is no news");
        assert_eq!(ways(&known), [Way::Uplink, Way::Uplink]);
        let hops = known.hops();
        let next = |target| NextHop { source: mac(9), target, vlan: Some(5), mtu: 1500 };
        assert_eq!((hops[&NEAR].next, hops[&FAR].next), (next(mac(2)), next(mac(1))));
        assert!(known.neighbours.take(neighbour(NEAR, None)));
        assert_eq!(ways(&known), [Way::Unresolved(NEAR), Way::Uplink]);
    }

    #[test]
    fn the_smallest_of_the_mtus_holds() {
        let mut known = known();
        known.neighbours.take(neighbour(NEAR, Some(mac(2))));
        known.routes.insert(NEAR, Some(Route { device: UPLINK, via: None, mtu: Some(1400) }));
        assert_eq!(known.hops()[&NEAR].next.mtu, 1400);
        known.path_mtu.insert(NEAR, 1300);
        assert_eq!(known.hops()[&NEAR].next.mtu, 1300);
        known.neighbours.take(neighbour(ROUTER, Some(mac(1))));
        assert_eq!(known.narrow(), [(NEAR, 1300)].into(), "the other's is the device's");
    }

    #[test]
    fn what_leaves_elsewhere_or_not_at_all_is_the_kernels() {
        let mut known = known();
        known.neighbours.take(neighbour(NEAR, Some(mac(2))));
        known.routes.insert(NEAR, Some(Route { device: 8, via: None, mtu: None }));
        known.routes.insert(FAR, None);
        assert_eq!(ways(&known), [Way::Elsewhere(8), Way::NoRoute]);
        known.device = None;
        assert_eq!(ways(&known), [Way::NoUplink; 2]);
    }
}
