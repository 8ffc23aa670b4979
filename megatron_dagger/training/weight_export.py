"""The trainer's end of a live transfer."""

from __future__ import annotations

import torch
import torch.distributed

from megatron_dagger.training import param_names as layout
from megatron_dagger.training.digests import block_scales
from megatron_dagger.training.engine import MegatronEngine
from megatron_dagger.training.model import bare
from megatron_dagger.weights.families.fp8 import Quantization
from megatron_dagger.weights.layouts import TargetLayout
from megatron_dagger.weights.transports import TransferSpec, WeightSource
from megatron_dagger.weights.transports.open import send_weights


def own_tensors(engine: MegatronEngine) -> dict[str, torch.Tensor]:
    """This rank's parameters by the names that the plan has for them, a tied output layer's copy included."""
    return {
        name: layout.values(parameter)
        for chunk in engine.chunks
        for name, parameter in layout.global_parameters(bare(chunk), number_experts=False)
    }


def send_to_engine(
    engine: MegatronEngine, offer: WeightSource, target: TargetLayout, dtype: str, quantization: Quantization = "none"
) -> None:
    """Send the weights to engines that were told of ``offer``; called on every rank.

    ``dtype``, by torch's name, and ``quantization``: what the engines hold. Raises WeightSyncError, within
    the offer's deadline.
    """
    agreement = TransferSpec(
        model=engine.model_config, target=target, dtype=dtype, offer=offer, quantization=quantization
    )
    with torch.no_grad():
        tensors = own_tensors(engine)
        if quantization == "fp8":
            tensors |= block_scales(engine.chunks, engine.model_config, engine.device).tensors()
        send_weights(agreement, torch.distributed.get_rank(), tensors, engine.device)
