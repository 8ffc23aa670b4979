"""The plan delivers the same parameters as vLLM's own weight loaders."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dagger.config.families import FAMILIES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("case", [*FAMILIES, "fp8"])
def test_every_rank_gets_the_parameters_that_vllm_would_load(case):
    command = [sys.executable, "-m", "tests.integration.vllm_shards", case]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
