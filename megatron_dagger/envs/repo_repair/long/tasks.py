"""Compose long repair tasks: K bugs of a package, a comment and a list of tests for each.

The repository of a task has the package with the bugs and a folder ``todo`` of three files with a line for each bug:
``list`` says where the wrong token is and what it must be, or only the number of the rule that it breaks
(``rules.py``); ``more`` says it in any case; ``tests`` names tests that fail because of it. ``all.tests`` lists every
test of the task. The tests of each line pass once its bug and those before it are repaired.
"""

from __future__ import annotations

import json
import logging
import random
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from megatron_dagger.config import RepoRepairConfig
from megatron_dagger.envs.environment import Track
from megatron_dagger.envs.repo_repair.episode import tree_diff
from megatron_dagger.envs.repo_repair.generate import SourceTree, UnusablePackage, task_template
from megatron_dagger.envs.repo_repair.long.bugs import LAST_LINE, Bug, BugPool, bug_pool
from megatron_dagger.envs.repo_repair.long.rules import rules_of
from megatron_dagger.envs.repo_repair.repository import make_repository
from megatron_dagger.envs.repo_repair.task import RepairTask, read_tasks, write_tasks
from megatron_dagger.envs.repo_repair.taskset import TaskSet, by_tree, cache_key, in_turn, source_trees
from megatron_dagger.envs.repo_repair.testing import TestBench
from megatron_dagger.sandbox.local import SandboxPool

logger = logging.getLogger(__name__)

TODO = "todo"
# Modules with bugs are moved to names drawn for each task and begin with as many comment lines as were drawn, so that a
# student must read addresses and cannot know them by heart. In a moved module's place remains one that executes the
# moved code as its own, which it loads as an import does (tools/code_cache.py).
FOLDERS = ("api", "base", "core", "data", "engine", "forms", "lang", "plugins", "server", "tools")
FILES = ("cache", "index", "model", "node", "parser", "query", "route", "store", "table", "tree", "utils", "view")
INCLUDE = """\
import importlib.machinery, pathlib
_code = pathlib.Path(__file__).parents[{up}] / "{place}"
exec(importlib.machinery.SourceFileLoader(__name__, str(_code)).get_code(__name__))
"""
# The arguments of sed, which a small student learns to copy soonest
COMMENT = re.compile(r"'(?P<line>\d+)s/(?P<wrong>[^/]+)/(?P<right>[^/]+)/' (?P<path>\S+)")
TERSE_COMMENT = re.compile(r"'(?P<line>\d+)s' (?P<path>\S+) rule (?P<rule>\d+)")
TESTS_PER_BUG = 2
MAX_PASSING_TESTS = 4
TRIES = 20  # compositions for one task
# Modules whose code decides which bugs are found, and which tasks are made of them
BUG_MODULES = ("generate", "mutate", "sources", "testing", "long/bugs")
TASK_MODULES = (*BUG_MODULES, "repository", "task", "long/rules", "long/tasks")


