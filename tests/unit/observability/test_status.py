"""The status of running, finished and killed runs, read from their files."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_dagger.observability.metrics import append_line
from megatron_dagger.observability.progress import track
from megatron_dagger.observability.rundir import NoRunError, read_run
from megatron_dagger.observability.status import status
from megatron_dagger.observability.status_file import RunProcess, failure_recorded
from megatron_dagger.store.aggregated import DataStore
from megatron_dagger.store.atomic import write_json
from tests.support.run_directory import make_run
from tests.support.trajectories import random_trajectory


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "one", rounds=2, tasks=3, heldout=2)


def test_status_of_a_finished_run(finished: Path) -> None:
    text = status(finished)
    assert "2 of 2 rounds finished" in text
    assert text.count(" done ") == 6
    assert "1 min 03 s" in text
    assert "The run is complete." in text


def test_if_only_the_last_round_is_evaluated_the_others_end_with_training(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "rounds" / "0000" / "evaluate.json").unlink()
    assert "1 of 2 rounds finished" in status(run)
    config = (run / "config.yaml").read_text()
    assert "evaluate_rounds: all" in config
    (run / "config.yaml").write_text(config.replace("evaluate_rounds: all", "evaluate_rounds: last"))
    assert "2 of 2 rounds finished" in status(run)


def test_status_of_a_running_a_killed_and_a_failed_stage(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    store = DataStore.create_or_open(run / "data.zarr")
    store.append([random_trajectory(0, f"t{i}", turns=2) for i in range(3)])
    (run / "rounds" / "0000").mkdir(parents=True)
    code = (
        "import sys, time; from pathlib import Path\n"
        "from megatron_dagger.observability.progress import track\n"
        "from megatron_dagger.observability.status_file import RunProcess\n"
        "with track('collecting', 64, process=RunProcess(run_dir=Path(sys.argv[1])), stage=(0, 'collect')):\n"
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
    assert f"Now: collecting: 0/64 episodes, 0.00/s (process {child.pid}" in text
    os.kill(child.pid, signal.SIGKILL)
    child.communicate(timeout=30)
    text = status(run, data=store)
    assert "collect   killed" in text
    assert "Run the same command again to resume." in text
    assert f"Logs: {run / 'logs'}" in text
    log = run / "logs" / "train.log"
    append_line(run / "rounds" / "0000" / "train" / "metrics.jsonl", {"step": 7, "loss": 1.5})
    with (
        pytest.raises(RuntimeError),
        track("training", 60, unit="steps", process=RunProcess(run_dir=run, log_file=log), stage=(0, "train"),
              stream=io.StringIO()),
    ):  # fmt: skip
        raise RuntimeError("rank 1 on node-3 is gone")
    text = status(run)
    assert "train     failed   0/60 steps, 0.00/s, step 7, loss 1.500" in text
    assert "collect   killed" in text
    assert "RuntimeError: rank 1 on node-3 is gone" in text
    assert f"Its log: {log}" in text


def test_damaged_files_read_as_not_done(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "rounds" / "0000").mkdir(parents=True)
    (run / "rounds" / "0000" / "collect.json").write_text('{"episodes": ')
    (run / "status").mkdir()
    (run / "status" / "0000-collect.json").write_text("")
    (run / "status" / "0000-train.json").write_text("[]")
    (run / "config.yaml").write_text("a: [")
    text = status(run)
    assert "collect   -" in text
    assert "No stage has reported yet." in text
    write_json(run / "rounds" / "0000" / "evaluate.json", {"round": 0})
    assert read_run(run).rounds[0].evaluate == {"round": 0}


def test_a_directory_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NoRunError, match="there is no such directory"):
        status(tmp_path / "none")
    with pytest.raises(NoRunError, match="not a run directory"):
        status(tmp_path)


def test_workers_on_another_host_are_listed_and_summed(finished: Path, tmp_path: Path) -> None:
    """The workers run on another host, as seen from a login node, so the age of their status files decides."""
    now, run = time.time(), tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "rounds" / "0001" / "evaluate.json").unlink()

    def worker(number: int, age_s: float, **values: Any) -> None:
        state = {
            "state": "running", "round": 2, "stage": "collect", "worker": f"worker-{number}", "pid": 7, "host": "gpu-7",
            "job": "41", "restart": number, "node": f"n{number}", "description": "round 2 collect", "unit": "episodes",
            "done": 10 + number, "total": 32, "rate": 0.5, "updated": now - age_s, "log": f"logs/worker-{number}.log",
        }  # fmt: skip
        write_json(run / "status" / f"0002-collect-worker-{number}.json", state | values)

    worker(0, 3)
    worker(1, 2)
    text = status(run)
    assert "round 2\n  collect   running  21/64 episodes, 1.00/s\n" in text
    assert "    worker-0  running  10/32 episodes, 0.50/s, job 41 on n0, process 7 on gpu-7\n" in text
    assert "Now: worker-1 round 2 collect: 11/32 episodes, 0.50/s (job 41 (restart 1) on n1, process 7 on gpu-7" in text

    worker(0, 3 * 3600)
    worker(1, 2, state="failed", error="PolicyError: the engine is gone", rate=0.1)
    text = status(run)
    assert "  collect   failed   21/64 episodes, 0.00/s\n    worker-0  killed " in text
    assert "Not running: job 41 on n0, process 7 on gpu-7 ended during worker-0 round 2 collect" in text
    assert "PolicyError: the engine is gone\nIts log: logs/worker-1.log" in text

    values = {"round": 2, "episodes": 63, "broken_episodes": 3, "given_up": 1, "turns": 9, "labelled_turns": 7}
    write_json(run / "rounds" / "0002" / "collect.json", values)
    text = status(run)
    assert "collect   done     63 episodes, 7 labelled turns (2 without a label)" in text
    assert "broken episodes left out: 3, tasks abandoned: 1, job 41 on n0, job 41 on n1" in text


def test_a_failure_outside_of_a_stage_and_a_requested_stop_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data.zarr").mkdir()
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURMD_NODENAME", "n3")
    process = RunProcess(run_dir=tmp_path)
    logged = replace(process, log_file=tmp_path / "x.log")
    with (
        pytest.raises(SystemExit),
        track("round 0 collect", 4, process=process, stage=(0, "collect"), stream=io.StringIO()),
    ):
        sys.exit(75)
    assert "collect   stopped  0/4 episodes" in status(tmp_path)
    assert "Stopped on request 0 s ago in round 0 collect: 0/4 episodes, 0.00/s (job 12 on n3" in status(tmp_path)
    for error in (RuntimeError("before"), RuntimeError("the engine did not start")):
        with pytest.raises(RuntimeError), failure_recorded(logged):
            raise error
    with (
        pytest.raises(RuntimeError),
        failure_recorded(logged),
        track("round 1 collect", 4, process=process, stage=(1, "collect"), stream=io.StringIO()),
    ):
        raise RuntimeError("in a stage")
    text = status(tmp_path)
    assert "Failed 0 s ago in round 1 collect: 0/4 episodes" in text
    assert "RuntimeError: in a stage" in text
    (tmp_path / "status" / "0001-collect.json").unlink()
    assert "starting a stage (job 12 on n3" in status(tmp_path)
    assert "RuntimeError: the engine did not start\nIts log:" in status(tmp_path)
