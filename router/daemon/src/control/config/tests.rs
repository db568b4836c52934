use super::*;
use crate::control::host::Interface;

const GOOD: &str = r#"node = "n1"
mode = "routed"
ranges = ["10.244.1.0/24", "fd00:10:244:1::/64"]

[underlay]
address = "10.200.0.1"

[[peers]]
name = "n2"
underlay = "10.200.0.2"
ranges = ["10.244.2.0/24", "fd00:10:244:2::/64"]

[[peers]]
name = "n3"
underlay = "10.200.0.3"
ranges = ["10.244.3.0/24", "fd00:10:244:3::/64"]
vtep_mac = "02:00:00:00:00:03"
"#;

fn host() -> Host {
    let device = |index, name: &str, mtu, address: &str| Interface {
        index,
        name: name.to_owned(),
        mtu,
        up: true,
        addresses: vec![address.parse().unwrap()],
    };
    Host {
        interfaces: vec![device(1, "lo", 65536, "127.0.0.1"), device(2, "uplink", 1500, "10.200.0.1")],
        defaults: vec![2],
        ..Host::default()
    }
}

fn problems(text: &str) -> Vec<String> {
    match Config::read(text, &host()) {
        Ok(_) => Vec::new(),
        Err(invalid) => invalid.0.iter().map(Problem::to_string).collect(),
    }
}

/// `GOOD` with one text in place of another.
fn with(old: &str, new: &str) -> String {
    assert!(GOOD.contains(old), "{old}");
    GOOD.replacen(old, new, 1)
}

#[test]
fn the_host_port_has_a_name_or_is_left_out() {
    let named = |switch: &str| with("mode = \"routed\"", &format!("mode = \"routed\"\nhost_port = {switch}"));
    let read = |switch: &str| Config::read(&named(switch), &host()).unwrap().config.host_port;
    assert_eq!(Config::read(GOOD, &host()).unwrap().config.host_port.as_deref(), Some("weft0"));
    assert_eq!(read("true").as_deref(), Some("weft0"));
    assert_eq!(read("\"pods\"").as_deref(), Some("pods"));
    assert_eq!(read("false"), None);
    for wrong in ["\"\"", "\"a/b\"", "\"lo\"", "\"sixteencharacter\"", "\"..\"", "7"] {
        let found = problems(&named(wrong));
        assert!(found.len() == 1 && found[0].starts_with("line 3: host_port: "), "{wrong}: {found:?}");
    }
    let device = with("address = \"10.200.0.1\"", "address = \"10.200.0.1\"\ndevice = \"weft0\"");
    assert!(problems(&device).iter().any(|problem| problem.contains("weft0 is the underlay's device")));
}

#[test]
fn an_underlay_that_leaves_less_than_ipv6_demands_is_warned_of_and_one_that_leaves_too_little_refused() {
    let read = |mtu, text: &str| {
        let mut host = host();
        host.interfaces[1].mtu = mtu;
        Config::read(text, &host)
    };
    for (mtu, given) in [(1329, ""), (626, ""), (1300, "mtu = 1280\n")] {
        let Checked { config, warnings } = read(mtu, &with("[underlay]", &format!("{given}[underlay]"))).unwrap();
        assert_eq!((config.mtu, config.underlay.mtu), (1280, mtu));
        assert!(warnings.len() == 1 && warnings[0].what.contains("in fragments"), "{warnings:?}");
    }
    assert_eq!(read(1330, GOOD).unwrap().warnings, []);
    assert!(read(625, GOOD).is_err() && read(1300, &with("[underlay]", "mtu = 1281\n[underlay]")).is_err());
}

