"""Writes the blocks of a plan into a vLLM model, parameter by parameter.

A plan describes vLLM's parameters as they are when a checkpoint is loaded. Layers that serve them unchanged are written
in place; on the CPU ``layers_stay_unpacked`` keeps linear layers that way. Layers that vLLM packs for the device (FP8,
experts) go through vLLM's layerwise reload, one at a time: new parameters are allocated, filled and packed, and replace
the old. So the extra memory is that of a layer, and a failure leaves every packed layer whole, either old or new.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from vllm.model_executor.layers import utils as vllm_layers
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import _layerwise_process, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_layer
from vllm.platforms import current_platform

from megatron_dagger.weights.blocks import Box
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.families.fp8 import vllm_table
from megatron_dagger.weights.transfer_plan import Copy
from megatron_dagger.weights.transports import TransferSpec, WeightTransport
from megatron_dagger.weights.verify.digest import Shares
from megatron_dagger.weights.verify.digest_pool import DigestPool

_linear = torch.nn.functional.linear

# Parameters of a model in FP8 until vLLM moves them to its KV cache (layers/quantization/kv_cache.py); not weights.
KV_CACHE_SCALES = (".attn.q_scale", ".attn.k_scale", ".attn.v_scale", ".attn.prob_scale")


class VllmTarget:
    """A worker's model as target rank ``rank`` of a plan. ``fresh``: vLLM has not packed its layers yet."""

    def __init__(self, model: torch.nn.Module, model_config: Any, rank: int, *, fresh: bool = False):
        self._model, self._model_config, self._rank, self._fresh = model, model_config, rank, fresh
        self.touched = False  # whether a weight has been changed

    def take(self, transport: WeightTransport, spec: TransferSpec) -> Shares:
        """Fill all parameters, and return this rank's shares of the digests of their new contents.

        Raises WeightSyncError. Parameters written by then stay changed, and ``touched`` is true.
        """
        table = vllm_table(spec.model, spec.quantization)
        self._check_parameters(table)
        self._check_layers()
        arrivals = transport.receive(spec.plan.by_target[self._rank])
        with DigestPool(spec.model) as digests:
            for module, names in itertools.groupby(table, key=lambda name: name.rpartition(".")[0]):
                with self._writable(self._model.get_submodule(module), digests) as tensors:
                    for name in names:
                        parameter, tensor = table[name], tensors[name.rpartition(".")[2]]
                        shard = spec.target.shard(self._rank, experts=parameter.experts > 0)
                        self._fill(name, tensor, parameter.shape(shard), parameter.padding(shard), arrivals)
                        digests.add(parameter.blocks(shard), tensor)
            surplus = next(arrivals, None)
            if surplus is not None:
                raise WeightSyncError(f"a block arrived for {surplus[0].target_parameter!r}, which is full")
            return digests.finish()

    def _fill(
        self,
        name: str,
        tensor: torch.Tensor,
        shape: tuple[int, ...],
        padding: Box | None,
        arrivals: Iterator[tuple[Copy, torch.Tensor]],
    ) -> None:
        """Write arriving blocks into a parameter until it is full. Padding is set to zero."""
        if tuple(tensor.shape) != shape:
            raise WeightSyncError(f"vLLM's {name!r} has shape {tuple(tensor.shape)}, but the plan expects {shape}")
        missing = math.prod(shape) - (padding.elements if padding else 0)
        while missing > 0:
            copy, block = next(arrivals)
            if copy.target_parameter != name:
                raise WeightSyncError(f"a block arrived for {copy.target_parameter!r} while {name!r} is incomplete")
            if block.dtype != tensor.dtype:
                raise WeightSyncError(f"vLLM's {name!r} is {tensor.dtype}, but {block.dtype} arrives for it")
            self.touched = True
            tensor[copy.target.slices].copy_(block)
            missing -= block.numel()
        if padding:
            tensor[padding.slices].zero_()

    def _check_parameters(self, table: Mapping[str, Any]) -> None:
        """Raise WeightSyncError unless the model has exactly the table's parameters. A tied output layer has none."""
        names = {name for name, _ in self._model.named_parameters() if not name.endswith(KV_CACHE_SCALES)}
        if names != table.keys():
            some = ", ".join(sorted(names ^ table.keys())[:5])
            raise WeightSyncError(f"vLLM's parameters are not those of the family's weight map: {some}")

    def _check_layers(self) -> None:
        """Raise WeightSyncError if vLLM has packed linear layers for the CPU: writing in place would have no effect."""
        for layer in self._model.modules():
            if _is_plain(layer) and getattr(layer, "cpu_linear", _linear) is not _linear:
                raise WeightSyncError(
                    "vLLM has packed its linear layers for the CPU: start it with load_format=megatron, which keeps "
                    "them unpacked"
                )

    @contextmanager
    def _writable(self, layer: torch.nn.Module, digests: DigestPool) -> Iterator[Mapping[str, torch.Tensor]]:
        """Context manager: yield the layer's own parameters, which the block fills. vLLM serves them afterwards."""
        if self._fresh or _is_served_unpacked(layer):
            yield {name: parameter.data for name, parameter in layer.named_parameters(recurse=False)}
            return
        initialize_layerwise_reload(layer)
        try:
            info = get_layerwise_info(layer)
            materialize_layer(layer, info)
            yield {name: parameter.data for name, parameter in layer.named_parameters(recurse=False)}
            digests.finish()  # before vLLM packs the parameters, which may change them in place
            with _new_expert_kernel(layer):
                _layerwise_process(layer, info)
        finally:
            finalize_layerwise_reload(layer, self._model_config)  # after a failure it restores the old parameters


