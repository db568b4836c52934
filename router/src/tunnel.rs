//! Between nodes: wrapping and unwrapping.
//!
//! Each peer is sent what its [`Node::encap`] says, and may send in any format. A frame from the underlay is nobody's until [`open`] has
//! found that its outer source is a node of this cluster and its tunnel header is one of ours; that the inner source belongs to that node
//! is [`crate::policy`]'s to check. The outer IP and UDP headers are the underlay ports'.
//!
//! All formats look alike here: a tunnel header, of [`Outer::base`] bytes, and behind it an Ethernet frame.
//!
//! | format | tunnel header | Ethernet header |
//! |---|---|---|
//! | VXLAN (RFC 7348) | 8 bytes, strictly as Linux has it | on the wire |
//! | Geneve (RFC 8926) | 8 bytes, and options when received | on the wire |
//! | GRE with Ethernet (RFC 2784, RFC 2890) | 4 bytes, up to 16 when received | on the wire |
//! | GRE with IP | the same | made by the port, which takes it off again |
//! | IP in IP (RFC 2003, RFC 2473) | one byte: the outer header's protocol | likewise |
//!
//! So whatever looks at a frame after this, or cuts it into segments, need not know how it travels. What has no Ethernet header on the
//! wire is taken in routed mode only: in bridged mode the MACs say who it is for.

use std::net::IpAddr;

use weft_encap::eth::{ETH_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6};
use weft_encap::format::Format;
use weft_encap::geneve::{self, GENEVE_LEN, GeneveError, GeneveHeader};
use weft_encap::gre::{self, GRE_LEN, GreHeader};
use weft_encap::ip;
use weft_encap::ipip::Inner;
use weft_encap::vxlan::{VXLAN_LEN, Vni, VxlanHeader};
use weft_encap::zerocopy::IntoBytes;

use crate::drop_reason::DropReason;
use crate::frame::{Frame, Outer};
use crate::path::Sender;
use crate::tables::{LEAST_V6, Mode, Node, NodeId, Tables};

/// Unwraps a frame that came from the underlay, and says who sent it.
///
/// # Errors
/// `NotMember`, `TunnelHeader`, `TunnelOption`, `TunnelPayload`, `WrongVni`; the frame is unchanged.
pub fn open(frame: &mut Frame, outer: Outer, tables: &Tables) -> Result<Sender, DropReason> {
    let node = member(outer.peer, tables).ok_or(DropReason::NotMember)?;
    let head = frame.head();
    let len = match outer.format {
        Format::Vxlan => open_vxlan(head, tables)?,
        Format::Geneve => open_geneve(head, tables)?,
        Format::Gre | Format::Gretap => open_gre(head, tables)?,
        Format::Ipip => open_ipip(head, tables)?,
    };
    frame.pull(len).ok_or(DropReason::TunnelHeader)?;
    frame.outer = None;
    Ok(Sender::Node(node))
}

fn open_vxlan(head: &[u8], tables: &Tables) -> Result<usize, DropReason> {
    // RFC 7348, section 5, has reserved bits ignored on receipt; Linux drops the frame, and so do we.
    let vni = VxlanHeader::parse(head).map_err(|_| DropReason::TunnelHeader)?;
    if vni == tables.vni { Ok(VXLAN_LEN) } else { Err(DropReason::WrongVni) }
}

fn open_geneve(head: &[u8], tables: &Tables) -> Result<usize, DropReason> {
    let read = GeneveHeader::parse(head).map_err(|error| match error {
        GeneveError::Critical => DropReason::TunnelOption,
        _ => DropReason::TunnelHeader,
    })?;
    match read.protocol {
        _ if read.vni != tables.vni => Err(DropReason::WrongVni),
        geneve::PROTOCOL_ETHERNET => Ok(read.len),
        _ => Err(DropReason::TunnelPayload),
    }
}

fn open_gre(head: &[u8], tables: &Tables) -> Result<usize, DropReason> {
    let read = GreHeader::parse(head).map_err(|_| DropReason::TunnelHeader)?;
    // We send no key. Who has to send one sends the network identifier, or zero for none, as Open vSwitch does.
    if read.key.is_some_and(|key| key != 0 && key != tables.vni.get()) {
        return Err(DropReason::WrongVni);
    }
    match (read.protocol, tables.mode) {
        (gre::PROTOCOL_ETHERNET, _) | (ETHERTYPE_IPV4 | ETHERTYPE_IPV6, Mode::Routed) => Ok(read.len),
        _ => Err(DropReason::TunnelPayload),
    }
}

fn open_ipip(head: &[u8], tables: &Tables) -> Result<usize, DropReason> {
    let (protocol, rest) = head.split_first().ok_or(DropReason::TunnelHeader)?;
    Inner::parse(*protocol, rest.get(ETH_LEN..).unwrap_or_default()).map_err(|_| DropReason::TunnelHeader)?;
    if tables.mode == Mode::Routed { Ok(IPIP_LEN) } else { Err(DropReason::TunnelPayload) }
}