#[test]
fn a_small_file_gets_sensible_defaults() {
    let Checked { config, warnings } = Config::read(GOOD, &host()).unwrap();
    assert_eq!(warnings, []);
    assert_eq!((config.mtu, config.underlay.mtu, config.underlay.port), (1450, 1500, 8472));
    assert_eq!(config.vni.get(), 1);
    assert_eq!(config.socket.to_str(), Some("/run/weft/weftd.sock"));
    assert_eq!(config.state_dir.to_str(), Some("/var/lib/weft"));
    assert_eq!(config.gateway.ipv4.unwrap().to_string(), "10.244.1.1");
    assert_eq!(config.gateway.ipv6.unwrap().to_string(), "fd00:10:244:1::1");
    assert_eq!(config.gateway.mac, crate::control::derive::GATEWAY_MAC);
    assert_eq!(config.peers[1].vtep_mac.to_string(), "02:00:00:00:00:03");
    assert_eq!(config.limits, Limits::default());
}

#[test]
fn two_nodes_derive_the_same_vtep_mac_for_one_of_them() {
    let n1 = Config::read(GOOD, &host()).unwrap().config;
    let text = with("node = \"n1\"", "node = \"n2\"\nmtu = 1450")
        .replacen("address = \"10.200.0.1\"", "address = \"10.200.0.2\"", 1)
        .replacen("name = \"n2\"", "name = \"n1\"", 1)
        .replacen("underlay = \"10.200.0.2\"", "underlay = \"10.200.0.1\"", 1);
    let n2 = Config::read(&text, &Host::default()).unwrap().config;
    assert_eq!(n2.node, "n2");
    assert_eq!(n1.peers[0].vtep_mac, n2.vtep_mac);
    assert_eq!(n2.peers[0].vtep_mac, n1.vtep_mac);
}

#[test]
fn a_bridged_file_takes_its_gateway_from_the_segment() {
    let text = with("mode = \"routed\"", "mode = \"bridged\"\nsegment = [\"10.244.0.0/16\", \"fd00:10:244::/48\"]");
    let config = Config::read(&text, &host()).unwrap().config;
    assert_eq!(config.gateway.ipv4.unwrap().to_string(), "10.244.0.1");
    assert_eq!(config.gateway.ipv6.unwrap().to_string(), "fd00:10:244::1");
}

#[test]
fn everything_wrong_is_said_at_once_with_line_and_key() {
    let text = r#"node = ""
mode = "switched"
mtu = "big"
vin = 3
ranges = ["10.244.1.7/24", "127.0.0.0/24", 5,
  "fe80::/64"]
gateway_mac = "01:00:00:00:00:01"

[underlay]
adress = "10.200.0.1"
port = 0

[[peers]]
name = "n2"
underlay = "224.0.0.1"
ranges = ["10.244.2.0/33"]

[limits]
flows = 1

[log]
level = "loud"
format = "xml"
"#;
    assert_eq!(problems(text).join("\n") + "\n", include_str!("golden/invalid.txt"));
}

#[test]
fn a_syntax_error_has_its_line_and_hides_what_it_would_cause() {
    let all = problems("node = \"n1\"\nmode = \n");
    assert!(all.len() == 1 && all[0].starts_with("line 2: "), "{all:?}");
}

#[test]
fn what_is_not_utf8_has_its_line() {
    assert_eq!(reader::decode(GOOD.as_bytes().to_vec()).unwrap(), GOOD);
    let error = reader::decode(b"node = \"n1\"\n# f\xfcr n1\n".to_vec()).unwrap_err();
    assert!(error.to_string().starts_with("line 2: a character is not UTF-8: "), "{error}");
}

