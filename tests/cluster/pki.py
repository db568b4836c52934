"""Keys and certificates of a cluster, as kubeadm makes them: one authority, and a certificate for each who speaks to another."""

import base64
import pathlib
import subprocess


class Authority:
    """Signs certificates into a folder: NAME.crt and NAME.key, and the authority's own as ca.crt and ca.key."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._key("ca")
        self._openssl("req", "-x509", "-new", "-key", self.path("ca.key"), "-subj", "/CN=weft-test-ca", "-days", "30", "-out", self.path("ca.crt"))
        self._key("accounts")
        self._openssl("ec", "-in", self.path("accounts.key"), "-pubout", "-out", self.path("accounts.pub"))

    def path(self, name):
        return str(self.folder / name)

    def sign(self, name, subject, addresses=()):
        """A certificate for both directions; `addresses` are names and addresses that a server is known by."""
        self._key(name)
        request, extensions = self.path(name + ".csr"), self.path(name + ".ext")
        self._openssl("req", "-new", "-key", self.path(name + ".key"), "-subj", subject, "-out", request)
        lines = ["extendedKeyUsage=clientAuth,serverAuth", "keyUsage=digitalSignature"]
        if addresses:
            kinds = ("IP" if ":" in a or a.replace(".", "").isdigit() else "DNS" for a in addresses)
            lines.append("subjectAltName=" + ",".join(f"{kind}:{a}" for kind, a in zip(kinds, addresses)))
        pathlib.Path(extensions).write_text("\n".join(lines) + "\n")
        self._openssl("x509", "-req", "-in", request, "-CA", self.path("ca.crt"), "-CAkey", self.path("ca.key"), "-CAcreateserial",
                      "-days", "30", "-extfile", extensions, "-out", self.path(name + ".crt"))

    def kubeconfig(self, name, server):
        """Writes NAME.conf for the certificate of that name, with everything in it."""
        encoded = (base64.b64encode(pathlib.Path(self.path(file)).read_bytes()).decode() for file in ("ca.crt", name + ".crt", name + ".key"))
        text = """apiVersion: v1
kind: Config
current-context: test
clusters: [{{name: test, cluster: {{server: "{}", certificate-authority-data: {}}}}}]
users: [{{name: test, user: {{client-certificate-data: {}, client-key-data: {}}}}}]
contexts: [{{name: test, context: {{cluster: test, user: test}}}}]
""".format(server, *encoded)
        pathlib.Path(self.path(name + ".conf")).write_text(text)
        return self.path(name + ".conf")

    def _key(self, name):
        self._openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", self.path(name + ".key"))

    @staticmethod
    def _openssl(*arguments):
        subprocess.run(["openssl", *arguments], check=True, capture_output=True)
