//! containerd on a [`Host`], asked as kubelet asks it.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::command::eventually;
use crate::cri::*;
use crate::host::{Host, Service};
use crate::image::{self, IMAGE};
use crate::machine::need;

/// What it takes, and the Debian packages.
pub const PROGRAMS: [(&str, &str); 6] = [
    ("containerd", "containerd"),
    ("ctr", "containerd"),
    ("runc", "runc"),
    ("busybox", "busybox-static"),
    ("iptables", "iptables"),
    ("/usr/lib/cni/portmap", "containernetworking-plugins"),
];

const PATIENCE: Duration = Duration::from_secs(60);

/// Cgroups and the killer of processes are not this test's, and not the same on all machines.
const CONFIG: &str = r#"
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "localhost/weft-box:latest"
disable_cgroup = true
disable_apparmor = true
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/opt/cni/bin"
conf_dir = "/etc/cni/net.d"
"#;

/// containerd of a host.
pub struct Containerd {
    socket: PathBuf,
    service: Service,
}

impl Containerd {
    /// Configures and starts it, and loads the image.
    #[track_caller]
    pub fn new(host: &Host) -> Containerd {
        need(&PROGRAMS);
        host.write("/etc/containerd/config.toml", CONFIG);
        image::write(&host.disk().join("image.tar"));
        let containerd = Containerd::start(host);
        host.sh("ctr --namespace k8s.io images import /run/test/disk/image.tar");
        containerd
    }

    /// Starts it with what is on the disk.
    #[track_caller]
    pub fn start(host: &Host) -> Containerd {
        let service = host.start("containerd", &["containerd"]);
        let containerd = Containerd { socket: host.path("/run/containerd/containerd.sock"), service };
        let started = std::time::Instant::now();
        while let Err(error) = containerd.conditions() {
            let log = || host.log("containerd");
            assert!(started.elapsed() < PATIENCE, "containerd is not ready: {error}\n{}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
        containerd
    }

    /// Ends it, and no container with it.
    #[track_caller]
    pub fn end(self, signal: Signal) {
        self.service.end(signal);
    }

    /// Whether it thinks that there is a network for pods.
    #[track_caller]
    pub fn is_network_ready(&self) -> bool {
        let conditions = self.conditions().expect("containerd runs");
        let condition = conditions.into_iter().find(|condition| condition.r#type == "NetworkReady");
        condition.expect("there is such a condition").status
    }

    fn conditions(&self) -> Result<Vec<RuntimeCondition>, String> {
        let answer: StatusResponse = call(&self.socket, "Status", StatusRequest { verbose: false })?;
        Ok(answer.status.unwrap_or_default().conditions)
    }

    /// A pod with one container that serves its own name by HTTP.
    #[track_caller]
    pub fn serve(&self, name: &str, ports: &[PortMapping]) -> Pod<'_> {
        let mut pod = self.run(name, 0, ports).unwrap_or_else(|error| panic!("{name}: {error}"));
        pod.start_server();
        pod
    }

    /// A sandbox of a pod: the first if `attempt` is 0, otherwise one that takes another's place.
    ///
    /// # Errors
    /// containerd's.
    pub fn run(&self, name: &str, attempt: u32, ports: &[PortMapping]) -> Result<Pod<'_>, String> {
        let metadata = PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("uid-of-{name}"),
            namespace: "default".to_owned(),
            attempt,
        };
        let config = PodSandboxConfig {
            metadata: Some(metadata),
            hostname: name.to_owned(),
            log_directory: format!("/run/test/disk/log/{name}"),
            dns_config: Some(DnsConfig { servers: vec!["192.0.2.53".to_owned()] }),
            port_mappings: ports.to_vec(),
            annotations: Default::default(),
            linux: Some(LinuxPodSandboxConfig { cgroup_parent: "/pods".to_owned() }),
        };
        let request = RunPodSandboxRequest { config: Some(config.clone()) };
        let PodSandboxId { pod_sandbox_id } = call(&self.socket, "RunPodSandbox", request)?;
        Ok(Pod { containerd: self, name: name.to_owned(), id: pod_sandbox_id, config, container: None })
    }

    /// A sandbox that is there, by its id.
    pub fn pod(&self, name: &str, id: &str) -> Pod<'_> {
        Pod {
            containerd: self,
            name: name.to_owned(),
            id: id.to_owned(),
            config: PodSandboxConfig::default(),
            container: None,
        }
    }
}

