"""A node of the cluster: a network namespace on the underlay, mounts and processes of its own, and a disk that outlives its reboots.

Everything that runs on it is in its process namespace, so when the first process ends, nothing is left: that is how a node loses its
power, and how a test ends.
"""

import pathlib
import signal
import subprocess
import time

PREFIX = "weft-k8s-"
ROUTER = PREFIX + "net"
HERE = pathlib.Path(__file__).resolve().parent

CONTAINERD = """version = 2
[grpc]
address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "localhost/weft-box:test"
disable_apparmor = true
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/opt/cni/bin"
conf_dir = "/etc/cni/net.d"
"""

KUBELET = """apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {{anonymous: {{enabled: false}}, webhook: {{enabled: true}}, x509: {{clientCAFile: /run/files/pki/ca.crt}}}}
authorization: {{mode: Webhook}}
clusterDNS: ["10.96.0.10"]
clusterDomain: cluster.local
cgroupDriver: cgroupfs
cgroupRoot: /weft-k8s/{name}
cgroupsPerQOS: false
enforceNodeAllocatable: []
failSwapOn: false
featureGates: {{IPv6DualStack: true}}
resolvConf: /etc/resolv.conf
tlsCertFile: /run/files/pki/{name}.crt
tlsPrivateKeyFile: /run/files/pki/{name}.key
evictionHard: {{memory.available: 1Mi, nodefs.available: 1Mi, imagefs.available: 1Mi}}
imageGCHighThresholdPercent: 100
volumeStatsAggPeriod: 0s
nodeStatusUpdateFrequency: 5s
"""

PROXY = """apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: iptables
clientConnection: {{kubeconfig: /run/files/pki/kube-proxy.conf}}
clusterCIDR: 10.244.0.0/16,fd00:10:244::/48
hostnameOverride: {name}
featureGates: {{IPv6DualStack: true}}
conntrack: {{maxPerCore: 0, min: 0}}
"""


def run(*command, timeout=60, check=True, stdin=None):
    """What a command printed; an error with all of it if it failed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, input=stdin)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))[:400]}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout if check else done


class Underlay:
    """The nodes' network, its router, and a host outside of the cluster behind that: 198.51.100.1 and 2001:db8:51::1."""

    def __init__(self):
        Underlay.remove()
        run("ip", "netns", "add", ROUTER)
        self.ip("link", "set", "lo", "up")
        self.ip("link", "add", "underlay", "type", "bridge")
        self.ip("link", "set", "underlay", "up")
        for address in ("10.210.0.254/24", "fd00:10:210::fe/64"):
            self.ip("address", "add", address, "dev", "underlay", *(["nodad"] if ":" in address else []))
        for address in ("198.51.100.1/32", "2001:db8:51::1/128"):
            self.ip("address", "add", address, "dev", "lo")
        self.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")

    def ip(self, *arguments):
        return run("ip", "-n", ROUTER, *arguments)

    def run(self, *command):
        return run("ip", "netns", "exec", ROUTER, *command)

    @staticmethod
    def remove():
        """Also what a run left behind that was killed."""
        for line in run("ip", "netns", "list").splitlines():
            name = line.split()[0]
            if name.startswith(PREFIX):
                for process in run("ip", "netns", "pids", name, check=False).stdout.split():
                    subprocess.run(["kill", "-9", process], capture_output=True)
                run("ip", "netns", "del", name)


