//! Inside the pod's network namespace: making the interface what it shall be, and comparing it later.
//!
//! Everything here runs on the thread that [`super::namespace::Namespace::enter`] made.

use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use rustix::io::Errno;
use weft_api::Bandwidth;
use weft_encap::mac::Mac;
use weft_router::tables::Dhcp;

use crate::netlink::{Link, LinkChange, Netlink, Route};
use crate::sysctl;

/// Frames that the pod's transmit queue holds. It gives TCP no backpressure, so it bounds memory, not delay.
pub const QUEUE: u32 = 1000;
/// How long a pod with a limit may have what it sends wait, and the part of that which one superframe takes.
const QUEUE_TIME: f64 = 0.1;
const FRAME_TIME: f64 = 0.005;
/// Frames that its queue holds at least: a burst of small ones.
const LEAST_QUEUE: f64 = 100.0;
/// Bytes of the largest datagram that the kernel segments in hardware's stead (`UDP_SEGMENT`).
const UNDERLAY_DATAGRAM: u32 = 65_493;
/// What a segment has on top of the pod's MTU inside a datagram: inner Ethernet and VXLAN.
const SEGMENT_OVERHEAD: u32 = 14 + 8;

/// A pod's interface as it shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its MAC.
    pub mac: Mac,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its addresses, each with its on-link prefix and its gateway, which is the unspecified address if there is none.
    pub addresses: Vec<(IpNet, IpAddr)>,
    /// The routes through it: those wanted, and after [`set_up`] those made.
    pub routes: Vec<Route>,
    /// What the pod may send and receive by it.
    pub bandwidth: Bandwidth,
    /// What the pod may say of DHCP.
    pub dhcp: Dhcp,
}

/// Why the interface could not be made.
#[derive(Debug)]
pub enum SetUpError {
    /// The name is taken in the pod.
    Exists,
    /// A step failed.
    Step(String, io::Error),
}

impl Interface {
    /// The gateway of the first address of a family that has one.
    pub fn gateway(&self, v4: bool) -> Option<IpAddr> {
        let has_one = |(net, gateway): &&(IpNet, IpAddr)| net.addr().is_ipv4() == v4 && !gateway.is_unspecified();
        self.addresses.iter().find(has_one).map(|(_, gateway)| *gateway)
    }

    /// A route by `gateway`, which need not be in any prefix of this interface.
    pub fn route(&self, destination: IpNet, gateway: Option<IpAddr>) -> Route {
        let is_outside = |gateway| !self.addresses.iter().any(|(net, _)| net.contains(&gateway));
        Route { gateway, on_link: gateway.is_some_and(is_outside), ..Route::new(destination) }
    }

    /// A default route for each family that has a gateway.
    pub fn default_routes(&self) -> Vec<Route> {
        let everywhere = |gateway: IpAddr| IpNet::new_assert(unspecified_like(gateway), 0);
        let route = |gateway| self.route(everywhere(gateway), Some(gateway));
        [true, false].into_iter().filter_map(|v4| self.gateway(v4)).map(route).collect()
    }

    fn has_ipv6(&self) -> bool {
        self.addresses.iter().any(|(net, _)| net.addr().is_ipv6())
    }
}

/// Segments that a superframe of the pod may stand for, so that it leaves the node as one datagram.
pub fn gso_max_segments(mtu: u32) -> u32 {
    (UNDERLAY_DATAGRAM / (mtu + SEGMENT_OVERHEAD)).clamp(1, 64)
}

/// The same, and the length of its transmit queue in frames, for a pod that may send so many bits per second; 0 is no limit. What is over the limit waits
/// there: it is to fit about as many bytes as the limit lets through in [`QUEUE_TIME`], in frames that are no burst of their own.
fn queue(mtu: u32, rate: u64) -> (u32, u32) {
    let most = gso_max_segments(mtu);
    if rate == 0 {
        return (most, QUEUE);
    }
    let packets_per_second = rate as f64 / 8.0 / f64::from(mtu);
    let segments = (packets_per_second * FRAME_TIME).clamp(1.0, most.into()).floor();
    let frames = (packets_per_second * QUEUE_TIME / segments).clamp(LEAST_QUEUE, QUEUE.into());
    (segments as u32, frames as u32)
}

