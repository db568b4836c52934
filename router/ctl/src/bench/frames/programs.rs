//! The generator's and the sink's programs.
//!
//! Each keeps its state in the one value of an array map, at fixed offsets, so that it is read and written without a call.
//! All numbers there are 64-bit and of the machine's byte order. In a frame the payload starts with the trial's tag, a
//! magic number and the frame's number ([`TAG`], [`MAGIC`], [`NUMBER`]), all of the machine's byte order too: both programs
//! run on this machine.
//!
//! The generator writes every header byte of each frame, since a frame's memory is used again after the path had it and may
//! have changed it.

use std::net::Ipv4Addr;

use weft_router::port::sys::bpf::{Instruction, Map};
use weft_router::port::xdp::Register::{R0, R1, R2, R3, R4, R5, R6, R7, R8, R9};
use weft_router::port::xdp::{Assembler, Helper, Label, Operation, Size, Verdict, When};

use super::{FLOWS, Mix};

/// Bytes of the frame check sequence, which sizes count and memory does not hold.
const FCS: u16 = 4;
/// What every frame has, in memory.
pub const LEAST: usize = 60;
const ETHERNET: usize = 14;
const MAC_BYTES: usize = 12;
const IP: usize = 20;
const UDP_AT: usize = ETHERNET + IP;
/// Where the low byte of the source port lies: the flow.
const FLOW: i16 = UDP_AT as i16 + 1;
const PROTOCOL: i16 = ETHERNET as i16 + 9;
/// Where the trial's tag lies (16 bits).
const TAG: i16 = 42;
/// Where the magic number lies (32 bits).
const MAGIC: i16 = 44;
/// Where the frame's number lies (64 bits).
const NUMBER: i16 = 48;
const MAGIC_NUMBER: u32 = 0x7466_6577;
/// Source ports are dynamic ones (RFC 6335), the destination is `discard`.
const SOURCE_PORT: u16 = 0xc000;
const DISCARD: u16 = 9;
const UDP: u8 = 17;
const IPV4: [u8; 2] = [0x08, 0x00];

/// The generator keeps time in fractions of a nanosecond, 2⁻¹⁰, so that rates are met to a thousandth.
const FRACTION_BITS: i32 = 10;
/// How many of them a nanosecond has.
pub const FRACTIONS: f64 = (1 << FRACTION_BITS) as f64;

/// The generator's state.
pub mod generator {
    /// When the next frame is due, after the start, in fractions of a nanosecond.
    pub const DUE: i16 = 0;
    /// From one frame to the next, in fractions of a nanosecond.
    pub const INTERVAL: i16 = 8;
    /// When it first ran: nanoseconds of CLOCK_MONOTONIC, 0 before that.
    pub const START: i16 = 16;
    /// For how many nanoseconds after that it sends.
    pub const LENGTH: i16 = 24;
    /// How late it may be without sending less, in fractions of a nanosecond.
    pub const LATE: i16 = 32;
    /// How many were sent, which is also the next one's number.
    pub const SENT: i16 = 40;
    /// The trial's tag.
    pub const TAG: i16 = 48;
    /// When the last frame was sent, after the start, in fractions of a nanosecond.
    pub const LAST: i16 = 56;
    /// Words in all.
    pub const WORDS: usize = 8;
}

/// The sink's state.
pub mod sink {
    use super::FLOWS;

    /// The tag of the trial whose frames are counted.
    pub const TAG: i16 = 0;
    /// Frames that arrived, duplicates included.
    pub const RECEIVED: i16 = 8;
    /// Those that came after a later one of their flow, duplicates included.
    pub const LATE: i16 = 16;
    /// Those that came a second time right after the first.
    pub const DUPLICATED: i16 = 24;
    /// One more than the highest number of each flow.
    pub const NEXT: i16 = 32;
    /// Words in all.
    pub const WORDS: usize = 4 + FLOWS as usize;
}

/// Whose frames they are.
#[derive(Debug, Clone, Copy)]
pub struct Headers {
    /// Sender's and receiver's (or gateway's) MAC.
    pub macs: ([u8; 6], [u8; 6]),
    /// Sender's and receiver's address.
    pub addresses: (Ipv4Addr, Ipv4Addr),
}

