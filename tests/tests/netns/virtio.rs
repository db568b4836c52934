//! Virtio headers from a pod that lies: whatever they say, what arrives is what a plain reading of them makes of the frame, or nothing.
//!
//! The pod sends by a packet socket with virtio's header, which reaches the router as it is where the pod has a TAP. Where
//! it has a veth, its own kernel cuts and the router sees but the partial checksums that are left. What arrives is
//! read in the same plain way, so that it does not matter how much of the work was handed on.

use std::collections::BTreeMap;
use std::time::Duration;

use weft_tests::frames::{self, L2, L3, internet_checksum};
use weft_tests::lab::{Lab, Pod};
use weft_tests::machine::turn;
use weft_tests::random::Random;
use weft_tests::wire::Wire;

const CASES: u16 = 1500;
/// Sent together: fewer than any queue on the way holds.
const WINDOW: u16 = 50;
const FIRST_PORT: u16 = 2000;
const DISCARD: u16 = 9;

const NEEDS_CHECKSUM: u8 = 1;
const TCP4: u8 = 1;
const TCP6: u8 = 4;
const UDP: u8 = 5;
/// Datagrams cut into IP fragments: nobody makes them any more, and what fits one segment is none.
const FRAGMENTS: u8 = 3;
const ECN: u8 = 0x80;

/// `struct virtio_net_hdr`, in the machine's byte order.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
struct Header {
    flags: u8,
    kind: u8,
    header_len: u16,
    size: u16,
    start: u16,
    offset: u16,
}

const LEN: usize = 10;

impl Header {
    fn bytes(self) -> Vec<u8> {
        let numbers = [self.header_len, self.size, self.start, self.offset];
        [self.flags, self.kind].into_iter().chain(numbers.into_iter().flat_map(u16::to_ne_bytes)).collect()
    }

    fn read(bytes: &[u8]) -> Header {
        let number = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let (header_len, size, start, offset) = (number(2), number(4), number(6), number(8));
        Header { flags: bytes[0], kind: bytes[1], header_len, size, start, offset }
    }
}

/// Where things are in a frame without options.
struct Shape {
    is_v6: bool,
    is_tcp: bool,
    /// Where TCP's or UDP's header begins, and where the payload does.
    l4: usize,
    payload: usize,
}

impl Shape {
    fn of(frame: &[u8]) -> Option<Shape> {
        let is_v6 = match frame.get(12..14)? {
            [8, 0] => false,
            [0x86, 0xdd] => true,
            _ => return None,
        };
        let (l4, protocol) = if is_v6 { (54, *frame.get(20)?) } else { (34, *frame.get(23)?) };
        let is_tcp = protocol == 6;
        let payload = l4 + if is_tcp { 20 } else { 8 };
        ((is_tcp || protocol == 17) && frame.len() >= payload).then_some(Shape { is_v6, is_tcp, l4, payload })
    }

    fn checksum(&self) -> usize {
        self.l4 + if self.is_tcp { 16 } else { 6 }
    }

    /// The sum of the pseudo-header of a frame, folded and not complemented.
    fn pseudo_sum(&self, frame: &[u8]) -> u16 {
        let addresses = if self.is_v6 { &frame[22..54] } else { &frame[26..34] };
        let len = (frame.len() - self.l4) as u32;
        let protocol = if self.is_tcp { 6 } else { 17 };
        !internet_checksum(&[addresses, &len.to_be_bytes(), &[0, 0, 0, protocol]].concat())
    }
}

/// What a frame and its header stand for, read without any haste. `None`: nothing.
fn meant(header: Header, frame: &[u8]) -> Option<Vec<Vec<u8>>> {
    if header.kind == 0 {
        let mut frame = frame.to_vec();
        if header.flags & NEEDS_CHECKSUM != 0 {
            fill(&mut frame, header.start.into(), usize::from(header.start) + usize::from(header.offset))?;
        }
        return Some(vec![frame]);
    }
    let shape = Shape::of(frame)?;
    let known = [TCP4, TCP6, UDP, FRAGMENTS].contains(&(header.kind & !ECN));
    if known && header.size > 0 && frame.len() - shape.payload <= header.size.into() {
        // Linux: "Too small packets are not really GSO ones."
        return meant(Header { kind: 0, ..header }, frame);
    }
    let right = match header.kind & !ECN {
        TCP4 => shape.is_tcp && !shape.is_v6,
        TCP6 => shape.is_tcp && shape.is_v6,
        UDP => !shape.is_tcp,
        _ => false,
    };
    if !right || header.size == 0 {
        return None;
    }
    let pieces: Vec<&[u8]> = frame[shape.payload..].chunks(header.size.into()).collect();
    let count = pieces.len();
    Some(
        pieces
            .into_iter()
            .enumerate()
            .map(|(index, piece)| segment(&shape, frame, piece, (index, count), header.size))
            .collect(),
    )
}

