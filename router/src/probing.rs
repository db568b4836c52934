//! Questions to other nodes over the tunnel, and answers to theirs: is the way there, how long is it, how much does it carry.
//!
//! A question is a UDP datagram inside the tunnel, from this node's underlay address to the other node's, as long as a pod's packet
//! would be: it is wrapped as such packets are and takes the ways that they take. The other node's data plane answers it at once with
//! the first [`PROBE_LEN`] bytes. Who is no Weft has no use for the datagram, and says nothing.
//!
//! The payload, all integers big-endian, zeros behind it up to the length that is asked about:
//!
//! | bytes | |
//! |---|---|
//! | 0–3 | `WFTP` |
//! | 4 | version, 1 |
//! | 5 | 1 a question, 2 an answer |
//! | 6–7 | zero, ignored |
//! | 8–11 | length of the question's inner IP packet |
//! | 12–15 | number of the question |
//! | 16–23 | when it was sent, by the asker's clock |
//! | 24–31 | tag: a hash of all that and of the node asked, keyed with a secret of the asker's process |
//!
//! An answer repeats everything but byte 5. Its tag shows the asker that it is about a question of its own to that very node: who did
//! not see the question cannot make the answer up, and no node can answer for another.

use std::hash::{DefaultHasher, Hasher};
use std::net::IpAddr;

use weft_encap::checksum::{Sum, pseudo_v4, pseudo_v6};
use weft_encap::eth::{ETH_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6, EthHeader};
use weft_encap::ip::UDP;
use weft_encap::ipv4::{IPV4_LEN, Ipv4Header};
use weft_encap::ipv6::{IPV6_LEN, Ipv6Header};
use weft_encap::udp::{UDP_LEN, UdpHeader};
use weft_encap::zerocopy::byteorder::network_endian::{U32, U64};
use weft_encap::zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::drop_reason::DropReason;
use crate::frame::Frame;
use crate::packet::{Ip, L3};
use crate::path::Macs;
use crate::tables::NodeId;
use crate::time::Instant;

/// The destination port of questions and answers, inside the tunnel.
pub const PROBE_PORT: u16 = 8473;
/// Length of a probe's payload without the zeros behind it.
pub const PROBE_LEN: usize = size_of::<Payload>();
/// The longest inner packet that is asked about: that of a jumbo frame.
pub const LONGEST: u32 = 9216;

const MAGIC: [u8; 4] = *b"WFTP";
const VERSION: u8 = 1;
const QUESTION: u8 = 1;
const ANSWER: u8 = 2;
/// The source port varies, so that no two probes in a row are taken for parts of one flow.
const FIRST_PORT: u16 = 0xc000;

/// What a datagram says. See the module's essay.
#[derive(Copy, Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Payload {
    magic: [u8; 4],
    version: u8,
    kind: u8,
    reserved: [u8; 2],
    size: U32,
    number: U32,
    sent: U64,
    tag: U64,
}

/// A question to be asked.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Whom.
    pub node: NodeId,
    /// How long the inner IP packet is, in bytes; at least [`shortest`], at most [`LONGEST`].
    pub size: u32,
    /// Tells it from others.
    pub number: u32,
}

/// What came of questions.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// This node answered a question.
    Answer {
        /// The question.
        to: Question,
        /// When it was sent.
        sent: Instant,
        /// When the answer came.
        at: Instant,
    },
    /// This node asked one, so it is a Weft that answers, too.
    Question(NodeId),
}

/// The addresses of a probe: this node's, and the other's.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Ends {
    /// The sender's underlay address.
    pub from: IpAddr,
    /// The receiver's, of the same family.
    pub to: IpAddr,
}

/// The length of the shortest question: headers and what has to be said.
pub fn shortest(v4: bool) -> u32 {
    (headers(v4) + PROBE_LEN) as u32
}

/// Length of the IP and UDP headers.
fn headers(v4: bool) -> usize {
    UDP_LEN + if v4 { IPV4_LEN } else { IPV6_LEN }
}

