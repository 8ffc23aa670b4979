"""What it costs to bring the weights from the trainer's ranks to vLLM, next to the limits and to the usual way.

The model has the shape of Qwen3 and about 0.5B parameters. Two trainer ranks (tensor parallel) hold it,
processes with the tensors that Megatron's ranks would have; vLLM is the real one, with one worker and with
two, each worker a process. Everything that a sync does is in its time: filling buckets, the way, the digests of
all parameters on the engine's side, whatever vLLM does then. The limits are measured in the same run:

- a plain copy of the same bytes in memory, by one process, in pieces of a bucket;
- gloo point to point of the same bytes, between as many processes, in pieces of a bucket;
- the usual way: rank 0 (which here has all tensors already) writes Hugging Face safetensors, which vLLM
  reads again.

All are repeated, and medians compared. vLLM as it comes packs its linear layers for the CPU, in its own reload
too: how long is said beside. Our loader leaves them as they are, as they are on a GPU, and an update writes in
place. Peak memory is the worker's own (anonymous) while it takes the weights, less what it was before, in
buckets; of several workers the one counts that needs the most. The buffers of the host transport are the
trainer's, two a rank; the pages of a checkpoint's files are the kernel's.

    tools/bench/weights.py                     about 5 minutes, 12 GB of memory, 5 GB of disk
    tools/bench/weights.py --layers 4          a quick look
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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_dagger.config import ModelConfig, to_dict  # noqa: E402
from megatron_dagger.weights.blocks import ITEMSIZE  # noqa: E402
from megatron_dagger.weights.layouts import SourceLayout, TargetLayout  # noqa: E402
from megatron_dagger.weights.transports import TransferSpec, WeightSource, checkpoint_offer  # noqa: E402
from tools.bench.processes import Side, side  # noqa: E402
from tools.bench.weights_processes import SIDES, SOURCES, model_of, source_of  # noqa: E402

WORKERS = (1, 2)
DEADLINE_S = 300.0

Times = dict[str, list[float]]  # seconds of each turn, by what was measured
Peaks = dict[str, float]  # buckets


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


def bench(arguments: argparse.Namespace) -> None:
    model, source = model_of(arguments), source_of(model_of(arguments))
    (arguments.folder / "config.json").write_text(json.dumps(model.hf_config() | {"torch_dtype": arguments.dtype}))
    times: Times = {}
    peaks: Peaks = {}
    ratios: list[float] = []
    with contextlib.ExitStack() as stack:
        trainers = [stack.enter_context(_side(arguments, f"trainer-{rank}")) for rank in range(SOURCES)]
        shares = [json.loads(trainer.answer("READY")) for trainer in trainers]
        digests = _merged(shares, model)
        size = trainers[0].go("WROTE", "checkpoint")
        print(f"{int(size) / 1e9:.2f} GB of weights in {arguments.dtype}, {SOURCES} trainer ranks", flush=True)
        for workers in WORKERS:
            target = TargetLayout(tensor_parallel_size=workers)
            offer = WeightSource(kind="host", address="x", source=source, bucket_mib=arguments.bucket_mib)
            plan = TransferSpec(model=model, target=target, dtype=arguments.dtype, offer=offer).plan
            moved = plan.bytes_moved(ITEMSIZE[arguments.dtype])
            ratios.append(moved / plan.minimum_bytes(ITEMSIZE[arguments.dtype]))
            with _side(arguments, f"engine-{workers}") as engine:
                started = json.loads(engine.go("STARTED", json.dumps(digests)))
                times[f"start {workers}"] = [started["seconds"]]
                for turn in range(arguments.turns):
                    for kind in ("host", "live", "checkpoint"):
                        took = _sync(engine, trainers, _order(kind, arguments, model, source, target, turn))
                        _note(arguments, f"{kind} {workers}", took, times, peaks)
            for _ in range(arguments.turns):
                with _side(arguments, "copier") as copier:
                    times.setdefault(f"memcpy {workers}", []).append(float(copier.go("COPIED", str(moved))))
                times.setdefault(f"gloo {workers}", []).append(_gloo(arguments, workers, moved))
        _usual_way(arguments, trainers[0], times, peaks)
    _report(times, peaks, max(ratios))


def _sync(engine: Side, trainers: list[Side], order: dict[str, Any]) -> dict[str, float]:
    """Have the engine take what the order offers; what it took, as ``engine`` in weights_sides.py says it."""
    senders = trainers if order["offer"]["kind"] != "checkpoint" else []
    for trainer in senders:
        trainer.tell(json.dumps(order))
    took: dict[str, float] = json.loads(engine.go("SYNCED", json.dumps(order)))
    for trainer in senders:
        trainer.answer("SENT")
    return took


def _usual_way(arguments: argparse.Namespace, trainer: Side, times: Times, peaks: Peaks) -> None:
    times["export"] = [float(trainer.go("EXPORTED", "export"))]
    with _side(arguments, "stock") as stock:
        times["stock start"] = [json.loads(stock.go("STARTED", "start"))["seconds"]]
        for _ in range(arguments.turns):
            exported = float(trainer.go("EXPORTED", "export"))
            took = json.loads(stock.go("RELOADED", "reload"))
            _note(arguments, "reload", took, times, peaks)
            times.setdefault("export and reload", []).append(exported + took["seconds"])
            times["export"].append(exported)


def _note(arguments: argparse.Namespace, name: str, took: dict[str, float], times: Times, peaks: Peaks) -> None:
    times.setdefault(name, []).append(took["seconds"])
    times.setdefault(f"{name} packing", []).append(took["packing"])
    peaks[name] = max(peaks.get(name, 0.0), took["peak_bytes"] / (arguments.bucket_mib << 20))


def _order(
    kind: str, arguments: argparse.Namespace, model: ModelConfig, source: SourceLayout, target: TargetLayout, turn: int
) -> dict[str, Any]:
    from megatron_dagger.weights.transports.p2p import free_address

    if kind == "checkpoint":
        offer = checkpoint_offer(arguments.folder / "checkpoint", model)
    else:
        address = str(arguments.folder) if kind == "host" else free_address()
        offer = WeightSource(kind=kind, address=address, source=source, bucket_mib=arguments.bucket_mib)  # type: ignore[arg-type]
    return {"offer": to_dict(offer), "target": to_dict(target), "version": turn}


def _merged(shares: list[dict[str, Any]], model: ModelConfig) -> dict[str, str]:
    from megatron_dagger.weights.verify.digest import merge

    found = []
    for rank in shares:
        found.append({name: (dtype, {(a, b): value for a, b, value in runs}) for name, (dtype, runs) in rank.items()})
    return merge(found, model)


def _report(times: Times, peaks: Peaks, bytes_ratio: float) -> None:
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{'':<24}{'seconds':>9}{'of these vLLM packs':>21}{'peak buckets':>14}")
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
        """Of one and two workers, the larger ratio to the limit."""
        return round(max(medians[f"{kind} {n}"] / medians[f"{limit} {n}"] for n in WORKERS), 2)

    final = {
        "bytes_ratio": bytes_ratio,
        "time_vs_memcpy": worst("host", "memcpy"),
        "time_vs_gloo": worst("live", "gloo"),
        "speedup_vs_hf_export": round(medians["export and reload"] / medians["host 1"], 2),
        "file_speedup_vs_hf_export": round(medians["export and reload"] / medians["checkpoint 1"], 2),
        "start_speedup_vs_export": round((medians["export"] + medians["stock start"]) / medians["start 1"], 2),
        "peak_extra_buckets": round(max(peak for name, peak in peaks.items() if name != "reload"), 2),
        "peak_extra_buckets_of_stock_reload": round(peaks["reload"], 2),
    }
    print("RESULT " + json.dumps(final))


def _gloo(arguments: argparse.Namespace, workers: int, moved: int) -> float:
    """The seconds that gloo needs for the bytes, as many processes as the transfer has, nothing else done."""
    from megatron_dagger.weights.transports.p2p import free_address

    order = json.dumps({"address": free_address(), "workers": workers, "moved": moved})
    with contextlib.ExitStack() as stack:
        ranks = [stack.enter_context(_side(arguments, f"gloo-{rank}")) for rank in range(SOURCES + workers)]
        for rank in ranks:
            rank.tell(order)
        return max(float(rank.answer("MOVED")) for rank in ranks)


def _side(arguments: argparse.Namespace, worker: str) -> contextlib.AbstractContextManager[Side]:
    given = [*sys.argv[1:], "--folder", str(arguments.folder), "--worker", worker]
    return side(given, DEADLINE_S, {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"})


if __name__ == "__main__":
    sys.exit(main())
