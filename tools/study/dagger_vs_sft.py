"""Compare DAgger with SFT at equal numbers of labelled turns and optimizer steps, on held-out tasks.

Both arms have the same tasks, rounds, labels of each round, steps and initial weights. They differ in who acts after
round 0: the mixture of student and teacher in the DAgger arm, whose labels are therefore for states that the student
reaches; the teacher alone in the SFT arm. Each seed has its own weights, tasks and draws.

The printed interval is a paired bootstrap over held-out tasks. It keeps the seeds and so does not cover the variation
between them, which is large: do not conclude from few seeds that one arm is better.

    .venv/bin/python -m tools.study.dagger_vs_sft              3 seeds, 100 held-out tasks, half an hour; can be resumed
    .venv/bin/python -m tools.study.dagger_vs_sft --seeds 1 --heldout 20 dagger.rounds=1      a quick look

The last line is ``RESULT {json}``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from statistics import fmean

from megatron_dagger.dagger.aggregation import aggregate
from megatron_dagger.driver.run_dir import load_run_config
from megatron_dagger.store.aggregated import DataStore

ROOT = Path(__file__).resolve().parents[2]
ARMS = {
    "dagger": [],
    "sft": ["dagger.beta.schedule=constant", "dagger.beta.start=1.0", "dagger.beta.floor=1.0"],
}
RESAMPLES = 10_000
SEED_STEP = 1000


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "study", help="folder of the runs (default: runs/study)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each arm (default %(default)s)")
    parser.add_argument("--heldout", type=int, default=100, help="held-out tasks (default %(default)s)")
    parser.add_argument(
        "--labels", type=int, default=950, help="labelled turns of each round, in both arms (default %(default)s)"
    )
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="other settings of both arms")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the current run as well
    outcomes: dict[str, list[dict[str, bool]]] = {arm: [] for arm in ARMS}
    amounts: list[tuple[int, int]] = []
    for number in range(arguments.seeds):
        for arm, arm_settings in ARMS.items():
            run = arguments.out / f"{arm}-{number}"
            settings = [
                f"seed={1 + SEED_STEP * number}",
                "repo_repair.heldout_packages=[]",  # empty: every package that is reserved for evaluation
                f"repo_repair.heldout_tasks={arguments.heldout}",
                f"dagger.evaluation_tasks={arguments.heldout}",
                "dagger.evaluate_rounds=last",
                "repo_repair.train_tasks=180",  # new tasks for each of the three rounds, enough for --labels labels
                "dagger.sft_tasks=60",
                "dagger.tasks_per_round=60",
                "training.epochs=1000",  # more than training.max_steps, which then ends a round in both arms
                f"dagger.aggregation.max_labels_per_round={arguments.labels}",
                "training.parallel.world_size=2",  # data-parallel: the fastest layout on two cores
                "training.parallel.tensor_model_parallel_size=1",
                "training.parallel.pipeline_model_parallel_size=1",
                *arguments.settings,
                *arm_settings,
            ]
            train(run, settings)
            outcomes[arm].append(heldout(run))
            amounts.append(amount(run))
    if len(set(amounts)) > 1:
        raise SystemExit(
            f"the runs had different (labelled turns, steps): {amounts}; lower --labels={arguments.labels}"
        )
    report(outcomes, *amounts[0])
    return 0


def train(run: Path, settings: list[str]) -> None:
    variables = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "megatron_dagger.cli.main", "run", str(run), "--recipe", "quickstart", *settings]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=True)


def heldout(run: Path) -> dict[str, bool]:
    """Return whether the last round's student solved each held-out task."""
    store = DataStore.open(run / "evaluations.zarr")
    return {episode.task_id: episode.solved for episode in store.episodes(max(store.rounds()))}


def amount(run: Path) -> tuple[int, int]:
    """Return the labelled turns of the last round's training, and the optimizer steps of all rounds."""
    store, config = DataStore.open(run / "data.zarr"), load_run_config(run)
    episodes = aggregate((e for index in store.rounds() for e in store.episodes(index)), config.dagger.aggregation)
    steps = [json.loads(path.read_text())["steps"] for path in sorted(run.glob("rounds/*/train/manifest.json"))]
    return sum(len(episode.labels) for episode in episodes), sum(steps)


def report(outcomes: dict[str, list[dict[str, bool]]], labelled_turns: int, steps: int) -> None:
    tasks = sorted({(seed, task) for seed, solved in enumerate(outcomes["dagger"]) for task in solved})
    print("seed  sft  dagger  tasks")
    for seed, (sft, dagger) in enumerate(zip(outcomes["sft"], outcomes["dagger"], strict=True)):
        print(f"{seed:4}  {fmean(sft.values()):4.0%}  {fmean(dagger.values()):5.0%}  {len(sft)}")
    by_task: dict[str, list[int]] = {}
    for seed, task in tasks:
        by_task.setdefault(task, []).append(outcomes["dagger"][seed][task] - outcomes["sft"][seed][task])
    difference, low, high = bootstrap(list(by_task.values()))
    result = {
        "seeds": len(outcomes["sft"]),
        "heldout_tasks": len(by_task),
        "labelled_turns": labelled_turns,
        "steps": steps,
        "sft_success": fmean(v for solved in outcomes["sft"] for v in solved.values()),
        "dagger_success": fmean(v for solved in outcomes["dagger"] for v in solved.values()),
        "difference_points": 100 * difference,
        "ci_low": 100 * low,
        "ci_high": 100 * high,
    }
    print(f"DAgger over SFT: {100 * difference:+.1f} points (95%: {100 * low:+.1f} to {100 * high:+.1f})")
    print("RESULT " + json.dumps(result))


def bootstrap(groups: list[list[int]]) -> tuple[float, float, float]:
    """Return the mean of all differences and its 95% interval, by resampling groups (the seeds of a task)."""
    rng = random.Random(0)
    means = sorted(
        fmean(value for group in rng.choices(groups, k=len(groups)) for value in group) for _ in range(RESAMPLES)
    )
    mean = fmean(value for group in groups for value in group)
    return mean, means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES)]


if __name__ == "__main__":
    sys.exit(main())
