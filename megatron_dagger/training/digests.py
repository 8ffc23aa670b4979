"""Digests of the trainer's weights, in canonical (Hugging Face) names, from its memory.

The first of the ranks that hold a share digests it; nothing but the hashes travels, and for
an engine that quantises the blocks' maxima.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed

from megatron_dagger.config import ModelConfig
from megatron_dagger.training import param_names as layout
from megatron_dagger.training.model import bare
from megatron_dagger.weights.blocks import Block
from megatron_dagger.weights.families import lookup
from megatron_dagger.weights.families.decoder import OUTPUT_LAYER
from megatron_dagger.weights.layouts import padded_vocab_size
from megatron_dagger.weights.quantise import BlockScales
from megatron_dagger.weights.verify.digest import Shares, digest_shares, digest_whole, merge


def parameter_digests(chunks: list[Any], model: ModelConfig, scales: BlockScales | None = None) -> dict[str, str]:
    """The digests by canonical name, the same on every rank; called on all ranks together.

    With ``scales``, of what an engine holds that quantises with them, the scales included.
    """
    mine: Shares = {}
    for blocks, tensor in _own_tensors(chunks, model):
        mine |= digest_shares(blocks, scales.quantised(blocks, tensor) if scales else tensor, model)
    all_tasks: list[Shares] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(all_tasks, mine)
    if scales:
        all_tasks.append(digest_whole(scales.canonical().items(), model))
    return merge(all_tasks, model)


def block_scales(chunks: list[Any], model: ModelConfig, device: torch.device) -> BlockScales:
    """The scales of the weights in block-wise FP8, the same on every rank; called on all ranks together."""
    scales = BlockScales(model, device)
    for blocks, tensor in _own_tensors(chunks, model):
        scales.add(blocks, tensor)
    torch.distributed.all_reduce(scales.maxima, torch.distributed.ReduceOp.MAX)
    scales.finish()
    return scales


def _own_tensors(chunks: list[Any], model: ModelConfig) -> Iterator[tuple[list[Block], torch.Tensor]]:
    """What this rank holds as the first replica, and what each tensor is made of; a tied embedding once."""
    for chunk in chunks:
        for name, parameter in layout.global_parameters(bare(chunk)):
            if not layout.is_first_replica(name) or (name == OUTPUT_LAYER and model.tie_embeddings):
                continue
            own = layout.own_shard(name)
            blocks = lookup(model).layout(name, model).blocks(own, padded_rows=padded_vocab_size(model, own.size))
            yield blocks, layout.values(parameter)
