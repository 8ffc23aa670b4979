"""The processes of tools.bench.weights: trainer ranks, vLLM engines, and the references they are compared with.

Each is a function that serves the orders on its standard input (see tools.bench.processes). Times are in seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from megatron_dagger.config import ModelConfig, ParallelConfig, VllmEngineConfig, build
from megatron_dagger.weights import families
from megatron_dagger.weights.layouts import SourceLayout, TargetLayout
from megatron_dagger.weights.torch_dist.writer import write_megatron
from megatron_dagger.weights.transports import TransferSpec, WeightSource, checkpoint_source
from tools.bench.worker_probe import read_probe, start_probe, time_packing

SOURCES = 2
PROMPT = list(range(100, 164))


def model_of(arguments: argparse.Namespace) -> ModelConfig:
    return ModelConfig(
        num_layers=arguments.layers,
        hidden_size=896,
        ffn_hidden_size=4864,
        num_attention_heads=14,
        num_query_groups=2,
        kv_channels=64,
        vocab_size=151_936,
        max_position_embeddings=4096,
    )


def source_of(model: ModelConfig) -> SourceLayout:
    return SourceLayout.of_trainer(model, ParallelConfig(world_size=SOURCES, tensor_model_parallel_size=SOURCES))


# ---- trainer ranks


def trainer(arguments: argparse.Namespace, rank: int) -> None:
    """Hold the tensors of trainer rank ``rank``. Orders: a transfer as JSON, "checkpoint" or "export"."""
    import torch

    from megatron_dagger.training.param_names import cut
    from megatron_dagger.weights.transports.open import send_weights
    from megatron_dagger.weights.verify.digest import digest_shares

    model, source, dtype = model_of(arguments), source_of(model_of(arguments)), getattr(torch, arguments.dtype)
    megatron_tensors = families.lookup(model).megatron(model)
    tensors: dict[str, Any] = {}
    shares: dict[str, Any] = {}
    for name, whole in _whole(model, source, dtype):
        layout = megatron_tensors[name]
        shard = next(shard for shard, ranks in source.holders(layout, 0) if rank in ranks)
        tensors[name] = cut(whole, layout, shard)
        shares |= digest_shares(layout.blocks(shard, padded_rows=source.padded_vocab_size), tensors[name], model)
    plain = {name: (kind, [(a, b, v) for (a, b), v in runs.items()]) for name, (kind, runs) in shares.items()}
    print("READY " + json.dumps(plain), flush=True)
    for line in sys.stdin:
        if line.strip() in ("checkpoint", "export"):
            _write(line.strip(), arguments, model, source, dtype)
            continue
        order = json.loads(line)
        spec = TransferSpec(
            model=model,
            target=build(TargetLayout, order["target"]),
            dtype=arguments.dtype,
            source=build(WeightSource, order["source"]),
        )
        send_weights(spec, rank, tensors, torch.device("cpu"))
        print("SENT", flush=True)


def _whole(model: ModelConfig, source: SourceLayout, dtype: Any) -> Iterator[tuple[str, Any]]:
    """Yield the model's full tensors by their global Megatron names; the same values in every process."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, layout in families.lookup(model).megatron(model).items():
        rows = source.padded_vocab_size if layout.padded else layout.shape[0]
        yield name, (0.02 * torch.randn(rows, *layout.tail, generator=generator)).to(dtype)


