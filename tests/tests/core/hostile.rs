//! Hostile frames through the whole forwarder: it neither panics nor loses count, and its cache never changes an answer.

use weft_router::DropReason;
use weft_router::tables::Mode;
use weft_tests::frames::{self, ArpFields, L2, L3};
use weft_tests::hostile::{Hostile, seeds};
use weft_tests::memory::{
    GATEWAY, GATEWAY4, GATEWAY6, Input, Memory, NODES, PODS, UNDERLAY, VTEP, node_underlay, pod_mac, pod4, pod6,
    remote_mac, remote4, remote6, tables,
};
use weft_tests::random::Random;

/// How many frames each mode is given.
fn count() -> usize {
    let fallback = if cfg!(debug_assertions) { 500_000 } else { 5_000_000 };
    match std::env::var("WEFT_FRAMES") {
        Ok(text) => text.parse().expect("WEFT_FRAMES is a number of frames"),
        Err(_) => fallback,
    }
}

/// Two forwarders are given the same frames; in one of them every look-up in the flow cache is made to miss by a new epoch. What
/// leaves and what ends must be the same, byte for byte.
fn cached_is_slow_path(mode: Mode, seed: u64) {
    let (mut cached, mut slow) = (Memory::new(tables(mode)), Memory::new(tables(mode)));
    let mut hostile = Hostile::new(seed);
    let mut random = Random::new(seed ^ 0xcac4e);
    let mut recent: Vec<Input> = Vec::new();
    let mut reached = vec![0u64; DropReason::COUNT + 1];
    for number in 0..count() {
        let input = match recent.len() {
            // Most frames come again while their flow is remembered, some of them changed since.
            64.. if !random.once_in(3) => recent[random.below(64)].clone(),
            _ => hostile.frame(),
        };
        let now = weft_router::Instant(cached.now.0 + 20_000_000);
        (cached.now, slow.now) = (now, now);
        slow.tables.epoch += 1;
        let (fast, sure) = (cached.feed(&input), slow.feed(&input));
        assert_eq!(fast, sure, "frame {number} of seed {seed:#x} in {mode:?} mode: {input:?}");
        for reason in &fast.ended {
            reached[*reason as usize] += 1;
        }
        reached[DropReason::COUNT] += fast.sent.len() as u64;
        let slot = number % 64;
        if recent.len() < 64 {
            recent.push(input)
        } else if random.once_in(4) {
            recent[slot] = input
        }
        if number % 997 == 0 {
            cached.forwarder.tick(now);
            slow.forwarder.tick(now);
        }
    }
    assert!(reached[DropReason::COUNT] > count() as u64 / 10, "hardly anything was forwarded: {reached:?}");
    let different = reached.iter().filter(|count| **count > 0).count();
    assert!(different > 15, "the frames met only {different} ends: {reached:?}");
}

#[test]
fn a_cached_verdict_is_the_slow_paths_verdict_in_routed_mode() {
    cached_is_slow_path(Mode::Routed, 0x5eed_0001);
}

#[test]
fn a_cached_verdict_is_the_slow_paths_verdict_in_bridged_mode() {
    cached_is_slow_path(Mode::Bridged, 0x5eed_0002);
}

#[test]
fn what_a_pod_sends_as_itself_is_all_that_leaves_in_its_name() {
    for mode in [Mode::Routed, Mode::Bridged] {
        let mut memory = Memory::new(tables(mode));
        let mut hostile = Hostile::new(0x5eed_0003);
        for _ in 0..count() / 10 {
            let input = hostile.frame();
            memory.now = weft_router::Instant(memory.now.0 + 20_000_000);
            let outcome = memory.feed(&input);
            let Some(pod) = Some(input.port.0).filter(|port| (1..=PODS).contains(port)) else { continue };
            for output in outcome.sent.iter().filter(|output| output.port != input.port) {
                let Some(source) = source4(output.inner()) else { continue };
                let own = source == pod4(pod) || source.is_unspecified();
                assert!(own, "pod {pod} spoke as {source}: {input:?}");
                let macs = [pod_mac(pod), GATEWAY, VTEP];
                assert!(macs.contains(&output.src()), "pod {pod} spoke as {}: {input:?}", output.src());
            }
        }
    }
}

fn source4(frame: &[u8]) -> Option<std::net::Ipv4Addr> {
    let is_v4 = frame.get(12..14)? == [8, 0];
    let source: [u8; 4] = frame.get(26..30)?.try_into().ok()?;
    is_v4.then(|| source.into())
}

