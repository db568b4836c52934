//! What goes to standard output, and its way back in: results, `prevResult`, errors.
//!
//! In a chain, weft-cni makes an interface beside those that plugins before it made: its interface, addresses and
//! routes are appended to theirs, and what is not ours passes through untouched, also keys that are not known here.
//! The versions differ little: before 1.0.0 each address says its family, from 1.1.0 on each interface its MTU.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde_json::{Map, Value, json};
use weft_api::{Attached, AttachedAddress, AttachedRoute, Failure, code};

use crate::config::{Config, invalid};
use crate::input::quoted;
use crate::version::Version;

/// The result of an ADD. `dns` is what an IPAM plugin said of name servers.
pub fn added(
    version: Version,
    config: &Config,
    netns: &str,
    attached: &Attached,
    dns: Option<&Value>,
) -> Result<Value, Failure> {
    let mut result = config.previous_result()?.cloned().unwrap_or_default();
    result.insert("cniVersion".to_owned(), version.as_str().into());

    let interfaces = list(&mut result, "interfaces")?;
    let index = interfaces.len();
    let mut interface = json!({ "name": attached.ifname, "mac": attached.mac, "sandbox": netns });
    if version.interfaces_say_their_mtu() {
        interface["mtu"] = attached.mtu.into();
    }
    interfaces.push(interface);

    let ips = list(&mut result, "ips")?;
    ips.extend(attached.addresses.iter().map(|address| ip(address, Some(index))));
    let routes = list(&mut result, "routes")?;
    routes.extend(attached.routes.iter().map(|made| route(version, made)));
    finish(version, config, result, dns)
}

/// The result of an ADD that gave addresses to another plugin: abbreviated, for what it means for interfaces is that plugin's to say.
pub fn leased(version: Version, config: &Config, leased: &Attached, dns: Option<&Value>) -> Result<Value, Failure> {
    let mut result = Map::new();
    result.insert("cniVersion".to_owned(), version.as_str().into());
    result.insert("ips".to_owned(), leased.addresses.iter().map(|address| ip(address, None)).collect());
    result.insert("routes".to_owned(), leased.routes.iter().map(|asked| route(version, asked)).collect());
    finish(version, config, result, dns)
}

fn finish(
    version: Version,
    config: &Config,
    mut result: Map<String, Value>,
    dns: Option<&Value>,
) -> Result<Value, Failure> {
    let entry = result.entry("dns").or_insert_with(|| json!({}));
    if let Some(said) = config.dns(dns)? {
        *entry = said;
    }
    let mut result = Value::Object(result);
    convert(&mut result, version);
    Ok(result)
}

/// Writes what plugins before us made as `version` has it.
pub fn convert(result: &mut Value, version: Version) {
    let ips = result.get_mut("ips").and_then(Value::as_array_mut).into_iter().flatten();
    ips.filter_map(Value::as_object_mut).for_each(|ip| say_family(version, ip));
}

/// The same for the result that a configuration of `version` holds.
pub fn convert_previous(document: &mut Value, version: Version) {
    if let Some(previous) = document.get_mut("prevResult").filter(|previous| previous.is_object()) {
        previous["cniVersion"] = version.as_str().into();
        convert(previous, version);
    }
}

fn ip(address: &AttachedAddress, interface: Option<usize>) -> Value {
    let mut ip = json!({ "address": address.address });
    if let Some(index) = interface {
        ip["interface"] = index.into();
    }
    if !address.gateway.is_unspecified() {
        ip["gateway"] = address.gateway.to_string().into();
    }
    ip
}

fn route(version: Version, made: &AttachedRoute) -> Value {
    let mut route = json!({ "dst": made.destination });
    if !made.gateway.is_unspecified() {
        route["gw"] = made.gateway.to_string().into();
    }
    if version.routes_say_their_metrics() {
        let numbers = [("mtu", made.mtu), ("advmss", made.advmss), ("priority", made.priority), ("table", made.table)];
        let numbers = numbers.into_iter().chain([("scope", made.scope.map(u32::from))]);
        for (key, number) in numbers.filter_map(|(key, number)| Some((key, number?))) {
            route[key] = number.into();
        }
    }
    route
}

