"""The commands of the repair agent. They run in the sandbox and import nothing of megatron_dagger.

list [DIR]                  files of the repository
search WORD                 lines of the modules under repair that contain WORD
view ADDRESS [COUNT]        a line, its fixes, and the fixes that no test run has failed yet; or COUNT lines
untested ADDRESS            only the fixes that no test run has failed yet
fix ADDRESS N               apply the N-th fix of a line
edit ADDRESS OLD NEW [N]    replace the N-th token OLD of a line by NEW
runtests                    run the task's tests
locate                      run the tests and list the most suspicious lines
An ADDRESS is FILE:LINE, or @K for the K-th line of locate's list.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import swaps
from line_tools import MAX_LINES, STATE, LineTools, answer


class DiskFiles:
    """The work tree on disk; the current directory is its root."""

    def read(self, path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    def write(self, path: str, content: bytes) -> None:
        with open(path, "wb") as file:
            file.write(content)


tools = LineTools(DiskFiles())


def main(name: str, arguments: list[str]) -> int:
    return answer(COMMANDS, __doc__ or "", name, arguments, print)


def command_list(folder: str = "."):  # type: ignore[no-untyped-def]
    paths = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        paths += [os.path.relpath(os.path.join(where, name)) for name in sorted(names)]
    yield from paths[:MAX_LINES]
    if len(paths) > MAX_LINES:
        yield f"... {len(paths) - MAX_LINES} more"


def command_search(word: str):  # type: ignore[no-untyped-def]
    task = tools.state("task.json")
    count = 0
    for path in task["source"]:
        for number, line in enumerate(tools.lines(path), 1):
            if word in line:
                count += 1
                if count <= MAX_LINES // 2:
                    yield f"{path}:{number} {line.strip()[:100]}"
    if count == 0:
        yield "nothing found"
    elif count > MAX_LINES // 2:
        yield f"... {count - MAX_LINES // 2} more"


def command_runtests():  # type: ignore[no-untyped-def]
    yield _verdict(_run(tools.state("task.json")))


def command_locate():  # type: ignore[no-untyped-def]
    task = tools.state("task.json")
    recorder = _run(task, trace=True)
    yield _verdict(recorder)
    ranked = suspects(recorder, task)
    with open(os.path.join(STATE, "suspects.json"), "w") as file:
        json.dump(ranked, file)
    for rank, (path, number) in enumerate(ranked, 1):
        yield f"@{rank} {path}:{number}"


def command_outcomes(trace: str = ""):  # type: ignore[no-untyped-def]
    """Write every outcome and, with "trace", the lines that each test ran; for the judge and for making tasks."""
    task = tools.state("task.json")
    recorder = _run(task, trace=bool(trace))
    root = os.getcwd() + os.sep
    lines = {
        test: sorted((path.removeprefix(root), line) for path, line in ran) for test, ran in recorder.lines.items()
    }
    result = {"outcomes": recorder.outcomes, "timed_out": recorder.timed_out, "lines": lines}
    result["suspects"] = suspects(recorder, task) if trace and task["tests"] else []
    with open(os.path.join(STATE, "outcomes.json"), "w") as file:
        json.dump(result, file)
    yield "written"


def suspects(recorder: Any, task: dict) -> list[tuple[str, int]]:
    """Return the lines that failing tests run, most suspicious first, by Ochiai's coefficient.

    ef / sqrt((ef + nf) * (ef + ep)): ef and ep count the failing and passing tests that ran the line, nf the failing
    tests that did not (Abreu et al., "On the accuracy of spectrum-based fault localization", 2007). Lines without a
    token of the bug family are omitted. Lines of equal score are in file order.
    """
    root = os.getcwd() + os.sep
    failing = {test for test in task["tests"] if recorder.outcomes.get(test) != "passed"}
    ran: dict[tuple[str, int], list[int]] = {}
    for test, lines in recorder.lines.items():
        for line in lines:
            ran.setdefault(line, [0, 0])[0 if test in failing else 1] += 1
    scored = []
    texts: dict[str, list[str]] = {}
    for (path, number), (failed, passed) in ran.items():
        if failed == 0:
            continue
        text = texts.setdefault(path, tools.lines(path))
        if number <= len(text) and swaps.repairs(text[number - 1]):
            score = failed / math.sqrt(len(failing) * (failed + passed))
            scored.append((-round(score, 6), path.removeprefix(root), number))
    return [(path, number) for _, path, number in sorted(scored)[: task["suspects"]]]


def _run(task: dict, *, trace: bool = False):  # type: ignore[no-untyped-def]
    import testrun  # imports pytest, which few tools need; the sandbox's server has it loaded

    return testrun.run(
        task["test_files"],
        task["tests"],
        paths=task["paths"],
        extra=task["pytest_args"],
        traced=task["source"] if trace else [],
    )


def _verdict(recorder: Any) -> str:
    task = tools.state("task.json")
    passed = sum(recorder.outcomes.get(test) == "passed" for test in task["tests"])
    if passed == len(task["tests"]):
        return f"PASS {passed}"
    return f"FAIL {len(task['tests']) - passed} of {len(task['tests'])}"


COMMANDS: dict[str, Callable[..., Iterable[str]]] = {
    **tools.commands,
    "list": command_list,
    "search": command_search,
    "runtests": command_runtests,
    "locate": command_locate,
    "outcomes": command_outcomes,
}


def _applet(name: str):  # type: ignore[no-untyped-def]
    return lambda arguments: main(name, arguments)


APPLETS = {name: _applet(name) for name in COMMANDS}
