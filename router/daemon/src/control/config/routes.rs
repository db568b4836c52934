//! The section `routes`: which routes of a routing daemon are followed.

use std::str::FromStr;

use ipnet::IpNet;

use super::reader::{At, Reader, Section};

/// `rtm_protocol` of the routes that weftd makes: who reads the routing table sees whose they are (`ip route show proto 87`).
pub const PROTOCOL: u8 = 87;
/// Routing protocols as `ip route` names them: <https://elixir.bootlin.com/linux/v6.18/A/ident/RTPROT_BIRD>. Those of FRR's daemons bear
/// their own names where zebra is built so, which Debian's is.
const PROTOCOLS: [(&str, u8); 12] = [
    ("zebra", 11),
    ("bird", 12),
    ("xorp", 14),
    ("babel", 42),
    ("openr", 99),
    ("bgp", 186),
    ("isis", 187),
    ("ospf", 188),
    ("rip", 189),
    ("eigrp", 192),
    ("static", 4),
    ("dhcp", 16),
];
/// So many of these are followed unless configured: those that no person and no DHCP server writes.
const DAEMONS: usize = 10;
/// Most routes of the kernel's that are followed.
const LIMIT: usize = 16_384;

/// Which routes of the kernel's are followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Routes {
    /// By who made them.
    pub protocols: Vec<u8>,
    /// By where they lead: within one of these, if there are any; else everywhere but where default routes lead.
    pub within: Vec<IpNet>,
    /// What is not sent by them, as the addresses of services.
    pub except: Vec<IpNet>,
    /// So many at most; with more of them, none is followed.
    pub limit: usize,
}

impl Default for Routes {
    fn default() -> Routes {
        let protocols = PROTOCOLS[..DAEMONS].iter().map(|(_, number)| *number).collect();
        Routes { protocols, within: Vec::new(), except: Vec::new(), limit: LIMIT }
    }
}

impl Routes {
    /// Whether a route to `destination` that this protocol made is followed.
    pub fn take(&self, protocol: u8, destination: IpNet) -> bool {
        let refused = self.except.iter().any(|net| net.contains(&destination));
        let inside = self.within.iter().any(|net| net.contains(&destination));
        let anywhere = self.within.is_empty() && destination.prefix_len() > 0;
        self.protocols.contains(&protocol) && !refused && (inside || anywhere)
    }

    pub(super) fn read<'t>(reader: &mut Reader<'t>, root: &mut Section<'t>) -> Routes {
        const PREFIX: &str = "a prefix such as 10.244.0.0/16";
        let mut routes = Routes::default();
        let Some(mut section) = reader.table(root, "routes") else { return routes };
        if section.has("protocols") {
            let form = "a protocol of ip route, such as \"bird\" or \"zebra\", or its number";
            let all: Vec<At<Protocol>> = reader.list(&mut section, "protocols", form);
            for protocol in all.iter().filter(|protocol| protocol.value.0 == PROTOCOL) {
                reader.problem(&protocol.place, "that is weftd's own protocol, whose routes lead back here");
            }
            routes.protocols = all.into_iter().map(|protocol| protocol.value.0).collect();
        }
        let nets = |all: Vec<At<IpNet>>| all.into_iter().map(|at| at.value.trunc()).collect();
        routes.within = nets(reader.list(&mut section, "within", PREFIX));
        routes.except = nets(reader.list(&mut section, "except", PREFIX));
        let limit: Option<At<u32>> = reader.number(&mut section, "limit", 0..=1 << 17);
        routes.limit = limit.map_or(routes.limit, |limit| limit.value as usize);
        reader.finish(section);
        routes
    }
}

/// The number of a protocol.
struct Protocol(u8);

impl FromStr for Protocol {
    type Err = ();
    fn from_str(text: &str) -> Result<Protocol, ()> {
        let named = PROTOCOLS.iter().find(|(name, _)| *name == text).map(|(_, number)| *number);
        named.or_else(|| text.parse().ok()).map(Protocol).ok_or(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::config::Config;
    use crate::control::host::Host;

    fn read(section: &str) -> Result<Routes, String> {
        let text = format!(
            "node = \"n1\"\nmode = \"routed\"\nmtu = 1450\nranges = [\"10.244.1.0/24\"]\n[underlay]\naddress = \"10.200.0.1\"\n{section}"
        );
        Config::read(&text, &Host::default()).map(|read| read.config.routes).map_err(|invalid| invalid.to_string())
    }

    #[test]
    fn routing_daemons_are_followed_unless_something_else_is_said() {
        let usual = read("").unwrap();
        let takes = |routes: &Routes, protocol, to: &str| routes.take(protocol, to.parse().unwrap());
        for daemon in [11, 12, 186, 188] {
            assert!(takes(&usual, daemon, "10.244.2.0/24") && !takes(&usual, daemon, "0.0.0.0/0"));
        }
        assert!(!takes(&usual, 4, "10.244.2.0/24") && !takes(&usual, PROTOCOL, "10.244.2.0/24"));
        let told = "[routes]\nprotocols = [\"static\", \"201\"]\nwithin = [\"10.0.0.0/8\"]\nexcept = [\"10.96.0.0/12\"]\nlimit = 9";
        let told = read(told).unwrap();
        assert!(takes(&told, 4, "10.244.2.0/24") && takes(&told, 201, "10.244.2.0/24") && told.limit == 9);
        assert!(
            !takes(&told, 12, "10.244.2.0/24") && !takes(&told, 4, "10.96.3.0/24") && !takes(&told, 4, "192.0.2.0/24")
        );
        assert!(!takes(&read("[routes]\nprotocols = []").unwrap(), 12, "10.244.2.0/24"));
    }

    #[test]
    fn our_own_routes_and_what_is_none_are_refused() {
        for (section, part) in [
            ("[routes]\nprotocols = [\"87\"]", "weftd's own protocol"),
            ("[routes]\nprotocols = [\"quagga\"]", "\"quagga\" is not a protocol of ip route"),
            ("[routes]\nwithin = [\"10.0.0.0\"]", "a prefix such as 10.244.0.0/16"),
            ("[routes]\nlimit = 9999999", "must be a whole number"),
            ("[routes]\nexempt = []", "unknown key"),
        ] {
            let error = read(section).unwrap_err();
            assert!(error.contains(part), "{section}: {error}");
        }
    }
}
