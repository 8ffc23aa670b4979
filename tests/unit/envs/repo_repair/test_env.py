"""An episode's environment, and the expert in it: from the start and after random commands."""

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from megatron_dagger.config import LimitsConfig
from megatron_dagger.dagger.mixing import SoloTurnPolicy
from megatron_dagger.envs.environment import Expert
from megatron_dagger.envs.repo_repair.env import SYSTEM_MESSAGE, TOOLS, RepairEnv, plain_words
from megatron_dagger.envs.repo_repair.expert import next_command
from megatron_dagger.envs.repo_repair.repository import read_repository
from megatron_dagger.policies.base import PolicyError, PolicyGone
from megatron_dagger.rollout.chat import ChatRenderer
from megatron_dagger.rollout.episode import EpisodeKey, EpisodeRunner, TurnDecision
from megatron_dagger.rollout.tokenizer import train_tokenizer
from megatron_dagger.sandbox.base import EnvironmentBroken
from megatron_dagger.types import ActedBy, Action, StopReason
from tools.support.scripted_policies import ReplayPolicy

MESS = [
    "locate", "runtests", "undo", "view @1", "view @2", "view @9", "edit @1 return 'return not'", "edit @1 + -",
    "edit @2 if 'if not'", "fix @1 1", "fix @2 1", "fix @3 9", "edit small.py:3 '<' '>'", "list", "search def",
    "view small.py:1 40", "rm -rf tests",
    "echo broken >> small.py", "sed -i s/return/pass/ small.py", "rm -rf .repair", "git status", "nonsense", "edit",
]  # fmt: skip


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([*MESS * 3, SYSTEM_MESSAGE], 600, folder)
    return ChatRenderer.load(folder)


@pytest.fixture
def make_env(tasks, pool, repositories):
    def make(index=0):
        return RepairEnv(tasks[index], read_repository(repositories / tasks[index].instance_id), pool, {})

    return make


def run(renderer, make_env, actor, **limits):
    runner = EpisodeRunner(
        renderer=renderer,
        limits=LimitsConfig(**{"max_turns": 64, "max_tokens": 4096, **limits}),
        max_action_tokens=32,
        threads=ThreadPoolExecutor(1),
    )
    return asyncio.run(runner.run(make_env, actor, EpisodeKey(run_seed=1, round_index=0, task_id="t")))


class Messy:
    """Types random commands for some turns, then lets the expert act."""

    def __init__(self, expert, turns, seed):
        self.expert, self.turns, self.chance = expert, turns, random.Random(seed)

    async def decide(self, state, turn):
        label = await self.expert.act(state)
        if turn >= self.turns:
            return TurnDecision(acted_by=ActedBy.TEACHER, action=label, label=label)
        text = self.chance.choice(MESS)
        tokens = np.append(self.expert.encode(text), []).astype(np.int32)
        return TurnDecision(acted_by=ActedBy.STUDENT, action=Action(text=text, tokens=tokens), label=label)


def test_expert_solves_from_the_start(renderer, make_env, tasks):
    expert = Expert(command=next_command, encode=renderer.action)
    for index in range(len(tasks)):
        episode = run(renderer, lambda index=index: make_env(index), SoloTurnPolicy(policy=expert))
        assert episode.solved, tasks[index].instance_id
        assert episode.stop_reason is StopReason.SUBMITTED


@pytest.mark.parametrize("seed", range(8))
def test_expert_solves_after_ten_random_turns(renderer, make_env, tasks, seed):
    actor = Messy(Expert(command=next_command, encode=renderer.action), 10, seed)
    episode = run(renderer, lambda: make_env(seed % len(tasks)), actor)
    assert episode.solved, [turn.action.text for turn in episode.turns]


def test_tokens_of_the_turns_are_the_conversation(renderer, make_env):
    episode = run(renderer, make_env, Messy(Expert(command=next_command, encode=renderer.action), 5, 3))
    parts = [part for turn in episode.turns for part in (turn.prompt_tokens, turn.action.tokens)]
    text = renderer.text(np.concatenate(parts))
    for turn in episode.turns:
        assert f"{turn.observation}<|im_end|>\n<|im_start|>assistant\n{turn.action.text}<|im_end|>" in text


def test_replaying_the_gold_commands_does_not_undo_a_mistake(renderer, make_env, tasks):
    expert = Expert(command=next_command, encode=renderer.action)
    gold = [turn.action.text for turn in run(renderer, make_env, SoloTurnPolicy(policy=expert)).turns]
    assert run(renderer, make_env, SoloTurnPolicy(policy=ReplayPolicy(gold, renderer.action))).solved
    harm = ["echo 'x = (' >> small.py", *gold]
    assert not run(renderer, make_env, SoloTurnPolicy(policy=ReplayPolicy(harm, renderer.action))).solved


def test_undo_takes_back_any_change(make_env):
    with make_env() as env:
        env.reset()
        before = dict(env._tree)
        assert env.step("rm -rf tests; echo 'x = (' >> small.py").text.endswith("edits: 1")
        assert env.step("runtests").text.startswith("FAIL")
        assert env.step("undo").text.startswith("edits: 0\n")
        assert env._tree == before
        assert env.step("undo").text.startswith("error: nothing to undo")


