//! How packets to another node are wrapped: by default, by where the node is, and by peer.
//!
//! `underlay.encapsulation` is what this node sends by. With `cross_subnet` that is for nodes behind routers only: those of the
//! underlay address's own subnet are sent packets as they are, as with `"host-gw"`. A peer's own `encapsulation` goes before both. All
//! of it concerns what is *sent*: each node takes in every format that it could open, so the key can be changed node by node. What a peer
//! says it takes in is believed: to one that does not take in what it would get, packets go by VXLAN, which every node does.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use ipnet::IpNet;
use weft_encap::format::Format;
use weft_encap::geneve;
use weft_router::tables::Mode;

use super::reader::{At, Place, Reader};
use super::{Config, Draft, Peer, Underlay};

/// How packets to a node are wrapped, if they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encapsulation {
    /// By a tunnel.
    Tunnel(Format),
    /// Not at all: the node is the next hop on the underlay.
    HostGw,
}

impl Encapsulation {
    /// How it is written.
    pub const FORM: &str = "one of \"vxlan\", \"geneve\", \"gre\", \"gretap\", \"ipip\", \"host-gw\"";

    /// As in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Encapsulation::Tunnel(format) => format.name(),
            Encapsulation::HostGw => "host-gw",
        }
    }

    /// What it adds to a packet, with an outer header of this family.
    pub const fn overhead(self, outer_is_v4: bool) -> u32 {
        match self {
            Encapsulation::Tunnel(format) => format.overhead(outer_is_v4),
            Encapsulation::HostGw => 0,
        }
    }

    /// What it is in this layout: in the bridged one GRE carries Ethernet frames.
    fn of_mode(self, mode: Mode) -> Encapsulation {
        match (self, mode) {
            (Encapsulation::Tunnel(Format::Gre), Mode::Bridged) => Encapsulation::Tunnel(Format::Gretap),
            _ => self,
        }
    }

    fn carries_ethernet(self) -> bool {
        matches!(self, Encapsulation::Tunnel(format) if format.carries_ethernet())
    }
}

impl Default for Encapsulation {
    fn default() -> Encapsulation {
        Encapsulation::Tunnel(Format::Vxlan)
    }
}

impl FromStr for Encapsulation {
    type Err = ();
    fn from_str(text: &str) -> Result<Encapsulation, ()> {
        match text {
            "host-gw" => Ok(Encapsulation::HostGw),
            other => other.parse().map(Encapsulation::Tunnel).map_err(drop),
        }
    }
}

/// Most formats that a peer is heard to take in: more than there are.
pub const MAX_ACCEPTED: usize = 16;

impl Underlay {
    /// What a format is called between nodes: those that do not use the same port do not mean the same by its name.
    pub fn word(&self, format: Format) -> String {
        match format {
            Format::Geneve if self.geneve_port != geneve::PORT => format!("{format}/{}", self.geneve_port),
            _ => format.to_string(),
        }
    }

    /// Where what is wrapped like this enters.
    pub fn end(&self, format: Format) -> String {
        match format {
            Format::Vxlan => SocketAddr::new(self.address, self.port).to_string(),
            Format::Geneve => format!("geneve {}", SocketAddr::new(self.address, self.geneve_port)),
            Format::Gre | Format::Gretap => format!("gre {}", self.address),
            Format::Ipip => format!("ipip {}", self.address),
        }
    }

    /// What this node takes in, as others are told.
    pub fn accepted(&self) -> Vec<String> {
        self.formats.iter().map(|format| self.word(*format)).collect()
    }

    /// What packets to a node with this address are wrapped in, unless its peer's entry says otherwise.
    fn usual(&self, address: IpAddr) -> Encapsulation {
        match self.subnet {
            Some(subnet) if self.cross_subnet && subnet.contains(&address) => Encapsulation::HostGw,
            _ => self.encapsulation,
        }
    }
}

impl Config {
    /// What packets to a peer are wrapped in; and what they should have been, if that cannot be.
    pub fn encapsulation_to(&self, peer: &Peer) -> (Encapsulation, Option<String>) {
        let wanted = peer.encapsulation.unwrap_or_else(|| self.underlay.usual(peer.underlay));
        let Encapsulation::Tunnel(format) = wanted else { return (wanted, None) };
        let word = self.underlay.word(format);
        let vxlan = Encapsulation::Tunnel(Format::Vxlan);
        if !self.underlay.formats.contains(&format) {
            return (vxlan, Some(format!("this node could not open {word}")));
        }
        match &peer.accepts {
            Some(accepts) if !accepts.contains(&word) => {
                (vxlan, Some(format!("{} does not take in {word}", peer.name)))
            }
            _ => (wanted, None),
        }
    }

