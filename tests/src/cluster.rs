//! A cluster built by hand: namespaces on one underlay, some with a weftd, some with whatever the test puts there.
//!
//! It is what `weft lab` does not do: nodes that are not ours, configurations of one's own, a daemon that is killed and
//! started again.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use weft_api::{Empty, Request};

use crate::command::{Background, eventually};
use crate::container::first_process;
use crate::daemon::Daemon;
use crate::machine::{binary, port, underlay_kind, unique};
use crate::netns::OwnNetns;
use crate::plugin::{Runtime, addresses};

/// The network between nodes, and a folder for files.
pub struct Cluster {
    /// What the names of its namespaces begin with.
    pub name: String,
    /// Its folder; it goes when this goes.
    pub folder: tempfile::TempDir,
    underlay: OwnNetns,
    kind: Option<String>,
    /// Of single nodes.
    kinds: BTreeMap<u8, String>,
    encapsulation: Option<&'static str>,
    is_v6: bool,
}

/// A node with a weftd.
pub struct WeftNode {
    /// Its namespace.
    pub netns: OwnNetns,
    /// Its number; its underlay address ends in it, and its ranges have it in them.
    pub number: u8,
    /// What its plugin is called with.
    pub runtime: Runtime,
    config: PathBuf,
    log: PathBuf,
    process: Started,
}

/// A weftd that was started, maybe in a container; it is killed when this goes.
struct Started(Background);

impl Started {
    fn has_ended(&mut self) -> bool {
        self.0.has_ended()
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let (outside, mut is_over) = (self.0.pid(), self.has_ended());
        // Killing what watches over a container would leave that alone.
        let inside = if is_over { outside } else { first_process(outside) };
        if inside != outside {
            let _ = Pid::from_raw(inside as i32).map(|pid| kill_process(pid, Signal::KILL));
            let deadline = Instant::now() + Duration::from_secs(10);
            while !is_over && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
                is_over = self.has_ended();
            }
        }
    }
}

impl Cluster {
    /// An underlay without nodes.
    #[track_caller]
    pub fn new(suffix: &str) -> Cluster {
        let name = unique(suffix);
        let underlay = OwnNetns::new(&format!("{name}-underlay"));
        underlay.ip("link add br0 type bridge");
        underlay.ip("link set br0 up");
        let folder = tempfile::tempdir().expect("there is a folder for temporary files");
        Cluster {
            name,
            folder,
            underlay,
            kind: underlay_kind(),
            kinds: BTreeMap::new(),
            encapsulation: None,
            is_v6: false,
        }
    }

    /// With this kind of underlay, whatever the tests' environment says.
    #[must_use]
    pub fn by(mut self, kind: &str) -> Cluster {
        self.kind = Some(kind.to_owned());
        self
    }

    /// With this kind for a node, whatever the others have.
    #[must_use]
    pub fn with(mut self, number: u8, kind: &str) -> Cluster {
        self.kinds.insert(number, kind.to_owned());
        self
    }

    /// With this encapsulation on all nodes.
    #[must_use]
    pub fn wrapping(self, encapsulation: &'static str) -> Cluster {
        Cluster { encapsulation: Some(encapsulation), ..self }
    }

    /// With an underlay by IPv6.
    #[must_use]
    pub fn over_v6(self) -> Cluster {
        Cluster { is_v6: true, ..self }
    }

    /// The underlay address of a node.
    pub fn address(&self, number: u8) -> IpAddr {
        if self.is_v6 {
            Ipv6Addr::new(0xfd00, 0x10, 0x200, 0, 0, 0, 0, number.into()).into()
        } else {
            Ipv4Addr::new(10, 200, 0, number).into()
        }
    }

    /// A `[[peers]]` section.
    pub fn peer(&self, number: u8, vtep_mac: Option<&str>) -> String {
        peer(number, vtep_mac).replace(&format!("10.200.0.{number}"), &self.address(number).to_string())
    }

    /// The underlay's own namespace.
    pub fn underlay(&self) -> &OwnNetns {
        &self.underlay
    }

