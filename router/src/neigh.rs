//! ARP and neighbour discovery: the questions that the router answers itself.
//!
//! It answers for the gateway and for the pods of this node, each with its own MAC, so that pods of a node talk to each other without
//! a broadcast. It never answers a duplicate address detection or an ARP probe, whose sender would take the
//! answer for a conflict, and never a pod's question for its own address. Questions for others go on as
//! the broadcasts and multicasts that they are. RFC 826, RFC 4861, RFC 5227.

use std::net::IpAddr;

use weft_encap::arp::{self, Arp};
use weft_encap::checksum;
use weft_encap::eth::{ETHERTYPE_ARP, ETHERTYPE_IPV6, EthHeader};
use weft_encap::ip;
use weft_encap::ipv6::{IPV6_LEN, Ipv6Header};
use weft_encap::mac::Mac;
use weft_encap::ndp::{self, NeighborMessage};
use weft_encap::zerocopy::IntoBytes;
use weft_encap::zerocopy::byteorder::network_endian::U16;

use crate::drop_reason::DropReason;
use crate::frame::Frame;
use crate::packet::{L3, Network, Packet};
use crate::path::Reply;
use crate::tables::{ExactMap, Gateway, Neighbour};

/// The answer to a pod's question, if it is one that the router answers.
pub fn answer(packet: &Packet, gateway: &Gateway, neighbours: &ExactMap<IpAddr, Neighbour>) -> Option<Reply> {
    let known = |target: IpAddr| -> Option<Mac> {
        if gateway.owns(target) {
            return Some(gateway.mac);
        }
        neighbours.get(&target).map(|neighbour| neighbour.mac).filter(|mac| *mac != packet.src)
    };
    match &packet.network {
        Network::Arp(question) => {
            let asks = question.op.get() == arp::REQUEST && !question.is_probe() && !question.is_announcement();
            let mac = asks.then(|| known(question.target().into())).flatten()?;
            Some(Reply::Arp(mac))
        }
        Network::Ip(ip) => {
            let question = ip.neighbour.filter(|message| message.solicitation)?;
            let mac = (!ip.src.is_unspecified()).then(|| known(question.target.into())).flatten()?;
            let router = gateway.owns(question.target.into());
            Some(Reply::Advertisement { target: question.target, mac, router })
        }
        Network::Other => None,
    }
}

/// The local pod that a question is about, for questions that come from other nodes: it answers for itself.
pub fn asked(packet: &Packet, neighbours: &ExactMap<IpAddr, Neighbour>) -> Option<Neighbour> {
    let target: IpAddr = match &packet.network {
        Network::Arp(question) if question.op.get() == arp::REQUEST => question.target().into(),
        Network::Ip(ip) => ip.neighbour.filter(|message| message.solicitation)?.target.into(),
        Network::Arp(_) | Network::Other => return None,
    };
    neighbours.get(&target).copied()
}

/// Turns the question into its answer, in place.
///
/// # Errors
/// `NoBuffer` if the answer does not fit the question's buffer; the frame is unchanged.
pub fn write(frame: &mut Frame, packet: &Packet, reply: Reply) -> Result<(), DropReason> {
    match (reply, &packet.network) {
        (Reply::Arp(mac), Network::Arp(question)) => {
            let bytes = frame.resize_head(L3 + size_of::<Arp>()).ok_or(DropReason::NoBuffer)?;
            bytes[..L3].copy_from_slice(EthHeader::new(packet.src, mac, ETHERTYPE_ARP).as_bytes());
            bytes[L3..].copy_from_slice(question.reply(mac).as_bytes());
            Ok(())
        }
        (Reply::Advertisement { target, mac, router }, Network::Ip(asked)) => {
            let IpAddr::V6(asker) = asked.src else { return Err(DropReason::Malformed) };
            // RFC 4861, section 7.2.4: solicited, and override unless it is an anycast address; each pod has its own.
            let flags = ndp::SOLICITED | ndp::OVERRIDE | if router { ndp::ROUTER } else { 0 };
            let mut message = NeighborMessage::advertisement(flags, target, mac);
            let len = size_of::<NeighborMessage>();
            let mut sum = checksum::pseudo_v6(target, asker, ip::ICMPV6, len as u32);
            message.neighbor.icmp.checksum = U16::new(sum.add(message.as_bytes()).finish());
            let bytes = frame.resize_head(L3 + IPV6_LEN + len).ok_or(DropReason::NoBuffer)?;
            bytes[..L3].copy_from_slice(EthHeader::new(packet.src, mac, ETHERTYPE_IPV6).as_bytes());
            let header = Ipv6Header::new(target, asker, ip::ICMPV6, 255, len as u16);
            bytes[L3..L3 + IPV6_LEN].copy_from_slice(header.as_bytes());
            bytes[L3 + IPV6_LEN..].copy_from_slice(message.as_bytes());
            Ok(())
        }
        _ => Err(DropReason::Malformed),
    }
}
