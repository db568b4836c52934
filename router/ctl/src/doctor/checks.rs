//! The checks, each for one thing that has kept a pod network from working somewhere.

use std::path::{Path, PathBuf};
use std::time::Duration;

use weft_api::folders::{CONTAINERD, Folders};
use weft_api::{Client, Request, Status};

use super::{Finding, Grade, Machine, reserved};

/// A check: what it finds, mostly one thing.
pub type Check = fn(&Machine) -> Vec<Finding>;

/// All checks of the machine.
pub const ALL: &[Check] = &[
    kernel,
    tun,
    forwarding,
    reverse_path,
    firewall,
    underlay,
    tunnel_port,
    plugin,
    networks,
    others,
    runc,
    reserved::check,
];

/// USO, without which large datagrams of pods are cut by us: <https://github.com/torvalds/linux/commit/399e0827642f>
const KERNEL_USO: (u32, u32) = (6, 2);
/// Programs on interfaces that go with their process (tcx), by which answers from outside of the cluster are led back.
const KERNEL_TCX: (u32, u32) = (6, 6);
/// `UDP_GRO` and `UDP_SEGMENT`, which carry superframes between nodes.
const KERNEL_LEAST: (u32, u32) = (5, 0);
/// The tunnel's UDP port unless configured.
const DEFAULT_PORT: u16 = 8472;
/// What VXLAN over IPv4 takes from the underlay's MTU.
const OVERHEAD: u32 = 50;
/// How long the daemon has to answer.
const PATIENCE: Duration = Duration::from_secs(5);

fn finding(check: &'static str, grade: Grade, found: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding { check, grade, found: found.into(), advice: advice.into() }
}

pub(super) fn good(check: &'static str, found: impl Into<String>) -> Vec<Finding> {
    vec![finding(check, Grade::Good, found, "")]
}

