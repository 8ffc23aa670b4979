"""Making tasks: which are accepted, their schema, and that the same seed gives the same tasks."""

import json
import subprocess
from dataclasses import replace

import pytest

from megatron_dagger.config import ConfigError, RepoRepairConfig
from megatron_dagger.envs.repo_repair.generate import UnusablePackage, make_tasks
from megatron_dagger.envs.repo_repair.repository import read_repository
from megatron_dagger.envs.repo_repair.task import read_tasks, write_tasks
from megatron_dagger.envs.repo_repair.testing import run_tests
from tests.unit.envs.repo_repair.conftest import TREE

SWE_BENCH_FIELDS = {
    "repo", "instance_id", "base_commit", "patch", "test_patch", "problem_statement", "hints_text", "created_at",
    "version", "FAIL_TO_PASS", "PASS_TO_PASS", "environment_setup_commit", "image", "eval_script", "log_parser",
    "eval_type",
}  # fmt: skip


def test_accepted_tasks_fail_and_pass_with_the_gold_patch(tasks, pool, repositories, tmp_path):
    assert len(tasks) >= 6
    assert len({task.operator for task in tasks}) >= 4
    for task in tasks[:4]:
        assert task.fail_to_pass
        folder = tmp_path / task.instance_id
        subprocess.run(["git", "clone", "-q", repositories / task.instance_id, folder], check=True)
        broken = run_tests(pool, read_repository(folder), task.tool_settings())
        assert not any(broken.outcomes[test] == "passed" for test in task.fail_to_pass)
        assert broken.passed(task.pass_to_pass)
        subprocess.run(["git", "apply", "-"], input=task.patch, text=True, cwd=folder, check=True)
        assert (folder / "small.py").read_bytes() == TREE.files["small.py"]
        assert run_tests(pool, read_repository(folder), task.tool_settings()).passed(task.tests)


def test_repository_has_one_commit_and_no_trace_of_the_repair(tasks, repositories):
    for task in tasks:
        log = subprocess.run(
            ["git", "-C", repositories / task.instance_id, "log", "--all", "--format=%H"],
            capture_output=True, text=True, check=True,
        ).stdout.split()  # fmt: skip
        assert log == [task.base_commit]


def test_rows_have_swe_bench_fields_and_survive_their_file(tasks, tmp_path):
    write_tasks(tmp_path / "tasks.jsonl", tasks)
    assert read_tasks(tmp_path / "tasks.jsonl") == tasks
    row = json.loads((tmp_path / "tasks.jsonl").read_text().splitlines()[0])
    assert set(row) >= SWE_BENCH_FIELDS


def test_same_seed_same_tasks(tasks, pool, tmp_path):
    assert make_tasks(TREE, 3, 1, RepoRepairConfig(), pool, tmp_path) == tasks[:3]


def test_damaged_row_is_named(tmp_path):
    (tmp_path / "tasks.jsonl").write_text('{"instance_id": 1}\n')
    with pytest.raises(ConfigError, match=r"tasks\.jsonl:1"):
        read_tasks(tmp_path / "tasks.jsonl")


def test_package_whose_tests_fail_is_refused(pool, tmp_path):
    broken = replace(TREE, files={**TREE.files, "tests/test_small.py": b"def test_x():\n    assert False\n"})
    with pytest.raises(UnusablePackage, match="small"):
        make_tasks(broken, 1, 1, RepoRepairConfig(), pool, tmp_path)
