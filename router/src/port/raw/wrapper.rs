//! A program that puts outer headers before superframes, so that the kernel takes them for packets of a tunnel that it may cut later.
//!
//! Raw sockets take no superframes, and virtio's header has no word for those inside GRE or IP. Yet the kernel cuts them for its own tunnels,
//! as late as it can, and devices do so for it; a superframe only has to be marked as one with a tunnel's headers before it, which a program on a
//! device's way out can do (`bpf_skb_adjust_room`). So superframes are sent by a packet socket on the host port's interface, with their outer
//! headers already written, behind a MAC that nobody has. The program there takes the outer headers off, puts them on again as
//! what they are, and sends the packet on by the interface that the kernel's routes name, to the next hop that the kernel finds. All that
//! the interface carries otherwise passes.
//!
//! It is attached as tcx (Linux 6.6 and later) by a link, and ends with the process. What cannot go (no route, a route that the node does not
//! forward by) is dropped by the program and counted.

use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use weft_encap::checksum;
use weft_encap::eth::ETH_LEN;
use weft_encap::format::Format;
use weft_encap::gre::GRE_LEN;
use weft_encap::ipv4::{IPV4_LEN, Ipv4Header};
use weft_encap::ipv6::{IPV6_LEN, Ipv6Header};
use zerocopy::IntoBytes;

use crate::frame::Outer;
use crate::port::packet::Outlet;
use crate::port::sys::bpf::{BpfError, Instruction, Link, Map, MapKind, Program};
use crate::port::xdp::Register::{R0, R1, R2, R3, R4, R5, R6, R7, R10};
use crate::port::xdp::{Assembler, Helper, Operation, Size, When};

/// Where a [`Wrapper`] is put for those who send, and taken from.
pub type WrapperPlace = Arc<ArcSwapOption<Wrapper>>;

/// The program, attached, and the socket whose packets it wraps.
#[derive(Debug)]
pub struct Wrapper {
    pub(super) outlet: Outlet,
    failures: Map,
    _link: Link,
}

/// The first bytes of the destination of what is to be wrapped; the last one says how. Locally administered, of nobody.
const MARK: [u8; 5] = [0x06, 0x77, 0x65, 0x66, 0x74];

/// The next program, or the interface: <https://elixir.bootlin.com/linux/v6.18/A/ident/tcx_action_base>.
const NEXT: i32 = -1;
const DROP: i32 = 2;
/// Of the outer header, as the kernel has it for its own packets (RFC 1700).
const HOPS: u8 = 64;
/// Where the outer headers and the kernel's answer are on the stack.
const OUTER: i16 = -64;
const LOOKUP: i16 = -128;
/// `struct bpf_fib_lookup`: its length and fields, <https://elixir.bootlin.com/linux/v6.18/A/ident/bpf_fib_lookup>.
const LOOKUP_LEN: i32 = 64;
const FAMILY: i16 = LOOKUP;
const PROTOCOL: i16 = LOOKUP + 1;
const INTERFACE: i16 = LOOKUP + 8;
const SOURCE: i16 = LOOKUP + 16;
const DESTINATION: i16 = LOOKUP + 32;
/// The next hop is found later: <https://elixir.bootlin.com/linux/v6.18/A/ident/BPF_FIB_LOOKUP_SKIP_NEIGH>.
const SKIP_NEIGHBOUR: i32 = 4;
/// Between the Ethernet header and what follows: <https://elixir.bootlin.com/linux/v6.18/A/ident/bpf_adj_room_mode>.
const BEHIND_ETHERNET: i32 = 1;
/// <https://elixir.bootlin.com/linux/v6.18/A/ident/BPF_F_ADJ_ROOM_FIXED_GSO> and those after it.
const FIXED_GSO: u64 = 1;
const OUTER_V4: u64 = 1 << 1;
const OUTER_V6: u64 = 1 << 2;
const GRE: u64 = 1 << 3;
const INNER_ETHERNET: u64 = 1 << 6;
const INNER_LEN_SHIFT: u32 = 56;

