"""Progress of long work."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path

import pytest

from megatron_dagger.observability import progress, status_file
from megatron_dagger.observability.progress import format_duration, track
from megatron_dagger.observability.status_file import RunProcess
from megatron_dagger.store.atomic import read_json
from tests.support.waiting import wait_until


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_progress_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
    with track("collect", 4, stream=io.StringIO()) as tracker:
        for _ in range(3):
            tracker.advance(note="solved 50%")
    assert len(caplog.records) == 4  # one for each call, as the interval is 0, and the final state
    assert caplog.messages[0].startswith("collect: 1/4 episodes (")
    assert caplog.messages[-1].endswith("left), solved 50%")
    caplog.clear()
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 60.0)
    with track("collect", 1000, stream=io.StringIO()) as tracker:
        for _ in range(1000):
            tracker.advance()
    assert len(caplog.records) == 1


def test_on_a_terminal_progress_is_a_bar(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stream = Terminal()
    with track("[red]collect", 2, stream=stream) as tracker:
        tracker.advance(2, note="x[/]y")
    assert "[red]collect" in stream.getvalue()
    assert "2/2" in stream.getvalue()
    assert "x[/]y" in stream.getvalue()
    assert not caplog.records


def test_units_done_before_do_not_count_for_the_rate() -> None:
    with track("collect", 200, done=100, stream=io.StringIO()) as tracker:
        assert tracker.rate == 0.0
        assert tracker.remaining_s is None
        tracker._started -= 10.0
        tracker.advance(10)
        assert tracker.rate == pytest.approx(1.0, rel=0.05)
        assert tracker.remaining_s == pytest.approx(90, rel=0.05)
        assert tracker.text().startswith("collect: 110/200 episodes (1.0")


def test_the_status_file_follows_running_done_and_failed_work(tmp_path: Path) -> None:
    path = tmp_path / "status" / "0002-collect.json"
    log, stage = tmp_path / "logs" / "x.log", (2, "collect")
    process = RunProcess(run_dir=tmp_path, log_file=log)
    with track("collect", 3, process=process, stage=stage, stream=io.StringIO()) as tracker:
        assert read_json(path)["state"] == "running"
        assert read_json(path)["pid"] == os.getpid()
        tracker.advance(3)
    state = read_json(path)
    assert (state["state"], state["done"], state["total"], state["round"]) == ("done", 3, 3, 2)

    def fail() -> None:
        with track("train", None, unit="steps", process=process, stage=stage, stream=io.StringIO()) as tracker:
            tracker.advance(5)
            raise RuntimeError("rank 1 is gone")

    with pytest.raises(RuntimeError, match="rank 1"):
        fail()
    state = read_json(path)
    assert (state["state"], state["error"], state["log"]) == (
        "failed",
        "RuntimeError: rank 1 is gone",
        str(log),
    )
    assert (state["done"], state["total"]) == (5, None)


def test_an_unwritable_status_file_does_not_end_the_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with track("collect", 1, process=RunProcess(run_dir=tmp_path / "file"), stream=io.StringIO()) as tracker:
        tracker.advance()
    assert tracker.done == 1
    assert "cannot write" in caplog.text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_work_of_another_process_is_counted_and_the_status_file_is_kept_fresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_POLL_S", 0.02)
    monkeypatch.setattr(status_file, "PULSE_S", 0.05)
    path, steps = tmp_path / "status" / "0000-train.json", [1]
    options = {"process": RunProcess(run_dir=tmp_path), "stage": (0, "train"), "stream": io.StringIO()}
    with track("train", None, unit="steps", count=lambda: len(steps), **options) as tracker:
        steps += [2, 3]
        wait_until(lambda: tracker.done == 3)
        before = read_json(path)["updated"]
        wait_until(lambda: read_json(path)["updated"] > before)
        steps.append(4)
    assert read_json(path)["done"] == 4
    assert read_json(path)["state"] == "done"
