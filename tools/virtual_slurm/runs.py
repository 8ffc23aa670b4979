"""Small runs as jobs of the virtual SLURM, for benchmarks and checks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from megatron_dagger.config import RepoRepairConfig, RunConfig
from megatron_dagger.driver.run_dir import cache_dir, create_run
from megatron_dagger.envs.repo_repair.taskset import prepare_tasks
from megatron_dagger.envs.repo_repair.testing import repair_sandbox
from megatron_dagger.observability.progress import track
from megatron_dagger.recipes import find_recipe
from megatron_dagger.sandbox.local import SandboxPool
from tools.virtual_slurm.cluster import SlurmCluster
from tools.virtual_slurm.settings import adapt_to_cluster

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 900.0
TASKS = RepoRepairConfig(
    source="stdlib",
    train_packages=("textwrap", "graphlib"),
    heldout_packages=("colorsys",),
    train_tasks=8,
    heldout_tasks=3,
)


def tiny_config() -> RunConfig:
    """Return two rounds of short_repair on a few tasks, trained by two ranks."""
    recipe = find_recipe("short_repair")()
    training = replace(
        recipe.training,
        parallel=replace(recipe.training.parallel, world_size=2, tensor_model_parallel_size=1),
        max_steps=20,
    )
    dagger = replace(recipe.dagger, rounds=1, sft_tasks=4, tasks_per_round=4, evaluation_tasks=3)
    return replace(recipe, repo_repair=TASKS, training=training, dagger=dagger)


def make_tasks(config: RunConfig) -> None:
    """Make the tasks, so that every run finds them in the cache."""
    with SandboxPool(repair_sandbox) as pool:
        prepare_tasks(config.repo_repair, config.seed, cache_dir(), pool, track)


def job_variables(folder: Path) -> dict[str, str]:
    """Write our command line to ``folder``, as VENV for jobs; return the variables of jobs on nodes that are one host.

    The command line first runs the shell code of the variable BEFORE_STEP. Nodes are examined with DOCTOR=yes only.
    """
    program = folder / "bin" / "megatron-dagger"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\neval "$BEFORE_STEP"\nexec {sys.executable} -m megatron_dagger.cli.main "$@"\n')
    program.chmod(0o755)
    return {
        "VENV": str(folder),
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",  # the nodes' names are this host's only
        "GLOO_SOCKET_IFNAME": "lo",
        "DOCTOR": "no",
    }


class SlurmRuns:
    """A cluster, a folder for the runs, and the environment variables of their jobs (``job_variables``)."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.environment = {
            **job_variables(folder),
            "MEGATRON_DAGGER_CACHE": str(cache_dir()),
            "SERVE": "sleep infinity",
        }

    def submit(
        self, name: str, file: str, *argv: str, config: RunConfig | None = None,
        variables: Mapping[str, str] | None = None, nodes: int | None = None,
    ) -> tuple[str, Path]:  # fmt: skip
        """Submit the run ``name`` with further arguments ``argv``, created with ``config`` if it is new.

        Return its job and its directory.
        """
        run = self.folder / name
        if not run.exists():
            create_run(config or tiny_config(), run)
        options = [f"--chdir={ROOT}", f"--output={run}.log", *([f"--nodes={nodes}"] if nodes else [])]
        script = adapt_to_cluster(ROOT / "slurm" / file, self.folder)
        environment = {**self.environment, **(variables or {})}
        return self.cluster.submit(*options, str(script), str(run), *argv, env=environment), run

    def finish(self, job: str) -> None:
        """Wait until a job is completed. Raises SlurmError with its log if it ends otherwise."""
        self.cluster.wait_for(job, "COMPLETED", deadline_s=DEADLINE_S)
