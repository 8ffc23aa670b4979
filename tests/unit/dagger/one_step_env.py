"""Environments of one step that break on demand, and a student with any weights."""

from dataclasses import dataclass, field

from megatron_dagger.envs.base import Observation
from megatron_dagger.sandbox.base import EnvironmentBroken
from megatron_dagger.types import StopReason

TASKS = tuple(f"owner/task-{number}" for number in range(8))


@dataclass
class EnvFactory:
    """Makes environments of one step. A task runs out of memory as many times as ``memory_errors`` gives for it."""

    memory_errors: dict[str, int] = field(default_factory=dict)
    opened: list[str] = field(default_factory=list)

    def make_env(self, task_id):
        self.opened.append(task_id)
        return Env(task_id, self)


@dataclass
class Env:
    task_id: str
    factory: EnvFactory

    def reset(self):
        return "be an agent", self.task_id

    def step(self, command):
        if self.factory.memory_errors.get(self.task_id, 0):
            self.factory.memory_errors[self.task_id] -= 1
            raise EnvironmentBroken("over 512 MiB", StopReason.OUT_OF_MEMORY)
        return Observation(text="", done=True)

    def judge(self):
        return True

    def report(self):
        return {}

    def close(self):
        pass


class Student:
    """Serves any weights."""

    def __init__(self, policy):
        self.policy = policy

    def with_sampling(self, sampling):
        return self.policy

    def sync(self, *arguments):
        pass
