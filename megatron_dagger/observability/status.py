"""What a run is doing and how far it is, from its files alone; the run may be going on, done or dead."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from megatron_dagger.observability.progress import format_duration
from megatron_dagger.observability.rundir import MANIFESTS, RoundFiles, RunFiles, read_run
from megatron_dagger.observability.source import EpisodeSource

STALE_S = 120.0  # on another host a run that wrote nothing for so long is taken for dead


def status(run_dir: Path, *, data: EpisodeSource | None = None) -> str:
    """A text for people: rounds, their stages, what is under way, what failed and where its log is.

    ``data`` (the run's store) gives the number of committed episodes of rounds under way.
    """
    run = read_run(run_dir)
    planned = f" of {run.planned_rounds}" if run.planned_rounds else ""
    finished = sum(r.evaluate is not None for r in run.rounds)
    lines = [f"{run.path}: {finished}{planned} rounds finished", ""]
    committed = {index: len(data.committed(index)) for index in data.rounds()} if data else {}
    for files in run.rounds:
        lines += _round_lines(files, run.status, committed.get(files.index))
    lines += ["", *_now(run)]
    return "\n".join(lines) + "\n"


def _round_lines(files: RoundFiles, state: dict[str, Any] | None, committed: int | None) -> list[str]:
    lines = [f"round {files.index}"]
    describe = {"collect": _collect, "train": _train, "evaluate": _evaluate}
    for name in MANIFESTS:
        values = files.stage(name)
        if values is not None:
            lines.append(f"  {name:<9} done     {describe[name](values)}")
            continue
        current = state if state and (state.get("round"), state.get("stage")) == (files.index, name) else None
        parts = []
        if current is not None:
            parts.append(_counts(current))
        if name == "collect" and committed:
            parts.append(f"{committed} episodes committed")
        if name == "train" and files.steps:
            last = files.steps[-1]
            parts.append(f"step {last.get('step')}, loss {_number(last.get('loss'))}")
        word = _liveness(current) if current else ("begun" if parts else "-")
        lines.append(f"  {name:<9} {word:<8} {', '.join(parts)}".rstrip())
    return lines


def _collect(v: dict[str, Any]) -> str:
    return (
        f"{v.get('episodes')} episodes, {v.get('labelled_turns')} labelled turns, solved {v.get('solved')}, "
        f"teacher share {_percent(v.get('teacher_turn_share'))}, agreement {_percent(v.get('agreement'))}"
        f"{_broken(v)}{_took(v)}"
    )


def _train(v: dict[str, Any]) -> str:
    return (
        f"{v.get('steps')} steps, loss {_number(v.get('first_loss'))} to "
        f"{_number(v.get('mean_loss_last_10', v.get('last_loss')))}, "
        f"{_number(v.get('tokens_per_s'), 0)} tokens/s{_took(v)}"
    )


def _evaluate(v: dict[str, Any]) -> str:
    parts = []
    for name, title in (("heldout", "held out"), ("train", "train")):
        part = v.get(name)
        if part:
            band = f"{_percent(part.get('ci_low'))} to {_percent(part.get('ci_high'))}"
            success = _percent(part.get("success"))
            parts.append(f"{title} {success} ({part.get('solved')}/{part.get('tasks')}; {band})")
    return ", ".join(parts) + _took(v)


def _now(run: RunFiles) -> list[str]:
    state = run.status
    if state is None:
        finished = sum(r.evaluate is not None for r in run.rounds)
        return ["The run is complete." if finished == run.planned_rounds else "No stage has reported yet."]
    age = format_duration(time.time() - float(state.get("updated") or 0))
    where = f"round {state['round']}, " if state.get("round") is not None else ""
    what = f"{where}{state.get('description')}: {_counts(state)}"
    word = _liveness(state)
    log = f"\nIts log: {state['log']}" if state.get("log") else f"\nLogs: {run.path / 'logs'}"
    if word == "running":
        return [f"Now: {what} (process {state.get('pid')} on {state.get('host')}, {age} ago)"]
    if word == "killed":
        return [f"Not running: process {state.get('pid')} on {state.get('host')} ended during {what}, "
                f"{age} ago. The same command again goes on from there.{log}"]  # fmt: skip
    if word == "failed":
        return [f"Failed {age} ago in {what}\n  {state.get('error')}{log}"]
    return [f"Last: {what}, done {age} ago."]


def _liveness(state: dict[str, Any]) -> str:
    """running, killed, failed or done."""
    if state.get("state") != "running":
        return str(state.get("state"))
    if state.get("host") != socket.gethostname():
        return "running" if time.time() - float(state.get("updated") or 0) < STALE_S else "killed"
    try:
        os.kill(int(state["pid"]), 0)
    except (ProcessLookupError, KeyError, TypeError, ValueError):
        return "killed"
    except PermissionError:
        pass
    return "running"


def _counts(state: dict[str, Any]) -> str:
    total = f"/{state['total']}" if state.get("total") is not None else ""
    note = f", {state['note']}" if state.get("note") else ""
    return f"{state.get('done')}{total} {state.get('unit')}, {_number(state.get('rate'), 2)}/s{note}"


def _percent(value: Any) -> str:
    return f"{100 * value:.1f}%" if isinstance(value, int | float) else "-"


def _number(value: Any, digits: int = 3) -> str:
    return f"{value:,.{digits}f}" if isinstance(value, int | float) else "-"


def _broken(values: dict[str, Any]) -> str:
    return f", broken episodes left out: {values['broken_episodes']}" if values.get("broken_episodes") else ""


def _took(values: dict[str, Any]) -> str:
    seconds = values.get("duration_s")
    return f" ({format_duration(seconds)})" if isinstance(seconds, int | float) else ""
