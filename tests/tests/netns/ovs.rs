//! Open vSwitch's userspace datapath as the other node, for the formats of which this kernel has no device: Geneve, and GRE with either
//! payload.
//!
//! With Ethernet inside it is a switch, and its pod a part of our segment. With IP inside its port is a layer 3 one (`legacy_l3`), for which
//! it makes Ethernet headers itself; two flows say where such packets go.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use weft_tests::cluster::{Cluster, WeftNode};
use weft_tests::command::{Background, eventually, run};
use weft_tests::machine::{need, turn};
use weft_tests::netns::OwnNetns;
use weft_tests::{plugin, traffic};

const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";
const GATEWAY: &str = "02:00:00:00:02:01";
const POD: &str = "02:00:00:00:02:02";

/// Node 2: Open vSwitch with one pod.
struct Ovs {
    netns: OwnNetns,
    pod: OwnNetns,
    folder: PathBuf,
    programs: Vec<Background>,
}

impl Ovs {
    fn start(cluster: &Cluster, mtu: u32) -> Ovs {
        need(&[("ovs-vswitchd", "openvswitch-switch"), ("ovs-ofctl", "openvswitch-switch")]);
        let (netns, pod) = (cluster.machine(2), cluster.sandbox("p2"));
        let folder = cluster.folder.path().join("ovs");
        std::fs::create_dir(&folder).unwrap();
        let mut ovs = Ovs { netns, pod, folder, programs: Vec::new() };
        let database = ovs.file("conf.db");
        run(ovs.command("ovsdb-tool", &["create", &database, SCHEMA])).must();
        let socket = format!("--remote=punix:{}", ovs.file("db.sock"));
        ovs.background("ovsdb-server", &[&database, &socket, "--no-chdir"]);
        eventually("ovsdb-server listens", Duration::from_secs(10), || ovs.folder.join("db.sock").exists());
        ovs.vsctl("--no-wait init");
        let remote = format!("unix:{}", ovs.file("db.sock"));
        ovs.background("ovs-vswitchd", &[&remote, "--no-chdir"]);
        let host = &ovs.netns;
        host.ip(&format!("link add p1 mtu {mtu} type veth peer name eth0 mtu {mtu} address {POD} netns {}", ovs.pod.0));
        host.ip("link set p1 up");
        for (netns, device) in [(&*ovs.pod, "eth0"), (&*ovs.netns, "uplink")] {
            // It takes neither superframes nor checksums that are not there yet.
            netns.exec(&format!("ethtool -K {device} tx off tso off gso off gro off tx-udp-segmentation off"));
        }
        ovs.pod.ip("link set eth0 up");
        for bridge in ["br-int", "br-phy"] {
            ovs.vsctl(&format!("add-br {bridge} -- set Bridge {bridge} datapath_type=netdev"));
        }
        ovs.vsctl("add-port br-int p1 -- add-port br-phy uplink");
        ovs
    }

    fn file(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = self.netns.command(program);
        for name in ["OVS_RUNDIR", "OVS_DBDIR", "OVS_LOGDIR", "OVS_SYSCONFDIR"] {
            command.env(name, &self.folder);
        }
        command.args(args);
        command
    }

    fn background(&mut self, program: &str, args: &[&str]) {
        let unixctl = format!("--unixctl={}", self.file(&format!("{program}.ctl")));
        let mut command = self.command(program, args);
        command.args(["-vsyslog:off", "-vfile:off", "-vconsole:emer", &unixctl]);
        self.programs.push(Background::start(command));
    }

    fn vsctl(&self, line: &str) {
        let db = format!("--db=unix:{}", self.file("db.sock"));
        let args: Vec<&str> = ["--timeout=10", &db].into_iter().chain(line.split_whitespace()).collect();
        run(self.command("ovs-vsctl", &args)).must();
    }

    fn flow(&self, flow: &str) {
        run(self.command("ovs-ofctl", &["add-flow", "br-int", flow])).must();
    }

    /// Gives it the underlay address that the uplink had, and a tunnel to node 1.
    fn connect(&self, cluster: &Cluster, settings: &str) {
        let (local, remote) = (cluster.address(2), cluster.address(1));
        let (len, nodad) = if local.is_ipv4() { (24, "") } else { (64, " nodad") };
        self.netns.ip("address flush dev uplink");
        self.netns.ip("link set br-phy mtu 1500 up");
        self.netns.ip(&format!("address add {local}/{len} dev br-phy{nodad}"));
        self.vsctl(&format!("add-port br-int tun -- set Interface tun {settings} options:remote_ip={remote}"));
    }
}

