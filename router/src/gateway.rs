//! The router's own stack: what happens to a packet that is addressed to the gateway.
//!
//! Pings are answered, whole or in fragments; a datagram to a closed port gets its ICMP error, a connection attempt its reset. All of
//! this is smoltcp's, which sees bare IP packets and knows neither Ethernet nor ARP (those are [`crate::neigh`]'s). It is
//! off the fast path: bytes are copied in and out of buffers that are kept.

use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::phy::{self, ChecksumCapabilities, DeviceCapabilities, Medium, TxToken};
use smoltcp::time::Instant as SmolInstant;
use smoltcp::wire::{HardwareAddress, IpCidr};
use weft_encap::icmp::{ICMP_LEN, IcmpHeader, v6};
use weft_encap::ipv6::{Fragment, FragmentHeader, IPV6_LEN, Ipv6Header};
use weft_encap::zerocopy::{FromBytes, IntoBytes};
use weft_encap::{checksum, ip};

use crate::drop_reason::DropReason;
use crate::frame::{Body, Frame};
use crate::packet::L3;
use crate::tables::Gateway;
use crate::time::Instant;

/// Most packets that one packet may cause; a reply to the largest ping has this many fragments at an MTU of 576.
pub const REPLIES: usize = 128;

/// The stack.
pub struct Stack {
    interface: Interface,
    sockets: SocketSet<'static>,
    wire: Wire,
    seed: u64,
    /// The addresses and the MTU that the interface was made for.
    made_for: Option<(Gateway, u32)>,
}

impl Stack {
    /// A stack without addresses; it gets them from the tables.
    pub fn new(seed: u64) -> Stack {
        let mut wire = Wire { mtu: 1450, ..Wire::default() };
        let interface = interface(&mut wire, seed);
        Stack { interface, sockets: SocketSet::new(Vec::new()), wire, seed, made_for: None }
    }

    /// Gives the stack one frame that holds an IP packet for the gateway, and returns the IP packets that it sends in return,
    /// each behind room for an Ethernet header.
    ///
    /// # Errors
    /// `GatewayRefused` for superframes, which no pod has a reason to send here, and for IPv6 fragments of anything but a ping.
    pub fn serve(
        &mut self,
        frame: &Frame,
        gateway: &Gateway,
        mtu: u32,
        now: Instant,
    ) -> Result<&mut [Vec<u8>], DropReason> {
        if frame.offload.gso.is_some() {
            return Err(DropReason::GatewayRefused);
        }
        self.configure(gateway, mtu);
        self.wire.load(frame);
        self.wire.filled = 0;
        if self.wire.holds_v6_fragment() {
            self.wire.echo_piece().ok_or(DropReason::GatewayRefused)?;
            return Ok(&mut self.wire.sent[..self.wire.filled]);
        }
        let now = SmolInstant::from_micros((now.0 / 1000) as i64);
        for _ in 0..=REPLIES {
            let before = self.wire.filled;
            let _ = self.interface.poll(now, &mut self.wire, &mut self.sockets);
            if self.wire.filled == before || self.wire.filled >= REPLIES {
                break;
            }
        }
        Ok(&mut self.wire.sent[..self.wire.filled])
    }

    fn configure(&mut self, gateway: &Gateway, mtu: u32) {
        if self.made_for == Some((*gateway, mtu)) {
            return;
        }
        self.made_for = Some((*gateway, mtu));
        self.wire.mtu = mtu as usize;
        // An interface asks its device for the MTU only once.
        self.interface = interface(&mut self.wire, self.seed);
        self.interface.update_ip_addrs(|addresses| {
            addresses.clear();
            let v4 = gateway.ipv4.map(|address| IpCidr::new(address.into(), 32));
            let v6 = gateway.ipv6.map(|address| IpCidr::new(address.into(), 128));
            let link = IpCidr::new(gateway.mac.link_local().into(), 64);
            for address in v4.into_iter().chain(v6).chain([link]) {
                // Three addresses fit the capacity that is set by feature; one that did not would merely not answer.
                let _ = addresses.push(address);
            }
        });
    }
}

fn interface(wire: &mut Wire, seed: u64) -> Interface {
    let mut config = Config::new(HardwareAddress::Ip);
    config.random_seed = seed;
    Interface::new(config, wire, SmolInstant::ZERO)
}

/// One packet in, several out.
#[derive(Default)]
struct Wire {
    mtu: usize,
    packet: Vec<u8>,
    waiting: bool,
    sent: Vec<Vec<u8>>,
    filled: usize,
}

