//! A data path that was built: two nodes with two pods each, the same for all.
//!
//! A bed is a lab, so it is written down before it is made, removed when it is dropped, and found by the next run if
//! this one is killed.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::Signal;

use super::contender::{Contender, Kind};
use super::iperf::Server;
use super::task::{Layout, Links};
use super::{frames, ovs, programs, testpmd};
use crate::lab::command::Run;
use crate::lab::plan::{self, Encapsulation, Mode, Plan};
use crate::lab::process::Process;
use crate::lab::record::{self, Record, Stored};
use crate::lab::up::{self, Programs};
use crate::lab::{down, twin};
use crate::output;

/// MTU of the underlay.
const MTU: u32 = 1500;
const NODES: u8 = 2;
const PODS: u8 = 2;
/// The pods' interface, everywhere.
const IFNAME: &str = "eth0";
/// What a NIC without offloads lacks, as `ethtool` calls it. What a tunnel device gives it is segmented before.
const UPLINK_OFFLOADS: [&str; 4] =
    ["tso", "tx-udp-segmentation", "tx-udp_tnl-segmentation", "tx-udp_tnl-csum-segmentation"];
/// The same for a pod's device.
const POD_OFFLOADS: [&str; 2] = ["tso", "tx-udp-segmentation"];

/// What has the kernel's pods leave in their node's name.
const NAT: &str = "add table ip weft-bench; add chain ip weft-bench post { type nat hook postrouting priority srcnat; }; \
    add rule ip weft-bench post ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 masquerade";

/// A pod, as one end of what is measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// Its namespace.
    pub netns: String,
    /// Its address.
    pub address: Ipv4Addr,
}

/// From where to where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ends {
    /// The client.
    pub from: End,
    /// The server.
    pub to: End,
}

/// A data path that was built.
#[derive(Debug)]
pub struct Bed {
    /// Which.
    pub contender: &'static Contender,
    plan: Plan,
    plugin: PathBuf,
    /// The program that forwards on each node, if it is one.
    routers: Vec<Process>,
    servers: Vec<Server>,
    /// Whose links are as a NIC without offloads.
    plain: Option<Layout>,
    /// Whether the kernel has rules for what leaves the cluster, which would cost everything else something, too.
    translates: bool,
    is_removed: bool,
}

impl Bed {
    /// Builds it, in a lab whose name begins with `name`, with so many workers of each weftd. It carries traffic when this returns.
    pub fn build(contender: &'static Contender, name: &str, programs: &Programs, workers: Option<u8>) -> Result<Bed> {
        let lab = lab_name(name, contender);
        let mode = if contender.is_dispensable() { Mode::Bridged } else { Mode::Routed };
        let plan = Plan { is_passing: true, workers, ..Plan::new(&lab, NODES, PODS, mode, MTU)? };
        let (plan, routers) = match contender.kind {
            Kind::Weft(change) | Kind::Wrapped(change) => {
                let plan = change(plan);
                let cluster = up::up(&plan, programs, false)?;
                let process = |node: &record::Node| Process::identify(node.pid, &format!("weftd of {}", node.name));
                let routers = cluster.nodes.iter().map(process).collect::<Result<_>>();
                (plan, routers)
            }
            Kind::Masquerading => {
                let plan = Plan { masquerade: true, ..plan };
                let cluster = up::up(&plan, programs, false)?;
                let process = |node: &record::Node| Process::identify(node.pid, &format!("weftd of {}", node.name));
                let routers = cluster.nodes.iter().map(process).collect::<Result<_>>();
                (plan, routers)
            }
            Kind::Kernel => {
                twin::build(&plan)?;
                (plan, Ok(Vec::new()))
            }
            Kind::Routes => {
                let plan = plan.wrapped(Encapsulation::HostGw)?;
                twin::build(&plan)?;
                (plan, Ok(Vec::new()))
            }
            Kind::Ovs(ports) => {
                let switches = ovs::build(&plan, ports)?;
                (plan, Ok(switches))
            }
            Kind::Testpmd => {
                let process = testpmd::build(&plan)?;
                (plan, Ok(vec![process]))
            }
        };
        // From here on there is something to remove.
        let plugin = programs.weft_cni.clone();
        let (routers_, servers, plain, translates, is_removed) = (Vec::new(), Vec::new(), None, false, false);
        let mut bed = Bed { contender, plan, plugin, routers: routers_, servers, plain, translates, is_removed };
        bed.routers = routers?;
        bed.prepare()?;
        bed.rest()?;
        Ok(bed)
    }

    /// What was built.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Weft's CNI plugin.
    pub fn plugin(&self) -> &Path {
        &self.plugin
    }