/// What `previous`, the result of the ADD, says about the interface `ifname` in the pod.
pub fn expected(previous: &Map<String, Value>, ifname: &str) -> Result<Attached, Failure> {
    let lacks = || {
        let what = format!("prevResult has no interface {} in a sandbox", quoted(ifname));
        Failure::new(code::CHECK, what)
            .with_details("the runtime's record is not of this attachment: DEL and ADD it again")
    };
    let items = |key: &str| previous.get(key).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let text = |value: &Value, key: &str| value[key].as_str().unwrap_or_default().to_owned();

    let in_pod = |interface: &&Value| interface["name"] == ifname && !text(interface, "sandbox").is_empty();
    let interface = items("interfaces").iter().find(in_pod).ok_or_else(lacks)?;
    let index = items("interfaces").iter().position(|other| std::ptr::eq(other, interface)).ok_or_else(lacks)?;

    let mut addresses = Vec::new();
    for ip in items("ips").iter().filter(|ip| ip["interface"].as_u64() == Some(index as u64)) {
        addresses.push(expected_address(ip)?);
    }
    let route = |route: &Value| {
        let destination = text(route, "dst");
        let gateway = match route["gw"].as_str() {
            None | Some("") => unspecified(destination.contains(':')),
            Some(gateway) => gateway.parse().ok()?,
        };
        Some(AttachedRoute::new(destination, gateway))
    };
    Ok(Attached {
        ifname: ifname.to_owned(),
        mac: text(interface, "mac").to_ascii_lowercase(),
        mtu: interface["mtu"].as_u64().and_then(|mtu| u32::try_from(mtu).ok()).unwrap_or(0),
        addresses,
        routes: items("routes").iter().filter_map(route).collect(),
        trusted: Vec::new(),
    })
}

/// An error object.
pub fn error(version: Version, failure: &Failure) -> Value {
    let mut error = json!({ "cniVersion": version.as_str(), "code": failure.code, "msg": failure.msg });
    if !failure.details.is_empty() {
        error["details"] = failure.details.as_str().into();
    }
    error
}

fn list<'a>(result: &'a mut Map<String, Value>, key: &str) -> Result<&'a mut Vec<Value>, Failure> {
    let value = result.entry(key).or_insert(Value::Null);
    if value.is_null() {
        *value = Value::Array(Vec::new());
    }
    value.as_array_mut().ok_or_else(|| invalid(format!("prevResult.{key} is not a list")))
}

fn say_family(version: Version, ip: &mut Map<String, Value>) {
    if !version.addresses_say_their_family() {
        ip.remove("version");
    } else if let Some(address) = ip.get("address").and_then(Value::as_str) {
        let family = if address.contains(':') { "6" } else { "4" };
        ip.insert("version".to_owned(), family.into());
    }
}

/// The addresses of a result that names no interfaces.
pub fn expected_leases(previous: &Map<String, Value>) -> Result<Attached, Failure> {
    let ips = previous.get("ips").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let addresses = ips.iter().map(expected_address).collect::<Result<Vec<_>, _>>()?;
    Ok(Attached {
        ifname: String::new(),
        mac: String::new(),
        mtu: 0,
        addresses,
        routes: Vec::new(),
        trusted: Vec::new(),
    })
}

fn unspecified(is_v6: bool) -> IpAddr {
    if is_v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() }
}

