"""SWE-bench's own harness (swebench 5.x), run as a program of its own on predictions in its own format.

It gets a directory to itself: the rows, the predictions, its logs with a ``report.json`` a task, and its
final report. What has a report is not run again, so a killed grading goes on where it was. The tasks' images
are used by their names, and the containers are the harness's: neither limits nor network are ours.
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
from megatron_dagger.signals import dies_with_this_process
from megatron_dagger.store.atomic import write_text

START_S, PER_TASK_S = 300.0, 600.0  # beyond the tests' own time: the imports; images, containers, their removal
_POLL_S = 0.5
_TAIL_CHARACTERS = 2000
_OPEN_FILES = 4096
_LOGS = Path("logs", "run_evaluation")


@dataclass(frozen=True, kw_only=True)
class Harness:
    """A grading in ``directory``. ``unpatched``: run the tests on the tasks as they are, without a prediction.

    ``rows`` are swebench 5.x's, ``predictions`` have instance_id, model_name_or_path (one for all) and model_patch.
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
        """In the names of its containers: what a killed harness left is found by it."""
        return f"megatron-dagger-{hashlib.sha256(str(self.directory.resolve()).encode()).hexdigest()[:12]}"

    def run(self, on_progress: Callable[[int], None] = lambda done: None) -> dict[str, Outcome]:
        """Grade what is not graded yet; what came of each task.

        ``on_progress`` is told how many tasks have a report. Raises ConfigError where the directory belongs to
        other predictions or something is missing, RuntimeError with the end of its log where the harness fails.
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
                preexec_fn=dies_with_this_process(),
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
            how = "took too long" if time.monotonic() > deadline else f"failed with exit code {process.returncode}"
            tail = log_path.read_text(errors="replace")[-_TAIL_CHARACTERS:]
            raise RuntimeError(f"SWE-bench's harness {how}; the end of {log_path}:\n{tail}")
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
        return [sys.executable, "-m", module, *(str(word) for option in options.items() for word in option)]

    def _deadline_s(self) -> float:
        return START_S + math.ceil(len(self.rows) / self.workers) * (self.timeout_s + PER_TASK_S)

    def _take_directory(self) -> None:
        """Write what the harness reads, or find it there."""
        lines = "".join(json.dumps(prediction) + "\n" for prediction in self.predictions)
        for name, text in (("dataset.json", json.dumps(list(self.rows))), ("predictions.jsonl", lines)):
            path = self.directory / name
            if not path.exists():
                write_text(path, text)
            elif path.read_text() != text:
                raise ConfigError(f"{path} is of another grading: remove {self.directory}, or name another directory")

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
        found = {task: outcome for name, outcome in names.items() for task in report[name]}
        return found | {task: self._error(task) for task in report["error_ids"]}

    def _error(self, task: str) -> Outcome:
        """Why a task has no report: something about the patch, which counts, or about the machine, which does not."""
        path = self.directory / _LOGS / self.run_id / self._model() / task / "run_instance.log"
        log = path.read_text(errors="replace") if path.exists() else ""
        if ">>>>> Patch Apply Failed" in log:
            return Outcome.PATCH_DOES_NOT_APPLY
        return Outcome.TESTS_TIMED_OUT if "Test timed out after" in log else Outcome.NOT_GRADED


def _check_installed() -> None:
    if importlib.util.find_spec("swebench") is None:
        raise ConfigError("grading needs swebench 5.x: pip install 'megatron-dagger[swe]'")
    if shutil.which("docker") is None:
        raise ConfigError("grading needs the docker command, with which SWE-bench's harness removes its containers")
