"""Export episodes in the formats of other tools.

- ``openai``: one JSON line per episode, with chat ``messages`` and the outcome;
- ``labels``: one JSON line per labelled state: the conversation up to it, then the teacher's answer. Trainers for
  supervised fine-tuning read it;
- ``traj``: a directory with one ``.traj.json`` per episode, for mini-swe-agent's inspector (trajectory format 1.1);
- ``predictions``: one JSON line per episode, for SWE-bench's harness (``--predictions_path``);
- ``parquet``: one row per turn, with tokens and log-probs.

Texts are exact, except that lone surrogates, which no UTF-8 file can hold, become ``?``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_dagger.rollout.chat import END, START
from megatron_dagger.store.atomic import temporary_name
from megatron_dagger.types import Trajectory, Turn

Format = Literal["openai", "labels", "traj", "predictions", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)
MODEL = "megatron-dagger"
TRAJ_VERSION = "mini-swe-agent-1.1"
_TURNS_PER_BATCH = 2048
_COLUMNS = {
    "task_id": "text",
    "attempt": "int",
    "round": "int",
    "turn": "int",
    "observation": "text",
    "prompt_tokens": "tokens",
    "executor": "text",
    "action": "text",
    "action_tokens": "tokens",
    "action_logprobs": "logprobs",
    "teacher_logprobs": "logprobs",
    "weight_version": "int",
    "label": "text",
    "label_tokens": "tokens",
    "solved": "flag",
    "stop_reason": "text",
    "beta": "real",
}
# mini-swe-agent's exit statuses; other stop reasons keep our name.
_EXIT_STATUS = {"submitted": "Submitted", "turn_limit": "LimitsExceeded", "context_limit": "LimitsExceeded"}


def export(episodes: Iterable[Trajectory], path: Path, form: Format, *, system: Callable[[Trajectory], str]) -> int:
    """Write ``episodes`` to a new file, or for ``traj`` a new directory, and return their number.

    ``system`` returns an episode's system message, which a store holds as tokens only. ``path`` appears complete or
    not at all. Raises FileExistsError if it exists, and ValueError for ``parquet`` without pyarrow.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already; remove it, or name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / temporary_name(path.name)
    writers = {"openai": _openai, "labels": _labels, "traj": _traj, "predictions": _predictions, "parquet": _parquet}
    count = 0

    def counted() -> Iterator[tuple[Trajectory, str]]:
        nonlocal count
        for episode in episodes:
            count += 1
            yield episode, system(episode)

    try:
        writers[form](counted(), temporary)
        os.rename(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
    return count


def prediction(episode: Trajectory) -> dict[str, Any]:
    """Return the episode's patch as a row of predictions for SWE-bench's harness."""
    return {
        "instance_id": episode.task_id,
        "model_name_or_path": f"{MODEL}-round{episode.round_index}",
        "model_patch": _clean(str(episode.details.get("patch", ""))),
    }


def system_message(opening: str) -> str:
    """Return the system message in the text of an episode's first prompt (Qwen's chat format), or an empty text."""
    match = re.match(rf"{re.escape(START)}system\n(.*?){re.escape(END)}", opening, re.DOTALL)
    return match.group(1) if match else ""


def _openai(episodes: Iterator[tuple[Trajectory, str]], path: Path) -> None:
    _write_lines(path, ({"messages": _messages(e.turns, system), **_about(e)} for e, system in episodes))


def _labels(episodes: Iterator[tuple[Trajectory, str]], path: Path) -> None:
    def samples() -> Iterator[dict[str, Any]]:
        for episode, system in episodes:
            for depth, turn in enumerate(episode.turns):
                if turn.label is not None:
                    before = _messages(episode.turns[: depth + 1], system)[:-1]
                    label = {"role": "assistant", "content": turn.label.text}
                    yield {"messages": [*before, label], "turn": depth, "executor": turn.acted_by, **_about(episode)}

    _write_lines(path, samples())


def _traj(episodes: Iterator[tuple[Trajectory, str]], directory: Path) -> None:
    directory.mkdir()
    for episode, system in episodes:
        messages = _messages(episode.turns, system)
        acted = [message for message in messages if message["role"] == "assistant"]
        for message, turn in zip(acted, episode.turns, strict=True):
            label = None if turn.label is None else turn.label.text
            message["extra"] = {"actions": [{"command": turn.action.text}], "executor": turn.acted_by, "label": label}
        info = {
            "model_stats": {"instance_cost": 0.0, "api_calls": len(episode.turns)},
            "exit_status": _EXIT_STATUS.get(episode.stop_reason, str(episode.stop_reason)),
            "submission": str(episode.details.get("patch", "")),
            **_about(episode),
        }
        name = re.sub(r"[^A-Za-z0-9._-]", "_", f"{episode.task_id}-r{episode.round_index}-{episode.attempt}")
        value = {"info": info, "messages": messages, "trajectory_format": TRAJ_VERSION}
        with open(directory / f"{name}.traj.json", "x", encoding="utf-8") as file:
            json.dump(_clean(value), file, ensure_ascii=False, indent=1)


def _predictions(episodes: Iterator[tuple[Trajectory, str]], path: Path) -> None:
    _write_lines(path, (prediction(episode) for episode, _ in episodes))


def _parquet(episodes: Iterator[tuple[Trajectory, str]], path: Path) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError("parquet needs pyarrow: pip install pyarrow, or choose another format") from None
    types = {"text": pa.string(), "int": pa.int64(), "flag": pa.bool_(), "real": pa.float64()}
    types |= {"tokens": pa.list_(pa.int32()), "logprobs": pa.list_(pa.float32())}
    schema = pa.schema([(name, types[kind]) for name, kind in _COLUMNS.items()])
    rows: list[dict[str, Any]] = []
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for episode, _ in episodes:
            rows += [_row(episode, depth, turn) for depth, turn in enumerate(episode.turns)]
            if len(rows) >= _TURNS_PER_BATCH:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema))


def _row(episode: Trajectory, depth: int, turn: Turn) -> dict[str, Any]:
    label, logprobs = turn.label, turn.action.logprobs
    return {
        "task_id": _clean(episode.task_id),
        "attempt": episode.attempt,
        "round": episode.round_index,
        "turn": depth,
        "observation": _clean(turn.observation),
        "prompt_tokens": turn.prompt_tokens,
        "executor": str(turn.acted_by),
        "action": _clean(turn.action.text),
        "action_tokens": turn.action.tokens,
        "action_logprobs": logprobs,
        "teacher_logprobs": turn.teacher_logprobs,
        "weight_version": turn.action.weight_version,
        "label": None if label is None else _clean(label.text),
        "label_tokens": None if label is None else label.tokens,
        "solved": episode.solved,
        "stop_reason": str(episode.stop_reason),
        "beta": episode.beta,
    }


def _messages(turns: tuple[Turn, ...], system: str) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages.append({"role": "user", "content": turn.observation})
        messages.append({"role": "assistant", "content": turn.action.text})
    return messages


def _about(episode: Trajectory) -> dict[str, Any]:
    return {
        "instance_id": episode.task_id,
        "round": episode.round_index,
        "attempt": episode.attempt,
        "solved": episode.solved,
        "stop_reason": str(episode.stop_reason),
        "beta": episode.beta,
    }


def _write_lines(path: Path, values: Iterable[dict[str, Any]]) -> None:
    with open(path, "x", encoding="utf-8") as file:
        for value in values:
            file.write(json.dumps(_clean(value), ensure_ascii=False) + "\n")


def _clean(value: Any) -> Any:
    """Return a JSON value without lone surrogates in its texts."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list) else value
