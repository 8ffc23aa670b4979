"""Opens an Offer, at the engine's end and at the trainer's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_dagger.weights.megatron_checkpoint import MegatronCheckpoint
from megatron_dagger.weights.transports import Agreement, WeightTransport
from megatron_dagger.weights.transports.buckets import BucketTransport, Sender, send
from megatron_dagger.weights.transports.checkpoint import CheckpointTransport
from megatron_dagger.weights.transports.host import HostReceiver, HostSender
from megatron_dagger.weights.transports.live import LiveReceiver, LiveSender


def open_transport(agreement: Agreement, target_rank: int, device: torch.device) -> WeightTransport:
    """A target rank's way to the weights. Raises WeightSyncError or CheckpointReadError; waits for the sources."""
    offer, dtype = agreement.offer, getattr(torch, agreement.dtype)
    if offer.kind == "checkpoint":
        checkpoint = MegatronCheckpoint(Path(offer.address))
        return CheckpointTransport(checkpoint, agreement.model, dtype, agreement.most_elements)
    most, plan_digest = agreement.most_elements, agreement.digest()
    if offer.kind == "host":
        sources = sorted({copy.source_rank for copy in agreement.plan.by_target[target_rank]})
        near = HostReceiver(
            offer.address,
            target_rank,
            sources,
            plan_digest=plan_digest,
            dtype=dtype,
            device=device,
            deadline_s=offer.deadline_s,
        )
        return BucketTransport(near, most)
    far = LiveReceiver(
        offer.address,
        target_rank,
        offer.source.world_size,
        agreement.target.world_size,
        plan_digest=plan_digest,
        dtype=dtype,
        most_elements=most,
        device=device,
        deadline_s=offer.deadline_s,
    )
    return BucketTransport(far, most)


def send_weights(
    agreement: Agreement, source_rank: int, tensors: Mapping[str, torch.Tensor], device: torch.device
) -> None:
    """Send what the target ranks want of this source rank's tensors (by global Megatron name), and see it taken.

    Called on every source rank. Raises WeightSyncError; then it may be called again with a new Offer.
    """
    with _sender(agreement, source_rank, device) as sender:
        send(agreement.plan, source_rank, tensors, sender, agreement.most_elements)


@contextmanager
def _sender(agreement: Agreement, source_rank: int, device: torch.device) -> Iterator[Sender]:
    offer, dtype, most = agreement.offer, getattr(torch, agreement.dtype), agreement.most_elements
    plan_digest = agreement.digest()
    if offer.kind == "host":
        copies = agreement.plan.by_source.get(source_rank, [])
        with HostSender(
            Path(offer.address),
            source_rank,
            sorted({copy.target_rank for copy in copies}),
            plan_digest=plan_digest,
            dtype=dtype,
            most_elements=most,
            device=device,
            deadline_s=offer.deadline_s,
        ) as near:
            near.accept()
            yield near
        return
    assert offer.kind == "live", "a checkpoint is sent by nobody"
    with LiveSender(
        offer.address,
        source_rank,
        offer.source.world_size,
        agreement.target.world_size,
        plan_digest=plan_digest,
        dtype=dtype,
        most_elements=most,
        device=device,
        deadline_s=offer.deadline_s,
    ) as far:
        yield far
