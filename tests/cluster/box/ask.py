"""What is asked from within a pod or a node. Each question is one argument; one line of JSON answers all of them, in order.

http:URL            who answered and whom it saw, or an error
tcp:ADDRESS:BYTES   so many bytes to the echo and back
udp:ADDRESS:BYTES   one datagram to the echo and back, tried three times
dns:SERVER:PROTO:NAME:TYPE   the addresses of the name (PROTO udp or tcp, TYPE A or AAAA)
name:NAME           the addresses that the resolver of the system has
api:                how many pods there are in the API server's opinion, asked by the pod's account
stream:ADDRESS:SECONDS   a TCP stream to the echo and back for so long: bytes echoed and the longest silence in seconds
"""

import json
import os
import socket
import ssl
import struct
import sys
import time
import urllib.request

ECHO = 7777
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount/"


def http(url):
    with urllib.request.urlopen("http://" + url, timeout=5) as answer:
        body = answer.read()
    return json.loads(body) if body[:1] == b"{" else {"bytes": len(body)}


def tcp(rest):
    address, size = rest.rsplit(":", 1)
    data = os.urandom(int(size))
    with socket.create_connection((address, ECHO), timeout=5) as sock:
        echoed, sent = bytearray(), 0
        while len(echoed) < len(data):
            if sent < len(data):
                sent += sock.send(data[sent : sent + 65536])
            echoed += sock.recv(65536)
    return {"same": bytes(echoed) == data}


def udp(rest):
    address, size = rest.rsplit(":", 1)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    data = os.urandom(int(size))
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(1)
        for attempt in range(3):
            sock.sendto(data, (address, ECHO))
            try:
                return {"same": sock.recv(65536) == data, "attempts": attempt + 1}
            except TimeoutError:
                pass
    raise TimeoutError("no echo")


def dns(rest):
    server, proto, name, kind = rest.rsplit(":", 3)
    code = {"A": 1, "AAAA": 28}[kind]
    query = struct.pack(">HHHHHH", 0x5746, 0x0100, 1, 0, 0, 0)
    query += b"".join(bytes([len(label)]) + label.encode() for label in name.rstrip(".").split(".")) + b"\0"
    query += struct.pack(">HH", code, 1)
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM if proto == "tcp" else socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.connect((server, 53))
        sock.sendall(struct.pack(">H", len(query)) + query if proto == "tcp" else query)
        answer = sock.recv(4096)
        answer = answer[2:] if proto == "tcp" else answer
    assert answer[:2] == query[:2] and answer[3] & 15 == 0, f"an answer with code {answer[3] & 15}"
    at, found = len(query), []
    for _ in range(struct.unpack(">H", answer[6:8])[0]):
        while answer[at] and answer[at] < 0xC0:
            at += answer[at] + 1
        at += 2 if answer[at] else 1
        kind_found, _, _, length = struct.unpack(">HHIH", answer[at : at + 10])
        if kind_found == code:
            found.append(socket.inet_ntop(socket.AF_INET if code == 1 else socket.AF_INET6, answer[at + 10 : at + 10 + length]))
        at += 10 + length
    return {"addresses": found}


def name(rest):
    return {"addresses": sorted({entry[4][0] for entry in socket.getaddrinfo(rest, 80, type=socket.SOCK_STREAM)})}


def api(_):
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    token = open(ACCOUNT + "token").read()
    request = urllib.request.Request(f"https://{host}:{port}/api/v1/namespaces/default/pods", headers={"Authorization": "Bearer " + token})
    with urllib.request.urlopen(request, timeout=5, context=ssl.create_default_context(cafile=ACCOUNT + "ca.crt")) as answer:
        return {"pods": len(json.load(answer)["items"])}


def stream(rest):
    address, seconds = rest.rsplit(":", 1)
    end, silence, count = time.monotonic() + float(seconds), 0.0, 0
    with socket.create_connection((address, ECHO), timeout=60) as sock:
        while time.monotonic() < end:
            before = time.monotonic()
            sock.sendall(b"x" * 1000)
            count += len(sock.recv(65536))
            silence = max(silence, time.monotonic() - before)
            time.sleep(0.01)
    return {"bytes": count, "silence": round(silence, 3)}


def ask(question):
    kind, _, rest = question.partition(":")
    try:
        return globals()[kind](rest)
    except Exception as error:
        return {"error": f"{question}: {type(error).__name__}: {error}"}


print(json.dumps([ask(question) for question in sys.argv[1:]]))
