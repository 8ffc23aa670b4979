"""Measure a rollout's turns per second with 32 concurrent episodes, against the engine alone on the same prompts.

The rollout is a real one: vLLM samples every turn, sandboxes run the commands, and the expert labels every state. Its
prompts are recorded. Then the engine alone answers them again, with as many episodes at once and the turns of an
episode in order, without waiting for anything else. A part's share is the share of the rollout's time in which at
least one episode is in that part, so the shares add up to more than 1.

    .venv/bin/python -m tools.bench.rollout --run runs/quickstart    the last student of a finished run
    .venv/bin/python -m tools.bench.rollout                          first trains a student on the expert's episodes
    .venv/bin/python -m tools.bench.rollout --against COMMIT         first measures the same with that commit's code

It takes about two minutes, and a few more to train a student. The last line is ``RESULT {json}``; with ``--against``
its ``speedup`` is the ratio of the two rollouts' turns per second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_dagger.config import RepoRepairConfig, RunConfig
from megatron_dagger.dagger import loop
from megatron_dagger.dagger.context import RunContext
from megatron_dagger.dagger.mixing import MixtureTurnPolicy
from megatron_dagger.driver.context import open_run_context
from megatron_dagger.driver.run_dir import create_run, load_run_config
from megatron_dagger.policies.base import Policy
from megatron_dagger.recipes import find_recipe
from megatron_dagger.rollout.episode import EpisodeKey, EpisodeRunner
from megatron_dagger.store.atomic import read_json
from megatron_dagger.types import Action, State, Trajectory

ROOT = Path(__file__).resolve().parent.parent.parent
BENCH_ROUND = 1_000_000  # no run has this round, so its random draws differ from those of every run


class Stopwatch:
    """Measures the time in which at least one thread or task is in a part of the program."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside, self._since = 0, 0.0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._since = time.perf_counter()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self.seconds += time.perf_counter() - self._since


@dataclass
class Timed:
    """Passes every call on to ``inner`` and times those named in ``methods``."""

    inner: Any
    stopwatch: Stopwatch
    methods: tuple[str, ...]

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        if name not in self.methods:
            return value

        @functools.wraps(value)
        def measured(*arguments: Any, **options: Any) -> Any:
            with self.stopwatch():
                return value(*arguments, **options)

        return measured


@dataclass
class TimedPolicy:
    """A policy whose answers are timed. The states are appended to ``states`` if that is a list."""

    inner: Policy
    stopwatch: Stopwatch
    states: list[State] | None = None
    name: str = field(default="timed")

    async def act(self, state: State) -> Action:
        if self.states is not None:
            self.states.append(state)
        with self.stopwatch():
            return await self.inner.act(state)


async def bounded(jobs: list[Callable[[], Any]], at_once: int) -> list[Any]:
    """Run the jobs, ``at_once`` at a time; return their results in order."""
    semaphore = asyncio.Semaphore(at_once)

    async def run(job: Callable[[], Any]) -> Any:
        async with semaphore:
            return await job()

    return await asyncio.gather(*[run(job) for job in jobs])


async def measure(context: RunContext, manifest: dict[str, Any], train_dir: Path, episodes: int) -> dict[str, Any]:
    """Run the rollout, then the engine alone on the rollout's prompts."""
    config = context.config
    at_once = config.rollout.concurrent_episodes
    student = context.student()
    checkpoint = train_dir / manifest["checkpoint"]
    stopwatches = {name: Stopwatch() for name in ("engine", "sandbox", "labelling", "rendering")}
    prompts: list[list[State]] = [[] for _ in range(episodes)]
    policy = student.with_sampling(config.rollout.sampling)
    renderer = Timed(context.renderer, stopwatches["rendering"], ("opening", "observation", "reply_text", "action"))
    runner = EpisodeRunner(
        renderer=renderer,  # type: ignore[arg-type]
        limits=config.rollout.limits,
        max_action_tokens=config.rollout.sampling.max_tokens,
        threads=context.threads,
    )

    def make_env(task: str) -> Any:
        with stopwatches["sandbox"]():
            env = context.make_env(task)
        return Timed(env, stopwatches["sandbox"], ("reset", "step", "judge", "close"))

    def episode(number: int) -> Callable[[], Any]:
        task = context.train_tasks[number % len(context.train_tasks)]
        actor = MixtureTurnPolicy(
            student=TimedPolicy(policy, stopwatches["engine"], prompts[number]),
            teacher=TimedPolicy(context.teacher, stopwatches["labelling"]),
            teacher_acts=lambda turn: False,
        )
        key = EpisodeKey(run_seed=config.seed, round_index=BENCH_ROUND, task_id=task, attempt=number)
        return lambda: runner.run(functools.partial(make_env, task), actor, key)

    async def replay(states: list[State]) -> int:
        for state in states:
            await policy.act(state)
        return len(states)

    student.sync(checkpoint, manifest["weight_version"], manifest["digests"])  # empties the prefix cache
    busy = student.engine_busy_s  # type: ignore[attr-defined]
    began = time.perf_counter()
    trajectories: list[Trajectory] = await bounded([episode(number) for number in range(episodes)], at_once)
    wall = time.perf_counter() - began
    busy = student.engine_busy_s - busy  # type: ignore[attr-defined]

    student.sync(checkpoint, manifest["weight_version"], manifest["digests"])
    began = time.perf_counter()
    answered = sum(await bounded([functools.partial(replay, states) for states in prompts], at_once))
    alone = time.perf_counter() - began

    turns = sum(len(trajectory.turns) for trajectory in trajectories)
    tokens = sum(len(turn.action.tokens) for trajectory in trajectories for turn in trajectory.turns)
    shares = {f"{name}_share": stopwatch.seconds / wall for name, stopwatch in stopwatches.items() if name != "engine"}
    shares["engine_share"] = busy / wall
    broken = sum(not trajectory.stop_reason.is_clean for trajectory in trajectories)
    return {
        "episodes": episodes,
        "concurrent_episodes": at_once,
        "broken_episodes": broken,
        "solved": sum(trajectory.solved for trajectory in trajectories),
        "turns": turns,
        "median_turns": statistics.median(len(trajectory.turns) for trajectory in trajectories),
        "turns_per_s": turns / wall,
        "tokens_per_s": tokens / wall,
        "engine_turns_per_s": answered / alone,
        "ratio_to_engine": (turns / wall) / (answered / alone),
        **shares,
        "waiting_for_engine_share": stopwatches["engine"].seconds / wall,
        "bottleneck": max(shares, key=shares.__getitem__).removesuffix("_share"),
    }


