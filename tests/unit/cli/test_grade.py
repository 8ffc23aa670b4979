"""The tasks and predictions of a run that are graded."""

import argparse
from types import SimpleNamespace

import pytest

pytest.importorskip("zarr")

from megatron_dagger.cli import grade
from megatron_dagger.store.aggregated import DataStore
from megatron_dagger.types import StopReason
from tests.support.trajectories import make_trajectory


def test_an_abandoned_heldout_task_counts_without_a_prediction(tmp_path, monkeypatch):
    store = DataStore.create_or_open(tmp_path / "evaluations.zarr")
    store.append([make_trajectory("a"), make_trajectory("trained")])
    for task in ("b", "also-trained"):
        store.abandoned(0).add(make_trajectory(task, stop_reason=StopReason.OUT_OF_MEMORY))
    store.seal(0)
    heldout = [SimpleNamespace(instance_id=name) for name in ("a", "b")]
    monkeypatch.setattr(grade, "_tasks", lambda arguments: heldout)
    arguments = argparse.Namespace(run_dir=tmp_path, predictions=None, round_index=None, out=tmp_path / "grades")
    subject = grade._run_subject(arguments)
    assert subject.tasks == heldout
    predicted = [row["instance_id"] for row in subject.predictions]
    assert predicted == [episode.task_id for episode in subject.episodes] == ["a"]
