"""DAgger against SFT with the same number of labelled turns and optimizer steps, on held-out tasks.

Both arms take the same tasks, the same rounds, the same number of labels of each round and the same steps, and
start from the same weights. They differ in who acts after round 0: in the DAgger arm the mixture, so that the
labels are for states that the student reaches; in the SFT arm the teacher alone. Each seed has its own weights,
tasks and draws. The interval is a bootstrap over held-out tasks, the seeds of a task kept together and paired.

    tools/study/dagger_vs_sft.py                 3 seeds, 100 held-out tasks, about half an hour; goes on where it was
    tools/study/dagger_vs_sft.py --seeds 1 --heldout 20 dagger.rounds=1     a quick look
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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_dagger.dagger.aggregation import aggregate  # noqa: E402
from megatron_dagger.driver.context import load_run_config  # noqa: E402
from megatron_dagger.store.aggregated import DataStore  # noqa: E402

ARMS = {
    "dagger": [],
    "sft": ["dagger.beta.schedule=constant", "dagger.beta.start=1.0", "dagger.beta.floor=1.0"],
}
RESAMPLES = 10_000
SEED_STEP = 1000


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study", help="where the runs go")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--heldout", type=int, default=100, help="held-out tasks")
    parser.add_argument("--labels", type=int, default=950, help="labelled turns of each round, in both arms")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="settings of both arms")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the run under way is ended as well
    outcomes: dict[str, list[dict[str, bool]]] = {arm: [] for arm in ARMS}
    amounts: list[tuple[int, int]] = []
    for number in range(arguments.seeds):
        for arm, differing in ARMS.items():
            run = arguments.out / f"{arm}-{number}"
            settings = [
                f"seed={1 + SEED_STEP * number}",
                "repo_repair.heldout_packages=[]",  # every package that is kept for evaluation
                f"repo_repair.heldout_tasks={arguments.heldout}",
                f"dagger.evaluation_tasks={arguments.heldout}",
                "dagger.evaluate_rounds=last",
                "repo_repair.train_tasks=180",  # of them fresh ones for every round, so that the teacher alone
                "dagger.sft_tasks=60",  # gives --labels as well
                "dagger.tasks_per_round=60",
                "training.epochs=1000",  # so that training.max_steps is what ends a round, in both arms
                f"dagger.aggregation.max_labels_per_round={arguments.labels}",
                "training.parallel.world_size=2",  # data-parallel: the fastest layout on two cores
                "training.parallel.tensor_model_parallel_size=1",
                "training.parallel.pipeline_model_parallel_size=1",
                *arguments.settings,
                *differing,
            ]
            train(run, settings)
            outcomes[arm].append(heldout(run))
            amounts.append(amount(run))
    if len(set(amounts)) > 1:
        raise SystemExit(f"the arms had different (labelled turns, steps): {amounts}; lower --labels")
    report(outcomes, *amounts[0])
    return 0


def train(run: Path, settings: list[str]) -> None:
    variables = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "megatron_dagger.cli.main", "run", str(run), "--recipe", "quickstart", *settings]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=True)


def heldout(run: Path) -> dict[str, bool]:
    """Which held-out tasks the last round's student solved."""
    store = DataStore.open(run / "evaluations.zarr")
    return {episode.task_id: episode.solved for episode in store.episodes(max(store.rounds()))}


def amount(run: Path) -> tuple[int, int]:
    """The labelled turns that the run's last round was trained on, and the optimizer steps of all rounds."""
    store, config = DataStore.open(run / "data.zarr"), load_run_config(run)
    episodes = aggregate((e for index in store.rounds() for e in store.episodes(index)), config.dagger.aggregation)
    steps = [json.loads(path.read_text())["steps"] for path in sorted(run.glob("rounds/*/train/manifest.json"))]
    return sum(len(episode.labels) for episode in episodes), sum(steps)


def report(outcomes: dict[str, list[dict[str, bool]]], labelled_turns: int, steps: int) -> None:
    tasks = sorted({(seed, task) for seed, found in enumerate(outcomes["dagger"]) for task in found})
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
        "sft_success": fmean(v for found in outcomes["sft"] for v in found.values()),
        "dagger_success": fmean(v for found in outcomes["dagger"] for v in found.values()),
        "difference_points": 100 * difference,
        "ci_low": 100 * low,
        "ci_high": 100 * high,
    }
    print(f"DAgger over SFT: {100 * difference:+.1f} points (95%: {100 * low:+.1f} to {100 * high:+.1f})")
    print("RESULT " + json.dumps(result))


def bootstrap(groups: list[list[int]]) -> tuple[float, float, float]:
    """The mean of all differences and its 95% interval, resampling whole tasks."""
    chance = random.Random(0)
    means = sorted(
        fmean(value for group in chance.choices(groups, k=len(groups)) for value in group) for _ in range(RESAMPLES)
    )
    everything = fmean(value for group in groups for value in group)
    return everything, means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES)]


if __name__ == "__main__":
    sys.exit(main())
