"""Turns per second of a rollout with 32 episodes at once, next to the engine alone on the same prompts.

The rollout is the real one: vLLM samples every turn, sandboxes run the commands, the expert labels
every state. Its prompts are recorded; then the engine alone answers them again, each episode's turns
one after the other and as many episodes at once, with nothing else to wait for. A part's share is the
share of the rollout's time in which at least one episode is in it (so the shares add up to over 1).

    tools/bench/rollout.py --run runs/quickstart    a finished run: its last trained student
    tools/bench/rollout.py                          trains a small one on the expert's episodes first
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_dagger.config import RepoRepairConfig, RunConfig
from megatron_dagger.dagger import loop
from megatron_dagger.dagger.context import RunContext
from megatron_dagger.dagger.mixing import MixtureTurnPolicy
from megatron_dagger.driver.context import create_run, load_run_config, open_run_context
from megatron_dagger.policies.base import Policy
from megatron_dagger.rollout.episode import EpisodeKey, EpisodeRunner
from megatron_dagger.store.atomic import read_json
from megatron_dagger.types import Action, State, Trajectory
from recipes import find_recipe

BENCH_ROUND = 1_000_000  # seeds of its own


class Stopwatch:
    """The time in which at least one of many threads and tasks is in a part of the program."""

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
class Watched:
    """Passes every call on to ``inner`` and measures those named in ``methods``."""

    inner: Any
    watch: Stopwatch
    methods: tuple[str, ...]

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        if name not in self.methods:
            return value

        @functools.wraps(value)
        def measured(*arguments: Any, **options: Any) -> Any:
            with self.watch():
                return value(*arguments, **options)

        return measured


@dataclass
class WatchedPolicy:
    """A policy whose answering is measured, and whose states are kept where ``states`` is a list."""

    inner: Policy
    watch: Stopwatch
    states: list[State] | None = None
    name: str = field(default="watched")

    async def act(self, state: State) -> Action:
        if self.states is not None:
            self.states.append(state)
        with self.watch():
            return await self.inner.act(state)


async def bounded(jobs: list[Callable[[], Any]], at_once: int) -> list[Any]:
    """Run the jobs, ``at_once`` at a time."""
    places = asyncio.Semaphore(at_once)

    async def one(job: Callable[[], Any]) -> Any:
        async with places:
            return await job()

    return await asyncio.gather(*[one(job) for job in jobs])


async def measure(place: RunContext, manifest: dict[str, Any], train_dir: Path, episodes: int) -> dict[str, Any]:
    """The rollout, then the engine alone on what the rollout asked it."""
    config = place.config
    at_once = config.rollout.concurrent_episodes
    student = place.student()
    checkpoint = train_dir / manifest["checkpoint"]
    watches = {name: Stopwatch() for name in ("engine", "sandbox", "labelling", "rendering")}
    asked: list[list[State]] = [[] for _ in range(episodes)]
    policy = student.with_sampling(config.rollout.sampling)
    renderer = Watched(place.renderer, watches["rendering"], ("opening", "observation", "reply_text", "action"))
    runner = EpisodeRunner(
        renderer=renderer,  # type: ignore[arg-type]
        limits=config.rollout.limits,
        max_action_tokens=config.rollout.sampling.max_tokens,
        threads=place.threads,
    )

    def make_env(task: str) -> Any:
        with watches["sandbox"]():
            env = place.make_env(task)
        return Watched(env, watches["sandbox"], ("reset", "step", "judge", "close"))

    def episode(number: int) -> Callable[[], Any]:
        task = place.train_tasks[number % len(place.train_tasks)]
        actor = MixtureTurnPolicy(
            student=WatchedPolicy(policy, watches["engine"], asked[number]),
            teacher=WatchedPolicy(place.teacher, watches["labelling"]),
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
    ended: list[Trajectory] = await bounded([episode(number) for number in range(episodes)], at_once)
    wall = time.perf_counter() - began
    busy = student.engine_busy_s - busy  # type: ignore[attr-defined]

    student.sync(checkpoint, manifest["weight_version"], manifest["digests"])
    began = time.perf_counter()
    answered = sum(await bounded([functools.partial(replay, states) for states in asked], at_once))
    alone = time.perf_counter() - began

    turns = sum(len(trajectory.turns) for trajectory in ended)
    tokens = sum(len(turn.action.tokens) for trajectory in ended for turn in trajectory.turns)
    shares = {f"{name}_share": watch.seconds / wall for name, watch in watches.items() if name != "engine"}
    shares["engine_share"] = busy / wall
    broken = sum(not trajectory.stop_reason.is_clean for trajectory in ended)
    return {
        "episodes": episodes,
        "concurrent_episodes": at_once,
        "broken_episodes": broken,
        "solved": sum(trajectory.solved for trajectory in ended),
        "turns": turns,
        "median_turns": statistics.median(len(trajectory.turns) for trajectory in ended),
        "turns_per_s": turns / wall,
        "tokens_per_s": tokens / wall,
        "engine_turns_per_s": answered / alone,
        "ratio_to_engine": (turns / wall) / (answered / alone),
        **shares,
        "waiting_for_engine_share": watches["engine"].seconds / wall,
        "bottleneck": max(shares, key=shares.__getitem__).removesuffix("_share"),
    }


def last_trained(run_dir: Path) -> Path:
    """The newest finished training of a run."""
    found = sorted(run_dir.glob("rounds/*/train/manifest.json"))
    if not found:
        sys.exit(f"{run_dir} has no trained round yet: run `megatron-dagger run` on it, or leave out --run")
    return found[-1].parent


async def prepare(config: RunConfig, run_dir: Path) -> None:
    """Round 0 of a run: the expert's episodes, and a student trained on them."""
    with open_run_context(create_run(config, run_dir), run_dir) as place:
        await loop.collect(place, 0)
        loop.train(place, 0)


def small_config(tasks: str) -> RunConfig:
    """Round 0 of the quickstart, whose student does what a trained one does."""
    recipe = find_recipe("quickstart")()
    packages = (
        recipe.repo_repair
        if tasks == "packages"
        else RepoRepairConfig(source="stdlib", train_tasks=64, heldout_tasks=8)
    )
    return replace(recipe, repo_repair=packages, dagger=replace(recipe.dagger, rounds=0))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run directory; without it a small student is trained first")
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--concurrent", type=int, default=32, help="episodes at once")
    parser.add_argument("--tasks", choices=["packages", "stdlib"], default="packages", help="without --run")
    arguments = parser.parse_args()
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
        place = stack.enter_context(open_run_context(config, run_dir))
        result = asyncio.run(measure(place, read_json(trained / "manifest.json"), trained, arguments.episodes))
    for name, value in result.items():
        print(f"{name:28} {value:.3f}" if isinstance(value, float) else f"{name:28} {value}")
    print("RESULT " + json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