/// Nothing of this leaves, it ends by `reason`, and it teaches nothing.
#[track_caller]
fn refused(memory: &mut Memory, input: &Input, reason: DropReason) {
    let known = memory.forwarder.fdb().len();
    let outcome = memory.feed(input);
    assert_eq!((outcome.sent.len(), outcome.ended.as_slice()), (0, &[reason][..]), "{input:?}");
    assert_eq!(memory.forwarder.fdb().len(), known, "{input:?} taught a MAC");
}

#[test]
fn a_frame_cut_at_any_byte_is_dropped_with_a_reason() {
    use DropReason::{BadOffload, Malformed, TooShort, TunnelHeader};
    for mode in [Mode::Routed, Mode::Bridged] {
        for seed in seeds().iter().filter(|seed| seed.bytes.len() < 200) {
            let base = if seed.outer.is_some() { 8 } else { 0 };
            // ARP and unknown types need not fill the frame; of IP every byte is announced in its header.
            let ip = matches!(seed.bytes.get(base + 12..base + 14), Some([0x08, 0x00] | [0x86, 0xdd]));
            let arp = seed.bytes.get(base + 12..base + 14) == Some(&[0x08, 0x06]);
            let end = if ip {
                seed.bytes.len()
            } else if arp {
                base + 42
            } else {
                base + 14
            };
            for len in 0..end {
                let mut memory = Memory::new(tables(mode));
                let cut = Input { bytes: seed.bytes[..len].to_vec(), ..seed.clone() };
                let outcome = memory.feed(&cut);
                assert!(outcome.sent.is_empty(), "{len} bytes of {seed:?} left as {:?}", outcome.sent);
                let named = matches!(outcome.ended.as_slice(), [TooShort | Malformed | BadOffload | TunnelHeader]);
                assert!(named, "{len} bytes of {seed:?} ended as {:?}", outcome.ended);
            }
        }
    }
}

#[test]
fn ip_headers_that_contradict_themselves_are_dropped() {
    let l2 = L2 { src: pod_mac(1), dst: GATEWAY };
    let good = frames::udp(l2, L3::new(pod4(1), pod4(2)), (1000, 2000), &[1; 32]);
    let changed = |at: usize, value: u8, fix: bool| {
        let mut frame = good.clone();
        frame[at] = value;
        if fix {
            frames::fix_ipv4_checksum(&mut frame);
        }
        Input::pod(1, frame)
    };
    let mut memory = Memory::new(tables(Mode::Routed));
    assert_eq!(memory.feed(&Input::pod(1, good.clone())).sent.len(), 1);
    for ihl in 0..5 {
        refused(&mut memory, &changed(14, 0x40 | ihl, true), DropReason::Malformed);
    }
    for version in [0, 1, 3, 5, 6, 15] {
        refused(&mut memory, &changed(14, version << 4 | 5, true), DropReason::Malformed);
    }
    refused(&mut memory, &changed(17, good.len() as u8 - 14 + 1, true), DropReason::TooShort);
    refused(&mut memory, &changed(17, 19, true), DropReason::Malformed);
    refused(&mut memory, &changed(39, 7, true), DropReason::Malformed);
    refused(&mut memory, &changed(39, 255, true), DropReason::Malformed);
    for at in 14..34 {
        let mut frame = good.clone();
        frame[at] ^= 0x10;
        let outcome = memory.feed(&Input::pod(1, frame));
        assert!(outcome.sent.is_empty(), "byte {at} of the IPv4 header may be wrong");
    }
}

#[test]
fn padding_behind_an_ip_packet_is_cut_off_before_it_goes_on() {
    for l3 in [L3::new(pod4(1), pod4(2)), L3::new(pod6(1), pod6(2)), L3::new(pod4(1), remote4(0, 1))] {
        let mut memory = Memory::new(tables(Mode::Routed));
        let frame = frames::udp(L2 { src: pod_mac(1), dst: GATEWAY }, l3, (1000, 2000), b"four");
        let padded = [&frame[..], &[0xee; 18]].concat();
        let outcome = memory.feed(&Input::pod(1, padded));
        assert_eq!(outcome.sent[0].inner().len(), frame.len(), "{l3:?}");
    }
}

