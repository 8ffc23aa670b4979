"""Rows with odd values in any field: a task that can be judged, or the reason why there is none."""

import json
import subprocess

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from megatron_dagger.config.base import ConfigError
from megatron_dagger.envs.swe.datasets import DATASETS, read_tasks
from megatron_dagger.envs.swe.load import keep, read_kept
from tests.unit.envs.swe.rows import BENCH, GYM, R2E, SMITH

ROWS = {"swe-bench": BENCH, "swe-gym": GYM, "swe-smith": SMITH, "r2e-gym": R2E}
TEXTS = st.text(st.characters(codec=None, categories=None), max_size=12) | st.sampled_from(
    [
        *(
            "",
            " ",
            "\n",
            "\ud83d",
            "\0",
            "a\fb\u2028c",
            "'; rm -rf / #",
            "$(date)",
            "../x",
            "[]",
            "[1]",
            '["a::b"]',
            "null",
        ),
        "diff --git a/t.py b/t.py\n--- a/t.py\n+++ b/t.py\n",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
OPTIONAL = ("PASS_TO_PASS", "image_assets", "version", "patch", "test_patch", "parsed_commit_content", "base_commit")


@settings(max_examples=200, deadline=None)
@given(dataset=st.sampled_from(sorted(DATASETS)), data=st.data())
def test_a_row_becomes_a_task_that_can_be_kept_and_judged_or_is_refused(tmp_path_factory, dataset, data):
    folder, row = tmp_path_factory.mktemp("rows"), dict(ROWS[dataset])
    names = st.sampled_from(sorted({*row, *OPTIONAL}))
    for name in data.draw(st.lists(names, min_size=1, max_size=3, unique=True)):
        row[name] = data.draw(VALUES)
    (folder / "rows.json").write_text(json.dumps([row]))
    try:
        (task,), _ = read_tasks(dataset, str(folder / "rows.json"))
    except ConfigError:
        event("refused")
        return
    event("read")
    assert task.fail_to_pass or task.expected_outcomes
    keep(folder / "kept.jsonl", [task])
    assert read_kept(folder / "kept.jsonl") == [task]
    json.dumps(task.harness_row())
    for text in (task.instance_id, task.problem_statement, task.image, task.eval_script, task.patch, task.workdir):
        text.encode()
    if dataset in ("swe-gym", "swe-smith"):  # whose scripts are written here: any name is quoted
        checked = subprocess.run(["bash", "-n"], input=task.eval_script.encode(), capture_output=True)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("dataset", sorted(DATASETS))
def test_the_rows_themselves_are_read(tmp_path, dataset):
    (tmp_path / "rows.json").write_text(json.dumps([ROWS[dataset]]))
    tasks, refused = read_tasks(dataset, str(tmp_path / "rows.json"))
    assert (len(tasks), refused) == (1, {})
