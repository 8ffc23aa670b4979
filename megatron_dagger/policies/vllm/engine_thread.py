"""A background thread that owns an engine and serves many callers at once.

The thread takes requests from a queue, steps the engine while any request runs (continuous batching: a new request
joins at the next step) and resolves the callers' futures. A call (``run``) waits until no request runs and holds
back new ones, so weights never change under a request. If the engine fails, every present and future caller gets a
PolicyError; nobody waits forever.
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
Build = Callable[[], VllmEngine]


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
    """Builds an engine on a thread of its own and serves requests until ``close``.

    ``preload(cancelled)`` runs on the thread before an engine is needed, for example to import vLLM early. It should
    return soon after ``cancelled()`` becomes true.
    """

    def __init__(self, preload: Callable[[Callable[[], bool]], None] = lambda cancelled: None):
        self.busy_s = 0.0  # time inside the engine's steps
        self._preload = preload
        self._build: Future[Build | None] = Future()  # None: closed before an engine was needed
        self._ready: Future[None] = Future()
        self._queue: queue.Queue[_Request | _Call | _Abort | None] = queue.Queue()
        self._names = itertools.count()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._running: dict[str, _Request] = {}
        self._arrived: deque[_Request | _Call] = deque()  # taken from the queue, not yet given to the engine
        self._lock = threading.Lock()  # keeps requests out of the queue after the thread has emptied it at its end

    @property
    def started(self) -> bool:
        """Whether ``start`` was called."""
        return self._build.done() and self._build.result() is not None

    def preload(self) -> None:
        """Run ``preload`` in the background, before it is known whether an engine is needed."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, name="vllm-engine", daemon=True)
            self._thread.start()

    def start(self, build: Build) -> None:
        """Build the engine in the background. Requests wait for it, and fail if it cannot be built."""
        if self._build.done():
            raise PolicyError("an engine thread starts once: it was started or closed before")
        self._build.set_result(build)
        self.preload()

    def wait_until_ready(self, *, timeout_s: float) -> None:
        """Wait until the engine is built. Raises PolicyError if that fails or takes longer."""
        try:
            self._ready.result(timeout_s)
        except TimeoutError:
            self._failure = PolicyError(f"the engine did not start within {timeout_s:.0f} s")
            raise self._failure from None
        except Exception as error:
            raise PolicyError(f"the engine did not start: {error}") from error

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> tuple[str, Future[Completion]]:
        """Queue a request, and return its name (for ``abort``) and its future."""
        request = _Request(name=str(next(self._names)), prompt=prompt, sampling=sampling)
        self._put(request)
        return request.name, request.future

    def abort(self, name: str) -> None:
        """Cancel a request. Nothing happens if it has finished."""
        self._queue.put(_Abort(name=name))

    def run(self, function: Callable[[VllmEngine], T], *, timeout_s: float) -> T:
        """Call ``function(engine)`` on the engine's thread while no request runs, and return its result.

        Raises what ``function`` raises, and PolicyError if it is not done in time.
        """
        call = _Call(function=function)
        self._put(call)
        try:
            return call.future.result(timeout_s)
        except TimeoutError:
            if not call.future.done() and not call.future.cancel():  # it runs, and cannot be stopped
                self._failure = PolicyError(f"a call took more than {timeout_s:.0f} s")
            raise PolicyError(f"the engine did not finish a call within {timeout_s:.0f} s") from None

    def close(self, *, timeout_s: float = 60.0) -> None:
        """Stop the engine. Running requests fail. May be called twice."""
        if not self._build.done():
            self._build.set_result(None)
        if self._thread is None:
            return
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

    # The methods below run on the engine's thread.

    def _main(self) -> None:
        engine: VllmEngine | None = None
        failure: BaseException = PolicyError("it was closed")
        try:
            began = time.monotonic()
            self._preload(lambda: self._build.done() and self._build.result() is None)
            preload_s = time.monotonic() - began
            build = self._build.result()
            if build is None:
                return
            began = time.monotonic()
            engine = build()
            logger.info("vLLM is up after %.1f s", preload_s + time.monotonic() - began)
            self._ready.set_result(None)
            while self._take(engine):
                self._submit(engine)
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
        self._fail_all()
        if engine is not None:
            try:
                engine.close()
            except Exception:
                logger.exception("the engine did not close")

    def _take(self, engine: VllmEngine) -> bool:
        """Move queued items to ``_arrived``; wait for one if there is nothing to do. Return False to stop."""
        try:
            while True:
                item = self._queue.get(block=not self._running and not self._arrived)
                if item is None:
                    return False
                if not isinstance(item, _Abort):
                    self._arrived.append(item)
                elif item.name in self._running:
                    engine.abort(item.name)
                    _fail(self._running.pop(item.name).future, PolicyError("the request was cancelled"))
        except queue.Empty:
            return True

    def _submit(self, engine: VllmEngine) -> None:
        """Pass the arrived items to the engine, in order. A call waits until no request runs."""
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
            except Exception as error:  # concerns this caller only
                item.future.set_exception(error)

    def _step(self, engine: VllmEngine) -> None:
        began = time.perf_counter()
        finished = engine.step()
        self.busy_s += time.perf_counter() - began
        for name, outcome in finished:
            request = self._running.pop(name, None)
            if request is None:
                continue
            if isinstance(outcome, PolicyError):
                _fail(request.future, outcome)
            else:
                request.future.set_result(outcome)

    def _fail_all(self) -> None:
        waiting: list[_Request | _Call] = [*self._running.values(), *self._arrived]
        while not self._queue.empty():
            item = self._queue.get()
            if isinstance(item, (_Request, _Call)):
                waiting.append(item)
        for item in waiting:
            _fail(item.future, PolicyGone(f"the engine is gone: {self._failure}"))


def _fail(future: Future[Any], error: Exception) -> None:
    """Set a future's exception, unless it is done or cancelled."""
    if not future.done():
        future.set_exception(error)
