"""Episodes of a SWE-bench task in real containers: its history, its tools, its judge, validation."""

import asyncio
import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_dagger.cli.main import main
from megatron_dagger.config import LimitsConfig, SweConfig, override
from megatron_dagger.dagger.mixing import SoloTurnPolicy
from megatron_dagger.driver.environments import swe_tasks
from megatron_dagger.envs.base import EnvironmentBroken
from megatron_dagger.envs.swe.env import SYSTEM_MESSAGE, SweEnv, clip
from megatron_dagger.envs.swe.judge import _reaches_beyond, grade, judge
from megatron_dagger.envs.swe.r2e_gym import r2e_gym_task
from megatron_dagger.envs.swe.swebench import swebench_task
from megatron_dagger.envs.swe.swesmith import swesmith_task
from megatron_dagger.envs.swe.task import CONDA
from megatron_dagger.envs.swe.tool_calls import ToolCall
from megatron_dagger.envs.swe.validation import TaskStatus, validate_tasks
from megatron_dagger.rollout.chat import ChatRenderer
from megatron_dagger.rollout.episode import EpisodeKey, EpisodeRunner
from megatron_dagger.rollout.tokenizer import train_tokenizer
from megatron_dagger.sandbox.docker.daemon import RUN_LABEL
from megatron_dagger.sandbox.docker.sandbox import DockerLimits, DockerSandbox
from megatron_dagger.types import StopReason
from tools.support import swe_image
from tools.support.scripted_policies import ReplayPolicy

LIMITS = DockerLimits(timeout_s=30, memory_mib=500, disk_mib=200, processes=64, cpus=1.0, output_bytes=20_000)


@pytest.fixture(scope="module")
def task(docker_host):
    return swebench_task(swe_image.row(swe_image.build(docker_host)))


@pytest.fixture(scope="module")
def open_sandbox(docker_host):
    return lambda task: DockerSandbox(docker_host, task.image, LIMITS, root=task.workdir)


@pytest.fixture(scope="module")
def env(task, open_sandbox):
    """One environment for the tests that reset it or leave the tree as it was."""
    with SweEnv(task, open_sandbox) as made:
        made.reset()
        yield made


def bash_call(command):
    return ToolCall(name="bash", arguments={"command": command}).text()


def bash(env, command):
    return answer(env, "bash", command=command)


def edit(env, command, path, **arguments):
    return answer(env, "str_replace_editor", command=command, path=path, **arguments)


def answer(env, name, **arguments):
    text = env.step(ToolCall(name=name, arguments=arguments).text()).text
    assert text.startswith("<tool_response>\n") and text.endswith("\n</tool_response>")
    return text.removeprefix("<tool_response>\n").removesuffix("\n</tool_response>")


def test_the_agent_repairs_and_is_judged_in_a_fresh_container(task, open_sandbox, docker_host):
    before = docker_host.containers()
    with SweEnv(task, open_sandbox) as env:
        system, message = env.reset()
        assert '{"type": "function", "function": {"name": "bash"' in system
        assert "mean([1, 2, 3]) should be 2." in message
        assert not env.judge()
        assert env.verdict.reason == "no change"
        assert "len(values) + 1" in bash(env, "grep -rn len calc")
        shown = edit(
            env, "str_replace", "/testbed/calc/__init__.py", old_str="(len(values) + 1)", new_str="len(values)"
        )
        assert "     2\t    return sum(values) / len(values)" in shown
        bash(env, "rm -rf tests; echo 'raise SystemExit(0)' > conftest.py; rm conftest.py; git commit -qam mine")
        assert env.step(ToolCall(name="submit", arguments={}).text()).done
        patch = env.patch()
        assert "diff --git a/calc/__init__.py b/calc/__init__.py" in patch
        assert "notes.txt" not in patch and "built.txt" not in patch
        assert env.judge(), env.verdict
    assert docker_host.containers() == before


