"""The scripted policies: deterministic, and without state."""

import asyncio

import numpy as np
import pytest

from megatron_dagger.policies.base import Policy, PolicyError
from megatron_dagger.types import Message, State
from tools.support.scripted_policies import RandomPolicy, ReplayPolicy


def encode(text: str) -> np.ndarray:
    return np.frombuffer(text.encode() + b"\0", np.uint8).astype(np.int32)


def state(seed: int = 0, turns: int = 0) -> State:
    messages = tuple(Message(role=r, content="x") for _ in range(turns) for r in ("assistant", "user"))
    return State(messages=messages, tokens=np.zeros(1, np.int32), seed=seed)


def test_a_random_policy_depends_only_on_the_states_seed():
    policy = RandomPolicy(["a", "b", "c"], encode, seed=1)
    assert isinstance(policy, Policy)
    first = [asyncio.run(policy.act(state(seed))).text for seed in range(40)]
    repeated = [asyncio.run(policy.act(state(seed))).text for seed in reversed(range(40))]
    assert first == repeated[::-1]
    assert set(first) == {"a", "b", "c"}
    other = RandomPolicy(["a", "b", "c"], encode, seed=2)
    assert first != [asyncio.run(other.act(state(seed))).text for seed in range(40)]


def test_a_replay_policy_answers_by_turn_until_the_script_ends():
    policy = ReplayPolicy(["one", "two"], encode)
    action = asyncio.run(policy.act(state(turns=1)))
    assert (action.text, action.tokens.tolist()) == ("two", [116, 119, 111, 0])
    assert asyncio.run(policy.act(state(turns=0))).text == "one"
    with pytest.raises(PolicyError, match="turn 2"):
        asyncio.run(policy.act(state(turns=2)))


def test_a_random_policy_needs_texts():
    with pytest.raises(ValueError, match="at least one"):
        RandomPolicy([], encode)
