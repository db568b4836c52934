//! The Internet checksum: whole (RFC 1071), as a delta (RFC 1624), and as Linux's *partial* form.
//!
//! Words used here. The *sum* of bytes is the ones' complement sum of their big-endian 16-bit words. A *checksum* is
//! the complement of a sum. A *partial* checksum field holds the sum of the pseudo-header, not complemented, for
//! somebody else to complete; see [`crate::offload::Partial`].
//!
//! Ones' complement has two zeros. A sum is 0 only if every byte was zero, and 0xffff stands for zero otherwise; this
//! follows from adding and folding, and the rules on UDP's zero rest on it.

use core::net::{Ipv4Addr, Ipv6Addr};

/// The sum of `bytes`, folded, as if they began at an even offset. An odd last byte counts as the high half of a word.
pub fn sum(bytes: &[u8]) -> u16 {
    // 2^16 ≡ 2^32 ≡ 1 modulo 2^16 - 1, so words of any width may be added and folded at the end, and in the machine's
    // own byte order (RFC 1071 section 2 B). To keep carries out of the loop, 64-bit words are added modulo 2^64 in `all` and their
    // upper halves in `high`: the lower halves' sum is then `all - (high << 32)`. That is one shift and two adds a
    // word, on as many lanes as the machine has.
    const LANES: usize = 8;
    let (blocks, rest) = bytes.as_chunks::<{ LANES * 8 }>();
    if blocks.is_empty() {
        return u16::from_be(fold(sum_short(rest)));
    }
    let mut all = [0u64; LANES];
    let mut high = [0u64; LANES];
    for block in blocks {
        let (words, _) = block.as_chunks::<8>();
        for lane in 0..LANES {
            let word = u64::from_ne_bytes(words[lane]);
            all[lane] = all[lane].wrapping_add(word);
            high[lane] = high[lane].wrapping_add(word >> 32);
        }
    }
    let high: u64 = high.iter().sum();
    let all = all.iter().fold(0u64, |sum, lane| sum.wrapping_add(*lane));
    let low = all.wrapping_sub(high << 32);
    u16::from_be(fold(low + high + sum_short(rest)))
}

/// The sum of less than a block, in the machine's byte order, not folded.
fn sum_short(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<4>();
    let mut total: u64 = words.iter().map(|word| u64::from(u32::from_ne_bytes(*word))).sum();
    if !rest.is_empty() {
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        total += u64::from(u32::from_ne_bytes(last));
    }
    total
}

