//! Coalescing: what merges, what does not, and that cutting is its inverse.

use weft_encap::coalesce::{MAX_FRAMES, Run, finish, partial_checksum, run};
use weft_encap::offload::{Offload, Partial};
use weft_encap::tcp;

use crate::frames::{Flow, L3, ethernet, kinds, noise};
use crate::segment::{cut, gso};

const TUNNEL: [u8; 8] = [8, 0, 0, 0, 0, 0, 1, 0];

/// Lays frames into a receive buffer as UDP_GRO does. All but the last must be of the same length.
fn buffer(frames: &[Vec<u8>]) -> (Vec<u8>, usize) {
    let buf = frames.iter().flat_map(|frame| [&TUNNEL[..], frame].concat()).collect();
    (buf, TUNNEL.len() + frames[0].len())
}

fn merge(frames: &[Vec<u8>]) -> Run {
    let (buf, stride) = buffer(frames);
    run(&buf, stride, TUNNEL.len())
}

/// The second of two frames that merge.
fn second(first: &Flow) -> Flow {
    Flow { id: first.id.wrapping_add(1), seq: first.seq.wrapping_add(first.payload.len() as u32), ..first.clone() }
}

fn assert_alone(run: &Run, verified: bool) {
    assert_eq!((run.frames, run.gso, run.verified), (1, None, verified));
    let mut head = [0xa5; 200];
    assert_eq!(finish(&mut head, run), Offload { verified, ..Offload::default() });
    assert_eq!(head, [0xa5; 200]);
}

/// Merging what a superframe was cut into gives the superframe.
pub fn assert_merges_again(flow: &Flow, size: usize) {
    let frames = cut(flow, size);
    let count = frames.len().min(MAX_FRAMES);
    let run = merge(&frames);
    assert_eq!((run.frames, run.header_len, run.verified), (count, flow.header_len(), true));
    if frames.len() == 1 {
        return assert_alone(&run, true);
    }
    let whole = Flow { payload: flow.payload[..run.total_payload].to_vec(), ..flow.clone() };
    let whole = if count < frames.len() { Flow { flags: flow.flags & !(tcp::PSH | tcp::FIN), ..whole } } else { whole };
    assert_eq!(run.first_payload, size);
    assert_eq!(run.total_payload, (count - 1) * size + run.last_payload);
    let mut head = frames[0][..flow.header_len()].to_vec();
    let offload = finish(&mut head, &run);
    assert_eq!(head, whole.superframe_headers());
    let start = flow.l4() as u16;
    let partial = Partial { start, offset: flow.checksum_at() as u16 - start };
    assert_eq!(offload, Offload { partial: Some(partial), gso: Some(gso(flow, size)), verified: false });
}

#[test]
fn merging_what_was_cut_gives_the_superframe() {
    for flow in kinds() {
        for size in [8, 100, 333, 500, 999, 1000] {
            assert_merges_again(&flow, size);
        }
        let headers = flow.header_len() - L3;
        assert_merges_again(&Flow { payload: noise(65_535 - headers), ..flow }, 1400);
    }
}

#[test]
fn a_window_of_one_frame_passes_alone() {
    for flow in kinds() {
        assert_alone(&merge(&[flow.frame()]), true);
    }
}

#[test]
fn psh_and_fin_end_a_run_and_belong_to_it() {
    for flag in [tcp::PSH, tcp::FIN] {
        let first = Flow::default();
        let last = Flow { flags: tcp::ACK | flag, ..second(&first) };
        let beyond = second(&Flow { flags: tcp::ACK, ..last.clone() });
        let run = merge(&[first.frame(), last.frame(), beyond.frame()]);
        assert_eq!((run.frames, run.end_flags), (2, flag));
        let mut head = first.frame()[..first.header_len()].to_vec();
        finish(&mut head, &run);
        assert_eq!(head[first.l4() + 13], tcp::ACK | flag);
        // At the start there is nothing that could follow.
        let pushed = Flow { flags: tcp::ACK | flag, ..first };
        assert_alone(&merge(&[pushed.frame(), second(&pushed).frame()]), true);
    }
}