#[test]
fn each_single_fault_is_named_with_its_line_and_key() {
    let bridged = "mode = \"bridged\"\nsegment = [\"10.244.0.0/16\", \"fd00:10:244::/48\"]";
    let cases = [
        (with("node = \"n1\"\n", ""), "line 1: node: is missing: write a name for this node"),
        (with("\"n2\"", "\"n1\""), "line 9: peers[1].name: n1 is this node's name; peers are the other nodes"),
        (with("\"n3\"", "\"n2\""), "line 14: peers[2].name: n2 stands in line 9 already: each node has its own"),
        (
            with("10.200.0.3", "10.200.0.2"),
            "line 15: peers[2].underlay: 10.200.0.2 stands in line 10 already: each node has its own",
        ),
        (
            with("10.200.0.3", "10.200.0.1"),
            "line 15: peers[2].underlay: 10.200.0.1 is this node's address; peers are the other nodes",
        ),
        (
            with("10.200.0.3", "fd00::3"),
            "line 15: peers[2].underlay: fd00::3 is not of the family of underlay.address 10.200.0.1",
        ),
        (
            with("10.244.3.0/24", "10.244.1.128/25"),
            "line 16: peers[2].ranges: 10.244.1.128/25 of peer n3 overlaps 10.244.1.0/24 of this node (line 3): \
             give each its own",
        ),
        (
            with("10.244.3.0/24", "10.200.0.0/24"),
            "line 6: underlay.address: 10.200.0.1 lies in 10.200.0.0/24 (line 16), which is for pods: \
             the underlay needs addresses of its own",
        ),
        (
            with("[underlay]", "mtu = 1451\n[underlay]"),
            "line 5: mtu: 1451 needs an underlay MTU of 1501, but uplink has 1500: lower it to 1450 or remove the key",
        ),
        (with("[underlay]", "mtu = 1279\n[underlay]"), "line 5: mtu: 1279 is not from 1280 to 32700"),
        (
            with("[underlay]", "segment = [\"10.244.0.0/16\"]\n[underlay]"),
            "line 5: segment: only bridged mode has a segment: remove it, or set mode = \"bridged\"",
        ),
        (
            with("[underlay]", "gateway = [\"10.244.2.1\"]\n[underlay]"),
            "line 5: gateway: 10.244.2.1 is not a usable address of this node's ranges",
        ),
        (
            with("[underlay]", "gateway = [\"10.244.1.255\"]\n[underlay]"),
            "line 5: gateway: 10.244.1.255 is not a usable address of this node's ranges",
        ),
        (
            with("mode = \"routed\"", "mode = \"bridged\""),
            "line 1: segment: is missing: bridged mode needs the on-link prefixes of all nodes together",
        ),
        (
            with("mode = \"routed\"", bridged).replace("10.244.3.0/24", "10.245.3.0/24"),
            "line 17: peers[2].ranges: 10.245.3.0/24 is not inside the segment: add it there, or change the range",
        ),
        (
            with("02:00:00:00:00:03", "02:77:65:66:74:01"),
            "line 17: peers[2].vtep_mac: 02:77:65:66:74:01 is the gateway's MAC, which never leaves a node: \
             choose another",
        ),
        (
            with("address = \"10.200.0.1\"", "address = \"10.200.0.1\"\ndevice = \"lo\""),
            "line 7: underlay.device: 10.200.0.1 is an address of uplink, not of lo",
        ),
        (
            with("[underlay]", "socket = \"weftd.sock\"\n[underlay]"),
            "line 5: socket: \"weftd.sock\" is not absolute: begin the path with '/'",
        ),
    ];
    for (text, expected) in cases {
        let all = problems(&text);
        assert!(all.iter().any(|problem| problem == expected), "expected {expected}\nin {all:#?}");
        // One fault may be seen from several places, but never under another name.
        let all_alike = all.iter().all(|problem| problem.contains("lies in"));
        assert!(all.len() == 1 || all_alike, "{all:#?}");
    }
}

const BY_ETCD: &str = "node = \"n1\"\nmode = \"routed\"\n[etcd]\nendpoints = [\"https://10.0.0.9:2379\"]\n\
                       network = [\"10.244.0.0/16\", \"fd00:10:244::/48\"]\n";

