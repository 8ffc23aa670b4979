"""The requirements of an installation: a Python, git, bubblewrap, disk space."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .steps import ROOT, SetupError, run, say

TOOLS = {"git": "git", "bwrap": "bubblewrap"}  # a program and its Debian package
_PROBE = """\
import sys, venv, ensurepip
print(*sys.version_info[:2])
print(getattr(sys, "_base_executable", sys.executable))
"""


def find_python(path, version):
    """Return the path of a Python of ``version``, such as (3, 11), with venv and not itself in a virtual environment.

    ``path`` (None: any) is the only candidate. Raises SetupError with the reason for each candidate that fails.
    """
    version = ".".join(map(str, version))
    seen = []
    for candidate in [path] if path else _candidates(version):
        try:
            done = subprocess.run([candidate, "-c", _PROBE], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            seen.append(f"{candidate}: {error}")
            continue
        if done.returncode:
            seen.append(f"{candidate}: {(done.stderr.strip().splitlines() or ['it fails'])[-1]}")
            continue
        candidate_version, base = done.stdout.splitlines()
        candidate_version = candidate_version.replace(" ", ".")
        if candidate_version == version:
            return base
        seen.append(f"{candidate}: it is Python {candidate_version}")
    tried = "\n    ".join(seen or ["none on PATH"])
    raise SetupError(
        f"no Python {version} with venv and ensurepip was found:\n    {tried}\n"
        f"  Install one (`pyenv install {version}`, `uv python install {version}`, or as root"
        f" `apt-get install python{version}-venv`), or name it with --python PATH.\n"
        "  The pins are for this version; for another one create an environment yourself:\n"
        "  pip install -e '.[train,rollout,swe,dev]'"
    )


def _candidates(version):
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    paths = [sys.executable, shutil.which(f"python{version}")]
    paths += [str(path) for path in sorted(pyenv.glob(f"{version}*/bin/python"))]
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR", Path.home() / ".local/share/uv/python"))
    paths += [str(path) for path in sorted(uv.glob(f"cpython-{version}*/bin/python3"))]
    paths += [f"/usr/local/bin/python{version}", f"/usr/bin/python{version}"]
    return [path for path in dict.fromkeys(paths) if path and Path(path).exists()]


def check_tools():
    """Install git and bubblewrap if they are missing and we are root. Raises SetupError without git.

    Without bubblewrap, which isolates the agent's commands, there is only a warning.
    """
    missing = [package for tool, package in TOOLS.items() if not shutil.which(tool)]
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
        try:
            run("apt-get update", ["apt-get", "update", "-q"], env)
            install = ["apt-get", "install", "-qy", "--no-install-recommends"]
            run(f"installing {' '.join(missing)}", [*install, *missing], env)
        except SetupError as error:
            say(f"warning: {error}")
    if not shutil.which("git"):
        raise SetupError("git is missing, which the tasks need: run `apt-get install git` as root")
    if not shutil.which("bwrap"):
        say("warning: bubblewrap is missing, so the agent's commands cannot be isolated in namespaces:")
        say("         run `apt-get install bubblewrap` as root")


def check_disk(need_gb):
    """Raise SetupError unless the checkout's disk has ``need_gb`` GB free."""
    free_gb = shutil.disk_usage(ROOT).free / 1e9
    if free_gb < need_gb:
        raise SetupError(
            f"{free_gb:.1f} GB are free on the disk of {ROOT} and {need_gb:.1f} GB are needed: free some space,"
            " or move the checkout to another disk"
        )
