"""The settings that the trainer supports: rules for trainer, planner and command line. No engine is imported."""

from __future__ import annotations

from megatron_dagger.config.base import ConfigError
from megatron_dagger.config.model import ModelConfig
from megatron_dagger.config.training import TrainingConfig


def check_supported(model: ModelConfig, training: TrainingConfig, *, cuda: bool) -> None:
    """Raise ConfigError for settings that the trainer cannot run, on a GPU (``cuda``) or on the CPU."""
    training.parallel.check_model(model)
    _check_parallel(training)
    if model.num_moe_experts is not None:
        _check_experts(model, training, cuda=cuda)
    _check_optimizer(training, cuda=cuda)
    _check_recompute(model, training, cuda=cuda)
    _check_fp8(model, training, cuda=cuda)
    masked = training.packing == "shared_prefix" and uses_transformer_engine(training, cuda=cuda)
    if (masked or _is_fp8(training)) and training.sequence_length % training.row_multiple:
        raise ConfigError(
            f"training.precision={training.precision} with packing={training.packing} needs training.sequence_length "
            f"to be a multiple of {training.row_multiple}, got {training.sequence_length}"
        )


def _check_parallel(training: TrainingConfig) -> None:
    parallel = training.parallel
    if parallel.context_parallel_size > 1:
        raise ConfigError(
            f"training.parallel.context_parallel_size={parallel.context_parallel_size}: packed rows cannot be "
            "split over ranks: a label's tokens attend to a prefix that other ranks would hold; set it to 1 and use "
            "tensor parallelism with sequence_parallel for long rows"
        )
    if training.sequence_length % parallel.tensor_model_parallel_size:
        raise ConfigError(
            f"training.sequence_length={training.sequence_length} is not a multiple of "
            f"training.parallel.tensor_model_parallel_size={parallel.tensor_model_parallel_size}"
        )
    virtual = parallel.virtual_pipeline_model_parallel_size
    if virtual is None or virtual == 1:
        return
    if parallel.pipeline_model_parallel_size == 1:
        raise ConfigError(
            f"training.parallel.virtual_pipeline_model_parallel_size={virtual} needs pipeline_model_parallel_size > 1"
        )
    if training.micro_batches % parallel.pipeline_model_parallel_size:
        raise ConfigError(
            f"the interleaved schedule needs a multiple of "
            f"pipeline_model_parallel_size={parallel.pipeline_model_parallel_size} micro-batches, got "
            f"{training.micro_batches}; change training.global_batch_tokens"
        )


def _check_experts(model: ModelConfig, training: TrainingConfig, *, cuda: bool) -> None:
    parallel = training.parallel
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            f"training.parallel.tensor_model_parallel_size={parallel.tensor_model_parallel_size} with experts needs "
            "sequence parallelism (Megatron-Core's rule); set training.parallel.sequence_parallel=true"
        )
    if model.moe_router_topk == 1 and model.norm_topk_prob:
        raise ConfigError(
            "model.moe_router_topk=1 with model.norm_topk_prob weighs every expert with 1, so the router would "
            "not learn; set model.norm_topk_prob=false"
        )
    if parallel.expert_tensor_parallel_size > 1 and not cuda:
        raise ConfigError(
            f"training.parallel.expert_tensor_parallel_size={parallel.expert_tensor_parallel_size} needs NCCL (gloo "
            "cannot gather ranks' unequal numbers of tokens); set it to 1 and use expert_model_parallel_size"
        )


def _check_optimizer(training: TrainingConfig, *, cuda: bool) -> None:
    """Check Megatron-Core's conditions on the precision-aware optimizer (OptimizerConfig.__post_init__)."""
    config = training.optimizer
    if not config.precision_aware:
        return
    moments, fraction = f"moments={config.moments}", f"cpu_offload_fraction={config.cpu_offload_fraction}"
    setting = f"training.optimizer.{moments if config.moments != 'fp32' else fraction}"
    if not uses_transformer_engine(training, cuda=cuda):
        raise ConfigError(
            f"{setting} needs Transformer Engine's AdamW, on a GPU in bf16 or fp8; set moments=fp32 and "
            "cpu_offload_fraction=0 here"
        )
    if not config.distributed:
        raise ConfigError(f"{setting} needs the distributed optimizer; set training.optimizer.distributed=true")
    if config.moments != "fp32" and config.cpu_offload_fraction > 0:
        raise ConfigError(f"{setting} with {fraction}: Megatron-Core offloads moments in fp32 only; set one of the two")


