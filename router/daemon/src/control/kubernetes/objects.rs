//! What is remembered of the API's objects, and how they are read: `v1` only, no field that is not used, and each value as its writer
//! wrote it. What the values mean is decided where they are compared with each other ([`members`](super::members)).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::mirror::{Kind, Metadata};

/// The annotation by which weftd tells the others about its node.
pub const ANNOUNCED: &str = "weft.internal/node";
/// The annotation by which an operator says what a node's underlay address is.
pub const UNDERLAY: &str = "weft.internal/underlay-address";
/// No announcement is longer.
const MAX_ANNOUNCED: usize = 16 << 10;

/// A Node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its identity: another Node of the same name has another one.
    pub uid: String,
    /// When it was made, as RFC 3339 has it.
    pub made: String,
    /// `spec.podCIDRs`.
    pub ranges: Vec<String>,
    /// Its addresses of the type `InternalIP`.
    pub addresses: Vec<String>,
    /// What an operator says its underlay address is.
    pub underlay: Option<String>,
    /// What its weftd says.
    pub announced: Option<Result<Announced, String>>,
    /// The condition `NetworkUnavailable`.
    pub network_unavailable: Option<String>,
}

/// What a weftd says about its node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announced {
    /// Which weftd says so: a random number that its machine keeps.
    pub identity: String,
    /// The underlay address.
    pub underlay: String,
    /// What it wraps packets in: `vxlan`.
    pub encapsulation: String,
    /// What it takes in; nothing: VXLAN alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub accepts: Vec<String>,
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP port of the tunnel.
    pub port: u16,
    /// `routed` or `bridged`.
    pub mode: String,
    /// The inner MAC.
    pub vtep_mac: String,
    /// The pods' MTU.
    pub mtu: u32,
    /// Ranges that are not the node's any more, but pods of it still have addresses of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub former: Vec<String>,
}

/// A Pod of this node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pod {
    /// The addresses that are its own: none if it has those of the machine, or has ended.
    pub addresses: Vec<String>,
}

#[derive(Deserialize)]
struct RawNode {
    metadata: RawMetadata,
    #[serde(default)]
    spec: RawNodeSpec,
    #[serde(default)]
    status: RawNodeStatus,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawMetadata {
    name: String,
    #[serde(default)]
    resource_version: String,
    #[serde(default)]
    uid: String,
    #[serde(default)]
    creation_timestamp: Option<String>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Default, Deserialize)]
struct RawNodeSpec {
    #[serde(default, rename = "podCIDR")]
    range: Option<String>,
    #[serde(default, rename = "podCIDRs")]
    ranges: Option<Vec<String>>,
}

#[derive(Default, Deserialize)]
struct RawNodeStatus {
    #[serde(default)]
    addresses: Option<Vec<RawAddress>>,
    #[serde(default)]
    conditions: Option<Vec<RawCondition>>,
}

#[derive(Deserialize)]
struct RawAddress {
    #[serde(rename = "type")]
    kind: String,
    address: String,
}

#[derive(Deserialize)]
struct RawCondition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

impl Kind for Node {
    const WHAT: &'static str = "nodes";
    const PATH: &'static str = "/api/v1/nodes";

    fn read(json: &str) -> Result<(Metadata, Node), String> {
        let raw: RawNode = serde_json::from_str(json).map_err(|why| format!("it cannot be read: {why}"))?;
        let RawMetadata { name, resource_version, uid, creation_timestamp, annotations } = raw.metadata;
        let metadata = Metadata { name: name.clone(), namespace: String::new(), resource_version };
        let mut annotations = annotations.unwrap_or_default();
        let announced = annotations.remove(ANNOUNCED).map(|text| {
            if text.len() > MAX_ANNOUNCED {
                return Err(format!("its annotation {ANNOUNCED} is too long"));
            }
            serde_json::from_str(&text).map_err(|why| format!("its annotation {ANNOUNCED} cannot be read: {why}"))
        });
        // Older than podCIDRs is podCIDR, which stayed as the first of them.
        let ranges = raw.spec.ranges.filter(|ranges| !ranges.is_empty());
        let ranges = ranges.unwrap_or_else(|| raw.spec.range.into_iter().filter(|range| !range.is_empty()).collect());
        let internal = raw.status.addresses.into_iter().flatten().filter(|address| address.kind == "InternalIP");
        let mut conditions = raw.status.conditions.into_iter().flatten();
        let node = Node {
            name,
            uid,
            made: creation_timestamp.unwrap_or_default(),
            ranges,
            addresses: internal.map(|address| address.address).collect(),
            underlay: annotations.remove(UNDERLAY),
            announced,
            network_unavailable: conditions.rfind(|each| each.kind == "NetworkUnavailable").map(|each| each.status),
        };
        Ok((metadata, node))
    }
}

