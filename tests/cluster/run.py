#!/usr/bin/env python3
"""run.py KUBERNETES WEFT: a real cluster on this machine, with the programs in the two folders, and what is to be seen in it.

Three nodes, each with kubelet, containerd and kube-proxy of its own, one API server; Weft is put on them by what the README says and nothing
else. Every check prints a line. Ends with 1 if one of them failed, and leaves nothing behind in either case. With KEEP=1 it waits after that
until Return is pressed, and says how to look around.
"""

import os
import pathlib
import shutil
import signal
import sys
import time
import traceback

import life
import reach
from control import Cluster

HERE = pathlib.Path(__file__).resolve().parent
MANIFESTS = HERE.parents[1] / "deploy/kubernetes"


def configure(cluster):
    """The manifests with what the README has users write into them, for a server of this version."""
    cluster.manifests = cluster.folder / "manifests"
    shutil.copytree(MANIFESTS, cluster.manifests)
    config = cluster.manifests / "config.yaml"
    text = config.read_text()
    for comment, line in (("# servers = [\"https://192.0.2.10:6443\"]", f"servers = [\"{cluster.server}\"]"),
                          ("# services = [\"10.96.0.0/12\", \"fd00:10:96::/112\"]", "services = [\"10.96.0.0/12\", \"fd00:10:96::/112\"]")):
        assert text.count(comment) == 1, f"config.yaml has no line {comment}"
        text = text.replace(comment, line)
    config.write_text(text)
    # Kubernetes before 1.30 does not know such policies.
    kustomization = cluster.manifests / "kustomization.yaml"
    kustomization.write_text(kustomization.read_text().replace("  - admission.yaml\n", ""))


def begin(cluster):
    """Three nodes that have no network for pods."""
    nodes = [cluster.add_node(number) for number in (1, 2, 3)]
    cluster.start_control_plane()
    for node in nodes:
        node.power_on()
    cluster.wait("three Nodes", lambda: len(cluster.get("nodes")["items"]) == 3, 60)
    assert "NotReady" in cluster.kubectl("get", "nodes")
    return cluster.kubectl("version", "--short").strip().replace("\n", ", ")


def deploy(cluster):
    """`kubectl apply -k`, and nothing else."""
    configure(cluster)
    started = time.monotonic()
    cluster.kubectl("apply", "-k", str(cluster.manifests))
    cluster.kubectl("wait", "--for=condition=Ready", "nodes", "--all", "--timeout=3m", timeout=190)
    ready = time.monotonic() - started
    cluster.wait("all pods of Weft are ready", lambda: all(life.is_ready(cluster, name) for name in cluster.nodes), 60)
    return f"nodes Ready after {ready:.1f} s, weftd after {time.monotonic() - started:.1f} s"


def workloads(cluster):
    """Pods of every kind become ready, for which kubelet's probes have to reach them."""
    started = time.monotonic()
    cluster.kubectl("apply", "-f", str(HERE / "workloads/pods.yaml"))
    life.settle(cluster)
    return f"{len(cluster.get('pods', '-A')['items'])} pods ready after {time.monotonic() - started:.1f} s"


CHECKS = [deploy, workloads, life.healthy, life.doctor, reach.pings, reach.matrix, reach.services, reach.outside, reach.dns, reach.kubelets,
          reach.webhook, life.churn, life.update, life.reboot, life.join, life.api_away, reach.services, life.memory, life.healthy, life.rights,
          life.uninstall]


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    # Also a run that is ended from outside takes everything away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    started, passed, failed = time.monotonic(), 0, []
    cluster = Cluster(sys.argv[1], sys.argv[2])
    try:
        shutil.copy(HERE / "box/ask.py", cluster.files)
        print(f"cluster: {begin(cluster)}", flush=True)
        for check in CHECKS:
            before = time.monotonic()
            try:
                said = check(cluster)
                passed += 1
                print(f"ok      {check.__name__}: {said} ({time.monotonic() - before:.0f} s)", flush=True)
            except Exception as error:
                failed.append(check.__name__)
                print(f"FAILED  {check.__name__}: {type(error).__name__}: {error}", flush=True)
                if os.environ.get("VERBOSE"):
                    traceback.print_exc()
                if check is deploy:
                    break
        if os.environ.get("KEEP"):
            conf = cluster.authority.path("admin.conf")
            print(f"nsenter --net=/run/netns/weft-k8s-n1 {cluster.programs}/kubectl --kubeconfig={conf} get nodes")
            input("Return ends it. ")
    finally:
        cluster.end()
    print(f"\n{passed} passed, {len(failed)} failed, in {time.monotonic() - started:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
