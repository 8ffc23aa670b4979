"""Every tool says what it does, wherever it is called from and with nothing set up for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[3] / "tools"
SIGNS = ("--help", "ArgumentParser(")
WITH_HELP = sorted(tool for tool in TOOLS.rglob("*.py") if any(sign in tool.read_text() for sign in SIGNS))


@pytest.mark.parametrize("tool", WITH_HELP, ids=lambda tool: tool.name)
def test_help(tool, tmp_path):
    done = subprocess.run(
        [sys.executable, str(tool), "--help"],
        cwd=tmp_path, env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 100
