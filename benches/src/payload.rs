//! What is done to the payload of superframes: it is summed on the way out, and verified on the way in.

use std::hint::black_box;
use std::ops::Range;

use weft_encap::checksum::{self, Sum};
use weft_encap::coalesce;
use weft_encap::eth::ETH_LEN;
use weft_encap::offload::Gso;
use weft_encap::segment::Segments;
use weft_encap::vxlan::{VXLAN_LEN, Vni, VxlanHeader};
use weft_encap::zerocopy::IntoBytes;

use crate::cases::SEGMENTS;
use crate::frames::{MSS, TCP_HEADERS, segment, superframe};
use crate::node::Family::V4;
use crate::node::{inwards, outwards};

/// Where an IPv4 header behind an Ethernet header has its identification and its checksum.
const ID: Range<usize> = 18..20;
const CHECK: Range<usize> = 24..26;

/// A superframe to be cut.
pub struct Cut {
    bytes: Vec<u8>,
    gso: Gso,
}

impl Default for Cut {
    fn default() -> Cut {
        let (bytes, offload) = superframe(outwards(V4), 1000, SEGMENTS);
        Cut { bytes, gso: offload.gso.expect("it is a superframe") }
    }
}

impl Cut {
    /// Its bytes in all.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Headers for every segment, and the sum of its payload; the payload itself is not copied.
    pub fn run(&self) {
        let mut headers = [0; TCP_HEADERS];
        let (head, payload) = black_box(&self.bytes).split_at(TCP_HEADERS);
        let segments = Segments::plan(head, ETH_LEN, ETH_LEN + 20, payload.len(), &self.gso).expect("it is sound");
        for index in 0..segments.count() {
            let mut sum = Sum::new();
            sum.add(&payload[segments.payload(index)]);
            segments.write(index, head, sum.fold(), &mut headers);
            black_box(&headers);
        }
    }
}

/// A train of tunnel packets as `UDP_GRO` hands it over, to be merged.
pub struct Merge {
    train: Vec<u8>,
}

impl Default for Merge {
    fn default() -> Merge {
        let tunnel = VxlanHeader::new(Vni::new(1).expect("1 fits 24 bits"));
        let mut train = Vec::new();
        for index in 0..SEGMENTS as u16 {
            let mut frame = segment(inwards(V4), 1000, 1 + u32::from(index) * u32::from(MSS), MSS.into());
            // IPv4's id counts up from segment to segment, as a sender's does.
            let word = |at: Range<usize>| u16::from_be_bytes([frame[at.start], frame[at.start + 1]]);
            let check = checksum::adjust(word(CHECK), word(ID), index);
            frame[ID].copy_from_slice(&index.to_be_bytes());
            frame[CHECK].copy_from_slice(&check.to_be_bytes());
            train.extend_from_slice(tunnel.as_bytes());
            train.extend_from_slice(&frame);
        }
        let merge = Merge { train };
        assert_eq!(merge.run(), SEGMENTS, "the train is one run");
        merge
    }
}

impl Merge {
    /// Its bytes in all.
    pub fn bytes(&self) -> usize {
        self.train.len()
    }

    /// Every checksum verified, one header for all. Returns how many segments became one.
    pub fn run(&self) -> usize {
        let mut head = [0; TCP_HEADERS];
        let run = coalesce::run(black_box(&self.train), self.train.len() / SEGMENTS, VXLAN_LEN);
        head.copy_from_slice(&self.train[VXLAN_LEN..VXLAN_LEN + TCP_HEADERS]);
        black_box(coalesce::finish(&mut head, &run));
        run.frames
    }
}