/// One of `count` segments.
fn segment(shape: &Shape, frame: &[u8], piece: &[u8], (index, count): (usize, usize), size: u16) -> Vec<u8> {
    let mut bytes = [&frame[..shape.payload], piece].concat();
    let (len, l4) = (bytes.len(), shape.l4);
    if shape.is_v6 {
        bytes[18..20].copy_from_slice(&((len - l4) as u16).to_be_bytes());
    } else {
        bytes[16..18].copy_from_slice(&((len - 14) as u16).to_be_bytes());
        let id = u16::from_be_bytes([frame[18], frame[19]]).wrapping_add(index as u16);
        bytes[18..20].copy_from_slice(&id.to_be_bytes());
        frames::fix_ipv4_checksum(&mut bytes);
    }
    if shape.is_tcp {
        let seq = u32::from_be_bytes(frame[l4 + 4..l4 + 8].try_into().unwrap());
        bytes[l4 + 4..l4 + 8].copy_from_slice(&seq.wrapping_add(index as u32 * u32::from(size)).to_be_bytes());
        if index + 1 < count {
            bytes[l4 + 13] &= !0x09;
        }
        if index > 0 {
            bytes[l4 + 13] &= !0x80;
        }
    } else {
        bytes[l4 + 4..l4 + 6].copy_from_slice(&((len - l4) as u16).to_be_bytes());
    }
    let sum = shape.pseudo_sum(&bytes);
    bytes[shape.checksum()..][..2].copy_from_slice(&sum.to_be_bytes());
    fill(&mut bytes, l4, shape.checksum()).expect("it lies in the header");
    bytes
}

/// Sums from `start` on, and writes the sum's complement; a zero as the other zero.
fn fill(frame: &mut [u8], start: usize, at: usize) -> Option<()> {
    if at < start || at + 2 > frame.len() {
        return None;
    }
    let sum = internet_checksum(&frame[start..]);
    frame[at..at + 2].copy_from_slice(&if sum == 0 { 0xffff } else { sum }.to_be_bytes());
    Some(())
}

/// A frame with the header that its kernel would give it.
fn honest(random: &mut Random, from: &Pod, to: &Pod, case: u16) -> (Header, Vec<u8>) {
    let l2 = L2 { src: from.mac(), dst: to.mac() };
    let l3 = if random.once_in(2) { L3::new(from.ipv4, to.ipv4) } else { L3::new(from.ipv6, to.ipv6) };
    let is_tcp = random.once_in(2);
    let is_long = random.once_in(2);
    let payload = random.bytes(1 + random.clone().below(if is_long { 12_000 } else { 1_300 }));
    let ports = (FIRST_PORT + case, DISCARD);
    let mut frame = match is_tcp {
        true => frames::tcp(l2, l3, ports, random.number() as u32, &payload),
        false => frames::udp(l2, l3, ports, &payload),
    };
    let shape = Shape::of(&frame).expect("it is plain");
    let sum = shape.pseudo_sum(&frame);
    frame[shape.checksum()..][..2].copy_from_slice(&sum.to_be_bytes());
    let kind = match (is_long, is_tcp, shape.is_v6) {
        (false, _, _) => 0,
        (true, true, false) => TCP4,
        (true, true, true) => TCP6,
        (true, false, _) => UDP,
    };
    // A UDP superframe has at most 128 segments (UDP_MAX_SEGMENTS).
    let size = if kind == 0 { 0 } else { 100 + random.below(1_288) as u16 };
    let header = Header {
        flags: NEEDS_CHECKSUM,
        kind,
        header_len: if kind == 0 { 0 } else { shape.payload as u16 },
        size,
        start: shape.l4 as u16,
        offset: (shape.checksum() - shape.l4) as u16,
    };
    (header, frame)
}