def prepare_long_tasks(
    config: RepoRepairConfig, seed: int, cache_dir: Path, pool: SandboxPool, track: Track
) -> TaskSet:
    """Return tasks of ``config.bugs`` bugs each; make those that the cache lacks. Same arguments, same tasks.

    Raises ConfigError if a package is unknown or a side gets no task, FetchError if a package cannot be downloaded.
    """
    train, heldout = source_trees(config, cache_dir)
    bugs_folder = cache_dir / "bugs" / cache_key(BUG_MODULES, [config.source])
    folder = cache_dir / "long_tasks" / cache_key(TASK_MODULES, [config.source, config.bugs, config.terse, seed])

    def tasks_of(tree: SourceTree, count: int) -> list[RepairTask]:
        path = folder / f"{tree.name}-{count}.jsonl"
        if not path.exists():
            try:
                bugs = bug_pool(tree, pool, bugs_folder / f"{tree.name}.json")
            except UnusablePackage as error:
                logger.warning("%s; the package is skipped", error)
                return []
            write_tasks(path, list(compose(tree, bugs, config, count, seed, pool, folder / "repos")))
        return read_tasks(path)

    quotas = [(tree, -(-config.train_tasks // len(train))) for tree in train]
    quotas += [(tree, -(-config.heldout_tasks // len(heldout))) for tree in heldout]
    by_name = by_tree(tasks_of, quotas, track)
    return TaskSet(
        train=in_turn(by_name, train, config.train_tasks, "train"),
        heldout=in_turn(by_name, heldout, config.heldout_tasks, "heldout"),
        repositories=folder / "repos",
        trees=tuple(train),
    )


def comment(path: str, line: int, bug: Bug) -> str:
    """Return the comment on a bug: the arguments of sed that repair it; ``COMMENT`` reads it."""
    return f"'{line:03}s/{bug.wrong}/{bug.right}/' {path}\n"


def terse_comment(path: str, line: int, rule: int) -> str:
    """Return the comment on a bug that breaks a rule; ``TERSE_COMMENT`` reads it."""
    return f"'{line:03}s' {path} rule {rule}\n"


def repairs(files: Mapping[str, bytes]) -> Iterator[dict[str, bytes]]:
    """Yield each module as one repair after the other, in the order of the task's list, leaves it."""
    modules = dict(files)
    for said in files[f"{TODO}/more"].decode().splitlines():
        match = COMMENT.fullmatch(said)
        assert match, said
        path, number = match["path"], int(match["line"]) - 1
        lines = modules[path].decode().splitlines(keepends=True)
        lines[number] = lines[number].replace(match["wrong"], match["right"], 1)
        modules[path] = "".join(lines).encode()
        yield {path: modules[path]}


def compose(
    tree: SourceTree, bugs: BugPool, config: RepoRepairConfig, count: int, seed: int, pool: SandboxPool,
    repositories: Path,
) -> Iterator[RepairTask]:  # fmt: skip
    """Yield up to ``count`` different tasks whose tests fail and pass as they should; write their repositories."""
    chance = random.Random(f"{seed}:{tree.name}:{tree.version}:{config.bugs}")
    seen: set[tuple[Bug, ...]] = set()
    with pool.lend() as sandbox:
        bench = TestBench(sandbox, tree.files)
        for number in range(count):
            for _ in range(TRIES):
                chosen = _ordered_bugs(bugs, config.bugs, chance)
                if chosen is None or tuple(chosen) in seen:
                    continue
                seen.add(tuple(chosen))
                name = f"{tree.name}__{config.bugs}-{seed}-{number}"
                task, files = _task(tree, bugs, chosen, name, config.terse, chance)
                if _as_expected(bench, tree, task, files):
                    commit = make_repository(repositories / task.instance_id, files)
                    yield replace(task, base_commit=commit, environment_setup_commit=commit)
                    break


def _ordered_bugs(bugs: BugPool, count: int, chance: random.Random) -> list[Bug] | None:
    """Return ``count`` bugs such that each has tests that run no line of a later one; None if none were found."""
    chosen: list[Bug] = []
    for bug in chance.sample(bugs.bugs, len(bugs.bugs)):
        for position in chance.sample(range(len(chosen) + 1), len(chosen) + 1):
            more = [*chosen[:position], bug, *chosen[position:]]
            if all(bugs.catching(each, more[number + 1 :]) for number, each in enumerate(more)):
                chosen = more
                break
        if len(chosen) == count:
            return chosen
    return None


def _task(
    tree: SourceTree, bugs: BugPool, chosen: list[Bug], name: str, terse: float, chance: random.Random
) -> tuple[RepairTask, dict[str, bytes]]:
    """Return a task without its commit, and the files of its repository."""
    places = _new_places(tree, {bug.path for bug in chosen}, chance)
    fixed = dict(tree.files)
    added: dict[str, int] = {}  # lines at the top of a module
    for path, place in places.items():
        last = max(bug.line for bug in chosen if bug.path == path)
        added[path] = chance.randint(0, LAST_LINE - last)
        fixed[place] = b"#\n" * added[path] + tree.files[path]
        fixed[path] = INCLUDE.format(up=path.count("/"), place=place).encode()
    files = dict(fixed)
    tests: list[list[str]] = []
    for number, bug in enumerate(chosen, 1):
        place = places[bug.path]
        files[place] = bug.apply(files[place].decode(), added[bug.path]).encode()
        tests.append(bugs.catching(bug, chosen[number:])[:TESTS_PER_BUG])
    failing = sorted({test for each in tests for test in each})
    modules = {test.partition("::")[0] for test in failing}
    untouched = [test for test in bugs.untouched(chosen) if test.partition("::")[0] in modules]
    passing = sorted(chance.sample(untouched, min(len(untouched), MAX_PASSING_TESTS)))
    task = replace(
        task_template(tree),
        instance_id=name,
        problem_statement=f"{TODO}/list",
        patch=tree_diff(files, fixed),
        FAIL_TO_PASS=json.dumps(failing),
        PASS_TO_PASS=json.dumps(passing),
        source_files=tuple(sorted(places.values())),
    )
    comments = more = named = ""
    for bug, each in zip(chosen, tests, strict=True):
        place, line, rules = places[bug.path], bug.line + added[bug.path], rules_of(bug.wrong, bug.right)
        said = comment(place, line, bug)
        more += said
        comments += terse_comment(place, line, chance.choice(rules)) if rules and chance.random() < terse else said
        named += shlex.join(each) + "\n"
    for file, content in (("list", comments), ("more", more), ("tests", named)):
        files[f"{TODO}/{file}"] = content.encode()
    files["all.tests"] = "".join(f"{test}\n" for test in task.tests).encode()
    return task, files


def _new_places(tree: SourceTree, paths: set[str], chance: random.Random) -> dict[str, str]:
    """Return a drawn path, not in the tree, for each of ``paths``."""
    taken = {path.partition("/")[0] for path in tree.files}
    folders = chance.sample([name for name in FOLDERS if name not in taken], len(paths))
    return {path: f"{folder}/{chance.choice(FILES)}.py" for path, folder in zip(sorted(paths), folders, strict=True)}


def _as_expected(bench: TestBench, tree: SourceTree, task: RepairTask, files: dict[str, bytes]) -> bool:
    """Return whether the failing tests fail and the passing ones pass, with the bugs and, all passing, without."""
    moved = {path: files[path] for path in files if files[path] != tree.files.get(path)}
    bench.write(moved)
    try:
        run = bench.run(task.tool_settings())
    finally:
        bench.write({path: tree.files.get(path) for path in moved})
    if not all(run.outcomes.get(test) == "failed" for test in task.fail_to_pass) or not run.passed(task.pass_to_pass):
        return False
    return bench.run(task.tool_settings()).passed(task.tests)
