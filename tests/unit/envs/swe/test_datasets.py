"""Rows of each data set become tasks, or are refused with the reason."""

import gzip
import json
from typing import get_args

import pytest

from megatron_dagger.config import SweConfig, override
from megatron_dagger.config.base import ConfigError
from megatron_dagger.config.swe import Dataset
from megatron_dagger.envs.swe.datasets import DATASETS, read_tasks
from megatron_dagger.envs.swe.r2e_gym import r2e_gym_task
from megatron_dagger.envs.swe.swebench import swebench_task
from megatron_dagger.envs.swe.swegym import swegym_task
from megatron_dagger.envs.swe.swesmith import swesmith_image, swesmith_task
from tests.support.git import git
from tests.unit.envs.swe.rows import BENCH, GYM, PATCH, R2E, SMITH, VERIFIED, needs_verified_rows, without


@needs_verified_rows
def test_real_rows_of_swebench_verified():
    tasks, refused = read_tasks("swe-bench", str(VERIFIED))
    rows = [json.loads(line) for line in gzip.decompress(VERIFIED.read_bytes()).splitlines()]
    assert rows
    assert (len(tasks), refused) == (len(rows), {})
    for task, row in zip(tasks, rows, strict=True):
        assert swebench_task(without(row, "image")).image == row["image"]
        assert task.fail_to_pass
        assert task.eval_script in row["eval_script"]
        with pytest.raises(ConfigError, match="older schema"):
            swebench_task(without(row, "image", "eval_script", "log_parser", "eval_type"))


def test_a_row_of_the_older_schema_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"Org__pkg-12 has .*older schema, without log_parser: use"):
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
    restore = [
        "rm -rf -- tests/test_a.py tests/test_new.py tests/data.json",
        f"git checkout {GYM['base_commit']} -- tests/test_a.py tests/data.json",
    ]
    assert lines[start + 3 :] == restore
    assert lines[lines.index(restore[0]) + 1] == restore[1]
    with pytest.raises(ConfigError, match="no test command is known for other/repo, only for bokeh/bokeh, "):
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


DIFF = "diff --git a/tests/{0} b/tests/{1}\n"
MODIFIED = DIFF.format("test_a.py", "test_a.py") + "--- a/tests/test_a.py\n+++ b/tests/test_a.py\n@@ -1 +1 @@\n-1\n+2\n"
RENAMED = DIFF.format("old.py", "new.py") + "similarity index 90%\nrename from tests/old.py\nrename to tests/new.py\n"
DELETED = DIFF.format("d.py", "d.py") + "deleted file mode 100644\n--- a/tests/d.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-1\n"
QUOTED = MODIFIED.replace("a/tests/test_a.py", '"a/tests/t\\303\\251.py"').replace(
    "b/tests/test_a.py", '"b/tests/t\\303\\251.py"'
)
PICTURE = DIFF.format("x.png", "x.png") + "new file mode 100644\nindex 0000000..1111111\n"
WITHOUT_CONTENT = PICTURE + "Binary files /dev/null and b/tests/x.png differ\n"
WITH_CONTENT = PICTURE + "GIT binary patch\nliteral 2\nJcmZQzWMKdR00962003+Q\n"


@pytest.mark.parametrize(
    "patch, chosen",
    [
        (MODIFIED + RENAMED, "tests/test_a.py tests/new.py"),
        (MODIFIED + DELETED, "tests/test_a.py"),
        (QUOTED, "'tests/té.py'"),
        (WITH_CONTENT + MODIFIED, "tests/test_a.py"),
    ],
)
def test_swegym_runs_the_test_files_that_there_are_after_the_patch(patch, chosen):
    assert f"\npytest -n0 -rA {chosen}\n" in swegym_task({**GYM, "test_patch": patch}).eval_script


@pytest.mark.parametrize(
    "patch, why",
    [
        (MODIFIED.replace("test_a.py", "x.json"), "no Python file that could be run"),
        (DELETED, "no Python file that could be run"),
        ("no patch", "no Python file that could be run"),
        (WITHOUT_CONTENT + MODIFIED, r"lacks the content of tests/x\.png, so git cannot apply it"),
    ],
)
def test_a_swegym_row_whose_tests_cannot_be_run_is_refused(patch, why):
    with pytest.raises(ConfigError, match=f"getmoto__Moto-5: .*{why}"):
        swegym_task({**GYM, "test_patch": patch})


@pytest.mark.parametrize("reader, row", [(swebench_task, BENCH), (swegym_task, GYM), (swesmith_task, SMITH)])
def test_a_row_that_any_patch_would_solve_is_refused(reader, row):
    for tests in ([], "[]", None, ""):
        with pytest.raises(ConfigError, match="FAIL_TO_PASS"):
            reader({**row, "FAIL_TO_PASS": tests})
    for tests in ("test_x", '"test_x"', "[1]", [""], [["a"]], '{"a": 1}', 3):
        with pytest.raises((ConfigError, ValueError)):
            reader({**row, "FAIL_TO_PASS": tests})
    with pytest.raises(ConfigError, match="expected_output_json names no test"):
        r2e_gym_task({**R2E, "expected_output_json": "{}"})


