"""Encode a trajectory as columns and decode it: a lossless round trip, except that ``details`` passes through JSON."""

from __future__ import annotations

import json

import numpy as np

from megatron_dagger.store.columns import (
    ACTED_BY,
    EPISODE_COLUMNS,
    LAYOUT,
    STOP_REASONS,
    TURN_COLUMNS,
    Columns,
    cut,
    decode_text,
    encode_text,
)
from megatron_dagger.store.errors import BrokenEpisodeError, StoreError
from megatron_dagger.types import Action, Trajectory, Turn


def encode(trajectory: Trajectory) -> Columns:
    """Return one episode as columns.

    Raises BrokenEpisodeError for an episode that did not end cleanly, and StoreError if an array has the wrong
    shape or ``details`` cannot be written as JSON.
    """
    where = f"episode {trajectory.task_id!r} attempt {trajectory.attempt} of round {trajectory.round_index}"
    if not trajectory.stop_reason.is_clean:
        raise BrokenEpisodeError(
            f"{where} ended with {trajectory.stop_reason.value}: the environment or a policy failed, so it is not "
            "data; run it again"
        )
    try:
        details = json.dumps(trajectory.details).encode()
    except (TypeError, ValueError) as error:
        raise StoreError(f"{where}: details cannot be written as JSON: {error}") from error
    names = ("tokens", "logprobs", "teacher_logprobs", "label_tokens", "label_logprobs", "text")
    flat = {name: _FlatArray(name) for name in names}
    task_id = encode_text(trajectory.task_id)
    flat["text"].add(task_id)
    flat["text"].add(np.frombuffer(details, np.uint8))
    rows = np.zeros((len(trajectory.turns), len(TURN_COLUMNS)), LAYOUT["turns"][0])
    for depth, turn in enumerate(trajectory.turns):
        row = _encode_turn(turn, flat, f"{where}, turn {depth}")
        row["depth"] = depth
        rows[depth] = [row.get(name, 0) for name in TURN_COLUMNS]
    episode = {
        "round": trajectory.round_index,
        "attempt": trajectory.attempt,
        "stop_reason": STOP_REASONS.index(trajectory.stop_reason),
        "solved": trajectory.solved,
        "turn_count": len(rows),
        "token_count": flat["tokens"].size,
        "label_count": flat["label_tokens"].size,
        "text_count": flat["text"].size,
        "task_id_bytes": len(task_id),
        "details_bytes": len(details),
    }
    return Columns(
        **{name: part.join() for name, part in flat.items()},
        turns=rows,
        episodes=np.array([[int(episode.get(name, 0)) for name in EPISODE_COLUMNS]], LAYOUT["episodes"][0]),
        episode_floats=np.array([[trajectory.beta, trajectory.duration_s]], LAYOUT["episode_floats"][0]),
    )


def decode(columns: Columns, index: int) -> Trajectory:
    """Return episode ``index`` of ``columns``. Its arrays are copies."""
    columns = cut(columns, index)
    episode = dict(zip(EPISODE_COLUMNS, columns.episodes[0].tolist(), strict=True))
    raw = columns.text.tobytes()
    details_end = episode["task_id_bytes"] + episode["details_bytes"]
    beta, duration_s = columns.episode_floats[0].tolist()
    return Trajectory(
        task_id=decode_text(raw[: episode["task_id_bytes"]]),
        attempt=episode["attempt"],
        round_index=episode["round"],
        turns=tuple(_decode_turn(columns, raw, row) for row in columns.turns.tolist()),
        stop_reason=STOP_REASONS[episode["stop_reason"]],
        solved=bool(episode["solved"]),
        beta=beta,
        duration_s=duration_s,
        details=json.loads(raw[episode["task_id_bytes"] : details_end]),
    )