#[test]
fn a_shorter_frame_ends_a_run_and_belongs_to_it() {
    for first in kinds() {
        let middle = second(&first);
        let last = Flow { payload: noise(999), ..second(&middle) };
        let run = merge(&[first.frame(), middle.frame(), last.frame()]);
        assert_eq!((run.frames, run.last_payload, run.total_payload), (3, 999, 2999));
        // Padded to the stride, so that more could follow.
        let mut padded = last.frame();
        padded.push(0);
        let run = merge(&[first.frame(), middle.frame(), padded, second(&last).frame()]);
        assert_eq!((run.frames, run.last_payload, run.total_payload), (3, 999, 2999));
    }
}

#[test]
fn whatever_differs_stops_the_run() {
    type Change = fn(&mut Flow);
    let both: [(&str, Change); 11] = [
        ("source MAC", |next| next.src_mac[5] ^= 1),
        ("destination MAC", |next| next.dst_mac[5] ^= 1),
        ("source", |next| next.src ^= 1),
        ("destination", |next| next.dst ^= 1),
        ("TTL", |next| next.ttl -= 1),
        ("TOS", |next| next.tos ^= 1 << 5),
        ("ECN", |next| next.tos ^= 3),
        ("source port", |next| next.src_port ^= 1),
        ("destination port", |next| next.dst_port ^= 1),
        ("no payload", |next| next.payload.clear()),
        ("longer", |next| next.payload.push(0)),
    ];
    let v4: [(&str, Change); 3] = [
        ("id skips", |next| next.id = next.id.wrapping_add(1)),
        ("id goes back", |next| next.id = next.id.wrapping_sub(2)),
        ("DF", |next| next.dont_fragment ^= true),
    ];
    let v6: [(&str, Change); 1] = [("flow label", |next| next.flow_label ^= 1)];
    let tcp: [(&str, Change); 14] = [
        ("gap", |next| next.seq = next.seq.wrapping_add(1)),
        ("overlap", |next| next.seq = next.seq.wrapping_sub(1)),
        ("ack", |next| next.ack += 1),
        ("window", |next| next.window += 1),
        ("option", |next| next.options[7] ^= 1),
        ("fewer options", |next| next.options.truncate(4)),
        ("SYN", |next| next.flags |= tcp::SYN),
        ("RST", |next| next.flags |= tcp::RST),
        ("URG", |next| next.flags |= tcp::URG),
        ("ECE", |next| next.flags |= tcp::ECE),
        ("CWR", |next| next.flags |= tcp::CWR),
        ("AccECN", |next| next.accurate_ecn = true),
        ("urgent pointer", |next| next.urgent = 1),
        ("no ACK", |next| next.flags = 0),
    ];
    for first in kinds() {
        let version: &[_] = if first.v6 { &v6 } else { &v4 };
        let transport: &[_] = if first.tcp { &tcp } else { &[] };
        for (name, change) in both.iter().chain(version).chain(transport) {
            let mut next = second(&first);
            change(&mut next);
            // The frames lie in slots of one length, whatever happened to the second.
            let mut frames = [first.frame(), next.frame()];
            frames[0].push(0);
            let len = frames[0].len().max(frames[1].len());
            frames.iter_mut().for_each(|frame| frame.resize(len, 0));
            assert_alone(&merge(&frames), true);
            // The same change in both frames is none, where it is allowed at all.
            assert_eq!(merge(&[first.frame(), second(&first).frame()]).frames, 2, "{name}");
        }
    }
}

#[test]
fn frames_with_flags_that_mean_a_place_in_the_stream_pass_alone() {
    for flag in [tcp::SYN, tcp::RST, tcp::URG, tcp::CWR] {
        let first = Flow { flags: tcp::ACK | flag, ..Flow::default() };
        assert_alone(&merge(&[first.frame(), second(&first).frame()]), true);
    }
}

#[test]
fn pure_acknowledgements_never_merge() {
    let ack = Flow { payload: Vec::new(), ..Flow::default() };
    assert_alone(&merge(&[ack.frame(), second(&ack).frame()]), true);
}

#[test]
fn ece_on_all_frames_is_kept() {
    let first = Flow { flags: tcp::ACK | tcp::ECE, ..Flow::default() };
    assert_eq!(merge(&[first.frame(), second(&first).frame()]).frames, 2);
}

