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
    let mut all = [0u64; LANES];
    let mut high = [0u64; LANES];
    let (blocks, rest) = bytes.as_chunks::<{ LANES * 8 }>();
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
