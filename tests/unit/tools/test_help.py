"""Every tool explains itself with --help, from the repository root and without any other set-up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = [ROOT / "tools" / name for name in ("quickstart", "setup")]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "tools").rglob("*.py")
    if "ArgumentParser(" in path.read_text()
)
COMMANDS = {path.name: [str(path)] for path in PROGRAMS} | {name: ["-m", name] for name in MODULES}


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name):
    done = subprocess.run(
        [sys.executable, *COMMANDS[name], "--help"],
        cwd=ROOT, env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 100
