"""``pytest`` as the agent's shell has it: run tests, print one line with their numbers.

    pytest @FILE...     run the tests that the files list, one to a line (pytest's own notation for arguments in a file)
    pytest TEST...      run these tests, or all tests of these files

It runs in the sandbox and imports nothing of megatron_dagger. The line is that of ``pytest -q``, without the time.
"""

from __future__ import annotations

import json
import os
from collections import Counter

ORDER = ("failed", "passed", "skipped", "error")


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--cwd"]:  # applets start in the root of the work tree
        os.chdir(arguments[1])
        arguments = arguments[2:]
    try:
        wanted = [test for argument in arguments if not argument.startswith("-") for test in _tests(argument)]
    except OSError as error:
        print(f"ERROR: {error.strerror}: {error.filename}")
        return 4
    files = sorted({test.partition("::")[0] for test in wanted})
    for file in files:
        if not os.path.exists(file):
            print(f"ERROR: file or directory not found: {file}")
            return 4
    if not wanted:
        print("no tests ran")
        return 5
    root = _root()
    try:
        with open(os.path.join(root, ".repair", "task.json")) as task_file:
            task = json.load(task_file)
    except (OSError, ValueError):
        print("ERROR: .repair/task.json is missing or broken")
        return 3
    import testrun

    names = [test for test in wanted if "::" in test]
    paths = [os.path.join(root, path) for path in task["paths"]]
    outcomes = testrun.run(files, names or None, paths=paths, extra=task["pytest_args"]).outcomes
    counts = Counter(outcomes.get(test, "error") for test in names or outcomes)
    shown = [f"{counts[outcome]} {outcome}" for outcome in ORDER if counts[outcome]]
    print(", ".join(shown) or "no tests ran")
    return 0 if set(counts) <= {"passed", "skipped"} else 1


def _root() -> str:
    """Return the root of the work tree: the nearest folder upwards that has the task's settings."""
    folder = os.getcwd()
    while not os.path.exists(os.path.join(folder, ".repair")) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    return folder


def _tests(argument: str) -> list[str]:
    if not argument.startswith("@"):
        return [argument]
    with open(argument[1:], encoding="utf-8") as file:
        return file.read().splitlines()


APPLETS = {"pytest": main}
