"""Puts the blocks of a plan into a vLLM model, parameter by parameter.

A plan speaks of vLLM's parameters as they are when a checkpoint is loaded. Where a layer serves them
as they are, blocks are written in place. Where it has packed them for its device (on the CPU all linear
layers), vLLM's layerwise reload takes the layer apart, one at a time: fresh parameters, filled, packed,
put into the place of the old. So what is needed beside the model is one layer, whose memory the next one
uses again, and a failure on the way leaves every layer whole, be it the old or the new one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
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

from megatron_dagger.config import ModelConfig
from megatron_dagger.weights.blocks import Block, Box
from megatron_dagger.weights.digest import Shares, digest_shares
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.families.fp8 import vllm_table
from megatron_dagger.weights.plan import Copy
from megatron_dagger.weights.transports import Agreement, WeightTransport

# Of a model in FP8, until vLLM has taken them for its KV cache (layers/quantization/kv_cache.py): not weights.
KV_CACHE_SCALES = (".attn.q_scale", ".attn.k_scale", ".attn.v_scale", ".attn.prob_scale")


class VllmTarget:
    """A worker's model as target rank ``rank``. ``fresh``: its parameters have not been packed yet."""

    def __init__(self, model: torch.nn.Module, model_config: Any, rank: int, *, fresh: bool = False):
        self._model, self._model_config, self._rank, self._fresh = model, model_config, rank, fresh
        self._scratch = _Scratch()
        self.touched = False  # whether a weight has been changed

    def take(self, transport: WeightTransport, agreement: Agreement) -> Shares:
        """Fill all parameters, and return the digests of what then stands in them.

        Raises WeightSyncError; what was changed until then stays changed.
        """
        table = vllm_table(agreement.model, agreement.quantization)
        self._check_parameters(table)
        arrivals = transport.receive(agreement.plan.by_target[self._rank])
        with _Digests(agreement.model) as digests:
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

    def pack_tied_heads(self) -> None:
        """On the CPU vLLM packs a copy of the output layer; where that is the embedding, pack it again."""
        if self._fresh or not current_platform.is_cpu():
            return
        modules = list(self._model.modules())
        embeddings = [m.weight for m in modules if isinstance(m, VocabParallelEmbedding) and not _is_head(m)]
        for module in modules:
            if _is_head(module) and any(module.weight is weight for weight in embeddings):
                module.cpu_linear = _unpacked_linear  # the old packed copy is freed before there is a new one
                module.quant_method.process_weights_after_loading(module)

    def _check_parameters(self, table: Mapping[str, Any]) -> None:
        """A tied output layer is the embedding's parameter, and listed once."""
        theirs = {name for name, _ in self._model.named_parameters() if not name.endswith(KV_CACHE_SCALES)}
        if theirs != table.keys():
            some = ", ".join(sorted(theirs ^ table.keys())[:5])
            raise WeightSyncError(f"vLLM's parameters are not those of the family's map: {some}")

    @contextmanager
    def _opened(self, layer: torch.nn.Module, digests: _Digests) -> Iterator[Mapping[str, torch.Tensor]]:
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
            if copied := _packs_a_copy(layer):
                digests.finish()
                self._scratch.lend(layer.parameters(recurse=False))
            yield {name: parameter.data for name, parameter in layer.named_parameters(recurse=False)}
            if copied:
                layer.cpu_linear = _unpacked_linear  # the old packed copy is freed before there is a new one
            else:
                digests.finish()  # vLLM may change them in place
            with _experts_are_packed_again(layer):
                _layerwise_process(layer, info)
        finally:
            finalize_layerwise_reload(layer, self._model_config)  # after a failure: the old ones come back


class _Digests:
    """The digests of parameters: on the CPU in a thread, beside what vLLM packs and what comes next."""

    def __init__(self, model: ModelConfig):
        self._model, self._shares = model, Shares()
        self._pool = ThreadPoolExecutor(1, "digests")
        self._running: list[Future[Shares]] = []

    def add(self, blocks: Sequence[Block], tensor: torch.Tensor) -> None:
        """Of what stands in ``tensor``, which must not change before ``finish``."""
        if tensor.device.type == "cpu":
            self._running.append(self._pool.submit(digest_shares, blocks, tensor, self._model))
        else:
            self._shares |= digest_shares(blocks, tensor, self._model)

    def finish(self) -> Shares:
        """All that there are, once they are there."""
        for future in self._running:
            self._shares |= future.result()
        self._running.clear()
        return self._shares

    def __enter__(self) -> _Digests:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown()


class _Scratch:
    """Memory for a layer's parameters while they are filled, the same for one layer after the other.

    The kernel clears fresh memory page by page, which takes several times as long as to copy into it.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def lend(self, parameters: Iterable[torch.Tensor]) -> None:
        """Put their values there, to be written; what was lent before is lost."""
        matrices = [parameter for parameter in parameters if parameter.dim() > 1]
        sizes = [matrix.nbytes for matrix in matrices]
        if sum(sizes) > self._memory.numel():
            self._memory = torch.empty(sum(sizes), dtype=torch.uint8)
        for matrix, memory in zip(matrices, self._memory[: sum(sizes)].split(sizes), strict=True):
            matrix.data = memory.view(matrix.dtype).view(matrix.shape)


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


def _is_head(module: torch.nn.Module) -> bool:
    return isinstance(module, ParallelLMHead)


def _unpacked_linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.nn.functional.linear(hidden, weight, bias)


def _packs_a_copy(layer: torch.nn.Module) -> bool:
    """Whether nothing of the layer's weight is used any more once it is packed."""
    if not current_platform.is_cpu() or current_platform.is_zen_cpu():  # zentorch may keep the weight itself
        return False
    return isinstance(getattr(layer, "quant_method", None), UnquantizedLinearMethod)


def _serves_them_as_they_are(layer: torch.nn.Module) -> bool:
    method = getattr(layer, "quant_method", None)
    if isinstance(layer, VocabParallelEmbedding) and not _is_head(layer):
        return isinstance(method, UnquantizedEmbeddingMethod)
    if isinstance(method, (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)):
        return bool(current_platform.is_cuda())
    return method is None
