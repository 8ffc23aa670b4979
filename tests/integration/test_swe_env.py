"""Episodes of a SWE-bench task in real containers: its history, its tools, its limits."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_dagger.config import LimitsConfig
from megatron_dagger.dagger.mixing import SoloTurnPolicy
from megatron_dagger.envs.base import truncate
from megatron_dagger.envs.swe.env import SYSTEM_MESSAGE, SweEnv
from megatron_dagger.envs.swe.tool_calls import ToolCall
from megatron_dagger.rollout.chat import ChatRenderer
from megatron_dagger.rollout.episode import EpisodeKey, EpisodeRunner
from megatron_dagger.rollout.tokenizer import train_tokenizer
from megatron_dagger.types import StopReason
from tests.integration.swe_episodes import answer, bash, bash_call, edit
from tools.support import swe_image
from tools.support.scripted_policies import ReplayPolicy


@pytest.fixture(scope="module")
def env(calc_task, open_sandbox):
    """An environment for tests that reset it or leave the tree unchanged."""
    with SweEnv(calc_task, open_sandbox) as opened:
        opened.reset()
        yield opened


def test_the_agent_repairs_and_is_judged_in_a_fresh_container(calc_task, open_sandbox, docker_host):
    before = docker_host.containers()
    with SweEnv(calc_task, open_sandbox) as env:
        system, message = env.reset()
        assert '{"type": "function", "function": {"name": "bash"' in system
        assert "mean([1, 2, 3]) should be 2." in message
        with pytest.raises(RuntimeError, match="is not judged yet"):
            env.report()
        assert not env.judge()
        assert env.verdict.reason == "no change"
        assert "len(values) + 1" in bash(env, "grep -rn len calc")
        shown = edit(
            env, "str_replace", "/testbed/calc/__init__.py", old_str="(len(values) + 1)", new_str="len(values)"
        )
        assert "     2\t    return sum(values) / len(values)" in shown
        bash(env, "rm -rf tests; echo 'raise SystemExit(0)' > conftest.py; rm conftest.py; git commit -qam mine")
        assert env.step(ToolCall(name="submit", arguments={}).text()).done
        patch = env.changes().patch
        assert "diff --git a/calc/__init__.py b/calc/__init__.py" in patch
        assert "notes.txt" not in patch and "built.txt" not in patch
        assert env.judge(), env.verdict
        assert env.report() == {"patch": patch, "verdict": ""}
    assert docker_host.containers() == before


def test_the_repository_has_no_trace_of_later_commits(env, calc_task):
    everything = "git log --all --reflog -p; git stash list; git notes list; git remote -v; git branch -a; git tag; "
    everything += (
        "git cat-file --batch-all-objects --batch; cat .git/packed-refs .git/*HEAD .git/logs/*; grep -rl repair .git"
    )
    assert swe_image.SECRET not in bash(env, everything)
    assert "unreachable" not in bash(env, "git fsck --unreachable --no-reflogs")
    history = bash(env, "git log --format=%s").splitlines()
    assert history == ["The state at the start", "The base", "An older commit"]
    assert calc_task.base_commit in bash(env, "git log --format=%H")
    assert bash(env, "git status --porcelain") == "[no output]"
    assert bash(env, "cat notes.txt built.txt") == "one\nmade by the image\nbuilt"


def test_the_editor(env):
    path = "/testbed/new file.txt"
    assert edit(env, "create", path, file_text="one\ntwo\n") == f"{path} was created"
    assert edit(env, "create", path, file_text="").startswith(f"error: {path} is there already: edit it")
    assert edit(env, "view", path) == "     1\tone\n     2\ttwo"
    assert edit(env, "view", path, view_range=[2, -1]) == "     2\ttwo"
    assert edit(env, "insert", path, insert_line=1, new_str="half\nway") == (
        "     1\tone\n     2\thalf\n     3\tway\n     4\ttwo"
    )
    assert edit(env, "str_replace", path, old_str="half\nway\n") == "     1\tone\n     2\ttwo"
    assert bash(env, f"cat '{path}'") == "one\ntwo"
    for arguments, why in (
        ({"command": "str_replace", "path": path, "old_str": "o", "new_str": "x"}, "it occurs 2 times"),
        ({"command": "str_replace", "path": path, "old_str": "", "new_str": "x"}, "it occurs 0 times"),
        ({"command": "str_replace", "path": path}, "str_replace needs old_str"),
        ({"command": "insert", "path": path, "insert_line": 3, "new_str": "x"}, "between 0 and 2, it is 3"),
        ({"command": "view", "path": path, "view_range": [3, 4]}, "between 1 and 2"),
        ({"command": "view", "path": path, "view_range": ["1"]}, "two numbers"),
        ({"command": "view", "path": "new file.txt"}, "no absolute path"),
        ({"command": "view", "path": "/testbed/nothing"}, "does not exist"),
        ({"command": "str_replace", "path": "/testbed", "old_str": "a"}, "is a directory"),
        ({"command": "create", "path": "/proc/version", "file_text": "a"}, "is there already"),
    ):
        text = answer(env, "str_replace_editor", **arguments)
        assert text.startswith("error: ") and why in text
    assert "/testbed/calc/__init__.py" in edit(env, "view", "/testbed")
    assert ".git" not in edit(env, "view", "/testbed")
    bash(env, f"printf '\\xff' > '{path}'")
    assert edit(env, "view", path).endswith("is not text in UTF-8")
    bash(env, f"rm '{path}'")


def test_format_errors_are_answered_and_reported(env):
    observation = env.step("ls -la")
    assert "exactly one <tool_call>" in observation.text
    assert (observation.understood, observation.done) == (False, False)
    assert env.step(ToolCall(name="bash", arguments={"command": "true"}).text()).understood


def test_observations_are_truncated_and_say_how_a_command_ended(env):
    env._observation_characters = 1000
    text = bash(env, "echo first; seq 10000; echo last")
    assert text.startswith("first\n") and text.endswith("last") and "characters cut" in text
    assert len(text) < 1100
    env._observation_characters = 12_000
    assert bash(env, "echo no; exit 3") == "no\n[exit code 3]"
    assert bash(env, "true") == "[no output]"
    assert truncate("abcdef", 4) == "ab\n... 2 characters cut ...\nef"


@pytest.mark.parametrize(
    "command",
    [
        "rm -rf .git",
        "rm -rf .git && git init -q && echo x > y",
        "cd / && rm -rf testbed",
        "git() { echo fake; }; export -f git; export GIT_DIR=/nowhere",
        "head -c 9000000 /dev/urandom > big",
        "ln -sfn /etc/passwd /tmp/patch.diff; rm -f /tmp/patch.diff; mkdir /tmp/patch.diff; echo x >> notes.txt",
    ],
)
def test_an_agent_that_wrecks_its_repository_has_not_solved_the_task(env, command):
    env.reset()
    bash(env, command)
    assert env.judge() is False
    assert env.verdict.reason


def run_episode(renderer, env, replies):
    policy = ReplayPolicy(replies, renderer.action)
    runner = EpisodeRunner(
        renderer=renderer,
        limits=LimitsConfig(max_turns=20, max_tokens=20_000, max_format_errors=3),
        max_action_tokens=200,
        threads=ThreadPoolExecutor(1),
    )
    key = EpisodeKey(run_seed=1, round_index=0, task_id=env.task_id)
    return asyncio.run(runner.run(lambda: env, SoloTurnPolicy(policy=policy), key))


def test_episodes_end_with_a_typed_reason_and_leave_no_container(calc_task, open_sandbox, docker_host, tmp_path):
    before = docker_host.containers()
    train_tokenizer([SYSTEM_MESSAGE, swe_image.BUILD, bash_call("ls")], 400, tmp_path)
    renderer = ChatRenderer.load(tmp_path)
    submit = ToolCall(name="submit", arguments={}).text()
    fix = bash_call("sed -i 's/(len(values) + 1)/len(values)/' calc/__init__.py")
    thought = "<think>\nThe divisor is wrong.\n</think>\n\n"
    for replies, reason, solved, errors in (
        ([bash_call("cat calc/__init__.py"), "no call", thought + fix, submit], StopReason.SUBMITTED, True, 1),
        (["a", "b", fix, "c", "d", "e"], StopReason.FORMAT_LIMIT, True, 5),
        ([bash_call("python -c 'x = bytearray(900 << 20)'"), fix, submit], StopReason.OUT_OF_MEMORY, False, None),
        ([bash_call("for i in 1 2 3; do head -c 150000000 /dev/zero > $i; done; sleep 1")],
         StopReason.ENVIRONMENT_ERROR, False, None),
    ):  # fmt: skip
        episode = run_episode(renderer, SweEnv(calc_task, open_sandbox), replies)
        assert (episode.stop_reason, episode.solved) == (reason, solved), episode.details
        assert episode.details.get("format_errors") == errors
        assert episode.stop_reason.is_clean == (errors is not None)
    assert docker_host.containers() == before
