"""Run a package's tests on a tree of files in a sandbox, for the judge and for making tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dagger.sandbox.base import EnvironmentBroken, SandboxLimits
from megatron_dagger.sandbox.local import BubblewrapSandbox, ProcessSandbox, SandboxPool, bubblewrap_works

TOOLS = Path(__file__).with_name("tools")
TEST_RUN_TIMEOUT_S = 30.0
SETTINGS_FILE = ".repair/task.json"
SUSPECTS_FILE = ".repair/suspects.json"
TESTED_FILE = ".repair/tested.json"
OUTCOMES_FILE = ".repair/outcomes.json"


def repair_sandbox(compiled: Path | None = None) -> ProcessSandbox:
    """Return a new sandbox with the repair agent's tools, isolated by bubblewrap if that works.

    ``compiled`` is the folder of the tasks' compiled modules, if there is one (compiled.py).
    """
    kind = BubblewrapSandbox if bubblewrap_works() else ProcessSandbox
    preload = ["testrun", "repair_tools", "pytest_command"]
    return kind(SandboxLimits(), tool_dir=TOOLS, preload=preload, shared_dir=compiled)


@dataclass(frozen=True, kw_only=True)
class TestRun:
    """Outcomes by test ("passed", "failed", "skipped"; absent if it was not reached), and executed lines by test."""

    __test__ = False

    outcomes: Mapping[str, str]
    lines: Mapping[str, list[tuple[str, int]]]
    suspects: tuple[tuple[str, int], ...]  # what ``locate`` would list; empty unless traced
    timed_out: bool

    def passed(self, tests: list[str]) -> bool:
        """Return whether all ``tests`` passed, in time."""
        return not self.timed_out and all(self.outcomes.get(test) == "passed" for test in tests)


class TestBench:
    """A sandbox with one tree, in which tests are run repeatedly."""

    __test__ = False

    def __init__(self, sandbox: ProcessSandbox, files: Mapping[str, bytes]):
        self._sandbox = sandbox
        sandbox.write(files)

    def write(self, files: Mapping[str, bytes | None]) -> None:
        """Write files into the tree; None removes one."""
        self._sandbox.write(files)

    def run(self, settings: dict[str, Any], *, trace: bool = False) -> TestRun:
        """Run the tests that ``settings`` name (RepairTask.tool_settings); ``trace`` records executed lines.

        If the code ends or hangs the test process, no test passed. Raises EnvironmentBroken if the sandbox fails.
        """
        self._sandbox.write({SETTINGS_FILE: json.dumps(settings).encode(), OUTCOMES_FILE: None})
        command = ["outcomes", *(["trace"] if trace else [])]
        result = self._sandbox.run(command, timeout_s=TEST_RUN_TIMEOUT_S)
        written = self._sandbox.read(".repair").get(OUTCOMES_FILE)
        if result.timed_out or result.exit_code != 0 or written is None:
            return TestRun(outcomes={}, lines={}, suspects=(), timed_out=result.timed_out)
        try:
            values = json.loads(written)
            lines = {test: [(path, line) for path, line in ran] for test, ran in values["lines"].items()}
            suspects = tuple((path, line) for path, line in values["suspects"])
            return TestRun(outcomes=values["outcomes"], lines=lines, suspects=suspects, timed_out=values["timed_out"])
        except (ValueError, KeyError, TypeError) as error:
            raise EnvironmentBroken(f"the test run left unreadable results: {error}") from error


def run_tests(pool: SandboxPool, files: Mapping[str, bytes], settings: dict[str, Any]) -> TestRun:
    """Run tests once on a fresh copy of ``files``. See TestBench.run."""
    with pool.lend() as sandbox:
        return TestBench(sandbox, files).run(settings)