@pytest.mark.parametrize("seed", range(3))
def test_the_driver_answers_as_the_sandbox_does(make_env, seed):
    """Until a shell command has run, the driver answers the tools on a line itself."""
    chance = random.Random(seed)
    tools = [command for command in MESS if command.split()[0] in TOOLS | {"undo"}]
    commands = ["view @1", "locate", *chance.choices(tools, k=25), "view @1", "fix @1 1"]
    commands += ["edit small.py:2 def 'def  é'", "view small.py:2", "view ./small.py:2", "view .git/HEAD:1"]
    with make_env() as here, make_env() as inside:
        here.reset()
        inside.reset()
        inside.step("true")
        for command in commands:
            assert here.step(command).text == inside.step(command).text, command
            assert here._tree == inside._tree, command
        assert (here._in_step, inside._in_step) == (True, False)
        assert here._sandbox.read() == inside._sandbox.read()


def test_a_change_is_seen_whatever_its_time(make_env):
    with make_env() as env:
        env.reset()
        command = "touch -r small.py stamp; sed -i 's/year % 4/year % 5/' small.py; touch -r stamp small.py; rm stamp"
        assert env.step(command).text.endswith("edits: 1")
        assert b"year % 5" in env._tree["small.py"]


def wrong_fix(env):
    """Try fixes until one fails the tests, and undo it; return the rank of its line and the text after the undo."""
    for rank in range(1, 10):
        if not env.step(f"view @{rank}").text.endswith(f"untested: none of @{rank}"):
            env.step(f"fix @{rank} 1")
            if env.step("runtests").text.startswith("FAIL"):
                return rank, env.step("undo").text
            env.step("undo")
    raise AssertionError("every first fix makes the tests pass")


def test_a_fix_that_failed_the_tests_is_not_proposed_again(make_env):
    with make_env() as env:
        env.reset()
        env.step("locate")
        rank, after_undo = wrong_fix(env)
        untested = after_undo.splitlines()[-1]
        assert untested.endswith(f" of @{rank}")
        assert not untested.endswith(f" 1 of @{rank}")
        assert env.step(f"view @{rank}").text.endswith(untested)
        env.reset()  # a new episode does not remember it
        env.step("locate")
        assert env.step(f"view @{rank}").text.endswith(f" 1 of @{rank}")


def test_two_open_edits_clear_no_fix(make_env):
    with make_env() as env:
        env.reset()
        env.step("locate")
        rank, _ = wrong_fix(env)
        before = env.step(f"view @{rank}").text
        env.step("echo '# a note' >> small.py")
        env.step(f"fix @{rank} 1")
        env.step("runtests")
        env.step("undo")
        env.step("undo")
        assert env.step(f"view @{rank}").text == before


@pytest.mark.parametrize("command", ["fix @1 99", "fix @1 x", "fix @1", "fix small.py:1 0", "fix nowhere.py:1 1"])
def test_a_missing_fix_is_an_error_and_changes_nothing(make_env, command):
    with make_env() as env:
        env.reset()
        env.step("locate")
        answer = env.step(command).text
        assert answer.startswith("error: ")
        assert answer.endswith("edits: 0")


def test_only_the_package_is_judged(make_env, tasks):
    with make_env() as env:
        env.reset()
        env.step("echo 'def test_nothing(): pass' > tests/test_small.py")
        assert not env.judge()


def test_judge_needs_the_repair(make_env, tasks):
    with make_env() as env:
        env.reset()
        assert not env.judge()


@pytest.mark.parametrize(
    ("texts", "limits", "reason"),
    [
        (["locate", "view @1"] * 30, {"max_turns": 5}, StopReason.TURN_LIMIT),
        (["runtests"] * 30, {"max_repeats": 4}, StopReason.REPEAT_LIMIT),
        (["  ", " ", "   "] * 9, {"max_format_errors": 3}, StopReason.FORMAT_LIMIT),
        (["list", "locate"] * 30, {"max_tokens": 300}, StopReason.CONTEXT_LIMIT),
        (["list", "locate"] * 30, {"max_seconds": 1e-9}, StopReason.TIME_LIMIT),
    ],
)
def test_every_limit_has_its_reason(renderer, make_env, texts, limits, reason):
    episode = run(renderer, make_env, SoloTurnPolicy(policy=ReplayPolicy(texts, renderer.action)), **limits)
    assert episode.stop_reason is reason
    assert reason.is_clean
    assert not episode.solved


def test_a_broken_episode_has_a_reason_and_is_not_clean(renderer, make_env):
    class Broken:
        async def decide(self, state, turn):
            raise PolicyError("the endpoint is down")

    episode = run(renderer, make_env, Broken())
    assert (episode.stop_reason, episode.stop_reason.is_clean) == (StopReason.POLICY_ERROR, False)

    class Gone:
        async def decide(self, state, turn):
            raise PolicyGone("the engine is gone")

    with pytest.raises(PolicyGone):  # the next episode could not use it either
        run(renderer, make_env, Gone())

    class BrokenEnv:
        def reset(self):
            raise EnvironmentBroken("no memory", StopReason.OUT_OF_MEMORY)

        def close(self):
            pass

    episode = run(renderer, BrokenEnv, Broken())
    assert (episode.stop_reason, episode.stop_reason.is_clean) == (StopReason.OUT_OF_MEMORY, False)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("edit @1 '<' '<='", ["edit", "@1", "<", "<="]),
        ("edit @1 < <=", None),
        ("runtests | tail -1", None),
        ("view @1; undo", None),
        ("view $(pwd)", None),
        ("submit", ["submit"]),
        ("it's", None),
    ],
)
def test_plain_words(command, arguments):
    assert plain_words(command) == arguments
