//! The network configuration: what the administrator wrote and what the runtime added to it.
//!
//! Keys of our own, all optional: `socket` (weftd's, [`weft_api::SOCKET`]), `stateDir` (where DEL leaves
//! tombstones, [`STATE_DIR`]), `wait` (seconds to wait for a weftd that is being restarted; by default each
//! command's own), `mtu` (0 or absent: the node's), `port` (`tap`, `xdp` or `auto`; absent: the node's), and `ipam` with type `weft` (or none): `ranges`, or the old
//! `subnet`, `rangeStart`, `rangeEnd`, `gateway`, as host-local reads them. From the runtime:
//! `runtimeConfig.{ips,ipRanges,mac}`, `args.cni.{ips,mac}`, `prevResult`, `cni.dev/valid-attachments`.
//!
//! A section is read by the commands that need it and by no other: a DEL must not fail because the addresses that
//! an ADD would ask for are misspelt. In `ipam`, which is ours alone, a key that is not known is refused; elsewhere
//! unknown keys belong to others and are ignored, but for those that ask for what is not done (`ipMasq`, port
//! mappings, bandwidth): a pod that silently lacks them is worse than one that does not start.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use weft_api::{Failure, Range, code};

use crate::environment::{self, Arguments};
use crate::input::quoted;

/// Where tombstones go unless the configuration says otherwise.
pub const STATE_DIR: &str = "/var/lib/weft";

/// The longest path of a unix socket, in bytes (`sun_path` without its NUL).
const MAX_SOCKET: usize = 107;

/// The longest `wait` that is accepted.
const MAX_WAIT: Duration = Duration::from_secs(600);

/// What every command needs, and the rest for those that ask.
#[derive(Debug)]
pub struct Config {
    pub network: String,
    pub socket: PathBuf,
    pub state_dir: PathBuf,
    pub wait: Option<Duration>,
    document: Value,
}

