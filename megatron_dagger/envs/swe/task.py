"""A software-engineering task of any supported data set, and the separation of training from evaluation tasks.

Every row becomes the same kind of task: an image, preparations in it before the agent starts, the issue, the gold
patch, and SWE-bench 5.x's way to judge a patch (a script and the parser of its log).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

from megatron_dagger.config.base import ConfigError, require
from megatron_dagger.text import split_lines

WORKDIR = "/testbed"  # where images of SWE-bench's kind have the repository
CONDA = "source /opt/miniconda3/bin/activate && conda activate testbed"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@:-]{0,199}")  # not "..", for one
CONDA_IF_PRESENT = f"[ ! -f /opt/miniconda3/bin/activate ] || {{ {CONDA}; }}"


@dataclass(frozen=True, kw_only=True, slots=True)
class SweTask:
    """One task. ``eval_script`` to ``eval_type`` are SWE-bench 5.x's fields of these names."""

    instance_id: str
    repo: str
    base_commit: str
    image: str
    problem_statement: str
    eval_script: str
    log_parser: str
    eval_type: str = "pass_and_fail"
    version: str = ""
    patch: str = ""  # the gold patch; empty if none is known
    patch_reversed: bool = False  # the gold patch is ``patch`` in reverse
    setup_patch: str = ""  # applied to the image's tree first (SWE-smith's bug)
    fail_to_pass: tuple[str, ...] = ()
    pass_to_pass: tuple[str, ...] = ()
    expected_outcomes: tuple[tuple[str, str], ...] = ()  # (test, outcome), instead of the two lists (R2E-Gym)
    assets: tuple[tuple[str, str], ...] = ()  # (path, address) of binary files that the tests read, put there for them
    hidden: tuple[str, ...] = ()  # files that only the judge may see, absolute or relative to ``workdir``
    startup: str = CONDA_IF_PRESENT  # run in the agent's shell before its first command
    workdir: str = WORKDIR

    def __post_init__(self) -> None:
        require(
            _ID.fullmatch(self.instance_id) is not None,
            f"instance_id={self.instance_id!r} names folders: it must be letters, digits and . _ + - @ :",
        )

    def with_image_of(self, registry: str) -> SweTask:
        """Return the task with its image at ``registry``, a mirror's address with any path; empty: where it is."""
        if not registry:
            return self
        first, slash, rest = self.image.partition("/")
        named = slash and ("." in first or ":" in first or first == "localhost")  # Docker's own rule
        return replace(self, image=f"{registry.rstrip('/')}/{rest if named else self.image}")

    def not_for_the_harness(self) -> str:
        """Return why SWE-bench's harness cannot grade the task by image, patch and script alone; empty if it can."""
        if self.expected_outcomes:
            return "its tests' outcomes are compared with a list, which the harness does not do"
        if self.setup_patch or self.hidden:
            return "its image must be changed before the patch is applied, which the harness does not do"
        return "" if self.workdir == WORKDIR else f"its repository is in {self.workdir}, not in {WORKDIR}"

    def harness_row(self) -> dict[str, Any]:
        """Return the task as a row for swebench 5.x."""
        return {
            "instance_id": self.instance_id,
            "repo": self.repo,
            "version": self.version,
            "base_commit": self.base_commit,
            "image": self.image,
            "eval_script": self.eval_script,
            "log_parser": self.log_parser,
            "eval_type": self.eval_type,
            "FAIL_TO_PASS": list(self.fail_to_pass),
            "PASS_TO_PASS": list(self.pass_to_pass),
            "patch": self.patch,
            "problem_statement": self.problem_statement,
            "image_assets": {"test_patch": [{"path": path, "url": url} for path, url in self.assets]},
        }


