"""Check the plan against vLLM's own loaders, for a family and many layouts (``python -m``, FAMILY or ``fp8``).

Each rank's model is built in this process, with the size and rank of vLLM's process groups patched, and vLLM loads
canonical weights into it. Its parameters must equal those that the plan delivers to the rank.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel, parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from megatron_dagger.config import ModelConfig, VllmEngineConfig
from megatron_dagger.policies.vllm.engine import quantization_settings
from megatron_dagger.weights import families
from megatron_dagger.weights.families.fp8 import (
    Quantization,
    megatron_table,
    source_name,
    vllm_table,
)
from megatron_dagger.weights.layouts import SourceLayout, TargetLayout
from megatron_dagger.weights.transfer_plan import plan
from megatron_dagger.weights.vllm.target import KV_CACHE_SCALES
from tests.integration import fp8_kernel
from tests.unit.weights.fp8_tensors import quantised

VOCAB = 1000  # vLLM pads to 1024


def sample(family: str, *, tied: bool) -> ModelConfig:
    moe = {"num_moe_experts": 8, "moe_ffn_hidden_size": 48} if family == "qwen3_moe" else {}
    return ModelConfig(
        family=family,  # type: ignore[arg-type]
        num_layers=2,
        hidden_size=256,
        num_attention_heads=8,
        num_query_groups=2,
        kv_channels=32,
        ffn_hidden_size=64,
        vocab_size=VOCAB,
        tie_embeddings=tied,
        **moe,  # type: ignore[arg-type]
    )


def sample_for_fp8(*, tied: bool) -> ModelConfig:
    """Return a model whose matrices divide into whole blocks on each of eight ranks."""
    return replace(sample("qwen3", tied=tied), kv_channels=128, ffn_hidden_size=1024)


def canonical(model: ModelConfig, quantization: Quantization) -> dict[str, torch.Tensor]:
    """Return random weights in the form of a published checkpoint."""
    generator = torch.Generator().manual_seed(0)
    names = families.canonical_names(model)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
    if quantization == "fp8":
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        return quantised(model, tensors.items())
    return tensors


def planned(
    model: ModelConfig, target: TargetLayout, tensors: dict[str, torch.Tensor], quantization: Quantization
) -> list[dict[str, torch.Tensor]]:
    """Return each target rank's parameters, delivered by the plan from a trainer of a single rank."""
    source_tensors: dict[str, torch.Tensor] = {source_name(name): tensor for name, tensor in tensors.items()}
    for name, entry in megatron_table(model, quantization).items():
        if name in source_tensors:
            continue  # scales
        full = [
            families.from_canonical(name.format(i), tensors, model, padded_rows=1024 if entry.padded else None)
            for i in range(entry.experts or 1)
        ]
        source_tensors[name] = torch.stack(full) if entry.experts else full[0]
    ranks: list[dict[str, torch.Tensor]] = [{} for _ in range(target.world_size)]
    result = plan(model, SourceLayout(padded_vocab_size=1024), target, quantization)
    dtypes = {copy.target_parameter: source_tensors[copy.source_tensor].dtype for copy in result.copies}
    for name, parameter in vllm_table(model, quantization).items():
        for shard, holders in target.holders(experts=parameter.experts > 0):
            for rank in holders:
                ranks[rank][name] = torch.full(parameter.shape(shard), float("nan")).to(dtypes[name])
    for copy in result.copies:
        block = source_tensors[copy.source_tensor][copy.source.slices]
        ranks[copy.target_rank][copy.target_parameter][copy.target.slices] = block
    for fill in result.fills:
        ranks[fill.target_rank][fill.target_parameter][fill.target.slices] = 0
    return ranks


@contextmanager
def as_rank(rank: int, target: TargetLayout, config: VllmConfig) -> Iterator[None]:
    """Patch vLLM's process groups to those of rank ``rank`` of ``target`` while the block runs."""
    groups = [parallel_state.get_tp_group()]
    if config.model_config.is_moe:
        groups.append(parallel_state.get_ep_group())
    config.parallel_config.tensor_parallel_size = target.tensor_parallel_size
    config.parallel_config.enable_expert_parallel = target.enable_expert_parallel
    config.compilation_config.static_forward_context.clear()
    with ExitStack() as stack:
        for group in groups:
            stack.enter_context(mock.patch.object(group, "world_size", target.tensor_parallel_size))
            stack.enter_context(mock.patch.object(group, "rank_in_group", rank))
        yield


def check(model: ModelConfig, target: TargetLayout, config: VllmEngineConfig, quantization: Quantization) -> None:
    tensors = canonical(model, quantization)
    for rank, expected in enumerate(planned(model, target, tensors, quantization)):
        with as_rank(rank, target, config), set_default_torch_dtype(config.model_config.dtype):
            engine = initialize_model(vllm_config=config)
            engine.load_weights(iter(tensors.items()))
        loaded = {n: p for n, p in engine.named_parameters() if not n.endswith(KV_CACHE_SCALES)}
        assert loaded.keys() == expected.keys(), f"{target}: {loaded.keys() ^ expected.keys()}"
        for name, tensor in expected.items():
            assert loaded[name].dtype == tensor.dtype, name
            assert torch.equal(loaded[name].float(), tensor.float()), f"rank {rank} of {target}: {name}"


def main(case: str) -> None:
    quantization: Quantization = "fp8" if case == "fp8" else "none"
    engine = VllmEngineConfig(dtype="bfloat16" if case == "fp8" else "float32", quantization=quantization)
    fp8_kernel.register()
    for tied in (True, False):
        model = sample_for_fp8(tied=tied) if case == "fp8" else sample(case, tied=tied)
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "config.json").write_text(json.dumps(model.hf_config()))
            arguments = EngineArgs(
                model=directory,
                skip_tokenizer_init=True,
                dtype=engine.dtype,
                enforce_eager=True,
                load_format="dummy",
                hf_overrides=quantization_settings(engine),
            )
            config = arguments.create_engine_config()
            with set_current_vllm_config(config):
                if not parallel_state.model_parallel_is_initialized():
                    init_distributed_environment(1, 0, f"file://{directory}/rendezvous", 0, "gloo")
                    initialize_model_parallel(1, 1)
        with set_current_vllm_config(config):
            for size in (1, 2, 4, 8):
                check(model, TargetLayout(tensor_parallel_size=size), config, quantization)
                if model.num_moe_experts:
                    target = TargetLayout(tensor_parallel_size=size, enable_expert_parallel=True)
                    check(model, target, config, quantization)


if __name__ == "__main__":
    main(sys.argv[1])
