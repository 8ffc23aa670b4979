"""Run a command of megatron-dagger with one part of the method broken: ``... control_breaks BREAK COMMAND ...``.

Each break replaces one function, in the driver and in the training ranks. ``positive_control.py`` shows that its
conditions notice every one of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_dagger.cli.main import main as run_command
from megatron_dagger.dagger import aggregation, loop, mixing
from megatron_dagger.training.data import packing, samples
from megatron_dagger.training.ranks import launch
from megatron_dagger.types import ActedBy, LabelledEpisode, StateLabel


def teacher_always_acts() -> None:
    """Mixing: every round is collected as round 0 is."""
    loop.mixture = lambda config, beta, key: lambda turn: True


def student_always_acts() -> None:
    """Mixing: beta is ignored, so that the SFT arm is a DAgger arm."""
    loop.mixture = lambda config, beta, key: lambda turn: key.round_index == 0


def labels_on_the_path_only() -> None:
    """Labels off the path: only states in which the teacher acts are labelled."""
    decide = mixing.MixtureTurnPolicy.decide

    async def broken(self: mixing.MixtureTurnPolicy, state: Any, turn: int) -> Any:
        decision = await decide(self, state, turn)
        return decision if decision.acted_by is ActedBy.TEACHER else replace(decision, label=None)

    _set(mixing.MixtureTurnPolicy, "decide", broken)


def branches_dropped() -> None:
    """Branches: a label that the episode did not follow is left out."""
    _change_labels(lambda episode: [label for label in episode.labels if _followed(episode, label)])


def branches_misplaced() -> None:
    """Branches: a label that the episode did not follow leaves the trunk a turn too early."""

    def moved(episode: LabelledEpisode) -> list[StateLabel]:
        before = (episode.labels[0], *episode.labels)
        return [
            label if _followed(episode, label) else replace(label, position=previous.position)
            for previous, label in zip(before, episode.labels, strict=False)
        ]

    _change_labels(moved)


def loss_on_all_tokens() -> None:
    """Masks: observations and the student's own actions are targets, too."""

    def trunk_weights(sample: samples.Sample) -> np.ndarray:
        return np.append(np.zeros(1, np.float32), np.ones(sample.trunk_length, np.float32))

    def weight(sample: samples.Sample) -> float:
        return sample.trunk_length + sum(len(branch.tokens) for branch in sample.branches)

    _set(samples.Sample, "trunk_weights", trunk_weights)
    _set(samples.Sample, "weight", property(weight))


def later_rounds_ignored() -> None:
    """Aggregation: every round trains on round 0."""
    _set(aggregation, "select_rounds", lambda config, current, available: [0])


def earlier_rounds_forgotten() -> None:
    """Aggregation: a round trains on its own labels only."""
    _set(aggregation, "select_rounds", lambda config, current, available: [current])


BREAKS: dict[str, tuple[str, Callable[[], None]]] = {  # name -> the arm that it changes, and what applies it
    function.__name__: (arm, function)
    for arm, function in (
        ("dagger", teacher_always_acts),
        ("sft", student_always_acts),
        ("dagger", labels_on_the_path_only),
        ("dagger", branches_dropped),
        ("dagger", branches_misplaced),
        ("dagger", loss_on_all_tokens),
        ("dagger", later_rounds_ignored),
        ("dagger", earlier_rounds_forgotten),
    )
}


def main() -> int:
    name, *command = sys.argv[1:]
    BREAKS[name][1]()
    start = launch.launch

    def start_broken(module_args: Sequence[str], *arguments: Any, **options: Any) -> None:
        start(["tools.check.control_breaks", name, *module_args[1:]], *arguments, **options)

    _set(launch, "launch", start_broken)
    return run_command(command)


def _change_labels(change: Callable[[LabelledEpisode], list[StateLabel]]) -> None:
    """Let the packing see the labels that ``change`` returns for an episode."""
    build = packing.build_samples

    def broken(episode: LabelledEpisode, *arguments: Any) -> tuple[list[samples.Sample], int]:
        return build(replace(episode, labels=tuple(change(episode))), *arguments)

    _set(packing, "build_samples", broken)


def _followed(episode: LabelledEpisode, label: StateLabel) -> bool:
    executed = episode.tokens[label.position : label.position + len(label.tokens)]
    return np.array_equal(executed, label.tokens)


def _set(owner: object, name: str, value: object) -> None:
    setattr(owner, name, value)


if __name__ == "__main__":
    sys.exit(main())
