//! What comes back to a node in whose name pods' packets left: led from the uplink to the host port, and what is nobody's back again.
//!
//! A program on the uplink takes what may be an answer: TCP and UDP to a reserved port of the node's addresses, answers to pings with such an
//! identifier, ICMP errors that quote such a packet, and later fragments, which have no ports. It gives the frame a MAC that says by which
//! uplink it came and puts it on the host port's queue, whole, as the kernel merged it. What the data plane does not know it writes back
//! with that MAC; a program on the host port's own interface then puts it where the first one took it from. A mark tells
//! that one to let it pass, and is gone before anyone else sees it. So the kernel gets what is its own, once.
//!
//! Both are attached as tcx (Linux 6.6 and later) by links, beside the programs of others, and end with the process. Frames with a VLAN's tag are
//! passed on: the VLAN's own interface is the uplink then.

use std::net::IpAddr;

use weft_encap::mac::Mac;
use weft_encap::{eth, icmp, ip, ipv4};

use crate::port::sys::bpf::{BpfError, Instruction, Link, Program};
use crate::port::xdp::Register::{R0, R1, R2, R3, R4, R5, R6, R7, R8, R10};
use crate::port::xdp::{Assembler, Helper, Label, Operation, Size, When};

/// Context: <https://elixir.bootlin.com/linux/v6.18/A/ident/__sk_buff>.
const PACKET_TYPE: i16 = 4;
const MARK: i16 = 8;
const PROTOCOL: i16 = 16;
const VLAN_PRESENT: i16 = 20;
/// The next program, or the kernel: <https://elixir.bootlin.com/linux/v6.18/A/ident/tcx_action_base>.
const NEXT: i32 = -1;
/// <https://elixir.bootlin.com/linux/v6.18/A/ident/BPF_F_INGRESS>.
const INGRESS: i32 = 1;
/// What frames bear between the two programs, and nowhere else.
const BACK: i32 = 0x7765_6674;
/// Where headers and MACs are on the stack.
const HEADER: i16 = -64;
const NEW_MAC: i16 = -16;

/// What is taken, and where it is led.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answers {
    /// The uplink's number.
    pub uplink: u32,
    /// Its MAC.
    pub mac: Mac,
    /// The node's addresses.
    pub addresses: Vec<IpAddr>,
    /// The reserved ports, first and last.
    pub ports: (u16, u16),
    /// The host port's interface.
    pub host: u32,
    /// The MAC that says by which uplink a frame came.
    pub came_back: Mac,
}

/// The two programs, attached for as long as this lives.
#[derive(Debug)]
pub struct AnswersLed {
    _back: Link,
    _taken: Link,
}

impl Answers {
    /// Loads and attaches the programs, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// [`BpfError::Refused`]: not permitted, no such interface, or a kernel without tcx (`EINVAL`).
    pub fn lead(&self) -> Result<AnswersLed, BpfError> {
        let (taken, back) = self.load()?;
        // The way back stands before anything is taken.
        Ok(AnswersLed { _back: back.attach_tcx(self.host)?, _taken: taken.attach_tcx(self.uplink)? })
    }

    /// Loads the programs: the uplink's, and that of the host port's interface.
    ///
    /// # Errors
    /// As for [`Answers::lead`].
    pub fn load(&self) -> Result<(Program, Program), BpfError> {
        Ok((Program::load_tc("weft_answers", &self.taken())?, Program::load_tc("weft_back", &self.back())?))
    }

    /// The program on the uplink.
    fn taken(&self) -> Vec<Instruction> {
        let mut a = Assembler::new();
        let labels = Labels {
            pass: a.label(),
            take: a.label(),
            number: a.label(),
            upper: a.label(),
            quoted4: a.label(),
            quoted6: a.label(),
            quoted: a.label(),
        };
        let (v6, fresh) = (a.label(), a.label());
        a.copy(R6, R1);
        a.load(Size::Word, R2, R6, MARK).jump_if(R2, When::Different, BACK, fresh);
        a.set(R2, 0).store(Size::Word, R6, MARK, R2).set(R0, NEXT).exit();
        a.place(fresh);
        a.load(Size::Word, R2, R6, PACKET_TYPE).jump_if(R2, When::Different, 0, labels.pass);
        a.load(Size::Word, R2, R6, VLAN_PRESENT).jump_if(R2, When::Different, 0, labels.pass);
        a.load(Size::Word, R2, R6, PROTOCOL).jump_if(R2, When::Equal, word(eth::ETHERTYPE_IPV6), v6);
        a.jump_if(R2, When::Different, word(eth::ETHERTYPE_IPV4), labels.pass);
        self.network4(&mut a, &labels);
        a.place(v6);
        self.network6(&mut a, &labels);
        self.upper(&mut a, &labels);
        self.quoted(&mut a, &labels);
        self.number(&mut a, &labels);
        a.place(labels.pass).set(R0, NEXT).exit();
        a.place(labels.take);
        give_mac(&mut a, self.came_back);
        a.set(R1, self.host as i32).set(R2, 0).call(Helper::Redirect).exit();
        a.finish()
    }