pub(super) fn bad(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Vec<Finding> {
    vec![finding(check, Grade::Problem, found, advice)]
}

pub(super) fn odd(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Vec<Finding> {
    vec![finding(check, Grade::Warning, found, advice)]
}

fn kernel(machine: &Machine) -> Vec<Finding> {
    let release = machine.read("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse::<u32>().ok());
    let Some(version) = numbers.next().zip(numbers.next()) else {
        return odd(
            "kernel",
            format!("its version, {release:?}, is not understood"),
            "Linux 6.2 or later is recommended",
        );
    };
    if version < KERNEL_LEAST {
        bad("kernel", release, "superframes between nodes need Linux 5.0 or later: upgrade the kernel")
    } else if version < KERNEL_TCX && machine.config.as_ref().is_some_and(|config| config.contains_key("masquerade")) {
        bad(
            "kernel",
            release,
            "[masquerade] needs Linux 6.6 or later: upgrade the kernel, or have it translated elsewhere",
        )
    } else if version < KERNEL_USO {
        odd("kernel", release, "before Linux 6.2 large UDP datagrams of pods are cut in software, which is slower")
    } else {
        good("kernel", release)
    }
}

fn tun(machine: &Machine) -> Vec<Finding> {
    if machine.path("/dev/net/tun").exists() {
        return good("tun", "/dev/net/tun is there");
    }
    bad("tun", "/dev/net/tun is missing", "modprobe tun, and write tun into /etc/modules-load.d/weft.conf")
}

fn sysctl(machine: &Machine, name: &str) -> Option<String> {
    machine.read(format!("/proc/sys/net/{name}")).map(|value| value.trim().to_owned())
}

fn forwarding(machine: &Machine) -> Vec<Finding> {
    let families =
        [("ipv4/ip_forward", "net.ipv4.ip_forward"), ("ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding")];
    let off: Vec<&str> = families
        .iter()
        .filter(|(path, _)| sysctl(machine, path).is_some_and(|value| value == "0"))
        .map(|(_, name)| *name)
        .collect();
    if off.is_empty() {
        return good("forwarding", "the kernel forwards packets");
    }
    odd(
        "forwarding",
        format!(
            "{} is 0: pods reach each other, but nothing beyond the nodes, nor services by kube-proxy",
            off.join(" and ")
        ),
        format!("write {} = 1 into /etc/sysctl.d/90-weft.conf and run sysctl --system", off.join(" = 1 and ")),
    )
}

/// Strict filtering drops what a service's backend on another node answers, since the kernel's own route for the pod's address may lead elsewhere.
fn reverse_path(machine: &Machine) -> Vec<Finding> {
    match sysctl(machine, "ipv4/conf/all/rp_filter").as_deref() {
        Some("1") => odd(
            "rp_filter",
            "net.ipv4.conf.all.rp_filter is 1 (strict): it holds for every interface, weft0 among them",
            "write net.ipv4.conf.all.rp_filter = 2 (or 0) into /etc/sysctl.d/90-weft.conf",
        ),
        Some(value) => good("rp_filter", format!("{value}, not strict for all interfaces")),
        None => Vec::new(),
    }
}

/// What comes for pods without a tunnel is forwarded by the kernel, and by its firewall, which sees that direction alone: what leaves does so
/// by a socket on the interface.
fn firewall(machine: &Machine) -> Vec<Finding> {
    let plain = configured_text(machine, Some("underlay"), "encapsulation") == Some("host-gw")
        || configured(machine, Some("underlay"), "cross_subnet").and_then(toml::Value::as_bool) == Some(true)
        || configured(machine, Some("routes"), "within").is_some();
    let Some(rules) = machine.firewall.as_deref().filter(|_| plain) else { return Vec::new() };
    let mut found = Vec::new();
    if rules.lines().any(|line| line.contains("hook forward") && line.contains("policy drop")) {
        found.extend(odd(
            "firewall",
            "a chain of the hook forward has the policy drop: what comes for pods without a tunnel has to be accepted there",
            "accept the pods' ranges as destination (nft list ruleset), or use a tunnel",
        ));
    }
    let liberal = sysctl(machine, "netfilter/nf_conntrack_tcp_be_liberal").as_deref() == Some("1");
    if !liberal && rules.lines().any(|line| line.contains("ct state invalid") && line.contains("drop")) {
        found.extend(odd(
            "firewall",
            "what connection tracking calls invalid is dropped, and so are TCP's answers to pods that come without a tunnel",
            "let kube-proxy set nf_conntrack_tcp_be_liberal (conntrack.tcpBeLiberal: true), accept the pods' ranges before such rules, or \
             use a tunnel",
        ));
    }
    if found.is_empty() { good("firewall", "nothing is in the way of packets without a tunnel") } else { found }
}

fn configured<'m>(machine: &'m Machine, table: Option<&str>, key: &str) -> Option<&'m toml::Value> {
    let config = machine.config.as_ref()?;
    match table {
        Some(table) => config.get(table)?.get(key),
        None => config.get(key),
    }
}

fn configured_text<'m>(machine: &'m Machine, table: Option<&str>, key: &str) -> Option<&'m str> {
    configured(machine, table, key).and_then(toml::Value::as_str)
}

/// Devices that carry Ethernet frames to elsewhere, and their MTUs.
fn uplinks(machine: &Machine) -> Vec<(String, u32)> {
    let is_real = |name: &String| machine.path(format!("/sys/class/net/{name}/device")).exists();
    let named = configured_text(machine, Some("underlay"), "device");
    let default = default_devices(machine);
    // Bonds, bridges and VLANs are no cards, but may be what leads to the other nodes.
    let is_meant = |name: &String| is_real(name) || default.contains(name);
    let all = machine.list("/sys/class/net").into_iter();
    let chosen = all.filter(|name| named.map_or_else(|| is_meant(name), |named| named == name));
    chosen
        .filter_map(|name| {
            let mtu = machine.read(format!("/sys/class/net/{name}/mtu"))?.trim().parse().ok()?;
            Some((name, mtu))
        })
        .collect()
}

