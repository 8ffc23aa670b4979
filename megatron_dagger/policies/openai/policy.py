"""A policy behind an OpenAI-compatible endpoint: the teacher as a language model.

It has its own tokenizer and chat template: it is sent the conversation as messages, and its answer is read
as an action and written in the student's format. Every answer is kept, so that a killed round asks nothing
twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_dagger.config import TeacherConfig
from megatron_dagger.policies.base import NoAction, PolicyError
from megatron_dagger.policies.openai.cache import MalformedResponse, Reply, ResponseCache, request_key
from megatron_dagger.policies.openai.endpoint_pool import EndpointPool
from megatron_dagger.types import Action, State

_SEEDS = 2**31  # endpoints take a seed below this


class EndpointPolicy:
    """The teacher as a Policy.

    ``read``: the action's text, in the student's format, in a Reply; raises MalformedResponse. ``encode``: an action's
    tokens (``ChatRenderer.action``).
    """

    name = "teacher"

    def __init__(
        self,
        config: TeacherConfig,
        replies: ResponseCache,
        *,
        read: Callable[[Reply], str],
        encode: Callable[[str], np.ndarray],
    ):
        self._config, self._replies, self._read, self._encode = config, replies, read, encode
        self.replicas = EndpointPool(config, replies)

    async def act(self, state: State) -> Action:
        """The teacher's action in a state.

        Raises NoAction if its answers hold none, which is kept, so that it is the same after a restart; else as
        EndpointPool.ask.
        """
        problem: MalformedResponse | None = None
        for attempt in range(self._config.malformed_retries + 1):
            reply = await self._reply(self._request(state, attempt))
            try:
                text = self._read(reply)
            except MalformedResponse as error:
                problem = error
                continue
            return Action(text=text, tokens=self._encode(text))
        raise NoAction(
            f"the teacher gave no action in {self._config.malformed_retries + 1} answers, the last time: {problem}"
        )

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

    async def _reply(self, request: dict[str, Any]) -> Reply:
        key = request_key(request)
        known = self._replies.get(key)
        if known is not None:
            return known
        reply = await self.replicas.ask("chat/completions", request, _parse)
        await asyncio.to_thread(self._replies.put, key, reply)
        return reply


def _parse(url: str, body: dict[str, Any]) -> Reply:
    """The reply in a chat completion; PolicyError where it is none."""
    try:
        message, usage = body["choices"][0]["message"], body.get("usage") or {}
        calls = [call["function"] for call in message.get("tool_calls") or []]
        return Reply(
            text=message.get("content") or "",
            tool_calls=tuple((str(call["name"]), str(call["arguments"])) for call in calls),
            prompt_tokens=int(usage.get("prompt_tokens", 0)),
            completion_tokens=int(usage.get("completion_tokens", 0)),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise PolicyError(f"{url} answered something that is no chat completion ({error!r})") from None
