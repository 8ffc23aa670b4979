"""Memory per GPU of training, by pipeline stage, and of serving. All sizes are in bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.config.rollout import VllmEngineConfig
from megatron_dagger.config.training import LABEL_MULTIPLE, TrainingConfig
from megatron_dagger.planning import activations
from megatron_dagger.planning.assumptions import Assumptions
from megatron_dagger.planning.gpus import Gpu
from megatron_dagger.planning.parameters import rank_parameters, worker_parameters
from megatron_dagger.planning.saved_tensors import FP32

GIB = 1 << 30
_MOMENT_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0}


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """The memory of one rank of pipeline stage ``stage``."""

    stage: int
    parameters: int
    weights: float
    fp8_weights: float  # copies that Transformer Engine keeps
    gradients: float
    optimizer: float  # main weights and AdamW's moments
    activations: float  # kept for the backward pass, at their peak
    working: float  # in addition, at the worst moment: a layer's backward pass, or logits
    reserve: float
    capacity: float

    @property
    def static(self) -> float:
        """The memory between two steps."""
        return self.weights + self.fp8_weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.static + self.activations + self.working + self.reserve

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity


@dataclass(frozen=True, kw_only=True)
class ServingMemory:
    """The memory of one worker of the student's engine."""

    parameters: int
    weights: float
    experts: float  # of the weights
    working: float
    kv_cache: float  # the remaining memory, or the size in the settings
    kv_bytes_per_token: float
    max_model_len: int
    capacity: float  # that the engine may use

    @property
    def kv_tokens(self) -> int:
        return max(0, int(self.kv_cache / self.kv_bytes_per_token))

    @property
    def full_sequences(self) -> int:
        """Sequences of ``max_model_len`` tokens that fit at once. vLLM refuses to start below one."""
        return self.kv_tokens // self.max_model_len

    @property
    def total(self) -> float:
        return self.weights + self.working + self.kv_cache

    @property
    def fits(self) -> bool:
        return self.full_sequences >= 1 and self.total <= self.capacity


def state_bytes(training: TrainingConfig, parameters: int, experts: int = 0) -> tuple[float, float, float]:
    """Return weights, gradients and optimizer state of a rank with ``parameters``, ``experts`` of them in experts.

    Weights are in the training precision, gradients in fp32 (``grad_reduce_in_fp32``), AdamW's two moments in fp32 and,
    with BF16 weights, their main copy in fp32: 6 + 12 / d bytes per parameter with the distributed optimizer, d the
    data-parallel size, else 18 (Megatron-LM, ``training/theoretical_memory_usage.py``). In fp32 the weights are their
    own main copy: 8 + 8 / d, else 16. Moments of fewer bytes and offloading count in the optimizer's part. Experts have
    their own buffers and optimizer, whose state is split over the ranks that hold the same experts
    (``_get_param_groups_and_buffers`` for ``expert_parallel_buffers``, with the group ``intra_expt_dp``, in
    Megatron-Core's ``optimizer/__init__.py``).
    """
    low, config, parallel = training.precision != "fp32", training.optimizer, training.parallel
    state = ((4.0 if low else 0.0) + 2 * _MOMENT_BYTES[config.moments]) * (1 - config.cpu_offload_fraction)
    held = float(parameters)
    if config.distributed:
        held = (parameters - experts) / parallel.data_parallel_size + experts / parallel.expert_data_parallel_size
    return (2.0 if low else 4.0) * parameters, 4.0 * parameters, state * held