/// The devices of default routes by IPv4.
fn default_devices(machine: &Machine) -> Vec<String> {
    let routes = machine.read("/proc/net/route").unwrap_or_default();
    let default = |line: &str| {
        let mut words = line.split_whitespace();
        let (device, to, mask) = (words.next()?, words.next()?, words.nth(5)?);
        (to == "00000000" && mask == "00000000").then(|| device.to_owned())
    };
    routes.lines().skip(1).filter_map(default).collect()
}

fn underlay(machine: &Machine) -> Vec<Finding> {
    let pods =
        configured(machine, None, "mtu").and_then(toml::Value::as_integer).and_then(|mtu| u32::try_from(mtu).ok());
    let uplinks = uplinks(machine);
    if uplinks.is_empty() {
        return odd("mtu", "no network card was found", "name the device in weftd's configuration: underlay.device");
    }
    let judge = |(name, mtu): (String, u32)| {
        let needed = pods.unwrap_or(1280) + OVERHEAD;
        let found = format!("{name} has an MTU of {mtu}, which leaves pods {}", mtu.saturating_sub(OVERHEAD));
        if mtu >= needed {
            return finding("mtu", Grade::Good, found, "");
        }
        let advice = format!(
            "pods need {} there: raise the device's MTU to {needed}, or lower the key mtu",
            pods.unwrap_or(1280)
        );
        finding("mtu", Grade::Problem, found, advice)
    };
    uplinks.into_iter().map(judge).collect()
}

/// A port on which something other than weftd listens, a kernel's VXLAN device included: that one shows in `/proc/net/udp` without a process.
fn tunnel_port(machine: &Machine) -> Vec<Finding> {
    let configured = configured(machine, Some("underlay"), "port").and_then(toml::Value::as_integer);
    let port = configured.and_then(|port| u16::try_from(port).ok()).unwrap_or(DEFAULT_PORT);
    let held = ["udp", "udp6"].iter().filter_map(|file| machine.read(format!("/proc/net/{file}"))).any(|text| {
        let local = |line: &str| line.split_whitespace().nth(1)?.rsplit_once(':').map(|(_, port)| port.to_owned());
        text.lines().skip(1).filter_map(local).any(|held| u16::from_str_radix(&held, 16) == Ok(port))
    });
    let socket = configured_text(machine, None, "socket").unwrap_or(weft_api::SOCKET);
    // One that was killed leaves its socket behind.
    let running = std::os::unix::net::UnixStream::connect(machine.path(socket)).is_ok();
    match (held, running) {
        (false, _) => good("tunnel port", format!("UDP port {port} is free")),
        (true, true) => good("tunnel port", format!("UDP port {port} is in use, as it should be while weftd runs")),
        (true, false) => bad(
            "tunnel port",
            format!("UDP port {port} is in use, and not by weftd"),
            "remove the other tunnel (Flannel's device is flannel.1: ip link del flannel.1), or choose another underlay.port on all nodes",
        ),
    }
}

/// Where the runtime looks for networks and plugins: what weftd's configuration says, else what containerd's does.
fn folders(machine: &Machine) -> Folders {
    let found = Folders::of(&machine.path(CONTAINERD));
    let or = |key: &str, found: PathBuf| configured_text(machine, Some("cni"), key).map_or(found, PathBuf::from);
    Folders { networks: or("conf_dir", found.networks), plugins: or("bin_dir", found.plugins) }
}

fn plugin(machine: &Machine) -> Vec<Finding> {
    let mut folders = vec![folders(machine).plugins];
    if !machine.path(CONTAINERD).exists() && configured(machine, Some("cni"), "bin_dir").is_none() {
        // Where other runtimes look.
        folders.extend(["/usr/lib/cni", "/usr/libexec/cni"].map(PathBuf::from));
    }
    let with = |program: &str| folders.iter().find(|folder| machine.path(folder).join(program).exists());
    let mut all = Vec::new();
    match with("weft-cni") {
        Some(folder) => all.extend(good("plugin", format!("weft-cni is in {}", folder.display()))),
        None => {
            let found = format!("weft-cni is not in {}, where the runtime looks for plugins", folders[0].display());
            all.extend(odd("plugin", found, "run `weft install-cni`, or `make install`"));
        }
    }
    if with("loopback").is_none() {
        let advice = "run `weft install-cni`, which puts one there, or install containernetworking-plugins";
        all.extend(odd("loopback", "the plugin loopback is missing, which containerd and CRI-O ask for", advice));
    }
    all
}

