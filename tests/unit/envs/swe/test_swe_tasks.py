"""Rows of the datasets become tasks, or are refused with the reason; evaluation stays out of training."""

import dataclasses
import gzip
import json
from pathlib import Path

import pytest

from megatron_dagger.config.base import ConfigError
from megatron_dagger.envs.swe.datasets import read_tasks
from megatron_dagger.envs.swe.judge import grade
from megatron_dagger.envs.swe.pytest_script import END, START
from megatron_dagger.envs.swe.r2e_gym import r2e_gym_task
from megatron_dagger.envs.swe.swebench import swebench_task
from megatron_dagger.envs.swe.swegym import HELD_OUT, swegym_task
from megatron_dagger.envs.swe.swesmith import swesmith_image, swesmith_task
from megatron_dagger.envs.swe.task import EvaluationSet, TrainingTasks, held_out

VERIFIED = Path(__file__).resolve().parents[4].parent / "shared" / "data" / "swebench_verified_50.jsonl.gz"
PATCH = "diff --git a/pkg/a.py b/pkg/a.py\n--- a/pkg/a.py\n+++ b/pkg/a.py\n@@ -1 +1 @@\n-x = 1\n+x = 2\n"
TEST_PATCH = """\
diff --git a/tests/test_a.py b/tests/test_a.py
--- a/tests/test_a.py
+++ b/tests/test_a.py
@@ -1 +1 @@
-1
+2
diff --git a/tests/test_new.py b/tests/test_new.py
new file mode 100644
--- /dev/null
+++ b/tests/test_new.py
@@ -0,0 +1 @@
+3
diff --git a/tests/data.json b/tests/data.json
--- a/tests/data.json
+++ b/tests/data.json
@@ -1 +1 @@
-{}
+[]
"""
BENCH = {
    "instance_id": "Org__pkg-12",
    "repo": "Org/pkg",
    "base_commit": "c0ffee00" * 5,
    "problem_statement": "x is wrong",
    "patch": PATCH,
    "test_patch": TEST_PATCH,
    "version": "1.0",
    "FAIL_TO_PASS": '["tests/test_a.py::test_x"]',
    "PASS_TO_PASS": "[]",
    "image": "registry/image:1",
    "eval_script": "#!/bin/bash\npytest\n",
    "log_parser": "parse_log_pytest",
    "eval_type": "pass_and_fail",
}
GYM = {
    **{k: BENCH[k] for k in ("base_commit", "problem_statement", "patch", "test_patch", "version")},
    "instance_id": "getmoto__Moto-5",
    "repo": "getmoto/moto",
    "FAIL_TO_PASS": ["tests/test_a.py::test_x"],
    "PASS_TO_PASS": ["tests/test_a.py::test_y"],
}
SMITH = {
    "instance_id": "org__pkg.c0ffee00.func_basic__1",
    "repo": "swesmith/org__pkg.c0ffee00",
    "patch": PATCH,
    "FAIL_TO_PASS": ["tests/test_a.py::test_x"],
    "PASS_TO_PASS": ["tests/test_a.py::test_y", "tests/test_b.py::test_z"],
    "image_name": "swesmith.x86_64.Org__pkg.c0ffee00",
    "problem_statement": "x is wrong",
}
R2E = {
    "repo_name": "pkg",
    "docker_image": "someone/pkg_final:c0ffee",
    "commit_hash": "deadbeef" * 5,
    "problem_statement": "noise [ISSUE]\nx is wrong\n[/ISSUE] noise",
    "expected_output_json": json.dumps({"TestA.test_x": "PASSED", "TestA.test_y": "FAILED"}),
    "parsed_commit_content": json.dumps(
        {
            "file_diffs": [
                {"header": {"file": {"path": "pkg/a.py"}}, "old_file_content": "x = 1", "new_file_content": "x = 2"},
                {"header": {"file": {"path": "tests/test_a.py"}}, "old_file_content": "", "new_file_content": "1\n"},
            ]
        }
    ),
}


def without(row, *names):
    return {name: value for name, value in row.items() if name not in names}


