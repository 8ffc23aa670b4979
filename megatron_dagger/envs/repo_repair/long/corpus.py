"""Texts like those of long repairs, to train a small student's tokenizer on."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_dagger.envs.repo_repair.long.env import SYSTEM_MESSAGE
from megatron_dagger.envs.repo_repair.long.expert import (
    ALL_TESTS,
    DIFF,
    DISCARD,
    READ,
    READ_MORE,
    RESTART,
    TAKE,
    TEST,
    take_back,
)
from megatron_dagger.envs.repo_repair.long.rules import OPERATORS
from megatron_dagger.envs.repo_repair.long.tasks import FILES, FOLDERS
from megatron_dagger.envs.repo_repair.taskset import TaskSet

REPEATS = 200  # of the fixed texts: they are in every episode, a line of code in few


def long_texts(tasks: TaskSet) -> Iterator[str]:
    """Yield the system message, problem statements, commands and what they print, and lines of code."""
    fixed = [
        READ,
        READ_MORE,
        TEST,
        TAKE,
        DIFF,
        DISCARD,
        RESTART,
        take_back(1),
        ALL_TESTS,
        "submit",
        "cd",
        "1 passed",
        "1 failed, 2 passed",
        "2 error",
    ]
    fixed += ["system\n" + SYSTEM_MESSAGE, "assistant\n", "user\n", "nothing to commit, working tree clean"]
    fixed += ["--- a/", "+++ b/", "Updated 1 path from the index", "On branch main", ": No such file or directory"]
    for folder in FOLDERS:
        fixed += [f"cd {folder}", f" a/{folder}", f" b/{folder}", f"/' {folder}", f"s' {folder}"]
    fixed += [f"/{file}.py rule \n sed: can't read /{file}.py" for file in FILES]
    fixed += [f"s/ {operator} / {operator} /' {folder}" for operator in sorted(OPERATORS) for folder in FOLDERS[:3]]
    for _ in range(REPEATS):
        yield from fixed
    for task in tasks.train:
        yield task.problem_statement
    for tree in tasks.trees:
        for path in tree.source_files:
            yield from tree.files[path].decode(errors="replace").splitlines()[::10]