#[test]
fn by_etcd_a_node_needs_no_ranges_and_has_the_machines_main_address() {
    let config = Config::read(BY_ETCD, &host()).unwrap().config;
    assert_eq!(config.underlay.address.to_string(), "10.200.0.1");
    assert_eq!((config.ranges.len(), config.gateway.ipv4, config.mtu), (0, None, 1450));
    let source::SourceConfig::Etcd(etcd) = &config.source else { panic!("it is etcd") };
    assert_eq!((etcd.prefix.as_str(), etcd.lease, etcd.rest, etcd.network.slots()), ("/weft", 60, 3600, 256));
    let nowhere = Config::read(BY_ETCD, &Host::default()).unwrap_err().to_string();
    assert!(nowhere.contains("underlay.address: is missing, and this machine has no main address"), "{nowhere}");
}

/// The machine with these addresses beside each other on the interface that the default route leads to.
fn machine(addresses: &[&str], mtu: u32) -> Host {
    let addresses: Vec<std::net::IpAddr> = addresses.iter().map(|address| address.parse().unwrap()).collect();
    let subnets = addresses.iter().map(|address| ipnet::IpNet::new(*address, 24).unwrap()).collect();
    let interface = Interface { index: 2, name: "eth0".into(), mtu, up: true, addresses };
    Host { interfaces: vec![interface], defaults: vec![2], subnets, ..Host::default() }
}

#[test]
fn the_address_of_a_node_stays_while_the_machine_has_it_and_follows_what_is_said() {
    let config = Config::read(BY_ETCD, &host()).unwrap().config;
    let on = |addresses: &[&str], said: Option<&str>| {
        let said = said.map(|said| said.parse().unwrap());
        config.address_on(&machine(addresses, 1500), said).to_string()
    };
    assert_eq!(on(&["10.200.0.9", "10.200.0.1"], None), "10.200.0.1", "it has it still");
    assert_eq!(on(&["10.200.0.9"], None), "10.200.0.9");
    assert_eq!(on(&[], None), "10.200.0.1", "it waits for it");
    assert_eq!(on(&["127.0.0.1", "169.254.7.7", "fd00::9"], None), "10.200.0.1", "none of those is one");
    assert_eq!(on(&["10.200.0.1", "10.200.0.9"], Some("10.200.0.9")), "10.200.0.9");
    assert_eq!(on(&["10.200.0.1"], Some("10.200.0.9")), "10.200.0.1", "not before it has it");
    assert_eq!(on(&["10.200.0.8"], Some("10.200.0.9")), "10.200.0.1", "that is not the one");
    let given = Config::read(GOOD, &host()).unwrap().config;
    assert_eq!(given.address_on(&machine(&["10.200.0.9"], 1500), None).to_string(), "10.200.0.1", "the file says it");
}

#[test]
fn what_belongs_to_an_address_changes_with_it() {
    let config = Config::read(BY_ETCD, &host()).unwrap().config;
    let moved = config.seen_on(&machine(&["10.201.0.9"], 9000), "10.201.0.9".parse().unwrap());
    assert_eq!((moved.mtu, moved.underlay.mtu), (8950, 9000));
    assert_eq!(moved.underlay.subnet.unwrap().to_string(), "10.201.0.0/24");
    assert_eq!(moved.vtep_mac, crate::control::derive::vtep_mac(&config.node, moved.underlay.address));
    let seen = |config: &Config, mtu| config.seen_on(&machine(&["10.201.0.9"], mtu), moved.underlay.address);
    let narrow = seen(&moved, 1280);
    assert_eq!((narrow.mtu, seen(&narrow, 1500).mtu), (1280, 1450), "IPv6 needs 1280, whatever the device has");
    let away = moved.seen_on(&machine(&[], 1500), moved.underlay.address);
    assert_eq!(away, moved, "what is not there says nothing");
    assert!(config.fixed_differences(&moved).is_empty());
}

