"""What pods, nodes, kubelets and the API server reach in a cluster, each asked of a real one."""

import base64
import json
import pathlib
import subprocess
import time

from node import run

HERE = pathlib.Path(__file__).resolve().parent
OUTSIDE = "198.51.100.1"


class Pods:
    """The pods of one label, by node."""

    def __init__(self, cluster, app, namespace="default", label="app"):
        self.cluster, self.namespace = cluster, namespace
        items = cluster.get("pods", "-n", namespace, "-l", f"{label}={app}")["items"]
        self.all = [item for item in items if not item["metadata"].get("deletionTimestamp")]
        self.by_node = {item["spec"]["nodeName"]: item for item in self.all}

    def name(self, node):
        return self.by_node[node]["metadata"]["name"]

    def addresses(self, node):
        return [entry["ip"] for entry in self.by_node[node]["status"]["podIPs"]]

    def ask(self, node, *questions, check=True):
        """The answers of `ask.py` in the pod of a node, each of which has to be one."""
        answer = self.cluster.kubectl("exec", "-n", self.namespace, self.name(node), "--", "python3", "/box/ask.py", *questions)
        return answers(answer, f"{self.name(node)} on {node}", check)


def answers(text, who, check):
    found = json.loads(text)
    wrong = [answer["error"] for answer in found if "error" in answer]
    assert not (check and wrong), f"{who}: {wrong}"
    return found


def ask_node(node, *questions, check=True):
    """The same from the node itself."""
    return answers(node.run("python3", "/run/files/ask.py", *questions), node.name, check)


def bracketed(address):
    return f"[{address}]" if ":" in address else address


def wait_for_pods(cluster, count, seconds=120):
    """Waits until so many pods are there, and all are ready."""

    def ready():
        items = cluster.get("pods", "-A")["items"]
        conditions = [c["status"] for i in items for c in i["status"].get("conditions", []) if c["type"] == "Ready"]
        return len(items) == count and conditions == ["True"] * count

    try:
        return cluster.wait(f"{count} pods are ready", ready, seconds)[1]
    except AssertionError as error:
        raise AssertionError(f"{error}\n{cluster.kubectl('get', 'pods', '-A', '-o', 'wide')}\n"
                             f"{cluster.kubectl('get', 'events', '-A', '--sort-by=.lastTimestamp')[-4000:]}") from None


def matrix(cluster):
    """Every pod reaches every other, and every node, by both families: TCP, UDP, what fills the MTU and what is larger."""
    pods, count = Pods(cluster, "box"), 0
    for node in pods.by_node:
        questions = []
        for other in pods.by_node:
            for address in pods.addresses(other):
                mtu = 1450 - (48 if ":" in address else 28)
                questions += [f"http:{bracketed(address)}:8080/", f"tcp:{address}:1", f"tcp:{address}:3000000"]
                questions += [f"udp:{address}:{size}" for size in (1, mtu, mtu + 1, 9000, 60000)]
            questions.append(f"http:{cluster.nodes[other].address}:18080/")
            questions.append(f"http:{bracketed(cluster.nodes[other].address6)}:18080/")
        for answer in pods.ask(node, *questions):
            assert answer.get("same", True), answer
            count += 1
        own = pods.addresses(node)
        seen = pods.ask(node, *(f"http:{bracketed(a)}:8080/" for other in pods.by_node if other != node for a in pods.addresses(other)))
        assert {answer["peer"] for answer in seen} == set(own), f"{node}'s pod is seen as {seen}, not as {own}"
    for node in cluster.nodes.values():
        questions = [f"http:{bracketed(address)}:8080/" for other in pods.by_node for address in pods.addresses(other)]
        count += len(ask_node(node, *questions))
        for other in pods.by_node:
            for address in pods.addresses(other):
                node.run("ping", "-c", "2", "-i", "0.2", "-W", "2", "-s", "1400", address)
    return f"{count} answers, all right"


