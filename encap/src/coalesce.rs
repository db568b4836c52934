//! Merges received segments into superframes: the inverse of [`crate::segment`].
//!
//! The rules are those of Linux's `tcp_gro_receive`, `udp_gro_receive` and `inet_gro_receive`, so that cutting a merged
//! superframe gives back the frames that arrived (but for IPv4 ids, where a sender keeps them constant). Two of them
//! are easily forgotten: the window has to stay the same, and a frame with CWR merges with nothing.
//!
//! **A frame's checksums are verified before it joins.** The superframe leaves with a partial checksum, which the
//! receiver takes as proof; a bad frame in it would be laundered. A frame that is wrong or merely odd passes alone
//! and as it came.
//!
//! Nothing is held back for a frame that may come: what lies in the buffer is all that is merged.

use core::ops::Range;

use zerocopy::{FromBytes, IntoBytes};

use crate::checksum::{self, Sum};
use crate::eth::{ETH_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6, EthHeader};
use crate::ip;
use crate::ipv4::{DONT_FRAGMENT, IPV4_LEN, Ipv4Header};
use crate::ipv6::{IPV6_LEN, Ipv6Header};
use crate::offload::{Gso, GsoKind, Offload, Partial};
use crate::tcp::{self, CWR, FIN, PSH, RST, SYN, TcpHeader, URG};
use crate::udp::{self, UDP_LEN, UdpHeader};

/// How many frames one superframe may be made of: as many as one `UDP_SEGMENT` call sends.
pub const MAX_FRAMES: usize = 128;

/// How long a superframe may become, from its IP header on.
const MAX_IP_LEN: usize = 65_535;

/// The frames at the start of a receive buffer that form one superframe.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// How many datagrams of the buffer, at least 1.
    pub frames: usize,
    /// Length of each frame's Ethernet, IP and transport headers, without tunnel header. 0 if a lone frame's headers
    /// could not be read; its payload is then all of it.
    pub header_len: usize,
    /// Bytes of payload in each frame but the last.
    pub first_payload: usize,
    /// Bytes of payload in the last frame.
    pub last_payload: usize,
    /// Bytes of payload in all frames. Bytes behind the end of an IP packet (Ethernet padding) are not payload.
    pub total_payload: usize,
    /// How the superframe can be cut again; `None` for a lone frame.
    pub gso: Option<Gso>,
    /// The checksums of all frames are correct.
    pub verified: bool,
    /// TCP's [`PSH`] and [`FIN`] of the last frame.
    pub end_flags: u8,
}

/// How many datagrams from the start of `buf` form one superframe.
///
/// `buf` holds datagrams of `stride` bytes each, the last may be shorter. Each starts with `skip` bytes of tunnel
/// header, identical within a run, followed by an Ethernet frame.
pub fn run(buf: &[u8], stride: usize, skip: usize) -> Run {
    let stride = if stride == 0 { buf.len() } else { stride };
    let mut datagrams = buf.chunks(stride.max(1));
    let datagram = datagrams.next().unwrap_or_default();
    let (tunnel, frame) = datagram.split_at(skip.min(datagram.len()));
    let Some(first) = Candidate::read(frame).filter(|_| tunnel.len() == skip) else {
        return Run::unread(frame.len());
    };
    let mut merge = Merge::new(first);
    if !merge.run.verified || !merge.first.may_begin() {
        return merge.run;
    }
    for datagram in datagrams.take(MAX_FRAMES - 1) {
        let Some(frame) = datagram.strip_prefix(tunnel) else { break };
        if merge.ended || !Candidate::read(frame).is_some_and(|next| merge.push(&next)) {
            break;
        }
    }
    merge.run
}

/// A run of frames that lie apart: each in a buffer of its own, in the order in which they came.
///
/// The rules are those of [`run`]. Of a frame whose checksum is still partial, what stands in the field must be the
/// pseudo-header's sum, as it will be in the superframe: a wrong one stays wrong.
#[derive(Copy, Clone, Debug)]
pub struct Merger {
    run: Run,
    kind: GsoKind,
    l4: usize,
    fixed_id: bool,
    ended: bool,
}

