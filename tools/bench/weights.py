"""Measure a weight sync, from trainer ranks to vLLM, by each transport and against the hardware's limits.

The model has Qwen3's shape and about 0.5B parameters. Two tensor-parallel trainer ranks hold it: processes with the
tensors that Megatron's ranks would have. vLLM is real, with one worker and then with two, each in its own process. The
time of a sync includes everything: filling buckets, the transfer, the digests of all parameters in the engine, and
vLLM's own work. References, measured in the same run:

- memcpy: a copy of the same bytes in memory by one process, a bucket at a time;
- gloo: the same bytes point to point between as many processes, a bucket at a time;
- export and reload: rank 0, which here has all tensors already, writes Hugging Face safetensors; stock vLLM reloads.

Everything is repeated and medians are compared. Stock vLLM packs its linear layers for the CPU, also in a reload; the
table lists that time separately. Our loader leaves them unpacked, as on a GPU, and an update writes in place. Peak
memory is the largest rise of a worker's anonymous memory during a sync, in buckets. It includes neither the
shared_memory transport's buffers (the trainer's, two for each rank) nor a checkpoint's file pages.

    .venv/bin/python -m tools.bench.weights                 5 minutes, 12 GB of memory, 5 GB of disk
    .venv/bin/python -m tools.bench.weights --layers 4      a quick look

The last line is ``RESULT {json}``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_dagger.config import ModelConfig, to_dict
from megatron_dagger.weights.blocks import ITEMSIZE
from megatron_dagger.weights.layouts import SourceLayout, TargetLayout
from megatron_dagger.weights.transports import TransferSpec, WeightSource, checkpoint_source
from tools.bench.processes import BenchProcess, bench_process
from tools.bench.weights_processes import PROCESSES, SOURCES, model_of, source_of

WORKERS = (1, 2)
DEADLINE_S = 300.0

Times = dict[str, list[float]]  # the seconds of each repetition, by the name of the measurement
Peaks = dict[str, float]  # in buckets, by the name of the measurement


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=int, default=24, help="layers of the model (default %(default)s: 0.5B parameters)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default %(default)s")
    parser.add_argument("--bucket-mib", type=int, default=32, help="size of a bucket (default %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="number of repetitions (default %(default)s)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, _, number = arguments.worker.partition("-")
        PROCESSES[kind](arguments, int(number or 0))
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-weights-") as folder:
        arguments.folder = Path(folder)
        bench(arguments)
    return 0


def bench(arguments: argparse.Namespace) -> None:
    model, source = model_of(arguments), source_of(model_of(arguments))
    (arguments.folder / "config.json").write_text(json.dumps(model.hf_config() | {"torch_dtype": arguments.dtype}))
    times: Times = {}
    peaks: Peaks = {}
    ratios: list[float] = []
    with contextlib.ExitStack() as stack:
        trainers = [stack.enter_context(_process(arguments, f"trainer-{rank}")) for rank in range(SOURCES)]
        shares = [json.loads(trainer.answer("READY")) for trainer in trainers]
        digests = _merged_digests(shares, model)
        size = trainers[0].ask("WROTE", "checkpoint")
        print(f"{int(size) / 1e9:.2f} GB of weights in {arguments.dtype}, {SOURCES} trainer ranks", flush=True)
        for workers in WORKERS:
            target = TargetLayout(tensor_parallel_size=workers)
            any_source = WeightSource(kind="shared_memory", address="x", layout=source, bucket_mib=arguments.bucket_mib)
            plan = TransferSpec(model=model, target=target, dtype=arguments.dtype, source=any_source).plan
            moved = plan.bytes_moved(ITEMSIZE[arguments.dtype])
            ratios.append(moved / plan.minimum_bytes(ITEMSIZE[arguments.dtype]))
            with _process(arguments, f"engine-{workers}") as engine:
                started = json.loads(engine.ask("STARTED", json.dumps(digests)))
                times[f"start {workers}"] = [started["seconds"]]
                for turn in range(arguments.turns):
                    for kind in ("shared_memory", "p2p", "checkpoint"):
                        measured = _sync(engine, trainers, _order(kind, arguments, model, source, target, turn))
                        _record(arguments, f"{kind} {workers}", measured, times, peaks)
            for _ in range(arguments.turns):
                with _process(arguments, "copier") as copier:
                    times.setdefault(f"memcpy {workers}", []).append(float(copier.ask("COPIED", str(moved))))
                times.setdefault(f"gloo {workers}", []).append(_gloo(arguments, workers, moved))
        _export_and_reload(arguments, trainers[0], times, peaks)
    _report(times, peaks, max(ratios))


def _sync(engine: BenchProcess, trainers: list[BenchProcess], order: dict[str, Any]) -> dict[str, float]:
    """Do one sync; return the engine's measurements: seconds, seconds of packing, peak bytes."""
    senders = trainers if order["source"]["kind"] != "checkpoint" else []
    for trainer in senders:
        trainer.send(json.dumps(order))
    measured: dict[str, float] = json.loads(engine.ask("SYNCED", json.dumps(order)))
    for trainer in senders:
        trainer.answer("SENT")
    return measured