def pings(cluster):
    pods, count = Pods(cluster, "box"), 0
    for node in pods.by_node:
        for other in pods.by_node:
            for address in pods.addresses(other):
                script = f"ping{'6' if ':' in address else ''} -c 2 -W 2 -s 1400 {address}"
                cluster.kubectl("exec", pods.name(node), "--", "sh", "-c", script)
                count += 1
    return f"{count} pings"


def services(cluster):
    """ClusterIPs and node ports, from pods and from nodes, with backends on the same node, on others, and in the nodes' own network."""
    pods = Pods(cluster, "box")
    web, hostweb = cluster.get("service", "web")["spec"], cluster.get("service", "hostweb")["spec"]
    every = {item["metadata"]["name"] for item in Pods(cluster, "web").all}
    every_host = {item["metadata"]["name"] for item in Pods(cluster, "hostweb").all}
    urls = [f"http:{bracketed(address)}/" for address in web["clusterIPs"]]
    urls += [f"http:{node.address}:30080/" for node in cluster.nodes.values()]
    echoes = [f"{kind}:{address}:{size}" for address in web["clusterIPs"] for kind in ("tcp", "udp") for size in (10, 4000)]
    # A node itself has one address here, so IPv6 leads to none of them.
    hosts, count = [f"http:{hostweb['clusterIP']}/"] * 16, 0
    for node in cluster.nodes.values():
        from_pod = pods.ask(node.name, *(urls * 8), *echoes, *hosts, "api:")
        from_node = ask_node(node, *(urls * 8), *echoes, *hosts)
        for answered in (from_pod, from_node):
            assert all(answer.get("same", True) for answer in answered)
            names = {answer["name"] for answer in answered if "name" in answer}
            assert names == every | every_host, f"{node.name}: {(every | every_host) - names} never answered"
        for answer in (answer for at, answer in enumerate(from_pod[: 8 * len(urls)]) if at % len(urls) < len(web["clusterIPs"])):
            assert answer["peer"] in pods.addresses(node.name), f"a pod is seen by a service's backend as {answer['peer']}"
        count += len(from_pod) + len(from_node)
    return f"{count} answers of {len(every)} pods and {len(every_host)} in the nodes' network"


def outside(cluster):
    """Pods reach what is beyond the nodes, where they are seen as their node, also by a service; and are reached from there."""
    pods = Pods(cluster, "box")
    server = subprocess.Popen(["ip", "netns", "exec", "weft-k8s-net", "python3", HERE / "box/serve.py"], stdout=subprocess.DEVNULL)
    ask = lambda url: answers(run("ip", "netns", "exec", "weft-k8s-net", "python3", HERE / "box/ask.py", url), "from outside", True)[0]
    try:
        time.sleep(1)
        for node in cluster.nodes.values():
            four, six, large = pods.ask(node.name, f"http:{OUTSIDE}:8080/", "http:[2001:db8:51::1]:8080/", f"http:{OUTSIDE}:8080/bytes/3000000")
            assert (four["peer"], six["peer"], large["bytes"]) == (node.address, node.address6, 3000000), (four, six, large)
            for address in (node.address, f"[{node.address6}]"):
                assert ask(f"http:{address}:30080/")["name"].startswith("web-")
                local = ask(f"http:{address}:30081/")
                assert (local["name"], local["peer"]) == (pods.name(node.name), "10.210.0.254" if "." in address else "fd00:10:210::fe"), local
    finally:
        server.kill()
        server.wait()
    return "seen as their nodes, by both families; published ports lead to pods, and who asks is known where that is asked for"


