"""The configuration of a run: recipes return it, run directories store it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from megatron_dagger.config.base import check_numbers, differing, number, require
from megatron_dagger.config.dagger import DaggerConfig
from megatron_dagger.config.model import ModelConfig
from megatron_dagger.config.repo_repair import RepoRepairConfig
from megatron_dagger.config.road import RoadConfig
from megatron_dagger.config.rollout import RolloutConfig, SamplingConfig
from megatron_dagger.config.swe import SweConfig
from megatron_dagger.config.teacher import TeacherConfig
from megatron_dagger.config.training import TrainingConfig

# Settings that may change during a run: limits of time and money, connections and reporting. They change no result.
CHANGEABLE = (
    "wandb_project",
    "teacher.urls",
    "teacher.api_key_env",
    "teacher.concurrent_requests",
    "teacher.request_timeout_s",
    "teacher.patience_s",
    "teacher.token_budget",
    "teacher.money_budget",
    "teacher.price_per_million_prompt_tokens",
    "teacher.price_per_million_completion_tokens",
    "training.deadline_s",
    "rollout.stage_deadline_s",
    "rollout.engine.start_deadline_s",
    "rollout.engine.request_deadline_s",
)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run depends on. The same config and seed give the same run."""

    RENAMED: ClassVar = {"tasks": "repo_repair"}

    name: str = "run"
    wandb_project: str | None = None  # None: no W&B; mode and key come from WANDB_MODE and WANDB_API_KEY
    seed: int = number(1234, ge=0)
    repo_repair: RepoRepairConfig = RepoRepairConfig()
    swe: SweConfig = SweConfig()
    road: RoadConfig = RoadConfig()
    model: ModelConfig = ModelConfig()
    init_checkpoint: str | None = None  # weights of round 0, made by megatron-dagger convert; None: random
    training: TrainingConfig = TrainingConfig()
    rollout: RolloutConfig = RolloutConfig()
    teacher: TeacherConfig = TeacherConfig()
    evaluation_sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.0, top_p=1.0))
    dagger: DaggerConfig = DaggerConfig()

    def __post_init__(self) -> None:
        check_numbers(self, "")
        self.training.parallel.check_model(self.model)
        self.rollout.engine.check_model(self.model)
        require(
            not self.swe.train or bool(self.teacher.urls),
            "swe.train needs teacher.urls: these tasks have no expert of their own",
        )
        require(
            not self.swe.train or self.init_checkpoint is not None,
            "swe.train needs init_checkpoint: these tasks are for a model that is trained already",
        )
        require(
            not self.swe.train or not self.road.stops,
            f"swe.train={self.swe.train} and road.stops={self.road.stops} name two environments: a run has one; "
            "set road.stops=0 or swe.train=''",
        )
        need = self.rollout.limits.max_tokens
        require(
            need <= self.rollout.engine.max_model_len,
            f"rollout.limits.max_tokens={need} exceeds rollout.engine.max_model_len="
            f"{self.rollout.engine.max_model_len}",
        )
        require(
            need <= self.training.sequence_length,
            f"rollout.limits.max_tokens={need} exceeds training.sequence_length="
            f"{self.training.sequence_length}: an episode must fit one packed row",
        )
        require(
            need <= self.model.max_position_embeddings,
            f"rollout.limits.max_tokens={need} exceeds model.max_position_embeddings="
            f"{self.model.max_position_embeddings}",
        )


def fixed_differences(existing: RunConfig, config: RunConfig) -> list[str]:
    """Return the names of the settings in which ``config`` differs from ``existing`` and which the run must keep."""
    teachers = bool(existing.teacher.urls) != bool(config.teacher.urls)  # the environment's expert, or a model
    changeable = set(CHANGEABLE) - ({"teacher.urls"} if teachers else set())
    if config.dagger.rounds > existing.dagger.rounds:  # no round so far depends on how many there will be
        changeable.add("dagger.rounds")
    return [name for name in differing(existing, config) if name not in changeable]
