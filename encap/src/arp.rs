//! ARP for IPv4 over Ethernet (RFC 826), with the probes and announcements of RFC 5227.

use core::net::Ipv4Addr;

use zerocopy::byteorder::network_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::eth::ETHERTYPE_IPV4;
use crate::mac::Mac;

/// `op`: who has this address?
pub const REQUEST: u16 = 1;
/// `op`: I have this address.
pub const REPLY: u16 = 2;

/// An ARP packet for IPv4 over Ethernet, 28 bytes. Check [`Arp::is_ethernet_ipv4`] before anything else.
#[derive(Copy, Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Arp {
    /// Kind of link: 1 is Ethernet.
    pub htype: U16,
    /// Kind of network address, as an ethertype.
    pub ptype: U16,
    /// Length of a link address: 6.
    pub hlen: u8,
    /// Length of a network address: 4.
    pub plen: u8,
    /// [`REQUEST`], [`REPLY`], or something nobody sends.
    pub op: U16,
    /// Link address of the sender.
    pub sha: Mac,
    /// Network address of the sender; 0.0.0.0 in a probe.
    pub spa: [u8; 4],
    /// Link address of the target; ignored in requests.
    pub tha: Mac,
    /// Network address of the target.
    pub tpa: [u8; 4],
}

impl Arp {
    /// Who has `tpa`? Tell `spa` at `sha`.
    pub fn request(sha: Mac, spa: Ipv4Addr, tpa: Ipv4Addr) -> Self {
        Self::new(REQUEST, sha, spa, Mac::ZERO, tpa)
    }

    /// The answer to this request: its target has the address `mac`.
    pub fn reply(&self, mac: Mac) -> Self {
        Self::new(REPLY, mac, self.target(), self.sha, self.sender())
    }

    /// Any operation.
    pub fn new(op: u16, sha: Mac, spa: Ipv4Addr, tha: Mac, tpa: Ipv4Addr) -> Self {
        Self {
            htype: 1.into(),
            ptype: ETHERTYPE_IPV4.into(),
            hlen: 6,
            plen: 4,
            op: op.into(),
            sha,
            spa: spa.octets(),
            tha,
            tpa: tpa.octets(),
        }
    }

    /// Whether the other fields mean what their names say.
    pub fn is_ethernet_ipv4(&self) -> bool {
        self.htype.get() == 1 && self.ptype.get() == ETHERTYPE_IPV4 && self.hlen == 6 && self.plen == 4
    }

    /// `spa` as an address.
    pub fn sender(&self) -> Ipv4Addr {
        self.spa.into()
    }

    /// `tpa` as an address.
    pub fn target(&self) -> Ipv4Addr {
        self.tpa.into()
    }

    /// RFC 5227 section 1.1: a request with an all-zero sender address asks whether the target is taken; it must
    /// not be answered on behalf of the one who asks.
    pub fn is_probe(&self) -> bool {
        self.op.get() == REQUEST && self.sender().is_unspecified()
    }

    /// RFC 5227 section 1.1: sender and target address are the same; it says who has it.
    pub fn is_announcement(&self) -> bool {
        self.spa == self.tpa
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: [u8; 28] = [0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1, 10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 10, 0, 0, 2];

    #[test]
    fn golden_request_parses() {
        let arp = Arp::ref_from_bytes(&GOLDEN).unwrap();
        assert!(arp.is_ethernet_ipv4());
        assert_eq!(arp.op.get(), REQUEST);
        assert_eq!(arp.sha, Mac([2, 0, 0, 0, 0, 1]));
        assert_eq!(arp.sender(), Ipv4Addr::new(10, 0, 0, 1));
        assert_eq!(arp.target(), Ipv4Addr::new(10, 0, 0, 2));
        assert!(!arp.is_probe());
        assert!(!arp.is_announcement());
    }

    #[test]
    fn golden_request_is_written() {
        let mut out = [0xa5; 30];
        Arp::request(Mac([2, 0, 0, 0, 0, 1]), Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2))
            .write_to_prefix(&mut out)
            .unwrap();
        assert_eq!(out[..28], GOLDEN);
        assert_eq!(out[28..], [0xa5; 2]);
    }

    #[test]
    fn a_reply_swaps_the_two_parties() {
        let request = Arp::read_from_bytes(&GOLDEN).unwrap();
        let reply = request.reply(Mac([2, 0, 0, 0, 0, 9]));
        assert_eq!(reply.op.get(), REPLY);
        assert_eq!((reply.sha, reply.sender()), (Mac([2, 0, 0, 0, 0, 9]), request.target()));
        assert_eq!((reply.tha, reply.target()), (request.sha, request.sender()));
    }

    #[test]
    fn a_probe_has_an_all_zero_sender_address() {
        let probe = Arp::request(Mac([2, 0, 0, 0, 0, 1]), Ipv4Addr::UNSPECIFIED, Ipv4Addr::new(10, 0, 0, 2));
        assert!(probe.is_probe());
        let announcement =
            Arp::request(Mac([2, 0, 0, 0, 0, 1]), Ipv4Addr::new(10, 0, 0, 2), Ipv4Addr::new(10, 0, 0, 2));
        assert!(announcement.is_announcement());
    }

    #[test]
    fn other_kinds_of_link_are_not_ethernet_ipv4() {
        for (at, wrong) in [(1, 6), (3, 1), (4, 8), (5, 16)] {
            let mut bytes = GOLDEN;
            bytes[at] = wrong;
            assert!(!Arp::ref_from_bytes(&bytes).unwrap().is_ethernet_ipv4(), "byte {at}");
        }
    }
}
