"""``megatron-dagger export`` as a user calls it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("zarr")

from megatron_dagger.cli.main import main
from megatron_dagger.rollout.chat import ChatRenderer
from megatron_dagger.store.aggregated import DataStore
from tests.support.trajectories import make_trajectory


@pytest.mark.parametrize(
    ("options", "tasks"), [([], {"good", "bad"}), (["--solved"], {"good"}), (["--failed"], {"bad"})]
)
def test_episodes_are_chosen_by_their_outcome(tmp_path, monkeypatch, options, tasks):
    run, out = tmp_path / "run", tmp_path / "episodes.jsonl"
    assert main(["create", str(run), "--recipe", "quickstart"]) == 0
    episodes = [replace(make_trajectory(name), solved=name == "good") for name in ("good", "bad")]
    DataStore.create_or_open(run / "data.zarr").append(episodes)
    monkeypatch.setattr(ChatRenderer, "load", lambda path: SimpleNamespace(text=lambda tokens: ""))
    assert main(["export", str(run), "--out", str(out), *options]) == 0
    assert {json.loads(line)["instance_id"] for line in out.read_text().splitlines()} == tasks
