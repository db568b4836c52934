//! Attaching pods as a container runtime does: by executing the plugin.
//!
//! The configuration goes to the plugin's standard input, the request into its environment, the result comes on its
//! standard output (CNI 1.1.0, sections 2 and 5). What is read of the result is what the lab needs to know.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use serde_json::json;

use super::command::{Run, quote};
use super::net;
use super::record::Pod;

const VERSION: &str = "1.1.0";
const NETWORK: &str = "weft";
/// How long the plugin may take: longer than it waits for a daemon.
const PATIENCE: Duration = Duration::from_secs(60);
const IFNAME: &str = "eth0";

/// A pod to attach.
pub struct Request<'a> {
    /// The lab.
    pub lab: &'a str,
    /// The plugin.
    pub plugin: &'a Path,
    /// The socket of the node's daemon.
    pub socket: &'a Path,
    /// Where the plugin keeps what it must remember while the daemon is away.
    pub state_dir: &'a Path,
    /// The pod's name.
    pub name: &'a str,
    /// The pod's namespace.
    pub netns: &'a str,
}

#[derive(Deserialize)]
struct Outcome {
    interfaces: Vec<Interface>,
    ips: Vec<Ip>,
}

#[derive(Deserialize)]
struct Interface {
    name: String,
    #[serde(default)]
    mac: String,
    #[serde(default)]
    sandbox: String,
}

#[derive(Deserialize)]
struct Ip {
    address: String,
    gateway: Option<IpAddr>,
}

#[derive(Deserialize)]
struct Refusal {
    code: u32,
    msg: String,
    #[serde(default)]
    details: String,
}

/// Attaches a pod.
pub fn add(request: &Request) -> Result<Pod> {
    let what = || format!("cannot attach pod {}", request.name);
    let path = net::path(request.netns);
    let folder = request.plugin.parent().unwrap_or(Path::new("/"));
    let run = Run::new(request.plugin).building(request.lab).within(PATIENCE).input(configuration(request)).only_env([
        ("CNI_COMMAND", "ADD".as_ref()),
        ("CNI_CONTAINERID", request.netns.as_ref()),
        ("CNI_NETNS", path.as_os_str()),
        ("CNI_IFNAME", IFNAME.as_ref()),
        ("CNI_PATH", folder.as_os_str()),
    ]);
    let ended = run.wait().with_context(what)?;
    if !ended.status.success() {
        return Err(refusal(&ended.stdout, &ended.stderr)).with_context(what);
    }
    pod(request, &ended.stdout)
        .with_context(|| format!("weft-cni's result: {}", quote(&ended.stdout)))
        .with_context(what)
}

fn configuration(request: &Request) -> Vec<u8> {
    json!({
        "cniVersion": VERSION,
        "name": NETWORK,
        "type": "weft-cni",
        "socket": request.socket,
        "stateDir": request.state_dir,
    })
    .to_string()
    .into_bytes()
}

fn refusal(stdout: &[u8], stderr: &[u8]) -> anyhow::Error {
    match serde_json::from_slice::<Refusal>(stdout) {
        Ok(refusal) if refusal.details.is_empty() => anyhow!("weft-cni: {} (code {})", refusal.msg, refusal.code),
        Ok(refusal) => anyhow!("weft-cni: {} (code {}): {}", refusal.msg, refusal.code, refusal.details),
        Err(_) => anyhow!("weft-cni failed: {}", quote(&[stdout, stderr].concat())),
    }
}

fn pod(request: &Request, stdout: &[u8]) -> Result<Pod> {
    let outcome: Outcome = serde_json::from_slice(stdout)?;
    let interface = outcome.interfaces.into_iter().find(|interface| !interface.sandbox.is_empty());
    let interface = interface.context("it holds no interface in the pod")?;
    let mut ipv4: Option<(Ipv4Addr, Option<IpAddr>)> = None;
    let mut ipv6: Option<Ipv6Addr> = None;
    for ip in &outcome.ips {
        let bare = ip.address.split('/').next().unwrap_or_default();
        match bare.parse().with_context(|| format!("{:?} is not an address", ip.address))? {
            IpAddr::V4(address) => ipv4 = Some((address, ip.gateway)),
            IpAddr::V6(address) => ipv6 = Some(address),
        }
    }
    let (ipv4, gateway) = ipv4.context("it holds no IPv4 address")?;
    let Some(IpAddr::V4(gateway4)) = gateway else { bail!("it holds no IPv4 gateway") };
    Ok(Pod {
        name: request.name.to_owned(),
        netns: request.netns.to_owned(),
        ifname: interface.name,
        mac: interface.mac,
        ipv4,
        ipv6: ipv6.context("it holds no IPv6 address")?,
        gateway4,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Request<'static> {
        Request {
            lab: "x",
            plugin: Path::new("/opt/cni/bin/weft-cni"),
            socket: Path::new("/run/weft/lab/x/n1.sock"),
            state_dir: Path::new("/run/weft/lab/x/n1"),
            name: "n1-p1",
            netns: "weft-x-n1-p1",
        }
    }

    #[test]
    fn a_result_becomes_a_pod() {
        let result = br#"{"cniVersion":"1.1.0","interfaces":[{"name":"host","mac":"02:00:00:00:00:09"},
            {"name":"eth0","mac":"02:00:00:00:00:01","sandbox":"/run/netns/weft-x-n1-p1","mtu":1450}],
            "ips":[{"address":"10.244.1.2/24","gateway":"10.244.1.1","interface":1},
            {"address":"fd00:10:244:1::2/64","gateway":"fd00:10:244:1::1","interface":1}],"routes":[],"dns":{}}"#;
        let pod = pod(&request(), result).unwrap();
        assert_eq!((pod.ifname.as_str(), pod.mac.as_str()), ("eth0", "02:00:00:00:00:01"));
        assert_eq!(pod.ipv4.to_string(), "10.244.1.2");
        assert_eq!(pod.ipv6.to_string(), "fd00:10:244:1::2");
        assert_eq!(pod.gateway4.to_string(), "10.244.1.1");
    }

    #[test]
    fn a_result_that_lacks_something_says_what() {
        let lacking = |json: &str| format!("{:#}", pod(&request(), json.as_bytes()).unwrap_err());
        assert!(lacking(r#"{"interfaces":[],"ips":[]}"#).contains("no interface"));
        let ips = |ips: &str| format!(r#"{{"interfaces":[{{"name":"eth0","sandbox":"x"}}],"ips":[{ips}]}}"#);
        assert!(lacking(&ips("")).contains("no IPv4 address"));
        assert!(lacking(&ips(r#"{"address":"10.0.0.1/24"}"#)).contains("no IPv4 gateway"));
        assert!(lacking(&ips(r#"{"address":"10.0.0.1/24","gateway":"10.0.0.2"}"#)).contains("no IPv6 address"));
        assert!(lacking(&ips(r#"{"address":"x"}"#)).contains("not an address"));
        assert!(!lacking("not json").is_empty());
    }

    #[test]
    fn a_refusal_is_told_with_its_code() {
        let error = refusal(br#"{"code":11,"msg":"weftd is not there","details":"start it"}"#, b"").to_string();
        assert_eq!(error, "weft-cni: weftd is not there (code 11): start it");
        assert!(refusal(b"", b"Segmentation fault").to_string().contains("Segmentation fault"));
    }

    #[test]
    fn the_configuration_names_the_nodes_daemon() {
        let value: serde_json::Value = serde_json::from_slice(&configuration(&request())).unwrap();
        assert_eq!(value["socket"], "/run/weft/lab/x/n1.sock");
        assert_eq!(value["type"], "weft-cni");
    }
}