def measure_commit(commit: str, episodes: int, concurrent: int, tasks: str) -> dict[str, Any]:
    """Run a commit's own rollout benchmark with its own code and a student of its own; return its result.

    Exits if git does not know the commit, or if its benchmark fails.
    """
    with tempfile.TemporaryDirectory(prefix="bench-against-") as folder:
        archive = subprocess.run(["git", "archive", "--format=tar", commit], cwd=ROOT, capture_output=True)
        if archive.returncode:
            sys.exit(f"--against {commit}: {archive.stderr.decode(errors='replace').strip()}")
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(folder, filter="tar")
        _declare_entry_points(Path(folder))
        module = Path(folder, "tools/bench/rollout.py")
        command = ["-m", "tools.bench.rollout"] if module.exists() else ["tools/bench_rollout.py"]
        command += ["--episodes", str(episodes), "--concurrent", str(concurrent), "--tasks", tasks]
        # Its worker processes must import its code too, not the installed one.
        environment = os.environ | {"PYTHONPATH": folder}
        run = subprocess.run([sys.executable, *command], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    results = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if run.returncode or not results:
        sys.exit(f"--against {commit}: its benchmark ended with exit code {run.returncode}\n{run.stdout[-2000:]}")
    result: dict[str, Any] = json.loads(results[-1].removeprefix("RESULT "))
    return result


def _declare_entry_points(folder: Path) -> None:
    """Make the entry points of the code in ``folder`` those of the package, as its installation would."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
    metadata = folder / f"{project['name'].replace('-', '_')}-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")


def last_trained(run_dir: Path) -> Path:
    """Return the training directory of a run's last trained round; exit if there is none."""
    manifests = sorted(run_dir.glob("rounds/*/train/manifest.json"))
    if not manifests:
        sys.exit(f"--run {run_dir}: no round is trained yet; finish it with `megatron-dagger run`, or omit --run")
    return manifests[-1].parent


async def prepare(config: RunConfig, run_dir: Path) -> None:
    """Do round 0 of a new run: collect the expert's episodes and train a student on them."""
    with open_run_context(create_run(config, run_dir), run_dir) as context:
        await loop.collect(context, 0)
        loop.train(context, 0)


def small_config(tasks: str) -> RunConfig:
    """Return the recipe short_repair with round 0 only. Its student already behaves like a trained one."""
    recipe = find_recipe("short_repair")()
    packages = (
        recipe.repo_repair
        if tasks == "packages"
        else RepoRepairConfig(source="stdlib", train_tasks=64, heldout_tasks=8)
    )
    return replace(recipe, repo_repair=packages, dagger=replace(recipe.dagger, rounds=0))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=Path, help="a run directory with a trained round (default: train a small student first)"
    )
    parser.add_argument("--episodes", type=int, default=64, help="episodes in all (default %(default)s)")
    parser.add_argument("--concurrent", type=int, default=32, help="episodes at once (default %(default)s)")
    parser.add_argument("--tasks", choices=["packages", "stdlib"], default="packages", help="tasks without --run")
    parser.add_argument("--against", metavar="COMMIT", help="first measure this commit, with a student that it trains")
    arguments = parser.parse_args()
    before = None
    if arguments.against:
        before = measure_commit(arguments.against, arguments.episodes, arguments.concurrent, arguments.tasks)
        print(f"{arguments.against}: {before}", flush=True)
    with contextlib.ExitStack() as stack:
        if arguments.run is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-rollout-"))
            run_dir = Path(folder)
            asyncio.run(prepare(small_config(arguments.tasks), run_dir))
        else:
            run_dir = arguments.run
        config = load_run_config(run_dir)
        config = replace(config, rollout=replace(config.rollout, concurrent_episodes=arguments.concurrent))
        trained = last_trained(run_dir)
        context = stack.enter_context(open_run_context(config, run_dir))
        result = asyncio.run(measure(context, read_json(trained / "manifest.json"), trained, arguments.episodes))
    if before:
        result |= {f"{name}_before": before[name] for name in ("turns_per_s", "engine_turns_per_s", "ratio_to_engine")}
        result |= {"against": arguments.against, "speedup": result["turns_per_s"] / before["turns_per_s"]}
    for name, value in result.items():
        print(f"{name:28} {value:.3f}" if isinstance(value, float) else f"{name:28} {value}")
    print("RESULT " + json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
