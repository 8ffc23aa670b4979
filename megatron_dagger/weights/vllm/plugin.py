"""vLLM's side of the bridge: the weight-transfer engine and the model loader that vLLM knows by name.

vLLM finds both through the ``vllm.general_plugins`` entry point, in every process that it starts.

- Transfer engine: the lifecycle is vLLM's own. ``init_weight_transfer_engine`` with the model's settings,
  then per update ``start_weight_update``, ``update_weights`` with an WeightSource, ``finish_weight_update``. Each
  worker takes what it needs by itself. Errors are not raised through vLLM's RPC, which with several workers
  would answer the next call with a stale reply: they are kept in ``TransferState``, which the caller asks
  for after every update, with the digests of what the worker's parameters then hold.
- Loader: ``load_format="megatron"`` starts a worker from a Megatron checkpoint, or without weights, for an update
  to bring them. It leaves the layers such that updates can write in place, also on the CPU.

This module, ``vllm_target.py``, ``policies/vllm_engine.py`` and ``vllm_imports.py`` are the only ones that touch vLLM.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.config import LoadConfig, ParallelConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from megatron_dagger.config import ConfigError, ModelConfig, build
from megatron_dagger.weights.checkpoints import model_of
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.families.fp8 import Quantization
from megatron_dagger.weights.layouts import TargetLayout
from megatron_dagger.weights.transports import TransferSpec, WeightSource, checkpoint_offer
from megatron_dagger.weights.transports.open import open_transport
from megatron_dagger.weights.verify.digest import Shares
from megatron_dagger.weights.vllm.target import VllmTarget, layers_stay_unpacked

logger = logging.getLogger(__name__)

BACKEND = "megatron_dagger"
LOAD_FORMAT = "megatron"
WORKER_EXTENSION = "megatron_dagger.weights.vllm.plugin.WorkerExtension"


def register() -> None:
    """Make engine and loader known to vLLM in this process; may be called any number of times."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, BridgeEngine)
    if LOAD_FORMAT not in _LOAD_FORMAT_TO_MODEL_LOADER:
        register_model_loader(LOAD_FORMAT)(MegatronLoader)


@dataclass
class InitInfo(WeightTransferInitInfo):
    """``model``: the ModelConfig as a dict; which of how many engines this is that take the same weights."""

    model: dict[str, Any]
    replica: int = 0
    replicas: int = 1


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """``offer``: the WeightSource as a dict."""

    offer: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TransferState:
    """What the last update left on this worker.

    ``shares``: the digests of all its parameters. ``error``: why the update failed, or None.
    ``touched``: whether it had begun to change the model's weights.
    """

    shares: Shares
    error: str | None
    touched: bool


class BridgeEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Takes offered weights into a vLLM worker's model, in place."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False
    transfer_state = TransferState(shares={}, error="no update has come yet", touched=False)

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self._architecture = build(ModelConfig, init_info.model)
        self._layout = _target_layout(self.parallel_config, init_info.replicas)
        self._rank = init_info.replica * self._layout.engine_size + _rank_in_engine(self.parallel_config)

    def start_weight_update(self) -> None:
        """Nothing yet: what can be found wrong is found before a weight is touched."""

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Take the weights; the outcome is in ``transfer_state``."""
        target = VllmTarget(self.model, self.model_config, self._rank)
        shares: Shares = {}
        error = None
        try:
            offer = build(WeightSource, update_info.offer)
            agreement = _agreement(self._architecture, self._layout, self.model_config, offer)
            with torch.no_grad(), open_transport(agreement, self._rank, self.device) as transport:
                shares = target.take(transport, agreement)
        except Exception as failure:
            error = str(failure) or type(failure).__name__
            logger.error("weights were not taken over: %s", error)
        self.transfer_state = TransferState(shares=shares, error=error, touched=target.touched)

    def finish_weight_update(self) -> None:
        """Nothing is left to do."""

    def shutdown(self) -> None:
        """Nothing is held between updates."""


class MegatronLoader(BaseModelLoader):
    """Starts a model from a Megatron checkpoint.

    ``model_loader_extra_config``: ``checkpoint``, the directory of one that says what model it is of, or None for
    dummy weights; or ``offer`` and ``model`` as dicts.
    """

    def load_model(self, *given: Any, **named: Any) -> torch.nn.Module:
        with layers_stay_unpacked():
            return super().load_model(*given, **named)

    def download_model(self, model_config: Any) -> None:
        """The checkpoint is there."""

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        source = _source(self.load_config.model_loader_extra_config)
        if source is None:
            DummyModelLoader(LoadConfig(load_format="dummy")).load_weights(model, model_config)
            return
        offer, architecture = source
        parallel = get_current_vllm_config().parallel_config
        rank = _rank_in_engine(parallel)
        agreement = _agreement(architecture, _target_layout(parallel, 1), model_config, offer)
        target = VllmTarget(model, model_config, rank, fresh=True)
        device = next(model.parameters()).device
        with torch.no_grad(), open_transport(agreement, rank, device) as transport:
            shares = target.take(transport, agreement)
        # The worker's transfer engine does not exist yet: it will hand these out.
        BridgeEngine.transfer_state = TransferState(shares=shares, error=None, touched=True)


class WorkerExtension:
    """Mixed into vLLM's workers: what ``collective_rpc`` can ask for by name."""

    weight_transfer_engine: BridgeEngine

    def transfer_state(self) -> TransferState:
        return self.weight_transfer_engine.transfer_state


def _source(extra: Any) -> tuple[WeightSource, ModelConfig] | None:
    """What a loader's extra config says; None for dummy weights. Raises ConfigError or CheckpointReadError."""
    match extra:
        case {"checkpoint": None}:
            return None
        case {"offer": offer, "model": model}:
            return build(WeightSource, offer), build(ModelConfig, model)
        case {"checkpoint": str(directory)}:
            own = model_of(Path(directory))
            return checkpoint_offer(Path(directory), own), own
    raise ConfigError(
        f'load_format={LOAD_FORMAT} needs model_loader_extra_config={{"checkpoint": DIRECTORY}}, got {extra!r}'
    )


def _target_layout(parallel: ParallelConfig, replicas: int) -> TargetLayout:
    return TargetLayout(
        tensor_parallel_size=parallel.tensor_parallel_size,
        data_parallel_size=parallel.data_parallel_size,
        enable_expert_parallel=parallel.enable_expert_parallel,
        replicas=replicas,
    )


def _agreement(architecture: ModelConfig, layout: TargetLayout, model_config: Any, offer: WeightSource) -> TransferSpec:
    """With what this engine holds its weights in."""
    return TransferSpec(
        model=architecture,
        target=layout,
        dtype=str(model_config.dtype).removeprefix("torch."),
        offer=offer,
        quantization=_quantization(model_config),
    )


def _quantization(model_config: Any) -> Quantization:
    method = model_config.quantization
    if method not in (None, "fp8"):
        raise WeightSyncError(f"vLLM was started with quantization={method!r}; the bridge brings none or fp8")
    return "none" if method is None else "fp8"


def _rank_in_engine(parallel: ParallelConfig) -> int:
    return int(parallel.data_parallel_rank * parallel.tensor_parallel_size + get_tensor_model_parallel_rank())


# A worker imports this module for its extension: so both are known also where the package is only on the
# path, and no entry point is installed.
register()
