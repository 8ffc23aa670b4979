"""What a teacher thinks of the student's own tokens: their log-probs, by vLLM's completions API.

One request an episode: its token stream as the prompt, of which the server computes the log-prob of each token
(``prompt_logprobs``). That has a meaning only where both have the same vocabulary: the server says which text each
token is, and a token that is another one here is an error, for all later ones would be as well.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_dagger.config import ConfigError, TeacherConfig
from megatron_dagger.policies.base import PolicyError, PolicyGone
from megatron_dagger.policies.openai.cache import Reply, ResponseCache, request_key
from megatron_dagger.policies.openai.endpoint_pool import EndpointPool
from megatron_dagger.types import ActedBy, Trajectory, Turn

logger = logging.getLogger(__name__)

WAY_OUT = "set teacher.score_student_turns=false"
_HALF_A_CHARACTER = "\ufffd"  # how a token decodes that is a part of one


class TeacherScores:
    """Adds ``teacher_logprobs`` to the student's turns. ``decode``: tokens as text (``ChatRenderer.text``)."""

    def __init__(
        self,
        config: TeacherConfig,
        replicas: EndpointPool,
        replies: ResponseCache,
        *,
        decode: Callable[[np.ndarray], str],
    ):
        self._config, self._replicas, self._replies, self._decode = config, replicas, replies, decode

    async def score(self, trajectory: Trajectory) -> Trajectory:
        """The episode with the log-probs, natural logarithm, of each of the student's turns at temperature 1.

        An episode that it refuses (one too long for it) stays as it is. Raises ConfigError where the server gives
        no log-probs or has another vocabulary, PolicyGone and BudgetSpent as EndpointPool.ask.
        """
        turns = trajectory.turns
        last = max((n for n, turn in enumerate(turns) if turn.acted_by is ActedBy.STUDENT), default=-1)
        if last < 0:
            return trajectory
        parts = [part for turn in turns[: last + 1] for part in (turn.prompt_tokens, turn.action.tokens)]
        tokens = np.concatenate(parts)
        request = {
            "model": self._config.model,
            "prompt": tokens.tolist(),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,
        }
        try:
            scores, usage = await self._replicas.ask("completions", request, _parse)
        except PolicyGone:
            raise
        except PolicyError as error:
            logger.warning("%s has no log-probs of the teacher: %s", trajectory.task_id, error)
            return trajectory
        if len(scores) != len(tokens):
            raise ConfigError(f"the teacher was asked about {len(tokens)} tokens and scored {len(scores)}; {WAY_OUT}")
        await asyncio.to_thread(self._replies.put, request_key(request), usage)  # it counts against the budget
        scored, position = [], 0
        for turn in turns[: last + 1]:
            start = position + len(turn.prompt_tokens)
            position = start + len(turn.action.tokens)
            of_student = turn.acted_by is ActedBy.STUDENT
            scored.append(self._scored(turn, scores[start:position]) if of_student else turn)
        return replace(trajectory, turns=(*scored, *turns[last + 1 :]))

    def _scored(self, turn: Turn, scores: list[dict[str, Any] | None]) -> Turn:
        logprobs = np.empty(len(scores), np.float32)
        for index, (token, found) in enumerate(zip(turn.action.tokens, scores, strict=True)):
            score = (found or {}).get(str(int(token)))
            if score is None:
                raise ConfigError(f"the teacher gave no log-prob of token {token}; {WAY_OUT}")
            here, there = self._decode(turn.action.tokens[index : index + 1]), score.get("decoded_token")
            # Blanks are left out: some tokenizers tidy them up.
            if _HALF_A_CHARACTER not in here and here.split() != str(there).split():
                raise ConfigError(
                    f"the teacher's vocabulary is not the student's: token {token} is {there!r} there and {here!r} "
                    f"here, so its log-probs mean nothing; {WAY_OUT}"
                )
            logprobs[index] = score["logprob"]
        return replace(turn, teacher_logprobs=logprobs)


def _parse(url: str, body: dict[str, Any]) -> tuple[list[dict[str, Any] | None], Reply]:
    try:
        scores, usage = body["choices"][0].get("prompt_logprobs"), body.get("usage") or {}
        counted = Reply(
            text="",
            prompt_tokens=int(usage.get("prompt_tokens", 0)),
            completion_tokens=int(usage.get("completion_tokens", 0)),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise PolicyError(f"{url} answered something that is no completion ({error!r})") from None
    if not isinstance(scores, list):
        raise ConfigError(f"{url} gives no prompt_logprobs, as vLLM's does; {WAY_OUT}")
    return scores, counted