    /// Sees to it that it carries traffic and that its pods are ready to be measured.
    fn prepare(&mut self) -> Result<()> {
        for layout in Layout::ALL.into_iter().filter(|layout| self.contender.has(*layout)) {
            self.translate(layout == Layout::Out)?;
            self.check(layout).with_context(|| format!("no traffic between {}", layout.label()))?;
            let Ends { from, to } = self.ends(layout);
            forget_pacing(&from.netns)?;
            forget_pacing(&to.netns)?;
            self.servers.push(Server::start(&to.netns)?);
        }
        Ok(())
    }

    /// The two pods of a layout.
    pub fn ends(&self, layout: Layout) -> Ends {
        let end = |node, pod| End { netns: self.plan.pod_netns(node, pod), address: plan::range_v4(node, pod + 1) };
        let to = match layout {
            Layout::Same => end(1, 2),
            Layout::Two => end(2, 1),
            Layout::Out => End { netns: self.plan.node_netns(2), address: outside(&self.plan) },
        };
        Ends { from: end(1, 1), to }
    }

    /// The same for frames that are made by hand, which must be addressed to the MAC that the pod's kernel would take.
    pub fn frame_ends(&self, layout: Layout) -> Result<frames::Ends> {
        let Ends { from, to } = self.ends(layout);
        let gateway = next_hop(&from, to.address)?;
        let end = |end: End| frames::End { netns: end.netns, device: IFNAME.to_owned(), address: end.address };
        Ok(frames::Ends { from: end(from), to: end(to), gateway, cpu: None })
    }

    /// The programs that forward in a layout.
    pub fn pids(&self, layout: Layout) -> Vec<u32> {
        self.routers.iter().take(nodes(layout)).map(|process| process.pid).collect()
    }

    /// Makes it ready to be measured: its routers run, its links are as asked for.
    pub fn wake(&mut self, layout: Layout, links: Links) -> Result<()> {
        if self.contender.spins() {
            self.routers.iter().take(nodes(layout)).try_for_each(|router| router.signal(Signal::CONT))?;
        }
        self.translate(layout == Layout::Out)?;
        let plain = (links == Links::Plain).then_some(layout);
        if plain != self.plain {
            if let Some(before) = self.plain.take() {
                self.switch_offloads(before, true)?;
            }
            if let Some(layout) = plain {
                self.switch_offloads(layout, false)?;
                self.plain = plain;
            }
        }
        Ok(())
    }

    /// Has the kernel masquerade or not, where it is what forwards.
    fn translate(&mut self, wanted: bool) -> Result<()> {
        if !matches!(self.contender.kind, Kind::Kernel) || self.translates == wanted {
            return Ok(());
        }
        let rules = if wanted { NAT } else { "delete table ip weft-bench" };
        Run::inside(&self.plan.node_netns(1), "nft").args([rules]).succeed()?;
        self.translates = wanted;
        Ok(())
    }

    /// Its turn is over: it uses no processor until it is woken.
    pub fn rest(&self) -> Result<()> {
        if self.contender.spins() {
            self.routers.iter().try_for_each(|router| router.signal(Signal::STOP))?;
        }
        Ok(())
    }

    /// Removes it.
    pub fn remove(mut self) -> Result<()> {
        self.take_down()
    }

    /// Sends a few datagrams both ways; an error if they do not come back.
    pub fn check(&self, layout: Layout) -> Result<()> {
        const BRIEF: Duration = Duration::from_millis(5);
        let Ends { from, to } = self.ends(layout);
        let (_server, address) = programs::serve(&to.netns, "echo", to.address, BRIEF)?;
        let rest = [("seconds", BRIEF), ("pause", Duration::ZERO), ("delay", Duration::ZERO)];
        let mut client = programs::client(&from.netns, "ping", address, &rest)?;
        client.hear::<programs::RoundTrips>(programs::deadline(BRIEF)).map(drop)
    }

    /// Gives the devices of a layout the offloads of a veth or TAP, or takes them away.
    fn switch_offloads(&self, layout: Layout, on: bool) -> Result<()> {
        let (devices, offloads) = match layout {
            Layout::Same => {
                let Ends { from, to } = self.ends(layout);
                ([from.netns, to.netns].map(|netns| (netns, IFNAME)), &POD_OFFLOADS[..])
            }
            Layout::Two | Layout::Out => {
                ([1, 2].map(|node| (self.plan.node_netns(node), plan::UPLINK)), &UPLINK_OFFLOADS[..])
            }
        };
        let state = if on { "on" } else { "off" };
        for (netns, device) in devices {
            let ethtool = |args: &[&str]| Run::inside(&netns, "ethtool").args(args).succeed();
            let mut args = vec!["-K", device];
            args.extend(offloads.iter().flat_map(|offload| [*offload, state]));
            if layout != Layout::Same {
                // The receiver's side of such a NIC merges again; a veth does so only if it is asked to.
                args.extend(["gro", if on { "off" } else { "on" }]);
            }
            ethtool(&args)?;
            let features = String::from_utf8_lossy(&ethtool(&["-k", device])?).into_owned();
            if !features.contains(&format!("\ntcp-segmentation-offload: {state}")) {
                bail!("{device} in {netns} does not let TCP segmentation be switched {state}");
            }
        }
        Ok(())
    }

