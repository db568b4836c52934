//! Random flows, with etherparse as the oracle for every byte.

use proptest::prelude::*;
use weft_encap::checksum::{self, Delta};
use weft_encap::offload::Partial;
use weft_encap::tcp;

use crate::coalesce::assert_merges_again;
use crate::frames::{Flow, L3, noise};
use crate::segment::assert_cut_as_the_oracle_builds;

/// Flags of a segment that may merge.
const FLAGS: [u8; 6] =
    [tcp::ACK, tcp::ACK | tcp::PSH, tcp::ACK | tcp::FIN, tcp::ACK | tcp::ECE, tcp::PSH | tcp::FIN, 0];

prop_compose! {
    fn flow()(
        (v6, tcp, dont_fragment) in any::<(bool, bool, bool)>(),
        (id, ttl, tos, flow_label) in (any::<u16>(), any::<u8>(), any::<u8>(), 0..1u32 << 20),
        (src, dst, src_port, dst_port) in any::<(u8, u8, u16, u16)>(),
        (seq, ack, window, urgent) in any::<(u32, u32, u16, u16)>(),
        flags in prop::sample::select(&FLAGS[..]),
        options in (0..=10usize).prop_map(|words| noise(words * 4)),
        payload in prop_oneof![prop::collection::vec(any::<u8>(), 1..100), (1..20_000usize).prop_map(noise)],
    ) -> Flow {
        Flow {
            v6, tcp, dont_fragment, id, ttl, tos, flow_label, src, dst, src_port, dst_port, seq, ack, window, urgent,
            flags, options, payload, ..Flow::default()
        }
    }
}

/// A segment size that makes a few to a few hundred segments.
fn size() -> impl Strategy<Value = usize> {
    prop_oneof![40..200usize, 200..3000usize]
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

proptest! {
    #[test]
    fn segments_are_what_the_oracle_builds(flow in flow(), cwr in any::<bool>(), size in size()) {
        let flags = if cwr { flow.flags | tcp::CWR } else { flow.flags };
        assert_cut_as_the_oracle_builds(&Flow { flags, ..flow }, size);
    }

    #[test]
    fn merging_what_was_cut_gives_the_superframe(flow in flow(), size in size()) {
        assert_merges_again(&flow, size);
    }

    #[test]
    fn a_partial_checksum_is_completed_to_what_the_oracle_computes(flow in flow(), split in 0..100usize) {
        let mut headers = flow.superframe_headers();
        let start = flow.l4() as u16;
        let (a, b) = flow.payload.split_at(split.min(flow.payload.len()));
        Partial { start, offset: flow.checksum_at() as u16 - start }.fill(&mut headers, [a, b]).unwrap();
        let oracle = flow.frame();
        prop_assert_eq!(&headers[..], &oracle[..headers.len()]);
    }

    #[test]
    fn headers_verify_as_the_oracle_made_them(flow in flow()) {
        let frame = flow.frame();
        if !flow.v6 {
            prop_assert!(checksum::verify_ipv4_header(&frame[L3..L3 + 20]));
            prop_assert_eq!(checksum::ipv4_header(&frame[L3..L3 + 20]), word(&frame, L3 + 10));
        }
        let run = weft_encap::coalesce::run(&frame, 0, 0);
        prop_assert!(run.verified);
    }

    #[test]
    fn a_translated_flow_has_the_checksums_that_the_oracle_computes(
        flow in flow(), (src, dst) in any::<(u8, u8)>(), (src_port, dst_port) in any::<(u16, u16)>(),
    ) {
        let after = Flow { src, dst, src_port, dst_port, ..flow.clone() };
        let (old, new) = (flow.frame(), after.frame());
        let addresses = if flow.v6 { L3 + 8..L3 + 40 } else { L3 + 12..L3 + 20 };
        let words = |range: std::ops::Range<usize>| range.step_by(2);
        let address = words(addresses).fold(Delta::NONE, |delta, at| delta.word(word(&old, at), word(&new, at)));
        let all = words(flow.l4()..flow.l4() + 4).fold(address, |delta, at| delta.word(word(&old, at), word(&new, at)));
        let field = word(&old, flow.checksum_at());
        let got = if flow.tcp { all.apply(field) } else { all.apply_udp(field) };
        prop_assert_eq!(got, word(&new, flow.checksum_at()));
        if !flow.v6 {
            prop_assert_eq!(address.apply(word(&old, L3 + 10)), word(&new, L3 + 10));
        }
        // A partial checksum does not cover the ports.
        let (old, new) = (flow.superframe_headers(), after.superframe_headers());
        prop_assert_eq!(address.apply_partial(word(&old, flow.checksum_at())), word(&new, flow.checksum_at()));
    }
}
