"""The trainer's parameters by their global names, and which part of one a rank holds.

``decoder.layers.3.…`` counts layers over all pipeline stages, ``…experts.linear_fc1.weight5`` experts over
all expert-parallel ranks, and the norms in front of a linear have the name that Megatron's checkpoints
give them whatever the layer spec is (``self_attention.linear_qkv.layer_norm_weight``). How a tensor is cut
is the family's to say (``weights.families``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from megatron.core import parallel_state

from megatron_dagger.weights.blocks import Shard
from megatron_dagger.weights.families.megatron_tensor import Layout

_LOCAL_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.)?(linear_fc[12])\.weight(\d*)")


def cut(full: torch.Tensor, layout: Layout, own: Shard) -> torch.Tensor:
    """The part of a full parameter (of one expert, or of none) that a tensor-parallel rank holds."""
    pieces = [full[box.slices] for box in layout.pieces(tuple(full.shape), own.rank, own.size)]
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces)


def values(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter's values; those of an FP8 one (``training.fp8_param_gather``) in BF16, as a copy."""
    detached = parameter.detach()
    return detached if type(detached) is torch.Tensor else detached.dequantize()


def own_shard(name: str) -> Shard:
    """This rank's share of a parameter: experts are cut over ranks of their own."""
    if _EXPERT.search(name):
        rank = parallel_state.get_expert_tensor_parallel_rank()
        return Shard(rank=rank, size=parallel_state.get_expert_tensor_parallel_world_size())
    rank = parallel_state.get_tensor_model_parallel_rank()
    return Shard(rank=rank, size=parallel_state.get_tensor_model_parallel_world_size())


def is_first_replica(name: str) -> bool:
    """Whether this rank is the first of those that hold the same of a parameter, data-parallel copies alike."""
    if _EXPERT.search(name):
        return bool(parallel_state.get_expert_data_parallel_rank() == 0)
    return bool(parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0)


def global_parameters(
    model: torch.nn.Module, *, number_experts: bool = True
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of one model chunk (a bare GPTModel) with their global names.

    Without ``number_experts`` a rank's own experts count from 0, as the bridge's plan names them.
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
            elif not hasattr(layer.mlp, "router") or not rest.startswith("pre_mlp"):  # nothing fuses a router's norm
                rest = _LOCAL_NORMS.get(rest, rest)
            name = f"decoder.layers.{layer.layer_number - 1}.{rest}"
        yield name, parameter
