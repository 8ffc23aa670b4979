"""``metrics.jsonl``: one line per finished stage, append-only. TensorBoard and W&B get the same numbers.

A line is written by one write and a sync. An unfinished last line of a killed process is cut off before the next
line is appended, and readers skip it. Recording a stage again after a resume changes nothing unless its numbers
changed. Readers take the last line of each (round, stage).
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_dagger.observability.trackers import Scalar, log_to_wandb, write_tensorboard
from megatron_dagger.store.atomic import explain_full_disk
from megatron_dagger.store.fence import permitted

logger = logging.getLogger(__name__)

STAGES = ("collect", "train", "evaluate")


class StageMetrics:
    """The metrics of the stages of a run. One process writes at a time."""

    def __init__(self, run_dir: Path, *, wandb_project: str | None = None):
        self.path = run_dir / "metrics.jsonl"
        self._run_dir, self._wandb_project = run_dir, wandb_project

    def record(
        self,
        round_index: int,
        stage: str,
        values: Mapping[str, Any],
        *,
        steps: Iterable[Mapping[str, Any]] = (),
    ) -> bool:
        """Append the stage's numbers. Return False if they are recorded already.

        ``steps`` are the lines of a training's own ``metrics.jsonl``. Only the trackers get them, with steps counted
        over all rounds.
        """
        line = {"round": round_index, "stage": stage, **values}
        known = {(r["round"], r["stage"]): r for r in read_metrics(self.path)}
        same = {k: v for k, v in known.get((round_index, stage), {}).items() if k != "time"}
        if same == json.loads(json.dumps(line)):
            return False
        append_line(self.path, {"time": round(time.time(), 3), **line})
        earlier = [r for (index, name), r in known.items() if name == "train" and index < round_index]
        first_step = sum(int(r.get("steps", 0)) for r in earlier)
        scalars = [Scalar("round", round_index, f"{stage}/{name}", value) for name, value in _numbers(values)]
        for step in steps:
            index = first_step + int(step["step"])
            scalars += [Scalar("step", index, f"steps/{name}", v) for name, v in _numbers(step) if name != "step"]
        write_tensorboard(self._run_dir / "tensorboard", scalars)
        if self._wandb_project is not None:
            log_to_wandb(self._run_dir, self._wandb_project, scalars)
        return True


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON line, after cutting off an unfinished line of a killed writer. Raises DiskFullError."""
    data = (json.dumps(value, allow_nan=False) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        with permitted(path):
            end = _end_of_last_line(descriptor)
            os.ftruncate(descriptor, end)
            try:
                if os.write(descriptor, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # a short write means a full disk
                os.fsync(descriptor)
            except OSError as error:
                os.ftruncate(descriptor, end)
                raise explain_full_disk(error, path, len(data)) from error
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a JSON-lines file, without an unfinished last one; none if there is no file."""
    if not path.exists():
        return []
    values = []
    content = path.read_bytes()
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            values.append(value)
        else:
            logger.warning("%s: line %d is not a JSON object and is skipped", path, number)
    return values


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the last record of each (round, stage), in the order of rounds and stages."""
    latest = {
        (line["round"], line["stage"]): line
        for line in read_lines(path)
        if isinstance(line.get("round"), int) and line.get("stage") in STAGES
    }
    return [latest[key] for key in sorted(latest, key=lambda key: (key[0], STAGES.index(key[1])))]


def _end_of_last_line(descriptor: int) -> int:
    """Return the offset behind the last newline of the file, in bytes."""
    size = os.fstat(descriptor).st_size
    end = size
    while end > 0:
        start = max(0, end - 65536)
        position = os.pread(descriptor, end - start, start).rfind(b"\n")
        if position >= 0:
            return start + position + 1
        end = start
    return 0


def _numbers(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Return the numbers of a nested record with their names; lists, texts and None are left out."""
    numbers: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            numbers += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name not in ("round", "time"):
            numbers.append((prefix + name, float(value)))
    return [(name, value) for name, value in numbers if not name.startswith("digests/")]
