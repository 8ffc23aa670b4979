"""What a study of methods runs: the arms, the horizons, and the settings of every run.

A run of a study is a ``Cell``: an arm at a horizon, with an amount of labels and a seed. The arms of one horizon,
amount and seed have the same tasks, initial weights, numbers of labels and optimizer steps of each round. They differ
in who acts after round 0, which is SFT on the teacher's episodes in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

from megatron_dagger.config import RunConfig, differing, override
from megatron_dagger.recipes.long_repair import long_repair

RECIPE = "long_repair"
SHORT_KIND = 0  # as a horizon: the repairs of one token that the agent searches with tools
SHORT_KIND_SIZE = 5  # bugs whose lengths are enough for it
HORIZONS = (SHORT_KIND, 1, 2, 4, 8)  # bugs of a task
ROUNDS = 2  # after round 0
SEED_STEP = 1000
# Round 0 trains on so many times the labels of a later one, in so many times the steps. Round 1 wants a student that
# can work: what one that cannot leads to are states that a good student never visits.
FIRST_ROUND_LABELS, FIRST_ROUND_STEPS = 4, 5
# 100 tasks of each horizon; three of the packages have fewer than 16 bugs. None is trained on.
HELDOUT_PACKAGES = ("jsonpointer", "schema", "simpleeval", "tabulate", "texttable", "unidiff", "xmltodict")
# Some packages yield too few tasks; students' episodes may be short.
SPARE_HELDOUT, SPARE_TASKS, SPARE_SFT_TASKS = 1.4, 1.2, 1.1

ARMS: dict[str, tuple[str, ...]] = {
    "sft": ("dagger.beta.start=1.0",),
    "dagger": (),
    "prefix": ("dagger.mixing=prefix", "dagger.takeover_turns=0"),  # and as many turns as fit the horizon
}
# Ablations of the arm dagger. The windows train on fewer labels than the arms do, in as many steps.
VARIANTS: dict[str, tuple[str, ...]] = {
    "window_last": ("dagger.aggregation.window=last", "dagger.aggregation.last_rounds=2"),
    "window_current": ("dagger.aggregation.window=current",),
    "no_takeover": ("dagger.takeover_turns=0",),
    "beta_half": ("dagger.takeover_turns=0", "dagger.beta.start=0.5"),
    "beta_falling": ("dagger.beta.schedule=linear", "dagger.beta.start=0.5", "dagger.beta.decay=0.5"),
    "beta_floor": (
        "dagger.beta.schedule=linear",
        "dagger.beta.start=0.5",
        "dagger.beta.decay=0.5",
        "dagger.beta.floor=0.25",
    ),
}
TURNS_PER_S, STEPS_PER_S, START_S = 50.0, 4.0, 40.0  # on two cores, for the time that a study takes


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A run's place in the study. ``seed`` counts from 0; ``greedy``: evaluated at temperature 0, not 0.7."""

    arm: str
    horizon: int
    amount: int  # labels of each round after round 0
    seed: int
    greedy: bool = False

    @property
    def name(self) -> str:
        return f"{self.arm}-k{self.horizon}-{self.amount}-s{self.seed}" + ("-greedy" if self.greedy else "")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The runs of a study. ``amounts``: of each horizon, ascending. ``variants``: extra arms at the longest horizon."""

    arms: tuple[str, ...] = tuple(ARMS)
    variants: tuple[str, ...] = ()
    amounts: dict[int, tuple[int, ...]]
    seeds: int
    heldout: int
    steps: int  # of each round after round 0
    greedy: bool = True
    settings: tuple[str, ...] = ()  # of all runs

    def all_cells(self) -> Iterator[Cell]:
        """Yield the runs seed by seed, such that a study that is cut short has complete seeds.

        SFT comes first in its group, because the other arms continue from its round 0.
        """
        for seed in range(self.seeds):
            for horizon, amounts in sorted(self.amounts.items()):
                for amount in amounts:
                    variants = self.variants if (horizon, amount) == (max(self.amounts), amounts[0]) else ()
                    for arm in (*self.arms, *variants):
                        for greedy in (False, True) if self.greedy else (False,):
                            yield Cell(arm=arm, horizon=horizon, amount=amount, seed=seed, greedy=greedy)

    def tasks_per_round(self, horizon: int) -> int:
        """Return how many tasks give the horizon's largest amount of labels, with some to spare."""
        return math.ceil(SPARE_TASKS * self.amounts[horizon][-1] / teacher_turns(horizon))

    def sft_tasks(self, horizon: int) -> int:
        """Return how many tasks give the labels of round 0, in which the teacher acts alone."""
        return math.ceil(SPARE_SFT_TASKS * FIRST_ROUND_LABELS * self.amounts[horizon][-1] / teacher_turns(horizon))

    def run_settings(self, cell: Cell) -> list[str]:
        """Return the settings in which the cell's run differs from the recipe."""
        tasks, sft_tasks = self.tasks_per_round(cell.horizon), self.sft_tasks(cell.horizon)
        return [
            *_size(cell.horizon),
            f"seed={1 + SEED_STEP * cell.seed}",
            f"repo_repair.bugs={cell.horizon}",
            f"repo_repair.heldout_packages=[{','.join(HELDOUT_PACKAGES)}]",
            f"repo_repair.train_tasks={sft_tasks + tasks * ROUNDS}",
            f"repo_repair.heldout_tasks={math.ceil(SPARE_HELDOUT * self.heldout)}",
            f"dagger.rounds={ROUNDS}",
            f"dagger.sft_tasks={sft_tasks}",
            f"dagger.tasks_per_round={tasks}",
            f"dagger.evaluation_tasks={self.heldout}",
            "dagger.evaluate_rounds=last",
            f"dagger.aggregation.max_labels_per_round={cell.amount}",
            f"dagger.aggregation.max_sft_labels={FIRST_ROUND_LABELS * cell.amount}",
            f"training.max_steps={self.steps}",
            f"training.max_sft_steps={FIRST_ROUND_STEPS * self.steps}",
            *self.settings,
            *(ARMS | VARIANTS)[cell.arm],
            *_prefix_turns(cell.arm, teacher_turns(cell.horizon)),
            *(["evaluation_sampling.temperature=0.0"] if cell.greedy else []),
        ]

    def config(self, cell: Cell) -> RunConfig:
        """Return the settings of the cell's run. Raises ConfigError."""
        return override(long_repair(), self.run_settings(cell))

    def assumed_seconds(self, cell: Cell) -> float:
        """Return a guess of a run's time; what it takes from other runs costs nothing."""
        turns, first = teacher_turns(cell.horizon), cell.arm == self.arms[0]
        evaluated = turns * self.heldout * (3 if first and not cell.greedy else 2)  # student, take-over, teacher alone
        if cell.greedy:
            return START_S + evaluated / TURNS_PER_S
        steps = self.steps * (ROUNDS + first * FIRST_ROUND_STEPS)
        tasks = ROUNDS * self.tasks_per_round(cell.horizon) + first * self.sft_tasks(cell.horizon)
        collected = turns * tasks
        return START_S + (collected + evaluated) / TURNS_PER_S + steps / STEPS_PER_S


