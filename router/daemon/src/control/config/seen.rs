//! What a configuration takes from the machine, and what becomes of that when the machine changes: its address among the nodes, and what belongs
//! to that. Pure.

use std::net::IpAddr;

use weft_router::tables::LEAST_V6;

use super::check::{MAX_MTU, special};
use super::{Config, encapsulation};
use crate::control::derive;
use crate::control::host::Host;

impl Config {
    /// The same on a machine that looks like this, with this address among the nodes. What belongs to the address stays as it was while no
    /// interface has it.
    #[must_use]
    pub fn seen_on(&self, host: &Host, address: IpAddr) -> Config {
        let mut config = self.clone();
        let vtep_mac = |address| derive::vtep_mac(&self.node, address);
        if self.vtep_mac == vtep_mac(self.underlay.address) {
            config.vtep_mac = vtep_mac(address);
        }
        config.underlay.address = address;
        if let Some(device) = host.holder_of(address) {
            config.underlay.subnet = encapsulation::subnet(host, address);
            config.underlay.mtu = device.mtu;
            if !self.mtu_is_given {
                config.mtu = device.mtu.saturating_sub(self.underlay.overhead).clamp(LEAST_V6, MAX_MTU);
            }
        }
        config
    }

    /// What is known of the device that had the address, while no interface has it.
    pub fn keep_device_of(&mut self, known: &Config) {
        (self.underlay.subnet, self.underlay.mtu) = (known.underlay.subnet, known.underlay.mtu);
        if !self.mtu_is_given {
            self.mtu = known.mtu;
        }
    }

    /// The address among the nodes that this node should have on a machine that looks like this: what the file says; or what the source says,
    /// as soon as the machine has it; or the one of now as long as the machine has that, and then its main one.
    pub fn address_on(&self, host: &Host, said: Option<IpAddr>) -> IpAddr {
        let now = self.underlay.address;
        let pods = || self.ranges.iter().chain(&self.former).chain(&self.segment);
        let fits = |address: IpAddr| {
            address.is_ipv4() == now.is_ipv4()
                && special(address).is_none()
                && !pods().any(|range| range.contains(&address))
        };
        if self.underlay.is_given {
            return now;
        }
        match said.filter(|said| fits(*said)) {
            Some(said) if host.holder_of(said).is_some() => said,
            Some(_) => now,
            None if host.holder_of(now).is_some() => now,
            None => host.main_address(self.underlay.device.as_deref(), fits).unwrap_or(now),
        }
    }
}
