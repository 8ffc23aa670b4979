"""What it costs to bring the weights from the trainer's ranks to vLLM, next to the limits and to the usual way.

The model has the shape of Qwen3 and about 0.5B parameters. Two trainer ranks (tensor parallel) hold it,
processes with the tensors that Megatron's ranks would have; vLLM is the real one, with one worker and with
two, each worker a process. Everything that a sync does is in its time: packing, the way, the digests of all
parameters on the engine's side, vLLM's own packing of its layers. The limits are measured in the same run:

- a plain copy of the same bytes in memory, by one process, in pieces of a bucket;
- gloo point to point of the same bytes, between as many processes, in pieces of a bucket;
- the usual way: rank 0 (which here has all tensors already) writes Hugging Face safetensors, which vLLM
  reads again.

All are repeated, and medians compared. Peak memory is the worker's own (anonymous) while it takes the weights,
less what it was before, in buckets: beside the buffers of a transfer what vLLM needs to pack a layer. The
buffers of the host transport are the trainer's, two a rank.

    tools/bench_weights.py                     about 5 minutes, 12 GB of memory, 5 GB of disk
    tools/bench_weights.py --layers 4          a quick look
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from sides import Side, side  # noqa: E402

from megatron_dagger.config import EngineConfig, ModelConfig, ParallelConfig, build, to_dict  # noqa: E402
from megatron_dagger.weights import families  # noqa: E402
from megatron_dagger.weights.blocks import ITEMSIZE  # noqa: E402
from megatron_dagger.weights.layouts import SourceLayout, TargetLayout  # noqa: E402
from megatron_dagger.weights.megatron_writer import write_megatron  # noqa: E402
from megatron_dagger.weights.transports import Agreement, Offer, checkpoint_offer  # noqa: E402

SOURCES = 2
WORKERS = (1, 2)
DEADLINE_S = 300.0
PROMPT = list(range(100, 164))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24, help="of the model (default %(default)s: 0.5B parameters)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--bucket-mib", type=int, default=32, help="default %(default)s")
    parser.add_argument("--turns", type=int, default=3, help="times that everything is measured (default %(default)s)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, _, number = arguments.worker.partition("-")
        SIDES[kind](arguments, int(number or 0))
        return 0
    with tempfile.TemporaryDirectory(prefix="bench_weights-") as folder:
        arguments.folder = Path(folder)
        bench(arguments)
    return 0


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


def bench(arguments: argparse.Namespace) -> None:
    model, source = model_of(arguments), source_of(model_of(arguments))
    (arguments.folder / "config.json").write_text(json.dumps(model.hf_config() | {"torch_dtype": arguments.dtype}))
    times: dict[str, list[float]] = {}
    result: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        trainers = [stack.enter_context(_side(arguments, f"trainer-{rank}")) for rank in range(SOURCES)]
        shares = [json.loads(trainer.answer("READY")) for trainer in trainers]
        digests = _merged(shares, model)
        size = trainers[0].go("WROTE", "checkpoint")
        print(f"{int(size) / 1e9:.2f} GB of weights in {arguments.dtype}, {SOURCES} trainer ranks", flush=True)
        for workers in WORKERS:
            target = TargetLayout(tensor_parallel_size=workers)
            offer = Offer(kind="host", address="x", source=source, bucket_mib=arguments.bucket_mib)
            plan = Agreement(model=model, target=target, dtype=arguments.dtype, offer=offer).plan
            moved = plan.bytes_moved(ITEMSIZE[arguments.dtype])
            result[f"bytes_ratio_{workers}"] = moved / plan.minimum_bytes(ITEMSIZE[arguments.dtype])
            with _side(arguments, f"engine-{workers}") as engine:
                started = json.loads(engine.go("STARTED", json.dumps(digests)))
                times[f"start {workers}"] = [started["seconds"]]
                for turn in range(arguments.turns):
                    for kind in ("host", "live", "checkpoint"):
                        order = _order(kind, arguments, model, source, target, turn)
                        for trainer in trainers if kind != "checkpoint" else ():
                            trainer.tell(json.dumps(order))
                        took = json.loads(engine.go("SYNCED", json.dumps(order)))
                        for trainer in trainers if kind != "checkpoint" else ():
                            trainer.answer("SENT")
                        times.setdefault(f"{kind} {workers}", []).append(took["seconds"])
                        times.setdefault(f"{kind} {workers} packing", []).append(took["packing"])
                        peak = result.setdefault(f"peak {kind} {workers}", 0.0)
                        result[f"peak {kind} {workers}"] = max(peak, took["peak_bytes"] / (arguments.bucket_mib << 20))
            for _ in range(arguments.turns):
                with _side(arguments, "copier") as copier:
                    times.setdefault(f"memcpy {workers}", []).append(float(copier.go("COPIED", str(moved))))
                times.setdefault(f"gloo {workers}", []).append(_gloo(arguments, workers, moved))
        _usual_way(arguments, trainers[0], times)
    _report(times, result)


def _usual_way(arguments: argparse.Namespace, trainer: Side, times: dict[str, list[float]]) -> None:
    times["export"] = [float(trainer.go("EXPORTED", "export"))]
    with _side(arguments, "stock") as stock:
        times["stock start"] = [json.loads(stock.go("STARTED", "start"))["seconds"]]
        for _ in range(arguments.turns):
            exported = float(trainer.go("EXPORTED", "export"))
            times.setdefault("export and reload", []).append(exported + float(stock.go("RELOADED", "reload")))
            times["export"].append(exported)


def _order(
    kind: str, arguments: argparse.Namespace, model: ModelConfig, source: SourceLayout, target: TargetLayout, turn: int
) -> dict[str, Any]:
    from megatron_dagger.weights.transports.live import free_address

    if kind == "checkpoint":
        offer = checkpoint_offer(arguments.folder / "checkpoint", model)
    else:
        address = str(arguments.folder) if kind == "host" else free_address()
        offer = Offer(kind=kind, address=address, source=source, bucket_mib=arguments.bucket_mib)  # type: ignore[arg-type]
    return {"offer": to_dict(offer), "target": to_dict(target), "version": turn}


def _merged(shares: list[dict[str, Any]], model: ModelConfig) -> dict[str, str]:
    from megatron_dagger.weights.digest import merge

    found = []
    for rank in shares:
        found.append({name: (dtype, {(a, b): value for a, b, value in runs}) for name, (dtype, runs) in rank.items()})
    return merge(found, model)


def _report(times: dict[str, list[float]], result: dict[str, Any]) -> None:
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{'':<24}{'seconds':>9}{'of these vLLM packs':>21}{'peak buckets':>14}")
    for name, seconds in medians.items():
        if name.endswith("packing"):
            continue
        packing = medians.get(f"{name} packing")
        peak = result.get(f"peak {name}")
        print(
            f"{name:<24}{seconds:>9.2f}{'' if packing is None else f'{packing:.2f}':>21}"
            f"{'' if peak is None else f'{peak:.2f}':>14}"
        )

    def worst(kind: str, limit: str, *, packing: bool) -> float:
        """Of one and two workers, the larger ratio to the limit."""
        ratios = []
        for workers in WORKERS:
            ours = medians[f"{kind} {workers}"] - (0.0 if packing else medians[f"{kind} {workers} packing"])
            ratios.append(ours / medians[f"{limit} {workers}"])
        return round(max(ratios), 2)

    final = {
        "bytes_ratio": max(result[f"bytes_ratio_{workers}"] for workers in WORKERS),
        "time_vs_memcpy": worst("host", "memcpy", packing=True),
        "time_vs_memcpy_without_packing": worst("host", "memcpy", packing=False),
        "time_vs_gloo": worst("live", "gloo", packing=True),
        "time_vs_gloo_without_packing": worst("live", "gloo", packing=False),
        "speedup_vs_hf_export": round(medians["export and reload"] / medians["host 1"], 2),
        "file_speedup_vs_hf_export": round(medians["export and reload"] / medians["checkpoint 1"], 2),
        "start_speedup_vs_export": round((medians["export"] + medians["stock start"]) / medians["start 1"], 2),
        "peak_extra_buckets": round(max(v for name, v in result.items() if name.startswith("peak")), 2),
    }
    print("RESULT " + json.dumps(final))


def _gloo(arguments: argparse.Namespace, workers: int, moved: int) -> float:
    """The seconds that gloo needs for the bytes, as many processes as the transfer has, nothing else done."""
    from megatron_dagger.weights.transports.live import free_address

    order = json.dumps({"address": free_address(), "workers": workers, "moved": moved})
    with contextlib.ExitStack() as stack:
        ranks = [stack.enter_context(_side(arguments, f"gloo-{rank}")) for rank in range(SOURCES + workers)]
        for rank in ranks:
            rank.tell(order)
        return max(float(rank.answer("MOVED")) for rank in ranks)


def _side(arguments: argparse.Namespace, worker: str) -> contextlib.AbstractContextManager[Side]:
    given = [*sys.argv[1:], "--folder", str(arguments.folder), "--worker", worker]
    return side(given, DEADLINE_S, {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"})


# ---- the trainer's ranks


def trainer(arguments: argparse.Namespace, rank: int) -> None:
    """A rank's tensors; its orders are offers, "checkpoint" and "export"."""
    import torch

    from megatron_dagger.training.layout import shard
    from megatron_dagger.weights.digest import digest_shares
    from megatron_dagger.weights.transports.open import send_weights

    model, source, dtype = model_of(arguments), source_of(model_of(arguments)), getattr(torch, arguments.dtype)
    layouts = families.lookup(model).megatron(model)
    tensors, shares = {}, {}
    for name, whole in _whole(model, source, dtype):
        layout = layouts[name]
        mine = next(own for own, ranks in source.holders(layout, 0) if rank in ranks)
        tensors[name] = shard(whole, layout, rank, SOURCES)
        shares |= digest_shares(layout.blocks(mine, padded_rows=source.padded_vocab_size), tensors[name], model)
    plain = {name: (kind, [(a, b, v) for (a, b), v in runs.items()]) for name, (kind, runs) in shares.items()}
    print("READY " + json.dumps(plain), flush=True)
    for line in sys.stdin:
        if line.strip() in ("checkpoint", "export"):
            _write(line.strip(), arguments, model, source, dtype)
            continue
        order = json.loads(line)
        agreement = Agreement(
            model=model,
            target=build(TargetLayout, order["target"]),
            dtype=arguments.dtype,
            offer=build(Offer, order["offer"]),
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
    with _timed_start():
        from megatron_dagger.policies.vllm_engine import Sampling, VllmEngine
        from megatron_dagger.weights import vllm_target, vllm_transfer  # noqa: F401 - the import is not what is measured

    model = model_of(arguments)
    digests = json.loads(sys.stdin.readline())
    config = EngineConfig(
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
    packing = _count_packing(vllm_target) if workers == 1 else lambda: 0.0
    for line in sys.stdin:
        order = json.loads(line)
        gc.collect()
        with _peak(workers) as peak:
            began, packed = time.perf_counter(), packing()
            served.load(build(Offer, order["offer"]), str(order["version"]), digests)
            seconds = time.perf_counter() - began
        print(
            "SYNCED " + json.dumps({"seconds": seconds, "packing": packing() - packed, "peak_bytes": peak()}),
            flush=True,
        )
    served.close()


def stock(arguments: argparse.Namespace, _: int) -> None:
    """Stock vLLM on the exported files."""
    with _timed_start():
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
    for _ in sys.stdin:
        began = time.perf_counter()
        llm.collective_rpc("reload_weights")
        llm.reset_prefix_cache()
        print(f"RELOADED {time.perf_counter() - began}", flush=True)


@contextlib.contextmanager
def _timed_start() -> Iterator[None]:
    """vLLM as the product starts it; imports are not measured."""
    from megatron_dagger.policies import vllm_engine

    for name, value in vllm_engine._ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    yield


def _count_packing(vllm_target: Any) -> Callable[[], float]:
    """The seconds that vLLM has packed layers for so far, in this process."""
    total = 0.0
    process = vllm_target._layerwise_process

    def counted(*given: Any) -> None:
        nonlocal total
        began = time.perf_counter()
        process(*given)
        total += time.perf_counter() - began

    vllm_target._layerwise_process = counted
    return lambda: total


@contextlib.contextmanager
def _peak(workers: int) -> Iterator[Callable[[], float]]:
    """The most memory that this process had within the block, over what it had before, in bytes.

    With several workers they are processes of their own, and this one holds no weights.
    """
    most, running = _resident(), True
    before = most

    def watch() -> None:
        nonlocal most
        while running:
            most = max(most, _resident())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: float(most - before) if workers == 1 else 0.0
    finally:
        running = False
        thread.join()


def _resident() -> int:
    """The anonymous memory of this process, in bytes."""
    with open("/proc/self/status") as file:
        (line,) = [line for line in file if line.startswith("RssAnon:")]
    return int(line.split()[1]) << 10


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

if __name__ == "__main__":
    sys.exit(main())
