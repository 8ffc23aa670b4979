"""Digests of the trainer's weights, in canonical (Hugging Face) names, from its memory.

Each tensor is put together over the tensor-parallel ranks, digested on the first of them, and dropped:
at most one whole tensor is in memory, and only hashes travel between pipeline stages.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state

from megatron_dagger.config import ModelConfig
from megatron_dagger.training import layout
from megatron_dagger.training.model import bare
from megatron_dagger.weights import families
from megatron_dagger.weights.digest import tensor_digest


def parameter_digests(chunks: list[Any], model: ModelConfig) -> dict[str, str]:
    """sha256 by canonical name, the same on every rank; called on all ranks together."""
    mine: dict[str, str] = {}
    for chunk in chunks:
        for name, parameter in layout.global_parameters(bare(chunk)):
            if name == "output_layer.weight" and model.tie_embeddings:
                continue  # the last stage's copy of the embedding
            full = _gather(parameter.detach(), name)
            if full is not None:
                for canonical, tensor in families.to_canonical(name, full, model):
                    mine[canonical] = tensor_digest(tensor)
    everybodys: list[dict[str, str] | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everybodys, mine)
    merged: dict[str, str] = {}
    for part in everybodys:
        merged.update(part or {})
    return {name: merged[name] for name in families.canonical_names(model)}


def _gather(part: torch.Tensor, name: str) -> torch.Tensor | None:
    """The whole parameter on the first tensor-parallel rank of the first data-parallel replica."""
    if parallel_state.get_data_parallel_rank() != 0:
        return None
    group = parallel_state.get_tensor_model_parallel_group()
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    if group.size() == 1 or layout.cut_of(name) is layout.Cut.NOT:
        return part if first else None
    parts = [torch.empty_like(part) for _ in range(group.size())] if first else None
    source = parallel_state.get_tensor_model_parallel_src_rank()
    torch.distributed.gather(part.contiguous(), parts, dst=source, group=group)
    return layout.unshard(parts, name) if parts is not None else None
