"""Search for the nearest settings that fit: the same model on as many GPUs, with the fewest and smallest changes.

Training and serving are searched one after the other, since the only setting they share is the length of an
episode. Changes of how the model is computed cost less than changes of what is trained: a shorter sequence is the
last resort.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_dagger.config import ConfigError, RunConfig, override
from megatron_dagger.planning.assumptions import Assumptions
from megatron_dagger.planning.gpus import Gpu
from megatron_dagger.planning.run_plan import Memory, memory_of

_SHORTEST = 1024  # tokens of a sequence
_PARALLEL = "training.parallel."
_COSTS = {  # of one change, or of one doubling or halving
    _PARALLEL + "sequence_parallel": 1.0,
    _PARALLEL + "tensor_model_parallel_size": 1.5,
    _PARALLEL + "pipeline_model_parallel_size": 2.0,
    _PARALLEL + "expert_model_parallel_size": 1.0,
    _PARALLEL + "virtual_pipeline_model_parallel_size": 1.0,
    "training.optimizer.distributed": 1.0,
    "training.recompute": 1.25,  # per step in none, selective, full
    "training.sequence_length": 20.0,
    "rollout.engine.tensor_parallel_size": 1.5,
    "rollout.engine.kv_cache_memory_mib": 1.0,
    "rollout.engine.max_model_len": 20.0,
}
_RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True, kw_only=True)
class Change:
    """Settings to change, as ``NAME=VALUE``, and the config and memory that result."""

    settings: tuple[str, ...]
    config: RunConfig
    memory: Memory


def nearest_that_fits(config: RunConfig, gpu: Gpu, assumed: Assumptions) -> Change | None:
    """Return the cheapest change with which everything fits; None if no candidate does."""
    settings: list[str] = []
    searches = ((_training(config), Memory.training_problem), (_serving(config), Memory.serving_problem))
    for candidates, problem in searches:
        extended = _cheapest(config, settings, candidates, problem, gpu, assumed)
        if extended is None:
            return None
        settings = extended
    changed = override(config, settings)
    return Change(settings=tuple(settings), config=changed, memory=memory_of(changed, gpu, assumed))


def _cheapest(
    config: RunConfig,
    settled: list[str],
    candidates: Iterator[tuple[float, dict[str, object]]],
    problem: Callable[[Memory], str | None],
    gpu: Gpu,
    assumed: Assumptions,
) -> list[str] | None:
    """Return ``settled`` plus the cheapest of ``candidates`` without the ``problem``; None if all have it."""
    for _, changes in sorted(candidates, key=lambda candidate: (candidate[0], str(candidate[1]))):
        settings = _merge(config, settled, changes)
        try:
            memory = memory_of(override(config, settings), gpu, assumed)
        except ConfigError:
            continue  # the model does not allow this layout
        if problem(memory) is None:
            return settings
    return None


def _merge(config: RunConfig, settled: list[str], changes: dict[str, object]) -> list[str]:
    """Return all changes as settings; the limit of an episode's tokens follows the shorter of the two lengths."""
    merged: dict[str, object] = dict(setting.split("=") for setting in settled) | changes
    lengths = [merged[name] for name in ("training.sequence_length", "rollout.engine.max_model_len") if name in merged]
    limit = config.rollout.limits.max_tokens
    shortest = min([limit, *(int(str(length)) for length in lengths)])
    if shortest < limit:
        merged["rollout.limits.max_tokens"] = shortest
    return [f"{name}={'null' if value is None else value}" for name, value in merged.items()]


def _training(config: RunConfig) -> Iterator[tuple[float, dict[str, object]]]:
    """Yield changes of the training settings with their costs; one of them is no change."""
    training, parallel = config.training, config.training.parallel
    per_node = parallel.ranks_per_node
    tensor = _sizes(parallel.tensor_model_parallel_size, per_node)
    pipeline = _sizes(parallel.pipeline_model_parallel_size, parallel.world_size)
    for tp, pp, ep, sequence, virtual, recompute, distributed, length in itertools.product(
        tensor,
        pipeline,
        _expert(config),
        {parallel.sequence_parallel, True},
        {parallel.virtual_pipeline_model_parallel_size, None},
        _RECOMPUTE[_RECOMPUTE.index(training.recompute) :],
        {training.optimizer.distributed, True},
        _halvings(training.sequence_length),
    ):
        if (sequence and tp == 1) or parallel.world_size % (pp * ep * parallel.expert_tensor_parallel_size):
            continue
        wanted: dict[str, object] = {
            _PARALLEL + "tensor_model_parallel_size": tp,
            _PARALLEL + "pipeline_model_parallel_size": pp,
            _PARALLEL + "expert_model_parallel_size": ep,
            _PARALLEL + "sequence_parallel": sequence,
            _PARALLEL + "virtual_pipeline_model_parallel_size": virtual,
            "training.recompute": recompute,
            "training.optimizer.distributed": distributed,
            "training.sequence_length": length,
        }
        yield _changes(config, wanted)


def _expert(config: RunConfig) -> list[int]:
    """Return sizes of expert parallelism, smaller ones too: a longer pipeline leaves a stage fewer ranks."""
    parallel, experts = config.training.parallel, config.model.num_moe_experts
    first = parallel.expert_model_parallel_size
    if experts is None:
        return [first]
    smaller = [first >> halvings for halvings in range(1, first.bit_length()) if first % (1 << halvings) == 0]
    return [size for size in _sizes(first, min(experts, parallel.world_size)) + smaller if experts % size == 0]


def _serving(config: RunConfig) -> Iterator[tuple[float, dict[str, object]]]:
    """Yield changes of the engine's settings with their costs; one of them is no change."""
    engine, parallel = config.rollout.engine, config.training.parallel
    for tp, cache, length in itertools.product(
        _sizes(engine.tensor_parallel_size, parallel.ranks_per_node),
        {engine.kv_cache_memory_mib, None},
        _halvings(engine.max_model_len),
    ):
        wanted: dict[str, object] = {
            "rollout.engine.tensor_parallel_size": tp,
            "rollout.engine.kv_cache_memory_mib": cache,
            "rollout.engine.max_model_len": length,
        }
        yield _changes(config, wanted)


def _changes(config: RunConfig, wanted: dict[str, object]) -> tuple[float, dict[str, object]]:
    """Return the cost of the settings in ``wanted`` that differ from the config, and those settings."""
    changes, cost = {}, 0.0
    for name, value in wanted.items():
        node: object = config
        for part in name.split("."):
            node = getattr(node, part)
        if node != value:
            changes[name] = value
            cost += _COSTS[name] * _steps(node, value)
    return cost, changes


def _steps(old: object, new: object) -> float:
    """Return how far two values are apart: steps of recomputation, doublings of a size, else 1."""
    if isinstance(old, str) and isinstance(new, str):
        return abs(_RECOMPUTE.index(new) - _RECOMPUTE.index(old))
    if isinstance(old, bool) or not (isinstance(old, int) and isinstance(new, int)):
        return 1.0
    return abs(math.log2(new / old))


def _sizes(first: int, limit: int) -> list[int]:
    """Return ``first`` and its doublings up to ``limit``."""
    sizes = [first]
    while sizes[-1] * 2 <= limit:
        sizes.append(sizes[-1] * 2)
    return sizes


def _halvings(first: int) -> list[int]:
    """Return ``first`` and its halvings down to ``_SHORTEST``."""
    lengths = [first]
    while lengths[-1] % 2 == 0 and lengths[-1] // 2 >= _SHORTEST:
        lengths.append(lengths[-1] // 2)
    return lengths
