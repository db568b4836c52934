//! MACs that nobody configured: made of names, so that two nodes agree without asking each other.
//!
//! All are locally administered unicast addresses. They must stay the same over restarts, releases and architectures,
//! because kernel VXLAN peers hold them in permanent neighbour entries: the golden test below is a promise.

use std::net::IpAddr;

use weft_encap::mac::Mac;

/// The gateway's MAC unless configured: the same on every node of every cluster, since it never leaves a node.
pub const GATEWAY_MAC: Mac = Mac([0x02, b'w', b'e', b'f', b't', 0x01]);

/// The VTEP MAC of a node, of its name and underlay address.
pub fn vtep_mac(node: &str, underlay: IpAddr) -> Mac {
    node_mac(b"weft vtep\0", node, underlay)
}

/// The MAC of a node's host port, of its name and underlay address: in bridged mode the other nodes see it.
pub fn host_mac(node: &str, underlay: IpAddr) -> Mac {
    node_mac(b"weft host\0", node, underlay)
}

/// A MAC of random octets for a pod.
pub fn local_unicast(mut octets: [u8; 6]) -> Mac {
    octets[0] = (octets[0] | 0x02) & !0x01;
    Mac(octets)
}

fn node_mac(purpose: &[u8], node: &str, underlay: IpAddr) -> Mac {
    let mut hash = fnv1a(0xcbf2_9ce4_8422_2325, purpose);
    hash = fnv1a(hash, node.as_bytes());
    hash = fnv1a(hash, b"\0");
    // As text, so that an address hashes alike whatever its representation in memory.
    hash = fnv1a(hash, underlay.to_canonical().to_string().as_bytes());
    // The low bits of FNV mix best after folding the high ones in.
    hash ^= hash >> 48;
    let [_, _, a, b, c, d, e, f] = hash.to_be_bytes();
    local_unicast([a, b, c, d, e, f])
}

fn fnv1a(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vtep_mac_is_stable_local_and_unicast() {
        let mac = vtep_mac("n1", "10.200.0.1".parse().unwrap());
        assert_eq!(mac.to_string(), "0e:57:dd:e4:d8:73");
        assert!(mac.is_local() && mac.is_unicast());
        assert_eq!(mac, vtep_mac("n1", "::ffff:10.200.0.1".parse().unwrap()));
        let host = host_mac("n1", "10.200.0.1".parse().unwrap());
        assert!(host.is_local() && host.is_unicast() && host != mac);
    }

    #[test]
    fn name_and_address_both_count() {
        let all = [("n1", "10.200.0.1"), ("n2", "10.200.0.1"), ("n1", "10.200.0.2"), ("n", "110.200.0.1")];
        let macs: std::collections::BTreeSet<Mac> =
            all.iter().map(|(name, address)| vtep_mac(name, address.parse().unwrap())).collect();
        assert_eq!(macs.len(), all.len());
    }
}