impl Wire {
    fn load(&mut self, frame: &Frame) {
        self.packet.clear();
        self.packet.extend_from_slice(&frame.head()[L3..]);
        frame.body().into_iter().flat_map(Body::pieces).for_each(|piece| self.packet.extend_from_slice(piece));
        if let Some(partial) = frame.offload.partial {
            // Offsets count from the Ethernet header; `Packet::parse` has put them behind the IP header and inside the head.
            let start = usize::from(partial.start) - L3;
            let field = start + usize::from(partial.offset);
            let value = weft_encap::checksum::Sum::new().add(&self.packet[start..]).finish_nonzero();
            self.packet[field..field + 2].copy_from_slice(&value.to_be_bytes());
        }
        self.waiting = true;
    }
}

// smoltcp reassembles IPv4 only. A fragmented IPv6 ping is answered without reassembly, piece by piece.
impl Wire {
    fn holds_v6_fragment(&self) -> bool {
        Ipv6Header::ref_from_prefix(&self.packet)
            .is_ok_and(|(header, _)| header.version() == 6 && header.next_header == ip::FRAGMENT)
    }

    /// Sends a piece of a ping back as it came, with the addresses exchanged, which leaves its checksum as it is; the first piece becomes
    /// that of a reply. What was wrong stays wrong. The hop limit falls, so that no two gateways can keep a piece between
    /// them. `None`: it is no piece of a ping.
    fn echo_piece(&mut self) -> Option<()> {
        self.waiting = false;
        let (header, rest) = Ipv6Header::ref_from_prefix(&self.packet).ok()?;
        let (piece, message) = FragmentHeader::ref_from_prefix(rest).ok()?;
        let is_first = Fragment::from(piece).offset == 0;
        let icmp = IcmpHeader::ref_from_prefix(message).ok().map(|(icmp, _)| *icmp);
        let is_request = icmp.is_some_and(|icmp| icmp.kind == v6::ECHO_REQUEST && icmp.code == 0);
        if piece.next_header != ip::ICMPV6 || header.hop_limit <= 1 || (is_first && !is_request) {
            return None;
        }
        let back = Ipv6Header { src: header.dst, dst: header.src, hop_limit: header.hop_limit - 1, ..*header };
        let len = self.packet.len();
        Transmit { sent: &mut self.sent, filled: &mut self.filled }.consume(len, |packet| {
            packet.copy_from_slice(&self.packet);
            packet[..IPV6_LEN].copy_from_slice(back.as_bytes());
            if let Some(icmp) = icmp.filter(|_| is_first) {
                let word = |kind: u8| u16::from_be_bytes([kind, 0]);
                let adjusted = checksum::adjust(icmp.checksum.get(), word(v6::ECHO_REQUEST), word(v6::ECHO_REPLY));
                let reply = IcmpHeader { kind: v6::ECHO_REPLY, checksum: adjusted.into(), ..icmp };
                let at = IPV6_LEN + size_of::<FragmentHeader>();
                packet[at..at + ICMP_LEN].copy_from_slice(reply.as_bytes());
            }
        });
        Some(())
    }
}

impl phy::Device for Wire {
    type RxToken<'a> = Receive<'a>;
    type TxToken<'a> = Transmit<'a>;

    fn receive(&mut self, _: SmolInstant) -> Option<(Receive<'_>, Transmit<'_>)> {
        if !std::mem::take(&mut self.waiting) {
            return None;
        }
        Some((Receive(&self.packet), Transmit { sent: &mut self.sent, filled: &mut self.filled }))
    }

    fn transmit(&mut self, _: SmolInstant) -> Option<Transmit<'_>> {
        (self.filled < REPLIES).then_some(Transmit { sent: &mut self.sent, filled: &mut self.filled })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        capabilities.checksum = ChecksumCapabilities::default();
        capabilities
    }
}

struct Receive<'a>(&'a [u8]);

impl phy::RxToken for Receive<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

struct Transmit<'a> {
    sent: &'a mut Vec<Vec<u8>>,
    filled: &'a mut usize,
}

impl phy::TxToken for Transmit<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        if self.sent.len() == *self.filled {
            self.sent.push(Vec::new());
        }
        let packet = &mut self.sent[*self.filled];
        packet.clear();
        packet.resize(L3 + len, 0);
        *self.filled += 1;
        f(&mut packet[L3..])
    }
}