/// A sandbox, and the container in it if there is one.
pub struct Pod<'a> {
    containerd: &'a Containerd,
    /// The pod's name.
    pub name: String,
    /// The sandbox's id.
    pub id: String,
    config: PodSandboxConfig,
    container: Option<String>,
}

impl Pod<'_> {
    /// Starts a container in it that serves its own name.
    #[track_caller]
    pub fn start_server(&mut self) {
        let server = format!("echo {} >/www/index.html; exec httpd -f -p 80 -h /www", self.name);
        // A container's name is its own among all containers of its pod, in whichever sandbox.
        let attempt = self.config.metadata.as_ref().map_or(0, |metadata| metadata.attempt);
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: "server".to_owned(), attempt }),
            image: Some(ImageSpec { image: IMAGE.to_owned() }),
            command: ["sh", "-c", &server].map(str::to_owned).to_vec(),
            log_path: "server.log".to_owned(),
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let created: ContainerId = self.must("CreateContainer", request);
        let Done {} = self.must("StartContainer", created.clone());
        self.container = Some(created.container_id);
        let serves = || self.fetch(IpAddr::V4(Ipv4Addr::LOCALHOST), 80) == self.name;
        eventually("a container's web server is there", PATIENCE, serves);
    }

    /// The container's id.
    pub fn container(&self) -> &str {
        self.container.as_deref().expect("a container was started")
    }

    /// Takes over a container that is there.
    pub fn with_container(mut self, container: &str) -> Self {
        self.container = Some(container.to_owned());
        self
    }

    /// Runs a command line in the container: what it printed.
    #[track_caller]
    pub fn exec(&self, line: &str) -> String {
        let cmd = line.split_whitespace().map(str::to_owned).collect();
        let request = ExecSyncRequest { container_id: self.container().to_owned(), cmd, timeout: 20 };
        let answer: ExecSyncResponse = self.must("ExecSync", request);
        String::from_utf8_lossy(&answer.stdout).into_owned()
    }

    /// What a web server says, asked from inside.
    #[track_caller]
    pub fn fetch(&self, address: IpAddr, port: u16) -> String {
        self.exec(&format!("fetch {address} {port}")).trim().to_owned()
    }

    /// Its addresses, IPv4 first.
    #[track_caller]
    pub fn addresses(&self) -> Vec<IpAddr> {
        let network = self.status(false).status.and_then(|status| status.network).unwrap_or_default();
        let all = std::iter::once(network.ip).chain(network.additional_ips.into_iter().map(|more| more.ip));
        let mut all: Vec<IpAddr> = all.map(|ip| ip.parse().expect("containerd knows the pod's addresses")).collect();
        all.sort();
        all
    }

    /// Whether its first process runs.
    #[track_caller]
    pub fn is_ready(&self) -> bool {
        self.status(false).status.is_some_and(|status| status.state == 0)
    }

    /// The process id of the sandbox's first process, as the host sees it.
    #[track_caller]
    pub fn pause(&self) -> u64 {
        let status = self.status(true);
        let info: Value = serde_json::from_str(&status.info["info"]).expect("containerd tells JSON");
        info["pid"].as_u64().expect("a sandbox has a first process")
    }

    #[track_caller]
    fn status(&self, verbose: bool) -> PodSandboxStatusResponse {
        self.must("PodSandboxStatus", PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose })
    }

    /// Ends its processes and takes its network.
    ///
    /// # Errors
    /// containerd's.
    pub fn stop(&self) -> Result<(), String> {
        let Done {} = call(&self.containerd.socket, "StopPodSandbox", self.sandbox())?;
        Ok(())
    }

    /// Stops and forgets it.
    #[track_caller]
    pub fn remove(&self) {
        self.stop().unwrap_or_else(|error| panic!("{}: {error}", self.name));
        let Done {} = self.must("RemovePodSandbox", self.sandbox());
    }

    fn sandbox(&self) -> PodSandboxId {
        PodSandboxId { pod_sandbox_id: self.id.clone() }
    }

    #[track_caller]
    fn must<A: prost::Message + Default + 'static>(&self, method: &str, request: impl prost::Message + 'static) -> A {
        call(&self.containerd.socket, method, request).unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }
}
