"""Calls of the command line with their expected outcomes: mistakes that users make, and calls that must work.

Each case runs in this process, in a temporary directory with one run, ``q``: the quickstart recipe with two rounds,
of which round 1 is trained. ``run_cases`` returns the cases that failed, with the reason.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dagger.cli.main import main
from megatron_dagger.store.aggregated import DataStore
from megatron_dagger.types import ActedBy, Action, StopReason, Trajectory, Turn

SWE = ("swe.train=rows.jsonl", "swe.heldout=rows.jsonl", "teacher.urls=[http://x/v1]", "teacher.model=m")


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


def _wrong(name: str, argv: Sequence[str], *says: str, absent: Sequence[str] = ()) -> Case:
    return Case(name=name, argv=argv, code=2, says=says, absent=absent)


CASES = (
    # a typo leaves no run directory behind
    _wrong(
        "a missing checkpoint is refused before anything is written",
        ("run", "n", "--recipe", "quickstart", "init_checkpoint=/nope"),
        "init_checkpoint=/nope: no such directory",
        absent=("n",),
    ),
    _wrong(
        "an unknown package is refused before anything is written",
        ("run", "n", "--recipe", "quickstart", "repo_repair.train_packages=[nosuchpackage]"),
        "repo_repair.train_packages",
        "nosuchpackage",
        absent=("n",),
    ),
    Case(
        name="a run without an episode can be created again with other settings",
        argv=("create", "m", "--recipe", "quickstart", "seed=2"),
        before=(("create", "m", "--recipe", "quickstart", "seed=1"),),
        code=0,
        says=("0 1 2",),
    ),
    # values that are not YAML
    _wrong(
        "broken YAML in a setting is named",
        ("run", "n", "--recipe", "quickstart", "dagger.rounds=["),
        "dagger.rounds='['",
        "not a YAML value",
        absent=("n",),
    ),
    _wrong("a damaged config.yaml is named", ("show", "damaged"), "damaged/config.yaml is not a YAML file"),
    # the rules of the trainer and the planner are checked before round 0
    _wrong(
        "trainer rules are checked first",
        (
            "run",
            "n",
            "--recipe",
            "quickstart",
            "training.parallel.context_parallel_size=2",
            "training.parallel.world_size=8",
        ),
        "training.parallel.context_parallel_size=2",
        absent=("n",),
    ),
    _wrong(
        "trainer rules are checked in a dry run too",
        (
            "run",
            "n",
            "--recipe",
            "quickstart",
            "--dry-run",
            "training.parallel.context_parallel_size=2",
            "training.parallel.world_size=8",
        ),
        "training.parallel.context_parallel_size=2",
    ),
    _wrong(
        "a recipe that does not fit is refused with the nearest settings that fit",
        (
            "create",
            "n",
            "--recipe",
            "qwen3_8b_swegym_8h100",
            "training.parallel.tensor_model_parallel_size=2",
            "init_checkpoint=checkpoint",
            *SWE,
        ),
        "does not fit 8 x h100",
        "the nearest settings that fit: training.parallel.tensor_model_parallel_size=8",
        absent=("n",),
    ),
    # one way to name a recipe, and the usage of the right command
    Case(name="plan takes --recipe", argv=("plan", "--recipe", "qwen3_8b_swegym_8h100"), code=0, says=("turns/s",)),
    Case(name="plan takes a run directory", argv=("plan", "q"), code=0, says=("note: q trains in fp32",)),
    _wrong("two recipes are refused", ("plan", "quickstart", "--recipe", "quickstart"), "name one recipe"),
    _wrong(
        "a recipe in place of a run is explained",
        ("run", "quickstart"),
        "quickstart is a recipe: megatron-dagger run runs/quickstart --recipe quickstart",
    ),
    Case(
        name="run names the missing directory, not the optional settings",
        argv=("run",),
        code=2,
        says=("usage: megatron-dagger run", "required: RUN"),
        never_says=("NAME=VALUE\n",),
    ),
    Case(
        name="validate names the missing file, not the optional settings",
        argv=("validate",),
        code=2,
        says=("usage: megatron-dagger validate", "required: FILE"),
        never_says=("required: FILE, NAME=VALUE",),
    ),
    _wrong(
        "a setting is found by its last name",
        ("run", "n", "--recipe", "quickstart", "lr=1e-3"),
        "unknown setting lr; did you mean training.optimizer.lr?",
        absent=("n",),
    ),
    _wrong(
        "a misspelt setting is suggested with its whole name",
        ("run", "n", "--recipe", "quickstart", "dagger.round=1"),
        "did you mean dagger.rounds?",
    ),
    _wrong(
        "a setting without = has the command's own usage",
        ("run", "n", "--recipe", "quickstart", "training.optimizer.lr", "1e-3"),
        "usage: megatron-dagger run",
        "'training.optimizer.lr' is not a setting: write NAME=VALUE",
    ),
    _wrong(
        "a setting with dashes is explained",
        ("run", "n", "--recipe", "quickstart", "--training.optimizer.lr=1e-3"),
        "usage: megatron-dagger run",
        "settings are NAME=VALUE, without dashes: training.optimizer.lr=1e-3",
    ),
    _wrong("a stray word has the command's own usage", ("show", "q", "1"), "usage: megatron-dagger show", ": 1"),
    _wrong("a misspelt option is suggested", ("show", "q", "--rounds", "1"), "did you mean --round?"),
    _wrong("an option of another command", ("train", "q", "--worker", "0/2"), "usage: megatron-dagger train"),
    # changing an existing run
    Case(
        name="rounds can be raised",
        argv=("create", "q", "dagger.rounds=4"),
        code=0,
        says=("0 1 2 3 4",),
        settings=("  rounds: 4",),
    ),
    _wrong("rounds cannot be lowered", ("create", "q", "dagger.rounds=1"), "dagger.rounds"),
    Case(
        name="a changed budget of a repeated command wins",
        argv=("create", "q", "--recipe", "quickstart", "teacher.token_budget=9"),
        code=0,
        settings=("  token_budget: 9",),
    ),
    Case(
        name="an old script does not lower a raised budget",
        argv=("create", "b", "--recipe", "quickstart", "teacher.token_budget=5"),
        before=(
            ("create", "b", "--recipe", "quickstart", "teacher.token_budget=5"),
            ("create", "b", "teacher.token_budget=50"),
        ),
        code=0,
        settings=("  token_budget: 50",),
        run="b",
    ),
    Case(
        name="another recipe for a run is refused in one line",
        argv=("run", "q", "--recipe", "smollm2_135m_repair_1gpu"),
        code=2,
        says=("q was created by recipe quickstart and has other settings", "more)"),
    ),
    # rounds
    _wrong("evaluate beyond the run", ("evaluate", "q", "--round", "7"), "round 7: this run has rounds 0 to 2"),
    _wrong("rollout beyond the run", ("rollout", "q", "--round", "3"), "round 3: this run has rounds 0 to 2"),
    _wrong("train beyond the run", ("train", "q", "--round", "-1"), "round -1: this run has rounds 0 to 2"),
    _wrong(
        "rollout needs --round or --resident", ("rollout", "q"), "usage: megatron-dagger rollout", "--round --resident"
    ),
    Case(
        name="a finished stage is reported and starts nothing",
        argv=("train", "q", "--round", "1"),
        code=0,
        says=("round 1 train: already done",),
        never_says=("making repair tasks", "Traceback"),
    ),
    # values of settings
    Case(
        name="a list of one needs no brackets",
        argv=(
            "run",
            "n",
            "--recipe",
            "quickstart",
            "--dry-run",
            "teacher.urls=http://x/v1",
            "teacher.model=m",
        ),
        code=0,
        says=("- http://x/v1",),
        absent=("n",),
    ),
    Case(
        name="old names of settings are read",
        argv=("create", "n", "--recipe", "quickstart", "--dry-run", "tasks.train_tasks=17"),
        code=0,
        says=("train_tasks: 17",),
    ),
    _wrong(
        "a mapping in place of a value", ("create", "n", "--recipe", "quickstart", "seed={a: 1}"), "seed: expected int"
    ),
    _wrong("an unknown recipe", ("create", "n", "--recipe", "quikstart"), "did you mean quickstart?"),
    # the command itself
    Case(name="--version", argv=("--version",), code=0, says=("megatron-dagger ",)),
    Case(name="help", argv=("help",), code=0, says=("inspect:", "exit codes")),
    Case(name="help of a command", argv=("help", "run"), code=0, says=("usage: megatron-dagger run",)),
    Case(name="no command", argv=(), code=0, says=("usage: megatron-dagger COMMAND",)),
    _wrong("an unknown command", ("statsu", "q"), "there is no command 'statsu'; did you mean status?"),
    Case(
        name="--debug prints the traceback",
        argv=("--debug", "show", "nowhere"),
        code=2,
        says=("Traceback", "nowhere is not a run directory"),
        never_says=(),
    ),
    Case(name="the old name of validate", argv=("admit", "--help"), code=0, says=("usage: megatron-dagger validate",)),
    _wrong("status of a missing run", ("status", "nowhere"), "nowhere is not a run directory (it has no config.yaml)"),
    _wrong("report on a missing run", ("report", "nowhere"), "nowhere is not a run directory", absent=("nowhere",)),
    Case(
        name="no episodes yet",
        argv=("show", "m"),
        before=(("create", "m", "--recipe", "quickstart"),),
        code=2,
        says=("m has no collected episodes yet",),
    ),
    _wrong("a round without episodes", ("show", "q", "--round", "1"), "round 1 has no episodes; rounds that have: 0"),
    _wrong("no evaluation yet", ("export", "q", "--out", "x", "--evaluation"), "q has no evaluated episodes yet"),
    _wrong("a round that is not a number", ("export", "q", "--out", "x", "--round", "a"), "'a' is neither a number"),
    _wrong("nothing to grade", ("grade", "q", "--check"), "q has no SWE-bench tasks to grade"),
    _wrong(
        "data sets that do not exist",
        ("validate", "r.json", "swe.train=no.jsonl", "swe.heldout=no.jsonl"),
        "no.jsonl: no such file",
    ),
    _wrong("a conversion of a missing checkpoint", ("convert", "inspect", "nowhere"), "nowhere"),
    _wrong("an impossible worker", ("rollout", "q", "--round", "0", "--worker", "4/4"), "worker 4/4"),
)


def run_cases(cases: Sequence[Case] = CASES) -> dict[str, str]:
    """Run the cases; return the problems of those that failed, by the case's name."""
    return {case.name: problem for case in cases if (problem := problem_of(case))}


def problem_of(case: Case) -> str:
    """Run one case; return the problems of its outcome and its output, or an empty string."""
    with _directory():
        for argv in case.before:
            _call(argv)
        code, output = _call(case.argv)
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
            _call(("create", "q", "--recipe", "quickstart", "dagger.rounds=2"))
            train = Path("q/rounds/0001/train")
            train.mkdir(parents=True)
            (train / "manifest.json").write_text("{}")
            Path("q/metrics.jsonl").write_text(json.dumps({"round": 1, "stage": "train"}) + "\n")
            DataStore.create_or_open(Path("q/data.zarr")).append([_episode()])
            Path("damaged").mkdir()
            Path("damaged/config.yaml").write_text("name: [")
            Path("checkpoint/hf").mkdir(parents=True)
            Path("rows.jsonl").write_text("")
            yield
        finally:
            os.chdir(before)
            for handler in set(root.handlers).difference(handlers):  # a command logs to the run's folder
                root.removeHandler(handler)
                handler.close()
            root.handlers[:] = handlers
            root.setLevel(level)
