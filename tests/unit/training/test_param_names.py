"""Cutting parameters for tensor parallelism: against the weight map's blocks, and against Megatron's rule for gates."""

import pytest
import torch

from megatron_dagger.training.param_names import cut
from megatron_dagger.weights import families
from megatron_dagger.weights.blocks import Shard
from tests.unit.weights.sample_models import sample_model

PADDED = 128


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_cut_parameter_has_the_blocks_of_the_weight_map(family, size):
    model = sample_model(family, num_query_groups=4, tie_embeddings=False)
    for name, layout in families.lookup(model).megatron_tensors(model).items():
        canonical = {
            part: torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
            for part, shape in layout.canonical_shapes().items()
        }
        rows = PADDED if layout.padded else None
        full = families.from_canonical(name, canonical, model, padded_rows=rows)
        for rank in range(size):
            own = Shard(rank=rank, size=size)
            part = cut(full, layout, own)
            for block in layout.blocks(own, padded_rows=rows):
                index = tuple(slice(s, s + n) for s, n in zip(block.start, block.canonical.shape, strict=True))
                assert torch.equal(part[index], canonical[block.name][block.canonical.slices]), name


def test_each_rank_gets_its_rows_of_the_gate_and_of_the_up_projection():
    layout = families.lookup(sample_model("qwen3")).megatron_tensors(sample_model("qwen3"))[
        "decoder.layers.0.mlp.linear_fc1.weight"
    ]
    full = torch.cat([torch.zeros(8, 8) + torch.arange(8)[:, None], torch.ones(8, 8) * 9])
    assert cut(full, layout, Shard(rank=1, size=2))[:, 0].tolist() == [4, 5, 6, 7, 9, 9, 9, 9]
