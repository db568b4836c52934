//! What a durable lease costs on this disk: `cargo run --release -p weft-ipam --example lease_cost -- FOLDER`.
//!
//! The folder must be empty or absent. Three numbers: a lease and its release one at a time (each one append and one
//! fdatasync), a /16 filled to the last address, and the time to open the store that this leaves.

use std::error::Error;
use std::time::Instant;

use weft_ipam::{Facts, LeaseError, Owner, Range, RangeSet, Store};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args().nth(1).ok_or("name a folder on the disk to measure")?;
    let store = Store::open(&folder)?;
    if !store.is_empty() {
        return Err(format!("{folder} holds leases; name an empty folder").into());
    }
    let set: RangeSet = Range::whole("10.1.0.0/16".parse()?)?.into();
    let sets = std::slice::from_ref(&set);
    let owner = |n: u32| Owner { network: "weft".into(), container: format!("{n:064x}"), ifname: "eth0".into() };

    let (mut leased, mut released) = (Vec::new(), Vec::new());
    for n in 0..2000 {
        let begun = Instant::now();
        store.lease(&owner(n), sets, &[], Facts::default(), 0)?;
        leased.push(begun.elapsed());
        let begun = Instant::now();
        store.release(&owner(n), 0);
        released.push(begun.elapsed());
    }
    for (name, times) in [("lease", &mut leased), ("release", &mut released)] {
        times.sort();
        let at = |percent: usize| times[times.len() * percent / 100];
        println!("{name}: median {:?}, p99 {:?}, p1 {:?}", at(50), at(99), at(1));
    }

    let begun = Instant::now();
    let mut count = 0;
    let full = loop {
        match store.lease(&owner(count), sets, &[], Facts::default(), 0) {
            Ok(_) => count += 1,
            Err(e @ LeaseError::Exhausted { .. }) => break e,
            Err(e) => return Err(e.into()),
        }
    };
    println!("filled: {count} leases in {:?} ({full})", begun.elapsed());
    println!("journal: {} bytes", store.journal_len());
    drop(store);

    let begun = Instant::now();
    let store = Store::open(&folder)?;
    println!("opened: {} leases in {:?}", store.len(), begun.elapsed());
    Ok(())
}
