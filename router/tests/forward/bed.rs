//! A node without devices: frames in, frames out, and every counter.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use weft_encap::arp::Arp;
use weft_encap::eth::{ETHERTYPE_ARP, EthHeader};
use weft_encap::mac::Mac;
use weft_encap::ndp::NeighborMessage;
use weft_encap::vxlan::{Vni, VxlanHeader};
use weft_encap::zerocopy::IntoBytes;
use weft_router::forward::Forwarder;
use weft_router::frame::{Frame, Outer};
use weft_router::pace::Limits;
use weft_router::pool::Pool;
use weft_router::port::{Outbox, PortId};
use weft_router::tables::{Dhcp, Gateway, Mode, Node, NodeId, Pod, Tables, Via};
use weft_router::{DropReason, Instant, RouterConfig};

pub const UNDERLAY: PortId = PortId(0);
pub const GATEWAY: Mac = Mac([2, 0, 0, 0, 0, 1]);
pub const VTEP: Mac = Mac([2, 0xee, 0, 0, 0, 1]);
pub const PEER_VTEP: Mac = Mac([2, 0xee, 0, 0, 0, 2]);
pub const PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 200, 0, 2));
pub const REMOTE: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 9);
pub const REMOTE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x244, 2, 0, 0, 0, 9);
pub const REMOTE_MAC: Mac = Mac([2, 0xbb, 0, 0, 0, 9]);

pub fn pod_mac(number: u8) -> Mac {
    Mac([2, 0xaa, 0, 0, 0, number])
}

pub fn pod_v4(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, 1, number + 1)
}

pub fn pod_v6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, u16::from(number) + 1)
}

pub struct Bed {
    pub forwarder: Forwarder,
    pub tables: Tables,
    pub pool: Pool,
    pub out: Outbox,
    pub now: Instant,
}

impl Bed {
    /// Pods 1 to `pods` on ports of the same number, the underlay on port 0, one other node.
    pub fn new(mode: Mode, pods: u8) -> Bed {
        let v4 = if mode == Mode::Routed { Ipv4Addr::new(10, 244, 1, 1) } else { Ipv4Addr::new(10, 244, 0, 1) };
        let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x244, if mode == Mode::Routed { 1 } else { 0 }, 0, 0, 0, 1);
        let mut tables = Tables::empty(Gateway { mac: GATEWAY, ipv4: Some(v4), ipv6: Some(v6) });
        tables.epoch = 1;
        tables.mode = mode;
        tables.vtep_mac = VTEP;
        tables.add_underlay(UNDERLAY);
        for number in 1..=pods {
            let pod = Pod {
                mac: pod_mac(number),
                ipv4: vec![pod_v4(number)],
                ipv6: vec![pod_v6(number)],
                mtu: 1450,
                limits: Limits::default(),
                dhcp: Dhcp::default(),
            };
            tables.add_pod(PortId(number.into()), pod);
        }
        for range in ["10.244.1.0/24", "fd00:10:244:1::/64"] {
            tables.add_route(range.parse().unwrap(), Via::Local);
        }
        let ranges = ["10.244.2.0/24", "fd00:10:244:2::/64"].map(|range| range.parse().unwrap()).to_vec();
        tables.add_node(NodeId(0), Node::new(PEER, PEER_VTEP, ranges));
        let forwarder = Forwarder::new(&RouterConfig::default());
        let now = Instant(1_000_000_000_000);
        Bed { forwarder, tables, pool: Pool::new(512, 64).unwrap(), out: Outbox::new(), now }
    }

    pub fn give(&mut self, frame: Frame) -> Vec<(PortId, Frame)> {
        self.forwarder.stats().received(&frame);
        self.forwarder.forward(frame, &self.tables, self.now, &self.pool, &mut self.out);
        let mut frames = Vec::new();
        while let Some(port) = self.out.touched() {
            while let Some(frame) = self.out.queue(port).pop_front() {
                frames.push((port, frame));
            }
        }
        frames.sort_by_key(|(port, _)| *port);
        frames
    }

    /// A pod sends bytes; what leaves is counted as sent.
    pub fn pod_sends(&mut self, port: u16, bytes: &[u8]) -> Vec<(u16, Vec<u8>)> {
        let frame = Frame::from_bytes(bytes, PortId(port), &self.pool).unwrap();
        self.pass(frame)
    }

    pub fn pass(&mut self, frame: Frame) -> Vec<(u16, Vec<u8>)> {
        let frames = self.give(frame);
        frames
            .into_iter()
            .map(|(port, frame)| {
                let bytes = frame.to_vec();
                self.forwarder.stats().sent(frame, port, 1);
                (port.0, bytes)
            })
            .collect()
    }

    pub fn node_sends(&mut self, peer: IpAddr, vni: u32, inner: &[u8]) -> Vec<(u16, Vec<u8>)> {
        let mut bytes = VxlanHeader::new(Vni::new(vni).unwrap()).as_bytes().to_vec();
        bytes.extend_from_slice(inner);
        self.underlay_brings(peer, &bytes)
    }

    pub fn underlay_brings(&mut self, peer: IpAddr, bytes: &[u8]) -> Vec<(u16, Vec<u8>)> {
        let mut frame = Frame::from_bytes(bytes, UNDERLAY, &self.pool).unwrap();
        frame.outer = Some(Outer::vxlan(peer));
        self.pass(frame)
    }

    pub fn dropped(&mut self, port: u16, reason: DropReason) -> u64 {
        self.forwarder.stats().of(PortId(port)).dropped[reason as usize]
    }

    /// Only this reason was counted on this port, `count` times, and no frame is missing anywhere.
    pub fn assert_only(&mut self, port: u16, reason: DropReason, count: u64) {
        let stats = self.forwarder.stats().of(PortId(port));
        for other in DropReason::ALL {
            let expected = if *other == reason { count } else { 0 };
            assert_eq!(stats.dropped[*other as usize], expected, "{}", other.name());
        }
        self.assert_conserved();
    }

    pub fn assert_conserved(&mut self) {
        for port in 0..16 {
            assert_eq!(self.forwarder.stats().of(PortId(port)).in_flight(), 0, "port {port}");
        }
        assert_eq!(self.pool.free(), (512, 64), "buffers leaked");
    }
}