/// Changes some of what a header says.
fn lie(random: &mut Random, header: Header, len: usize) -> Header {
    let mut lie = header;
    for _ in 0..1 + random.below(3) {
        let near = |number: u16, random: &mut Random| match random.below(6) {
            0 => 0,
            1 => number.wrapping_add(1),
            2 => number.wrapping_sub(1),
            3 => len as u16,
            4 => random.below(64) as u16,
            _ => random.number() as u16,
        };
        match random.below(6) {
            0 => lie.flags = random.pick(&[0, 1, 2, 3, 4, 5, 0xff]),
            1 => {
                lie.kind =
                    random.pick(&[0, TCP4, FRAGMENTS, TCP6, UDP, TCP4 | ECN, TCP6 | ECN, UDP | ECN, 2, 0x7f, 0xff])
            }
            2 => lie.header_len = near(header.header_len, random),
            3 => lie.size = near(header.size, random),
            4 => lie.start = near(header.start, random),
            _ => lie.offset = near(header.offset, random),
        }
    }
    lie
}

/// What came from those ports, as it was meant, by case.
fn arrived(wire: &Wire, from: &Pod, by_case: &mut BTreeMap<u16, Vec<Vec<u8>>>) {
    for bytes in wire.collect(Duration::from_millis(120)) {
        let (header, frame) = bytes.split_at(LEN.min(bytes.len()));
        let Some(shape) = Shape::of(frame).filter(|_| frame[6..12] == from.mac().0) else { continue };
        let port = u16::from_be_bytes([frame[shape.l4], frame[shape.l4 + 1]]);
        let Some(case) = port.checked_sub(FIRST_PORT).filter(|case| *case < CASES) else { continue };
        let header = Header::read(header);
        let read = meant(header, frame).unwrap_or_else(|| panic!("case {case} arrived with {header:?}"));
        by_case.entry(case).or_default().extend(read);
    }
}

fn every_field(port: &str, seed: u64) {
    let _turn = turn();
    let lab = Lab::up("v", 1, 2, "bridged", &["--port", port]);
    let (from, to, daemon) = (lab.pod(1, 1), lab.pod(1, 2), lab.daemon(1));
    let wire = Wire::with_virtio_headers(&from.netns(), &from.ifname);
    let listener = Wire::with_virtio_headers(&to.netns(), &to.ifname);
    let mut random = Random::new(seed);
    let (mut cases, mut came, mut refused) = (Vec::new(), BTreeMap::new(), 0);
    for case in 0..CASES {
        let (truth, frame) = honest(&mut random, from, to, case);
        let header = if random.once_in(3) { truth } else { lie(&mut random, truth, frame.len()) };
        if !wire.offer(&[header.bytes(), frame.clone()].concat()) {
            assert_ne!(header, truth, "{port}, seed {seed}, case {case}: the kernel refuses the truth");
            refused += 1;
        }
        cases.push((header, header == truth, frame));
        if case % WINDOW == WINDOW - 1 {
            arrived(&listener, from, &mut came);
        }
    }
    let mut same = 0;
    for (case, (header, is_true, frame)) in cases.iter().enumerate() {
        let Some(read) = came.get(&(case as u16)) else {
            assert!(
                !is_true,
                "{port}, seed {seed}, case {case}: {header:?} is true, and nothing arrived: {:?}",
                daemon.all_drops()
            );
            continue;
        };
        // A pod's own kernel makes what it likes of a lie before it comes to a veth, and cuts what is to be fragments itself.
        if *is_true || port == "tap" && header.kind & !ECN != FRAGMENTS {
            let meant = meant(*header, frame);
            assert!(
                meant.as_ref() == Some(read),
                "{port}, seed {seed}, case {case}: {header:?} of {} bytes became {} frames",
                frame.len(),
                read.len()
            );
            same += 1;
        }
    }
    println!("{port}: of {CASES} {refused} were refused by the kernel, {same} arrived as they were meant");
    assert!(same > usize::from(CASES) / 4 && came.len() < CASES.into(), "{same} of {}", came.len());
    let drops = daemon.all_drops();
    assert_eq!(drops.get("RouterFault"), None, "{drops:?}");
    if port == "tap" {
        assert!(drops.get("BadOffload").is_some_and(|count| *count > 0), "{drops:?}");
    }
    to.netns().exec(&format!("ping -n -c 1 -W 2 {}", from.ipv4)).must();
    lab.assert_conserved();
}

#[test]
fn whatever_a_tap_pods_virtio_header_says_what_arrives_is_what_it_means() {
    every_field("tap", 1);
}

#[test]
fn whatever_an_xdp_pods_virtio_header_says_the_truth_arrives_and_lies_harm_nobody() {
    every_field("xdp", 2);
}
