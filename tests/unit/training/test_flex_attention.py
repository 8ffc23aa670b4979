"""FlexAttention over trees: its block mask against the definition, its output against TreeAttention's."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_mask

from megatron_dagger.training import flex_attention
from megatron_dagger.training.data.packing import pack
from megatron_dagger.training.flex_attention import BLOCK, TreeFlexAttention, block_mask, blocks
from megatron_dagger.training.tree_attention import TreeAttention, tree_params
from megatron_dagger.types import LabelledEpisode, StateLabel

HEADS, GROUPS, SIZE, LENGTH = 4, 2, 16, 12 * BLOCK
CPU = torch.device("cpu")


def row(seed):
    """Return a row of two long episodes with branches of all lengths, a short one, and padding."""
    rng = np.random.default_rng(seed)
    episodes = []
    for length in (700, 300, 20):
        tokens = rng.integers(0, 9, length).astype(np.int32)
        positions = np.sort(rng.choice(np.arange(1, length), 3, replace=False))
        labels = [StateLabel(position=int(p), tokens=rng.integers(10, 19, rng.integers(1, 70))) for p in positions]
        episodes.append(LabelledEpisode(tokens=tokens, labels=(*labels, StateLabel(position=4, tokens=tokens[4:]))))
    return pack(episodes, LENGTH).row(0)


def visible(packed):
    """Return which keys each query attends to, by the definition: (queries, keys) bool."""
    starts = np.repeat(packed.trees[:-1], np.diff(packed.trees))[:, None]
    query, key = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
    in_prefix = (key >= starts) & (key < packed.prefix_stops[:, None])
    return in_prefix | ((key >= packed.run_starts[:, None]) & (key <= query))


@pytest.mark.parametrize("seed", range(6))
def test_the_block_mask_equals_the_definition(seed):
    packed = row(seed)
    sees = visible(packed)
    tiles = sees.reshape(LENGTH // BLOCK, BLOCK, LENGTH // BLOCK, BLOCK)
    partial, full = blocks(packed)
    assert np.array_equal(partial | full, tiles.any((1, 3)))
    assert not (full & ~tiles.all((1, 3))).any()
    assert full.any() and not (partial | full).all()
    mask = block_mask(packed, CPU)
    assert np.array_equal(create_mask(mask.mask_mod, 1, 1, LENGTH, LENGTH, device="cpu")[0, 0].numpy(), sees)
    assert np.array_equal(mask.to_dense()[0, 0].numpy().astype(bool), partial | full)


@pytest.mark.parametrize("seed", range(2))
def test_the_output_equals_that_of_attention_run_by_run(seed):
    packed = row(seed)
    params = tree_params(packed, CPU)
    params.block_mask = block_mask(packed, CPU)
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(LENGTH, 1, n, SIZE, generator=generator) for n in (HEADS, GROUPS, GROUPS)]
    output, expected = (
        kind(SimpleNamespace(kv_channels=SIZE), 1, None, "self")(*inputs, packed_seq_params=params)
        for kind in (TreeFlexAttention, TreeAttention)
    )
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


def test_rows_of_many_lengths_are_compiled_a_few_times(monkeypatch):
    """Count Dynamo's compilations with an eager backend; a GPU's kernels would be compiled as often."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", torch._dynamo.config.recompile_limit)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    kernel = flex_attention._kernel.__wrapped__(True)
    assert torch._dynamo.config.recompile_limit > 8
    monkeypatch.setattr(flex_attention, "_kernel", lambda _: kernel)
    for count in (4, 3, 1, 2, 6, 5):
        length = count * BLOCK
        tokens = np.zeros(length // 2, np.int32)
        labels = (StateLabel(position=9, tokens=tokens[9:]), StateLabel(position=20, tokens=tokens[:7] + 1))
        params = tree_params(packed := pack([LabelledEpisode(tokens=tokens, labels=labels)], length).row(0), CPU)
        params.block_mask = block_mask(packed, CPU)
        inputs = [torch.randn(length, 1, heads, SIZE) for heads in (HEADS, GROUPS, GROUPS)]
        output, expected = (
            kind(SimpleNamespace(kv_channels=SIZE), 1, None, "self")(*inputs, packed_seq_params=params)
            for kind in (TreeFlexAttention, TreeAttention)
        )
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 3, "a row's length must not be compiled in"
