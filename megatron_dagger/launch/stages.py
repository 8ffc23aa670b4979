"""The rounds of a run as jobs: which commands, in which order, on how many nodes. Knows no launcher.

The first job writes the settings into the run directory; each of the others names only the run and a round. A
stage that is done is not run again, so a job may be repeated at any time.
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
    """All rounds' stages, each to be started when the one before has ended well.

    ``directory`` is the run's, ``work_dir`` what relative paths in the settings start from: both as the nodes
    see them. ``program`` calls our command line there, in the shell's words. With several ``workers`` a round is
    collected by one job of as many nodes, a worker on each, before its rollout does what is missing and seals it.
    """
    run, last = shlex.quote(str(directory)), config.dagger.rounds
    begin = f"set -e\ncd {shlex.quote(str(work_dir))}\n"
    create = f"{program} create {run} --config - <<'{_END}'\n{dump_yaml(config)}{_END}\n"
    nodes = {"collect": workers, "train": config.training.parallel.nodes}
    words = {"collect": "rollout", "rollout": "rollout", "train": "train", "evaluate": "evaluate"}

    def script(stage: str, index: int) -> str:
        share = " --worker $SLURM_PROCID/$SLURM_NTASKS" if stage == "collect" else ""
        # exec: a signal that ends the job reaches our program, with no shell between that dies of it first
        return f"{begin}exec {program} {words[stage]} {run} --round {index}{share}\n"

    stages = [
        Stage(name=f"round{index}-{stage}", script=script(stage, index), nodes=nodes.get(stage, 1))
        for index in range(last + 1)
        for stage in words
        if not (stage == "collect" and workers == 1)
        and not (stage == "evaluate" and config.dagger.evaluate_rounds == "last" and index < last)
    ]
    return [replace(stages[0], script=stages[0].script.replace(begin, begin + create)), *stages[1:]]
