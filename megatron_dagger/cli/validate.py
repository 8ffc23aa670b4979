"""Validate SWE tasks: the gold patch must pass and the unpatched repository must fail, N times.

The report is written after every task, so the repeated command resumes and judges broken tasks again. A run
trains on the valid tasks only with ``swe.validation=FILE``.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_dagger.config import SweConfig, override
from megatron_dagger.config.base import require
from megatron_dagger.driver.preemption import stop_on_signals
from megatron_dagger.observability.progress import track

_LISTED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "report", type=Path, metavar="FILE", help="the report to write, for swe.validation=FILE of a run"
    )
    parser.add_argument("--recipe", help="start from this recipe's swe settings (see `recipes`)")
    parser.add_argument("--heldout", action="store_true", help="validate the held-out tasks, not the training tasks")
    parser.add_argument("--repeats", type=int, default=3, help="runs with and without the gold patch (default: 3)")
    parser.add_argument("--workers", type=int, default=4, help="tasks at a time (default: 4)")
    parser.add_argument(
        "settings", nargs="*", default=[], metavar="NAME=VALUE", help="such as swe.train=FILE_OR_HUB_ID"
    )


@stop_on_signals()
def main(arguments: argparse.Namespace) -> int:
    """Return 0 if every task was judged, 1 if some could not be: no image, or the container broke."""
    from megatron_dagger.envs.swe import validation
    from megatron_dagger.envs.swe.containers import open_containers
    from megatron_dagger.envs.swe.load import load_tasks
    from megatron_dagger.store.lock import exclusive

    require(arguments.repeats > 0 and arguments.workers > 0, "--repeats and --workers must be positive")
    swe = override(_base(arguments.recipe), [setting.removeprefix("swe.") for setting in arguments.settings])
    require(bool(swe.train), "validate: name the tasks with swe.train and swe.train_dataset, or with --recipe")
    train, heldout = load_tasks(swe)
    tasks = [task.with_image_of(swe.image_prefix) for task in (heldout if arguments.heldout else train)]
    source = swe.heldout if arguments.heldout and swe.heldout else swe.train
    subject = {"source": source, "heldout": arguments.heldout, "repeats": arguments.repeats}
    path: Path = arguments.report
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(path.with_name(f".{path.name}.lock"), deadline_s=5.0), ExitStack() as stack:
        rows = validation.read_report(path, subject)
        pending = [task for task in tasks if task.instance_id not in rows]
        images, open_sandbox = open_containers(swe, path, stack)
        images.prefetch(task.image for task in pending)
        progress = stack.enter_context(track("validate", len(tasks), unit="tasks", done=len(tasks) - len(pending)))
        results = validation.validate_tasks(pending, open_sandbox, repeats=arguments.repeats, at_once=arguments.workers)
        for result in stack.enter_context(closing(results)):
            rows[result.instance_id] = asdict(result)
            validation.write_report(path, subject, rows)
            progress.advance(note=f"{sum(map(validation.is_valid, rows.values()))} valid")
    return _print_summary(path, rows)


def _base(recipe: str | None) -> SweConfig:
    if recipe is None:
        return SweConfig()
    from megatron_dagger.recipes import find_recipe

    return find_recipe(recipe)().swe


def _print_summary(path: Path, rows: dict[str, dict[str, Any]]) -> int:
    from megatron_dagger.envs.swe.validation import TaskStatus, is_valid

    counts = Counter(row["status"] for row in rows.values())
    print(*(f"{status:18}{count:6}" for status, count in counts.most_common()), sep="\n")
    invalid = [(name, row) for name, row in sorted(rows.items()) if not is_valid(row)]
    for name, row in invalid[:_LISTED]:
        print(f"{row['status']:18}{name}  {row['reason']}"[:200].rstrip())
    if len(invalid) > _LISTED:
        print(f"and {len(invalid) - _LISTED} more")
    print(f"report: {path}")
    if broken := counts[TaskStatus.BROKEN]:
        sys.stderr.write(f"error: {broken} tasks could not be judged; repeat the command to judge them again\n")
    return int(broken > 0)
