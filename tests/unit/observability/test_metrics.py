"""metrics.jsonl: recorded once, and consistent after a kill."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from megatron_dagger.observability.metrics import StageMetrics, append_line, read_lines, read_metrics
from megatron_dagger.store.atomic import DiskFullError


def test_a_stage_is_recorded_once_unless_its_numbers_change(tmp_path: Path) -> None:
    metrics = StageMetrics(tmp_path)
    assert metrics.record(0, "collect", {"episodes": 4, "agreement": None})
    assert metrics.record(0, "train", {"steps": 2})
    assert not metrics.record(0, "collect", {"episodes": 4, "agreement": None})  # a resume
    assert not StageMetrics(tmp_path).record(0, "train", {"steps": 2})
    assert metrics.record(0, "collect", {"episodes": 5, "agreement": 0.5})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["stage"], r.get("episodes")) for r in records] == [("collect", 5), ("train", None)]
    assert all(r["time"] > 1e9 for r in records)


@pytest.mark.parametrize("half", [b'{"round": 1, "stage": "tr', b"{", b'{"round": 1, "stage": "train"}', b"\0" * 9])
def test_an_unfinished_line_of_a_killed_writer_is_cut_off(tmp_path: Path, half: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"round": 0, "stage": "collect"})
    whole = path.read_bytes()
    path.write_bytes(whole + half)
    assert read_lines(path) == [{"round": 0, "stage": "collect"}]
    append_line(path, {"round": 1, "stage": "train"})
    assert read_lines(path) == [{"round": 0, "stage": "collect"}, {"round": 1, "stage": "train"}]
    assert path.read_bytes().startswith(whole)


def test_a_long_unfinished_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"x" * 200_000)
    append_line(path, {"a": 1})
    assert path.read_bytes() == b'{"a": 1}\n'
    path.write_bytes(b'{"a": 1}\n' + b"x" * 200_000)
    append_line(path, {"a": 2})
    assert read_lines(path) == [{"a": 1}, {"a": 2}]


def test_a_line_that_is_not_an_object_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\nnonsense\n[1]\n{"a": 2}\n')
    assert read_lines(path) == [{"a": 1}, {"a": 2}]
    assert "line 2 is not a JSON object" in caplog.text
    assert read_lines(tmp_path / "none.jsonl") == []


def test_a_full_disk_leaves_the_complete_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"a": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match=r"metrics\.jsonl"):
        append_line(path, {"a": 2})
    assert path.read_bytes() == b'{"a": 1}\n'


def test_only_json_is_recorded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        append_line(tmp_path / "m.jsonl", {"loss": float("nan")})
    assert not (tmp_path / "m.jsonl").exists()
    append_line(tmp_path / "m.jsonl", {"text": "a\nb\u2028c"})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"text": "a\nb\u2028c"}
