"""Check the project's surface: sizes, imports, names, the command line, and the wheel. It takes about a minute.

    .venv/bin/python -m tools.check.house               all checks
    .venv/bin/python -m tools.check.house --no-wheel    without building the wheel

It prints the problems; the last line is ``RESULT {json}``. It exits with 1 unless the README has at most 900 words, no
file has over 350 lines, their median is under 110, no packages import each other, no identifier is a private word,
every case of the command line has its expected outcome, and every command runs from the wheel.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_dagger"
OURS = (PACKAGE, "recipes", "tests", "tools")
MAX_README_WORDS, MAX_LINES, MEDIAN_LINES = 900, 350, 110

# Former names whose meaning a newcomer could not guess. They count as identifiers only; prose may use the words.
_CLASSES = """
World Desk Offer Agreement Wire Cells Piece Part Cut Executor Actor Decision GivenUp Point Saved Replicas ReplyStore
Malformed Fitness EngineConfig TasksConfig
"""
_FUNCTIONS_AND_MODULES = """
open_run desk hand_over handover offer wire cells boards sides weights_sides worker_watch told tracked
train_and_tell everybodys ended have_ended ends_stage admit admission fullest_fit subset_fit rank_server local_modules
"""
_LOCAL_NAMES = "one found left given made most room words"
PRIVATE_WORDS = frozenset(f"{_CLASSES} {_FUNCTIONS_AND_MODULES} {_LOCAL_NAMES}".split())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-wheel", action="store_true", help="do not build and install a wheel")
    arguments = parser.parse_args()
    files = [ROOT / name for name in _git("ls-files", "*.py") if (ROOT / name).is_file()]
    lines = {path: len(path.read_text().splitlines()) for path in files}
    long = {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > MAX_LINES}
    cycles, private = package_cycles(), private_words(files)
    result: dict[str, Any] = {
        "readme_words": len((ROOT / "README.md").read_text().split()),
        "files_over_350": len(long),
        "median_lines": statistics.median(count for count in lines.values() if count),
        "package_cycles": len(cycles),
        "private_words_left": len(private),
    }
    for title, listed in (("over 350 lines", long), ("package cycles", cycles), ("private words", private)):
        for item in listed:
            print(f"{title}: {item}")
    failures = _run_cli_cases(result)
    for name, problem in failures.items():
        print(f"command line, {name}: {problem}")
    if not arguments.no_wheel:
        from tools.check.wheel import commands_of_a_wheel

        outcomes = commands_of_a_wheel()
        for name, problem in outcomes.items():
            if problem:
                print(f"wheel, {name}: {problem}")
        result |= {"wheel_commands": sum(not problem for problem in outcomes.values()), "commands": len(outcomes)}
    ok = (
        result["readme_words"] <= MAX_README_WORDS
        and result["median_lines"] < MEDIAN_LINES
        and not (long or cycles or private or failures)
        and result.get("wheel_commands") == result.get("commands")
    )
    print("RESULT " + json.dumps(result))
    return int(not ok)


def package_cycles() -> list[str]:
    """Return the pairs of sub-packages that import each other at run time, directly or indirectly."""
    imports = defaultdict(set)
    for path in (ROOT / PACKAGE).rglob("*.py"):
        owner = path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")
        for module in _imported(ast.parse(path.read_text())):
            parts = module.split(".")
            if parts[0] == PACKAGE and len(parts) > 1 and parts[1] != owner:
                imports[owner].add(parts[1])
    reach = {name: set(targets) for name, targets in imports.items()}
    for _ in reach:  # the transitive closure
        for name in reach:
            reach[name] |= {far for near in tuple(reach[name]) for far in reach.get(near, ())}
    return sorted(f"{a} <-> {b}" for a in reach for b in reach[a] if a < b and a in reach.get(b, ()))


def _imported(tree: ast.AST) -> Iterator[str]:
    """Yield the modules that a file imports at run time, without those under ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == PACKAGE else [node.module]
            )
        yield from _imported(node)


def private_words(files: list[Path]) -> list[str]:
    """Return every place where an identifier is a private word: definitions, arguments, assignments, imports."""
    return [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in files
        for name, line in _identifiers(ast.parse(path.read_text()))
        if name in PRIVATE_WORDS
    ]


def _identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield name, node.lineno
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name.lstrip("_"), node.lineno
            case ast.ImportFrom(module=str(module), names=names):
                ours = module.partition(".")[0] in OURS  # hypothesis has its own ``given``
                yield from ((alias.asname or alias.name, node.lineno) for alias in names if ours or alias.asname)
            case ast.keyword(arg=str(name)):
                yield name, node.lineno


def _run_cli_cases(result: dict[str, Any]) -> dict[str, str]:
    from tools.check.cli_cases import CASES, run_cases

    failures = run_cases()
    result |= {"cli_cases": len(CASES), "cli_cases_right": len(CASES) - len(failures)}
    return failures


def _git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()


if __name__ == "__main__":
    sys.exit(main())
