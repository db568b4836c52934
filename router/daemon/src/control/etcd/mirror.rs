//! What etcd holds about the cluster, as this node saw it last, and what this node has to do about its own part. Pure: no
//! connection, no clock.
//!
//! | key | value | ends with |
//! |---|---|---|
//! | `<prefix>/network` | how the network is cut, as the first node wrote it | nothing |
//! | `<prefix>/slots/<number>` | [`Holder`]: who has this part of the network | nothing; when it left, the long lease |
//! | `<prefix>/nodes/<name>` | [`Alive`] | the short lease: the node is heard of |
//! | `<prefix>/resting/<identity>` | the node's name, as JSON | the long lease: its part is not to be given away |
//!
//! So that *a lease that lapses cuts nobody off*, routes follow from slots alone, and a slot stays its holder's until somebody else
//! claims it. That takes that the holder's long lease has lapsed too, which outlives the short one by the time of rest; there is no
//! clock that machines would have to agree on. A node claims a slot that never had a holder if there is one, and otherwise the one
//! whose holder was silent for longest. Its own comes first: by its identity, a number that it keeps on disk, then by its name.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::messages::{Header, KeyValue};
use crate::control::cluster::Record;
use crate::control::config::source::Network;

/// Keys of one kind that are kept: twice as many as there can be slots.
const MAX_KEYS: usize = 1 << 17;

/// Who has a slot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The holder's identity, which no other machine has.
    pub identity: String,
    /// What it says about itself; its ranges follow from the slot.
    #[serde(flatten)]
    pub record: Record,
    /// It has left, and its slot rests.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub left: bool,
}

/// A node that is heard of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alive {
    /// Its identity.
    pub identity: String,
    /// Its underlay address.
    pub underlay: String,
}

/// A value and when it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen<T> {
    /// The value; `None` if it is not understood.
    pub value: Option<T>,
    /// When the key was made.
    pub made: i64,
    /// When it was changed last.
    pub changed: i64,
    /// The lease with which it ends.
    pub lease: i64,
}

/// All keys.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mirror {
    /// Of which cluster they are.
    pub cluster_id: u64,
    /// Up to which revision they were followed.
    pub revision: i64,
    /// How the network is cut.
    pub network: Option<Seen<Vec<String>>>,
    /// The slots.
    pub slots: BTreeMap<u32, Seen<Holder>>,
    /// Nodes that are heard of, by name.
    pub alive: BTreeMap<String, Seen<Alive>>,
    /// Identities whose slot is not to be given away.
    pub resting: BTreeMap<String, Seen<String>>,
}

/// This node, as it should be in etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Me {
    /// What it is as a holder.
    pub holder: Holder,
    /// Its short and its long lease; 0 if there is none yet.
    pub leases: [i64; 2],
    /// The slot that it had when weftd last ran.
    pub had: Option<u32>,
    /// The address by which etcd knows it since weftd runs.
    pub was_at: Option<String>,
    /// The network, as its configuration has it.
    pub network: Network,
}

/// What is to be done next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Nothing: all is as it should be.
    Done,
    /// Only time or an operator helps.
    Wait(String),
    /// Write how the network is cut: this node is the first.
    Found,
    /// Write this slot, which was changed last at this revision; and the keys that say that the node is there. If it was another's,
    /// that one's time of rest must be over.
    Claim { slot: u32, changed: i64, of: Option<String> },
    /// Say again that the node is there.
    Announce,
}

impl Mirror {
    /// Of everything that was listed.
    pub fn of(header: &Header, prefix: &str, keys: Vec<KeyValue>) -> Mirror {
        let mut mirror = Mirror { cluster_id: header.cluster_id, revision: header.revision, ..Mirror::default() };
        keys.into_iter().for_each(|key| mirror.put(prefix, &key));
        mirror
    }

