//! What leaves the cluster in the node's name, and what comes back: see [`crate::snat`].
//!
//! A packet of a pod leaves as one of the node's addresses if no route of the pod network covers its destination, if that is none of the
//! node's own addresses and not among what is kept for the kernel (services, and what the configuration says), and if the kernel's own
//! table leads there by an uplink. It leaves by that uplink; while nobody knows the next hop's MAC, the translated packet is handed to the
//! kernel, which looks for it. A pod's own address never goes out by an uplink.
//!
//! What comes back is led to the host port by a program on the uplink, with a MAC that says so
//! ([`came_by`]). What belongs to no session goes back by the host port as it came, and on to the kernel. What is longer than the pod's
//! MTU, which the tunnel makes narrower than the uplink's, goes to the kernel in the pod's name if it may be fragmented, or was: it comes
//! back in pieces.
//!
//! A datagram to the outer port of another pod of this node does not leave: it turns round here, and its source is translated as if it
//! had left (RFC 4787, REQ-9). Only UDP has such ports: one of TCP's is somebody else's for each destination.

use weft_encap::{icmp, ip};

use super::asking::Asking;
use super::hop::{Way, port_mtu};
use super::{AddressedTo, Forwarder, returning};
use crate::drop_reason::DropReason;
use crate::flow::FlowKey;
use crate::frame::Frame;
use crate::packet::{Fragment, Ip, Packet};
use crate::path::{
    Commit, Entrance, FlowCommit, Hop, Macs, MasqueradeCommit, Path, Rewrite, Sender, Side, Translation,
};
use crate::route;
use crate::tables::{Gateway, GroupId, Masquerade, Tables, WayOut, came_by};
use crate::time::Instant;

/// The uplink that the host port's frame came by, if it came by one.
pub(super) fn came_back<'a>(packet: &Packet, tables: &'a Tables) -> Option<&'a WayOut> {
    let port = came_by(packet.dst)?;
    let host = tables.host.filter(|host| packet.sender == Sender::Port(host.port))?;
    let masquerade = tables.masquerade.as_deref()?;
    masquerade.way(port).filter(|way| way.port != host.port)
}

/// As whom the router speaks to the sender of such a frame: as whom that one spoke to.
pub(super) fn speaker(packet: &Packet, tables: &Tables) -> Gateway {
    let gateway = tables.gateway;
    match (came_back(packet, tables), packet.ip().map(|ip| ip.dst)) {
        (Some(_), Some(std::net::IpAddr::V4(own))) => Gateway { ipv4: Some(own), ..gateway },
        (Some(_), Some(std::net::IpAddr::V6(own))) => Gateway { ipv6: Some(own), ..gateway },
        _ => gateway,
    }
}

impl Forwarder {
    /// The way of a packet that leaves in the node's name, or turns round at the point of leaving; none if it does not.
    pub(super) fn leaving(
        &self,
        to: &AddressedTo,
        asking: &Asking<'_>,
    ) -> Result<Option<(Way, MasqueradeCommit)>, DropReason> {
        let Asking { packet, tables, now, .. } = *asking;
        let (Some(masquerade), Some(host), AddressedTo::Router, Some(ip)) =
            (tables.masquerade.as_deref(), tables.host, to, packet.ip())
        else {
            return Ok(None);
        };
        let from_pod = matches!(packet.sender, Sender::Port(port) if port != host.port);
        if !from_pod || route::find(ip.dst, &tables.routes4, &tables.routes6) != Err(DropReason::NoRoute) {
            return Ok(None);
        }
        let leads = |group: &GroupId| *group != GroupId::NOT_OUTSIDE && masquerade.covers(ip.dst);
        let Some(group) = tables.outside(ip.dst).filter(leads) else {
            return self.turning(ip, masquerade, tables, now);
        };
        let group = tables.group(group);
        let next = group.choose(asking.hash());
        let (known, commit) = match self.session_of(ip, masquerade, now)? {
            (Some(known), _) => (Some(known), MasqueradeCommit::None),
            (None, inside) => {
                let outside = masquerade.source(ip.dst, next.map(|next| next.port)).ok_or(DropReason::NoSource)?;
                (None, MasqueradeCommit::Open { inside, outside, turns: false })
            }
        };
        // A session keeps its address, and the uplink that has it as long as that leads there.
        let has = |port| {
            masquerade
                .way(port)
                .is_some_and(|way| way.addresses.iter().any(|net| Some(net.addr()) == known.map(|known| known.address)))
        };
        let next = group.all().iter().find(|next| known.is_some() && has(next.port)).or(next);
        let (hop, rewrite) = match next {
            Some(next) => (Hop::Port(next.port), Rewrite::routed(next.macs, next.mtu)),
            None => {
                let Path { hop, rewrite, .. } = returning::to_host(host, tables);
                (hop, rewrite)
            }
        };
        Ok(Some(((hop, Rewrite { translation: known, ..rewrite }, None), commit)))
    }

