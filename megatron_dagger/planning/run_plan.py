"""The plan of a run on a type of GPU: memory, rates and hours, and the problems if it does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dagger.config import RunConfig
from megatron_dagger.config.base import require
from megatron_dagger.config.trainer_support import check_supported
from megatron_dagger.planning.assumptions import Assumptions
from megatron_dagger.planning.episodes import MeanEpisode
from megatron_dagger.planning.gpus import Gpu
from megatron_dagger.planning.memory import (
    GIB,
    ServingMemory,
    TrainingMemory,
    serving_memory,
    training_memory,
)
from megatron_dagger.planning.rounds import RoundTime, round_times
from megatron_dagger.planning.speed import RolloutSpeed, TeacherLoad, rollout_speed, teacher_load


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The memory of both phases of a round. Run as separate jobs, each phase has the GPUs to itself."""

    training: tuple[TrainingMemory, ...]  # by pipeline stage
    serving: ServingMemory

    @property
    def fullest(self) -> TrainingMemory:
        return max(self.training, key=lambda stage: stage.total)

    @property
    def fit_together(self) -> bool:
        """Whether trainer and engine fit one GPU at the same time, as ``megatron-dagger run`` needs it."""
        return self.fullest.total + self.serving.total <= self.fullest.capacity

    def training_problem(self) -> str | None:
        """Return why training does not fit; None if it fits."""
        worst = self.fullest
        if worst.fits:
            return None
        parts = ("weights", "fp8_weights", "gradients", "optimizer", "activations", "working", "reserve")
        sizes = ", ".join(f"{name} {getattr(worst, name) / GIB:.1f}" for name in parts if getattr(worst, name))
        return (
            f"training needs {worst.total / GIB:.1f} GiB on a GPU of pipeline stage {worst.stage}, which has "
            f"{worst.capacity / GIB:.1f}: {sizes}"
        )

    def serving_problem(self) -> str | None:
        """Return why the student cannot be served; None if it can."""
        serving = self.serving
        if serving.total > serving.capacity:
            return (
                f"serving needs {serving.total / GIB:.1f} GiB of {serving.capacity / GIB:.1f}: weights "
                f"{serving.weights / GIB:.1f}, activations {serving.working / GIB:.1f}, KV cache "
                f"{serving.kv_cache / GIB:.1f}"
            )
        if serving.full_sequences < 1:
            return (
                f"serving: the KV cache of {serving.kv_cache / GIB:.1f} GiB holds {serving.kv_tokens} tokens, less "
                f"than rollout.engine.max_model_len={serving.max_model_len}"
            )
        return None

    def problems(self) -> list[str]:
        """Return what does not fit, and why."""
        return [problem for problem in (self.training_problem(), self.serving_problem()) if problem]


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The result of ``plan_run``."""

    memory: Memory
    problems: tuple[str, ...]
    episode: MeanEpisode
    rollout: RolloutSpeed
    teacher: TeacherLoad
    rounds: tuple[RoundTime, ...]

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def total_s(self) -> float:
        """The seconds of all rounds."""
        return sum(r.total_s for r in self.rounds)


def memory_of(config: RunConfig, gpu: Gpu, assumed: Assumptions) -> Memory:
    """Return the memory of both phases. Raises ConfigError for settings that trainer or engine refuse on a GPU."""
    check_supported(config.model, config.training, cuda=True)
    gpu.flops(config.training.precision)
    _check_engine(config)
    stages = range(config.training.parallel.pipeline_model_parallel_size)
    return Memory(
        training=tuple(training_memory(config.model, config.training, gpu, assumed, stage) for stage in stages),
        serving=serving_memory(config.model, config.rollout.engine, gpu, assumed),
    )


def plan_run(config: RunConfig, betas: Sequence[float], gpu: Gpu, assumed: Assumptions) -> RunPlan:
    """Return the plan of a run; ``betas`` are the teacher's shares of the turns in rounds 0, 1, ...

    Raises ConfigError for settings that no GPU can run, and ValueError for a precision that ``gpu`` lacks.
    """
    memory = memory_of(config, gpu, assumed)
    episode = MeanEpisode.of(config, assumed)
    rollout = rollout_speed(config, gpu, assumed, memory.serving, episode)
    return RunPlan(
        memory=memory,
        problems=tuple(memory.problems()),
        episode=episode,
        rollout=rollout,
        teacher=teacher_load(rollout, episode),
        rounds=round_times(config, betas, gpu, assumed, rollout, episode),
    )


def _check_engine(config: RunConfig) -> None:
    """Check the engine's size: it fits the model, and the GPUs of a node if trainer and engine share them."""
    parallel, tp = config.training.parallel, config.rollout.engine.tensor_parallel_size
    config.rollout.engine.check_model(config.model)
    per_node = parallel.ranks_per_node
    require(
        tp <= per_node,
        f"rollout.engine.tensor_parallel_size={tp} is more than the {per_node} GPUs of a node: the student is one "
        "engine on one node",
    )
