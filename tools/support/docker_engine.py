"""A Docker daemon of the tests' own, and an image made of this host's programs: nothing is pulled.

The daemon keeps everything in a temporary directory and is ended by its process number.
"""

import importlib.metadata
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

IMAGE = "megatron-dagger-test:base"
PROGRAMS = """
bash sh cat cp cut date dirname basename head tail ls ln mkdir mktemp mknod mv rm rmdir printf pwd realpath readlink
sleep sort stat tee timeout touch tr true false uname uniq wc yes env id chmod chown chroot dd df du echo seq sync test
kill expr nohup setsid find xargs grep sed awk tar gzip base64 md5sum sha256sum diff patch mount truncate unshare git
"""
PACKAGES = ("pytest", "pluggy", "iniconfig", "packaging", "pygments")
START_TIMEOUT_S = 60
# Of the interpreter's own tests only what the others import.
LEFT_OUT = re.compile(
    r"/(tests|test/(?!support|__init__)[^/]+|(site|dist)-packages|idlelib|tkinter|ensurepip|__pycache__|config-[^/]*)(/|$)"
)


def missing():
    """Why no daemon can be started here; empty where one can."""
    if os.geteuid() != 0:
        return "a Docker daemon of one's own needs root"
    absent = [program for program in ("dockerd", "containerd", "runc", "git") if not shutil.which(program)]
    return f"{', '.join(absent)} missing: apt-get install docker.io git" if absent else ""


class DoesNotStart(RuntimeError):
    """The end of the daemon's log, which says what this machine lacks."""


class Daemon:
    """dockerd in ``home``, which can be killed and started again as a machine's would."""

    def __init__(self, home):
        self.home = Path(home)
        self.url = f"unix://{self.home}/docker.sock"
        self.process = None

    def start(self):
        import docker

        for left in ("docker.pid", "exec/containerd/containerd.pid"):  # numbers of processes that a kill ended
            (self.home / left).unlink(missing_ok=True)
        command = ["dockerd", "--data-root", self.home / "data", "--exec-root", self.home / "exec"]
        command += ["-p", self.home / "docker.pid", "-H", self.url, "--storage-driver=overlay2", "--bridge=none"]
        command += ["--iptables=false", "--ip6tables=false", "--exec-opt", "native.cgroupdriver=cgroupfs"]
        with open(self.home / "log", "ab") as log:
            quiet = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self.process = subprocess.Popen(list(map(str, command)), start_new_session=True, **quiet)
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with suppress(docker.errors.DockerException, OSError):
                client = docker.DockerClient(base_url=self.url, timeout=10)
                client.ping()
                client.close()
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise DoesNotStart((self.home / "log").read_text()[-500:])
            time.sleep(0.1)

    def kill(self):
        """kill -9; its containerd dies with it, the containers' shims do not."""
        self.process.kill()
        self.process.wait(timeout=30)

    def shims(self):
        """The processes that hold this daemon's containers; they outlive its kill, and sometimes their containers."""
        command = ["pgrep", "-f", f"containerd-shim.*{self.home}/"]
        return [int(pid) for pid in subprocess.run(command, capture_output=True, text=True).stdout.split()]

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.kill()
        for shim in self.shims():  # of containers that ran when it was killed
            for process in processes_below(shim):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        for mount in sorted(mounts_below(self.home), reverse=True):
            subprocess.run(["umount", "-l", mount], check=False, capture_output=True)


def processes_with(word):
    """Those that stay: what was killed takes a moment to vanish from a busy machine."""
    for _ in range(30):
        found = subprocess.run(["pgrep", "-f", word], capture_output=True, text=True, check=False).stdout.split()
        if not found:
            break
        time.sleep(0.1)
    return found


def wait_for(condition, deadline_s=60):
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"nothing happened in {deadline_s} s"
        time.sleep(0.05)


def processes_below(parent):
    """A process and all that it started, the last first."""
    listed = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True, check=False).stdout
    return [one for child in listed.split() for one in processes_below(int(child))] + [parent]


def mounts_below(folder):
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line.split()[1] for line in lines if line.split()[1].startswith(f"{folder}/")]


