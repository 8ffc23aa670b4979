"""Examine this machine for a recipe or a run: what will not work, and the way out.

  megatron-dagger doctor qwen3_8b_swegym_8h100
  megatron-dagger doctor runs/mine --skip teacher --json
  megatron-dagger doctor runs/mine --recipe quickstart dagger.rounds=5     as run is called: a run not yet created

It takes a minute and leaves nothing behind; a check that hangs is abandoned after one or two. The sbatch files run it
first, on every node of the job.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dagger.cli.arguments import recipe_or_run
from megatron_dagger.config import ConfigError, RunConfig
from megatron_dagger.driver.preemption import stop_on_signals

if TYPE_CHECKING:
    from megatron_dagger.driver.doctor import Finding

CHECK_DEADLINE_S = 60.0
LONG_DEADLINES_S = {"ranks": 110.0, "sandbox": 110.0}  # starting processes on all nodes; pulling an image
SHARED_WAIT_S = 90.0  # until the folder that another node made is seen, late on some network file systems
STALE_S = 600.0  # older folders are those of killed processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="NAME", help="the recipe, if the run does not exist yet")
    parser.add_argument(
        "subject", nargs="*", metavar="RECIPE|RUN|NAME=VALUE", help="a recipe or a run directory; settings"
    )
    parser.add_argument("--skip", metavar="CHECK,...", default="", help="checks to leave out, such as teacher")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    for option in ("--take-over", "--dry-run"):  # of run, whose arguments a job passes on
        parser.add_argument(option, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--gpu", help=argparse.SUPPRESS)


@stop_on_signals()
def main(arguments: argparse.Namespace) -> int:
    """Return 0 if no check found a problem, else 1."""
    from megatron_dagger.driver.doctor import CHECKS, Examination, examine
    from megatron_dagger.driver.doctor.checks import FIRST_NODE_ONLY
    from megatron_dagger.driver.run_dir import cache_dir, load_origin
    from megatron_dagger.training.ranks.launch import node_rank

    name, run_dir, config = _subject(arguments)
    skip = set(filter(None, arguments.skip.split(",")))
    if unknown := sorted(skip - CHECKS.keys()):
        raise ConfigError(f"--skip {','.join(unknown)}: choose from {', '.join(CHECKS)}")
    node = node_rank(config.training.parallel)
    skip |= FIRST_NODE_ONLY if node else set()
    findings: dict[str, Finding] = {}
    with ExitStack() as stack:
        examination = Examination(
            config=config,
            run_dir=run_dir,
            work_dir=_work_dir(run_dir, node, stack),
            cache_dir=cache_dir(),
            stack=stack,
            node=node,
            gpu=arguments.gpu or load_origin(run_dir).gpu,
        )
        for check, function in CHECKS.items():
            if check in skip:
                continue
            deadline_s = LONG_DEADLINES_S.get(check, CHECK_DEADLINE_S)
            findings[check] = examine(examination, check, function, deadline_s=deadline_s)
            if not arguments.json:
                _print(check, findings[check], prefix=f"{socket.gethostname()}: " if node else "")
    problems, host = examination.problems, socket.gethostname()
    if arguments.json:
        checks = {check: asdict(finding) for check, finding in findings.items()}
        print(json.dumps({"subject": name, "host": host, "ok": not problems, "checks": checks}, indent=1))
    elif problems:
        sys.stderr.write(f"error: {name} will not work on {host}: {', '.join(problems)}\n")
    sys.stdout.flush()
    code = int(bool(problems))
    if examination.hanging:
        os._exit(code)  # not even threads of its own keep this process
    return code


def _subject(arguments: argparse.Namespace) -> tuple[str, Path, RunConfig]:
    """Return the subject's name, its run directory, and its config. Of an existing run its own settings count."""
    from megatron_dagger.driver.run_dir import CONFIG

    runs = [word for word in arguments.subject if "=" not in word]
    if not arguments.recipe or not runs or Path(runs[0], CONFIG).is_file():
        name, config = recipe_or_run(arguments.subject, None if runs else arguments.recipe)
        return name, Path(name) if Path(name, CONFIG).is_file() else Path("runs", name), config
    settings = [word for word in arguments.subject if word != runs[0]]
    return runs[0], Path(runs[0]), recipe_or_run(settings, arguments.recipe)[1]


def _work_dir(run_dir: Path, node: int, stack: ExitStack) -> Path:
    """Return a folder beside the run that the nodes of a job share; the first node makes and removes it."""
    from megatron_dagger.driver.doctor.machine import existing_parent

    parent = existing_parent(run_dir.resolve().parent)
    for stale in parent.glob(".doctor-*"):
        with contextlib.suppress(FileNotFoundError):  # another node removes it as well
            if time.time() - stale.stat().st_mtime > STALE_S:
                shutil.rmtree(stale, ignore_errors=True)
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".doctor-", dir=parent)))
    names = ("SLURM_RESTART_COUNT", "SLURM_STEP_ID")
    folder = parent / "-".join([".doctor", job, *(os.environ.get(name, "0") for name in names)])
    if node == 0:
        folder.mkdir(exist_ok=True)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        return folder
    end = time.monotonic() + SHARED_WAIT_S
    while folder.name not in os.listdir(parent):
        if time.monotonic() > end:
            raise ConfigError(f"{parent} is not shared: this node does not see {folder.name}, which the first one made")
        time.sleep(0.2)
    return folder


def _print(check: str, finding: Finding, *, prefix: str) -> None:
    print(f"{prefix}{finding.status:8} {check.replace('_', ' '):14} {finding.text}", flush=True)
    if finding.advice:
        print(f"{prefix}{'':24}-> {finding.advice}", flush=True)
