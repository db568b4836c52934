//! Segments that come one by one, gathered into superframes: whatever is gathered, the far end gets what was sent.
//!
//! [`packets`] makes vectors of packets from any bytes: several streams side by side, sizes, flags, checksums right, wrong and still to be
//! filled in, losses, repetitions, headers that change on the way. [`check`] gathers a vector and compares: each superframe is
//! cut again, by the same code that cuts it for a device, and what comes out has to be, stream by stream, what went in. The streams are told
//! apart and the checksums filled in by code of this module's own.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;

use weft_encap::offload::{Offload, Partial};
use weft_encap::tcp::CHECKSUM_OFFSET;
use weft_router::PortId;
use weft_router::frame::{Frame, Outer};
use weft_router::gather::gather;
use weft_router::pool::Pool;
use weft_router::port::memory::{MemoryPort, Packet};
use weft_router::port::{BATCH, Batch, Capabilities, Port, Queue};
use weft_router::stats::Stats;

use crate::frames::{self, L2, L3, fix_ipv4_checksum, internet_checksum};
use crate::memory::{GATEWAY, VTEP, node_underlay, node_vtep, pod_mac, pod4, pod6, remote4, remote6};

/// Length of our tunnel header.
const TUNNEL: usize = 8;
/// Length of an Ethernet header.
const ETH: usize = 14;
/// How many streams run side by side: more than can be merged at once.
const STREAMS: usize = 8;
/// How many bytes describe one packet.
pub const RECORD: usize = 8;
const INGRESS: PortId = PortId(1);

/// Which stream of which sender a packet belongs to; `None` where that cannot be told.
pub type Stream = (Option<(IpAddr, u16, u8)>, Vec<u8>);

/// One stream in the making.
#[derive(Copy, Clone)]
struct Source {
    seq: u32,
    id: u16,
}

/// A vector of packets from one pod, or from other nodes. The first byte says which; each packet is described by [`RECORD`] more:
/// 0: stream (bits 0..2), checksum still to be filled in (3), exchanged with the one before (4), UDP (5), damaged behind the checksum's back (6), a
/// header changed (7); 1, 2: its size; 3: where in the stream it is; 4: TCP's flags; 5: whether those are used, and padding; 6, 7: where and how it is
/// damaged or changed.
pub fn packets(bytes: &[u8]) -> Vec<Packet> {
    let Some((first, rest)) = bytes.split_first() else { return Vec::new() };
    let from_nodes = first & 1 != 0;
    let mut sources = [0u32; STREAMS].map(|_| Source { seq: u32::MAX - 20_000, id: 0xfff0 });
    let mut all: Vec<Packet> = Vec::new();
    for record in rest.as_chunks::<RECORD>().0.iter().take(BATCH) {
        let stream = usize::from(record[0] & 7);
        let mut packet = packet(record, stream, &mut sources[stream], from_nodes);
        if from_nodes {
            packet.bytes.splice(..0, frames::vxlan(1));
            packet.outer = Some(Outer::vxlan(node_underlay(stream as u16 >> 1 & 1)));
        }
        all.push(packet);
        let len = all.len();
        if record[0] & 16 != 0 && len > 1 {
            all.swap(len - 2, len - 1);
        }
    }
    all
}

fn packet(record: &[u8; RECORD], stream: usize, source: &mut Source, from_nodes: bool) -> Packet {
    let [kind, high, low, place, flags, more, at, value] = *record;
    let size = if high < 40 { usize::from(low) * 5 } else { 600 + 90 * stream };
    match place {
        0..8 => source.seq = source.seq.wrapping_sub(700),
        8..16 => source.seq = source.seq.wrapping_add(700),
        16..20 => source.id = source.id.wrapping_add(1),
        _ => {}
    }
    let payload: Vec<u8> = (0..size).map(|index| source.seq.wrapping_add(index as u32) as u8).collect();
    let (l2, l3) = ends(stream, from_nodes);
    let ports = (1000 + stream as u16, 80);
    let mut bytes = match kind & 32 != 0 && place < 128 {
        true => frames::udp(l2, l3, ports, &payload),
        false => frames::tcp(l2, l3, ports, source.seq, &payload),
    };
    let (v4, partial) = (l3.src.is_ipv4(), kind & 8 != 0 && !from_nodes);
    if v4 {
        bytes[18..20].copy_from_slice(&source.id.to_be_bytes());
    }
    let l4 = if v4 { ETH + 20 } else { ETH + 40 };
    let is_tcp = bytes[if v4 { 23 } else { 20 }] == 6;
    if is_tcp && more < 32 {
        bytes[l4 + 13] |= flags;
    }
    if kind & 128 != 0 && place < 160 {
        // Behind the MACs and ethertype, so that it is still a packet between these two.
        let at = ETH + usize::from(at) % (bytes.len().min(l4 + 20) - ETH);
        // A sum that is still to be filled in would be one over what lies behind a packet that says it is shorter.
        if !partial || !(16..20).contains(&at) {
            bytes[at] ^= value;
        }
    }
    source.seq = source.seq.wrapping_add(size as u32);
    source.id = source.id.wrapping_add(u16::from(stream & 4 == 0));
    fix_ipv4_checksum(&mut bytes);
    let offload = finish(&mut bytes, l4, is_tcp, partial);
    if kind & 64 != 0 && place < 160 && !partial {
        let at = ETH + usize::from(at) * 3 % (bytes.len() - ETH);
        bytes[at] ^= value;
    }
    if more > 224 && !partial {
        bytes.extend_from_slice(&[value; 6]);
    }
    Packet { bytes, offload, outer: None }
}

