"""Run one stage of a run in this process, as the commands ``rollout``, ``train`` and ``evaluate`` do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from megatron_dagger.config import RunConfig
from megatron_dagger.dagger.context import RunContext, round_dir, train_manifest
from megatron_dagger.dagger.worker import Worker
from megatron_dagger.driver.context import open_run_context
from megatron_dagger.driver.run_dir import check_round, load_run_config
from megatron_dagger.observability.logs import DRIVER, setup_logging
from megatron_dagger.observability.metrics import read_metrics

logger = logging.getLogger(__name__)


def run_stage_function(
    run_dir: Path,
    stage_function: Callable[[RunContext], None],
    worker: Worker | None = None,
    *,
    stage: tuple[str, int] | None = None,
    take_over: bool = False,
) -> None:
    """Open a run and call ``stage_function``.

    ``stage``: the stage's name and round, if it is one round's. Raises ConfigError for a round that the run does not
    have. For a finished stage, only a log line is written: neither tasks nor engines are opened.
    """
    config = load_run_config(run_dir)
    if stage is not None:
        check_round(config, stage[1])
    setup_logging(run_dir, name=worker.name if worker else DRIVER)
    if stage is not None and (done := _already_done(config, run_dir, *stage)):
        logger.info("round %d %s: %s", stage[1], stage[0], done)
        return
    with open_run_context(config, run_dir, worker=worker, take_over=take_over) as context:
        stage_function(context)


def _already_done(config: RunConfig, run_dir: Path, name: str, round_index: int) -> str:
    """Return why a stage has nothing left to do, or an empty string."""
    if name == "evaluate" and not config.dagger.evaluates(round_index):
        return "nothing to do (dagger.evaluate_rounds=last)"
    folder = round_dir(run_dir, round_index)
    last_file = train_manifest(run_dir, round_index) if name == "train" else folder / f"{name}.json"
    recorded = {(row["round"], row["stage"]) for row in read_metrics(run_dir / "metrics.jsonl")}
    return "already done" if last_file.exists() and (round_index, name) in recorded else ""
