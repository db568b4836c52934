//! Segmentation, byte for byte against frames that etherparse built one by one.

use weft_encap::checksum;
use weft_encap::offload::{Gso, GsoKind};
use weft_encap::segment::{MAX_SEGMENTS, SegmentError, Segments};
use weft_encap::tcp;

use crate::frames::{Flow, L3, kinds, noise};

pub fn gso(flow: &Flow, size: usize) -> Gso {
    let kind = match (flow.tcp, flow.v6) {
        (true, false) => GsoKind::Tcp4,
        (true, true) => GsoKind::Tcp6,
        (false, _) => GsoKind::Udp,
    };
    Gso { kind, ecn: flow.flags & tcp::CWR != 0, size: size as u16, header_len: flow.header_len() as u16 }
}

fn plan(flow: &Flow, headers: &[u8], size: usize) -> Result<Segments, SegmentError> {
    Segments::plan(headers, L3, flow.l4(), flow.payload.len(), &gso(flow, size))
}

/// All segments of a superframe as whole frames.
pub fn cut(flow: &Flow, size: usize) -> Vec<Vec<u8>> {
    let headers = flow.superframe_headers();
    let segments = plan(flow, &headers, size).expect("a sound superframe can be cut");
    let segment = |i| {
        let payload = &flow.payload[segments.payload(i)];
        let mut out = vec![0xa5; segments.header_len() + 2];
        segments.write(i, &headers, checksum::sum(payload), &mut out);
        assert_eq!(out[segments.header_len()..], [0xa5; 2], "nothing is written behind the headers");
        out.truncate(segments.header_len());
        out.extend(payload);
        out
    };
    (0..segments.count()).map(segment).collect()
}

pub fn assert_cut_as_the_oracle_builds(flow: &Flow, size: usize) {
    let frames = cut(flow, size);
    assert_eq!(frames.len(), flow.payload.len().div_ceil(size));
    for (i, frame) in frames.iter().enumerate() {
        assert_eq!(*frame, flow.nth(i, size).frame(), "segment {i} of {flow:?}");
    }
}

#[test]
fn segments_are_what_the_sender_would_have_sent_one_by_one() {
    for flow in kinds() {
        for size in [1, 7, 333, 500, 999, 1000, 1001, 65_535] {
            assert_cut_as_the_oracle_builds(&flow, size);
        }
    }
}

#[test]
fn fin_and_psh_are_on_the_last_segment_only_and_cwr_on_the_first() {
    let flags = tcp::ACK | tcp::FIN | tcp::PSH | tcp::CWR | tcp::ECE;
    for flow in [Flow { flags, ..Flow::default() }, Flow { v6: true, flags, ..Flow::default() }] {
        assert_cut_as_the_oracle_builds(&flow, 300);
        let seen: Vec<_> = cut(&flow, 300).iter().map(|frame| frame[flow.l4() + 13]).collect();
        let middle = tcp::ACK | tcp::ECE;
        assert_eq!(seen, [middle | tcp::CWR, middle, middle, middle | tcp::FIN | tcp::PSH]);
    }
}

#[test]
fn the_largest_superframe_can_be_cut() {
    for flow in kinds() {
        let headers = flow.header_len() - L3;
        let flow = Flow { payload: noise(65_535 - headers), ..flow };
        assert_cut_as_the_oracle_builds(&flow, 1448);
    }
}

#[test]
fn the_largest_ipv6_payload_may_stay_whole() {
    for flow in kinds().into_iter().filter(|flow| flow.v6) {
        let flow = Flow { payload: noise(65_535 - (flow.header_len() - flow.l4())), ..flow };
        assert_cut_as_the_oracle_builds(&flow, 65_535);
        assert_cut_as_the_oracle_builds(&flow, 1448);
    }
}

#[test]
fn a_udp_checksum_of_zero_is_transmitted_as_all_ones() {
    // The payload's first word takes each value once: for one of them the checksum comes out as zero.
    let flow = Flow { tcp: false, payload: vec![0; 4], ..Flow::default() };
    let headers = flow.superframe_headers();
    let segments = plan(&flow, &headers, 4).unwrap();
    let mut all_ones = 0;
    for payload_sum in 0..=u16::MAX {
        let mut out = vec![0xa5; segments.header_len()];
        segments.write(0, &headers, payload_sum, &mut out);
        let field = &out[flow.checksum_at()..][..2];
        assert_ne!(field, [0, 0]);
        all_ones += u32::from(field == [0xff, 0xff]);
    }
    assert_eq!(all_ones, 1);
}

#[test]
fn ipv4_options_are_copied_into_each_segment() {
    let flow = Flow::default();
    let mut headers = flow.superframe_headers();
    headers.splice(L3 + 20..L3 + 20, [1, 1, 1, 0]);
    headers[L3] = 0x46;
    let total_len = (headers.len() - L3 + flow.payload.len()) as u16;
    headers[L3 + 2..L3 + 4].copy_from_slice(&total_len.to_be_bytes());
    let segments = Segments::plan(&headers, L3, L3 + 24, flow.payload.len(), &gso(&flow, 400)).unwrap();
    for i in 0..segments.count() {
        let payload = &flow.payload[segments.payload(i)];
        let mut out = vec![0xa5; segments.header_len()];
        segments.write(i, &headers, checksum::sum(payload), &mut out);
        assert_eq!(out[L3 + 20..L3 + 24], [1, 1, 1, 0]);
        assert!(checksum::verify_ipv4_header(&out[L3..L3 + 24]));
        out.extend(payload);
        let sliced = etherparse::SlicedPacket::from_ethernet(&out).unwrap();
        let Some(etherparse::TransportSlice::Tcp(tcp)) = sliced.transport else { panic!("no TCP") };
        let oracle = tcp.to_header().calc_checksum_ipv4_raw([10, 244, 1, 1], [10, 244, 2, 2], payload).unwrap();
        assert_eq!(tcp.checksum(), oracle);
    }
}