def _check_recompute(model: ModelConfig, training: TrainingConfig, *, cuda: bool) -> None:
    if training.recompute != "selective":
        return
    modules = set(training.recompute_modules)
    experts = sorted(modules & {"moe", "moe_act"})
    if experts and model.num_moe_experts is None:
        raise ConfigError(f"training.recompute_modules has {experts[0]}, and family {model.family} has no experts")
    if "moe_act" in modules and not uses_transformer_engine(training, cuda=cuda):
        raise ConfigError("training.recompute_modules has moe_act, which needs Transformer Engine's experts; use moe")
    outputs = sorted(modules & {"layernorm", "moe_act"})
    if outputs and training.precision == "fp8_delayed":
        raise ConfigError(
            f"training.recompute_modules: Megatron-Core cannot recompute {outputs[0]} with precision=fp8_delayed; "
            "use fp8_tensorwise, or leave it out"
        )


def _check_fp8(model: ModelConfig, training: TrainingConfig, *, cuda: bool) -> None:
    """Check Megatron-Core's conditions on FP8 (TransformerConfig.__post_init__; Megatron-LM's arguments.py)."""
    fp8, ends = _is_fp8(training), training.bf16_layers_at_ends
    if fp8 and not cuda:
        raise ConfigError(f"training.precision={training.precision} needs a GPU; use fp32 or bf16 here")
    for name in ("fp8_param_gather", "bf16_layers_at_ends"):
        if getattr(training, name) and not fp8:
            raise ConfigError(f"training.{name} needs an FP8 precision, and training.precision={training.precision}")
    if training.fp8_param_gather and not training.optimizer.distributed:
        raise ConfigError("training.fp8_param_gather needs training.optimizer.distributed=true")
    if training.fp8_param_gather and model.num_moe_experts is not None:
        raise ConfigError("training.fp8_param_gather is for dense models here; set it to false")
    if ends and training.precision == "fp8_delayed":
        raise ConfigError(
            f"training.bf16_layers_at_ends={ends}: delayed scaling cannot leave layers out; use fp8_tensorwise or "
            "fp8_blockwise"
        )
    if fp8:
        _check_fp8_widths(model, training)
    stage_layers = model.num_layers // training.parallel.pipeline_model_parallel_size
    if not 0 <= ends <= stage_layers:
        raise ConfigError(f"training.bf16_layers_at_ends={ends} must lie between 0 and a stage's {stage_layers} layers")


def _check_fp8_widths(model: ModelConfig, training: TrainingConfig) -> None:
    """Check Transformer Engine's rules on sizes (``assert_dim_for_fp8_exec``, ``assert_dim_for_all_gather``)."""
    parallel = training.parallel
    dense, experts = model.ffn_hidden_size // parallel.tensor_model_parallel_size, model.moe_ffn_hidden_size
    heads = model.num_attention_heads // parallel.tensor_model_parallel_size
    widths = {
        "model.hidden_size": model.hidden_size,
        "model.kv_channels of a rank's heads": heads * model.kv_channels,
        "a rank's share of the MLP": experts // parallel.expert_tensor_parallel_size if experts else dense,
    }
    blocks = training.precision == "fp8_blockwise" and parallel.sequence_parallel  # gathered in FP8
    for name, width in widths.items():
        multiple = 128 if blocks and name == "model.hidden_size" else 16
        if width % multiple:
            raise ConfigError(
                f"training.precision={training.precision} needs {name} to be a multiple of {multiple}, and it is "
                f"{width}; use bf16, or another layout"
            )


def _is_fp8(training: TrainingConfig) -> bool:
    return training.precision.startswith("fp8")


def uses_transformer_engine(training: TrainingConfig, *, cuda: bool) -> bool:
    """Return whether the layers are Transformer Engine's; its packed attention does not support fp32."""
    return cuda and training.precision != "fp32"