@contextmanager
def layers_stay_unpacked() -> Iterator[None]:
    """Context manager: vLLM does not pack linear layers for the CPU inside the block, as it does not on GPUs.

    Packing took most of an update (2.2 of 3.9 s with 0.5B parameters). Unpacked layers decode 10% to 30% slower with
    0.1B parameters, most with 4 to 8 concurrent sequences; the quickstart's model shows no difference.
    """
    pack = vllm_layers.dispatch_cpu_unquantized_gemm

    def keep_unpacked(layer: torch.nn.Module, remove_weight: bool) -> None:
        if layer.weight.dim() == 2:
            layer.cpu_linear = _linear  # vLLM's own choice for layers that it cannot pack
        else:
            pack(layer, remove_weight)

    vllm_layers.dispatch_cpu_unquantized_gemm = keep_unpacked
    try:
        yield
    finally:
        vllm_layers.dispatch_cpu_unquantized_gemm = pack


@contextmanager
def _new_expert_kernel(layer: torch.nn.Module) -> Iterator[None]:
    """Context manager: vLLM creates a new kernel for experts inside the block, since on the CPU only that packs them.

    With the old kernel (vLLM 0.32) unpacked weights are read as packed ones: wrong outputs without an error.
    """
    method: Any = getattr(layer, "quant_method", None)
    kernel = getattr(method, "moe_kernel", None)
    if kernel is None or not current_platform.is_cpu():
        yield
        return
    method.moe_kernel = None
    try:
        yield
    finally:
        method.moe_kernel = method.moe_kernel or kernel


def _is_plain(layer: torch.nn.Module) -> bool:
    """Return whether the layer is an embedding or linear layer that is not quantised."""
    method = getattr(layer, "quant_method", None)
    return isinstance(method, (UnquantizedLinearMethod, UnquantizedEmbeddingMethod))


def _is_served_unpacked(layer: torch.nn.Module) -> bool:
    """Return whether vLLM serves the layer's parameters as they are when a checkpoint is loaded."""
    if not _is_plain(layer):
        return getattr(layer, "quant_method", None) is None
    is_lookup = isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)
    return is_lookup or bool(current_platform.is_cuda() or current_platform.is_cpu())
