//! The interfaces that frames leave by, as ports of the data plane, and the next hops by them.
//!
//! An interface gets a port when a next hop by it is first known, and keeps it until it is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;
use weft_encap::mac::Mac;
use weft_router::port::packet::Outlet;
use weft_router::stats::PortStats;
use weft_router::tables::{GroupId, NextHop, NextHops, WayOut, Ways};
use weft_router::{Device, PortId, Router};

use super::find::{Found, Hop};
use crate::control::desired::OUTLETS;
use crate::netlink::Netlink;

/// Where packets leave without a tunnel, as the tables have it.
#[derive(Debug, Clone, Default)]
pub struct Leads {
    /// Another one each time something changes.
    revision: u64,
    /// The ports that there are.
    pub uplinks: Vec<PortId>,
    /// Next hops.
    pub groups: Arc<Vec<NextHops>>,
    /// Where routes of a routing daemon lead.
    pub learned: Ways,
    /// Where the kernel's main table leads.
    pub outside: Ways,
    /// Nodes on the same network that can be sent packets as they are.
    pub peers: BTreeMap<IpAddr, GroupId>,
    /// The interfaces that outside destinations are behind, with their numbers.
    pub ways: Vec<(u32, WayOut)>,
    /// All addresses of this machine.
    pub own: Vec<IpAddr>,
}

impl PartialEq for Leads {
    fn eq(&self, other: &Leads) -> bool {
        self.revision == other.revision
    }
}

impl Eq for Leads {}

/// The ports.
#[derive(Debug, Default)]
pub struct Outlets {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    ports: BTreeMap<u32, PortId>,
    last: Leads,
    problems: Vec<String>,
}

impl Outlets {
    /// What the tables shall have of what was found; `None` if that is what they have. Opens what is needed, and closes what is gone, whose
    /// last counters go to `retired`.
    pub fn follow(&self, found: &Found, router: &Router, retired: &mut PortStats) -> Option<Leads> {
        let mut guard = self.lock();
        let state = &mut *guard;
        state.problems.clear();
        let used: BTreeSet<u32> = found.groups.iter().flatten().map(|hop| hop.device).collect();
        let used: BTreeSet<u32> = found.ways.iter().map(|(device, _, _)| *device).chain(used).collect();
        let gone: Vec<u32> = state.ports.keys().filter(|device| !found.devices.contains(device)).copied().collect();
        for device in gone {
            if let Some(port) = state.ports.remove(&device)
                && let Ok(Some(last)) = router.remove_port(port)
            {
                *retired += &last;
            }
        }
        for device in used {
            if !state.ports.contains_key(&device) {
                state.open(device, router);
            }
        }
        let next = |hop: &Hop| {
            let port = *state.ports.get(&hop.device)?;
            Some(NextHop { port, macs: hop.macs, mtu: hop.mtu, weight: hop.weight })
        };
        let groups = found.groups.iter().map(|group| NextHops::new(group.iter().filter_map(next)));
        let leads = Leads {
            revision: state.last.revision + 1,
            uplinks: state.ports.values().copied().collect(),
            groups: Arc::new(groups.collect()),
            learned: found.learned.clone(),
            outside: found.outside.clone(),
            peers: found.peers.iter().map(|(peer, (_, group))| (*peer, *group)).collect(),
            ways: state.ways(found),
            own: found.own.clone(),
        };
        if leads.says_the_same(&state.last) {
            return None;
        }
        state.last = leads.clone();
        Some(leads)
    }

    /// This port's interface is gone. Returns whether it was one of these.
    pub fn lost(&self, port: PortId) -> bool {
        let mut state = self.lock();
        let before = state.ports.len();
        state.ports.retain(|_, other| *other != port);
        state.ports.len() < before
    }

    /// The interface behind a port.
    pub fn device(&self, port: PortId) -> Option<u32> {
        self.lock().ports.iter().find(|(_, other)| **other == port).map(|(device, _)| *device)
    }

    /// The names of all of them.
    pub fn names(&self) -> Vec<String> {
        let devices: Vec<u32> = self.lock().ports.keys().copied().collect();
        devices.into_iter().map(name_of).collect()
    }

    /// What could not be opened.
    pub fn problems(&self) -> Vec<String> {
        self.lock().problems.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Which of the interfaces that outside destinations are behind have a port.
    fn ways(&self, found: &Found) -> Vec<(u32, WayOut)> {
        let way = |(device, mac, addresses): &(u32, Mac, Vec<IpNet>)| {
            let port = *self.ports.get(device)?;
            Some((*device, WayOut { port, mac: *mac, addresses: addresses.clone() }))
        };
        found.ways.iter().filter_map(way).collect()
    }

    fn open(&mut self, device: u32, router: &Router) {
        let name = name_of(device);
        let Some(port) = OUTLETS.map(PortId).find(|port| !self.ports.values().any(|other| other == port)) else {
            self.problems.push(format!(
                "more uplinks than {} are in use: what leaves by {name} goes by the kernel",
                OUTLETS.count()
            ));
            return;
        };
        let added = Outlet::open(device)
            .map_err(|error| error.to_string())
            .and_then(|outlet| router.add_port(port, Device::Outlet(outlet)).map_err(|error| error.to_string()));
        match added {
            Ok(()) => {
                tracing::info!(%port, "frames leave by {name}");
                self.ports.insert(device, port);
            }
            Err(error) => {
                self.problems.push(format!(
                    "{name} cannot be sent by (CAP_NET_RAW): {error}; the kernel routes what leaves there"
                ));
            }
        }
    }
}

impl Leads {
    fn says_the_same(&self, other: &Leads) -> bool {
        self.uplinks == other.uplinks
            && self.groups == other.groups
            && self.ways == other.ways
            && self.own == other.own
            && self.peers == other.peers
            && self.learned.all().eq(other.learned.all())
            && self.outside.all().eq(other.outside.all())
    }
}

/// The name of a device, for people.
pub fn name_of(device: u32) -> String {
    let found = Netlink::open().and_then(|mut netlink| netlink.detailed(device));
    found.ok().flatten().map_or_else(|| format!("device {device}"), |found| found.link.name)
}
