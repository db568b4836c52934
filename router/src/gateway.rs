//! The router's own stack: what happens to a packet that is addressed to the gateway.
//!
//! Pings are answered, whole or in fragments; a datagram to a closed port gets its ICMP error, a connection attempt its reset. All of
//! this is smoltcp's, which sees bare IP packets and knows neither Ethernet nor ARP (those are [`crate::neigh`]'s). It is
//! off the fast path: bytes are copied in and out of buffers that are kept.

use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::phy::{self, ChecksumCapabilities, DeviceCapabilities, Medium};
use smoltcp::time::Instant as SmolInstant;
use smoltcp::wire::{HardwareAddress, IpCidr};

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
    addresses: Option<Gateway>,
}

impl Stack {
    /// A stack without addresses; it gets them from the tables.
    pub fn new(seed: u64) -> Stack {
        let mut wire = Wire { mtu: 1450, ..Wire::default() };
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let interface = Interface::new(config, &mut wire, SmolInstant::ZERO);
        Stack { interface, sockets: SocketSet::new(Vec::new()), wire, addresses: None }
    }

    /// Gives the stack one frame that holds an IP packet for the gateway, and returns the IP packets that it sends in return,
    /// each behind room for an Ethernet header.
    ///
    /// # Errors
    /// `GatewayRefused` for superframes, which no pod has a reason to send here.
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
        self.wire.mtu = mtu as usize;
        if self.addresses == Some(*gateway) {
            return;
        }
        self.addresses = Some(*gateway);
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
