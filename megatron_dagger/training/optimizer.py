"""Megatron-Core's gradient buffers and AdamW: distributed over data-parallel ranks, with clipping."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed import finalize_model_grads as megatron_finalize
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer

from megatron_dagger.config import TrainingConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}  # of Transformer Engine's AdamW


def fp8_recipe(training: TrainingConfig) -> str | None:
    """Return Megatron's name of the FP8 recipe; None in other precisions."""
    name, _, recipe = training.precision.partition("_")
    return recipe if name == "fp8" else None


def data_parallel_config(training: TrainingConfig) -> DistributedDataParallelConfig:
    """Return Megatron's settings of gradient reduction."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=training.optimizer.distributed,
        overlap_grad_reduce=torch.cuda.is_available(),
        overlap_param_gather=False,  # between steps the weights are complete, to be saved and digested
        check_for_nan_in_grad=True,
        average_in_collective=False,
        fp8_param_gather=training.fp8_param_gather,
    )


def data_parallel(chunks: list[Any], training: TrainingConfig) -> list[Any]:
    """Wrap model chunks with Megatron's gradient buffers and data-parallel reduction."""
    settings = data_parallel_config(training)
    config = chunks[0].config
    wrapped = [
        DistributedDataParallel(config, settings, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    if settings.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return wrapped


def finalize_model_grads(model: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
    """Finalise gradients as Megatron does, but do not divide by ``num_tokens``: the loss is normalised already."""
    megatron_finalize(model, None, **kwargs)


def settings(training: TrainingConfig) -> dict[str, Any]:
    """Return the fields of Megatron's OptimizerConfig."""
    config = training.optimizer
    dtype = torch.float32 if training.precision == "fp32" else torch.bfloat16
    return {
        "optimizer": "adam",
        "lr": config.lr,
        "min_lr": config.min_lr,
        "weight_decay": config.weight_decay,
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "adam_eps": config.adam_eps,
        "clip_grad": config.clip_grad,
        "bf16": dtype is torch.bfloat16,
        "params_dtype": dtype,
        "use_distributed_optimizer": config.distributed,
        "fp8_recipe": fp8_recipe(training),
        "use_precision_aware_optimizer": config.precision_aware,
        "exp_avg_dtype": _DTYPES[config.moments],
        "exp_avg_sq_dtype": _DTYPES[config.moments],
        "optimizer_cpu_offload": config.cpu_offload_fraction > 0,
        "optimizer_offload_fraction": config.cpu_offload_fraction,
        "overlap_cpu_optimizer_d2h_h2d": config.cpu_offload_fraction > 0,
    }


def build(chunks: list[Any], training: TrainingConfig) -> Any:
    """Return Megatron's AdamW over the wrapped ``chunks``, without any moments yet."""
    optimizer = get_megatron_optimizer(MegatronOptimizerConfig(**settings(training)), chunks)
    chunks[0].config.grad_scale_func = optimizer.scale_loss
    if not torch.cuda.is_available():
        for group in optimizer.param_groups:
            group["fused"] = True  # torch's AdamW in one pass over the memory
    return optimizer


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)


def each_optimizer(optimizer: Any) -> list[Any]:
    """Return the Megatron optimizers inside a ChainedOptimizer, or the only one."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))