class Node:
    def __init__(self, cluster, number):
        self.cluster, self.number, self.name = cluster, number, f"n{number}"
        self.netns = PREFIX + self.name
        self.address, self.address6 = f"10.210.0.{number}", f"fd00:10:210::{number}"
        self.disk = cluster.folder / "disks" / self.name
        self.disk.mkdir(parents=True)
        authority = cluster.authority
        authority.sign(self.name, f"/O=system:nodes/CN=system:node:{self.name}", [self.name, self.address, self.address6])
        authority.kubeconfig(self.name, cluster.server)
        self.services, self.first, self.unshare = {}, None, None
        self.connect()

    def connect(self):
        """Its network namespace, with one interface."""
        run("ip", "netns", "add", self.netns)
        run("ip", "link", "add", "uplink", "netns", self.netns, "mtu", "1500", "type", "veth", "peer", "name", self.name, "netns", ROUTER)
        self.cluster.underlay.ip("link", "set", self.name, "up", "master", "underlay")
        for arguments in (
            ("link", "set", "lo", "up"),
            ("address", "add", f"{self.address}/24", "dev", "uplink"),
            ("address", "add", f"{self.address6}/64", "dev", "uplink", "nodad"),
            ("link", "set", "uplink", "up"),
            ("route", "add", "default", "via", "10.210.0.254"),
            ("-6", "route", "add", "default", "via", "fd00:10:210::fe"),
        ):
            run("ip", "-n", self.netns, *arguments)
        run("ip", "netns", "exec", self.netns, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")

    def power_on(self):
        """Its first process, then containerd and its images, kube-proxy and kubelet, as an init system starts them."""
        command = ["setpriv", "--pdeathsig", "KILL", "nsenter", f"--net=/run/netns/{self.netns}", "unshare", "--mount", "--pid", "--uts", "--ipc",
                   "--fork", "--kill-child=KILL", "sh", "-eu", str(HERE / "node.sh"), self.name, str(self.disk),
                   str(self.cluster.programs), str(self.cluster.files)]
        log = open(self.cluster.folder / f"{self.name}.log", "ab")
        self.unshare = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.cluster.wait(f"{self.name} is up", self.booted, 20)
        self.write("/etc/containerd/config.toml", CONTAINERD)
        self.write("/etc/kubernetes/kubelet.yaml", KUBELET.format(name=self.name))
        self.write("/etc/kubernetes/proxy.yaml", PROXY.format(name=self.name))
        self.start("containerd", "containerd")
        self.cluster.wait(f"containerd of {self.name}", lambda: self.run("ctr", "version", check=False).returncode == 0, 30)
        if not (self.disk / "imported").exists():
            for image in self.cluster.images:
                self.run("ctr", "-n", "k8s.io", "images", "import", f"/run/files/{image}", timeout=180)
            (self.disk / "imported").touch()
        self.start_proxy()
        self.start_kubelet()

    def start_proxy(self):
        self.start("kube-proxy", "/run/kubernetes/kube-proxy", "--config=/etc/kubernetes/proxy.yaml", "--v=1")

    def start_kubelet(self):
        self.start("kubelet", "/run/kubernetes/kubelet", "--config=/etc/kubernetes/kubelet.yaml", f"--kubeconfig=/run/files/pki/{self.name}.conf",
                   "--container-runtime=remote", "--container-runtime-endpoint=unix:///run/containerd/containerd.sock",
                   f"--node-ip={self.address}", f"--hostname-override={self.name}", "--network-plugin=cni", "--v=1")

    def booted(self):
        children = pathlib.Path(f"/proc/{self.unshare.pid}/task/{self.unshare.pid}/children").read_text().split()
        self.first = int(children[0]) if children else None
        return self.first is not None and pathlib.Path(f"/proc/{self.first}/root/run/booted").exists()

    def power_off(self):
        """All processes are killed, and what the kernel had for them is gone: interfaces, mounts, /run. The disk stays."""
        if self.unshare:
            self.unshare.send_signal(signal.SIGKILL)
            self.unshare.wait()
            self.unshare, self.services = None, {}
            while pathlib.Path(f"/proc/{self.first}").exists():
                time.sleep(0.02)
        run("ip", "netns", "del", self.netns)

    def reboot(self):
        self.power_off()
        time.sleep(1)
        self.connect()
        self.power_on()

    def command(self, *command):
        return ["nsenter", "--mount", "--pid", "--net", "--uts", "--ipc", "--target", str(self.first), *command]

    def run(self, *command, timeout=60, check=True, stdin=None):
        return run(*self.command(*command), timeout=timeout, check=check, stdin=stdin)

    def write(self, path, text):
        self.run("sh", "-c", 'mkdir -p "${1%/*}"; cat >"$1"', "sh", path, stdin=text)

    def start(self, name, *command):
        """Starts a program that stays; its log is /var/log/NAME.log."""
        shell = 'log=/var/log/$1.log; shift; exec "$@" >>"$log" 2>&1'
        self.services[name] = subprocess.Popen(self.command("sh", "-c", shell, "sh", name, *command), stdin=subprocess.DEVNULL)

    def stop(self, name):
        service = self.services.pop(name)
        child = pathlib.Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text().split()
        for process in child:
            subprocess.run(["kill", "-TERM", process], check=True)
        service.wait(timeout=30)

    def log(self, name):
        return (self.disk / "log" / f"{name}.log").read_text(errors="replace")
