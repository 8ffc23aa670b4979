"""The rounds of a run as jobs: which commands, in which order, on how many nodes. Independent of any launcher.

The first job writes the settings into the run directory; all others name only the run and a round. A finished
stage is not run again, so a job may be repeated at any time.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_dagger.config import RunConfig, dump_yaml

_END = "END_OF_SETTINGS"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A job: one process per node, all of which run ``script``."""

    name: str
    script: str
    nodes: int = 1


def round_stages(config: RunConfig, directory: Path, work_dir: Path, program: str, *, workers: int = 1) -> list[Stage]:
    """Return the stages of all rounds; each may start once the previous one has succeeded.

    ``directory`` is the run directory and ``work_dir`` the folder where relative paths in the settings start, both
    as the nodes see them. ``program`` is the shell command for our command line there. With several ``workers``, one
    job on as many nodes collects a round, a worker on each; the round's rollout then completes and seals it.
    """
    run, last = shlex.quote(str(directory)), config.dagger.rounds
    begin = f"set -e\ncd {shlex.quote(str(work_dir))}\n"
    create = f"{program} create {run} --config - <<'{_END}'\n{dump_yaml(config)}{_END}\n"
    nodes = {"collect": workers, "train": config.training.parallel.nodes}
    commands = {"collect": "rollout", "rollout": "rollout", "train": "train", "evaluate": "evaluate"}

    def script(stage: str, index: int) -> str:
        share = " --worker $SLURM_PROCID/$SLURM_NTASKS" if stage == "collect" else ""
        # exec: the signal that ends the job reaches our program instead of killing a shell around it
        return f"{begin}exec {program} {commands[stage]} {run} --round {index}{share}\n"

    stages = [
        Stage(name=f"round{index}-{stage}", script=script(stage, index), nodes=nodes.get(stage, 1))
        for index in range(last + 1)
        for stage in commands
        if not (stage == "collect" and workers == 1)
        and not (stage == "evaluate" and config.dagger.evaluate_rounds == "last" and index < last)
    ]
    return [replace(stages[0], script=stages[0].script.replace(begin, begin + create)), *stages[1:]]
