//! Where knowledge of the cluster comes from: this file alone, or an engine that all nodes share.
//!
//! With an engine the file has no ranges and no peers: this node's ranges and the other nodes come from there. What
//! every node must agree on (`network`, the lengths of prefixes) is written in each node's file all the same, for that is
//! how a node that is the first can begin; the engine keeps what the first one wrote, and others are held to it.
//!
//! ```toml
//! [etcd]
//! endpoints = ["https://10.0.0.1:2379", "https://10.0.0.2:2379"]
//! network = ["10.244.0.0/16", "fd00:10:244::/48"]  # each node gets a part of each
//! ```
//!
//! Optional: `node_prefix_v4` (24) and `node_prefix_v6` (64), how large a part is; `prefix` (`"/weft"`) of the keys; `lease`
//! (60), seconds after which a silent node counts as gone; `rest` (3600), seconds for which its range stays unused after
//! that; `user`, `password_file`; `ca`, `certificate`, `key`, files in PEM form, read again for each connection.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use ipnet::IpNet;
use weft_router::tables::Mode;

use super::PREFIX;
use super::check::{check_range, root};
use super::kubernetes::KubernetesConfig;
use super::reader::{At, Place, Reader, Section, TEXT};

/// What a node's part of the network is by default.
const NODE_PREFIX_V4: u8 = 24;
const NODE_PREFIX_V6: u8 = 64;
/// Seconds after which a node that etcd does not hear of counts as gone.
const LEASE: u64 = 60;
/// Seconds for which the range of such a node stays unused.
const REST: u64 = 3600;
/// Parts of a network that are counted: nodes are numbered with 16 bits.
const MAX_SLOT_BITS: u8 = 16;
/// Where the keys are in etcd.
const KEYS: &str = "/weft";
/// Servers of one engine.
const MAX_ENDPOINTS: usize = 16;

/// Where knowledge of the cluster comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceConfig {
    /// This file: ranges and peers stand in it.
    File,
    /// etcd.
    Etcd(Box<EtcdConfig>),
    /// The Kubernetes API.
    Kubernetes(Box<KubernetesConfig>),
}

impl SourceConfig {
    /// Its table in the file.
    pub fn table(&self) -> &'static str {
        match self {
            SourceConfig::File => "peers",
            SourceConfig::Etcd(_) => "etcd",
            SourceConfig::Kubernetes(_) => "kubernetes",
        }
    }
}

/// How etcd is reached, and what the cluster's network is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdConfig {
    /// Its servers.
    pub endpoints: Vec<String>,
    /// What all keys begin with, without a slash at its end.
    pub prefix: String,
    /// The network out of which nodes get their ranges.
    pub network: Network,
    /// Seconds after which a node that etcd does not hear of counts as gone.
    pub lease: u64,
    /// Seconds for which the range of a node that is gone stays unused.
    pub rest: u64,
    /// Who we are.
    pub user: Option<String>,
    /// Where the password is.
    pub password_file: Option<PathBuf>,
    /// Who may have signed the servers' certificates.
    pub ca: Option<PathBuf>,
    /// Our certificate and its key.
    pub certificate: Option<(PathBuf, PathBuf)>,
}

/// A network that is cut into equal parts, one for each node: a slot is a part of each family's prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// One prefix of each family at most, and how long the prefixes of its parts are.
    pub prefixes: Vec<(IpNet, u8)>,
}

impl std::fmt::Display for SourceConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SourceConfig::File => f.write_str("file"),
            SourceConfig::Etcd(etcd) => write!(f, "etcd, {} at {}", etcd.prefix, etcd.endpoints.join(" ")),
            SourceConfig::Kubernetes(kubernetes) => write!(f, "kubernetes, {kubernetes}"),
        }
    }
}

impl Network {
    /// How many slots there are.
    pub fn slots(&self) -> u32 {
        let bits = |(prefix, length): &(IpNet, u8)| length.saturating_sub(prefix.prefix_len()).min(MAX_SLOT_BITS);
        self.prefixes.iter().map(bits).min().map_or(0, |bits| 1 << bits)
    }

