//! What must not come in: spoofed, malformed, hidden.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::PacketBuilder;
use weft_encap::eth::EthHeader;
use weft_encap::mac::Mac;
use weft_encap::vxlan::{Vni, VxlanHeader};
use weft_encap::zerocopy::IntoBytes;
use weft_router::DropReason;
use weft_router::port::PortId;
use weft_router::tables::{Dhcp, Mode, Role};

use crate::bed::*;

#[test]
fn nothing_comes_out_of_the_tunnel_that_does_not_belong_there() {
    let good = udp4(PEER_VTEP, VTEP, REMOTE, pod_v4(1), 63, 10);
    let stranger = "10.200.0.77".parse().unwrap();
    let cases: [(IpAddr, u32, Vec<u8>, DropReason); 7] = [
        (stranger, 1, good.clone(), DropReason::NotMember),
        (PEER, 2, good.clone(), DropReason::WrongVni),
        (PEER, 1, udp4(PEER_VTEP, VTEP, "10.244.3.9".parse().unwrap(), pod_v4(1), 63, 10), DropReason::TunnelSource),
        (PEER, 1, udp4(PEER_VTEP, VTEP, pod_v4(2), pod_v4(1), 63, 10), DropReason::TunnelSource),
        (PEER, 1, udp4(PEER_VTEP, VTEP, REMOTE, "10.244.2.10".parse().unwrap(), 63, 10), DropReason::NotForUs),
        (PEER, 1, arp_request(PEER_VTEP, REMOTE, pod_v4(1)), DropReason::UnsupportedType),
        (
            PEER,
            1,
            udp4(PEER_VTEP, Mac::BROADCAST, REMOTE, "255.255.255.255".parse().unwrap(), 63, 10),
            DropReason::UnsupportedType,
        ),
    ];
    for (peer, vni, inner, reason) in cases {
        let mut bed = Bed::new(Mode::Routed, 2);
        assert_eq!(bed.node_sends(peer, vni, &inner), [], "{reason:?}");
        bed.assert_only(0, reason, 1);
        assert_eq!(bed.forwarder.fdb(), []);
    }
}

#[test]
fn each_reserved_bit_of_the_tunnel_header_is_refused() {
    let inner = udp4(PEER_VTEP, VTEP, REMOTE, pod_v4(1), 63, 10);
    for bit in 0..64 {
        let is_vni = (32..56).contains(&bit);
        if is_vni {
            continue;
        }
        let mut bed = Bed::new(Mode::Routed, 1);
        let mut bytes = VxlanHeader::new(Vni::new(1).unwrap()).as_bytes().to_vec();
        bytes[bit / 8] ^= 0x80 >> (bit % 8);
        bytes.extend_from_slice(&inner);
        assert_eq!(bed.underlay_brings(PEER, &bytes), [], "bit {bit}");
        bed.assert_only(0, DropReason::TunnelHeader, 1);
    }
}

#[test]
fn a_pod_speaks_for_nobody_else() {
    let other = pod_v4(2);
    let (m1, m2) = (pod_mac(1), pod_mac(2));
    let dhcp_offer = |mac: Mac| {
        let builder = PacketBuilder::ethernet2(mac.0, [0xff; 6]).ipv4(pod_v4(1).octets(), [255; 4], 64).udp(67, 68);
        let mut bytes = Vec::new();
        builder.write(&mut bytes, &[0; 240]).unwrap();
        bytes
    };
    let mut router_advertisement = advertisement(m1, m1.link_local(), m1.link_local(), m1);
    router_advertisement[54] = 134;
    let mut lying_arp = arp_request(m1, pod_v4(1), "10.244.1.77".parse().unwrap());
    lying_arp[14 + 8..14 + 14].copy_from_slice(&m2.0);
    let cases = [
        (udp4(m2, GATEWAY, pod_v4(1), REMOTE, 64, 1), DropReason::SourceMac),
        (udp4(Mac([3, 0, 0, 0, 0, 1]), GATEWAY, pod_v4(1), REMOTE, 64, 1), DropReason::SourceMac),
        (udp4(m1, GATEWAY, other, REMOTE, 64, 1), DropReason::SourceIp),
        (udp4(m1, m2, Ipv4Addr::UNSPECIFIED, other, 64, 1), DropReason::SourceIp),
        (udp6(m1, GATEWAY, pod_v6(2), REMOTE6, 64, 1), DropReason::SourceIp),
        (udp6(m1, m2, m2.link_local(), m2.link_local(), 64, 1), DropReason::SourceIp),
        (udp6(m1, m2, GATEWAY.link_local(), "ff02::1".parse().unwrap(), 64, 1), DropReason::SourceIp),
        (udp6(m1, GATEWAY, "fe80::77".parse().unwrap(), REMOTE6, 64, 1), DropReason::SourceIp),
        (arp_request(m1, other, "10.244.1.77".parse().unwrap()), DropReason::ArpSpoof),
        (lying_arp, DropReason::ArpSpoof),
        (advertisement(m1, pod_v6(1), pod_v6(2), m1), DropReason::NdSpoof),
        (advertisement(m1, pod_v6(1), pod_v6(1), m2), DropReason::NdSpoof),
        (advertisement(m1, pod_v6(1), GATEWAY.link_local(), m1), DropReason::NdSpoof),
        (solicitation(m1, Ipv6Addr::UNSPECIFIED, m2.link_local()), DropReason::NdSpoof),
        (router_advertisement, DropReason::RouterMessage),
        (dhcp_offer(m1), DropReason::DhcpServer),
    ];
    for (bytes, reason) in cases {
        let mut bed = Bed::new(Mode::Bridged, 2);
        assert_eq!(bed.pod_sends(1, &bytes), [], "{reason:?}");
        bed.assert_only(1, reason, 1);
        assert_eq!(bed.forwarder.fdb(), []);
    }
}

