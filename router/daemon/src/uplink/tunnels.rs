//! The underlay's ports beside VXLAN's: one for Geneve, one for GRE, one for IP in IP.
//!
//! A node takes in every format that its layout can use, whatever it sends itself, so that the nodes of a cluster can be changed one by
//! one. They are opened once, before anybody is told what this node takes in. What cannot be opened is left out, and said: packets then go
//! by VXLAN, and other nodes send VXLAN.

use std::net::SocketAddr;

use weft_encap::format::Format;
use weft_router::port::raw::RawTunnel;
use weft_router::port::udp::Underlay as Sockets;
use weft_router::{Device, PortId, Router};

use super::TRANSMIT_SOCKETS;
use crate::control::config::{Config, Underlay};
use crate::control::desired::tunnel_port;

/// The ports that were opened, for the workers to get.
#[derive(Default)]
pub struct Tunnels {
    opened: Vec<(PortId, Device)>,
    /// What could not be opened, and why.
    pub refused: Vec<(Format, String)>,
}

impl Tunnels {
    /// Opens what the configuration's layout can use, and leaves the rest out of its formats.
    pub fn open(config: &mut Config, workers: usize) -> Tunnels {
        let mut tunnels = Tunnels::default();
        let formats = config.underlay.formats.clone();
        for format in formats {
            let port = tunnel_port(format);
            // GRE has two formats and one port.
            if format == Format::Vxlan || tunnels.opened.iter().any(|(other, _)| *other == port) {
                continue;
            }
            match open(&config.underlay, format, workers) {
                Ok(device) => tunnels.opened.push((port, device)),
                Err(why) => tunnels.refused.push((format, why)),
            }
        }
        let is_refused = |format: &Format| tunnels.refused.iter().any(|(refused, _)| refused == format);
        config.underlay.formats.retain(|format| !is_refused(format));
        tunnels
    }

    /// Gives them to the workers. Returns what could not be opened, in words.
    ///
    /// # Errors
    /// The data plane takes nothing.
    pub fn hand_over(self, router: &Router) -> anyhow::Result<Vec<(Format, String)>> {
        for (port, device) in self.opened {
            router.add_port(port, device)?;
        }
        for (format, why) in &self.refused {
            tracing::info!("{format} is not taken in: {why}");
        }
        Ok(self.refused)
    }
}

/// The same ports for another address; those that were refused stay so.
///
/// # Errors
/// What could not be opened.
pub fn open_all(underlay: &Underlay, workers: usize) -> anyhow::Result<Vec<(PortId, Device)>> {
    let mut opened: Vec<(PortId, Device)> = Vec::new();
    for format in underlay.formats.iter().copied().filter(|format| *format != Format::Vxlan) {
        let port = tunnel_port(format);
        if !opened.iter().any(|(other, _)| *other == port) {
            opened.push((port, open(underlay, format, workers).map_err(anyhow::Error::msg)?));
        }
    }
    Ok(opened)
}

fn open(underlay: &Underlay, format: Format, workers: usize) -> Result<Device, String> {
    match format {
        Format::Vxlan | Format::Geneve => {
            let local = SocketAddr::new(underlay.address, underlay.geneve_port);
            let opened = Sockets::open_for(workers, local, TRANSMIT_SOCKETS);
            let opened = opened.map_err(|error| {
                format!("{local} cannot be opened ({error}): does another program, or a device of the kernel, use the port (ss -ulnp)?")
            })?;
            Ok(Device::Underlay(opened.carrying(format)))
        }
        Format::Gre | Format::Gretap | Format::Ipip => {
            let opened = RawTunnel::open(format, workers, underlay.address);
            let why =
                |error| format!("raw sockets of {} cannot be opened ({error}): it takes CAP_NET_RAW", underlay.address);
            opened.map(Device::Raw).map_err(why)
        }
    }
}
