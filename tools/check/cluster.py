"""Check what a first job on a cluster meets, on a real SLURM of two virtual nodes without GPUs.

- uneven: a run on two nodes, one of whose workers begins later than SLURM waits after the other has ended; every step
  says how many processors it sees.
- layout: a run that begins with TP2 on one node, is cancelled while it trains, and goes on with PP2 x DP2 on two; its
  losses are compared with those of the same run left alone.
- docker: the training of SWE tasks where no Docker daemon can be reached.
- packing: how much of a step's loss a label has, over an epoch of the run's labels packed separately and as trees.
- doctor, proxy: `megatron-dagger doctor` on this machine, for a run and for an H100 recipe; a teacher on this host
  while the environment names a proxy.

    .venv/bin/python -m tools.check.cluster        about six minutes; needs root, installs SLURM if it is missing

The last line is ``RESULT {json}``; the exit code is 1 if something is not as it must be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dagger.config import RunConfig, SweConfig, TeacherConfig, override
from megatron_dagger.dagger.aggregation import aggregate
from megatron_dagger.driver.run_dir import create_run
from megatron_dagger.observability.metrics import read_lines
from megatron_dagger.policies.openai.cache import ResponseCache
from megatron_dagger.policies.openai.endpoint_pool import EndpointPool
from megatron_dagger.store.aggregated import DataStore
from megatron_dagger.training.data.batches import BatchPlan
from megatron_dagger.training.data.packing import pack
from megatron_dagger.types import LabelledEpisode
from tools.support.chat_server import chat_server
from tools.virtual_slurm.cluster import SlurmCluster
from tools.virtual_slurm.packages import SlurmError, install
from tools.virtual_slurm.runs import DEADLINE_S, ROOT, SlurmRuns, make_tasks, tiny_config
from tools.virtual_slurm.settings import WAIT_S

ONE_NODE = ("training.parallel.tensor_model_parallel_size=2", "training.parallel.pipeline_model_parallel_size=1")
TWO_NODES = (
    "training.parallel.world_size=4",
    "training.parallel.tensor_model_parallel_size=1",
    "training.parallel.pipeline_model_parallel_size=2",
)
LOWEST = {"job_cpus_share": 1.0}
HIGHEST = {
    "layout_change_max_loss_diff": 1e-5,
    "separate_weight_spread_ratio": 1.05,
    "doctor_s": 120.0,
    "leftover_processes": 0,
}
MUST_HOLD = ("uneven_workers", "train_without_docker", "proxy_ignored", "load_without_random_init")
ROW = {  # of a task that nobody starts
    "repo": "org/pkg",
    "problem_statement": "x is wrong",
    "test_patch": "",
    "version": "1.0",
    "FAIL_TO_PASS": "[]",
    "PASS_TO_PASS": "[]",
    "image": "registry/image:1",
    "eval_script": "#!/bin/bash\npytest\n",
    "log_parser": "parse_log_pytest",
    "eval_type": "pass_and_fail",
}


def uneven(runs: SlurmRuns) -> dict[str, Any]:
    """Run both rounds on two nodes, with the second node's worker late."""
    seen = runs.folder / "processors"
    late = f'[ "$1 $SLURM_PROCID" != "rollout 1" ] || sleep {3 * WAIT_S}'
    before = f"env -u OMP_NUM_THREADS nproc >>{seen}; {late}"
    job, run = runs.submit("uneven", "multi_node.sbatch", variables={"BEFORE_STEP": before, "DOCTOR": "yes"}, nodes=2)
    runs.finish(job)
    node = len(os.sched_getaffinity(0))  # of which a virtual node has all
    logs = [(run / f"logs/train-{index:04d}/rank-0.log").read_text() for index in (0, 1)]
    return {
        "uneven_workers": "Killed" not in run.with_suffix(".log").read_text() and (run / "report.html").exists(),
        "job_cpus_share": min(map(int, seen.read_text().split())) / node,
        "load_without_random_init": ["drawing random weights" in log for log in logs] == [True, False],
    }


def layout(runs: SlurmRuns) -> dict[str, Any]:
    """Change a run's layout and nodes in the middle of a training."""
    config = override(tiny_config(), [*ONE_NODE, "dagger.rounds=0", "training.checkpoint_interval=2"])
    job, alone = runs.submit("alone", "single_node.sbatch", config=config)
    runs.finish(job)
    job, run = runs.submit("changed", "single_node.sbatch", config=config)
    steps = run / "rounds/0000/train/metrics.jsonl"
    log = run.with_suffix(".log")
    runs.cluster.wait(lambda: len(read_lines(steps)) >= 5, DEADLINE_S, "five steps", log.read_text)
    runs.cluster.call("scancel", job)
    runs.cluster.wait_for(job, "CANCELLED", deadline_s=DEADLINE_S)
    job, _ = runs.submit("changed", "multi_node.sbatch", *TWO_NODES, nodes=2)
    runs.finish(job)
    expected, losses = (
        [step["loss"] for step in read_lines(path / "rounds/0000/train/metrics.jsonl")] for path in (alone, run)
    )
    return {"layout_change_max_loss_diff": max(abs(a - b) for a, b in zip(expected, losses, strict=True))}


