"""The Debian packages that a virtual SLURM needs."""

from __future__ import annotations

import os
import shutil
import subprocess

from tools.virtual_slurm import accounting as slurm_accounting

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge")
INSTALL_DEADLINE_S = 600


class SlurmError(RuntimeError):
    """The cluster or one of its jobs failed; the message has SLURM's own answer."""


def why_unavailable(*, accounting: bool = False) -> str | None:
    """Return the reason why no cluster can run here (without root, or programs are missing); None if it can."""
    packages, missing = _missing_programs(accounting=accounting)
    if missing:
        return f"SLURM lacks {', '.join(missing)} (Debian packages: {' '.join(packages)})"
    if os.geteuid() != 0:
        return "SLURM's node daemons, and the device files of the nodes' GPUs, need root"
    return None


def install() -> None:
    """Install SLURM and its accounting if something is missing. Raises SlurmError if that fails."""
    packages, missing = _missing_programs(accounting=True)
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        names = " ".join(packages)
        raise SlurmError(f"SLURM lacks {', '.join(missing)}: as root on Debian run `apt-get install {names}`")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-q"], ["install", "-qy", "--no-install-recommends", *packages]):
        done = subprocess.run(
            ["apt-get", *command],
            env=env,
            capture_output=True,
            text=True,
            timeout=INSTALL_DEADLINE_S,
            check=False,
        )
        if done.returncode:
            raise SlurmError(f"apt-get {command[0]} failed:\n{done.stderr[-2000:]}")


def _missing_programs(*, accounting: bool) -> tuple[list[str], list[str]]:
    """Return the packages that a cluster needs, and those of their programs that are not installed."""
    packages = [*PACKAGES, *(slurm_accounting.PACKAGES if accounting else ())]
    programs = [*PROGRAMS, *(slurm_accounting.PROGRAMS if accounting else ())]
    return packages, [program for program in programs if not shutil.which(program)]
