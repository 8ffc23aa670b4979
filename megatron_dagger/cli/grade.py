"""Grade patches of a run or of a file with SWE-bench's own harness, in Docker.

The report is written once every task is graded; until then, repeat the command to resume. With --check the grader
itself is tested: every gold patch must resolve its task, and no task may be resolved without a patch.

  megatron-dagger grade RUN
  megatron-dagger grade RUN --check
  megatron-dagger grade --predictions FILE --tasks FILE_OR_HUB_ID --out DIR
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from megatron_dagger.cli.arguments import add_round
from megatron_dagger.config import ConfigError, SweConfig
from megatron_dagger.config.base import require
from megatron_dagger.config.swe import Dataset
from megatron_dagger.driver.preemption import stop_on_signals
from megatron_dagger.evaluation.harness import Harness
from megatron_dagger.evaluation.resolved import Outcome, resolve_rate, table
from megatron_dagger.observability.export import prediction
from megatron_dagger.observability.progress import track
from megatron_dagger.store.atomic import read_json, write_json

if TYPE_CHECKING:
    from megatron_dagger.envs.swe.task import SweTask
    from megatron_dagger.types import Trajectory

REPORT = "report.json"
_REQUIRED_FIELDS = ("instance_id", "model_name_or_path", "model_patch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, nargs="?", metavar="RUN", help="grade a run's held-out episodes")
    add_round(parser, "the round to grade (default: the last one)")
    parser.add_argument(
        "--predictions", type=Path, metavar="FILE", help="grade the predictions in FILE (.jsonl or .json)"
    )
    parser.add_argument("--tasks", metavar="SOURCE", help="the predictions' tasks: a file of rows, or an id on the hub")
    parser.add_argument(
        "--dataset", default="swe-bench", help=f"dataset format: {', '.join(get_args(Dataset))} (default: swe-bench)"
    )
    parser.add_argument("--split", default="test", help="split of a data set on the hub (default: test)")
    parser.add_argument(
        "--check", action="store_true", help="test the grader with the gold patches and without a patch"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the directory to write to (default: below RUN/grades)")
    parser.add_argument("--workers", type=int, default=4, help="tasks at a time (default: 4)")
    parser.add_argument("--timeout-s", type=int, default=1800, help="seconds for a task's tests (default: 1800)")
    parser.add_argument("--docker-url", help="the Docker daemon (default: the run's swe.docker_url, or DOCKER_HOST)")
    parser.add_argument("--pull", action="store_true", help="let the harness pull missing images")


@stop_on_signals()
def main(arguments: argparse.Namespace) -> int:
    """Return 0 if every task is graded (and the check passes), 1 otherwise."""
    if arguments.check:
        return _check(arguments)
    subject = _run_subject(arguments) if arguments.run_dir else _file_subject(arguments)
    tasks, predictions, directory = subject.tasks, subject.predictions, subject.directory
    outcomes = _grade(arguments, tasks, predictions, directory)
    rates = resolve_rate(outcomes, {task.instance_id: task.repo for task in tasks})
    model = predictions[0]["model_name_or_path"]
    print(f"{model}, {len(predictions)} predictions for {len(tasks)} tasks, in {directory}\n\n{table(rates)}")
    verdicts = {episode.task_id: episode.solved for episode in subject.episodes}
    disagreeing = [task for task, solved in verdicts.items() if solved != (outcomes[task] is Outcome.RESOLVED)]
    if verdicts:
        print(f"the run's own judge agrees in {len(verdicts) - len(disagreeing)} of {len(verdicts)}")
    report = {
        "model": model,
        "harness": f"swebench {importlib.metadata.version('swebench')}",
        "predictions": len(predictions),
        **rates,
        "judged_otherwise_in_the_run": disagreeing if verdicts else None,
        "outcomes": dict(sorted(outcomes.items())),
    }
    return _finish(directory, report, [task for task, outcome in outcomes.items() if outcome is Outcome.NOT_GRADED])


def _check(arguments: argparse.Namespace) -> int:
    tasks, directory = _tasks(arguments), arguments.out or _default_directory(arguments, "check")
    without = [task.instance_id for task in tasks if not task.patch]
    require(not without, f"--check: {len(without)} tasks have no gold patch, such as {without[:3]}")
    gold = [_prediction(task, "gold", task.patch) for task in tasks]
    unpatched = [_prediction(task, "none", "not applied") for task in tasks]  # the harness skips an empty patch
    with_gold = _grade(arguments, tasks, gold, directory / "gold")
    with_none = _grade(arguments, tasks, unpatched, directory / "none", unpatched=True)
    wrong = {
        "gold_does_not_resolve": [task for task, outcome in with_gold.items() if outcome is not Outcome.RESOLVED],
        "none_resolves": [task for task, outcome in with_none.items() if outcome is Outcome.RESOLVED],
    }
    for name, by_task in (("gold patch", with_gold), ("no patch", with_none)):
        print(f"{name:10}  {', '.join(f'{n} {outcome}' for outcome, n in Counter(by_task.values()).items())}")
    for name, listed in wrong.items():
        print(*(f"{name}: {task}\n" for task in listed), sep="", end="")
    outcomes = {task: {"gold": outcome, "none": with_none[task]} for task, outcome in with_gold.items()}
    not_graded = [task for task, both in outcomes.items() if Outcome.NOT_GRADED in both.values()]
    holds = not any(wrong.values())
    report = {"tasks": len(tasks), "holds": holds, **wrong, "outcomes": outcomes}
    return _finish(directory, report, not_graded) or int(not holds)


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """The predictions to grade, their tasks, the report's directory, and the run's episodes if there is a run."""

    tasks: list[SweTask]
    predictions: list[dict[str, Any]]
    directory: Path
    episodes: Sequence[Trajectory] = ()


def _run_subject(arguments: argparse.Namespace) -> _Subject:
    """Return a sealed evaluation's held-out tasks with the patches of its episodes."""
    from megatron_dagger.driver.run_dir import EVALUATED
    from megatron_dagger.store.aggregated import DataStore

    require(arguments.predictions is None, "grade: give RUN or --predictions, not both")
    path = arguments.run_dir / EVALUATED
    require(path.is_dir(), f"{arguments.run_dir} has no evaluation yet")
    store = DataStore.open(path)
    sealed = store.sealed()
    index = arguments.round_index if arguments.round_index is not None else max(sealed, default=None)
    if index not in sealed:
        raise ConfigError(f"{path}: round {index} is not evaluated completely; rounds that are: {sealed}")
    by_id = {task.instance_id: task for task in _tasks(arguments)}
    episodes = [episode for episode in store.episodes(index) if episode.task_id in by_id]
    require(bool(episodes), f"{path}: round {index} has no episode of a held-out task")
    directory = arguments.out or _default_directory(arguments, f"round-{index:04d}")
    abandoned = sorted(store.abandoned(index).tasks() & by_id.keys())  # they count, without a prediction
    tasks = [by_id[task] for task in (*(e.task_id for e in episodes), *abandoned)]
    predictions = [prediction(e) for e in episodes]
    return _Subject(tasks=tasks, predictions=predictions, directory=directory, episodes=episodes)


