"""What a check is, and how checks are run: one after the other, each under a time limit.

A check returns a Finding or raises; every error is a finding of its own, so a machine on which nothing is installed is
examined to the end. What a check opens goes into the examination's ``stack``, which closes it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from megatron_dagger.config import RunConfig
from megatron_dagger.envs.environment import Environment

logger = logging.getLogger(__name__)


class Status(StrEnum):
    """What a check found."""

    OK = "ok"
    WARNING = "warning"  # the run works, but not well
    PROBLEM = "problem"  # the run will fail
    SKIPPED = "skipped"  # not needed, or not possible here


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of a check: what it saw, and what to do about it."""

    status: Status
    text: str
    advice: str = ""
    seconds: float = 0.0


@dataclass(kw_only=True)
class Examination:
    """A run's settings and folder, a folder for files of the checks, and what earlier checks leave to later ones."""

    config: RunConfig
    run_dir: Path  # it may not exist yet
    work_dir: Path  # on a file system that all nodes share
    cache_dir: Path
    stack: ExitStack
    environment: Environment | None = None
    prompt: tuple[str, str] | None = None  # a task's system and first message
    gpu: str | None = None  # the kind that the user named for the run, or planning.gpus.ANY_GPU
    node: int = 0  # which of the job's nodes this is
    problems: list[str] = field(default_factory=list)  # names of checks
    hanging: bool = False  # whether a check was abandoned


Check = Callable[[Examination], Finding]


def ok(text: str) -> Finding:
    return Finding(status=Status.OK, text=text)


def skipped(text: str) -> Finding:
    return Finding(status=Status.SKIPPED, text=text)


def warning(text: str, advice: str) -> Finding:
    return Finding(status=Status.WARNING, text=text, advice=advice)


def problem(text: str, advice: str) -> Finding:
    return Finding(status=Status.PROBLEM, text=text, advice=advice)


def examine(examination: Examination, name: str, check: Check, *, deadline_s: float) -> Finding:
    """Run a check and return its finding; one that takes longer than ``deadline_s`` is abandoned, with a warning."""
    findings: list[Finding] = []

    def run() -> None:
        try:
            findings.append(check(examination))
        except Exception as error:  # whatever a part of the machine raises is what the user wants to know
            logger.debug("a check failed", exc_info=error)
            findings.append(problem(str(error) or type(error).__name__, ""))

    began = time.monotonic()
    thread = threading.Thread(target=run, name=f"check-{name}", daemon=True)
    thread.start()
    thread.join(deadline_s)
    if not findings:
        examination.hanging = True
        findings.append(warning(f"no answer within {deadline_s:.0f} s", f"--skip {name} leaves this check out"))
    if findings[0].status is Status.PROBLEM:
        examination.problems.append(name)
    return replace(findings[0], seconds=time.monotonic() - began)
