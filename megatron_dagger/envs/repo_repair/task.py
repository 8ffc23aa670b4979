"""A repair task: a row in SWE-bench's schema, and the files of its repository.

On disk, ``<folder>/<side>.jsonl`` has the rows and ``<folder>/repos/<instance_id>/`` the git repository of each task,
whose only commit contains the bug: no history could show the repair.
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
    """One task. The fields up to ``eval_type`` are those of SWE-bench 5.x."""

    instance_id: str
    repo: str
    version: str
    base_commit: str
    problem_statement: str
    patch: str  # the gold patch; neither the agent nor the teacher sees it
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
    source_files: tuple[str, ...] = ()  # the modules under repair: only changes in them are judged
    python_paths: tuple[str, ...] = ()
    pytest_args: tuple[str, ...] = ()
    operator: str = ""  # the kind of bug, for statistics
    suspects: int = 9  # number of lines that the fault localiser shows

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
        """Return the settings of the agent's tools in the sandbox (``.repair/task.json``)."""
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
        """Return the task of a row. Raises KeyError or TypeError if its fields are not those of a task."""
        lists = ("source_files", "python_paths", "pytest_args")
        return cls(**{**row, **{name: tuple(row[name]) for name in lists}})


def read_tasks(path: Path) -> list[RepairTask]:
    """Return the tasks of a jsonl file. Raises ConfigError that names the first bad line."""
    tasks = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            tasks.append(RepairTask.from_row(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{path}:{number} is not a repair task ({error}); delete the file to make its tasks again"
            ) from error
    return tasks


def write_tasks(path: Path, tasks: list[RepairTask]) -> None:
    """Write tasks to a jsonl file, atomically."""
    write_text(path, "".join(json.dumps(asdict(task)) + "\n" for task in tasks))
