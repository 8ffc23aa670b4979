"""Texts like those of repair episodes, to train a small student's tokenizer on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megatron_dagger.envs.repo_repair.env import SYSTEM_MESSAGE
from megatron_dagger.envs.repo_repair.generate import SourceTree
from megatron_dagger.envs.repo_repair.task import RepairTask
from megatron_dagger.envs.repo_repair.tools.swaps import numbered, repairs

REPEATS = 40  # of the fixed texts: they are in every episode, a line of code in few


def texts(trees: Iterable[SourceTree], tasks: Iterable[RepairTask]) -> Iterator[str]:
    """Yield the system message, problem statements, commands, and lines of code as the tools show them."""
    fixed = ["locate", "runtests", "undo", "submit", "edits: 0", "edits: 1", "FAIL 1 of 9\n", "PASS 9"]
    fixed += ["system\n" + SYSTEM_MESSAGE, "assistant\n", "user\n", "untested: none of @1"]
    fixed += ["error: nothing to undo", "error: run locate first", "error: undo the edits first"]
    for _ in range(REPEATS):
        yield from fixed
        yield from (f"view @{rank}\nfix @{rank} {rank}" for rank in range(1, 10))
    for task in tasks:
        yield task.problem_statement
    for tree in trees:
        for path in tree.source_files:
            for number, line in enumerate(tree.files[path].decode(errors="replace").splitlines(), 1):
                fixes = repairs(line)
                if not fixes:
                    continue
                yield f"@{number % 9 + 1} {path}:{number}\n"
                yield f"@{number % 9 + 1}: {line}\n{numbered(fixes)}\nuntested: {len(fixes)}, 1 of @{number % 9 + 1}"
