"""Puts the blocks of a plan into a vLLM model, parameter by parameter.

A plan speaks of vLLM's parameters as they are when a checkpoint is loaded. Where a layer serves them
as they are, blocks are written in place; ``layers_stay_unpacked`` has the CPU's linear layers do so. Where it
has packed them for its device (FP8, experts), vLLM's layerwise reload takes the layer apart, one at a time:
fresh parameters, filled, packed, put into the place of the old. So what is needed beside the model is one
layer, and a failure on the way leaves every layer whole, be it the old or the new one.
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

# Of a model in FP8, until vLLM has taken them for its KV cache (layers/quantization/kv_cache.py): not weights.
KV_CACHE_SCALES = (".attn.q_scale", ".attn.k_scale", ".attn.v_scale", ".attn.prob_scale")


class VllmTarget:
    """A worker's model as target rank ``rank``. ``fresh``: its parameters have not been packed yet."""

    def __init__(self, model: torch.nn.Module, model_config: Any, rank: int, *, fresh: bool = False):
        self._model, self._model_config, self._rank, self._fresh = model, model_config, rank, fresh
        self.touched = False  # whether a weight has been changed

    def take(self, transport: WeightTransport, agreement: TransferSpec) -> Shares:
        """Fill all parameters, and return the digests of what then stands in them.

        Raises WeightSyncError; what was changed until then stays changed.
        """
        table = vllm_table(agreement.model, agreement.quantization)
        self._check_parameters(table)
        self._check_layers()
        arrivals = transport.receive(agreement.plan.by_target[self._rank])
        with DigestPool(agreement.model) as digests:
            for module, names in itertools.groupby(table, key=lambda name: name.rpartition(".")[0]):
                with self._opened(self._model.get_submodule(module), digests) as tensors:
                    for name in names:
                        parameter, tensor = table[name], tensors[name.rpartition(".")[2]]
                        shard = agreement.target.shard(self._rank, experts=parameter.experts > 0)
                        self._fill(name, tensor, parameter.shape(shard), parameter.padding(shard), arrivals)
                        digests.add(parameter.blocks(shard), tensor)
            for _ in arrivals:
                raise AssertionError("the plan brings more than the parameters hold")
            return digests.finish()

    def _fill(
        self,
        name: str,
        tensor: torch.Tensor,
        shape: tuple[int, ...],
        padding: Box | None,
        arrivals: Iterator[tuple[Copy, torch.Tensor]],
    ) -> None:
        """Put what arrives for a parameter where it belongs, until it is full."""
        if tuple(tensor.shape) != shape:
            raise WeightSyncError(f"vLLM's {name!r} has shape {tuple(tensor.shape)}, planned is {shape}")
        missing = math.prod(shape) - (padding.elements if padding else 0)
        while missing > 0:
            copy, block = next(arrivals)
            assert copy.target_parameter == name, "copies come in the order of the parameters"
            if block.dtype != tensor.dtype:
                raise WeightSyncError(f"vLLM's {name!r} is {tensor.dtype}, what comes for it is {block.dtype}")
            self.touched = True
            tensor[copy.target.slices].copy_(block)
            missing -= block.numel()
        if padding:
            tensor[padding.slices].zero_()

    def _check_parameters(self, table: Mapping[str, Any]) -> None:
        """A tied output layer is the embedding's parameter, and listed once."""
        theirs = {name for name, _ in self._model.named_parameters() if not name.endswith(KV_CACHE_SCALES)}
        if theirs != table.keys():
            some = ", ".join(sorted(theirs ^ table.keys())[:5])
            raise WeightSyncError(f"vLLM's parameters are not those of the family's map: {some}")

    def _check_layers(self) -> None:
        for layer in self._model.modules():
            if _is_plain(layer) and getattr(layer, "cpu_linear", _linear) is not _linear:
                raise WeightSyncError(
                    "vLLM has packed its linear layers for the CPU: start it with load_format=megatron, which leaves "
                    "them as they are"
                )

    @contextmanager
    def _opened(self, layer: torch.nn.Module, digests: DigestPool) -> Iterator[Mapping[str, torch.Tensor]]:
        """The layer's own parameters, to be written; with the end of the block they are served.

        Until their ``digests`` are there, nobody writes to them again.
        """
        if self._fresh or _serves_them_as_they_are(layer):
            yield {name: parameter.data for name, parameter in layer.named_parameters(recurse=False)}
            return
        initialize_layerwise_reload(layer)
        try:
            info = get_layerwise_info(layer)
            materialize_layer(layer, info)
            yield {name: parameter.data for name, parameter in layer.named_parameters(recurse=False)}
            digests.finish()  # vLLM may change them in place
            with _experts_are_packed_again(layer):
                _layerwise_process(layer, info)
        finally:
            finalize_layerwise_reload(layer, self._model_config)  # after a failure: the old ones come back


@contextmanager
def layers_stay_unpacked() -> Iterator[None]:
    """In the block, linear layers that vLLM would pack for the CPU stay as a checkpoint has them, as they do on GPUs.

    To pack them took most of an update (2.2 of 3.9 s, 0.5B parameters). Not to do so slows decoding by a tenth to
    three tenths with 0.1B parameters, most with 4 to 8 sequences at once; the quickstart's takes as long as before.
    """
    packs = vllm_layers.dispatch_cpu_unquantized_gemm

    def stays(layer: torch.nn.Module, remove_weight: bool) -> None:
        if layer.weight.dim() == 2:
            layer.cpu_linear = _linear  # what vLLM itself uses where it cannot pack
        else:
            packs(layer, remove_weight)

    vllm_layers.dispatch_cpu_unquantized_gemm = stays
    try:
        yield
    finally:
        vllm_layers.dispatch_cpu_unquantized_gemm = packs


@contextmanager
def _experts_are_packed_again(layer: torch.nn.Module) -> Iterator[None]:
    """On the CPU vLLM packs experts only when it makes their kernel, so let it make a new one.

    Else (seen in 0.32) new weights lie where packed ones are read, and the outputs are wrong without an error.
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
    """Whether it is an embedding or a linear layer that is not quantised."""
    method = getattr(layer, "quant_method", None)
    return isinstance(method, (UnquantizedLinearMethod, UnquantizedEmbeddingMethod))


def _serves_them_as_they_are(layer: torch.nn.Module) -> bool:
    if not _is_plain(layer):
        return getattr(layer, "quant_method", None) is None
    looked_up = isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)
    return looked_up or bool(current_platform.is_cuda() or current_platform.is_cpu())
