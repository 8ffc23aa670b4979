"""What an engine's thread does before an engine is wanted, and how it is given up."""

import importlib.util
import os
import subprocess
import sys
import threading
import time

import pytest

from megatron_dagger.policies.base import PolicyError, PolicyGone
from megatron_dagger.policies.vllm.engine_thread import EngineThread

STOPPED_WHILE_IMPORTING = """
import sys, time
from functools import partial
from megatron_dagger.config import VllmEngineConfig
from megatron_dagger.policies.vllm.engine_thread import EngineThread
from megatron_dagger.policies.vllm.preload import import_vllm

thread = EngineThread(build=lambda: None, ahead=partial(import_vllm, VllmEngineConfig()))
thread.prepare()
while "torch.nn" not in sys.modules:
    time.sleep(0.01)
thread.close()
assert "vllm.v1.engine.llm_engine" not in sys.modules
import graphlib  # others' imports go on
sys.exit(75)
"""


def test_an_engine_that_was_prepared_is_built_when_it_is_wanted():
    prepared, built = threading.Event(), threading.Event()
    thread = EngineThread(build=built.set, ahead=lambda given_up: prepared.set())
    thread.prepare()
    assert prepared.wait(5)
    assert not thread.started
    time.sleep(0.05)
    assert not built.is_set()
    thread.start(timeout_s=5)
    assert built.is_set()
    thread.close()


def test_preparing_ends_when_no_engine_is_wanted_any_more():
    ended = threading.Event()

    def ahead(given_up):
        while not given_up():
            time.sleep(0.01)
        ended.set()

    thread = EngineThread(build=lambda: pytest.fail("it was built"), ahead=ahead)
    thread.prepare()
    thread.close(timeout_s=5)
    assert ended.is_set()


def absent(given_up):
    raise ImportError("no such module")


def test_what_failed_in_advance_is_told_at_the_start():
    thread = EngineThread(build=lambda: pytest.fail("it was built"), ahead=absent)
    thread.prepare()
    with pytest.raises(PolicyError, match="the engine did not start: no such module"):
        thread.start(timeout_s=5)


def test_a_start_in_the_background_that_failed_is_told_to_who_asks_something():
    thread = EngineThread(build=lambda: pytest.fail("it was built"), ahead=absent)
    thread.begin()
    with pytest.raises(PolicyGone, match="the engine is gone: no such module"):
        thread.run(lambda engine: None, timeout_s=5)


@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed")
def test_a_process_that_is_to_stop_does_not_wait_for_the_import_and_keeps_its_exit_code():
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_WHILE_IMPORTING],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 75, done.stderr
