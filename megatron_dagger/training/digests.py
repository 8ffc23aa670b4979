"""Digests of the trainer's weights, in canonical (Hugging Face) names, from its memory.

Every rank of one data-parallel replica digests its own shares; nothing but the hashes travels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state

from megatron_dagger.config import ModelConfig
from megatron_dagger.training import layout
from megatron_dagger.training.model import bare
from megatron_dagger.weights.blocks import Shard
from megatron_dagger.weights.digest import Shares, digest_shares, merge
from megatron_dagger.weights.families import lookup
from megatron_dagger.weights.layouts import padded_vocab_size


def parameter_digests(chunks: list[Any], model: ModelConfig) -> dict[str, str]:
    """The digests by canonical name, the same on every rank; called on all ranks together."""
    mine: Shares = {}
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
        family, size = lookup(model), parallel_state.get_tensor_model_parallel_world_size()
        shard = Shard(rank=parallel_state.get_tensor_model_parallel_rank(), size=size)
        for chunk in chunks:
            for name, parameter in layout.global_parameters(bare(chunk)):
                if name == "output_layer.weight" and model.tie_embeddings:
                    continue  # the last stage's copy of the embedding
                blocks = family.layout(name, model).blocks(shard, padded_rows=padded_vocab_size(model, size))
                mine |= digest_shares(blocks, parameter.detach(), model)
    everybodys: list[Shares] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everybodys, mine)
    return merge(everybodys, model)