#[test]
fn ipv6_extension_headers_are_read_up_to_their_limit_and_refused_beyond() {
    let l2 = L2 { src: pod_mac(1), dst: GATEWAY };
    for count in 0..=12usize {
        let mut memory = Memory::new(tables(Mode::Routed));
        let frame = with_destination_options(&frames::udp(l2, L3::new(pod6(1), pod6(2)), (1, 2), b"x"), count);
        let outcome = memory.feed(&Input::pod(1, frame));
        let expected = if count <= weft_encap::ipv6::MAX_EXTENSION_HEADERS { 1 } else { 0 };
        assert_eq!(outcome.sent.len(), expected, "{count} extension headers: {:?}", outcome.ended);
        assert!(expected == 1 || outcome.ended == [DropReason::TooManyHeaders]);
    }
}

fn with_destination_options(frame: &[u8], count: usize) -> Vec<u8> {
    let mut frame = frame.to_vec();
    for _ in 0..count {
        let next = std::mem::replace(&mut frame[20], 60);
        frame.splice(54..54, [next, 0, 1, 4, 0, 0, 0, 0]);
    }
    let len = (frame.len() - 54) as u16;
    frame[18..20].copy_from_slice(&len.to_be_bytes());
    frame
}

#[test]
fn a_bad_checksum_of_the_transport_stays_bad_and_one_of_ipv4_ends_the_frame() {
    let l2 = L2 { src: pod_mac(1), dst: GATEWAY };
    for (l3, at) in [(L3::new(pod4(1), remote4(0, 1)), 40), (L3::new(pod6(1), remote6(0, 1)), 60)] {
        for wrong in [0u16, 0x1234, 0xffff] {
            let mut frame = frames::udp(l2, l3, (1000, 2000), b"payload");
            frame[at..at + 2].copy_from_slice(&wrong.to_be_bytes());
            let outcome = Memory::new(tables(Mode::Routed)).feed(&Input::pod(1, frame));
            let [sent] = outcome.sent.as_slice() else { panic!("{:?}", outcome.ended) };
            assert_eq!(sent.inner()[at..at + 2], wrong.to_be_bytes(), "a router does not repair what it did not break");
        }
    }
    let mut frame = frames::udp(l2, L3::new(pod4(1), pod4(2)), (1, 2), b"x");
    frame[24] ^= 1;
    refused(&mut Memory::new(tables(Mode::Routed)), &Input::pod(1, frame), DropReason::BadIpv4Checksum);
}

#[test]
fn a_tagged_frame_never_passes_a_pod_port() {
    let frame = frames::udp(L2 { src: pod_mac(1), dst: pod_mac(2) }, L3::new(pod4(1), pod4(2)), (1, 2), b"x");
    for kind in [[0x81, 0x00], [0x88, 0xa8]] {
        for id in [0u16, 1, 4094, 4095, 0xe000] {
            for depth in 1..=3 {
                let [high, low] = id.to_be_bytes();
                let tags = [kind[0], kind[1], high, low].repeat(depth);
                let tagged = [&frame[..12], &tags, &frame[12..]].concat();
                for mode in [Mode::Routed, Mode::Bridged] {
                    refused(&mut Memory::new(tables(mode)), &Input::pod(1, tagged.clone()), DropReason::VlanTag);
                }
                for cut in 14..14 + tags.len() {
                    let cut = Input::pod(1, tagged[..cut].to_vec());
                    refused(&mut Memory::new(tables(Mode::Bridged)), &cut, DropReason::VlanTag);
                }
            }
        }
    }
}

/// A frame over the tunnel from a pod of that node, which is delivered if all is well.
fn from_remote(node: u16, mode: Mode) -> Vec<u8> {
    let dst = if mode == Mode::Bridged { pod_mac(1) } else { VTEP };
    frames::udp(L2 { src: remote_mac(node, 1), dst }, L3::new(remote4(node, 1), pod4(1)), (1, 2), b"tunnelled")
}