pub fn udp4(src: Mac, dst: Mac, from: Ipv4Addr, to: Ipv4Addr, ttl: u8, payload: usize) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(src.0, dst.0).ipv4(from.octets(), to.octets(), ttl).udp(1111, 2222);
    let mut bytes = Vec::new();
    builder.write(&mut bytes, &vec![0x5a; payload]).unwrap();
    bytes
}

pub fn udp6(src: Mac, dst: Mac, from: Ipv6Addr, to: Ipv6Addr, ttl: u8, payload: usize) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(src.0, dst.0).ipv6(from.octets(), to.octets(), ttl).udp(1111, 2222);
    let mut bytes = Vec::new();
    builder.write(&mut bytes, &vec![0x5a; payload]).unwrap();
    bytes
}

pub fn arp_request(src: Mac, spa: Ipv4Addr, tpa: Ipv4Addr) -> Vec<u8> {
    let mut bytes = EthHeader::new(Mac::BROADCAST, src, ETHERTYPE_ARP).as_bytes().to_vec();
    bytes.extend_from_slice(Arp::request(src, spa, tpa).as_bytes());
    bytes
}

pub fn solicitation(src: Mac, from: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
    icmp6(
        src,
        Mac([0x33, 0x33, 0xff, 0, 0, 1]),
        from,
        "ff02::1:ff00:1".parse().unwrap(),
        &NeighborMessage::solicitation(target, src),
    )
}

pub fn advertisement(src: Mac, from: Ipv6Addr, target: Ipv6Addr, mac: Mac) -> Vec<u8> {
    icmp6(
        src,
        Mac([0x33, 0x33, 0, 0, 0, 1]),
        from,
        "ff02::1".parse().unwrap(),
        &NeighborMessage::advertisement(0x20, target, mac),
    )
}

pub fn icmp6(src: Mac, dst: Mac, from: Ipv6Addr, to: Ipv6Addr, message: &NeighborMessage) -> Vec<u8> {
    let mut message = *message;
    let mut sum = weft_encap::checksum::pseudo_v6(from, to, 58, 32);
    message.neighbor.icmp.checksum.set(sum.add(message.as_bytes()).finish());
    let mut bytes = EthHeader::new(dst, src, 0x86dd).as_bytes().to_vec();
    bytes.extend_from_slice(weft_encap::ipv6::Ipv6Header::new(from, to, 58, 255, 32).as_bytes());
    bytes.extend_from_slice(message.as_bytes());
    bytes
}

/// Everything in these bytes is in order: lengths, IPv4 header checksum, transport checksum.
pub fn assert_sound(bytes: &[u8]) {
    let packet = SlicedPacket::from_ethernet(bytes).unwrap();
    match packet.net.unwrap() {
        NetSlice::Ipv4(ip) => {
            assert_eq!(ip.header().to_header().calc_header_checksum(), ip.header().header_checksum());
            match packet.transport {
                Some(TransportSlice::Icmpv4(icmp)) => {
                    assert_eq!(icmp.icmp_type().calc_checksum(icmp.payload()), icmp.checksum());
                }
                Some(TransportSlice::Udp(udp)) => {
                    let expected = udp.to_header().calc_checksum_ipv4(&ip.header().to_header(), udp.payload()).unwrap();
                    assert_eq!(udp.checksum(), expected);
                }
                _ => {}
            }
        }
        NetSlice::Ipv6(ip) => {
            if let Some(TransportSlice::Icmpv6(icmp)) = packet.transport {
                let header = ip.header().to_header();
                let sum = icmp.icmp_type().calc_checksum(header.source, header.destination, icmp.payload()).unwrap();
                assert_eq!(sum, icmp.checksum());
            }
        }
        NetSlice::Arp(_) => {}
    }
}
