//! The section `leases`: what holds for the addresses that this node gives.

use std::path::PathBuf;
use std::str::FromStr;

use ipnet::IpNet;

use super::reader::{At, Reader, Section};

/// Where the kernel tells one boot from another.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Seconds for which a freed address is left alone: what others know of it, as neighbours and connections, has expired by then.
const REST: u64 = 30;
/// A day: whoever wants more has no addresses to rest.
const MAX_REST: u64 = 86_400;

/// What holds for the addresses that this node gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leases {
    /// The file that has another content after each boot.
    pub boot_id: PathBuf,
    /// Seconds for which a freed address is not given again, as long as there are others.
    pub rest: u64,
    /// What is never given.
    pub reserved: Vec<IpNet>,
}

/// An address, or all of a prefix.
struct Reserved(IpNet);

impl FromStr for Reserved {
    type Err = ();
    fn from_str(text: &str) -> Result<Reserved, ()> {
        let address = text.parse().map(|address: std::net::IpAddr| IpNet::from(address.to_canonical()));
        let net = text.parse().map(|net: IpNet| net.trunc());
        address.or(net).map(Reserved).map_err(|_| ())
    }
}

impl Default for Leases {
    fn default() -> Leases {
        Leases { boot_id: BOOT_ID.into(), rest: REST, reserved: Vec::new() }
    }
}

impl Leases {
    pub(super) fn read<'t>(reader: &mut Reader<'t>, root: &mut Section<'t>) -> Leases {
        let mut leases = Leases::default();
        let Some(mut section) = reader.table(root, "leases") else { return leases };
        if let Some(path) = reader.parsed::<PathBuf>(&mut section, "boot_id", "a path") {
            if !path.value.is_absolute() {
                reader.problem(&path.place, "must be an absolute path");
            }
            leases.boot_id = path.value;
        }
        let rest: Option<At<u64>> = reader.number(&mut section, "rest", 0..=MAX_REST);
        leases.rest = rest.map_or(leases.rest, |rest| rest.value);
        let reserved: Vec<At<Reserved>> =
            reader.list(&mut section, "reserved", "an address such as 10.244.1.10 or a prefix such as 10.244.1.16/28");
        leases.reserved = reserved.into_iter().map(|at| at.value.0).collect();
        reader.finish(section);
        leases
    }
}
