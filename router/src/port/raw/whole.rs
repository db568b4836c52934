//! Superframes that leave whole: those of TCP, by a [`Wrapper`], as long as it can.
//!
//! All other packets, and superframes when there is no wrapper or it had to drop one a moment ago, go by raw sockets and are cut there.

use std::io::IoSlice;
use std::net::IpAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use rustix::io::Errno;
use weft_encap::eth::{ETH_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6};
use weft_encap::format::Format;
use weft_encap::gre::GRE_LEN;
use weft_encap::ip;
use weft_encap::ipv6::IPV6_LEN;
use weft_encap::offload::{GsoKind, Offload};
use weft_encap::virtio;

use super::wrapper::{self, Wrap, Wrapper, WrapperPlace};
use crate::drop_reason::DropReason;
use crate::frame::Frame;
use crate::port::sys::packet::FRAMES;
use crate::port::{PortId, Queue};
use crate::stats::Stats;

/// How long nothing leaves whole after the program had to drop something.
const PAUSE: Duration = Duration::from_secs(10);
/// Slices of one call.
const SLICES: usize = 512;
/// Virtio's header and the outer headers of one frame, at most.
const PREFIX: usize = virtio::LEN + ETH_LEN + IPV6_LEN + GRE_LEN + ETH_LEN;

/// One worker's way for superframes.
pub(super) struct Whole {
    id: PortId,
    local: IpAddr,
    place: WrapperPlace,
    /// Which wrapper was used last, and how many of its failures are counted.
    known: Option<(Arc<Wrapper>, u64)>,
    /// Nothing leaves whole before.
    paused: Option<Instant>,
}

impl Whole {
    pub(super) fn new(id: PortId, local: IpAddr, place: WrapperPlace) -> Whole {
        Whole { id, local, place, known: None, paused: None }
    }

    /// What to send by now, if there is something.
    pub(super) fn wrapper(&mut self) -> Option<Arc<Wrapper>> {
        if self.paused.is_some_and(|until| Instant::now() < until) {
            return None;
        }
        self.paused = None;
        let current = self.place.load();
        let current = current.as_ref()?;
        match &self.known {
            Some((known, _)) if Arc::ptr_eq(known, current) => Some(Arc::clone(known)),
            _ => {
                self.known = Some((Arc::clone(current), current.failures()));
                Some(Arc::clone(current))
            }
        }
    }

    /// Whether this frame can leave whole.
    pub(super) fn takes(&self, frame: &Frame) -> bool {
        let (Some(outer), Some(gso)) = (frame.outer, frame.offload.gso) else { return false };
        let tunnel = match outer.format {
            Format::Gre | Format::Gretap => GRE_LEN,
            Format::Ipip => 1,
            Format::Vxlan | Format::Geneve => return false,
        };
        let inner = frame.len().saturating_sub(usize::from(outer.base) + ETH_LEN);
        matches!(gso.kind, GsoKind::Tcp4 | GsoKind::Tcp6)
            && !outer.in_fragments
            && frame.offload.partial.is_some()
            && usize::from(outer.base) == tunnel
            && outer.peer.is_ipv4() == self.local.is_ipv4()
            && Wrap::new(outer.format, outer.peer.is_ipv4()).len() + inner <= usize::from(u16::MAX)
    }

    /// Sends from the front of the queue what can leave whole, in one call. Returns how many frames that were.
    ///
    /// # Errors
    /// The kernel's for the first one.
    pub(super) fn send(&self, wrapper: &Wrapper, queue: &Queue) -> Result<usize, Errno> {
        let header = wrapper.outlet.header();
        let mut prefixes = ArrayVec::<([u8; PREFIX], usize), FRAMES>::new();
        for frame in queue.iter().take(FRAMES).take_while(|frame| self.takes(frame)) {
            let mut bytes = [0; PREFIX];
            let Some(len) = self.write_prefix(frame, header, &mut bytes) else { break };
            prefixes.push((bytes, len));
        }
        let mut slices = ArrayVec::<IoSlice<'_>, SLICES>::new();
        let mut frames = ArrayVec::<Range<usize>, FRAMES>::new();
        for ((prefix, len), frame) in prefixes.iter().zip(queue.iter()) {
            let first = slices.len();
            let pieces = frame.slices(frame.base() + ETH_LEN..frame.len());
            let mut all = std::iter::once(&prefix[..*len]).chain(pieces);
            if !all.all(|piece| slices.try_push(IoSlice::new(piece)).is_ok()) {
                slices.truncate(first);
                break;
            }
            frames.push(first..slices.len());
        }
        if frames.is_empty() { Err(Errno::MSGSIZE) } else { wrapper.outlet.send(&frames, &slices) }
    }

    /// Writes all that stands before a frame's inner IP header; how long that is. `None` for what cannot be sent so.
    fn write_prefix(&self, frame: &Frame, header: usize, out: &mut [u8; PREFIX]) -> Option<usize> {
        let outer = frame.outer?;
        let wrap = Wrap::new(outer.format, outer.peer.is_ipv4());
        let base = usize::from(outer.base);
        let tunnel = frame.head().get(..base)?;
        let ethernet = frame.head().get(base..base + ETH_LEN)?;
        let is_v4 = frame.offload.gso?.kind == GsoKind::Tcp4;
        virtio::write(&moved(&frame.offload, wrap.len() as u16), out.first_chunk_mut()?);
        let (mac, rest) = out[header..].split_at_mut(ETH_LEN);
        mac[..6].copy_from_slice(&wrap.mac()?);
        mac[12..].copy_from_slice(&if is_v4 { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 }.to_be_bytes());
        let (ip_header, rest) = rest.split_at_mut(wrap.ip_len());
        let protocol = match outer.format {
            Format::Ipip => *tunnel.first()?,
            format => {
                let (gre, inner) = rest.split_at_mut(GRE_LEN);
                gre.copy_from_slice(tunnel);
                match format {
                    Format::Gretap => inner[..ETH_LEN].copy_from_slice(ethernet),
                    // GRE's header ends with the type, as the Ethernet header does.
                    _ => gre[2..].copy_from_slice(&ethernet[12..]),
                }
                ip::GRE
            }
        };
        let behind = wrap.len() - wrap.ip_len() + frame.len() - base - ETH_LEN;
        wrapper::write_outer(ip_header, self.local, &outer, protocol, behind as u16);
        Some(header + ETH_LEN + wrap.len())
    }

    /// Enters what the program had to drop, and uses it no more for a while if there was something.
    pub(super) fn count(&mut self, stats: &mut Stats) {
        let Some((wrapper, counted)) = &mut self.known else { return };
        let failures = wrapper.failures();
        let lost = failures.saturating_sub(*counted);
        *counted = failures;
        if lost > 0 {
            self.paused = Some(Instant::now() + PAUSE);
        }
        (0..lost).for_each(|_| stats.lost(self.id, DropReason::UnderlayUnreachable));
    }
}

/// What is still to be done for a packet that has so many bytes more before its IP header.
fn moved(offload: &Offload, by: u16) -> Offload {
    let mut moved = *offload;
    if let Some(partial) = &mut moved.partial {
        partial.start += by;
    }
    if let Some(gso) = &mut moved.gso {
        gso.header_len += by;
    }
    moved
}
