"""Check training and weight transfer on one CUDA GPU, in at most --seconds (500).

- attention: output and gradients of attention by compiled block masks, against attention without them.
- bridge: all weights of a model through CUDA IPC to another process, compared; the transfer's rate against a copy in
  memory, and the rate of the digests.
- ranks: a rank on each GPU, which add up by NCCL.
- serve-*: vLLM serves the checkpoints that a trainer wrote in BF16 and FP8, with CUDA graphs, and takes the next
  weights in place; digests and canary are compared.
- curve-*: a small model trained by the trainer of real runs in fp32, BF16, FP8 and with their options, saved and
  resumed; its losses against those in fp32 on the CPU, from the same seed on the same rows.
- speed-*: a model of Qwen3's shape: tokens per second, the share of the GPU's peak (model FLOPs without recomputation),
  and peak memory against the planner's estimate.

Checks run in worker processes (tools.check.gpu_worker). If one fails, hangs or leaves CUDA unusable, the others still
run. It needs Transformer Engine.

    .venv/bin/python -m tools.check.gpu                          all checks
    .venv/bin/python -m tools.check.gpu --checks attention,bridge
    .venv/bin/python -m tools.check.gpu --model 4b-64k --checks speed-bf16,speed-bf16_separate
    .venv/bin/python -m tools.check.gpu --dry-run                the same code on the CPU with tiny models, a minute

Each check prints a line when it ends. The last line is ``RESULT {json}``; the exit code is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dagger.config import to_dict
from megatron_dagger.planning.gpus import device_peak
from megatron_dagger.training.ranks.launch import gpu_variables
from tools.check.gpu_cases import DRY, REFERENCES, SIZES, VARIANTS
from tools.check.gpu_worker import POISONED

ROOT = Path(__file__).resolve().parents[2]
ATTENTION_LIMIT = 0.02  # relative to the largest value, in BF16
NAMES = ["attention", "bridge", "ranks", "serve-bf16", "serve-fp8_tensorwise", *(f"curve-{name}" for name in VARIANTS)]
NAMES += [f"speed-{name}" for name, variant in VARIANTS.items() if variant.speed]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", default=",".join(NAMES), help="comma-separated names of checks (default: all)")
    parser.add_argument(
        "--model", choices=list(SIZES), default="1.7b", help="model of the checks speed-* (default %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=500.0, help="time limit of all checks (default %(default)s)")
    parser.add_argument("--each", type=float, default=150.0, help="time limit of one check (default %(default)s)")
    parser.add_argument(
        "--peak-tflops", type=float, help="dense BF16 peak of a GPU that megatron_dagger/planning/gpus.py does not list"
    )
    parser.add_argument("--logs", type=Path, help="keep logs and results in this new folder")
    parser.add_argument("--dry-run", action="store_true", help="run on the CPU, with tiny models")
    arguments = parser.parse_args()
    names = arguments.checks.split(",")
    if unknown := [name for name in names if name not in NAMES]:
        parser.error(f"--checks {unknown[0]}: no such check; choose from {', '.join(NAMES)}")
    if arguments.logs and arguments.logs.exists() and any(arguments.logs.iterdir()):
        parser.error(f"--logs {arguments.logs}: the folder is not empty; name a new one")
    device = "dry run on the CPU" if arguments.dry_run else _device()
    if device is None:
        print("no CUDA GPU with Transformer Engine; --dry-run runs on the CPU", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="check-gpu-") as temporary:
        folder = arguments.logs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        sizes = DRY if arguments.dry_run else SIZES[arguments.model]
        (folder / "settings.json").write_text(json.dumps(to_dict(sizes)))
        report = Report(folder, device, arguments)
        run(folder, names, arguments, report)
    result = {"device": device, "model": arguments.model, **report.result()}
    print("RESULT " + json.dumps(result))
    return int(not result["ok"])


def _device() -> str | None:
    """Return the GPU's name; None without one. A subprocess asks for it, because this process must not use the GPU."""
    code = "import torch, transformer_engine.pytorch; print(torch.cuda.get_device_name())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if done.returncode:
        print(done.stderr[-1000:], file=sys.stderr)
        return None
    return done.stdout.strip().splitlines()[-1]


def run(folder: Path, names: list[str], arguments: argparse.Namespace, report: Report) -> None:
    """Run the checks one after another, and their CPU references in parallel. Return before --seconds have passed."""
    end = time.monotonic() + arguments.seconds
    curves = [VARIANTS[name.partition("-")[2]] for name in names if name.startswith("curve-")]
    references = [
        Worker(folder, [name], cpu=True) for name in REFERENCES if name in {variant.reference for variant in curves}
    ]
    try:
        remaining = list(names)
        while remaining and time.monotonic() < end:
            with Worker(folder, remaining, cpu=arguments.dry_run) as worker:
                remaining = _follow(worker, remaining, min(arguments.each, end - time.monotonic()), end, report)
        for reference in references:
            reference.wait(end)
        report.finish()
    finally:
        for reference in references:
            reference.__exit__()