/// Which sizes, in memory, are sent: in turn, one of twelve.
pub fn sizes(mix: Mix, mtu: u32) -> [u16; 12] {
    let most = u16::try_from(mtu).unwrap_or(u16::MAX - 64).saturating_add(ETHERNET as u16);
    let fit = |size: u16| (size - FCS).clamp(LEAST as u16, most.max(LEAST as u16));
    match mix {
        Mix::Size(size) => [fit(size.max(64)); 12],
        Mix::Imix => {
            let (small, middle, large) = (fit(64), fit(570), fit(1518));
            [small, middle, small, small, middle, small, small, middle, small, large, small, middle]
        }
    }
}

/// A whole frame of that size, as the generator's memory is filled first. Its payload is zeros.
pub fn frame(headers: &Headers, size: u16) -> Vec<u8> {
    let mut frame = vec![0; usize::from(size)];
    frame[..6].copy_from_slice(&headers.macs.1);
    frame[6..MAC_BYTES].copy_from_slice(&headers.macs.0);
    frame[MAC_BYTES..ETHERNET].copy_from_slice(&IPV4);
    let ip_len = size - ETHERNET as u16;
    let ip = &mut frame[ETHERNET..UDP_AT];
    ip[0] = 0x45;
    ip[2..4].copy_from_slice(&ip_len.to_be_bytes());
    ip[6] = 0x40; // Do not fragment.
    ip[8] = 64;
    ip[9] = UDP;
    ip[12..16].copy_from_slice(&headers.addresses.0.octets());
    ip[16..20].copy_from_slice(&headers.addresses.1.octets());
    let sum: u32 = ip.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    ip[10..12].copy_from_slice(&(!((folded & 0xffff) + (folded >> 16)) as u16).to_be_bytes());
    // A UDP checksum of zero says that there is none (RFC 768): numbers can then change freely.
    for (at, value) in [(0, SOURCE_PORT), (2, DISCARD), (4, ip_len - IP as u16)] {
        frame[UDP_AT + at..UDP_AT + at + 2].copy_from_slice(&value.to_be_bytes());
    }
    frame[MAGIC as usize..NUMBER as usize].copy_from_slice(&MAGIC_NUMBER.to_ne_bytes());
    frame
}

/// The generator: what runs once for each frame that might be sent.
pub fn generate(state: &Map, headers: &Headers, sizes: [u16; 12], interface: u32) -> Vec<Instruction> {
    let mut a = Assembler::new();
    let idle = a.label();
    a.copy(R6, R1).load_map_value(R7, state, 0);
    pace(&mut a, idle);
    // R8 = the frame's number; one more is sent.
    a.load(Size::Double, R8, R7, generator::SENT).copy(R1, R8).compute(Operation::Add, R1, 1);
    a.store(Size::Double, R7, generator::SENT, R1);
    choose_size(&mut a, headers, sizes, idle);
    // Sent out of the pod's device. Frames go in bulk after the batch, so nothing is known of them here.
    a.set(R1, interface as i32).set(R2, 0).call(Helper::Redirect).exit();
    a.place(idle).exit_with(Verdict::Drop);
    a.finish()
}

/// Goes on if a frame is due, and says when the next one is.
fn pace(a: &mut Assembler, idle: Label) {
    let (started, on_time) = (a.label(), a.label());
    // R0 = time since the start.
    a.call(Helper::KtimeNs).load(Size::Double, R1, R7, generator::START).jump_if(R1, When::Different, 0, started);
    a.store(Size::Double, R7, generator::START, R0).copy(R1, R0);
    a.place(started).compute_with(Operation::Subtract, R0, R1);
    a.load(Size::Double, R2, R7, generator::LENGTH).jump_if_with(R0, When::AtLeast, R2, idle);
    // R3 = when the frame is due.
    a.compute(Operation::ShiftLeft, R0, FRACTION_BITS);
    a.load(Size::Double, R3, R7, generator::DUE).jump_if_with(R3, When::Above, R0, idle);
    a.store(Size::Double, R7, generator::LAST, R0);
    // Too late to be caught up with: what is lost of the time is not sent.
    a.load(Size::Double, R2, R7, generator::LATE).copy(R4, R3).compute_with(Operation::Add, R4, R2);
    a.jump_if_with(R4, When::AtLeast, R0, on_time);
    a.copy(R3, R0).compute_with(Operation::Subtract, R3, R2);
    a.place(on_time).load(Size::Double, R2, R7, generator::INTERVAL).compute_with(Operation::Add, R3, R2);
    a.store(Size::Double, R7, generator::DUE, R3);
}

