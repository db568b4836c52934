//! An attachment and what it has: the words that everything else here is about.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

/// What identifies an attachment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Owner {
    /// Name of the network.
    pub network: String,
    /// The runtime's container id.
    pub container: String,
    /// Name of the interface in the pod.
    pub ifname: String,
}

/// The container of reservations.
pub const RESERVED: &str = "reserved";

/// Who has an address that is never given. No CNI request can name it, for the network's name is empty.
pub fn reserved_owner(address: IpAddr) -> Owner {
    Owner { network: String::new(), container: RESERVED.into(), ifname: address.to_canonical().to_string() }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.network, self.container, self.ifname)
    }
}

/// What is remembered with a lease and not looked at here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// The pool: the name of the address space in which the addresses are unique. The node's own is empty.
    pub pool: String,
    /// When the lease was made, in seconds since 1970, for people: nothing is decided by it.
    pub time: u64,
    /// The MAC of the interface.
    pub mac: Option<[u8; 6]>,
    /// The boot in which the lease was made, by the kernel's boot id: no pod outlives one. Empty if it is not known.
    pub boot: String,
    /// The pod's network namespace, if it is known.
    pub netns: Option<Netns>,
    /// Anything else, for people: namespace and name of the pod and the like.
    pub labels: BTreeMap<String, String>,
}

/// A network namespace, by what the kernel never gives to another one before the next boot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Netns {
    /// Its cookie (`SO_NETNS_COOKIE`).
    pub cookie: u64,
    /// The inode of its file, which the kernel wants to hear along with the cookie to find it again. By itself it means nothing: the
    /// next namespace may have it.
    pub inode: u64,
    /// Its number, if it was given one.
    pub number: Option<NetnsNumber>,
}

/// The number that a namespace has in another one (`RTM_NEWNSID`); it is gone when the namespace is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NetnsNumber {
    /// The cookie of the namespace in which the number counts.
    pub home: u64,
    /// The number.
    pub id: i32,
}

/// An address given to an attachment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The address.
    pub address: IpAddr,
    /// Length of the on-link prefix in bits.
    pub prefix_len: u8,
    /// The gateway of the range that the address is from; unspecified if another program gave it.
    pub gateway: IpAddr,
    /// Which set the address is from: the start of that set's first range; unspecified if another program gave it.
    pub(crate) set: IpAddr,
}

impl Lease {
    /// An address of which nothing is known but that an attachment has it.
    pub(crate) fn foreign(address: IpAddr) -> Lease {
        let (prefix_len, unknown) = match address {
            IpAddr::V4(_) => (32, IpAddr::from([0; 4])),
            IpAddr::V6(_) => (128, IpAddr::from([0; 16])),
        };
        Lease { address, prefix_len, gateway: unknown, set: unknown }
    }

    /// Address and prefix length together, as in `10.244.1.2/24`.
    pub fn cidr(&self) -> IpNet {
        IpNet::new(self.address, self.prefix_len).expect("a lease has a prefix that fits its family")
    }
}

/// An attachment and all of its addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Whose they are.
    pub owner: Owner,
    /// One for each range set, in the order in which the sets were given.
    pub leases: Vec<Lease>,
    /// What came with the request.
    pub facts: Facts,
}

impl Record {
    /// The addresses alone.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.leases.iter().map(|l| l.address)
    }
}
