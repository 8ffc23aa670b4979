"""Checks of the GPUs: whether torch and Transformer Engine can use them, and whether the run fits them.

A process of its own asks, since this one must not initialise CUDA before it starts others.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

from megatron_dagger.driver.doctor.examination import Examination, Finding, ok, problem, skipped, warning
from megatron_dagger.driver.doctor.machine import needs_gpus
from megatron_dagger.gpus import driver_version, visible_gpus
from megatron_dagger.planning import GPUS, Assumptions
from megatron_dagger.planning.gpus import ANY_GPU, DEFAULT_GPU
from megatron_dagger.planning.memory import GIB
from megatron_dagger.planning.run_plan import memory_of

PROBE_TIMEOUT_S = 55.0
FREE_SHARE = 0.9  # of a GPU's memory; below, another process uses it
INSTALL = "tools/setup --cuda installs the CUDA builds in .venv-cuda (slurm/README.md)"
_PROBE = """
import json
answer = {}
try:
    import torch
    answer |= {"torch": torch.__version__, "cuda": torch.version.cuda, "available": torch.cuda.is_available()}
    if answer["available"]:
        count = torch.cuda.device_count()
        answer["names"] = [torch.cuda.get_device_name(i) for i in range(count)]
        answer["memory"] = [torch.cuda.mem_get_info(i) for i in range(count)]
        for i in range(count):
            torch.ones(1, device=f"cuda:{i}").add_(1)
        torch.cuda.synchronize()
        import transformer_engine.pytorch
        import transformer_engine
        answer["transformer_engine"] = transformer_engine.__version__
except Exception as error:
    answer["error"] = f"{type(error).__name__}: {error}"
print("ANSWER " + json.dumps(answer))
"""


def gpus(examination: Examination) -> Finding:
    """Check the driver, torch's CUDA, every GPU, and Transformer Engine."""
    seen = visible_gpus(os.environ)
    if not needs_gpus(examination):
        return skipped(f"not needed in fp32; {seen or 'none'} visible")
    if seen is None:
        return problem("none visible on this host", "run this in a job with GPUs: sbatch --gpus-per-node=8 ...")
    answer = _ask()
    ranks = examination.config.training.parallel.ranks_per_node
    if "torch" in answer and answer["cuda"] is None:
        return problem(f"torch {answer['torch']} in {sys.prefix} is built for the CPU", INSTALL)
    if not answer.get("available"):
        return problem(
            f"torch {answer.get('torch', 'missing')} (CUDA {answer.get('cuda')}) cannot use the {seen} GPUs; "
            f"driver {driver_version()}. {answer.get('error', '')}".rstrip(),
            f"{INSTALL}; nvidia-smi shows the driver and the GPUs",
        )
    if "error" in answer:
        return problem(answer["error"], INSTALL)
    names = answer["names"]
    if len(names) < ranks:
        return problem(f"{len(names)} for {ranks} ranks of this node", "set training.parallel.world_size, or add nodes")
    used = [i for i, (free, total) in enumerate(answer["memory"]) if free < FREE_SHARE * total]
    text = (
        f"{len(names)} x {names[0]}, driver {driver_version()}, torch {answer['torch']} for CUDA {answer['cuda']}, "
        f"Transformer Engine {answer['transformer_engine']}"
    )
    if used:
        free = min(answer["memory"][i][0] for i in used) / GIB
        return warning(f"{text}; GPU {used[0]} has only {free:.0f} GiB free", "end the processes that nvidia-smi lists")
    return ok(text)


def memory(examination: Examination) -> Finding:
    """Check the run against the planner's memory, on this host's kind of GPU or else an H100."""
    config = examination.config
    if not needs_gpus(examination):
        return skipped("training in fp32 is for the CPU")
    if examination.gpu == ANY_GPU:
        return skipped("--gpu any")
    answer = _ask() if visible_gpus(os.environ) else {}
    names = " ".join(answer.get("names", [])).lower()
    gpu = GPUS[examination.gpu or next((kind for kind in GPUS if kind in names), DEFAULT_GPU)]
    if sizes := [total for _, total in answer.get("memory", [])]:
        gpu = replace(gpu, name=answer["names"][0], memory_gib=min(sizes) / GIB)
    plan = memory_of(config, gpu, Assumptions())
    if plan.problems():
        return problem(f"{gpu.name}: {'; '.join(plan.problems())}", "`megatron-dagger plan` names settings that fit")
    return ok(f"{plan.fullest.total / GIB:.1f} GiB in training, of an {gpu.name}'s {plan.fullest.capacity / GIB:.1f}")


@functools.cache
def _ask() -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=PROBE_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"torch and Transformer Engine were not imported within {PROBE_TIMEOUT_S:.0f} s"}
    answers = [line.removeprefix("ANSWER ") for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    if not answers:
        return {"error": f"the probe ended with exit code {done.returncode}: {done.stderr.strip()[-300:]}"}
    answer: dict[str, Any] = json.loads(answers[-1])
    return answer
