"""The teacher's log-probs of the student's own tokens, from vLLM's completions API.

One request per episode: the prompt is the episode's token stream, and the server returns the log-prob of each of its
tokens (``prompt_logprobs``). They mean something only if teacher and student share a vocabulary. So the text the
server gives for each token is compared with the student's, and a difference is an error.
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
from megatron_dagger.policies.openai.cache import Response, ResponseCache, request_key
from megatron_dagger.policies.openai.completion import json_object, token_counts
from megatron_dagger.policies.openai.endpoint_pool import EndpointPool
from megatron_dagger.policies.openai.failures import check_body
from megatron_dagger.types import ActedBy, Trajectory, Turn

logger = logging.getLogger(__name__)

HINT = "set teacher.score_student_turns=false"
_PARTIAL_CHARACTER = "\ufffd"  # a token decodes to it if it is a part of a character
_Scores = list[dict[str, Any] | None]  # per token of the prompt, by token id; None for the first


class TeacherScores:
    """Adds ``teacher_logprobs`` to the student's turns. ``decode`` turns tokens into text (``ChatRenderer.text``)."""

    def __init__(
        self,
        config: TeacherConfig,
        pool: EndpointPool,
        cache: ResponseCache,
        *,
        decode: Callable[[np.ndarray], str],
    ):
        self._config, self._pool, self._cache, self._decode = config, pool, cache, decode

    async def score(self, trajectory: Trajectory) -> Trajectory:
        """Return the episode with the natural log-probs of the student's turns at temperature 1, (n,) float32 each.

        An episode that the server refuses, for example as too long, is returned unchanged. Raises ConfigError if the
        server gives no log-probs or has another vocabulary, and PolicyGone and BudgetSpent as EndpointPool.request.
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
            scores, usage = await self._pool.request("completions", request, _parse)
        except PolicyGone:
            raise
        except PolicyError as error:
            logger.warning("%s gets no log-probs from the teacher: %s", trajectory.task_id, error)
            return trajectory
        if len(scores) != len(tokens):
            raise ConfigError(f"the teacher was sent {len(tokens)} tokens and scored {len(scores)}; {HINT}")
        await asyncio.to_thread(self._cache.put, request_key(request), usage)  # counts towards the budget
        scored, position = [], 0
        for turn in turns[: last + 1]:
            start = position + len(turn.prompt_tokens)
            position = start + len(turn.action.tokens)
            by_student = turn.acted_by is ActedBy.STUDENT
            scored.append(self._scored(turn, scores[start:position]) if by_student else turn)
        return replace(trajectory, turns=(*scored, *turns[last + 1 :]))

    def _scored(self, turn: Turn, scores: _Scores) -> Turn:
        logprobs = np.empty(len(scores), np.float32)
        for index, (token, candidates) in enumerate(zip(turn.action.tokens, scores, strict=True)):
            score = (candidates or {}).get(str(int(token)))
            if score is None:
                raise ConfigError(f"the teacher gave no log-prob of token {token}; {HINT}")
            student_text, teacher_text = self._decode(turn.action.tokens[index : index + 1]), score.get("decoded_token")
            # Whitespace is ignored: some tokenizers clean it up.
            if _PARTIAL_CHARACTER not in student_text and student_text.split() != str(teacher_text).split():
                raise ConfigError(
                    f"the teacher's vocabulary is not the student's: token {token} is {teacher_text!r} for the teacher "
                    f"and {student_text!r} for the student, so its log-probs mean nothing; {HINT}"
                )
            logprobs[index] = score["logprob"]
        return replace(turn, teacher_logprobs=logprobs)


def _parse(url: str, body: dict[str, Any]) -> tuple[_Scores, Response]:
    """Return the scores in a completion, and a response that holds its token counts only."""
    check_body(url, body)
    scores = json_object(body["choices"][0]).get("prompt_logprobs")
    prompt, completion = token_counts(body)
    if not isinstance(scores, list) or not all(score is None or isinstance(score, dict) for score in scores):
        raise ConfigError(f"{url} returned no prompt_logprobs; scoring needs a vLLM server, or {HINT}")
    return scores, Response(text="", prompt_tokens=prompt, completion_tokens=completion or 0)
