//! Whether somebody else uses the ports by which packets of pods leave the cluster in the node's name.

use super::checks::{bad, good, odd};
use super::{Finding, Machine};

const NAME: &str = "masquerade";
/// What leads answers back came with this version: tcx.
const KERNEL: (u32, u32) = (6, 6);
/// Ports of services on nodes, unless the API server is told otherwise.
const NODE_PORTS: (u16, u16) = (30_000, 32_767);
/// The reserved ports unless configured.
const RESERVED: (u16, u16) = (61_000, 65_535);

/// Looks at what the kernel, Kubernetes and other programs take of them.
pub fn check(machine: &Machine) -> Vec<Finding> {
    let Some(section) = machine.config.as_ref().and_then(|config| config.get("masquerade")) else { return Vec::new() };
    let key = |name: &str, otherwise: u16| {
        let value = section.get(name).and_then(toml::Value::as_integer);
        value.and_then(|value| u16::try_from(value).ok()).unwrap_or(otherwise)
    };
    let range = (key("first_port", RESERVED.0), key("last_port", RESERVED.1));
    let shown = format!("ports {}-{}", range.0, range.1);
    let mut all = Vec::new();
    if kernel(machine).is_some_and(|version| version < KERNEL) {
        all.extend(bad(
            NAME,
            "before Linux 6.6 answers from outside cannot be led to weftd, so nothing of pods leaves the cluster",
            "upgrade the kernel, or remove [masquerade] and let the node's kernel masquerade",
        ));
    }
    let ephemeral = machine.read("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut ends = ephemeral.split_whitespace().map_while(|word| word.parse::<u16>().ok());
    if let Some(taken) = ends.next().zip(ends.next()).filter(|taken| overlap(*taken, range)) {
        all.extend(bad(
            NAME,
            format!("{shown} overlap with those that the kernel gives to programs, {}-{}", taken.0, taken.1),
            "give the kernel others by net.ipv4.ip_local_port_range, or choose others by first_port and last_port",
        ));
    }
    if overlap(NODE_PORTS, range) {
        all.extend(odd(
            NAME,
            format!("{shown} overlap with those that Kubernetes gives to services on nodes, 30000-32767"),
            "choose others by first_port and last_port",
        ));
    }
    let listeners = listeners(machine, range);
    if !listeners.is_empty() {
        let ports: Vec<String> = listeners.iter().map(ToString::to_string).collect();
        all.extend(odd(
            NAME,
            format!("programs of this node use {} of {shown}: {}", listeners.len(), ports.join(" ")),
            "they work, but share their ports with pods' answers: move them, or choose others by first_port and last_port",
        ));
    }
    if all.is_empty() { good(NAME, format!("{shown} are free")) } else { all }
}

fn overlap(a: (u16, u16), b: (u16, u16)) -> bool {
    a.0 <= b.1 && b.0 <= a.1
}

fn kernel(machine: &Machine) -> Option<(u32, u32)> {
    let release = machine.read("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.trim().split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse().ok());
    numbers.next().zip(numbers.next())
}

/// Ports in this range that sockets of the node have, at most a few.
fn listeners(machine: &Machine, range: (u16, u16)) -> Vec<u16> {
    const MOST: usize = 10;
    /// <https://elixir.bootlin.com/linux/v6.18/A/ident/TCP_LISTEN>, and what UDP sockets show that are not connected.
    const STATES: [&str; 2] = ["0A", "07"];
    let tables =
        ["tcp", "tcp6", "udp", "udp6"].map(|name| machine.read(format!("/proc/net/{name}")).unwrap_or_default());
    let lines = tables.iter().flat_map(|table| table.lines().skip(1));
    let port = |line: &str| {
        let mut words = line.split_whitespace().skip(1);
        let (local, state) = (words.next()?, words.nth(1)?);
        let port = u16::from_str_radix(local.rsplit_once(':')?.1, 16).ok()?;
        (STATES.contains(&state) && (range.0..=range.1).contains(&port)).then_some(port)
    };
    let mut ports: Vec<u16> = lines.filter_map(port).collect();
    ports.sort_unstable();
    ports.dedup();
    ports.truncate(MOST);
    ports
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Grade;

    #[test]
    fn who_else_uses_the_ports_is_told() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let examine = |config: &str| {
            write("etc/weftd.toml", config);
            check(&Machine::new(root.path(), "etc/weftd.toml".as_ref()))
        };
        write("proc/sys/net/ipv4/ip_local_port_range", "32768\t60999\n");
        write("proc/sys/kernel/osrelease", "6.18.5-amd64\n");
        let socket = |port: u16, state: &str| format!("   0: 00000000:{port:04X} 00000000:0000 {state} 0:0 0:0\n");
        let title = "  sl  local_address rem_address   st\n".to_owned();
        write("proc/net/tcp", &(title.clone() + &socket(61_500, "01") + &socket(22, "0A")));
        assert_eq!(examine("node = \"n1\""), []);
        assert_eq!(examine("[masquerade]").iter().map(|found| found.grade).collect::<Vec<_>>(), [Grade::Good]);
        write("proc/net/udp", &(title + &socket(61_001, "07")));
        let found = examine("[masquerade]");
        assert!(found.len() == 1 && found[0].found.contains("1 of ports 61000-65535: 61001"), "{found:?}");
        let found = examine("[masquerade]\nfirst_port = 32000\nlast_port = 42000");
        assert_eq!(found.iter().map(|found| found.grade).collect::<Vec<_>>(), [Grade::Problem, Grade::Warning]);
        assert!(found[0].found.contains("32768-60999"), "{found:?}");
        write("proc/sys/kernel/osrelease", "6.1.0\n");
        assert!(examine("[masquerade]")[0].found.contains("before Linux 6.6"));
    }
}