    /// The program on the host port's interface.
    fn back(&self) -> Vec<Instruction> {
        let mut a = Assembler::new();
        let pass = a.label();
        a.copy(R6, R1);
        load_constant(&mut a, 0, 6, pass);
        let [m0, m1, m2, m3, m4, m5] = self.came_back.0;
        a.load(Size::Word, R2, R10, HEADER).load_constant(R3, u32::from_ne_bytes([m0, m1, m2, m3]).into());
        a.jump_if_with(R2, When::Different, R3, pass);
        a.load(Size::Half, R2, R10, HEADER + 4);
        a.jump_if(R2, When::Different, u16::from_ne_bytes([m4, m5]).into(), pass);
        give_mac(&mut a, self.mac);
        a.set(R2, BACK).store(Size::Word, R6, MARK, R2);
        a.set(R1, self.uplink as i32).set(R2, INGRESS).call(Helper::Redirect).exit();
        a.place(pass).set(R0, NEXT).exit();
        a.finish()
    }

    /// An IPv4 header: to one of ours? R8 becomes the protocol, R7 where its header is.
    fn network4(&self, a: &mut Assembler, labels: &Labels) {
        load_constant(a, eth::ETH_LEN as i32, 20, labels.pass);
        header_len4(a, labels.pass);
        a.compute(Operation::Add, R7, eth::ETH_LEN as i32);
        let ours = a.label();
        self.is_ours4(a, HEADER + 16, ours, labels.pass);
        a.place(ours);
        a.load(Size::Byte, R8, R10, HEADER + 9).load(Size::Half, R2, R10, HEADER + 6);
        a.jump_if(R2, When::Bits, word(ipv4::FRAGMENT_OFFSET), labels.take).jump(labels.upper);
    }

    fn network6(&self, a: &mut Assembler, labels: &Labels) {
        let ours = a.label();
        load_constant(a, eth::ETH_LEN as i32, 40, labels.pass);
        self.is_ours6(a, HEADER + 24, ours, labels.pass);
        a.place(ours).load(Size::Byte, R8, R10, HEADER + 6).set(R7, eth::ETH_LEN as i32 + 40);
        a.jump_if(R8, When::Different, ip::FRAGMENT.into(), labels.upper);
        load(a, 0, 8, labels.pass);
        a.load(Size::Byte, R8, R10, HEADER).compute(Operation::Add, R7, 8).load(Size::Half, R2, R10, HEADER + 2);
        // All but "more fragments" and the reserved bits.
        a.jump_if(R2, When::Bits, word(0xfff8), labels.take).jump(labels.upper);
    }

    /// The transport header: R2 becomes where its port or identifier is.
    fn upper(&self, a: &mut Assembler, labels: &Labels) {
        let (ports, message6, identifier) = (a.label(), a.label(), a.label());
        a.place(labels.upper);
        a.jump_if(R8, When::Equal, ip::TCP.into(), ports).jump_if(R8, When::Equal, ip::UDP.into(), ports);
        a.jump_if(R8, When::Equal, ip::ICMPV6.into(), message6).jump_if(
            R8,
            When::Different,
            ip::ICMP.into(),
            labels.pass,
        );
        load(a, 0, 1, labels.pass);
        a.load(Size::Byte, R2, R10, HEADER).jump_if(R2, When::Equal, icmp::v4::ECHO_REPLY.into(), identifier);
        for error in [icmp::v4::UNREACHABLE, icmp::v4::TIME_EXCEEDED, PARAMETER_PROBLEM] {
            a.jump_if(R2, When::Equal, error.into(), labels.quoted4);
        }
        a.jump(labels.pass);
        a.place(message6);
        load(a, 0, 1, labels.pass);
        a.load(Size::Byte, R2, R10, HEADER).jump_if(R2, When::Equal, icmp::v6::ECHO_REPLY.into(), identifier);
        a.jump_if(R2, When::Equal, 0, labels.pass).jump_if(R2, When::Below, 5, labels.quoted6).jump(labels.pass);
        a.place(identifier).compute(Operation::Add, R7, 4).jump(labels.number);
        a.place(ports).compute(Operation::Add, R7, 2).jump(labels.number);
    }