def training_memory(
    model: ModelConfig, training: TrainingConfig, gpu: Gpu, assumed: Assumptions, stage: int
) -> TrainingMemory:
    """Return the memory of a rank of pipeline stage ``stage`` at the worst moment of a round."""
    parameters = rank_parameters(model, training.parallel, stage)
    weights, gradients, optimizer = state_bytes(training, parameters.total, parameters.experts)
    te = training.precision != "fp32"
    kept, working = _activations(model, training, assumed, stage, te=te)
    wasted = 1 + assumed.fragmentation
    return TrainingMemory(
        stage=stage,
        parameters=parameters.total,
        weights=weights - (2.0 * parameters.linears if training.fp8_param_gather else 0.0),
        # TELinear caches a weight in FP8 and its transpose between micro-batches: one byte each
        fp8_weights=2.0 * parameters.linears if training.precision.startswith("fp8") else 0.0,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept * wasted,
        working=working * wasted,
        reserve=assumed.reserve_gib * GIB,
        capacity=gpu.memory_gib * GIB,
    )


def _activations(
    model: ModelConfig, training: TrainingConfig, assumed: Assumptions, stage: int, *, te: bool
) -> tuple[float, float]:
    """Return the peak of the bytes kept for backward passes, and the bytes added at the worst moment."""
    length = training.sequence_length
    layers = activations.in_flight_layers(model, training, stage)
    load = assumed.expert_load
    kept = layers * activations.layer_bytes(model, training, te=te, expert_load=load)
    in_layer = activations.recomputed_bytes(model, training, te=te, expert_load=load)
    in_layer += activations.gradient_bytes(model, training, expert_load=load)
    if stage < training.parallel.pipeline_model_parallel_size - 1:
        return kept, in_layer
    labels = label_positions(training, assumed)
    head = activations.head_bytes(model, training, labels, te=te)
    head += activations.logits_bytes(model, training, labels, kept=False)
    # A round ends with the log-probs of one whole row, for the canary; no activations are kept for a backward pass.
    canary = activations.logits_bytes(model, training, length, kept=False) - kept
    return kept, max(in_layer, head, canary)


def label_positions(training: TrainingConfig, assumed: Assumptions) -> int:
    """Return the tokens of a row whose logits are computed: all of them with sequence parallelism."""
    if training.parallel.sequence_parallel:
        return training.sequence_length
    wanted = math.ceil(training.sequence_length * assumed.label_share)
    return min(training.sequence_length, -(-wanted // LABEL_MULTIPLE) * LABEL_MULTIPLE)


def kv_bytes_per_token(model: ModelConfig, engine: VllmEngineConfig) -> float:
    """Return the bytes of keys and values of one worker's KV heads in all layers, in the engine's dtype."""
    heads = max(1, model.num_query_groups // engine.tensor_parallel_size)
    return 2.0 * model.num_layers * heads * model.kv_channels * dtype_bytes(engine)


def dtype_bytes(engine: VllmEngineConfig) -> int:
    """Return the bytes of one value in the engine's dtype."""
    return 4 if engine.dtype == "float32" else 2


def serving_memory(model: ModelConfig, engine: VllmEngineConfig, gpu: Gpu, assumed: Assumptions) -> ServingMemory:
    """Return the memory of one worker of the engine.

    vLLM gives the KV cache the memory that ``gpu_memory_utilization`` leaves after weights and activations, unless
    ``kv_cache_memory_mib`` sets its size.
    """
    parameters = worker_parameters(model, engine.tensor_parallel_size)
    size = dtype_bytes(engine)
    matrix = 1 + FP32 / 128**2 if engine.quantization == "fp8" else size  # a byte, and a scale per 128 x 128
    weights = matrix * parameters.linears + size * (parameters.vocabulary + parameters.small)
    working = assumed.serving_gib * GIB
    cache_mib = engine.kv_cache_memory_mib
    capacity = gpu.memory_gib * GIB * (engine.gpu_memory_utilization if cache_mib is None else 1.0)
    return ServingMemory(
        parameters=parameters.total,
        weights=weights,
        experts=matrix * parameters.experts,
        working=working,
        kv_cache=max(0.0, capacity - weights - working) if cache_mib is None else float(cache_mib << 20),
        kv_bytes_per_token=kv_bytes_per_token(model, engine),
        max_model_len=engine.max_model_len,
        capacity=capacity,
    )
