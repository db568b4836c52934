//! The devices at a path's ends: what they are, what they counted, and NAPI where a veth needs it.
//!
//! `ip` and `ethtool` are asked rather than the kernel itself: this happens before and after trials, never within.

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::lab::command::Run;

/// What `ip -json -details -statistics link` says of a device, as far as it matters.
#[derive(Debug, Deserialize)]
pub struct Device {
    /// Its number in its namespace.
    pub ifindex: u32,
    /// Its name there.
    pub ifname: String,
    /// Longest packet.
    pub mtu: u32,
    flags: Vec<String>,
    address: String,
    link_index: Option<u32>,
    link_netnsid: Option<u32>,
    #[serde(default)]
    linkinfo: LinkInfo,
    xdp: Option<serde_json::Value>,
    stats64: Statistics,
}

#[derive(Debug, Default, Deserialize)]
struct LinkInfo {
    #[serde(default)]
    info_kind: String,
}

#[derive(Debug, Deserialize)]
struct Statistics {
    tx: Counted,
}

#[derive(Debug, Deserialize)]
struct Counted {
    packets: u64,
}

#[derive(Deserialize)]
struct NamedNetns {
    nsid: i64,
    name: Option<String>,
}

impl Device {
    /// Looks at a device.
    pub fn look(netns: &str, name: &str) -> Result<Device> {
        let said = Run::ip(&format!("-n {netns} -json -details -statistics link show dev {name}")).succeed()?;
        let mut devices: Vec<Device> = serde_json::from_slice(&said).with_context(|| strange(netns))?;
        devices.pop().with_context(|| format!("there is no device {name} in {netns}"))
    }

    /// Refuses a device that cannot carry frames.
    pub fn check_up(&self, netns: &str) -> Result<()> {
        for flag in ["UP", "LOWER_UP"] {
            if !self.flags.iter().any(|has| has == flag) {
                bail!("{} in {netns} is down; `ip -n {netns} link set {} up`, at both ends", self.ifname, self.ifname);
            }
        }
        Ok(())
    }

    /// Its MAC.
    pub fn mac(&self) -> Result<[u8; 6]> {
        let mut mac = [0; 6];
        let mut digits = self.address.split(':');
        for byte in &mut mac {
            *byte = digits
                .next()
                .and_then(|digits| u8::from_str_radix(digits, 16).ok())
                .with_context(|| format!("{} has no MAC, but {:?}", self.ifname, self.address))?;
        }
        Ok(mac)
    }

    /// Frames that were taken out of it: by the reader of a TAP, by the other end of a veth.
    pub fn taken(&self) -> u64 {
        self.stats64.tx.packets
    }
}

fn strange(netns: &str) -> String {
    format!("`ip` says strange things about {netns}; a newer iproute2 may help")
}

/// NAPI on the other end of a sender's veth, without which nothing can be redirected into it. GRO brings it; so does a
/// program on the other end, as AF_XDP ports have it. A TAP needs nothing.
#[derive(Debug)]
pub struct Napi {
    /// Where GRO was turned on: namespace and device.
    changed: Option<(String, String)>,
}

impl Napi {
    /// Makes sure that there is NAPI.
    pub fn ensure(netns: &str, device: &Device) -> Result<Napi> {
        if device.linkinfo.info_kind != "veth" {
            return Ok(Napi { changed: None });
        }
        // A namespace without a name is weftd's own: its devices have programs. If they had not, nothing would arrive.
        let Some((other, name)) = peer(netns, device)? else { return Ok(Napi { changed: None }) };
        let peer = Device::look(&other, &name)?;
        if peer.xdp.is_some() || is_gro_on(&other, &name)? {
            return Ok(Napi { changed: None });
        }
        switch_gro(&other, &name, "on")?;
        Ok(Napi { changed: Some((other, name)) })
    }

    /// Takes it away again, if it was brought.
    pub fn restore(mut self) -> Result<()> {
        match self.changed.take() {
            Some((netns, name)) => switch_gro(&netns, &name, "off"),
            None => Ok(()),
        }
    }
}

impl Drop for Napi {
    fn drop(&mut self) {
        if let Some((netns, name)) = self.changed.take() {
            // Whatever ended the trials is already on its way to the user.
            let _ = switch_gro(&netns, &name, "off");
        }
    }
}

/// Namespace and name of a veth's other end; none if the namespace has no name.
fn peer(netns: &str, device: &Device) -> Result<Option<(String, String)>> {
    let index = device.link_index.with_context(|| format!("{} in {netns} has no other end", device.ifname))?;
    let other = match device.link_netnsid {
        None => netns.to_owned(),
        Some(id) => match named(netns, id)? {
            Some(named) => named,
            None => return Ok(None),
        },
    };
    let said = Run::ip(&format!("-n {other} -json -details -statistics link show")).succeed()?;
    let devices: Vec<serde_json::Value> = serde_json::from_slice(&said).with_context(|| strange(&other))?;
    let found = devices.iter().find(|device| device["ifindex"] == index);
    let name = found.and_then(|device| device["ifname"].as_str());
    let name = name.with_context(|| format!("the other end of {} in {netns} is not in {other}", device.ifname))?;
    Ok(Some((other, name.to_owned())))
}

fn named(netns: &str, id: u32) -> Result<Option<String>> {
    let said = Run::ip(&format!("-n {netns} -json netns list-id")).succeed()?;
    let all: Vec<NamedNetns> = serde_json::from_slice(&said).with_context(|| strange(netns))?;
    Ok(all.into_iter().find(|known| known.nsid == i64::from(id)).and_then(|known| known.name))
}

fn is_gro_on(netns: &str, name: &str) -> Result<bool> {
    let said = Run::inside(netns, "ethtool").args(["-k", name]).succeed().with_context(ETHTOOL)?;
    let said = String::from_utf8_lossy(&said);
    Ok(said.lines().any(|line| line.trim().starts_with("generic-receive-offload: on")))
}

fn switch_gro(netns: &str, name: &str, to: &str) -> Result<()> {
    let run = Run::inside(netns, "ethtool").args(["-K", name, "gro", to]).uninterrupted();
    run.succeed().with_context(ETHTOOL).map(drop)
}

const ETHTOOL: fn() -> &'static str = || "cannot switch GRO; `apt-get install ethtool`, if it is missing";
