//! What the runtime says in environment variables: `CNI_CONTAINERID`, `CNI_IFNAME`, `CNI_NETNS`, `CNI_ARGS`.
//!
//! Every failure here has code 4 and names the variable. The forms are the specification's: container id
//! `[A-Za-z0-9][A-Za-z0-9_.-]*`, interface name as Linux takes it. A container id is limited in length besides,
//! because it becomes part of what the daemon keeps.

use std::collections::BTreeMap;
use std::net::IpAddr;

use weft_api::{AttachmentKey, Failure, code};

use crate::input::quoted;

/// The longest name of a network and the longest container id, in bytes.
const MAX_NAME: usize = 255;

/// The longest name of an interface, in bytes (`IFNAMSIZ` without its NUL).
const MAX_IFNAME: usize = 15;

/// Keys of `CNI_ARGS` that tell people which pod it is.
const LABELS: [&str; 4] = ["K8S_POD_NAMESPACE", "K8S_POD_NAME", "K8S_POD_INFRA_CONTAINER_ID", "K8S_POD_UID"];

/// What `CNI_ARGS` asks for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Arguments {
    pub addresses: Vec<IpAddr>,
    pub mac: Option<String>,
    pub labels: BTreeMap<String, String>,
}

/// The variable's value; `None` if it is absent or empty.
pub fn variable(name: &str) -> Result<Option<String>, Failure> {
    match std::env::var_os(name).map(std::ffi::OsString::into_string) {
        None => Ok(None),
        Some(Ok(value)) => Ok(Some(value).filter(|value| !value.is_empty())),
        Some(Err(value)) => Err(invalid(name, &format!("{} is not UTF-8", quoted(&value.to_string_lossy())))),
    }
}

/// The variable's value, which must be there.
pub fn required(name: &str) -> Result<String, Failure> {
    variable(name)?.ok_or_else(|| invalid(name, "it is missing or empty"))
}

/// The attachment of `network` that the environment names.
pub fn attachment(network: &str) -> Result<AttachmentKey, Failure> {
    let container = required("CNI_CONTAINERID")?;
    if !is_name(&container) {
        return Err(invalid("CNI_CONTAINERID", &format!("{}: it {}", quoted(&container), name_form())));
    }
    let ifname = required("CNI_IFNAME")?;
    if !is_ifname(&ifname) {
        let why = "an interface's name has at most 15 bytes, is not '.' or '..', and holds no '/', ':' or white space";
        return Err(invalid("CNI_IFNAME", &format!("{}: {why}", quoted(&ifname))));
    }
    Ok(AttachmentKey { network: network.to_owned(), container, ifname })
}

/// Reads `CNI_ARGS`.
pub fn arguments() -> Result<Arguments, Failure> {
    parse_arguments(variable("CNI_ARGS")?.as_deref().unwrap_or(""))
}

/// Whether `text` has the form of a container id or of a network's name.
pub fn is_name(text: &str) -> bool {
    text.len() <= MAX_NAME
        && text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text.chars().all(|next| next.is_ascii_alphanumeric() || "_.-".contains(next))
}

/// What [`is_name`] demands, for messages: the end of a sentence that begins with "it".
pub fn name_form() -> String {
    format!(
        "must begin with a letter or digit, continue with letters, digits, '_', '.' and '-', and have at most {MAX_NAME} bytes"
    )
}

/// Whether Linux would take `text` as the name of an interface.
pub fn is_ifname(text: &str) -> bool {
    let forbidden = |next: char| next == '/' || next == ':' || next.is_whitespace() || next.is_control();
    (1..=MAX_IFNAME).contains(&text.len()) && text != "." && text != ".." && !text.contains(forbidden)
}

/// Reads an address that was asked for; as with host-local, a prefix length may follow and means nothing.
pub fn address(text: &str) -> Option<IpAddr> {
    let (address, length) = text.trim().split_once('/').map_or((text.trim(), None), |(a, l)| (a, Some(l)));
    let address: IpAddr = address.parse().ok()?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let fits = length.is_none_or(|length| length.parse::<u8>().is_ok_and(|length| length <= longest));
    fits.then(|| address.to_canonical())
}

/// Reads a MAC that an interface may have, and writes it as `aa:bb:cc:dd:ee:ff`.
pub fn mac(text: &str) -> Option<String> {
    // Two digits each: `from_str_radix` alone would take a sign for one.
    let is_octet = |part: &&str| part.len() == 2 && part.chars().all(|digit| digit.is_ascii_hexdigit());
    let octet = |part| Some(part).filter(is_octet).and_then(|part| u8::from_str_radix(part, 16).ok());
    let octets: Option<Vec<u8>> = text.split([':', '-']).map(octet).collect();
    let octets = octets.filter(|octets| octets.len() == 6 && octets[0] & 1 == 0 && octets.iter().any(|&o| o != 0))?;
    Some(octets.iter().map(|octet| format!("{octet:02x}")).collect::<Vec<_>>().join(":"))
}

