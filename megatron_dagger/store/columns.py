"""Episodes as a few flat arrays, and how to cut and join them.

``Columns`` holds any number of episodes:

======================  =======  ======================================================================
tokens                  int32    the executed token streams: prompt and action tokens, turn after turn
logprobs                float32  of tokens; NaN where the policy gave none
label_tokens            int32    the labels, stored also where they equal the executed action
label_logprobs          float32  of label_tokens; NaN where the teacher gave none
text                    uint8    UTF-8: per episode task id and details (JSON), per turn observation,
                                 action text, label text
turns                   int64    (turns, len(TURN_COLUMNS)); offsets count from the episode's own start
episodes                int64    (episodes, len(EPISODE_COLUMNS)); offsets count from the array's start
episode_floats          float64  (episodes, 2): beta, duration_s
teacher_logprobs        float32  of tokens, under the teacher; NaN where they were not requested
======================  =======  ======================================================================

The arrays in ``OPTIONAL`` were added after the first stores. One that is all NaN is not written, and a missing one
reads as NaN. So a store without teacher log-probs is the same in older and newer versions of the program.

Turn offsets are relative to the episode, so an episode's rows do not change when it moves: cutting and joining
copy slices and adjust only the four ``*_start`` columns of the episode table. Nothing here touches a disk.
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
# The codes on the disk are positions in these tuples: append only.
STOP_REASONS = (
    StopReason.SUBMITTED, StopReason.TURN_LIMIT, StopReason.CONTEXT_LIMIT,
    StopReason.TIME_LIMIT, StopReason.FORMAT_LIMIT, StopReason.REPEAT_LIMIT, StopReason.NO_ACTION,
)  # fmt: skip
TURN = {name: i for i, name in enumerate(TURN_COLUMNS)}
EPISODE = {name: i for i, name in enumerate(EPISODE_COLUMNS)}
_MOVING = [EPISODE["turn_start"], EPISODE["token_start"], EPISODE["label_start"], EPISODE["text_start"]]


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


LAYOUT: dict[str, tuple[np.dtype, int]] = {  # dtype and width; width 0 means a 1-D array
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
OPTIONAL = {"teacher_logprobs": "tokens"}  # by name, the array of the same length
assert list(LAYOUT) == [f.name for f in fields(Columns)]


def keys(columns: Columns) -> list[tuple[str, int]]:
    """Return (task_id, attempt) of every episode, in order."""
    episode_keys = []
    for row in columns.episodes:
        start = row[EPISODE["text_start"]]
        task_id = decode_text(columns.text[start : start + row[EPISODE["task_id_bytes"]]].tobytes())
        episode_keys.append((task_id, int(row[EPISODE["attempt"]])))
    return episode_keys


def cut(columns: Columns, index: int) -> Columns:
    """Return episode ``index`` alone, with arrays of its own."""
    row = columns.episodes[index].copy()
    turns, tokens, labels, text = (
        slice(row[EPISODE[f"{name}_start"]], row[EPISODE[f"{name}_start"]] + row[EPISODE[f"{name}_count"]])
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
    """Return all episodes of ``parts`` as one, in order."""
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


def stored_arrays(columns: Columns) -> list[str]:
    """Return the names of the arrays to write: all but the ``OPTIONAL`` ones that are all NaN."""
    return [name for name in LAYOUT if name not in OPTIONAL or not np.isnan(getattr(columns, name)).all()]


def from_stored_arrays(arrays: dict[str, np.ndarray]) -> Columns:
    """Return the columns that ``arrays``, as read from the disk, stand for; a missing ``OPTIONAL`` array is all NaN."""
    for name, like in OPTIONAL.items():
        if name not in arrays:
            arrays[name] = np.full(len(arrays[like]), np.nan, LAYOUT[name][0])
    return Columns(**arrays)


def decode_text(raw: bytes) -> str:
    """Return the text that ``encode_text`` turned into ``raw``."""
    return raw.decode("utf-8", "surrogatepass")


def encode_text(text: str) -> np.ndarray:
    """Return text as (n,) uint8 in UTF-8. Lone surrogates, which the output of a command may hold, are kept."""
    return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
