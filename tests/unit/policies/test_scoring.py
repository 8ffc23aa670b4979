"""The teacher's log-probs of the student's tokens, asked of a server that answers as vLLM's does."""

import asyncio

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
    """Of token n the log-prob -n, and the n-th letter; of the first token nothing."""
    prompt = request["prompt"]
    scores = [{str(n): {"logprob": -float(n), "rank": 1, "decoded_token": chr(96 + n + shift)}} for n in prompt]
    usage = {"prompt_tokens": len(prompt), "completion_tokens": 1}
    return {"choices": [{"text": "x", "prompt_logprobs": [None, *scores[1:]]}], "usage": usage}


def score(url, folder, **settings):
    config = TeacherConfig(urls=(url,), model="big", **settings)
    replies = ResponseCache(folder)
    scores = TeacherScores(config, EndpointPool(config, replies), replies, decode=letters)
    try:
        return asyncio.run(scores.score(EPISODE))
    finally:
        replies.close()


def test_only_the_students_turns_are_scored_in_one_request_up_to_the_last_of_them(tmp_path):
    with chat_server(vllm) as server:
        scored = score(server.url, tmp_path)
        assert [turn.teacher_logprobs is None for turn in scored.turns] == [True, False, True]
        assert scored.turns[1].teacher_logprobs.tolist() == [-3, -4, -5]
        assert scored.turns[1].teacher_logprobs.dtype == np.float32
        [request] = server.requests
        stream = [part for turn in EPISODE.turns[:2] for part in (turn.prompt_tokens, turn.action.tokens)]
        assert request["prompt"] == np.concatenate(stream).tolist()
        assert (request["prompt_logprobs"], request["max_tokens"]) == (0, 1)
        assert ResponseCache(tmp_path).prompt_tokens == len(request["prompt"]), "it counts against the budget"
        with pytest.raises(BudgetSpent):
            score(server.url, tmp_path, token_budget=5)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda request: vllm(request, shift=1), r"vocabulary is not the student's: token 3 is 'd' there and 'c' here"),
        (lambda request: {"choices": [{"text": "x"}]}, "/v1 gives no prompt_logprobs, as vLLM's does"),
        (lambda request: {"choices": [{"prompt_logprobs": [None]}]}, "tokens and scored 1;"),
    ],
)
def test_where_log_probs_would_mean_nothing_the_reason_is_said(tmp_path, answer, message):
    with chat_server(answer) as server, pytest.raises(ConfigError, match=message):
        score(server.url, tmp_path)


def test_an_episode_that_the_server_refuses_stays_without(tmp_path):
    with chat_server(lambda request: 400) as server:
        assert score(server.url, tmp_path) is EPISODE


def test_there_must_be_a_server_to_ask():
    with pytest.raises(ConfigError, match=r"teacher\.score_student_turns needs teacher\.urls"):
        TeacherConfig(score_student_turns=True)