/// What is wrapped in what.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) struct Wrap {
    format: Format,
    outer_is_v4: bool,
}

impl Wrap {
    /// Everything that there is.
    const ALL: [Wrap; 6] = [
        Wrap::new(Format::Gre, true),
        Wrap::new(Format::Gre, false),
        Wrap::new(Format::Gretap, true),
        Wrap::new(Format::Gretap, false),
        Wrap::new(Format::Ipip, true),
        Wrap::new(Format::Ipip, false),
    ];

    pub(super) const fn new(format: Format, outer_is_v4: bool) -> Wrap {
        Wrap { format, outer_is_v4 }
    }

    /// The destination by which the program knows it. Formats that lie in UDP have none.
    pub(super) fn mac(self) -> Option<[u8; 6]> {
        let number = Wrap::ALL.iter().position(|wrap| *wrap == self)?;
        let mut mac = [number as u8; 6];
        mac[..MARK.len()].copy_from_slice(&MARK);
        Some(mac)
    }

    /// The length of the outer IP header.
    pub(super) fn ip_len(self) -> usize {
        if self.outer_is_v4 { IPV4_LEN } else { IPV6_LEN }
    }

    /// The length of all that is put before the inner IP header, but for the outer Ethernet header.
    pub(super) fn len(self) -> usize {
        let tunnel = match self.format {
            Format::Gre => GRE_LEN,
            Format::Gretap => GRE_LEN + ETH_LEN,
            _ => 0,
        };
        self.ip_len() + tunnel
    }

    fn flags(self) -> u64 {
        let outer = if self.outer_is_v4 { OUTER_V4 } else { OUTER_V6 };
        FIXED_GSO
            | outer
            | match self.format {
                Format::Gre => GRE,
                Format::Gretap => GRE | INNER_ETHERNET | (ETH_LEN as u64) << INNER_LEN_SHIFT,
                _ => 0,
            }
    }
}

impl Wrapper {
    /// Attaches the program to this interface's way out, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel's: not permitted, no such interface, or a kernel without tcx (`EINVAL`).
    pub fn attach(interface: u32) -> Result<Wrapper, BpfError> {
        let failures = Map::create(MapKind::Array, "weft_unwrapped", 4, 8, 1)?;
        let program = Program::load_tc("weft_wrap", &instructions(&failures, interface))?;
        let outlet = Outlet::open(interface).map_err(|source| BpfError::Refused {
            what: format!("open a packet socket on interface {interface}"),
            source,
        })?;
        Ok(Wrapper { outlet, failures, _link: program.attach_tcx_egress(interface)? })
    }

    /// How many superframes it had to drop since it was attached.
    pub fn failures(&self) -> u64 {
        let mut value = [0; 8];
        // An array has all its values, always.
        let _ = self.failures.lookup(&0_u32.to_ne_bytes(), &mut value);
        u64::from_ne_bytes(value)
    }
}

fn instructions(failures: &Map, interface: u32) -> Vec<Instruction> {
    let mut a = Assembler::new();
    let (pass, fail) = (a.label(), a.label());
    a.copy(R6, R1);
    load(&mut a, 0, 6);
    a.jump_if(R0, When::Different, 0, pass);
    let [m0, m1, m2, m3, m4] = MARK;
    a.load(Size::Word, R2, R10, OUTER).load_constant(R3, u32::from_ne_bytes([m0, m1, m2, m3]).into());
    a.jump_if_with(R2, When::Different, R3, pass);
    a.load(Size::Byte, R2, R10, OUTER + 4).jump_if(R2, When::Different, m4.into(), pass);
    a.load(Size::Byte, R2, R10, OUTER + 5);
    let wraps = Wrap::ALL.map(|wrap| (wrap, a.label()));
    for (number, (_, label)) in wraps.iter().enumerate() {
        a.jump_if(R2, When::Equal, number as i32, *label);
    }
    a.place(pass).set(R0, NEXT).exit();
    for (wrap, label) in wraps {
        a.place(label);
        load(&mut a, ETH_LEN as i32, wrap.len() as i32);
        a.jump_if(R0, When::Different, 0, fail);
        look_up(&mut a, wrap, interface);
        a.jump_if(R0, When::Different, 0, fail);
        a.load(Size::Word, R7, R10, INTERFACE);
        adjust(&mut a, -(wrap.len() as i32), FIXED_GSO);
        a.jump_if(R0, When::Different, 0, fail);
        adjust(&mut a, wrap.len() as i32, wrap.flags());
        a.jump_if(R0, When::Different, 0, fail);
        a.copy(R1, R6)
            .set(R2, ETH_LEN as i32)
            .copy(R3, R10)
            .compute(Operation::Add, R3, OUTER.into())
            .set(R4, wrap.len() as i32)
            .set(R5, 0);
        a.call(Helper::StoreBytes).jump_if(R0, When::Different, 0, fail);
        a.copy(R1, R7).set(R2, 0).set(R3, 0).set(R4, 0).call(Helper::RedirectNeighbour).exit();
    }
    a.place(fail).load_map_value(R1, failures, 0).set(R2, 1).add_atomically(R1, 0, R2);
    a.set(R0, DROP).exit();
    a.finish()
}

