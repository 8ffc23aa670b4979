"""The student as a policy, with the real vLLM: sampled tokens, the end of a turn, and the engine's limits."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("megatron.core", reason="Megatron-Core is not installed")

from megatron_dagger.config import SamplingConfig
from megatron_dagger.policies.base import Policy, PolicyError
from tests.integration.served import TOLERANCE, sample, state


def test_an_action_is_verbatim_versioned_and_reproducible_in_any_batch(student):
    policy = student.with_sampling(SamplingConfig(temperature=1.0, top_p=0.95, max_tokens=12))
    assert isinstance(policy, Policy)

    async def act_on(seeds):
        return await asyncio.gather(*[policy.act(state(seed)) for seed in seeds])

    [alone] = asyncio.run(act_on([5]))
    batch = asyncio.run(act_on(range(16)))
    assert np.array_equal(alone.tokens, batch[5].tokens)
    assert alone.tokens.dtype == np.int32
    assert alone.logprobs.dtype == np.float32
    assert {action.weight_version for action in batch} == {0}
    assert len({tuple(action.tokens) for action in batch}) == 16
    same_prompt = replace(state(5), seed=6)
    assert not np.array_equal(asyncio.run(policy.act(same_prompt)).tokens, alone.tokens)
    # The log-probs are the model's own at temperature 1, whatever the sampling parameters.
    whole = np.concatenate([state(5).tokens, alone.tokens])
    assert np.abs(student.logprobs(whole)[-len(alone.tokens) :] - alone.logprobs).max() < TOLERANCE


def test_many_long_seeded_prompts_at_once_are_sampled_as_if_alone(student):
    """The prompts have more tokens than fit one step. On the CPU a chunked prefill would kill the engine."""
    policy = student.with_sampling(SamplingConfig(temperature=1.0, top_p=0.95, max_tokens=4))

    async def act_on(seeds):
        return await asyncio.gather(*[policy.act(state(seed, 400)) for seed in seeds])

    batch = asyncio.run(act_on(range(12)))
    assert np.array_equal(asyncio.run(act_on([11]))[0].tokens, batch[11].tokens)


def test_a_turn_ends_with_the_end_of_turn_token_which_is_kept(student):
    sampling = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 12}
    cut_off = sample(student, state(1), **sampling)
    assert len(cut_off.tokens) == 12
    student.end_of_turn = int(cut_off.tokens[4])
    complete = sample(student, state(1), **sampling)
    stop = cut_off.tokens.tolist().index(student.end_of_turn) + 1
    assert complete.tokens.tolist() == cut_off.tokens[:stop].tolist()
    assert complete.text == str(cut_off.tokens[: stop - 1])


def test_a_long_conversation_is_cut_off_at_max_model_len_or_refused(student):
    assert len(sample(student, state(1, 509), max_tokens=64).tokens) <= 3
    with pytest.raises(PolicyError, match="max_model_len is 512"):
        sample(student, state(1, 512), max_tokens=64)
    with pytest.raises(ValueError, match="2 to 511 tokens"):
        student.logprobs(np.zeros(512, np.int32))


def test_a_request_that_misses_its_deadline_is_cancelled_and_the_engine_continues(student):
    student.config = replace(student.config, request_deadline_s=0.02)
    with pytest.raises(PolicyError, match="request_deadline_s=0"):
        sample(student, state(1), max_tokens=400, top_p=1.0, temperature=1.0)
    student.config = replace(student.config, request_deadline_s=120.0)
    assert len(sample(student, state(2), max_tokens=2).tokens) <= 2
    assert student._thread.run(lambda engine: engine._engine.get_num_unfinished_requests(), timeout_s=60) == 0