#[test]
fn an_id_may_stay_the_same_if_the_datagrams_are_never_fragmented() {
    for tcp in [false, true] {
        let first = Flow { tcp, ..Flow::default() };
        let flows = |flow: &Flow, ids: [u16; 3]| {
            let mut flow = flow.clone();
            ids.map(|id| {
                let frame = Flow { id: flow.id.wrapping_add(id), ..flow.clone() }.frame();
                flow.seq = flow.seq.wrapping_add(1000);
                frame
            })
        };
        assert_eq!(merge(&flows(&first, [0, 0, 0])).frames, 3);
        assert_eq!(merge(&flows(&first, [0, 1, 2])).frames, 3);
        // The second frame decides.
        assert_eq!(merge(&flows(&first, [0, 0, 1])).frames, 2);
        assert_eq!(merge(&flows(&first, [0, 1, 1])).frames, 2);
        let first = Flow { dont_fragment: false, ..first };
        assert_eq!(merge(&flows(&first, [0, 0, 0])).frames, 1);
        assert_eq!(merge(&flows(&first, [0, 1, 2])).frames, 3);
    }
}

#[test]
fn a_frame_with_a_bad_checksum_passes_alone_and_unverified() {
    for first in kinds() {
        let (good, next) = (first.frame(), second(&first).frame());
        let network = if first.v6 { None } else { Some(L3 + 10) };
        for at in [Some(first.checksum_at()), Some(first.header_len()), Some(good.len() - 1), network] {
            let Some(at) = at else { continue };
            let mut bad = next.clone();
            bad[at] ^= 0x40;
            assert_alone(&merge(&[good.clone(), bad.clone()]), true);
            assert_alone(&merge(&[bad, good.clone()]), false);
        }
        let third = second(&second(&first)).frame();
        let mut bad = third.clone();
        bad[first.header_len()] ^= 1;
        assert_eq!(merge(&[good.clone(), next.clone(), bad]).frames, 2);
        assert_eq!(merge(&[good, next, third]).frames, 3);
    }
}

#[test]
fn a_datagram_without_a_checksum_proves_nothing() {
    let frame = |word: u16| Flow { tcp: false, payload: word.to_be_bytes().to_vec(), ..Flow::default() }.frame();
    let at = Flow::default().l4() + 6;
    // Also where the sum is zero, so that a missing checksum would verify.
    let zero_sum = (0..=u16::MAX).find(|word| frame(*word)[at..at + 2] == [0xff, 0xff]);
    for word in [0x1234, zero_sum.unwrap()] {
        let mut frame = frame(word);
        assert_alone(&merge(&[frame.clone()]), true);
        frame[at..at + 2].fill(0);
        assert_alone(&merge(&[frame.clone(), frame]), false);
    }
}

#[test]
fn a_udp_length_that_does_not_fill_the_packet_is_odd() {
    let flow = Flow { tcp: false, ..Flow::default() };
    let mut frame = flow.frame();
    frame[flow.l4() + 5] -= 2;
    assert_alone(&merge(&[frame.clone(), frame]), false);
}

#[test]
fn another_tunnel_header_stops_the_run() {
    let first = Flow::default();
    for bit in 0..64 {
        let (mut buf, stride) = buffer(&[first.frame(), second(&first).frame()]);
        assert_eq!(run(&buf, stride, 8).frames, 2);
        buf[stride + bit / 8] ^= 1 << (bit % 8);
        assert_alone(&run(&buf, stride, 8), true);
    }
}

#[test]
fn a_run_is_no_longer_than_an_ip_packet() {
    for flow in kinds() {
        let mut frames = Vec::new();
        let mut next = Flow { payload: noise(16_000), ..flow.clone() };
        for _ in 0..4 {
            frames.push(next.frame());
            next = second(&next);
        }
        let room = 65_535 - (flow.header_len() - L3) - 4 * 16_000;
        for (payload, count) in [(room, 5), (room + 1, 4)] {
            let last = Flow { payload: noise(payload), ..next.clone() };
            let frames = [&frames[..], &[last.frame()]].concat();
            assert_eq!(merge(&frames).frames, count, "{payload}");
        }
    }
}

