"""Checks training and the bridge on one CUDA GPU, in at most --seconds (500).

attention: the compiled block mask's output and gradients against attention run by run. bridge: all weights of a
model from one process to another through CUDA IPC, compared, its rate against a copy in memory, and that of the
digests. curve-*: a small model trained in fp32, BF16, the FP8 recipes and the options of these by the product's
trainer, saved, and resumed; its losses against those of fp32 on the CPU, from the same seed on the same rows.
speed-*: a model of Qwen3's shape; tokens per second, the share of the GPU's peak (model FLOPs, nothing recomputed
counted twice), and peak memory against the planner's figure.

Checks run in processes of their own (``gpu_checks``). One that fails, hangs or leaves CUDA unusable costs no
other: the rest goes on. Each line is printed as it comes, and at the end RESULT with all of it. --dry-run runs the
same code in a minute on a machine without a GPU, as far as the CPU can.
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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from megatron_dagger.config import to_dict  # noqa: E402
from tools.check.gpu_cases import DRY, REFERENCES, SIZES, VARIANTS  # noqa: E402
from tools.check.gpu_worker import POISONED  # noqa: E402

ATTENTION_LIMIT = 0.02  # of the largest value, in BF16
# Dense peak in TFLOP/s (NVIDIA's data sheets, without sparsity): BF16, FP8.
PEAKS = {"H100 PCIe": (756, 1513), "H100 NVL": (835, 1671), "H100": (989, 1979), "H200": (989, 1979)}
NAMES = ["attention", "bridge", *(f"curve-{name}" for name in VARIANTS)]
NAMES += [f"speed-{name}" for name, variant in VARIANTS.items() if variant.speed]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", default=",".join(NAMES), help="comma-separated (default: all)")
    parser.add_argument("--model", choices=list(SIZES), default="1.7b", help="for the speed (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=500.0, help="for all checks together (default %(default)s)")
    parser.add_argument("--each", type=float, default=150.0, help="for one check (default %(default)s)")
    parser.add_argument("--peak-tflops", type=float, help="the GPU's dense BF16 peak, if it is not known here")
    parser.add_argument("--logs", type=Path, help="keep the checks' logs and results in this new folder")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny models")
    arguments = parser.parse_args()
    names = arguments.checks.split(",")
    if unknown := [name for name in names if name not in NAMES]:
        parser.error(f"unknown check {unknown[0]}; there are {', '.join(NAMES)}")
    if arguments.logs and arguments.logs.exists() and any(arguments.logs.iterdir()):
        parser.error(f"--logs {arguments.logs} is not empty; name a new folder")
    device = "dry run on the CPU" if arguments.dry_run else _device()
    if device is None:
        print("gpu_check needs one CUDA GPU and Transformer Engine; --dry-run does without", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as temporary:
        folder = arguments.logs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        size = DRY if arguments.dry_run else SIZES[arguments.model]
        (folder / "settings.json").write_text(json.dumps(to_dict(size)))
        report = Report(folder, device, arguments)
        run(folder, names, arguments, report)
    result = {"device": device, "model": arguments.model, **report.result()}
    print("RESULT " + json.dumps(result))
    return int(not result["ok"])


def _device() -> str | None:
    """The GPU's name, by a process that ends again: this one shall not hold memory of it."""
    code = "import torch, transformer_engine.pytorch; print(torch.cuda.get_device_name())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if found.returncode:
        print(found.stderr[-1000:], file=sys.stderr)
        return None
    return found.stdout.strip().splitlines()[-1]


def run(folder: Path, names: list[str], arguments: argparse.Namespace, report: Report) -> None:
    """All checks, one after the other, beside them their references on the CPU; ends in time whatever they do."""
    end = time.monotonic() + arguments.seconds
    curves = [VARIANTS[name.partition("-")[2]] for name in names if name.startswith("curve-")]
    references = [
        Child(folder, [name], cpu=True) for name in REFERENCES if name in {variant.reference for variant in curves}
    ]
    try:
        left = list(names)
        while left and time.monotonic() < end:
            with Child(folder, left, cpu=arguments.dry_run) as child:
                left = _watch(child, left, min(arguments.each, end - time.monotonic()), end, report)
        for reference in references:
            reference.wait(end)
        report.finish()
    finally:
        for reference in references:
            reference.__exit__()


