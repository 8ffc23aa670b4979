"""Measure training tokens per second against plain Hugging Face Transformers, on episodes of uneven length.

Both train the same Qwen3 model in fp32 on the same samples, with the same number of threads and about as many tokens
in an optimizer step. Only real tokens count, no padding. The Transformers loop is the usual one: batches padded to
their longest sample (hf_padded), SDPA, fused AdamW, gradient clipping. It is measured with batches of one sample too
(hf_single), its best case, since nothing is padded. Each runs in its own process, and they take turns.

    .venv/bin/python -m tools.bench.training                           about two minutes
    .venv/bin/python -m tools.bench.training --layouts dp2,tp2,pp2     the trainer under parallel layouts as well

The last line is ``RESULT {json}``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dagger.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_dagger.training.data import batches, packing
from megatron_dagger.training.data.episode_file import save_episodes
from megatron_dagger.training.job import TrainJob
from megatron_dagger.training.metrics import read_steps
from megatron_dagger.training.ranks.launch import launch
from tools.bench.processes import ROOT, BenchProcess, bench_process
from tools.support import labelled_episodes

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"world_size": 2},
    "tp2": {"world_size": 2, "tensor_model_parallel_size": 2},
    "pp2": {"world_size": 2, "pipeline_model_parallel_size": 2},
    "tp2_pp2": {"world_size": 4, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
}
BATCH_TOKENS = 8192
PADDED_BATCH = 8
DEADLINE_S = 600.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of each process (default %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="measurements of each (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of one measurement (default %(default)s)")
    parser.add_argument(
        "--sequence-length", type=int, default=2048, help="tokens of a packed row (default %(default)s)"
    )
    parser.add_argument("--episodes", type=int, default=64, help="episodes in the data (default %(default)s)")
    parser.add_argument("--layouts", default="", help=f"parallel layouts to measure as well: {','.join(LAYOUTS)}")
    parser.add_argument("--worker", choices=list(WORKERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _serve(arguments)
        return 0
    data = _data(arguments)
    speeds, per_cpu = _take_turns(arguments)
    for name in filter(None, arguments.layouts.split(",")):
        speeds[name] = _layout(arguments, name)
    ours, padded, single = (speeds[name] for name in WORKERS)
    fill = data.fill(_training(arguments).row_multiple)
    shares = dict.fromkeys(speeds, fill)
    shares |= {"hf_padded": _padded_fill(arguments, data), "hf_single": 1.0}
    print(f"{'trainer':<12}{'tokens/s':>10}{'per CPU s':>11}{'to hf_padded':>14}{'real tokens':>13}")
    for name, speed in speeds.items():
        cpu = f"{per_cpu[name]:.0f}" if name in per_cpu else ""
        share = f"{shares[name]:.0%}"
        print(f"{name:<12}{speed:>10.0f}{cpu:>11}{speed / padded:>14.2f}{share:>13}")
    result = {
        "tokens_per_s": round(ours, 1),
        "hf_tokens_per_s": round(padded, 1),
        "hf_unpadded_tokens_per_s": round(single, 1),
        "ratio_to_hf": round(ours / padded, 3),
        "ratio_to_hf_unpadded": round(ours / single, 3),
        "ratio_to_hf_per_cpu_s": round(per_cpu["megatron"] / per_cpu["hf_padded"], 3),
        "ratio_to_hf_unpadded_per_cpu_s": round(per_cpu["megatron"] / per_cpu["hf_single"], 3),
        "layout_tokens_per_s": {name: round(speeds[name], 1) for name in speeds if name in LAYOUTS},
        "threads": arguments.threads,
        "fill": round(fill, 4),
        "hf_fill": round(shares["hf_padded"], 4),
        "label_share": round(data.label_tokens / data.tokens, 4),
        "sequence_length": arguments.sequence_length,
    }
    print("RESULT " + json.dumps(result))
    return 0


def _episodes(arguments: argparse.Namespace) -> list[Any]:
    vocab_size, longest = ModelConfig().vocab_size, arguments.sequence_length
    return labelled_episodes.make(arguments.episodes, seed=7, vocab_size=vocab_size, longest=longest)


def _data(arguments: argparse.Namespace) -> packing.PackedDataset:
    return packing.pack(_episodes(arguments), arguments.sequence_length, packing="separate")


def _training(arguments: argparse.Namespace, **parallel: Any) -> TrainingConfig:
    return TrainingConfig(
        parallel=ParallelConfig(**parallel),
        sequence_length=arguments.sequence_length,
        global_batch_tokens=max(BATCH_TOKENS, arguments.sequence_length),
        epochs=1000.0,
        threads_per_process=arguments.threads if not parallel else 1,
        deadline_s=DEADLINE_S,
    )


# ---- the measured trainers, each in its own process


def _megatron(arguments: argparse.Namespace) -> Iterator[int]:
    """Train with this project's engine; yield the real tokens of each optimizer step."""
    from megatron_dagger.training import compat
    from megatron_dagger.training.engine import MegatronEngine
    from megatron_dagger.training.ranks.process_groups import process_groups

    compat.quiet()
    data, training = _data(arguments), _training(arguments)
    plan = batches.BatchPlan(
        groups=len(data.groups),
        groups_per_step=training.micro_batches,
        epochs=training.epochs,
        max_steps=None,
        seed=1,
        round_index=0,
    )
    with process_groups(training.parallel, seed=1, timeout_s=DEADLINE_S, threads=arguments.threads) as device:
        engine = MegatronEngine(ModelConfig(), training, seed=1, device=device)
        for step in range(plan.steps):
            rows = data.rows_of(plan.groups_of(step))
            engine.step(
                [
                    data.row(i, n)
                    for i, n in zip(rows, batches.row_lengths(data.row_tokens[rows], training), strict=True)
                ],
                normaliser=float(data.row_weights[rows].sum()),
                learning_rate=1e-4,
            )
            yield int(data.row_tokens[rows].sum())