/// What an ADD asks for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    pub requested: Vec<IpAddr>,
    pub ranges: Vec<Vec<Range>>,
    pub mac: Option<String>,
    pub mtu: Option<u32>,
    pub port: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Ipam {
    #[serde(rename = "type")]
    _type: String,
    #[serde(default)]
    ranges: Vec<Vec<Range>>,
    subnet: Option<String>,
    range_start: Option<IpAddr>,
    range_end: Option<IpAddr>,
    gateway: Option<IpAddr>,
    #[serde(default)]
    routes: Vec<Route>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

#[derive(Deserialize)]
struct Route {
    dst: String,
    gw: Option<IpAddr>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct RuntimeConfig {
    ips: Option<Vec<String>>,
    ip_ranges: Option<Vec<Vec<Range>>>,
    mac: Option<String>,
    port_mappings: Option<Value>,
    bandwidth: Option<Value>,
}

#[derive(Deserialize)]
struct Attachment {
    #[serde(rename = "containerID")]
    container: String,
    ifname: String,
}

impl Config {
    /// Reads what every command needs.
    pub fn parse(document: Value) -> Result<Config, Failure> {
        if !document.is_object() {
            return Err(invalid("the network configuration is not a JSON object"));
        }
        let network: String =
            section(&document, "/name")?.ok_or_else(|| invalid("the network configuration has no name"))?;
        if !environment::is_name(&network) {
            return Err(invalid(format!("name is {}: it {}", quoted(&network), environment::name_form())));
        }
        let socket = absolute(&document, "/socket", weft_api::SOCKET)?;
        if socket.as_os_str().len() > MAX_SOCKET {
            return Err(invalid(format!(
                "socket is longer than {MAX_SOCKET} bytes, which no unix socket's path can be"
            )));
        }
        let state_dir = absolute(&document, "/stateDir", STATE_DIR)?;
        let wait = match section::<f64>(&document, "/wait")?.map(Duration::try_from_secs_f64) {
            None => None,
            Some(Ok(wait)) if wait <= MAX_WAIT => Some(wait),
            Some(_) => {
                return Err(invalid(format!("wait is not a number of seconds from 0 to {}", MAX_WAIT.as_secs())));
            }
        };
        Ok(Config { network, socket, state_dir, wait, document })
    }

    /// What an ADD with these arguments asks for. Addresses in the order of host-local: `CNI_ARGS`, `args.cni.ips`,
    /// `runtimeConfig.ips`; ranges: `runtimeConfig.ipRanges`, the old single range, `ranges`.
    pub fn wanted(&self, arguments: &Arguments) -> Result<Wanted, Failure> {
        if section(&self.document, "/ipMasq")?.unwrap_or(false) {
            return Err(unsupported("ipMasq", "remove it"));
        }
        let runtime: RuntimeConfig = section(&self.document, "/runtimeConfig")?.unwrap_or_default();
        let asks =
            |value: &Option<Value>| !matches!(value, None | Some(Value::Null)) && *value != Some(Value::Array(vec![]));
        if asks(&runtime.port_mappings) {
            let what = "remove the capability portMappings here and chain the portmap plugin";
            return Err(unsupported("runtimeConfig.portMappings", what));
        }
        if asks(&runtime.bandwidth) {
            let what = "remove the capability bandwidth here and chain the bandwidth plugin";
            return Err(unsupported("runtimeConfig.bandwidth", what));
        }

        let mut requested = arguments.addresses.clone();
        let in_args: Vec<String> = section(&self.document, "/args/cni/ips")?.unwrap_or_default();
        append_addresses(&mut requested, "args.cni.ips", &in_args)?;
        append_addresses(&mut requested, "runtimeConfig.ips", &runtime.ips.unwrap_or_default())?;
        let mut seen = std::collections::HashSet::new();
        requested.retain(|address| seen.insert(*address));

        let mut ranges = runtime.ip_ranges.unwrap_or_default();
        ranges.extend(self.ipam_ranges()?);
        if let Some(set) = ranges.iter().position(Vec::is_empty) {
            return Err(invalid(format!("range set {set} is empty")));
        }
        Ok(Wanted { requested, ranges, mac: self.mac(runtime.mac, arguments)?, mtu: self.mtu()?, port: self.port()? })
    }

    /// The result of the plugin before, or of the ADD that a CHECK is about.
    pub fn previous_result(&self) -> Result<Option<&Map<String, Value>>, Failure> {
        match self.document.get("prevResult") {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(result)) => Ok(Some(result)),
            Some(_) => Err(invalid("prevResult is not an object")),
        }
    }

    /// The name servers to pass on, if the configuration says any.
    pub fn dns(&self) -> Result<Option<&Value>, Failure> {
        match self.document.get("dns") {
            None | Some(Value::Null) => Ok(None),
            Some(dns) if dns.is_object() => Ok(Some(dns)),
            Some(_) => Err(invalid("dns is not an object")),
        }
    }

    /// The attachments that a GC leaves: (container id, interface name). `null` is how Go writes an empty list; but
    /// where the key is absent nobody said that nothing is valid.
    pub fn valid_attachments(&self) -> Result<Vec<(String, String)>, Failure> {
        // The specification's first text called it by the second name, and libcni sends both.
        let keys = ["cni.dev/valid-attachments", "cni.dev/attachments"];
        let Some(key) = keys.into_iter().find(|key| self.document.get(key).is_some()) else {
            return Err(invalid("GC without cni.dev/valid-attachments: nothing says which attachments to keep"));
        };
        let attachments: Option<Vec<Attachment>> = Option::deserialize(&self.document[key])
            .map_err(|error: serde_json::Error| invalid(format!("{key} cannot be read: {error}")))?;
        Ok(attachments.unwrap_or_default().into_iter().map(|valid| (valid.container, valid.ifname)).collect())
    }

    fn ipam_ranges(&self) -> Result<Vec<Vec<Range>>, Failure> {
        let Some(kind) = self.document.get("ipam").filter(|ipam| !ipam.is_null()).map(|ipam| &ipam["type"]) else {
            return Ok(Vec::new());
        };
        if kind != "weft" {
            let what = match kind {
                Value::String(kind) => format!("ipam.type {}", quoted(kind)),
                _ => "ipam without a type".to_owned(),
            };
            return Err(unsupported(
                &what,
                "set ipam.type to \"weft\", or remove ipam: weftd gives the node's addresses",
            ));
        }
        let ipam: Ipam = section(&self.document, "/ipam")?.expect("ipam has a type, so it is there");
        if let Some(key) = ipam.others.keys().next() {
            return Err(unsupported(&format!("ipam.{}", key.escape_debug()), "remove it"));
        }
        let is_default = |route: &Route| route.gw.is_none() && ["0.0.0.0/0", "::/0"].contains(&route.dst.as_str());
        if !ipam.routes.iter().all(is_default) {
            return Err(unsupported("a route in ipam.routes that is not the default route", "remove it"));
        }
        let old = ipam.subnet.map(|subnet| {
            vec![Range { subnet, range_start: ipam.range_start, range_end: ipam.range_end, gateway: ipam.gateway }]
        });
        let orphan =
            old.is_none() && (ipam.range_start.is_some() || ipam.range_end.is_some() || ipam.gateway.is_some());
        if orphan {
            return Err(invalid("ipam has rangeStart, rangeEnd or gateway without subnet"));
        }
        Ok(old.into_iter().chain(ipam.ranges).collect())
    }

    fn mac(&self, runtime: Option<String>, arguments: &Arguments) -> Result<Option<String>, Failure> {
        let in_args: Option<String> = section(&self.document, "/args/cni/mac")?;
        let asked = [("runtimeConfig.mac", runtime), ("args.cni.mac", in_args)];
        let asked = asked.into_iter().find_map(|(key, mac)| Some((key, mac.filter(|mac| !mac.is_empty())?)));
        match asked {
            None => Ok(arguments.mac.clone()),
            Some((key, text)) => match environment::mac(&text) {
                Some(mac) => Ok(Some(mac)),
                None => Err(invalid(format!("{key} is {}, which is not a unicast MAC", quoted(&text)))),
            },
        }
    }

    fn mtu(&self) -> Result<Option<u32>, Failure> {
        Ok(section(&self.document, "/mtu")?.filter(|&mtu: &u32| mtu != 0))
    }

    fn port(&self) -> Result<Option<String>, Failure> {
        let asked: Option<String> = section(&self.document, "/port")?.filter(|port: &String| !port.is_empty());
        match asked {
            Some(port) if !["tap", "xdp", "auto"].contains(&port.as_str()) => {
                Err(invalid(format!("port is {}, which is none of tap, xdp, auto", quoted(&port))))
            }
            asked => Ok(asked),
        }
    }
}

/// A failure of the configuration.
pub fn invalid(what: impl Into<String>) -> Failure {
    Failure::new(code::CONFIG, what)
}

fn unsupported(what: &str, remedy: &str) -> Failure {
    Failure::new(code::UNSUPPORTED_FIELD, format!("{what} is not supported by weft-cni")).with_details(remedy)
}

/// The value at `pointer`, if it is there and not null.
fn section<T: DeserializeOwned>(document: &Value, pointer: &str) -> Result<Option<T>, Failure> {
    let value = document.pointer(pointer).unwrap_or(&Value::Null);
    Option::deserialize(value).map_err(|error: serde_json::Error| {
        let key = pointer.trim_start_matches('/').replace('/', ".");
        invalid(format!("{key} cannot be read: {}", bounded(&error.to_string())))
    })
}

/// serde repeats the whole value that it could not read.
fn bounded(text: &str) -> String {
    text.chars().take(200).collect()
}

fn absolute(document: &Value, pointer: &str, default: &str) -> Result<PathBuf, Failure> {
    let text: String = section(document, pointer)?.unwrap_or_else(|| default.to_owned());
    if !text.starts_with('/') || text.contains('\0') {
        return Err(invalid(format!("{} is {}, which is not an absolute path", &pointer[1..], quoted(&text))));
    }
    Ok(PathBuf::from(text))
}

fn append_addresses(all: &mut Vec<IpAddr>, key: &str, texts: &[String]) -> Result<(), Failure> {
    for text in texts {
        let wrong = || invalid(format!("{key}: {} is not an address", quoted(text)));
        all.push(environment::address(text).ok_or_else(wrong)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A configuration with `keys` beside the name.
    fn config(keys: Value) -> Result<Config, Failure> {
        let mut document = json!({ "cniVersion": "1.1.0", "name": "pods", "type": "weft-cni" });
        document.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        Config::parse(document)
    }

    fn wanted(keys: Value) -> Result<Wanted, Failure> {
        config(keys)?.wanted(&Arguments::default())
    }

    fn range(subnet: &str) -> Range {
        Range { subnet: subnet.into(), range_start: None, range_end: None, gateway: None }
    }

    #[test]
    fn a_bare_configuration_has_the_defaults() {
        let config = config(json!({ "unknown": [1], "ipam": null, "dns": null })).unwrap();
        assert_eq!(config.network, "pods");
        assert_eq!(config.socket, PathBuf::from(weft_api::SOCKET));
        assert_eq!(config.state_dir, PathBuf::from("/var/lib/weft"));
        assert_eq!(config.wait, None);
        assert_eq!(config.wanted(&Arguments::default()).unwrap(), Wanted::default());
        assert!(config.previous_result().unwrap().is_none());
        assert!(config.dns().unwrap().is_none());
    }

    #[test]
    fn keys_of_the_wrong_kind_are_named() {
        let cases = [
            (json!({ "name": null }), "no name"),
            (json!({ "name": 7 }), "name"),
            (json!({ "name": "../../etc" }), "name"),
            (json!({ "name": "a\0b" }), "name"),
            (json!({ "name": "" }), "name"),
            (json!({ "socket": 1 }), "socket"),
            (json!({ "socket": "relative" }), "socket"),
            (json!({ "socket": "/a\0b" }), "socket"),
            (json!({ "socket": format!("/{}", "x".repeat(107)) }), "socket"),
            (json!({ "stateDir": "state" }), "stateDir"),
            (json!({ "wait": -1 }), "wait"),
            (json!({ "wait": 1e300 }), "wait"),
            (json!({ "wait": "1" }), "wait"),
            (json!({ "mtu": -1 }), "mtu"),
            (json!({ "mtu": "1500" }), "mtu"),
            (json!({ "port": "veth" }), "port"),
            (json!({ "port": 1 }), "port"),
            (json!({ "runtimeConfig": [] }), "runtimeConfig"),
            (json!({ "runtimeConfig": { "ips": ["x"] } }), "runtimeConfig.ips"),
            (json!({ "runtimeConfig": { "mac": "x" } }), "runtimeConfig.mac"),
            (json!({ "args": { "cni": { "ips": "10.0.0.1" } } }), "args.cni.ips"),
            (json!({ "args": { "cni": { "ips": ["10.0.0.1/99"] } } }), "args.cni.ips"),
            (json!({ "ipam": { "type": "weft", "ranges": [[]] } }), "range set 0 is empty"),
            (json!({ "ipam": { "type": "weft", "ranges": [[{}]] } }), "subnet"),
            (json!({ "ipam": { "type": "weft", "gateway": "10.0.0.1" } }), "without subnet"),
            (json!({ "ipam": { "type": "weft", "subnet": "10.0.0.0/8", "rangeStart": "y" } }), "ipam"),
        ];
        for (keys, named) in cases {
            let failure = wanted(keys).unwrap_err();
            assert_eq!(failure.code, code::CONFIG, "{failure}");
            assert!(failure.msg.contains(named) && failure.msg.len() < 300, "{failure}");
        }
        assert_eq!(Config::parse(json!([])).unwrap_err().code, code::CONFIG);
    }

    #[test]
    fn what_is_not_done_is_refused_instead_of_ignored() {
        let cases = [
            (json!({ "ipMasq": true }), "ipMasq"),
            (json!({ "runtimeConfig": { "portMappings": [{ "hostPort": 80 }] } }), "portMappings"),
            (json!({ "runtimeConfig": { "bandwidth": { "ingressRate": 1 } } }), "bandwidth"),
            (json!({ "ipam": { "type": "host-local", "subnet": 7 } }), "host-local"),
            (json!({ "ipam": {} }), "ipam without a type"),
            (json!({ "ipam": "weft" }), "ipam without a type"),
            (json!({ "ipam": { "type": "weft", "dataDir": "/tmp" } }), "ipam.dataDir"),
            (json!({ "ipam": { "type": "weft", "routes": [{ "dst": "10.0.0.0/8" }] } }), "ipam.routes"),
        ];
        for (keys, named) in cases {
            let failure = wanted(keys).unwrap_err();
            assert_eq!(failure.code, code::UNSUPPORTED_FIELD, "{failure}");
            assert!(failure.msg.contains(named) && !failure.details.is_empty(), "{failure}");
        }
        let harmless = json!({
            "ipMasq": false, "runtimeConfig": { "portMappings": [] },
            "ipam": { "type": "weft", "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }] }
        });
        assert_eq!(wanted(harmless).unwrap(), Wanted::default());
    }

    #[test]
    fn addresses_come_from_arguments_then_args_then_the_runtime_each_once() {
        let keys = json!({
            "args": { "cni": { "ips": ["10.0.0.2", "10.0.0.1"] } },
            "runtimeConfig": { "ips": ["10.0.0.3/24", "10.0.0.2"] }
        });
        let arguments = Arguments { addresses: vec!["10.0.0.1".parse().unwrap()], ..Arguments::default() };
        let wanted = config(keys).unwrap().wanted(&arguments).unwrap();
        let expected: Vec<IpAddr> = ["10.0.0.1", "10.0.0.2", "10.0.0.3"].map(|text| text.parse().unwrap()).to_vec();
        assert_eq!(wanted.requested, expected);
    }

    #[test]
    fn ranges_come_from_the_runtime_then_the_old_keys_then_the_list() {
        let keys = json!({
            "ipam": {
                "type": "weft", "subnet": "10.1.0.0/24", "rangeStart": "10.1.0.9", "gateway": "10.1.0.254",
                "ranges": [[{ "subnet": "10.2.0.0/24" }, { "subnet": "10.3.0.0/24" }]]
            },
            "runtimeConfig": { "ipRanges": [[{ "subnet": "fd00::/64" }]] }
        });
        let old = Range {
            range_start: Some("10.1.0.9".parse().unwrap()),
            gateway: Some("10.1.0.254".parse().unwrap()),
            ..range("10.1.0.0/24")
        };
        let expected = vec![vec![range("fd00::/64")], vec![old], vec![range("10.2.0.0/24"), range("10.3.0.0/24")]];
        assert_eq!(wanted(keys).unwrap().ranges, expected);
    }

    #[test]
    fn the_runtimes_mac_wins_over_args_and_arguments() {
        let arguments = Arguments { mac: Some("02:00:00:00:00:01".into()), ..Arguments::default() };
        let cases = [
            (json!({}), "02:00:00:00:00:01"),
            (json!({ "args": { "cni": { "mac": "02:00:00:00:00:02" } } }), "02:00:00:00:00:02"),
            (
                json!({ "args": { "cni": { "mac": "x" } }, "runtimeConfig": { "mac": "02:00:00:00:00:0A" } }),
                "02:00:00:00:00:0a",
            ),
        ];
        for (keys, mac) in cases {
            assert_eq!(config(keys).unwrap().wanted(&arguments).unwrap().mac.as_deref(), Some(mac));
        }
    }

    #[test]
    fn an_empty_list_of_valid_attachments_is_meaningful_and_an_absent_one_an_error() {
        let valid = |keys| config(keys).unwrap().valid_attachments();
        assert_eq!(valid(json!({ "cni.dev/valid-attachments": [] })).unwrap(), []);
        assert_eq!(valid(json!({ "cni.dev/valid-attachments": null })).unwrap(), []);
        let one = json!([{ "containerID": "c1", "ifname": "eth0", "more": 1 }]);
        let expected = [("c1".to_owned(), "eth0".to_owned())];
        assert_eq!(valid(json!({ "cni.dev/valid-attachments": one })).unwrap(), expected);
        assert_eq!(valid(json!({ "cni.dev/attachments": one })).unwrap(), expected);
        assert_eq!(valid(json!({ "cni.dev/attachments": [], "cni.dev/valid-attachments": one })).unwrap(), expected);
        for wrong in [json!({}), json!({ "cni.dev/valid-attachments": [{ "containerID": "c1" }] })] {
            assert_eq!(valid(wrong).unwrap_err().code, code::CONFIG);
        }
    }
}