def _watch(child: Child, names: list[str], each_s: float, end: float, report: Report) -> list[str]:
    """Report a child's checks as they end; returns what another child has to do, the one that failed hard left out."""
    left, since = list(names), time.monotonic()
    while left:
        ended = child.ended()  # before the results are looked for
        before = len(left)
        left = [name for name in left if not report.found(name)]
        if len(left) < before:
            since = time.monotonic()
        elif ended is not None:
            if ended != POISONED:
                report.lost(left.pop(0), f"its process ended with {ended}: {child.last_words()}")
            return left
        elif time.monotonic() > min(since + each_s, end):
            report.lost(left.pop(0), f"did not end within {time.monotonic() - since:.0f} s: {child.last_words()}")
            return left
        else:
            time.sleep(0.2)
    child.wait(min(end, time.monotonic() + 30))
    return left


class Child:
    """A process with checks; a context manager that ends it, and what it started."""

    def __init__(self, folder: Path, names: Iterable[str], *, cpu: bool) -> None:
        names = list(names)
        self._log = folder / f"{names[0]}.log"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        environment.pop("TORCHDYNAMO_DISABLE", None)  # else FlexAttention is not compiled
        if cpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, str(ROOT / "tools" / "gpu_checks.py"), str(folder), *names]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def ended(self) -> int | None:
        return self._process.poll()

    def wait(self, end: float) -> None:
        try:
            self._process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.__exit__()

    def last_words(self) -> str:
        return " ".join(self._log.read_text(errors="replace")[-400:].split())

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Report:
    """Prints the checks' lines as they come, and knows all of them at the end."""

    def __init__(self, folder: Path, device: str, arguments: argparse.Namespace) -> None:
        self._folder, self._device, self._arguments = folder, device, arguments
        self._results: dict[str, dict[str, Any]] = {}
        print(device, flush=True)

    def found(self, name: str) -> bool:
        """Whether the check has ended; then it is told of."""
        result = self._read(name)
        if result is not None:
            self._results[name] = result
            self._tell(name)
        return result is not None

    def lost(self, name: str, why: str) -> None:
        self._results[name] = {"error": why}
        self._tell(name)

    def finish(self) -> None:
        """Curves against their references, which may have come later."""
        for name, result in self._results.items():
            if name.startswith("curve-") and "error" not in result:
                self._compare(name, result)
                self._tell(f"{name} by the CPU", result, shown=("difference", "limit"))

    def result(self) -> dict[str, Any]:
        missing = [name for name in self._arguments.checks.split(",") if name not in self._results]
        failed = [name for name, result in self._results.items() if not self._good(name, result)]
        if missing:
            print(f"not run, since no time was left: --checks {','.join(missing)}")
        checks = {name: {k: v for k, v in r.items() if k != "losses"} for name, r in self._results.items()}
        return {"ok": not missing and not failed, "failed": failed, "not_run": missing, "checks": checks}

    def _compare(self, name: str, result: dict[str, Any]) -> None:
        variant = VARIANTS[name.partition("-")[2]]
        reference = self._read(variant.reference) or {"error": "it did not end in time"}
        if "error" in reference:
            result["error"] = f"{variant.reference}: {reference['error']}"
            return
        ours, theirs = np.array(result["losses"]), np.array(reference["losses"])
        result["difference"] = float(np.abs(ours - theirs).mean() / theirs.mean())
        result["limit"] = variant.limit

    def _good(self, name: str, result: dict[str, Any]) -> bool:
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

    def _tell(self, name: str, result: dict[str, Any] | None = None, shown: tuple[str, ...] = ()) -> None:
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
        """The GPU's dense peak in TFLOP/s for the variant's precision; None if it is not known."""
        fp8 = VARIANTS[name.partition("-")[2]].precision.startswith("fp8")
        if self._arguments.peak_tflops is not None:
            return float(self._arguments.peak_tflops) * (2 if fp8 else 1)
        for part, peaks in PEAKS.items():
            if all(word in self._device for word in part.split()):
                return float(peaks[fp8])
        return None

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self._folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
