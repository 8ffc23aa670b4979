"""Digests of the trainer's weights, in canonical (Hugging Face) names, from its memory.

The first of the ranks that hold a share digests it. Only the hashes are exchanged and, for a rollout engine that
quantises, the maxima of the weights' blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed

from megatron_dagger.config import ModelConfig
from megatron_dagger.training import param_names
from megatron_dagger.training.model import bare
from megatron_dagger.weights.blocks import Block
from megatron_dagger.weights.families import lookup
from megatron_dagger.weights.families.decoder import OUTPUT_LAYER
from megatron_dagger.weights.layouts import padded_vocab_size
from megatron_dagger.weights.quantise import BlockScales
from megatron_dagger.weights.verify.digest import Shares, digest_shares, digest_whole, merge


def parameter_digests(chunks: list[Any], model: ModelConfig, scales: BlockScales | None = None) -> dict[str, str]:
    """Return the digests by canonical name, the same on every rank. Called on all ranks together.

    With ``scales`` the weights are digested as quantised with them, and the scales are digested too.
    """
    own: Shares = {}
    for blocks, tensor in _own_tensors(chunks, model):
        own |= digest_shares(blocks, scales.quantised(blocks, tensor) if scales else tensor, model)
    gathered: list[Shares] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, own)
    if scales:
        gathered.append(digest_whole(scales.canonical().items(), model))
    return merge(gathered, model)


def block_scales(chunks: list[Any], model: ModelConfig, device: torch.device) -> BlockScales:
    """Return the scales of the weights in block-wise FP8, the same on every rank. Called on all ranks together."""
    scales = BlockScales(model, device)
    for blocks, tensor in _own_tensors(chunks, model):
        scales.add(blocks, tensor)
    torch.distributed.all_reduce(scales.maxima, torch.distributed.ReduceOp.MAX)
    scales.finish()
    return scales


def _own_tensors(chunks: list[Any], model: ModelConfig) -> Iterator[tuple[list[Block], torch.Tensor]]:
    """Yield (blocks, tensor) for each tensor of which this rank is the first replica; a tied embedding once."""
    for chunk in chunks:
        for name, parameter in param_names.global_parameters(bare(chunk)):
            if not param_names.is_first_replica(name) or (name == OUTPUT_LAYER and model.tie_embeddings):
                continue
            shard = param_names.own_shard(name)
            blocks = (
                lookup(model)
                .megatron_tensor(name, model)
                .blocks(shard, padded_rows=padded_vocab_size(model, shard.size))
            )
            yield blocks, param_names.values(parameter)
