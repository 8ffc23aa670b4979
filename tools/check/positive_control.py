"""The positive control: on a task made for it, DAgger leaves SFT far behind at equal labels and steps.

    .venv/bin/python -m tools.check.positive_control                 3 seeds of both arms, 9 minutes; can be resumed
    .venv/bin/python -m tools.check.positive_control --break all     1 seed, and again with each part broken, 15 minutes

The SFT arm is the recipe ``positive_control`` with the teacher acting alone in every round. ``problems`` says what is
wrong with two arms; ``tests/integration/test_positive_control.py`` requires that it finds nothing. With ``--break``
each break of ``control_breaks.py`` must make it find something. The last line is ``RESULT {json}``; the exit code is 1
if anything is not as it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from megatron_dagger.driver.run_dir import load_run_config
from megatron_dagger.store.atomic import read_json
from tools.check.control_breaks import BREAKS
from tools.study.outcome import labels_due

ROOT = Path(__file__).resolve().parents[2]
ARMS = {"sft": ("dagger.beta.start=1.0",), "dagger": ()}
LEAST_DAGGER, LEAST_GAP = 0.9, 0.3  # success
FIRST_SEED = 301
DEADLINE_S = 1800  # of a run, which takes a minute on two free cores


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run's files say: the success of its last round, and the labels and steps of every round."""

    success: float
    labels: tuple[int, ...]  # that the trainer read, by round
    steps: tuple[int, ...]
    labels_due: tuple[int, ...]  # by the settings: as many of each round so far


def run_arm(run: Path, arm: str, seed: int, broken: str | None = None) -> Outcome:
    """Run one arm of the control, or finish its run, with the break ``broken``; return its outcome."""
    program = ["tools.check.control_breaks", broken] if broken else ["megatron_dagger.cli.main"]
    arguments = ["run", str(run), "--recipe", "positive_control", f"seed={seed}", *ARMS[arm]]
    variables = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *program, *arguments],
        cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{run} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return read_outcome(run)


def read_outcome(run: Path) -> Outcome:
    """Return the outcome of a finished run."""
    config = load_run_config(run)
    rounds = range(config.dagger.rounds + 1)
    trained = [read_json(run / f"rounds/{index:04d}/train/manifest.json") for index in rounds]
    evaluation = read_json(run / f"rounds/{config.dagger.rounds:04d}/evaluate.json")
    return Outcome(
        success=evaluation["heldout"]["success"],
        labels=tuple(manifest["labels"] for manifest in trained),
        steps=tuple(manifest["steps"] for manifest in trained),
        labels_due=labels_due(config),
    )


def problems(sft: Outcome, dagger: Outcome) -> list[str]:
    """Return what is wrong with the two arms of a seed; nothing if the method works."""
    gap = dagger.success - sft.success
    conditions = {
        f"the arms' steps differ: {sft.steps}, {dagger.steps}": sft.steps == dagger.steps,
        f"SFT is trained on {sft.labels} labels, not {sft.labels_due}": sft.labels == sft.labels_due,
        f"DAgger is trained on {dagger.labels} labels, not {dagger.labels_due}": dagger.labels == dagger.labels_due,
        f"DAgger solves {dagger.success:.0%}, less than {LEAST_DAGGER:.0%}": dagger.success >= LEAST_DAGGER,
        f"DAgger is {100 * gap:.0f} points above SFT, less than {100 * LEAST_GAP:.0f}": gap >= LEAST_GAP,
    }
    return [problem for problem, right in conditions.items() if not right]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "control", help="default: runs/control")
    parser.add_argument("--seeds", type=int, help=f"seeds from {FIRST_SEED} on (default: 3, with --break 1)")
    parser.add_argument("--break", dest="breaks", choices=[*BREAKS, "all"], help="break this part, in the first seed")
    arguments = parser.parse_args()
    names = list(BREAKS) if arguments.breaks == "all" else [arguments.breaks] if arguments.breaks else []
    seeds = range(FIRST_SEED, FIRST_SEED + (arguments.seeds or (1 if names else 3)))
    outcomes, right = [], True
    for seed in seeds:
        arms = {arm: run_arm(arguments.out / f"{arm}-{seed}", arm, seed) for arm in ARMS}
        outcomes.append(arms)
        right &= not _report(f"seed {seed}", arms)
    broken = {name: _break(arguments.out, name, outcomes[0]) for name in names}
    result = {
        "seeds": list(seeds),
        "control_sft": fmean(arms["sft"].success for arms in outcomes),
        "control_dagger": fmean(arms["dagger"].success for arms in outcomes),
        "success": {arm: [arms[arm].success for arms in outcomes] for arm in ARMS},
        "labels": outcomes[0]["dagger"].labels,
        "steps": outcomes[0]["dagger"].steps,
        "breaks": broken,
    }
    print("RESULT " + json.dumps(result))
    return int(not right or not all(entry["red"] for entry in broken.values()))


def _break(out: Path, name: str, unbroken: dict[str, Outcome]) -> dict[str, object]:
    """Run the arm that the break changes; return both arms' success and what is wrong with them."""
    arm, _ = BREAKS[name]
    arms = unbroken | {arm: run_arm(out / f"{name}-{FIRST_SEED}", arm, FIRST_SEED, broken=name)}
    wrong = _report(name, arms)
    return {"arm": arm, **{arm: arms[arm].success for arm in ARMS}, "red": bool(wrong), "problems": wrong}


def _report(title: str, arms: dict[str, Outcome]) -> Sequence[str]:
    wrong, (sft, dagger) = problems(**arms), (arms["sft"].success, arms["dagger"].success)
    print(f"{title}: SFT {sft:.0%}, DAgger {dagger:.0%}", *wrong, sep="\n  ", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
