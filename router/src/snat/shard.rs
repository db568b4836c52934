//! What is written when a session opens or closes, under one lock: who is found by what, and which ports are taken.

use std::net::IpAddr;

use hashbrown::HashMap;
use weft_encap::ip;

use crate::flow::FlowKey;
use crate::snat::session::{Ends, is_ping};
use crate::tables::ExactMap;
use crate::time::Instant;

/// A part of the table: all sessions whose ports exclude each other are in the same one.
#[derive(Default)]
pub(super) struct Shard {
    /// Sessions by their flow as the pod sends it.
    pub(super) inside: ExactMap<FlowKey, u32>,
    /// The same as the other side gets it.
    pub(super) outside: ExactMap<FlowKey, u32>,
    /// Where ports exclude each other.
    pub(super) pools: ExactMap<FlowKey, Pool>,
    /// The port that a pod's socket has for all destinations, by socket and outer address.
    pub(super) endpoints: ExactMap<(FlowKey, FlowKey), Endpoint>,
    /// Whose these ports are.
    pub(super) owners: ExactMap<FlowKey, IpAddr>,
}

/// Ports that exclude each other: those of TCP towards one destination, all of UDP and of pings.
#[derive(Copy, Clone, Default)]
pub(super) struct Pool {
    /// How many are taken.
    pub(super) taken: u32,
    /// That it was looked for any that could be taken back, in vain.
    pub(super) barren: Option<Barren>,
}

/// A pool that had nothing to give.
#[derive(Copy, Clone)]
pub(super) struct Barren {
    /// When, in seconds.
    pub(super) when: u32,
    /// How many were taken then.
    pub(super) taken: u32,
    /// Who had more than half of them: it does for others.
    pub(super) most: Option<IpAddr>,
}

impl Pool {
    /// Whether it has nothing for this pod, as it had nothing a moment ago.
    pub(super) fn is_barren(&self, pod: IpAddr, now: Instant) -> bool {
        let is_same = |barren: Barren| barren.when == now.seconds() && barren.taken == self.taken;
        self.barren.is_some_and(|barren| is_same(barren) && barren.most.is_none_or(|most| most == pod))
    }
}

#[derive(Copy, Clone)]
pub(super) struct Endpoint {
    pub(super) port: u16,
    sessions: u32,
}

/// Whether a pod's socket has one port for all destinations (RFC 4787, REQ-1; RFC 5508, REQ-1). TCP's are used once for each, for there they would
/// not suffice.
pub(super) fn is_shared(protocol: u8) -> bool {
    protocol == ip::UDP || is_ping(protocol)
}

/// The pool that a session's port is from.
pub(super) fn pool_of(ends: &Ends) -> FlowKey {
    let nobody = (ends.outside.0, 0);
    let remote = if is_shared(ends.protocol) { nobody } else { ends.remote };
    FlowKey::between(ends.protocol, nobody, remote)
}

/// The socket that a session is from, and as which address it leaves.
fn socket_of(ends: &Ends) -> (FlowKey, FlowKey) {
    let nobody = (ends.outside.0, 0);
    (FlowKey::between(ends.protocol, ends.inside, nobody), FlowKey::between(ends.protocol, nobody, nobody))
}

/// A reserved port of one address.
pub(super) fn owner_of(protocol: u8, outside: (IpAddr, u16)) -> FlowKey {
    FlowKey::between(protocol, outside, (outside.0, 0))
}

impl Shard {
    /// The port that this session's socket has already.
    pub(super) fn port_of(&self, ends: &Ends) -> Option<u16> {
        self.endpoints.get(&socket_of(ends)).map(|endpoint| endpoint.port)
    }

    /// Whether nobody has this session's port.
    pub(super) fn is_free(&self, ends: &Ends) -> bool {
        match is_shared(ends.protocol) {
            true => !self.owners.contains_key(&owner_of(ends.protocol, ends.outside)),
            false => !self.outside.contains_key(&ends.outside_key()),
        }
    }

    /// Enters a session.
    pub(super) fn enter(&mut self, ends: &Ends, slot: u32) {
        self.inside.insert(ends.inside_key(), slot);
        self.outside.insert(ends.outside_key(), slot);
        if is_shared(ends.protocol) {
            let fresh = Endpoint { port: ends.outside.1, sessions: 0 };
            let endpoint = self.endpoints.entry(socket_of(ends)).or_insert(fresh);
            endpoint.sessions += 1;
            if endpoint.sessions > 1 {
                return;
            }
            self.owners.insert(owner_of(ends.protocol, ends.outside), ends.inside.0);
        }
        self.pools.entry(pool_of(ends)).or_default().taken += 1;
    }

    /// Takes a session out.
    pub(super) fn remove(&mut self, ends: &Ends) {
        self.inside.remove(&ends.inside_key());
        self.outside.remove(&ends.outside_key());
        if is_shared(ends.protocol) {
            let socket = socket_of(ends);
            let left = self.endpoints.get_mut(&socket).map_or(0, |endpoint| {
                endpoint.sessions -= 1;
                endpoint.sessions
            });
            if left > 0 {
                return;
            }
            self.endpoints.remove(&socket);
            self.owners.remove(&owner_of(ends.protocol, ends.outside));
        }
        let pool = pool_of(ends);
        if let Some(found) = self.pools.get_mut(&pool) {
            found.taken -= 1;
            if found.taken == 0 {
                self.pools.remove(&pool);
            }
        }
        self.tidy();
    }

    /// Gives memory back after a flood.
    fn tidy(&mut self) {
        fn shrink<K: Eq + std::hash::Hash, V>(map: &mut ExactMap<K, V>) {
            if map.capacity() > 1024 && map.len() < map.capacity() / 8 {
                HashMap::shrink_to(map, map.len() * 2);
            }
        }
        shrink(&mut self.inside);
        shrink(&mut self.outside);
        shrink(&mut self.pools);
        shrink(&mut self.endpoints);
        shrink(&mut self.owners);
    }
}
