//! What the machine looks like: its interfaces, as far as the configuration depends on them.

use std::net::IpAddr;

use ipnet::IpNet;

/// The interfaces of the network namespace that weftd runs in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Host {
    /// All of them.
    pub interfaces: Vec<Interface>,
    /// The numbers of those that a default route leads to, the preferred one first.
    pub defaults: Vec<u32>,
    /// What its environment calls it.
    pub node_name: Option<String>,
    /// Its address among the nodes, as the cluster knows it.
    pub node_address: Option<IpAddr>,
    /// All of its addresses with the prefixes that are on-link there.
    pub subnets: Vec<IpNet>,
}

/// A network interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is up and has carrier.
    pub up: bool,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

impl Host {
    /// The interface that has `address`.
    pub fn holder_of(&self, address: IpAddr) -> Option<&Interface> {
        self.interfaces.iter().find(|interface| interface.addresses.contains(&address))
    }

    /// The address by which others know this machine: the first usable one, IPv4 before IPv6, of the named interface, or else of
    /// the one that a default route leads to.
    pub fn main_address(&self, name: Option<&str>, usable: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
        let interfaces: Vec<&Interface> = match name {
            Some(name) => self.named(name).into_iter().collect(),
            None => {
                let by_index = |index: &u32| self.interfaces.iter().find(|interface| interface.index == *index);
                self.defaults.iter().filter_map(by_index).collect()
            }
        };
        let all = || interfaces.iter().flat_map(|interface| &interface.addresses).copied();
        all().find(|address| address.is_ipv4() && usable(*address)).or_else(|| all().find(|address| usable(*address)))
    }

    /// The interface with this name.
    pub fn named(&self, name: &str) -> Option<&Interface> {
        self.interfaces.iter().find(|interface| interface.name == name)
    }
}
