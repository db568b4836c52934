//! Frames that nobody should send: well-formed ones of every kind, and what damage makes of them.
//!
//! [`seeds`] are what pods and nodes send on a good day, and a few things that they might try. [`Hostile`] takes one, damages it
//! in some of the ways that hurt other routers (lengths that lie, cuts, padding, tags, options, wrong
//! offload metadata, another sender), and now and then sends pure noise.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use weft_encap::mac::Mac;
use weft_encap::offload::{Gso, GsoKind, Offload, Partial};
use weft_router::PortId;

use crate::frames::{self, ArpFields, L2, L3};
use crate::memory::{
    GATEWAY, GATEWAY4, GATEWAY6, Input, NODES, PODS, VTEP, node_underlay, pod_mac, pod4, pod6, remote_mac, remote4,
    remote6,
};
use crate::random::Random;

/// As much of a long frame as the ports put into its head.
const SHORT_HEAD: usize = 264;

/// A source of hostile frames.
pub struct Hostile {
    random: Random,
    seeds: Vec<Input>,
}

impl Hostile {
    /// The source of that seed.
    pub fn new(seed: u64) -> Hostile {
        Hostile { random: Random::new(seed), seeds: seeds() }
    }

    /// The next frame.
    pub fn frame(&mut self) -> Input {
        let random = &mut self.random;
        if random.once_in(20) {
            return noise(random);
        }
        let mut input = self.seeds[random.below(self.seeds.len())].clone();
        if random.once_in(8) {
            return input;
        }
        for _ in 0..=random.below(3) {
            damage(&mut input, random);
        }
        input
    }
}

fn noise(random: &mut Random) -> Input {
    let len = random.pick(&[0, 1, 12, 13, 14, 15, 34, 54, 60, 64, 128, 1500, 3000]);
    let len = random.below(len + 1);
    let bytes = random.bytes(len);
    match random.below(3) {
        0 => Input::node(random.below(usize::from(NODES)) as u16, &bytes),
        1 => Input { bytes, ..Input::node(0, &[]) },
        _ => Input::pod(random.below(usize::from(PODS) + 2) as u16, bytes),
    }
}

fn damage(input: &mut Input, random: &mut Random) {
    let base = if input.outer.is_some() { 8 } else { 0 };
    match random.below(14) {
        0 => flip(input, random, 0),
        1 => flip(input, random, base + 12),
        2 => {
            let len = random.below(input.bytes.len() + 1);
            input.bytes.truncate(len);
        }
        3 => {
            let padding = random.below(80);
            let padding = random.bytes(padding);
            input.bytes.extend_from_slice(&padding);
        }
        4 => lie(input, random, base),
        5 => lie(input, random, base),
        6 => input.offload = offload(random, input.bytes.len()),
        7 => tag(input, random, base),
        8 => extend_v6(input, random, base),
        9 => input.head = SHORT_HEAD,
        10 => impersonate(input, random, base),
        11 => {
            if let Some(outer) = &mut input.outer {
                outer.peer = random.pick(&[
                    node_underlay(0),
                    node_underlay(1),
                    IpAddr::from([10, 200, 0, 99]),
                    IpAddr::from([0; 16]),
                ]);
            } else {
                input.port = PortId(random.below(usize::from(PODS) + 3) as u16);
            }
        }
        12 => {
            let at = random.below(8.max(base));
            if base > 0 && at < input.bytes.len() {
                input.bytes[at] = random.byte();
            }
        }
        _ => flip(input, random, base + 14),
    }
}

fn flip(input: &mut Input, random: &mut Random, from: usize) {
    if input.bytes.len() > from {
        let span = (input.bytes.len() - from).min(80);
        let at = from + random.below(span);
        input.bytes[at] ^= 1 << random.below(8);
    }
}

/// Writes an interesting number where lengths, offsets and protocols stand, and makes the IPv4 checksum right again.
fn lie(input: &mut Input, random: &mut Random, base: usize) {
    let frame = input.bytes.get_mut(base..).unwrap_or_default();
    let ipv6 = frame.get(12..14) == Some(&[0x86, 0xdd]);
    let fields: &[usize] =
        if ipv6 { &[14, 18, 19, 20, 21, 54, 55, 58, 66] } else { &[14, 16, 17, 20, 21, 22, 23, 34, 38, 46] };
    let at = random.pick(fields);
    let value = match at {
        14 => random.pick(&[0x40, 0x41, 0x44, 0x45, 0x46, 0x4f, 0x50, 0x60, 0x65, 0xff]),
        _ => random.pick(&[0, 1, 2, 6, 7, 8, 17, 19, 20, 41, 43, 44, 47, 50, 51, 58, 59, 60, 0x7f, 0x80, 0xff]),
    };
    if let Some(byte) = frame.get_mut(at) {
        *byte = value;
    }
    if !ipv6 && random.below(4) > 0 {
        frames::fix_ipv4_checksum(frame);
    }
}

