"""Two rounds as a SLURM job, from an idle cluster to the end; and the same preempted in the middle.

The SLURM is real, of two virtual nodes on this host (slurm_cluster.py); the run is a tiny one whose tasks
are made beforehand. First slurm/single_node.sbatch runs undisturbed: where its time went is read from the
stages' own numbers and the log; all that is not a stage's work is waiting (idle_share). Then it runs
again, a job of a higher partition takes both nodes while round 0 trains, and the time is taken from that
job's submission to the next optimizer step. At the end the two runs' episodes are compared.

    tools/bench_slurm.py                  prints a table, and as its last line RESULT {json}
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_dagger.cli.world import cache_dir, create_run
from megatron_dagger.config import RunConfig, TasksConfig
from megatron_dagger.envs.repo_repair.taskset import prepare_tasks
from megatron_dagger.envs.repo_repair.testing import repair_sandbox
from megatron_dagger.envs.sandbox import SandboxPool
from megatron_dagger.observability.metrics import STAGES, read_lines, read_metrics
from megatron_dagger.observability.progress import track
from megatron_dagger.store.aggregated import DataStore
from recipes import find_recipe
from tools.slurm_cluster import SlurmCluster
from tools.slurm_packages import SlurmError, install

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 900.0
ROUNDS = (0, 1)
TASKS = TasksConfig(
    source="stdlib",
    train_packages=("textwrap", "graphlib"),
    heldout_packages=("colorsys",),
    train_tasks=8,
    heldout_tasks=3,
)


def tiny_config() -> RunConfig:
    """Two rounds of the quickstart on a few tasks, trained by two ranks."""
    recipe = find_recipe("quickstart")()
    training = replace(
        recipe.training,
        parallel=replace(recipe.training.parallel, world_size=2, tensor_model_parallel_size=1),
        max_steps=20,
    )
    dagger = replace(recipe.dagger, rounds=ROUNDS[-1], sft_tasks=4, tasks_per_round=4, evaluation_tasks=3)
    return replace(recipe, tasks=TASKS, training=training, dagger=dagger)


class Bench:
    """A cluster, the folder that the runs lie in, and the environment of their jobs."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        program = folder / "bin" / "megatron-dagger"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m megatron_dagger.cli.main "$@"\n')
        program.chmod(0o755)
        self.environment = {"VENV": str(folder), "PYTHONPATH": str(ROOT), "MEGATRON_DAGGER_CACHE": str(cache_dir())}

    def submit(self, name: str) -> tuple[str, Path]:
        """Submit the whole run ``name``; its job, and its directory."""
        run = self.folder / name
        create_run(tiny_config(), run)
        options = ("--gpus-per-node=4", "--mem=8000", f"--chdir={ROOT}", f"--output={run}.log")
        job = self.cluster.submit(*options, str(ROOT / "slurm/single_node.sbatch"), str(run), env=self.environment)
        return job, run

    def undisturbed(self) -> dict[str, Any]:
        began = time.time()
        job, run = self.submit("undisturbed")
        self.cluster.wait_for(job, "COMPLETED", deadline_s=DEADLINE_S)
        wall = time.time() - began
        items = where_the_time_went(run, began)
        items["end"] = wall - sum(items.values())
        idle = wall - items["episodes"] - items["train"]
        return {"two_rounds_s": wall, "idle_share": idle / wall, **{f"{k}_s": v for k, v in items.items()}}

    def preempted(self) -> dict[str, Any]:
        job, run = self.submit("preempted")
        steps = run / "rounds/0000/train/metrics.jsonl"
        self._wait(lambda: len(read_lines(steps)) >= 3, "three steps", job)
        began = time.monotonic()
        options = ("--partition=high", "--nodes=2", "--exclusive", "--mem=0", "--output=/dev/null")
        urgent = self.cluster.submit(*options, "--wrap=true")
        self.cluster.wait_for(urgent, "COMPLETED", deadline_s=DEADLINE_S)
        freed = time.monotonic() - began
        saved = len(read_lines(steps))
        self._wait(lambda: len(read_lines(steps)) > saved, "the next step", job)
        productive = time.monotonic() - began
        self.cluster.wait_for(job, "COMPLETED", deadline_s=DEADLINE_S)
        return {"preempt_to_productive_s": productive, "preempt_to_free_nodes_s": freed}

    def compare(self) -> dict[str, int]:
        lost = duplicates = 0
        for index in ROUNDS:
            expected, found = (self._tasks(name, index) for name in ("undisturbed", "preempted"))
            lost += len(set(expected) - set(found))
            duplicates += len(found) - len(set(found))
        return {"lost_episodes": lost, "duplicate_episodes": duplicates}

    def _tasks(self, name: str, index: int) -> list[tuple[str, int]]:
        episodes = DataStore.open(self.folder / name / "data.zarr").episodes(index)
        return [(episode.task_id, episode.attempt) for episode in episodes]

    def _wait(self, condition: Callable[[], bool], what: str, job: str) -> None:
        self.cluster.wait(condition, DEADLINE_S, what, lambda: self.cluster.log(job))


def where_the_time_went(run: Path, submitted: float) -> dict[str, float]:
    """Seconds by item, from a stage's end and length in metrics.jsonl, and from what the log says of the engine."""
    records = read_metrics(run / "metrics.jsonl")  # in the order in which the stages ended
    log = (run / "logs/driver.log").read_text()
    engine = sum(map(float, re.findall(r"weights \d+: \d+ tensors in ([\d.]+) s", log)))
    spent = {stage: sum(r["duration_s"] for r in records if r["stage"] == stage) for stage in STAGES}
    gaps = {(b["round"], b["stage"]): b["time"] - b["duration_s"] - a["time"] for a, b in itertools.pairwise(records)}
    return {
        "begin": records[0]["time"] - records[0]["duration_s"] - submitted,
        "episodes": spent["collect"] + spent["evaluate"] - engine,
        "engine_start": engine,
        "train": spent["train"],
        "ranks_start": sum(gap for (_, stage), gap in gaps.items() if stage == "train"),
        "between_stages": sum(gap for (_, stage), gap in gaps.items() if stage != "train"),
    }


def prepare(config: RunConfig) -> None:
    """Make the tasks, which a run finds in the cache from its second time on."""
    with SandboxPool(repair_sandbox) as pool:
        prepare_tasks(config.tasks, config.seed, cache_dir(), pool, track)


def main() -> int:
    try:
        install()
        prepare(tiny_config())
        with tempfile.TemporaryDirectory(prefix="bench-slurm-") as folder, SlurmCluster() as cluster:
            bench = Bench(cluster, Path(folder))
            result: dict[str, Any] = {**bench.undisturbed(), **bench.preempted(), **bench.compare()}
            result["leftover_processes"] = len(cluster.job_processes())
    except SlurmError as error:
        sys.exit(f"error: {error}")
    for name, value in result.items():
        print(f"{name:28} {value:.3f}" if isinstance(value, float) else f"{name:28} {value}")
    print("RESULT " + json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
