"""Patches that let Megatron-Core run on a machine without CUDA.

Megatron-Core asks ``torch.cuda`` for the current device, streams and generators, and allocates on "cuda" by name. Here
each of these answers for the CPU. ``install`` runs once per process, before a model or an optimizer is built; on a
machine with CUDA it does nothing.

Other places where the package changes a library in its process: ``training/__init__`` hides Transformer Engine and Apex
on a machine without a GPU, ``compat`` replaces the queue of Megatron's checkpoint writer, ``flex_attention`` raises
Dynamo's recompile limit, and ``weights/vllm/target`` replaces a function of vLLM's linear layers.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "ones_like", "tensor", "zeros", "zeros_like")
_installed = False


class _Stream:
    """A CUDA stream and an event in one: CPU work is done when the call returns."""

    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self, event: object = None) -> _Stream:
        return self


def install() -> bool:
    """Patch torch and Megatron-Core on a machine without CUDA; return whether this is such a machine."""
    global _installed
    if torch.cuda.is_available():
        return False
    if not _installed:
        _installed = True
        _patch_torch_cuda()
        _patch_tensors()
        _patch_megatron()
    return True


def _patch_torch_cuda() -> None:
    stream = _Stream()
    answers: dict[str, Callable[..., Any]] = {
        "current_device": lambda: _CPU,
        "synchronize": lambda *args, **kwargs: None,
        "empty_cache": lambda: None,
        "current_stream": lambda *args: stream,
        "default_stream": lambda *args: stream,
        "stream": lambda _: contextlib.nullcontext(),
        "Stream": _Stream,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda *args: torch.get_rng_state(),
        "set_rng_state": lambda state, *args: torch.set_rng_state(state),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)


def _patch_tensors() -> None:
    def on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
                kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return wrapper

    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))

    typename = torch.Tensor.type

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return CUDA's type names to Megatron, which sorts gradients by names such as torch.cuda.FloatTensor."""
        answer = typename(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(answer, str) and caller.startswith("megatron.core"):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.type = tensor_type


def _patch_megatron() -> None:
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    def set_states(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        """Set the states as Megatron does, except for ``step``, which torch's AdamW has and a checkpoint lacks."""
        group, order = self.model_param_group_index_map[model_param]
        param = self.optimizer.param_groups[group]["params"][order]
        with torch.no_grad():
            for key, value in {"param": param, **self.optimizer.state[param]}.items():
                if key != "step":
                    value.copy_(tensors[key])

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states

    moe_utils.te_general_gemm = None  # 0.16 uses the name even if its import failed
    move = token_dispatcher.maybe_move_tensor_to_cpu

    def move_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        """Return CPU tensors unchanged as Megatron does, but honour ``as_numpy``."""
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else move(tensor)

    token_dispatcher.maybe_move_tensor_to_cpu = move_to_cpu