/// Folds carries back in until 16 bits are left.
const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + ((sum >> 16) & 0xffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// A sum in the making, over pieces of any length, in order.
#[derive(Copy, Clone, Debug, Default)]
pub struct Sum {
    total: u64,
    odd: bool,
}

impl Sum {
    /// The sum of nothing.
    pub const fn new() -> Self {
        Self { total: 0, odd: false }
    }

    /// Adds bytes. If the pieces before had an odd length together, these continue in the middle of a word.
    pub fn add(&mut self, bytes: &[u8]) -> &mut Self {
        let sum = sum(bytes);
        // RFC 1071 section 2 B: swapped bytes give a swapped sum.
        self.total += u64::from(if self.odd { sum.swap_bytes() } else { sum });
        self.odd ^= bytes.len() % 2 == 1;
        self
    }

    /// Adds a word, or a folded sum of bytes that begin at an even offset of what is summed.
    pub fn add_word(&mut self, word: u16) -> &mut Self {
        self.total += u64::from(word);
        self
    }

    /// The sum, folded, *not* complemented: what a partial checksum field holds.
    pub const fn fold(&self) -> u16 {
        fold(self.total)
    }

    /// The checksum: the complement of the sum.
    pub const fn finish(&self) -> u16 {
        !self.fold()
    }

    /// The checksum with zero written as 0xffff, as UDP wants it.
    pub const fn finish_nonzero(&self) -> u16 {
        match self.finish() {
            0 => 0xffff,
            checksum => checksum,
        }
    }

    /// Whether what was summed includes a correct checksum.
    pub const fn is_valid(&self) -> bool {
        self.fold() == 0xffff
    }
}

/// The sum of IPv4's pseudo-header (RFC 9293 section 3.1). `len` is that of transport header and payload.
pub fn pseudo_v4(src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, len: u32) -> Sum {
    let mut sum = Sum::new();
    sum.total = u64::from(src.to_bits()) + u64::from(dst.to_bits()) + u64::from(protocol) + u64::from(len);
    sum
}

/// The sum of IPv6's pseudo-header (RFC 8200 section 8.1). `len` is that of transport header and payload, without
/// extension headers.
pub fn pseudo_v6(src: Ipv6Addr, dst: Ipv6Addr, protocol: u8, len: u32) -> Sum {
    let mut sum = Sum::new();
    sum.add(&src.octets()).add(&dst.octets());
    sum.total += u64::from(protocol) + u64::from(len);
    sum
}

/// The checksum for an IPv4 header with options, whatever its checksum field holds.
pub fn ipv4_header(bytes: &[u8]) -> u16 {
    let mut sum = Sum::new();
    sum.add(bytes);
    if let Some(field) = bytes.get(10..12) {
        sum.add_word(!self::sum(field));
    }
    sum.finish()
}

/// Whether the checksum of an IPv4 header is correct. `bytes` is the header with its options and nothing else.
pub fn verify_ipv4_header(bytes: &[u8]) -> bool {
    sum(bytes) == 0xffff
}

/// Whether the checksum of a TCP, UDP or ICMP packet is correct. `pseudo` is its pseudo-header's sum ([`Sum::new`]
/// for ICMP over IPv4), `bytes` is transport header and payload. A zero UDP checksum is the caller's to accept.
pub fn verify(pseudo: Sum, bytes: &[u8]) -> bool {
    let mut sum = pseudo;
    sum.add(bytes).is_valid()
}

/// What replacing some words does to every checksum that covers them. Made once, applied to many packets.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Default)]
pub struct Delta(u16);

impl Delta {
    /// Nothing is replaced.
    pub const NONE: Self = Self(0);

    /// And this word is replaced too.
    #[must_use]
    pub const fn word(self, old: u16, new: u16) -> Self {
        Self(fold(self.0 as u64 + !old as u64 + new as u64))
    }

    /// And this address is replaced too.
    #[must_use]
    pub const fn v4(self, old: Ipv4Addr, new: Ipv4Addr) -> Self {
        Self(fold(self.0 as u64 + !old.to_bits() as u64 + new.to_bits() as u64))
    }

    /// And this address is replaced too.
    #[must_use]
    pub fn v6(self, old: Ipv6Addr, new: Ipv6Addr) -> Self {
        Self(fold(u64::from(self.0) + u64::from(!sum(&old.octets())) + u64::from(sum(&new.octets()))))
    }

    /// The checksum afterwards: RFC 1624 equation 3, HC' = ~(~HC + ~m + m'). For UDP see [`Delta::apply_udp`].
    #[must_use]
    pub const fn apply(self, checksum: u16) -> u16 {
        !self.apply_partial(!checksum)
    }

    /// The UDP checksum afterwards: zero is none and stays none, and a sum of zero is written as 0xffff.
    #[must_use]
    pub const fn apply_udp(self, checksum: u16) -> u16 {
        if checksum == 0 {
            return 0;
        }
        match self.apply(checksum) {
            0 => 0xffff,
            checksum => checksum,
        }
    }

    /// A partial checksum field afterwards: field − old + new. It covers addresses, but not ports.
    #[must_use]
    pub const fn apply_partial(self, field: u16) -> u16 {
        fold(field as u64 + self.0 as u64)
    }
}

/// The checksum after one word that it covers changed from `old` to `new` (RFC 1624 equation 3).
pub const fn adjust(checksum: u16, old: u16, new: u16) -> u16 {
    Delta::NONE.word(old, new).apply(checksum)
}

/// The checksum after an IPv4 address that it covers changed.
pub const fn adjust_v4(checksum: u16, old: Ipv4Addr, new: Ipv4Addr) -> u16 {
    Delta::NONE.v4(old, new).apply(checksum)
}

/// The checksum after an IPv6 address that it covers changed.
pub fn adjust_v6(checksum: u16, old: Ipv6Addr, new: Ipv6Addr) -> u16 {
    Delta::NONE.v6(old, new).apply(checksum)
}

/// A partial checksum field after one word of the pseudo-header changed from `old` to `new`.
pub const fn adjust_partial(field: u16, old: u16, new: u16) -> u16 {
    Delta::NONE.word(old, new).apply_partial(field)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Straight from the definition.
    fn slow_sum(bytes: &[u8]) -> u16 {
        let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
        words.fold(0, |sum, word| (sum + word) % 0x1_0000 + (sum + word) / 0x1_0000) as u16
    }

    /// Bytes without a pattern that a swapped or shifted sum would fit as well.
    fn noise(len: usize) -> Vec<u8> {
        let mut state = 0x9e37_79b9_u32;
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        (0..len).map(next).collect()
    }

    #[test]
    fn the_example_of_rfc_1071_section_3() {
        assert_eq!(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), 0xddf2);
    }

    #[test]
    fn every_length_gives_what_the_definition_gives() {
        let bytes = noise(300);
        for len in 0..bytes.len() {
            assert_eq!(sum(&bytes[..len]), slow_sum(&bytes[..len]), "{len}");
        }
    }

    #[test]
    fn carries_are_not_lost_in_the_longest_input() {
        for len in [65_535, 65_536, 1 << 20] {
            assert_eq!(sum(&vec![0xff; len]), slow_sum(&vec![0xff; len]), "{len}");
        }
    }

    #[test]
    fn pieces_of_odd_length_continue_in_the_middle_of_a_word() {
        let bytes = noise(200);
        for a in 0..20 {
            for b in [a, a + 1, a + 2, a + 65, a + 70] {
                let mut sum = Sum::new();
                sum.add(&bytes[..a]).add(&bytes[a..b]).add(&[]).add(&bytes[b..]);
                assert_eq!(sum.fold(), super::sum(&bytes), "{a} {b}");
            }
        }
    }

    #[test]
    fn only_zeros_have_the_sum_zero() {
        assert_eq!(sum(&[0; 100]), 0);
        assert_eq!(sum(&[]), 0);
        assert_eq!(sum(&[0xff, 0xff]), 0xffff);
        assert_eq!(sum(&[0xff, 0xfe, 0, 1]), 0xffff);
    }

    #[test]
    fn the_example_of_rfc_1624_section_4() {
        // An implementation after RFC 1141 gives 0xffff here.
        assert_eq!(adjust(0xdd2f, 0x5555, 0x3285), 0x0000);
    }

    #[test]
    fn a_delta_gives_what_summing_again_gives() {
        let old = noise(40);
        let mut new = old.clone();
        new[4..8].copy_from_slice(&[10, 0, 0, 9]);
        new[10..12].copy_from_slice(&[0xff, 0xff]);
        new[16..32].copy_from_slice(&noise(16));
        let octets = |bytes: &[u8], at: usize| <[u8; 4]>::try_from(&bytes[at..at + 4]).unwrap();
        let octets6 = |bytes: &[u8]| <[u8; 16]>::try_from(&bytes[16..32]).unwrap();
        let word = |bytes: &[u8]| u16::from_be_bytes([bytes[10], bytes[11]]);
        let delta = Delta::NONE
            .v4(octets(&old, 4).into(), octets(&new, 4).into())
            .word(word(&old), word(&new))
            .v6(octets6(&old).into(), octets6(&new).into());
        assert_eq!(delta.apply(!sum(&old)), !sum(&new));
        assert_eq!(delta.apply_udp(!sum(&old)), !sum(&new));
        assert_eq!(delta.apply_partial(sum(&old)), sum(&new));
        let steps = adjust_v4(!sum(&old), octets(&old, 4).into(), octets(&new, 4).into());
        let steps = adjust(steps, word(&old), word(&new));
        assert_eq!(adjust_v6(steps, octets6(&old).into(), octets6(&new).into()), !sum(&new));
    }

    #[test]
    fn a_partial_field_moves_the_other_way() {
        assert_eq!(adjust_partial(0x1000, 0x0001, 0x0003), 0x1002);
        assert_eq!(adjust(0x1000, 0x0001, 0x0003), 0x0ffe);
    }

    #[test]
    fn an_all_zero_transmitted_checksum_value_means_that_there_is_none() {
        assert_eq!(Delta::NONE.word(1, 2).apply_udp(0), 0);
        // The checksum of a datagram whose sum became zero is written as all ones.
        let sum_before: u16 = 0xfffe;
        assert_eq!(Delta::NONE.word(1, 2).apply(!sum_before), 0);
        assert_eq!(Delta::NONE.word(1, 2).apply_udp(!sum_before), 0xffff);
    }

    #[test]
    fn a_delta_of_nothing_changes_nothing() {
        for checksum in [1, 0x1234, 0xfffe] {
            assert_eq!(Delta::NONE.apply(checksum), checksum);
            assert_eq!(Delta::NONE.word(7, 7).apply(checksum), checksum);
        }
    }

    #[test]
    fn pseudo_headers_are_summed_as_they_would_lie_in_memory() {
        let (a, b) = (Ipv4Addr::new(10, 1, 2, 3), Ipv4Addr::new(192, 168, 255, 254));
        let bytes = [&a.octets()[..], &b.octets(), &[0, 17, 0xff, 0xfe]].concat();
        assert_eq!(pseudo_v4(a, b, 17, 0xfffe).fold(), slow_sum(&bytes));
        let (a, b): (Ipv6Addr, Ipv6Addr) = ("fd00::1:2:3".parse().unwrap(), "fe80::ffff:ffff".parse().unwrap());
        let bytes = [&a.octets()[..], &b.octets(), &[0, 1, 0xff, 0xfe, 0, 0, 0, 58]].concat();
        assert_eq!(pseudo_v6(a, b, 58, 0x1_fffe).fold(), slow_sum(&bytes));
    }

    #[test]
    fn the_header_checksum_ignores_what_its_field_holds() {
        let mut header = noise(24);
        let expected = {
            header[10..12].fill(0);
            !slow_sum(&header)
        };
        for field in [0, 0x1234, 0xffff_u16] {
            header[10..12].copy_from_slice(&field.to_be_bytes());
            assert_eq!(ipv4_header(&header), expected);
        }
        header[10..12].copy_from_slice(&expected.to_be_bytes());
        assert!(verify_ipv4_header(&header));
        header[3] ^= 1;
        assert!(!verify_ipv4_header(&header));
    }

    #[test]
    fn a_packet_verifies_with_its_pseudo_header_only() {
        let pseudo = pseudo_v4(Ipv4Addr::LOCALHOST, Ipv4Addr::LOCALHOST, 17, 9);
        let mut packet = [0, 7, 0, 9, 0, 9, 0, 0, 0xab];
        let checksum = pseudo.clone().add(&packet).finish();
        packet[6..8].copy_from_slice(&checksum.to_be_bytes());
        assert!(verify(pseudo, &packet));
        assert!(!verify(Sum::new(), &packet));
        packet[8] ^= 0x10;
        assert!(!verify(pseudo, &packet));
    }
}
