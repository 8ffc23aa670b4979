"""Which tasks are fit to be used: the gold patch resolves them and no patch does not, every time.

Each is judged several times in fresh containers. A task that now passes and now fails would reward and
punish by chance; it is listed as flaky and left out.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from megatron_dagger.config.base import require
from megatron_dagger.envs.base import EnvironmentBroken
from megatron_dagger.envs.swe.judge import OpenSandbox, judge
from megatron_dagger.envs.swe.task import SweTask
from megatron_dagger.store.atomic import read_json, write_json


class Fitness(StrEnum):
    """What the judging of a task showed."""

    ADMITTED = "admitted"
    FLAKY = "flaky"  # the same patch was judged differently
    GOLD_FAILS = "gold_fails"
    PASSES_UNCHANGED = "passes_unchanged"
    NO_GOLD = "no_gold"  # the row has no gold patch: nothing shows that it can be solved
    BROKEN = "broken"  # its image is missing, or does not fit it


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """The verdicts on one task: whether each run with the gold patch, and each without, resolved it."""

    instance_id: str
    fitness: Fitness
    gold: tuple[bool, ...] = ()
    unchanged: tuple[bool, ...] = ()
    reason: str = ""


def admit(
    tasks: Iterable[SweTask], open_sandbox: OpenSandbox, *, repeats: int = 3, at_once: int = 4
) -> Generator[Admission, None, None]:
    """Judge every task ``repeats`` times with its gold patch and as often without; ``at_once`` tasks at a time.

    Yields them as they are done. Given up by its reader, it begins no more of them.
    """
    threads = ThreadPoolExecutor(at_once, thread_name_prefix="admission")
    try:
        running = [threads.submit(_admit, task, open_sandbox, repeats) for task in tasks]
        for one in as_completed(running):
            yield one.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def write_report(path: Path, what: Mapping[str, Any], admissions: Mapping[str, Mapping[str, Any]]) -> None:
    """Put a report in place: ``what`` it is about, and the admissions as dicts, by task."""
    write_json(path, {**what, "admissions": dict(sorted(admissions.items()))})


def read_report(path: Path, what: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A report's admissions, less what was broken; none where there is no report.

    Raises ConfigError where it is about something else.
    """
    if not path.exists():
        return {}
    report = read_json(path)
    theirs = {name: report.get(name) for name in what}
    require(theirs == what, f"{path} is about {theirs}, and not {what}: name another file")
    return {name: one for name, one in report["admissions"].items() if one["fitness"] != Fitness.BROKEN}


def admitted(path: Path) -> set[str]:
    """The tasks that a report admits. Raises ConfigError where there is none."""
    require(path.is_file(), f"{path}: there is no such file; `megatron-dagger admit {path} ...` makes it")
    return {name for name, one in read_json(path)["admissions"].items() if is_admitted(one)}


def is_admitted(admission: Mapping[str, Any]) -> bool:
    """Whether an admission, as a report has it, is one."""
    return bool(admission["fitness"] == Fitness.ADMITTED)


def _admit(task: SweTask, open_sandbox: OpenSandbox, repeats: int) -> Admission:
    if not task.patch:
        return Admission(instance_id=task.instance_id, fitness=Fitness.NO_GOLD)
    try:
        gold = [judge(open_sandbox, task, task.patch, reverse=task.patch_reversed) for _ in range(repeats)]
        unchanged = [judge(open_sandbox, task, "") for _ in range(repeats)]
    except EnvironmentBroken as error:
        return Admission(instance_id=task.instance_id, fitness=Fitness.BROKEN, reason=str(error))
    fitness, reason = Fitness.ADMITTED, ""
    if any(verdict.resolved != runs[0].resolved for runs in (gold, unchanged) for verdict in runs):
        fitness = Fitness.FLAKY
        reason = next((verdict.reason for verdict in gold if not verdict.resolved), "resolved without a patch at times")
    elif not gold[0].resolved:
        fitness, reason = Fitness.GOLD_FAILS, gold[0].reason
    elif unchanged[0].resolved:
        fitness = Fitness.PASSES_UNCHANGED
    return Admission(
        instance_id=task.instance_id,
        fitness=fitness,
        gold=tuple(verdict.resolved for verdict in gold),
        unchanged=tuple(verdict.resolved for verdict in unchanged),
        reason=reason,
    )
