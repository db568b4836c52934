//! The programs on devices: which frames go to our socket, and what becomes of the others.
//!
//! A pod's device is ours alone, so [`pod`] takes everything; while there is no socket, everything ends, since a port forwards
//! nothing until it is in place. An uplink is the node's: [`uplink`] takes our tunnel's packets to our address and nothing else,
//! and passes all others, our own included while there is no socket, to the kernel untouched. What it does not understand
//! (fragments, IP options, extension headers, a third VLAN tag) it passes too: the UDP socket that stays open gets it.

use std::net::IpAddr;

use weft_encap::ip::UDP;
use weft_encap::{eth, ipv4};

use super::Register::{R0, R1, R2, R3, R4, R5, R6};
use super::{Assembler, Helper, Label, Size, Verdict, When};
use crate::port::sys::bpf::{Instruction, Map};
use crate::port::xdp::Operation;

/// Context: <https://elixir.bootlin.com/linux/v6.18/A/ident/xdp_md>.
const DATA: i16 = 0;
const DATA_END: i16 = 4;
const INTERFACE: i16 = 12;
const QUEUE: i16 = 16;

/// Addresses and port of our tunnel.
#[derive(Clone, Debug)]
pub struct Tunnel {
    /// The node's underlay addresses.
    pub addresses: Vec<IpAddr>,
    /// The UDP port.
    pub port: u16,
    /// The VLAN that frames come by; any if it is none. Some devices take the tag off, so a frame may come without.
    pub vlan: Option<u16>,
    /// What [`cookie`](super::too_big::cookie) is made with; unknown to others.
    pub secret: u64,
}

/// Every frame goes to the socket of its queue.
pub fn pod(sockets: &Map) -> Vec<Instruction> {
    let mut a = Assembler::new();
    // R2 = the queue's number.
    a.load(Size::Word, R2, R1, QUEUE);
    redirect(&mut a, sockets, Verdict::Drop);
    a.finish()
}

/// Every frame goes to the socket that its interface's number has, less what exceeds the size of the map, a power of two.
pub fn pods(sockets: &Map, size: u32) -> Vec<Instruction> {
    let mut a = Assembler::new();
    a.load(Size::Word, R2, R1, INTERFACE).compute(Operation::And, R2, size as i32 - 1);
    redirect(&mut a, sockets, Verdict::Drop);
    a.finish()
}

/// UDP packets to our address and port go to the socket of their queue. `otherwise` is for those of them whose queue has no
/// socket: [`Verdict::Pass`], but for tests.
pub fn uplink(sockets: &Map, tunnel: &Tunnel, otherwise: Verdict) -> Vec<Instruction> {
    let mut a = Assembler::new();
    let (take, pass, v4, v6) = (a.label(), a.label(), a.label(), a.label());
    // R6 = the context, R2 = the frame, R3 = its end, R5 = its type.
    a.copy(R6, R1).load(Size::Word, R2, R6, DATA).load(Size::Word, R3, R6, DATA_END);
    need(&mut a, eth::ETH_LEN, pass);
    a.load(Size::Half, R5, R2, 12);
    for _ in 0..2 {
        untag(&mut a, pass);
    }
    a.jump_if(R5, When::Equal, word(eth::ETHERTYPE_IPV4), v4);
    a.jump_if(R5, When::Equal, word(eth::ETHERTYPE_IPV6), v6);
    a.place(pass).exit_with(Verdict::Pass);
    a.place(v4);
    match_v4(&mut a, tunnel, take, pass);
    a.place(v6);
    match_v6(&mut a, tunnel, take, pass);
    a.place(take).load(Size::Word, R2, R6, QUEUE);
    redirect(&mut a, sockets, otherwise);
    a.finish()
}

/// Goes to the socket of queue R2, and returns `otherwise` if there is none.
fn redirect(a: &mut Assembler, sockets: &Map, otherwise: Verdict) {
    a.load_map(R1, sockets).set(R3, otherwise as i32).call(Helper::RedirectMap).exit();
}

/// Passes a frame that ends within the next bytes.
fn need(a: &mut Assembler, bytes: usize, pass: Label) {
    a.copy(R4, R2).compute(Operation::Add, R4, bytes as i32).jump_if_with(R4, When::Above, R3, pass);
}

/// Steps over a VLAN tag, if there is one: R2 then points to four bytes before the header behind it, where an Ethernet header without
/// the tag would begin.
fn untag(a: &mut Assembler, pass: Label) {
    let (tag, done) = (a.label(), a.label());
    a.jump_if(R5, When::Equal, word(eth::ETHERTYPE_VLAN), tag).jump_if(
        R5,
        When::Different,
        word(eth::ETHERTYPE_QINQ),
        done,
    );
    a.place(tag);
    need(a, eth::ETH_LEN + 4, pass);
    a.load(Size::Half, R5, R2, 16).compute(Operation::Add, R2, 4);
    a.place(done);
}

fn match_v4(a: &mut Assembler, tunnel: &Tunnel, take: Label, pass: Label) {
    let ip = eth::ETH_LEN as i16;
    need(a, eth::ETH_LEN + 28, pass);
    // Version 4 and no options.
    a.load(Size::Byte, R4, R2, ip).jump_if(R4, When::Different, 0x45, pass);
    a.load(Size::Byte, R4, R2, ip + 9).jump_if(R4, When::Different, UDP.into(), pass);
    a.load(Size::Half, R4, R2, ip + 6);
    a.jump_if(R4, When::Bits, word(ipv4::MORE_FRAGMENTS | ipv4::FRAGMENT_OFFSET), pass);
    a.load(Size::Half, R4, R2, ip + 22).jump_if(R4, When::Different, word(tunnel.port), pass);
    a.load(Size::Word, R4, R2, ip + 16);
    for address in &tunnel.addresses {
        if let IpAddr::V4(address) = address {
            a.load_constant(R0, u32::from_ne_bytes(address.octets()).into()).jump_if_with(R4, When::Equal, R0, take);
        }
    }
    a.exit_with(Verdict::Pass);
}

fn match_v6(a: &mut Assembler, tunnel: &Tunnel, take: Label, pass: Label) {
    let ip = eth::ETH_LEN as i16;
    need(a, eth::ETH_LEN + 48, pass);
    a.load(Size::Byte, R4, R2, ip + 6).jump_if(R4, When::Different, UDP.into(), pass);
    a.load(Size::Half, R4, R2, ip + 42).jump_if(R4, When::Different, word(tunnel.port), pass);
    a.load(Size::Double, R4, R2, ip + 24).load(Size::Double, R5, R2, ip + 32);
    for address in &tunnel.addresses {
        if let IpAddr::V6(address) = address {
            let other = a.label();
            let octets = address.octets();
            let half = |at: usize| u64::from_ne_bytes(octets[at..at + 8].try_into().expect("eight of sixteen"));
            a.load_constant(R0, half(0)).jump_if_with(R4, When::Different, R0, other);
            a.load_constant(R0, half(8)).jump_if_with(R5, When::Equal, R0, take);
            a.place(other);
        }
    }
    a.exit_with(Verdict::Pass);
}

/// A 16-bit number as it lies in a frame, read by a machine of this byte order.
fn word(value: u16) -> i32 {
    u16::from_ne_bytes(value.to_be_bytes()).into()
}