def _file_subject(arguments: argparse.Namespace) -> _Subject:
    """Return the predictions in a file with all tasks of a data set."""
    from megatron_dagger.envs.swe.rows import read_rows

    complete = arguments.predictions is not None and arguments.out is not None
    require(complete, "grade: give RUN, or --predictions with --tasks and --out, or --check")
    tasks, known = _tasks(arguments), set()
    names = {task.instance_id for task in tasks}
    predictions = []
    for row in read_rows(str(arguments.predictions)):
        absent = [name for name in _REQUIRED_FIELDS if name not in row]
        require(not absent, f"{arguments.predictions}: a prediction has no {', '.join(absent)}")
        task = row["instance_id"]
        require(task in names, f"{arguments.predictions}: {task} is not a task of {arguments.tasks}")
        require(task not in known, f"{arguments.predictions}: there are two predictions for {task}")
        known.add(task)
        predictions.append({name: row[name] for name in _REQUIRED_FIELDS})
    models = sorted({str(row["model_name_or_path"]) for row in predictions})
    require(len(models) == 1, f"{arguments.predictions}: grade the predictions of one model at a time, not {models}")
    return _Subject(tasks=tasks, predictions=predictions, directory=arguments.out)


def _tasks(arguments: argparse.Namespace) -> list[SweTask]:
    """Return the named data set's or the run's held-out tasks. Raises ConfigError if the harness cannot grade them."""
    from megatron_dagger.envs.swe.datasets import read_tasks

    if arguments.tasks is not None:
        tasks, _ = read_tasks(arguments.dataset, arguments.tasks, split=arguments.split)
    else:
        from megatron_dagger.envs.swe.load import run_tasks

        require(arguments.run_dir is not None, "grade: name a run, or the tasks with --tasks")
        config = _settings(arguments.run_dir)
        require(bool(config.train), f"{arguments.run_dir} has no SWE-bench tasks to grade (swe.train is not set)")
        _, kept = run_tasks(config, arguments.run_dir)
        tasks = [task.with_image_of(config.image_prefix) for task in kept]
    unfit = [(task.instance_id, reason) for task in tasks if (reason := task.not_for_the_harness())]
    require(not unfit, f"SWE-bench's harness cannot grade {len(unfit)} tasks, such as {unfit[:1]}")
    return tasks


