"""Run a call of the command line in a prepared directory and compare its outcome with what is expected.

The directory has a run, ``q``: the recipe short_repair with two rounds, of which round 1 is trained.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dagger.cli.main import main
from megatron_dagger.recipes import find_recipe
from megatron_dagger.store.aggregated import DataStore
from megatron_dagger.types import ActedBy, Action, StopReason, Trajectory, Turn
from tools.support.checkpoints import write_index

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call: its arguments, exit code, texts that its output must and must not have, and files it must not write."""

    name: str
    argv: Sequence[str]
    code: int
    says: Sequence[str] = ()
    never_says: Sequence[str] = ("Traceback",)
    absent: Sequence[str] = ()  # paths that must not exist afterwards
    before: Sequence[Sequence[str]] = ()  # calls made first; their outcome does not matter
    settings: Sequence[str] = ()  # lines that the config.yaml of ``run`` must have afterwards
    run: str = "q"
    launcher: bool = False  # a call of ``python -m megatron_dagger.launch`` in .venv-launch, not of the command line


def wrong(name: str, argv: Sequence[str], *says: str, absent: Sequence[str] = ()) -> Case:
    """Return the case of a call that is refused (exit code 2)."""
    return Case(name=name, argv=argv, code=2, says=says, absent=absent)


def right(name: str, argv: Sequence[str], *says: str) -> Case:
    """Return the case of a call that works."""
    return Case(name=name, argv=argv, code=0, says=says)


def problem_of(case: Case) -> str:
    """Run one case; return the problems of its outcome and its output, or an empty string."""
    with _directory():
        for argv in case.before:
            _call(argv)
        code, output = _launch(case.argv) if case.launcher else _call(case.argv)
        problems = [f"exit code {code}, not {case.code}"] if code != case.code else []
        problems += [
            f"does not say {text!r}" for text in case.says if " ".join(text.split()) not in " ".join(output.split())
        ]
        problems += [f"says {text!r}" for text in case.never_says if text in output]
        problems += [f"wrote {path}" for path in case.absent if Path(path).exists()]
        config = Path(case.run, "config.yaml").read_text().splitlines()
        problems += [f"{case.run}/config.yaml lacks {line!r}" for line in case.settings if line not in config]
    return f"{'; '.join(problems)}\n{output}" if problems else ""


def _call(argv: Sequence[str]) -> tuple[int, str]:
    """Call the command line; return its exit code and its output, standard error included."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = main(list(argv))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
    return code, output.getvalue()


def _launch(argv: Sequence[str]) -> tuple[int, str]:
    """Call NeMo-Run's command line with our entry point; return its exit code and its output."""
    command = [str(ROOT / ".venv-launch" / "bin" / "python"), "-m", "megatron_dagger.launch", *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout + done.stderr


def _episode() -> Trajectory:
    tokens = np.arange(3, dtype=np.int32)
    action = Action(text="submit", tokens=tokens)
    turn = Turn(observation="", prompt_tokens=tokens, acted_by=ActedBy.TEACHER, action=action, label=action)
    return Trajectory(
        task_id="task",
        attempt=0,
        round_index=0,
        turns=(turn,),
        stop_reason=StopReason.SUBMITTED,
        solved=True,
        beta=1.0,
        duration_s=1.0,
    )


@contextlib.contextmanager
def _directory() -> Iterator[None]:
    """Work in a temporary directory with the run q, a damaged run and the inputs that the cases name."""
    before, root = os.getcwd(), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            _call(("create", "q", "--recipe", "short_repair", "dagger.rounds=2"))
            train = Path("q/rounds/0001/train")
            train.mkdir(parents=True)
            (train / "manifest.json").write_text("{}")
            Path("q/metrics.jsonl").write_text(json.dumps({"round": 1, "stage": "train"}) + "\n")
            DataStore.create_or_open(Path("q/data.zarr")).append([_episode()])
            DataStore.create_or_open(Path("q/evaluations.zarr")).append([_episode()])
            Path("q/logs").mkdir()
            Path("q/logs/driver.log").touch()
            Path("empty").mkdir()
            Path("empty/config.yaml").touch()
            Path("damaged").mkdir()
            Path("damaged/config.yaml").write_text("name: [")
            model = find_recipe("qwen3_8b_swegym_8h100")().model
            write_index(Path("checkpoint"), model)
            Path("rows.jsonl").write_text("")
            yield
        finally:
            os.chdir(before)
            for handler in set(root.handlers).difference(handlers):  # a command logs to the run's folder
                root.removeHandler(handler)
                handler.close()
            root.handlers[:] = handlers
            root.setLevel(level)
