"""A policy behind an OpenAI-compatible endpoint: a language model as the teacher.

The teacher has its own tokenizer and chat template. It gets the conversation as messages; an action is read from its
response and written in the student's format. Responses are cached, so a restarted round never pays twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_dagger.config import TeacherConfig
from megatron_dagger.policies.base import NoAction
from megatron_dagger.policies.openai.cache import MalformedResponse, Response, ResponseCache, request_key
from megatron_dagger.policies.openai.completion import check_complete, parse_completion
from megatron_dagger.policies.openai.endpoint_pool import EndpointPool
from megatron_dagger.types import Action, State

logger = logging.getLogger(__name__)

_EMPTY = "(no text)"  # in place of a message without text, which some servers refuse
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
                check_complete(response)
                text = self._read(response)
                return Action(text=text, tokens=self._encode(text))
            except MalformedResponse as error:
                problem = error
            except Exception as error:  # of any kind: the response comes from outside, and is cached
                logger.exception("the teacher's response %.500r cannot be read", response)
                problem = MalformedResponse(f"{type(error).__name__}: {error}")
        raise NoAction(f"the teacher gave no action in {attempts} answers; the last problem: {problem}")

    def _request(self, state: State, attempt: int) -> dict[str, Any]:
        sampling = self._config.sampling
        parameters = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self._config.max_tokens_parameter: sampling.max_tokens,
            "seed": (state.seed + attempt) % _SEEDS,
        }
        return {
            "model": self._config.model,
            "messages": [
                {"role": m.role, "content": m.content if m.content.strip() else _EMPTY} for m in state.messages
            ],
            **{name: value for name, value in parameters.items() if name not in self._config.omitted_parameters},
        }

    async def _respond(self, request: dict[str, Any]) -> Response:
        key = request_key(request)
        cached = self._cache.get(key)
        if cached is not None:
            return cached
        response = await self._pool.request("chat/completions", request, parse_completion)
        await asyncio.to_thread(self._cache.put, key, response)
        return response
