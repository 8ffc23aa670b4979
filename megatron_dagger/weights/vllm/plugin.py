"""vLLM plugin: a weight-transfer engine and a model loader, registered with vLLM by name.

- The transfer engine follows vLLM's own lifecycle: ``init_weight_transfer_engine`` with the model's settings, then for
  each update ``start_weight_update``, ``update_weights`` with a WeightSource, and ``finish_weight_update``. Each worker
  fetches its own shards. Errors are not raised through vLLM's RPC: with several workers, the next call would then
  return a stale reply. They are kept in the TransferState, with the digests of the worker's parameters, which the
  caller requests after each update.
- The loader (``load_format="megatron"``) starts a worker from a Megatron checkpoint, or with dummy weights. It keeps
  linear layers unpacked on the CPU too, so that updates write in place.

vLLM finds both through the ``vllm.general_plugins`` entry point in every process that it starts. Only this module,
``target.py`` and ``policies/vllm/`` touch vLLM.
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
from megatron_dagger.weights.transports import TransferSpec, WeightSource, checkpoint_source
from megatron_dagger.weights.transports.open import open_transport
from megatron_dagger.weights.verify.digest import Shares
from megatron_dagger.weights.vllm.target import VllmTarget, layers_stay_unpacked

logger = logging.getLogger(__name__)

BACKEND = "megatron_dagger"
LOAD_FORMAT = "megatron"
WORKER_EXTENSION = "megatron_dagger.weights.vllm.plugin.WorkerExtension"
_STATE = "megatron_dagger_transfer_state"  # attribute of a model


def register() -> None:
    """Register the transfer engine and the loader with vLLM in this process. Repeated calls have no effect."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, MegatronTransferEngine)
    if LOAD_FORMAT not in _LOAD_FORMAT_TO_MODEL_LOADER:
        register_model_loader(LOAD_FORMAT)(MegatronLoader)


@dataclass
class InitInfo(WeightTransferInitInfo):
    """``model``: the ModelConfig as a dict. This is engine ``replica`` of ``replicas`` that get the same weights."""

    model: dict[str, Any]
    replica: int = 0
    replicas: int = 1


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """``source``: the WeightSource as a dict."""

    source: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TransferState:
    """The result of the last update, or of loading, on a worker.

    It is an attribute of the worker's model: the loader, which runs before the transfer engine exists, has nothing else
    in common with it.

    ``shares``: the worker's shares of the digests. ``error``: why the update failed, or None. ``touched``: whether the
    model's weights had begun to change.
    """

    shares: Shares
    error: str | None
    touched: bool

    @classmethod
    def of(cls, model: torch.nn.Module) -> TransferState:
        """Return the state of a model."""
        state: TransferState = getattr(model, _STATE, _NO_UPDATE)
        return state

    def attach(self, model: torch.nn.Module) -> None:
        """Make this the state of a model."""
        setattr(model, _STATE, self)


_NO_UPDATE = TransferState(shares={}, error="no weights have been loaded yet", touched=False)


class MegatronTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Replaces the weights of a vLLM worker's model in place."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self._architecture = build(ModelConfig, init_info.model)
        self._layout = _target_layout(self.parallel_config, init_info.replicas)
        self._rank = init_info.replica * self._layout.engine_size + _rank_in_engine(self.parallel_config)

    def start_weight_update(self) -> None:
        """Do nothing: ``receive_weights`` checks everything it can before it changes a weight."""

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Replace the weights. The model's TransferState has the result."""
        target = VllmTarget(self.model, self.model_config, self._rank)
        shares: Shares = {}
        error = None
        try:
            source = build(WeightSource, update_info.source)
            spec = _transfer_spec(self._architecture, self._layout, self.model_config, source)
            with torch.no_grad(), open_transport(spec, self._rank, self.device) as transport:
                shares = target.take(transport, spec)
        except Exception as failure:
            error = str(failure) or type(failure).__name__
            logger.error("the weights could not be updated: %s", error)
        TransferState(shares=shares, error=error, touched=target.touched).attach(self.model)

    def finish_weight_update(self) -> None:
        """Do nothing: the weights are complete when ``receive_weights`` returns."""

    def shutdown(self) -> None:
        """Do nothing: no resource outlives an update."""


class MegatronLoader(BaseModelLoader):
    """Loads a model's weights from a WeightSource.

    ``model_loader_extra_config`` is ``{"checkpoint": DIRECTORY}`` for a Megatron checkpoint with its model's settings
    beside it, ``{"checkpoint": None}`` for dummy weights, or ``{"source": ..., "model": ...}`` with a WeightSource and
    a ModelConfig as dicts.
    """

    def load_model(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        with layers_stay_unpacked():
            return super().load_model(*args, **kwargs)

    def download_model(self, model_config: Any) -> None:
        """Do nothing: the weights are read from where they are."""

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        source_and_model = _source_and_model(self.load_config.model_loader_extra_config)
        if source_and_model is None:
            DummyModelLoader(LoadConfig(load_format="dummy")).load_weights(model, model_config)
            return
        source, architecture = source_and_model
        parallel = get_current_vllm_config().parallel_config
        rank = _rank_in_engine(parallel)
        spec = _transfer_spec(architecture, _target_layout(parallel, 1), model_config, source)
        target = VllmTarget(model, model_config, rank, fresh=True)
        device = next(model.parameters()).device
        with torch.no_grad(), open_transport(spec, rank, device) as transport:
            shares = target.take(transport, spec)
        TransferState(shares=shares, error=None, touched=True).attach(model)


class WorkerExtension:
    """Methods added to vLLM's workers, for ``collective_rpc`` by name."""

    weight_transfer_engine: MegatronTransferEngine

    def transfer_state(self) -> TransferState:
        """Return the result of the last update, or of loading."""
        return TransferState.of(self.weight_transfer_engine.model)


def _source_and_model(extra: Any) -> tuple[WeightSource, ModelConfig] | None:
    """Return the contents of a loader's extra config, None for dummy weights.

    Raises ConfigError or CheckpointReadError.
    """
    match extra:
        case {"checkpoint": None}:
            return None
        case {"source": source, "model": model}:
            return build(WeightSource, source), build(ModelConfig, model)
        case {"checkpoint": str(directory)}:
            architecture = model_of(Path(directory))
            return checkpoint_source(Path(directory), architecture), architecture
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


def _transfer_spec(
    architecture: ModelConfig, layout: TargetLayout, model_config: Any, source: WeightSource
) -> TransferSpec:
    """Return the spec of a transfer to this engine, with its dtype and quantization."""
    return TransferSpec(
        model=architecture,
        target=layout,
        dtype=str(model_config.dtype).removeprefix("torch."),
        source=source,
        quantization=_quantization(model_config),
    )


def _quantization(model_config: Any) -> Quantization:
    method = model_config.quantization
    if method not in (None, "fp8"):
        raise WeightSyncError(f"vLLM's quantization={method!r} is not supported; start it with fp8 or without")
    return "none" if method is None else "fp8"


def _rank_in_engine(parallel: ParallelConfig) -> int:
    return int(parallel.data_parallel_rank * parallel.tensor_parallel_size + get_tensor_model_parallel_rank())


# Workers import this module for WORKER_EXTENSION, so the engine and the loader are registered even if the package is
# only on the path, without an installed entry point.
register()
