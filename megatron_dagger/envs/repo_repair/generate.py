"""Making repair tasks: mutate a package, admit what its own tests show and can localise.

A task is admitted only if some test of the mutated tree fails that passes on the original, the gold
patch brings it back, repeated runs of either agree (in several processes), no test runs into its time
limit, and a search through the lines that the fault localiser lists comes upon the repair in time.
Nothing depends on the clock or on the number of workers: the same package, seed and settings give the
same tasks.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_dagger.config import RepoRepairConfig
from megatron_dagger.envs.repo_repair.env import tree_diff
from megatron_dagger.envs.repo_repair.mutate import Mutation, sites
from megatron_dagger.envs.repo_repair.repository import make_repository
from megatron_dagger.envs.repo_repair.task import RepairTask
from megatron_dagger.envs.repo_repair.testing import TestBench, TestRun
from megatron_dagger.envs.repo_repair.tools.swaps import repairs
from megatron_dagger.sandbox import SandboxPool

MOST_COVERING_TESTS = 12  # run on a mutant to see whether any notices
MOST_FAILING_TESTS = 4
MOST_PASSING_TESTS = 6  # half of them not running the line: they clear other lines of suspicion
MOST_LISTED_TESTS = 2  # names in the problem statement


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
    """A package's own tests do not pass in the sandbox, so no bug could be seen there."""


def make_tasks(
    tree: SourceTree, count: int, seed: int, config: RepoRepairConfig, pool: SandboxPool, repositories: Path
) -> list[RepairTask]:
    """Up to ``count`` admitted tasks from one package, their repositories below ``repositories``.

    Raises UnusablePackage, EnvironmentBroken.
    """
    template = RepairTask(
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
        suspects=config.suspects,
    )
    chance = random.Random(f"{seed}:{tree.name}:{tree.version}")
    tasks: list[RepairTask] = []
    used: set[tuple[str, int]] = set()
    with pool.lend() as one, pool.lend() as other:
        benches = (TestBench(one, tree.files), TestBench(other, tree.files))
        reliable, covering = _covering_tests(tree, template, config.repeats, benches, pool)
        for path, mutation in _choices(tree, chance):
            if len(tasks) >= count:
                break
            tests = covering.get((path, mutation.line), [])
            if (path, mutation.line) in used or not tests:
                continue
            files = {test.partition("::")[0] for test in tests}
            others = [test for test in reliable if test.partition("::")[0] in files and test not in set(tests)]
            chosen = sorted(chance.sample(tests, min(len(tests), MOST_COVERING_TESTS)))
            chosen += sorted(chance.sample(others, min(len(others), MOST_PASSING_TESTS // 2)))
            task = _admit(tree, template, path, mutation, chosen, config, benches)
            if task is not None:
                used.add((path, mutation.line))
                broken = {**tree.files, path: mutation.apply(tree.files[path].decode()).encode()}
                commit = make_repository(repositories / task.instance_id, broken)
                tasks.append(replace(task, base_commit=commit, environment_setup_commit=commit))
    return tasks


def _choices(tree: SourceTree, chance: random.Random) -> list[tuple[str, Mutation]]:
    """Every mutation of the package in an order that takes the operators in turn."""
    by_operator: dict[str, list[tuple[str, Mutation]]] = {}
    for path in tree.source_files:
        for mutation in sites(tree.files[path].decode()):
            by_operator.setdefault(mutation.operator, []).append((path, mutation))
    for found in by_operator.values():
        chance.shuffle(found)
    turns = sorted((turn, name) for name, found in by_operator.items() for turn in range(len(found)))
    return [by_operator[name][turn] for turn, name in turns]


def _covering_tests(
    tree: SourceTree,
    template: RepairTask,
    repeats: int,
    benches: tuple[TestBench, TestBench],
    pool: SandboxPool,
) -> tuple[list[str], dict[tuple[str, int], list[str]]]:
    """The tests that pass whenever they are run, and for each line of the original those that run it."""
    settings = {**template.tool_settings(), "tests": None, "test_files": list(tree.test_files)}
    runs = [bench.run(settings, trace=bench is benches[0]) for bench in benches[:repeats]]
    for _ in range(repeats - len(runs)):
        # A process of its own each time: the order of a set, and so the names of parametrised tests,
        # can differ between processes and be the same in each.
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


def _admit(
    tree: SourceTree,
    template: RepairTask,
    path: str,
    mutation: Mutation,
    tests: list[str],
    config: RepoRepairConfig,
    benches: tuple[TestBench, TestBench],
) -> RepairTask | None:
    """The task of one mutation, or None; ``benches`` hold the original tree, before and after."""
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
            FAIL_TO_PASS=json.dumps(failing[:MOST_FAILING_TESTS]),
            PASS_TO_PASS=json.dumps(passing[-MOST_PASSING_TESTS:]),
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
    # The gold patch gives the original tree, in which these tests passed repeatedly already,
    # though among others: this run shows that they need no others.
    return task if other.run(task.tool_settings()).passed(task.tests) else None


def _as_expected(run: TestRun, task: RepairTask) -> bool:
    failed = all(run.outcomes.get(test) == "failed" for test in task.fail_to_pass)
    return failed and run.passed(task.pass_to_pass)


def _repairs_before(
    suspects: tuple[tuple[str, int], ...], files: Mapping[str, bytes], path: str, mutation: Mutation
) -> int | None:
    """How many repairs of the listed lines stand before the right one; None where it is not listed."""
    count = 0
    for name, number in suspects:
        text = files[name].decode().splitlines()[number - 1]
        for candidate in repairs(text):
            if (name, number) == (path, mutation.line) and candidate.new == mutation.bug.old:
                return count
            count += 1
    return None


def _slug(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".")


def _statement(task: RepairTask) -> str:
    failing = task.fail_to_pass
    named = failing[:MOST_LISTED_TESTS]
    more = f"\nand {len(failing) - len(named)} more" if len(failing) > len(named) else ""
    count = f"{len(failing)} of {len(task.tests)}"
    return f"{task.repo} {task.version}: {count} tests fail.\n" + "\n".join(named) + more