    /// What an error quotes: is it from one of ours?
    fn quoted(&self, a: &mut Assembler, labels: &Labels) {
        let (ours4, ours6, identifier) = (a.label(), a.label(), a.label());
        a.place(labels.quoted4).compute(Operation::Add, R7, icmp::ICMP_LEN as i32);
        load(a, 0, 20, labels.pass);
        a.load(Size::Byte, R8, R10, HEADER + 9).load(Size::Half, R2, R10, HEADER + 6);
        a.jump_if(R2, When::Bits, word(ipv4::FRAGMENT_OFFSET), labels.pass);
        self.is_ours4(a, HEADER + 12, ours4, labels.pass);
        a.place(ours4).load(Size::Byte, R2, R10, HEADER).compute(Operation::And, R2, 15);
        a.compute(Operation::ShiftLeft, R2, 2).compute_with(Operation::Add, R7, R2).jump(labels.quoted);
        a.place(labels.quoted6).compute(Operation::Add, R7, icmp::ICMP_LEN as i32);
        load(a, 0, 40, labels.pass);
        self.is_ours6(a, HEADER + 8, ours6, labels.pass);
        a.place(ours6).load(Size::Byte, R8, R10, HEADER + 6).compute(Operation::Add, R7, 40);
        a.place(labels.quoted);
        a.jump_if(R8, When::Equal, ip::TCP.into(), labels.number);
        a.jump_if(R8, When::Equal, ip::UDP.into(), labels.number);
        a.jump_if(R8, When::Equal, ip::ICMP.into(), identifier);
        a.jump_if(R8, When::Different, ip::ICMPV6.into(), labels.pass);
        a.place(identifier).compute(Operation::Add, R7, 4);
    }

    /// The number at R7: is it reserved?
    fn number(&self, a: &mut Assembler, labels: &Labels) {
        a.place(labels.number);
        load(a, 0, 2, labels.pass);
        a.load(Size::Byte, R2, R10, HEADER).load(Size::Byte, R3, R10, HEADER + 1);
        a.compute(Operation::ShiftLeft, R2, 8).compute_with(Operation::Or, R2, R3);
        a.jump_if(R2, When::Below, self.ports.0.into(), labels.pass);
        a.jump_if(R2, When::Above, self.ports.1.into(), labels.pass).jump(labels.take);
    }

    fn is_ours4(&self, a: &mut Assembler, at: i16, ours: Label, pass: Label) {
        a.load(Size::Word, R4, R10, at);
        for address in &self.addresses {
            if let IpAddr::V4(address) = address {
                a.load_constant(R5, u32::from_ne_bytes(address.octets()).into()).jump_if_with(
                    R4,
                    When::Equal,
                    R5,
                    ours,
                );
            }
        }
        a.jump(pass);
    }

    fn is_ours6(&self, a: &mut Assembler, at: i16, ours: Label, pass: Label) {
        a.load(Size::Double, R3, R10, at).load(Size::Double, R4, R10, at + 8);
        for address in &self.addresses {
            if let IpAddr::V6(address) = address {
                let other = a.label();
                let octets = address.octets();
                let half = |at: usize| u64::from_ne_bytes(octets[at..at + 8].try_into().expect("eight of sixteen"));
                a.load_constant(R5, half(0)).jump_if_with(R3, When::Different, R5, other);
                a.load_constant(R5, half(8)).jump_if_with(R4, When::Equal, R5, ours);
                a.place(other);
            }
        }
        a.jump(pass);
    }
}

/// RFC 792.
const PARAMETER_PROBLEM: u8 = 12;

struct Labels {
    pass: Label,
    take: Label,
    number: Label,
    upper: Label,
    quoted4: Label,
    quoted6: Label,
    quoted: Label,
}

/// Version 4, and R7 = length of the header.
fn header_len4(a: &mut Assembler, pass: Label) {
    a.load(Size::Byte, R2, R10, HEADER).copy(R7, R2).compute(Operation::ShiftRight, R2, 4);
    a.jump_if(R2, When::Different, 4, pass);
    a.compute(Operation::And, R7, 15).compute(Operation::ShiftLeft, R7, 2).jump_if(R7, When::Below, 20, pass);
}

/// Copies bytes at R7 + `more` to the stack; passes a frame without them.
fn load(a: &mut Assembler, more: i32, len: i32, pass: Label) {
    a.copy(R2, R7).compute(Operation::Add, R2, more);
    load_at(a, len, pass);
}

/// The same at a fixed place.
fn load_constant(a: &mut Assembler, at: i32, len: i32, pass: Label) {
    a.set(R2, at);
    load_at(a, len, pass);
}

fn load_at(a: &mut Assembler, len: i32, pass: Label) {
    a.copy(R1, R6).copy(R3, R10).compute(Operation::Add, R3, HEADER.into()).set(R4, len);
    a.call(Helper::LoadBytes).jump_if(R0, When::Different, 0, pass);
}

/// The frame's destination becomes this one.
fn give_mac(a: &mut Assembler, mac: Mac) {
    for (at, byte) in (NEW_MAC..).zip(mac.0) {
        a.store_value(Size::Byte, R10, at, byte.into());
    }
    a.copy(R1, R6).set(R2, 0).copy(R3, R10).compute(Operation::Add, R3, NEW_MAC.into()).set(R4, 6).set(R5, 0);
    a.call(Helper::StoreBytes);
}

/// A 16-bit number as it lies in a frame, read by a machine of this byte order.
fn word(value: u16) -> i32 {
    u16::from_ne_bytes(value.to_be_bytes()).into()
}