def held_out(tasks: Iterable[SweTask], count: int, seed: int = 0) -> list[SweTask]:
    """Return ``count`` tasks (or all, if there are fewer) to evaluate on, for data sets without a split for it.

    Drawn by a hash of seed and id, so the draw depends neither on the order of the rows nor on how many are refused.
    The published split of SWE-Gym holds out 100 of 2,438 tasks (``swegym.HELD_OUT``).
    """
    return sorted(tasks, key=lambda task: hashlib.sha256(f"{seed}:{task.instance_id}".encode()).digest())[:count]


class _Tasks(Sequence[SweTask]):
    """Tasks in a fixed order."""

    def __init__(self, tasks: Iterable[SweTask]):
        self._tasks = tuple(tasks)

    @overload
    def __getitem__(self, index: int) -> SweTask: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SweTask]: ...
    def __getitem__(self, index: int | slice) -> SweTask | Sequence[SweTask]:
        return self._tasks[index]

    def __len__(self) -> int:
        return len(self._tasks)


class EvaluationSet(_Tasks):
    """The evaluation tasks, which must stay out of training.

    A task conflicts with them by its id, by its repository's name and commit, or by the changes of its gold patch;
    with ``whole_repositories``, by its repository alone.
    """

    def __init__(self, tasks: Iterable[SweTask], *, whole_repositories: bool = False):
        super().__init__(tasks)
        self._ids = {task.instance_id.lower() for task in self._tasks}
        self._commits = {_commit(task) for task in self._tasks}
        self._patches = {_changes(task.patch) for task in self._tasks if task.patch}
        self._repositories = {_name(task) for task in self._tasks} if whole_repositories else frozenset[str]()

    def conflict(self, task: SweTask) -> str:
        """Return why a task may not be trained on; empty if it may."""
        if task.instance_id.lower() in self._ids:
            return "it is in the evaluation set"
        if _commit(task) in self._commits:
            return f"the evaluation set has {task.repo} at commit {task.base_commit[:8]}"
        if task.patch and _changes(task.patch) in self._patches:
            return "its gold patch is one of the evaluation set"
        if _name(task) in self._repositories:
            return f"the evaluation set has tasks of {task.repo}"
        return ""


class TrainingTasks(_Tasks):
    """Tasks that may be trained on. Raises ConfigError if one conflicts with the evaluation set ``never``."""

    def __init__(self, tasks: Iterable[SweTask], *, never: EvaluationSet):
        super().__init__(tasks)
        self.never = never
        conflicts = {task.instance_id: why for task in self._tasks if (why := never.conflict(task))}
        if conflicts:
            shown = "; ".join(f"{name}: {why}" for name, why in list(conflicts.items())[:5])
            raise ConfigError(
                f"{len(conflicts)} training tasks conflict with the evaluation set ({shown}); "
                "drop them with TrainingTasks.allowed"
            )

    @classmethod
    def allowed(cls, tasks: Iterable[SweTask], *, never: EvaluationSet) -> tuple[TrainingTasks, dict[str, str]]:
        """Return the tasks that may be trained on, and for every other task's id the reason why it may not."""
        reasons = [(task, never.conflict(task)) for task in tasks]
        refused = {task.instance_id: why for task, why in reasons if why}
        return cls([task for task, why in reasons if not why], never=never), refused


def _name(task: SweTask) -> str:
    """Return the repository's name without its owner, also for SWE-smith's copies (swesmith/owner__name.commit)."""
    repo = task.repo.lower().rpartition("/")[2]
    if task.repo.lower().startswith("swesmith/"):
        repo = repo.rpartition(".")[0].rpartition("__")[2]
    return repo.replace("_", "-")  # data sets spell some names either way


def _commit(task: SweTask) -> tuple[str, str]:
    return _name(task), task.base_commit[:8].lower()


def _changes(patch: str) -> str:
    """Return a digest of a patch's changed lines, whatever their place."""
    lines = [line for line in split_lines(patch) if line[:1] in "+-" and line[:4] not in ("+++ ", "--- ")]
    return hashlib.sha256("\n".join(line.strip() for line in lines).encode()).hexdigest()
