"""Abandoned tasks are recorded in files whose names older runs have too."""

from __future__ import annotations

from pathlib import Path

from megatron_dagger.store.abandoned import AbandonedTasks
from megatron_dagger.store.aggregated import DataStore
from megatron_dagger.store.atomic import read_json
from megatron_dagger.types import StopReason
from tests.support.trajectories import make_trajectory


def test_an_abandoned_task_is_listed_until_it_is_withdrawn(tmp_path: Path) -> None:
    abandoned = AbandonedTasks(tmp_path / "folder")
    assert abandoned.tasks() == set()
    for task_id in ("a/b c", "toolz__1"):
        abandoned.add(make_trajectory(task_id, stop_reason=StopReason.OUT_OF_MEMORY, details={"error": "killed"}))
    assert abandoned.tasks() == {"a/b c", "toolz__1"}
    abandoned.withdraw(["a/b c", "another"])
    assert abandoned.tasks() == {"toolz__1"}


def test_the_folder_and_the_files_keep_their_names_and_the_round_stays_empty(tmp_path: Path) -> None:
    store = DataStore.create_or_open(tmp_path / "data.zarr")
    store.abandoned(3).add(make_trajectory("a b", stop_reason=StopReason.POLICY_ERROR, details={"n": 1}))
    path = tmp_path / "data.zarr" / "rounds" / "0003" / "given_up" / "a%20b.json"
    assert read_json(path) == {"task_id": "a b", "stop_reason": "policy_error", "error": None}
    assert store.rounds() == []
    assert DataStore.open(store.path).abandoned(3).tasks() == {"a b"}
