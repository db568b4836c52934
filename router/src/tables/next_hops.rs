//! Ways out of this node without a tunnel: by an uplink, to a machine whose MAC is known.
//!
//! A route may lead to several next hops that are as good as each other (ECMP). A flow stays on one of them, and moves only when that one
//! goes: each next hop has a number made of the flow's hash and itself, and the highest one wins ("highest random weight", Thaler and
//! Ravishankar 1998), so that what others get does not depend on who comes and goes.

use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use prefix_trie::PrefixMap;

use crate::path::Macs;
use crate::port::PortId;

/// A machine that packets are handed to.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// The uplink that leads there.
    pub port: PortId,
    /// Its MAC, and that of the uplink.
    pub macs: Macs,
    /// The longest packet in bytes.
    pub mtu: u32,
    /// Its share of the flows, in relation to the others of its group.
    pub weight: u8,
}

/// Number of a group in [`super::Tables::next_hops`].
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GroupId(pub u16);

impl GroupId {
    /// No group: in [`super::Tables::outside`], what is the kernel's alone, as the node's own addresses are.
    pub const NOT_OUTSIDE: GroupId = GroupId(u16::MAX);
}

/// Next hops that are as good as each other. None: nobody is known who could take the packet, and the node's kernel is to find out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NextHops(Vec<NextHop>);

/// Most next hops of a group, as many as are ever used.
pub const MOST_HOPS: usize = 32;

impl NextHops {
    /// A group of these; what is beyond [`MOST_HOPS`] is left out.
    pub fn new(hops: impl IntoIterator<Item = NextHop>) -> NextHops {
        NextHops(hops.into_iter().take(MOST_HOPS).collect())
    }

    /// A group of nobody.
    pub const fn none() -> NextHops {
        NextHops(Vec::new())
    }

    /// All of them.
    pub fn all(&self) -> &[NextHop] {
        &self.0
    }

    /// The one for flows with this hash.
    pub fn choose(&self, hash: u64) -> Option<&NextHop> {
        if let [only] = self.0.as_slice() {
            return Some(only);
        }
        self.0.iter().max_by_key(|hop| rank(hop, hash))
    }
}

/// How a next hop stands for a flow: the best of as many throws as it has weight.
fn rank(hop: &NextHop, hash: u64) -> u64 {
    let mac = hop.macs.dst.0.iter().fold(u64::from(hop.port.0), |sum, byte| sum << 8 | u64::from(*byte));
    let throw = |number: u8| mix(hash ^ mix(mac ^ u64::from(number) << 56));
    (0..hop.weight.max(1)).map(throw).max().unwrap_or(0)
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
fn mix(mut word: u64) -> u64 {
    word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

/// Groups of next hops by destination, of which the longest prefix holds.
#[derive(Clone, Debug, Default)]
pub struct Ways {
    v4: Arc<PrefixMap<Ipv4Net, GroupId>>,
    v6: Arc<PrefixMap<Ipv6Net, GroupId>>,
}

impl Ways {
    /// Enters a destination.
    pub fn insert(&mut self, destination: IpNet, group: GroupId) {
        match destination {
            IpNet::V4(to) => drop(Arc::make_mut(&mut self.v4).insert(to.trunc(), group)),
            IpNet::V6(to) => drop(Arc::make_mut(&mut self.v6).insert(to.trunc(), group)),
        }
    }

    /// The group for all of a destination, or for what it is part of.
    pub fn find(&self, destination: IpNet) -> Option<GroupId> {
        match destination {
            IpNet::V4(to) => self.v4.get_lpm(&to.trunc()).map(|(_, group)| *group),
            IpNet::V6(to) => self.v6.get_lpm(&to.trunc()).map(|(_, group)| *group),
        }
    }

    /// All destinations.
    pub fn all(&self) -> impl Iterator<Item = (IpNet, GroupId)> {
        let v4 = self.v4.iter().map(|(net, group)| (IpNet::V4(net), *group));
        v4.chain(self.v6.iter().map(|(net, group)| (IpNet::V6(net), *group)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_encap::mac::Mac;

    fn hop(last: u8, weight: u8) -> NextHop {
        let macs = Macs { dst: Mac([2, 0, 0, 0, 0, last]), src: Mac::ZERO };
        NextHop { port: PortId(last.into()), macs, mtu: 1500, weight }
    }

    fn counts(group: &NextHops) -> Vec<usize> {
        let chosen: Vec<PortId> = (0..10_000).map(|hash| group.choose(hash << 48 | hash).unwrap().port).collect();
        group.all().iter().map(|hop| chosen.iter().filter(|port| **port == hop.port).count()).collect()
    }

    #[test]
    fn flows_are_shared_out_by_weight() {
        for count in counts(&NextHops::new([hop(1, 1), hop(2, 1)])) {
            assert!((4_700..5_300).contains(&count), "{count}");
        }
        let counted = counts(&NextHops::new([hop(1, 1), hop(2, 3)]));
        assert!((2_200..2_800).contains(&counted[0]), "{counted:?}");
        assert!(NextHops::default().choose(7).is_none());
    }

    #[test]
    fn only_flows_of_a_next_hop_that_goes_move() {
        let (all, fewer) = (NextHops::new([hop(1, 1), hop(2, 1), hop(3, 1)]), NextHops::new([hop(3, 1), hop(1, 1)]));
        for hash in 0..10_000 {
            let before = all.choose(hash).unwrap();
            if before.port != PortId(2) {
                assert_eq!(fewer.choose(hash), Some(before));
            }
        }
    }

    #[test]
    fn a_group_has_a_limit() {
        assert_eq!(NextHops::new((0..200).map(|last| hop(last, 1))).all().len(), MOST_HOPS);
    }
}
