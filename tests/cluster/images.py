"""The images of the cluster, made on this machine: Weft's, as `make image` makes it, and one for everything else.

That other one is a static busybox, this machine's Python and dnsmasq with what they load, and the test's own two programs. It is also
the image of pods' sandboxes.
"""

import pathlib
import shutil
import subprocess
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
BOX = "localhost/weft-box:test"
APPLETS = ("cat", "echo", "hostname", "ip", "ls", "nc", "nslookup", "ping", "ping6", "ps", "sed", "sh", "sleep", "traceroute", "wget")
PYTHON = "/usr/bin/python3"
CONTAINERFILE = """FROM scratch
COPY root/ /
ENV PATH=/bin:/usr/bin
STOPSIGNAL SIGKILL
CMD ["/bin/sleep", "1000000"]
"""


def make_images(folder, weft):
    """Writes the archives into the folder: their names."""
    version = subprocess.run([weft / "weft", "--version"], check=True, capture_output=True, text=True).stdout.split()[-1]
    named = f"localhost/weft:{version}"
    was_there = subprocess.run(["podman", "image", "exists", named]).returncode == 0
    subprocess.run([HERE.parents[1] / "deploy/image", weft, named], check=True, capture_output=True)
    with tempfile.TemporaryDirectory(dir=folder) as context:
        fill(pathlib.Path(context, "root"))
        pathlib.Path(context, "Containerfile").write_text(CONTAINERFILE)
        subprocess.run(["podman", "build", "--quiet", "--tag", BOX, context], check=True, capture_output=True)
    archives = []
    for name, archive in ((named, "weft.tar"), (BOX, "box.tar")):
        subprocess.run(["podman", "save", "--quiet", "--output", folder / archive, name], check=True, capture_output=True)
        archives.append(archive)
    for name in [BOX] if was_there else [BOX, named]:
        subprocess.run(["podman", "rmi", "--force", name], check=True, capture_output=True)
    return archives


def fill(root):
    (root / "bin").mkdir(parents=True)
    (root / "tmp").mkdir()
    shutil.copy2(shutil.which("busybox"), root / "bin/busybox")
    for applet in APPLETS:
        (root / "bin" / applet).symlink_to("busybox")
    version = subprocess.run([PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('stdlib'))"], check=True, capture_output=True, text=True).stdout.strip()
    left_out = shutil.ignore_patterns("test", "idlelib", "ensurepip", "lib2to3", "dist-packages", "site-packages")
    shutil.copytree(version, root / version[1:], ignore=left_out, symlinks=True)
    programs = [pathlib.Path(PYTHON).resolve(), pathlib.Path(shutil.which("dnsmasq"))]
    for program, name in zip(programs, ("python3", "dnsmasq")):
        shutil.copy2(program, root / "bin" / name)
    libraries = [*programs, *root.glob(f"{version[1:]}/lib-dynload/*.so")]
    loaded = subprocess.run(["ldd", *libraries], capture_output=True, text=True).stdout
    for word in {word for word in loaded.split() if word.startswith("/") and ".so" in word and not word.endswith(":")}:
        (root / word[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(word, root / word[1:])
    (root / "usr/bin").mkdir(parents=True, exist_ok=True)
    (root / "usr/bin/python3").symlink_to("../../bin/python3")
    shutil.copytree(HERE / "box", root / "box", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "etc").mkdir(exist_ok=True)
    (root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