/// Copies the packet's bytes to the stack. R0 becomes zero if they are there.
fn load(a: &mut Assembler, at: i32, len: i32) {
    a.copy(R1, R6)
        .set(R2, at)
        .copy(R3, R10)
        .compute(Operation::Add, R3, OUTER.into())
        .set(R4, len)
        .call(Helper::LoadBytes);
}

/// Asks the kernel's routes by which interface the outer header's destination is reached. R0 becomes zero if by one.
fn look_up(a: &mut Assembler, wrap: Wrap, interface: u32) {
    for at in (0..LOOKUP_LEN as i16).step_by(8) {
        a.store_value(Size::Double, R10, LOOKUP + at, 0);
    }
    let (family, protocol, source, destination, words) = match wrap.outer_is_v4 {
        true => (libc::AF_INET, 9, 12, 16, 1),
        false => (libc::AF_INET6, 6, 8, 24, 4),
    };
    a.store_value(Size::Byte, R10, FAMILY, family);
    a.load(Size::Byte, R2, R10, OUTER + protocol).store(Size::Byte, R10, PROTOCOL, R2);
    a.store_value(Size::Word, R10, INTERFACE, interface as i32);
    for (from, to) in [(source, SOURCE), (destination, DESTINATION)] {
        for word in (0..words * 4).step_by(4) {
            a.load(Size::Word, R2, R10, OUTER + from + word).store(Size::Word, R10, to + word, R2);
        }
    }
    a.copy(R1, R6).copy(R2, R10).compute(Operation::Add, R2, LOOKUP.into()).set(R3, LOOKUP_LEN).set(R4, SKIP_NEIGHBOUR);
    a.call(Helper::FibLookup);
}

fn adjust(a: &mut Assembler, by: i32, flags: u64) {
    a.copy(R1, R6).set(R2, by).set(R3, BEHIND_ETHERNET).load_constant(R4, flags).call(Helper::AdjustRoom);
}

/// Writes the outer IP header of a packet of `len` bytes behind it. The kernel writes it anew for each segment.
pub(super) fn write_outer(out: &mut [u8], local: IpAddr, outer: &Outer, protocol: u8, len: u16) {
    match (local, outer.peer) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut header = Ipv4Header::new(from, to, protocol, HOPS, len);
            (header.tos, header.checksum) = (outer.tos, 0.into());
            header.checksum = checksum::ipv4_header(header.as_bytes()).into();
            out.copy_from_slice(header.as_bytes());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let mut header = Ipv6Header::new(from, to, protocol, HOPS, len);
            // Routers on the way tell flows by the label (RFC 6438).
            let words = 6 << 28 | u32::from(outer.tos) << 20 | u32::from(outer.entropy);
            header.version_class_flow = words.into();
            out.copy_from_slice(header.as_bytes());
        }
        _ => unreachable!("whoever sends has checked that both are of one family"),
    }
}
