//! The real `weftd` in a namespace of its own, and what its tests ask of it.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use weft_api::{Attach, Attached, AttachmentKey, Client, ClientError, Request};

pub const PATIENCE: Duration = Duration::from_secs(20);

/// Namespaces, a daemon and its files; all of them go when this does, whatever happened.
pub struct Lab {
    pub name: String,
    pub folder: tempfile::TempDir,
    pub namespaces: Vec<String>,
    pub underlay: &'static str,
    pub daemon: Option<Child>,
}

impl Lab {
    pub fn new(name: &str) -> Lab {
        assert!(
            rustix::process::geteuid().is_root(),
            "this test makes network namespaces: run it as root, e.g. sudo -E cargo test -p weft-daemon"
        );
        let name = format!("weft-t{}-{name}", std::process::id());
        Lab { name, folder: tempfile::tempdir().unwrap(), namespaces: Vec::new(), underlay: "10.200.0.1", daemon: None }
    }

    /// A node namespace with an underlay device, and a daemon in it.
    pub fn with_daemon(name: &str, config: &str) -> Lab {
        let mut lab = Lab::new(name);
        let node = lab.namespace("n");
        run(&["ip", "-n", &node, "link", "set", "lo", "up"]);
        // Nothing answers on the other end: what counts here is an address and an MTU.
        run(&["ip", "-n", &node, "link", "add", "uplink", "type", "veth", "peer", "name", "uplink-end"]);
        run(&["ip", "-n", &node, "addr", "add", "10.200.0.1/24", "dev", "uplink"]);
        run(&["ip", "-n", &node, "link", "set", "uplink", "up"]);
        run(&["ip", "-n", &node, "link", "set", "uplink-end", "up"]);
        lab.configure(config);
        lab.start();
        lab
    }

    /// Two nodes with a wire between them.
    pub fn pair(name: &str, configs: [&str; 2]) -> [Lab; 2] {
        let mut labs = [Lab::new(&format!("{name}1")), Lab::new(&format!("{name}2"))];
        let nodes: Vec<String> = labs.iter_mut().map(|lab| lab.namespace("n")).collect();
        let link = ["ip", "link", "add", "uplink", "netns", &nodes[0]];
        run(&[&link[..], &["type", "veth", "peer", "name", "uplink", "netns", &nodes[1]]].concat());
        for (lab, (config, address)) in labs.iter_mut().zip(configs.into_iter().zip(["10.200.0.1", "10.200.0.2"])) {
            let node = lab.namespaces[0].clone();
            lab.underlay = address;
            run(&["ip", "-n", &node, "addr", "add", &format!("{address}/24"), "dev", "uplink"]);
            run(&["ip", "-n", &node, "link", "set", "uplink", "up"]);
            lab.configure(config);
        }
        for lab in &mut labs {
            lab.start();
        }
        labs
    }

    pub fn namespace(&mut self, name: &str) -> String {
        let name = format!("{}-{name}", self.name);
        run(&["ip", "netns", "add", &name]);
        // As a node of a cluster has it; to a pod it makes no difference.
        let forward = "echo 1 | tee /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding >/dev/null";
        run(&["ip", "netns", "exec", &name, "sh", "-c", forward]);
        self.namespaces.push(name.clone());
        name
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn configure(&self, more: &str) {
        let text = format!(
            "node = \"n1\"\nsocket = {:?}\nstate_dir = {:?}\n{more}\n[underlay]\naddress = \"{}\"\n",
            self.path("run/weftd.sock"),
            self.path("state"),
            self.underlay
        );
        fs::write(self.path("weftd.toml"), text).unwrap();
    }

    pub fn start(&mut self) {
        self.spawn();
        self.wait_until_ready();
    }

    pub fn spawn(&mut self) {
        let log = File::create(self.path("log")).unwrap();
        let daemon = Command::new("ip")
            .args(["netns", "exec", &self.namespaces[0], env!("CARGO_BIN_EXE_weftd"), "--config"])
            .arg(self.path("weftd.toml"))
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.daemon = Some(daemon);
    }

    pub fn wait_until_ready(&self) {
        let ready = until(|| Client::connect(&self.path("run/weftd.sock"), PATIENCE).is_ok());
        assert!(ready, "weftd did not start:\n{}", self.log());
    }

    pub fn signal(&mut self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(self.daemon.as_ref().unwrap());
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub fn stop(&mut self) -> Option<i32> {
        self.signal(rustix::process::Signal::TERM);
        self.daemon.take().unwrap().wait().unwrap().code()
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.path("run/weftd.sock"), PATIENCE).unwrap()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub fn add(&self, namespace: &str, request: Attach) -> Result<Attached, ClientError> {
        self.client().call_with_fd(&Request::Add(request), open(namespace).as_fd())
    }

    pub fn call<T: serde::de::DeserializeOwned>(&self, request: Request) -> T {
        self.client().call(&request).unwrap_or_else(|error| panic!("{request:?}: {error}\n{}", self.log()))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        for namespace in &self.namespaces {
            let _ = Command::new("ip").args(["netns", "del", namespace]).stderr(Stdio::null()).status();
        }
        if std::thread::panicking() {
            eprintln!("log of weftd:\n{}", self.log());
        }
    }
}

pub fn open(namespace: &str) -> File {
    File::open(Path::new("/run/netns").join(namespace)).unwrap()
}

pub fn output(command: &[&str]) -> (bool, String) {
    let output = Command::new(command[0]).args(&command[1..]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

pub fn run(command: &[&str]) -> String {
    let (success, text) = output(command);
    assert!(success, "{command:?}: {text}");
    text
}

pub fn until(holds: impl FnMut() -> bool) -> bool {
    until_seconds(PATIENCE.as_secs(), holds)
}

pub fn until_seconds(seconds: u64, mut holds: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        if holds() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    false
}

pub fn key(container: &str) -> AttachmentKey {
    AttachmentKey { network: "pods".into(), container: container.into(), ifname: "eth0".into() }
}

pub fn attach(container: &str) -> Attach {
    Attach {
        key: key(container),
        netns: "/run/netns/test".into(),
        requested: Vec::new(),
        ranges: Vec::new(),
        mac: None,
        mtu: None,
        port: None,
        bandwidth: None,
        given: Vec::new(),
        routes: None,
        trusted: Vec::new(),
        labels: std::collections::BTreeMap::new(),
    }
}

pub fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> u32 {
    match result {
        Err(ClientError::Refused(failure)) => failure.code,
        other => panic!("not refused: {other:?}"),
    }
}

pub const ROUTED: &str = "mode = \"routed\"\nranges = [\"10.244.1.0/24\", \"fd00:10:244:1::/64\"]";

/// The devices in the daemon's namespace that weftd makes for a moment.
pub fn left_over_devices(lab: &Lab) -> bool {
    run(&["ip", "-n", &lab.namespaces[0], "-o", "link"])
        .lines()
        .any(|line| line.contains(": weft") && !line.contains(": weft0:"))
}
