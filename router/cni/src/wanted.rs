//! What an ADD asks for: the administrator's keys, the runtime's `runtimeConfig`, `args.cni` and `CNI_ARGS` in one.
//!
//! Keys of the configuration, all optional: `mtu` (0 or absent: the node's), `port` (`tap`, `xdp` or `auto`; absent: the
//! node's), `bandwidth` (limits as the capability has them), `trusted` (a list of what the network's pods may do that others may not: `dhcp`, to
//! answer as a DHCP server), `dns`, and `ipam` with type `weft` (or none): `ranges`, or the old `subnet`,
//! `rangeStart`, `rangeEnd`, `gateway`, as host-local reads them, and `routes`. From the runtime:
//! `runtimeConfig.{ips,ipRanges,mac,bandwidth,dns,portMappings}`, `args.cni.{ips,mac}`.
//!
//! In `ipam`, which is ours alone, a key that is not known is refused; elsewhere unknown keys belong to others and are
//! ignored, but for `ipMasq`, which asks for what is not done: a pod that silently lacks it is worse than one that does not
//! start. Port mappings are read and left to the plugin `portmap` behind us, which is given the same.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::Deserialize;
use serde_json::{Map, Value, json};
use weft_api::{AttachedRoute, Bandwidth, Failure, Range};

use crate::config::{Config, Role, invalid, section, unsupported};
use crate::environment::{self, Arguments};
use crate::input::quoted;

