"""The hours that the jobs of a run ask SLURM for: those planned on the default GPU, with a margin."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megatron_dagger.config import RunConfig
from megatron_dagger.planning.assumptions import Assumptions
from megatron_dagger.planning.gpus import DEFAULT_GPU, GPUS
from megatron_dagger.planning.run_plan import RunPlan, plan_run

MARGIN = 2.0  # over the plan, since none of its speeds was measured; a job that needs longer is requeued and resumes
DEFAULT_HOURS = 24  # of a job that cannot be planned: that of a run on the CPU
STAGES = ("rollout", "train", "evaluate")


def default_plan(config: RunConfig, betas: Sequence[float]) -> RunPlan | None:
    """Return the plan on the default GPU; None for a run on the CPU. Arguments and errors as in ``plan_run``."""
    if config.training.precision == "fp32":
        return None
    return plan_run(config, betas, GPUS[DEFAULT_GPU], Assumptions())


def stage_hours(config: RunConfig, betas: Sequence[float]) -> Sequence[Mapping[str, int]] | None:
    """Return the hours that each round's jobs ask for, by stage (``STAGES``); None for a run on the CPU."""
    plan = default_plan(config, betas)
    if plan is None:
        return None
    return [{stage: _hours(getattr(planned, f"{stage}_s")) for stage in STAGES} for planned in plan.rounds]


def run_hours(plan: RunPlan) -> int:
    """Return the hours that one job for all rounds asks for."""
    return _hours(plan.total_s)


def _hours(seconds: float) -> int:
    return max(1, math.ceil(MARGIN * seconds / 3600))
