//! What a durable lease costs on this disk: `cargo run --release -p weft-ipam --example lease_cost -- FOLDER`.
//!
//! The folder must be empty or absent. Three numbers: a lease and its release one at a time (each one append and one
//! fdatasync), a /16 filled to the last address by eight threads, and the time to open the store that this leaves.

use std::error::Error;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use weft_ipam::{Facts, LeaseError, Owner, Range, RangeSet, Store};

const THREADS: usize = 8;

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

    let (next, begun) = (AtomicU32::new(10_000), Instant::now());
    let before = store.counts();
    let fill = || -> Result<(), LeaseError> {
        loop {
            let owner = owner(next.fetch_add(1, Ordering::Relaxed));
            match store.lease(&owner, sets, &[], Facts::default(), 0) {
                Ok(_) => {}
                Err(LeaseError::Exhausted { .. }) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    };
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(fill)).collect();
        threads.into_iter().map(|thread| thread.join().expect("no thread panics")).collect()
    });
    results.into_iter().collect::<Result<(), _>>()?;
    let (after, took) = (store.counts(), begun.elapsed());
    let (count, syncs) = (after.leased - before.leased, after.commits - before.commits);
    println!(
        "filled by {THREADS} threads: {count} leases in {took:?}, {:.0} per second, {:.1} per sync",
        count as f64 / took.as_secs_f64(),
        count as f64 / syncs as f64
    );
    println!("journal: {} bytes", store.journal_len());
    drop(store);

    let begun = Instant::now();
    let store = Store::open(&folder)?;
    println!("opened: {} leases in {:?}", store.len(), begun.elapsed());
    Ok(())
}