impl Merger {
    /// Begins with an Ethernet frame; `None` if nothing can follow it.
    pub fn begin(first: &[u8], partial: Option<Partial>) -> Option<Merger> {
        let first = Candidate::read(first)?;
        if !first.may_begin() || !first.is_sound(partial) {
            return None;
        }
        let (kind, l4) = (first.kind, first.l4);
        let run = Run { header_len: first.header_len, end_flags: first.end_flags(), ..Run::unread(first.payload()) };
        Some(Merger { run, kind, l4, fixed_id: false, ended: false })
    }

    /// Takes the next Ethernet frame of the same flow in, if it belongs there; `first` is the frame that it began with. Where the
    /// frame's payload lies is returned.
    pub fn push(&mut self, first: &[u8], next: &[u8], partial: Option<Partial>) -> Option<Range<usize>> {
        let next = Candidate::read(next).filter(|_| !self.ended)?;
        let end = self.run.header_len + self.run.first_payload;
        let bytes = first.get(..end)?;
        let first = Candidate { bytes, kind: self.kind, l4: self.l4, header_len: self.run.header_len };
        let mut merge = Merge { first, run: self.run, fixed_id: self.fixed_id, ended: false };
        if !merge.push_if(&next, |next| next.is_sound(partial)) {
            return None;
        }
        (self.run, self.fixed_id, self.ended) = (merge.run, merge.fixed_id, merge.ended);
        Some(next.header_len..next.bytes.len())
    }

    /// What has been merged so far; for [`finish`].
    pub fn run(&self) -> &Run {
        &self.run
    }
}

/// Turns a copy of the first frame's headers (from Ethernet to transport, without the tunnel header) into the
/// superframe's: lengths, IPv4's checksum, TCP's flags, a partial transport checksum. A lone frame's headers stay.
///
/// `verified` speaks of complete checksums, so a merged superframe leaves without it, though each of its frames was.
///
/// # Panics
///
/// If `run` has several frames and `head` is not what it was made of.
pub fn finish(head: &mut [u8], run: &Run) -> Offload {
    let Some(gso) = run.gso else {
        return Offload { partial: None, gso: None, verified: run.verified };
    };
    let network = &mut head[ETH_LEN..run.header_len];
    let l4 = ETH_LEN + if network[0] >> 4 == 4 { IPV4_LEN } else { IPV6_LEN };
    // It fits: no run is longer than `MAX_IP_LEN`.
    let len = (run.header_len - l4 + run.total_payload) as u16;
    let (sum, transport) = finish_network(network, len, gso.kind);
    let offset = match gso.kind {
        GsoKind::Tcp4 | GsoKind::Tcp6 => {
            let (header, _) = TcpHeader::mut_from_prefix(transport).expect("the run read this header");
            header.flags |= run.end_flags;
            header.checksum = sum.fold().into();
            tcp::CHECKSUM_OFFSET
        }
        GsoKind::Udp => {
            let (header, _) = UdpHeader::mut_from_prefix(transport).expect("the run read this header");
            header.len = len.into();
            header.checksum = sum.fold().into();
            udp::CHECKSUM_OFFSET
        }
    };
    let partial = Partial { start: l4 as u16, offset: offset as u16 };
    Offload { partial: Some(partial), gso: Some(gso), verified: false }
}

/// Writes IP's length and checksum; returns the pseudo-header's sum, and the transport header.
fn finish_network(bytes: &mut [u8], len: u16, kind: GsoKind) -> (Sum, &mut [u8]) {
    let protocol = if kind == GsoKind::Udp { ip::UDP } else { ip::TCP };
    if bytes[0] >> 4 == 4 {
        let (network, transport) = bytes.split_at_mut(IPV4_LEN);
        let header = Ipv4Header::mut_from_bytes(network).expect("the lengths are the same");
        header.total_len = (IPV4_LEN as u16 + len).into();
        header.checksum = checksum::ipv4_header(header.as_bytes()).into();
        (checksum::pseudo_v4(header.src(), header.dst(), protocol, len.into()), transport)
    } else {
        let (network, transport) = bytes.split_at_mut(IPV6_LEN);
        let header = Ipv6Header::mut_from_bytes(network).expect("the lengths are the same");
        header.payload_len = len.into();
        (checksum::pseudo_v6(header.src(), header.dst(), protocol, len.into()), transport)
    }
}

