"""A policy behind an OpenAI-compatible endpoint: a language model as the teacher.

The teacher has its own tokenizer and chat template. It gets the conversation as messages; an action is read from its
response and written in the student's format. Responses are cached, so a restarted round never pays twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_dagger.config import TeacherConfig
from megatron_dagger.policies.base import NoAction, PolicyError
from megatron_dagger.policies.openai.cache import MalformedResponse, Response, ResponseCache, request_key
from megatron_dagger.policies.openai.endpoint_pool import EndpointPool
from megatron_dagger.types import Action, State

_SEEDS = 2**31  # endpoints take a seed below this


class EndpointPolicy:
    """The teacher as a Policy.

    ``read`` returns the text of the action in a response, in the student's format, or raises MalformedResponse.
    ``encode`` turns that text into the action's tokens (``ChatRenderer.action``).
    """

    name = "teacher"

    def __init__(
        self,
        config: TeacherConfig,
        pool: EndpointPool,
        cache: ResponseCache,
        *,
        read: Callable[[Response], str],
        encode: Callable[[str], np.ndarray],
    ):
        self._config, self._pool, self._cache = config, pool, cache
        self._read, self._encode = read, encode

    async def act(self, state: State) -> Action:
        """Return the teacher's action in ``state``.

        A malformed response is requested again, with another seed, up to ``malformed_retries`` times; then raises
        NoAction. Malformed responses are cached as well, so a restart gives the same result. Otherwise raises as
        EndpointPool.request.
        """
        attempts = self._config.malformed_retries + 1
        problem: MalformedResponse | None = None
        for attempt in range(attempts):
            response = await self._respond(self._request(state, attempt))
            try:
                text = self._read(response)
            except MalformedResponse as error:
                problem = error
                continue
            return Action(text=text, tokens=self._encode(text))
        raise NoAction(f"the teacher gave no action in {attempts} answers; the last problem: {problem}")

    def _request(self, state: State, attempt: int) -> dict[str, Any]:
        sampling = self._config.sampling
        return {
            "model": self._config.model,
            "messages": [{"role": message.role, "content": message.content} for message in state.messages],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": (state.seed + attempt) % _SEEDS,
        }

    async def _respond(self, request: dict[str, Any]) -> Response:
        key = request_key(request)
        cached = self._cache.get(key)
        if cached is not None:
            return cached
        response = await self._pool.request("chat/completions", request, _parse)
        await asyncio.to_thread(self._cache.put, key, response)
        return response


def _parse(url: str, body: dict[str, Any]) -> Response:
    """Return the response in a chat completion. Raises PolicyError if ``body`` is none."""
    try:
        message, usage = body["choices"][0]["message"], body.get("usage") or {}
        calls = [call["function"] for call in message.get("tool_calls") or []]
        return Response(
            text=message.get("content") or "",
            tool_calls=tuple((str(call["name"]), str(call["arguments"])) for call in calls),
            prompt_tokens=int(usage.get("prompt_tokens", 0)),
            completion_tokens=int(usage.get("completion_tokens", 0)),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise PolicyError(f"{url} answered with something other than a chat completion ({error!r})") from None
