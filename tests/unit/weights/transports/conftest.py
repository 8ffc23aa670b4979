"""Buckets of 400 bytes: a transfer takes many buckets, most tensors are split, and many share a bucket."""

import pytest

from megatron_dagger.weights.transports import WeightSource


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(WeightSource, "bucket_bytes", 400)
