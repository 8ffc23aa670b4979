"""Global names of the trainer's parameters, and the part of a parameter that a rank holds.

In a global name ``decoder.layers.3.…`` counts layers over all pipeline stages and ``…experts.linear_fc1.weight5``
experts over all expert-parallel ranks. The norm before a linear layer has the name that it has in Megatron's
checkpoints, with either layer spec (``self_attention.linear_qkv.layer_norm_weight``). The model's family defines how a
tensor is cut (``weights.families``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from megatron.core import parallel_state

from megatron_dagger.weights.blocks import Shard
from megatron_dagger.weights.families.megatron_tensor import MegatronTensor

_LOCAL_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.)?(linear_fc[12])\.weight(\d*)")


def cut(full: torch.Tensor, layout: MegatronTensor, shard: Shard) -> torch.Tensor:
    """Return the part of a full parameter (of a single expert, for experts) that the rank of ``shard`` holds."""
    pieces = [full[box.slices] for box in layout.shard_boxes(tuple(full.shape), shard.rank, shard.size)]
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces)


def values(parameter: torch.Tensor) -> torch.Tensor:
    """Return a parameter's values; of an FP8 parameter (``training.fp8_param_gather``) a copy in BF16."""
    detached = parameter.detach()
    return detached if type(detached) is torch.Tensor else detached.dequantize()


def own_shard(name: str) -> Shard:
    """Return this rank's shard of a parameter: of an expert over the expert-tensor-parallel ranks."""
    if _EXPERT.search(name):
        rank = parallel_state.get_expert_tensor_parallel_rank()
        return Shard(rank=rank, size=parallel_state.get_expert_tensor_parallel_world_size())
    rank = parallel_state.get_tensor_model_parallel_rank()
    return Shard(rank=rank, size=parallel_state.get_tensor_model_parallel_world_size())


def is_first_replica(name: str) -> bool:
    """Return whether this rank is the first of the data-parallel ranks that hold the same shard of a parameter."""
    if _EXPERT.search(name):
        return bool(parallel_state.get_expert_data_parallel_rank() == 0)
    return bool(parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0)


def global_parameters(
    model: torch.nn.Module, *, number_experts: bool = True
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield (global name, parameter) of one model chunk (a bare GPTModel).

    Without ``number_experts`` this rank's experts count from 0, as in a TransferPlan.
    """
    layers = model.decoder.layers  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers."):
            local, _, rest = name.removeprefix("decoder.layers.").partition(".")
            layer = layers[int(local)]  # type: ignore[index,union-attr]
            expert = _EXPERT.fullmatch(rest)
            if expert:
                first = parallel_state.get_expert_model_parallel_rank() * layer.mlp.num_local_experts
                number = int(expert[1] or expert[3]) + (first if number_experts else 0)
                rest = f"mlp.experts.{expert[2]}.weight{number}"
            elif not hasattr(layer.mlp, "router") or not rest.startswith("pre_mlp"):  # a router's norm is not fused
                rest = _LOCAL_NORMS.get(rest, rest)
            name = f"decoder.layers.{layer.layer_number - 1}.{rest}"
        yield name, parameter