/// Whether a frame's TCP or UDP checksum is partial: the field is the folded sum of the pseudo-header, as a kernel
/// peer leaves it over a veth or in a superframe.
///
/// It is safe to believe. Where a *complete* checksum happens to have that value, completing it "again" gives the same
/// value: the field is ~(pseudo + rest) and equals pseudo, so the sum over field and rest is pseudo + rest.
pub fn partial_checksum(frame: &[u8], l3: usize, l4: usize, protocol: u8) -> bool {
    pseudo_sum(frame, l3, l4, protocol).is_some_and(|(sum, field)| sum.fold() == field)
}

/// The pseudo-header's sum, and what the checksum field holds.
fn pseudo_sum(frame: &[u8], l3: usize, l4: usize, protocol: u8) -> Option<(Sum, u16)> {
    let network = frame.get(l3..l4)?;
    let transport = &frame[l4..];
    let offset = match protocol {
        ip::TCP => tcp::CHECKSUM_OFFSET,
        ip::UDP => udp::CHECKSUM_OFFSET,
        _ => return None,
    };
    let field = transport.get(offset..offset + 2).map(|field| u16::from_be_bytes([field[0], field[1]]))?;
    let (len, sum) = if network.first()? >> 4 == 4 {
        let (header, _) = Ipv4Header::ref_from_prefix(network).ok().filter(|(header, _)| !header.is_fragment())?;
        let len = usize::from(header.total_len.get()).checked_sub(network.len())?;
        (len, checksum::pseudo_v4(header.src(), header.dst(), protocol, len as u32))
    } else {
        let (header, extensions) = Ipv6Header::ref_from_prefix(network).ok()?;
        let len = usize::from(header.payload_len.get()).checked_sub(extensions.len())?;
        (len, checksum::pseudo_v6(header.src(), header.dst(), protocol, len as u32))
    };
    (len <= transport.len()).then_some((sum, field))
}

/// A run in the making.
struct Merge<'a> {
    first: Candidate<'a>,
    run: Run,
    /// All frames have the first one's IPv4 id. The second frame decides, as in Linux's `inet_gro_flush`.
    fixed_id: bool,
    /// Nothing may follow.
    ended: bool,
}

impl Run {
    /// A frame whose headers could not be read.
    fn unread(len: usize) -> Self {
        Self {
            frames: 1,
            header_len: 0,
            first_payload: len,
            last_payload: len,
            total_payload: len,
            gso: None,
            verified: false,
            end_flags: 0,
        }
    }
}

impl<'a> Merge<'a> {
    fn new(first: Candidate<'a>) -> Self {
        let run = Run {
            header_len: first.header_len,
            verified: first.is_valid(),
            end_flags: first.end_flags(),
            ..Run::unread(first.payload())
        };
        Self { first, run, fixed_id: false, ended: false }
    }

    /// Takes a frame in if it belongs here.
    fn push(&mut self, next: &Candidate<'_>) -> bool {
        self.push_if(next, |next| next.is_valid())
    }

