"""Only the newest incarnation of a run writes: with real processes, one of them stopped and continued."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_dagger.observability.metrics import append_line
from megatron_dagger.store import atomic, fence
from megatron_dagger.store.aggregated import DataStore
from megatron_dagger.store.fence import FencedError, claim, inherit, permitted
from megatron_dagger.store.lock import LockedError
from tests.support.trajectories import random_trajectory

ROOT = Path(__file__).parents[3]
# Claims the run, then writes each line that it reads.
TWIN = """
import sys
from pathlib import Path
from megatron_dagger.store.atomic import write_text
from megatron_dagger.store.fence import claim

run = Path(sys.argv[1])
with claim(run, worker=sys.argv[2] if len(sys.argv) > 2 else None):
    print("claimed", flush=True)
    for line in sys.stdin:
        write_text(run / "value", line)
        print("wrote", flush=True)
"""


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    yield
    fence._claims.clear()


@pytest.fixture
def twin(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = start_twin(tmp_path)
    yield process
    process.kill()
    process.communicate()


def start_twin(run: Path, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", TWIN, str(run), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "7"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    return process


def write_in(process: subprocess.Popen[str], text: str) -> str:
    """Let the twin write ``text`` to the run, and return its answer: empty if it was fenced off."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(text + "\n")
    process.stdin.flush()
    return process.stdout.readline()


def test_a_held_run_is_refused_and_its_holder_named(twin: subprocess.Popen[str], tmp_path: Path) -> None:
    refused = pytest.raises(LockedError, match=rf"is in use by process {twin.pid} on .*--take-over")
    with refused, claim(tmp_path, deadline_s=0.1):
        pass
    assert write_in(twin, "1") == "wrote\n"


def test_a_dead_holder_holds_nothing(twin: subprocess.Popen[str], tmp_path: Path) -> None:
    twin.kill()
    twin.wait()
    with claim(tmp_path, deadline_s=0.1):
        atomic.write_text(tmp_path / "value", "2")


def test_the_next_incarnation_of_a_job_fences_off_the_previous_one(
    twin: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin holds the lock and is stopped. When it continues, the run belongs to another process."""
    assert write_in(twin, "1") == "wrote\n"
    twin.send_signal(signal.SIGSTOP)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with claim(tmp_path, deadline_s=0.1):
        atomic.write_text(tmp_path / "value", "2")
        twin.send_signal(signal.SIGCONT)
        assert write_in(twin, "3") == ""
        assert f"process {os.getpid()} on" in twin.communicate()[1].splitlines()[-1]
        atomic.write_text(tmp_path / "other", "the new incarnation still writes")
        with pytest.raises(LockedError), claim(tmp_path, deadline_s=0.1):
            pass  # the end of the twin did not free the run
    assert (tmp_path / "value").read_text() == "2"


@pytest.mark.parametrize("job,restart", [("8", "1"), ("7", "0")])
def test_another_job_and_the_same_incarnation_do_not_take_over(
    twin: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, restart: str
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    with pytest.raises(LockedError), claim(tmp_path, deadline_s=0.1):
        pass
    assert write_in(twin, "1") == "wrote\n"


def test_a_run_can_be_taken_over_by_hand(twin: subprocess.Popen[str], tmp_path: Path) -> None:
    with claim(tmp_path, take_over=True, deadline_s=0.1):
        assert write_in(twin, "1") == ""
    assert not (tmp_path / "value").exists()


def test_every_durable_write_is_fenced(tmp_path: Path) -> None:
    store = DataStore.create_or_open(tmp_path / "data.zarr")
    store.append([random_trajectory(0, "one", turns=2)])
    (tmp_path / "folder").mkdir()
    with claim(tmp_path):
        with claim(tmp_path, take_over=True):
            pass
        for write in (
            lambda: atomic.write_json(tmp_path / "new.json", {}),
            lambda: atomic.publish_directory(tmp_path / "folder", tmp_path / "published"),
            lambda: atomic.remove_tree(tmp_path / "folder"),
            lambda: append_line(tmp_path / "metrics.jsonl", {}),
            lambda: store.append([random_trajectory(0, "two", turns=2)]),
            lambda: store.seal(0),
        ):
            with pytest.raises(FencedError, match="has taken this run over"):
                write()
    assert store.committed(0) == {("one", 0)}
    assert store.manifest(0) is None
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == [
        "data.zarr", "folder", "metrics.jsonl",
    ]  # fmt: skip
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    atomic.write_text(tmp_path / "new.json", "no claim, no fence")


def test_a_claim_waits_for_a_write_in_progress(twin: subprocess.Popen[str], tmp_path: Path) -> None:
    """Check and rename are one step: nobody can take over between them."""
    code = "import sys; from pathlib import Path; from megatron_dagger.store.fence import claim\n"
    code += "with claim(Path(sys.argv[1]), take_over=True): print('claimed', flush=True)"
    with claim(tmp_path, take_over=True):
        with permitted(tmp_path / "value"):
            other = subprocess.Popen(
                [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
            )  # fmt: skip
            with pytest.raises(subprocess.TimeoutExpired):
                other.wait(1.0)
        assert other.communicate(timeout=30)[0] == b"claimed\n"
        with pytest.raises(FencedError), permitted(tmp_path / "value"):
            pass


def test_ranks_share_their_drivers_claim(tmp_path: Path) -> None:
    with claim(tmp_path) as token:
        pass
    inherit(tmp_path, {})
    assert fence._claims == []
    inherit(tmp_path, {fence.VARIABLE: token})
    atomic.write_text(tmp_path / "value", "1")
    with claim(tmp_path), pytest.raises(FencedError):  # by the inherited claim
        atomic.write_text(tmp_path / "value", "2")


def test_workers_share_a_run_and_are_fenced_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = start_twin(tmp_path, "worker-0"), start_twin(tmp_path, "worker-1")
    try:
        for attempt in ({}, {"worker": "worker-1"}):
            with pytest.raises(LockedError), claim(tmp_path, deadline_s=0.1, **attempt):  # type: ignore[arg-type]
                pass
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with claim(tmp_path, worker="worker-1", deadline_s=0.1):
            assert write_in(second, "1") == ""
            assert write_in(first, "1") == "wrote\n"
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    with claim(tmp_path, deadline_s=0.1):
        pass