def test_no_trace_of_the_future_is_left(env, task):
    everything = "git log --all --reflog -p; git stash list; git notes list; git remote -v; git branch -a; git tag; "
    everything += (
        "git cat-file --batch-all-objects --batch; cat .git/packed-refs .git/*HEAD .git/logs/*; grep -rl repair .git"
    )
    assert swe_image.SECRET not in bash(env, everything)
    assert "unreachable" not in bash(env, "git fsck --unreachable --no-reflogs")
    history = bash(env, "git log --format=%s").splitlines()
    assert history == ["The state at the start", "The base", "An older commit"]
    assert task.base_commit in bash(env, "git log --format=%H")
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
        told = answer(env, "str_replace_editor", **arguments)
        assert told.startswith("error: ") and why in told
    assert "/testbed/calc/__init__.py" in edit(env, "view", "/testbed")
    assert ".git" not in edit(env, "view", "/testbed")
    bash(env, f"printf '\\xff' > '{path}'")
    assert edit(env, "view", path).endswith("is not text in UTF-8")
    bash(env, f"rm '{path}'")


def test_format_errors_are_answered_and_counted(env):
    before = env.format_errors
    observation = env.step("ls -la")
    assert "exactly one <tool_call>" in observation.text
    assert (observation.understood, observation.done, env.format_errors) == (False, False, before + 1)
    assert env.step(ToolCall(name="bash", arguments={"command": "true"}).text()).understood


def test_observations_are_clipped_and_say_how_a_command_ended(env):
    env._most_characters = 1000
    text = bash(env, "echo first; seq 10000; echo last")
    assert text.startswith("first\n") and text.endswith("last") and "characters cut" in text
    assert len(text) < 1100
    env._most_characters = 12_000
    assert bash(env, "echo no; exit 3") == "no\n[exit code 3]"
    assert bash(env, "true") == "[no output]"
    assert clip("abcdef", 4) == "ab\n... 2 characters cut ...\nef"


@pytest.mark.parametrize(
    "deed",
    [
        "rm -rf .git",
        "rm -rf .git && git init -q && echo x > y",
        "cd / && rm -rf testbed",
        "git() { echo fake; }; export -f git; export GIT_DIR=/nowhere",
        "head -c 9000000 /dev/urandom > big",
        "ln -sfn /etc/passwd /tmp/patch.diff; rm -f /tmp/patch.diff; mkdir /tmp/patch.diff; echo x >> notes.txt",
    ],
)
def test_an_agent_that_wrecks_its_repository_has_not_solved_the_task(env, deed):
    env.reset()
    bash(env, deed)
    assert env.judge() is False
    assert env.verdict.reason


def test_a_patch_cannot_reach_beyond_the_repository(task, open_sandbox):
    for name in ("../eval.sh", ".git/hooks/post-checkout", "calc/../../eval.sh", "/eval.sh"):
        verdict = judge(open_sandbox, task, swe_image.PATCH + swe_image.WRITE.format(name))
        assert verdict.reason == "the patch reaches beyond the repository"
    through = swe_image.LINK + swe_image.WRITE.format("calc/away/eval.sh")
    verdict = judge(open_sandbox, task, swe_image.PATCH + through)
    assert (verdict.resolved, verdict.reason) == (False, "the patch does not apply")


def test_names_that_lead_out_are_read_off_the_headers_only():
    harmless = swe_image.PATCH + "@@ -9,2 +9,2 @@\n--- SELECT .. FROM /.git/x\n+++ b//..\n context\n"
    assert not _reaches_beyond(harmless)
    for bad in (
        "--- a/x\n+++ b/../y\n@@ -1 +1 @@\n",
        "--- /etc/x\n+++ b/x\n@@ -1 +1 @@\n",
        "rename to a/.git/config\n",
    ):
        assert _reaches_beyond(swe_image.PATCH + bad)


def test_a_patch_that_changes_the_tests_is_judged_by_the_real_ones(task, open_sandbox):
    cheat = swe_image.TESTS_CHANGED
    verdict = judge(open_sandbox, task, cheat)
    assert "1 tests do not pass" in verdict.reason
    assert judge(open_sandbox, task, swe_image.PATCH + cheat).resolved
    quiet = "diff --git a/conftest.py b/conftest.py\nnew file mode 100644\n--- /dev/null\n+++ b/conftest.py\n"
    quiet += "@@ -0,0 +1,2 @@\n+import os\n+os._exit(0)\n"
    assert not judge(open_sandbox, task, swe_image.PATCH + quiet).resolved


