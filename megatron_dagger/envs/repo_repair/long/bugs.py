"""The bugs of a package that long tasks are composed of: at most one in each function, each caught by tests.

A bug is used if replacing a piece of text in its line once repairs it (``sed 's/wrong/right/'``), if tests fail with it
in repeated runs, and if its line belongs to a function's body, which only tests that call it can feel.
"""

from __future__ import annotations

import ast
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_dagger.envs.repo_repair.generate import SourceTree, choices, covering_tests, task_template
from megatron_dagger.envs.repo_repair.long.rules import OPERATORS
from megatron_dagger.envs.repo_repair.mutate import Mutation
from megatron_dagger.envs.repo_repair.testing import TestBench
from megatron_dagger.sandbox.local import SandboxPool
from megatron_dagger.store.atomic import write_text
from megatron_dagger.text import split_lines

MAX_BUGS = 32  # of one package
MAX_TRIED = 160  # mutations
MAX_COVERING_TESTS = 12
MAX_FAILING_TESTS = 4
REPEATS = 3
LAST_LINE = 999  # every address has three digits

Place = tuple[str, int]  # file and line number


@dataclass(frozen=True, kw_only=True, slots=True)
class Bug:
    """A mistake: in line ``line`` (from 1) of ``path`` the first ``wrong``, a piece of text, must be ``right``."""

    path: str
    line: int
    wrong: str
    right: str
    text: str  # the line with the bug, without its ending
    tests: tuple[str, ...]  # that fail with it

    @property
    def place(self) -> Place:
        return self.path, self.line

    def apply(self, source: str, added: int = 0) -> str:
        """Return the module's source, with ``added`` lines at its top, with the bug."""
        lines = split_lines(source, keepends=True)
        old = lines[self.line + added - 1]
        lines[self.line + added - 1] = self.text + old[len(old.rstrip("\r\n")) :]
        return "".join(lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class BugPool:
    """The bugs of a package, its tests that always pass, and for each of those the places of bugs that it runs."""

    bugs: tuple[Bug, ...]
    runs: Mapping[str, frozenset[Place]]

    def catching(self, bug: Bug, others: list[Bug]) -> list[str]:
        """Return the tests that catch ``bug`` whether or not ``others`` are repaired."""
        places = {other.place for other in others}
        return [test for test in bug.tests if not self.runs[test] & places]

    def untouched(self, bugs: list[Bug]) -> list[str]:
        """Return the tests that run the line of none of ``bugs``."""
        places = {bug.place for bug in bugs}
        return [test for test in sorted(self.runs) if not self.runs[test] & places]


def bug_pool(tree: SourceTree, pool: SandboxPool, path: Path) -> BugPool:
    """Return the package's bugs, found once and kept in ``path``. Raises UnusablePackage, EnvironmentBroken."""
    if not path.exists():
        write_text(path, json.dumps(_to_json(_find(tree, pool))))
    return _from_json(json.loads(path.read_text()))


def _find(tree: SourceTree, pool: SandboxPool) -> BugPool:
    template = task_template(tree)
    chance = random.Random(f"bugs:{tree.name}:{tree.version}")
    bugs: list[Bug] = []
    used: set[tuple[str, int]] = set()  # functions, by file and first line
    functions = {path: dict(_function_of_line(tree.files[path].decode())) for path in tree.source_files}
    with pool.lend() as first, pool.lend() as second:
        benches = (TestBench(first, tree.files), TestBench(second, tree.files))
        reliable, covering = covering_tests(tree, template, REPEATS, benches, pool)
        tried = 0
        for path, mutation in choices(tree, chance):
            function = functions[path].get(mutation.line)
            tests = covering.get((path, mutation.line), [])
            if function is None or (path, function) in used or not tests:
                continue
            pieces = _pieces(tree.files[path].decode(), mutation)
            if pieces is None:
                continue
            tried += 1
            chosen = sorted(chance.sample(tests, min(len(tests), MAX_COVERING_TESTS)))
            failing = _failing(tree, path, mutation, chosen, benches)
            wrong, right = pieces
            bug = Bug(path=path, line=mutation.line, wrong=wrong, right=right, text=mutation.mutated, tests=failing)
            if failing:
                used.add((path, function))
                bugs.append(bug)
            if len(bugs) >= MAX_BUGS or tried >= MAX_TRIED:
                break
    runs: dict[str, set[Place]] = {test: set() for test in reliable}
    for bug in bugs:
        for test in covering[bug.place]:
            runs[test].add(bug.place)
    return BugPool(bugs=tuple(bugs), runs={test: frozenset(places) for test, places in runs.items()})


def _failing(
    tree: SourceTree, path: str, mutation: Mutation, tests: list[str], benches: tuple[TestBench, TestBench]
) -> tuple[str, ...]:
    """Return tests that fail with the bug; none unless they are the same ones in two processes."""
    mutated = mutation.apply(tree.files[path].decode()).encode()
    template = task_template(tree)
    settings = {**template.tool_settings(), "tests": tests, "test_files": sorted({t.partition("::")[0] for t in tests})}
    failing: list[list[str]] = []
    for bench in benches:
        bench.write({path: mutated})
        try:
            run = bench.run(settings)
        finally:
            bench.write({path: tree.files[path]})
        failing.append([test for test in tests if run.outcomes.get(test) == "failed"])
        if run.timed_out or not failing[-1]:
            return ()
    return tuple(failing[0][:MAX_FAILING_TESTS]) if failing[0] == failing[1] else ()


def _pieces(source: str, mutation: Mutation) -> tuple[str, str] | None:
    """Return the wrong and the right text if replacing the first of the one by the other repairs the bug, else None."""
    wrong, right = mutation.bug.new, mutation.bug.old
    if mutation.line > LAST_LINE or not ({wrong, right} <= OPERATORS or (wrong.isdigit() and right.isdigit())):
        return None
    if wrong in OPERATORS:
        wrong, right = f" {wrong} ", f" {right} "
    return (
        (wrong, right) if mutation.mutated.replace(wrong, right, 1) == split_lines(source)[mutation.line - 1] else None
    )


def _function_of_line(source: str) -> Iterator[tuple[int, int]]:
    """Yield (line, first line of the innermost function whose body has it)."""
    for node in ast.walk(ast.parse(source)):  # outer functions come before the functions in them
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for line in range(node.body[0].lineno, (node.end_lineno or 0) + 1):
                yield line, node.lineno


def _to_json(pool: BugPool) -> dict[str, Any]:
    return {"bugs": [asdict(bug) for bug in pool.bugs], "runs": {k: sorted(v) for k, v in pool.runs.items()}}


def _from_json(values: dict[str, Any]) -> BugPool:
    bugs = tuple(Bug(**{**bug, "tests": tuple(bug["tests"])}) for bug in values["bugs"])
    runs = {test: frozenset((path, line) for path, line in places) for test, places in values["runs"].items()}
    return BugPool(bugs=bugs, runs=runs)
