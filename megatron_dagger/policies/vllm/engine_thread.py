"""One background thread that owns an engine and serves many callers at once.

It takes requests from a queue, steps the engine while any runs (continuous batching: a request joins
at the next step), and resolves the callers' futures. A call (``run``) waits until no request runs
and holds new ones back meanwhile, so weights never change under a request. If the engine fails, every
caller gets a PolicyError, now and later; nobody waits for ever.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megatron_dagger.policies.base import PolicyError, PolicyGone
from megatron_dagger.policies.vllm.engine import Completion, Sampling, VllmEngine

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(kw_only=True)
class _Request:
    name: str
    prompt: Sequence[int]
    sampling: Sampling
    future: Future[Completion] = field(default_factory=Future)


@dataclass(kw_only=True)
class _Call:
    function: Callable[[VllmEngine], Any]
    future: Future[Any] = field(default_factory=Future)


@dataclass(frozen=True, kw_only=True)
class _Abort:
    name: str


class EngineThread:
    """Builds an engine with ``build`` on its own thread and serves until ``close``.

    ``ahead`` is what the thread can do before an engine is wanted; it is given what says that none will be.
    """

    def __init__(
        self, build: Callable[[], VllmEngine], ahead: Callable[[Callable[[], bool]], None] = lambda given_up: None
    ):
        self.busy_s = 0.0  # time inside the engine's steps
        self.started = False
        self._build, self._ahead = build, ahead
        self._wanted: Future[bool] = Future()  # whether an engine is
        self._ready: Future[None] = Future()
        self._queue: queue.Queue[_Request | _Call | _Abort | None] = queue.Queue()
        self._names = itertools.count()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._running: dict[str, _Request] = {}
        self._arrived: deque[_Request | _Call] = deque()  # taken from the queue, not yet given to the engine
        self._lock = threading.Lock()  # nothing is queued after the thread has looked for the last time

    def prepare(self) -> None:
        """Do what can be done before an engine is wanted, in the background."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, name="vllm-engine", daemon=True)
            self._thread.start()

    def begin(self) -> None:
        """Start the engine in the background; what it is asked meanwhile waits, and fails if the start does."""
        if self.started:
            raise PolicyError("the engine was started before")
        self.started = True
        self.prepare()
        self._wanted.set_result(True)

    def start(self, *, timeout_s: float) -> None:
        """Start the engine; PolicyError if it fails or is not ready in time."""
        self.begin()
        try:
            self._ready.result(timeout_s)
        except TimeoutError:
            self._failure = PolicyError(f"the engine did not start within {timeout_s:.0f} s")
            raise self._failure from None
        except Exception as error:
            raise PolicyError(f"the engine did not start: {error}") from error

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> tuple[str, Future[Completion]]:
        """Queue a request; returns its name (for ``abort``) and its future."""
        request = _Request(name=str(next(self._names)), prompt=prompt, sampling=sampling)
        self._put(request)
        return request.name, request.future

    def abort(self, name: str) -> None:
        """Give up a request; nothing happens if it has ended."""
        self._queue.put(_Abort(name=name))

    def run(self, function: Callable[[VllmEngine], T], *, timeout_s: float) -> T:
        """Call ``function(engine)`` on the engine's thread while no request runs, and wait for it.

        Raises what it raises, and PolicyError when it is not done in time.
        """
        call = _Call(function=function)
        self._put(call)
        try:
            return call.future.result(timeout_s)
        except TimeoutError:
            if not call.future.done() and not call.future.cancel():  # it runs, and cannot be stopped
                self._failure = PolicyError(f"a call took over {timeout_s:.0f} s")
            raise PolicyError(f"the engine was not done within {timeout_s:.0f} s") from None

    def close(self, *, timeout_s: float = 60.0) -> None:
        """End the engine; requests under way fail. May be called twice."""
        if self._thread is None:
            return
        if not self._wanted.done():
            self._wanted.set_result(False)
        self._queue.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.error("the engine's thread did not end within %.0f s", timeout_s)

    def _put(self, item: _Request | _Call) -> None:
        if not self.started:
            raise PolicyError("the engine was not started: call start() first")
        with self._lock:
            if self._failure is not None:
                raise PolicyGone(f"the engine is gone: {self._failure}") from self._failure
            self._queue.put(item)

    # What follows runs on the engine's thread.

    def _main(self) -> None:
        engine: VllmEngine | None = None
        failure: BaseException = PolicyError("it was closed")
        try:
            began = time.monotonic()
            self._ahead(lambda: self._wanted.done() and not self._wanted.result())
            spent_s = time.monotonic() - began
            if not self._wanted.result():
                return
            began = time.monotonic()
            engine = self._build()
            logger.info("vLLM is up after %.1f s", spent_s + time.monotonic() - began)
            self._ready.set_result(None)
            while self._take(engine):
                self._admit(engine)
                if self._running:
                    self._step(engine)
        except BaseException as error:
            failure = error
            if self._ready.done():
                logger.exception("the engine failed")
            else:
                self._ready.set_exception(error)
        with self._lock:
            self._failure = self._failure or failure
        self._fail_everybody()
        if engine is not None:
            try:
                engine.close()
            except Exception:
                logger.exception("the engine did not close")

    def _take(self, engine: VllmEngine) -> bool:
        """Move what has come into ``_arrived``; wait for something if there is nothing to do."""
        try:
            while True:
                item = self._queue.get(block=not self._running and not self._arrived)
                if item is None:
                    return False
                if not isinstance(item, _Abort):
                    self._arrived.append(item)
                elif item.name in self._running:
                    engine.abort(item.name)
                    _fail(self._running.pop(item.name).future, PolicyError("the request was given up"))
        except queue.Empty:
            return True

    def _admit(self, engine: VllmEngine) -> None:
        """Give the engine what has arrived, in order; a call waits until nothing runs."""
        while self._arrived:
            item = self._arrived[0]
            if isinstance(item, _Call) and self._running:
                return
            self._arrived.popleft()
            if not item.future.set_running_or_notify_cancel():
                continue
            try:
                if isinstance(item, _Call):
                    item.future.set_result(item.function(engine))
                else:
                    engine.add(item.name, item.prompt, item.sampling)
                    self._running[item.name] = item
            except Exception as error:  # belongs to the caller; the others go on
                item.future.set_exception(error)

    def _step(self, engine: VllmEngine) -> None:
        began = time.perf_counter()
        ended = engine.step()
        self.busy_s += time.perf_counter() - began
        for name, outcome in ended:
            request = self._running.pop(name, None)
            if request is None:
                continue
            if isinstance(outcome, PolicyError):
                _fail(request.future, outcome)
            else:
                request.future.set_result(outcome)

    def _fail_everybody(self) -> None:
        waiting: list[_Request | _Call] = [*self._running.values(), *self._arrived]
        while not self._queue.empty():
            item = self._queue.get()
            if isinstance(item, (_Request, _Call)):
                waiting.append(item)
        for item in waiting:
            _fail(item.future, PolicyGone(f"the engine is gone: {self._failure}"))


def _fail(future: Future[Any], error: Exception) -> None:
    """End a future that nobody has ended; one that was cancelled stays so."""
    if not future.done():
        future.set_exception(error)
