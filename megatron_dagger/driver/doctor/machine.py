"""Checks of this host: packages, processors, shared memory, disk, locks."""

from __future__ import annotations

import importlib.util
import os
import shutil
from importlib import metadata
from pathlib import Path

from megatron_dagger.dagger.context import train_manifest
from megatron_dagger.driver.doctor.examination import Examination, Finding, ok, problem, warning
from megatron_dagger.planning.memory import GIB
from megatron_dagger.planning.parameters import total_parameters
from megatron_dagger.store.lock import LockedError, flocked
from megatron_dagger.training.ranks.launch import PROCESSORS_PER_RANK

SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_MEMORY = 1 * GIB  # for vLLM's workers, NCCL and the transfer of weights
CHECKPOINT_BYTES = 14  # of a parameter: BF16 weights, FP32 main weights, two FP32 moments
OTHER_BYTES = 5 * GIB  # episodes, logs, tasks
_MODULES = {"torch": "torch", "megatron.core": "megatron-core", "vllm": "vllm", "zarr": "zarr"}


def packages(examination: Examination) -> Finding:
    """Check that the packages that the run imports are installed; importing them is left to other checks."""
    modules = dict(_MODULES)
    if needs_gpus(examination):
        modules["transformer_engine"] = "transformer-engine"
    if examination.config.environment == "swe":
        modules |= {"docker": "docker", "swebench": "swebench"}
    absent = [package for module, package in modules.items() if not _is_installed(module)]
    if absent:
        return problem(
            f"not installed: {', '.join(absent)}",
            "tools/setup --cuda installs the builds for GPUs (slurm/README.md), tools/setup those for the CPU",
        )
    return ok(", ".join(f"{package} {_version(module, package)}" for module, package in modules.items()))


def processors(examination: Examination) -> Finding:
    """Check that a node's ranks have the processors that keep their GPUs busy."""
    count, ranks = len(os.sched_getaffinity(0)), examination.config.training.parallel.ranks_per_node
    text, needed = f"{count} for {ranks} ranks", PROCESSORS_PER_RANK * ranks
    if needs_gpus(examination) and count < needed:
        return warning(text, f"ask SLURM for the whole node (--exclusive) or for --cpus-per-task={needed} and more")
    return ok(text)


def shared_memory(examination: Examination) -> Finding:
    """Check the size of /dev/shm."""
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < LEAST_SHARED_MEMORY:
        return problem(
            f"{SHARED_MEMORY} has {free / GIB:.2f} GiB free",
            f"it must have {LEAST_SHARED_MEMORY / GIB:.0f}: in a container, mount the host's or set --shm-size",
        )
    return ok(f"{free / GIB:.0f} GiB free")


def disk(examination: Examination) -> Finding:
    """Check the space for the run's checkpoints."""
    folder = existing_parent(examination.run_dir)
    free = shutil.disk_usage(folder).free
    rounds = range(examination.config.dagger.rounds + 1)
    untrained = sum(not train_manifest(examination.run_dir, index).exists() for index in rounds)
    # Each round keeps its checkpoint, and while one is saved the one before is still there
    checkpoints = untrained + 1 if untrained else 0
    needed = total_parameters(examination.config.model) * CHECKPOINT_BYTES * checkpoints + OTHER_BYTES
    text = f"{free / GIB:.0f} GiB free in {folder}, about {needed / GIB:.0f} needed"
    return ok(text) if free >= needed else problem(text, "free some, or name a run directory on another file system")


def locks(examination: Examination) -> Finding:
    """Check that the run's file system supports locks; the check ``ranks`` tries them between nodes."""
    path = examination.work_dir / "lock"
    try:
        with flocked(path, deadline_s=1.0):
            try:
                with flocked(path, deadline_s=0.0):
                    return _no_locks("it lets two processes hold the same lock")
            except LockedError:
                return ok(f"{existing_parent(examination.run_dir)} supports them")
    except OSError as error:
        return _no_locks(str(error))


def _no_locks(reason: str) -> Finding:
    return problem(f"the file system has no locks: {reason}", "Lustre: mount it with the option flock")


def needs_gpus(examination: Examination) -> bool:
    return examination.config.training.precision != "fp32"


def existing_parent(path: Path) -> Path:
    """Return the nearest folder above or at ``path`` that exists."""
    return next(folder for folder in (path, *path.resolve().parents) if folder.is_dir())


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _version(module: str, package: str) -> str:
    """Return an installed package's version; vLLM's builds have distributions of different names."""
    for distribution in (package, *metadata.packages_distributions().get(module.partition(".")[0], ())):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"