    fn take_down(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.is_removed, true) {
            return Ok(());
        }
        self.servers.clear();
        // A process that is stopped does not hear that it should end.
        self.routers.iter().for_each(|router| drop(router.signal(Signal::CONT)));
        down::down(&self.plan.lab).map(drop)
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if let Err(error) = self.take_down() {
            output::complain(&format!("{error:#}"));
        }
    }
}

/// Makes Reno the congestion control that sockets of a namespace begin with. One that begins with BBR, as many systems have it,
/// goes on pacing by a timer also after `iperf3 -C cubic`, and then a timer is measured. Reno may be set in any namespace.
fn forget_pacing(netns: &str) -> Result<()> {
    let set = "echo reno > /proc/sys/net/ipv4/tcp_congestion_control";
    Run::inside(netns, "sh").args(["-c", set]).succeed().map(drop)
}

/// The MAC of the gateway by which a pod reaches an address; none if it reaches it directly.
fn next_hop(from: &End, to: Ipv4Addr) -> Result<Option<[u8; 6]>> {
    let said = Run::ip(&format!("-n {} route get {to}", from.netns)).succeed()?;
    let route = String::from_utf8_lossy(&said).into_owned();
    let Some(gateway) = word_after(&route, "via") else { return Ok(None) };
    let said = Run::ip(&format!("-n {} neigh show to {gateway} dev {IFNAME}", from.netns)).succeed()?;
    let neighbour = String::from_utf8_lossy(&said).into_owned();
    let mac = word_after(&neighbour, "lladdr").and_then(parse_mac);
    Ok(Some(mac.with_context(|| format!("{} does not know the MAC of its gateway {gateway}", from.netns))?))
}

fn word_after<'a>(text: &'a str, word: &str) -> Option<&'a str> {
    text.split_whitespace().skip_while(|next| *next != word).nth(1)
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Vec<u8> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect::<Option<_>>()?;
    bytes.try_into().ok()
}

/// What this machine lacks for a data path, and what to do about that.
pub fn missing(contender: &Contender) -> Option<String> {
    match contender.kind {
        Kind::Ovs(_) => ovs::missing(),
        Kind::Testpmd => testpmd::missing(),
        Kind::Weft(_) | Kind::Wrapped(_) | Kind::Masquerading | Kind::Kernel | Kind::Routes => None,
    }
}

/// The name of a data path's lab.
pub fn lab_name(name: &str, contender: &Contender) -> String {
    format!("{name}-{}", contender.id)
}

/// Removes what is left of a run that was killed.
pub fn remove_abandoned(lab: &str) -> Result<()> {
    if let Stored::Present(record) = Record::load(lab)?
        && record.is_abandoned()
    {
        output::progress(&format!("the lab {lab} was left by a run that was killed; it is removed first"));
        down::tear_down(&record)?;
    }
    Ok(())
}

/// The other node's own address.
fn outside(plan: &Plan) -> Ipv4Addr {
    match plan.underlay_address(2) {
        IpAddr::V4(address) => address,
        IpAddr::V6(_) => unreachable!("the underlay of a bed has IPv4 addresses"),
    }
}

/// How many nodes have a part in it.
fn nodes(layout: Layout) -> usize {
    match layout {
        Layout::Same | Layout::Out => 1,
        Layout::Two => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gateways_mac_is_read_as_ip_prints_it() {
        let route = "10.244.2.2 via 10.244.1.1 dev eth0 src 10.244.1.2 uid 0 \n    cache \n";
        assert_eq!(word_after(route, "via"), Some("10.244.1.1"));
        assert_eq!(word_after("10.244.1.3 dev eth0 src 10.244.1.2", "via"), None);
        let neighbour = "10.244.1.1 lladdr 02:0a:00:00:00:ff STALE";
        assert_eq!(word_after(neighbour, "lladdr").and_then(parse_mac), Some([2, 10, 0, 0, 0, 255]));
        for bad in ["", "02:00", "02:00:00:00:00:00:00", "02:00:00:00:00:zz"] {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }
}
