"""What the test's pods do: answers HTTP on 8080 by both families with who it is and who asked, and echoes UDP and TCP on 7777.

`serve.py webhook` answers admission reviews on 8443 instead: it forbids what has "forbidden" in its data.
"""

import http.server
import json
import os
import socket
import socketserver
import ssl
import sys
import threading


class Page(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        who = {"name": os.environ.get("NAME", socket.gethostname()), "peer": self.client_address[0].replace("::ffff:", "")}
        body = json.dumps(who).encode()
        if self.path.startswith("/bytes/"):
            body = b"x" * int(self.path.split("/")[2])
        self.answer(body)

    def do_POST(self):
        review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        data = review["request"]["object"].get("data") or {}
        allowed = "forbidden" not in data
        print("review", review["request"]["name"], "allowed" if allowed else "denied", "asked by", self.client_address[0], flush=True)
        response = {"uid": review["request"]["uid"], "allowed": allowed, "status": {"message": "weft's test forbids it"}}
        self.answer(json.dumps({"apiVersion": review["apiVersion"], "kind": review["kind"], "response": response}).encode())

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    daemon_threads = True
    request_queue_size = 128


class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(65536):
            self.request.sendall(data)


class EchoServer(socketserver.ThreadingTCPServer):
    address_family = socket.AF_INET6
    allow_reuse_address = True
    daemon_threads = True


def echo_datagrams(port):
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.bind(("::", port))
    while True:
        data, peer = sock.recvfrom(65536)
        sock.sendto(data, peer)


def main():
    if sys.argv[1:] == ["webhook"]:
        server = Server(("::", 8443), Page)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain("/tls/tls.crt", "/tls/tls.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    else:
        port = int(os.environ.get("PORT", "8080"))
        server = Server(("::", port), Page)
        echo = EchoServer(("::", port - 303), Echo)
        threading.Thread(target=echo.serve_forever, daemon=True).start()
        threading.Thread(target=echo_datagrams, args=(port - 303,), daemon=True).start()
    print("serving", flush=True)
    server.serve_forever()


main()