/// Puts the transport's checksum in, or half of it.
fn finish(bytes: &mut [u8], l4: usize, is_tcp: bool, partial: bool) -> Offload {
    let offset = if is_tcp { CHECKSUM_OFFSET } else { 6 };
    let (network, transport) = bytes.split_at_mut(l4);
    let len = (transport.len() as u32).to_be_bytes();
    let addresses = if l4 == ETH + 20 { &network[ETH + 12..] } else { &network[ETH + 8..] };
    let protocol = if is_tcp { 6 } else { 17 };
    let pseudo = [addresses, &len, &[0, 0, 0, protocol]].concat();
    let field = offset..offset + 2;
    transport[field.clone()].fill(0);
    let sum = match partial {
        true => !internet_checksum(&pseudo),
        false => internet_checksum(&[&pseudo[..], transport].concat()),
    };
    transport[field].copy_from_slice(&sum.to_be_bytes());
    let partial = partial.then_some(Partial { start: l4 as u16, offset: offset as u16 });
    Offload { partial, ..Offload::default() }
}

/// Between whom a stream runs, so that the tables of [`crate::memory::tables`] let it pass.
fn ends(stream: usize, from_nodes: bool) -> (L2, L3) {
    let (v6, node, pod) = (stream & 1 != 0, stream as u16 >> 1 & 1, 2 + (stream as u16 >> 2));
    let (src, src_mac): (IpAddr, _) = match (from_nodes, v6) {
        (true, false) => (remote4(node, 1).into(), node_vtep(node)),
        (true, true) => (remote6(node, 1).into(), node_vtep(node)),
        (false, false) => (pod4(1).into(), pod_mac(1)),
        (false, true) => (pod6(1).into(), pod_mac(1)),
    };
    let remote = !from_nodes && stream & 2 != 0;
    let (dst, dst_mac): (IpAddr, _) = match (remote, v6) {
        (true, false) => (remote4(node, 1).into(), GATEWAY),
        (true, true) => (remote6(node, 1).into(), GATEWAY),
        (false, false) => (pod4(pod).into(), if from_nodes { VTEP } else { pod_mac(pod) }),
        (false, true) => (pod6(pod).into(), if from_nodes { VTEP } else { pod_mac(pod) }),
    };
    (L2 { src: src_mac, dst: dst_mac }, L3::new(src, dst))
}

/// Gathers what lies in one vector, and returns how many packets became part of another. Panics unless what then leaves is, cut again, for
/// each stream what came, in its order; what cannot be told to be of a stream has kept its place among all.
pub fn check(packets: &[Packet]) -> u64 {
    const BUFFERS: (u32, u32) = (3 * BATCH as u32, 8);
    let pool = Pool::new(BUFFERS.0, BUFFERS.1).expect("there is memory for a small pool");
    let (mut batch, mut stats, mut came) = (Batch::new(), Stats::default(), Vec::new());
    for packet in packets.iter().take(BATCH) {
        let Some(mut frame) = Frame::from_bytes(&packet.bytes, INGRESS, &pool) else { continue };
        (frame.offload, frame.outer) = (packet.offload, packet.outer);
        batch.push(frame);
        came.push(packet);
    }
    gather(&mut batch, &pool, &mut stats);
    let merged = stats.of(INGRESS).merged;
    assert_eq!(batch.len() as u64 + merged, came.len() as u64, "packets are left over or missing");
    Comparison::new(&came).all(&batch);
    drop(batch);
    assert_eq!(pool.free(), (BUFFERS.0 as usize, BUFFERS.1 as usize), "a buffer is lost");
    merged
}

/// What has come and not left yet.
struct Comparison<'a> {
    waiting: BTreeMap<Option<Stream>, VecDeque<(usize, &'a Packet)>>,
    left: usize,
}

