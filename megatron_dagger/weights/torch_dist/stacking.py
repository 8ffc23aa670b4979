"""The stacking of tensors in Megatron's checkpoints: an entry contains all layers, or all experts of all layers.

The first dimension of ``decoder.layers.mlp.linear_fc2.weight`` is the layer; the first two of
``decoder.layers.mlp.experts.experts.linear_fc2.weight`` are layer and expert, whatever module computed the experts
(``megatron/core/transformer/moe/experts.py``, the same in 0.16 and 0.19). Entries with a layer number in their name are
not stacked.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from megatron_dagger.weights.blocks import Index

_LAYERS = "decoder.layers."
_EXPERTS = "mlp.experts.experts."
_EXPERT = re.compile(r"(mlp\.experts\.)(linear_fc[12]\.weight)(\d+)")


def unstack(stored: str, shape: Index) -> Iterator[tuple[str, Index]]:
    """Yield the global Megatron names in a stored entry, each with its index in the leading dimensions."""
    rest = stored.removeprefix(_LAYERS)
    if rest == stored or rest.partition(".")[0].isdigit():
        yield stored, ()
    elif rest.startswith(_EXPERTS):
        for layer, expert in itertools.product(range(shape[0]), range(shape[1])):
            yield f"{_LAYERS}{layer}.mlp.experts.{rest.removeprefix(_EXPERTS)}{expert}", (layer, expert)
    else:
        for layer in range(shape[0]):
            yield f"{_LAYERS}{layer}.{rest}", (layer,)


def stacked(name: str) -> tuple[str, Index]:
    """Return the stored entry of a global Megatron name, and its index in the leading dimensions."""
    rest = name.removeprefix(_LAYERS)
    if rest == name:
        return name, ()
    layer, _, rest = rest.partition(".")
    expert = _EXPERT.fullmatch(rest)
    if expert:
        return f"{_LAYERS}{_EXPERTS}{expert[2]}", (int(layer), int(expert[3]))
    return f"{_LAYERS}{rest}", (int(layer),)