/// One of a result's `ips`.
pub fn expected_address(ip: &Value) -> Result<AttachedAddress, Failure> {
    let wrong = |what: &str| invalid(format!("prevResult.ips: {what} is not an address"));
    let address = ip["address"].as_str().ok_or_else(|| wrong("what has no address"))?;
    let gateway: IpAddr = match &ip["gateway"] {
        Value::String(text) if !text.is_empty() => text.parse().map_err(|_| wrong(&quoted(text)))?,
        _ => unspecified(address.contains(':')),
    };
    Ok(AttachedAddress { address: address.to_owned(), gateway })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attached() -> Attached {
        Attached {
            ifname: "eth0".into(),
            mac: "02:00:00:00:00:01".into(),
            mtu: 1450,
            addresses: vec![
                AttachedAddress { address: "10.1.0.2/24".into(), gateway: "10.1.0.1".parse().unwrap() },
                AttachedAddress { address: "fd00::2/64".into(), gateway: "fd00::1".parse().unwrap() },
            ],
            routes: vec![AttachedRoute::new("0.0.0.0/0", "10.1.0.1".parse().unwrap())],
            trusted: Vec::new(),
        }
    }

    fn config(keys: Value) -> Config {
        let mut document = json!({ "name": "pods" });
        document.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        Config::parse(document).unwrap()
    }

    #[test]
    fn each_version_has_its_shape() {
        for version in Version::ALL {
            let old = version < Version::V1_0_0;
            let mut expected = json!({
                "cniVersion": version.as_str(),
                "interfaces": [{ "name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/run/netns/x" }],
                "ips": [
                    { "interface": 0, "address": "10.1.0.2/24", "gateway": "10.1.0.1" },
                    { "interface": 0, "address": "fd00::2/64", "gateway": "fd00::1" }
                ],
                "routes": [{ "dst": "0.0.0.0/0", "gw": "10.1.0.1" }],
                "dns": { "nameservers": ["10.1.0.10"] }
            });
            if old {
                expected["ips"][0]["version"] = "4".into();
                expected["ips"][1]["version"] = "6".into();
            }
            if version == Version::V1_1_0 {
                expected["interfaces"][0]["mtu"] = 1450.into();
            }
            let config = config(json!({ "dns": { "nameservers": ["10.1.0.10"] } }));
            assert_eq!(added(version, &config, "/run/netns/x", &attached(), None).unwrap(), expected);
        }
    }

    #[test]
    fn a_result_before_ours_passes_through_and_ours_is_appended() {
        let previous = json!({
            "cniVersion": "1.0.0",
            "interfaces": [{ "name": "br0" }, { "name": "net0", "sandbox": "/run/netns/x", "pciID": "0000:00:01.0" }],
            "ips": [{ "interface": 1, "address": "192.0.2.5/24" }],
            "routes": null,
            "dns": { "search": ["example"] },
            "other": { "kept": true }
        });
        let config = config(json!({ "prevResult": previous }));
        let result = added(Version::V0_4_0, &config, "/run/netns/x", &attached(), None).unwrap();
        assert_eq!(result["cniVersion"], "0.4.0");
        assert_eq!(result["interfaces"][1], previous["interfaces"][1]);
        assert_eq!(result["interfaces"][2]["name"], "eth0");
        assert_eq!(result["ips"][0], json!({ "interface": 1, "address": "192.0.2.5/24", "version": "4" }));
        assert_eq!(result["ips"][1]["interface"], 2);
        assert_eq!(result["ips"][2]["interface"], 2);
        assert_eq!(result["routes"].as_array().unwrap().len(), 1);
        assert_eq!(result["dns"], previous["dns"]);
        assert_eq!(result["other"], previous["other"]);
    }

    #[test]
    fn a_result_is_what_a_check_then_expects() {
        for version in Version::ALL {
            let previous = json!({ "interfaces": [{ "name": "eth0" }, { "name": "net0", "sandbox": "/run/netns/x" }],
                "ips": [{ "interface": 1, "address": "192.0.2.5/24" }] });
            let result =
                added(version, &config(json!({ "prevResult": previous })), "/run/netns/x", &attached(), None).unwrap();
            let mtu = if version == Version::V1_1_0 { 1450 } else { 0 };
            let expected = expected(result.as_object().unwrap(), "eth0").unwrap();
            assert_eq!(expected, Attached { mtu, ..attached() });
        }
    }

    #[test]
    fn a_previous_result_of_any_shape_is_an_error_or_read_but_never_a_panic() {
        let odd = [json!(null), json!(7), json!("x"), json!([]), json!([null, 7, "x", [], {}]), json!({})];
        for key in ["interfaces", "ips", "routes", "dns"] {
            for value in &odd {
                let mut previous = json!({ "interfaces": [{ "name": "eth0", "sandbox": "/x" }] });
                previous[key] = value.clone();
                let _ = expected(previous.as_object().unwrap(), "eth0");
                let _ = added(Version::V0_3_1, &config(json!({ "prevResult": previous })), "/x", &attached(), None);
            }
        }
        assert_eq!(expected(&Map::new(), "eth0").unwrap_err().code, code::CHECK);
        let elsewhere = json!({ "interfaces": [{ "name": "eth0" }, { "name": "eth1", "sandbox": "/x" }] });
        assert_eq!(expected(elsewhere.as_object().unwrap(), "eth0").unwrap_err().code, code::CHECK);
        let garbled = json!({ "interfaces": [{ "name": "eth0", "sandbox": "/x" }],
            "ips": [{ "interface": 0, "address": "10.0.0.1/8", "gateway": "x" }] });
        assert_eq!(expected(garbled.as_object().unwrap(), "eth0").unwrap_err().code, code::CONFIG);
    }

    #[test]
    fn an_error_names_code_and_cause_and_leaves_empty_details_out() {
        let failure = Failure::new(7, "no name");
        assert_eq!(error(Version::V0_4_0, &failure), json!({ "cniVersion": "0.4.0", "code": 7, "msg": "no name" }));
        assert_eq!(error(Version::V1_1_0, &failure.with_details("set it"))["details"], "set it");
    }
}
