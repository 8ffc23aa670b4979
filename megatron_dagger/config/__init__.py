"""The settings of a run: recipes build them, run directories store them. No engine is imported."""

from megatron_dagger.config.base import (
    ConfigError,
    build,
    current_name,
    differing,
    dump_yaml,
    load_yaml,
    override,
    to_dict,
)
from megatron_dagger.config.dagger import AggregationConfig, BetaConfig, DaggerConfig
from megatron_dagger.config.environment import EnvironmentConfig
from megatron_dagger.config.model import ModelConfig, YarnConfig
from megatron_dagger.config.repo_repair import RepoRepairConfig
from megatron_dagger.config.road import RoadConfig
from megatron_dagger.config.rollout import LimitsConfig, RolloutConfig, SamplingConfig, VllmEngineConfig
from megatron_dagger.config.run import RunConfig
from megatron_dagger.config.swe import SweConfig
from megatron_dagger.config.teacher import TeacherConfig
from megatron_dagger.config.training import OptimizerConfig, Packing, ParallelConfig, Precision, TrainingConfig

__all__ = [
    "AggregationConfig",
    "BetaConfig",
    "ConfigError",
    "DaggerConfig",
    "VllmEngineConfig",
    "LimitsConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Packing",
    "ParallelConfig",
    "Precision",
    "RoadConfig",
    "RolloutConfig",
    "RunConfig",
    "SamplingConfig",
    "SweConfig",
    "RepoRepairConfig",
    "EnvironmentConfig",
    "TeacherConfig",
    "TrainingConfig",
    "YarnConfig",
    "build",
    "current_name",
    "differing",
    "dump_yaml",
    "load_yaml",
    "override",
    "to_dict",
]