def test_the_patch_of_a_swesmith_row_is_a_bug_to_undo():
    task = swesmith_task(SMITH)
    assert task.image == "jyangballin/swesmith.x86_64.org_1776_pkg.c0ffee00:latest"
    assert swesmith_image("someone/swesmith.x86_64.a_1776_b.c:2") == "someone/swesmith.x86_64.a_1776_b.c:2"
    assert (task.setup_patch, task.patch_reversed, task.base_commit) == (PATCH, True, "c0ffee00")
    assert task.pass_to_pass == ("tests/test_a.py::test_y",)
    assert task.hidden == ("tests/test_a.py",)
    with pytest.raises(ConfigError, match="only pytest tests are supported"):
        swesmith_task({**SMITH, "FAIL_TO_PASS": ["TestSomething"]})
    with pytest.raises(ConfigError, match="bugs without an issue text"):
        swesmith_task({**SMITH, "problem_statement": ""})


def test_the_gold_patch_of_an_r2e_gym_row_is_made_from_its_file_diffs():
    task = r2e_gym_task(R2E)
    assert (task.image, task.problem_statement) == (R2E["docker_image"], "x is wrong")
    assert dict(task.expected_outcomes) == {"TestA.test_x": "PASSED", "TestA.test_y": "FAILED"}
    no_newline = "\\ No newline at end of file\n"
    head = "diff --git a/pkg/a.py b/pkg/a.py\n--- a/pkg/a.py\n+++ b/pkg/a.py\n@@ -1 +1 @@\n"
    assert task.patch == f"{head}-x = 1\n{no_newline}+x = 2\n{no_newline}"
    assert r2e_gym_task(without(R2E, "parsed_commit_content")).patch == ""


@pytest.mark.parametrize(
    "before, after",
    [
        ("1\n2\n", "1\n3\n"),
        ("one\f1\r\nlast\u2028\n", "one\f2\r\nlast\u2028\n"),
        ("1\n", "1"),
        (None, "1\n"),
        (None, ""),
        ("", "1\n"),
        ("1\n", ""),
        ("1\n", None),
        ("", None),
    ],
)
def test_git_makes_r2e_gyms_commit_of_its_gold_patch(tmp_path, before, after):
    def side(name, text):
        return {"path": "/dev/null" if text is None else f"{name}/pkg/a b.py"}

    change = {
        "header": {"file": {"path": "pkg/a b.py"}},
        "minus_file": side("a", before),
        "plus_file": side("b", after),
        "old_file_content": before or "",
        "new_file_content": after or "",
    }
    patch = r2e_gym_task({**R2E, "parsed_commit_content": json.dumps({"file_diffs": [change]})}).patch
    file = tmp_path / "pkg" / "a b.py"
    file.parent.mkdir()
    if before is not None:
        file.write_bytes(before.encode())
    git(tmp_path, "init", "-q")
    git(tmp_path, "apply", "-", input=patch.encode())
    assert (file.read_bytes().decode() if file.exists() else None) == after


def test_pictures_of_a_multimodal_row_are_handed_on(tmp_path):
    pictures = {
        "test_patch": [{"path": "tests/a.png", "url": "https://host.org/a"}],
        "problem_statement": ["https://b"],
    }
    for value in (pictures, json.dumps(pictures)):
        task = swebench_task({**BENCH, "image_assets": value})
        assert task.assets == (("tests/a.png", "https://host.org/a"),)
        assert task.harness_row()["image_assets"] == {"test_patch": pictures["test_patch"]}
    for value in (None, "", {}, {"test_patch": None}):
        assert swebench_task({**BENCH, "image_assets": value}).assets == ()
    for path, url in (
        *(("../a", "https://host.org/a"), ("/a", "https://host.org/a"), ("a", "file:///etc/passwd"), ("a", None)),
        *(
            ("a", f"http://{host}/a")
            for host in ("127.0.0.1", "169.254.169.254", "[::1", "localhost", "h st.org", "é.org")
        ),
        ("a", "https://host.org/é"),
    ):
        with pytest.raises(ConfigError, match="no file with a public address"):
            swebench_task({**BENCH, "image_assets": {"patch": [{"path": path, "url": url}]}})


def test_every_format_of_the_settings_has_a_reader():
    assert tuple(DATASETS) == get_args(Dataset)
    with pytest.raises(ConfigError, match="swe-bench"):
        override(SweConfig(), ["train_dataset=swebench"])
