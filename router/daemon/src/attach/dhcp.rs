//! Attaching a pod that gets its address by DHCP: in two halves.
//!
//! The plugin `dhcp` asks for an address from inside the pod, by the interface, which therefore comes first. [`prepare`] makes it; its
//! port lets DHCP requests out and nothing else ([`Dhcp::Asking`]). Then the plugin asks, and [`complete`] leases what it was
//! given, durably, opens the port, and gives the pod its addresses. A second half that fails leaves what the first one made, so that
//! the plugin can give its address back by it; then comes a DEL. What never gets its second half goes with its
//! namespace, or by DEL or GC, like any attachment.
//!
//! This is for the bridged layout: only there a question to everybody reaches a server. Servers are pods whose network's configuration trusts them,
//! or are reached by the node itself.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use weft_api::{Attach, Attached, Failure, code};
use weft_router::tables::{Dhcp, Mode};

use super::namespace::Namespace;
use super::pod::Interface;
use super::{
    Attempt, attached, check_key, choose_mac, choose_mtu, device, facts, given, owner, parse_mac, parse_port, refusal,
    refuse_known, tombstone,
};
use crate::node::{Node, since_boot};

/// What pods can be trusted with.
const SERVER: &str = "dhcp";

/// What a request's words of trust mean.
///
/// # Errors
/// One of them is not known.
pub fn granted(trusted: &[String]) -> Result<Dhcp, Failure> {
    match trusted.iter().find(|word| *word != SERVER) {
        Some(word) => Err(Failure::new(code::CONFIG, format!("a pod cannot be trusted with {word:?}"))
            .with_details(format!("trusted may list {SERVER:?}"))),
        None if trusted.is_empty() => Ok(Dhcp::Client),
        None => Ok(Dhcp::Server),
    }
}

/// The same as words.
pub fn told(dhcp: Dhcp) -> Vec<String> {
    if dhcp == Dhcp::Server { vec![SERVER.to_owned()] } else { Vec::new() }
}

/// Makes the interface, without addresses.
///
/// # Errors
/// Those of an ADD; and the nodes do not share one segment.
pub fn prepare(node: &Node, request: &Attach, fd: Option<OwnedFd>) -> Result<Attached, Failure> {
    check_key(&request.key)?;
    granted(&request.trusted)?;
    let mac = request.mac.as_deref().map(parse_mac).transpose()?;
    let kind = request.port.as_deref().map(parse_port).transpose()?;
    let namespace = Namespace::check(fd, &request.netns)?;
    tombstone::honour_all(node);
    let _turn = node.turns.take(&request.key);
    refuse_known(node, &request.key)?;
    if node.store.get(&owner(&request.key)).is_some() {
        let msg = format!("container {} has addresses for {} already", request.key.container, request.key.ifname);
        return Err(Failure::new(code::EXISTS, msg).with_details("DEL comes before another ADD"));
    }
    let config = Arc::clone(&node.state().desired.config);
    if config.mode != Mode::Bridged {
        let msg = "addresses come by DHCP in the bridged layout only: here a pod's questions reach nobody";
        return Err(Failure::new(code::CONFIG, msg).with_details("use another ipam.type, or mode = \"bridged\""));
    }
    let mut interface = Interface {
        name: request.key.ifname.clone(),
        mac: choose_mac(node, &config, mac)?,
        mtu: choose_mtu(&config, request.mtu)?,
        addresses: Vec::new(),
        routes: Vec::new(),
        bandwidth: request.bandwidth.unwrap_or_default(),
        dhcp: Dhcp::Asking,
    };
    let mut attempt = Attempt::new(node, &request.key);
    attempt.open(kind, &namespace, &request.netns, &mut interface)?;
    attempt.finish();
    Ok(attached(&interface))
}

/// Leases the addresses that came, opens the port, and gives them to the pod.
///
/// # Errors
/// They cannot work, or are somebody else's; or the interface is gone, as after a restart of weftd.
pub fn complete(node: &Node, request: &Attach, fd: Option<OwnedFd>) -> Result<Attached, Failure> {
    check_key(&request.key)?;
    let namespace = Namespace::check(fd, &request.netns)?;
    let _turn = node.turns.take(&request.key);
    let config = Arc::clone(&node.state().desired.config);
    let prepared = node.state().attachments.get(&request.key).map(|attachment| attachment.interface.clone());
    let prepared = prepared.filter(|interface| interface.dhcp == Dhcp::Asking).ok_or_else(|| {
        Failure::new(
            code::TRY_AGAIN,
            "the interface that waited for its address is gone: weftd was restarted, or it was deleted",
        )
        .with_details("try again")
    })?;
    let given = given::addresses(request)?;
    if given.is_empty() {
        return Err(Failure::new(code::CONFIG, "the IPAM plugin gave no address"));
    }
    let sets = given::sets(&config, &given)?;
    let requested: Vec<_> = given.iter().map(|(net, _)| net.addr()).collect();
    let mut interface = Interface { addresses: given, dhcp: granted(&request.trusted)?, ..prepared.clone() };
    interface.routes = given::routes(request.routes.as_deref(), &interface)?;
    let facts = facts(node, request, interface.mac, node.census.describe(&namespace));
    let leased = node.store.lease(&owner(&request.key), &sets, &requested, facts, since_boot());
    leased.map_err(|error| refusal(&error))?;
    match open(node, request, &namespace, &mut interface) {
        Ok(()) => {
            tracing::info!(
                network = request.key.network, container = request.key.container, ifname = request.key.ifname,
                mac = %interface.mac, addresses = ?requested, "attached, by DHCP"
            );
            Ok(attached(&interface))
        }
        Err(failure) => {
            node.change(&request.key, &prepared);
            node.store.release(&owner(&request.key), since_boot());
            Err(failure)
        }
    }
}

/// First the port, then the pod, which announces itself as soon as it has its addresses.
fn open(node: &Node, request: &Attach, namespace: &Namespace, interface: &mut Interface) -> Result<(), Failure> {
    if !node.change(&request.key, interface) {
        return Err(Failure::new(code::NETNS, "the pod's network namespace went away"));
    }
    device::complete(namespace, interface)?;
    if let Some(attachment) = node.state().attachments.get_mut(&request.key) {
        attachment.interface.routes.clone_from(&interface.routes);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_trusted_with_what_is_known_and_nothing_else() {
        let words = |words: &[&str]| granted(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
        assert_eq!(
            (words(&[]), words(&["dhcp"]), words(&["dhcp", "dhcp"])),
            (Ok(Dhcp::Client), Ok(Dhcp::Server), Ok(Dhcp::Server))
        );
        for bad in [&["all"][..], &["dhcp", "ra"], &[""]] {
            assert_eq!(words(bad).unwrap_err().code, code::CONFIG, "{bad:?}");
        }
        assert_eq!(told(Dhcp::Server), ["dhcp"]);
        assert_eq!((told(Dhcp::Client), told(Dhcp::Asking)), (Vec::new(), Vec::new()));
    }
}
