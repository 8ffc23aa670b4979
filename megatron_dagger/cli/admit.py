"""``megatron-dagger admit``: which tasks of a dataset are fit to train on, by their gold patches and by none.

The report is written after every task: the same command goes on where it was, and judges again what was
broken. A run takes what is admitted by ``swe.admission=FILE``.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_dagger.cli.stopping import stops_when_asked
from megatron_dagger.config import SweConfig, override
from megatron_dagger.config.base import require
from megatron_dagger.observability.progress import track

_LISTED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("report", type=Path, metavar="FILE", help="the report, for swe.admission=FILE of a run")
    parser.add_argument("--recipe", help="the recipe whose swe settings to start from (see `recipes`)")
    parser.add_argument("--heldout", action="store_true", help="judge the tasks to evaluate on, not those to train on")
    parser.add_argument("--repeats", type=int, default=3, help="with the gold patch, and without (default: 3)")
    parser.add_argument("--workers", type=int, default=4, help="tasks at once (default: 4)")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="such as swe.train=FILE_OR_HUB_ID")


@stops_when_asked()
def admit(arguments: argparse.Namespace) -> int:
    """0 when all are judged, 1 when some could not be: their image is missing, or their container broke."""
    from megatron_dagger.cli.environments import containers, swe_tasks
    from megatron_dagger.envs.swe import admission
    from megatron_dagger.store.lock import exclusive

    require(arguments.repeats > 0 and arguments.workers > 0, "--repeats and --workers must be positive")
    swe = override(_base(arguments.recipe), [one.removeprefix("swe.") for one in arguments.settings])
    require(bool(swe.train), "admit: name the tasks by swe.train and swe.train_dataset, or by --recipe")
    train, heldout = swe_tasks(swe)
    tasks = heldout if arguments.heldout else train
    source = swe.heldout if arguments.heldout and swe.heldout else swe.train
    what = {"source": source, "heldout": arguments.heldout, "repeats": arguments.repeats}
    path: Path = arguments.report
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(path.with_name(f".{path.name}.lock"), deadline_s=5.0), ExitStack() as stack:
        found = admission.read_report(path, what)
        left = [task for task in tasks if task.instance_id not in found]
        images, open_sandbox = containers(swe, path, stack)
        images.prefetch(task.image for task in left)
        progress = stack.enter_context(track("admit", len(tasks), unit="tasks", done=len(tasks) - len(left)))
        judged = admission.admit(left, open_sandbox, repeats=arguments.repeats, at_once=arguments.workers)
        for one in stack.enter_context(closing(judged)):
            found[one.instance_id] = asdict(one)
            admission.write_report(path, what, found)
            progress.advance(note=f"{sum(map(admission.is_admitted, found.values()))} admitted")
    return _tell(path, found)


def _base(recipe: str | None) -> SweConfig:
    if recipe is None:
        return SweConfig()
    from recipes import find_recipe

    return find_recipe(recipe)().swe


def _tell(path: Path, found: dict[str, dict[str, Any]]) -> int:
    from megatron_dagger.envs.swe.admission import Fitness, is_admitted

    counts = Counter(one["fitness"] for one in found.values())
    print(*(f"{fitness:18}{count:6}" for fitness, count in counts.most_common()), sep="\n")
    unfit = [(name, one) for name, one in sorted(found.items()) if not is_admitted(one)]
    for name, one in unfit[:_LISTED]:
        print(f"{one['fitness']:18}{name}  {one['reason']}"[:200].rstrip())
    if len(unfit) > _LISTED:
        print(f"and {len(unfit) - _LISTED} more")
    print(f"report: {path}")
    if broken := counts[Fitness.BROKEN]:
        sys.stderr.write(f"error: {broken} tasks could not be judged; the same command again judges those\n")
    return int(broken > 0)
