"""Importing vLLM early: it can be cancelled, so a process that needs no engine ends promptly."""

import importlib.util
import os
import subprocess
import sys

import pytest

from megatron_dagger.config import VllmEngineConfig
from megatron_dagger.policies.vllm.preload import import_vllm, set_environment

STOPPED_WHILE_IMPORTING = """
import sys, time
from functools import partial
from megatron_dagger.config import VllmEngineConfig
from megatron_dagger.policies.vllm.engine_thread import EngineThread
from megatron_dagger.policies.vllm.preload import import_vllm

thread = EngineThread(partial(import_vllm, VllmEngineConfig()))
thread.preload()
while "torch.nn" not in sys.modules:
    time.sleep(0.01)
thread.close()
assert "vllm.v1.engine.llm_engine" not in sys.modules
import graphlib  # other imports still work
sys.exit(75)
"""


def test_a_cancelled_preload_imports_nothing_more(monkeypatch):
    imported = []
    monkeypatch.setattr("megatron_dagger.policies.vllm.preload.set_environment", lambda config: None)
    monkeypatch.setattr("megatron_dagger.policies.vllm.preload.importlib.import_module", imported.append)
    import_vllm(VllmEngineConfig(), cancelled=lambda: len(imported) == 2)
    assert imported == ["vllm", "vllm.config"]
    imported.clear()
    import_vllm(VllmEngineConfig())
    assert imported[-2:] == ["vllm.v1.engine.llm_engine", "megatron_dagger.weights.vllm.plugin"]


@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed")
def test_a_process_that_stops_does_not_wait_for_the_whole_import_and_keeps_its_exit_code():
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_WHILE_IMPORTING],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 75, done.stderr


def test_the_engines_workers_are_spawned_because_this_process_has_threads(monkeypatch):
    for name in [name for name in os.environ if name.startswith("VLLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    set_environment(VllmEngineConfig())
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "0", "the user's value"
