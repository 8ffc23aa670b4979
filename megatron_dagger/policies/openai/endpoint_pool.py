"""The replicas of an OpenAI-compatible endpoint: the load shared, failures waited out, a budget kept.

A replica that fails is left alone for a while, longer each time. What the endpoint has read and written is
counted by the ResponseCache; a spent budget ends the run cleanly.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from megatron_dagger.config import TeacherConfig
from megatron_dagger.policies.base import BudgetSpent, NoAction, PolicyError, PolicyGone
from megatron_dagger.policies.openai.cache import ResponseCache

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 60.0  # that a failing replica is left alone, doubled each time
_LONGEST_AWAY_S = 10.0  # the same where nobody answers: one that is starting is to be found soon
_WORTH_ANOTHER_TRY = {408, 409, 425, 429, 500, 502, 503, 504}
_REFUSES_ALL = {401, 402, 404}  # the key, the account or the model's name is wrong
_TOO_LONG = re.compile(r"context[ _](length|window)|maximum model length|too long", re.IGNORECASE)
T = TypeVar("T")
Parse = Callable[[str, dict[str, Any]], T]  # what the replica at an address answered


@dataclass
class _Replica:
    url: str
    waiting: int = 0
    failures: int = 0  # in a row
    closed_until: float = 0.0


class EndpointPool:
    """All that is asked of one endpoint. The key is read from the environment when a request is sent."""

    def __init__(self, config: TeacherConfig, replies: ResponseCache):
        self._config, self._replies = config, replies
        self._replicas = [_Replica(url.rstrip("/")) for url in config.urls]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._answered = -math.inf  # when a request was last answered

    async def ask(self, path: str, request: dict[str, Any], parse: Parse[T]) -> T:
        """What ``parse`` makes of the first answer of a replica to a POST of ``request`` to its ``path``.

        Raises PolicyGone if no replica answers anything within ``patience_s`` or one refuses whatever it is asked,
        NoAction if the request is too long for the model, PolicyError if it alone is not answered, is refused for
        another reason or ``parse`` raises one; BudgetSpent if nothing may be asked any more.
        """
        self._open()
        async with self._places:
            self._check_budget()
            return await self._ask(path, request, parse)

    def _open(self) -> None:
        """The connections and places belong to one event loop; a stage has its own."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop = loop
            most = self._config.concurrent_requests  # the places are what is waited for, never a connection
            timeout = httpx.Timeout(self._config.request_timeout_s, pool=None)
            limits = httpx.Limits(max_connections=most, max_keepalive_connections=most)
            self._client = httpx.AsyncClient(timeout=timeout, limits=limits)
            self._places = asyncio.Semaphore(most)

    def _check_budget(self) -> None:
        config, prompt, completion = self._config, self._replies.prompt_tokens, self._replies.completion_tokens
        if config.token_budget is not None and prompt + completion >= config.token_budget:
            raise BudgetSpent(
                f"the teacher has read and written {prompt + completion:,} tokens, teacher.token_budget is "
                f"{config.token_budget:,}; {_more('teacher.token_budget')}"
            )
        money = (
            prompt * config.price_per_million_prompt_tokens + completion * config.price_per_million_completion_tokens
        ) / 1e6
        if config.money_budget is not None and money >= config.money_budget:
            raise BudgetSpent(
                f"the teacher has cost {money:.2f}, teacher.money_budget is {config.money_budget:.2f}; "
                f"{_more('teacher.money_budget')}"
            )

    async def _ask(self, path: str, request: dict[str, Any], parse: Parse[T]) -> T:
        """Ask the replicas until one answers."""
        end = time.monotonic() + self._config.patience_s
        problem = "none was asked"
        while (now := time.monotonic()) < end:
            replica = min(self._replicas, key=lambda r: (max(r.closed_until, now), r.waiting))
            if replica.closed_until > now:
                await asyncio.sleep(min(replica.closed_until, end) - now)
                continue
            replica.waiting += 1
            failures, longest_s = replica.failures, _LONGEST_PAUSE_S
            try:
                response = await self._client.post(f"{replica.url}/{path}", json=request, headers=self._headers())
                if response.status_code not in _WORTH_ANOTHER_TRY:
                    answer = parse(replica.url, _body(replica.url, response))
                    replica.failures, self._answered = 0, time.monotonic()
                    return answer
                problem = f"{replica.url} answered {response.status_code}"
            except httpx.TransportError as error:
                problem, longest_s = f"{replica.url}: {type(error).__name__} {error}".rstrip(), _LONGEST_AWAY_S
            finally:
                replica.waiting -= 1
            if replica.failures == failures:  # else another request that was under way with it has failed first
                self._leave_alone(replica, problem, longest_s)
        alive = self._answered > end - self._config.patience_s / 2  # others were answered: it is this request
        why = f"no teacher answered within {self._config.patience_s:.0f} s; the last: {problem}"
        raise PolicyError(why) if alive else PolicyGone(why)

    def _leave_alone(self, replica: _Replica, problem: str, longest_s: float) -> None:
        pause = min(_FIRST_PAUSE_S * 2**replica.failures, longest_s) * random.uniform(0.5, 1.0)
        replica.failures += 1
        replica.closed_until = time.monotonic() + pause
        logger.warning("teacher: %s; next try in %.1f s", problem, pause)

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(self._config.api_key_env)
        return {"Authorization": f"Bearer {key}"} if key else {}


def _more(name: str) -> str:
    return f"what it answered is kept, and `megatron-dagger run RUN {name}=VALUE` goes on from here with more"


def _body(url: str, response: httpx.Response) -> dict[str, Any]:
    """The JSON object in an answer that is final; raises as ``EndpointPool.ask`` where it is something else."""
    if response.status_code != 200:
        refused = f"{url} refused the request with {response.status_code}: {response.text[:500]}"
        if response.status_code in _REFUSES_ALL:
            raise PolicyGone(refused)
        raise NoAction(refused) if _TOO_LONG.search(response.text) else PolicyError(refused)
    try:
        body = response.json()
    except ValueError as error:
        raise PolicyError(f"{url} answered something that is no JSON ({error})") from None
    if not isinstance(body, dict):
        raise PolicyError(f"{url} answered something that is no JSON object")
    return body