    /// A key was written. What is older than what is known is passed over.
    pub fn put(&mut self, prefix: &str, key: &KeyValue) {
        match Name::of(prefix, &key.key) {
            Some(Name::Network) => self.network = Some(seen(key)),
            Some(Name::Slot(slot)) => enter(&mut self.slots, slot, key),
            Some(Name::Alive(name)) => enter(&mut self.alive, name, key),
            Some(Name::Resting(identity)) => enter(&mut self.resting, identity, key),
            None => {}
        }
    }

    /// A key was deleted.
    pub fn delete(&mut self, prefix: &str, key: &KeyValue) {
        let when = key.mod_revision;
        match Name::of(prefix, &key.key) {
            Some(Name::Network) => self.network = None,
            Some(Name::Slot(slot)) => remove(&mut self.slots, &slot, when),
            Some(Name::Alive(name)) => remove(&mut self.alive, &name, when),
            Some(Name::Resting(identity)) => remove(&mut self.resting, &identity, when),
            None => {}
        }
    }

    /// The slot of this node.
    pub fn own_slot(&self, identity: &str) -> Option<u32> {
        self.holders().find(|(_, _, holder)| holder.identity == identity && !holder.left).map(|(slot, _, _)| slot)
    }

    /// The other nodes: those that are heard of, then those that are not, each in the order in which their slots came to be. One that is
    /// not heard of and has the name or the address of one that is was replaced by it.
    pub fn others(&self, identity: &str, network: &Network) -> Vec<Record> {
        let others = self.holders().filter(|(_, _, holder)| holder.identity != identity && !holder.left);
        let (mut heard, mut silent): (Vec<_>, Vec<_>) = others.partition(|(_, _, holder)| self.is_alive(holder));
        let taken: BTreeSet<&str> =
            heard.iter().flat_map(|(_, _, holder)| [&*holder.record.name, &*holder.record.underlay]).collect();
        silent.retain(|(_, _, holder)| {
            ![&*holder.record.name, &*holder.record.underlay].iter().any(|claimed| taken.contains(claimed))
        });
        heard.sort_by_key(|(_, seen, _)| seen.made);
        silent.sort_by_key(|(_, seen, _)| seen.made);
        let record =
            |(slot, _, holder): (u32, _, &Holder)| Record { ranges: ranges(network, slot), ..holder.record.clone() };
        heard.into_iter().chain(silent).map(record).collect()
    }

    /// Slots that `before` had and this one has not, in order to have mercy with them after etcd was set back.
    pub fn missing(&self, before: &Mirror) -> Vec<(u32, Holder)> {
        let gone = before.holders().filter(|(slot, _, holder)| !holder.left && !self.slots.contains_key(slot));
        gone.map(|(slot, _, holder)| (slot, holder.clone())).collect()
    }

    /// What this node has to do next.
    pub fn next(&self, me: &Me) -> Step {
        let ours = me.network.shown();
        match &self.network {
            None => return Step::Found,
            Some(Seen { value: Some(theirs), .. }) if *theirs == ours => {}
            Some(theirs) => {
                let theirs = theirs.value.as_ref().map_or("something else".into(), |list| list.join(", "));
                return Step::Wait(format!(
                    "the cluster's network is {theirs}, and etcd.network here says {}: make them the same",
                    ours.join(", ")
                ));
            }
        }
        if let Some(why) = self.someone_else(me) {
            return Step::Wait(why);
        }
        if let Some(slot) = self.own_slot(&me.holder.identity) {
            let seen = &self.slots[&slot];
            if seen.value.as_ref() != Some(&me.holder) {
                return Step::Claim { slot, changed: seen.changed, of: None };
            }
            return if self.is_announced(me) { Step::Done } else { Step::Announce };
        }
        self.free_slot(me)
    }

