"""How Megatron names and cuts the parameters of a dense decoder: which dimension goes to which rank.

Names here are global: ``decoder.layers.3.…`` counts layers over all pipeline stages, and the norms in
front of a linear have the name that Megatron's checkpoints give them whatever the layer spec is
(``self_attention.linear_qkv.layer_norm_weight``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum

import torch


class Cut(Enum):
    """How tensor parallelism cuts a parameter."""

    NOT = "not"  # every rank has all of it
    ROWS = "rows"  # along dimension 0
    COLUMNS = "columns"  # along dimension 1
    GATED_ROWS = "gated_rows"  # two halves, gate and up, each along dimension 0


_CUTS = {
    "word_embeddings.weight": Cut.ROWS,
    "output_layer.weight": Cut.ROWS,
    "linear_qkv.weight": Cut.ROWS,  # query groups one after the other: [q..., k, v] each
    "linear_proj.weight": Cut.COLUMNS,
    "linear_fc1.weight": Cut.GATED_ROWS,
    "linear_fc2.weight": Cut.COLUMNS,
}
_LOCAL_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def cut_of(name: str) -> Cut:
    """How the parameter called ``name`` is cut."""
    return _CUTS.get(".".join(name.split(".")[-2:]), Cut.NOT)


def shard(full: torch.Tensor, name: str, rank: int, size: int) -> torch.Tensor:
    """The part of a full parameter that tensor-parallel rank ``rank`` of ``size`` holds."""
    cut = cut_of(name)
    if cut is Cut.NOT or size == 1:
        return full
    if cut is Cut.GATED_ROWS:
        return torch.cat([half.chunk(size, dim=0)[rank] for half in full.chunk(2, dim=0)])
    return full.chunk(size, dim=1 if cut is Cut.COLUMNS else 0)[rank].contiguous()


def unshard(parts: Sequence[torch.Tensor], name: str) -> torch.Tensor:
    """The full parameter from all ranks' parts, in rank order (the inverse of ``shard``)."""
    cut = cut_of(name)
    if cut is Cut.NOT or len(parts) == 1:
        return parts[0]
    if cut is Cut.GATED_ROWS:
        halves = [part.chunk(2, dim=0) for part in parts]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    return torch.cat(list(parts), dim=1 if cut is Cut.COLUMNS else 0)


def global_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of one model chunk (a bare GPTModel) with their global names."""
    layers = model.decoder.layers  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers."):
            local, _, rest = name.removeprefix("decoder.layers.").partition(".")
            number = layers[int(local)].layer_number - 1  # type: ignore[index,union-attr]
            name = f"decoder.layers.{number}.{_LOCAL_NORMS.get(rest, rest)}"
        yield name, parameter