/// A node of ours with a pod, and Open vSwitch with one.
struct Pair {
    ovs: Ovs,
    node: WeftNode,
    pod: OwnNetns,
    ours: Vec<IpAddr>,
}

fn pair(cluster: &Cluster, mode: &str, format: &str, settings: &str, mtu: u32) -> Pair {
    let text = cluster.config(1, mode, &cluster.peer(2, None));
    let text = text.replace("device = \"uplink\"\n", &format!("device = \"uplink\"\nencapsulation = \"{format}\"\n"));
    let text =
        text.replace("mtu = 1450\n", &format!("mtu = {mtu}\n")).replace("mtu = 1430\n", &format!("mtu = {mtu}\n"));
    let node = cluster.weft_node_of(1, &text, "");
    // It drops datagrams whose checksum is left to the device.
    node.netns.exec("ethtool -K uplink tx off").must();
    let ovs = Ovs::start(cluster, mtu);
    ovs.connect(cluster, settings);
    let pod = cluster.sandbox("p1");
    let ours = plugin::addresses(&node.attach("pod", &pod));
    Pair { ovs, node, pod, ours }
}

const THEIRS: [&str; 2] = ["10.244.2.2", "fd00:10:244:2::2"];

impl Pair {
    /// Pings, streams, datagrams in fragments, both ways.
    fn everything_passes(&self) {
        let theirs: Vec<IpAddr> = THEIRS.iter().map(|address| address.parse().unwrap()).collect();
        let (here, there) = (&self.pod, &self.ovs.pod);
        for (from, to, addresses) in [(here, there, &theirs), (there, here, &self.ours)] {
            for address in addresses {
                traffic::await_answer(from, *address);
                traffic::transfer(from, to, *address, 2 << 20);
                traffic::echo_datagrams(from, to, *address, &[1, 1000, 1400, 5000, 20_000]);
            }
        }
        self.node.daemon().assert_conserved();
        let drops = self.node.daemon().all_drops();
        let tunnel: Vec<_> = drops.keys().filter(|reason| reason.starts_with("Tunnel")).collect();
        assert!(tunnel.is_empty(), "{drops:?}");
    }
}

/// One segment over both nodes.
fn a_switch(cluster: &Cluster, format: &str, settings: &str, mtu: u32) {
    let pair = pair(cluster, "bridged", format, settings, mtu);
    pair.ovs.pod.ip("address add 10.244.2.2/16 dev eth0");
    pair.ovs.pod.ip("-6 address add fd00:10:244:2::2/48 dev eth0 nodad");
    pair.everything_passes();
}

#[test]
fn geneve_with_open_vswitch_over_ipv4_and_ipv6() {
    let _turn = turn();
    a_switch(&Cluster::new("og"), "geneve", "type=geneve options:key=1", 1450);
    a_switch(&Cluster::new("og6").over_v6(), "geneve", "type=geneve options:key=1", 1430);
}

#[test]
fn gre_with_ethernet_with_open_vswitch_with_checksum_and_key_too() {
    let _turn = turn();
    a_switch(&Cluster::new("oe"), "gretap", "type=gre", 1462);
    a_switch(&Cluster::new("ok"), "gre", "type=gre options:csum=true options:out_key=1", 1454);
}

#[test]
fn gre_with_ip_with_open_vswitch() {
    let _turn = turn();
    let cluster = Cluster::new("oi");
    let pair = pair(&cluster, "routed", "gre", "type=gre options:packet_type=legacy_l3", 1476);
    let ovs = &pair.ovs;
    // Its pod's neighbour is nobody: the frame's destination is dropped with the header.
    ovs.pod.ip("address add 10.244.2.2/24 dev eth0");
    ovs.pod.ip("-6 address add fd00:10:244:2::2/64 dev eth0 nodad");
    for (gateway, family) in [("10.244.2.1", "-4"), ("fd00:10:244:2::1", "-6")] {
        ovs.pod.ip(&format!("neigh add {gateway} lladdr {GATEWAY} dev eth0 nud permanent"));
        ovs.pod.ip(&format!("{family} route add default via {gateway}"));
    }
    for kind in ["ip", "ipv6"] {
        ovs.flow(&format!("priority=10,in_port=p1,{kind},dl_dst={GATEWAY},actions=output:tun"));
        ovs.flow(&format!("priority=10,in_port=tun,{kind},actions=mod_dl_src:{GATEWAY},mod_dl_dst:{POD},output:p1"));
    }
    pair.everything_passes();
}