    /// Another machine that goes by this node's name, or by its identity, and is alive.
    fn someone_else(&self, me: &Me) -> Option<String> {
        let alive = self.alive.get(&me.holder.record.name)?;
        let other = alive.value.as_ref()?;
        let name = &me.holder.record.name;
        if other.identity != me.holder.identity {
            return Some(format!(
                "another machine, at {}, is the node {name:?}: give one of them another name (key node); if this machine replaces it, \
                 wait until that one's lease has ended",
                other.underlay
            ));
        }
        let is_here = [Some(&me.holder.record.underlay), me.was_at.as_ref()].contains(&Some(&other.underlay));
        (!is_here).then(|| {
            format!(
                "a machine at {} has this node's identity: if it is a copy of this one, remove the file `identity` from the state_dir of \
                 one of them; if this node has a new address, wait until its lease at the old one has ended",
                other.underlay
            )
        })
    }

    fn is_announced(&self, me: &Me) -> bool {
        let alive = self.alive.get(&me.holder.record.name);
        let resting = self.resting.get(&me.holder.identity);
        alive.is_some_and(|seen| seen.lease == me.leases[0] && seen.value.as_ref() == Some(&me.alive()))
            && resting.is_some_and(|seen| seen.lease == me.leases[1])
    }

    fn free_slot(&self, me: &Me) -> Step {
        let identity = &me.holder.identity;
        let claim = |slot: u32, of: Option<&Holder>| {
            let changed = self.slots.get(&slot).map_or(0, |seen| seen.changed);
            let of = of.map(|holder| holder.identity.clone()).filter(|of| of != identity);
            Step::Claim { slot, changed, of }
        };
        // What this node has left, what it had on this disk, and what a node of its name had.
        let own = self.holders().find(|(_, _, holder)| holder.identity == *identity);
        if let Some((slot, _, holder)) = own {
            return claim(slot, Some(holder));
        }
        let count = me.network.slots();
        if let Some(had) = me.had.filter(|had| *had < count && !self.slots.contains_key(had)) {
            return claim(had, None);
        }
        let name = &me.holder.record.name;
        let named = self.holders().find(|(_, _, holder)| holder.record.name == *name && self.is_rested(holder));
        if let Some((slot, _, holder)) = named {
            return claim(slot, Some(holder));
        }
        // Nodes that come at once begin at different places.
        let first = number_of(name) % count.max(1);
        if let Some(slot) = (0..count).map(|step| (first + step) % count).find(|slot| !self.slots.contains_key(slot)) {
            return claim(slot, None);
        }
        let rested = self.holders().filter(|(slot, _, holder)| *slot < count && self.is_rested(holder));
        match rested.min_by_key(|(_, seen, _)| seen.changed) {
            Some((slot, _, holder)) => claim(slot, Some(holder)),
            None => Step::Wait(format!(
                "none of the {count} parts of the network is free: wait until the time of rest of a node that left is over, or make \
                 the network larger"
            )),
        }
    }

    /// Whether the time of rest of a holder is over.
    fn is_rested(&self, holder: &Holder) -> bool {
        !self.resting.contains_key(&holder.identity) && !self.is_alive(holder)
    }

    fn is_alive(&self, holder: &Holder) -> bool {
        let alive = self.alive.get(&holder.record.name).and_then(|seen| seen.value.as_ref());
        alive.is_some_and(|alive| alive.identity == holder.identity)
    }

    fn holders(&self) -> impl Iterator<Item = (u32, &Seen<Holder>, &Holder)> {
        self.slots.iter().filter_map(|(slot, seen)| Some((*slot, seen, seen.value.as_ref()?)))
    }

    /// Slots that nobody can read.
    pub fn strange(&self) -> BTreeSet<u32> {
        self.slots.iter().filter(|(_, seen)| seen.value.is_none()).map(|(slot, _)| *slot).collect()
    }
}

impl Me {
    /// What it says while it is there.
    pub fn alive(&self) -> Alive {
        Alive { identity: self.holder.identity.clone(), underlay: self.holder.record.underlay.clone() }
    }
}

/// A slot's ranges as text.
pub fn ranges(network: &Network, slot: u32) -> Vec<String> {
    network.ranges(slot).iter().map(ToString::to_string).collect()
}

/// What a key is.
enum Name {
    Network,
    Slot(u32),
    Alive(String),
    Resting(String),
}

