//! The daemon's configuration file: any text is a configuration or a list of what is wrong with it, each with its line.

use crate::control::config::Config;
use crate::control::host::{Host, Interface};

/// See the module.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let uplink = Interface {
        index: 2,
        name: "uplink".into(),
        mtu: 1500,
        up: true,
        addresses: vec!["10.200.0.1".parse().expect("an address")],
    };
    match Config::read(text, &Host { interfaces: vec![uplink], defaults: vec![2], ..Host::default() }) {
        Ok(checked) => {
            let config = checked.config;
            assert!(config.mtu >= 68 && config.mtu <= u32::from(u16::MAX));
            assert!(config.vtep_mac.is_unicast() && config.gateway.mac.is_unicast());
            assert!(
                config.peers.iter().all(|peer| peer.vtep_mac.is_unicast() && peer.underlay != config.underlay.address)
            );
        }
        Err(invalid) => assert!(!invalid.0.is_empty() && !invalid.to_string().trim().is_empty()),
    }
}