    /// The way of a packet to the outer port of another pod of this node; none if it is to none, and hence the kernel's.
    fn turning(
        &self,
        ip: &Ip,
        masquerade: &Masquerade,
        tables: &Tables,
        now: Instant,
    ) -> Result<Option<(Way, MasqueradeCommit)>, DropReason> {
        if !masquerade.is_own(ip.dst) {
            return Ok(None);
        }
        let later = ip.fragment == Some(Fragment::Later);
        // What names no ports belongs to what did.
        let known = match &ip.quote {
            _ if later => self.pieces.find(ip, now).filter(|known| known.side == Side::Source),
            Some(quote) if ip.is_icmp_error() && quote.ports.is_some() => {
                self.snat.leaving(&FlowKey::of_quote(quote).reversed())
            }
            _ => None,
        };
        let (pod, commit) = match (known, FlowKey::of_named(ip)) {
            (Some(known), _) => {
                let turned = self.snat.turned(known.handle).ok_or(DropReason::Uninvited)?;
                (turned.address, MasqueradeCommit::Turn)
            }
            (None, Some(inside)) if ip.protocol == ip::UDP && !later => {
                let Some(pod) = self.snat.owner(ip::UDP, inside.dst(), inside.ports().1) else { return Ok(None) };
                let outside = masquerade.source(ip.dst, None).ok_or(DropReason::NoSource)?;
                (pod, MasqueradeCommit::Open { inside, outside, turns: true })
            }
            _ => return Ok(None),
        };
        let Some(pod) = tables.neighbours.get(&pod) else { return Ok(None) };
        let rewrite = Rewrite::routed(Macs { dst: pod.mac, src: tables.gateway.mac }, port_mtu(pod.port, tables));
        Ok(Some(((Hop::Port(pod.port), Rewrite { translation: known, ..rewrite }, None), commit)))
    }

    /// The session that a pod's packet belongs to, or the flow for which one is to be opened.
    fn session_of(
        &self,
        ip: &Ip,
        masquerade: &Masquerade,
        now: Instant,
    ) -> Result<(Option<Translation>, FlowKey), DropReason> {
        if ip.fragment == Some(Fragment::Later) {
            let known = self.pieces.find(ip, now).filter(|known| known.side == Side::Source);
            return known.map(|known| (Some(known), FlowKey::of(ip))).ok_or(DropReason::UnknownPiece);
        }
        if ip.is_icmp_error() {
            // It quotes what came in.
            let quote = ip.quote.as_ref().filter(|quote| quote.ports.is_some()).ok_or(DropReason::NotMasqueraded)?;
            let inside = FlowKey::of_quote(quote).reversed();
            let known = self.snat.leaving(&inside).ok_or(DropReason::NotMasqueraded)?;
            return Ok((Some(known), inside));
        }
        let inside = FlowKey::of_named(ip).ok_or(DropReason::NotMasqueraded)?;
        let known = self.snat.leaving(&inside).filter(|known| masquerade.is_own(known.address));
        let answers = ip.icmp.is_some_and(|(kind, _)| kind == icmp::v4::ECHO_REPLY || kind == icmp::v6::ECHO_REPLY);
        if known.is_none() && answers { Err(DropReason::NotMasqueraded) } else { Ok((known, inside)) }
    }

    /// The way of a packet that came back by an uplink.
    pub(super) fn coming_back(&self, packet: &Packet, tables: &Tables, now: Instant) -> (Path, Option<Translation>) {
        let to_kernel = (Path::unchanged(packet_port(packet)), None);
        let Some(known) = packet.ip().and_then(|ip| self.session_from(ip, now)) else { return to_kernel };
        // A pod that has gone: the kernel says so.
        let Some(pod) = tables.neighbours.get(&known.address) else { return to_kernel };
        let macs = Macs { dst: pod.mac, src: tables.gateway.mac };
        let mtu = port_mtu(pod.port, tables);
        let too_long = |ip: &Ip| ip.src.is_ipv4() && (ip.fragment.is_some() || (!ip.dont_fragment && ip.size > mtu));
        if let Some(host) = tables.host.filter(|_| packet.ip().is_some_and(too_long)) {
            // The kernel cuts it, on a way round by the host port; all pieces of a datagram, for it may want to see all of them.
            let Path { hop, rewrite, .. } = returning::to_host(host, tables);
            let rewrite = Rewrite { mtu: u32::MAX, translation: Some(known), ..rewrite };
            return (Path { hop, rewrite, entropy: 0 }, None);
        }
        let rewrite = Rewrite { translation: Some(known), ..Rewrite::routed(macs, mtu) };
        (Path { hop: Hop::Port(pod.port), rewrite, entropy: 0 }, Some(known))
    }