    /// A namespace at the underlay with its [`Cluster::address`] on its interface `uplink`.
    #[track_caller]
    pub fn machine(&self, number: u8) -> OwnNetns {
        let netns = OwnNetns::new(&format!("{}-n{number}", self.name));
        let underlay = &self.underlay.0;
        netns.ip(&format!("link add uplink type veth peer name n{number} netns {underlay}"));
        self.underlay.ip(&format!("link set n{number} master br0 up"));
        let (address, end) = (self.address(number), if self.is_v6 { "/64 dev uplink nodad" } else { "/24 dev uplink" });
        netns.ip(&format!("address add {address}{end}"));
        netns.ip("link set uplink up");
        netns.set("net/ipv4/ip_forward", "1");
        netns.set("net/ipv6/conf/all/forwarding", "1");
        netns
    }

    /// A namespace for a pod.
    #[track_caller]
    pub fn sandbox(&self, name: &str) -> OwnNetns {
        OwnNetns::new(&format!("{}-{name}", self.name))
    }

    /// A pod of a node, with its addresses.
    #[track_caller]
    pub fn pod(&self, node: &WeftNode) -> (OwnNetns, Vec<IpAddr>) {
        let name = format!("p{}", node.number);
        let sandbox = self.sandbox(&name);
        let addresses = addresses(&node.attach(&name, &sandbox));
        (sandbox, addresses)
    }

    /// A node with a weftd. `more` is appended to its configuration: peers, limits.
    #[track_caller]
    pub fn weft_node(&self, number: u8, mode: &str, more: &str) -> WeftNode {
        self.weft_node_by(number, mode, more, "")
    }

    /// The same, with a weftd that is started by another program: `wrapper` and its arguments, which must in the end execute what
    /// follows them.
    #[track_caller]
    pub fn weft_node_by(&self, number: u8, mode: &str, more: &str, wrapper: &str) -> WeftNode {
        self.weft_node_of(number, &self.config(number, mode, more), wrapper)
    }

    /// The same with any configuration.
    #[track_caller]
    pub fn weft_node_of(&self, number: u8, text: &str, wrapper: &str) -> WeftNode {
        let node = self.weft_node_unready(number, text, wrapper);
        node.await_ready();
        node
    }

    /// A node with a weftd that has this configuration, on an uplink of that MTU.
    #[track_caller]
    pub fn weft_node_of_mtu(&self, number: u8, text: &str, mtu: u32) -> WeftNode {
        let netns = self.machine(number);
        netns.ip(&format!("link set uplink mtu {mtu}"));
        self.underlay.ip(&format!("link set n{number} mtu {mtu}"));
        let node = self.weft_node_in(netns, number, text, "");
        node.await_ready();
        node
    }

    /// A node with a weftd that has this configuration, and need not be ready.
    #[track_caller]
    pub fn weft_node_unready(&self, number: u8, text: &str, wrapper: &str) -> WeftNode {
        self.weft_node_in(self.machine(number), number, text, wrapper)
    }

    fn weft_node_in(&self, netns: OwnNetns, number: u8, text: &str, wrapper: &str) -> WeftNode {
        let file = |end: &str| self.folder.path().join(format!("n{number}.{end}"));
        let (config, log, socket, state) = (file("toml"), file("log"), file("sock"), file("state"));
        std::fs::write(&config, text).expect("the folder is writable");
        let process = start(wrapper, &netns, &config, &log);
        WeftNode { netns, number, runtime: Runtime::new(&socket, &state), config, log, process }
    }

    /// The configuration of a node that knows ranges and peers from an engine; `engine` is that table.
    pub fn config_by(&self, number: u8, mode: &str, engine: &str) -> String {
        let text = self.config(number, mode, engine);
        text.lines().filter(|line| !line.starts_with("ranges = ")).map(|line| format!("{line}\n")).collect()
    }