#[test]
fn ipv6_extension_headers_are_copied_into_each_segment() {
    let flow = Flow { v6: true, ..Flow::default() };
    let mut headers = flow.superframe_headers();
    headers.splice(L3 + 40..L3 + 40, [6, 0, 1, 4, 0, 0, 0, 0]);
    headers[L3 + 6] = 60;
    let payload_len = (headers.len() - L3 - 40 + flow.payload.len()) as u16;
    headers[L3 + 4..L3 + 6].copy_from_slice(&payload_len.to_be_bytes());
    let plan = |headers: &[u8]| Segments::plan(headers, L3, L3 + 48, flow.payload.len(), &gso(&flow, 400));
    let segments = plan(&headers).unwrap();
    for i in 0..segments.count() {
        let payload = &flow.payload[segments.payload(i)];
        let mut out = vec![0xa5; segments.header_len()];
        segments.write(i, &headers, checksum::sum(payload), &mut out);
        let expected = flow.nth(i, 400).frame();
        assert_eq!(out[L3 + 48..], expected[L3 + 40..flow.header_len()]);
        assert_eq!(u16::from_be_bytes([out[L3 + 4], out[L3 + 5]]) as usize, out.len() - L3 - 40 + payload.len());
    }
    // With a Routing header, checksums cover an address that is not in the fixed header.
    headers[L3 + 6] = 43;
    assert_eq!(plan(&headers).err(), Some(SegmentError::Header));
    headers[L3 + 6] = 44;
    assert_eq!(plan(&headers).err(), Some(SegmentError::Fragment));
}

#[test]
fn fragments_cannot_be_cut() {
    let flow = Flow::default();
    for fragment in [[0x20, 0], [0, 1], [0x3f, 0xff]] {
        let mut headers = flow.superframe_headers();
        headers[L3 + 6..L3 + 8].copy_from_slice(&fragment);
        assert_eq!(plan(&flow, &headers, 100).err(), Some(SegmentError::Fragment));
    }
}

#[test]
fn a_superframe_without_payload_or_size_is_refused() {
    for flow in kinds() {
        let headers = flow.superframe_headers();
        assert_eq!(plan(&flow, &headers, 0).err(), Some(SegmentError::Empty));
        let empty = Flow { payload: Vec::new(), ..flow };
        assert_eq!(plan(&empty, &empty.superframe_headers(), 100).err(), Some(SegmentError::Empty));
    }
}

#[test]
fn the_number_of_segments_has_a_bound() {
    let flow = Flow { payload: noise(MAX_SEGMENTS * 3), ..Flow::default() };
    assert_eq!(plan(&flow, &flow.superframe_headers(), 3).unwrap().count(), MAX_SEGMENTS);
    let flow = Flow { payload: noise(MAX_SEGMENTS * 3 + 1), ..Flow::default() };
    assert_eq!(plan(&flow, &flow.superframe_headers(), 3).err(), Some(SegmentError::TooMany));
}

#[test]
fn headers_of_another_kind_are_refused() {
    for flow in kinds() {
        let headers = flow.superframe_headers();
        for other in kinds() {
            let gso = gso(&other, 100);
            let plan = Segments::plan(&headers, L3, flow.l4(), flow.payload.len(), &gso);
            let same = flow.tcp == other.tcp && (flow.v6 == other.v6 || !flow.tcp);
            assert_eq!(plan.err(), if same { None } else { Some(SegmentError::Kind) });
        }
    }
}

#[test]
fn headers_that_do_not_end_where_they_say_are_refused() {
    for flow in kinds() {
        let headers = flow.superframe_headers();
        let gso = gso(&flow, 100);
        for len in 0..headers.len() {
            // Telling the truth about the whole length does not help.
            for payload_len in [flow.payload.len(), flow.payload.len() + headers.len() - len] {
                assert!(Segments::plan(&headers[..len], L3, flow.l4(), payload_len, &gso).is_err(), "{len}");
            }
        }
        for (l3, l4) in [
            (L3 + 1, flow.l4()),
            (L3, flow.l4() + 4),
            (L3, flow.l4() - 4),
            (200, 240),
            (flow.l4(), L3),
            (0, usize::MAX),
        ] {
            assert!(Segments::plan(&headers, l3, l4, flow.payload.len(), &gso).is_err(), "{l3} {l4}");
        }
    }
}

#[test]
fn lengths_that_do_not_fit_the_payload_are_refused() {
    for flow in kinds() {
        let headers = flow.superframe_headers();
        for payload_len in [flow.payload.len() - 1, flow.payload.len() + 1, usize::MAX / 2] {
            let plan = Segments::plan(&headers, L3, flow.l4(), payload_len, &gso(&flow, 100));
            assert!(matches!(plan.err(), Some(SegmentError::Length | SegmentError::TooMany)), "{payload_len}");
        }
    }
    let flow = Flow { tcp: false, ..Flow::default() };
    let mut headers = flow.superframe_headers();
    headers[flow.l4() + 5] ^= 1;
    assert_eq!(plan(&flow, &headers, 100).err(), Some(SegmentError::Length));
}
