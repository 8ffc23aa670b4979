"""The environment with NeMo-Run and without engines, from which jobs are launched."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-launch" / "bin" / "python"
SKIP_REASON = "there is no .venv-launch with NeMo-Run; create it with tools/setup"


def run_python(folder, *argv, environment=os.environ, expected=0, timeout=300):
    """Run this environment's Python in ``folder``, assert the expected exit code, and return the output.

    NeMo-Run keeps its experiments in ``folder`` too.
    """
    variables = {**environment, "PYTHONPATH": str(ROOT), "NEMORUN_HOME": str(folder / "nemo"), "COLUMNS": "200"}
    done = subprocess.run(
        [PYTHON, *map(str, argv)], env=variables, cwd=folder, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == expected, (done.returncode, done.stdout[-3000:], done.stderr[-3000:])
    return done.stdout + done.stderr
