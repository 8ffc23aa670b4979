"""``megatron-dagger grade``: patches graded by SWE-bench's own harness, of a run's evaluation or of a file.

Writes ``report.json`` to the grading's directory when all is graded; until then the same command goes on
where it was. ``--check`` grades the grader: all gold patches must resolve their tasks, and none without.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dagger.config import ConfigError, SweConfig
from megatron_dagger.config.base import require
from megatron_dagger.driver.preemption import stops_when_asked
from megatron_dagger.evaluation.harness import Harness
from megatron_dagger.evaluation.resolved import Outcome, resolve_rate, table
from megatron_dagger.observability.export import prediction
from megatron_dagger.observability.progress import track
from megatron_dagger.store.atomic import read_json, write_json

if TYPE_CHECKING:
    from megatron_dagger.envs.swe.task import SweTask
    from megatron_dagger.types import Trajectory

REPORT = "report.json"
_NEEDED = ("instance_id", "model_name_or_path", "model_patch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, nargs="?", metavar="RUN", help="grade a run's held-out episodes")
    parser.add_argument("--round", type=int, dest="round_index", metavar="N", help="of this round (default: the last)")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="grade these (.jsonl or .json), not a run's")
    parser.add_argument("--tasks", metavar="SOURCE", help="their tasks: a file of rows, or a dataset's id on the hub")
    parser.add_argument("--dataset", default="swe-bench", help="of which kind the rows are (default: swe-bench)")
    parser.add_argument("--split", default="test", help="of the dataset on the hub (default: test)")
    parser.add_argument("--check", action="store_true", help="check the grader by the gold patches and by none")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to (default: in RUN/grades)")
    parser.add_argument("--workers", type=int, default=4, help="tasks at once (default: 4)")
    parser.add_argument("--timeout-s", type=int, default=1800, help="of a task's tests (default: 1800)")
    parser.add_argument("--docker-url", help="of the daemon (default: the run's swe.docker_url, or DOCKER_HOST)")
    parser.add_argument("--pull", action="store_true", help="let the harness pull images that are not here")


@stops_when_asked()
def grade(arguments: argparse.Namespace) -> int:
    """0 when all is graded (and the check holds), 1 when a part could not be."""
    if arguments.check:
        return _check(arguments)
    tasks, predictions, directory, episodes = _of_run(arguments) if arguments.run_dir else _of_file(arguments)
    outcomes = _graded(arguments, tasks, predictions, directory)
    rates = resolve_rate(outcomes, {task.instance_id: task.repo for task in tasks})
    model = predictions[0]["model_name_or_path"]
    print(f"{model}, {len(predictions)} predictions for {len(tasks)} tasks, in {directory}\n\n{table(rates)}")
    judged = {e.task_id: e.solved for e in episodes}
    differing = [task for task, solved in judged.items() if solved != (outcomes[task] is Outcome.RESOLVED)]
    if judged:
        print(f"the run's own judge agrees in {len(judged) - len(differing)} of {len(judged)}")
    report = {
        "model": model,
        "harness": f"swebench {importlib.metadata.version('swebench')}",
        "predictions": len(predictions),
        **rates,
        "judged_otherwise_in_the_run": differing if judged else None,
        "outcomes": dict(sorted(outcomes.items())),
    }
    return _finish(directory, report, [task for task, one in outcomes.items() if one is Outcome.NOT_GRADED])


def _check(arguments: argparse.Namespace) -> int:
    tasks, directory = _tasks(arguments), arguments.out or _default(arguments, "check")
    without = [task.instance_id for task in tasks if not task.patch]
    require(not without, f"--check: {len(without)} tasks have no gold patch, such as {without[:3]}")
    gold = [_prediction(task, "gold", task.patch) for task in tasks]
    left = [_prediction(task, "none", "not applied") for task in tasks]  # the harness skips a patch that is empty
    with_gold = _graded(arguments, tasks, gold, directory / "gold")
    with_none = _graded(arguments, tasks, left, directory / "none", unpatched=True)
    wrong = {
        "gold_does_not_resolve": [task for task, one in with_gold.items() if one is not Outcome.RESOLVED],
        "none_resolves": [task for task, one in with_none.items() if one is Outcome.RESOLVED],
    }
    for name, found in (("gold patch", with_gold), ("no patch", with_none)):
        print(f"{name:10}  {', '.join(f'{n} {outcome}' for outcome, n in Counter(found.values()).items())}")
    for name, listed in wrong.items():
        print(*(f"{name}: {task}\n" for task in listed), sep="", end="")
    outcomes = {task: {"gold": outcome, "none": with_none[task]} for task, outcome in with_gold.items()}
    broken = [task for task, found in outcomes.items() if Outcome.NOT_GRADED in found.values()]
    holds = not any(wrong.values())
    report = {"tasks": len(tasks), "holds": holds, **wrong, "outcomes": outcomes}
    return _finish(directory, report, broken) or int(not holds)


def _of_run(
    arguments: argparse.Namespace,
) -> tuple[list[SweTask], list[dict[str, Any]], Path, Sequence[Trajectory]]:
    """A sealed evaluation: of each held-out task the patch in its episode, if it has one."""
    from megatron_dagger.store.aggregated import DataStore

    require(arguments.predictions is None, "grade: give RUN or --predictions, not both")
    path = arguments.run_dir / "evaluations.zarr"
    require(path.is_dir(), f"{arguments.run_dir} has no evaluation yet")
    store = DataStore.open(path)
    sealed = store.sealed()
    index = arguments.round_index if arguments.round_index is not None else max(sealed, default=None)
    if index not in sealed:
        raise ConfigError(f"{path}: round {index} is not evaluated to its end; those that are: {sealed}")
    by_id = {task.instance_id: task for task in _tasks(arguments)}
    episodes = [episode for episode in store.episodes(index) if episode.task_id in by_id]
    require(bool(episodes), f"{path}: round {index} has no episode of a held-out task")
    directory = arguments.out or _default(arguments, f"round-{index:04d}")
    given_up = sorted(store.given_up(index).tasks() & by_id.keys())  # they count, with no prediction
    tasks = [by_id[task] for task in (*(e.task_id for e in episodes), *given_up)]
    return tasks, [prediction(e) for e in episodes], directory, episodes


def _of_file(
    arguments: argparse.Namespace,
) -> tuple[list[SweTask], list[dict[str, Any]], Path, Sequence[Trajectory]]:
    from megatron_dagger.envs.swe.rows import read_rows

    given = arguments.predictions is not None and arguments.out is not None
    require(given, "grade: give RUN, or --predictions with --tasks and --out, or --check")
    tasks, known = _tasks(arguments), set()
    names = {task.instance_id for task in tasks}
    predictions = []
    for row in read_rows(str(arguments.predictions)):
        absent = [name for name in _NEEDED if name not in row]
        require(not absent, f"{arguments.predictions}: a prediction has no {', '.join(absent)}")
        one = row["instance_id"]
        require(one in names, f"{arguments.predictions}: {one} is no task of {arguments.tasks}")
        require(one not in known, f"{arguments.predictions}: there are two predictions for {one}")
        known.add(one)
        predictions.append({name: row[name] for name in _NEEDED})
    models = sorted({str(one["model_name_or_path"]) for one in predictions})
    require(len(models) == 1, f"{arguments.predictions}: predictions of one model are graded at a time, not {models}")
    return tasks, predictions, arguments.out, []


def _tasks(arguments: argparse.Namespace) -> list[SweTask]:
    """Those of the dataset that is named, or the run's held-out ones; ConfigError where the harness knows none such."""
    from megatron_dagger.envs.swe.datasets import read_tasks

    if arguments.tasks is not None:
        tasks, _ = read_tasks(arguments.dataset, arguments.tasks, split=arguments.split)
    else:
        from megatron_dagger.driver.environments import swe_tasks

        require(arguments.run_dir is not None, "grade: name the tasks by --tasks, or a run")
        config = _settings(arguments.run_dir)
        require(bool(config.train), f"{arguments.run_dir} is on repair tasks, whose judge is the run's own")
        _, tasks = swe_tasks(config)
    strange = [(task.instance_id, why) for task in tasks if (why := task.not_for_the_harness())]
    require(not strange, f"SWE-bench's harness cannot grade {len(strange)} tasks, such as {strange[:1]}")
    return tasks


