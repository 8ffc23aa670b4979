"""The trainer's end of a transfer of weights to rollout engines."""

from __future__ import annotations

import torch
import torch.distributed

from megatron_dagger.training import param_names
from megatron_dagger.training.digests import block_scales
from megatron_dagger.training.engine import MegatronEngine
from megatron_dagger.training.model import bare
from megatron_dagger.weights.families.fp8 import Quantization
from megatron_dagger.weights.layouts import TargetLayout
from megatron_dagger.weights.transports import TransferSpec, WeightSource
from megatron_dagger.weights.transports.open import send_weights


def own_tensors(engine: MegatronEngine) -> dict[str, torch.Tensor]:
    """Return this rank's parameters by their names in a TransferPlan, a tied output layer's copy included."""
    return {
        name: param_names.values(parameter)
        for chunk in engine.chunks
        for name, parameter in param_names.global_parameters(bare(chunk), number_experts=False)
    }


def send_to_engine(
    engine: MegatronEngine, source: WeightSource, target: TargetLayout, dtype: str, quantization: Quantization = "none"
) -> None:
    """Send the weights to the rollout engines that opened ``source``. Called on all ranks together.

    ``dtype`` (torch's name) and ``quantization`` say how the engines hold the weights. Raises WeightSyncError, at the
    latest after the source's deadline.
    """
    spec = TransferSpec(model=engine.model_config, target=target, dtype=dtype, source=source, quantization=quantization)
    with torch.no_grad():
        tensors = own_tensors(engine)
        if quantization == "fp8":
            tensors |= block_scales(engine.chunks, engine.model_config, engine.device).tensors()
        send_weights(spec, torch.distributed.get_rank(), tensors, engine.device)