/// Cuts the frame to the size that is its turn, and writes it.
fn choose_size(a: &mut Assembler, headers: &Headers, sizes: [u16; 12], idle: Label) {
    let largest = sizes.into_iter().max().expect("there are twelve");
    let mut distinct = sizes.to_vec();
    distinct.sort_unstable();
    distinct.dedup();
    let written = a.label();
    let labels: Vec<_> = distinct.iter().map(|&size| (size, a.label())).collect();
    let label_of = |size| labels.iter().find(|(s, _)| *s == size).expect("all sizes have one").1;
    if distinct.len() > 1 {
        a.copy(R9, R8).compute(Operation::Remainder, R9, 12);
        for (turn, size) in sizes.into_iter().enumerate() {
            a.jump_if(R9, When::Equal, turn as i32, label_of(size));
        }
    }
    for (size, label) in &labels {
        a.place(*label);
        if *size < largest {
            a.copy(R1, R6).set(R2, i32::from(*size) - i32::from(largest)).call(Helper::AdjustTail);
            a.jump_if(R0, When::Different, 0, idle);
        }
        write_frame(a, &frame(headers, *size), idle);
        if labels.len() > 1 {
            a.jump(written);
        }
    }
    a.place(written);
}

/// Writes the first bytes of a frame: template, flow, tag and number.
fn write_frame(a: &mut Assembler, template: &[u8], idle: Label) {
    a.load(Size::Word, R2, R6, 0).load(Size::Word, R3, R6, 4);
    a.copy(R4, R2).compute(Operation::Add, R4, LEAST as i32).jump_if_with(R4, When::Above, R3, idle);
    for (index, word) in template[..NUMBER as usize].chunks_exact(8).enumerate() {
        let word = u64::from_ne_bytes(word.try_into().expect("they are eight bytes"));
        a.load_constant(R1, word).store(Size::Double, R2, index as i16 * 8, R1);
    }
    a.store(Size::Byte, R2, FLOW, R8);
    a.load(Size::Double, R1, R7, generator::TAG).store(Size::Half, R2, TAG, R1);
    a.store(Size::Double, R2, NUMBER, R8);
}

/// The sink: counts and ends the frames of the stream, and lets everything else pass.
pub fn absorb(state: &Map) -> Vec<Instruction> {
    let mut a = Assembler::new();
    let (foreign, ours, late, stale) = (a.label(), a.label(), a.label(), a.label());
    a.load(Size::Word, R2, R1, 0).load(Size::Word, R3, R1, 4);
    a.copy(R4, R2).compute(Operation::Add, R4, LEAST as i32).jump_if_with(R4, When::Above, R3, foreign);
    let ether_type = i32::from(u16::from_ne_bytes(IPV4));
    a.load(Size::Half, R4, R2, MAC_BYTES as i16).jump_if(R4, When::Different, ether_type, foreign);
    a.load(Size::Byte, R4, R2, PROTOCOL).jump_if(R4, When::Different, UDP.into(), foreign);
    a.load(Size::Word, R4, R2, MAGIC).jump_if(R4, When::Equal, MAGIC_NUMBER as i32, ours);
    a.place(foreign).exit_with(Verdict::Pass);
    a.place(ours).load_map_value(R7, state, 0);
    // A straggler of an earlier trial counts nowhere.
    a.load(Size::Half, R4, R2, TAG).load(Size::Double, R5, R7, sink::TAG).jump_if_with(R4, When::Different, R5, stale);
    a.set(R5, 1).add_atomically(R7, sink::RECEIVED, R5);
    // R1 = its number, R4 = where its flow's highest number is kept, R3 = one more than that.
    a.load(Size::Double, R1, R2, NUMBER).copy(R4, R1).compute(Operation::And, R4, FLOWS as i32 - 1);
    a.compute(Operation::ShiftLeft, R4, 3).compute_with(Operation::Add, R4, R7);
    a.load(Size::Double, R3, R4, sink::NEXT).compute(Operation::Add, R1, 1);
    a.jump_if_with(R3, When::AtLeast, R1, late);
    a.store(Size::Double, R4, sink::NEXT, R1).exit_with(Verdict::Drop);
    a.place(late).add_atomically(R7, sink::LATE, R5);
    a.jump_if_with(R3, When::Different, R1, stale).add_atomically(R7, sink::DUPLICATED, R5);
    a.place(stale).exit_with(Verdict::Drop);
    a.finish()
}
