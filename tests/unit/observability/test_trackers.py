"""TensorBoard and Weights & Biases get the numbers of metrics.jsonl."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megatron_dagger.observability.metrics import StageMetrics, read_metrics


def test_tensorboard_reads_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = StageMetrics(tmp_path)
    for index in range(2):
        steps = [{"step": s, "loss": 2.0 - s - index, "lr": 0.1} for s in range(2)]
        metrics.record(index, "train", {"steps": 2, "digests": {"w": "ab"}, "fill": 0.5}, steps=steps)
        metrics.record(index, "evaluate", {"heldout": {"success": 0.25 * index}, "train": None})
    metrics.record(1, "evaluate", {"heldout": {"success": 0.25}, "train": None})  # after a resume: no new event
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert sorted(tags) == ["evaluate/heldout/success", "steps/loss", "steps/lr", "train/fill", "train/steps"]
    assert [(e.step, e.value) for e in events.Scalars("steps/loss")] == [
        (0, 2.0),
        (1, 1.0),
        (2, 1.0),
        (3, 0.0),
    ]
    assert [(e.step, e.value) for e in events.Scalars("evaluate/heldout/success")] == [(0, 0.0), (1, 0.25)]


def test_all_stages_go_to_one_offline_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for round_index in range(2):  # each stage may run in its own job
        metrics = StageMetrics(tmp_path, wandb_project="dagger")
        metrics.record(round_index, "train", {"steps": 2, "loss": 0.5}, steps=[{"step": 1, "loss": 0.75}])
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1, "both processes log to the same run"
    deadline = time.monotonic() + 30  # W&B's own process still writes after the run has finished
    for file in files:
        while not (b"train/loss" in file.read_bytes() and b"steps/loss" in file.read_bytes()):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_failing_tracker_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert StageMetrics(tmp_path, wandb_project="no/such:project").record(0, "collect", {"episodes": 1})
    assert "cannot log to W&B" in caplog.text
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