/// Runtimes take the first file by name, so another network's may win, or ours may hide it.
fn networks(machine: &Machine) -> Vec<Finding> {
    const OURS: &str = "05-weft.conflist";
    let is_network = |name: &String| [".conf", ".conflist", ".json"].iter().any(|ending| name.ends_with(ending));
    let folder = folders(machine).networks;
    let folder = folder.display();
    let files: Vec<String> = machine.list(&folder.to_string()).into_iter().filter(is_network).collect();
    let before: Vec<&str> = files.iter().map(String::as_str).filter(|name| *name < OURS).collect();
    if !before.is_empty() {
        return bad(
            "networks",
            format!("{} comes before {OURS} in {folder}: the runtime will use that network", before.join(", ")),
            "remove the other network's file, or rename it so that it sorts behind ours",
        );
    }
    let behind: Vec<&str> = files.iter().map(String::as_str).filter(|name| *name > OURS).collect();
    if behind.is_empty() {
        return good("networks", format!("no other network is configured in {folder}"));
    }
    odd(
        "networks",
        format!("{} is also in {folder}: pods get that network whenever ours is not there", behind.join(", ")),
        "remove it once no pod uses that network any more",
    )
}

/// What other networks leave behind.
fn others(machine: &Machine) -> Vec<Finding> {
    const KNOWN: [(&str, &str); 7] = [
        ("flannel.", "Flannel"),
        ("cni0", "the bridge plugin"),
        ("cali", "Calico"),
        ("vxlan.calico", "Calico"),
        ("cilium_", "Cilium"),
        ("weave", "Weave Net"),
        ("kube-bridge", "kube-router"),
    ];
    let devices = machine.list("/sys/class/net");
    let of = |device: &String| KNOWN.iter().find(|(prefix, _)| device.starts_with(prefix)).map(|(_, network)| *network);
    let mut found: Vec<(&str, &str)> =
        devices.iter().filter_map(|device| Some((device.as_str(), of(device)?))).collect();
    found.dedup_by_key(|(_, network)| *network);
    if found.is_empty() {
        return good("other networks", "no device of another pod network is here");
    }
    let named: Vec<String> = found.iter().map(|(device, network)| format!("{device} ({network})")).collect();
    odd(
        "other networks",
        format!("devices of other pod networks are here: {}", named.join(", ")),
        "remove them, with their routes, once no pod uses them any more; a reboot does so in most cases",
    )
}

/// runc 1.2.0 to 1.2.3 took /dev/net/tun from the devices that containers may use (opencontainers/runc#4550), weftd's own container included.
fn runc(machine: &Machine) -> Vec<Finding> {
    let Some(said) = &machine.runc else { return Vec::new() };
    let version = said.split_whitespace().skip_while(|word| *word != "version").nth(1).unwrap_or_default();
    if ["1.2.0", "1.2.1", "1.2.2", "1.2.3"].iter().any(|bad| version == *bad || version.starts_with(&format!("{bad}-")))
    {
        return odd(
            "runc",
            format!("{version} refuses /dev/net/tun to containers, also to weftd when it runs in one"),
            "upgrade runc to 1.2.4 or later",
        );
    }
    good("runc", format!("{version} lets weftd have /dev/net/tun"))
}

