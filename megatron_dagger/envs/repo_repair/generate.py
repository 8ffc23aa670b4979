"""Make repair tasks: mutate a package, and accept the mutations that its own tests detect and can localise.

A task is accepted only if
- a test fails on the mutated tree that passes on the original, and the gold patch makes it pass again;
- repeated runs of either tree, in several processes, agree, and no test reaches its time limit;
- a search through the lines that the fault localiser lists finds the repair within the configured number of tries.
Nothing depends on the clock or the number of workers: the same package, seed and settings give the same tasks.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_dagger.config import RepoRepairConfig
from megatron_dagger.envs.repo_repair.episode import tree_diff
from megatron_dagger.envs.repo_repair.mutate import Mutation, sites
from megatron_dagger.envs.repo_repair.repository import make_repository
from megatron_dagger.envs.repo_repair.task import RepairTask
from megatron_dagger.envs.repo_repair.testing import TestBench, TestRun
from megatron_dagger.envs.repo_repair.tools.swaps import repairs
from megatron_dagger.sandbox.local import SandboxPool
from megatron_dagger.text import split_lines

MAX_COVERING_TESTS = 12  # run on a mutant to see whether any fails
MAX_FAILING_TESTS = 4
MAX_PASSING_TESTS = 6  # half of them do not run the line: they lower the suspicion of other lines
MAX_NAMED_TESTS = 2  # in the problem statement


@dataclass(frozen=True, kw_only=True)
class SourceTree:
    """A package with its tests, as files of a work tree."""

    name: str
    version: str
    files: Mapping[str, bytes]
    source_files: tuple[str, ...]  # what may be mutated
    test_files: tuple[str, ...]
    python_paths: tuple[str, ...]
    pytest_args: tuple[str, ...] = ()


class UnusablePackage(ValueError):
    """A package's own tests do not pass in the sandbox, so they cannot show a bug."""


