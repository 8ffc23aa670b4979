"""The rounds of a run as jobs, independent of any launcher: their commands, order and numbers of nodes.

The first job writes the settings into the run directory; all others name only the run and a round. A finished
stage is not run again, so a job may be repeated at any time.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from megatron_dagger.config import RunConfig, dump_yaml
from megatron_dagger.dagger.beta import betas
from megatron_dagger.planning.job_time import DEFAULT_HOURS, stage_hours

_END = "END_OF_SETTINGS"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A job: one process per node, all of which run ``script``. ``hours``: what it should ask for, by plan."""

    name: str
    script: str
    nodes: int = 1
    hours: int = DEFAULT_HOURS


def round_stages(config: RunConfig, directory: Path, work_dir: Path, program: str, *, workers: int = 1) -> list[Stage]:
    """Return the stages of all rounds; each may start once the previous one has succeeded.

    ``directory`` is the run directory and ``work_dir`` the folder where relative paths in the settings start, both
    as the nodes see them. ``program`` is the shell command for our command line there. With several ``workers``, one
    job on as many nodes collects a round, a worker on each; the round's rollout then completes and seals it.
    """
    run = shlex.quote(str(directory))
    begin = f"set -e\ncd {shlex.quote(str(work_dir))}\n"
    create = f"{program} create {run} --config - <<'{_END}'\n{dump_yaml(config)}{_END}\n"
    nodes = {"collect": workers, "train": config.training.parallel.nodes}
    commands = {"collect": "rollout", "rollout": "rollout", "train": "train", "evaluate": "evaluate"}

    hours = stage_hours(config, betas(config.dagger))

    stages: list[Stage] = []
    for index in range(config.dagger.rounds + 1):
        for name, command in commands.items():
            if (name == "collect" and workers == 1) or (name == "evaluate" and not config.dagger.evaluates(index)):
                continue
            share = " --worker $SLURM_PROCID/$SLURM_NTASKS" if name == "collect" else ""
            # exec: the signal that ends the job reaches our program instead of killing a shell around it
            script = f"{begin if stages else begin + create}exec {program} {command} {run} --round {index}{share}\n"
            limit = hours[index][command] if hours else DEFAULT_HOURS
            stages.append(Stage(name=f"round{index}-{name}", script=script, nodes=nodes.get(name, 1), hours=limit))
    return stages