#[test]
fn a_tunnel_frame_from_a_stranger_or_with_a_wrong_header_is_dropped() {
    for mode in [Mode::Routed, Mode::Bridged] {
        let mut memory = Memory::new(tables(mode));
        let inner = from_remote(0, mode);
        assert_eq!(memory.feed(&Input::node(0, &inner)).sent.len(), 1);
        for stranger in ["10.200.0.1", "10.200.0.99", "10.244.1.11", "fd00::1", "::ffff:10.200.0.99"] {
            let input = Input::underlay(stranger.parse().unwrap(), frames::vxlan(1), &inner);
            refused(&mut memory, &input, DropReason::NotMember);
        }
        for vni in [0, 2, 0x01_0001, 0xff_ffff, 256] {
            let input = Input::underlay(node_underlay(0), frames::vxlan(vni), &inner);
            refused(&mut memory, &input, DropReason::WrongVni);
        }
        for bit in 0..64 {
            let mut header = frames::vxlan(1);
            header[bit / 8] ^= 0x80 >> (bit % 8);
            let vni = (32..56).contains(&bit);
            let reason = if vni { DropReason::WrongVni } else { DropReason::TunnelHeader };
            refused(&mut memory, &Input::underlay(node_underlay(0), header, &inner), reason);
        }
        let nested = [&frames::vxlan(1)[..], &inner].concat();
        let outcome = memory.feed(&Input::node(0, &nested));
        assert!(outcome.sent.is_empty(), "a tunnel within the tunnel was opened: {outcome:?}");
    }
}

#[test]
fn a_node_speaks_for_its_own_pods_only_in_routed_mode() {
    let mut memory = Memory::new(tables(Mode::Routed));
    let l2 = L2 { src: remote_mac(0, 1), dst: VTEP };
    // As itself it may speak, too: that is where its kernel answers pods from. Not as another node.
    let itself: std::net::IpAddr = [10, 200, 0, 2].into();
    let inner = frames::udp(l2, L3::new(itself, pod4(1)), (1, 2), b"x");
    assert_eq!((node_underlay(0), memory.feed(&Input::node(0, &inner)).sent.len()), (itself, 1));
    for source in
        [remote4(1, 1), pod4(1), pod4(2), GATEWAY4, [10, 200, 0, 3].into(), [192, 0, 2, 1].into(), [0, 0, 0, 0].into()]
    {
        for target in [pod4(1), GATEWAY4] {
            let inner = frames::udp(l2, L3::new(source, target), (1, 2), b"x");
            refused(&mut memory, &Input::node(0, &inner), DropReason::TunnelSource);
        }
    }
    for source in [remote6(1, 1), pod6(1), GATEWAY6, GATEWAY.link_local(), std::net::Ipv6Addr::UNSPECIFIED] {
        let inner = frames::udp(l2, L3::new(source, pod6(1)), (1, 2), b"x");
        refused(&mut memory, &Input::node(0, &inner), DropReason::TunnelSource);
    }
    let arp = frames::arp_request(remote_mac(0, 1), remote4(0, 1), pod4(1));
    refused(&mut memory, &Input::node(0, &arp), DropReason::UnsupportedType);
}

#[test]
fn a_node_never_speaks_as_a_local_pod_or_the_gateway_in_bridged_mode() {
    let mut memory = Memory::new(tables(Mode::Bridged));
    for src in [pod_mac(1), pod_mac(3), GATEWAY, VTEP] {
        for dst in [pod_mac(2), weft_encap::mac::Mac::BROADCAST] {
            let inner = frames::udp(L2 { src, dst }, L3::new(remote4(0, 1), pod4(2)), (1, 2), b"x");
            refused(&mut memory, &Input::node(0, &inner), DropReason::TunnelSource);
        }
    }
    let honest = L2 { src: remote_mac(0, 1), dst: pod_mac(2) };
    for source in [pod4(1), GATEWAY4] {
        let inner = frames::udp(honest, L3::new(source, pod4(2)), (1, 2), b"x");
        refused(&mut memory, &Input::node(0, &inner), DropReason::TunnelSource);
        let claim = ArpFields { op: 2, sha: remote_mac(0, 1), spa: source, tha: pod_mac(2), tpa: pod4(2) };
        refused(&mut memory, &Input::node(0, &frames::arp(honest, claim)), DropReason::TunnelSource);
    }
    for source in [pod6(1), GATEWAY6, GATEWAY.link_local(), pod_mac(1).link_local()] {
        let inner = frames::udp(honest, L3::new(source, pod6(2)), (1, 2), b"x");
        refused(&mut memory, &Input::node(0, &inner), DropReason::TunnelSource);
        let inner = frames::advertisement(honest, remote6(0, 1), pod6(2), source, remote_mac(0, 1));
        refused(&mut memory, &Input::node(0, &inner), DropReason::TunnelSource);
    }
}

