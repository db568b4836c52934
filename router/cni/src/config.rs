//! The network configuration: what the administrator wrote and what the runtime added to it.
//!
//! Keys of our own, all optional: `socket` (weftd's, [`weft_api::SOCKET`]), `stateDir` (where DEL and GC leave
//! tombstones, [`STATE_DIR`]), `wait` (seconds to wait for a weftd that is being restarted; by default each
//! command's own). What an ADD asks for is in [`crate::wanted`].
//!
//! A section is read by the commands that need it and by no other: a DEL must not fail because the addresses that
//! an ADD would ask for are misspelt.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use weft_api::{Failure, code};

use crate::environment;
use crate::input::quoted;

/// Where tombstones go unless the configuration says otherwise.
pub const STATE_DIR: &str = "/var/lib/weft";

/// What this plugin is called in configurations.
const NAME: &str = "weft-cni";

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
    pub document: Value,
}

/// As what the plugin is asked, and who gives addresses.
#[derive(Debug, PartialEq, Eq)]
pub enum Role {
    /// It makes the interface; addresses are weftd's.
    Network,
    /// It makes the interface, for which the IPAM plugin of this name gives addresses.
    Delegating(String),
    /// Another plugin makes the interface and wants addresses for it.
    Ipam,
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

    /// As what this configuration asks for us.
    pub fn role(&self) -> Result<Role, Failure> {
        let ipam = match self.document.get("ipam") {
            None | Some(Value::Null) => return Ok(Role::Network),
            Some(ipam) => ipam,
        };
        let (kind, plugin) = (ipam["type"].as_str(), self.document["type"].as_str());
        match kind {
            Some(NAME) if plugin.is_some_and(|plugin| plugin != NAME) => Ok(Role::Ipam),
            Some("weft" | NAME) => Ok(Role::Network),
            Some(other) if is_plugin(other) => Ok(Role::Delegating(other.to_owned())),
            Some(other) => Err(invalid(format!("ipam.type is {}, which is not a plugin's name", quoted(other)))),
            None => Err(unsupported(
                "ipam without a type",
                ipam,
                "name the plugin that gives addresses in ipam.type, or remove ipam: weftd gives the node's addresses",
            )),
        }
    }

    /// The result of the plugin before, or of the ADD that a CHECK is about.
    pub fn previous_result(&self) -> Result<Option<&Map<String, Value>>, Failure> {
        match self.document.get("prevResult") {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(result)) => Ok(Some(result)),
            Some(_) => Err(invalid("prevResult is not an object")),
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
}

/// A failure of the configuration.
pub fn invalid(what: impl Into<String>) -> Failure {
    Failure::new(code::CONFIG, what)
}

/// A field whose meaning cannot be had here.
///
/// "The error message must contain the key and value of the unsupported field" (section 5, error).
pub fn unsupported(key: &str, value: &Value, remedy: &str) -> Failure {
    let what = format!("{key} with the value {} is not supported by weft-cni", bounded(&value.to_string()));
    Failure::new(code::UNSUPPORTED_FIELD, what).with_details(remedy)
}

/// The value at `pointer`, if it is there and not null.
pub fn section<T: DeserializeOwned>(document: &Value, pointer: &str) -> Result<Option<T>, Failure> {
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

/// Whether `text` can be the name of a plugin: a file's name, and nothing that leads elsewhere.
fn is_plugin(text: &str) -> bool {
    let plain = |next: char| next.is_ascii_alphanumeric() || "_.-+".contains(next);
    !text.is_empty() && text.len() <= 255 && !text.starts_with('.') && text.chars().all(plain)
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

    #[test]
    fn the_role_depends_on_who_is_asked_for_addresses() {
        let role = |plugin: &str, ipam: Value| config(json!({ "type": plugin, "ipam": ipam })).unwrap().role();
        for ours in [json!(null), json!({ "type": "weft" }), json!({ "type": "weft-cni" })] {
            assert_eq!(role("weft-cni", ours).unwrap(), Role::Network);
        }
        assert_eq!(role("weft-cni", json!({ "type": "host-local" })).unwrap(), Role::Delegating("host-local".into()));
        assert_eq!(role("bridge", json!({ "type": "weft-cni" })).unwrap(), Role::Ipam);
        for bad in ["../../bin/sh", "a/b", "", ".", "..", "a b", "a\0"] {
            assert_eq!(role("weft-cni", json!({ "type": bad })).unwrap_err().code, code::CONFIG, "{bad}");
        }
        for bad in [json!({}), json!("weft"), json!([]), json!({ "type": 7 })] {
            let failure = role("weft-cni", bad.clone()).unwrap_err();
            assert!(failure.code == code::UNSUPPORTED_FIELD && failure.msg.contains(&bad.to_string()), "{failure}");
        }
    }
}
