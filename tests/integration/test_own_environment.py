"""The environment that a user copies works from outside the package: a round of it by the command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dagger import recipes
from megatron_dagger.store.aggregated import DataStore

SETTINGS = [
    *("dagger.rounds=1", "dagger.sft_tasks=8", "dagger.tasks_per_round=8", "dagger.evaluation_tasks=4"),
    *("training.max_steps=4", "tasks.options.highest=15"),
]


@pytest.mark.slow
def test_an_environment_outside_the_package_is_run_by_its_recipe(tmp_path):
    pytest.importorskip("vllm")
    pytest.importorskip("megatron.core")
    source = Path(recipes.__file__).with_name("own_environment.py")
    assert len(source.read_text().splitlines()) <= 60, "a whole environment with its recipe stays short"
    shutil.copyfile(source, tmp_path / "guessing.py")
    command = [sys.executable, "-m", "megatron_dagger.cli.main", "run", "run", "--recipe", "guessing:guess_a_number"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [*command, *SETTINGS], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    store = DataStore.open(tmp_path / "run" / "data.zarr")
    assert [len(store.committed(index)) for index in store.sealed()] == [8, 8]
    assert all(episode.solved for episode in store.episodes(0)), "the teacher solves every task"
    assert all(turn.label.text.isdecimal() for episode in store.episodes(1) for turn in episode.turns)
    assert all(int(turn.label.text) <= 15 for episode in store.episodes(1) for turn in episode.turns)
    assert json.loads((tmp_path / "run/rounds/0001/evaluate.json").read_text())["heldout"]["tasks"] == 4
