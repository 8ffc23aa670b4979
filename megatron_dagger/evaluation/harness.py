"""Run SWE-bench's own harness (swebench 5.x) as a separate program, on predictions in its own format.

The harness gets a directory to itself, with the rows, the predictions, a log folder with a ``report.json`` per task,
and its final report. It does not run a task again that has a report, so a killed grading resumes. It makes its own
containers from the tasks' images, without this project's limits on resources and network.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dagger.config.base import ConfigError
from megatron_dagger.evaluation.resolved import Outcome
from megatron_dagger.signals import parent_death_hook
from megatron_dagger.store.atomic import write_text

START_S, PER_TASK_S = 300.0, 600.0  # beyond the tests' own time: for imports; for a task's image and container
_POLL_S = 0.5
_TAIL_CHARACTERS = 2000
_OPEN_FILES = 4096
_LOGS = Path("logs", "run_evaluation")


@dataclass(frozen=True, kw_only=True)
class Harness:
    """A grading in ``directory``.

    ``rows`` are swebench 5.x's. ``predictions`` have instance_id, model_name_or_path (one for all) and model_patch.
    ``unpatched``: run the tests without the predictions' patches.
    """

    directory: Path
    rows: Sequence[Mapping[str, Any]]
    predictions: Sequence[Mapping[str, Any]]
    unpatched: bool = False
    docker_url: str | None = None
    workers: int = 4
    timeout_s: int = 1800  # of a task's tests

    @property
    def run_id(self) -> str:
        """The part of the containers' names by which a killed harness's containers are found."""
        return f"megatron-dagger-{hashlib.sha256(str(self.directory.resolve()).encode()).hexdigest()[:12]}"

    def run(self, on_progress: Callable[[int], None] = lambda done: None) -> dict[str, Outcome]:
        """Grade the tasks that are not graded yet; return every task's outcome.

        ``on_progress`` gets the number of tasks with a report, about twice a second. Raises ConfigError if the
        directory belongs to other predictions or a program is missing, RuntimeError with the end of the log if the
        harness fails or exceeds its deadline.
        """
        _check_installed()
        self._take_directory()
        log_path, deadline = self.directory / "harness.log", time.monotonic() + self._deadline_s()
        environment = {**os.environ, **({"DOCKER_HOST": self.docker_url} if self.docker_url else {})}
        with (
            open(log_path, "ab") as log,
            subprocess.Popen(
                self._command(),
                cwd=self.directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=parent_death_hook(),
            ) as process,
        ):
            try:
                while process.poll() is None and time.monotonic() < deadline:
                    on_progress(len(self._reports()))
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(_POLL_S)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        on_progress(len(self._reports()))
        if process.returncode:
            problem = f"failed with exit code {process.returncode}"
            if time.monotonic() > deadline:
                problem = f"took over {self._deadline_s():.0f} s"
            tail = log_path.read_text(errors="replace")[-_TAIL_CHARACTERS:]
            raise RuntimeError(f"SWE-bench's harness {problem}; the end of {log_path}:\n{tail}")
        return self._outcomes()

    def _command(self) -> list[str]:
        module = "megatron_dagger.evaluation.unpatched" if self.unpatched else "swebench.harness.run_evaluation"
        files = min(_OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        options = {
            "--dataset_name": "dataset.json",
            "--predictions_path": "predictions.jsonl",
            "--run_id": self.run_id,
            "--max_workers": self.workers,
            "--timeout": self.timeout_s,
            "--open_file_limit": files,
        }
        return [sys.executable, "-m", module, *(str(item) for option in options.items() for item in option)]

    def _deadline_s(self) -> float:
        return START_S + math.ceil(len(self.rows) / self.workers) * (self.timeout_s + PER_TASK_S)

    def _take_directory(self) -> None:
        """Write the harness's input, or check that it is the one already there."""
        lines = "".join(json.dumps(prediction) + "\n" for prediction in self.predictions)
        for name, text in (("dataset.json", json.dumps(list(self.rows))), ("predictions.jsonl", lines)):
            path = self.directory / name
            if not path.exists():
                write_text(path, text)
            elif path.read_text() != text:
                raise ConfigError(
                    f"{path} belongs to another grading: remove {self.directory}, or choose another directory"
                )

    def _model(self) -> str:
        return str(self.predictions[0]["model_name_or_path"]).replace("/", "__")

    def _reports(self) -> list[Path]:
        return list((self.directory / _LOGS / self.run_id / self._model()).glob("*/report.json"))

    def _outcomes(self) -> dict[str, Outcome]:
        report = json.loads((self.directory / f"{self._model()}.{self.run_id}.json").read_text())
        names = {
            "resolved_ids": Outcome.RESOLVED,
            "unresolved_ids": Outcome.UNRESOLVED,
            "empty_patch_ids": Outcome.EMPTY_PATCH,
            "incomplete_ids": Outcome.NO_PREDICTION,
        }
        outcomes = {task: outcome for name, outcome in names.items() for task in report[name]}
        return outcomes | {task: self._error(task) for task in report["error_ids"]}

    def _error(self, task: str) -> Outcome:
        """Return why a task has no report: a fault of the patch, which counts, or of the machine, which does not."""
        path = self.directory / _LOGS / self.run_id / self._model() / task / "run_instance.log"
        log = path.read_text(errors="replace") if path.exists() else ""
        if ">>>>> Patch Apply Failed" in log:
            return Outcome.PATCH_DOES_NOT_APPLY
        return Outcome.TESTS_TIMED_OUT if "Test timed out after" in log else Outcome.NOT_GRADED


def _check_installed() -> None:
    if importlib.util.find_spec("swebench") is None:
        raise ConfigError("grading needs swebench 5.x: pip install 'megatron-dagger[swe]'")
    if shutil.which("docker") is None:
        raise ConfigError("grading needs the docker command, which SWE-bench's harness uses to remove its containers")
