"""Rows of every kind of file, and sources that cannot be read."""

import gzip
import json

import pytest

from megatron_dagger.config.base import ConfigError
from megatron_dagger.envs.swe.datasets import read_tasks
from megatron_dagger.envs.swe.swebench import swebench_task
from tests.unit.envs.swe.rows import BENCH, without


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_rows_are_read_from_every_kind_of_file(tmp_path, name):
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


def test_bad_sources_are_named_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "broken.json").write_text("[")
    (tmp_path / "number.json").write_text("3")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "twice.json").write_text(json.dumps([BENCH, BENCH]))
    (tmp_path / "odd.json").write_text(json.dumps([{**BENCH, "FAIL_TO_PASS": "no list"}]))
    for source, why in (
        ("absent.json", "no such file"),
        ("broken.json", "not valid JSON"),
        ("number.json", "expected a list of rows"),
        ("empty.jsonl", "it has no rows"),
        ("twice.json", "two rows have the id Org__pkg-12"),
        ("odd.json", "a field has a wrong value"),
        (".", "expected a .json, .jsonl or .parquet file"),
    ):
        with pytest.raises(ConfigError, match=why):
            read_tasks("swe-bench", str(tmp_path / source))
    with pytest.raises(ConfigError, match="choose one of swe-bench, swe-gym, swe-smith, r2e-gym"):
        read_tasks("swebench", "x")
