//! Random and damaged bytes through every way in.

use proptest::prelude::*;
use weft_encap::exercise;

use crate::frames::{Flow, L3, kinds, noise};
use crate::segment::cut;

/// A receive buffer with sound frames, in the form that [`exercise::coalescing`] takes.
fn receive_buffer(flow: &Flow, size: usize) -> Vec<u8> {
    let frames = cut(flow, size);
    let stride = (8 + frames[0].len()) as u16;
    let datagrams = frames.iter().flat_map(|frame| [&[8, 0, 0, 0, 0, 0, 1, 0], &frame[..]].concat());
    stride.to_be_bytes().into_iter().chain([8]).chain(datagrams).collect()
}

/// A sound superframe, in the form that [`exercise::segmentation`] takes.
fn superframe(flow: &Flow, size: u16) -> Vec<u8> {
    let kind = if !flow.tcp { 2 } else { u8::from(flow.v6) };
    let [s0, s1] = size.to_be_bytes();
    let [p0, p1] = (flow.payload.len() as u16).to_be_bytes();
    let mut bytes = vec![kind, L3 as u8, flow.l4() as u8, s0, s1, p0, p1, 0xa5];
    bytes.extend(flow.superframe_headers());
    bytes
}

fn damage() -> impl Strategy<Value = Vec<(prop::sample::Index, u8)>> {
    prop::collection::vec(any::<(prop::sample::Index, u8)>(), 0..4)
}

fn damaged(mut bytes: Vec<u8>, damage: &[(prop::sample::Index, u8)]) -> Vec<u8> {
    for (at, byte) in damage {
        *at.get_mut(&mut bytes) = *byte;
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_bytes_break_no_promise(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        exercise::everything(&bytes);
    }

    #[test]
    fn small_numbers_break_no_promise(bytes in prop::collection::vec(0..64u8, 0..120)) {
        exercise::everything(&bytes);
    }

    #[test]
    fn damaged_superframes_break_no_promise(kind in 0..4usize, size in 1..500u16, damage in damage()) {
        exercise::segmentation(&damaged(superframe(&kinds()[kind], size), &damage));
    }

    #[test]
    fn damaged_receive_buffers_break_no_promise(kind in 0..4usize, size in 50..400usize, damage in damage()) {
        exercise::coalescing(&damaged(receive_buffer(&kinds()[kind], size), &damage));
    }

    #[test]
    fn damaged_headers_of_frames_break_no_promise(kind in 0..4usize, damage in damage()) {
        let flow = Flow { payload: noise(4), ..kinds()[kind].clone() };
        let mut bytes = vec![L3 as u8, flow.l4() as u8, flow.protocol()];
        bytes.extend(flow.superframe_headers());
        bytes.extend(&flow.payload);
        exercise::partial_checksum(&damaged(bytes, &damage));
    }
}
