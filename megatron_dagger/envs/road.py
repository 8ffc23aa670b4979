"""A road, the smallest environment, and one in which DAgger must beat SFT: slips lead where the teacher never is.

A stop shows a sign, or only a number, from which the teacher alone knows the way: the student guesses and gets lost.
Then it needs ``back``, which no teacher's episode shows; another command there ends the walk.
"""

import random

from megatron_dagger.envs.base import Env, Observation
from megatron_dagger.envs.environment import Environment, EnvironmentContext, Expert
from megatron_dagger.types import Message

LETTERS, COMMANDS = "ABCDEFGH", {"road": "go", "lost": "back"}
UNSIGNED, WAY_BACK = 0.2, 2  # the share of stops without a sign; the steps that a slip costs


def next_command(messages: tuple[Message, ...]) -> str:
    """Return the teacher's command for the last place that ``messages`` show."""
    shown = [m.content for m in messages if m.role == "user" and m.content.split()[0] in COMMANDS][-1]
    place, _, name = shown.partition(" ")
    return f"{COMMANDS[place]} {random.Random(int(name)).choice(LETTERS) if name.isdigit() else name}".rstrip()


class Road(Env):
    """A walk along ``stops`` stops. All that is random follows from the task's name and the agent's commands."""

    def __init__(self, task_id: str, stops: int):
        self.task_id, self.draws, self.way = task_id, random.Random(task_id), ["road"] * stops

    def reset(self) -> tuple[str, str]:
        return "Follow the road.", self._look()

    def step(self, command: str) -> Observation:
        if command == next_command((self.seen,)):
            self.way.pop()
        elif self.way[-1] == "lost":
            return Observation(text="nowhere", done=True)
        else:
            self.way += ["lost"] * WAY_BACK
        return Observation(text=self._look() if self.way else "there", done=not self.way)

    def judge(self) -> bool:
        return not self.way

    def _look(self) -> str:
        name = self.draws.randint(100, 999) if self.draws.random() < UNSIGNED else self.draws.choice(LETTERS)
        self.seen = Message(role="user", content=f"road {name}" if self.way[-1] == "road" else self.way[-1])
        return self.seen.content


def load_environment(context: EnvironmentContext) -> Environment:
    road, vocabulary = context.config.road, (*COMMANDS.keys(), *COMMANDS.values(), "user", "assistant")
    return Environment(
        train_tasks=tuple(f"train-{context.config.seed}-{number}" for number in range(road.train_tasks)),
        heldout_tasks=tuple(f"heldout-{number}" for number in range(road.heldout_tasks)),
        make_env=lambda task_id: Road(task_id, road.stops),
        expert=lambda encode: Expert(command=next_command, encode=encode),
        tokenizer_texts=lambda: [f"{word} {x}" for word in vocabulary for x in LETTERS],
    )