@pytest.mark.skipif(not VERIFIED.is_file(), reason="the 50 rows of SWE-bench Verified are not beside this checkout")
def test_real_rows_of_swebench_verified():
    tasks, refused = read_tasks("swe-bench", str(VERIFIED))
    assert (len(tasks), refused) == (50, {})
    rows = [json.loads(line) for line in gzip.decompress(VERIFIED.read_bytes()).splitlines()]
    for task, row in zip(tasks, rows, strict=True):
        assert swebench_task(without(row, "image")).image == row["image"]
        assert task.fail_to_pass
        assert task.eval_script in row["eval_script"]
        older, why = without(row, "image", "eval_script", "log_parser", "eval_type"), "older schema"
        with pytest.raises(ConfigError, match=why):
            swebench_task(older)


def test_a_row_of_the_older_schema_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"Org__pkg-12 is of .*older schema, without log_parser: take"):
        swebench_task(without(BENCH, "log_parser"))
    with pytest.raises(ConfigError, match="has no base_commit"):
        swebench_task(without(BENCH, "base_commit"))


def test_swegym_rows_get_image_and_script():
    task = swegym_task(GYM)
    assert task.image == "xingyaoww/sweb.eval.x86_64.getmoto_s_moto-5:latest"
    lines = task.eval_script.splitlines()
    start = lines.index(": '>>>>> Start Test Output'")
    assert lines[start + 1] == "pytest -n0 -rA tests/test_a.py tests/test_new.py"
    assert lines[start + 2] == ": '>>>>> End Test Output'"
    restore = ["rm -f -- tests/test_new.py", f"git checkout {GYM['base_commit']} -- tests/test_a.py tests/data.json"]
    assert lines[start + 3 :] == restore
    assert lines[lines.index(restore[0]) + 1] == restore[1]
    with pytest.raises(ConfigError, match="no test command is known for other/repo; there are: bokeh/bokeh, "):
        swegym_task({**GYM, "repo": "other/repo"})


def test_swegym_rows_are_judged_as_its_fork_of_the_harness_does():
    data = "diff --git a/test-data/a.test b/test-data/a.test\n--- a/test-data/a.test\n+++ b/test-data/a.test\n"
    data += "@@ -1 +1,3 @@\n [case testA]\n+[case testB]\n+x = 1\n"
    mypy = {**GYM, "repo": "python/mypy", "test_patch": data, "FAIL_TO_PASS": ["mypy/test/testcheck.py::S::a::testB"]}
    assert "\npytest -n0 -rA -k 'testA or testB'\n" in swegym_task(mypy).eval_script
    plain = swegym_task({**mypy, "test_patch": GYM["test_patch"]})  # no cases: files
    assert "\npytest -n0 -rA tests/test_a.py tests/test_new.py\n" in plain.eval_script
    conan = swegym_task({**GYM, "repo": "conan-io/conan"}).eval_script
    assert "\nexport PYTHONPATH=${PYTHONPATH:-}:$(pwd)\npytest -n0 -rA tests/test_a.py" in conan
    assert swegym_task({**GYM, "repo": "pydantic/pydantic"}).log_parser == "parse_log_pytest_v2"


def test_swesmith_rows_are_bugs_to_be_undone():
    task = swesmith_task(SMITH)
    assert task.image == "jyangballin/swesmith.x86_64.org_1776_pkg.c0ffee00:latest"
    assert swesmith_image("someone/swesmith.x86_64.a_1776_b.c:2") == "someone/swesmith.x86_64.a_1776_b.c:2"
    assert (task.setup_patch, task.patch_reversed, task.base_commit) == (PATCH, True, "c0ffee00")
    assert task.pass_to_pass == ("tests/test_a.py::test_y",)
    assert task.hidden == ("tests/test_a.py",)
    with pytest.raises(ConfigError, match="only pytest's tests"):
        swesmith_task({**SMITH, "FAIL_TO_PASS": ["TestSomething"]})
    with pytest.raises(ConfigError, match="bugs without an issue text"):
        swesmith_task({**SMITH, "problem_statement": ""})


def test_r2e_gym_rows_have_their_gold_patch_made():
    task = r2e_gym_task(R2E)
    assert (task.image, task.problem_statement) == (R2E["docker_image"], "x is wrong")
    assert dict(task.expected_outcomes) == {"TestA.test_x": "PASSED", "TestA.test_y": "FAILED"}
    lost = "\\ No newline at end of file\n"
    head = "diff --git a/pkg/a.py b/pkg/a.py\n--- a/pkg/a.py\n+++ b/pkg/a.py\n@@ -1 +1 @@\n"
    assert task.patch == f"{head}-x = 1\n{lost}+x = 2\n{lost}"
    assert r2e_gym_task(without(R2E, "parsed_commit_content")).patch == ""


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_rows_of_any_kind_of_file(tmp_path, name):
    path, second = tmp_path / name, {**BENCH, "instance_id": "Org__pkg-13"}
    rows = [BENCH, second, without(BENCH, "eval_script")]
    if name.endswith("parquet"):
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    else:
        text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    tasks, refused = read_tasks("swe-bench", str(path))
    assert tasks == [swebench_task(BENCH), swebench_task(second)]
    assert list(refused) == ["row 3"]
    assert "without eval_script" in refused["row 3"]


