"""What happens to a cluster in its life: pods come and go, Weft is updated, nodes reboot, join and leave, the API is away."""

import collections
import json
import subprocess
import time

from node import run
from reach import Pods, answers, ask_node, bracketed, matrix, wait_for_pods

WEFT = ("-n", "weft")


def weft(cluster, node, *arguments, check=True):
    """`weft` on a node, by kubectl exec as a user calls it: what it prints."""
    pod = Pods(cluster, "weft", "weft", "app.kubernetes.io/name").name(node)
    done = cluster.kubectl(*WEFT, "exec", pod, "-c", "weftd", "--", "weft", *arguments, check=False)
    if check and done.returncode != 0:
        raise AssertionError(f"weft {' '.join(arguments)} on {node}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def leases(cluster, node):
    listed = json.loads(weft(cluster, node, "ipam", "ls", "--json"))
    return {address for lease in listed if lease["kind"] == "lease" for address in lease["addresses"]}


def healthy(cluster):
    """What Kubernetes shows of the nodes, and what weftd says of itself."""
    for name in cluster.nodes:
        node = cluster.get("node", name)
        conditions = {c["type"]: c for c in node["status"]["conditions"]}
        assert conditions["Ready"]["status"] == "True", conditions["Ready"]
        assert conditions["NetworkUnavailable"]["status"] == "False", conditions["NetworkUnavailable"]
        assert conditions["NetworkUnavailable"]["reason"] == "WeftIsUp"
        said = json.loads(node["metadata"]["annotations"]["weft.internal/node"])
        assert said["underlay"] == cluster.nodes[name].address, said
        cluster.wait(f"{name} has nothing to report", lambda: weft(cluster, name, "status").startswith("all is well"), 60)
    return f"{len(cluster.nodes)} nodes"


def churn(cluster):
    """Pods are deleted and come anew, fifty times; in the end each address belongs to a pod that is there."""
    started, count = time.monotonic(), 0
    cluster.kubectl("scale", "deployment/web", "--replicas=17")
    settle(cluster)
    while count < 50:
        count += len(Pods(cluster, "web").all)
        cluster.kubectl("delete", "pods", "-l", "app=web", "--wait=false")
        settle(cluster)
    cluster.kubectl("scale", "deployment/web", "--replicas=3")
    settle(cluster)
    no_leaks(cluster)
    return f"{count} pods in {time.monotonic() - started:.0f} s"


def settle(cluster, seconds=400):
    """Waits until every workload has the pods that it wants, all ready."""

    def done():
        for item in cluster.get("daemonsets,deployments", "-A")["items"]:
            status, kind = item["status"], item["kind"]
            wanted = item["spec"]["replicas"] if kind == "Deployment" else len(cluster.nodes)
            ready = status.get("readyReplicas" if kind == "Deployment" else "numberReady", 0)
            if ready != wanted or status.get("observedGeneration") != item["metadata"]["generation"]:
                return False
        return not [p for p in cluster.get("pods", "-A")["items"] if p["metadata"].get("deletionTimestamp")]

    try:
        return cluster.wait("every workload is as it should be", done, seconds)[1]
    except AssertionError as error:
        raise AssertionError(f"{error}\n{cluster.kubectl('get', 'pods', '-A', '-o', 'wide')}"
                             f"{cluster.kubectl('get', 'events', '-A', '--sort-by=.lastTimestamp')[-4000:]}") from None


def no_leaks(cluster, seconds=60):
    """The leases of each node are the addresses of its pods, and its own."""

    def same():
        pods = collections.defaultdict(set)
        for item in cluster.get("pods", "-A")["items"]:
            if not item["spec"].get("hostNetwork"):
                pods[item["spec"]["nodeName"]] |= {entry["ip"] for entry in item["status"].get("podIPs", [])}
        wrong = {}
        for name, node in cluster.nodes.items():
            shown = json.loads(node.run("ip", "-j", "address", "show", "dev", "weft0"))[0]["addr_info"]
            own = {entry["local"] for entry in shown if entry["scope"] == "global"}
            held = leases(cluster, name) - own
            if held != pods[name]:
                wrong[name] = {"leases without a pod": held - pods[name], "pods without a lease": pods[name] - held}
        if wrong:
            raise LookupError(wrong)
        return True

    cluster.wait("leases are the pods' addresses", same, seconds)


def update(cluster):
    """Weft's own pod of a node is replaced, as an update does it, and each node's pods have a network again."""
    before = Pods(cluster, "weft", "weft", "app.kubernetes.io/name").name("n3")
    stream = cluster.nodes["n1"]
    pods = Pods(cluster, "box")
    other = subprocess.Popen(stream.command("python3", "/run/files/ask.py", f"stream:{pods.addresses('n2')[0]}:30"), stdout=subprocess.PIPE, text=True)
    started = time.monotonic()
    cluster.kubectl(*WEFT, "delete", "pod", before, timeout=120)
    cluster.wait("n3 has a weftd again", lambda: is_ready(cluster, "n3"), 120)
    took = time.monotonic() - started
    said = weft(cluster, "n3", "status", check=False)
    # A stream between two other nodes takes no notice.
    answer, = answers(other.communicate(timeout=90)[0], "the stream", True)
    assert answer["silence"] < 10, answer
    assert "leases belong to pods without a device" in said, said
    # What the README says: pods of that node get links when they are made anew.
    victims = [i["metadata"] for i in cluster.get("pods", "-A")["items"] if i["spec"].get("nodeName") == "n3" and not i["spec"].get("hostNetwork")]
    for victim in victims:
        cluster.kubectl("-n", victim["namespace"], "delete", "pod", victim["name"], "--wait=false")
    settle(cluster)
    no_leaks(cluster)
    return f"Weft ready again after {took:.1f} s, a stream between other nodes was silent for {answer['silence']} s at most"


def reboot(cluster):
    """A node loses its power, and comes back with its disk."""
    node = cluster.nodes["n2"]
    before = leases(cluster, "n2")
    since, started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), time.monotonic()
    node.reboot()

    # For a while the API shows what was before.
    def runs_again():
        pods = [pod for pod in cluster.get("pods", "-A")["items"] if pod["spec"].get("nodeName") == "n2"]
        states = [each["state"].get("running", {}).get("startedAt", "") for pod in pods for each in pod["status"].get("containerStatuses", [])]
        return states and min(states) >= since and is_ready(cluster, "n2")

    cluster.wait("n2 runs its pods again", runs_again, 240)
    ran = time.monotonic() - started
    settle(cluster)
    # Of pods that went elsewhere meanwhile kubelet removes what is left once a minute.
    no_leaks(cluster, 180)
    reached = matrix(cluster)
    return f"its pods run again {ran:.0f} s after power off, with {len(before)} addresses leased before; {reached}"