def _settings(run_dir: Path) -> SweConfig:
    from megatron_dagger.driver.context import load_run_config

    return load_run_config(run_dir).swe


def _default(arguments: argparse.Namespace, name: str) -> Path:
    require(arguments.run_dir is not None, "grade: name a directory by --out")
    return Path(arguments.run_dir) / "grades" / name


def _prediction(task: SweTask, model: str, patch: str) -> dict[str, str]:
    return {"instance_id": task.instance_id, "model_name_or_path": model, "model_patch": patch}


def _graded(
    arguments: argparse.Namespace,
    tasks: Sequence[SweTask],
    predictions: Sequence[dict[str, Any]],
    directory: Path,
    *,
    unpatched: bool = False,
) -> dict[str, Outcome]:
    """What came of each task, by the harness; it leaves no container behind."""
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
        _alone(directory),
        _daemon(harness, tasks, pull=arguments.pull),
        track(f"grade {directory.name}", len(predictions), unit="tasks") as progress,
    ):
        return harness.run(lambda done: progress.advance(done - progress.done))


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    from megatron_dagger.store.lock import exclusive

    directory.mkdir(parents=True, exist_ok=True)
    with exclusive(directory / ".lock", deadline_s=5.0):
        yield


@contextmanager
def _daemon(harness: Harness, tasks: Sequence[SweTask], *, pull: bool) -> Iterator[None]:
    """A daemon that has the images; what a harness has left there is removed before and after."""
    from megatron_dagger.sandbox.docker.daemon import DockerHost
    from megatron_dagger.sandbox.docker.images import is_here

    with DockerHost(harness.run_id, harness.docker_url) as host:
        absent = [] if pull else sorted({task.image for task in tasks if not is_here(host, task.image)})
        require(not absent, f"{len(absent)} images are not here, such as {absent[:3]}: pull them, or give --pull")
        host.remove_named(harness.run_id)
        try:
            yield
        finally:
            host.remove_named(harness.run_id)


def _finish(directory: Path, report: dict[str, Any], not_graded: Sequence[str]) -> int:
    """Write the report; 1 where some tasks could not be graded."""
    if not_graded:
        sys.stderr.write(
            f"error: {len(not_graded)} tasks could not be graded, such as {list(not_graded[:3])}; their logs are in "
            f"{directory}/logs; the same command again grades those\n"
        )
        return 1
    path = directory / REPORT
    if not path.exists() or read_json(path) != json.loads(json.dumps(report)):
        write_json(path, report)
    print(f"report: {path}")
    return 0
