"""Validate SWE tasks: the gold patch must pass and the unpatched repository must fail, every time.

Each task is judged several times in fresh containers. A task whose verdict varies would reward and punish by
chance; it is reported as flaky and left out of training.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from megatron_dagger.config.base import require
from megatron_dagger.envs.swe.judge import OpenSandbox, judge
from megatron_dagger.envs.swe.task import SweTask
from megatron_dagger.sandbox.base import EnvironmentBroken
from megatron_dagger.store.atomic import read_json, write_json


class TaskStatus(StrEnum):
    """The outcome of validating a task."""

    VALID = "valid"
    FLAKY = "flaky"  # the same patch got different verdicts
    GOLD_FAILS = "gold_fails"
    PASSES_UNCHANGED = "passes_unchanged"
    NO_GOLD = "no_gold"  # the row has no gold patch: nothing shows that the task can be solved
    BROKEN = "broken"  # its image is missing, or does not fit the task


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskValidation:
    """A task's status, and whether each run with the gold patch and each run without a patch resolved it."""

    instance_id: str
    status: TaskStatus
    gold: tuple[bool, ...] = ()
    unchanged: tuple[bool, ...] = ()
    reason: str = ""


def validate_tasks(
    tasks: Iterable[SweTask], open_sandbox: OpenSandbox, *, repeats: int = 3, at_once: int = 4
) -> Generator[TaskValidation, None, None]:
    """Judge every task ``repeats`` times with its gold patch and as often without, ``at_once`` tasks at a time.

    Yields each task's validation as it finishes. Closing the generator starts no further task.
    """
    threads = ThreadPoolExecutor(at_once, thread_name_prefix="validation")
    try:
        running = [threads.submit(_validate, task, open_sandbox, repeats) for task in tasks]
        for future in as_completed(running):
            yield future.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def write_report(path: Path, subject: Mapping[str, Any], validations: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a report atomically: its ``subject`` (data set, repeats) and the validations as dicts, by task id."""
    write_json(path, {**subject, "tasks": dict(sorted(validations.items()))})


def read_report(path: Path, subject: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a report's validations by task id, without broken tasks; empty if there is no report.

    Raises ConfigError if the report is about another subject.
    """
    if not path.exists():
        return {}
    report = read_json(path)
    existing = {name: report.get(name) for name in subject}
    require(existing == subject, f"{path} is a report about {existing}, not {subject}: name another file")
    return {name: row for name, row in _rows(report).items() if row["status"] != TaskStatus.BROKEN}


def valid_tasks(path: Path) -> set[str]:
    """Return the ids of a report's valid tasks. Raises ConfigError if there is no such file."""
    require(path.is_file(), f"{path}: no such file; `megatron-dagger validate {path} ...` writes it")
    return {name for name, row in _rows(read_json(path)).items() if is_valid(row)}


def is_valid(row: Mapping[str, Any]) -> bool:
    """Return whether a report's row is that of a valid task."""
    return bool(row["status"] == TaskStatus.VALID)


def _rows(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a report's rows by task id; reports of `megatron-dagger admit`, the command's old name, are read too."""
    if "tasks" in report:
        return dict(report["tasks"])
    statuses = {"admitted": TaskStatus.VALID.value}
    return {
        name: {**row, "status": statuses.get(row["fitness"], row["fitness"])}
        for name, row in report["admissions"].items()
    }


def _validate(task: SweTask, open_sandbox: OpenSandbox, repeats: int) -> TaskValidation:
    if not task.patch:
        return TaskValidation(instance_id=task.instance_id, status=TaskStatus.NO_GOLD)
    try:
        gold = [judge(open_sandbox, task, task.patch, reverse=task.patch_reversed) for _ in range(repeats)]
        unchanged = [judge(open_sandbox, task, "") for _ in range(repeats)]
    except EnvironmentBroken as error:
        return TaskValidation(instance_id=task.instance_id, status=TaskStatus.BROKEN, reason=str(error))
    status, reason = TaskStatus.VALID, ""
    if any(verdict.resolved != runs[0].resolved for runs in (gold, unchanged) for verdict in runs):
        status = TaskStatus.FLAKY
        reason = next(
            (verdict.reason for verdict in gold if not verdict.resolved), "sometimes resolved without a patch"
        )
    elif not gold[0].resolved:
        status, reason = TaskStatus.GOLD_FAILS, gold[0].reason
    elif unchanged[0].resolved:
        status = TaskStatus.PASSES_UNCHANGED
    return TaskValidation(
        instance_id=task.instance_id,
        status=status,
        gold=tuple(verdict.resolved for verdict in gold),
        unchanged=tuple(verdict.resolved for verdict in unchanged),
        reason=reason,
    )
