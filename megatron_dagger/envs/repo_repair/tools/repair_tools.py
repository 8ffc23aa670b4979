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
from typing import Any

import swaps

STATE = ".repair"  # task.json: the tests to run; suspects.json: locate's list; tested.json: edits that failed the tests
MAX_LINES = 40


class UsageError(Exception):
    """A command's arguments are wrong; the message tells the agent why."""


def main(name: str, arguments: list[str]) -> int:
    try:
        for line in COMMANDS[name](*arguments):  # type: ignore[operator]
            print(line)
    except UsageError as error:
        print(f"error: {error}")
        return 2
    except TypeError:
        usage = next(line for line in (__doc__ or "").splitlines() if line.startswith(name))
        print(f"error: usage: {' '.join(usage.split('  ')[:1])}")
        return 2
    return 0


def command_list(folder: str = "."):  # type: ignore[no-untyped-def]
    paths = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        paths += [os.path.relpath(os.path.join(where, name)) for name in sorted(names)]
    yield from paths[:MAX_LINES]
    if len(paths) > MAX_LINES:
        yield f"... {len(paths) - MAX_LINES} more"


def command_search(word: str):  # type: ignore[no-untyped-def]
    task = _read("task.json")
    count = 0
    for path in task["source"]:
        for number, line in enumerate(_lines(path), 1):
            if word in line:
                count += 1
                if count <= MAX_LINES // 2:
                    yield f"{path}:{number} {line.strip()[:100]}"
    if count == 0:
        yield "nothing found"
    elif count > MAX_LINES // 2:
        yield f"... {count - MAX_LINES // 2} more"


def command_view(address: str, count: str = "1"):  # type: ignore[no-untyped-def]
    path, number = _address(address)
    lines = _lines(path)
    if not 1 <= number <= len(lines):
        raise UsageError(f"{path} has {len(lines)} lines")
    if not count.isdigit() or not 1 <= int(count) <= MAX_LINES:
        raise UsageError(f"COUNT is 1 to {MAX_LINES}")
    for offset, line in enumerate(lines[number - 1 : number - 1 + int(count)]):
        yield f"{_name(path, number + offset)}: {line.rstrip()}"
    if count == "1":
        yield swaps.numbered(swaps.repairs(lines[number - 1])) or "no fixes"
        yield from command_untested(address)


def command_untested(address: str):  # type: ignore[no-untyped-def]
    path, number = _address(address)
    lines = _lines(path)
    line = lines[number - 1] if 1 <= number <= len(lines) else ""
    failed = _tested()
    fixes = enumerate(swaps.repairs(line), 1)
    untested = [str(n) for n, fix in fixes if (path, number, swaps.replace_token(line, fix)) not in failed]
    # The lowest last: a small model first learns what is always at the same distance from the end.
    yield f"untested: {', '.join(reversed(untested)) or 'none'} of {_name(path, number)}"


def command_fix(address: str, number_of_fix: str):  # type: ignore[no-untyped-def]
    path, number = _address(address)
    lines = _lines(path)
    fixes = swaps.repairs(lines[number - 1]) if 1 <= number <= len(lines) else []
    if not number_of_fix.isdigit() or not 1 <= int(number_of_fix) <= len(fixes):
        raise UsageError(f"there are {len(fixes)} fixes of {_name(path, number)}")
    yield _replace(path, number, lines, fixes[int(number_of_fix) - 1])


def command_edit(address: str, old: str, new: str, nth: str = "1"):  # type: ignore[no-untyped-def]
    path, number = _address(address)
    lines = _lines(path)
    if not 1 <= number <= len(lines):
        raise UsageError(f"{path} has {len(lines)} lines")
    if not nth.isdigit():
        raise UsageError("N is a number")
    yield _replace(path, number, lines, swaps.Candidate(old=old, new=new, nth=int(nth)))


def _replace(path: str, number: int, lines: list[str], change: swaps.Candidate) -> str:
    changed = swaps.replace_token(lines[number - 1], change)
    if changed is None:
        raise UsageError(f"there are not {change.nth} tokens {change.old}")
    lines[number - 1] = changed
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.writelines(lines)
    return f"{_name(path, number)}: {changed.rstrip()}"


def command_runtests():  # type: ignore[no-untyped-def]
    yield _verdict(_run(_read("task.json")))


def command_locate():  # type: ignore[no-untyped-def]
    task = _read("task.json")
    recorder = _run(task, trace=True)
    yield _verdict(recorder)
    ranked = suspects(recorder, task)
    with open(os.path.join(STATE, "suspects.json"), "w") as file:
        json.dump(ranked, file)
    for rank, (path, number) in enumerate(ranked, 1):
        yield f"@{rank} {path}:{number}"


def command_outcomes(trace: str = ""):  # type: ignore[no-untyped-def]
    """Write every outcome and, with "trace", the lines that each test ran; for the judge and for making tasks."""
    task = _read("task.json")
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
        text = texts.setdefault(path, _lines(path))
        if number <= len(text) and swaps.repairs(text[number - 1]):
            score = failed / math.sqrt(len(failing) * (failed + passed))
            scored.append((-round(score, 6), path.removeprefix(root), number))
    return [(path, number) for _, path, number in sorted(scored)[: task["suspects"]]]


def _tested() -> set[tuple[str, int, str]]:
    """Return the lines (file, number, text) with which, as the only change, the tests have failed."""
    try:
        return {(path, number, text) for path, number, text in _read("tested.json")}
    except UsageError:
        return set()


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
    task = _read("task.json")
    passed = sum(recorder.outcomes.get(test) == "passed" for test in task["tests"])
    if passed == len(task["tests"]):
        return f"PASS {passed}"
    return f"FAIL {len(task['tests']) - passed} of {len(task['tests'])}"


def _address(text: str) -> tuple[str, int]:
    if text.startswith("@"):
        try:
            listed = _read("suspects.json")
        except UsageError:
            raise UsageError("run locate first") from None
        if not text[1:].isdigit() or not 1 <= int(text[1:]) <= len(listed):
            raise UsageError(f"there are @1 to @{len(listed)}")
        path, number = listed[int(text[1:]) - 1]
        return path, number
    path, _, number = text.rpartition(":")
    if not path or not number.isdigit():
        raise UsageError("ADDRESS is FILE:LINE or @K")
    return path, int(number)


def _name(path: str, number: int) -> str:
    try:
        return f"@{[tuple(line) for line in _read('suspects.json')].index((path, number)) + 1}"
    except (UsageError, ValueError):
        return f"{path}:{number}"


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.readlines()
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"cannot read {path}") from None


def _read(name: str):  # type: ignore[no-untyped-def]
    try:
        with open(os.path.join(STATE, name)) as file:
            return json.load(file)
    except (OSError, ValueError):
        raise UsageError(f"{STATE}/{name} is missing or broken") from None


COMMANDS = {
    "list": command_list,
    "search": command_search,
    "view": command_view,
    "untested": command_untested,
    "fix": command_fix,
    "edit": command_edit,
    "runtests": command_runtests,
    "locate": command_locate,
    "outcomes": command_outcomes,
}


def _applet(name: str):  # type: ignore[no-untyped-def]
    return lambda arguments: main(name, arguments)


APPLETS = {name: _applet(name) for name in COMMANDS}