#[test]
fn each_fault_in_what_is_said_about_etcd_is_named() {
    for (old, new, expected) in [
        ("https://10.0.0.9:2379", "10.0.0.9", "line 4: etcd.endpoints: \"10.0.0.9\" is no server"),
        ("endpoints = [\"https://10.0.0.9:2379\"]\n", "", "line 3: etcd.endpoints: is missing"),
        ("\"10.244.0.0/16\", \"fd00:10:244::/48\"", "", "line 3: etcd.network: is missing"),
        ("fd00:10:244::/48", "10.245.0.0/16", "line 5: etcd.network: is the second prefix of its family"),
        ("10.244.0.0/16", "10.244.0.0/24", "line 5: etcd.network: 10.244.0.0/24 cannot be cut into parts of /24"),
        (
            "10.244.0.0/16",
            "10.200.0.0/16",
            "line 5: etcd.network: 10.200.0.0/16 has this machine's address 10.200.0.1 in it",
        ),
        ("[etcd]", "ranges = [\"10.9.0.0/24\"]\n[etcd]", "line 3: ranges: stands here, but etcd says who has what"),
        ("[etcd]", "gateway = [\"10.244.0.1\"]\n[etcd]", "line 3: gateway: stands here, but etcd says who has what"),
        ("[etcd]", "[etcd]\nuser = \"weft\"", "line 3: etcd.user: and password_file come together"),
        ("[etcd]", "[etcd]\nkey = \"/k\"", "line 3: etcd.certificate: and key come together"),
        ("[etcd]", "[etcd]\nca = \"ca.pem\"", "line 4: etcd.ca: \"ca.pem\" is not absolute"),
        ("[etcd]", "[etcd]\nprefix = \"weft/\"", "line 4: etcd.prefix: \"weft/\" is no prefix of keys"),
        ("[etcd]", "[etcd]\nlease = 1", "line 4: etcd.lease: must be a whole number from 2 to 86400"),
    ] {
        let text = BY_ETCD.replacen(old, new, 1);
        let said = problems(&text).join("\n");
        assert!(said.contains(expected), "expected {expected}\nin {said}");
    }
}

#[test]
fn an_address_that_this_machine_does_not_have_is_a_warning_and_the_usual_mtu_is_assumed() {
    let elsewhere = Host::default();
    let early = Config::read(GOOD, &elsewhere).unwrap();
    assert_eq!((early.config.mtu, early.config.underlay.mtu, early.warnings.len()), (1450, 1500, 1));
    let checked = Config::read(&with("[underlay]", "mtu = 1450\n[underlay]"), &elsewhere).unwrap();
    assert_eq!(checked.config.underlay.mtu, 1500);
    assert_eq!(checked.warnings.len(), 1);
    assert!(checked.warnings[0].to_string().starts_with("line 7: underlay.address: 10.200.0.1 is not an address of"));
}

#[test]
fn an_ipv6_underlay_costs_twenty_bytes_more() {
    let mut host = host();
    host.interfaces[1].addresses = vec!["fd01::1".parse().unwrap()];
    let text = GOOD.replace("10.200.0.", "fd01::");
    assert_eq!(Config::read(&text, &host).unwrap().config.mtu, 1430);
}

#[test]
fn what_cannot_change_while_running_is_named() {
    let old = Config::read(GOOD, &host()).unwrap().config;
    let free = with("\"n3\"", "\"n4\"").replace("[underlay]", "mtu = 1400\n[log]\nlevel = \"debug\"\n[underlay]");
    let free = Config::read(&free, &host()).unwrap().config;
    assert_eq!(old.fixed_differences(&free), Vec::<&str>::new());
    let text = with("node = \"n1\"", "node = \"n9\"\nworkers = 2\nvni = 2\nsocket = \"/s\"\nstate_dir = \"/d\"")
        .replace("address = \"10.200.0.1\"", "address = \"10.200.0.1\"\nport = 4789");
    let fixed = Config::read(&text, &host()).unwrap().config;
    assert_eq!(
        old.fixed_differences(&fixed),
        ["node", "workers", "vni", "socket", "state_dir", "vtep_mac", "underlay.port"]
    );
}

