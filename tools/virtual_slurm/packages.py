"""What a virtual SLURM needs to be installed, and installing it on Debian."""

from __future__ import annotations

import os
import shutil
import subprocess

from tools.virtual_slurm import accounting as slurm_accounting

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge")


class SlurmError(RuntimeError):
    """The cluster or one of its jobs did not do what was asked; says what SLURM answered."""


def lacking(*, accounting: bool = False) -> str | None:
    """What is missing here for a cluster, and in which packages it is; None if all is there."""
    packages, missing = _missing(accounting=accounting)
    if missing:
        return f"SLURM lacks {', '.join(missing)} (Debian: {' '.join(packages)})"
    if os.geteuid() != 0:
        return "SLURM's node daemons, and the device files of the nodes' GPUs, need root"
    return None


def _missing(*, accounting: bool) -> tuple[list[str], list[str]]:
    """The packages that a cluster needs, and the programs of them that are not there."""
    packages = [*PACKAGES, *(slurm_accounting.PACKAGES if accounting else ())]
    programs = [*PROGRAMS, *(slurm_accounting.PROGRAMS if accounting else ())]
    return packages, [program for program in programs if not shutil.which(program)]


def install() -> None:
    """Install SLURM and its accounting where we may and something is missing. SlurmError if that fails."""
    packages, missing = _missing(accounting=True)
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise SlurmError(f"SLURM is missing and cannot be installed from here (Debian: {' '.join(packages)})")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-q"], ["install", "-qy", "--no-install-recommends", *packages]):
        done = subprocess.run(["apt-get", *command], env=env, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise SlurmError(f"apt-get {command[0]} failed:\n{done.stderr[-2000:]}")
