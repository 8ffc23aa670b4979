"""status: from the files of a run that goes on, is done, or was killed."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dagger.observability.metrics import append_line
from megatron_dagger.observability.progress import track
from megatron_dagger.observability.rundir import NoRunError, read_run
from megatron_dagger.observability.status import status
from megatron_dagger.store.aggregated import DataStore
from megatron_dagger.store.atomic import write_json
from tests.synthetic import random_trajectory
from tests.synthetic_run import make_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "one", rounds=2, tasks=3, heldout=2)


def test_a_finished_run(finished: Path) -> None:
    text = status(finished)
    assert "2 of 2 rounds finished" in text
    assert text.count(" done ") == 6
    assert "1 min 03 s" in text
    assert "The run is complete." in text


def test_a_round_under_way_and_killed_and_failed(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    store = DataStore.create_or_open(run / "data.zarr")
    store.append([random_trajectory(0, f"t{i}", turns=2) for i in range(3)])
    (run / "rounds" / "0000").mkdir(parents=True)
    code = (
        "import sys, time; from pathlib import Path\n"
        "from megatron_dagger.observability.progress import track\n"
        "where = dict(run_dir=Path(sys.argv[1]), round_index=0, stage='collect')\n"
        "with track('collecting', 64, **where):\n"
        "    print('up', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(run)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    text = status(run, data=store)
    assert "0 rounds finished" in text
    assert "collect   running  0/64 episodes, 0.00/s, 3 episodes committed" in text
    assert f"Now: round 0, collecting: 0/64 episodes, 0.00/s (process {child.pid}" in text
    os.kill(child.pid, signal.SIGKILL)
    child.communicate(timeout=30)
    text = status(run, data=store)
    assert "collect   killed" in text
    assert "The same command again goes on from there." in text
    assert f"Logs: {run / 'logs'}" in text
    log = run / "logs" / "train.log"
    append_line(run / "rounds" / "0000" / "train" / "metrics.jsonl", {"step": 7, "loss": 1.5})
    with (
        pytest.raises(RuntimeError),
        track("training", 60, unit="steps", run_dir=run, round_index=0, stage="train", log_file=log,
              stream=io.StringIO()),
    ):  # fmt: skip
        raise RuntimeError("rank 1 on node-3 is gone")
    text = status(run)
    assert "train     failed   0/60 steps, 0.00/s, step 7, loss 1.500" in text
    assert "RuntimeError: rank 1 on node-3 is gone" in text
    assert f"Its log: {log}" in text


def test_files_that_are_half_there(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "rounds" / "0000").mkdir(parents=True)
    (run / "rounds" / "0000" / "collect.json").write_text('{"episodes": ')
    (run / "status.json").write_text("")
    (run / "config.yaml").write_text("a: [")
    text = status(run)
    assert "collect   -" in text
    assert "No stage has reported yet." in text
    write_json(run / "rounds" / "0000" / "evaluate.json", {"round": 0})
    assert read_run(run).rounds[0].evaluate == {"round": 0}


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(NoRunError, match="there is no such directory"):
        status(tmp_path / "none")
    with pytest.raises(NoRunError, match="no run directory"):
        status(tmp_path)
