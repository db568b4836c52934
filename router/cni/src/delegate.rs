//! IPAM plugins that this one executes.
//!
//! The specification (section 4): a delegated plugin is looked for in the folders of `CNI_PATH`, is given our environment and
//! our configuration, writes its errors to our standard error, and is executed for every command that we are executed for.
//! What it says when it fails is passed on to our caller.
//!
//! A plugin of an older release refuses a configuration of a newer version. Then it is asked for the versions that it
//! has, and asked again in the newest one that both sides speak: what it answers means the same in all of them.
//!
//! A plugin that hangs, or says without end, is ended: the runtime must not wait for it for ever.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use weft_api::{AttachedAddress, AttachedRoute, AttachmentKey, Failure, code};

use crate::config::invalid;
use crate::environment;
use crate::input::quoted;
use crate::outcome;
use crate::version::Version;
use crate::wanted;

/// How long a plugin may take. One that asks a DHCP server repeats itself for a minute.
const PATIENCE: Duration = Duration::from_secs(90);

/// The longest answer, in bytes.
const MAX_OUTPUT: u64 = 1024 * 1024;

/// An IPAM plugin.
#[derive(Debug)]
pub struct Delegate {
    name: String,
    path: PathBuf,
    /// Another attachment than the environment's.
    whose: Option<AttachmentKey>,
}

/// What it gave.
#[derive(Debug)]
pub struct Given {
    pub addresses: Vec<AttachedAddress>,
    /// `None` if it said nothing of routes.
    pub routes: Option<Vec<AttachedRoute>>,
    pub dns: Option<Value>,
}

impl Delegate {
    /// The plugin of this name, which must be a plain one.
    pub fn find(name: &str) -> Result<Delegate, Failure> {
        let folders = environment::required("CNI_PATH")?;
        let executable = |path: &PathBuf| {
            path.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
        };
        let candidates = folders.split(':').filter(|folder| !folder.is_empty());
        let found = candidates.map(|folder| PathBuf::from(folder).join(name)).find(executable);
        let path = found.ok_or_else(|| {
            let folders: String = folders.chars().take(200).collect();
            invalid(format!("the IPAM plugin {} is in none of the folders of CNI_PATH ({folders})", quoted(name)))
                .with_details(
                    "install it (on Debian: apt-get install containernetworking-plugins), or change ipam.type",
                )
        })?;
        Ok(Delegate { name: name.to_owned(), path, whose: None })
    }

    /// Whether the plugin of this name works by the interface that the addresses are for: then it comes after that is made, and before
    /// it goes.
    pub fn is_by_the_interface(name: &str) -> bool {
        name == "dhcp"
    }

    /// Has it give addresses. If it fails, what it may have taken is freed.
    pub fn add(&self, document: &Value) -> Result<Given, Failure> {
        let given = self.run("ADD", document).and_then(|result| self.given(&result));
        if given.is_err() {
            self.undo(document);
        }
        given
    }

    /// Frees what an ADD gave that came to nothing after all.
    pub fn undo(&self, document: &Value) {
        if let Err(failure) = self.run("DEL", document) {
            eprintln!(
                "weft-cni: what {} gave could not be freed, which is left to the runtime's DEL: {failure}",
                self.name
            );
        }
    }

    /// The same, to be asked about another attachment, of whose namespace nothing is known.
    pub fn of(&self, whose: AttachmentKey) -> Delegate {
        Delegate { name: self.name.clone(), path: self.path.clone(), whose: Some(whose) }
    }

    /// Executes it for a command, in the version of `document`, or in the newest that it has and that has the command.
    pub fn run(&self, command: &str, document: &Value) -> Result<Value, Failure> {
        let since = if command == "CHECK" { Version::V0_4_0 } else { Version::V0_3_0 };
        match self.execute(command, document) {
            Err(failure) if failure.code == code::VERSION => match self.common_version(document, since) {
                Some(version) => {
                    let mut older = document.clone();
                    older["cniVersion"] = version.as_str().into();
                    outcome::convert_previous(&mut older, version);
                    self.execute(command, &older)
                }
                None => Err(failure),
            },
            outcome => outcome,
        }
    }

    /// Whether it knows a command that came with `since`.
    pub fn knows(&self, document: &Value, since: Version) -> bool {
        self.versions(document).is_some_and(|versions| versions.iter().any(|version| *version >= since))
    }

    fn common_version(&self, document: &Value, since: Version) -> Option<Version> {
        let asked = Version::of(document).ok()?;
        self.versions(document)?.into_iter().filter(|version| (since..asked).contains(version)).max()
    }

    /// The versions that both sides speak.
    fn versions(&self, document: &Value) -> Option<Vec<Version>> {
        let said = self.execute("VERSION", &json!({ "cniVersion": document["cniVersion"] })).ok()?;
        let supported = said["supportedVersions"].as_array()?;
        Some(Version::ALL.into_iter().filter(|ours| supported.iter().any(|theirs| theirs == ours.as_str())).collect())
    }

