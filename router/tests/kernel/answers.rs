//! The programs that lead answers back: what they take, packet by packet, as the kernel runs them.

use etherparse::PacketBuilder;
use weft_encap::checksum;
use weft_encap::mac::Mac;
use weft_router::PortId;
use weft_router::port::tcx::Answers;
use weft_router::tables::came_back;

use crate::bed::exclusively;

const NODE: [u8; 4] = [192, 0, 2, 5];
const OTHER: [u8; 4] = [192, 0, 2, 6];
const SERVER: [u8; 4] = [203, 0, 113, 9];
const NODE6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5];
const SERVER6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];
/// A frame to the interface that test runs happen on, the loopback's.
const MACS: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 0, 9], [0; 6]);
const REDIRECT: u32 = 7;
const NEXT: u32 = u32::MAX;

fn answers() -> Answers {
    let addresses = vec![NODE.into(), NODE6.into()];
    let (mac, came_back) = (Mac([2, 0, 0, 0, 0, 1]), came_back(PortId(5)));
    Answers { uplink: 1, mac, addresses, ports: (61_000, 65_535), host: 1, came_back }
}

fn udp(dst: [u8; 4], port: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    PacketBuilder::ethernet2(MACS.0, MACS.1).ipv4(SERVER, dst, 64).udp(53, port).write(&mut bytes, &[7; 40]).unwrap();
    bytes
}

fn udp6(dst: [u8; 16], port: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    PacketBuilder::ethernet2(MACS.0, MACS.1).ipv6(SERVER6, dst, 64).udp(53, port).write(&mut bytes, &[7; 40]).unwrap();
    bytes
}

/// The packet as a fragment that begins at this byte.
fn fragment(mut bytes: Vec<u8>, at: u16, more: bool) -> Vec<u8> {
    bytes[20..22].copy_from_slice(&((at / 8) | if more { 0x2000 } else { 0 }).to_be_bytes());
    let sum = checksum::ipv4_header(&bytes[14..34]);
    bytes[24..26].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// An error of this type that quotes a packet of ours.
fn error(kind: u8, from: [u8; 4], port: u16) -> Vec<u8> {
    let mut quoted = Vec::new();
    PacketBuilder::ipv4(from, SERVER, 60).udp(port, 53).write(&mut quoted, &[]).unwrap();
    let mut message = vec![kind, 1, 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(&quoted);
    let mut bytes = Vec::new();
    let builder = PacketBuilder::ethernet2(MACS.0, MACS.1).ipv4([198, 51, 100, 1], NODE, 64);
    builder.write(&mut bytes, etherparse::IpNumber::ICMP, &message).unwrap();
    bytes
}

fn error6(kind: u8, port: u16) -> Vec<u8> {
    let mut quoted = Vec::new();
    PacketBuilder::ipv6(NODE6, SERVER6, 60).udp(port, 53).write(&mut quoted, &[]).unwrap();
    let mut message = vec![kind, 0, 0, 0, 0, 0, 5, 0];
    message.extend_from_slice(&quoted);
    let mut bytes = Vec::new();
    let builder = PacketBuilder::ethernet2(MACS.0, MACS.1).ipv6(SERVER6, NODE6, 64);
    builder.write(&mut bytes, etherparse::IpNumber::IPV6_ICMP, &message).unwrap();
    bytes
}

fn pong(id: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    let builder = PacketBuilder::ethernet2(MACS.0, MACS.1).ipv4(SERVER, NODE, 64);
    builder.icmpv4_echo_reply(id, 1).write(&mut bytes, &[1; 32]).unwrap();
    bytes
}

#[test]
fn what_may_be_an_answer_is_taken_and_nothing_else() {
    let _alone = exclusively();
    let (taken, _) = answers().load().unwrap();
    let mut ping = pong(61_000);
    ping[34] = 8;
    let cases = [
        ("to the first reserved port", udp(NODE, 61_000), true),
        ("to the last one", udp(NODE, 65_535), true),
        ("to a port below", udp(NODE, 60_999), false),
        ("to another address", udp(OTHER, 62_000), false),
        ("of IPv6", udp6(NODE6, 61_000), true),
        ("of IPv6 to a port below", udp6(NODE6, 60_999), false),
        ("of IPv6 to another address", udp6(SERVER6, 62_000), false),
        ("a first fragment", fragment(udp(NODE, 62_000), 0, true), true),
        ("a first fragment of another's", fragment(udp(NODE, 80), 0, true), false),
        ("a later fragment", fragment(udp(NODE, 80), 800, false), true),
        ("a later fragment to another address", fragment(udp(OTHER, 62_000), 800, false), false),
        ("the answer to a ping", pong(61_234), true),
        ("the answer to another's", pong(7), false),
        ("a ping", ping, false),
        ("an error about a packet of ours", error(3, NODE, 62_000), true),
        ("that its time is over", error(11, NODE, 62_000), true),
        ("an error about another's", error(3, NODE, 600), false),
        ("one about a packet that was not from here", error(3, OTHER, 62_000), false),
        ("a redirect", error(5, NODE, 62_000), false),
        ("that a packet of IPv6 was too big", error6(2, 62_000), true),
        ("that another's was", error6(2, 600), false),
    ];
    for (what, frame, is_taken) in cases {
        let (verdict, out) = taken.run(&frame).unwrap();
        assert_eq!(verdict, if is_taken { REDIRECT } else { NEXT }, "{what}");
        let expected = if is_taken { came_back(PortId(5)).0 } else { MACS.1 };
        assert_eq!((&out[..6], &out[6..]), (&expected[..], &frame[6..]), "{what}");
    }
    // Cut at every byte, it is never taken for what it is not, and nothing is read that is not there.
    let whole = udp(NODE, 62_000);
    for len in 34..38 {
        assert_eq!(taken.run(&whole[..len]).unwrap().0, NEXT, "{len} bytes");
    }
}

#[test]
fn what_is_nobodys_goes_back_with_the_mac_that_it_came_with() {
    let _alone = exclusively();
    let (_, back) = answers().load().unwrap();
    let mut frame = udp(NODE, 62_000);
    frame[..6].copy_from_slice(&came_back(PortId(5)).0);
    let (verdict, out) = back.run(&frame).unwrap();
    assert_eq!((verdict, &out[..6], &out[6..]), (REDIRECT, &[2, 0, 0, 0, 0, 1][..], &frame[6..]));
    for other in [came_back(PortId(6)), Mac([2, 0, 0, 0, 0, 3])] {
        frame[..6].copy_from_slice(&other.0);
        assert_eq!(back.run(&frame).unwrap(), (NEXT, frame.clone()));
    }
}
