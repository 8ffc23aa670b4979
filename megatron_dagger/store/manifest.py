"""The manifest of a sealed round: its counts and its digest.

The digest is the SHA-256 of everything that a run must reproduce exactly: per episode, in (task_id, attempt) order,
the task, the attempt and the outcome, and per turn who acted, the prompt and action tokens, and the label's tokens.

The digest leaves out, on purpose:

- log-probs: their last bits depend on the other sequences in the engine's batch;
- durations and ``details``: they depend on the clock;
- texts: the tokens determine them;
- weight versions: after a resume the number of weight syncs differs;
- beta: the column of who acted shows its effect.

The checksums of the chunks cover all of these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from megatron_dagger.store import columns as c
from megatron_dagger.store.columns import Columns
from megatron_dagger.store.errors import CorruptDataError
from megatron_dagger.types import SCHEMA_VERSION

_DIGESTED_TURN_COLUMNS = [
    c.TURN["executor"],
    c.TURN["has_label"],
    *(c.TURN[name] for name in ("prompt_start", "action_start", "action_end", "label_start", "label_end")),
]
_COUNTS = ("episodes", "turns", "labelled_turns", "tokens", "label_tokens", "solved")


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Counts and digest of a sealed round; ``digest`` is hex SHA-256."""

    round: int
    episodes: int
    turns: int
    labelled_turns: int
    tokens: int
    label_tokens: int
    solved: int
    digest: str
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, where: object) -> Manifest:
        """Build a manifest from the output of ``to_dict``. Raises CorruptDataError that names ``where`` it was read."""
        expected = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != expected:
            raise CorruptDataError(f"{where}: the manifest is damaged: {values!r}")
        return cls(**values)


class RoundDigest:
    """Counts and digest of a round's episodes, which are added in (task_id, attempt) order."""

    def __init__(self, round_index: int):
        self._round = round_index
        self._hash = hashlib.sha256(f"round {round_index} schema {SCHEMA_VERSION}\n".encode())
        self._counts = dict.fromkeys(_COUNTS, 0)

    def update(self, columns: Columns) -> None:
        """Add the episodes of ``columns``."""
        for index, (task_id, attempt) in enumerate(c.keys(columns)):
            episode = c.cut(columns, index)
            row = episode.episodes[0]
            stop_reason = c.STOP_REASONS[int(row[c.EPISODE["stop_reason"]])]
            head = [task_id, attempt, stop_reason, bool(row[c.EPISODE["solved"]]), len(episode.turns)]
            self._hash.update(json.dumps(head).encode() + b"\n")
            for array in (episode.turns[:, _DIGESTED_TURN_COLUMNS], episode.tokens, episode.label_tokens):
                self._hash.update(np.ascontiguousarray(array).tobytes())
            labelled = int(episode.turns[:, c.TURN["has_label"]].sum())
            solved = int(row[c.EPISODE["solved"]])
            counts = (1, len(episode.turns), labelled, len(episode.tokens), len(episode.label_tokens), solved)
            for name, count in zip(_COUNTS, counts, strict=True):
                self._counts[name] += count

    def manifest(self) -> Manifest:
        return Manifest(round=self._round, digest=self._hash.hexdigest(), **self._counts)


def digest_of(manifests: Iterable[Manifest]) -> str:
    """Return one digest (hex SHA-256) over sealed rounds, in the order of the rounds."""
    total = hashlib.sha256()
    for manifest in sorted(manifests, key=lambda m: m.round):
        total.update(f"{manifest.round}:{manifest.digest}\n".encode())
    return total.hexdigest()
