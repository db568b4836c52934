//! What libcni does with a list of plugins: the runtime's side of chaining.
//!
//! A list is one network. ADD runs its plugins in order, each with the result of the one before; CHECK in the same order and DEL in the
//! reverse one, each with the result of the last ADD. What the runtime knows of a pod goes to those plugins that have the capability.
//! Plugins are executed in the network namespace of a node, for some of them work there.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::command::{PATIENCE, run_with};
use crate::machine::{binaries, binary};
use crate::netns::Netns;
use crate::plugin::Answer;

/// Where Debian keeps the reference plugins.
pub const REFERENCE: &str = "/usr/lib/cni";

/// A list of plugins.
#[derive(Clone, Debug)]
pub struct Network {
    /// Where plugins are executed.
    pub node: Netns,
    /// Its name.
    pub name: String,
    /// The CNI version that the list is of.
    pub version: String,
    /// The plugins' own keys.
    pub plugins: Vec<Value>,
    /// Where plugins look for others, if not where they are.
    pub path: Option<String>,
}

/// What the runtime attaches to a network.
#[derive(Clone, Debug)]
pub struct Attachment {
    /// The container's id; absent if empty.
    pub container: String,
    /// The interface's name; absent if empty.
    pub ifname: String,
    /// The namespace; absent if there is none.
    pub netns: Option<PathBuf>,
    /// `CNI_ARGS`.
    pub arguments: String,
    /// What the runtime knows, by capability.
    pub capabilities: Map<String, Value>,
}

impl Attachment {
    /// `eth0` of a container.
    pub fn new(container: &str, netns: &Netns) -> Attachment {
        let (container, ifname) = (container.to_owned(), "eth0".to_owned());
        let (netns, arguments) = (Some(netns.path()), "IgnoreUnknown=1".to_owned());
        Attachment { container, ifname, netns, arguments, capabilities: Map::new() }
    }

    /// The same with what the runtime knows.
    pub fn with(mut self, capability: &str, value: Value) -> Attachment {
        self.capabilities.insert(capability.to_owned(), value);
        self
    }

    /// The same for another interface.
    pub fn by(mut self, ifname: &str) -> Attachment {
        ifname.clone_into(&mut self.ifname);
        self
    }
}

impl Network {
    /// A list of version 1.0.0.
    #[track_caller]
    pub fn new(node: &Netns, name: &str, plugins: Vec<Value>) -> Network {
        assert!(Path::new(REFERENCE).join("host-local").is_file(), "apt-get install containernetworking-plugins");
        Network { node: node.clone(), name: name.to_owned(), version: "1.0.0".to_owned(), plugins, path: None }
    }

    /// Runs the list. As soon as one plugin fails, its answer is the outcome.
    #[track_caller]
    pub fn add(&self, attachment: &Attachment) -> Answer {
        let mut result = Value::Null;
        for plugin in &self.plugins {
            let answer = self.execute("ADD", plugin, attachment, &json!({ "prevResult": result }));
            if !answer.success {
                return answer;
            }
            result = answer.json;
        }
        Answer { success: true, json: result }
    }

    /// Runs the list backwards.
    #[track_caller]
    pub fn del(&self, attachment: &Attachment, result: &Value) -> Answer {
        self.each("DEL", self.plugins.iter().rev(), attachment, &json!({ "prevResult": result }))
    }

    /// Checks it with the result of the ADD.
    #[track_caller]
    pub fn check(&self, attachment: &Attachment, result: &Value) -> Answer {
        self.each("CHECK", self.plugins.iter(), attachment, &json!({ "prevResult": result }))
    }

    /// Calls a command of the whole network: GC, STATUS.
    #[track_caller]
    pub fn call(&self, command: &str, keys: &Value) -> Answer {
        let (container, ifname, arguments) = (String::new(), String::new(), String::new());
        let nobody = Attachment { container, ifname, netns: None, arguments, capabilities: Map::new() };
        self.each(command, self.plugins.iter(), &nobody, keys)
    }

    #[track_caller]
    fn each<'p>(
        &self,
        command: &str,
        plugins: impl Iterator<Item = &'p Value>,
        attachment: &Attachment,
        keys: &Value,
    ) -> Answer {
        for plugin in plugins {
            let answer = self.execute(command, plugin, attachment, keys);
            if !answer.success {
                return answer;
            }
        }
        Answer { success: true, json: Value::Null }
    }

    /// Starts the first plugin's ADD, and kills the plugin after a while, if it still runs.
    pub fn add_and_kill(&self, attachment: &Attachment, after: Duration) {
        let (mut call, config) = self.prepare("ADD", &self.plugins[0], attachment, &Value::Null);
        call.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut plugin = call.spawn().expect("the plugin can be started");
        let _ = plugin.stdin.take().expect("it is piped").write_all(config.as_bytes());
        std::thread::sleep(after);
        let _ = plugin.kill();
        plugin.wait().expect("it was started here");
    }

    #[track_caller]
    fn execute(&self, command: &str, plugin: &Value, attachment: &Attachment, keys: &Value) -> Answer {
        let (call, config) = self.prepare(command, plugin, attachment, keys);
        Answer::of(&run_with(call, config.as_bytes(), PATIENCE))
    }

    fn prepare(&self, command: &str, plugin: &Value, attachment: &Attachment, keys: &Value) -> (Command, String) {
        let mut config = plugin.clone();
        config["cniVersion"] = self.version.clone().into();
        config["name"] = self.name.clone().into();
        for (key, value) in keys.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
            config[key] = value.clone();
        }
        let has = |capability: &str| plugin["capabilities"][capability] == true;
        let known = attachment.capabilities.iter().filter(|(capability, _)| has(capability));
        let known: Map<String, Value> = known.map(|(key, value)| (key.clone(), value.clone())).collect();
        if !known.is_empty() {
            config["runtimeConfig"] = known.into();
        }
        let kind = plugin["type"].as_str().expect("a plugin has a type");
        let program = if kind == "weft-cni" { binary(kind) } else { Path::new(REFERENCE).join(kind) };
        let mut call = Command::new("ip");
        call.args(["netns", "exec", &self.node.0]).arg(program).env_clear();
        let path = self.path.clone().unwrap_or_else(|| format!("{}:{REFERENCE}", binaries().display()));
        call.env("CNI_COMMAND", command).env("CNI_PATH", path);
        call.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        let texts = [
            ("CNI_CONTAINERID", &attachment.container),
            ("CNI_IFNAME", &attachment.ifname),
            ("CNI_ARGS", &attachment.arguments),
        ];
        call.envs(texts.into_iter().filter(|(_, text)| !text.is_empty()));
        call.envs(attachment.netns.as_ref().map(|netns| ("CNI_NETNS", netns)));
        (call, config.to_string())
    }
}