/// A device in the pod that is to become its interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Raw<'a> {
    /// What it is called so far.
    pub name: &'a str,
    /// Whether it was made with everything that [`Interface::change`] names.
    pub is_complete: bool,
}

impl Interface {
    /// What a device has to be before it can be the interface.
    pub fn change(&self) -> LinkChange<'_> {
        let (segments, frames) = queue(self.mtu, self.bandwidth.egress_rate);
        LinkChange {
            name: Some(&self.name),
            mac: Some(self.mac),
            mtu: Some(self.mtu),
            queue: Some(frames),
            gso_max_segments: Some(segments),
            ..LinkChange::default()
        }
    }
}

/// The number of the calling thread's interface of that name, if there is one. Waits for nobody.
pub fn index_of(name: &str) -> io::Result<Option<u32>> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    match rustix::net::netdevice::name_to_index(&socket, name) {
        Err(Errno::NODEV) => Ok(None),
        found => Ok(Some(found?)),
    }
}

/// Turns the device `raw`, which is here and down, into `interface`. Returns the routes that it made: where
/// another interface of the pod has a default route of a family already, that one stays.
pub fn set_up(raw: Raw<'_>, interface: &Interface) -> Result<Vec<Route>, SetUpError> {
    let mut netlink = Netlink::open().map_err(step("open a netlink socket"))?;
    let index = index_of(raw.name).map_err(step("find the new device"))?;
    let index = index.ok_or_else(|| step("find the new device")(Errno::NODEV.into()))?;
    let all = interface.change();
    let change = if raw.is_complete {
        LinkChange::default()
    } else {
        // A name that is changed, even into itself, costs a grace period.
        LinkChange { name: all.name.filter(|name| *name != raw.name), ..all }
    };
    netlink.change_new_link(index, change).map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::EXIST) => SetUpError::Exists,
        _ => SetUpError::Step("set name, MAC and MTU".into(), error),
    })?;
    address(&mut netlink, index, interface)
}

/// Gives `interface`, which was made without addresses, those that it has by now, and its routes. It is down for a moment, so that the
/// kernel announces them as it comes up. Returns the routes like [`set_up`].
pub fn complete(interface: &Interface) -> Result<Vec<Route>, SetUpError> {
    let mut netlink = Netlink::open().map_err(step("open a netlink socket"))?;
    let device = netlink.link(&interface.name).map_err(step("find the interface"))?;
    let index = device.ok_or_else(|| step("find the interface")(Errno::NODEV.into()))?.index;
    let down = LinkChange { down: true, ..LinkChange::default() };
    netlink.change_link(index, down).map_err(step("set the interface down"))?;
    address(&mut netlink, index, interface)
}

/// Addresses, up, routes.
fn address(netlink: &mut Netlink, index: u32, interface: &Interface) -> Result<Vec<Route>, SetUpError> {
    set_ipv6(&interface.name, interface.has_ipv6()).map_err(step("set the interface's IPv6 behaviour"))?;
    announce_when_up(&interface.name);
    let up = LinkChange { up: true, ..LinkChange::default() };
    if let Some(lo) = netlink.link("lo").map_err(step("find lo"))?
        && !lo.up
    {
        netlink.change_link(lo.index, up).map_err(step("set lo up"))?;
    }
    for (address, _) in &interface.addresses {
        netlink.add_address(index, *address).map_err(step(&format!("add the address {address}")))?;
    }
    netlink.change_link(index, up).map_err(step("set the interface up"))?;
    let there = netlink.routes().map_err(step("list the routes"))?;
    let is_there = |route: &Route| {
        let everywhere = route.destination.prefix_len() == 0;
        let same = |other: &Route| (other.destination, other.table) == (route.destination, route.table);
        everywhere && route.priority.is_none() && there.iter().any(|(_, other)| same(other))
    };
    let mut made = Vec::new();
    for route in interface.routes.iter().filter(|route| !is_there(route)) {
        match netlink.add_route(index, route) {
            // Whoever came first has it; so do the reference plugins.
            Err(error) if Errno::from_io_error(&error) == Some(Errno::EXIST) => {}
            Err(error) => return Err(SetUpError::Step(format!("add the route {}", shown(route)), error)),
            Ok(()) => made.push(*route),
        }
    }
    Ok(made)
}