/// What one pod says to everybody over UDP.
fn to_everybody(mac: Mac, from: Ipv4Addr, ports: (u16, u16)) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(mac.0, [0xff; 6]).ipv4(from.octets(), [255; 4], 64).udp(ports.0, ports.1);
    let mut bytes = Vec::new();
    builder.write(&mut bytes, &[0; 240]).unwrap();
    bytes
}

fn bed_with(port: u16, dhcp: Dhcp) -> Bed {
    let mut bed = Bed::new(Mode::Bridged, 2);
    let role = bed.tables.ports[usize::from(port)].as_mut().map(std::sync::Arc::make_mut);
    let Some(Role::Pod(pod)) = role else { panic!("there is such a pod") };
    pod.dhcp = dhcp;
    bed
}

#[test]
fn a_trusted_pod_may_answer_as_a_dhcp_server_and_still_not_lie() {
    let (m1, offer) = (pod_mac(1), to_everybody(pod_mac(1), pod_v4(1), (67, 68)));
    // The other pod, and the other node.
    assert_eq!(bed_with(1, Dhcp::Server).pod_sends(1, &offer).len(), 2);
    let lies = [
        (to_everybody(m1, pod_v4(2), (67, 68)), DropReason::SourceIp),
        (to_everybody(pod_mac(2), pod_v4(1), (67, 68)), DropReason::SourceMac),
    ];
    for (bytes, reason) in lies {
        let mut bed = bed_with(1, Dhcp::Server);
        assert_eq!(bed.pod_sends(1, &bytes), [], "{reason:?}");
        bed.assert_only(1, reason, 1);
    }
}

#[test]
fn a_pod_that_waits_for_its_address_asks_for_it_and_says_nothing_else() {
    let (m1, m2) = (pod_mac(1), pod_mac(2));
    let nobody = Ipv4Addr::UNSPECIFIED;
    assert_eq!(bed_with(1, Dhcp::Asking).pod_sends(1, &to_everybody(m1, nobody, (68, 67))).len(), 2);
    // Answers reach it, by its MAC or to everybody.
    assert_eq!(bed_with(1, Dhcp::Asking).pod_sends(2, &udp4(m2, m1, pod_v4(2), pod_v4(1), 64, 1)).len(), 1);
    let refused = [
        to_everybody(m1, nobody, (68, 68)),
        to_everybody(m1, nobody, (67, 67)),
        to_everybody(m1, pod_v4(1), (68, 67)),
        udp4(m1, GATEWAY, pod_v4(1), REMOTE, 64, 1),
        udp4(m1, m2, pod_v4(1), pod_v4(2), 64, 1),
        arp_request(m1, pod_v4(1), pod_v4(2)),
        arp_request(m1, nobody, pod_v4(1)),
        solicitation(m1, Ipv6Addr::UNSPECIFIED, m1.link_local()),
        udp6(m1, m2, m1.link_local(), m2.link_local(), 64, 1),
    ];
    for bytes in refused {
        let mut bed = bed_with(1, Dhcp::Asking);
        assert_eq!(bed.pod_sends(1, &bytes), [], "{bytes:02x?}");
        bed.assert_only(1, DropReason::AddressPending, 1);
    }
    let mut bed = bed_with(1, Dhcp::Asking);
    assert_eq!(bed.pod_sends(1, &to_everybody(m2, nobody, (68, 67))), []);
    bed.assert_only(1, DropReason::SourceMac, 1);
}

