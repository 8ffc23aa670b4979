"""Opens an WeightSource, at the engine's end and at the trainer's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_dagger.weights.torch_dist.reader import MegatronCheckpoint
from megatron_dagger.weights.transports import TransferSpec, WeightTransport
from megatron_dagger.weights.transports.buckets import BucketTransport, send
from megatron_dagger.weights.transports.checkpoint import CheckpointTransport
from megatron_dagger.weights.transports.p2p import LiveReceiver, LiveSender
from megatron_dagger.weights.transports.pack import Packer
from megatron_dagger.weights.transports.shared_memory import HostReceiver, HostSender


def open_transport(agreement: TransferSpec, target_rank: int, device: torch.device) -> WeightTransport:
    """A target rank's way to the weights. Raises WeightSyncError or CheckpointReadError; waits for the sources."""
    offer = agreement.offer
    if offer.kind == "checkpoint":
        checkpoint = MegatronCheckpoint(Path(offer.address))
        return CheckpointTransport(checkpoint, agreement, target_rank)
    receiver = HostReceiver if offer.kind == "host" else LiveReceiver
    return BucketTransport(receiver(agreement, target_rank, device), agreement.wire)


def send_weights(
    agreement: TransferSpec, source_rank: int, tensors: Mapping[str, torch.Tensor], device: torch.device
) -> None:
    """Send what the target ranks want of this source rank's tensors (by global Megatron name), and see it taken.

    Called on every source rank; where the engine quantises, with the tables of scales (``BlockScales``) among
    the tensors. Raises WeightSyncError; then it may be called again with a new WeightSource.
    """
    assert agreement.offer.kind != "checkpoint", "a checkpoint is sent by nobody"
    sender = HostSender if agreement.offer.kind == "host" else LiveSender
    with sender(agreement, source_rank, device) as opened:
        send(agreement.plan, source_rank, Packer(agreement, tensors), opened, agreement.wire)
