"""A repair task: a row in SWE-bench's schema, and the files it starts from.

On disk, ``<folder>/<side>.jsonl`` holds the rows and ``<folder>/repos/<instance_id>/`` the git
repository of each task: one commit, the bug in it, no history that could show the repair.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from megatron_dagger.config.base import ConfigError
from megatron_dagger.store.atomic import write_text


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairTask:
    """One task. The fields up to ``eval_type`` are those of SWE-bench 5.x.

    ``source_files`` are the modules under repair: only what is changed in them is judged.
    ``patch`` is the gold patch; neither the agent nor the teacher ever sees it.
    """

    instance_id: str
    repo: str
    version: str
    base_commit: str
    problem_statement: str
    patch: str
    FAIL_TO_PASS: str  # a JSON list of pytest node ids, as in SWE-bench
    PASS_TO_PASS: str
    test_patch: str = ""
    hints_text: str = ""
    created_at: str = "2020-01-01T00:00:00Z"
    environment_setup_commit: str = ""
    image: str = ""
    eval_script: str = ""
    log_parser: str = "parse_log_pytest_v2"
    eval_type: str = "pass_and_fail"
    source_files: tuple[str, ...] = ()
    python_paths: tuple[str, ...] = ()
    pytest_args: tuple[str, ...] = ()
    operator: str = ""  # the kind of bug, for statistics
    suspects: int = 9  # lines that the fault localiser shows

    @property
    def fail_to_pass(self) -> list[str]:
        return list(json.loads(self.FAIL_TO_PASS))

    @property
    def pass_to_pass(self) -> list[str]:
        return list(json.loads(self.PASS_TO_PASS))

    @property
    def tests(self) -> list[str]:
        return self.fail_to_pass + self.pass_to_pass

    def tool_settings(self) -> dict[str, Any]:
        """What the agent's tools in the sandbox are told (``.repair/task.json``)."""
        return {
            "tests": self.tests,
            "test_files": sorted({test.partition("::")[0] for test in self.tests}),
            "source": list(self.source_files),
            "paths": list(self.python_paths),
            "pytest_args": list(self.pytest_args),
            "suspects": self.suspects,
        }

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        lists = ("source_files", "python_paths", "pytest_args")
        return cls(**{**row, **{name: tuple(row[name]) for name in lists}})


def read_tasks(path: Path) -> list[RepairTask]:
    """The tasks of a jsonl file; ConfigError names a line that is none."""
    tasks = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            tasks.append(RepairTask.from_row(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path}:{number} is no repair task ({error}); remove it to have it made anew") from error
    return tasks


def write_tasks(path: Path, tasks: list[RepairTask]) -> None:
    write_text(path, "".join(json.dumps(asdict(task)) + "\n" for task in tasks))
