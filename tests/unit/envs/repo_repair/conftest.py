"""A small package with tests, as a source of repair tasks that need no download."""

import pytest

from megatron_dagger.config import RepoRepairConfig
from megatron_dagger.envs.repo_repair.generate import SourceTree, make_tasks
from megatron_dagger.envs.repo_repair.testing import repair_sandbox
from megatron_dagger.sandbox.local import SandboxPool

CODE = b"""
def clamp(value, low, high):
    if value < low:
        return low
    if value > high:
        return high
    return value


def is_leap(year):
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


def count(items, wanted):
    total = 0
    for item in items:
        if item == wanted:
            total += 1
    return total
"""
TESTS = b"""
import pytest
from small import clamp, count, is_leap

@pytest.mark.parametrize("value, expected", [(-1, 0), (0, 0), (3, 3), (5, 5), (7, 5)])
def test_clamp(value, expected):
    assert clamp(value, 0, 5) == expected

@pytest.mark.parametrize("year, leap", [(1900, False), (2000, True), (2023, False), (2024, True)])
def test_is_leap(year, leap):
    assert is_leap(year) is leap

def test_count():
    assert count("banana", "a") == 3
    assert count("", "a") == 0
"""
TREE = SourceTree(
    name="small",
    version="1.0",
    files={"small.py": CODE, "tests/test_small.py": TESTS},
    source_files=("small.py",),
    test_files=("tests/test_small.py",),
    python_paths=(".",),
)


@pytest.fixture(scope="session")
def pool():
    with SandboxPool(repair_sandbox) as opened:
        yield opened


@pytest.fixture(scope="session")
def repositories(tmp_path_factory):
    return tmp_path_factory.mktemp("repositories")


@pytest.fixture(scope="session")
def tasks(pool, repositories):
    return make_tasks(TREE, 8, 1, RepoRepairConfig(), pool, repositories)
