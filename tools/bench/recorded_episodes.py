"""Labelled episodes made of real agent runs: their lengths, turns and texts are real, their labels a rule's.

Every turn has a label, the recorded action. In a seeded share of the turns the agent executed something
else, its action of the turn before, as agents that are stuck do: there the label is a branch.
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

TRAJECTORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "real_trajectories_64.jsonl.gz"

Turns = list[tuple[np.ndarray, np.ndarray]]  # of each turn (the prompt's new tokens, the action's), (n,) int32


def read(path: Path, vocab_size: int) -> list[Turns]:
    """The turns of every run, in tokens of a byte-level BPE of ``vocab_size`` trained on these texts.

    Raises FileNotFoundError without the file, ValueError for a run that is not system, user, and then
    assistant and user in turn.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give the real trajectories with --trajectories")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        runs = [json.loads(line)["messages"] for line in lines]
    with tempfile.TemporaryDirectory(prefix="real_episodes-") as folder:
        train_tokenizer((message["content"] for run in runs for message in run), vocab_size, Path(folder))
        renderer = ChatRenderer.load(Path(folder))
    return [_turns(run, renderer) for run in runs]


def _turns(run: list[dict[str, str]], renderer: ChatRenderer) -> Turns:
    roles = [message["role"] for message in run]
    texts = [message["content"] for message in run]
    if roles != ["system", *(["user", "assistant"] * len(roles))[: len(roles) - 1]]:
        raise ValueError(f"a run of messages from {roles[:5]}...: not system, then user and assistant in turn")
    turns: Turns = []
    for user, assistant in zip(texts[1::2], texts[2::2], strict=False):
        before = renderer.observation(user, turns[-1][1]) if turns else renderer.opening(texts[0], user)
        turns.append((before, renderer.action(assistant)))
    return turns


def make(
    runs: Sequence[Turns], *, seed: int, longest: int | None = None, branches: float = 0.5
) -> tuple[list[LabelledEpisode], list[LabelledEpisode]]:
    """The labelled episodes of ``runs``, and the same executed tokens with these as their labels.

    An episode ends before the turn that would take it beyond ``longest`` tokens (None: it does not); a
    run whose first turn is longer gives none.
    """
    made = [_episode(run, np.random.default_rng([seed, i]), longest, branches) for i, run in enumerate(runs)]
    pairs = [pair for pair in made if pair is not None]
    return [labelled for labelled, _ in pairs], [executed for _, executed in pairs]


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
