//! Random scenarios of pods, nodes and frames: the router delivers to exactly those to whom the reference router does.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;
use weft_encap::mac::Mac;
use weft_router::tables::Mode;
use weft_tests::frames::{self, ArpFields, L2, L3};
use weft_tests::memory::{
    GATEWAY, GATEWAY4, GATEWAY6, Input, Memory, NODES, Output, PODS, UNDERLAY, VTEP, node_underlay, node_vtep, pod_mac,
    pod4, pod6, remote_mac, remote4, remote6, tables,
};

use crate::reference::{Content, Delivery, MTU, Message, Place, Reference, What};

fn macs() -> Vec<Mac> {
    let mut macs =
        vec![GATEWAY, VTEP, node_vtep(0), Mac::BROADCAST, Mac([0x33, 0x33, 0, 0, 0, 1]), Mac([2, 9, 9, 9, 9, 9])];
    macs.extend((1..=PODS).map(pod_mac));
    macs.extend((0..NODES).flat_map(|node| [remote_mac(node, 1), remote_mac(node, 2)]));
    macs
}

fn addresses4() -> Vec<Ipv4Addr> {
    let mut all = vec![
        GATEWAY4,
        pod4(99),
        Ipv4Addr::new(192, 0, 2, 1),
        Ipv4Addr::new(10, 244, 77, 1),
        Ipv4Addr::new(127, 0, 0, 1),
    ];
    all.extend([
        Ipv4Addr::UNSPECIFIED,
        Ipv4Addr::BROADCAST,
        Ipv4Addr::new(224, 0, 0, 251),
        Ipv4Addr::new(169, 254, 1, 1),
    ]);
    all.extend((1..=PODS).map(pod4));
    all.extend((0..NODES).flat_map(|node| [remote4(node, 1), remote4(node, 2)]));
    all
}

fn addresses6() -> Vec<Ipv6Addr> {
    let fixed = ["2001:db8::1", "::1", "::", "fe80::77", "ff02::1", "ff05::2", "fd00:10:244:77::1"];
    let mut all: Vec<Ipv6Addr> = fixed.iter().map(|text| text.parse().unwrap()).collect();
    all.extend([GATEWAY6, GATEWAY.link_local(), pod6(99)]);
    all.extend((1..=PODS).flat_map(|pod| [pod6(pod), pod_mac(pod).link_local()]));
    all.extend((0..NODES).flat_map(|node| [remote6(node, 1), remote6(node, 2)]));
    all
}

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![
        6 => (1..=PODS).prop_map(Place::Pod),
        3 => (0..NODES).prop_map(Place::Node),
        1 => Just(Place::Stranger),
    ]
}

/// The sender's own, more often than not.
fn own(from: Place) -> (Mac, Ipv4Addr, Ipv6Addr) {
    match from {
        Place::Pod(pod) => (pod_mac(pod), pod4(pod), pod6(pod)),
        Place::Node(node) => (remote_mac(node, 1), remote4(node, 1), remote6(node, 1)),
        Place::Stranger => (remote_mac(0, 1), remote4(0, 1), remote6(0, 1)),
    }
}

fn or<T: Clone + std::fmt::Debug + 'static>(often: T, all: Vec<T>) -> impl Strategy<Value = T> {
    prop_oneof![3 => Just(often), 1 => proptest::sample::select(all)]
}

fn content(mac: Mac, four: Ipv4Addr, six: Ipv6Addr) -> impl Strategy<Value = Content> {
    let (any4, any6) = (|| proptest::sample::select(addresses4()), || proptest::sample::select(addresses6()));
    let ttl = || proptest::sample::select(vec![0u8, 1, 2, 64, 64, 255]);
    let size = || proptest::sample::select(vec![28usize, 100, 700, MTU - 1, MTU, MTU + 1]);
    let pair = || {
        prop_oneof![
            (or(four, addresses4()), any4()).prop_map(|(src, dst)| (IpAddr::V4(src), IpAddr::V4(dst))),
            (or(six, addresses6()), any6()).prop_map(|(src, dst)| (IpAddr::V6(src), IpAddr::V6(dst))),
        ]
    };
    prop_oneof![
        6 => (pair(), ttl(), size()).prop_map(|((src, dst), ttl, size)| Content::Udp { src, dst, ttl, size: size.max(48) }),
        3 => (pair(), ttl()).prop_map(|((src, dst), ttl)| Content::Ping { src, dst, ttl }),
        2 => (any::<bool>(), or(mac, macs()), or(four, addresses4()), any4())
            .prop_map(|(request, sha, spa, tpa)| Content::Arp { request, sha, spa, tpa }),
        2 => (or(six, addresses6()), any6(), any6(), or(mac, macs()))
            .prop_map(|(src, dst, target, option)| Content::Solicit { src, dst, target, option }),
        1 => (or(six, addresses6()), any6(), any6(), or(mac, macs()))
            .prop_map(|(src, dst, target, option)| Content::Advertise { src, dst, target, option }),
        1 => Just(Content::Other),
    ]
}

fn message() -> impl Strategy<Value = Message> {
    place()
        .prop_flat_map(|from| {
            let (mac, four, six) = own(from);
            let dst = proptest::sample::select(macs());
            (or(mac, macs()), dst, content(mac, four, six)).prop_map(move |(src, dst, content)| Message {
                from,
                src,
                dst,
                content,
            })
        })
        .prop_filter("a target that no valid message has", |message| match message.content {
            // RFC 4861, sections 7.1.1 and 7.1.2: such messages are malformed, whoever sends them.
            Content::Solicit { target, .. } | Content::Advertise { target, .. } => !target.is_multicast(),
            _ => true,
        })
}