#[derive(Deserialize)]
struct RawPod {
    metadata: Metadata,
    #[serde(default)]
    spec: RawPodSpec,
    #[serde(default)]
    status: RawPodStatus,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawPodSpec {
    #[serde(default)]
    host_network: bool,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawPodStatus {
    #[serde(default)]
    phase: String,
    #[serde(default, rename = "podIP")]
    address: Option<String>,
    #[serde(default, rename = "podIPs")]
    addresses: Option<Vec<RawPodAddress>>,
}

#[derive(Deserialize)]
struct RawPodAddress {
    #[serde(default)]
    ip: String,
}

impl Kind for Pod {
    const WHAT: &'static str = "pods";
    const PATH: &'static str = "/api/v1/pods";

    fn read(json: &str) -> Result<(Metadata, Pod), String> {
        let raw: RawPod = serde_json::from_str(json).map_err(|why| format!("it cannot be read: {why}"))?;
        if raw.spec.host_network || matches!(raw.status.phase.as_str(), "Succeeded" | "Failed") {
            return Ok((raw.metadata, Pod::default()));
        }
        let all = raw.status.addresses.into_iter().flatten().map(|each| each.ip).chain(raw.status.address);
        let mut addresses: Vec<String> = all.filter(|address| !address.is_empty()).collect();
        addresses.sort_unstable();
        addresses.dedup();
        Ok((raw.metadata, Pod { addresses }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Node {
        Node::read(json).unwrap().1
    }

    #[test]
    fn a_node_is_read_with_or_without_what_is_optional() {
        let bare = read(r#"{"metadata":{"name":"n1"}}"#);
        assert_eq!(bare, Node { name: "n1".into(), ..Node::default() });
        let nulls = r#"{"metadata":{"name":"n1","annotations":null},"spec":{"podCIDRs":null},"status":{"addresses":null,"conditions":null}}"#;
        assert_eq!(read(nulls), bare);
        let old = read(r#"{"metadata":{"name":"n1"},"spec":{"podCIDR":"10.244.1.0/24"}}"#);
        assert_eq!(old.ranges, ["10.244.1.0/24"]);
        let text = r#"{"metadata":{"name":"n1","annotations":{"weft.internal/node":"{","weft.internal/underlay-address":"10.0.0.1"}},
            "spec":{"podCIDR":"a","podCIDRs":["a","b"]},"status":{"addresses":[{"type":"Hostname","address":"h"},
            {"type":"InternalIP","address":"10.0.0.2"}],"conditions":[{"type":"NetworkUnavailable","status":"True"}]}}"#;
        let full = read(text);
        assert_eq!((full.ranges, full.addresses), (vec!["a".to_owned(), "b".into()], vec!["10.0.0.2".to_owned()]));
        assert_eq!((full.underlay.as_deref(), full.network_unavailable.as_deref()), (Some("10.0.0.1"), Some("True")));
        assert!(full.announced.unwrap().unwrap_err().contains("weft.internal/node cannot be read"));
        Node::read(r#"{"metadata":{"name":"n1"},"spec":{"podCIDRs":5}}"#).unwrap_err();
    }

    #[test]
    fn no_object_panics() {
        let whole = weft_tests::kubernetes::node(1).to_string();
        for at in (0..whole.len()).step_by(3) {
            let _ = Node::read(whole.get(..at).unwrap_or_default());
            for by in ["\"", "{", "null", "9e999", "\\u0000", "]"] {
                let (Some(before), Some(after)) = (whole.get(..at), whole.get(at + 1..)) else { continue };
                let spoilt = format!("{before}{by}{after}");
                let _ = (Node::read(&spoilt), Pod::read(&spoilt));
            }
        }
    }

    #[test]
    fn only_a_pod_that_lives_and_has_a_network_of_its_own_has_addresses() {
        let pod = |spec: &str, phase: &str| {
            let text = format!(
                r#"{{"metadata":{{"name":"p"}},"spec":{{{spec}}},"status":{{"phase":"{phase}","podIP":"10.244.1.2","podIPs":[{{"ip":"10.244.1.2"}},{{"ip":"fd00::2"}}]}}}}"#
            );
            Pod::read(&text).unwrap().1.addresses
        };
        assert_eq!(pod("", "Running"), ["10.244.1.2", "fd00::2"]);
        assert!(pod("\"hostNetwork\":true", "Running").is_empty());
        assert!(pod("", "Succeeded").is_empty() && pod("", "Failed").is_empty());
    }
}