fn step(what: &str) -> impl FnOnce(io::Error) -> SetUpError + use<> {
    let what = what.to_owned();
    move |error| SetUpError::Step(what, error)
}

/// The unspecified address of the same family.
pub fn unspecified_like(address: IpAddr) -> IpAddr {
    if address.is_ipv4() { std::net::Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() }
}

/// A route as people write it.
pub fn shown(route: &Route) -> String {
    let by = route.gateway.map_or_else(String::new, |gateway| format!(" by {gateway}"));
    format!("to {}{by}", route.destination)
}

/// No router advertisement shall change what was set, and the link-local address is usable at once like the others.
pub fn set_ipv6(ifname: &str, has_ipv6: bool) -> io::Result<()> {
    let folder = format!("ipv6/conf/{ifname}");
    if !has_ipv6 && !sysctl::exists(&folder) {
        return Ok(());
    }
    let mut wanted = vec![("accept_ra", "0"), ("accept_dad", "0")];
    if has_ipv6 {
        wanted.push(("disable_ipv6", "0"));
    }
    wanted.into_iter().try_for_each(|(name, value)| sysctl::set(&format!("{folder}/{name}"), value))
}

/// Has the pod's kernel announce its addresses as it comes up (gratuitous ARP, unsolicited advertisement): whoever knew one of
/// them at another MAC or behind another node would send there until its entry expires. The announcement waits in the device until
/// the port is open. Where `/proc/sys` is read-only the pod is found as soon as it speaks.
pub fn announce_when_up(ifname: &str) {
    for (family, name) in [("ipv4", "arp_notify"), ("ipv6", "ndisc_notify")] {
        let _ = sysctl::set(&format!("{family}/conf/{ifname}/{name}"), "1");
    }
}

/// What is there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// The interface; `None` if there is none of that name.
    pub link: Option<Link>,
    /// Its addresses.
    pub addresses: Vec<IpNet>,
    /// Routes through it, of all tables.
    pub routes: Vec<Route>,
}

/// Looks at the interface `name`.
pub fn observe(name: &str) -> io::Result<Observed> {
    let mut netlink = Netlink::open()?;
    let Some(link) = netlink.link(name)? else { return Ok(Observed::default()) };
    let here = |at: u32| at == link.index;
    let addresses = netlink.addresses()?.into_iter().filter(|(at, _)| here(*at)).map(|(_, net)| net).collect();
    let routes = netlink.routes()?.into_iter().filter(|(at, _)| here(*at)).map(|(_, route)| route).collect();
    Ok(Observed { link: Some(link), addresses, routes })
}

impl Observed {
    /// What is missing or different, one item each. A plugin behind us in the chain may have lowered the MTU, and moved routes to
    /// other tables.
    pub fn differences(&self, wanted: &Interface) -> Vec<String> {
        let Some(link) = &self.link else { return vec![format!("there is no interface {}", wanted.name)] };
        let mut all = Vec::new();
        if link.mac != Some(wanted.mac) {
            let has = link.mac.map_or("none".to_owned(), |mac| mac.to_string());
            all.push(format!("{}'s MAC is {has}, not {}", wanted.name, wanted.mac));
        }
        if link.mtu > wanted.mtu {
            all.push(format!("{}'s MTU is {}, more than {}", wanted.name, link.mtu, wanted.mtu));
        }
        if !link.up {
            all.push(format!("{} is down", wanted.name));
        }
        for (address, _) in wanted.addresses.iter().filter(|(address, _)| !self.addresses.contains(address)) {
            all.push(format!("{} has no address {address}", wanted.name));
        }
        for route in wanted.routes.iter().filter(|route| !self.has_route(route.destination, route.gateway)) {
            all.push(format!("there is no route {} through {}", shown(route), wanted.name));
        }
        all
    }

