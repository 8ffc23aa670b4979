"""An environment of one's own with its recipe: copy this file, and change it.

megatron-dagger run runs/own --recipe own_environment:guess_a_number tasks.options.highest=99
"""

import random
import re

from megatron_dagger.config import RunConfig, override
from megatron_dagger.envs.base import Env, Observation
from megatron_dagger.envs.environment import Environment, EnvironmentContext, Expert
from megatron_dagger.recipes.positive_control import positive_control
from megatron_dagger.types import Message


class GuessEnv(Env):
    """Guess a number. All that happens follows from the task's name and the agent's commands."""

    def __init__(self, task_id: str, highest: int):
        self.task_id, self.highest, self.solved = task_id, highest, False
        self.number = random.Random(task_id).randint(1, highest)

    def reset(self) -> tuple[str, str]:
        return "Guess the number.", f"between 1 and {self.highest}"

    def step(self, command: str) -> Observation:
        if not re.fullmatch("[0-9]{1,9}", command):
            return Observation(text="not a number", understood=False)
        self.solved = int(command) == self.number
        answer = "right" if self.solved else "higher" if int(command) < self.number else "lower"
        return Observation(text=f"{answer} {command}", done=self.solved)

    def judge(self) -> bool:
        return self.solved


def halve(messages: tuple[Message, ...]) -> str:
    """Return the teacher's command: the middle of what is still possible by the messages."""
    shown = "\n".join(message.content for message in messages if message.role == "user")
    answers = re.findall(r"(higher|lower) (\d+)", shown)
    low = max([1, *(int(number) + 1 for answer, number in answers if answer == "higher")])
    high = min([int(shown.split()[3]), *(int(number) - 1 for answer, number in answers if answer == "lower")])
    return str((low + high) // 2)


def load(context: EnvironmentContext) -> Environment:
    highest = context.config.tasks.options.get("highest", 31)
    return Environment(
        train_tasks=tuple(f"train-{n}" for n in range(780)),
        heldout_tasks=tuple(f"heldout-{n}" for n in range(100)),
        make_env=lambda task_id: GuessEnv(task_id, highest),
        expert=lambda encode: Expert(command=halve, encode=encode),
        tokenizer_texts=lambda: [f"{word} {n}" for word in ("higher", "lower", "right") for n in range(highest)],
    )


def guess_a_number() -> RunConfig:
    """A tiny Qwen3 learns to guess a number; CPU, one process, a minute."""
    return override(positive_control(), ["name=guess", "road.stops=0", f"tasks.kind={__name__}:load"])
