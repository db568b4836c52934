//! Makes frames with etherparse, which computes each length and checksum on its own.

use etherparse::{
    EtherType, Ethernet2Header, IpHeaders, IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6Header, PacketBuilder, TcpHeader,
};
use weft_encap::tcp;

pub const L3: usize = 14;

/// All that two frames of a flow may differ in.
#[derive(Clone, Debug)]
pub struct Flow {
    pub v6: bool,
    pub tcp: bool,
    pub src_mac: [u8; 6],
    pub dst_mac: [u8; 6],
    pub src: u8,
    pub dst: u8,
    pub id: u16,
    pub dont_fragment: bool,
    pub ttl: u8,
    pub tos: u8,
    pub flow_label: u32,
    pub src_port: u16,
    pub dst_port: u16,
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    pub accurate_ecn: bool,
    pub window: u16,
    pub urgent: u16,
    pub options: Vec<u8>,
    pub payload: Vec<u8>,
}

impl Default for Flow {
    fn default() -> Self {
        Self {
            v6: false,
            tcp: true,
            src_mac: [2, 0, 0, 0, 0, 1],
            dst_mac: [2, 0, 0, 0, 0, 2],
            src: 1,
            dst: 2,
            id: 0xfffe,
            dont_fragment: true,
            ttl: 64,
            tos: 0,
            flow_label: 0x12345,
            src_port: 40_000,
            dst_port: 443,
            seq: u32::MAX - 1000,
            ack: 77,
            flags: tcp::ACK,
            accurate_ecn: false,
            window: 502,
            urgent: 0,
            // Two no-operations and a timestamp.
            options: vec![1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2],
            payload: noise(1000),
        }
    }
}

/// The four kinds of flow there are.
pub fn kinds() -> [Flow; 4] {
    [(false, false), (false, true), (true, false), (true, true)].map(|(v6, tcp)| Flow { v6, tcp, ..Flow::default() })
}

impl Flow {
    pub fn l4(&self) -> usize {
        L3 + if self.v6 { 40 } else { 20 }
    }

    pub fn header_len(&self) -> usize {
        self.l4() + if self.tcp { 20 + self.options.len() } else { 8 }
    }

    pub fn protocol(&self) -> u8 {
        if self.tcp { 6 } else { 17 }
    }

    pub fn checksum_at(&self) -> usize {
        self.l4() + if self.tcp { 16 } else { 6 }
    }

    /// The frame, with complete checksums.
    pub fn frame(&self) -> Vec<u8> {
        let mut frame = Vec::new();
        let eth = PacketBuilder::ethernet2(self.src_mac, self.dst_mac);
        let packet = eth.ip(self.ip());
        let written = if self.tcp {
            packet.tcp_header(self.tcp_header()).write(&mut frame, &self.payload)
        } else {
            packet.udp(self.src_port, self.dst_port).write(&mut frame, &self.payload)
        };
        written.expect("a vector takes everything");
        frame
    }

    /// The frame's headers with a partial checksum, as a superframe has them.
    pub fn superframe_headers(&self) -> Vec<u8> {
        let mut headers = self.frame();
        let len = (headers.len() - self.l4()) as u32;
        headers.truncate(self.header_len());
        let addresses = if self.v6 { L3 + 8..L3 + 40 } else { L3 + 12..L3 + 20 };
        let words = headers[addresses].chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
        let mut sum = words.sum::<u32>() + u32::from(self.protocol()) + len;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        headers[self.checksum_at()..][..2].copy_from_slice(&(sum as u16).to_be_bytes());
        headers
    }

    /// The frame `i` of those that this superframe is cut into, by Linux's rules.
    pub fn nth(&self, i: usize, size: usize) -> Self {
        let pieces: Vec<_> = self.payload.chunks(size).collect();
        let mut flags = self.flags;
        if i > 0 {
            flags &= !tcp::CWR;
        }
        if i + 1 < pieces.len() {
            flags &= !(tcp::PSH | tcp::FIN);
        }
        Self {
            id: self.id.wrapping_add(i as u16),
            seq: self.seq.wrapping_add((i * size) as u32),
            flags,
            payload: pieces[i].to_vec(),
            ..self.clone()
        }
    }

    fn ip(&self) -> IpHeaders {
        let protocol = IpNumber(self.protocol());
        if self.v6 {
            let address = |last| [0xfd, 0, 0, 0x10, 2, 0x44, 0, 1, 0, 0, 0, 0, 0, 0, 0, last];
            let header = Ipv6Header {
                traffic_class: self.tos,
                flow_label: Ipv6FlowLabel::try_new(self.flow_label).expect("20 bits"),
                payload_length: 0,
                next_header: protocol,
                hop_limit: self.ttl,
                source: address(self.src),
                destination: address(self.dst),
            };
            return IpHeaders::Ipv6(header, Default::default());
        }
        let mut header = Ipv4Header::new(0, self.ttl, protocol, [10, 244, 1, self.src], [10, 244, 2, self.dst])
            .expect("no payload is not too long");
        header.dscp = (self.tos >> 2).try_into().expect("6 bits");
        header.ecn = (self.tos & 3).try_into().expect("2 bits");
        header.identification = self.id;
        header.dont_fragment = self.dont_fragment;
        IpHeaders::Ipv4(header, Default::default())
    }

    fn tcp_header(&self) -> TcpHeader {
        let mut header = TcpHeader::new(self.src_port, self.dst_port, self.seq, self.window);
        header.acknowledgment_number = self.ack;
        header.urgent_pointer = self.urgent;
        header.ns = self.accurate_ecn;
        for (field, flag) in [
            (&mut header.fin, tcp::FIN),
            (&mut header.syn, tcp::SYN),
            (&mut header.rst, tcp::RST),
            (&mut header.psh, tcp::PSH),
            (&mut header.ack, tcp::ACK),
            (&mut header.urg, tcp::URG),
            (&mut header.ece, tcp::ECE),
            (&mut header.cwr, tcp::CWR),
        ] {
            *field = self.flags & flag != 0;
        }
        header.set_options_raw(&self.options).expect("at most 40 bytes");
        header
    }
}

/// An Ethernet header in front of anything.
pub fn ethernet(ethertype: u16, packet: &[u8]) -> Vec<u8> {
    let header = Ethernet2Header {
        source: [2, 0, 0, 0, 0, 1],
        destination: [2, 0, 0, 0, 0, 2],
        ether_type: EtherType(ethertype),
    };
    [&header.to_bytes()[..], packet].concat()
}

/// Bytes without a pattern.
pub fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..len).map(next).collect()
}
