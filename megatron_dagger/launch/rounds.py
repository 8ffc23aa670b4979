"""A run's rounds as a NeMo-Run experiment: for NeMo-Run's command line and for your own experiment scripts.

    python -m megatron_dagger.launch config=qwen3_4b_swegym_8h100 directory=runs/first config.dagger.rounds=3
        run.executor=slurm run.executor.account=me run.executor.gpus_per_node=8 --dryrun

This module runs in the launch environment, which has no engine; the jobs run in an environment without NeMo-Run.
The tasks are therefore scripts that call our command line.
"""

import logging
from pathlib import Path
from typing import Any

import nemo_run as run  # reads annotations as objects: this file must not postpone them
from torchx.specs.api import AppState

from megatron_dagger.config import RunConfig
from megatron_dagger.launch.executors import executor_names, for_stage
from megatron_dagger.launch.recipes import register_recipes
from megatron_dagger.launch.stages import round_stages
from megatron_dagger.recipes import find_recipe

logger = logging.getLogger(__name__)

register_recipes()


class StageFailedError(RuntimeError):
    """A task of the experiment failed or was cancelled."""


class RoundsExperiment(run.Experiment):
    """An experiment that stops with an error at the first failed task.

    NeMo-Run's own class exits with 0, and where the executor has no dependencies it starts the next task.
    """

    def _wait_for_jobs(self, jobs: list[Any]) -> None:
        super()._wait_for_jobs(jobs)
        failed = [f"{job.id} ({job.state.name})" for job in jobs if job.state is not AppState.SUCCEEDED]
        if failed:
            raise StageFailedError(f"these stages of {self._id} failed: {', '.join(sorted(failed))}")


class Context(run.cli.RunContext):
    """NeMo-Run's context, but an error makes the command exit with 1, and the settings can be exported."""

    def cli_execute(self, fn: Any, args: list[str], entrypoint_type: Any = "task") -> None:
        try:
            _check_recipe(args)
            super().cli_execute(fn, args, entrypoint_type)
        except Exception as error:  # of any kind: NeMo-Run would print it and exit with 0
            logger.debug("the error came from here", exc_info=True)
            raise SystemExit(f"error: {error}") from error

    def parse_executor(self, name: str, *args: str) -> Any:
        known = executor_names()
        if name.isidentifier() and name not in known:
            raise ValueError(f"run.executor={name}: there is no such executor; choose one of {', '.join(known)}")
        return super().parse_executor(name, *args)

    def parse_fn(self, fn: Any, args: list[str], **defaults: Any) -> Any:
        partial = super().parse_fn(fn, args, **defaults)
        if not hasattr(partial, "directory"):
            raise ValueError("directory is missing: name the run directory, for example directory=runs/first")
        if self.to_yaml or self.to_toml or self.to_json:
            del partial.ctx  # cannot be exported
        return partial


def _check_recipe(args: list[str]) -> None:
    """Raise ConfigError for an unknown recipe: NeMo-Run's own error is about types and does not list the recipes."""
    known = {factory.__name__ for factory in run.cli.list_factories(RunConfig)}
    for arg in args:
        name, _, value = arg.partition("=")
        # any other value is an import path or a call, which NeMo-Run resolves
        if name == "config" and value.isidentifier() and value not in known:
            find_recipe(value)


def add_rounds(
    experiment: run.Experiment,
    config: RunConfig,
    directory: Path,
    *,
    program: str = "megatron-dagger",
    workers: int = 1,
    work_dir: Path | None = None,
) -> list[str]:
    """Add the stages of ``config``'s rounds to ``experiment``, each dependent on the previous one; return their ids.

    All paths are as the nodes see them. Relative paths start from ``work_dir``, by default the current directory.
    ``workers`` is the number of nodes that collect a round together.
    """
    work_dir = work_dir or Path.cwd()
    ids: list[str] = []
    for stage in round_stages(config, work_dir / directory, work_dir, program, workers=workers):
        executor = for_stage(experiment.executor, stage.nodes, stage.hours)
        task = run.Script(inline=stage.script)
        ids.append(experiment.add(task, executor=executor, name=stage.name, dependencies=ids[-1:]))
    return ids


@run.cli.entrypoint(type="experiment", namespace="megatron_dagger", run_ctx_cls=Context)
def rounds(
    ctx: run.cli.RunContext, config: RunConfig, directory: str, program: str = "megatron-dagger", workers: int = 1
) -> None:
    """Run all rounds of DAgger as jobs: rollout, train, evaluate. All are queued at once, each after the previous one.

    Args:
        ctx: NeMo-Run's context.
        config: A recipe. Override any of its settings, for example with config.training.optimizer.lr=1e-6.
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