def is_ready(cluster, name):
    node = cluster.get("node", name)
    heard = next(c for c in node["status"]["conditions"] if c["type"] == "Ready")
    weftd = [p for p in cluster.get("pods", *WEFT)["items"] if p["spec"].get("nodeName") == name]
    return heard["status"] == "True" and all(c["ready"] for p in weftd for c in p["status"].get("containerStatuses", [{"ready": False}]))


def join(cluster):
    """A node joins, gets Weft by itself, and leaves for good."""
    node = cluster.add_node(4)
    started = time.monotonic()
    node.power_on()
    registered = time.monotonic() - started
    cluster.wait("n4 is Ready", lambda: is_ready(cluster, "n4"), 120)
    ready = time.monotonic() - started
    settle(cluster)
    reached = matrix(cluster)
    peers = lambda name: sum(not node["local"] for node in json.loads(weft(cluster, name, "nodes", "--json")))
    assert peers("n1") == 3
    node.power_off()
    del cluster.nodes["n4"]
    cluster.kubectl("delete", "node", "n4")
    _, forgotten = cluster.wait("the others have forgotten n4", lambda: all(peers(name) == 2 for name in cluster.nodes), 30)
    settle(cluster)
    return f"Ready {ready - registered:.1f} s after kubelet started; {reached}; forgotten {forgotten:.1f} s after its Node was deleted"