    /// The configuration of a node.
    pub fn config(&self, number: u8, mode: &str, more: &str) -> String {
        let folder = self.folder.path().display();
        let segment = if mode == "bridged" {
            "segment = [\"10.244.0.0/16\", \"fd00:10:244::/48\"]\ngateway = [\"10.244.0.1\", \"fd00:10:244::1\"]\n"
        } else {
            ""
        };
        let port = port().map(|port| format!("port = \"{port}\"\n")).unwrap_or_default();
        let kind = self.kinds.get(&number).or(self.kind.as_ref());
        let (address, mtu) = (self.address(number), if self.is_v6 { 1430 } else { 1450 });
        let kind = kind.map(|kind| format!("kind = \"{kind}\"\n")).unwrap_or_default();
        let wraps = self.encapsulation.map(|word| format!("encapsulation = \"{word}\"\n")).unwrap_or_default();
        format!(
            "{port}node = \"n{number}\"\nmode = \"{mode}\"\nvni = 1\nmtu = {mtu}\n\
             socket = \"{folder}/n{number}.sock\"\nstate_dir = \"{folder}/n{number}.state\"\n\
             ranges = [\"10.244.{number}.0/24\", \"fd00:10:244:{number}::/64\"]\n{segment}\
             \n[underlay]\naddress = \"{address}\"\nport = 8472\ndevice = \"uplink\"\n{kind}{wraps}\n{more}"
        )
    }
}

/// A `[[peers]]` section.
pub fn peer(number: u8, vtep_mac: Option<&str>) -> String {
    let mac = vtep_mac.map_or(String::new(), |mac| format!("vtep_mac = \"{mac}\"\n"));
    format!(
        "[[peers]]\nname = \"n{number}\"\nunderlay = \"10.200.0.{number}\"\n\
         ranges = [\"10.244.{number}.0/24\", \"fd00:10:244:{number}::/64\"]\n{mac}\n"
    )
}

fn start(wrapper: &str, netns: &OwnNetns, config: &Path, log: &Path) -> Started {
    // `exec` all the way, so that the process id is weftd's.
    let script = format!(
        "exec {wrapper} ip netns exec {} {} --config {} >>{} 2>&1",
        netns.0,
        binary("weftd").display(),
        config.display(),
        log.display()
    );
    let mut command = Command::new("sh");
    command.args(["-c", &script]);
    Started(Background::start(command))
}

impl WeftNode {
    /// Its daemon.
    pub fn daemon(&self) -> Daemon {
        Daemon { socket: self.runtime.socket.clone(), pid: first_process(self.process.0.pid()) }
    }

    /// Its underlay address.
    pub fn underlay(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 200, 0, self.number)
    }

    /// Attaches a pod: its addresses and its MAC.
    #[track_caller]
    pub fn attach(&self, container: &str, netns: &OwnNetns) -> Value {
        self.attach_with(container, netns, &Value::Null)
    }

    /// The same, with further keys in the network's configuration.
    #[track_caller]
    pub fn attach_with(&self, container: &str, netns: &OwnNetns, keys: &Value) -> Value {
        let result = self.runtime.call("ADD", container, Some(&netns.path()), keys);
        assert!(result.success, "{}\n{}", result.json, self.log());
        result.json
    }

    /// Writes another configuration and has it read. The error is the daemon's.
    pub fn reload(&self, config: &str) -> Result<Empty, weft_api::ClientError> {
        std::fs::write(&self.config, config).expect("the folder is writable");
        self.daemon().try_ask(&Request::Reload)
    }

    /// Ends the daemon with `kill -9`.
    pub fn kill(&mut self) {
        self.daemon().signal(Signal::KILL);
        eventually("a killed weftd is gone", Duration::from_secs(5), || self.process.has_ended());
    }

    /// Asks the daemon to stop, and waits for it.
    #[track_caller]
    pub fn stop(&mut self) {
        self.daemon().signal(Signal::TERM);
        eventually("weftd stops when it is asked to", Duration::from_secs(5), || self.process.has_ended());
    }

    /// Starts the daemon again.
    #[track_caller]
    pub fn start_again(&mut self) {
        self.start_unready();
        self.await_ready();
    }

    /// Starts the daemon again; it need not be ready.
    pub fn start_unready(&mut self) {
        self.process = start("", &self.netns, &self.config, &self.log);
    }

    /// What the daemon has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until its daemon can attach pods.
    #[track_caller]
    pub fn await_ready(&self) {
        let ready = || self.daemon().try_ask::<Empty>(&Request::Ready).is_ok();
        let patience = Duration::from_secs(10);
        let started = Instant::now();
        while !ready() {
            assert!(started.elapsed() < patience, "weftd of n{} is not ready:\n{}", self.number, self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
