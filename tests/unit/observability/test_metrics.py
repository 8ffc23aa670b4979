"""metrics.jsonl and TensorBoard."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import pytest

from megatron_dagger.observability.metrics import Metrics, append_line, read_lines, read_metrics
from megatron_dagger.store.atomic import DiskFullError


def test_a_stage_is_recorded_once_and_again_when_its_numbers_change(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    assert metrics.record(0, "collect", {"episodes": 4, "agreement": None})
    assert metrics.record(0, "train", {"steps": 2})
    assert not metrics.record(0, "collect", {"episodes": 4, "agreement": None})  # a resume
    assert not Metrics(tmp_path).record(0, "train", {"steps": 2})
    assert metrics.record(0, "collect", {"episodes": 5, "agreement": 0.5})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["stage"], r.get("episodes")) for r in found] == [("collect", 5), ("train", None)]
    assert all(r["time"] > 1e9 for r in found)


@pytest.mark.parametrize("half", [b'{"round": 1, "stage": "tr', b"{", b'{"round": 1, "stage": "train"}', b"\0" * 9])
def test_what_a_killed_writer_left_is_cut_off(tmp_path: Path, half: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"round": 0, "stage": "collect"})
    whole = path.read_bytes()
    path.write_bytes(whole + half)
    assert read_lines(path) == [{"round": 0, "stage": "collect"}]
    append_line(path, {"round": 1, "stage": "train"})
    assert read_lines(path) == [{"round": 0, "stage": "collect"}, {"round": 1, "stage": "train"}]
    assert path.read_bytes().startswith(whole)


def test_a_long_unfinished_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"x" * 200_000)
    append_line(path, {"a": 1})
    assert path.read_bytes() == b'{"a": 1}\n'
    path.write_bytes(b'{"a": 1}\n' + b"x" * 200_000)
    append_line(path, {"a": 2})
    assert read_lines(path) == [{"a": 1}, {"a": 2}]


def test_a_line_that_is_no_object_is_skipped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\nnonsense\n[1]\n{"a": 2}\n')
    assert read_lines(path) == [{"a": 1}, {"a": 2}]
    assert "line 2 is no JSON object" in caplog.text
    assert read_lines(tmp_path / "none.jsonl") == []


def test_a_full_disk_leaves_the_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"a": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match=r"metrics\.jsonl"):
        append_line(path, {"a": 2})
    assert path.read_bytes() == b'{"a": 1}\n'


def test_tensorboard_reads_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path)
    for index in range(2):
        steps = [{"step": s, "loss": 2.0 - s - index, "lr": 0.1} for s in range(2)]
        metrics.record(index, "train", {"steps": 2, "digests": {"w": "ab"}, "fill": 0.5}, steps=steps)
        metrics.record(index, "evaluate", {"heldout": {"success": 0.25 * index}, "train": None})
    metrics.record(1, "evaluate", {"heldout": {"success": 0.25}, "train": None})  # a resume adds no event
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    tags = found.Tags()["scalars"]
    assert sorted(tags) == ["evaluate/heldout/success", "steps/loss", "steps/lr", "train/fill", "train/steps"]
    assert [(e.step, e.value) for e in found.Scalars("steps/loss")] == [
        (0, 2.0),
        (1, 1.0),
        (2, 1.0),
        (3, 0.0),
    ]
    assert [(e.step, e.value) for e in found.Scalars("evaluate/heldout/success")] == [(0, 0.0), (1, 0.25)]


def test_records_are_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        append_line(tmp_path / "m.jsonl", {"loss": float("nan")})
    assert not (tmp_path / "m.jsonl").exists()
    append_line(tmp_path / "m.jsonl", {"text": "a\nb\u2028c"})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"text": "a\nb\u2028c"}


def test_one_offline_run_of_weights_and_biases_for_all_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for round_index in range(2):  # each stage may be another job
        metrics = Metrics(tmp_path, wandb_project="dagger")
        metrics.record(round_index, "train", {"steps": 2, "loss": 0.5}, steps=[{"step": 1, "loss": 0.75}])
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1, "one run, under one name"
    deadline = time.monotonic() + 30  # W&B's own process writes on after a run is finished
    for file in files:
        while not (b"train/loss" in file.read_bytes() and b"steps/loss" in file.read_bytes()):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_board_that_fails_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert Metrics(tmp_path, wandb_project="no/such:project").record(0, "collect", {"episodes": 1})
    assert "W&B did not take the numbers" in caplog.text
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
