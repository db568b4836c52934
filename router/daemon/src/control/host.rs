//! What the machine looks like: its interfaces, as far as the configuration depends on them.

use std::net::IpAddr;

/// The interfaces of the network namespace that weftd runs in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Host {
    /// All of them.
    pub interfaces: Vec<Interface>,
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

    /// The interface with this name.
    pub fn named(&self, name: &str) -> Option<&Interface> {
        self.interfaces.iter().find(|interface| interface.name == name)
    }
}
