//! How long packets of pods may be, as the configuration and the underlay's device have it.

use std::net::IpAddr;

use super::check::{MAX_MTU, root};
use super::reader::{Place, Problem, Reader};
use super::{Draft, encapsulation};
use weft_router::tables::Mode;

use crate::control::host::{Host, Interface};

/// RFC 8200, section 5: "IPv6 requires that every link in the Internet have an MTU of 1280 octets or greater."
const MIN_MTU_V6: u32 = 1280;
/// RFC 791, page 25: "Every internet destination must be able to receive a datagram of 576 octets."
const MIN_MTU_V4: u32 = 576;
/// What a device is taken to carry before it is known: Ethernet's.
const USUAL_MTU: u32 = 1500;

/// The pods' MTU and the underlay's.
pub(super) fn check_mtu(
    reader: &mut Reader<'_>,
    draft: &Draft,
    (mode, underlay): (Option<Mode>, IpAddr),
    host: &Host,
    warnings: &mut Vec<Problem>,
) -> Option<(u32, u32)> {
    let overhead = encapsulation::most_overhead(draft, mode, underlay.is_ipv4());
    let network = draft.etcd.iter().flat_map(|etcd| &etcd.network);
    let all = draft.ranges.iter().chain(&draft.segment).chain(network);
    let least = if all.clone().any(|range| range.value.addr().is_ipv6()) { MIN_MTU_V6 } else { MIN_MTU_V4 };
    let device = check_device(reader, draft, underlay, host, warnings)?;
    let Some(mtu) = &draft.mtu else {
        // The address may be late; what its device has then is followed.
        let usual = Interface { name: "the underlay's device".into(), mtu: USUAL_MTU, ..Interface::default() };
        let device = device.unwrap_or(&usual);
        let mtu = device.mtu.saturating_sub(overhead).min(MAX_MTU);
        if (MIN_MTU_V4..MIN_MTU_V6).contains(&mtu) && least == MIN_MTU_V6 {
            warnings.push(in_fragments(root("mtu"), device, MIN_MTU_V6 + overhead));
            return Some((MIN_MTU_V6, device.mtu));
        }
        if mtu < least {
            let what = format!(
                "{} has an MTU of {}, which leaves {mtu} for pods after {overhead} bytes of encapsulation; \
                 they need {least}: raise the device's MTU",
                device.name, device.mtu
            );
            reader.problem(&root("mtu"), what);
        }
        return Some((mtu, device.mtu));
    };
    if !(least..=MAX_MTU).contains(&mtu.value) {
        reader.problem(&mtu.place, format!("{} is not from {least} to {MAX_MTU}", mtu.value));
    }
    let needed = mtu.value + overhead;
    if let Some(device) = device.filter(|device| device.mtu < needed && mtu.value == MIN_MTU_V6 && least == MIN_MTU_V6)
    {
        warnings.push(in_fragments(mtu.place.clone(), device, needed));
    } else if let Some(device) = device.filter(|device| device.mtu < needed) {
        let what = format!(
            "{} needs an underlay MTU of {needed}, but {} has {}: lower it to {} or remove the key",
            mtu.value,
            device.name,
            device.mtu,
            device.mtu.saturating_sub(overhead)
        );
        reader.problem(&mtu.place, what);
    }
    Some((mtu.value, device.map_or(needed, |device| device.mtu)))
}

/// What IPv6 demands of any path is more than the device carries (RFC 2473, section 7.1).
fn in_fragments(place: Place, device: &Interface, needed: u32) -> Problem {
    let what = format!(
        "pods have IPv6 and hence an MTU of {MIN_MTU_V6}, which takes {needed} bytes on the underlay, but {} has {}: longer packets go to \
         other nodes in fragments, which is slow and which firewalls may drop; raise the device's MTU",
        device.name, device.mtu
    );
    Problem { place, what }
}

/// The underlay's device, if this machine has it: a configuration may be checked elsewhere. `None` after a problem.
fn check_device<'h>(
    reader: &mut Reader<'_>,
    draft: &Draft,
    underlay: IpAddr,
    host: &'h Host,
    warnings: &mut Vec<Problem>,
) -> Option<Option<&'h Interface>> {
    let draft = draft.underlay.as_ref();
    let holder = host.holder_of(underlay);
    if let Some(address) = draft.and_then(|draft| draft.address.as_ref()).filter(|_| holder.is_none()) {
        let what = format!("{underlay} is not an address of this machine: other nodes cannot be reached before it is");
        warnings.push(Problem { place: address.place.clone(), what });
    }
    let Some(named) = draft.and_then(|draft| draft.device.as_ref()) else { return Some(holder) };
    match (host.named(&named.value), holder) {
        (Some(device), Some(holder)) if device.index != holder.index => {
            let what = format!("{underlay} is an address of {}, not of {}", holder.name, device.name);
            reader.problem(&named.place, what);
            None
        }
        (None, _) => {
            let what = format!("{:?} is not a device of this machine", named.value);
            warnings.push(Problem { place: named.place.clone(), what });
            Some(holder)
        }
        (device, _) => Some(device),
    }
}
