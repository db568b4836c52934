//! As the IPAM plugin of another: addresses without an interface.
//!
//! A plugin such as bridge, ptp or macvlan names us in `ipam.type`, executes us with its own configuration, and makes the interface
//! itself. We answer with an abbreviated result: addresses, routes and name servers, and nothing of interfaces. `ipam` is read as
//! host-local reads it: `ranges`, `routes`, `resolvConf`; without `ranges` the addresses are this node's.

use std::os::fd::AsFd;

use serde_json::{Map, Value, json};
use weft_api::{Attach, Attached, Check, Empty, Failure, Request};

use crate::command::{CHECK_WAIT, WAIT};
use crate::config::{Config, invalid, section};
use crate::version::Version;
use crate::{daemon, environment, netns, outcome};

/// The longest file of name servers that is read, in bytes.
const MAX_RESOLV_CONF: u64 = 64 * 1024;

/// Gives addresses.
pub fn add(version: Version, config: &Config) -> Result<Value, Failure> {
    let key = environment::attachment(&config.network)?;
    let arguments = environment::arguments()?;
    let wanted = config.wanted(&arguments)?;
    let dns = dns(config)?;
    let netns = environment::variable("CNI_NETNS").ok().flatten().unwrap_or_default();
    // By it weftd knows when the lease is of no more use; the interface may as well be elsewhere.
    let descriptor = netns::open_pod(&netns).ok();
    let routes = wanted.routes.clone().unwrap_or_default();
    let request = Request::Lease(Attach {
        key,
        netns,
        requested: wanted.requested,
        ranges: wanted.ranges,
        mac: None,
        mtu: None,
        port: None,
        bandwidth: None,
        given: Vec::new(),
        routes: None,
        trusted: Vec::new(),
        labels: arguments.labels,
    });
    let wait = config.wait.unwrap_or(WAIT);
    let leased: Attached =
        daemon::ask(&config.socket, wait, daemon::ANSWER, &request, descriptor.as_ref().map(AsFd::as_fd))
            .map_err(daemon::failure)?;
    outcome::leased(version, config, &Attached { routes, ..leased }, dns.as_ref())
}

/// Whether the addresses of the result are leased still.
pub fn check(config: &Config) -> Result<(), Failure> {
    let key = environment::attachment(&config.network)?;
    let previous =
        config.previous_result()?.ok_or_else(|| invalid("CHECK without prevResult: nothing says what to check"))?;
    let all = outcome::expected_leases(previous)?;
    // The result is a whole chain's: what other plugins added is not ours.
    let request = Request::CheckLease(Check { key, expected: Some(all) });
    let wait = config.wait.unwrap_or(CHECK_WAIT);
    let Empty {} = daemon::ask(&config.socket, wait, daemon::ANSWER, &request, None).map_err(daemon::failure)?;
    Ok(())
}

/// Name servers out of the file that `ipam.resolvConf` names.
fn dns(config: &Config) -> Result<Option<Value>, Failure> {
    use std::io::Read;
    let Some(path) = section::<String>(&config.document, "/ipam/resolvConf")?.filter(|path| !path.is_empty()) else {
        return Ok(None);
    };
    let mut text = String::new();
    // A FIFO would hold us up for ever.
    let is_file = std::fs::metadata(&path).is_ok_and(|found| found.is_file());
    let read = if is_file { std::fs::File::open(&path) } else { Err(std::io::Error::other("it is not a file")) };
    read.and_then(|file| file.take(MAX_RESOLV_CONF).read_to_string(&mut text))
        .map_err(|error| invalid(format!("ipam.resolvConf {} cannot be read: {error}", crate::input::quoted(&path))))?;
    Ok(Some(parse_resolv_conf(&text)))
}

/// As resolv.conf(5) has it.
fn parse_resolv_conf(text: &str) -> Value {
    let mut dns = Map::new();
    let mut append = |key: &str, words: &[&str]| {
        let list = dns.entry(key).or_insert_with(|| json!([]));
        if let Some(list) = list.as_array_mut() {
            list.extend(words.iter().map(|&word| Value::from(word)));
        }
    };
    let mut domain = None;
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';'])) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["nameserver", server, ..] => append("nameservers", &[server]),
            ["domain", name, ..] => domain = Some(*name),
            ["search", names @ ..] => append("search", names),
            ["options", options @ ..] => append("options", options),
            _ => {}
        }
    }
    if let Some(domain) = domain {
        dns.insert("domain".to_owned(), domain.into());
    }
    dns.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resolv_conf_is_read_word_by_word() {
        let text = "# a\nnameserver 10.0.0.1\nnameserver fd00::1 \n; b\ndomain a.b\nsearch c.d e.f\noptions ndots:5 x\nbogus\n\n";
        let expected = json!({
            "nameservers": ["10.0.0.1", "fd00::1"], "domain": "a.b", "search": ["c.d", "e.f"], "options": ["ndots:5", "x"]
        });
        assert_eq!(parse_resolv_conf(text), expected);
        assert_eq!(parse_resolv_conf(""), json!({}));
    }
}