impl Name {
    fn of(prefix: &str, key: &[u8]) -> Option<Name> {
        let rest = std::str::from_utf8(key).ok()?.strip_prefix(prefix)?.strip_prefix('/')?;
        match rest.split_once('/') {
            None if rest == "network" => Some(Name::Network),
            Some(("slots", number)) => Some(Name::Slot(number.parse().ok()?)),
            Some(("nodes", name)) => Some(Name::Alive(name.to_owned())),
            Some(("resting", identity)) => Some(Name::Resting(identity.to_owned())),
            _ => None,
        }
    }
}

fn seen<T: for<'a> Deserialize<'a>>(key: &KeyValue) -> Seen<T> {
    Seen {
        value: serde_json::from_slice(&key.value).ok(),
        made: key.create_revision,
        changed: key.mod_revision,
        lease: key.lease,
    }
}

fn enter<K: Ord, T: for<'a> Deserialize<'a>>(map: &mut BTreeMap<K, Seen<T>>, name: K, key: &KeyValue) {
    let fits = map.get(&name).map_or(map.len() < MAX_KEYS, |known| known.changed <= key.mod_revision);
    if fits {
        map.insert(name, seen(key));
    }
}

fn remove<K: Ord, T>(map: &mut BTreeMap<K, Seen<T>>, name: &K, when: i64) {
    if map.get(name).is_some_and(|known| known.changed <= when) {
        map.remove(name);
    }
}