#[test]
fn what_is_never_given_is_written_as_address_or_prefix() {
    let leases = |text: &str| with("[underlay]", &format!("[leases]\n{text}\n[underlay]"));
    let config =
        Config::read(&leases("rest = 0\nreserved = [\"10.244.1.9\", \"fd00::1\", \"10.244.1.17/28\"]"), &host());
    let read = config.unwrap().config.leases;
    assert_eq!(
        read.reserved.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.244.1.9/32", "fd00::1/128", "10.244.1.16/28"]
    );
    assert_eq!(read.rest, 0);
    for wrong in ["rest = 86401", "rest = -1", "reserved = [\"10.244.1\"]", "boot_id = \"boot\"", "resting = 3"] {
        assert_eq!(problems(&leases(wrong)).len(), 1, "{wrong}");
    }
}

#[test]
fn workers_are_counted_or_follow_from_the_cpus() {
    assert_eq!(Config::read(GOOD, &host()).unwrap().config.workers, None);
    let text = |count: &str| with("node = \"n1\"", &format!("node = \"n1\"\nworkers = {count}"));
    assert_eq!(Config::read(&text("64"), &host()).unwrap().config.workers, Some(64));
    for wrong in ["0", "65", "-1", "\"two\""] {
        assert_eq!(problems(&text(wrong)), ["line 2: workers: must be a whole number from 1 to 64"]);
    }
    let defaults = [1, 2, 3, 4, 7, 8, 31, 32, 33, 1000].map(default_workers);
    assert_eq!(defaults, [1, 1, 1, 1, 1, 2, 7, 8, 8, 8]);
}

#[test]
fn no_input_panics() {
    for end in 0..GOOD.len() {
        let _ = Config::read(&GOOD[..end], &host());
    }
    let endless = "[".repeat(100_000);
    for text in ["", "\0", "=", "[[peers]]", "peers = 1", "underlay = []", "ranges = [[]]", endless.as_str()] {
        assert!(Config::read(text, &host()).is_err());
    }
}

#[test]
fn nodes_of_a_kubernetes_cluster_can_share_one_file() {
    let read =
        |text: &str, host: &Host| Config::read(text, host).map(|checked| checked.config).map_err(|why| why.to_string());
    let shared = "mode = \"routed\"\n[kubernetes]\n";
    let named = Host { node_name: Some("n7".into()), node_address: Some("10.200.0.1".parse().unwrap()), ..host() };
    let config = read(shared, &named).unwrap();
    assert_eq!((config.node.as_str(), config.underlay.address.to_string().as_str()), ("n7", "10.200.0.1"));
    assert!(!config.underlay.is_given && config.ranges.is_empty());
    assert_eq!(config.source.to_string(), "kubernetes, as the environment says");
    let own = read(&format!("node = \"n8\"\n{shared}[underlay]\naddress = \"10.200.0.1\"\n"), &named).unwrap();
    assert!(own.node == "n8" && own.underlay.is_given);
    let said = read(shared, &host()).unwrap_err();
    assert!(said.contains("set NODE_NAME"), "{said}");
    let cases = [
        ("servers = [\"10.0.0.1\"]", "kubernetes.servers"),
        ("context = \"c\"", "is a part of a kubeconfig"),
        ("kubeconfig = \"config\"", "is not absolute"),
        ("kubeconfig = \"/a\"\nca = \"/b\"", "the kubeconfig says it, too"),
        ("certificate = \"/a\"", "come together"),
        ("idle = 0", "idle"),
        ("[etcd]\nendpoints = [\"http://a:1\"]\nnetwork = [\"10.244.0.0/16\"]", "a cluster has one source"),
    ];
    for (text, why) in cases {
        let said = read(&format!("{shared}{text}\n"), &named).unwrap_err();
        assert!(said.contains(why), "{text}: {said}");
    }
    let beside = read(&format!("ranges = [\"10.244.1.0/24\"]\n{shared}"), &named).unwrap_err();
    assert!(beside.contains("kubernetes says who has what"), "{beside}");
}
