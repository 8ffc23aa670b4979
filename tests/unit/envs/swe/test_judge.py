"""Grading of logs, and the names in a patch."""

import json

import pytest

from megatron_dagger.envs.swe.datasets import read_tasks
from megatron_dagger.envs.swe.judge import _reaches_beyond, grade
from megatron_dagger.envs.swe.pytest_script import END, START
from megatron_dagger.envs.swe.r2e_gym import r2e_gym_task
from tests.unit.envs.swe.rows import VERIFIED, needs_verified_rows
from tools.support import swe_image


def test_only_headers_name_files_outside_the_repository():
    harmless = swe_image.PATCH + "@@ -9,2 +9,2 @@\n--- SELECT .. FROM /.git/x\n+++ b//..\n context\n"
    assert not _reaches_beyond(harmless)
    for bad in (
        "--- a/x\n+++ b/../y\n@@ -1 +1 @@\n",
        "--- /etc/x\n+++ b/x\n@@ -1 +1 @@\n",
        "rename to a/.git/config\n",
    ):
        assert _reaches_beyond(swe_image.PATCH + bad)


R2E_LOG = """\
+ pytest -rA r2e_tests
=========================== short test summary info ============================
\x1b[32mPASSED\x1b[0m r2e_tests/test_1.py::TestA::test_x
FAILED r2e_tests/test_1.py::TestA::test_y - AssertionError: 1 == 2
ERROR r2e_tests/test_1.py::TestA::test_z - ValueError
"""


def test_r2e_gym_compares_every_test():
    row = {"repo_name": "p", "docker_image": "i", "commit_hash": "c" * 40, "problem_statement": "s"}
    outcomes = {"TestA.test_x": "PASSED", "TestA.test_y": "FAILED", "TestA.test_z": "ERROR"}
    for expected, resolved in (
        (outcomes, True),
        ({**outcomes, "TestA.test_y": "PASSED"}, False),
        ({**outcomes, "TestA.test_w": "PASSED"}, False),
        ({"TestA.test_x": "PASSED"}, False),
    ):
        task = r2e_gym_task({**row, "expected_output_json": json.dumps(expected)})
        assert grade(task, R2E_LOG).resolved is resolved
    assert grade(task, "nothing ran").reason == "no test has run"


def line_of(parser, test, passed):
    """Return a test's line in the log format that ``parser`` reads."""
    if parser == "parse_log_django":
        return f"{test} ... {'ok' if passed else 'FAIL'}"
    if parser == "parse_log_sympy":
        return f"{test} {'ok' if passed else 'F'}"
    return f"{'PASSED' if passed else 'FAILED'} {test}"


@needs_verified_rows
def test_logs_of_real_rows_are_graded_by_the_harness():
    pytest.importorskip("swebench")
    tasks, _ = read_tasks("swe-bench", str(VERIFIED))
    for task in tasks:
        tests = [*task.pass_to_pass, *task.fail_to_pass]
        for failing, resolved in ((None, True), (task.fail_to_pass[0], False), (tests[0], False)):
            lines = [line_of(task.log_parser, test, test != failing) for test in tests]
            log = "\n".join([f"+ : '{START}'", *lines, f"+ : '{END}'", ""])
            assert grade(task, log).resolved is resolved, task.instance_id
        assert grade(task, "nothing ran").reason == "the log shows no test run"