def _encode_turn(turn: Turn, flat: dict[str, _FlatArray], where: str) -> dict[str, int]:
    tokens, logprobs, text = flat["tokens"], flat["logprobs"], flat["text"]
    row: dict[str, int] = {"executor": ACTED_BY.index(turn.acted_by), "prompt_start": tokens.size}
    tokens.add(_ids(turn.prompt_tokens, where))
    logprobs.add(_logprobs(None, len(turn.prompt_tokens), where))
    flat["teacher_logprobs"].add(_logprobs(None, len(turn.prompt_tokens), where))
    row["action_start"] = tokens.size
    tokens.add(_ids(turn.action.tokens, where))
    logprobs.add(_logprobs(turn.action.logprobs, len(turn.action.tokens), where))
    flat["teacher_logprobs"].add(_logprobs(turn.teacher_logprobs, len(turn.action.tokens), where))
    row["action_end"] = tokens.size
    row["weight_version"] = turn.action.weight_version
    row["has_logprobs"] = turn.action.logprobs is not None
    row["observation_start"] = text.size
    text.add(encode_text(turn.observation))
    row["action_text_start"] = text.size
    text.add(encode_text(turn.action.text))
    row["label_text_start"] = text.size
    row["label_start"] = flat["label_tokens"].size
    if turn.label is not None:
        flat["label_tokens"].add(_ids(turn.label.tokens, where))
        flat["label_logprobs"].add(_logprobs(turn.label.logprobs, len(turn.label.tokens), where))
        text.add(encode_text(turn.label.text))
        row["has_label"] = 1
        row["label_has_logprobs"] = turn.label.logprobs is not None
        row["label_weight_version"] = turn.label.weight_version
    row["label_end"] = flat["label_tokens"].size
    row["text_end"] = text.size
    return row


def _decode_turn(columns: Columns, raw: bytes, values: list[int]) -> Turn:
    row = dict(zip(TURN_COLUMNS, values, strict=True))
    action = slice(row["action_start"], row["action_end"])
    labels = slice(row["label_start"], row["label_end"])
    label = None
    if row["has_label"]:
        label = Action(
            text=decode_text(raw[row["label_text_start"] : row["text_end"]]),
            tokens=columns.label_tokens[labels].copy(),
            logprobs=columns.label_logprobs[labels].copy() if row["label_has_logprobs"] else None,
            weight_version=row["label_weight_version"],
        )
    scored = not np.isnan(columns.teacher_logprobs[action]).all()
    return Turn(
        observation=decode_text(raw[row["observation_start"] : row["action_text_start"]]),
        prompt_tokens=columns.tokens[row["prompt_start"] : row["action_start"]].copy(),
        acted_by=ACTED_BY[row["executor"]],
        action=Action(
            text=decode_text(raw[row["action_text_start"] : row["label_text_start"]]),
            tokens=columns.tokens[action].copy(),
            logprobs=columns.logprobs[action].copy() if row["has_logprobs"] else None,
            weight_version=row["weight_version"],
        ),
        label=label,
        teacher_logprobs=columns.teacher_logprobs[action].copy() if scored else None,
    )


class _FlatArray:
    """A flat array that is built by appending parts."""

    def __init__(self, name: str) -> None:
        self.size = 0
        self._parts: list[np.ndarray] = [np.zeros(0, LAYOUT[name][0])]

    def add(self, part: np.ndarray) -> None:
        self.size += len(part)
        self._parts.append(part)

    def join(self) -> np.ndarray:
        return np.concatenate(self._parts)


def _ids(values: np.ndarray, where: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or not (array.dtype.kind in "iu" or array.size == 0):
        raise StoreError(
            f"{where}: token ids must be a 1-D array of integers, got shape {array.shape} of {array.dtype}"
        )
    ids = array.astype(LAYOUT["tokens"][0], copy=False)
    if not np.array_equal(ids, array):
        raise StoreError(f"{where}: token ids must fit 32 bits, the largest is {array.max()}")
    return ids


def _logprobs(values: np.ndarray | None, length: int, where: str) -> np.ndarray:
    if values is None:
        return np.full(length, np.nan, LAYOUT["logprobs"][0])
    if np.shape(values) != (length,):
        raise StoreError(f"{where}: {length} tokens but log-probs of shape {np.shape(values)}")
    return np.asarray(values, LAYOUT["logprobs"][0])
