"""The checks by name, in the order in which they are run: later ones use what earlier ones found."""

from __future__ import annotations

from megatron_dagger.driver.doctor import gpus, machine, parts, ranks
from megatron_dagger.driver.doctor.examination import Check

CHECKS: dict[str, Check] = {
    "packages": machine.packages,
    "gpus": gpus.gpus,
    "memory": gpus.memory,
    "processors": machine.processors,
    "shared_memory": machine.shared_memory,
    "disk": machine.disk,
    "locks": machine.locks,
    "ranks": ranks.ranks,
    "model": parts.model,
    "tasks": parts.tasks,
    "sandbox": parts.sandbox,
    "teacher": parts.teacher,
}
FIRST_NODE_ONLY = frozenset({"model", "teacher"})  # the same on every node