/// A number that a name leads to: FNV-1a.
pub fn number_of(name: &str) -> u32 {
    name.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PREFIX: &str = "/weft";

    fn network() -> Network {
        Network { prefixes: vec![("10.244.0.0/22".parse().unwrap(), 24)] }
    }

    fn me(number: u8) -> Me {
        let record = Record { name: format!("n{number}"), underlay: format!("10.200.0.{number}"), ..Record::default() };
        let holder = Holder { identity: format!("id{number}"), record, left: false };
        Me {
            holder,
            leases: [i64::from(number) * 2, i64::from(number) * 2 + 1],
            had: None,
            was_at: None,
            network: network(),
        }
    }

    /// etcd's keys and their revision: what a transaction does to them.
    #[derive(Clone, Default)]
    struct Etcd {
        mirror: Mirror,
        revision: i64,
    }

    impl Etcd {
        fn write(&mut self, key: &str, value: &impl Serialize, lease: i64) {
            self.revision += 1;
            let key = KeyValue {
                key: format!("{PREFIX}/{key}").into_bytes(),
                value: serde_json::to_vec(value).unwrap(),
                create_revision: self.revision,
                mod_revision: self.revision,
                lease,
            };
            self.mirror.put(PREFIX, &key);
        }

        /// Obeys steps until there is none left; the last one that is no change.
        fn settle(&mut self, me: &Me) -> Step {
            for _ in 0..10 {
                match self.mirror.next(me) {
                    Step::Found => self.write("network", &me.network.shown(), 0),
                    Step::Claim { slot, changed, of } => {
                        assert_eq!(self.mirror.slots.get(&slot).map_or(0, |seen| seen.changed), changed);
                        assert!(of.is_none_or(|of| !self.mirror.resting.contains_key(&of)), "its rest is not over");
                        self.write(&format!("slots/{slot}"), &me.holder, 0);
                        self.announce(me);
                    }
                    Step::Announce => self.announce(me),
                    step => return step,
                }
            }
            panic!("it never settles");
        }

        fn announce(&mut self, me: &Me) {
            self.write(&format!("nodes/{}", me.holder.record.name), &me.alive(), me.leases[0]);
            self.write(&format!("resting/{}", me.holder.identity), &me.holder.record.name, me.leases[1]);
        }

        /// A lease ends, and its keys with it.
        fn lapse(&mut self, lease: i64) {
            self.mirror.alive.retain(|_, seen| seen.lease != lease);
            self.mirror.resting.retain(|_, seen| seen.lease != lease);
        }

        fn slot(&self, me: &Me) -> Option<u32> {
            self.mirror.own_slot(&me.holder.identity)
        }

        fn names(&self, seen_by: &Me) -> Vec<String> {
            let mut names: Vec<String> = self
                .mirror
                .others(&seen_by.holder.identity, &network())
                .into_iter()
                .map(|record| record.name)
                .collect();
            names.sort();
            names
        }
    }

    fn settled(count: u8) -> Etcd {
        let mut etcd = Etcd::default();
        (1..=count).for_each(|number| assert_eq!(etcd.settle(&me(number)), Step::Done));
        etcd
    }

    #[test]
    fn nodes_find_each_other_and_each_has_a_part_of_its_own() {
        let etcd = settled(4);
        let slots: BTreeSet<u32> = (1..=4).map(|number| etcd.slot(&me(number)).unwrap()).collect();
        assert_eq!(slots.len(), 4);
        assert_eq!(etcd.names(&me(1)), ["n2", "n3", "n4"]);
        assert!(etcd.mirror.others("id1", &network())[0].ranges[0].starts_with("10.244."));
    }

    #[test]
    fn a_restart_changes_nothing_in_etcd() {
        let mut etcd = settled(3);
        let before = etcd.revision;
        assert_eq!(etcd.settle(&me(2)), Step::Done);
        assert_eq!(etcd.revision, before);
    }

    #[test]
    fn a_lapsed_lease_cuts_nobody_off_and_the_part_is_given_away_last() {
        let mut etcd = settled(3);
        let lost = etcd.slot(&me(2));
        me(2).leases.into_iter().for_each(|lease| etcd.lapse(lease));
        assert_eq!(etcd.names(&me(1)), ["n2", "n3"], "its routes stay");
        assert_eq!(etcd.settle(&me(4)), Step::Done);
        assert_ne!(etcd.slot(&me(4)), lost, "a part that nobody had goes first");
        assert_eq!(etcd.settle(&me(5)), Step::Done);
        assert_eq!(etcd.slot(&me(5)), lost, "no other part is left");
        assert_eq!(etcd.names(&me(1)), ["n3", "n4", "n5"]);
    }

    #[test]
    fn a_part_rests_before_it_is_given_away() {
        let mut etcd = settled(4);
        etcd.lapse(me(2).leases[0]);
        let Step::Wait(why) = etcd.settle(&me(5)) else { panic!("it rests") };
        assert!(why.contains("none of the 4 parts of the network is free"), "{why}");
        etcd.lapse(me(2).leases[1]);
        assert_eq!(etcd.settle(&me(5)), Step::Done);
        assert_eq!(etcd.slot(&me(2)), None);
        let Step::Wait(_) = etcd.settle(&me(2)) else { panic!("its part is gone, and there is no other") };
    }

    #[test]
    fn a_node_that_comes_back_after_its_leases_has_its_part_again() {
        let mut etcd = settled(3);
        let had = etcd.slot(&me(2));
        me(2).leases.into_iter().for_each(|lease| etcd.lapse(lease));
        let later = Me { leases: [90, 91], ..me(2) };
        assert_eq!(etcd.mirror.next(&later), Step::Announce);
        assert_eq!(etcd.settle(&later), Step::Done);
        assert_eq!(etcd.slot(&later), had);
    }

    #[test]
    fn after_etcd_lost_it_a_node_claims_the_part_that_it_had() {
        let mut etcd = settled(2);
        let later = Me { had: Some(3), ..me(3) };
        assert_eq!(etcd.settle(&later), Step::Done);
        assert_eq!(etcd.slot(&later), Some(3));
    }

    #[test]
    fn a_machine_with_the_name_of_one_that_is_alive_waits() {
        let mut etcd = settled(2);
        let mut other = me(2);
        other.holder.identity = "id9".into();
        other.holder.record.underlay = "10.200.0.9".into();
        let Step::Wait(why) = etcd.settle(&other) else { panic!("the name is taken") };
        assert!(why.contains("another machine, at 10.200.0.2, is the node \"n2\""), "{why}");
        etcd.lapse(me(2).leases[0]);
        assert_eq!(etcd.settle(&other), Step::Done, "it was replaced");
        let all = etcd.mirror.others("id1", &network());
        assert_eq!(all.len(), 1, "the one that was replaced is out: {all:?}");
        assert_eq!(all[0].underlay, "10.200.0.9");
    }

    #[test]
    fn a_copy_of_a_machine_that_is_alive_waits() {
        let mut etcd = settled(2);
        let mut copy = me(2);
        copy.holder.record.underlay = "10.200.0.9".into();
        let Step::Wait(why) = etcd.settle(&copy) else { panic!("the identity is in use") };
        assert!(why.contains("a machine at 10.200.0.2 has this node's identity"), "{why}");
    }

    #[test]
    fn a_node_whose_address_changes_while_it_runs_says_so_at_once() {
        let mut etcd = settled(2);
        let mut moved = Me { was_at: Some("10.200.0.2".into()), ..me(2) };
        moved.holder.record.underlay = "10.200.0.9".into();
        assert_eq!(etcd.settle(&moved), Step::Done);
        assert_eq!(etcd.mirror.others("id1", &network())[0].underlay, "10.200.0.9");
        assert_eq!(etcd.slot(&moved), etcd.slot(&me(2)), "its part stays");
    }

    #[test]
    fn a_node_that_left_is_no_peer_and_its_part_rests() {
        let mut etcd = settled(4);
        let slot = etcd.slot(&me(3)).unwrap();
        etcd.write(&format!("slots/{slot}"), &Holder { left: true, ..me(3).holder }, me(3).leases[1]);
        etcd.mirror.alive.remove("n3");
        assert_eq!(etcd.names(&me(1)), ["n2", "n4"]);
        assert!(matches!(etcd.settle(&me(5)), Step::Wait(_)), "it rests");
        etcd.lapse(me(3).leases[1]);
        assert_eq!(etcd.settle(&me(5)), Step::Done);
        assert_eq!(etcd.slot(&me(5)), Some(slot));
    }

    #[test]
    fn a_cluster_that_is_cut_otherwise_is_not_joined() {
        let mut etcd = settled(1);
        let other = Me { network: Network { prefixes: vec![("10.9.0.0/16".parse().unwrap(), 24)] }, ..me(2) };
        let Step::Wait(why) = etcd.settle(&other) else { panic!("they differ") };
        assert!(why.contains("10.244.0.0/22 in parts of /24") && why.contains("10.9.0.0/16"), "{why}");
    }

    #[test]
    fn what_nobody_can_read_is_nobodys_and_is_not_given_away() {
        let mut etcd = settled(3);
        let free = (0..4).find(|slot| !etcd.mirror.slots.contains_key(slot)).unwrap();
        etcd.write(&format!("slots/{free}"), &"?", 0);
        assert_eq!(etcd.mirror.strange(), BTreeSet::from([free]));
        assert_eq!(etcd.names(&me(1)), ["n2", "n3"]);
        assert!(matches!(etcd.settle(&me(4)), Step::Wait(_)));
        for key in ["/weft/slots/x", "/weft/nodes", "/other/slots/1", "/weft/slots/1/2", "\u{1}"] {
            let key = KeyValue { key: key.as_bytes().to_vec(), mod_revision: 1_000, ..KeyValue::default() };
            let before = etcd.mirror.clone();
            etcd.mirror.put(PREFIX, &key);
            assert_eq!(etcd.mirror, before);
        }
    }

    #[test]
    fn news_that_come_late_are_passed_over() {
        let mut etcd = settled(1);
        let (slot, seen) = etcd.mirror.slots.iter().next().map(|(slot, seen)| (*slot, seen.clone())).unwrap();
        let old = KeyValue {
            key: format!("/weft/slots/{slot}").into_bytes(),
            mod_revision: seen.changed - 1,
            ..KeyValue::default()
        };
        etcd.mirror.delete(PREFIX, &old);
        etcd.mirror.put(PREFIX, &old);
        assert_eq!(etcd.mirror.slots[&slot], seen);
    }
}