def _settings(run_dir: Path) -> SweConfig:
    from megatron_dagger.driver.run_dir import load_run_config

    return load_run_config(run_dir).swe


def _default_directory(arguments: argparse.Namespace, name: str) -> Path:
    require(arguments.run_dir is not None, "grade: name a directory with --out")
    return Path(arguments.run_dir) / "grades" / name


def _prediction(task: SweTask, model: str, patch: str) -> dict[str, str]:
    return {"instance_id": task.instance_id, "model_name_or_path": model, "model_patch": patch}


def _grade(
    arguments: argparse.Namespace,
    tasks: Sequence[SweTask],
    predictions: Sequence[dict[str, Any]],
    directory: Path,
    *,
    unpatched: bool = False,
) -> dict[str, Outcome]:
    """Return each task's outcome, graded by the harness, which leaves no container behind."""
    url = arguments.docker_url
    if url is None and arguments.run_dir is not None:
        url = _settings(arguments.run_dir).docker_url
    harness = Harness(
        directory=directory,
        rows=[task.harness_row() for task in tasks],
        predictions=predictions,
        unpatched=unpatched,
        docker_url=url,
        workers=arguments.workers,
        timeout_s=arguments.timeout_s,
    )
    with (
        _locked(directory),
        _daemon(harness, tasks, pull=arguments.pull),
        track(f"grade {directory.name}", len(predictions), unit="tasks") as progress,
    ):
        return harness.run(lambda done: progress.advance(done - progress.done))


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    from megatron_dagger.store.lock import exclusive

    directory.mkdir(parents=True, exist_ok=True)
    with exclusive(directory / ".lock", deadline_s=5.0):
        yield


@contextmanager
def _daemon(harness: Harness, tasks: Sequence[SweTask], *, pull: bool) -> Iterator[None]:
    """Check that the daemon has the images; before and after the block, remove containers that the harness left."""
    from megatron_dagger.sandbox.docker.daemon import DockerHost
    from megatron_dagger.sandbox.docker.images import has_image

    with DockerHost(harness.run_id, harness.docker_url) as host:
        absent = [] if pull else sorted({task.image for task in tasks if not has_image(host, task.image)})
        require(not absent, f"{len(absent)} images are missing, such as {absent[:3]}: pull them, or give --pull")
        host.remove_named(harness.run_id)
        try:
            yield
        finally:
            host.remove_named(harness.run_id)


def _finish(directory: Path, report: dict[str, Any], not_graded: Sequence[str]) -> int:
    """Write the report. Return 1, and write none, if some tasks could not be graded."""
    if not_graded:
        sys.stderr.write(
            f"error: {len(not_graded)} tasks could not be graded, such as {list(not_graded[:3])}; their logs are in "
            f"{directory}/logs; repeat the command to grade them again\n"
        )
        return 1
    path = directory / REPORT
    if not path.exists() or read_json(path) != json.loads(json.dumps(report)):
        write_json(path, report)
    print(f"report: {path}")
    return 0