@contextmanager
def docker_daemon():
    """A running Daemon that has IMAGE; ended, with all its containers, in any case."""
    home = tempfile.mkdtemp(prefix="megatron-dagger-docker-")
    daemon = Daemon(home)
    try:
        daemon.start()
        load_image(daemon.url, Path(home))
        yield daemon
    finally:
        try:
            if daemon.process.poll() is not None:
                daemon.start()
            remove_containers(daemon.url)
        finally:
            daemon.stop()
            shutil.rmtree(home, ignore_errors=True)


def remove_containers(url):
    import docker

    client = docker.DockerClient(base_url=url)
    for container in client.api.containers(all=True):
        client.api.remove_container(container["Id"], force=True)
    client.close()


def load_image(url, folder):
    import docker

    archive = folder / "rootfs.tar"
    write_rootfs(archive)
    client = docker.DockerClient(base_url=url)
    name, tag = IMAGE.split(":")
    changes = ["ENV PYTHONPATH=/opt/packages", "ENV LANG=C.UTF-8", "ENV PATH=/usr/local/bin:/usr/bin:/bin"]
    client.api.import_image_from_file(str(archive), repository=name, tag=tag, changes=changes)
    client.close()
    archive.unlink()


def write_rootfs(path):
    """A root file system of this host's shell, tools, git and Python with pytest, and their libraries."""
    python = Path(sys.base_prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}")
    stdlib = Path(sysconfig.get_path("stdlib", vars={"base": sys.base_prefix, "installed_base": sys.base_prefix}))
    git_core = Path(subprocess.check_output(["git", "--exec-path"], text=True).strip())
    programs = [Path(shutil.which(name)) for name in PROGRAMS.split() if shutil.which(name)]
    extensions = sorted(stdlib.glob("lib-dynload/*.so"))
    with tarfile.open(path, "w") as archive:
        for name in ("bin", "sbin", "lib", "lib64"):
            if os.path.islink(f"/{name}"):
                archive.add(f"/{name}", arcname=name, recursive=False)
        add_text(archive, "etc/passwd", "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534::/:/bin/false\n")
        add_text(archive, "etc/group", "root:x:0:\nnogroup:x:65534:\n")
        add_folder(archive, "tmp", 0o1777)
        add_folder(archive, "root", 0o700)
        add_text(archive, "usr/local/bin/pytest", '#!/bin/sh\nexec python -m pytest "$@"\n', 0o755)
        files = [*programs, python, *libraries([*programs, python, *extensions])]
        for name, file in {place(file): file for file in files}.items():
            archive.add(os.path.realpath(file), arcname=name)
        for name in ("python", "python3"):
            link = tarfile.TarInfo(f"usr/local/bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, place(python, slash="/")
            archive.addfile(link)
        archive.add(git_core, arcname=place(git_core))
        archive.add(stdlib, place(stdlib), filter=lambda member: None if LEFT_OUT.search(member.name) else member)
        for package in PACKAGES:
            add_package(archive, package)


def libraries(files):
    """What the files are linked against, and the loader."""
    found = set()
    for file in files:
        listed = subprocess.run(["ldd", str(file)], capture_output=True, text=True, check=False).stdout
        found |= {Path(word) for line in listed.splitlines() for word in line.split() if word.startswith("/")}
    return found


def place(path, slash=""):
    """Where a file lies, with the links of its folders resolved: /lib is a link itself."""
    path = Path(path)
    return slash + str(Path(os.path.realpath(path.parent), path.name)).lstrip("/")


def add_package(archive, name):
    try:
        files = importlib.metadata.distribution(name).files
    except importlib.metadata.PackageNotFoundError:
        return
    for file in files:
        if ".." not in file.parts and "__pycache__" not in file.parts and file.locate().is_file():
            archive.add(file.locate(), arcname=f"opt/packages/{file}")


def add_folder(archive, name, mode):
    member = tarfile.TarInfo(name)
    member.type, member.mode = tarfile.DIRTYPE, mode
    archive.addfile(member)


def add_text(archive, name, text, mode=0o644):
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(text.encode()), mode
    archive.addfile(member, io.BytesIO(text.encode()))
