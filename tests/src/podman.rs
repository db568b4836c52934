//! Podman on a [`Host`], with its CNI backend.
//!
//! Cgroups are left out, for what a machine allows there differs, and they are no business of a network's.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use serde_json::Value;

use crate::command::{Said, eventually, run_with};
use crate::host::Host;
use crate::image::{self, IMAGE};
use crate::machine::need;

/// What it takes, and the Debian packages.
pub const PROGRAMS: [(&str, &str); 5] = [
    ("podman", "podman"),
    ("crun", "crun"),
    ("conmon", "conmon"),
    ("busybox", "busybox-static"),
    ("/usr/lib/cni/portmap", "containernetworking-plugins"),
];

const PATIENCE: Duration = Duration::from_secs(60);

const CONTAINERS: &str = r#"
[containers]
cgroups = "disabled"
[network]
network_backend = "cni"
default_network = "weft"
cni_plugin_dirs = ["/opt/cni/bin"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "crun"
"#;

const STORAGE: &str = r#"
[storage]
driver = "vfs"
runroot = "/run/containers/storage"
graphroot = "/var/lib/containers/storage"
"#;

/// Podman of a host.
#[derive(Clone, Copy)]
pub struct Podman<'a>(&'a Host<'a>);

impl<'a> Podman<'a> {
    /// Configures it, with `weft` as the network of containers that name none, and loads the image.
    #[track_caller]
    pub fn new(host: &'a Host<'a>) -> Podman<'a> {
        need(&PROGRAMS);
        host.write("/etc/containers/containers.conf", CONTAINERS);
        host.write("/etc/containers/storage.conf", STORAGE);
        let archive = host.disk().join("image.tar");
        image::write(&archive);
        let podman = Podman(host);
        podman.call(&["load", "--quiet", "--input", "/run/test/disk/image.tar"]).must();
        podman
    }

    /// The same, where it was configured before.
    pub fn again(host: &'a Host<'a>) -> Podman<'a> {
        Podman(host)
    }

    /// Calls it.
    #[track_caller]
    pub fn call(&self, args: &[&str]) -> Said {
        let mut command = self.0.command("podman");
        command.args(args);
        run_with(command, &[], PATIENCE)
    }

    /// Starts a container that serves its own name by HTTP, and answers when it does.
    #[track_caller]
    pub fn serve(&self, name: &str, options: &[&str]) -> Container<'a> {
        let server = format!("echo {name} >/www/index.html; exec httpd -f -p 80 -h /www");
        let start = ["run", "--detach", "--name", name];
        self.call(&[&start[..], options, &[IMAGE, "sh", "-c", &server]].concat()).must();
        let container = self.container(name);
        container.await_server();
        container
    }

    /// A container that is there.
    pub fn container(&self, name: &str) -> Container<'a> {
        Container { podman: *self, name: name.to_owned() }
    }
}

/// A container.
pub struct Container<'a> {
    podman: Podman<'a>,
    /// Its name.
    pub name: String,
}

impl Container<'_> {
    /// What Podman knows of it.
    #[track_caller]
    pub fn inspect(&self) -> Value {
        let said = self.podman.call(&["inspect", &self.name]).must();
        let mut all: Vec<Value> = serde_json::from_str(&said).expect("podman inspect prints JSON");
        all.pop().expect("it is there")
    }

    /// Its attachment to a network, as Podman tells it.
    #[track_caller]
    pub fn network(&self, network: &str) -> Value {
        self.inspect()["NetworkSettings"]["Networks"][network].clone()
    }

    /// Its addresses in a network, IPv4 first.
    #[track_caller]
    pub fn addresses(&self, network: &str) -> [IpAddr; 2] {
        let attached = self.network(network);
        ["IPAddress", "GlobalIPv6Address"].map(|key| {
            let address = attached[key].as_str().and_then(|text| text.parse().ok());
            address.unwrap_or_else(|| panic!("no {key} in {attached}"))
        })
    }

    /// Runs a command line in it.
    #[track_caller]
    pub fn exec(&self, line: &str) -> Said {
        let words: Vec<&str> = line.split_whitespace().collect();
        self.podman.call(&[&["exec", &self.name][..], &words].concat())
    }

    /// What a web server says, asked from inside.
    #[track_caller]
    pub fn fetch(&self, address: IpAddr, port: u16) -> String {
        self.exec(&format!("fetch {address} {port}")).out.trim().to_owned()
    }

    /// Waits until its web server, which says its name, is there.
    #[track_caller]
    pub fn await_server(&self) {
        let serves = || self.fetch(IpAddr::V4(Ipv4Addr::LOCALHOST), 80) == self.name;
        eventually("a container's web server is there", PATIENCE, serves);
    }

    /// Calls Podman about it: `stop`, `start`, `rm`.
    #[track_caller]
    pub fn call(&self, command: &[&str]) -> Said {
        self.podman.call(&[command, &[&self.name]].concat())
    }
}
