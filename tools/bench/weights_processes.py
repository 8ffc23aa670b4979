"""The sides of bench_weights.py: trainer ranks, engines and the limits, each a process of its own.

They work when they are told to (sides.py).
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
from megatron_dagger.weights.transports import TransferSpec, WeightSource, checkpoint_offer
from tools.bench.worker_probe import count_packing, seen, watch

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


# ---- the trainer's ranks


def trainer(arguments: argparse.Namespace, rank: int) -> None:
    """A rank's tensors; its orders are offers, "checkpoint" and "export"."""
    import torch

    from megatron_dagger.training.param_names import cut
    from megatron_dagger.weights.transports.open import send_weights
    from megatron_dagger.weights.verify.digest import digest_shares

    model, source, dtype = model_of(arguments), source_of(model_of(arguments)), getattr(torch, arguments.dtype)
    layouts = families.lookup(model).megatron(model)
    tensors: dict[str, Any] = {}
    shares: dict[str, Any] = {}
    for name, whole in _whole(model, source, dtype):
        layout = layouts[name]
        mine = next(own for own, ranks in source.holders(layout, 0) if rank in ranks)
        tensors[name] = cut(whole, layout, mine)
        shares |= digest_shares(layout.blocks(mine, padded_rows=source.padded_vocab_size), tensors[name], model)
    plain = {name: (kind, [(a, b, v) for (a, b), v in runs.items()]) for name, (kind, runs) in shares.items()}
    print("READY " + json.dumps(plain), flush=True)
    for line in sys.stdin:
        if line.strip() in ("checkpoint", "export"):
            _write(line.strip(), arguments, model, source, dtype)
            continue
        order = json.loads(line)
        agreement = TransferSpec(
            model=model,
            target=build(TargetLayout, order["target"]),
            dtype=arguments.dtype,
            offer=build(WeightSource, order["offer"]),
        )
        send_weights(agreement, rank, tensors, torch.device("cpu"))
        print("SENT", flush=True)


def _whole(model: ModelConfig, source: SourceLayout, dtype: Any) -> Iterator[tuple[str, Any]]:
    """The tensors that all ranks hold together, by their global Megatron names."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, layout in families.lookup(model).megatron(model).items():
        rows = source.padded_vocab_size if layout.padded else layout.shape[0]
        yield name, (0.02 * torch.randn(rows, *layout.tail, generator=generator)).to(dtype)


def _write(what: str, arguments: argparse.Namespace, model: ModelConfig, source: SourceLayout, dtype: Any) -> None:
    from safetensors.torch import save_file

    tensors = dict(_whole(model, source, dtype))
    if what == "checkpoint":
        name = str(dtype).removeprefix("torch.")
        folder = arguments.folder / "checkpoint"
        folder.mkdir()
        write_megatron(folder, model, tensors.__getitem__, source, name)
        print(f"WROTE {sum(t.nbytes for t in tensors.values())}", flush=True)
        return
    began = time.perf_counter()
    found = [pair for name, tensor in tensors.items() for pair in families.to_canonical(name, tensor, model)]
    save_file(
        {name: tensor.contiguous() for name, tensor in found},
        arguments.folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    print(f"EXPORTED {time.perf_counter() - began}", flush=True)


# ---- the engine's


def engine(arguments: argparse.Namespace, workers: int) -> None:
    """Our engine: started from the checkpoint, then it takes what is offered."""
    _environment()
    from megatron_dagger.policies.vllm.engine import Sampling, VllmEngine
    from megatron_dagger.weights.vllm import plugin as vllm_transfer  # noqa: F401 - imports are not what is measured

    model = model_of(arguments)
    digests = json.loads(sys.stdin.readline())
    config = VllmEngineConfig(
        dtype=arguments.dtype, max_model_len=512, kv_cache_memory_mib=64, tensor_parallel_size=workers
    )  # type: ignore[arg-type]
    began = time.perf_counter()
    offer = checkpoint_offer(arguments.folder / "checkpoint", model)
    served = VllmEngine(arguments.folder, model, config, seed=0, start=offer)
    served.accept("0", digests)
    served.add("first", PROMPT, Sampling(temperature=0.0, max_tokens=1))
    while not served.step():
        pass
    print("STARTED " + json.dumps({"seconds": time.perf_counter() - began}), flush=True)
    rpc = served._engine.collective_rpc
    rpc(count_packing)
    for line in sys.stdin:
        order = json.loads(line)
        rpc(watch)
        began = time.perf_counter()
        served.load(build(WeightSource, order["offer"]), str(order["version"]), digests)
        seconds = time.perf_counter() - began
        of_workers = rpc(seen)
        most = {name: max(worker[name] for worker in of_workers) for name in of_workers[0]}
        print("SYNCED " + json.dumps({"seconds": seconds} | most), flush=True)
    served.close()


def stock(arguments: argparse.Namespace, _: int) -> None:
    """Stock vLLM on the exported files."""
    _environment()
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
    llm.collective_rpc(count_packing)
    for _order in sys.stdin:
        llm.collective_rpc(watch)
        began = time.perf_counter()
        llm.collective_rpc("reload_weights")
        llm.reset_prefix_cache()
        seconds = time.perf_counter() - began
        [of_worker] = llm.collective_rpc(seen)
        print("RELOADED " + json.dumps({"seconds": seconds} | of_worker), flush=True)


def _environment() -> None:
    """That in which the product starts vLLM."""
    from megatron_dagger.policies.vllm.preload import set_environment

    set_environment(VllmEngineConfig())


# ---- the limits


def copier(arguments: argparse.Namespace, _: int) -> None:
    """A plain copy in memory, in pieces of a bucket; the memory was touched before."""
    import torch

    size = int(sys.stdin.readline())
    source, target = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
    piece = arguments.bucket_mib << 20
    began = time.perf_counter()
    for start in range(0, size, piece):
        target[start : start + piece].copy_(source[start : start + piece])
    print(f"COPIED {time.perf_counter() - began}", flush=True)


def gloo(arguments: argparse.Namespace, rank: int) -> None:
    """One rank of gloo point to point: every source sends every target its part, in pieces of a bucket."""
    import torch
    import torch.distributed as dist

    order = json.loads(sys.stdin.readline())
    workers, piece = order["workers"], arguments.bucket_mib << 20
    dist.init_process_group("gloo", init_method=f"tcp://{order['address']}", rank=rank, world_size=SOURCES + workers)
    each = order["moved"] // (SOURCES * workers)
    buffers = {peer: torch.ones(piece, dtype=torch.uint8) for peer in range(SOURCES + workers)}
    dist.barrier()
    began = time.perf_counter()
    others = range(SOURCES, SOURCES + workers) if rank < SOURCES else range(SOURCES)
    move = dist.isend if rank < SOURCES else dist.irecv
    for start in range(0, each, piece):
        works = [move(buffers[other][: min(piece, each - start)], other) for other in others]
        for work in works:
            work.wait()
    dist.barrier()
    print(f"MOVED {time.perf_counter() - began}", flush=True)


SIDES: dict[str, Callable[[argparse.Namespace, int], None]] = {
    "trainer": trainer,
    "engine": engine,
    "stock": stock,
    "copier": copier,
    "gloo": gloo,
}