def teacher_turns(horizon: int) -> int:
    """Return about how many turns the teacher needs for a task."""
    return 5 * horizon + 3 if horizon else 20


def parse_amounts(horizons: Sequence[int], texts: Sequence[str]) -> dict[int, tuple[int, ...]]:
    """Return the amounts of each horizon, ascending: N is for every horizon, K:N for horizon K in place of those.

    Raises ValueError for an item that is neither, and for a horizon without an amount.
    """
    everywhere: set[int] = set()
    own: dict[int, set[int]] = {horizon: set() for horizon in horizons}
    for text in texts:
        horizon, colon, amount = text.rpartition(":")
        if not amount.isdigit() or not int(amount) or (colon and horizon not in map(str, horizons)):
            raise ValueError(f"amount {text!r}: write N, or K:N for a horizon K of {', '.join(map(str, horizons))}")
        (own[int(horizon)] if colon else everywhere).add(int(amount))
    amounts = {horizon: tuple(sorted(own[horizon] or everywhere)) for horizon in horizons}
    if without := [str(horizon) for horizon, numbers in amounts.items() if not numbers]:
        raise ValueError(f"horizon {', '.join(without)} has no amount of labels: add N or {without[0]}:N")
    return amounts


def _size(horizon: int) -> list[str]:
    """Return the recipe's lengths of context and episodes for a horizon."""
    recipe, sized = long_repair(), long_repair(horizon or SHORT_KIND_SIZE)
    names = [name for name in differing(sized, recipe) if name != "repo_repair.bugs"]
    return [f"{name}={reduce(getattr, name.split('.'), sized)}" for name in names]


def _prefix_turns(arm: str, turns: int) -> list[str]:
    """Return the settings with which the student's first turns reach the whole horizon in the last round."""
    if arm != "prefix":
        return []
    return [f"dagger.prefix_turns_per_round={math.ceil(turns / ROUNDS)}", f"dagger.prefix_turns_limit={turns}"]
