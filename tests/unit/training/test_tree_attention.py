"""Attention over trees, against a plain computation over the whole row in float64."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_dagger.training.data.packing import pack
from megatron_dagger.training.tree_attention import TreeAttention, tree_params
from megatron_dagger.types import LabelledEpisode, StateLabel

HEADS, GROUPS, SIZE = 4, 2, 8


def row(seed, length=96):
    """Return a packed row of a few episodes with branches of many lengths, and padding."""
    rng = np.random.default_rng(seed)
    episodes = []
    for _ in range(4):
        tokens = rng.integers(0, 9, rng.integers(8, 22)).astype(np.int32)
        positions = np.sort(rng.choice(np.arange(1, len(tokens)), rng.integers(1, 4), replace=False))
        labels = [
            StateLabel(position=int(p), tokens=rng.integers(10, 19, rng.integers(1, 6)).astype(np.int32))
            for p in positions
        ]
        episodes.append(LabelledEpisode(tokens=tokens, labels=(*labels, StateLabel(position=4, tokens=tokens[4:6]))))
    return pack(episodes, length).row(0)


def naive_attention(packed, query, key, value):
    """Return attention computed query by query: the softmax over the keys that the query attends to."""
    out = torch.zeros_like(query)
    starts = np.repeat(packed.trees[:-1], np.diff(packed.trees))
    for i in range(query.size(0)):
        seen = [*range(starts[i], packed.prefix_stops[i]), *range(packed.run_starts[i], i + 1)]
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            scores = key[seen, 0, group] @ query[i, 0, head] / math.sqrt(SIZE)
            out[i, 0, head] = scores.softmax(0) @ value[seen, 0, group]
    return out.reshape(query.size(0), 1, -1)


@pytest.mark.parametrize("seed", range(4))
def test_output_and_gradients_equal_those_of_the_plain_computation(seed):
    packed = row(seed)
    assert packed.prefix_stops.any(), "there are branches"
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(96, 1, n, SIZE, generator=generator, dtype=torch.float64) for n in (HEADS, GROUPS, GROUPS)]
    attention = TreeAttention(SimpleNamespace(kv_channels=SIZE), 1, None, "self")
    inputs_of_trees = [x.clone().requires_grad_() for x in inputs]
    inputs_of_plain = [x.clone().requires_grad_() for x in inputs]
    a = attention(*inputs_of_trees, packed_seq_params=tree_params(packed, torch.device("cpu")))
    b = naive_attention(packed, *inputs_of_plain)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    weights = torch.randn(a.shape, generator=generator, dtype=torch.float64)
    for result in (a, b):
        (result * weights).sum().backward()
    for x, y in zip(inputs_of_trees, inputs_of_plain, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("seen", "own"), [(0, 1), (0, 3), (5, 1), (4, 3)])
def test_a_branch_attends_to_its_prefix_and_causally_to_itself(seen, own):
    params = tree_params(row(0), torch.device("cpu"))
    mask = params.mask(seen, own, torch.float32)
    in_order = [*range(own, own + seen), *reversed(range(own))]  # the branch's own keys come first, reversed
    visible = np.tril(np.ones((own, own + seen)), seen).astype(bool)
    assert np.array_equal(mask[:, in_order].numpy(), np.where(visible, 0, -np.inf))


def test_a_label_on_the_first_token_is_a_branch_without_a_prefix():
    tokens = np.arange(9, dtype=np.int32)
    labels = tuple(StateLabel(position=p, tokens=np.array([30, 31], np.int32)) for p in (1, 6))
    packed = pack([LabelledEpisode(tokens=tokens, labels=labels)], 12).row(0)
    tree, _ = tree_params(packed, torch.device("cpu")).trees
    assert (tree.trunk, tree.branches) == (5, ((0, 2), (5, 2)))


def test_positions_continue_from_the_prefix():
    tokens = np.arange(20, dtype=np.int32)
    label = StateLabel(position=12, tokens=np.array([30, 31, 32], np.int32))
    packed = pack([LabelledEpisode(tokens=tokens, labels=(label,))], 32).row(0)
    assert list(packed.position_ids[:14]) == [*range(11), 11, 12, 13]
    assert list(packed.tokens[10:14]) == [10, 11, 30, 31]
    assert list(packed.targets[11:14]) == [30, 31, 32]
