//! `virtio_net_hdr_v1`, 12 bytes, little endian: what a TAP puts in front of every frame (VIRTIO 1.2 section 5.1.6).
//!
//! The kernel relays what a pod's stack, or a pod's raw socket, said about the frame, so each field is hostile. What
//! [`parse`] returns points into the frame; whether it points at a TCP or UDP header there is for the reader of that
//! header to check.

use core::fmt;

use zerocopy::byteorder::little_endian::U16;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::offload::{Gso, GsoKind, Offload, Partial};
use crate::{tcp, udp};

/// The length of the header.
pub const LEN: usize = size_of::<VirtioHeader>();

/// `flags`: the checksum is still to be filled in.
pub const NEEDS_CSUM: u8 = 1;
/// `flags`: the checksum has been verified.
pub const DATA_VALID: u8 = 2;

/// `gso_type`: not a superframe.
pub const GSO_NONE: u8 = 0;
/// `gso_type`: TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// `gso_type`: TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// `gso_type`: UDP, one datagram per segment.
pub const GSO_UDP_L4: u8 = 5;
/// `gso_type`, in addition to a TCP one: CWR is set.
pub const GSO_ECN: u8 = 0x80;

#[derive(Copy, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct VirtioHeader {
    flags: u8,
    gso_type: u8,
    hdr_len: U16,
    gso_size: U16,
    csum_start: U16,
    csum_offset: U16,
    num_buffers: U16,
}

/// Why a header is refused.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum VirtioError {
    /// A flag other than [`NEEDS_CSUM`] and [`DATA_VALID`].
    UnknownFlags,
    /// A kind of superframe that was never asked for.
    UnknownGso,
    /// A superframe whose checksum is complete, or lies where its kind has none.
    GsoChecksum,
    /// A superframe of segments without payload.
    GsoSizeZero,
    /// The checksum field lies outside of the frame.
    ChecksumOutside,
}

impl fmt::Display for VirtioError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UnknownFlags => "a virtio header has unknown flags",
            Self::UnknownGso => "a virtio header has an unknown segmentation type",
            Self::GsoChecksum => "a virtio header asks for segmentation without the checksum that goes with it",
            Self::GsoSizeZero => "a virtio header asks for segments of size zero",
            Self::ChecksumOutside => "a virtio header's checksum field lies outside of the frame",
        })
    }
}

impl std::error::Error for VirtioError {}

/// Reads the header in front of a frame of `frame_len` bytes.
///
/// `num_buffers` is ignored: TAP leaves it as it was. `hdr_len` is a hint that the kernel may set too large; where it
/// cannot be true, the shortest length that the transport header allows takes its place.
pub fn parse(header: &[u8; LEN], frame_len: usize) -> Result<Offload, VirtioError> {
    let header = VirtioHeader::read_from_bytes(header).expect("the lengths are the same");
    if header.flags & !(NEEDS_CSUM | DATA_VALID) != 0 {
        return Err(VirtioError::UnknownFlags);
    }
    let partial = partial(&header, frame_len)?;
    let gso = gso(&header, partial, frame_len)?;
    Ok(Offload { partial, gso, verified: partial.is_none() && header.flags & DATA_VALID != 0 })
}

fn partial(header: &VirtioHeader, frame_len: usize) -> Result<Option<Partial>, VirtioError> {
    if header.flags & NEEDS_CSUM == 0 {
        return Ok(None);
    }
    let (start, offset) = (header.csum_start.get(), header.csum_offset.get());
    if usize::from(start) + usize::from(offset) + 2 > frame_len {
        return Err(VirtioError::ChecksumOutside);
    }
    Ok(Some(Partial { start, offset }))
}

fn gso(header: &VirtioHeader, partial: Option<Partial>, frame_len: usize) -> Result<Option<Gso>, VirtioError> {
    let ecn = header.gso_type & GSO_ECN != 0;
    let (kind, field, shortest) = match header.gso_type & !GSO_ECN {
        GSO_NONE if !ecn => return Ok(None),
        GSO_TCPV4 => (GsoKind::Tcp4, tcp::CHECKSUM_OFFSET, tcp::TCP_LEN),
        GSO_TCPV6 => (GsoKind::Tcp6, tcp::CHECKSUM_OFFSET, tcp::TCP_LEN),
        GSO_UDP_L4 if !ecn => (GsoKind::Udp, udp::CHECKSUM_OFFSET, udp::UDP_LEN),
        _ => return Err(VirtioError::UnknownGso),
    };
    let Some(partial) = partial.filter(|partial| usize::from(partial.offset) == field) else {
        return Err(VirtioError::GsoChecksum);
    };
    let size = header.gso_size.get();
    if size == 0 {
        return Err(VirtioError::GsoSizeZero);
    }
    let least = usize::from(partial.start) + shortest;
    let told = usize::from(header.hdr_len.get());
    let header_len = if (least..=frame_len).contains(&told) { told } else { least };
    Ok(Some(Gso { kind, ecn, size, header_len: header_len.try_into().unwrap_or(u16::MAX) }))
}