    /// The same. The cheap questions come first; `is_sound`, which may have to sum the frame up, is the last.
    fn push_if(&mut self, next: &Candidate<'_>, is_sound: impl FnOnce(&Candidate<'_>) -> bool) -> bool {
        let total_payload = self.run.total_payload + next.payload();
        let fits =
            next.payload() <= self.run.first_payload && self.run.header_len - ETH_LEN + total_payload <= MAX_IP_LEN;
        let belongs = fits && next.may_join() && self.same_network(next) && self.same_transport(next);
        if !belongs || !is_sound(next) {
            return false;
        }
        self.fixed_id = self.is_fixed_id(next);
        self.ended = next.payload() < self.run.first_payload || next.end_flags() != 0;
        self.run.frames += 1;
        self.run.last_payload = next.payload();
        self.run.total_payload = total_payload;
        self.run.end_flags = next.end_flags();
        // Both fit: they are parts of an IP packet of at most `MAX_IP_LEN`, behind an Ethernet header of 14 bytes.
        self.run.gso = Some(Gso {
            kind: self.first.kind,
            ecn: false,
            size: self.run.first_payload as u16,
            header_len: self.run.header_len as u16,
        });
        true
    }

    fn same_network(&self, next: &Candidate<'_>) -> bool {
        let (first, next_bytes) = (self.first.bytes, next.bytes);
        let same = |range: core::ops::Range<usize>| first[range.clone()] == next_bytes[range];
        if self.first.kind != next.kind || self.first.l4 != next.l4 || self.first.header_len != next.header_len {
            return false;
        }
        let l3 = ETH_LEN;
        if self.first.l4 == l3 + IPV4_LEN {
            // MACs, ethertype, version, header length, TOS; fragment field, TTL, protocol; addresses.
            let id = if self.is_fixed_id(next) { 0 } else { self.run.frames as u16 };
            same(0..l3 + 2)
                && same(l3 + 6..l3 + 10)
                && same(l3 + 12..l3 + 20)
                && next.id().wrapping_sub(self.first.id()) == id
        } else {
            // MACs, ethertype, version, class, flow label; next header, hop limit, addresses.
            same(0..l3 + 4) && same(l3 + 6..l3 + IPV6_LEN)
        }
    }

    fn same_transport(&self, next: &Candidate<'_>) -> bool {
        let l4 = self.first.l4;
        let (Some(first), Some(next_tcp)) = (self.first.tcp(), next.tcp()) else {
            return self.first.bytes[l4..l4 + 4] == next.bytes[l4..l4 + 4];
        };
        first.src_port == next_tcp.src_port
            && first.dst_port == next_tcp.dst_port
            && next_tcp.seq.get() == first.seq.get().wrapping_add(self.run.total_payload as u32)
            && first.ack == next_tcp.ack
            && first.data_offset == next_tcp.data_offset
            && (first.flags ^ next_tcp.flags) & !(PSH | FIN) == 0
            && first.window == next_tcp.window
            && first.urgent == next_tcp.urgent
            && self.first.options() == next.options()
    }

    /// Only a datagram that is never fragmented may keep its id (RFC 6864 section 4.1).
    fn is_fixed_id(&self, next: &Candidate<'_>) -> bool {
        match self.run.frames {
            1 => self.first.dont_fragment() && self.first.id() == next.id(),
            _ => self.fixed_id,
        }
    }
}

/// A frame that holds a whole TCP segment or UDP datagram right behind a plain IP header.
struct Candidate<'a> {
    /// The frame up to the end of its IP packet.
    bytes: &'a [u8],
    kind: GsoKind,
    l4: usize,
    header_len: usize,
}

impl<'a> Candidate<'a> {
    /// `None` if the frame is anything else: options, extension headers, fragments, lengths that do not fit.
    fn read(frame: &'a [u8]) -> Option<Self> {
        let (eth, packet) = EthHeader::ref_from_prefix(frame).ok()?;
        let (protocol, l4, len) = match eth.ethertype.get() {
            ETHERTYPE_IPV4 => {
                let (header, _) = Ipv4Header::ref_from_prefix(packet).ok()?;
                let plain = header.version_ihl == 0x45 && header.flags_fragment.get() & !DONT_FRAGMENT == 0;
                plain.then_some((header.protocol, IPV4_LEN, usize::from(header.total_len.get())))?
            }
            ETHERTYPE_IPV6 => {
                let (header, _) = Ipv6Header::ref_from_prefix(packet).ok()?;
                let len = IPV6_LEN + usize::from(header.payload_len.get());
                (header.version() == 6).then_some((header.next_header, IPV6_LEN, len))?
            }
            _ => return None,
        };
        let transport = packet.get(l4..len)?;
        let (kind, transport_len) = match protocol {
            ip::TCP => {
                let (header, _) = TcpHeader::ref_from_prefix(transport).ok()?;
                let kind = if l4 == IPV4_LEN { GsoKind::Tcp4 } else { GsoKind::Tcp6 };
                (kind, Some(header.header_len()).filter(|len| (tcp::TCP_LEN..=transport.len()).contains(len))?)
            }
            ip::UDP => {
                let (header, _) = UdpHeader::ref_from_prefix(transport).ok()?;
                // A zero checksum proves nothing.
                let fits = usize::from(header.len.get()) == transport.len() && header.checksum.get() != 0;
                (GsoKind::Udp, fits.then_some(UDP_LEN)?)
            }
            _ => return None,
        };
        let l4 = ETH_LEN + l4;
        Some(Self { bytes: &frame[..ETH_LEN + len], kind, l4, header_len: l4 + transport_len })
    }