def _hugging_face(arguments: argparse.Namespace, batch: int) -> Iterator[int]:
    """Train with Transformers, ``batch`` samples in a padded micro-batch; yield the real tokens of each step."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.set_num_threads(arguments.threads)
    model = Qwen3ForCausalLM(Qwen3Config(**ModelConfig().hf_config(), use_cache=False))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    for group in _padded_batches(_data(arguments), batch, arguments.sequence_length):
        items = sum(int((labels[:, 1:] != -100).sum()) for _, _, labels, _ in group)
        for tokens, mask, labels, _ in group:
            model(
                input_ids=torch.from_numpy(tokens),
                attention_mask=torch.from_numpy(mask),
                labels=torch.from_numpy(labels),
                num_items_in_batch=items,
            ).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield sum(real for _, _, _, real in group)


def _padded_batches(data: packing.PackedDataset, batch: int, row: int) -> Iterator[list[Any]]:
    """Yield endless optimizer steps: lists of padded micro-batches (tokens, attention mask, labels, real tokens)."""
    rng, group, total = np.random.default_rng(1), [], 0
    while True:
        order = rng.permutation(len(data.samples))
        for chosen in np.split(order, range(batch, len(order), batch)):
            samples = [data.samples[index] for index in chosen]
            longest = max(len(sample.trunk) for sample in samples)
            tokens = np.zeros((len(samples), longest), np.int64)
            mask, labels = np.zeros_like(tokens), np.full_like(tokens, -100)
            for i, sample in enumerate(samples):
                text, weights = sample.trunk, sample.trunk_weights()
                tokens[i, : len(text)], mask[i, : len(text)] = text, 1
                labels[i, : len(text)] = np.where(weights > 0, text, -100)
            group.append((tokens, mask, labels, sum(sample.length for sample in samples)))
            total += group[-1][-1]
            if total >= max(BATCH_TOKENS, row):
                yield group
                group, total = [], 0


WORKERS: dict[str, Callable[[argparse.Namespace], Iterator[int]]] = {
    "megatron": _megatron,
    "hf_padded": lambda arguments: _hugging_face(arguments, PADDED_BATCH),
    "hf_single": lambda arguments: _hugging_face(arguments, 1),
}


def _serve(arguments: argparse.Namespace) -> None:
    """Warm up; then for each line of standard input train for a while and print tokens, seconds and CPU seconds."""
    steps = WORKERS[arguments.worker](arguments)
    next(steps)
    print("READY", flush=True)
    for _ in sys.stdin:
        began, cpu, tokens = time.monotonic(), time.process_time(), 0
        while time.monotonic() - began < arguments.seconds:
            tokens += next(steps)
        print(f"TOKENS {tokens} {time.monotonic() - began} {time.process_time() - cpu}", flush=True)


# ---- measuring


def _take_turns(arguments: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """Return each trainer's median tokens per second, and per second of CPU time."""
    variables = {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    speeds: dict[str, list[float]] = {name: [] for name in WORKERS}
    per_cpu: dict[str, list[float]] = {name: [] for name in WORKERS}
    with ExitStack() as stack:
        processes: dict[str, BenchProcess] = {}
        for name in WORKERS:
            argv = [*sys.argv[1:], "--worker", name]
            process = bench_process("tools.bench.training", argv, DEADLINE_S, variables)
            processes[name] = stack.enter_context(process)
            processes[name].answer("READY")
        for _ in range(arguments.turns):
            for name, running in processes.items():
                tokens, seconds, cpu_seconds = map(float, running.ask("TOKENS").split())
                speeds[name].append(tokens / seconds)
                per_cpu[name].append(tokens / cpu_seconds)
    median = statistics.median
    return {k: median(v) for k, v in speeds.items()}, {k: median(v) for k, v in per_cpu.items()}


def _layout(arguments: argparse.Namespace, name: str) -> float:
    """Return the tokens per second of a run's trainer under a parallel layout, without its first two steps."""
    with tempfile.TemporaryDirectory(prefix="bench-training-") as temporary:
        folder = Path(temporary)
        training = _training(arguments, **LAYOUTS[name])
        training = TrainingConfig(**{**vars(training), "max_steps": 10})
        job = TrainJob(round_index=0, seed=1, model=ModelConfig(), training=training, output_dir=str(folder / "train"))
        job.save(folder / "job.json")
        save_episodes(folder / "episodes.npz", _episodes(arguments))
        launch(
            ["megatron_dagger.training", str(folder / "episodes.npz"), str(folder / "job.json")],
            training.parallel,
            folder / "logs",
            DEADLINE_S,
            env={"PYTHONPATH": str(ROOT)},
        )
        lines = read_steps(folder / "train" / "metrics.jsonl")[2:]
    return sum(line["tokens"] for line in lines) / sum(line["step_s"] for line in lines)


def _padded_fill(arguments: argparse.Namespace, data: packing.PackedDataset) -> float:
    """Return the share of real tokens in the padded batches."""
    steps = _padded_batches(data, PADDED_BATCH, arguments.sequence_length)
    groups = [next(steps) for _ in range(20)]
    positions = sum(tokens.shape[0] * (tokens.shape[1] - 1) for group in groups for tokens, *_ in group)
    return sum(real for group in groups for *_, real in group) / positions


if __name__ == "__main__":
    sys.exit(main())