@pytest.mark.slow
def test_tasks_are_validated_with_the_gold_patch_and_without(task, open_sandbox):
    opened = []

    def open_one(task):
        """An environment in which the task that is called flaky is whole every other time only."""
        sandbox = open_sandbox(task)
        if task.instance_id == "flaky":
            opened.append(task)
            if len(opened) % 2:
                sandbox.run("rm -rf calc .git")
        return sandbox

    variants = {
        "good": {},
        "wrong-gold": {"patch": swe_image.PATCH.replace("+    return sum(values) / len(values)", "+    return 7")},
        "no-gold": {"patch": ""},
        "already": {"fail_to_pass": task.pass_to_pass},
        "missing": {"image": "nowhere/image:1"},
        "flaky": {},
    }
    tasks = [dataclasses.replace(task, instance_id=name, **changes) for name, changes in variants.items()]
    validations = [
        *validate_tasks(tasks[:-1], open_one, repeats=1, at_once=2),
        *validate_tasks(tasks[-1:], open_one, repeats=2),
    ]
    assert {one.instance_id: one.status for one in validations} == {
        "good": TaskStatus.VALID,
        "wrong-gold": TaskStatus.GOLD_FAILS,
        "no-gold": TaskStatus.NO_GOLD,
        "already": TaskStatus.PASSES_UNCHANGED,
        "missing": TaskStatus.BROKEN,
        "flaky": TaskStatus.FLAKY,
    }
    assert (validations[-1].gold, validations[-1].unchanged) == ((False, True), (False, False))


def test_a_dataset_is_validated_by_the_command_line_and_a_run_takes_its_valid_tasks(
    task, docker_host, daemon, tmp_path, capsys
):
    good = swe_image.row(task.base_commit)
    wrong = good | {
        "instance_id": "example__calc-2",
        "patch": swe_image.PATCH.replace("+    return", "+    return 7 +"),
    }
    absent = good | {"instance_id": "example__calc-3", "image": "localhost:1/nowhere:1"}
    heldout = good | {"instance_id": "example__calc-4", "base_commit": "0" * 40, "patch": BUG}
    for name, rows in (("train", (good, wrong, absent)), ("heldout", (heldout,))):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    where = [f"swe.{name}={tmp_path / name}.jsonl" for name in ("train", "heldout")]
    limits = ["swe.memory_mib=500", "swe.cpus=1.0", f"swe.docker_url={daemon.url}"]
    path = tmp_path / "out" / "validation.json"
    command = ["validate", str(path), "--repeats", "1", *where, "swe.train_dataset=swe-bench", *limits]
    assert main(command) == 1
    assert "example__calc-2" in capsys.readouterr().out
    found = json.loads(path.read_text())["tasks"]
    assert {name[-1]: one["status"] for name, one in found.items()} == {
        "1": "valid",
        "2": "gold_fails",
        "3": "broken",
    }
    rows = (good, wrong, good | {"instance_id": "example__calc-3", "FAIL_TO_PASS": good["PASS_TO_PASS"]})
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found["example__calc-2"]["reason"] = "seen before"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tasks": found}))
    assert main(command) == 0  # what was broken is judged again, and nothing else
    again = json.loads(path.read_text())["tasks"]
    assert again["example__calc-2"]["reason"] == "seen before"
    assert again["example__calc-3"]["status"] == "passes_unchanged"
    assert main([*command, "--repeats", "2"]) == 2
    assert "name another file" in capsys.readouterr().err
    settings = [*(one.removeprefix("swe.") for one in where), "train_dataset=swe-bench", f"validation={path}"]
    taken, _ = swe_tasks(override(SweConfig(), settings))
    assert [one.instance_id for one in taken] == ["example__calc-1"]
    assert not docker_host.client.containers.list(all=True, filters={"label": f"{RUN_LABEL}={path.resolve()}"})


BUG = """\
diff --git a/calc/__init__.py b/calc/__init__.py
--- a/calc/__init__.py
+++ b/calc/__init__.py
@@ -5,2 +5,2 @@ def mean(values):
 def spread(values):
-    return max(values) - min(values)
+    return max(values) + min(values)
"""