def _follow(worker: Worker, names: list[str], each_s: float, end: float, report: Report) -> list[str]:
    """Report a worker's checks as they end. Return those that another worker must run.

    A check whose process ends or hangs is reported as failed and not run again.
    """
    remaining, since = list(names), time.monotonic()
    while remaining:
        code = worker.exit_code()  # before reading results: the last one may arrive in between
        before = len(remaining)
        remaining = [name for name in remaining if not report.read_result(name)]
        if len(remaining) < before:
            since = time.monotonic()
        elif code is not None:
            if code != POISONED:
                report.fail(remaining.pop(0), f"its process exited with {code}: {worker.log_tail()}")
            return remaining
        elif time.monotonic() > min(since + each_s, end):
            report.fail(remaining.pop(0), f"did not end within {time.monotonic() - since:.0f} s: {worker.log_tail()}")
            return remaining
        else:
            time.sleep(0.2)
    worker.wait(min(end, time.monotonic() + 30))
    return remaining


class Worker:
    """A process that runs checks. Leaving the block kills it and its children."""

    def __init__(self, folder: Path, names: Iterable[str], *, cpu: bool) -> None:
        names = list(names)
        self._log = folder / f"{names[0]}.log"
        environment = {**os.environ, **gpu_variables()}
        environment.pop("TORCHDYNAMO_DISABLE", None)  # it would keep FlexAttention from being compiled
        if cpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, "-m", "tools.check.gpu_worker", str(folder.resolve()), *names]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def exit_code(self) -> int | None:
        return self._process.poll()

    def wait(self, end: float) -> None:
        try:
            self._process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.__exit__()

    def log_tail(self) -> str:
        return " ".join(self._log.read_text(errors="replace")[-400:].split())

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Report:
    """Prints a line for each check when it ends, and collects the results."""

    def __init__(self, folder: Path, device: str, arguments: argparse.Namespace) -> None:
        self._folder, self._device, self._arguments = folder, device, arguments
        self._results: dict[str, dict[str, Any]] = {}
        print(device, flush=True)

    def read_result(self, name: str) -> bool:
        """Print the result of a check if it has ended; return whether it has."""
        result = self._read(name)
        if result is not None:
            self._results[name] = result
            self._print(name)
        return result is not None

    def fail(self, name: str, reason: str) -> None:
        self._results[name] = {"error": reason}
        self._print(name)

    def finish(self) -> None:
        """Compare the curves with their references, which may end after them."""
        for name, result in self._results.items():
            if name.startswith("curve-") and "error" not in result:
                self._compare(name, result)
                self._print(f"{name} against the CPU", result, shown=("difference", "limit"))

    def result(self) -> dict[str, Any]:
        missing = [name for name in self._arguments.checks.split(",") if name not in self._results]
        failed = [name for name, result in self._results.items() if not self._passed(name, result)]
        if missing:
            print(f"not run within --seconds {self._arguments.seconds:g}: --checks {','.join(missing)}")
        checks = {name: {k: v for k, v in r.items() if k != "losses"} for name, r in self._results.items()}
        return {"ok": not missing and not failed, "failed": failed, "not_run": missing, "checks": checks}

    def _compare(self, name: str, result: dict[str, Any]) -> None:
        variant = VARIANTS[name.partition("-")[2]]
        reference = self._read(variant.reference) or {"error": "it did not end in time"}
        if "error" in reference:
            result["error"] = f"{variant.reference}: {reference['error']}"
            return
        losses, expected = np.array(result["losses"]), np.array(reference["losses"])
        result["difference"] = float(np.abs(losses - expected).mean() / expected.mean())
        result["limit"] = variant.limit

    def _passed(self, name: str, result: dict[str, Any]) -> bool:
        if "error" in result:
            return False
        if name == "attention":
            return bool(result["difference"] <= ATTENTION_LIMIT)
        if name.startswith("curve-"):
            losses = result["losses"]
            learned = losses[-1] < 0.9 * losses[0] and result["resumed"] < 0.9 * losses[0]
            return result.get("difference", np.inf) <= result.get("limit", 0.0) and (
                learned or bool(self._arguments.dry_run)
            )
        return True

    def _print(self, name: str, result: dict[str, Any] | None = None, shown: tuple[str, ...] = ()) -> None:
        result = self._results[name] if result is None else result
        if "error" in result:
            print(f"{name:<40}FAILED: {result['error']}", flush=True)
            return
        if "losses" in result:
            result |= {"first_loss": result["losses"][0], "last_loss": result["losses"][-1]}
        if name.startswith("speed-") and (peak := self._peak(name)):
            result["peak_share"] = result["tflops"] / peak
        numbers = {k: v for k, v in result.items() if not isinstance(v, list) and (not shown or k in shown)}
        print(f"{name:<40}" + "  ".join(f"{k} {v:.4g}" for k, v in numbers.items()), flush=True)

    def _peak(self, name: str) -> float | None:
        """Return the GPU's dense peak in TFLOP/s for the variant's precision; None if it is unknown."""
        fp8 = VARIANTS[name.partition("-")[2]].precision.startswith("fp8")
        if self._arguments.peak_tflops is not None:
            return float(self._arguments.peak_tflops) * (2 if fp8 else 1)
        flops = device_peak(self._device, fp8=fp8)
        return flops / 1e12 if flops else None

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self._folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
