"""The trainer's parameters by their global names, and which part of one a rank holds.

``decoder.layers.3.…`` counts layers over all pipeline stages, and the norms in front of a linear have the
name that Megatron's checkpoints give them whatever the layer spec is
(``self_attention.linear_qkv.layer_norm_weight``). How a tensor is cut is the family's to say
(``weights.families``).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_dagger.weights.blocks import Cut, share
from megatron_dagger.weights.families.layout import Layout

_LOCAL_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def shard(full: torch.Tensor, layout: Layout, rank: int, size: int) -> torch.Tensor:
    """The part of a full parameter that tensor-parallel rank ``rank`` of ``size`` holds."""
    if layout.cut is Cut.NONE or size == 1:
        return full
    name = layout.parts[0].name
    if layout.cut is Cut.COLUMNS:
        start, extent = share(full.shape[1], rank, size, name)
        return full[:, start : start + extent].contiguous()
    fused = layout.cut is Cut.ROWS and not layout.padded  # gate and up: each is cut for itself
    parts = full.split([part.rows for part in layout.parts]) if fused else [full]
    own = []
    for part in parts:
        start, extent = share(part.shape[0], rank, size, name)
        own.append(part[start : start + extent])
    return torch.cat(own)


def global_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of one model chunk (a bare GPTModel) with their global names."""
    layers = model.decoder.layers  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers."):
            local, _, rest = name.removeprefix("decoder.layers.").partition(".")
            number = layers[int(local)].layer_number - 1  # type: ignore[index,union-attr]
            name = f"decoder.layers.{number}.{_LOCAL_NORMS.get(rest, rest)}"
        yield name, parameter
