"""vLLM's side of the bridge: a weight-transfer engine that reads Megatron checkpoints.

vLLM finds it through the ``vllm.general_plugins`` entry point, in every process that it starts. The
lifecycle is vLLM's own: ``init_weight_transfer_engine`` with the model's settings, then per update
``start_weight_update``, ``update_weights`` with the checkpoint's directory and the digests that the
trainer computed, ``finish_weight_update``. Each worker reads the checkpoint itself.

Invariants: everything that can be checked without reading weights is checked before the first
weight is touched, so that such a failure leaves the old weights serving. A tensor is given to the
model only after its digest was found right. Errors are not raised through vLLM's RPC, which with
several workers would answer the next call with a stale reply: they are kept in ``TransferState``,
which the caller asks for after every update.

This module and ``policies/vllm_engine.py`` are the only ones that touch vLLM.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_dagger.config import ModelConfig, build
from megatron_dagger.weights.digest import tensor_digest
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.families import lookup
from megatron_dagger.weights.megatron_checkpoint import MegatronCheckpoint

logger = logging.getLogger(__name__)

BACKEND = "megatron_checkpoint"
WORKER_EXTENSION = "megatron_dagger.weights.vllm_transfer.WorkerExtension"


def register() -> None:
    """Make the engine known to vLLM in this process; may be called any number of times."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, MegatronCheckpointEngine)


@dataclass
class InitInfo(WeightTransferInitInfo):
    """``model``: the ModelConfig as a dict."""

    model: dict[str, Any]


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """``directory``: the checkpoint; ``digests``: what the trainer had, by canonical name."""

    directory: str
    digests: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class TransferState:
    """What the last update left on this worker.

    ``received``: the digest of every tensor that was given to the model. ``error``: why the update
    failed, or None. ``touched``: whether it had begun to change the model's weights.
    """

    received: dict[str, str]
    error: str | None
    touched: bool


class MegatronCheckpointEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads a Megatron checkpoint into a vLLM worker's model, in place."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False
    transfer_state = TransferState(received={}, error="no update has come yet", touched=False)
    _taken_apart = False  # between layerwise reload's two ends

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.architecture = build(ModelConfig, init_info.model)

    def start_weight_update(self) -> None:
        """Nothing yet: the model is taken apart only after the checkpoint was found readable."""

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Check, read and load the checkpoint; the outcome is in ``transfer_state``."""
        received: dict[str, str] = {}
        error = None
        try:
            checkpoint = MegatronCheckpoint(Path(update_info.directory))
            checkpoint.sources(self.architecture)
            lookup(self.architecture).check_complete(update_info.digests, self.architecture)
            self._load(checkpoint, update_info.digests, received)
        except Exception as failure:
            error = str(failure) or type(failure).__name__
            logger.error("weights were not taken over from %s: %s", update_info.directory, error)
        self.transfer_state = TransferState(received=received, error=error, touched=self._taken_apart)

    def finish_weight_update(self) -> None:
        """Put the model together again, also after a failure: the next update can start from there."""
        if not self._taken_apart:
            return
        finalize_layerwise_reload(self.model, self.model_config)
        self._taken_apart = False
        for module in self.model.modules():
            # On the CPU vLLM packs a copy of the output layer. With tied embeddings nothing was loaded
            # into that layer itself, so vLLM does not pack it again: without this the logits are stale.
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        """Nothing is held between updates."""

    def _load(self, checkpoint: MegatronCheckpoint, expected: dict[str, str], received: dict[str, str]) -> None:
        # A tied output layer is the embedding's parameter, and listed once; during the update it is not.
        parameters = [name for name, _ in self.model.named_parameters()]
        self._taken_apart = True
        initialize_layerwise_reload(self.model)
        loaded = self.model.load_weights(self._verified(checkpoint, expected, received))
        left = [name for name in parameters if name not in loaded]
        if left:
            raise WeightSyncError(f"vLLM left parameters without new weights: {', '.join(left[:5])}")

    def _verified(
        self, checkpoint: MegatronCheckpoint, expected: dict[str, str], received: dict[str, str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in checkpoint.canonical_tensors(self.architecture):
            received[name] = tensor_digest(tensor)
            if received[name] != expected[name]:
                raise WeightSyncError(
                    f"tensor {name!r} ({tensor.dtype} {tuple(tensor.shape)}) in {checkpoint.directory} is "
                    f"not the trainer's: sent {expected[name][:12]}, received {received[name][:12]}"
                )
            yield name, tensor


class WorkerExtension:
    """Mixed into vLLM's workers: what ``collective_rpc`` can ask for by name."""

    weight_transfer_engine: MegatronCheckpointEngine

    def transfer_state(self) -> TransferState:
        return self.weight_transfer_engine.transfer_state


# A worker imports this module for its extension: so the engine is known also where the package is only
# on the path, and no entry point is installed.
register()