    /// The tunnel by which a peer can be reached in any case: also what the router itself has to say goes by one.
    pub fn tunnel_to(&self, peer: &Peer) -> Format {
        match (self.encapsulation_to(peer).0, self.underlay.encapsulation) {
            (Encapsulation::Tunnel(format), _) => format,
            (Encapsulation::HostGw, Encapsulation::Tunnel(format)) if self.underlay.formats.contains(&format) => format,
            (Encapsulation::HostGw, _) => Format::Vxlan,
        }
    }
}

/// All formats that can be taken in in this layout.
pub fn formats_of(mode: Mode) -> Vec<Format> {
    Format::ALL.into_iter().filter(|format| mode == Mode::Routed || format.carries_ethernet()).collect()
}

/// What a format is in the layout that was chosen.
pub(super) fn chosen(draft: Option<&At<Encapsulation>>, mode: Mode) -> Option<Encapsulation> {
    draft.map(|at| at.value.of_mode(mode))
}

/// What the longest headers are that this node may put before a pod's packet.
pub(super) fn most_overhead(draft: &Draft, mode: Option<Mode>, underlay_is_v4: bool) -> u32 {
    let mode = mode.unwrap_or_default();
    let usual = draft.underlay.as_ref().and_then(|underlay| underlay.encapsulation.as_ref());
    let usual = chosen(usual, mode).unwrap_or_default();
    let peers = draft.peers.iter().filter_map(|peer| chosen(peer.encapsulation.as_ref(), mode));
    peers.chain([usual]).map(|one| one.overhead(underlay_is_v4)).max().unwrap_or_default()
}

/// What cannot be with this layout, or beside each other.
pub(super) fn check(reader: &mut Reader<'_>, draft: &Draft, mode: Option<Mode>) {
    let underlay = draft.underlay.as_ref();
    let usual = underlay.and_then(|underlay| underlay.encapsulation.as_ref());
    let crossing = underlay.and_then(|underlay| underlay.cross_subnet.as_ref()).filter(|at| at.value);
    let all = usual.into_iter().chain(draft.peers.iter().filter_map(|peer| peer.encapsulation.as_ref()));
    if mode == Some(Mode::Bridged) {
        let carries = |at: &&At<Encapsulation>| at.value.of_mode(Mode::Bridged).carries_ethernet();
        for at in all.filter(|at| !carries(at)) {
            refuse_bridged(reader, &at.place, at.value.name());
        }
        if let Some(at) = crossing {
            refuse_bridged(reader, &at.place, "what cross_subnet sends");
        }
    }
    if let (Some(at), Some(Encapsulation::HostGw)) = (crossing, usual.map(|usual| usual.value)) {
        let what = "needs a tunnel for the nodes of other subnets: set encapsulation to another one than \"host-gw\"";
        reader.problem(&at.place, what);
    }
    if let (Some(geneve), Some(underlay)) = (underlay.and_then(|underlay| underlay.geneve_port.as_ref()), underlay)
        && geneve.value == underlay.port.as_ref().map_or(super::DEFAULT_PORT, |port| port.value)
    {
        reader.problem(&geneve.place, "is VXLAN's port already (underlay.port): give each its own");
    }
}

fn refuse_bridged(reader: &mut Reader<'_>, place: &Place, what: &str) {
    let what = format!(
        "{what} carries no Ethernet frames, which bridged mode needs: choose \"vxlan\", \"geneve\" or \"gre\", or mode = \"routed\""
    );
    reader.problem(place, what);
}

