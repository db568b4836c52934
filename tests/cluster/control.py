"""The cluster: underlay, keys, images, the control plane in the first node's network, as kubeadm places it, and the nodes."""

import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time

from images import make_images
from node import Node, Underlay, run
from pki import Authority

SERVICES = "10.96.0.0/16,fd00:10:96::/112"
PODS = "10.244.0.0/16,fd00:10:244::/48"
GATES = "--feature-gates=IPv6DualStack=true"

# What weftd asks of the API is written down, and nothing else.
AUDIT = """apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - {level: Metadata, users: ["system:serviceaccount:weft:weft"]}
  - {level: None}
"""


class Cluster:
    def __init__(self, programs, weft):
        self.programs, self.weft = pathlib.Path(programs).resolve(), pathlib.Path(weft).resolve()
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="weft-k8s.", dir="/var/tmp"))
        self.files = self.folder / "files"
        self.files.mkdir()
        self.server = "https://10.210.0.1:6443"
        self.daemons, self.nodes = {}, {}
        self.underlay = Underlay()
        self.authority = Authority(self.files / "pki")
        mounts = (line.split() for line in pathlib.Path("/proc/mounts").read_text().splitlines())
        ours = {"rw", "ro", "nosuid", "nodev", "noexec", "relatime"}
        lines = [f"{m[2]} {m[1]} {','.join(o for o in m[3].split(',') if o not in ours) or '-'}\n" for m in mounts if m[2] in ("cgroup", "cgroup2")]
        (self.files / "cgroups").write_text("".join(lines))
        self.cgroups = [line.split()[1] for line in lines]
        for point in self.cgroups:
            os.makedirs(f"{point}/weft-k8s", exist_ok=True)
        self.images = make_images(self.files, self.weft)

    def add_node(self, number):
        node = Node(self, number)
        self.nodes[node.name] = node
        for point in self.cgroups:
            group = pathlib.Path(point, "weft-k8s", node.name)
            group.mkdir(exist_ok=True)
            self.fill_cpuset(group)
        return node

    @staticmethod
    def fill_cpuset(group):
        """A group of version 1 can hold processes only after it was told of processors and memory."""
        for which in (group.parent, group):
            for name in ("cpuset.cpus", "cpuset.mems"):
                if (which / name).exists() and not (which / name).read_text().strip():
                    (which / name).write_text((which.parent / name).read_text())

    def start_control_plane(self):
        """In the network of the first node, which is connected already."""
        sign, conf = self.authority.sign, self.authority.kubeconfig
        sign("apiserver", "/CN=kube-apiserver", ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "10.210.0.1", "10.96.0.1", "127.0.0.1"])
        sign("to-kubelet", "/O=system:masters/CN=kube-apiserver-kubelet-client")
        for name, subject in (("admin", "/O=system:masters/CN=admin"), ("controller-manager", "/CN=system:kube-controller-manager"),
                              ("scheduler", "/CN=system:kube-scheduler"), ("kube-proxy", "/CN=system:kube-proxy")):
            sign(name, subject)
            conf(name, self.server)
        (self.files / "audit.yaml").write_text(AUDIT)
        self.start("etcd", "etcd", f"--data-dir={self.folder}/etcd", "--unsafe-no-fsync", "--log-level=error")
        self.start_api_server()
        self.wait("the API server", lambda: "ok" in self.kubectl("get", "--raw", "/readyz", check=False).stdout, 60)
        self.start_controllers()

    def start_api_server(self):
        path = self.authority.path
        self.start("kube-apiserver", "kube-apiserver", "--etcd-servers=http://127.0.0.1:2379", "--advertise-address=10.210.0.1", GATES + ",BoundServiceAccountTokenVolume=true",
                   f"--service-cluster-ip-range={SERVICES}", f"--tls-cert-file={path('apiserver.crt')}", f"--tls-private-key-file={path('apiserver.key')}",
                   f"--client-ca-file={path('ca.crt')}", f"--kubelet-certificate-authority={path('ca.crt')}", f"--kubelet-client-certificate={path('to-kubelet.crt')}",
                   f"--kubelet-client-key={path('to-kubelet.key')}", "--service-account-issuer=https://kubernetes.default.svc",
                   f"--service-account-key-file={path('accounts.pub')}", f"--service-account-signing-key-file={path('accounts.key')}",
                   "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--kubelet-preferred-address-types=InternalIP",
                   f"--audit-policy-file={self.files}/audit.yaml", f"--audit-log-path={self.folder}/audit.log", "--v=1")

    def start_controllers(self):
        path = self.authority.path
        self.start("kube-controller-manager", "kube-controller-manager", f"--kubeconfig={path('controller-manager.conf')}", GATES + ",BoundServiceAccountTokenVolume=true",
                   "--allocate-node-cidrs=true", f"--cluster-cidr={PODS}", f"--service-cluster-ip-range={SERVICES}", f"--root-ca-file={path('ca.crt')}",
                   f"--service-account-private-key-file={path('accounts.key')}", "--use-service-account-credentials=true", "--leader-elect=false",
                   "--configure-cloud-routes=false", "--v=1")
        self.start("kube-scheduler", "kube-scheduler", f"--kubeconfig={path('scheduler.conf')}", "--leader-elect=false", "--v=1")

    def start(self, name, program, *arguments):
        """Starts a part of the control plane."""
        program = str(self.programs / program) if (self.programs / program).exists() else program
        log = open(self.folder / f"{name}.log", "ab")
        command = ["setpriv", "--pdeathsig", "KILL", "nsenter", "--net=/run/netns/weft-k8s-n1", program, *arguments]
        self.daemons[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def stop(self, name):
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def kubectl(self, *arguments, check=True, timeout=120, stdin=None):
        conf = self.authority.path("admin.conf")
        return run("nsenter", "--net=/run/netns/weft-k8s-n1", str(self.programs / "kubectl"), f"--kubeconfig={conf}", *arguments,
                   check=check, timeout=timeout, stdin=stdin)

    def get(self, *arguments):
        return json.loads(self.kubectl("get", "-o", "json", *arguments))

    def wait(self, what, question, seconds):
        """Waits until the question is answered by something true: that, and the seconds it took."""
        started, wrong = time.monotonic(), None
        while time.monotonic() - started < seconds:
            try:
                if answer := question():
                    return answer, time.monotonic() - started
            except (RuntimeError, OSError, LookupError, subprocess.TimeoutExpired) as error:
                wrong = error
            time.sleep(0.2)
        raise AssertionError(f"not within {seconds} s: {what}{f' ({wrong})' if wrong else ''}")

    def end(self):
        """Everything that was started ends, and nothing of it is left."""
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        for node in self.nodes.values():
            if node.unshare:
                node.unshare.kill()
                node.unshare.wait()
        time.sleep(0.5)
        Underlay.remove()
        for point in self.cgroups:
            for group, _, _ in os.walk(f"{point}/weft-k8s", topdown=False):
                for _ in range(50):
                    try:
                        os.rmdir(group)
                        break
                    except OSError:
                        time.sleep(0.1)
        shutil.rmtree(self.folder, ignore_errors=True)
