//! Namespaces and the underlay, made with iproute2.
//!
//! The underlay is a bridge in a namespace of its own with one veth to each node, so nothing is ever made in, or
//! moved through, the machine's own namespace.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::command::Run;
use super::plan::{self, Plan, UPLINK};

const BRIDGE: &str = "br0";

/// The file that stands for a namespace.
pub fn path(netns: &str) -> PathBuf {
    Path::new("/run/netns").join(netns)
}

/// An error if one of the plan's namespaces exists: it is not ours.
pub fn check_free(plan: &Plan) -> Result<()> {
    if let Some(taken) = plan.all_netns().iter().find(|netns| path(netns).exists()) {
        bail!(
            "the network namespace {taken} exists already, and no lab's record mentions it; \
             remove it with `ip netns del {taken}` or choose another --name"
        );
    }
    Ok(())
}

/// Makes all namespaces of the plan, each with its loopback up.
pub fn make_namespaces(plan: &Plan) -> Result<()> {
    let run = |args: String| Run::ip(&args).building(&plan.lab).succeed();
    for netns in plan.all_netns() {
        run(format!("netns add {netns}"))?;
        run(format!("-n {netns} link set lo up"))?;
    }
    Ok(())
}

/// Makes the network between the nodes.
pub fn make_underlay(plan: &Plan) -> Result<()> {
    let (underlay, mtu, len) = (plan.underlay_netns(), plan.mtu, plan.family.prefix_len());
    let run = |args: String| Run::ip(&args).building(&plan.lab).succeed();
    run(format!("-n {underlay} link add {BRIDGE} mtu {mtu} type bridge"))?;
    run(format!("-n {underlay} link set {BRIDGE} up"))?;
    for node in plan.node_numbers() {
        let (netns, port, address) = (plan.node_netns(node), plan::node_name(node), plan.underlay_address(node));
        run(format!("-n {netns} link add {UPLINK} mtu {mtu} type veth peer name {port} mtu {mtu} netns {underlay}"))?;
        run(format!("-n {underlay} link set {port} master {BRIDGE} up"))?;
        run(format!("-n {netns} address add {address}/{len} dev {UPLINK}{}", without_detection(address)))?;
        run(format!("-n {netns} link set {UPLINK} up"))?;
        set_forwarding(&netns, &plan.lab)?;
    }
    Ok(())
}

/// Gives the underlay's bridge an address of its own, for a service in the underlay's namespace.
pub fn give_bridge_address(plan: &Plan, address: IpAddr) -> Result<()> {
    let (underlay, len) = (plan.underlay_netns(), plan.family.prefix_len());
    let detection = without_detection(address);
    let line = format!("-n {underlay} address add {address}/{len} dev {BRIDGE}{detection}");
    Run::ip(&line).building(&plan.lab).succeed().map(drop)
}

/// An IPv6 address can be used at once only if nobody looks whether somebody has it already.
fn without_detection(address: IpAddr) -> &'static str {
    if address.is_ipv6() { " nodad" } else { "" }
}

/// Has a node's kernel route, as that of a node of a cluster does.
fn set_forwarding(netns: &str, lab: &str) -> Result<()> {
    let settings = ["/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"];
    Run::inside(netns, "tee").args(settings).input("1\n").building(lab).succeed().map(drop)
}

/// Removes a namespace with everything in it. One that is not there is fine.
pub fn remove_namespace(netns: &str) -> Result<()> {
    if path(netns).exists() {
        Run::ip(&format!("netns del {netns}")).uninterrupted().succeed()?;
    }
    Ok(())
}