def train_without_docker(runs: SlurmRuns) -> dict[str, Any]:
    """Train a run of SWE tasks on the episodes of another run, with a Docker daemon's address that leads nowhere."""
    donor, rows, checkpoint = runs.folder / "alone", runs.folder / "rows.jsonl", runs.folder / "checkpoint"
    numbered = [ROW | {"instance_id": f"org__pkg-{n}", "base_commit": f"{n}" * 40, "patch": f"+{n}\n"} for n in (1, 2)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in numbered))
    _program(runs, "convert", "megatron-to-hf", donor / "rounds/0000/train/checkpoint", runs.folder / "hf")
    for file in (donor / "student").iterdir():
        if not (runs.folder / "hf" / file.name).exists():
            shutil.copy(file, runs.folder / "hf")
    _program(runs, "convert", "hf-to-megatron", runs.folder / "hf", checkpoint)
    config = replace(
        override(tiny_config(), ["dagger.rounds=0"]),
        swe=SweConfig(
            train=str(rows), train_dataset="swe-bench", heldout_of_train=1, docker_url=f"unix://{runs.folder}/none.sock"
        ),
        teacher=TeacherConfig(urls=("http://127.0.0.1:9/v1",), model="m"),
        init_checkpoint=str(checkpoint),
    )
    create_run(config, runs.folder / "swe")
    shutil.copytree(donor / "data.zarr", runs.folder / "swe" / "data.zarr")
    _program(runs, "train", runs.folder / "swe", "--round", "0")
    return {"train_without_docker": (runs.folder / "swe/rounds/0000/train/manifest.json").exists()}


def packing(runs: SlurmRuns) -> dict[str, Any]:
    """Compare by packing how much a label token's share of its step's loss varies over an epoch."""
    config = tiny_config()
    episodes = list(DataStore.open(runs.folder / "uneven" / "data.zarr").episodes(1))
    labelled = aggregate(episodes, config.dagger.aggregation)
    trees, separate = (_spread(labelled, config, packing) for packing in ("shared_prefix", "separate"))
    return {"separate_weight_spread_ratio": separate / trees, "weight_spread": trees}


def _spread(episodes: list[LabelledEpisode], config: RunConfig, packing: Any) -> float:
    """Return the 95th over the 5th percentile of a label token's share of its step's weight."""
    data = pack(episodes, config.training.sequence_length, packing=packing)
    plan = BatchPlan(groups=len(data.groups), groups_per_step=2, epochs=1.0, max_steps=None, seed=1, round_index=0)
    shares: list[float] = []
    for step in range(plan.steps):
        rows = data.rows_of(plan.groups_of(step))
        shares += [1 / data.row_weights[rows].sum()] * int(data.row_label_tokens[rows].sum())
    low, high = np.percentile(shares, [5, 95])
    return float(high / low)


def doctor(runs: SlurmRuns) -> dict[str, Any]:
    """Time the doctor on a run that works here, and on a recipe that lacks everything."""
    seconds = []
    for subject, code in ((runs.folder / "alone", 0), ("qwen3_8b_swegym_8h100", 1)):
        began = time.monotonic()
        done = subprocess.run(
            [runs.folder / "bin/megatron-dagger", "doctor", subject, "swe.docker_url=unix:///nowhere.sock"],
            env={**os.environ, **runs.environment}, cwd=runs.folder, check=False, timeout=300,
        )  # fmt: skip
        seconds.append(time.monotonic() - began)
        if done.returncode != code:
            raise RuntimeError(f"the doctor found {subject} to be other than it is")
    if remaining := list(runs.folder.glob(".doctor*")):
        raise RuntimeError(f"the doctor did not remove {remaining}")
    return {"doctor_s": max(seconds)}


def proxy(runs: SlurmRuns) -> dict[str, Any]:
    """Ask a server on this host while the environment names a proxy that leads nowhere."""
    names = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "http://127.0.0.1:9"))
    try:
        with chat_server(lambda request: "a") as server:
            config = TeacherConfig(urls=(server.url,), model="m", patience_s=3.0)
            with closing(ResponseCache(runs.folder / "teacher")) as cache, EndpointPool(config, cache) as pool:
                asyncio.run(pool.request("chat/completions", {"messages": []}, lambda url, body: body))
            return {"proxy_ignored": len(server.requests) == 1}
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _program(runs: SlurmRuns, *arguments: object) -> None:
    """Run a command of megatron-dagger here. Raises RuntimeError with its output if it fails."""
    done = subprocess.run(
        [runs.folder / "bin/megatron-dagger", *map(str, arguments)], env={**os.environ, **runs.environment}, cwd=ROOT,
        capture_output=True, text=True, check=False, timeout=DEADLINE_S,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, arguments))}: {done.stderr[-2000:]}")


def wrong(result: dict[str, Any]) -> list[str]:
    """Return the names of the results that are not as they must be."""
    return [
        *(name for name in MUST_HOLD if not result[name]),
        *(name for name, limit in LOWEST.items() if result[name] < limit),
        *(name for name, limit in HIGHEST.items() if result[name] > limit),
    ]


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the jobs and the cluster, and removes the folder
    result: dict[str, Any] = {}
    try:
        install()
        make_tasks(tiny_config())
        with tempfile.TemporaryDirectory(prefix="check-cluster-") as folder, SlurmCluster() as cluster:
            runs = SlurmRuns(cluster, Path(folder))
            for check in (proxy, uneven, packing, layout, train_without_docker, doctor):
                result |= check(runs)
                print(f"{check.__name__}: {result}", flush=True)
            result["leftover_processes"] = len(cluster.job_processes())
    except SlurmError as error:
        sys.exit(f"error: {error}")
    problems = wrong(result)
    print(*problems, sep="\n")
    print("RESULT " + json.dumps(result))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