/// The subnet of the underlay address, as this machine has it.
pub(super) fn subnet(host: &super::Host, address: IpAddr) -> Option<IpNet> {
    host.subnets.iter().find(|subnet| subnet.addr() == address).map(IpNet::trunc)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::host::Host;

    const BASE: &str = "node = \"n1\"\nMODE\nranges = [\"10.244.1.0/24\"]\n[underlay]\naddress = \"10.200.0.1\"\n";
    const PEER: &str = "[[peers]]\nname = \"n2\"\nunderlay = \"10.200.0.2\"\nranges = [\"10.244.2.0/24\"]\n";
    const FAR: &str = "[[peers]]\nname = \"n3\"\nunderlay = \"10.201.0.3\"\nranges = [\"10.244.3.0/24\"]\n";

    fn host() -> Host {
        let uplink = crate::control::host::Interface {
            index: 2,
            name: "uplink".into(),
            mtu: 1500,
            up: true,
            addresses: vec!["10.200.0.1".parse().unwrap()],
        };
        Host { interfaces: vec![uplink], subnets: vec!["10.200.0.1/16".parse().unwrap()], ..Host::default() }
    }

    fn read(mode: &str, underlay: &str, peer: &str) -> Result<Config, String> {
        let mode = match mode {
            "bridged" => "mode = \"bridged\"\nsegment = [\"10.244.0.0/16\"]",
            _ => "mode = \"routed\"",
        };
        let text = format!("{}{underlay}\n{PEER}{peer}\n{FAR}", BASE.replace("MODE", mode));
        Config::read(&text, &host()).map(|read| read.config).map_err(|invalid| invalid.to_string())
    }

    fn to(config: &Config) -> [&'static str; 2] {
        [0, 1].map(|number| config.encapsulation_to(&config.peers[number]).0.name())
    }

    #[test]
    fn what_is_sent_follows_default_subnet_and_peer() {
        let config = |underlay, peer| read("routed", underlay, peer).unwrap();
        assert_eq!(to(&config("", "")), ["vxlan", "vxlan"]);
        assert_eq!(to(&config("encapsulation = \"geneve\"", "")), ["geneve", "geneve"]);
        assert_eq!(to(&config("encapsulation = \"gre\"", "encapsulation = \"gretap\"")), ["gretap", "gre"]);
        assert_eq!(to(&config("encapsulation = \"host-gw\"", "encapsulation = \"vxlan\"")), ["vxlan", "host-gw"]);
        assert_eq!(to(&config("encapsulation = \"ipip\"\ncross_subnet = true", "")), ["host-gw", "ipip"]);
        assert_eq!(to(&config("cross_subnet = true", "encapsulation = \"geneve\"")), ["geneve", "vxlan"]);
    }

    #[test]
    fn the_mtu_leaves_room_for_the_longest_headers() {
        let mtu = |underlay, peer| read("routed", underlay, peer).unwrap().mtu;
        assert_eq!(mtu("", ""), 1450);
        assert_eq!(mtu("encapsulation = \"ipip\"", ""), 1480);
        assert_eq!(mtu("encapsulation = \"gre\"", ""), 1476);
        assert_eq!(mtu("encapsulation = \"gretap\"", ""), 1462);
        assert_eq!(mtu("encapsulation = \"host-gw\"", ""), 1500);
        assert_eq!(mtu("encapsulation = \"host-gw\"", "encapsulation = \"geneve\""), 1450);
        assert_eq!(mtu("encapsulation = \"ipip\"\ncross_subnet = true", ""), 1480);
    }

    #[test]
    fn bridged_mode_takes_what_carries_ethernet() {
        assert_eq!(to(&read("bridged", "encapsulation = \"gre\"", "").unwrap()), ["gretap", "gretap"]);
        assert_eq!(to(&read("bridged", "encapsulation = \"geneve\"", "").unwrap()), ["geneve", "geneve"]);
        for bad in ["encapsulation = \"ipip\"", "encapsulation = \"host-gw\"", "cross_subnet = true"] {
            let why = read("bridged", bad, "").unwrap_err();
            assert!(why.contains("carries no Ethernet frames"), "{why}");
        }
        assert!(read("bridged", "", "encapsulation = \"ipip\"").unwrap_err().contains(".encapsulation: "));
    }

    #[test]
    fn what_cannot_stand_beside_each_other_is_refused() {
        let why = read("routed", "encapsulation = \"host-gw\"\ncross_subnet = true", "").unwrap_err();
        assert!(why.contains("needs a tunnel for the nodes of other subnets"), "{why}");
        let why = read("routed", "geneve_port = 8472", "").unwrap_err();
        assert!(why.contains("is VXLAN's port already"), "{why}");
        let why = read("routed", "encapsulation = \"wireguard\"", "").unwrap_err();
        assert!(why.contains("\"host-gw\""), "{why}");
    }

    #[test]
    fn a_peer_that_does_not_take_in_a_format_gets_vxlan() {
        let mut config = read("routed", "encapsulation = \"geneve\"", "").unwrap();
        config.peers[0].accepts = Some(vec!["vxlan".into(), "geneve/7000".into()]);
        config.peers[1].accepts = Some(vec!["geneve".into()]);
        assert_eq!(to(&config), ["vxlan", "geneve"]);
        let why = config.encapsulation_to(&config.peers[0]).1.unwrap();
        assert_eq!(why, "n2 does not take in geneve");
        config.underlay.geneve_port = 7000;
        assert_eq!(to(&config), ["geneve", "vxlan"]);
        config.underlay.formats.retain(|format| *format != Format::Geneve);
        assert_eq!(to(&config), ["vxlan", "vxlan"]);
    }
}
