"""The teacher's log-probs of the student's tokens, from a server that answers like vLLM's."""

import asyncio
from contextlib import closing

import numpy as np
import pytest

from megatron_dagger.config import ConfigError, TeacherConfig
from megatron_dagger.policies.base import BudgetSpent
from megatron_dagger.policies.openai.cache import ResponseCache
from megatron_dagger.policies.openai.endpoint_pool import EndpointPool
from megatron_dagger.policies.openai.scoring import TeacherScores
from megatron_dagger.types import ActedBy
from tests.support.trajectories import make_trajectory, make_turn
from tools.support.chat_server import chat_server

EPISODE = make_trajectory(
    turns=(
        make_turn([1, 2], [2], acted_by=ActedBy.TEACHER),
        make_turn([3, 4, 5], [6]),
        make_turn([7], None, acted_by=ActedBy.TEACHER),
    )
)


def letters(tokens):
    return "".join(chr(96 + int(token)) for token in tokens)


def vllm(request, *, shift=0):
    """Answer with log-prob -n and the n-th letter for token n, and with nothing for the first token."""
    prompt = request["prompt"]
    scores = [{str(n): {"logprob": -float(n), "rank": 1, "decoded_token": chr(96 + n + shift)}} for n in prompt]
    usage = {"prompt_tokens": len(prompt), "completion_tokens": 1}
    return {"choices": [{"text": "x", "prompt_logprobs": [None, *scores[1:]]}], "usage": usage}


def score(url, folder, **settings):
    config = TeacherConfig(urls=(url,), model="big", **settings)
    with closing(ResponseCache(folder)) as cache, EndpointPool(config, cache) as pool:
        return asyncio.run(TeacherScores(config, pool, cache, decode=letters).score(EPISODE))


def test_one_request_up_to_the_students_last_turn_scores_its_turns_only(tmp_path):
    with chat_server(vllm) as server:
        scored = score(server.url, tmp_path)
        assert [turn.teacher_logprobs is None for turn in scored.turns] == [True, False, True]
        assert scored.turns[1].teacher_logprobs.tolist() == [-3, -4, -5]
        assert scored.turns[1].teacher_logprobs.dtype == np.float32
        [request] = server.requests
        stream = [part for turn in EPISODE.turns[:2] for part in (turn.prompt_tokens, turn.action.tokens)]
        assert request["prompt"] == np.concatenate(stream).tolist()
        assert (request["prompt_logprobs"], request["max_tokens"]) == (0, 1)
        assert ResponseCache(tmp_path).prompt_tokens == len(request["prompt"]), "scoring counts towards the budget"
        with pytest.raises(BudgetSpent):
            score(server.url, tmp_path, token_budget=5)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda request: vllm(request, shift=1),
            r"vocabulary is not the student's: token 3 is 'd' for the teacher and 'c' for the student",
        ),
        (lambda request: {"choices": [{"text": "x"}]}, "/v1 returned no prompt_logprobs; scoring needs a vLLM server"),
        (lambda request: {"choices": [{"prompt_logprobs": [None]}]}, "tokens and scored 1;"),
    ],
)
def test_unusable_log_probs_are_an_error_with_the_reason(tmp_path, answer, message):
    with chat_server(answer) as server, pytest.raises(ConfigError, match=message):
        score(server.url, tmp_path)


def test_an_episode_that_the_server_refuses_is_returned_unchanged(tmp_path):
    with chat_server(lambda request: 400) as server:
        assert score(server.url, tmp_path) is EPISODE
