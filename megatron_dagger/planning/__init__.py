"""Predicts a run's memory per GPU, rates and hours before it is queued. Formulas over settings, without any engine.

Each formula names its source; each number that cannot be derived is a named field of ``Assumptions``.
"""

from megatron_dagger.planning.assumptions import Assumptions
from megatron_dagger.planning.gpus import GPUS, Gpu
from megatron_dagger.planning.run_plan import RunPlan, plan_run
from megatron_dagger.planning.search import Change, nearest_that_fits

__all__ = ["GPUS", "Assumptions", "Change", "Gpu", "RunPlan", "nearest_that_fits", "plan_run"]
