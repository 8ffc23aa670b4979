"""The parallel layouts of both sides: which ranks of the trainer and of the engine hold which shard.

Neither Megatron nor vLLM is imported; their rank orders are reproduced.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from megatron_dagger.config.base import require
from megatron_dagger.config.model import ModelConfig, padded_vocab_size
from megatron_dagger.config.training import ParallelConfig
from megatron_dagger.weights.blocks import Shard, ShardDim
from megatron_dagger.weights.families.decoder import OUTPUT_LAYER
from megatron_dagger.weights.families.megatron_tensor import MegatronTensor

_LAYERS = "decoder.layers."


@dataclass(frozen=True, kw_only=True)
class SourceLayout:
    """Megatron-Core's parallel layout, in its default rank order ``tp-cp-ep-dp-pp``.

    As in ``megatron.core.parallel_state``, dense tensors and experts each have a grid over the same ranks:
    ``tp-cp-dp-pp`` and ``expert tp-ep-expert dp-pp``. ``padded_vocab_size`` counts the embedding's rows over all
    tensor-parallel ranks.
    """

    padded_vocab_size: int
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int = 1  # model chunks per pipeline stage, interleaved
    context_parallel_size: int = 1
    data_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None  # None: the same as tensor_model_parallel_size

    def __post_init__(self) -> None:
        for name in ("tensor_model", "pipeline_model", "virtual_pipeline_model", "context", "data", "expert_model"):
            size = getattr(self, name + "_parallel_size")
            require(size > 0, f"source.{name}_parallel_size must be positive, got {size}")
        require(
            self.virtual_pipeline_model_parallel_size == 1 or self.pipeline_model_parallel_size > 1,
            f"source.virtual_pipeline_model_parallel_size={self.virtual_pipeline_model_parallel_size} needs "
            "pipeline_model_parallel_size > 1",
        )
        require(
            self.stage_size % self._expert_model_size == 0,
            f"source.expert_model_parallel_size={self.expert_model_parallel_size} x expert tensor parallelism of "
            f"{self.expert_tensor_size} does not divide the {self.stage_size} ranks of a pipeline stage",
        )

    @classmethod
    def of_trainer(cls, model: ModelConfig, parallel: ParallelConfig) -> Self:
        """Return the layout of the trainer under its own parallel settings."""
        return cls(
            padded_vocab_size=padded_vocab_size(model, parallel.tensor_model_parallel_size),
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size or 1,
            context_parallel_size=parallel.context_parallel_size,
            data_parallel_size=parallel.data_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        )

    @property
    def world_size(self) -> int:
        return self.stage_size * self.pipeline_model_parallel_size

    @property
    def stage_size(self) -> int:
        """The number of ranks of a pipeline stage."""
        return self.tensor_model_parallel_size * self.context_parallel_size * self.data_parallel_size

    @property
    def expert_tensor_size(self) -> int:
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def _expert_model_size(self) -> int:
        return self.expert_tensor_size * self.expert_model_parallel_size

    def check_model(self, model: ModelConfig) -> None:
        """Raise ConfigError if the model's layers or experts cannot be split this way."""
        chunks = self.pipeline_model_parallel_size * self.virtual_pipeline_model_parallel_size
        require(
            model.num_layers % chunks == 0,
            f"model.num_layers={model.num_layers} cannot be split evenly over {chunks} pipeline stages: "
            f"source.pipeline_model_parallel_size={self.pipeline_model_parallel_size} x "
            f"virtual_pipeline_model_parallel_size={self.virtual_pipeline_model_parallel_size}",
        )
        require(
            self.expert_model_parallel_size == 1 or model.num_moe_experts is not None,
            f"source.expert_model_parallel_size={self.expert_model_parallel_size}: "
            f"family {model.family} has no experts; set it to 1",
        )

    def stage(self, name: str, model: ModelConfig) -> int:
        """Return the pipeline stage that holds the Megatron tensor with this global name.

        With virtual stages the layers are dealt out in turn: chunk 0 of every stage, then chunk 1 of every stage.
        """
        stages = self.pipeline_model_parallel_size
        if not name.startswith(_LAYERS):
            return 0 if name.startswith("embedding.") else stages - 1
        layer = int(name.removeprefix(_LAYERS).partition(".")[0])
        layers_per_chunk = model.num_layers // (stages * self.virtual_pipeline_model_parallel_size)
        return layer // layers_per_chunk % stages

    def holders(self, tensor: MegatronTensor, stage: int) -> Iterator[tuple[Shard, tuple[int, ...]]]:
        """Yield each distinct shard of a tensor of this stage, with all the ranks that hold it."""
        ranks = range(stage * self.stage_size, (stage + 1) * self.stage_size)
        if tensor.experts:
            inner, experts = self.expert_tensor_size, self.expert_model_parallel_size
            for index in range(inner * experts):
                shard = Shard(rank=index % inner, size=inner, expert_rank=index // inner, expert_size=experts)
                yield shard, tuple(ranks[index :: inner * experts])
        elif tensor.shard_dim is ShardDim.NONE:
            yield Shard(), tuple(ranks)
        else:
            size = self.tensor_model_parallel_size
            for rank in range(size):
                yield Shard(rank=rank, size=size), tuple(ranks[rank::size])

    def tied_copy(self, model: ModelConfig) -> str | None:
        """Return the name of the last stage's copy of a tied embedding, or None if it has none."""
        return OUTPUT_LAYER if model.tie_embeddings and self.pipeline_model_parallel_size > 1 else None


@dataclass(frozen=True, kw_only=True)
class TargetLayout:
    """vLLM's parallel layout: ``replicas`` engines, each of data-parallel x tensor-parallel ranks.

    Ranks count tensor-parallel ranks first, then data-parallel ranks, then engines. The experts are spread over all
    ranks of an engine (``FusedMoEParallelConfig.make``): whole experts with ``enable_expert_parallel``, otherwise a
    shard of every expert.
    """

    tensor_parallel_size: int = 1
    data_parallel_size: int = 1  # replicates dense tensors, but not experts
    enable_expert_parallel: bool = False
    replicas: int = 1

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "data_parallel_size", "replicas"):
            require(getattr(self, name) > 0, f"target.{name} must be positive, got {getattr(self, name)}")

    @property
    def engine_size(self) -> int:
        """The number of ranks of an engine."""
        return self.tensor_parallel_size * self.data_parallel_size

    @property
    def world_size(self) -> int:
        return self.engine_size * self.replicas

    def check_model(self, model: ModelConfig) -> None:
        """Raise ConfigError if vLLM would reject the model in this layout."""
        experts = model.num_moe_experts
        require(
            experts is None or self.tensor_parallel_size <= experts,
            f"target.tensor_parallel_size={self.tensor_parallel_size} is more than model.num_moe_experts={experts}, "
            "which vLLM rejects",
        )
        require(
            experts is not None or not self.enable_expert_parallel,
            f"target.enable_expert_parallel: family {model.family} has no experts; leave it out",
        )

    def holders(self, *, experts: bool) -> Iterator[tuple[Shard, tuple[int, ...]]]:
        """Yield each distinct shard of dense tensors, or of stacked experts, with all the ranks that hold it."""
        ranks = range(self.world_size)
        size = self.engine_size if experts else self.tensor_parallel_size
        for rank in range(size):
            whole_experts = experts and self.enable_expert_parallel
            shard = Shard(expert_rank=rank, expert_size=size) if whole_experts else Shard(rank=rank, size=size)
            yield shard, tuple(ranks[rank::size])

    def shard(self, rank: int, *, experts: bool) -> Shard:
        """Return the shard of dense tensors, or of stacked experts, on ``rank``."""
        return next(shard for shard, ranks in self.holders(experts=experts) if rank in ranks)
