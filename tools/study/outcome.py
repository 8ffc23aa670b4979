"""The numbers of a finished run, as the study keeps them: one small JSON file for each run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_dagger.config import RunConfig, build
from megatron_dagger.dagger.aggregation import select_rounds
from megatron_dagger.dagger.context import round_dir, train_manifest
from megatron_dagger.driver.run_dir import COLLECTED, EVALUATED, REFERENCES, load_run_config
from megatron_dagger.observability.metrics import read_lines
from megatron_dagger.store.aggregated import DataStore
from megatron_dagger.store.atomic import read_json, write_json
from megatron_dagger.types import ActedBy
from tools.study.plan import Cell


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished run. ``by_depth``: as in ``evaluation.drift.errors``; turns and errors, on and off the path."""

    cell: Cell
    seconds: float  # that the study waited for it
    solved: dict[str, bool]  # each held-out task, in the last round; an abandoned one is not solved
    turns: float  # median of the student's episodes
    teacher_turns: float  # median of the teacher's episodes of these tasks
    labels: tuple[int, ...]  # that each round's training read
    labels_due: tuple[int, ...]  # by the settings
    steps: tuple[int, ...]
    executed_tokens: int  # of the teacher, in all collections
    labelled_tokens: int  # likewise; executed ones are labels too
    by_depth: tuple[tuple[int, int, int, int, int], ...]
    visited_states: int
    new_states: int  # of these, never in the teacher's episodes
    takeovers: int  # from states off the path
    takeovers_solved: int

    @property
    def success(self) -> float:
        return sum(self.solved.values()) / len(self.solved)

    def errors(self, *, on_path: bool) -> tuple[int, int]:
        """Return the turns on or off the teacher's path, and the errors in them."""
        first = 1 if on_path else 3
        return sum(row[first] for row in self.by_depth), sum(row[first + 1] for row in self.by_depth)


def read_outcome(run_dir: Path, cell: Cell, seconds: float) -> Outcome:
    """Read a finished run, whose evaluation is diagnosed."""
    config = load_run_config(run_dir)
    last = config.dagger.rounds
    trained = [read_json(train_manifest(run_dir, index)) for index in range(last + 1)]
    evaluation = read_json(round_dir(run_dir, last) / "evaluate.json")
    drift, takeovers = evaluation["drift"], evaluation["drift"]["expert_from_student_states"]
    heldout = {row["instance_id"] for row in read_lines(run_dir / "tasks" / "heldout.jsonl")}
    evaluated = DataStore.open(run_dir / EVALUATED)
    solved = {episode.task_id: episode.solved for episode in evaluated.episodes(last)}
    solved |= dict.fromkeys(evaluated.abandoned(last).tasks() - solved.keys(), False)
    executed, labelled = _teacher_tokens(DataStore.open(run_dir / COLLECTED))
    return Outcome(
        cell=cell,
        seconds=seconds,
        solved={task: solved[task] for task in sorted(solved) if task in heldout},
        turns=evaluation["heldout"]["median_turns"],
        teacher_turns=statistics.median(len(e.turns) for e in DataStore.open(run_dir / REFERENCES).episodes(0)),
        labels=tuple(manifest["labels"] for manifest in trained),
        labels_due=labels_due(config),
        steps=tuple(manifest["steps"] for manifest in trained),
        executed_tokens=executed,
        labelled_tokens=labelled,
        by_depth=tuple(tuple(row) for row in drift["by_depth"]),
        visited_states=drift["visited_states"],
        new_states=drift["new_states"],
        takeovers=takeovers["tried"],
        takeovers_solved=takeovers["solved"],
    )


def labels_due(config: RunConfig) -> tuple[int, ...]:
    """Return how many labels each round must be trained on if every collection has enough."""
    aggregation, rounds = config.dagger.aggregation, range(config.dagger.rounds + 1)
    chosen = (select_rounds(aggregation, index, rounds) for index in rounds)
    return tuple(sum(aggregation.max_labels(number) or 0 for number in numbers) for numbers in chosen)


def save(path: Path, outcome: Outcome) -> None:
    """Write an outcome, atomically."""
    write_json(path, asdict(outcome))


def load(path: Path) -> Outcome:
    """Read what ``save`` wrote. Raises ConfigError for the file of another version, UnreadableFileError."""
    return build(Outcome, read_json(path))


def unmatched(outcomes: Iterable[Outcome]) -> list[str]:
    """Return which runs were not trained on the labels due, and which groups of arms not in equal steps."""
    problems: list[str] = []
    groups: dict[tuple[int, int, int], list[Outcome]] = {}
    for outcome in outcomes:
        if not outcome.cell.greedy:
            cell = outcome.cell
            groups.setdefault((cell.horizon, cell.amount, cell.seed), []).append(outcome)
            if outcome.labels != outcome.labels_due:
                problems.append(f"{cell.name}: trained on {outcome.labels} labels, not {outcome.labels_due}")
    for group in groups.values():
        if len({outcome.steps for outcome in group}) > 1:
            steps = ", ".join(f"{outcome.cell.name} {outcome.steps}" for outcome in group)
            problems.append(f"the steps differ: {steps}")
    return problems


def _teacher_tokens(store: DataStore) -> tuple[int, int]:
    """Return the teacher's tokens in all collections: executed, and in labels."""
    executed = labelled = 0
    for index in store.rounds():
        for episode in store.episodes(index):
            for turn in episode.turns:
                labelled += len(turn.label.tokens) if turn.label is not None else 0
                executed += len(turn.action.tokens) if turn.acted_by is ActedBy.TEACHER else 0
    return executed, labelled
