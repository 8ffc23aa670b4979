"""A digest covers dtype, shape and values, and is the same for torch and numpy."""

import hashlib

import numpy as np
import pytest
import torch

from megatron_dagger.weights.digest import compare, digests, tensor_digest


def test_the_definition():
    tensor = torch.tensor([[1.0, 2.0]])
    expected = hashlib.sha256(b"float32 (1, 2)\n" + np.array([1, 2], "<f4").tobytes()).hexdigest()
    assert tensor_digest(tensor) == expected
    assert tensor_digest(tensor.numpy()) == expected
    assert tensor_digest(tensor.numpy().astype(">f4").astype("<f4")) == expected


def test_what_a_tensor_lies_in_does_not_matter():
    tensor = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    assert tensor_digest(tensor.t().contiguous().t()) == tensor_digest(tensor)
    assert tensor_digest(torch.nn.Parameter(tensor)) == tensor_digest(tensor)
    assert tensor_digest(torch.cat([tensor, tensor])[:3]) == tensor_digest(tensor)


def test_dtype_shape_and_every_value_matter():
    tensor = torch.arange(12, dtype=torch.float32)
    others = [tensor.reshape(3, 4), tensor.to(torch.bfloat16), tensor.to(torch.int32), tensor.clone()]
    others[-1][7] += 1e-6
    others += [torch.zeros(0), torch.tensor(0.0)]
    assert len({tensor_digest(other) for other in [tensor, *others]}) == 7


def test_the_difference_is_named():
    sent = digests([("a", torch.zeros(1)), ("b", torch.ones(1))])
    assert compare(sent, dict(sent)) is None
    assert "'b' differs" in (compare(sent, {**sent, "b": sent["a"]}) or "")
    assert "'b' was not received" in (compare(sent, {"a": sent["a"]}) or "")
    assert "'c' was received" in (compare(sent, {**sent, "c": sent["a"]}) or "")
    with pytest.raises(ValueError, match="'a' comes twice"):
        digests([("a", torch.zeros(1)), ("a", torch.zeros(1))])