def _export_and_reload(arguments: argparse.Namespace, trainer: BenchProcess, times: Times, peaks: Peaks) -> None:
    times["export"] = [float(trainer.ask("EXPORTED", "export"))]
    with _process(arguments, "stock") as stock:
        times["stock start"] = [json.loads(stock.ask("STARTED", "start"))["seconds"]]
        for _ in range(arguments.turns):
            exported_s = float(trainer.ask("EXPORTED", "export"))
            measured = json.loads(stock.ask("RELOADED", "reload"))
            _record(arguments, "reload", measured, times, peaks)
            times.setdefault("export and reload", []).append(exported_s + measured["seconds"])
            times["export"].append(exported_s)


def _record(arguments: argparse.Namespace, name: str, measured: dict[str, float], times: Times, peaks: Peaks) -> None:
    times.setdefault(name, []).append(measured["seconds"])
    times.setdefault(f"{name} packing", []).append(measured["packing"])
    peaks[name] = max(peaks.get(name, 0.0), measured["peak_bytes"] / (arguments.bucket_mib << 20))


def _order(
    kind: str, arguments: argparse.Namespace, model: ModelConfig, source: SourceLayout, target: TargetLayout, turn: int
) -> dict[str, Any]:
    from megatron_dagger.weights.transports.p2p import free_address

    if kind == "checkpoint":
        weights = checkpoint_source(arguments.folder / "checkpoint", model)
    else:
        address = str(arguments.folder) if kind == "shared_memory" else free_address()
        weights = WeightSource(kind=kind, address=address, layout=source, bucket_mib=arguments.bucket_mib)
    return {"source": to_dict(weights), "target": to_dict(target), "version": turn}


def _merged_digests(shares: list[dict[str, Any]], model: ModelConfig) -> dict[str, str]:
    from megatron_dagger.weights.verify.digest import merge

    decoded = []
    for rank in shares:
        decoded.append({name: (dtype, {(a, b): value for a, b, value in runs}) for name, (dtype, runs) in rank.items()})
    return merge(decoded, model)


def _report(times: Times, peaks: Peaks, bytes_ratio: float) -> None:
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{'':<24}{'seconds':>9}{'of which packing':>21}{'peak buckets':>14}")
    for name, seconds in medians.items():
        if name.endswith("packing"):
            continue
        packing = medians.get(f"{name} packing")
        peak = peaks.get(name)
        print(
            f"{name:<24}{seconds:>9.2f}{'' if packing is None else f'{packing:.2f}':>21}"
            f"{'' if peak is None else f'{peak:.2f}':>14}"
        )

    def worst(kind: str, limit: str) -> float:
        """Return the larger of the time ratios with one and with two workers."""
        return round(max(medians[f"{kind} {n}"] / medians[f"{limit} {n}"] for n in WORKERS), 2)

    final = {
        "bytes_ratio": bytes_ratio,
        "time_vs_memcpy": worst("shared_memory", "memcpy"),
        "time_vs_gloo": worst("p2p", "gloo"),
        "speedup_vs_hf_export": round(medians["export and reload"] / medians["shared_memory 1"], 2),
        "file_speedup_vs_hf_export": round(medians["export and reload"] / medians["checkpoint 1"], 2),
        "start_speedup_vs_export": round((medians["export"] + medians["stock start"]) / medians["start 1"], 2),
        "peak_extra_buckets": round(max(peak for name, peak in peaks.items() if name != "reload"), 2),
        "peak_extra_buckets_of_stock_reload": round(peaks["reload"], 2),
    }
    print("RESULT " + json.dumps(final))


def _gloo(arguments: argparse.Namespace, workers: int, moved: int) -> float:
    """Return the seconds of a gloo transfer of ``moved`` bytes between as many processes as a sync has."""
    from megatron_dagger.weights.transports.p2p import free_address

    order = json.dumps({"address": free_address(), "workers": workers, "moved": moved})
    with contextlib.ExitStack() as stack:
        ranks = [stack.enter_context(_process(arguments, f"gloo-{rank}")) for rank in range(SOURCES + workers)]
        for rank in ranks:
            rank.send(order)
        return max(float(rank.answer("MOVED")) for rank in ranks)


def _process(arguments: argparse.Namespace, worker: str) -> contextlib.AbstractContextManager[BenchProcess]:
    argv = [*sys.argv[1:], "--folder", str(arguments.folder), "--worker", worker]
    variables = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    return bench_process("tools.bench.weights", argv, DEADLINE_S, variables)


if __name__ == "__main__":
    sys.exit(main())