def make_tasks(
    tree: SourceTree, count: int, seed: int, config: RepoRepairConfig, pool: SandboxPool, repositories: Path
) -> list[RepairTask]:
    """Return up to ``count`` accepted tasks from one package, and write their repositories below ``repositories``.

    Raises UnusablePackage, EnvironmentBroken.
    """
    template = replace(task_template(tree), suspects=config.suspects)
    chance = random.Random(f"{seed}:{tree.name}:{tree.version}")
    tasks: list[RepairTask] = []
    used: set[tuple[str, int]] = set()
    with pool.lend() as first, pool.lend() as second:
        benches = (TestBench(first, tree.files), TestBench(second, tree.files))
        reliable, covering = covering_tests(tree, template, config.repeats, benches, pool)
        for path, mutation in choices(tree, chance):
            if len(tasks) >= count:
                break
            tests = covering.get((path, mutation.line), [])
            if (path, mutation.line) in used or not tests:
                continue
            files = {test.partition("::")[0] for test in tests}
            others = [test for test in reliable if test.partition("::")[0] in files and test not in set(tests)]
            chosen = sorted(chance.sample(tests, min(len(tests), MAX_COVERING_TESTS)))
            chosen += sorted(chance.sample(others, min(len(others), MAX_PASSING_TESTS // 2)))
            task = _accept(tree, template, path, mutation, chosen, config, benches)
            if task is not None:
                used.add((path, mutation.line))
                broken = {**tree.files, path: mutation.apply(tree.files[path].decode()).encode()}
                commit = make_repository(repositories / task.instance_id, broken)
                tasks.append(replace(task, base_commit=commit, environment_setup_commit=commit))
    return tasks


def task_template(tree: SourceTree) -> RepairTask:
    """Return a task with the package's fields; the others are empty."""
    return RepairTask(
        instance_id="",
        repo=tree.name,
        version=tree.version,
        base_commit="",
        problem_statement="",
        patch="",
        FAIL_TO_PASS="[]",
        PASS_TO_PASS="[]",
        source_files=tree.source_files,
        python_paths=tree.python_paths,
        pytest_args=tree.pytest_args,
    )


def choices(tree: SourceTree, chance: random.Random) -> list[tuple[str, Mutation]]:
    """Return every mutation of the package, shuffled, in an order that takes the operators in turn."""
    by_operator: dict[str, list[tuple[str, Mutation]]] = {}
    for path in tree.source_files:
        for mutation in sites(tree.files[path].decode()):
            by_operator.setdefault(mutation.operator, []).append((path, mutation))
    for mutations in by_operator.values():
        chance.shuffle(mutations)
    turns = sorted((turn, name) for name, mutations in by_operator.items() for turn in range(len(mutations)))
    return [by_operator[name][turn] for turn, name in turns]


def covering_tests(
    tree: SourceTree,
    template: RepairTask,
    repeats: int,
    benches: tuple[TestBench, TestBench],
    pool: SandboxPool,
) -> tuple[list[str], dict[tuple[str, int], list[str]]]:
    """Return the tests that pass in every one of ``repeats`` runs, and by line of the original those that run it.

    Raises UnusablePackage if there are none.
    """
    settings = {**template.tool_settings(), "tests": None, "test_files": list(tree.test_files)}
    runs = [bench.run(settings, trace=bench is benches[0]) for bench in benches[:repeats]]
    for _ in range(repeats - len(runs)):
        # A new process each time: the order of a set, and with it the names of parametrised tests, can differ between
        # processes but not within one.
        with pool.lend(fresh=True) as sandbox:
            runs.append(TestBench(sandbox, tree.files).run(settings))
    traced = runs[0]
    reliable = {test for test in traced.outcomes if all(run.outcomes.get(test) == "passed" for run in runs)}
    if not reliable:
        raise UnusablePackage(f"{tree.name} {tree.version}: none of its tests passes {repeats} times in the sandbox")
    covering: dict[tuple[str, int], list[str]] = {}
    for test in sorted(reliable):
        for line in traced.lines.get(test, []):
            covering.setdefault(line, []).append(test)
    return sorted(reliable), covering


def _accept(
    tree: SourceTree,
    template: RepairTask,
    path: str,
    mutation: Mutation,
    tests: list[str],
    config: RepoRepairConfig,
    benches: tuple[TestBench, TestBench],
) -> RepairTask | None:
    """Return the task of a mutation, or None if it is not accepted.

    ``benches`` have the original tree before and after the call.
    """
    mutated = mutation.apply(tree.files[path].decode()).encode()
    bench, other = benches
    for each in benches:
        each.write({path: mutated})
    try:
        first = bench.run(replace(template, FAIL_TO_PASS=json.dumps(tests)).tool_settings())
        failing = [test for test in tests if first.outcomes.get(test) == "failed"]
        passing = [test for test in tests if first.outcomes.get(test) == "passed"]
        if first.timed_out or not failing:
            return None
        task = replace(
            template,
            instance_id=f"{tree.name}__{_slug(path)}-{mutation.line}-{mutation.bug.nth}-{mutation.operator}",
            operator=mutation.operator,
            patch=tree_diff({**tree.files, path: mutated}, tree.files),
            FAIL_TO_PASS=json.dumps(failing[:MAX_FAILING_TESTS]),
            PASS_TO_PASS=json.dumps(passing[-MAX_PASSING_TESTS:]),
        )
        task = replace(task, problem_statement=_statement(task))
        traced = other.run(task.tool_settings(), trace=True)
        cost = _repairs_before(traced.suspects, {**tree.files, path: mutated}, path, mutation)
        in_reach = cost is not None and config.fewest_repairs <= cost <= config.most_repairs
        if not in_reach or not _as_expected(traced, task):
            return None
        again = itertools.islice(itertools.cycle(benches), config.repeats - 2)
        if not all(_as_expected(each.run(task.tool_settings()), task) for each in again):
            return None
    finally:
        for each in benches:
            each.write({path: tree.files[path]})
    # The gold patch restores the original tree, on which these tests have passed among others: this run shows that
    # they also pass alone.
    return task if other.run(task.tool_settings()).passed(task.tests) else None


def _as_expected(run: TestRun, task: RepairTask) -> bool:
    failed = all(run.outcomes.get(test) == "failed" for test in task.fail_to_pass)
    return failed and run.passed(task.pass_to_pass)


def _repairs_before(
    suspects: tuple[tuple[str, int], ...], files: Mapping[str, bytes], path: str, mutation: Mutation
) -> int | None:
    """Return how many repairs of the suspect lines come before the right one; None if it is not among them."""
    count = 0
    for name, number in suspects:
        text = split_lines(files[name].decode())[number - 1]
        for candidate in repairs(text):
            if (name, number) == (path, mutation.line) and candidate.new == mutation.bug.old:
                return count
            count += 1
    return None


def _slug(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".")


def _statement(task: RepairTask) -> str:
    failing = task.fail_to_pass
    named = failing[:MAX_NAMED_TESTS]
    more = f"\nand {len(failing) - len(named)} more" if len(failing) > len(named) else ""
    count = f"{len(failing)} of {len(task.tests)}"
    return f"{task.repo} {task.version}: {count} tests fail.\n" + "\n".join(named) + more
