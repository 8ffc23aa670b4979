"""Experiment trackers: TensorBoard and Weights & Biases. Both are optional, and neither can stop a run."""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

logger = logging.getLogger(__name__)


class Scalar(NamedTuple):
    """One value of a curve: ``name`` has ``value`` at round or step ``number``."""

    axis: Literal["round", "step"]  # optimizer steps, counted over all rounds
    number: int  # of the round or step
    name: str
    value: float


def write_tensorboard(directory: Path, scalars: Sequence[Scalar]) -> None:
    """Write an event file to ``directory``, if TensorBoard is installed."""
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
        for scalar in scalars:
            summary = Summary(value=[Summary.Value(tag=scalar.name, simple_value=scalar.value)])
            writer.add_event(Event(wall_time=time.time(), step=scalar.number, summary=summary))
    finally:
        writer.close()


def log_to_wandb(run_dir: Path, project: str, scalars: Sequence[Scalar]) -> None:
    """Log to the W&B run of this run directory: one W&B run for all rounds, stages and jobs.

    W&B's own variables set mode and key (WANDB_MODE=offline, WANDB_API_KEY).
    """
    try:
        import wandb
    except ImportError:
        logger.warning("wandb_project=%s is set, but wandb is not installed: pip install wandb", project)
        return
    name = run_dir.resolve().name
    identity = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
    try:
        settings = wandb.Settings(silent=True, console="off")
        with wandb.init(
            project=project, id=identity, name=name, dir=str(run_dir), resume="allow", settings=settings
        ) as run:
            run.define_metric("steps/*", step_metric="step")
            for stage in ("collect", "train", "evaluate"):
                run.define_metric(f"{stage}/*", step_metric="round")
            for (axis, number), group in itertools.groupby(scalars, key=lambda scalar: (scalar.axis, scalar.number)):
                run.log({axis: number, **{scalar.name: scalar.value for scalar in group}})
    except Exception as error:  # its server, its disk, its version: the run continues without it
        logger.warning("cannot log to W&B: %s", error)