/// Writes a question into `bytes` as an Ethernet frame with these MACs. Returns how long it is; `None` if the addresses are of two
/// families or it does not fit.
pub fn write(
    question: &Question,
    ends: Ends,
    macs: Macs,
    now: Instant,
    secret: u64,
    bytes: &mut [u8],
) -> Option<usize> {
    let v4 = ends.from.is_ipv4();
    let size = question.size.clamp(shortest(v4), LONGEST);
    let payload = Payload {
        magic: MAGIC,
        version: VERSION,
        kind: QUESTION,
        reserved: [0; 2],
        size: size.into(),
        number: question.number.into(),
        sent: now.0.into(),
        tag: tag(question.node, size, question.number, now.0, secret).into(),
    };
    let bytes = bytes.get_mut(..ETH_LEN + size as usize)?;
    bytes.fill(0);
    let start = L3 + headers(v4);
    bytes[start..start + PROBE_LEN].copy_from_slice(payload.as_bytes());
    let port = FIRST_PORT | question.number as u16 & !FIRST_PORT;
    seal(bytes, ends, macs, port)?;
    Some(bytes.len())
}

/// Writes all headers before the payload of a frame that is as long as it shall be; the UDP checksum is in place.
fn seal(bytes: &mut [u8], ends: Ends, macs: Macs, port: u16) -> Option<()> {
    let udp_len = (bytes.len() - L3 - (headers(ends.from.is_ipv4()) - UDP_LEN)) as u16;
    let (ethertype, mut sum, l4) = match (ends.from, ends.to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let header = Ipv4Header::new(from, to, UDP, TTL, udp_len);
            bytes[L3..L3 + IPV4_LEN].copy_from_slice(header.as_bytes());
            (ETHERTYPE_IPV4, pseudo_v4(from, to, UDP, udp_len.into()), L3 + IPV4_LEN)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let header = Ipv6Header::new(from, to, UDP, TTL, udp_len);
            bytes[L3..L3 + IPV6_LEN].copy_from_slice(header.as_bytes());
            (ETHERTYPE_IPV6, pseudo_v6(from, to, UDP, udp_len.into()), L3 + IPV6_LEN)
        }
        _ => return None,
    };
    bytes[..ETH_LEN].copy_from_slice(EthHeader::new(macs.dst, macs.src, ethertype).as_bytes());
    let mut header =
        UdpHeader { src_port: port.into(), dst_port: PROBE_PORT.into(), len: udp_len.into(), checksum: 0.into() };
    sum.add(header.as_bytes()).add(&bytes[l4 + UDP_LEN..]);
    header.checksum = checksum(sum).into();
    bytes[l4..l4 + UDP_LEN].copy_from_slice(header.as_bytes());
    Some(())
}

const TTL: u8 = 64;

/// RFC 768: "If the computed checksum is zero, it is transmitted as all ones".
fn checksum(sum: Sum) -> u16 {
    match sum.finish() {
        0 => 0xffff,
        sum => sum,
    }
}

fn tag(node: NodeId, size: u32, number: u32, sent: u64, secret: u64) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write_u64(secret);
    hasher.write_u64(u64::from(size) << 32 | u64::from(number));
    hasher.write_u64(sent);
    hasher.write_u64(node.0.into());
    hasher.finish()
}

/// Whether a packet that came by the tunnel from a node is a probe: between the two nodes themselves.
pub fn is_probe(ip: &Ip, ends: Ends) -> bool {
    let to_us = (ip.src, ip.dst) == (ends.from, ends.to);
    to_us && ip.protocol == UDP && ip.ports.is_some_and(|(_, port)| port == PROBE_PORT)
}

/// What a probe is.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// It wants to be answered.
    Question,
    /// It is the answer to this question of ours, sent then.
    Answer(Question, Instant),
}

