"""Run the cells of a study one by one, through the command line, and keep their outcomes.

``OUT/runs/NAME`` is a run directory, ``OUT/logs/NAME.log`` what its program printed, ``OUT/outcomes/NAME.json`` its
numbers, which exist when the run is finished. Repeating a killed study goes on where it was. Several processes may work
on a study: each takes the runs of a (horizon, seed) that no other holds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

from megatron_dagger.config.base import require
from megatron_dagger.driver.run_dir import load_origin, load_run_config
from megatron_dagger.observability.metrics import append_line, read_lines
from megatron_dagger.store.atomic import TEMPORARY_PREFIX
from megatron_dagger.store.lock import LockedError, exclusive
from tools.study.outcome import Outcome, load, read_outcome, save
from tools.study.plan import RECIPE, Cell, Plan
from tools.study.shared import choose_donor, start_from

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
DEADLINE_S = 6 * 3600.0  # of one run
STOP_S = 180.0  # for saving its state


class Study:
    """The files of a study in the folder ``out``."""

    def __init__(self, out: Path, plan: Plan):
        self.out, self.plan = out, plan

    def outcomes(self) -> list[Outcome]:
        """Return the outcomes of the plan's finished runs, in its order."""
        paths = map(self._outcome_file, self.plan.all_cells())
        return [load(path) for path in paths if path.exists()]

    def pending(self) -> list[Cell]:
        return [cell for cell in self.plan.all_cells() if not self._outcome_file(cell).exists()]

    def seconds_to_go(self, outcomes: Sequence[Outcome]) -> float:
        """Return a guess of the time of the pending runs, corrected by how long the finished ones took."""
        assumed = sum(self.plan.assumed_seconds(outcome.cell) for outcome in outcomes)
        correction = sum(outcome.seconds for outcome in outcomes) / assumed if assumed else 1.0
        return correction * sum(map(self.plan.assumed_seconds, self.pending()))

    def check(self) -> None:
        """Raise ConfigError if a run was begun with other settings than the plan's, or if the plan's cannot work."""
        for cell in self.plan.all_cells():
            if cell.seed == 0:
                self.plan.config(cell)
            run_dir, settings = self._run_dir(cell), set(self.plan.run_settings(cell))
            other = sorted(settings ^ set(load_origin(run_dir).settings)) if run_dir.exists() else []
            require(
                not other,
                f"{run_dir} was begun with other settings ({', '.join(other[:4])}): repeat the study's own command, or "
                "give another --out",
            )

    def run(self) -> Iterator[Outcome]:
        """Run the pending cells; yield the outcome of each. Raises RuntimeError if a run fails."""
        for (horizon, seed), group in groupby(self.pending(), key=lambda cell: (cell.horizon, cell.seed)):
            lock = self.out / "locks" / f"k{horizon}-s{seed}"
            lock.parent.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:
                try:
                    stack.enter_context(exclusive(lock, deadline_s=0.0))
                except LockedError:  # another process does these
                    continue
                for cell in group:
                    if not self._outcome_file(cell).exists():
                        yield self._run(cell)

    def _run(self, cell: Cell) -> Outcome:
        run_dir, settings = self._run_dir(cell), self.plan.run_settings(cell)
        started = time.monotonic()
        try:
            if not run_dir.exists():
                self._start(cell, run_dir, settings)
            log = self.out / "logs" / f"{cell.name}.log"
            run_program(["run", str(run_dir), "--recipe", RECIPE, *settings], log)
        finally:  # a killed run's time counts as well
            append_line(self.out / "times.jsonl", {"run": cell.name, "seconds": time.monotonic() - started})
        times = [row["seconds"] for row in read_lines(self.out / "times.jsonl") if row["run"] == cell.name]
        outcome = read_outcome(run_dir, cell, sum(times))
        save(self._outcome_file(cell), outcome)
        return outcome

    def _start(self, cell: Cell, run_dir: Path, settings: Sequence[str]) -> None:
        """Create the run from what the finished runs of its tasks have in common with it, if any."""
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        for leftover in run_dir.parent.glob(f"{TEMPORARY_PREFIX}{cell.name}-*"):
            shutil.rmtree(leftover)
        done = [outcome.cell for outcome in self.outcomes()]
        paths = [self._run_dir(c) for c in done if (c.horizon, c.seed) == (cell.horizon, cell.seed)]
        donor, common = choose_donor(self.plan.config(cell), {p: load_run_config(p) for p in paths if p.exists()})
        if donor is not None:
            start_from(donor, common, run_dir, RECIPE, settings)

    def _run_dir(self, cell: Cell) -> Path:
        return self.out / "runs" / cell.name

    def _outcome_file(self, cell: Cell) -> Path:
        return self.out / "outcomes" / f"{cell.name}.json"


def run_program(arguments: Sequence[str], log: Path) -> None:
    """Run a command of megatron-dagger with its output in ``log``. Raises RuntimeError if it fails.

    If this process is interrupted, the command saves its state and ends first.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "megatron_dagger.cli.main", *arguments]
    with log.open("a") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **VARIABLES}, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
        try:
            code = process.wait(timeout=DEADLINE_S)
        except BaseException:
            process.terminate()
            try:
                process.wait(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
    if code:
        raise RuntimeError(f"{' '.join(command[3:5])} ended with exit code {code}; see {log}:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]