def api_away(cluster, seconds=180):
    """The API server is away: traffic goes on, also between nodes, and weftd too, when it is restarted meanwhile."""
    pods = Pods(cluster, "box")
    target = pods.addresses("n2")[0]
    stream = subprocess.Popen(cluster.nodes["n3"].command("python3", "/run/files/ask.py", f"stream:{target}:{seconds + 20}"), stdout=subprocess.PIPE, text=True)
    time.sleep(2)
    cluster.stop("kube-apiserver")
    time.sleep(seconds)
    for node in cluster.nodes.values():
        ask_node(node, *(f"http:{bracketed(a)}:8080/" for other in pods.by_node for a in pods.addresses(other)))
    cluster.start_api_server()
    started = time.monotonic()
    cluster.wait("the API server is back", lambda: "ok" in cluster.kubectl("get", "--raw", "/readyz", check=False).stdout, 60)
    answer, = answers(stream.communicate(timeout=120)[0], "the stream", True)
    assert answer["silence"] < 10, answer
    settle(cluster)
    cluster.wait("n1 has nothing to report", lambda: weft(cluster, "n1", "status").startswith("all is well"), 120)
    return f"{seconds} s without it, a stream was silent for {answer['silence']} s at most; settled {time.monotonic() - started:.0f} s after"


def rights(cluster):
    """weftd was never refused, and uses each right that it was given."""
    used, refused = collections.Counter(), []
    for line in (cluster.folder / "audit.log").read_text().splitlines():
        event = json.loads(line)
        what = event.get("objectRef", {})
        resource = what.get("resource", event["requestURI"]) + (f"/{what['subresource']}" if what.get("subresource") else "")
        used[f"{event['verb']} {resource}"] += event["stage"] == "ResponseComplete" or event["verb"] != "watch"
        if event.get("responseStatus", {}).get("code") in (401, 403):
            refused.append(event["requestURI"])
    assert not refused, refused
    role = json.loads(cluster.kubectl("get", "clusterrole", "weft", "-o", "json"))
    given = {f"{verb} {resource}" for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert given == set(used), f"given {given}, used {set(used)}"
    return ", ".join(f"{what}: {count}" for what, count in sorted(used.items()))


def doctor(cluster):
    """`weft doctor` finds nothing wrong with a node that works."""
    for name in cluster.nodes:
        said = weft(cluster, name, "doctor")
        assert "0 problems" in said, said
    return "no problems"


def memory(cluster):
    """What weftd takes, with its few pods."""
    sizes = {}
    for name, node in cluster.nodes.items():
        pid = node.run("sh", "-c", "pgrep -x weftd | head -1").strip()
        status = node.run("cat", f"/proc/{pid}/status")
        sizes[name] = next(int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmRSS"))
    assert max(sizes.values()) < 200, sizes
    return ", ".join(f"{name}: {size} MiB" for name, size in sizes.items())


def uninstall(cluster):
    """As the README says it: pods away, `kubectl delete -k`, and the pods that remove the files. The nodes are as before."""
    workloads = [f"{i['kind']}/{i['metadata']['name']} -n {i['metadata']['namespace']}" for i in cluster.get("daemonsets,deployments", "-A")["items"]
                 if i["metadata"]["namespace"] != "weft"]
    for workload in workloads:
        cluster.kubectl("delete", *workload.split(), timeout=120)
    cluster.wait("no pods are left but Weft's", lambda: all(p["metadata"]["namespace"] == "weft" for p in cluster.get("pods", "-A")["items"]), 120)
    cluster.kubectl("delete", "-k", str(cluster.manifests), timeout=180, check=False)
    manifest = cluster.manifests / "uninstall.yaml"
    cluster.kubectl("apply", "-f", str(manifest))
    cluster.kubectl("-n", "weft-uninstall", "rollout", "status", "daemonset/weft-uninstall", "--timeout=120s", timeout=130)
    said = cluster.kubectl("-n", "weft-uninstall", "logs", "daemonset/weft-uninstall")
    cluster.kubectl("delete", "-f", str(manifest), timeout=120)
    for name, node in cluster.nodes.items():
        found = node.run("sh", "-c", "find /etc/cni /opt/cni /var/lib/weft /run/weft -mindepth 1 2>/dev/null; ip -br link | grep weft; ip route show proto 87; ip -6 route show proto 87",
                         check=False).stdout.split("\n")
        left = [line for line in found if line and line not in ("/etc/cni/net.d", "/opt/cni/bin")]
        assert not left, f"{name}: {left}"
    return said.strip().splitlines()[-1] if said.strip() else ""
