//! Namespaces and the underlay, made with iproute2.
//!
//! The underlay is a bridge in a namespace of its own with one veth to each node, so nothing is ever made in, or
//! moved through, the machine's own namespace.

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
    for netns in plan.all_netns() {
        Run::ip(&format!("netns add {netns}")).succeed()?;
        Run::ip(&format!("-n {netns} link set lo up")).succeed()?;
    }
    Ok(())
}

/// Makes the network between the nodes.
pub fn make_underlay(plan: &Plan) -> Result<()> {
    let (underlay, mtu) = (plan.underlay_netns(), plan.mtu);
    Run::ip(&format!("-n {underlay} link add {BRIDGE} mtu {mtu} type bridge")).succeed()?;
    Run::ip(&format!("-n {underlay} link set {BRIDGE} up")).succeed()?;
    for node in plan.node_numbers() {
        let (netns, port, address) = (plan.node_netns(node), plan::node_name(node), plan::underlay_address(node));
        Run::ip(&format!(
            "-n {netns} link add {UPLINK} mtu {mtu} type veth peer name {port} mtu {mtu} netns {underlay}"
        ))
        .succeed()?;
        Run::ip(&format!("-n {underlay} link set {port} master {BRIDGE} up")).succeed()?;
        Run::ip(&format!("-n {netns} address add {address}/24 dev {UPLINK}")).succeed()?;
        Run::ip(&format!("-n {netns} link set {UPLINK} up")).succeed()?;
    }
    Ok(())
}

/// Removes a namespace with everything in it. One that is not there is fine.
pub fn remove_namespace(netns: &str) -> Result<()> {
    if path(netns).exists() {
        Run::ip(&format!("netns del {netns}")).uninterrupted().succeed()?;
    }
    Ok(())
}
