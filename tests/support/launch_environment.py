"""The environment in which rounds are launched: it has NeMo-Run, and no engine."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-launch" / "bin" / "python"
LACKING = "there is no .venv-launch with NeMo-Run: tools/setup makes it"


def nemo(folder, *command, environment=os.environ, expected=0, timeout=300):
    """Run its Python in ``folder``, where NeMo-Run keeps its experiments too, to the expected code; its output."""
    variables = {**environment, "PYTHONPATH": str(ROOT), "NEMORUN_HOME": str(folder / "nemo"), "COLUMNS": "200"}
    done = subprocess.run(
        [PYTHON, *map(str, command)], env=variables, cwd=folder, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == expected, (done.returncode, done.stdout[-3000:], done.stderr[-3000:])
    return done.stdout + done.stderr
