"""A Docker daemon for tests and tools, and an image made from this host's programs: nothing is pulled.

The daemon keeps everything in a temporary directory.
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
# Parts of the standard library that are not copied. Of its tests only the modules that other code imports are copied.
EXCLUDED = re.compile(
    r"/(tests|test/(?!support|__init__)[^/]+|(site|dist)-packages|idlelib|tkinter|ensurepip|__pycache__|config-[^/]*)(/|$)"
)


def missing():
    """Return why no daemon can be started here; empty if one can."""
    if os.geteuid() != 0:
        return "starting a Docker daemon needs root"
    absent = [program for program in ("dockerd", "containerd", "runc", "git") if not shutil.which(program)]
    return f"{', '.join(absent)} missing: apt-get install docker.io git" if absent else ""


class DaemonStartError(RuntimeError):
    """The daemon did not start; the message is the end of its log."""


class Daemon:
    """dockerd with all its files in ``home``; it can be killed and started again."""

    def __init__(self, home):
        self.home = Path(home)
        self.url = f"unix://{self.home}/docker.sock"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self):
        """Start dockerd and wait until it answers. Raises DaemonStartError."""
        import docker

        for pid_file in ("docker.pid", "exec/containerd/containerd.pid"):  # left by a killed daemon
            (self.home / pid_file).unlink(missing_ok=True)
        command = ["dockerd", "--data-root", self.home / "data", "--exec-root", self.home / "exec"]
        command += ["-p", self.home / "docker.pid", "-H", self.url, "--storage-driver=overlay2", "--bridge=none"]
        command += ["--iptables=false", "--ip6tables=false", "--exec-opt", "native.cgroupdriver=cgroupfs"]
        with open(self.home / "log", "ab") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), start_new_session=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with suppress(docker.errors.DockerException, OSError):
                client = docker.DockerClient(base_url=self.url, timeout=10)
                client.ping()
                client.close()
                return
            if not self.is_running() or time.monotonic() > deadline:
                raise DaemonStartError((self.home / "log").read_text()[-500:])
            time.sleep(0.1)

    def is_running(self):
        """Return whether dockerd is running."""
        return self.process is not None and self.process.poll() is None

    def kill(self):
        """Kill dockerd with SIGKILL. Its containerd dies with it; the containers' shims do not."""
        assert self.process is not None, "the daemon was not started"
        self.process.kill()
        self.process.wait(timeout=30)

    def shims(self):
        """Return the pids of the containers' parents; they outlive a killed daemon, and sometimes the containers."""
        command = ["pgrep", "-f", f"containerd-shim.*{self.home}/"]
        return [int(pid) for pid in subprocess.run(command, capture_output=True, text=True).stdout.split()]

    def stop(self):
        """Stop dockerd, kill what its containers left, and unmount its file systems."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.kill()
        for shim in self.shims():  # of containers that were running when the daemon was killed
            for process in processes_below(shim):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        for mount in sorted(mounts_below(self.home), reverse=True):
            subprocess.run(["umount", "-l", mount], check=False, capture_output=True)


def processes_with(pattern):
    """Return the pids whose command line matches ``pattern``, once killed processes have had time to vanish."""
    for _ in range(30):
        pids = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=False).stdout.split()
        if not pids:
            break
        time.sleep(0.1)
    return pids


def processes_below(parent):
    """Return the pids of a process and its descendants, descendants first."""
    listed = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True, check=False).stdout
    return [pid for child in listed.split() for pid in processes_below(int(child))] + [parent]


def mounts_below(folder):
    """Return the mount points below a folder."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line.split()[1] for line in lines if line.split()[1].startswith(f"{folder}/")]


@contextmanager
def docker_daemon():
    """Yield a running Daemon that has IMAGE; stop it and remove its containers afterwards."""
    home = tempfile.mkdtemp(prefix="megatron-dagger-docker-")
    daemon = Daemon(home)
    try:
        daemon.start()
        load_image(daemon.url, Path(home))
        yield daemon
    finally:
        try:
            if not daemon.is_running():
                daemon.start()
            remove_containers(daemon.url)
        finally:
            daemon.stop()
            shutil.rmtree(home, ignore_errors=True)


def remove_containers(url):
    """Remove all containers of a daemon."""
    import docker

    client = docker.DockerClient(base_url=url)
    for container in client.api.containers(all=True):
        client.api.remove_container(container["Id"], force=True)
    client.close()


def load_image(url, folder):
    """Build IMAGE and import it into a daemon; ``folder`` holds the archive meanwhile."""
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
    """Write a tar archive of this host's shell, tools, git, and Python with pytest, and their libraries."""
    python = Path(sys.base_prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}")
    stdlib = Path(sysconfig.get_path("stdlib", vars={"base": sys.base_prefix, "installed_base": sys.base_prefix}))
    git_core = Path(subprocess.check_output(["git", "--exec-path"], text=True).strip())
    programs = [Path(program) for program in map(shutil.which, PROGRAMS.split()) if program]
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
        for name, file in {path_in_image(file): file for file in files}.items():
            archive.add(os.path.realpath(file), arcname=name)
        for name in ("python", "python3"):
            link = tarfile.TarInfo(f"usr/local/bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, path_in_image(python, slash="/")
            archive.addfile(link)
        archive.add(git_core, arcname=path_in_image(git_core))
        archive.add(
            stdlib, path_in_image(stdlib), filter=lambda member: None if EXCLUDED.search(member.name) else member
        )
        for package in PACKAGES:
            add_package(archive, package)


def libraries(files):
    """Return the libraries that the files are linked against, and the loader."""
    paths = set()
    for file in files:
        listed = subprocess.run(["ldd", str(file)], capture_output=True, text=True, check=False).stdout
        paths |= {Path(field) for line in listed.splitlines() for field in line.split() if field.startswith("/")}
    return paths


def path_in_image(path, slash=""):
    """Return a file's path in the image, with the links of its folders resolved (/lib may be one)."""
    path = Path(path)
    return slash + str(Path(os.path.realpath(path.parent), path.name)).lstrip("/")


def add_package(archive, name):
    try:
        files = importlib.metadata.distribution(name).files or ()
    except importlib.metadata.PackageNotFoundError:
        return
    for file in files:
        path = Path(str(file.locate()))
        if ".." not in file.parts and "__pycache__" not in file.parts and path.is_file():
            archive.add(path, arcname=f"opt/packages/{file}")


def add_folder(archive, name, mode):
    member = tarfile.TarInfo(name)
    member.type, member.mode = tarfile.DIRTYPE, mode
    archive.addfile(member)


def add_text(archive, name, text, mode=0o644):
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(text.encode()), mode
    archive.addfile(member, io.BytesIO(text.encode()))
