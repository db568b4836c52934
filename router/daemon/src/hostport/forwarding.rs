//! What the node's own settings forbid: they are the operator's, so they are read and never written.

use std::fs;

use crate::control::config::Config;
use crate::control::host::Host;

/// What keeps pods from reaching further than this node, and others from reaching it. `uplinks` are the interfaces by which packets come
/// without a tunnel, `tunnels` says whether any come by one.
pub fn problems(config: &Config, host: Option<&Host>, uplinks: &[String], tunnels: bool) -> Vec<String> {
    if config.host_port.is_none() {
        return Vec::new();
    }
    let device = host.and_then(|host| host.holder_of(config.underlay.address)).map(|device| device.name.as_str());
    of(config, device.filter(|_| tunnels), uplinks, |key| {
        fs::read_to_string(format!("/proc/sys/net/{}", key.replace('.', "/"))).ok()
    })
}

fn of(
    config: &Config,
    underlay: Option<&str>,
    uplinks: &[String],
    read: impl Fn(&str) -> Option<String>,
) -> Vec<String> {
    let value = |key: &str| read(key).and_then(|text| text.trim().parse::<i64>().ok());
    let mut all = Vec::new();
    for (key, v4) in [("ipv4.ip_forward", true), ("ipv6.conf.all.forwarding", false)] {
        if value(key) == Some(0) && config.ranges.iter().any(|range| range.addr().is_ipv4() == v4) {
            all.push(format!(
                "net.{key} is 0, so this node's kernel routes nothing for pods: they reach pods and this node, but no service \
                 address and nothing beyond; sysctl -w net.{key}=1"
            ));
        }
    }
    for (device, (family, v4)) in
        uplinks.iter().flat_map(|device| [(device, ("ipv4", true)), (device, ("ipv6", false))])
    {
        // Dots are separators here, and a VLAN has one in its name.
        let key = format!("{family}.conf.{}.forwarding", device.replace('.', "/"));
        if value(&key) == Some(0) && config.ranges.iter().any(|range| range.addr().is_ipv4() == v4) {
            all.push(format!(
                "net.{key} is 0, so this node's kernel does not forward what comes for its pods by {device} without a tunnel: sysctl -w \
                 net.{key}=1"
            ));
        }
    }
    let strict = |name: &str| value(&format!("ipv4.conf.{name}.rp_filter"));
    if let Some(device) = underlay
        && config.underlay.address.is_ipv4()
        && strict("all").max(strict(device)) == Some(1)
    {
        all.push(format!(
            "rp_filter is strict on {device}, so this node's kernel drops what other nodes' pods send to {}: sysctl -w \
             net.ipv4.conf.{device}.rp_filter=2",
            config.underlay.address
        ));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_will_not_do_is_told() {
        let text = "node = \"n1\"\nmode = \"routed\"\nmtu = 1450\nranges = [\"10.244.1.0/24\"]\n[underlay]\naddress = \
                    \"10.200.0.1\"";
        let config = Config::read(text, &Host::default()).unwrap().config;
        let all = |off: &[(&str, &str)]| {
            let found = |key: &str| off.iter().find(|(name, _)| *name == key).map(|(_, value)| (*value).to_owned());
            of(&config, Some("eth0"), &["eth1".into()], |key| {
                found(key).or_else(|| Some("1\n".into()).filter(|_| key.contains("forward")))
            })
        };
        assert_eq!(all(&[]), Vec::<String>::new());
        assert_eq!(all(&[("ipv6.conf.all.forwarding", "0")]), Vec::<String>::new(), "the node has no IPv6 range");
        assert!(all(&[("ipv4.ip_forward", "0\n")])[0].starts_with("net.ipv4.ip_forward is 0"));
        assert!(all(&[("ipv4.conf.eth1.forwarding", "0")])[0].contains("for its pods by eth1 without a tunnel"));
        assert!(all(&[("ipv4.conf.all.rp_filter", "1")])[0].contains("strict on eth0"));
        assert_eq!(all(&[("ipv4.conf.all.rp_filter", "1"), ("ipv4.conf.eth0.rp_filter", "2")]), Vec::<String>::new());
    }
}