    /// Whether a route there leads through the interface, by this gateway if one is named.
    pub fn has_route(&self, destination: IpNet, gateway: Option<IpAddr>) -> bool {
        let same = |route: &&Route| route.destination == destination && (gateway.is_none() || route.gateway == gateway);
        self.routes.iter().any(|route| same(&route))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted() -> Interface {
        let address = |net: &str, gateway: &str| (net.parse().unwrap(), gateway.parse().unwrap());
        Interface {
            name: "eth0".into(),
            mac: "0a:00:00:00:00:01".parse().unwrap(),
            mtu: 1450,
            addresses: vec![
                address("10.244.1.2/24", "10.244.1.1"),
                address("fd00::2/64", "fd00::1"),
                address("10.9.0.2/24", "10.9.0.1"),
            ],
            routes: Vec::new(),
            bandwidth: Bandwidth::default(),
            dhcp: Dhcp::default(),
        }
    }

    #[test]
    fn a_superframe_of_the_pod_fits_one_datagram() {
        assert_eq!((gso_max_segments(1450), gso_max_segments(8950), gso_max_segments(576)), (44, 7, 64));
        assert_eq!(gso_max_segments(65_535), 1);
    }

    #[test]
    fn what_a_limit_keeps_back_waits_for_a_tenth_of_a_second_in_frames_that_are_no_burst() {
        let limits = [0, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000, 100_000_000_000];
        let queues = limits.map(|rate| queue(1450, rate));
        assert_eq!(queues, [(44, 1000), (1, 100), (4, 100), (43, 100), (44, 195), (44, 1000)]);
    }

    #[test]
    fn each_family_has_one_default_route() {
        let text = |interface: &Interface| -> Vec<String> {
            interface.default_routes().iter().map(|route| format!("{} {}", shown(route), route.on_link)).collect()
        };
        assert_eq!(text(&wanted()), ["to 0.0.0.0/0 by 10.244.1.1 false", "to ::/0 by fd00::1 false"]);
        let mut outside = wanted();
        outside.addresses[0].1 = "10.244.7.1".parse().unwrap();
        outside.addresses[1].1 = "::".parse().unwrap();
        assert_eq!(text(&outside), ["to 0.0.0.0/0 by 10.244.7.1 true"]);
    }

    #[test]
    fn every_difference_is_named() {
        let mut wanted = wanted();
        wanted.routes = wanted.default_routes();
        assert_eq!(Observed::default().differences(&wanted), ["there is no interface eth0"]);
        let link = Link { name: "eth0".into(), mac: Some(Mac::ZERO), mtu: 1500, ..Link::default() };
        let observed = Observed { link: Some(link), addresses: vec![wanted.addresses[1].0], routes: vec![] };
        assert_eq!(
            observed.differences(&wanted),
            [
                "eth0's MAC is 00:00:00:00:00:00, not 0a:00:00:00:00:01",
                "eth0's MTU is 1500, more than 1450",
                "eth0 is down",
                "eth0 has no address 10.244.1.2/24",
                "eth0 has no address 10.9.0.2/24",
                "there is no route to 0.0.0.0/0 by 10.244.1.1 through eth0",
                "there is no route to ::/0 by fd00::1 through eth0",
            ]
        );
        let link = Link { mac: Some(wanted.mac), mtu: 1400, up: true, ..observed.link.unwrap() };
        let all = wanted.addresses.iter().map(|(net, _)| *net).collect();
        let elsewhere = |route: &Route| Route { table: 100, ..*route };
        let routes = wanted.routes.iter().map(elsewhere).collect();
        let observed = Observed { link: Some(link), addresses: all, routes };
        assert_eq!(observed.differences(&wanted), Vec::<String>::new());
    }
}