/// Reads what [`is_probe`] says is one, from that node.
///
/// # Errors
/// `Malformed` if it is of another version, shorter or longer than it says, or answers what was not asked.
pub fn read(frame: &Frame, ip: &Ip, node: NodeId, secret: u64) -> Result<Probe, DropReason> {
    let payload = frame.head().get(usize::from(ip.l4) + UDP_LEN..).ok_or(DropReason::Malformed)?;
    let (payload, _) = Payload::ref_from_prefix(payload).map_err(|_| DropReason::Malformed)?;
    if payload.magic != MAGIC || payload.version != VERSION {
        return Err(DropReason::Malformed);
    }
    let (size, number, sent) = (payload.size.get(), payload.number.get(), payload.sent.get());
    match payload.kind {
        // Cut short on the way, or put together of several: then the answer would say what is not so.
        QUESTION if size == ip.size && frame.offload.gso.is_none() => Ok(Probe::Question),
        ANSWER if payload.tag.get() == tag(node, size, number, sent, secret) => {
            Ok(Probe::Answer(Question { node, size, number }, Instant(sent)))
        }
        _ => Err(DropReason::Malformed),
    }
}

/// Makes the answer of a question that [`read`] has read.
///
/// # Errors
/// `NoBuffer` if it does not fit the frame's own.
pub fn answer(frame: &mut Frame, ip: &Ip, ends: Ends, macs: Macs) -> Result<(), DropReason> {
    let start = usize::from(ip.l4) + UDP_LEN;
    let mut payload = Payload::read_from_prefix(&frame.head()[start..]).map_err(|_| DropReason::Malformed)?.0;
    payload.kind = ANSWER;
    let begin = L3 + headers(ends.from.is_ipv4());
    let bytes = frame.resize_head(begin + PROBE_LEN).ok_or(DropReason::NoBuffer)?;
    bytes[begin..].copy_from_slice(payload.as_bytes());
    seal(bytes, ends, macs, FIRST_PORT | payload.number.get() as u16 & !FIRST_PORT).ok_or(DropReason::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::Packet;
    use crate::path::Sender;
    use crate::pool::Pool;
    use crate::port::PortId;
    use weft_encap::mac::Mac;

    const MACS: Macs = Macs { dst: Mac([2, 0, 0, 0, 0, 2]), src: Mac([2, 0, 0, 0, 0, 1]) };
    const NODE: NodeId = NodeId(3);

    fn ends(v4: bool) -> Ends {
        let parse = |text: &str| text.parse().unwrap();
        if v4 {
            Ends { from: parse("10.0.0.1"), to: parse("10.0.0.2") }
        } else {
            Ends { from: parse("fd00::1"), to: parse("fd00::2") }
        }
    }

    fn back(ends: Ends) -> Ends {
        Ends { from: ends.to, to: ends.from }
    }

    fn question(size: u32, v4: bool, pool: &Pool) -> (Frame, Ip) {
        let mut bytes = vec![0xa5; 10_000];
        let question = Question { node: NODE, size, number: 77 };
        let len = write(&question, ends(v4), MACS, Instant(5), 9, &mut bytes).unwrap();
        arrived(&bytes[..len], pool)
    }

    fn arrived(bytes: &[u8], pool: &Pool) -> (Frame, Ip) {
        let mut frame = Frame::from_bytes(bytes, PortId(0), pool).unwrap();
        let ip = *Packet::parse(&mut frame, Sender::Node(NodeId(0))).unwrap().ip().unwrap();
        (frame, ip)
    }

    fn is_summed(frame: &Frame, ip: &Ip, ends: Ends) -> bool {
        let bytes = frame.to_vec();
        let segment = &bytes[usize::from(ip.l4)..];
        let mut sum = match (ends.from, ends.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => pseudo_v4(from, to, UDP, segment.len() as u32),
            (IpAddr::V6(from), IpAddr::V6(to)) => pseudo_v6(from, to, UDP, segment.len() as u32),
            _ => unreachable!(),
        };
        sum.add(segment).finish() == 0
    }

    #[test]
    fn a_question_of_any_length_is_answered_in_few_bytes_and_the_answer_is_known_again() {
        let pool = Pool::new(8, 8).unwrap();
        for v4 in [true, false] {
            for size in [shortest(v4), 576, 1450, 4000, LONGEST] {
                let (mut frame, ip) = question(size, v4, &pool);
                assert_eq!(ip.size, size);
                assert!(is_probe(&ip, ends(v4)) && !is_probe(&ip, back(ends(v4))) && is_summed(&frame, &ip, ends(v4)));
                assert_eq!(read(&frame, &ip, NodeId(8), 1), Ok(Probe::Question), "others have other secrets");
                answer(&mut frame, &ip, back(ends(v4)), MACS).unwrap();
                assert_eq!(frame.len(), L3 + shortest(v4) as usize);
                let (frame, ip) = arrived(&frame.to_vec(), &pool);
                assert!(is_probe(&ip, back(ends(v4))) && is_summed(&frame, &ip, back(ends(v4))));
                let known = Probe::Answer(Question { node: NODE, size, number: 77 }, Instant(5));
                assert_eq!(read(&frame, &ip, NODE, 9), Ok(known));
            }
        }
    }

    #[test]
    fn an_answer_that_nobody_was_asked_for_is_refused() {
        let pool = Pool::new(8, 8).unwrap();
        let (mut frame, ip) = question(1450, true, &pool);
        answer(&mut frame, &ip, back(ends(true)), MACS).unwrap();
        let good = frame.to_vec();
        let (frame, ip) = arrived(&good, &pool);
        assert!(read(&frame, &ip, NODE, 9).is_ok());
        assert_eq!(read(&frame, &ip, NodeId(4), 9), Err(DropReason::Malformed), "another node answers");
        assert_eq!(read(&frame, &ip, NODE, 10), Err(DropReason::Malformed), "made with another secret");
        let start = usize::from(ip.l4) + UDP_LEN;
        for at in (0..6).chain(8..PROBE_LEN) {
            for bit in 0..8 {
                let mut changed = good.clone();
                changed[start + at] ^= 1 << bit;
                let (frame, ip) = arrived(&changed, &pool);
                assert_eq!(read(&frame, &ip, NODE, 9), Err(DropReason::Malformed), "byte {at}, bit {bit}");
            }
        }
    }

    #[test]
    fn a_question_that_is_not_as_long_as_it_says_and_one_that_is_cut_off_are_refused() {
        let pool = Pool::new(8, 8).unwrap();
        let (frame, ip) = question(100, true, &pool);
        let bytes = frame.to_vec();
        for size in [99_u32, 101, u32::MAX] {
            let mut changed = bytes.clone();
            changed[usize::from(ip.l4) + UDP_LEN + 8..][..4].copy_from_slice(&size.to_be_bytes());
            let (frame, ip) = arrived(&changed, &pool);
            assert_eq!(read(&frame, &ip, NODE, 9), Err(DropReason::Malformed));
        }
        for len in L3 + headers(true)..bytes.len() {
            let mut cut = bytes[..len].to_vec();
            cut[16..18].copy_from_slice(&((len - L3) as u16).to_be_bytes());
            cut[38..40].copy_from_slice(&((len - L3 - IPV4_LEN) as u16).to_be_bytes());
            cut[24..26].fill(0);
            let sum = weft_encap::checksum::ipv4_header(&cut[L3..L3 + IPV4_LEN]);
            cut[24..26].copy_from_slice(&sum.to_be_bytes());
            let (frame, ip) = arrived(&cut, &pool);
            assert_eq!(read(&frame, &ip, NODE, 9), Err(DropReason::Malformed), "{len}");
        }
    }

    #[test]
    fn addresses_of_two_families_and_a_place_too_small_give_no_question() {
        let question = Question { node: NODE, size: 1450, number: 1 };
        let mixed = Ends { from: ends(true).from, to: ends(false).to };
        let mut bytes = [0; 2000];
        assert_eq!(write(&question, mixed, MACS, Instant(5), 9, &mut bytes), None);
        assert_eq!(write(&question, ends(true), MACS, Instant(5), 9, &mut bytes[..1000]), None);
    }
}
