//! Addresses for pods: ranges, leases, and a store that keeps them through any crash.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use weft_ipam::{Facts, LeaseError, Owner, Range, RangeSet, Store};
//!
//! let folder = tempfile::tempdir()?;
//! let store = Store::open(folder.path())?;
//! // One address from each set: dual stack.
//! let sets: [RangeSet; 2] =
//!     [Range::whole("10.244.1.0/24".parse()?)?.into(), Range::whole("fd00:10:244:1::/64".parse()?)?.into()];
//! let owner = Owner { network: "weft".into(), container: "c0ffee".into(), ifname: "eth0".into() };
//!
//! let now = 7_000; // milliseconds since the boot
//! let record = store.lease(&owner, &sets, &[], Facts { time: 1_700_000_000, ..Facts::default() }, now)?;
//! assert_eq!(record.leases[0].address.to_string(), "10.244.1.2"); // .1 is the gateway
//! assert_eq!(record.leases[1].address.to_string(), "fd00:10:244:1::2");
//! assert!(matches!(store.lease(&owner, &sets, &[], Facts::default(), now), Err(LeaseError::Exists { .. })));
//!
//! // Whatever ends the process here, the lease is there when the store is opened again.
//! drop(store);
//! let store = Store::open(folder.path())?;
//! assert_eq!(store.by_address("", "10.244.1.2".parse()?).map(|r| r.owner.clone()), Some(owner.clone()));
//! assert!(store.release(&owner, now).is_some());
//! assert!(store.release(&owner, now).is_none());
//! # Ok(())
//! # }
//! ```
//!
//! What is promised:
//!
//! - **No address is given twice** within a pool, and no acknowledged lease is lost, whatever crashes when: a process
//!   that is killed, a machine that loses power, a disk that fills up or fails. Damage that would force a guess is
//!   refused by name ([`OpenError::Damaged`]).
//! - **Time is an argument.** Nothing here reads a clock, a configuration or the network.
//! - **Choosing is fast in a full range**: a look-up or two in an ordered map, in a /16 as in a /64.
//! - **One writer**, by a lock that ends with the process; readers need none ([`Store::read_only`]).
//!
//! Read `range` for from where addresses are given, `choose` for which one, `leases` for who has it, `store` for what
//! is promised when, `commit` for how many threads share a write, `journal` and `codec` for every byte on disk, `disk` for what is asked of a
//! file system.

mod choose;
mod codec;
mod commit;
mod disk;
mod error;
mod fsck;
mod host_local;
mod journal;
mod leases;
mod range;
mod record;
mod resting;
mod rounds;
mod store;
mod taken;

pub use disk::{Disk, JOURNAL_FILE, LOCK_FILE, NEXT_FILE, Which};
pub use error::{LeaseError, OpenError, Recovery, StoreError};
pub use fsck::{Checkup, Damage, check, examine, lost_owner, repair};
pub use host_local::{Foreign, Written, export, foreign, unknown_owner};
pub use ipnet::IpNet;
pub use journal::{COMPACT_STEP, MAX_JOURNAL, MAX_PAYLOAD, VERSION};
pub use leases::{Leases, Usage};
pub use range::{Range, RangeError, RangeSet};
pub use record::{Facts, Lease, Netns, NetnsNumber, Owner, RESERVED, Record, reserved_owner};
pub use store::{Begun, Counts, MAX_LIVE, Rules, Store};
