"""``metrics.jsonl``: one line per finished stage, append-only; and the same numbers for TensorBoard and W&B.

A line goes to the disk by one write and a sync. What a killed process left of a last line is cut off
before the next is appended, and skipped by readers. Recording a stage again after a resume changes nothing
unless its numbers changed; readers take the last line of each (round, stage).
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

from megatron_dagger.observability import trackers as boards
from megatron_dagger.store.atomic import explain_full_disk
from megatron_dagger.store.fence import permitted

logger = logging.getLogger(__name__)

STAGES = ("collect", "train", "evaluate")


class Metrics:
    """The metrics of one run directory; one process writes at a time."""

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
        """Append the stage's numbers; False if they are there already.

        ``steps`` are the lines of a training's own ``metrics.jsonl``; they go to the boards only, at the
        step counted over all rounds.
        """
        line = {"round": round_index, "stage": stage, **values}
        known = {(r["round"], r["stage"]): r for r in read_metrics(self.path)}
        same = {k: v for k, v in known.get((round_index, stage), {}).items() if k != "time"}
        if same == json.loads(json.dumps(line)):
            return False
        append_line(self.path, {"time": round(time.time(), 3), **line})
        earlier = [r for (index, name), r in known.items() if name == "train" and index < round_index]
        first_step = sum(int(r.get("steps", 0)) for r in earlier)
        points = [boards.Point("round", round_index, f"{stage}/{name}", value) for name, value in _scalars(values)]
        for step in steps:
            at = first_step + int(step["step"])
            points += [boards.Point("step", at, f"steps/{n}", value) for n, value in _scalars(step) if n != "step"]
        boards.tensorboard(self._run_dir / "tensorboard", points)
        if self._wandb_project is not None:
            boards.wandb(self._run_dir, self._wandb_project, points)
        return True


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON line, after cutting off what a killed writer left of the last one."""
    data = (json.dumps(value, allow_nan=False) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        with permitted(path):
            whole = _whole_lines(descriptor)
            os.ftruncate(descriptor, whole)
            try:
                if os.write(descriptor, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # what a short write means
                os.fsync(descriptor)
            except OSError as error:
                os.ftruncate(descriptor, whole)
                raise explain_full_disk(error, path, len(data)) from error
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; an unfinished last one is left out, as is a missing file."""
    if not path.exists():
        return []
    found = []
    content = path.read_bytes()
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            logger.warning("%s: line %d is no JSON object and is skipped", path, number)
    return found


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """One record per (round, stage), the last that was written, in the order of rounds and stages."""
    latest = {
        (line["round"], line["stage"]): line
        for line in read_lines(path)
        if isinstance(line.get("round"), int) and line.get("stage") in STAGES
    }
    return [latest[key] for key in sorted(latest, key=lambda key: (key[0], STAGES.index(key[1])))]


def _whole_lines(descriptor: int) -> int:
    """The size of the file up to the end of its last whole line, in bytes."""
    size = os.fstat(descriptor).st_size
    end = size
    while end > 0:
        start = max(0, end - 65536)
        position = os.pread(descriptor, end - start, start).rfind(b"\n")
        if position >= 0:
            return start + position + 1
        end = start
    return 0


def _scalars(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Numbers of a (nested) record by name; lists, texts and None have no place in a curve."""
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name not in ("round", "time"):
            found.append((prefix + name, float(value)))
    return [(name, value) for name, value in found if not name.startswith("digests/")]
