//! A container runtime: it executes `weft-cni` and reads what it says.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::command::{PATIENCE, Said, run_with};
use crate::machine::binary;
use crate::netns::Netns;

/// A runtime of one node.
#[derive(Clone, Debug)]
pub struct Runtime {
    /// weftd's socket.
    pub socket: PathBuf,
    /// Where the plugin leaves tombstones.
    pub state_dir: PathBuf,
    /// The name of the network.
    pub network: String,
    /// The CNI version it speaks.
    pub version: String,
}

/// What the plugin said.
#[derive(Debug)]
pub struct Answer {
    /// Whether its exit code was 0.
    pub success: bool,
    /// Its standard output; null if there was none.
    pub json: Value,
}

impl Answer {
    /// What a plugin that has ended said.
    #[track_caller]
    pub fn of(said: &Said) -> Answer {
        let parsed = || serde_json::from_str(&said.out);
        let json = if said.out.trim().is_empty() { Ok(Value::Null) } else { parsed() };
        let json = json.unwrap_or_else(|error| panic!("{error} in the plugin's output: {}", said.out));
        Answer { success: said.success, json }
    }

    /// The result; fails unless it succeeded.
    #[track_caller]
    pub fn must(self) -> Value {
        assert!(self.success, "weft-cni failed: {}", self.json);
        self.json
    }

    /// Fails unless it failed with this code.
    #[track_caller]
    pub fn refused(self, code: u64) -> String {
        assert!(!self.success && self.json["code"] == code, "expected error {code}, got {}", self.json);
        self.json["msg"].as_str().unwrap_or_default().to_owned()
    }
}

impl Runtime {
    /// A runtime that speaks CNI 1.1.0 about network `pods`.
    pub fn new(socket: &Path, state_dir: &Path) -> Runtime {
        let (network, version) = ("pods".to_owned(), "1.1.0".to_owned());
        Runtime { socket: socket.to_owned(), state_dir: state_dir.to_owned(), network, version }
    }

    /// The network's configuration with further keys.
    pub fn config(&self, keys: &Value) -> Value {
        let mut config = json!({
            "cniVersion": self.version, "name": self.network, "type": "weft-cni",
            "socket": self.socket, "stateDir": self.state_dir,
        });
        if let (Some(config), Some(keys)) = (config.as_object_mut(), keys.as_object()) {
            config.extend(keys.clone());
        }
        config
    }

    /// Calls the plugin.
    #[track_caller]
    pub fn call(&self, command: &str, container: &str, netns: Option<&Path>, keys: &Value) -> Answer {
        self.call_with(command, container, netns, &self.config(keys).to_string())
    }

    /// Calls the plugin with anything on its standard input.
    #[track_caller]
    pub fn call_with(&self, command: &str, container: &str, netns: Option<&Path>, input: &str) -> Answer {
        let mut plugin = Command::new(binary("weft-cni"));
        plugin.env_clear().env("CNI_COMMAND", command).env("CNI_PATH", "/opt/cni/bin");
        if !container.is_empty() {
            plugin.env("CNI_CONTAINERID", container).env("CNI_IFNAME", "eth0");
        }
        if let Some(netns) = netns {
            plugin.env("CNI_NETNS", netns);
        }
        Answer::of(&run_with(plugin, input.as_bytes(), PATIENCE))
    }

    /// ADD, which must succeed.
    #[track_caller]
    pub fn add(&self, container: &str, netns: &Netns) -> Value {
        self.call("ADD", container, Some(&netns.path()), &Value::Null).must()
    }

    /// DEL, which must succeed.
    #[track_caller]
    pub fn del(&self, container: &str, netns: &Netns) {
        self.call("DEL", container, Some(&netns.path()), &Value::Null).must();
    }

    /// CHECK against an ADD's result.
    #[track_caller]
    pub fn check(&self, container: &str, netns: &Netns, result: &Value) -> Answer {
        self.call("CHECK", container, Some(&netns.path()), &json!({ "prevResult": result }))
    }
}

/// The addresses of an ADD's result, without prefix lengths.
#[track_caller]
pub fn addresses(result: &Value) -> Vec<std::net::IpAddr> {
    let ips = result["ips"].as_array().unwrap_or_else(|| panic!("no ips in {result}"));
    let address = |ip: &Value| ip["address"].as_str()?.split('/').next()?.parse().ok();
    ips.iter().map(|ip| address(ip).unwrap_or_else(|| panic!("no address in {ip}"))).collect()
}

/// The MAC of the pod's interface in an ADD's result.
#[track_caller]
pub fn mac(result: &Value) -> String {
    let interfaces = result["interfaces"].as_array().unwrap_or_else(|| panic!("no interfaces in {result}"));
    let inside = interfaces.iter().find(|interface| interface["sandbox"].as_str().is_some_and(|path| !path.is_empty()));
    inside.unwrap_or(&interfaces[0])["mac"].as_str().expect("it has a MAC").to_owned()
}