#[test]
fn frames_that_contradict_themselves_end_here_by_name() {
    let good = udp4(pod_mac(1), pod_mac(2), pod_v4(1), pod_v4(2), 64, 20);
    let edit = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    let mut tagged = good[..12].to_vec();
    tagged.extend_from_slice(&[0x81, 0, 0, 5]);
    tagged.extend_from_slice(&good[12..]);
    let cases = [
        (edit(14, 0x44), DropReason::Malformed),
        (edit(14, 0x65), DropReason::Malformed),
        (edit(14, 0x4f), DropReason::Malformed),
        (edit(17, 200), DropReason::TooShort),
        (edit(17, 10), DropReason::Malformed),
        (edit(24, good[24] ^ 1), DropReason::BadIpv4Checksum),
        (tagged.clone(), DropReason::VlanTag),
        (tagged[..14].to_vec(), DropReason::VlanTag),
    ];
    for (bytes, reason) in cases {
        let mut bed = Bed::new(Mode::Routed, 2);
        assert_eq!(bed.pod_sends(1, &bytes), []);
        bed.assert_only(1, reason, 1);
    }
    for cut in 0..good.len() {
        let mut bed = Bed::new(Mode::Routed, 2);
        assert_eq!(bed.pod_sends(1, &good[..cut]), [], "cut at {cut}");
        bed.assert_conserved();
        assert_eq!(bed.forwarder.stats().of(PortId(1)).dropped_total(), 1);
    }
}

/// The first fragment of an IPv6 packet whose fragmentable part is `rest` as far as it is there.
fn first_fragment(src: Mac, from: Ipv6Addr, next: u8, more: bool, rest: &[u8]) -> Vec<u8> {
    let mut bytes = EthHeader::new(Mac([0x33, 0x33, 0, 0, 0, 1]), src, 0x86dd).as_bytes().to_vec();
    let to = "ff02::1".parse().unwrap();
    bytes.extend_from_slice(weft_encap::ipv6::Ipv6Header::new(from, to, 44, 255, 8 + rest.len() as u16).as_bytes());
    bytes.extend_from_slice(&[next, 0, 0, u8::from(more), 0, 0, 0, 7]);
    bytes.extend_from_slice(rest);
    bytes
}

#[test]
fn nothing_hides_in_a_first_fragment() {
    let m1 = pod_mac(1);
    let lie = advertisement(m1, pod_v6(1), pod_v6(2), m1);
    let offer = [0x02, 0x23, 0x02, 0x22, 0, 100, 0, 0];
    let cases = [
        (first_fragment(m1, pod_v6(1), 58, true, &lie[54..]), DropReason::Malformed),
        (first_fragment(m1, pod_v6(1), 58, false, &lie[54..]), DropReason::Malformed),
        (first_fragment(m1, m1.link_local(), 58, true, &[]), DropReason::TooShort),
        (first_fragment(m1, m1.link_local(), 58, true, &[134, 0, 0, 0]), DropReason::TooShort),
        (first_fragment(m1, m1.link_local(), 17, true, &offer), DropReason::DhcpServer),
    ];
    for (bytes, reason) in cases {
        let mut bed = Bed::new(Mode::Bridged, 2);
        assert_eq!(bed.pod_sends(1, &bytes), []);
        bed.assert_only(1, reason, 1);
    }
}

#[test]
fn a_dhcp_offer_does_not_leave_a_pod_from_whichever_port() {
    for from in [67, 1067, 68] {
        for more_fragments in [false, true] {
            let mut header =
                etherparse::Ipv4Header::new(8, 64, etherparse::IpNumber::UDP, pod_v4(1).octets(), [255; 4]).unwrap();
            header.more_fragments = more_fragments;
            header.dont_fragment = false;
            header.header_checksum = header.calc_header_checksum();
            let mut bytes = EthHeader::new(Mac::BROADCAST, pod_mac(1), 0x0800).as_bytes().to_vec();
            header.write(&mut bytes).unwrap();
            let [high, low] = u16::to_be_bytes(from);
            bytes.extend_from_slice(&[high, low, 0, 68, 0, 8, 0, 0]);
            let mut bed = Bed::new(Mode::Bridged, 2);
            assert_eq!(bed.pod_sends(1, &bytes), []);
            bed.assert_only(1, DropReason::DhcpServer, 1);
        }
    }
}

#[test]
fn addresses_that_only_stand_for_ipv4_do_not_come_in() {
    let mut bed = Bed::new(Mode::Bridged, 1);
    let (from, to) = (Ipv4Addr::new(10, 244, 2, 5), pod_v4(1));
    bed.node_sends(PEER, 1, &udp4(REMOTE_MAC, VTEP, from, to, 64, 5));
    let mapped = udp6(REMOTE_MAC, VTEP, from.to_ipv6_mapped(), to.to_ipv6_mapped(), 64, 5);
    assert_eq!(bed.node_sends(PEER, 1, &mapped), []);
    assert_eq!(bed.dropped(0, DropReason::Malformed), 1);
}