def test_bad_sources_are_named_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "broken.json").write_text("[")
    (tmp_path / "number.json").write_text("3")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "twice.json").write_text(json.dumps([BENCH, BENCH]))
    (tmp_path / "odd.json").write_text(json.dumps([{**BENCH, "FAIL_TO_PASS": "no list"}]))
    for source, why in (
        ("absent.json", "there is no such file"),
        ("broken.json", "not valid JSON"),
        ("number.json", "expected a list of rows"),
        ("empty.jsonl", "it has no rows"),
        ("twice.json", "two rows are called Org__pkg-12"),
        ("odd.json", "a field is not what it should be"),
        (".", "expected a .json, .jsonl or .parquet file"),
    ):
        with pytest.raises(ConfigError, match=why):
            read_tasks("swe-bench", str(tmp_path / source))
    with pytest.raises(ConfigError, match="none of swe-bench, swe-gym, swe-smith, r2e-gym"):
        read_tasks("swebench", "x")


def test_no_task_of_the_evaluation_set_can_be_trained_on():
    evaluated = swebench_task(BENCH)
    other = dataclasses.replace(evaluated, instance_id="org__pkg-99", base_commit="12345678", patch=PATCH + "+y = 1\n")
    never = EvaluationSet([evaluated])
    same_id = dataclasses.replace(other, instance_id="org__PKG-12")
    same_commit = dataclasses.replace(other, base_commit=evaluated.base_commit[:12], repo="fork/Pkg")
    same_patch = dataclasses.replace(other, patch=PATCH.replace("@@ -1 +1 @@", "@@ -7,1 +7,1 @@"))
    smith = swesmith_task({**SMITH, "patch": PATCH + "-z\n"})  # of the commit that is evaluated
    for task, why in (
        (same_id, "in the evaluation set"),
        (same_commit, "at commit c0ffee00"),
        (same_patch, "its gold patch"),
        (smith, "at commit c0ffee00"),
    ):
        with pytest.raises(ConfigError, match=why):
            TrainingTasks([other, task], never=never)
        kept, refused = TrainingTasks.allowed([other, task], never=never)
        assert list(kept) == [other]
        assert list(refused) == [task.instance_id]
    assert list(TrainingTasks([other], never=never)) == [other]
    with pytest.raises(ConfigError, match="has tasks of Org/pkg"):
        TrainingTasks([other], never=EvaluationSet([evaluated], whole_repositories=True))


def test_the_published_count_of_swegym_is_held_out():
    one = swegym_task({**GYM, "patch": ""})
    tasks = [dataclasses.replace(one, instance_id=f"getmoto__moto-{n}", base_commit=f"{n:08x}") for n in range(2438)]
    heldout = held_out(tasks, HELD_OUT)
    assert held_out(reversed(tasks), HELD_OUT) == heldout, "whatever the order of the rows"
    assert held_out(tasks, HELD_OUT, seed=1) != heldout
    without_one = [task for task in tasks if task != heldout[0]]
    assert held_out(without_one, HELD_OUT)[:-1] == heldout[1:], "a row that is refused changes nothing else"
    train, refused = TrainingTasks.allowed(tasks, never=EvaluationSet(heldout))
    assert (len(heldout), len(train), set(refused)) == (100, 2338, {task.instance_id for task in heldout})


def line_of(parser, test, passed):
    """How the test runner that the parser is for tells of a test."""
    if parser == "parse_log_django":
        return f"{test} ... {'ok' if passed else 'FAIL'}"
    if parser == "parse_log_sympy":
        return f"{test} {'ok' if passed else 'F'}"
    return f"{'PASSED' if passed else 'FAILED'} {test}"


@pytest.mark.skipif(not VERIFIED.is_file(), reason="the 50 rows of SWE-bench Verified are not beside this checkout")
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
