"""A complete Env without a sandbox: guess a number."""

from typing import Self

from megatron_dagger.envs.base import Observation


class GuessEnv:
    def __init__(self, task_id: str):
        self.task_id = task_id
        self.last = ""

    def reset(self) -> tuple[str, str]:
        self.last = ""
        return "Guess a number from 1 to 9.", "Reply with a number."

    def step(self, command: str) -> Observation:
        self.last = command
        if not command.isdigit():
            return Observation(text="not a number", understood=False)
        if command == self.task_id:
            return Observation(text="right", done=True)
        return Observation(text="higher" if int(command) < int(self.task_id) else "lower")

    def judge(self) -> bool:
        return self.last == self.task_id

    def report(self) -> dict[str, object]:
        return {}

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