def _write(target: str, arguments: argparse.Namespace, model: ModelConfig, source: SourceLayout, dtype: Any) -> None:
    from safetensors.torch import save_file

    tensors = dict(_whole(model, source, dtype))
    if target == "checkpoint":
        name = str(dtype).removeprefix("torch.")
        folder = arguments.folder / "checkpoint"
        folder.mkdir()
        write_megatron(folder, model, tensors.__getitem__, source, name)
        print(f"WROTE {sum(t.nbytes for t in tensors.values())}", flush=True)
        return
    began = time.perf_counter()
    canonical = [pair for name, tensor in tensors.items() for pair in families.to_canonical(name, tensor, model)]
    save_file(
        {name: tensor.contiguous() for name, tensor in canonical},
        arguments.folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    print(f"EXPORTED {time.perf_counter() - began}", flush=True)


# ---- vLLM engines


def engine(arguments: argparse.Namespace, workers: int) -> None:
    """Start our engine with ``workers`` workers from the checkpoint, then load the weight source of each order."""
    _set_environment()
    from megatron_dagger.policies.vllm.engine import Sampling, VllmEngine
    from megatron_dagger.weights.vllm import plugin  # noqa: F401 - imported here to keep it out of the measured time

    model = model_of(arguments)
    digests = json.loads(sys.stdin.readline())
    config = VllmEngineConfig(
        dtype=arguments.dtype, max_model_len=512, kv_cache_memory_mib=64, tensor_parallel_size=workers
    )  # type: ignore[arg-type]
    began = time.perf_counter()
    checkpoint = checkpoint_source(arguments.folder / "checkpoint", model)
    served = VllmEngine(arguments.folder, model, config, seed=0, weights=checkpoint)
    served.accept("0", digests)
    served.add("first", PROMPT, Sampling(temperature=0.0, max_tokens=1))
    while not served.step():
        pass
    print("STARTED " + json.dumps({"seconds": time.perf_counter() - began}), flush=True)
    rpc = served._engine.collective_rpc
    rpc(time_packing)
    for line in sys.stdin:
        order = json.loads(line)
        rpc(start_probe)
        began = time.perf_counter()
        served.load(build(WeightSource, order["source"]), str(order["version"]), digests)
        seconds = time.perf_counter() - began
        readings = rpc(read_probe)
        largest = {name: max(reading[name] for reading in readings) for name in readings[0]}
        print("SYNCED " + json.dumps({"seconds": seconds} | largest), flush=True)
    served.close()


def stock(arguments: argparse.Namespace, _: int) -> None:
    """Start stock vLLM on the exported Hugging Face files, then reload them at every order."""
    _set_environment()
    import vllm

    sys.stdin.readline()
    began = time.perf_counter()
    llm = vllm.LLM(
        str(arguments.folder),
        skip_tokenizer_init=True,
        dtype=arguments.dtype,
        enforce_eager=True,
        max_model_len=512,
        kv_cache_memory_bytes=64 << 20,
    )
    prompt = {"prompt_token_ids": PROMPT}
    llm.generate([prompt], vllm.SamplingParams(temperature=0.0, max_tokens=1, detokenize=False), use_tqdm=False)
    print("STARTED " + json.dumps({"seconds": time.perf_counter() - began}), flush=True)
    llm.collective_rpc(time_packing)
    for _order in sys.stdin:
        llm.collective_rpc(start_probe)
        began = time.perf_counter()
        llm.collective_rpc("reload_weights")
        llm.reset_prefix_cache()
        seconds = time.perf_counter() - began
        [reading] = llm.collective_rpc(read_probe)
        print("RELOADED " + json.dumps({"seconds": seconds} | reading), flush=True)


def _set_environment() -> None:
    """Set the environment variables with which a run starts vLLM."""
    from megatron_dagger.policies.vllm.preload import set_environment

    set_environment(VllmEngineConfig())


# ---- references


def copier(arguments: argparse.Namespace, _: int) -> None:
    """Copy the ordered number of bytes in memory once, a bucket at a time, between pages that are already mapped."""
    import torch

    size, bucket = int(sys.stdin.readline()), arguments.bucket_mib << 20
    source, target = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
    began = time.perf_counter()
    for start in range(0, size, bucket):
        target[start : start + bucket].copy_(source[start : start + bucket])
    print(f"COPIED {time.perf_counter() - began}", flush=True)


def gloo(arguments: argparse.Namespace, rank: int) -> None:
    """Run one rank of a gloo transfer: every source sends every target an equal part, a bucket at a time."""
    import torch
    import torch.distributed as dist

    order = json.loads(sys.stdin.readline())
    workers, bucket = order["workers"], arguments.bucket_mib << 20
    dist.init_process_group("gloo", init_method=f"tcp://{order['address']}", rank=rank, world_size=SOURCES + workers)
    part = order["moved"] // (SOURCES * workers)
    buffers = {peer: torch.ones(bucket, dtype=torch.uint8) for peer in range(SOURCES + workers)}
    dist.barrier()
    began = time.perf_counter()
    peers = range(SOURCES, SOURCES + workers) if rank < SOURCES else range(SOURCES)
    move = dist.isend if rank < SOURCES else dist.irecv
    for start in range(0, part, bucket):
        works = [move(buffers[peer][: min(bucket, part - start)], peer) for peer in peers]
        for work in works:
            work.wait()
    dist.barrier()
    print(f"MOVED {time.perf_counter() - began}", flush=True)


PROCESSES: dict[str, Callable[[argparse.Namespace, int], None]] = {
    "trainer": trainer,
    "engine": engine,
    "stock": stock,
    "copier": copier,
    "gloo": gloo,
}