    /// The ranges of a slot.
    pub fn ranges(&self, slot: u32) -> Vec<IpNet> {
        let part = |(prefix, length): &(IpNet, u8)| match prefix.network() {
            IpAddr::V4(base) => {
                let offset = slot.checked_shl(32 - u32::from(*length)).unwrap_or(0);
                IpNet::new(Ipv4Addr::from_bits(base.to_bits() | offset).into(), *length)
            }
            IpAddr::V6(base) => {
                let offset = u128::from(slot).checked_shl(128 - u32::from(*length)).unwrap_or(0);
                IpNet::new(Ipv6Addr::from_bits(base.to_bits() | offset).into(), *length)
            }
        };
        // Lengths were checked against their family when the configuration was read.
        self.prefixes.iter().filter_map(|each| part(each).ok()).collect()
    }

    /// As people and the engine have it.
    pub fn shown(&self) -> Vec<String> {
        self.prefixes.iter().map(|(prefix, length)| format!("{prefix} in parts of /{length}")).collect()
    }
}

/// What stands in the file about an engine.
pub struct DraftEtcd {
    section: Place,
    endpoints: Vec<At<String>>,
    /// The network out of which nodes get their ranges.
    pub network: Vec<At<IpNet>>,
    prefix: Option<At<String>>,
    length_v4: Option<At<u8>>,
    length_v6: Option<At<u8>>,
    lease: Option<At<u64>>,
    rest: Option<At<u64>>,
    user: Option<At<String>>,
    files: [Option<At<PathBuf>>; 4],
}

impl DraftEtcd {
    /// Reads the table `etcd`.
    pub fn read<'t>(reader: &mut Reader<'t>, root: &mut Section<'t>) -> Option<DraftEtcd> {
        let mut section = reader.table(root, "etcd")?;
        let draft = DraftEtcd {
            section: section.missing("endpoints"),
            endpoints: reader.list(&mut section, "endpoints", TEXT),
            network: reader.list(&mut section, "network", PREFIX),
            prefix: reader.parsed(&mut section, "prefix", TEXT),
            length_v4: reader.number(&mut section, "node_prefix_v4", 8..=30),
            length_v6: reader.number(&mut section, "node_prefix_v6", 16..=126),
            // etcd itself makes shorter ones longer.
            lease: reader.number(&mut section, "lease", 2..=86_400),
            rest: reader.number(&mut section, "rest", 0..=31_536_000),
            user: reader.parsed(&mut section, "user", TEXT),
            files: ["password_file", "ca", "certificate", "key"].map(|key| reader.parsed(&mut section, key, "a path")),
        };
        reader.finish(section);
        Some(draft)
    }

    /// Checks it; `None` if something needed is missing.
    pub fn check(&self, reader: &mut Reader<'_>) -> Option<EtcdConfig> {
        self.check_endpoints(reader);
        self.check_files(reader);
        let network = self.check_network(reader)?;
        let prefix = self.prefix.as_ref().map_or(KEYS, |prefix| prefix.value.as_str());
        if let Some(at) = self.prefix.as_ref().filter(|at| !is_key_prefix(&at.value)) {
            reader.problem(&at.place, format!("{:?} is no prefix of keys: write one such as {KEYS:?}", at.value));
        }
        let [password_file, ca, certificate, key] =
            self.files.each_ref().map(|at| at.as_ref().map(|at| at.value.clone()));
        Some(EtcdConfig {
            endpoints: self.endpoints.iter().map(|at| at.value.clone()).collect(),
            prefix: prefix.to_owned(),
            network,
            lease: self.lease.as_ref().map_or(LEASE, |at| at.value),
            rest: self.rest.as_ref().map_or(REST, |at| at.value),
            user: self.user.as_ref().map(|at| at.value.clone()),
            password_file,
            ca,
            certificate: certificate.zip(key),
        })
    }

    fn check_endpoints(&self, reader: &mut Reader<'_>) {
        if self.endpoints.is_empty() && !reader.problems.iter().any(|problem| problem.place == self.section) {
            reader.problem(&self.section, "is missing: write the addresses of etcd's servers");
        }
        if let Some(at) = self.endpoints.get(MAX_ENDPOINTS) {
            reader.problem(&at.place, format!("is one too many: {MAX_ENDPOINTS} servers are enough"));
        }
        for at in &self.endpoints {
            let rest = at.value.strip_prefix("https://").or_else(|| at.value.strip_prefix("http://"));
            if !rest.is_some_and(is_authority) {
                let what = format!("{:?} is no server: write it as \"https://10.0.0.1:2379\"", at.value);
                reader.problem(&at.place, what);
            }
        }
    }

    fn check_files(&self, reader: &mut Reader<'_>) {
        check_absolute(reader, &self.files);
        let [password_file, _, certificate, key] = &self.files;
        let key_of = |name: &str| Place { key: format!("etcd.{name}"), ..self.section.clone() };
        if self.user.is_some() != password_file.is_some() {
            reader.problem(&key_of("user"), "and password_file come together: write both or none");
        }
        if certificate.is_some() != key.is_some() {
            reader.problem(&key_of("certificate"), "and key come together: write both or none");
        }
    }

    fn check_network(&self, reader: &mut Reader<'_>) -> Option<Network> {
        let place = Place { key: "etcd.network".into(), ..self.section.clone() };
        if self.network.is_empty() && !reader.problems.iter().any(|problem| problem.place.key == place.key) {
            reader.problem(&place, "is missing: write the prefixes out of which all nodes get their ranges");
        }
        let mut prefixes: Vec<(IpNet, u8)> = Vec::new();
        for at in &self.network {
            check_range(reader, at);
            let v4 = at.value.addr().is_ipv4();
            if prefixes.iter().any(|(other, _)| other.addr().is_ipv4() == v4) {
                reader.problem(&at.place, "is the second prefix of its family: a network has one of each at most");
                continue;
            }
            let (given, default) =
                if v4 { (&self.length_v4, NODE_PREFIX_V4) } else { (&self.length_v6, NODE_PREFIX_V6) };
            let length = given.as_ref().map_or(default, |at| at.value);
            let bits = length.checked_sub(at.value.prefix_len());
            if !bits.is_some_and(|bits| (1..=MAX_SLOT_BITS).contains(&bits)) {
                let what = format!(
                    "{} cannot be cut into parts of /{length}: between the lengths there must be 1 to {MAX_SLOT_BITS} bits",
                    at.value
                );
                reader.problem(&at.place, what);
                continue;
            }
            prefixes.push((at.value, length));
        }
        (!prefixes.is_empty()).then_some(Network { prefixes })
    }
}