impl<'a> Comparison<'a> {
    fn new(came: &[&'a Packet]) -> Comparison<'a> {
        let mut waiting: BTreeMap<_, VecDeque<_>> = BTreeMap::new();
        for (place, packet) in came.iter().enumerate() {
            waiting.entry(stream(packet)).or_default().push_back((place, *packet));
        }
        Comparison { waiting, left: 0 }
    }

    fn all(&mut self, batch: &Batch) {
        let pool = Pool::new(8, 8).expect("there is memory for a small pool");
        for frame in batch.iter() {
            let packet = Packet { bytes: frame.to_vec(), offload: frame.offload, outer: frame.outer };
            // What nobody touched is as it came, wrong checksums and odd offloads included.
            if self.next(&packet).is_some_and(|(_, came)| **came == packet) {
                self.leave(&packet);
                continue;
            }
            let segments = cut(&packet, &pool);
            assert!(segments.len() > 1, "changed, but no superframe: {packet:02x?}");
            for segment in &segments {
                let (_, came) = self.next(segment).unwrap_or_else(|| panic!("nobody sent {segment:02x?}"));
                assert_same(segment, &finished(came));
                self.leave(segment);
            }
        }
        assert!(self.waiting.values().all(VecDeque::is_empty), "lost: {:02x?}", self.waiting);
    }

    fn next(&self, packet: &Packet) -> Option<&(usize, &'a Packet)> {
        self.waiting.get(&stream(packet))?.front()
    }

    fn leave(&mut self, packet: &Packet) {
        let key = stream(packet);
        let (place, _) = self.waiting.get_mut(&key).and_then(VecDeque::pop_front).expect("it was looked at");
        // Nothing may pass it, and it passes nothing: it could be of any stream.
        assert!(key.is_some() || place == self.left, "{packet:02x?} came as number {place} and left as {}", self.left);
        self.left += 1;
    }
}

/// A packet as a device sends it that can do nothing by itself: cut, its checksums filled in.
pub fn cut(packet: &Packet, pool: &Pool) -> Vec<Packet> {
    let mut frame = Frame::from_bytes(&packet.bytes, INGRESS, pool).expect("there are free buffers");
    (frame.offload, frame.outer) = (packet.offload, packet.outer);
    let mut port = MemoryPort::new(PortId(99)).with_capabilities(Capabilities::default());
    port.transmit(&mut Queue::from([frame]), &mut Stats::default()).expect("memory does not break");
    port.outbox().take().into()
}

/// The packet with its checksum filled in and without padding, as a segment has to be that was cut from a superframe. Where half a sum
/// was there, it is made anew: nobody has said that it was right.
fn finished(packet: &Packet) -> Packet {
    let (mut bytes, base) = (packet.bytes.clone(), base(packet));
    let total = match bytes[base + 12..base + 14] {
        [0x08, 0x00] => usize::from(u16::from_be_bytes([bytes[base + 16], bytes[base + 17]])),
        _ => 40 + usize::from(u16::from_be_bytes([bytes[base + 18], bytes[base + 19]])),
    };
    bytes.truncate(base + ETH + total);
    if let Some(partial) = packet.offload.partial {
        finish(&mut bytes[base..], partial.start.into(), usize::from(partial.offset) == CHECKSUM_OFFSET, false);
    }
    Packet { bytes, offload: Offload::default(), outer: packet.outer }
}

/// Panics unless a segment is what was sent, but for the identification of what may not be fragmented (RFC 6864, section 4.1).
#[track_caller]
pub fn assert_same(segment: &Packet, sent: &Packet) {
    let (mut bytes, base) = (sent.bytes.clone(), base(sent));
    let may_differ = bytes.get(base + 12..base + 14) == Some(&[0x08, 0x00]) && bytes[base + 20] & 0x40 != 0;
    if may_differ && segment.bytes.len() == bytes.len() {
        bytes[base + 18..base + 20].copy_from_slice(&segment.bytes[base + 18..base + 20]);
        fix_ipv4_checksum(&mut bytes[base..]);
    }
    let expected = Packet { bytes, ..sent.clone() };
    assert!(*segment == expected || segment == sent, "left as\n{segment:02x?}\ncame as\n{sent:02x?}");
}

/// Where the Ethernet header is.
fn base(packet: &Packet) -> usize {
    if packet.outer.is_some() { TUNNEL } else { 0 }
}

/// The stream of a packet: sender, tunnel header, protocol, addresses and ports.
pub fn stream(packet: &Packet) -> Option<Stream> {
    let frame = packet.bytes.get(base(packet)..)?;
    let (protocol, ends) = match frame.get(12..15)? {
        [0x08, 0x00, 0x45] => (*frame.get(23)?, frame.get(26..38)?),
        [0x86, 0xdd, _] => (*frame.get(20)?, frame.get(22..58)?),
        _ => return None,
    };
    let outer = packet.outer.map(|outer| (outer.peer, outer.entropy, outer.tos));
    matches!(protocol, 6 | 17).then(|| (outer, [&[protocol], ends].concat()))
}
