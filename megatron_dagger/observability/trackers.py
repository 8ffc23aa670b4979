"""The boards that people watch: TensorBoard and Weights & Biases. Both are optional, and neither can stop a run."""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)


class Point(NamedTuple):
    """A number of a curve: ``axis`` is what ``at`` counts, round or (optimizer) step."""

    axis: str
    at: int
    name: str
    value: float


def tensorboard(directory: Path, points: Sequence[Point]) -> None:
    """Write an event file, if TensorBoard is installed."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        logger.debug("tensorboard is not installed")
        return
    directory.mkdir(parents=True, exist_ok=True)
    writer = EventFileWriter(str(directory))
    try:
        for point in points:
            summary = Summary(value=[Summary.Value(tag=point.name, simple_value=point.value)])
            writer.add_event(Event(wall_time=time.time(), step=point.at, summary=summary))
    finally:
        writer.close()


def wandb(run_dir: Path, project: str, points: Sequence[Point]) -> None:
    """Add to the W&B run of this run directory: one run across all rounds, stages and jobs.

    Mode and key are W&B's own variables (WANDB_MODE=offline, WANDB_API_KEY).
    """
    try:
        import wandb as library
    except ImportError:
        logger.warning("wandb_project is set, but wandb is not installed")
        return
    name = run_dir.resolve().name
    identity = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
    try:
        settings = library.Settings(silent=True, console="off")
        with library.init(
            project=project, id=identity, name=name, dir=str(run_dir), resume="allow", settings=settings
        ) as run:
            run.define_metric("steps/*", step_metric="step")
            for stage in ("collect", "train", "evaluate"):
                run.define_metric(f"{stage}/*", step_metric="round")
            for (axis, at), group in itertools.groupby(points, key=lambda point: (point.axis, point.at)):
                run.log({axis: at, **{point.name: point.value for point in group}})
    except Exception as error:  # its server, its disk, its version: the run goes on
        logger.warning("W&B did not take the numbers: %s", error)
