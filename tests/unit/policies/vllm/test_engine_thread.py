"""The engine's thread: its preload before an engine is needed, and how failures reach the callers."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_dagger.policies.base import PolicyError, PolicyGone
from megatron_dagger.policies.vllm.engine import Completion, Sampling
from megatron_dagger.policies.vllm.engine_thread import EngineThread

SAMPLING = Sampling(temperature=0.0, max_tokens=1)


class ScriptedEngine:
    """Finishes all requests in the next step, which waits for ``may_step``; keeps a log of what it is asked."""

    def __init__(self):
        self.running, self.log, self.may_step = [], [], threading.Event()

    def add(self, name, prompt, sampling):
        if not prompt:
            raise PolicyError("an empty prompt")
        self.running.append(name)
        self.log.append(f"add {name}")

    def step(self):
        assert self.may_step.wait(5)
        finished, self.running = self.running, []
        return [(name, completion()) for name in finished]

    def close(self):
        self.log.append("close")


def completion():
    return Completion(tokens=None, logprobs=None, prompt_logprobs=None, weight_version="0", cached_tokens=0)


def must_not_build():
    pytest.fail("an engine was built")


def missing_module(cancelled):
    raise ImportError("no such module")


def test_a_preloaded_engine_is_built_when_it_is_started():
    preloaded, built = threading.Event(), threading.Event()

    def build():
        built.set()
        return ScriptedEngine()

    thread = EngineThread(lambda cancelled: preloaded.set())
    thread.preload()
    assert preloaded.wait(5)
    assert not thread.started
    time.sleep(0.05)
    assert not built.is_set()
    thread.start(build)
    thread.wait_until_ready(timeout_s=5)
    assert thread.started
    assert built.is_set()
    thread.close()


def test_closing_the_thread_cancels_the_preload():
    finished = threading.Event()

    def preload(cancelled):
        while not cancelled():
            time.sleep(0.01)
        finished.set()

    thread = EngineThread(preload)
    thread.preload()
    thread.close(timeout_s=5)
    assert finished.is_set()
    assert not thread.started


def test_a_failed_preload_is_reported_at_the_start():
    thread = EngineThread(missing_module)
    thread.preload()
    thread.start(must_not_build)
    with pytest.raises(PolicyError, match="the engine did not start: no such module"):
        thread.wait_until_ready(timeout_s=5)


def test_a_failed_start_is_reported_to_every_caller():
    thread = EngineThread(missing_module)
    thread.start(must_not_build)
    with pytest.raises(PolicyGone, match="the engine is gone: no such module"):
        thread.run(lambda engine: None, timeout_s=5)


def test_a_thread_starts_once():
    closed, started = EngineThread(), EngineThread()
    closed.close()
    started.start(ScriptedEngine)
    for thread in (closed, started):
        with pytest.raises(PolicyError, match="started or closed before"):
            thread.start(must_not_build)
    started.close()


def test_a_slow_start_is_an_error():
    release = threading.Event()
    thread = EngineThread(lambda cancelled: release.wait(5))
    thread.start(ScriptedEngine)
    with pytest.raises(PolicyError, match="the engine did not start within 0 s"):
        thread.wait_until_ready(timeout_s=0.05)
    release.set()
    thread.close()


def test_a_call_waits_for_running_requests_and_holds_back_new_ones():
    engine, thread = ScriptedEngine(), EngineThread()
    thread.start(lambda: engine)
    _, before = thread.submit([1], SAMPLING)
    while not engine.log:
        time.sleep(0.01)
    with ThreadPoolExecutor(1) as caller:
        call = caller.submit(thread.run, lambda engine: engine.log.append(f"call {engine.running}"), timeout_s=5)
        while thread._queue.empty():
            time.sleep(0.01)
        _, after = thread.submit([1], SAMPLING)
        engine.may_step.set()
        call.result(5)
    assert before.result(5).weight_version == after.result(5).weight_version == "0"
    thread.close()
    assert engine.log == ["add 0", "call []", "add 1", "close"]


def test_a_refused_request_fails_alone_and_a_closed_thread_refuses_all():
    engine, thread = ScriptedEngine(), EngineThread()
    engine.may_step.set()
    thread.start(lambda: engine)
    _, refused = thread.submit([], SAMPLING)
    _, accepted = thread.submit([1], SAMPLING)
    with pytest.raises(PolicyError, match="an empty prompt"):
        refused.result(5)
    assert accepted.result(5).weight_version == "0"
    thread.close()
    with pytest.raises(PolicyGone, match="the engine is gone: it was closed"):
        thread.submit([1], SAMPLING)