    fn given(&self, result: &Value) -> Result<Given, Failure> {
        let wrong = |what: &str| self.failed(format!("its result {what}"));
        let ips = result["ips"].as_array().filter(|ips| !ips.is_empty()).ok_or_else(|| wrong("has no ips"))?;
        let addresses = ips.iter().map(outcome::expected_address).collect::<Result<Vec<_>, _>>();
        let addresses = addresses.map_err(|failure| wrong(&failure.msg))?;
        let routes: Option<Vec<wanted::Route>> =
            serde_json::from_value(result["routes"].clone()).map_err(|error| wrong(&error.to_string()))?;
        let routes = routes.filter(|routes| !routes.is_empty());
        let routes = routes.map(|routes| routes.iter().map(wanted::route).collect()).transpose()?;
        let dns = Some(&result["dns"]).filter(|dns| dns.as_object().is_some_and(|dns| !dns.is_empty())).cloned();
        Ok(Given { addresses, routes, dns })
    }

    fn failed(&self, what: impl std::fmt::Display) -> Failure {
        Failure::new(code::DELEGATE, format!("the IPAM plugin {}: {what}", self.name))
    }

    fn execute(&self, command: &str, document: &Value) -> Result<Value, Failure> {
        let failed = |what: &str| self.failed(format!("{} {what}", self.path.display()));
        let mut plugin = Command::new(&self.path);
        plugin.env("CNI_COMMAND", command).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        if let Some(whose) = &self.whose {
            plugin.env("CNI_CONTAINERID", &whose.container).env("CNI_IFNAME", &whose.ifname);
            plugin.env_remove("CNI_NETNS").env_remove("CNI_ARGS");
        }
        let mut plugin = plugin.spawn().map_err(|error| failed(&format!("cannot be executed: {error}")))?;
        let output = converse(&mut plugin, document.to_string());
        // Whoever still runs has had its time; whoever has ended is not harmed.
        let _ = plugin.kill();
        let status = plugin.wait().map_err(|error| failed(&format!("cannot be waited for: {error}")))?;
        let Some(output) = output else {
            return Err(failed(&format!("gave no answer within {} s", PATIENCE.as_secs())));
        };
        let said: Option<Value> = serde_json::from_slice(&output).ok();
        if status.success() {
            let silent = output.trim_ascii().is_empty();
            return said.or(silent.then_some(Value::Null)).ok_or_else(|| failed("said what is not JSON"));
        }
        let Some(error) = said.filter(|said| said["code"].is_u64()) else {
            return Err(failed(&format!("failed without an error object ({status})")));
        };
        let text = |key: &str| error[key].as_str().unwrap_or_default().chars().take(500).collect::<String>();
        let code = error["code"].as_u64().and_then(|code| u32::try_from(code).ok()).unwrap_or(code::DELEGATE);
        Err(Failure { code, ..self.failed(text("msg")) }.with_details(text("details")))
    }
}

/// Writes and reads at once, for either side may say more than a pipe holds. `None` if the plugin took too long.
fn converse(plugin: &mut Child, input: String) -> Option<Vec<u8>> {
    let mut stdin = plugin.stdin.take()?;
    let stdout = plugin.stdout.take()?;
    // A plugin that does not read its input has not failed by that.
    thread::spawn(move || stdin.write_all(input.as_bytes()));
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut output = Vec::new();
        let read = stdout.take(MAX_OUTPUT).read_to_end(&mut output);
        let _ = sender.send(read.map(|_| output));
    });
    receiver.recv_timeout(PATIENCE).ok()?.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_becomes_addresses_routes_and_name_servers() {
        let delegate = Delegate { name: "x".into(), path: "/x".into(), whose: None };
        let result = json!({
            "ips": [{ "address": "10.0.0.5/24", "gateway": "10.0.0.1" }, { "version": "6", "address": "fd00::5/64" }],
            "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "10.0.0.0/8", "gw": "10.0.0.9" }], "dns": { "search": ["a"] }
        });
        let given = delegate.given(&result).unwrap();
        assert_eq!(given.addresses[0].gateway.to_string(), "10.0.0.1");
        assert_eq!(
            (given.addresses[1].address.as_str(), given.addresses[1].gateway.to_string()),
            ("fd00::5/64", "::".into())
        );
        let routes: Vec<String> =
            given.routes.unwrap().iter().map(|route| format!("{} {}", route.destination, route.gateway)).collect();
        assert_eq!(routes, ["0.0.0.0/0 0.0.0.0", "10.0.0.0/8 10.0.0.9"]);
        assert_eq!(given.dns, Some(json!({ "search": ["a"] })));
        let bare =
            delegate.given(&json!({ "ips": [{ "address": "10.0.0.5/24" }], "routes": null, "dns": {} })).unwrap();
        assert!(bare.routes.is_none() && bare.dns.is_none());
        for bad in [
            json!({}),
            json!({ "ips": [] }),
            json!({ "ips": [{}] }),
            json!({ "ips": [7] }),
            json!(null),
            json!({ "ips": [{ "address": "10.0.0.5/24" }], "routes": 7 }),
        ] {
            assert_eq!(delegate.given(&bad).unwrap_err().code, code::DELEGATE, "{bad}");
        }
    }
}