    fn session_from(&self, ip: &Ip, now: Instant) -> Option<Translation> {
        if ip.fragment == Some(Fragment::Later) {
            return self.pieces.find(ip, now).filter(|known| known.side == Side::Destination);
        }
        if ip.is_icmp_error() {
            // It quotes what left, and is addressed to whom it left as.
            let quote = ip.quote.as_ref().filter(|quote| quote.ports.is_some() && quote.src == ip.dst)?;
            return self.snat.entering(&FlowKey::of_quote(quote));
        }
        let asks = ip.icmp.is_some_and(|(kind, _)| kind == icmp::v4::ECHO_REQUEST || kind == icmp::v6::ECHO_REQUEST);
        let key = FlowKey::of_named(ip).filter(|_| !asks)?;
        self.snat.entering(&key.reversed())
    }

    /// What [`Forwarder::decide`] says of a packet that came back.
    pub(super) fn back_to_pod(&self, asking: &Asking<'_>) -> (Path, Commit) {
        let (path, known) = self.coming_back(asking.packet, asking.tables, asking.now);
        let whole = asking.packet.ip().filter(|ip| ip.ports.is_some());
        match (known, whole) {
            (Some(_), Some(_)) => {
                let flow = asking.opens(path, None, Entrance::Unknown);
                (path, Commit { flow, ..Commit::default() })
            }
            (None, Some(ip)) if path.rewrite.translation.is_none() => {
                let masquerade = MasqueradeCommit::Stranger(FlowKey::of(ip).reversed());
                (path, Commit { masquerade, ..Commit::default() })
            }
            _ => (path, Commit::default()),
        }
    }

    /// Opens the session that a decision asks for, tells those that a packet belongs to, and says how it is translated: in the path, and what
    /// becomes of the destination of one that turns round.
    pub(super) fn in_session(
        &mut self,
        path: &mut Path,
        commit: &mut Commit,
        packet: &Packet,
        now: Instant,
    ) -> Result<Option<Translation>, DropReason> {
        let turns = match &commit.masquerade {
            MasqueradeCommit::None => false,
            MasqueradeCommit::Open { inside, outside, turns } => {
                path.rewrite.translation = Some(self.snat.open(inside, *outside, now)?);
                *turns
            }
            MasqueradeCommit::Turn => true,
            MasqueradeCommit::Stranger(flow) => {
                self.snat.is_strangers(flow, now);
                false
            }
        };
        let (Some(translation), Some(ip)) = (path.rewrite.translation, packet.ip()) else { return Ok(None) };
        match &mut commit.flow {
            // What has no ports may be of several sessions, and what turns is of two.
            FlowCommit::Open(..) if ip.ports.is_none() || turns => commit.flow = FlowCommit::None,
            FlowCommit::Open(_, _, verdict) => verdict.path = *path,
            FlowCommit::None | FlowCommit::Seen(_) => {}
        }
        self.passes(ip, translation, now);
        if !turns {
            return Ok(None);
        }
        // Its own session stays: by it the other one is let in.
        let turned = self.snat.turned(translation.handle).ok_or(DropReason::Uninvited)?;
        if !ip.is_icmp_error() {
            self.snat.pass(turned.handle, turned.side, 0, now);
        }
        Ok(Some(turned))
    }

    /// A packet of a session passes.
    fn passes(&mut self, ip: &Ip, translation: Translation, now: Instant) {
        if !ip.is_icmp_error() {
            let flags = if ip.protocol == ip::TCP { ip.flags } else { 0 };
            self.snat.pass(translation.handle, translation.side, flags, now);
        }
        let pod = if translation.side == Side::Source { ip.src } else { translation.address };
        match ip.fragment {
            Some(Fragment::First) => self.pieces.open(ip, pod, translation, now),
            Some(Fragment::Later) => self.pieces.pass(ip),
            None => {}
        }
    }
}

/// Back to where it came from.
fn packet_port(packet: &Packet) -> Hop {
    match packet.sender {
        Sender::Port(port) => Hop::Port(port),
        Sender::Node(node) => Hop::Node(node),
    }
}

/// TCP's flags of a packet that was seen at a glance, whose transport header begins at `l4`.
#[inline(always)]
pub(super) fn tcp_flags(frame: &Frame, at: usize, protocol: u8) -> u8 {
    if protocol == ip::TCP { frame.head().get(at + 13).copied().unwrap_or(0) } else { 0 }
}
