"""Running an episode: tokens and turns as they are recorded, the limits that end it, and failures."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest

from megatron_dagger.config import ConfigError, LimitsConfig
from megatron_dagger.dagger.mixing import SoloTurnPolicy
from megatron_dagger.envs.base import Observation
from megatron_dagger.policies.base import BudgetSpent, NoAction, PolicyError, PolicyGone
from megatron_dagger.rollout.chat import ChatRenderer
from megatron_dagger.rollout.episode import FORMAT_ERROR, EpisodeKey, EpisodeRunner
from megatron_dagger.rollout.tokenizer import train_tokenizer
from megatron_dagger.sandbox.base import EnvironmentBroken
from megatron_dagger.types import Action, StopReason
from tools.support.scripted_policies import ReplayPolicy

KEY = EpisodeKey(run_seed=7, round_index=1, task_id="t")


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["submit a b c d"] * 3, 300, folder)
    return ChatRenderer.load(folder)


@dataclass
class EchoEnv:
    """Repeats every command; ``submit`` ends it, ``break`` breaks it, and it understands only lower case."""

    commands: list[str] = field(default_factory=list)
    closed: bool = False

    def reset(self):
        return "Echo.", "Say something."

    def step(self, command):
        self.commands.append(command)
        if command == "break":
            raise EnvironmentBroken("the sandbox died", StopReason.OUT_OF_MEMORY)
        return Observation(text=f"echo {command}", done=command == "submit", understood=command.islower())

    def judge(self):
        return True

    def report(self):
        return {"commands": len(self.commands)}

    def close(self):
        self.closed = True


class FailingPolicy:
    name = "failing"

    def __init__(self, error):
        self.error = error

    async def act(self, state):
        raise self.error


def run(renderer, policy, *, env=None, **limits):
    env = env or EchoEnv()
    with ThreadPoolExecutor(1) as threads:
        runner = EpisodeRunner(renderer=renderer, limits=LimitsConfig(**limits), max_action_tokens=8, threads=threads)
        try:
            return asyncio.run(runner.run(lambda: env, SoloTurnPolicy(policy=policy), KEY, beta=0.5))
        finally:
            assert env.closed


def replay(renderer, *texts):
    return ReplayPolicy(texts, renderer.action)


def test_the_turns_hold_the_conversation_token_by_token(renderer):
    episode = run(renderer, replay(renderer, "a", "submit"))
    assert (episode.stop_reason, episode.solved, episode.beta) == (StopReason.SUBMITTED, True, 0.5)
    assert [turn.observation for turn in episode.turns] == ["Say something.", "echo a"]
    tokens = np.concatenate([part for turn in episode.turns for part in (turn.prompt_tokens, turn.action.tokens)])
    first = renderer.action("a")
    expected = [renderer.opening("Echo.", "Say something."), first, renderer.observation("echo a", after=first)]
    assert tokens.tolist() == np.concatenate([*expected, renderer.action("submit")]).tolist()
    assert episode.details == {"commands": 2}


@pytest.mark.parametrize(
    ("texts", "limits", "reason"),
    [
        (["a", "b", "c"], {"max_turns": 2}, StopReason.TURN_LIMIT),
        (["a", "a", "a"], {"max_repeats": 2}, StopReason.REPEAT_LIMIT),
        (["A", "B", "c"], {"max_format_errors": 2}, StopReason.FORMAT_LIMIT),
        (["a", "b", "c"], {"max_tokens": 8}, StopReason.CONTEXT_LIMIT),
        (["a", "b", "c"], {"max_seconds": 1e-9}, StopReason.TIME_LIMIT),
    ],
)
def test_a_limit_ends_an_episode_cleanly(renderer, texts, limits, reason):
    episode = run(renderer, replay(renderer, *texts), **limits)
    assert (episode.stop_reason, episode.stop_reason.is_clean) == (reason, True)


def test_the_time_limit_does_not_count_the_start_of_the_environment(renderer):
    class SlowToStart(EchoEnv):
        def reset(self):
            time.sleep(0.3)
            return super().reset()

    episode = run(renderer, replay(renderer, "a", "submit"), env=SlowToStart(), max_seconds=0.25)
    assert episode.stop_reason is StopReason.SUBMITTED
    assert episode.duration_s > 0.3


def test_a_reply_that_is_cut_off_is_a_format_error_and_never_reaches_the_environment(renderer):
    class CutOff:
        name = "cut off"

        async def act(self, state):
            return Action(text="a", tokens=renderer.action("a")[:-1])

    episode = run(renderer, CutOff(), max_turns=2)
    assert (episode.details, episode.turns[1].observation) == ({"commands": 0, "format_errors": 2}, FORMAT_ERROR)


def test_a_failure_breaks_the_episode_and_never_counts_as_solved(renderer):
    episode = run(renderer, replay(renderer, "a", "break"))
    assert (episode.stop_reason, episode.solved, len(episode.turns)) == (StopReason.OUT_OF_MEMORY, False, 2)
    assert episode.details["error"] == "the sandbox died"
    episode = run(renderer, FailingPolicy(PolicyError("no answer")))
    assert (episode.stop_reason, episode.details["error"]) == (StopReason.POLICY_ERROR, "no answer")


@pytest.mark.parametrize("method", ["reset", "step", "judge", "report"])
def test_whatever_an_environment_raises_breaks_its_episode_only(renderer, caplog, method):
    def fail(*args):
        raise KeyError("a fault of the environment's author")

    env = EchoEnv()
    setattr(env, method, fail)
    episode = run(renderer, replay(renderer, "a", "submit"), env=env)
    assert (episode.stop_reason, episode.solved) == (StopReason.ENVIRONMENT_ERROR, False)
    assert episode.details["error"] == 'KeyError: "a fault of the environment\'s author"'
    assert episode.details.get("last_action") == {"reset": None, "step": "a"}.get(method, "submit")
    assert "Traceback" in caplog.text, "the author finds the line"


def test_an_environment_that_cannot_be_closed_has_its_episode_all_the_same(renderer):
    class Unclosed(EchoEnv):
        def close(self):
            super().close()
            raise OSError("busy")

    assert run(renderer, replay(renderer, "submit"), env=Unclosed()).solved


def test_whatever_a_policy_raises_breaks_its_episode_only(renderer, caplog):
    episode = run(renderer, FailingPolicy(TypeError("a fault of the policy's author")))
    assert (episode.stop_reason, len(episode.turns)) == (StopReason.POLICY_ERROR, 0)
    assert episode.details["error"] == "TypeError: a fault of the policy's author"
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("error", [PolicyGone("it"), BudgetSpent("it"), ConfigError("it")])
def test_what_concerns_all_episodes_is_raised(renderer, error):
    with pytest.raises(type(error), match="it"):
        run(renderer, FailingPolicy(error))


def test_text_that_cannot_be_encoded_is_replaced_before_anybody_sees_it(renderer):
    class Surrogates(EchoEnv):
        def reset(self):
            return "Echo\ud800.", "Say \udc80."

        def step(self, command):
            return Observation(text="error: /t/\ud83d does not exist", done=command == "submit", understood=True)

    episode = run(renderer, replay(renderer, "a", "submit"), env=Surrogates())
    assert episode.stop_reason is StopReason.SUBMITTED
    assert [turn.observation for turn in episode.turns] == ["Say \ufffd.", "error: /t/\ufffd does not exist"]


def test_a_state_without_an_action_ends_the_episode_and_keeps_the_turns_before(renderer):
    class OneAction(FailingPolicy):
        async def act(self, state):
            return (
                Action(text="a", tokens=renderer.action("a")) if len(state.messages) == 2 else await super().act(state)
            )

    episode = run(renderer, OneAction(NoAction("four answers without one")))
    assert (episode.stop_reason, episode.stop_reason.is_clean, len(episode.turns)) == (StopReason.NO_ACTION, True, 1)
    assert episode.details["no_action"] == "four answers without one"
    episode = run(renderer, FailingPolicy(NoAction("none at all")))
    assert episode.stop_reason is StopReason.POLICY_ERROR, "without a turn there is nothing to keep"


def test_seeds_depend_on_the_identity_the_turn_the_purpose_and_the_draw():
    keys = [
        KEY,
        EpisodeKey(run_seed=8, round_index=1, task_id="t"),
        EpisodeKey(run_seed=7, round_index=2, task_id="t"),
        EpisodeKey(run_seed=7, round_index=1, task_id="u"),
        EpisodeKey(run_seed=7, round_index=1, task_id="t", attempt=1),
        EpisodeKey(run_seed=7, round_index=1, task_id="t", draw=1),
    ]
    seeds = [*(key.seed(2) for key in keys), KEY.seed(3), KEY.seed(2, "mixing")]
    assert len(set(seeds)) == len(seeds)
    assert KEY.seed(2) == 449093112517334062, "resumed runs must draw the same numbers"
