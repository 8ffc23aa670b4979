"""Labelled episodes from recorded agent runs. Lengths, turns and texts are real; the labels follow a rule.

A file of runs is gzipped JSON lines, ``{"messages": [{"role": ..., "content": ...}, ...]}``: a system message, then
user and assistant messages in turn. Every turn's label is the recorded action. In a seeded share of the turns the
executed action is replaced by that of the turn before, as an agent that is stuck repeats itself: the label is then a
branch of the episode's tree.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_dagger.rollout.chat import ChatRenderer
from megatron_dagger.rollout.tokenizer import train_tokenizer
from megatron_dagger.types import LabelledEpisode, StateLabel

Turns = list[tuple[np.ndarray, np.ndarray]]  # for each turn the prompt's new tokens and the action's, (n,) int32


def read(path: Path, vocab_size: int) -> list[Turns]:
    """Return the turns of every run, in tokens of a byte-level BPE of ``vocab_size`` entries trained on these texts.

    Raises FileNotFoundError if there is no such file, ValueError for a run whose messages are not system, user,
    assistant, user, ...
    """
    if not path.is_file():
        raise FileNotFoundError(f"--trajectories {path}: no such file; name gzipped JSON lines of recorded runs")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        runs = [json.loads(line)["messages"] for line in lines]
    with tempfile.TemporaryDirectory(prefix="recorded-episodes-") as folder:
        train_tokenizer((message["content"] for run in runs for message in run), vocab_size, Path(folder))
        renderer = ChatRenderer.load(Path(folder))
    return [_turns(run, renderer) for run in runs]


def _turns(run: list[dict[str, str]], renderer: ChatRenderer) -> Turns:
    roles = [message["role"] for message in run]
    texts = [message["content"] for message in run]
    if roles != ["system", *(["user", "assistant"] * len(roles))[: len(roles) - 1]]:
        raise ValueError(
            f"a run's messages have the roles {roles[:5]}...; expected system, then user and assistant in turn"
        )
    turns: Turns = []
    for user, assistant in zip(texts[1::2], texts[2::2], strict=False):
        before = renderer.observation(user, turns[-1][1]) if turns else renderer.opening(texts[0], user)
        turns.append((before, renderer.action(assistant)))
    return turns


def make(
    runs: Sequence[Turns], *, seed: int, longest: int | None = None, branches: float = 0.5
) -> tuple[list[LabelledEpisode], list[LabelledEpisode]]:
    """Return the labelled episodes of ``runs``, and the same episodes with the executed actions as labels.

    ``branches`` is the share of turns whose executed action differs from the label. An episode is cut before the turn
    that would take it beyond ``longest`` tokens (None: not cut). A run whose first turn is longer is left out.
    """
    pairs = [_episode(run, np.random.default_rng([seed, i]), longest, branches) for i, run in enumerate(runs)]
    kept = [pair for pair in pairs if pair is not None]
    return [labelled for labelled, _ in kept], [executed for _, executed in kept]


def _episode(
    run: Turns, rng: np.random.Generator, longest: int | None, branches: float
) -> tuple[LabelledEpisode, LabelledEpisode] | None:
    tokens: list[np.ndarray] = []
    labels: list[StateLabel] = []
    actions: list[StateLabel] = []
    end = 0
    for index, (prompt, label) in enumerate(run):
        action = run[index - 1][1] if index and rng.random() < branches else label
        start = end + len(prompt)
        if longest is not None and start + max(len(action), len(label)) > longest:
            break
        end = start + len(action)
        tokens += [prompt, action]
        labels.append(StateLabel(position=start, tokens=label))
        actions.append(StateLabel(position=start, tokens=action))
    if not labels:
        return None
    stream = np.concatenate(tokens)
    return LabelledEpisode(tokens=stream, labels=tuple(labels)), LabelledEpisode(tokens=stream, labels=tuple(actions))
