"""The trainer's parameters by their global names, and which part of one a rank holds.

``decoder.layers.3.…`` counts layers over all pipeline stages, and the norms in front of a linear have the
name that Megatron's checkpoints give them whatever the layer spec is
(``self_attention.linear_qkv.layer_norm_weight``). How a tensor is cut is the family's to say
(``weights.families``).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_dagger.weights.families.layout import Layout

_LOCAL_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def shard(full: torch.Tensor, layout: Layout, rank: int, size: int) -> torch.Tensor:
    """The part of a full parameter that tensor-parallel rank ``rank`` of ``size`` holds."""
    pieces = [full[box.slices] for box in layout.pieces(tuple(full.shape), rank, size)]
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces)


def global_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of one model chunk (a bare GPTModel) with their global names."""
    layers = model.decoder.layers  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers."):
            local, _, rest = name.removeprefix("decoder.layers.").partition(".")
            number = layers[int(local)].layer_number - 1  # type: ignore[index,union-attr]
            name = f"decoder.layers.{number}.{_LOCAL_NORMS.get(rest, rest)}"
        yield name, parameter