#[test]
fn a_run_has_a_bounded_number_of_frames() {
    for flow in kinds() {
        assert_merges_again(&Flow { payload: noise(MAX_FRAMES * 8 + 8), ..flow }, 8);
    }
}

#[test]
fn what_is_neither_plain_tcp_nor_plain_udp_passes_alone() {
    let mut options = Flow::default().frame();
    options[L3] = 0x46;
    let mut fragment = Flow::default().frame();
    fragment[L3 + 6] = 0x20;
    let mut reserved = Flow::default().frame();
    reserved[L3 + 6] |= 0x80;
    let mut icmp = Flow::default().frame();
    icmp[L3 + 9] = 1;
    let mut extension = Flow { v6: true, ..Flow::default() }.frame();
    extension[L3 + 6] = 60;
    let mut version = Flow { v6: true, ..Flow::default() }.frame();
    version[L3] = 0x45;
    let mut short = Flow::default().frame();
    short[Flow::default().l4() + 12] = 0x40;
    let arp = ethernet(0x0806, &[0; 28]);
    for frame in [options, fragment, reserved, icmp, extension, version, short, arp, vec![0; 13], Vec::new()] {
        let run = merge(&[frame.clone(), frame.clone()]);
        assert_alone(&run, false);
        assert_eq!((run.header_len, run.total_payload), (0, frame.len()));
    }
}

#[test]
fn a_frame_that_is_cut_off_passes_alone() {
    for flow in kinds() {
        let frame = flow.frame();
        for len in 0..frame.len() {
            assert_alone(&merge(&[frame[..len].to_vec(), frame[..len].to_vec()]), false);
        }
    }
}

#[test]
fn strides_and_tunnel_headers_of_any_length_are_taken() {
    let frame = Flow::default().frame();
    assert_alone(&run(&[], 0, 0), false);
    assert_alone(&run(&[], 100, 8), false);
    assert_alone(&run(&frame, 0, 0), true);
    assert_alone(&run(&frame, usize::MAX, 0), true);
    assert_alone(&run(&frame, 1, 0), false);
    assert_alone(&run(&frame, 100, usize::MAX), false);
    // Two datagrams that are shorter than a tunnel header.
    assert_alone(&run(&[0; 8], 4, 8), false);
}

#[test]
fn a_partial_checksum_is_recognised() {
    for flow in kinds() {
        let partial = [flow.superframe_headers(), flow.payload.clone()].concat();
        let is_partial = |frame: &[u8]| partial_checksum(frame, L3, flow.l4(), flow.protocol());
        assert!(is_partial(&partial));
        assert!(!is_partial(&flow.frame()));
        // Padding is not part of the packet, and a packet that is cut off has no length to speak of.
        assert!(is_partial(&[&partial[..], &[0; 4]].concat()));
        assert!(!is_partial(&partial[..partial.len() - 1]));
        let other = if flow.tcp { 17 } else { 6 };
        assert!(!partial_checksum(&partial, L3, flow.l4(), other));
        assert!(!partial_checksum(&partial, L3, flow.l4(), 58));
        // A frame with a partial checksum does not merge, since there is nothing to verify.
        assert_alone(&merge(&[partial.clone(), partial.clone()]), false);
    }
}

#[test]
fn completing_a_checksum_that_only_looks_partial_changes_nothing() {
    for flow in kinds() {
        // Find a payload for which the complete checksum is the pseudo-header's sum.
        let flow = Flow { payload: vec![0; 2], ..flow };
        let headers = flow.superframe_headers();
        let field = flow.checksum_at()..flow.checksum_at() + 2;
        let word = (0..=u16::MAX).find(|word| {
            let frame = Flow { payload: word.to_be_bytes().to_vec(), ..flow.clone() }.frame();
            frame[field.clone()] == headers[field.clone()]
        });
        let complete = Flow { payload: word.expect("one of all words").to_be_bytes().to_vec(), ..flow.clone() };
        let before = complete.frame();
        assert!(partial_checksum(&before, L3, flow.l4(), flow.protocol()));
        let mut after = before.clone();
        let start = flow.l4() as u16;
        Partial { start, offset: flow.checksum_at() as u16 - start }.fill(&mut after, []).unwrap();
        assert_eq!(after, before);
    }
}
