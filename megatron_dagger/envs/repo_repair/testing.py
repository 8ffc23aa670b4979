"""Real test runs of a tree of files in a fresh sandbox: for the judge and for the making of tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dagger.envs.base import EnvironmentBroken
from megatron_dagger.sandbox import (
    BubblewrapSandbox,
    ProcessSandbox,
    SandboxLimits,
    SandboxPool,
    bubblewrap_works,
)

TOOLS = Path(__file__).with_name("tools")
TEST_RUN_TIMEOUT_S = 30.0
SETTINGS_FILE = ".repair/task.json"
SUSPECTS_FILE = ".repair/suspects.json"
TESTED_FILE = ".repair/tested.json"
OUTCOMES_FILE = ".repair/outcomes.json"


def repair_sandbox() -> ProcessSandbox:
    """A sandbox with the repair agent's tools: bubblewrap's where it works."""
    kind = BubblewrapSandbox if bubblewrap_works() else ProcessSandbox
    return kind(SandboxLimits(), tool_dir=TOOLS, preload=["testrun", "repair_tools"])


@dataclass(frozen=True, kw_only=True)
class TestRun:
    """Outcomes by test ("passed", "failed", "skipped"; absent: it was not reached), executed lines by test."""

    __test__ = False

    outcomes: Mapping[str, str]
    lines: Mapping[str, list[tuple[str, int]]]
    suspects: tuple[tuple[str, int], ...]  # what ``locate`` would list; only of a traced run
    timed_out: bool

    def passed(self, tests: list[str]) -> bool:
        return not self.timed_out and all(self.outcomes.get(test) == "passed" for test in tests)


class TestBench:
    """One sandbox holding one tree, in which tests are run again and again."""

    __test__ = False

    def __init__(self, sandbox: ProcessSandbox, files: Mapping[str, bytes]):
        self._sandbox = sandbox
        sandbox.write(files)

    def write(self, files: Mapping[str, bytes]) -> None:
        self._sandbox.write(files)

    def run(self, settings: dict[str, Any], *, trace: bool = False) -> TestRun:
        """Run the tests that ``settings`` name (RepairTask.tool_settings).

        Code that ends the test process or hangs it is a run in which no test passed. Raises
        EnvironmentBroken where the sandbox failed.
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
    """Run tests once on a fresh copy of ``files``; see TestBench.run."""
    with pool.lend() as sandbox:
        return TestBench(sandbox, files).run(settings)
