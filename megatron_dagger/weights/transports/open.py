"""Opens a WeightSource, on the engine's side and on the trainer's."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from megatron_dagger.weights.transports import TRANSPORTS, TransferSpec, WeightTransport
from megatron_dagger.weights.transports.buckets import send
from megatron_dagger.weights.transports.pack import Packer


def transport_module(kind: str) -> Any:
    """Import the module of a transport."""
    return import_module(TRANSPORTS[kind].module)


def open_transport(spec: TransferSpec, target_rank: int, device: torch.device) -> WeightTransport:
    """Connect a target rank to the source, waiting for the source's ranks.

    Raises WeightSyncError or CheckpointReadError.
    """
    transport: WeightTransport = transport_module(spec.source.kind).open_transport(spec, target_rank, device)
    return transport


def send_weights(
    spec: TransferSpec, source_rank: int, tensors: Mapping[str, torch.Tensor], device: torch.device
) -> None:
    """Send this source rank's part of the plan, and return when it has arrived. Called on every source rank.

    ``tensors`` are the rank's own by global Megatron name; if the engine quantises, with the tensors of scales
    (``BlockScales``). Raises WeightSyncError; a new source can then be served.
    """
    assert spec.source.from_trainer, f"no trainer sends a source of kind {spec.source.kind}"
    with transport_module(spec.source.kind).open_sender(spec, source_rank, device) as sender:
        send(spec.plan, source_rank, Packer(spec, tensors), sender, spec.bucket_spec)
