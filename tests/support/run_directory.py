"""A synthetic run directory, written by the real store and metrics code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_dagger.config import DaggerConfig, RunConfig, TrainingConfig, dump_yaml
from megatron_dagger.dagger.aggregation import DEPTH_BUCKET_TURNS, summarise
from megatron_dagger.evaluation.drift import errors, expert_from_student_states, expert_success, new_states
from megatron_dagger.observability.metrics import StageMetrics, append_line, read_lines
from megatron_dagger.store.aggregated import DataStore
from megatron_dagger.store.atomic import write_json, write_text
from megatron_dagger.types import ActedBy, Action, StopReason, Trajectory, Turn

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'>&amp;\x1b[31m"
TASK = """You are in a checkout of {package}. Something in it is broken: {n} tests fail.

Tests that fail:
  tests/test_core.py::test_merge
  tests/test_core.py::test_windows

Suspicious lines: src/core.py:41, src/core.py:57, src/core.py:88"""
SOURCE = "\n".join(f"{n:>4}  {'    ' * (n % 3)}result = combine(items[{n}], limit - {n})" for n in range(38, 52))
PYTEST = """FAILED tests/test_core.py::test_merge - AssertionError: assert [1, 3] == [1, 2, 3]
FAILED tests/test_core.py::test_windows
2 failed, 31 passed in 0.42s"""

COMMANDS = (
    "list src",
    "lines src/core.py 38 51",
    "edit src/core.py 41 'limit - 1' 'limit'",
    "test tests/test_core.py",
    "undo",
    "submit",
)


def make_run(path: Path, *, rounds: int = 4, tasks: int = 12, heldout: int = 10, turns: int = 14) -> Path:
    """Write rounds 0 to ``rounds - 1`` of a plausible run, and return ``path``."""
    train_ids = [f"{('toolz', 'schema', 'isodate')[i % 3]}__{i:03d}" for i in range(tasks)]
    heldout_ids = [f"{('tabulate', 'cachetools')[i % 2]}__{i:03d}" for i in range(heldout)]
    config = RunConfig(
        name="synthetic",
        dagger=DaggerConfig(rounds=rounds - 1),
        training=TrainingConfig(sequence_length=4096),
    )
    write_text(path / "config.yaml", dump_yaml(config))
    for name, ids in (("train", train_ids), ("heldout", heldout_ids)):
        for instance_id in ids:
            append_line(path / "tasks" / f"{name}.jsonl", {"instance_id": instance_id})
    data = DataStore.create_or_open(path / "data.zarr")
    evaluations = DataStore.create_or_open(path / "evaluations.zarr")
    metrics = StageMetrics(path)
    for index in range(rounds):
        beta, skill = max(0.0, 1 - 0.34 * index), 0.35 + 0.5 * index / max(1, rounds - 1)
        episodes = [_episode(t, index, i, beta, skill, turns) for i, t in enumerate(train_ids)]
        data.append(episodes)
        manifest = data.seal(index)
        folder = path / "rounds" / f"{index:04d}"
        collect = {
            "round": index, "beta": beta, **summarise(episodes), "broken_episodes": index % 2,
            "duration_s": 41.0 + index, "weight_version": index, "digest": manifest.digest,
        }  # fmt: skip
        write_json(folder / "collect.json", collect)
        steps = _train(folder, index)
        train = {
            "round": index, "steps": len(steps),
            "first_loss": steps[0]["loss"], "last_loss": steps[-1]["loss"],
            "mean_loss_last_10": float(np.mean([s["loss"] for s in steps[-10:]])), "tokens": 90_000,
            "label_tokens": 21_000, "samples": 300, "fill": 0.93, "tokens_per_s": 2210.5, "duration_s": 63.0,
            "checkpoint": "checkpoint", "weight_version": index + 1, "digests": {},
        }  # fmt: skip
        write_json(folder / "train" / "manifest.json", train)
        parts = {}
        for name, ids in (("heldout", heldout_ids), ("train", train_ids[:6])):
            evaluated = [_episode(t, index, 50 + i, 0.0, skill, turns) for i, t in enumerate(ids)]
            evaluations.append(evaluated)
            parts[name] = _success(evaluated)
        evaluations.seal(index)
        drift = _drift([e for e in evaluations.episodes(index) if e.task_id in heldout_ids]) if index else None
        evaluate = {"round": index, "weight_version": index + 1, **parts, "drift": drift, "duration_s": 30.0}
        write_json(folder / "evaluate.json", evaluate)
        metrics.record(index, "collect", collect)
        metrics.record(index, "train", train, steps=read_lines(folder / "train" / "metrics.jsonl"))
        metrics.record(index, "evaluate", evaluate)
    return path


def _train(folder: Path, index: int) -> list[dict[str, float]]:
    rng = np.random.default_rng(index)
    steps = []
    for step in range(60):
        loss = float(0.25 + 2.2 * np.exp(-(step + 45 * index) / 30) + 0.06 * abs(rng.normal()))
        steps.append({"step": step, "loss": loss, "grad_norm": 1.0, "lr": 2e-3, "label_tokens": 350,
                      "tokens": 1500, "step_s": 1.0})  # fmt: skip
        append_line(folder / "train" / "metrics.jsonl", steps[-1])
    return steps


def _success(episodes: list[Trajectory]) -> dict[str, object]:
    n, k = len(episodes), sum(t.solved for t in episodes)
    half = 1.96 * (max(k, 0.5) / n * (1 - min(k, n - 0.5) / n) / n) ** 0.5
    summary = summarise(episodes)
    return {
        "tasks": n, "solved": k, "success": k / n, "ci_low": max(0.0, k / n - half),
        "ci_high": min(1.0, k / n + half), "median_turns": summary["median_turns"],
        "stop_reasons": summary["stop_reasons"],
    }  # fmt: skip


def _drift(episodes: list[Trajectory]) -> dict[str, object]:
    """Return the diagnosis of evaluated episodes, as if the teacher had met the same observations."""
    labelled = {e.task_id: tuple(replace(turn, action=turn.label or turn.action) for turn in e.turns) for e in episodes}
    right = {e.task_id: replace(e, turns=labelled[e.task_id]) for e in episodes}
    return {
        **errors(episodes, bucket_turns=DEPTH_BUCKET_TURNS),
        **new_states(episodes, right),
        "expert_alone": expert_success(list(right.values())),
        "expert_from_student_states": expert_from_student_states([], {}, given_up=1),
    }


def _episode(task_id: str, index: int, seed: int, beta: float, skill: float, max_turns: int) -> Trajectory:
    rng = np.random.default_rng([index, seed])
    count = int(rng.integers(max(2, max_turns // 2), max_turns + 1))
    turns = []
    for depth in range(count):
        right = COMMANDS[-1] if depth == count - 1 else COMMANDS[depth % 5]
        teacher = bool(rng.random() < beta)
        slips = not teacher and rng.random() > skill + 0.2 - 0.01 * depth
        label = _action(right)
        wrong = _action("edit src/core.py 57 'items' 'item'" if depth else "grep merge src")
        observation = (SOURCE, PYTEST)[depth % 2]
        if depth == 0:
            observation = TASK.format(package=task_id.split("__")[0], n=2)
        if seed == 0 and depth == 1:
            observation = f"{HOSTILE}\n{observation}"
            wrong = _action(f"echo {HOSTILE}")
            slips, teacher = True, False
        turns.append(
            Turn(
                observation=observation,
                prompt_tokens=np.arange(20 + depth, dtype=np.int32),
                acted_by=ActedBy.TEACHER if teacher else ActedBy.STUDENT,
                action=replace(wrong if slips else label, weight_version=-1 if teacher else index),
                label=label,
            )
        )
    solved = bool(rng.random() < max(beta, skill))
    return Trajectory(
        task_id=task_id,
        attempt=0,
        round_index=index,
        turns=tuple(turns),
        stop_reason=StopReason.SUBMITTED if solved or rng.random() < 0.5 else StopReason.TURN_LIMIT,
        solved=solved,
        beta=beta,
        duration_s=float(rng.random() * 20),
    )


def _action(text: str) -> Action:
    return Action(text=text, tokens=np.frombuffer(text.encode(), np.uint8).astype(np.int32))
