"""The configuration of a run: recipes return it, run directories store it."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_dagger.config.base import check_numbers, differing, number, require
from megatron_dagger.config.dagger import DaggerConfig
from megatron_dagger.config.environment import ENVIRONMENTS, EnvironmentConfig
from megatron_dagger.config.model import ModelConfig
from megatron_dagger.config.repo_repair import RepoRepairConfig
from megatron_dagger.config.road import RoadConfig
from megatron_dagger.config.rollout import RolloutConfig, SamplingConfig
from megatron_dagger.config.swe import SweConfig
from megatron_dagger.config.teacher import TeacherConfig
from megatron_dagger.config.training import TrainingConfig

LAYOUT = "training.parallel."
# Settings that may change during a run, or groups of them, which end with a dot: layout and memory, limits of time and
# money, connections and reporting. They change no result but in the last digits; max_seconds decides which episodes are
# cut off from now on.
CHANGEABLE = (
    "wandb_project",
    "teacher.urls",
    "teacher.api_key_env",
    "teacher.omitted_parameters",
    "teacher.max_tokens_parameter",
    "teacher.concurrent_requests",
    "teacher.request_timeout_s",
    "teacher.patience_s",
    "teacher.token_budget",
    "teacher.money_budget",
    "teacher.price_per_million_prompt_tokens",
    "teacher.price_per_million_completion_tokens",
    LAYOUT,
    "training.recompute",
    "training.recompute_modules",
    "training.checkpoint_interval",
    "training.threads_per_process",
    "training.deadline_s",
    "training.collective_timeout_s",
    "rollout.concurrent_episodes",
    "rollout.limits.max_seconds",
    "rollout.stage_deadline_s",
    "rollout.engine.tensor_parallel_size",
    "rollout.engine.max_num_seqs",
    "rollout.engine.kv_cache_memory_mib",
    "rollout.engine.gpu_memory_utilization",
    "rollout.engine.enforce_eager",
    "rollout.engine.threads",
    "rollout.engine.start_deadline_s",
    "rollout.engine.request_deadline_s",
    "swe.docker_url",
    "swe.image_prefix",
    "swe.image_budget_mib",
)
# Settings that may change while no round is half trained: the rounds after the change are trained with them.
BETWEEN_ROUNDS = (
    "training.precision",
    "training.fp8_param_gather",
    "training.bf16_layers_at_ends",
    "training.packing",
)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run depends on. On the CPU the same config and seed give the same run."""

    name: str = "run"
    wandb_project: str | None = None  # None: no W&B; mode and key come from WANDB_MODE and WANDB_API_KEY
    seed: int = number(1234, ge=0)
    tasks: EnvironmentConfig = EnvironmentConfig()
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
        self._check_environment()
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

    @property
    def environment(self) -> str:
        """The name of the environment that the tasks come from."""
        return self.tasks.kind or ("swe" if self.swe.train else "road" if self.road.stops else "repair")

    def _check_environment(self) -> None:
        """Raise ConfigError unless the settings are of one environment, and all that it needs are there."""
        for name, setting, value in (("swe", "swe.train", self.swe.train), ("road", "road.stops", self.road.stops)):
            require(
                not value or self.environment == name,
                f"{setting}={value} and tasks.kind={self.environment} name two environments, but a run has one: "
                f"set {setting}={'0' if name == 'road' else repr('')}, or the other's setting",
            )
            require(bool(value) or self.environment != name, f"tasks.kind={name} needs {setting}")
        require(
            not self.tasks.options or self.environment not in ENVIRONMENTS,
            f"tasks.options are for environments of your own: {self.environment} has settings of its own",
        )
        if self.environment == "swe":
            why = "needs teacher.urls: these tasks have no expert of their own"
            require(self.teacher.source != "expert", f"swe.train {why}")
            why = "needs init_checkpoint: these tasks are for a model that is trained already"
            require(self.init_checkpoint is not None, f"swe.train {why}")


def fixed_differences(existing: RunConfig, config: RunConfig) -> list[str]:
    """Return the names of the settings in which ``config`` differs from ``existing`` and which the run must keep."""
    teachers = existing.teacher.source != config.teacher.source  # the environment's expert, a model, or another
    more_rounds = config.dagger.rounds > existing.dagger.rounds  # no round so far depends on how many there will be

    def fixed(name: str) -> bool:
        if name == "teacher.urls" and teachers:
            return True
        return not (changeable(name) or name in BETWEEN_ROUNDS or (name == "dagger.rounds" and more_rounds))

    return list(filter(fixed, differing(existing, config)))


def changeable(name: str) -> bool:
    """Return whether the setting ``name`` may change at any time during a run."""
    return name in CHANGEABLE or any(group.endswith(".") and name.startswith(group) for group in CHANGEABLE)