fn offload(random: &mut Random, len: usize) -> Offload {
    let start = random.pick(&[0, 14, 33, 34, 35, 54, 58, 200, len as u16, u16::MAX]);
    let offset = random.pick(&[0, 6, 16, 17, u16::MAX]);
    let partial = (!random.once_in(4)).then_some(Partial { start, offset });
    let gso = random.once_in(2).then(|| Gso {
        kind: random.pick(&[GsoKind::Tcp4, GsoKind::Tcp6, GsoKind::Udp]),
        ecn: random.once_in(2),
        size: random.pick(&[0, 1, 7, 64, 536, 1448, 9000, u16::MAX]),
        header_len: random.pick(&[0, 13, 54, 66, 74, len as u16, u16::MAX]),
    });
    Offload { partial, gso, verified: random.once_in(4) }
}

fn tag(input: &mut Input, random: &mut Random, base: usize) {
    if input.bytes.len() < base + 12 {
        return;
    }
    let id = random.pick(&[[0u8, 0], [0, 1], [0x0f, 0xff], [0xe0, 0]]);
    let kind = random.pick(&[[0x81u8, 0], [0x88, 0xa8], [0x91, 0]]);
    for _ in 0..=random.below(2) {
        let tag = [kind[0], kind[1], id[0], id[1]];
        input.bytes.splice(base + 12..base + 12, tag);
    }
    if random.once_in(3) {
        input.bytes.truncate(base + 12 + random.below(6));
    }
}

/// Puts extension headers behind an IPv6 header, more than a router should read.
fn extend_v6(input: &mut Input, random: &mut Random, base: usize) {
    if input.bytes.get(base + 12..base + 14) != Some(&[0x86, 0xdd]) || input.bytes.len() < base + 54 {
        return;
    }
    for _ in 0..random.pick(&[1, 2, 7, 8, 9, 30]) {
        let next = std::mem::replace(&mut input.bytes[base + 20], random.pick(&[0, 43, 44, 60, 60, 60, 51, 135]));
        let units = random.pick(&[0u8, 0, 0, 1, 200]);
        let mut header = vec![next, units, 0, 0, 0, 0, 0, 0];
        header.resize(8 + usize::from(units) * 8, 0);
        let len = header.len() as u16;
        input.bytes.splice(base + 54..base + 54, header);
        let field = &mut input.bytes[base + 18..base + 20];
        let total = u16::from_be_bytes([field[0], field[1]]).wrapping_add(len);
        field.copy_from_slice(&total.to_be_bytes());
    }
}

/// Takes another's MAC or address.
fn impersonate(input: &mut Input, random: &mut Random, base: usize) {
    let mac = random.pick(&[GATEWAY, VTEP, pod_mac(1), pod_mac(2), remote_mac(0, 1), Mac::BROADCAST, Mac::ZERO]);
    let at = base + random.pick(&[0, 6, 22, 32]);
    if let Some(field) = input.bytes.get_mut(at..at + 6) {
        field.copy_from_slice(&mac.0);
    }
    let address = random.pick(&[GATEWAY4, pod4(1), pod4(2), remote4(0, 1), Ipv4Addr::LOCALHOST, Ipv4Addr::BROADCAST]);
    if random.once_in(2)
        && let Some(frame) = input.bytes.get_mut(base..)
        && let Some(field) = frame.get_mut(26..30)
    {
        field.copy_from_slice(&address.octets());
        frames::fix_ipv4_checksum(frame);
    }
}

/// What pods and nodes send on a good day, and what they might try.
pub fn seeds() -> Vec<Input> {
    let mut seeds = Vec::new();
    for pod in 1..=PODS {
        from_pod(pod, &mut seeds);
    }
    for node in 0..NODES {
        from_node(node, &mut seeds);
    }
    seeds.extend(tricks());
    seeds
}

fn from_pod(pod: u16, seeds: &mut Vec<Input>) {
    let (mac, other) = (pod_mac(pod), pod % PODS + 1);
    let gateway = L2 { src: mac, dst: GATEWAY };
    let neighbour = L2 { src: mac, dst: pod_mac(other) };
    let far = L2 { src: mac, dst: remote_mac(0, 1) };
    let mut push = |bytes| seeds.push(Input::pod(pod, bytes));
    for l2 in [gateway, neighbour, far] {
        for (four, six) in [
            (pod4(other), pod6(other)),
            (remote4(0, 1), remote6(0, 1)),
            (remote4(1, 2), remote6(1, 2)),
            (GATEWAY4, GATEWAY6),
        ] {
            for l3 in [L3::new(pod4(pod), four), L3::new(pod6(pod), six)] {
                push(frames::udp(l2, l3, (4000 + pod, 53), b"question"));
                push(frames::tcp(l2, l3, (5000 + pod, 80), 1, &[0x5a; 200]));
                push(frames::ping(l2, l3, pod, 1, &[1; 56]));
                push(frames::udp(l2, l3.ttl(1), (4000, 33434), &[0; 32]));
                push(frames::udp(l2, l3, (4000, 9), &[7; 1600]));
            }
        }
    }
    let outside = L3::new(pod4(pod), Ipv4Addr::new(192, 0, 2, 1));
    push(frames::udp(gateway, outside, (4000, 53), b"nowhere"));
    push(frames::udp(gateway, L3::new(pod4(pod), pod4(99)), (4000, 53), b"nobody"));
    push(frames::fragment(gateway, pod4(pod), pod4(other), 77, 0, true, &[9; 64]));
    push(frames::fragment(gateway, pod4(pod), pod4(other), 77, 8, false, &[9; 64]));
    for target in [GATEWAY4, pod4(other), pod4(pod), remote4(0, 1), pod4(99)] {
        push(frames::arp_request(mac, pod4(pod), target));
        push(frames::arp_request(mac, Ipv4Addr::UNSPECIFIED, target));
    }
    for target in [GATEWAY6, pod6(other), pod6(pod), remote6(0, 1), mac.link_local(), GATEWAY.link_local()] {
        push(frames::solicit(mac, pod6(pod), target));
        push(frames::solicit(mac, mac.link_local(), target));
        push(frames::solicit(mac, Ipv6Addr::UNSPECIFIED, target));
        push(frames::advertisement(L2 { src: mac, dst: GATEWAY }, pod6(pod), GATEWAY6, target, mac));
    }
    push(frames::ethernet(L2 { src: mac, dst: Mac::BROADCAST }, 0x88b5, &[3; 46]));
    push(frames::ethernet(L2 { src: mac, dst: Mac([1, 0x80, 0xc2, 0, 0, 0]) }, 0x0027, &[0; 46]));
}