fn bytes(message: &Message, number: usize) -> Vec<u8> {
    let l2 = L2 { src: message.src, dst: message.dst };
    match message.content {
        Content::Arp { request, sha, spa, tpa } => {
            let op = if request { 1 } else { 2 };
            frames::arp(l2, ArpFields { op, sha, spa, tha: Mac::ZERO, tpa })
        }
        Content::Udp { src, dst, ttl, size } => {
            let header = if src.is_ipv4() { 28 } else { 48 };
            frames::udp(l2, L3 { src, dst, ttl }, (1000, 2000), &vec![number as u8; size - header])
        }
        Content::Ping { src, dst, ttl } => {
            let header = if src.is_ipv4() { 28 } else { 48 };
            frames::ping(l2, L3 { src, dst, ttl }, 1, number as u16, &vec![number as u8; 84 - header])
        }
        Content::Solicit { src, dst, target, option } => {
            frames::solicitation(l2, src, dst, target, (!src.is_unspecified()).then_some(option))
        }
        Content::Advertise { src, dst, target, option } => frames::advertisement(l2, src, dst, target, option),
        Content::Other => frames::ethernet(l2, 0x88b5, &[number as u8; 46]),
    }
}

fn input(message: &Message, bytes: &[u8]) -> Input {
    match message.from {
        Place::Pod(pod) => Input::pod(pod, bytes.to_vec()),
        Place::Node(node) => Input::node(node, bytes),
        Place::Stranger => Input::underlay([10, 200, 0, 200].into(), frames::vxlan(1), bytes),
    }
}

/// What a frame that left is, seen from outside.
fn delivery(output: &Output, sent: &[u8]) -> Delivery {
    let to = match output.outer {
        Some(outer) => {
            assert_eq!((output.port, &output.bytes[..8]), (UNDERLAY, &frames::vxlan(1)[..]));
            Place::Node((0..NODES).find(|node| node_underlay(*node) == outer.peer).expect("it goes to a node"))
        }
        None => Place::Pod(output.port.0),
    };
    (to, output.dst(), output.src(), what(output.inner(), sent))
}

fn what(frame: &[u8], sent: &[u8]) -> What {
    let ethertype = &frame[12..14];
    let ttl_at = match ethertype {
        [0x08, 0x00] => Some(22),
        [0x86, 0xdd] => Some(21),
        _ => None,
    };
    let neutral = |frame: &[u8]| {
        let mut frame = frame.to_vec();
        frame[..12].fill(0);
        if let Some(at) = ttl_at {
            frame[at] = 0;
        }
        if ttl_at == Some(22) {
            frame[24..26].fill(0);
        }
        frame
    };
    if frame.len() == sent.len() && neutral(frame) == neutral(sent) {
        if ttl_at == Some(22) {
            assert_eq!(frames::internet_checksum(&frame[14..34]), 0, "the IPv4 header checksum is right");
        }
        return What::Same(ttl_at.map(|at| frame[at]));
    }
    match (ethertype, ttl_at) {
        ([0x08, 0x06], _) => {
            assert_eq!((&frame[20..22], &frame[28..32]), (&[0, 2][..], &sent[38..42]));
            What::ArpReply(Mac(frame[22..28].try_into().unwrap()))
        }
        (_, Some(22)) => {
            assert_eq!(
                (frame[23], frames::internet_checksum(&frame[14..34]), frames::internet_checksum(&frame[34..])),
                (1, 0, 0)
            );
            if frame[34] == 0 { What::EchoReply } else { What::Error(frame[34], frame[35]) }
        }
        (_, Some(21)) => {
            let length = (frame.len() as u32 - 54).to_be_bytes();
            let pseudo = [&frame[22..54], &length, &[0, 0, 0, 58], &frame[54..]].concat();
            assert_eq!((frame[20], frames::internet_checksum(&pseudo)), (58, 0));
            match frame[54] {
                129 => What::EchoReply,
                136 => What::Advertisement(Mac(frame[80..86].try_into().unwrap())),
                kind => What::Error(kind, frame[55]),
            }
        }
        _ => panic!("nobody sent this: {frame:02x?}"),
    }
}

/// What is left open: the gateway's own stack may stay silent, and neighbour discovery in routed mode ends at the link.
fn is_open(message: &Message, mode: Mode) -> bool {
    let discovery = matches!(message.content, Content::Solicit { .. } | Content::Advertise { .. });
    discovery && mode == Mode::Routed && matches!(message.from, Place::Node(_))
}

fn run(mode: Mode, messages: &[Message]) -> Result<(), TestCaseError> {
    let (mut memory, mut reference) = (Memory::new(tables(mode)), Reference::new(mode));
    for (number, message) in messages.iter().enumerate().filter(|(_, message)| !is_open(message, mode)) {
        let sent = bytes(message, number);
        memory.now = weft_router::Instant(memory.now.0 + 1_000_000_000);
        let outcome = memory.feed(&input(message, &sent));
        let actual: BTreeSet<Delivery> = outcome.sent.iter().map(|output| delivery(output, &sent)).collect();
        let expected = reference.expect(message);
        prop_assert_eq!(
            &actual,
            &expected,
            "message {} of {:?} mode: {:?}; ended: {:?}",
            number,
            mode,
            message,
            outcome.ended
        );
        prop_assert_eq!(outcome.sent.len(), expected.len(), "somebody got it twice");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn everyone_receives_what_the_reference_says_in_routed_mode(messages in proptest::collection::vec(message(), 1..30)) {
        run(Mode::Routed, &messages)?;
    }

    #[test]
    fn everyone_receives_what_the_reference_says_in_bridged_mode(messages in proptest::collection::vec(message(), 1..30)) {
        run(Mode::Bridged, &messages)?;
    }
}