/// The node with this underlay address.
pub fn member(peer: IpAddr, tables: &Tables) -> Option<NodeId> {
    tables.members.get(&peer.to_canonical()).copied()
}

/// Where the Ethernet header is, if a frame's head begins with a tunnel header that [`open`] accepts at a glance.
#[inline]
pub fn plain(outer: &Outer, head: &[u8], tables: &Tables) -> Option<usize> {
    match outer.format {
        Format::Vxlan => is_vxlan(head, tables.vni).then_some(VXLAN_LEN),
        _ => plain_other(outer.format, head, tables),
    }
}

#[inline]
fn is_vxlan(head: &[u8], vni: Vni) -> bool {
    head.first_chunk() == Some(VxlanHeader::new(vni).as_bytes().first_chunk::<VXLAN_LEN>().expect("its length"))
}

fn plain_other(format: Format, head: &[u8], tables: &Tables) -> Option<usize> {
    let routed = tables.mode == Mode::Routed;
    match format {
        Format::Vxlan => None,
        Format::Geneve => head.starts_with(GeneveHeader::new(tables.vni).as_bytes()).then_some(GENEVE_LEN),
        Format::Gre | Format::Gretap => {
            let [0, 0, a, b] = *head.first_chunk::<GRE_LEN>()? else { return None };
            let protocol = u16::from_be_bytes([a, b]);
            let carries_ip = routed && matches!(protocol, ETHERTYPE_IPV4 | ETHERTYPE_IPV6);
            (carries_ip || protocol == gre::PROTOCOL_ETHERNET).then_some(GRE_LEN)
        }
        // The port made the Ethernet header, by this protocol, and whoever looks at the packet reads its version.
        Format::Ipip => (routed && matches!(head.first()?, &ip::IPIP | &ip::IPV6)).then_some(IPIP_LEN),
    }
}

/// The outer header's protocol stands before the frame.
const IPIP_LEN: usize = 1;

/// Wraps a frame for a node. Offsets in its offload metadata keep counting from the inner Ethernet header.
///
/// # Errors
/// `NoBuffer` if the frame has no headroom left for the tunnel header, `TunnelPayload` if the format carries IP and it is something else.
#[inline]
pub fn encapsulate(frame: &mut Frame, node: &Node, tables: &Tables, entropy: u16) -> Result<(), DropReason> {
    // What was verified was the inner checksum, which goes on unchanged; nothing is claimed about it on the wire.
    frame.offload.verified = false;
    let in_fragments = node.carries < LEAST_V6 && longest(frame) > node.carries as usize;
    let format = node.encap;
    let base = match format {
        Format::Vxlan => push(frame, VxlanHeader::new(tables.vni).as_bytes())?,
        _ => push_other(frame, format, tables)?,
    };
    frame.outer = Some(Outer { peer: node.underlay, entropy, tos: 0, format, base, in_fragments });
    Ok(())
}

/// The longest packet that a frame without a tunnel header stands for.
fn longest(frame: &Frame) -> usize {
    let segment = frame.offload.gso.map(|gso| usize::from(gso.header_len) + usize::from(gso.size));
    segment.map_or(frame.len(), |segment| segment.min(frame.len())).saturating_sub(ETH_LEN)
}

#[inline(never)]
fn push_other(frame: &mut Frame, format: Format, tables: &Tables) -> Result<u16, DropReason> {
    match format {
        Format::Vxlan => push(frame, VxlanHeader::new(tables.vni).as_bytes()),
        Format::Geneve => push(frame, GeneveHeader::new(tables.vni).as_bytes()),
        Format::Gretap => push_gre(frame, gre::PROTOCOL_ETHERNET),
        Format::Gre => {
            let inner = inner(frame)?;
            push_gre(frame, inner.ethertype())
        }
        Format::Ipip => {
            let inner = inner(frame)?;
            push(frame, &[inner.protocol()])
        }
    }
}

#[inline(always)]
fn push(frame: &mut Frame, header: &[u8]) -> Result<u16, DropReason> {
    frame.push(header.len()).ok_or(DropReason::NoBuffer)?.copy_from_slice(header);
    Ok(header.len() as u16)
}

fn push_gre(frame: &mut Frame, protocol: u16) -> Result<u16, DropReason> {
    let mut header = [0; GRE_LEN];
    GreHeader::write(protocol, None, &mut header);
    push(frame, &header)
}

/// What a frame carries, for a format that carries IP alone.
fn inner(frame: &Frame) -> Result<Inner, DropReason> {
    let ethertype = frame.head().get(ETH_LEN - 2..ETH_LEN).and_then(|bytes| bytes.first_chunk());
    ethertype.and_then(|bytes| Inner::of(u16::from_be_bytes(*bytes))).ok_or(DropReason::TunnelPayload)
}