pub fn parse_arguments(text: &str) -> Result<Arguments, Failure> {
    let refuse = |why: String| invalid("CNI_ARGS", &why);
    let mut arguments = Arguments::default();
    let mut ignore_unknown = false;
    let mut unknown = None;
    for pair in text.split(';').filter(|pair| !pair.is_empty()) {
        let (key, value) =
            pair.split_once('=').ok_or_else(|| refuse(format!("{} is not of the form KEY=VALUE", quoted(pair))))?;
        match key {
            "IgnoreUnknown" => {
                ignore_unknown = boolean(value)
                    .ok_or_else(|| refuse(format!("IgnoreUnknown is {}, neither 1 nor 0", quoted(value))))?;
            }
            "IP" => {
                for part in value.split(',').filter(|part| !part.is_empty()) {
                    let wrong = || refuse(format!("IP: {} is not an address", quoted(part)));
                    arguments.addresses.push(address(part).ok_or_else(wrong)?);
                }
            }
            "MAC" => {
                let wrong = || refuse(format!("MAC: {} is not a unicast MAC", quoted(value)));
                arguments.mac = Some(mac(value).ok_or_else(wrong)?);
            }
            label if LABELS.contains(&label) => {
                arguments.labels.insert(label.to_owned(), value.to_owned());
            }
            other => unknown = unknown.or(Some(other)),
        }
    }
    match unknown {
        Some(key) if !ignore_unknown => Err(refuse(format!("{} is not a known key", quoted(key)))
            .with_details("known are IP, MAC, IgnoreUnknown and K8S_POD_*; add IgnoreUnknown=1 to pass others")),
        _ => Ok(arguments),
    }
}

fn boolean(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "true" => Some(true),
        "0" | "false" => Some(false),
        _ => None,
    }
}

/// A failure that names the variable.
pub fn invalid(name: &str, why: &str) -> Failure {
    Failure::new(code::ENVIRONMENT, format!("{name} cannot be used: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_begins_alphanumeric_and_stays_plain() {
        for good in ["a", "0", "pods", "a_b.c-d", "c1", &"x".repeat(255)] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", ".", "..", "../x", "-a", "_a", "a/b", "a b", "a\0", "ä", "a\n", &"x".repeat(256)] {
            assert!(!is_name(bad), "{bad}");
        }
    }

    #[test]
    fn an_interface_name_is_one_that_linux_takes() {
        for good in ["eth0", "a", "...", "net1.5", "0123456789abcde", "ä"] {
            assert!(is_ifname(good), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a:b", "a b", "a\tb", "a\u{a0}b", "a\0", "0123456789abcdef", "ääääääää"]
        {
            assert!(!is_ifname(bad), "{bad}");
        }
    }

    #[test]
    fn arguments_are_read_in_any_order() {
        let text = "K8S_POD_NAME=web-0;IP=10.0.0.5,fd00::5/64;Other=1;MAC=02-AA-bb-00-00-01;IgnoreUnknown=TRUE;";
        let arguments = parse_arguments(text).unwrap();
        assert_eq!(arguments.addresses, ["10.0.0.5".parse::<IpAddr>().unwrap(), "fd00::5".parse().unwrap()]);
        assert_eq!(arguments.mac.as_deref(), Some("02:aa:bb:00:00:01"));
        assert_eq!(arguments.labels, BTreeMap::from([("K8S_POD_NAME".to_owned(), "web-0".to_owned())]));
        assert_eq!(parse_arguments("").unwrap(), Arguments::default());
        assert_eq!(parse_arguments(";;IP=;").unwrap(), Arguments::default());
    }

    #[test]
    fn arguments_that_are_wrong_are_refused_and_named() {
        let cases = [
            ("FOO=BAR", "FOO"),
            ("FOO=BAR;IgnoreUnknown=0", "FOO"),
            ("IgnoreUnknown=maybe", "IgnoreUnknown"),
            ("IgnoreUnknown=1;novalue", "novalue"),
            ("IP=10.0.0.256", "10.0.0.256"),
            ("IP=10.0.0.1/33", "10.0.0.1/33"),
            ("IP=10.0.0.1,,x", "\"x\""),
            ("MAC=01:00:00:00:00:01", "unicast"),
            ("MAC=00:00:00:00:00:00", "unicast"),
            ("MAC=02:00:00:00:00", "unicast"),
            ("MAC=02:00:00:00:00:+1", "unicast"),
        ];
        for (text, named) in cases {
            let failure = parse_arguments(text).unwrap_err();
            assert_eq!(failure.code, code::ENVIRONMENT);
            assert!(failure.msg.contains("CNI_ARGS") && failure.msg.contains(named), "{failure}");
        }
    }
}