/// Paths must not depend on where weftd was started.
pub(super) fn check_absolute(reader: &mut Reader<'_>, files: &[Option<At<PathBuf>>]) {
    for at in files.iter().flatten().filter(|at| !at.value.is_absolute()) {
        reader.problem(&at.place, format!("{:?} is not absolute: begin the path with '/'", at.value));
    }
}

/// What must not stand in the file beside an engine, because it comes from there.
pub fn check_beside(reader: &mut Reader<'_>, engine: &str, found: &[(&Place, &str)], mode: Option<Mode>) {
    for (place, what) in found {
        if !(*what == "gateway" && mode == Some(Mode::Bridged)) {
            reader.problem(
                place,
                format!("stands here, but {engine} says who has what: remove the {what}, or [{engine}]"),
            );
        }
    }
}

fn is_key_prefix(text: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '-');
    text.len() > 1 && text.len() <= 200 && text.starts_with('/') && !text.ends_with('/') && text.chars().all(good)
}

pub(super) fn is_authority(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '[' | ']');
    !host.is_empty() && host.chars().all(good) && port.parse::<u16>().is_ok_and(|port| port > 0)
}

/// The place of the key of an engine that is not there.
pub fn missing_underlay() -> Place {
    root("underlay.address")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(prefixes: &[(&str, u8)]) -> Network {
        Network { prefixes: prefixes.iter().map(|(prefix, length)| (prefix.parse().unwrap(), *length)).collect() }
    }

    #[test]
    fn a_slot_is_the_same_part_of_each_family() {
        let both = network(&[("10.244.0.0/16", 24), ("fd00:10:244::/48", 64)]);
        assert_eq!(both.slots(), 256);
        let text = |slot| both.ranges(slot).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(text(0), ["10.244.0.0/24", "fd00:10:244::/64"]);
        assert_eq!(text(3), ["10.244.3.0/24", "fd00:10:244:3::/64"]);
        assert_eq!(text(255), ["10.244.255.0/24", "fd00:10:244:ff::/64"]);
        assert_eq!(network(&[("fd00::/48", 64)]).slots(), 65_536);
        assert_eq!(network(&[("10.244.0.0/21", 24)]).slots(), 8);
    }

    #[test]
    fn a_server_has_a_scheme_a_host_and_a_port() {
        assert!(["10.0.0.1:2379", "etcd-1.example:2379", "[fd00::1]:2379"].iter().all(|text| is_authority(text)));
        assert!(["10.0.0.1", ":2379", "etcd:0", "etcd:99999", "a/b:1", "a b:1"].iter().all(|text| !is_authority(text)));
    }
}