#[test]
fn a_pod_speaks_as_nobody_else() {
    use DropReason::{ArpSpoof, DhcpServer, NdSpoof, RouterMessage, SourceIp, SourceMac};
    let mac = pod_mac(1);
    let all = L2 { src: mac, dst: weft_encap::mac::Mac::BROADCAST };
    let all_nodes: std::net::Ipv6Addr = "ff02::1".parse().unwrap();
    let ra = [134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    let redirect6 = [137; 1].into_iter().chain([0; 39]).collect::<Vec<u8>>();
    for mode in [Mode::Routed, Mode::Bridged] {
        let mut memory = Memory::new(tables(mode));
        for dst in [GATEWAY, pod_mac(2), weft_encap::mac::Mac::BROADCAST] {
            for src in [pod_mac(2), GATEWAY, VTEP, remote_mac(0, 1), weft_encap::mac::Mac::ZERO] {
                let frame = frames::udp(L2 { src, dst }, L3::new(pod4(1), pod4(2)), (1, 2), b"x");
                refused(&mut memory, &Input::pod(1, frame), SourceMac);
            }
            for source in [pod4(2), GATEWAY4, remote4(0, 1), [127, 0, 0, 1].into(), [255; 4].into(), [0; 4].into()] {
                let frame = frames::udp(L2 { src: mac, dst }, L3::new(source, pod4(3)), (1, 2), b"x");
                refused(&mut memory, &Input::pod(1, frame), SourceIp);
            }
            for source in [
                pod6(2),
                GATEWAY6,
                remote6(0, 1),
                "::1".parse().unwrap(),
                "::".parse().unwrap(),
                "fe80::1".parse().unwrap(),
            ] {
                let frame = frames::udp(L2 { src: mac, dst }, L3::new(source, pod6(3)), (1, 2), b"x");
                refused(&mut memory, &Input::pod(1, frame), SourceIp);
            }
            for op in [1, 2] {
                for (sha, spa) in
                    [(mac, pod4(2)), (mac, GATEWAY4), (pod_mac(2), pod4(1)), (GATEWAY, GATEWAY4), (mac, remote4(0, 1))]
                {
                    let frame =
                        frames::arp(L2 { src: mac, dst }, ArpFields { op, sha, spa, tha: pod_mac(3), tpa: pod4(3) });
                    refused(&mut memory, &Input::pod(1, frame), ArpSpoof);
                }
            }
            for target in [pod6(2), GATEWAY6, remote6(0, 1), GATEWAY.link_local()] {
                let frame = frames::advertisement(L2 { src: mac, dst }, pod6(1), all_nodes, target, mac);
                refused(&mut memory, &Input::pod(1, frame), NdSpoof);
            }
            let lie = frames::advertisement(L2 { src: mac, dst }, pod6(1), all_nodes, pod6(1), pod_mac(2));
            refused(&mut memory, &Input::pod(1, lie), NdSpoof);
            let lie = frames::solicitation(L2 { src: mac, dst }, pod6(1), pod6(3), pod6(3), Some(pod_mac(2)));
            refused(&mut memory, &Input::pod(1, lie), NdSpoof);
        }
        refused(&mut memory, &Input::pod(1, frames::icmp6(all, mac.link_local(), all_nodes, 255, &ra)), RouterMessage);
        refused(&mut memory, &Input::pod(1, frames::icmp6(all, pod6(1), all_nodes, 255, &redirect6)), RouterMessage);
        let offer = frames::udp(all, L3::new(pod4(1), [255; 4]), (67, 68), &[2; 240]);
        refused(&mut memory, &Input::pod(1, offer), DhcpServer);
        let advertise = frames::udp(all, L3::new(mac.link_local(), all_nodes), (547, 546), &[2; 60]);
        refused(&mut memory, &Input::pod(1, advertise), DhcpServer);
        let probe = frames::solicit(mac, std::net::Ipv6Addr::UNSPECIFIED, pod6(2));
        refused(&mut memory, &Input::pod(1, probe), NdSpoof);
    }
}

#[test]
fn a_million_source_macs_from_a_node_stay_within_the_limit() {
    let mut memory = Memory::new(tables(Mode::Bridged));
    for number in 0..count().min(1_000_000) as u32 {
        let [_, a, b, c] = number.to_be_bytes();
        let src = weft_encap::mac::Mac([6, 1, 2, a, b, c]);
        let frame = frames::ethernet(L2 { src, dst: pod_mac(1) }, 0x88b5, &[0; 46]);
        assert_eq!(memory.feed(&Input::node(0, &frame)).sent.len(), 1);
    }
    assert_eq!(memory.forwarder.fdb().len(), 64);
    let frame = frames::ethernet(L2 { src: pod_mac(1), dst: pod_mac(2) }, 0x88b5, &[0; 46]);
    assert_eq!(
        memory.feed(&Input::pod(1, frame)).sent[0].port.0,
        2,
        "pods of this node do not depend on what is learned"
    );
}

#[test]
fn a_mac_that_moves_takes_its_flows_along() {
    let mut memory = Memory::new(tables(Mode::Bridged));
    let (roamer, pod) = (remote_mac(0, 1), pod_mac(1));
    let arrival = frames::ethernet(L2 { src: roamer, dst: pod }, 0x88b5, &[0; 46]);
    let flow = frames::udp(L2 { src: pod, dst: roamer }, L3::new(pod4(1), remote4(0, 1)), (1, 2), b"follow me");
    for step in 0..10_000u16 {
        let node = step % NODES;
        memory.feed(&Input::node(node, &arrival));
        let outcome = memory.feed(&Input::pod(1, flow.clone()));
        let [sent] = outcome.sent.as_slice() else { panic!("{outcome:?}") };
        assert_eq!((sent.port, sent.outer.unwrap().peer), (UNDERLAY, node_underlay(node)));
    }
}

#[test]
fn the_gateways_mac_never_crosses_the_tunnel_in_bridged_mode() {
    let mut memory = Memory::new(tables(Mode::Bridged));
    let mut hostile = Hostile::new(0x5eed_0004);
    for _ in 0..count() / 10 {
        let input = hostile.frame();
        memory.now = weft_router::Instant(memory.now.0 + 20_000_000);
        for output in memory.feed(&input).sent.iter().filter(|output| output.port == UNDERLAY) {
            assert_ne!(output.src(), GATEWAY, "{input:?}");
            assert_ne!(output.dst(), GATEWAY, "{input:?}");
        }
    }
}

/// The pieces of an ICMPv6 message of this type to the gateway, each with `size` bytes of it.
fn pieces(kind: u8, hop_limit: u8, size: usize) -> Vec<Vec<u8>> {
    let l2 = L2 { src: pod_mac(1), dst: GATEWAY };
    let message = [&[kind, 0, 0, 0, 0, 1, 0, 1][..], &[0x77; 3000]].concat();
    let whole = frames::icmp6(l2, pod6(1), GATEWAY6, hop_limit, &message);
    let piece = |(number, bytes): (usize, &[u8])| {
        let more = u16::from((number + 1) * size < whole.len() - 54);
        let offset = ((number * size) as u16 | more).to_be_bytes();
        let header = [58, 0, offset[0], offset[1], 0, 0, 0, 9];
        let mut frame = [&whole[..54], &header, bytes].concat();
        let len = (bytes.len() as u16 + 8).to_be_bytes();
        frame[18..20].copy_from_slice(&len);
        frame[20] = 44;
        frame
    };
    whole[54..].chunks(size).enumerate().map(piece).collect()
}

#[test]
fn a_fragmented_ping_to_the_gateway_comes_back_whole_with_a_right_checksum() {
    let mut memory = Memory::new(tables(Mode::Routed));
    let mut message = Vec::new();
    for piece in pieces(128, 64, 1200) {
        let outcome = memory.feed(&Input::pod(1, piece.clone()));
        let [reply] = outcome.sent.as_slice() else { panic!("{outcome:?}") };
        assert_eq!((reply.port.0, reply.dst(), reply.src()), (1, pod_mac(1), GATEWAY));
        assert_eq!((&reply.bytes[22..38], &reply.bytes[38..54]), (&GATEWAY6.octets()[..], &pod6(1).octets()[..]));
        assert_eq!(reply.bytes[54..62], piece[54..62], "the Fragment header is the same");
        message.extend_from_slice(&reply.bytes[62..]);
    }
    assert_eq!((message.len(), message[0]), (3008, 129));
    let length = (message.len() as u32).to_be_bytes();
    let pseudo = [&GATEWAY6.octets()[..], &pod6(1).octets(), &length, &[0, 0, 0, 58], &message].concat();
    assert_eq!(frames::internet_checksum(&pseudo), 0);
}

#[test]
fn fragments_of_anything_but_a_ping_are_refused_by_the_gateway() {
    for (kind, hop_limit) in [(129, 64), (1, 64), (200, 64), (128, 1), (128, 0)] {
        let first = pieces(kind, hop_limit, 1200).remove(0);
        refused(&mut Memory::new(tables(Mode::Routed)), &Input::pod(1, first), DropReason::GatewayRefused);
    }
}
