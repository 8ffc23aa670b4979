"""Requests to the servers of one OpenAI-compatible endpoint: balanced, retried, and stopped by a budget.

A server that fails is left alone for a while, longer after each failure. Tokens are counted by the ResponseCache.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from megatron_dagger.config import TeacherConfig
from megatron_dagger.policies.base import BudgetSpent, PolicyError, PolicyGone
from megatron_dagger.policies.clock import exclude
from megatron_dagger.policies.openai.cache import ResponseCache
from megatron_dagger.policies.openai.failures import Forbidden, Unavailable, refusal, retry_after_s
from megatron_dagger.policies.openai.proxies import direct_mounts

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.5, 60.0  # after a server's first failure, doubled with each further one
_MAX_PAUSE_UNREACHABLE_S = 10.0  # for an unreachable server: it may be starting, and is noticed soon
T = TypeVar("T")
Parse = Callable[[str, dict[str, Any]], T]  # (url of the server, body of its response) -> result


@dataclass
class _Server:
    url: str
    waiting: int = 0  # requests that wait for its response
    failures: int = 0  # in a row
    closed_until: float = 0.0


class EndpointPool:
    """All requests to one endpoint, at most ``concurrent_requests`` at a time.

    The stages of a run each have an event loop, so connections live on a loop of their own, in a background thread
    that the first request starts. ``close`` ends both; the pool is also a context manager. The API key is read
    from the environment when a request is sent.
    """

    def __init__(self, config: TeacherConfig, cache: ResponseCache):
        self._config, self._cache = config, cache
        self._servers = [_Server(url.rstrip("/")) for url in config.urls]
        self._last_success = -math.inf  # on the monotonic clock
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    async def request(self, path: str, body: dict[str, Any], parse: Parse[T]) -> T:
        """POST ``body`` to ``path`` on a server, and return ``parse`` of its response.

        A request is repeated while the server is ``failures.Unavailable``, which ``parse`` may raise too. Raises
        PolicyGone if no server answers any request within ``patience_s`` or one refuses all requests; NoAction if
        asking again will not help, as for a conversation that is too long; PolicyError if only this request fails, or
        if ``parse`` raises it; BudgetSpent if a budget is used up.
        """
        loop = self._running_loop()
        running = asyncio.run_coroutine_threadsafe(self._request(path, body, parse), loop)
        result, waited_s = await asyncio.wrap_future(running)
        exclude(waited_s)
        return result

    def close(self) -> None:
        """Close all connections. Running requests are cancelled. May be called twice."""
        with self._lock:
            if self._thread is not None:
                self._loop.call_soon_threadsafe(self._closing.set)
                self._thread.join()
                self._thread = None

    def __enter__(self) -> EndpointPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        """Return the pool's event loop; start it if it does not run."""
        with self._lock:
            if self._thread is None:
                limit = self._config.concurrent_requests
                timeout = httpx.Timeout(self._config.request_timeout_s, pool=None)  # a request waits for its slot only
                limits = httpx.Limits(max_connections=limit, max_keepalive_connections=limit)
                direct = direct_mounts(server.url for server in self._servers)
                self._client = httpx.AsyncClient(timeout=timeout, limits=limits, mounts=direct)
                self._slots, self._closing = asyncio.Semaphore(limit), asyncio.Event()
                ready: Future[asyncio.AbstractEventLoop] = Future()
                target = functools.partial(asyncio.run, self._keep_open(ready))
                self._thread = threading.Thread(target=target, name="endpoint-pool", daemon=True)
                self._thread.start()
                self._loop = ready.result()
            return self._loop

    # The methods below run on the pool's event loop.

    async def _keep_open(self, ready: Future[asyncio.AbstractEventLoop]) -> None:
        async with self._client:
            ready.set_result(asyncio.get_running_loop())
            await self._closing.wait()

    async def _request(self, path: str, body: dict[str, Any], parse: Parse[T]) -> tuple[T, float]:
        """Return the result, and the seconds until the request was sent to the server that answered it."""
        asked = time.monotonic()
        async with self._slots:
            self._check_budget()
            result, sent = await self._request_until_answered(path, body, parse)
        return result, sent - asked

    def _check_budget(self) -> None:
        config, prompt, completion = self._config, self._cache.prompt_tokens, self._cache.completion_tokens
        if config.token_budget is not None and prompt + completion >= config.token_budget:
            raise BudgetSpent(
                f"the teacher has read and written {prompt + completion:,} tokens, teacher.token_budget is "
                f"{config.token_budget:,}; {_how_to_raise('teacher.token_budget')}"
            )
        cost = (
            prompt * config.price_per_million_prompt_tokens + completion * config.price_per_million_completion_tokens
        ) / 1e6
        if config.money_budget is not None and cost >= config.money_budget:
            raise BudgetSpent(
                f"the teacher has cost {cost:.2f}, teacher.money_budget is {config.money_budget:.2f}; "
                f"{_how_to_raise('teacher.money_budget')}"
            )

    async def _request_until_answered(self, path: str, body: dict[str, Any], parse: Parse[T]) -> tuple[T, float]:
        """Return the result, and when the request was sent that was answered, on the monotonic clock."""
        end = time.monotonic() + self._config.patience_s
        problem = "no request was sent"
        while (now := time.monotonic()) < end:
            server = min(self._servers, key=lambda s: (max(s.closed_until, now), s.waiting))
            if server.closed_until > now:
                await asyncio.sleep(min(server.closed_until, end) - now)
                continue
            server.waiting += 1
            sent = time.monotonic()
            failures, max_pause_s, least_pause_s = server.failures, _MAX_PAUSE_S, 0.0
            try:
                response = await self._client.post(f"{server.url}/{path}", json=body, headers=self._headers())
                result = parse(server.url, _json(server.url, response))
                server.failures, self._last_success = 0, time.monotonic()
                return result, sent
            except Unavailable as error:
                problem, least_pause_s = str(error), error.retry_after_s or 0.0
            except Forbidden as error:
                # Content that the endpoint does not like is refused in the same way as a key without rights
                raise error if self._works(time.monotonic()) else PolicyGone(str(error)) from None
            except httpx.HTTPError as error:
                problem = f"{server.url}: {type(error).__name__} {error}".rstrip()
                max_pause_s = _MAX_PAUSE_UNREACHABLE_S
            finally:
                server.waiting -= 1
            # The first of several requests records an outage; each may learn how long it will last
            if server.failures == failures or time.monotonic() + least_pause_s > server.closed_until:
                self._pause(server, problem, max_pause_s, least_pause_s)
        message = f"no teacher answered within {self._config.patience_s:.0f} s; the last problem: {problem}"
        raise PolicyError(message) if self._works(end) else PolicyGone(message)

    def _works(self, now: float) -> bool:
        """Return whether the endpoint answered another request lately, so that a failing request is itself at fault.

        That is, within half of ``patience_s``: since an earlier answer every request may have failed.
        """
        return self._last_success > now - self._config.patience_s / 2

    def _pause(self, server: _Server, problem: str, max_pause_s: float, least_pause_s: float) -> None:
        pause = min(_FIRST_PAUSE_S * 2**server.failures, max_pause_s) * random.uniform(0.5, 1.0)
        pause = max(pause, least_pause_s)
        server.failures += 1
        server.closed_until = time.monotonic() + pause
        logger.warning("teacher: %s; next try in %.1f s", problem, pause)

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(self._config.api_key_env)
        return {"Authorization": f"Bearer {key}"} if key else {}


def _how_to_raise(name: str) -> str:
    return f"raise it and resume with `megatron-dagger run RUN {name}=VALUE` (cached responses are not paid for again)"


def _json(url: str, response: httpx.Response) -> dict[str, Any]:
    """Return the JSON object of a response. Raises as ``failures.refusal`` if there is none."""
    if not response.is_success:
        raise refusal(url, response.status_code, response.text, response.headers)
    try:
        body = response.json()
    except (ValueError, RecursionError) as error:  # a gateway's page, for example
        raise Unavailable(f"{url} answered with invalid JSON ({error})", retry_after_s(response.headers)) from None
    if not isinstance(body, dict):
        raise Unavailable(f"{url} answered with JSON that is not an object")
    return body