fn from_node(node: u16, seeds: &mut Vec<Input>) {
    for pod in 1..=2 {
        let src = remote_mac(node, pod);
        for dst in [VTEP, pod_mac(1), pod_mac(2), Mac::BROADCAST, GATEWAY, remote_mac(1 - node, 1)] {
            let l2 = L2 { src, dst };
            for (four, six) in [
                (pod4(1), pod6(1)),
                (pod4(2), pod6(2)),
                (GATEWAY4, GATEWAY6),
                (remote4(1 - node, 1), remote6(1 - node, 1)),
            ] {
                for l3 in [L3::new(remote4(node, pod), four), L3::new(remote6(node, pod), six)] {
                    seeds.push(Input::node(node, &frames::udp(l2, l3, (4000 + pod, 53), b"question")));
                    seeds.push(Input::node(node, &frames::tcp(l2, l3, (5000, 80), 9, &[1; 300])));
                    seeds.push(Input::node(node, &frames::ping(l2, l3, pod, 1, &[1; 56])));
                }
            }
        }
        seeds.push(Input::node(node, &frames::arp_request(src, remote4(node, pod), pod4(1))));
        seeds.push(Input::node(node, &frames::solicit(src, remote6(node, pod), pod6(1))));
        seeds.push(Input::node(node, &frames::ethernet(L2 { src, dst: Mac::BROADCAST }, 0x88b5, &[3; 46])));
    }
}

/// Lies about who one is, superframes, tunnels within the tunnel.
fn tricks() -> Vec<Input> {
    let mac = pod_mac(1);
    let (gateway, all) = (L2 { src: mac, dst: GATEWAY }, L2 { src: mac, dst: Mac::BROADCAST });
    let dhcp = L3::new(pod4(1), Ipv4Addr::BROADCAST);
    let claim = ArpFields { op: 2, sha: mac, spa: GATEWAY4, tha: pod_mac(2), tpa: pod4(2) };
    let ra = [134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let nested = [&frames::vxlan(1)[..], &frames::udp(gateway, L3::new(pod4(2), pod4(3)), (1, 2), b"x")].concat();
    let mut tricks = vec![
        frames::udp(all, dhcp, (67, 68), &[2; 240]),
        frames::udp(all, L3::new(Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST), (68, 67), &[1; 240]),
        frames::arp(L2 { src: mac, dst: pod_mac(2) }, claim),
        frames::icmp6(all, mac.link_local(), all_nodes, 255, &ra),
        frames::advertisement(L2 { src: mac, dst: pod_mac(2) }, pod6(1), pod6(2), GATEWAY6, mac),
        frames::udp(gateway, L3::new(pod4(2), pod4(3)), (1, 2), b"not me"),
        frames::udp(gateway, L3::new(pod4(1), remote4(0, 1)), (4789, 4789), &nested),
        frames::udp(gateway, L3::new(pod4(1), Ipv4Addr::new(10, 200, 0, 2)), (4789, 8472), &nested),
    ]
    .into_iter()
    .map(|bytes| Input::pod(1, bytes))
    .collect::<Vec<_>>();
    tricks.push(Input::node(0, &nested));
    for (l3, kind, start) in
        [(L3::new(pod4(1), pod4(2)), GsoKind::Tcp4, 34), (L3::new(pod6(1), remote6(0, 1)), GsoKind::Tcp6, 54)]
    {
        let bytes = frames::tcp(gateway, l3, (5001, 5201), 1, &[0x77; 9000]);
        let gso = Some(Gso { kind, ecn: false, size: 1398, header_len: start + 20 });
        let offload = Offload { partial: Some(Partial { start, offset: 16 }), gso, verified: false };
        tricks.push(Input { offload, head: SHORT_HEAD, ..Input::pod(1, bytes) });
    }
    tricks
}
