//! Between nodes: wrapping and unwrapping.
//!
//! VXLAN (RFC 7348) as Linux speaks it. A frame from the underlay is nobody's until [`open`] has found that its outer source is a
//! node of this cluster and its tunnel header is exactly ours; that the inner source belongs to that node is
//! [`crate::policy`]'s to check. The outer IP and UDP headers are the underlay port's.

use std::net::IpAddr;

use weft_encap::offload::Offload;
use weft_encap::vxlan::{VXLAN_LEN, VxlanHeader};
use weft_encap::zerocopy::IntoBytes;

use crate::drop_reason::DropReason;
use crate::frame::{Frame, Outer};
use crate::path::Sender;
use crate::tables::{Node, NodeId, Tables};

/// Unwraps a frame that came from the underlay, and says who sent it.
///
/// # Errors
/// `NotMember`, `TunnelHeader`, `WrongVni`; the frame is unchanged.
pub fn open(frame: &mut Frame, outer: Outer, tables: &Tables) -> Result<Sender, DropReason> {
    let node = member(outer.peer, tables).ok_or(DropReason::NotMember)?;
    // RFC 7348, section 5, has reserved bits ignored on receipt; Linux drops the frame, and so do we.
    let vni = VxlanHeader::parse(frame.head()).map_err(|_| DropReason::TunnelHeader)?;
    if vni != tables.vni {
        return Err(DropReason::WrongVni);
    }
    frame.pull(VXLAN_LEN).ok_or(DropReason::TunnelHeader)?;
    frame.outer = None;
    Ok(Sender::Node(node))
}

/// The node with this underlay address.
pub fn member(peer: IpAddr, tables: &Tables) -> Option<NodeId> {
    tables.members.get(&peer.to_canonical()).copied()
}

/// Whether a frame's head begins with the tunnel header that [`open`] accepts.
#[inline]
pub fn is_plain(head: &[u8], tables: &Tables) -> bool {
    head.first_chunk() == Some(VxlanHeader::new(tables.vni).as_bytes().first_chunk::<VXLAN_LEN>().expect("its length"))
}

/// Wraps a frame for a node. Offsets in its offload metadata keep counting from the inner Ethernet header.
///
/// # Errors
/// `NoBuffer` if the frame has no headroom left for the tunnel header.
pub fn encapsulate(frame: &mut Frame, node: &Node, tables: &Tables, entropy: u16) -> Result<(), DropReason> {
    // What was verified was the inner checksum, which goes on unchanged; nothing is claimed about it on the wire.
    frame.offload = Offload { verified: false, ..frame.offload };
    let header = frame.push(VXLAN_LEN).ok_or(DropReason::NoBuffer)?;
    header.copy_from_slice(VxlanHeader::new(tables.vni).as_bytes());
    frame.outer = Some(Outer { peer: node.underlay, entropy, tos: 0 });
    Ok(())
}
