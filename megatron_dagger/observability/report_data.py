"""What the report's page shows, as plain data: rounds, losses, and an even choice of episodes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from megatron_dagger.observability.rundir import RoundFiles, RunFiles
from megatron_dagger.observability.source import EpisodeSource, visible
from megatron_dagger.types import ActedBy, Trajectory

MAX_LOSS_POINTS = 800
MAX_TEXT = 2400  # characters of one observation or action
MAX_EPISODES_BYTES = 8 << 20  # of all embedded episodes' texts

Key = tuple[str, int]
Slot = tuple[str, EpisodeSource, int, Key]  # kind, source, round, key


def gather(
    run: RunFiles, data: EpisodeSource | None, evaluations: EpisodeSource | None, *, max_episodes: int
) -> dict[str, Any]:
    """The page's data: JSON, bounded in size whatever the run's."""
    slots = list(_slots(run, data, evaluations))
    episodes = _episodes(choose_evenly(slots, max_episodes))
    losses, steps = _losses(run.rounds)
    return {
        "name": str(run.config.get("name") or run.path.resolve().name),
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "planned_rounds": run.planned_rounds,
        "rounds": [_round(files) for files in run.rounds if files.collect or files.train or files.evaluate],
        "losses": losses,
        "loss_steps": steps,
        "episodes": episodes,
        "episodes_in_all": len(slots),
    }


def choose_evenly(slots: list[Slot], limit: int) -> list[Slot]:
    """At most ``limit`` slots: as many of each (kind, round) as can be, evenly spread within each."""
    groups: dict[tuple[str, int], list[Slot]] = {}
    for slot in slots:
        groups.setdefault((slot[0], slot[2]), []).append(slot)
    quota, left = dict.fromkeys(groups, 0), limit
    while left > 0:  # deal one to each group in turn, so that small groups leave their rest to large ones
        open_groups = [name for name in groups if quota[name] < len(groups[name])]
        if not open_groups:
            break
        for name in open_groups[:left]:
            quota[name] += 1
        left -= len(open_groups[:left])
    chosen = []
    for name, members in groups.items():
        chosen += [members[i * len(members) // quota[name]] for i in range(quota[name])]
    return chosen


def describe(trajectory: Trajectory, kind: str) -> dict[str, Any]:
    """One episode for the page; texts are cleaned of control characters and cut in the middle."""
    turns = []
    for turn in trajectory.turns:
        shown: dict[str, Any] = {
            "by": "teacher" if turn.acted_by is ActedBy.TEACHER else "student",
            "saw": clip(visible(turn.observation)),
            "did": clip(visible(turn.action.text)),
            "labelled": turn.label is not None,
        }
        if turn.label is not None and not turn.agrees:
            shown["would"] = clip(visible(turn.label.text))
        turns.append(shown)
    return {
        "kind": kind,
        "round": trajectory.round_index,
        "task": visible(trajectory.task_id),
        "attempt": trajectory.attempt,
        "solved": trajectory.solved,
        "stop": trajectory.stop_reason.value,
        "beta": trajectory.beta,
        "seconds": round(trajectory.duration_s, 1),
        "turns": turns,
    }


def clip(text: str) -> str:
    """``text``, or its beginning and end with a note of how much is missing between them."""
    if len(text) <= MAX_TEXT:
        return text
    head, tail = MAX_TEXT * 2 // 3, MAX_TEXT // 3
    return f"{text[:head]}\n… {len(text) - head - tail} characters left out …\n{text[-tail:]}"


def _slots(run: RunFiles, data: EpisodeSource | None, evaluations: EpisodeSource | None) -> Iterator[Slot]:
    for source, collected in ((evaluations, False), (data, True)):
        for index in source.rounds() if source else []:
            assert source is not None
            for key in sorted(source.committed(index)):
                kind = "collected" if collected else ("heldout" if key[0] in run.heldout_tasks else "train")
                yield kind, source, index, key


def _episodes(slots: list[Slot]) -> list[dict[str, Any]]:
    """The chosen episodes; when they are too large together, an even part of them."""
    found = [describe(source.read(index, key), kind) for kind, source, index, key in slots]
    sizes = [sum(len(t["saw"]) + len(t["did"]) + len(t.get("would", "")) for t in e["turns"]) for e in found]
    keep = min(len(found), max(1, len(found) * MAX_EPISODES_BYTES // max(1, sum(sizes))))
    return [found[i * len(found) // keep] for i in range(keep)] if found else []


def _round(files: RoundFiles) -> dict[str, Any]:
    train = {k: v for k, v in (files.train or {}).items() if k not in ("digests", "canary")}
    return {
        "index": files.index,
        "collect": files.collect,
        "train": train or None,
        "evaluate": files.evaluate,
    }


def _losses(rounds: list[RoundFiles]) -> tuple[list[list[float]], int]:
    """[step over all rounds, mean loss, round] of stretches of equal length, and the number of steps."""
    points: list[tuple[int, float, int]] = []
    first = 0
    for files in rounds:
        for line in files.steps:
            if isinstance(line.get("loss"), int | float) and isinstance(line.get("step"), int):
                points.append((first + line["step"], float(line["loss"]), files.index))
        first += int((files.train or {}).get("steps") or len(files.steps))
    stride = -(-len(points) // MAX_LOSS_POINTS) or 1
    found = []
    for index in sorted({p[2] for p in points}):
        own = [p for p in points if p[2] == index]
        for start in range(0, len(own), stride):
            part = own[start : start + stride]
            found.append([part[-1][0], round(sum(p[1] for p in part) / len(part), 5), index])
    return found, len(points)
