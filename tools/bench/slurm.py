"""Measure two rounds as a SLURM job, from submission to the end: stage by stage, resident, and preempted.

SLURM is real, with two virtual nodes on this host (tools.virtual_slurm); the run is tiny and its tasks are made
beforehand. Three jobs run:

- by stages: slurm/single_node.sbatch, undisturbed. Its time is broken down by the stages' reports and the log.
- resident: slurm/resident.sbatch, with trainer and rollout worker alive side by side through all rounds.
- preempted: slurm/single_node.sbatch, while a job of the higher partition takes both nodes during the training of round
  0. The time is measured from that job's submission until the run's next optimizer step.

Time in which neither episodes nor a training are under way is idle (idle_share); an engine's start counts as idle. At
the end the runs' episodes are compared. It needs root and installs SLURM if it is missing.

    .venv/bin/python -m tools.bench.slurm        about two minutes

It prints a table. The last line is ``RESULT {json}``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dagger.config import dump_yaml
from megatron_dagger.dagger.context import round_dir
from megatron_dagger.observability.logs import DRIVER, log_file
from megatron_dagger.observability.metrics import STAGES, read_lines, read_metrics
from megatron_dagger.observability.rundir import MANIFESTS
from megatron_dagger.store.aggregated import DataStore
from megatron_dagger.store.atomic import read_json
from tools.virtual_slurm.cluster import SlurmCluster
from tools.virtual_slurm.packages import SlurmError, install
from tools.virtual_slurm.runs import DEADLINE_S, SlurmRuns, make_tasks, tiny_config

ROUNDS = (0, 1)


class Bench(SlurmRuns):
    """The measured runs."""

    def by_stages(self) -> dict[str, Any]:
        """Measure the job that runs stage by stage, undisturbed."""
        wall, idle, began, run = self._undisturbed("by_stages")
        items = seconds_by_item(run, began)
        items["end"] = wall - sum(items.values())
        return {"two_rounds_s": wall, "idle_share": idle / wall, **{f"{k}_s": v for k, v in items.items()}}

    def resident(self) -> dict[str, Any]:
        """Measure the resident job. Its teacher is the environment's expert, as in the other jobs."""
        file = self.folder / "settings.yaml"
        file.write_text(dump_yaml(tiny_config()))
        wall, idle, began, run = self._undisturbed("resident", "resident.sbatch", "--config", str(file))
        spans = stage_spans(run)
        items = {
            "begin": min(begin for begin, _ in spans) - began,
            "end": began + wall - max(end for _, end in spans),
            "engine_start": sum(map(float, re.findall(r"vLLM is up after ([\d.]+) s", worker_log(run)))),
        }
        values = {"two_rounds_s": wall, "idle_share": idle / wall, **{f"{k}_s": v for k, v in items.items()}}
        return {f"resident_{name}": value for name, value in values.items()}

    def _undisturbed(self, name: str, file: str = "single_node.sbatch", *argv: str) -> tuple[float, float, float, Path]:
        """Run a job to its end; return its seconds, its idle seconds, the time of submission, and the run."""
        began = time.time()
        job, run = self.submit(name, file, *argv)
        self.finish(job)
        wall = time.time() - began
        return wall, wall - covered_seconds(stage_spans(run)) + engine_seconds(run), began, run

    def preempted(self) -> dict[str, Any]:
        """Measure how long a preemption takes, until the nodes are free and until the run trains again."""
        job, run = self.submit("preempted", "single_node.sbatch")
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
        self.finish(job)
        return {"preempt_to_productive_s": productive, "preempt_to_free_nodes_s": freed}

    def compare(self) -> dict[str, int]:
        """Count the episodes that the other runs lost or duplicated, compared with the run by stages."""
        lost = duplicates = 0
        for name, index in itertools.product(("resident", "preempted"), ROUNDS):
            expected, actual = (self._episodes(run, index) for run in ("by_stages", name))
            lost += len(set(expected) - set(actual))
            duplicates += len(actual) - len(set(actual))
        return {"lost_episodes": lost, "duplicate_episodes": duplicates}

    def _episodes(self, name: str, index: int) -> list[tuple[str, int]]:
        episodes = DataStore.open(self.folder / name / "data.zarr").episodes(index)
        return [(episode.task_id, episode.attempt) for episode in episodes]

    def _wait(self, condition: Callable[[], bool], event: str, job: str) -> None:
        self.cluster.wait(condition, DEADLINE_S, event, lambda: self.cluster.log(job))


def stage_spans(run: Path) -> list[tuple[float, float]]:
    """Return each stage's begin and end, from the modification time of its manifest and the duration in it."""
    paths = [round_dir(run, index) / name for index in ROUNDS for name in MANIFESTS.values()]
    return [(path.stat().st_mtime - read_json(path)["duration_s"], path.stat().st_mtime) for path in paths]


def covered_seconds(spans: list[tuple[float, float]]) -> float:
    """Return the seconds in which at least one of the spans is under way."""
    total, until = 0.0, 0.0
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def engine_seconds(run: Path) -> float:
    """Return the seconds that engines spent starting or receiving new weights."""
    return sum(map(float, re.findall(r"weights \d+: \d+ tensors in ([\d.]+) s", worker_log(run))))


def worker_log(run: Path) -> str:
    [log] = [path for name in (DRIVER, "worker-0") if (path := log_file(run, name)).exists()]
    return log.read_text()


def seconds_by_item(run: Path, submitted: float) -> dict[str, float]:
    """Return seconds by item, from the stages' records in metrics.jsonl and the engine's lines in the log."""
    records = read_metrics(run / "metrics.jsonl")  # in the order in which the stages end
    engine = engine_seconds(run)
    seconds = {stage: sum(r["duration_s"] for r in records if r["stage"] == stage) for stage in STAGES}
    gaps = {(b["round"], b["stage"]): b["time"] - b["duration_s"] - a["time"] for a, b in itertools.pairwise(records)}
    return {
        "begin": records[0]["time"] - records[0]["duration_s"] - submitted,
        "episodes": seconds["collect"] + seconds["evaluate"] - engine,
        "engine_start": engine,
        "train": seconds["train"],
        "ranks_start": sum(gap for (_, stage), gap in gaps.items() if stage == "train"),
        "between_stages": sum(gap for (_, stage), gap in gaps.items() if stage != "train"),
    }


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the jobs and the cluster, and removes the folder
    try:
        install()
        make_tasks(tiny_config())
        with tempfile.TemporaryDirectory(prefix="bench-slurm-") as folder, SlurmCluster() as cluster:
            bench = Bench(cluster, Path(folder))
            result = {**bench.by_stages(), **bench.resident(), **bench.preempted(), **bench.compare()}
            result["leftover_processes"] = len(cluster.job_processes())
    except SlurmError as error:
        sys.exit(f"error: {error}")
    for name, value in result.items():
        print(f"{name:28} {value:.3f}" if isinstance(value, float) else f"{name:28} {value}")
    print("RESULT " + json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
