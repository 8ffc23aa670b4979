"""The state and progress of a run, from its files alone: the run may be running, finished or dead.

Works on any host that sees the files. A process on another host counts as alive while its status file is recent.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from megatron_dagger.observability.episode_source import EpisodeSource
from megatron_dagger.observability.progress import format_duration
from megatron_dagger.observability.rundir import MANIFESTS, RoundFiles, RunFiles, read_run
from megatron_dagger.observability.status_file import PULSE_S

STALE_S = 4 * PULSE_S  # a process on another host that wrote nothing for so long counts as dead
_ERROR_LINES = 12


def status(run_dir: Path, *, data: EpisodeSource | None = None) -> str:
    """Return a text: the rounds, their stages, the running processes, and each failure with its log.

    ``data``, the run's store, gives the number of committed episodes of unfinished rounds. Raises NoRunError.
    """
    run = read_run(run_dir)
    planned = f" of {run.planned_rounds}" if run.planned_rounds else ""
    lines = [f"{run.path}: {run.finished_rounds}{planned} rounds finished", ""]
    committed = {index: len(data.committed(index)) for index in data.rounds()} if data else {}
    begun = {state["round"] for state in run.statuses if isinstance(state.get("round"), int)}
    rounds = {files.index: files for files in run.rounds}
    for index in sorted(begun | set(rounds)):
        lines += _round_lines(rounds.get(index, RoundFiles(index=index)), run.statuses, committed.get(index))
    lines += ["", *_now(run)]
    return "\n".join(lines) + "\n"


def _round_lines(files: RoundFiles, statuses: list[dict[str, Any]], committed: int | None) -> list[str]:
    lines = [f"round {files.index}"]
    describe = {"collect": _collect, "train": _train, "evaluate": _evaluate}
    for name in MANIFESTS:
        states = [state for state in statuses if (state.get("round"), state.get("stage")) == (files.index, name)]
        drivers = [state for state in states if not state.get("worker")]
        workers = sorted((state for state in states if state.get("worker")), key=lambda state: str(state["worker"]))
        values = files.stage(name)
        if values is not None:
            jobs = dict.fromkeys(f", job {state['job']} on {state['node']}" for state in states if "job" in state)
            lines.append(f"  {name:<9} done     {describe[name](values)}{''.join(jobs)}")
            continue
        current = drivers or workers  # the driver's counts include those of the workers
        parts = [_counts(_sum(current))] if current else []
        if name == "collect" and committed:
            parts.append(f"{committed} episodes committed")
        if name == "train" and files.steps:
            last = files.steps[-1]
            parts.append(f"step {last.get('step')}, loss {_number(last.get('loss'))}")
        summary = _joint_liveness(current) if current else ("begun" if parts else "-")
        lines.append(f"  {name:<9} {summary:<8} {', '.join(parts)}".rstrip())
        lines += [f"    {w['worker']:<9} {_liveness(w):<8} {_counts(w)}, {_where(w)}" for w in workers]
    return lines


def _sum(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the summed progress of several processes. Only running processes count for the rate."""
    if len(states) == 1:
        return states[0]
    numbers = {name: sum(state.get(name) or 0 for state in states) for name in ("done", "total")}
    rate = sum(state.get("rate") or 0.0 for state in states if _liveness(state) == "running")
    return {**numbers, "rate": rate, "unit": states[0].get("unit")}


def _joint_liveness(states: list[dict[str, Any]]) -> str:
    """Return "running" if any process runs, and otherwise the worst state of all."""
    all_states = [_liveness(state) for state in states]
    return next(state for state in ("running", "failed", "killed", "stopped", *all_states) if state in all_states)


def _collect(v: dict[str, Any]) -> str:
    return (
        f"{v.get('episodes')} episodes, {v.get('labelled_turns')} labelled turns{_unlabelled(v)}, "
        f"solved {v.get('solved')}, teacher share {_percent(v.get('teacher_turn_share'))}, "
        f"agreement {_percent(v.get('agreement'))}{_broken(v)}{_took(v)}"
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
            abandoned = f"; {part['given_up']} abandoned, not solved" if part.get("given_up") else ""
            parts.append(f"{title} {success} ({part.get('solved')}/{part.get('tasks')}; {band}{abandoned})")
    return ", ".join(parts) + _took(v)


def _now(run: RunFiles) -> list[str]:
    if run.finished_rounds == run.planned_rounds:
        return ["The run is complete."]
    if not run.statuses:
        return ["No stage has reported yet."]
    newest = run.statuses[-1]
    place = (newest.get("round"), newest.get("stage"))
    same_stage = [
        state for state in run.statuses[:-1] if (state.get("round"), state.get("stage")) == place != (None, None)
    ]
    states = [*(state for state in same_stage if _liveness(state) != "done"), newest]
    return [line for state in states for line in _describe(state, run.path)]


def _describe(state: dict[str, Any], path: Path) -> list[str]:
    """Return lines that say what one process is doing, or how its work ended."""
    age = format_duration(time.time() - float(state.get("updated") or 0))
    progress = f": {_counts(state)}" if state.get("unit") else ""
    work = f"{state.get('worker') or ''} {state.get('description')}{progress}".lstrip()
    again = "Run the same command again to resume."
    log = f"Its log: {state['log']}" if state.get("log") else f"Logs: {path / 'logs'}"
    match _liveness(state):
        case "running":
            return [f"Now: {work} ({_where(state)}, {age} ago)"]
        case "killed":
            return [f"Not running: {_where(state)} ended during {work}, {age} ago. {again}", log]
        case "stopped":
            return [f"Stopped on request {age} ago in {work} ({_where(state)}). {again}", log]
        case "failed":
            error = str(state.get("error")).splitlines()
            shown = error if len(error) <= _ERROR_LINES else [error[0], "...", *error[2 - _ERROR_LINES :]]
            return [f"Failed {age} ago in {work} ({_where(state)})", *(f"  {line}" for line in shown), log]
    return [f"Last: {work}, done {age} ago ({_where(state)})."]


def _liveness(state: dict[str, Any]) -> str:
    """Return running, killed, stopped, failed or done."""
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


def _where(state: dict[str, Any]) -> str:
    restart = f" (restart {state['restart']})" if state.get("restart") else ""
    job = f"job {state['job']}{restart} on {state.get('node')}, " if "job" in state else ""
    return f"{job}process {state.get('pid')} on {state.get('host')}"


def _counts(state: dict[str, Any]) -> str:
    total = f"/{state['total']}" if state.get("total") is not None else ""
    note = f", {state['note']}" if state.get("note") else ""
    return f"{state.get('done')}{total} {state.get('unit')}, {_number(state.get('rate'), 2)}/s{note}"


def _percent(value: Any) -> str:
    return f"{100 * value:.1f}%" if isinstance(value, int | float) else "-"


def _number(value: Any, digits: int = 3) -> str:
    return f"{value:,.{digits}f}" if isinstance(value, int | float) else "-"


def _unlabelled(values: dict[str, Any]) -> str:
    missing = (values.get("turns") or 0) - (values.get("labelled_turns") or 0)
    return f" ({missing} without a label)" if missing else ""


def _broken(values: dict[str, Any]) -> str:
    counts = {"broken episodes left out": "broken_episodes", "tasks abandoned": "given_up"}
    return "".join(f", {title}: {values[name]}" for title, name in counts.items() if values.get(name))


def _took(values: dict[str, Any]) -> str:
    seconds = values.get("duration_s")
    return f" ({format_duration(seconds)})" if isinstance(seconds, int | float) else ""
