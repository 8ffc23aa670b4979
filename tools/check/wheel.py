"""Build the wheel and install it into a fresh environment with its declared dependencies, without the checkout.

The dependencies are linked from the running environment, so nothing is downloaded.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from megatron_dagger.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
CONTENT = ("pyproject.toml", "README.md", "LICENSE", "megatron_dagger", "recipes")


def commands_of_a_wheel() -> dict[str, str]:
    """Run ``--help`` of every command from an installed wheel; return the problems by command ("": none)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        programs = install(build_wheel(copy_checkout(folder / "checkout"), folder / "dist"), folder / "environment")
        return {command: _problem_of(programs, command, folder) for command in COMMANDS}


def _problem_of(programs: Path, command: str, folder: Path) -> str:
    try:
        output = run(programs / "megatron-dagger", command, "--help", cwd=folder)
    except AssertionError as error:
        return str(error)
    return "" if f"usage: megatron-dagger {command}" in output else output


def copy_checkout(target: Path) -> Path:
    """Copy the packaged files to ``target``, because building leaves files in the source folder; return ``target``."""
    target.mkdir(parents=True)
    for name in CONTENT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return target


def build_wheel(source: Path, folder: Path, kind: str = "wheel") -> Path:
    """Build the wheel (``kind="sdist"``: the sdist) of a source tree into an empty folder; return its file."""
    folder.mkdir(exist_ok=True)
    program = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
    run(sys.executable, "-c", program, cwd=source)
    [archive] = folder.iterdir()
    return archive


def install(wheel: Path, folder: Path) -> Path:
    """Create an environment with the wheel and its dependencies; return its folder of programs."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "--disable-pip-version-check"]
    run(*pip, "install", "--no-index", "--no-deps", wheel, cwd=folder)
    [site_packages] = folder.glob("lib/python*/site-packages")
    for name in set(_required("megatron-dagger")):
        _link(name, site_packages)
    return folder / "bin"


def run(*argv: object, cwd: Path, expected: int = 0) -> str:
    """Run a command without the environment variables that could lead it to the checkout; return its output."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MEGATRON_DAGGER"))}
    done = subprocess.run(
        [str(argument) for argument in argv], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout + done.stderr


def _required(distribution: str) -> Iterator[str]:
    """Yield the distributions that ``distribution`` needs without extras, directly and indirectly."""
    for text in importlib.metadata.requires(distribution) or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement.name
            yield from _required(requirement.name)


def _link(distribution: str, site_packages: Path) -> None:
    """Link the packages of an installed distribution into another environment."""
    for file in importlib.metadata.files(distribution) or []:
        top = site_packages / file.parts[0]
        if file.parts[0] not in ("..", "__pycache__") and not top.exists():
            top.symlink_to(Path(str(importlib.metadata.distribution(distribution).locate_file(file.parts[0]))))