def smith_task():
    """A task whose image is that of ``task``."""
    row = {
        "instance_id": "example__calc.c0ffee00.func__1",
        "repo": "swesmith/example__calc.c0ffee00",
        "patch": BUG,
        "FAIL_TO_PASS": ["tests/test_calc.py::test_spread"],
        "PASS_TO_PASS": [],
        "image_name": "someone/unused",
        "problem_statement": "spread is wrong",
    }
    task = swesmith_task(row)
    script = task.eval_script.replace(f"{CONDA}\n", "")
    return dataclasses.replace(task, image=swe_image.SWE_IMAGE, eval_script=script)


def test_a_bug_as_swesmith_has_them(task, open_sandbox):
    task = smith_task()
    (validation,) = validate_tasks([task], open_sandbox, repeats=1)
    assert validation.status is TaskStatus.VALID, validation
    with SweEnv(task, open_sandbox) as env:
        env.reset()
        assert "max(values) + min" in bash(env, "cat calc/__init__.py")
        everything = bash(env, "ls -R .; git log --all -p; git cat-file --batch-all-objects --batch")
        assert "test_calc" not in everything
        assert "max(values) - min" not in everything  # what the repair brings back
        assert bash(env, "git log --format=%s") == "The state at the start"
        bash(env, "sed -i 's/max(values) + min/max(values) - min/' calc/__init__.py")
        bash(env, "mkdir -p tests; echo 'def test(): 0' > tests/test_calc.py")
        assert env.judge(), env.verdict


def test_between_two_attempts_at_a_patch_the_bug_stays(task, open_sandbox):
    """git refuses this patch for its context and patch takes it: on a tree brought back to the last commit."""
    elsewhere = "diff --git a/notes.txt b/notes.txt\n--- a/notes.txt\n+++ b/notes.txt\n"
    elsewhere += "@@ -1,2 +1,2 @@\n-one\n+two\n another line than there is\n"
    verdict = judge(open_sandbox, smith_task(), elsewhere)
    assert not verdict.resolved
    assert verdict.reason.startswith("1 tests do not pass" if shutil.which("patch") else "the patch does not apply")


R2E_LOG = """\
+ pytest -rA r2e_tests
=========================== short test summary info ============================
\x1b[32mPASSED\x1b[0m r2e_tests/test_1.py::TestA::test_x
FAILED r2e_tests/test_1.py::TestA::test_y - AssertionError: 1 == 2
ERROR r2e_tests/test_1.py::TestA::test_z - ValueError
"""


def test_r2e_gym_compares_every_test():
    row = {"repo_name": "p", "docker_image": "i", "commit_hash": "c" * 40, "problem_statement": "s"}
    ends = {"TestA.test_x": "PASSED", "TestA.test_y": "FAILED", "TestA.test_z": "ERROR"}
    for expected, resolved in (
        (ends, True),
        ({**ends, "TestA.test_y": "PASSED"}, False),
        ({**ends, "TestA.test_w": "PASSED"}, False),
        ({"TestA.test_x": "PASSED"}, False),
    ):
        task = r2e_gym_task({**row, "expected_output_json": json.dumps(expected)})
        assert grade(task, R2E_LOG).resolved is resolved
    assert grade(task, "nothing ran").reason == "no test has run"


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


def test_episodes_end_with_a_typed_reason_and_leave_no_container(task, open_sandbox, docker_host, tmp_path):
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
        episode = run_episode(renderer, SweEnv(task, open_sandbox), replies)
        assert (episode.stop_reason, episode.solved) == (reason, solved), episode.details
        assert episode.details.get("format_errors") == errors
        assert episode.stop_reason.is_clean == (errors is not None)
    assert docker_host.containers() == before


def test_an_image_that_does_not_fit_the_task_is_broken(task, open_sandbox):
    wrong = dataclasses.replace(task, setup_patch=swe_image.PATCH.replace("len(values)", "size"))
    with SweEnv(wrong, open_sandbox) as env, pytest.raises(EnvironmentBroken, match="cannot be prepared"):
        env.reset()
    with pytest.raises(EnvironmentBroken, match="setup patch does not apply"):
        judge(open_sandbox, wrong, "")
