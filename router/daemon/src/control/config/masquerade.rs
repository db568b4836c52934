//! The section `masquerade`: whether packets of pods leave the cluster in the node's name, and what they may take of it.
//!
//! Without the section they go to the node's kernel as they are. What is kept for the kernel also with it are the addresses of services,
//! which the kernel translates (kube-proxy). An API server's range of them has at most 20 bits of addresses, so the /12 around the one address
//! of which each process in a cluster is told, `KUBERNETES_SERVICE_HOST`, has all of them (IPv6: /108). The key `services` says it more
//! exactly, and is needed for a second family.

use std::net::IpAddr;

use ipnet::IpNet;
use weft_router::snat;

use super::reader::{At, Reader, Section};

/// Whence a process in a cluster knows the API server's service.
const API_SERVICE: &str = "KUBERNETES_SERVICE_HOST";
/// Least number of a reserved port: below are servers.
const LEAST_PORT: u16 = 1024;
/// Most sessions.
const MOST: usize = 1 << 22;

/// What holds for packets that leave the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Masquerade {
    /// Where pods are known by their own addresses.
    pub exclude: Vec<IpNet>,
    /// The addresses of services, which the kernel translates.
    pub services: Vec<IpNet>,
    /// Ports and sessions.
    pub limits: snat::Limits,
}

impl Masquerade {
    /// What goes to the kernel as it is.
    pub fn kept(&self) -> Vec<IpNet> {
        self.exclude.iter().chain(&self.services).copied().collect()
    }

    pub(super) fn read<'t>(reader: &mut Reader<'t>, root: &mut Section<'t>) -> Option<Masquerade> {
        const PREFIX: &str = "a prefix such as 10.96.0.0/12";
        let mut section = reader.table(root, "masquerade")?;
        let mut limits = snat::Limits::default();
        let nets = |all: Vec<At<IpNet>>| all.into_iter().map(|at| at.value.trunc()).collect();
        let exclude = nets(reader.list(&mut section, "exclude", PREFIX));
        let given = section.has("services");
        let services: Vec<IpNet> = nets(reader.list(&mut section, "services", PREFIX));
        let first: Option<At<u16>> = reader.number(&mut section, "first_port", LEAST_PORT..=u16::MAX);
        let last: Option<At<u16>> = reader.number(&mut section, "last_port", LEAST_PORT..=u16::MAX);
        limits.first = first.map_or(limits.first, |first| first.value);
        if let Some(last) = last {
            limits.last = last.value;
            if limits.last < limits.first {
                reader.problem(&last.place, format!("must not be less than the first port, {}", limits.first));
                limits.last = limits.first;
            }
        }
        let sessions: Option<At<usize>> = reader.number(&mut section, "sessions", 1..=MOST);
        let per_pod: Option<At<usize>> = reader.number(&mut section, "per_pod", 1..=MOST);
        limits.sessions = sessions.map_or(limits.sessions, |sessions| sessions.value);
        limits.per_pod = per_pod.map_or((limits.sessions / 4).max(1), |per_pod| per_pod.value);
        reader.finish(section);
        let around = || std::env::var(API_SERVICE).ok().and_then(|text| around(text.parse().ok()?));
        let services = if given { services } else { around().into_iter().collect() };
        Some(Masquerade { exclude, services, limits })
    }
}

/// The range of services that one of them is in, or more.
fn around(service: IpAddr) -> Option<IpNet> {
    let bits = if service.is_ipv4() { 12 } else { 108 };
    IpNet::new(service, bits).ok().map(|net| net.trunc())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::config::Config;
    use crate::control::host::Host;

    #[test]
    fn the_section_is_checked_as_all_others() {
        let read = |section: &str| {
            let text = format!(
                "node = \"n1\"\nmode = \"routed\"\nmtu = 1450\nranges = [\"10.244.1.0/24\"]\n[underlay]\naddress = \"10.200.0.1\"\n{section}"
            );
            Config::read(&text, &Host::default()).map(|read| read.config.masquerade)
        };
        assert_eq!(read("").unwrap(), None);
        let section = "[masquerade]\nexclude = [\"192.168.1.1/16\"]\nservices = [\"10.96.0.0/12\"]\nfirst_port = 50000\n\
                       last_port = 59999\nsessions = 1000";
        let masquerade = read(section).unwrap().unwrap();
        assert_eq!(masquerade.kept(), ["192.168.0.0/16", "10.96.0.0/12"].map(|net| net.parse().unwrap()));
        let limits = snat::Limits { first: 50_000, last: 59_999, sessions: 1000, per_pod: 250 };
        assert_eq!((masquerade.limits, limits.ports()), (limits, 10_000));
        for (wrong, what) in [
            ("first_port = 80", "first_port"),
            ("first_port = 5000\nlast_port = 4999", "last_port"),
            ("per_pod = 0", "per_pod"),
            ("exclude = [\"10.0.0.0\"]", "exclude"),
            ("ports = 7", "ports"),
        ] {
            let said = read(&format!("[masquerade]\n{wrong}")).unwrap_err().to_string();
            assert!(said.contains(what), "{wrong}: {said}");
        }
    }

    #[test]
    fn the_range_of_services_is_around_one_of_them() {
        let around = |text: &str| around(text.parse().unwrap()).unwrap().to_string();
        assert_eq!(around("10.96.0.1"), "10.96.0.0/12");
        assert_eq!(around("10.43.0.1"), "10.32.0.0/12");
        assert_eq!(around("fd00:10:96::1"), "fd00:10:96::/108");
    }
}