/// Writes the header for a frame that goes to a TAP.
pub fn write(offload: &Offload, out: &mut [u8; LEN]) {
    let mut header = VirtioHeader::new_zeroed();
    if let Some(partial) = offload.partial {
        header.flags = NEEDS_CSUM;
        header.csum_start = partial.start.into();
        header.csum_offset = partial.offset.into();
    } else if offload.verified {
        header.flags = DATA_VALID;
    }
    if let Some(gso) = offload.gso {
        let kind = match gso.kind {
            GsoKind::Tcp4 => GSO_TCPV4,
            GsoKind::Tcp6 => GSO_TCPV6,
            GsoKind::Udp => GSO_UDP_L4,
        };
        header.gso_type = if gso.ecn { kind | GSO_ECN } else { kind };
        header.hdr_len = gso.header_len.into();
        header.gso_size = gso.size.into();
    }
    header.write_to(out).expect("the lengths are the same");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Linux writes for a TCP superframe over IPv4 with 12 bytes of options.
    const GOLDEN: [u8; LEN] = [1, 1, 66, 0, 0xa8, 0x05, 34, 0, 16, 0, 0, 0];
    const FRAME: usize = 66 + 4000;

    fn golden() -> Offload {
        Offload {
            partial: Some(Partial { start: 34, offset: 16 }),
            gso: Some(Gso { kind: GsoKind::Tcp4, ecn: false, size: 1448, header_len: 66 }),
            verified: false,
        }
    }

    fn changed(at: usize, byte: u8) -> [u8; LEN] {
        let mut header = GOLDEN;
        header[at] = byte;
        header
    }

    #[test]
    fn golden_header_goes_both_ways() {
        assert_eq!(parse(&GOLDEN, FRAME), Ok(golden()));
        let mut out = [0xa5; LEN];
        write(&golden(), &mut out);
        assert_eq!(out, GOLDEN);
    }

    #[test]
    fn every_kind_goes_both_ways() {
        for (kind, offset, ecn) in
            [(GsoKind::Tcp4, 16, true), (GsoKind::Tcp6, 16, false), (GsoKind::Tcp6, 16, true), (GsoKind::Udp, 6, false)]
        {
            let partial = Some(Partial { start: 54, offset });
            let gso = Some(Gso { kind, ecn, size: 1, header_len: 74 });
            for gso in [gso, None] {
                let offload = Offload { partial, gso, verified: false };
                let mut out = [0xa5; LEN];
                write(&offload, &mut out);
                assert_eq!(parse(&out, FRAME), Ok(offload));
            }
        }
    }

    #[test]
    fn a_verified_frame_and_a_plain_one_go_both_ways() {
        for verified in [false, true] {
            let offload = Offload { verified, ..Offload::default() };
            let mut out = [0xa5; LEN];
            write(&offload, &mut out);
            assert_eq!(out, [if verified { DATA_VALID } else { 0 }, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            assert_eq!(parse(&out, 0), Ok(offload));
        }
    }

    #[test]
    fn num_buffers_is_left_as_it_was() {
        let mut header = changed(10, 0xff);
        header[11] = 0xff;
        assert_eq!(parse(&header, FRAME), Ok(golden()));
    }

    #[test]
    fn unknown_flags_are_refused() {
        for bit in 2..8 {
            assert_eq!(parse(&changed(0, 1 | 1 << bit), FRAME), Err(VirtioError::UnknownFlags));
        }
    }

    #[test]
    fn unknown_kinds_of_superframe_are_refused() {
        for kind in (0..=255).filter(|kind| ![0, 1, 4, 5, 0x81, 0x84].contains(kind)) {
            assert_eq!(parse(&changed(1, kind), FRAME), Err(VirtioError::UnknownGso), "{kind}");
        }
    }

    #[test]
    fn a_superframe_needs_its_own_checksum_to_be_partial() {
        assert_eq!(parse(&changed(0, 0), FRAME), Err(VirtioError::GsoChecksum));
        assert_eq!(parse(&changed(0, DATA_VALID), FRAME), Err(VirtioError::GsoChecksum));
        assert_eq!(parse(&changed(8, 6), FRAME), Err(VirtioError::GsoChecksum));
        assert_eq!(parse(&changed(1, GSO_UDP_L4), FRAME), Err(VirtioError::GsoChecksum));
    }

    #[test]
    fn segments_of_size_zero_are_refused() {
        let mut header = changed(4, 0);
        header[5] = 0;
        assert_eq!(parse(&header, FRAME), Err(VirtioError::GsoSizeZero));
    }

    #[test]
    fn the_checksum_lies_within_the_frame() {
        assert!(parse(&GOLDEN, 52).is_ok());
        assert_eq!(parse(&GOLDEN, 51), Err(VirtioError::ChecksumOutside));
        assert_eq!(parse(&changed(7, 0xff), FRAME), Err(VirtioError::ChecksumOutside));
        assert_eq!(parse(&[1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0], FRAME), Err(VirtioError::ChecksumOutside));
    }

    #[test]
    fn an_implausible_header_length_is_ignored() {
        let header_len = |header: [u8; LEN]| parse(&header, FRAME).unwrap().gso.unwrap().header_len;
        assert_eq!(header_len(GOLDEN), 66);
        assert_eq!(header_len(changed(2, 0)), 54);
        assert_eq!(header_len(changed(2, 53)), 54);
        assert_eq!(header_len(changed(3, 0xff)), 54);
    }
}