    /// Whether its checksum is correct, or is this one and still to be filled in.
    fn is_sound(&self, partial: Option<Partial>) -> bool {
        let offset = if self.kind == GsoKind::Udp { udp::CHECKSUM_OFFSET } else { tcp::CHECKSUM_OFFSET };
        match partial {
            Some(partial) => {
                let protocol = if self.kind == GsoKind::Udp { ip::UDP } else { ip::TCP };
                partial == Partial { start: self.l4 as u16, offset: offset as u16 }
                    && self.is_header_valid()
                    && partial_checksum(self.bytes, ETH_LEN, self.l4, protocol)
            }
            None => self.is_valid(),
        }
    }

    fn payload(&self) -> usize {
        self.bytes.len() - self.header_len
    }

    fn ipv4(&self) -> Option<&Ipv4Header> {
        let network = &self.bytes[ETH_LEN..self.l4];
        Ipv4Header::ref_from_bytes(network).ok()
    }

    fn id(&self) -> u16 {
        self.ipv4().map_or(0, |header| header.id.get())
    }

    fn dont_fragment(&self) -> bool {
        self.ipv4().is_some_and(Ipv4Header::dont_fragment)
    }

    fn tcp(&self) -> Option<&TcpHeader> {
        let is_tcp = self.kind != GsoKind::Udp;
        is_tcp.then(|| TcpHeader::ref_from_prefix(&self.bytes[self.l4..]).ok().map(|(header, _)| header))?
    }

    fn options(&self) -> &[u8] {
        &self.bytes[self.l4 + tcp::TCP_LEN..self.header_len]
    }

    fn end_flags(&self) -> u8 {
        self.tcp().map_or(0, |header| header.flags & (PSH | FIN))
    }

    /// Pure acknowledgements count one by one, and flags that mean something at one place in the stream stay there.
    fn may_join(&self) -> bool {
        self.payload() > 0 && self.tcp().is_none_or(|header| header.flags & (SYN | RST | URG | CWR) == 0)
    }

    fn may_begin(&self) -> bool {
        self.may_join() && self.end_flags() == 0
    }

    /// Whether IP's checksum is correct, if it has one.
    fn is_header_valid(&self) -> bool {
        self.ipv4().is_none_or(|header| checksum::verify_ipv4_header(header.as_bytes()))
    }

    /// Whether IP's and the transport's checksums are correct.
    fn is_valid(&self) -> bool {
        let network = &self.bytes[ETH_LEN..self.l4];
        let transport = &self.bytes[self.l4..];
        let protocol = if self.kind == GsoKind::Udp { ip::UDP } else { ip::TCP };
        let len = transport.len() as u32;
        if let Ok(header) = Ipv4Header::ref_from_bytes(network) {
            let pseudo = checksum::pseudo_v4(header.src(), header.dst(), protocol, len);
            self.is_header_valid() && checksum::verify(pseudo, transport)
        } else {
            let header = Ipv6Header::ref_from_bytes(network).expect("the frame was read as one of the two");
            checksum::verify(checksum::pseudo_v6(header.src(), header.dst(), protocol, len), transport)
        }
    }
}
