"""An environment and a teacher from outside the package: a round of them by the command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dagger import recipes
from megatron_dagger.store.aggregated import DataStore

pytestmark = pytest.mark.slow
SETTINGS = [
    *("dagger.rounds=1", "dagger.sft_tasks=8", "dagger.tasks_per_round=8", "dagger.evaluation_tasks=4"),
    *("training.max_steps=4", "tasks.options.highest=15"),
]
TEACHER = """\
from guessing import halve
from megatron_dagger.types import Action

class Teacher:
    name = "mine"

    def __init__(self, context):
        self.context, self.shift = context, context.config.teacher.options["shift"]

    async def act(self, state):
        text = str(max(1, int(halve(state.messages)) - self.shift))
        return Action(text=text, tokens=self.context.encode(text))
"""


def run(folder, *settings):
    """Run two rounds in ``folder``, which gets a copy of the environment; return the store of the data."""
    pytest.importorskip("vllm")
    pytest.importorskip("megatron.core")
    source = Path(recipes.__file__).with_name("own_environment.py")
    assert len(source.read_text().splitlines()) <= 60, "a whole environment with its recipe stays short"
    shutil.copyfile(source, folder / "guessing.py")
    command = [sys.executable, "-m", "megatron_dagger.cli.main", "run", "run", "--recipe", "guessing:guess_a_number"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command += [*SETTINGS, *settings]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    store = DataStore.open(folder / "run" / "data.zarr")
    assert [len(store.committed(index)) for index in store.sealed()] == [8, 8]
    return store


def test_an_environment_outside_the_package_is_run_by_its_recipe(tmp_path):
    store = run(tmp_path)
    assert all(episode.solved for episode in store.episodes(0)), "the teacher solves every task"
    assert all(turn.label.text.isdecimal() for episode in store.episodes(1) for turn in episode.turns)
    assert all(int(turn.label.text) <= 15 for episode in store.episodes(1) for turn in episode.turns)
    assert json.loads((tmp_path / "run/rounds/0001/evaluate.json").read_text())["heldout"]["tasks"] == 4


def test_a_teacher_outside_the_package_labels_every_state(tmp_path):
    (tmp_path / "my_teacher.py").write_text(TEACHER)
    store = run(tmp_path, "teacher.kind=my_teacher:Teacher", "teacher.options.shift=1")
    first = {episode.turns[0].label.text for index in (0, 1) for episode in store.episodes(index)}
    assert first == {"7"}, "the middle of 1 to 15 is 8"
    assert all(turn.label is not None for episode in store.episodes(1) for turn in episode.turns)
