"""A run's rounds as a NeMo-Run experiment, on NeMo-Run's command line and for one's own experiment script.

    python -m megatron_dagger.launch config=qwen3_4b_swegym_8h100 directory=runs/first config.dagger.rounds=3
        run.executor=slurm run.executor.account=me run.executor.gpus_per_node=8 --dryrun

Runs in the launch environment, which has no engine; the jobs run in theirs, which has no NeMo-Run: tasks are
scripts that call our command line.
"""

import logging
from pathlib import Path
from typing import Any

import nemo_run as run  # reads annotations as objects: this file must not postpone them
from torchx.specs.api import AppState

from megatron_dagger.config import RunConfig
from megatron_dagger.launch.executors import for_stage
from megatron_dagger.launch.recipes import register_recipes
from megatron_dagger.launch.stages import round_stages

logger = logging.getLogger(__name__)

register_recipes()


class StageFailedError(RuntimeError):
    """A task of the experiment did not end well."""


class RoundsExperiment(run.Experiment):
    """An experiment that ends with an error at a failed task.

    NeMo-Run's own exits with 0, and where the executor has no dependencies it goes on with the next task.
    """

    def _wait_for_jobs(self, jobs: list[Any]) -> None:
        super()._wait_for_jobs(jobs)
        failed = [f"{job.id} ({job.state.name})" for job in jobs if job.state is not AppState.SUCCEEDED]
        if failed:
            raise StageFailedError(f"not every stage of {self._id} ended well: {', '.join(sorted(failed))}")


class Context(run.cli.RunContext):
    """NeMo-Run's, whose command exits with 1 on an error, not with 0, and exports: a context cannot be exported."""

    def cli_execute(self, fn: Any, args: list[str], entrypoint_type: Any = "task") -> None:
        try:
            super().cli_execute(fn, args, entrypoint_type)
        except Exception as error:  # whatever it is, NeMo-Run would print it and exit with 0
            logger.debug("the error came from here", exc_info=True)
            raise SystemExit(f"error: {error}") from error

    def parse_fn(self, fn: Any, args: list[str], **defaults: Any) -> Any:
        partial = super().parse_fn(fn, args, **defaults)
        if self.to_yaml or self.to_toml or self.to_json:
            del partial.ctx
        return partial


def add_rounds(
    experiment: run.Experiment,
    config: RunConfig,
    directory: Path,
    *,
    program: str = "megatron-dagger",
    workers: int = 1,
    work_dir: Path | None = None,
) -> list[str]:
    """Add the stages of ``config``'s rounds to ``experiment``, each after the one before; returns their ids.

    Paths are as the nodes see them; ``work_dir`` (by default the current directory) is what relative ones
    start from. With several ``workers`` so many nodes collect a round.
    """
    work_dir = work_dir or Path.cwd()
    ids: list[str] = []
    for stage in round_stages(config, work_dir / directory, work_dir, program, workers=workers):
        executor = for_stage(experiment.executor, stage.nodes)
        task = run.Script(inline=stage.script)
        ids.append(experiment.add(task, executor=executor, name=stage.name, dependencies=ids[-1:]))
    return ids


@run.cli.entrypoint(type="experiment", namespace="megatron_dagger", run_ctx_cls=Context)
def rounds(
    ctx: run.cli.RunContext, config: RunConfig, directory: str, program: str = "megatron-dagger", workers: int = 1
) -> None:
    """Run all rounds of DAgger as jobs: rollout, train, evaluate. All are queued at once, each after the one before.

    Args:
        ctx: NeMo-Run's context.
        config: A recipe; any of its settings can be overridden, as in config.training.optimizer.lr=1e-6.
        directory: The run directory, on a file system that the nodes share.
        program: Our command line in the jobs' environment, for example /shared/repo/.venv/bin/megatron-dagger.
        workers: How many nodes collect a round together.
    """
    if ctx.executor is None:
        ctx.executor = run.LocalExecutor()
    with RoundsExperiment(config.name, executor=ctx.executor) as experiment:
        add_rounds(experiment, config, Path(directory), program=program, workers=workers)
        ctx.launch(experiment)


def main() -> None:
    run.cli.main(rounds)
