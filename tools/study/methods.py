"""Compare ways to learn from a teacher: SFT, DAgger and its prefix form, by horizon, at equal labels and steps.

    .venv/bin/python -m tools.study.methods --quick       the control, one horizon, 2 seeds: a quarter of an hour
    .venv/bin/python -m tools.study.methods               5 seeds, 100 held-out tasks, all horizons: a day
    .venv/bin/python -m tools.study.methods --horizons 2,8 --amounts 1600 --arms sft,dagger --heldout 50 --no-greedy

First comes the positive control (tools/check/positive_control.py), in which DAgger must win. Then come the long repairs
(recipe long_repair): tasks of K bugs, 5 K + 3 turns; the horizon 0 is the short kind, one bug to search for. The
arms of a (horizon, amount of labels, seed) have the same tasks, initial weights, labels of each round and steps, and
share round 0. They differ in who acts later: the teacher (sft), the student, and after its errors the teacher for some
turns (dagger), or the student first and then the teacher (prefix). Each last round is evaluated at temperature 0.7 and
greedily.

The tool says before it starts how long it will take and which difference it can see. After every run it writes the
page OUT/methods.html. Stop it at any time: the same command goes on. The same command in a second terminal shares the
work (``--control-seeds 0`` there). More seeds can be added later. The last line is ``RESULT {json}``; the exit code is
1 if arms were not matched or the control failed.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_dagger.cli.arguments import setting
from megatron_dagger.config.base import require
from megatron_dagger.store.atomic import write_text
from tools.check import positive_control as control
from tools.study.outcome import unmatched
from tools.study.page import page
from tools.study.plan import ARMS, HORIZONS, VARIANTS, Plan, parse_amounts
from tools.study.runs import ROOT, Study
from tools.study.statistics import POWER
from tools.study.summary import BASELINE, Results, numbers, visible_difference

PAGE = "methods.html"
FULL: dict[str, Any] = {
    "horizons": HORIZONS, "arms": tuple(ARMS), "amounts": ("400", "1600"),
    "seeds": 5, "heldout": 100, "steps": 200, "control_seeds": 3,
}  # fmt: skip
QUICK: dict[str, Any] = {
    "horizons": (2,), "arms": ("sft", "dagger"), "amounts": ("800",),
    "seeds": 2, "heldout": 20, "steps": 150, "control_seeds": 1,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the current run as well
    try:
        plan = _plan(arguments)
        study = Study(arguments.out, plan)
        study.check()
    except ValueError as error:
        parser.error(str(error))
    visible = visible_difference(plan.seeds, plan.heldout, arguments.seed_sd)
    print(
        f"{len(list(plan.all_cells()))} runs, {len(study.pending())} of them to do: about "
        f"{_duration(study.seconds_to_go(study.outcomes()))}\n{_power(plan, visible)}, if it varies by "
        f"{arguments.seed_sd:g} points between seeds",
        flush=True,
    )
    if arguments.dry_run:
        return 0
    try:
        controls, wrong = run_control(arguments.out / "control", arguments.control_seeds)
        write_page(study, visible)
        if not arguments.page_only:
            run_study(study, visible)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    outcomes = study.outcomes()
    problems = unmatched(outcomes)
    print(*wrong, *problems, f"page: {study.out / PAGE}", sep="\n")
    result = {
        **controls,
        **numbers(Results(outcomes)),
        "smallest_visible_difference": visible,
        "runs": len(outcomes),
        "pending_runs": len(study.pending()),
        "unmatched": problems,
    }
    print("RESULT " + json.dumps(result))
    return int(bool(wrong or problems))


def run_control(out: Path, seeds: int) -> tuple[dict[str, float], list[str]]:
    """Run both arms of the positive control, or finish them; return their mean success and what is wrong."""
    success: dict[str, list[float]] = {f"control_{arm}": [] for arm in control.ARMS}
    wrong = []
    for seed in range(control.FIRST_SEED, control.FIRST_SEED + seeds):
        arms = {arm: _control_outcome(out / f"{arm}-{seed}", arm, seed) for arm in control.ARMS}
        for arm, outcome in arms.items():
            success[f"control_{arm}"].append(outcome.success)
        wrong += [f"control, seed {seed}: {problem}" for problem in control.problems(**arms)]
        print(f"control, seed {seed}: SFT {arms['sft'].success:.0%}, DAgger {arms['dagger'].success:.0%}", flush=True)
    return {name: fmean(values) for name, values in success.items() if values}, wrong


def _control_outcome(run: Path, arm: str, seed: int) -> control.Outcome:
    finished = (run / "report.html").exists()  # its last file
    return control.read_outcome(run) if finished else control.run_arm(run, arm, seed)


def run_study(study: Study, visible: float) -> None:
    """Do the pending runs; after each of them say how it went, and write the page."""
    total = len(list(study.plan.all_cells()))
    for outcome in study.run():
        outcomes = study.outcomes()
        print(
            f"[{len(outcomes)} of {total}] {outcome.cell.name}: {outcome.success:.0%} solved, "
            f"{_duration(outcome.seconds)}; to go: {_duration(study.seconds_to_go(outcomes))}",
            flush=True,
        )
        write_page(study, visible)


def write_page(study: Study, visible: float) -> None:
    """Write the page over the runs that are finished."""
    outcomes, plan = study.outcomes(), study.plan
    heading = [
        f"{len(outcomes)} of {len(list(plan.all_cells()))} runs are finished. {_power(plan, visible)}.",
        f"Settings of all runs beside the study's own: {' '.join(plan.settings) or 'none'}.",
    ]
    write_text(study.out / PAGE, page(Results(outcomes), heading))


def _parser() -> argparse.ArgumentParser:
    shown = {name: _shown(value) if isinstance(value, tuple) else value for name, value in QUICK.items()}
    quick = ", ".join(f"{name} {value}" for name, value in shown.items())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the study (default: runs/methods, runs/methods-quick)")
    parser.add_argument("--quick", action="store_true", help=f"few of everything, sampled only: {quick}")
    parser.add_argument(
        "--horizons", type=_list(int), metavar="K,...",
        help=f"bugs of a task, 0 to 9; 0: the short kind (default: {_shown(FULL['horizons'])})",
    )  # fmt: skip
    parser.add_argument(
        "--amounts", type=_list(str), metavar="[K:]N,...",
        help="labels of each round after round 0, which has four times as many; N at every horizon or K:N at "
        f"horizon K (default: {_shown(FULL['amounts'])})",
    )  # fmt: skip
    parser.add_argument(
        "--arms", type=_list(str), metavar="NAME,...", help=f"sft and others (default: {_shown(FULL['arms'])})"
    )
    parser.add_argument(
        "--variants", type=_list(str), default=[], metavar="NAME,...",
        help="ablations of dagger, at the longest horizon with the smaller amount: all, or some of "
        f"{_shown(list(VARIANTS))}",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, help=f"at least 2 (default: {FULL['seeds']})")
    parser.add_argument("--heldout", type=int, help=f"held-out tasks of each seed (default: {FULL['heldout']})")
    parser.add_argument(
        "--steps",
        type=int,
        help=f"optimizer steps of each round, five times as many in round 0 (default: {FULL['steps']})",
    )
    parser.add_argument("--no-greedy", action="store_false", dest="greedy", help="no greedy evaluations")
    parser.add_argument(
        "--control-seeds", type=int, metavar="N",
        help=f"seeds of the positive control, 0: without it (default: {FULL['control_seeds']})",
    )  # fmt: skip
    parser.add_argument(
        "--seed-sd", type=float, default=8.0,
        help="points by which the true difference varies between seeds, for the power (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="only say what would be run")
    parser.add_argument("--page-only", action="store_true", help="no runs of the study: only the page and the RESULT")
    parser.add_argument("settings", nargs="*", type=setting, metavar="NAME=VALUE", help="other settings of all runs")
    return parser


def _plan(arguments: argparse.Namespace) -> Plan:
    """Return the plan; set the default of ``arguments.out``. Raises ValueError."""
    defaults = QUICK if arguments.quick else FULL
    chosen = {name: default if getattr(arguments, name) is None else getattr(arguments, name)
              for name, default in defaults.items()}  # fmt: skip
    horizons, arms, seeds, heldout, steps = (chosen[n] for n in ("horizons", "arms", "seeds", "heldout", "steps"))
    require(seeds >= 2 and heldout >= 1 and steps >= 1, "a study needs two seeds or more, held-out tasks and steps")
    require(chosen["control_seeds"] >= 0, f"--control-seeds {chosen['control_seeds']}: write 0 or more")
    require(set(horizons) <= set(range(10)), f"--horizons {_shown(horizons)}: write numbers of bugs from 0 to 9")
    require(set(arms) <= set(ARMS), f"--arms {_shown(arms)}: choose from {_shown(list(ARMS))}")
    require(BASELINE in arms, f"--arms {_shown(arms)}: add {BASELINE}, with which the others are compared")
    variants = list(VARIANTS) if arguments.variants == ["all"] else arguments.variants
    known = f"choose all, or from {_shown(list(VARIANTS))}"
    require(set(variants) <= set(VARIANTS), f"--variants {_shown(variants)}: {known}")
    arguments.control_seeds = chosen["control_seeds"]
    arguments.out = arguments.out or ROOT / "runs" / ("methods-quick" if arguments.quick else "methods")
    return Plan(
        arms=tuple(arm for arm in ARMS if arm in arms),
        variants=tuple(name for name in VARIANTS if name in variants),
        amounts=parse_amounts(horizons, arguments.amounts or _applicable(chosen["amounts"], horizons)),
        seeds=seeds,
        heldout=heldout,
        steps=steps,
        greedy=arguments.greedy and not arguments.quick,
        settings=tuple(arguments.settings),
    )


def _power(plan: Plan, visible: float) -> str:
    size = f"{plan.seeds} seeds of {plan.heldout} held-out tasks"
    if visible > 100:
        return f"{size} are too few to show any difference"
    return f"{size} show a difference of {visible:.1f} points or more in {POWER:.0%} of studies"


def _applicable(amounts: Iterable[str], horizons: Sequence[int]) -> list[str]:
    """Return the default amounts without those of horizons that are not studied."""
    return [amount for amount in amounts if ":" not in amount or int(amount.partition(":")[0]) in horizons]


def _list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Return a function that reads values of a kind, separated by commas."""

    def read(text: str) -> list[Any]:
        try:
            return [kind(item) for item in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: separate the values by commas, such as 1,8") from None

    return read


def _shown(values: Iterable[Any]) -> str:
    return ",".join(map(str, values))


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    sys.exit(main())