/// What an ADD asks for.
#[derive(Debug, Default, PartialEq)]
pub struct Wanted {
    pub requested: Vec<IpAddr>,
    pub ranges: Vec<Vec<Range>>,
    pub routes: Option<Vec<AttachedRoute>>,
    pub mac: Option<String>,
    pub mtu: Option<u32>,
    pub port: Option<String>,
    pub bandwidth: Option<Bandwidth>,
    pub trusted: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Ipam {
    #[serde(rename = "type")]
    _type: String,
    #[serde(default)]
    ranges: Option<Vec<Vec<Range>>>,
    subnet: Option<String>,
    range_start: Option<IpAddr>,
    range_end: Option<IpAddr>,
    gateway: Option<IpAddr>,
    routes: Option<Vec<Route>>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// A route as CNI writes it, in configurations and results.
#[derive(Deserialize)]
pub struct Route {
    dst: String,
    gw: Option<String>,
    mtu: Option<u32>,
    advmss: Option<u32>,
    priority: Option<u32>,
    table: Option<u32>,
    scope: Option<u8>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct RuntimeConfig {
    ips: Option<Vec<String>>,
    ip_ranges: Option<Vec<Vec<Range>>>,
    mac: Option<String>,
    port_mappings: Option<Vec<Map<String, Value>>>,
    bandwidth: Option<Bandwidth>,
}

#[derive(Deserialize)]
struct RuntimeDns {
    servers: Option<Vec<String>>,
    searches: Option<Vec<String>>,
    options: Option<Vec<String>>,
}

impl Config {
    /// What an ADD with these arguments asks for. Addresses in the order of host-local: `CNI_ARGS`, `args.cni.ips`,
    /// `runtimeConfig.ips`; ranges: `runtimeConfig.ipRanges`, the old single range, `ranges`. Where another plugin gives the
    /// addresses, that is for it to read.
    pub fn wanted(&self, arguments: &Arguments) -> Result<Wanted, Failure> {
        if section(&self.document, "/ipMasq")?.unwrap_or(false) {
            return Err(unsupported("ipMasq", &json!(true), "remove it"));
        }
        let runtime: RuntimeConfig = section(&self.document, "/runtimeConfig")?.unwrap_or_default();
        drop(runtime.port_mappings);
        let mut wanted = Wanted {
            mac: self.mac(runtime.mac, arguments)?,
            mtu: section(&self.document, "/mtu")?.filter(|&mtu: &u32| mtu != 0),
            port: self.port()?,
            bandwidth: self.bandwidth(runtime.bandwidth)?,
            trusted: self.trusted()?,
            ..Wanted::default()
        };
        if matches!(self.role()?, Role::Delegating(_)) {
            return Ok(wanted);
        }
        wanted.requested = self.requested(arguments, &runtime.ips.unwrap_or_default())?;
        wanted.ranges = runtime.ip_ranges.unwrap_or_default();
        if let Some(ipam) = self.ipam()? {
            wanted.routes = ipam.routes.as_deref().map(|routes| routes.iter().map(route).collect()).transpose()?;
            wanted.ranges.extend(ranges(ipam)?);
        }
        match wanted.ranges.iter().position(Vec::is_empty) {
            Some(set) => Err(invalid(format!("range set {set} is empty"))),
            None => Ok(wanted),
        }
    }

    fn requested(&self, arguments: &Arguments, by_runtime: &[String]) -> Result<Vec<IpAddr>, Failure> {
        let mut requested = arguments.addresses.clone();
        let in_args: Vec<String> = section(&self.document, "/args/cni/ips")?.unwrap_or_default();
        append_addresses(&mut requested, "args.cni.ips", &in_args)?;
        append_addresses(&mut requested, "runtimeConfig.ips", by_runtime)?;
        let mut seen = HashSet::new();
        requested.retain(|address| seen.insert(*address));
        Ok(requested)
    }

    /// The name servers to pass on, if anybody says any: the runtime, the configuration, or the plugin that gave the addresses.
    pub fn dns(&self, by_ipam: Option<&Value>) -> Result<Option<Value>, Failure> {
        if let Some(runtime) = section::<RuntimeDns>(&self.document, "/runtimeConfig/dns")? {
            let lists = [("nameservers", runtime.servers), ("search", runtime.searches), ("options", runtime.options)];
            let said = lists.into_iter().filter_map(|(key, list)| Some((key.to_owned(), json!(list?))));
            let dns: Map<String, Value> = said.collect();
            if !dns.is_empty() {
                return Ok(Some(dns.into()));
            }
        }
        match self.document.get("dns") {
            None | Some(Value::Null) => Ok(by_ipam.cloned()),
            Some(Value::Object(dns)) if dns.is_empty() => Ok(by_ipam.cloned()),
            Some(dns) if dns.is_object() => Ok(Some(dns.clone())),
            Some(_) => Err(invalid("dns is not an object")),
        }
    }

    fn ipam(&self) -> Result<Option<Ipam>, Failure> {
        let Some(ipam) = section::<Ipam>(&self.document, "/ipam")? else { return Ok(None) };
        // What host-local reads besides means nothing here, and a file of name servers is read where only addresses are asked for.
        let foreign =
            |key: &&String| !(self.role() == Ok(Role::Ipam) && ["dataDir", "resolvConf"].contains(&key.as_str()));
        match ipam.others.iter().find(|(key, _)| foreign(key)) {
            Some((key, value)) => Err(unsupported(&format!("ipam.{}", key.escape_debug()), value, "remove it")),
            None => Ok(Some(ipam)),
        }
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

    fn bandwidth(&self, runtime: Option<Bandwidth>) -> Result<Option<Bandwidth>, Failure> {
        let asked = match runtime {
            Some(bandwidth) => Some(bandwidth),
            None => section(&self.document, "/bandwidth")?,
        };
        let Some(asked) = asked else { return Ok(None) };
        for (direction, rate, burst) in
            [("ingress", asked.ingress_rate, asked.ingress_burst), ("egress", asked.egress_rate, asked.egress_burst)]
        {
            if rate == 0 && burst > 0 {
                return Err(invalid(format!("bandwidth has {direction}Burst {burst} without {direction}Rate")));
            }
        }
        Ok(Some(asked).filter(|asked| asked.ingress_rate > 0 || asked.egress_rate > 0))
    }

    /// The administrator says it, never the runtime or who makes pods.
    fn trusted(&self) -> Result<Vec<String>, Failure> {
        if self.role()? == Role::Ipam {
            return Ok(Vec::new());
        }
        let trusted: Vec<String> = section(&self.document, "/trusted")?.unwrap_or_default();
        match trusted.iter().find(|word| *word != "dhcp") {
            Some(word) => {
                Err(unsupported("trusted", &json!(word), "the pods of a network can be trusted with \"dhcp\""))
            }
            None => Ok(trusted),
        }
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

/// A route as the daemon takes it.
pub fn route(route: &Route) -> Result<AttachedRoute, Failure> {
    let wrong =
        |key: &str, text: &str| invalid(format!("a route's {key} is {}, which is not an address", quoted(text)));
    let network = route.dst.split('/').next().and_then(|address| address.parse::<IpAddr>().ok());
    let network = network.filter(|_| route.dst.contains('/')).ok_or_else(|| {
        invalid(format!("a route's dst is {}, which is not an address with a prefix length", quoted(&route.dst)))
    })?;
    let gateway = match route.gw.as_deref() {
        None | Some("") if network.is_ipv4() => Ipv4Addr::UNSPECIFIED.into(),
        None | Some("") => Ipv6Addr::UNSPECIFIED.into(),
        Some(text) => text.parse().map_err(|_| wrong("gw", text))?,
    };
    let Route { mtu, advmss, priority, table, scope, .. } = *route;
    Ok(AttachedRoute { mtu, advmss, priority, table, scope, ..AttachedRoute::new(route.dst.clone(), gateway) })
}

fn ranges(ipam: Ipam) -> Result<Vec<Vec<Range>>, Failure> {
    let old = ipam.subnet.map(|subnet| {
        vec![Range { subnet, range_start: ipam.range_start, range_end: ipam.range_end, gateway: ipam.gateway }]
    });
    let orphan = old.is_none() && (ipam.range_start.is_some() || ipam.range_end.is_some() || ipam.gateway.is_some());
    if orphan {
        return Err(invalid("ipam has rangeStart, rangeEnd or gateway without subnet"));
    }
    Ok(old.into_iter().chain(ipam.ranges.unwrap_or_default()).collect())
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
    use std::path::PathBuf;

    use weft_api::code;

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
        assert!(config.dns(None).unwrap().is_none());
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
            (json!({ "runtimeConfig": { "portMappings": 7 } }), "runtimeConfig"),
            (json!({ "runtimeConfig": { "bandwidth": { "ingressRate": -1 } } }), "runtimeConfig"),
            (json!({ "runtimeConfig": { "bandwidth": { "egressBurst": 9 } } }), "egressBurst 9 without egressRate"),
            (json!({ "bandwidth": "fast" }), "bandwidth"),
            (json!({ "ipam": { "type": "weft", "routes": [{ "dst": "10.0.0.0" }] } }), "dst"),
            (json!({ "ipam": { "type": "weft", "routes": [{ "dst": "10.0.0.0/8", "gw": "x" }] } }), "gw"),
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
            (json!({ "ipMasq": true }), "ipMasq with the value true"),
            (json!({ "ipam": {} }), "ipam without a type"),
            (json!({ "ipam": "weft" }), "ipam without a type with the value \"weft\""),
            (json!({ "ipam": { "type": "weft", "dataDir": "/tmp" } }), "ipam.dataDir"),
            (json!({ "trusted": ["dhcp", "all"] }), "trusted with the value \"all\""),
        ];
        for (keys, named) in cases {
            let failure = wanted(keys).unwrap_err();
            assert_eq!(failure.code, code::UNSUPPORTED_FIELD, "{failure}");
            assert!(failure.msg.contains(named) && !failure.details.is_empty(), "{failure}");
        }
        let harmless =
            json!({ "ipMasq": false, "runtimeConfig": { "portMappings": [{ "hostPort": 80, "containerPort": 80 }] } });
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
    fn bandwidth_comes_from_the_runtime_then_from_the_configuration() {
        let limits = |keys| wanted(keys).unwrap().bandwidth;
        let (low, high) = (json!({ "ingressRate": 1_000_000 }), json!({ "egressRate": 2_000_000, "egressBurst": 9 }));
        let one = Bandwidth { ingress_rate: 1_000_000, ..Bandwidth::default() };
        let other = Bandwidth { egress_rate: 2_000_000, egress_burst: 9, ..Bandwidth::default() };
        assert_eq!(limits(json!({ "bandwidth": low })), Some(one));
        assert_eq!(limits(json!({ "bandwidth": low, "runtimeConfig": { "bandwidth": high } })), Some(other));
        assert_eq!(limits(json!({ "runtimeConfig": { "bandwidth": {} } })), None);
    }

    #[test]
    fn trust_is_the_administrators_to_give() {
        let trusted = |keys| wanted(keys).unwrap().trusted;
        assert_eq!(trusted(json!({ "trusted": ["dhcp"] })), ["dhcp"]);
        let word = json!({ "trusted": ["dhcp"] });
        for keys in [
            json!({}),
            json!({ "trusted": null }),
            json!({ "runtimeConfig": word }),
            json!({ "args": { "cni": word } }),
        ] {
            assert!(trusted(keys).is_empty());
        }
        assert_eq!(wanted(json!({ "trusted": "dhcp" })).unwrap_err().code, code::CONFIG);
    }

    #[test]
    fn name_servers_come_from_the_runtime_the_configuration_or_the_ipam_plugin() {
        let by_ipam = json!({ "nameservers": ["10.0.0.3"] });
        let dns = |keys| config(keys).unwrap().dns(Some(&by_ipam)).unwrap().unwrap();
        assert_eq!(dns(json!({})), by_ipam);
        assert_eq!(dns(json!({ "dns": {}, "runtimeConfig": { "dns": {} } })), by_ipam);
        let own = json!({ "nameservers": ["10.0.0.2"] });
        assert_eq!(dns(json!({ "dns": own })), own);
        let runtime = json!({ "servers": ["10.0.0.1"], "searches": ["a.b"] });
        let expected = json!({ "nameservers": ["10.0.0.1"], "search": ["a.b"] });
        assert_eq!(dns(json!({ "dns": own, "runtimeConfig": { "dns": runtime } })), expected);
        assert!(config(json!({ "dns": 7 })).unwrap().dns(None).is_err());
    }

    #[test]
    fn where_another_plugin_gives_addresses_what_is_asked_of_it_is_not_ours_to_read() {
        let keys = json!({ "ipam": { "type": "host-local", "subnet": 7 }, "runtimeConfig": { "ips": ["10.0.0.9"] } });
        assert_eq!(wanted(keys).unwrap(), Wanted::default());
    }

    #[test]
    fn routes_are_taken_as_they_are_and_an_empty_list_means_none() {
        let routes = |routes: Value| wanted(json!({ "ipam": { "type": "weft", "routes": routes } })).unwrap().routes;
        assert_eq!(routes(json!(null)), None);
        assert_eq!(routes(json!([])), Some(vec![]));
        let some = routes(json!([{ "dst": "10.0.0.0/8", "priority": 7 }, { "dst": "::/0", "gw": "fd00::1" }])).unwrap();
        let any = Ipv4Addr::UNSPECIFIED.into();
        assert_eq!(some[0], AttachedRoute { priority: Some(7), ..AttachedRoute::new("10.0.0.0/8", any) });
        assert_eq!(some[1], AttachedRoute::new("::/0", "fd00::1".parse().unwrap()));
    }
}
