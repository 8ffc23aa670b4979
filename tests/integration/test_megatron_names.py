"""The weight maps have every parameter of Megatron-Core's models, with its name and shape."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="Megatron-Core is not installed")
ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_weight_maps_have_every_parameter_with_its_shape():
    command = [sys.executable, "-m", "tests.integration.megatron_names"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
