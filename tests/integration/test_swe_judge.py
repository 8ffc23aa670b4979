"""Patches judged in real containers: cheats, broken images, and bugs like SWE-smith's."""

import dataclasses
import shutil

import pytest

from megatron_dagger.envs.swe.env import SweEnv
from megatron_dagger.envs.swe.judge import judge
from megatron_dagger.envs.swe.validation import TaskStatus, validate_tasks
from megatron_dagger.sandbox.base import EnvironmentBroken
from tests.integration.swe_episodes import bash, smith_task
from tools.support import swe_image


def test_a_patch_cannot_reach_beyond_the_repository(calc_task, open_sandbox):
    for name in ("../eval.sh", ".git/hooks/post-checkout", "calc/../../eval.sh", "/eval.sh"):
        verdict = judge(open_sandbox, calc_task, swe_image.PATCH + swe_image.WRITE.format(name))
        assert verdict.reason == "the patch reaches beyond the repository"
    through = swe_image.LINK + swe_image.WRITE.format("calc/away/eval.sh")
    verdict = judge(open_sandbox, calc_task, swe_image.PATCH + through)
    assert (verdict.resolved, verdict.reason) == (False, "the patch does not apply")


def test_a_patch_that_changes_the_tests_is_judged_by_the_real_ones(calc_task, open_sandbox):
    cheat = swe_image.TESTS_CHANGED
    verdict = judge(open_sandbox, calc_task, cheat)
    assert "1 tests do not pass" in verdict.reason
    assert judge(open_sandbox, calc_task, swe_image.PATCH + cheat).resolved
    quiet = "diff --git a/conftest.py b/conftest.py\nnew file mode 100644\n--- /dev/null\n+++ b/conftest.py\n"
    quiet += "@@ -0,0 +1,2 @@\n+import os\n+os._exit(0)\n"
    assert not judge(open_sandbox, calc_task, swe_image.PATCH + quiet).resolved


def test_a_task_like_those_of_swesmith(calc_task, open_sandbox):
    task = smith_task()
    (validation,) = validate_tasks([task], open_sandbox, repeats=1)
    assert validation.status is TaskStatus.VALID, validation
    with SweEnv(task, open_sandbox) as env:
        env.reset()
        assert "max(values) + min" in bash(env, "cat calc/__init__.py")
        everything = bash(env, "ls -R .; git log --all -p; git cat-file --batch-all-objects --batch")
        assert "test_calc" not in everything
        assert "max(values) - min" not in everything  # the line that the repair restores
        assert bash(env, "git log --format=%s") == "The state at the start"
        bash(env, "sed -i 's/max(values) + min/max(values) - min/' calc/__init__.py")
        bash(env, "mkdir -p tests; echo 'def test(): 0' > tests/test_calc.py")
        assert env.judge(), env.verdict


def test_the_bug_remains_after_a_failed_attempt_to_apply_a_patch(calc_task, open_sandbox):
    """git refuses this patch because of its context and the tree is reset to the last commit; then patch accepts it."""
    elsewhere = "diff --git a/notes.txt b/notes.txt\n--- a/notes.txt\n+++ b/notes.txt\n"
    elsewhere += "@@ -1,2 +1,2 @@\n-one\n+two\n another line than there is\n"
    verdict = judge(open_sandbox, smith_task(), elsewhere)
    assert not verdict.resolved
    assert verdict.reason.startswith("1 tests do not pass" if shutil.which("patch") else "the patch does not apply")


def test_an_image_that_does_not_fit_the_task_is_broken(calc_task, open_sandbox):
    wrong = dataclasses.replace(calc_task, setup_patch=swe_image.PATCH.replace("len(values)", "size"))
    with SweEnv(wrong, open_sandbox) as env, pytest.raises(EnvironmentBroken, match="cannot be prepared"):
        env.reset()
    with pytest.raises(EnvironmentBroken, match="setup patch does not apply"):
        judge(open_sandbox, wrong, "")