/// What a running weftd says of itself.
pub fn daemon(socket: &Path) -> Vec<Finding> {
    let asked = Client::connect(socket, PATIENCE).and_then(|mut client| client.call::<Status>(&Request::Status));
    match asked {
        Ok(status) if status.problems.is_empty() => {
            good("weftd", format!("version {} runs as {} and has nothing to report", status.version, status.node))
        }
        Ok(status) => {
            let problem = |problem: String| finding("weftd", Grade::Problem, problem, "");
            status.problems.into_iter().map(problem).collect()
        }
        Err(error) => odd(
            "weftd",
            format!("is not running, or does not answer: {error}"),
            "start it; journalctl -u weftd says why it stopped",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A node with these files.
    fn machine(files: &[(&str, &str)]) -> (tempfile::TempDir, Machine) {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = folder.path().join(path.trim_start_matches('/'));
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let machine = Machine::new(folder.path(), Path::new("/etc/weft/weftd.toml"));
        (folder, machine)
    }

    #[track_caller]
    fn assert_found(check: Check, files: &[(&str, &str)], grade: Grade, part: &str) {
        let (_folder, machine) = machine(files);
        let found = check(&machine);
        assert!(found.iter().any(|finding| finding.grade == grade && finding.found.contains(part)), "{found:?}");
        assert!(found.iter().all(|finding| (finding.grade == Grade::Good) == finding.advice.is_empty()), "{found:?}");
    }

    #[test]
    fn kernels_are_told_apart_by_what_they_lack() {
        let release = "/proc/sys/kernel/osrelease";
        assert_found(kernel, &[(release, "6.18.1-cloud-amd64\n")], Grade::Good, "6.18.1");
        assert_found(kernel, &[(release, "5.10.0\n")], Grade::Warning, "5.10");
        assert_found(kernel, &[(release, "4.18.0-553.el8\n")], Grade::Problem, "4.18");
        assert_found(kernel, &[], Grade::Warning, "not understood");
        let leaving = [(release, "6.1.0-40-amd64\n"), ("/etc/weft/weftd.toml", "[masquerade]\n")];
        assert_found(kernel, &leaving, Grade::Problem, "6.1");
    }

    #[test]
    fn what_is_missing_for_devices_and_forwarding_is_said() {
        assert_found(tun, &[], Grade::Problem, "/dev/net/tun");
        assert_found(tun, &[("/dev/net/tun", "")], Grade::Good, "/dev/net/tun");
        let off = [("/proc/sys/net/ipv4/ip_forward", "0\n"), ("/proc/sys/net/ipv6/conf/all/forwarding", "1\n")];
        assert_found(forwarding, &off, Grade::Warning, "net.ipv4.ip_forward is 0");
        assert_found(reverse_path, &[("/proc/sys/net/ipv4/conf/all/rp_filter", "1\n")], Grade::Warning, "strict");
        assert_found(reverse_path, &[("/proc/sys/net/ipv4/conf/all/rp_filter", "2\n")], Grade::Good, "2");
    }

    #[test]
    fn an_uplink_that_is_too_small_is_a_problem() {
        let card = [
            ("/sys/class/net/ens3/device", ""),
            ("/sys/class/net/ens3/mtu", "1500\n"),
            ("/sys/class/net/lo/mtu", "65536\n"),
        ];
        assert_found(underlay, &card, Grade::Good, "leaves pods 1450");
        let wide = [&card[..], &[("/etc/weft/weftd.toml", "mtu = 1500\n")]].concat();
        assert_found(underlay, &wide, Grade::Problem, "ens3 has an MTU of 1500");
        let named =
            [("/sys/class/net/bond0/mtu", "9000"), ("/etc/weft/weftd.toml", "[underlay]\ndevice = \"bond0\"\n")];
        assert_found(underlay, &named, Grade::Good, "leaves pods 8950");
        let table = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\nbond0\t00000000\t0100000A\t3\t0\t0\t0\t00000000\n";
        let default = [("/sys/class/net/bond0/mtu", "1300"), ("/proc/net/route", table)];
        assert_found(underlay, &default, Grade::Problem, "bond0 has an MTU of 1300");
        assert_found(underlay, &[], Grade::Warning, "no network card");
    }

    #[test]
    fn a_port_that_another_holds_is_a_problem_unless_it_is_weftd() {
        let held = "  sl  local_address rem_address\n  12: 00000000:2118 00000000:0000 07\n";
        assert_found(tunnel_port, &[("/proc/net/udp", held)], Grade::Problem, "8472");
        let left = [("/proc/net/udp", held), ("/run/weft/weftd.sock", "")];
        assert_found(tunnel_port, &left, Grade::Problem, "8472");
        let (folder, machine) = machine(&[("/proc/net/udp", held), ("/run/weft/x", "")]);
        let _weftd = std::os::unix::net::UnixListener::bind(folder.path().join("run/weft/weftd.sock")).unwrap();
        assert_eq!(tunnel_port(&machine)[0].grade, Grade::Good, "it is weftd's");
        let other = [("/proc/net/udp", held), ("/etc/weft/weftd.toml", "[underlay]\nport = 4789\n")];
        assert_found(tunnel_port, &other, Grade::Good, "4789 is free");
    }

    #[test]
    fn networks_of_others_are_found_by_their_files_and_devices() {
        assert_found(networks, &[("/etc/cni/net.d/00-multus.conf", "")], Grade::Problem, "00-multus.conf comes before");
        assert_found(networks, &[("/etc/cni/net.d/10-flannel.conflist", "")], Grade::Warning, "10-flannel.conflist");
        assert_found(networks, &[("/etc/cni/net.d/notes.txt", "")], Grade::Good, "no other network");
        let devices =
            [("/sys/class/net/cali123/mtu", ""), ("/sys/class/net/cali456/mtu", ""), ("/sys/class/net/eth0/mtu", "")];
        assert_found(others, &devices, Grade::Warning, "cali123 (Calico)");
        let theirs =
            ("/etc/containerd/config.toml", "[plugins.\"io.containerd.grpc.v1.cri\".cni]\nconf_dir = \"/etc/mine\"\n");
        assert_found(networks, &[theirs, ("/etc/mine/00-multus.conf", "")], Grade::Problem, "in /etc/mine");
        assert_found(plugin, &[("/usr/lib/cni/weft-cni", "")], Grade::Warning, "loopback");
        assert_found(plugin, &[theirs, ("/usr/lib/cni/weft-cni", "")], Grade::Warning, "not in /opt/cni/bin");
    }

    #[test]
    fn a_firewall_matters_where_packets_come_without_a_tunnel() {
        let plain = ("/etc/weft/weftd.toml", "[underlay]\nencapsulation = \"host-gw\"");
        let judged = |files: &[(&str, &str)], rules: &str| {
            let (_folder, mut machine) = machine(files);
            machine.firewall = Some(rules.to_owned());
            firewall(&machine).iter().map(|finding| finding.grade).collect::<Vec<_>>()
        };
        let policy = "\tchain FORWARD {\n\t\ttype filter hook forward priority filter; policy drop;\n";
        let invalid = "\t\tct state invalid counter drop\n";
        assert_eq!(judged(&[], policy), []);
        assert_eq!(judged(&[plain], ""), [Grade::Good]);
        assert_eq!(judged(&[plain], policy), [Grade::Warning]);
        assert_eq!(judged(&[plain], &[policy, invalid].concat()), [Grade::Warning; 2]);
        let liberal = ("/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal", "1\n");
        assert_eq!(judged(&[plain, liberal], invalid), [Grade::Good]);
    }

    #[test]
    fn the_versions_of_runc_that_refuse_tun_are_known() {
        let with = |said: &str| {
            let (_folder, mut machine) = machine(&[]);
            machine.runc = Some(said.to_owned());
            runc(&machine)
        };
        assert_eq!(with("runc version 1.2.3\ncommit: x\n")[0].grade, Grade::Warning);
        assert_eq!(with("runc version 1.2.2-0ubuntu1\n")[0].grade, Grade::Warning);
        for fine in ["runc version 1.2.4\n", "runc version 1.1.5+ds1\n", "runc version 1.2.30\n"] {
            assert_eq!(with(fine)[0].grade, Grade::Good, "{fine}");
        }
    }
}
