"""Episodes as a few flat arrays: what they are, how to cut and join them.

``Columns`` holds any number of episodes:

======================  =======  ======================================================================
tokens                  int32    every executed token stream: prompt and action tokens, turn after turn
logprobs                float32  same length; NaN where the policy gave none
label_tokens            int32    the labels, apart from what was executed even where both are equal
label_logprobs          float32  same length; NaN where the teacher gave none
text                    uint8    UTF-8: per episode task id and details (JSON), per turn observation,
                                 action text, label text
turns                   int64    (turns, len(TURN_COLUMNS)); offsets count from the episode's own start
episodes                int64    (episodes, len(EPISODE_COLUMNS)); offsets count from the array's start
episode_floats          float64  (episodes, 2): beta, duration_s
teacher_logprobs        float32  of tokens, under the teacher; NaN where it was not asked for them
======================  =======  ======================================================================

An array of ``LATER`` came after the first stores: where all of it is NaN it is not written, and where it is not
there it is read as that. So older programs and newer ones read each other's stores, unless it is used.

Turn offsets are relative, so an episode's rows do not change when it moves: cutting and joining copy
slices and adjust only the four ``*_start`` columns of the episode table. Nothing here touches a disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from megatron_dagger.types import ActedBy, StopReason

TURN_COLUMNS = (
    "depth", "executor", "weight_version", "has_logprobs",
    "has_label", "label_weight_version", "label_has_logprobs",
    "prompt_start", "action_start", "action_end", "label_start", "label_end",
    "observation_start", "action_text_start", "label_text_start", "text_end",
)  # fmt: skip
EPISODE_COLUMNS = (
    "round", "attempt", "stop_reason", "solved",
    "turn_start", "turn_count", "token_start", "token_count",
    "label_start", "label_count", "text_start", "text_count", "task_id_bytes", "details_bytes",
)  # fmt: skip
ACTED_BY = (ActedBy.STUDENT, ActedBy.TEACHER)
# Codes are positions in these tuples and go to the disk: append only.
STOP_REASONS = (
    StopReason.SUBMITTED, StopReason.TURN_LIMIT, StopReason.CONTEXT_LIMIT,
    StopReason.TIME_LIMIT, StopReason.FORMAT_LIMIT, StopReason.REPEAT_LIMIT,
)  # fmt: skip
T = {name: i for i, name in enumerate(TURN_COLUMNS)}
E = {name: i for i, name in enumerate(EPISODE_COLUMNS)}
_MOVING = [E["turn_start"], E["token_start"], E["label_start"], E["text_start"]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Episodes as flat arrays; the fields are described in the module's docstring."""

    tokens: np.ndarray
    logprobs: np.ndarray
    label_tokens: np.ndarray
    label_logprobs: np.ndarray
    text: np.ndarray
    turns: np.ndarray
    episodes: np.ndarray
    episode_floats: np.ndarray
    teacher_logprobs: np.ndarray

    def __len__(self) -> int:
        return len(self.episodes)


LAYOUT: dict[str, tuple[np.dtype, int]] = {  # dtype and width; width 0 is a 1-D array
    "tokens": (np.dtype("<i4"), 0),
    "logprobs": (np.dtype("<f4"), 0),
    "label_tokens": (np.dtype("<i4"), 0),
    "label_logprobs": (np.dtype("<f4"), 0),
    "text": (np.dtype("u1"), 0),
    "turns": (np.dtype("<i8"), len(TURN_COLUMNS)),
    "episodes": (np.dtype("<i8"), len(EPISODE_COLUMNS)),
    "episode_floats": (np.dtype("<f8"), 2),
    "teacher_logprobs": (np.dtype("<f4"), 0),
}
LATER = {"teacher_logprobs": "tokens"}  # and the array of the same length
assert list(LAYOUT) == [f.name for f in fields(Columns)]


def keys(columns: Columns) -> list[tuple[str, int]]:
    """(task_id, attempt) of every episode, in order."""
    found = []
    for row in columns.episodes:
        start = row[E["text_start"]]
        task_id = string(columns.text[start : start + row[E["task_id_bytes"]]].tobytes())
        found.append((task_id, int(row[E["attempt"]])))
    return found


def cut(columns: Columns, index: int) -> Columns:
    """Episode ``index`` alone, with its own arrays."""
    row = columns.episodes[index].copy()
    turns, tokens, labels, text = (
        slice(row[E[f"{name}_start"]], row[E[f"{name}_start"]] + row[E[f"{name}_count"]])
        for name in ("turn", "token", "label", "text")
    )
    row[_MOVING] = 0
    return Columns(
        tokens=columns.tokens[tokens].copy(),
        logprobs=columns.logprobs[tokens].copy(),
        label_tokens=columns.label_tokens[labels].copy(),
        label_logprobs=columns.label_logprobs[labels].copy(),
        text=columns.text[text].copy(),
        turns=columns.turns[turns].copy(),
        episodes=row[None],
        episode_floats=columns.episode_floats[index : index + 1].copy(),
        teacher_logprobs=columns.teacher_logprobs[tokens].copy(),
    )


def join(parts: Sequence[Columns]) -> Columns:
    """All episodes of ``parts`` in one, in order."""
    shifted, start = [], np.zeros(4, np.int64)
    for part in parts:
        rows = part.episodes.copy()
        rows[:, _MOVING] += start
        shifted.append(rows)
        start += [len(part.turns), len(part.tokens), len(part.label_tokens), len(part.text)]
    arrays = {}
    for name, (dtype, width) in LAYOUT.items():
        pieces = shifted if name == "episodes" else [getattr(part, name) for part in parts]
        empty = np.zeros((0, width) if width else 0, dtype)
        arrays[name] = np.concatenate([empty, *pieces])
    return Columns(**arrays)


def written(columns: Columns) -> list[str]:
    """The arrays that go to the disk."""
    return [name for name in LAYOUT if name not in LATER or not np.isnan(getattr(columns, name)).all()]


def complete(arrays: dict[str, np.ndarray]) -> Columns:
    """Columns of what was on the disk."""
    for name, like in LATER.items():
        if name not in arrays:
            arrays[name] = np.full(len(arrays[like]), np.nan, LAYOUT[name][0])
    return Columns(**arrays)


def string(raw: bytes) -> str:
    """Text as ``utf8`` wrote it."""
    return raw.decode("utf-8", "surrogatepass")


def utf8(text: str) -> np.ndarray:
    """Text as (n,) uint8. What a command printed may hold half a character (a lone surrogate): kept."""
    return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
