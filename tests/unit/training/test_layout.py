"""Cutting parameters for tensor parallelism and putting them together again."""

import pytest
import torch

from megatron_dagger.training.layout import Cut, cut_of, shard, unshard

NAMES = {
    "embedding.word_embeddings.weight": Cut.ROWS,
    "output_layer.weight": Cut.ROWS,
    "decoder.layers.3.self_attention.linear_qkv.weight": Cut.ROWS,
    "decoder.layers.3.self_attention.linear_proj.weight": Cut.COLUMNS,
    "decoder.layers.0.mlp.linear_fc1.weight": Cut.GATED_ROWS,
    "decoder.layers.0.mlp.linear_fc2.weight": Cut.COLUMNS,
    "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": Cut.NOT,
    "decoder.layers.0.self_attention.q_layernorm.weight": Cut.NOT,
    "decoder.final_layernorm.weight": Cut.NOT,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_put_together_are_the_whole(name, size):
    full = torch.arange(16 * 8, dtype=torch.float32).view(16, 8)
    full = full[0] if NAMES[name] is Cut.NOT else full
    parts = [shard(full, name, rank, size) for rank in range(size)]
    assert cut_of(name) is NAMES[name]
    assert torch.equal(unshard(parts, name), full)
    if size > 1 and NAMES[name] is not Cut.NOT:
        assert sum(part.numel() for part in parts) == full.numel()


def test_each_rank_gets_its_rows_of_the_gate_and_of_the_up_projection():
    gate, up = torch.zeros(4, 2) + torch.arange(4)[:, None], torch.ones(4, 2) * 9
    part = shard(torch.cat([gate, up]), "decoder.layers.0.mlp.linear_fc1.weight", 1, 2)
    assert part[:, 0].tolist() == [2, 3, 9, 9]
