//! The plugin `loopback`, for nodes where it is missing: runtimes call it for each sandbox, before anything else. weft-cni does its job when
//! it is called by that name.
//!
//! ADD sets `lo` up, and DEL down again if the namespace is still there; the interface is `lo` whatever `CNI_IFNAME` says.

use std::os::fd::OwnedFd;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Value, json};
use weft_api::{Failure, code};

use crate::command::Command;
use crate::config::Config;
use crate::version::Version;
use crate::{environment, netns, outcome, sys};

/// The name by which this is asked for.
pub const NAME: &str = "loopback";

/// Does the command.
pub fn run(command: Command, version: Version, config: &Config) -> Result<Option<Value>, Failure> {
    match command {
        Command::Add => {
            environment::attachment(&config.network)?;
            let path = environment::required("CNI_NETNS")?;
            enter(netns::open_pod(&path)?)?;
            sys::set_loopback(true).map_err(|errno| failed("set lo up", errno.into()))?;
            result(version, config, &path).map(Some)
        }
        Command::Del => {
            environment::attachment(&config.network)?;
            let namespace = environment::variable("CNI_NETNS").ok().flatten();
            // Its end takes lo along.
            if let Some(Ok(namespace)) = namespace.map(|path| netns::open_pod(&path)) {
                enter(namespace)?;
                sys::set_loopback(false).map_err(|errno| failed("set lo down", errno.into()))?;
            }
            Ok(None)
        }
        Command::Check => {
            environment::attachment(&config.network)?;
            enter(netns::open_pod(&environment::required("CNI_NETNS")?)?)?;
            match sys::is_loopback_up() {
                Ok(true) => Ok(None),
                Ok(false) => Err(Failure::new(code::CHECK, "lo is down")),
                Err(errno) => Err(failed("look at lo", errno.into())),
            }
        }
        // Nothing is kept, and nothing is needed.
        Command::Gc | Command::Status | Command::Version => Ok(None),
    }
}

fn enter(namespace: OwnedFd) -> Result<(), Failure> {
    use std::os::fd::AsFd;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|errno| failed("enter the network namespace", errno.into()))
}

fn failed(what: &str, error: std::io::Error) -> Failure {
    Failure::new(code::IO, format!("cannot {what}: {error}")).with_details("the runtime must execute this as root")
}

/// What a plugin before us made, or else lo itself.
fn result(version: Version, config: &Config, sandbox: &str) -> Result<Value, Failure> {
    if let Some(previous) = config.previous_result()? {
        let mut result = previous.clone();
        result.insert("cniVersion".to_owned(), version.as_str().into());
        return Ok(Value::Object(result));
    }
    let mut result = json!({
        "cniVersion": version.as_str(),
        "interfaces": [{ "name": "lo", "mac": "00:00:00:00:00:00", "sandbox": sandbox }],
        "ips": [{ "interface": 0, "address": "127.0.0.1/8" }],
        "dns": {},
    });
    if std::fs::read_to_string("/proc/thread-self/net/if_inet6").is_ok_and(|all| all.contains(" lo\n")) {
        result["ips"]
            .as_array_mut()
            .expect("it is one, see above")
            .push(json!({ "interface": 0, "address": "::1/128" }));
    }
    outcome::convert(&mut result, version);
    Ok(result)
}