def dns(cluster):
    """Names, by UDP and TCP, from each pod, and by the resolver that kubelet configured in it."""
    entries = {f"{name}.default.svc.cluster.local": cluster.get("service", name)["spec"]["clusterIPs"] for name in ("web", "hostweb", "kubernetes")}
    hosts = "".join(f"{address} {name}\n" for name, addresses in entries.items() for address in addresses)
    patch = json.dumps({"data": {"hosts": hosts}})
    cluster.kubectl("-n", "kube-system", "patch", "configmap", "dns", "-p", patch)
    cluster.kubectl("-n", "kube-system", "rollout", "restart", "deployment/dns")
    cluster.kubectl("-n", "kube-system", "rollout", "status", "deployment/dns", "--timeout=120s", timeout=130)
    pods, count = Pods(cluster, "box"), 0
    # kube-proxy takes a moment to forget the pods of before.
    known = lambda node: all("addresses" in answer for answer in pods.ask(node, *["dns:10.96.0.10:tcp:web.default.svc.cluster.local:A"] * 8, check=False))
    cluster.wait("every node knows the new pods of DNS", lambda: all(known(node) for node in cluster.nodes), 30)
    for node in cluster.nodes:
        for name, addresses in entries.items():
            questions = [f"dns:10.96.0.10:{proto}:{name}:{kind}" for proto in ("udp", "tcp") for kind in ("A", "AAAA")] * 2
            found = pods.ask(node, *questions, f"name:{name.split('.')[0]}")
            for answer, question in zip(found, questions):
                assert answer["addresses"] == [a for a in addresses if (":" in a) == question.endswith("AAAA")], (question, answer)
            assert found[-1]["addresses"] == sorted(addresses), found[-1]
            count += len(found)
    return f"{count} names resolved"


def kubelets(cluster):
    """Logs, exec and port-forward, which go through the nodes; probes, for which kubelet speaks to pods."""
    pods = Pods(cluster, "box")
    for node in cluster.nodes:
        assert "serving" in cluster.kubectl("logs", pods.name(node)), node
        assert cluster.kubectl("exec", "-i", pods.name(node), "--", "cat", stdin="through exec") == "through exec"
        command = ["nsenter", "--net=/run/netns/weft-k8s-n1", str(cluster.programs / "kubectl"), f"--kubeconfig={cluster.authority.path('admin.conf')}",
                   "port-forward", pods.name(node), "18888:8080"]
        forward = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            ask = lambda: json.loads(cluster.nodes["n1"].run("python3", "/run/files/ask.py", "http:127.0.0.1:18888/"))[0].get("name")
            name, _ = cluster.wait("port-forward", ask, 10)
            assert name == pods.name(node), name
        finally:
            forward.kill()
            forward.wait()
    return "logs, exec and port-forward on every node"


def webhook(cluster):
    """The API server asks a pod before it accepts something."""
    authority = cluster.authority
    authority.sign("webhook", "/CN=webhook", ["webhook.default.svc"])
    text = (HERE / "workloads/webhook.yaml").read_text()
    for word, file in (("CERTIFICATE", "webhook.crt"), ("KEY", "webhook.key"), ("AUTHORITY", "ca.crt")):
        text = text.replace(word, base64.b64encode(pathlib.Path(authority.path(file)).read_bytes()).decode())
    cluster.kubectl("apply", "-f", "-", stdin=text)
    cluster.kubectl("rollout", "status", "deployment/webhook", "--timeout=90s", timeout=100)
    cluster.kubectl("create", "namespace", "asked")
    cluster.kubectl("label", "namespace", "asked", "weft-test=webhook")
    make = lambda name, key: cluster.kubectl("-n", "asked", "create", "configmap", name, f"--from-literal={key}=x", check=False)
    cluster.wait("the webhook is asked", lambda: "weft's test forbids it" in make("bad", "forbidden").stderr, 30)
    took = []
    for i in range(20):
        started = time.monotonic()
        allowed = make(f"good{i}", "welcome")
        took.append(time.monotonic() - started)
        assert allowed.returncode == 0, allowed
    assert cluster.kubectl("logs", "deployment/webhook").count("allowed") >= 20
    cluster.kubectl("delete", "namespace", "asked", "--wait=false")
    cluster.kubectl("delete", "validatingwebhookconfiguration", "weft-test")
    cluster.kubectl("delete", "deployment/webhook", "service/webhook")
    return f"20 objects allowed after being asked about, in {sum(took) / 20:.2f} s each with kubectl; one denied"
