"""A process that runs checks of tools.check.gpu: ``python -m tools.check.gpu_worker FOLDER NAME...``.

FOLDER/settings.json has the sizes. Each check writes FOLDER/NAME.json when it ends, with its result or its error, and
the next one begins. If a check leaves CUDA unusable the process exits with POISONED, and its parent starts another for
the remaining checks. Without a GPU (CUDA_VISIBLE_DEVICES="") the same checks run on the CPU.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_dagger.config import build
from megatron_dagger.store import atomic
from megatron_dagger.training.data import packing
from megatron_dagger.training.data.batches import BatchPlan, row_lengths
from megatron_dagger.training.data.flops import row_flops
from megatron_dagger.training.job import TrainJob
from megatron_dagger.training.metrics import read_steps
from tools.check.gpu_cases import REFERENCES, VARIANTS, Sizes, Variant
from tools.support import labelled_episodes

POISONED = 3  # exit code: CUDA is unusable in this process


def curve(folder: Path, name: str, variant: Variant, sizes: Sizes) -> dict[str, Any]:
    """Train a round with the trainer of real runs, checkpoint included, then start the next round from the checkpoint.

    Returns the losses of the round and, as ``resumed``, the first loss of the next.
    """
    import torch

    from megatron_dagger.training.trainer import train_round

    model = sizes.small_moe if variant.moe else sizes.small
    episodes = labelled_episodes.make(64, seed=3, vocab_size=model.vocab_size, longest=sizes.small_tokens)
    first_job = TrainJob(
        round_index=0,
        seed=11,
        model=model,
        training=variant.settings(sizes.small_training(), cuda=torch.cuda.is_available()),
        output_dir=str(folder / name / "0"),
    )
    manifest = train_round(first_job, lambda: episodes)
    assert manifest is not None
    next_job = replace(
        first_job,
        round_index=1,
        training=replace(first_job.training, max_steps=2),
        output_dir=str(folder / name / "1"),
        init_checkpoint=str(folder / name / "0" / manifest["checkpoint"]),
    )
    train_round(next_job, lambda: episodes)
    losses, resumed = ([line["loss"] for line in read_steps(folder / name / part / "metrics.jsonl")] for part in "01")
    atomic.remove_tree(folder / name)
    return {"losses": losses, "resumed": resumed[0], "digests": len(manifest["digests"])}


def speed(variant: Variant, sizes: Sizes) -> dict[str, Any]:
    """Time steps of the large model. FLOPs are those of tokens without padding; recomputation does not count."""
    import torch

    from megatron_dagger.planning import GPUS, Assumptions
    from megatron_dagger.planning.memory import GIB, training_memory
    from megatron_dagger.training.engine import MegatronEngine
    from megatron_dagger.training.ranks.process_groups import process_groups

    warmup, cuda = 4, torch.cuda.is_available()
    training = variant.settings(sizes.large_training(), cuda=cuda)
    episodes = labelled_episodes.make(48, seed=4, vocab_size=sizes.large.vocab_size, longest=sizes.large_tokens)
    data = packing.pack(episodes, training.sequence_length, packing=training.packing)
    flops = row_flops(data, sizes.large)
    plan = BatchPlan(groups=len(data.groups), groups_per_step=2, epochs=1e6, max_steps=None, seed=1, round_index=0)
    tokens = total_flops = 0.0
    with process_groups(training.parallel, seed=1, timeout_s=120.0, threads=1) as device:
        engine = MegatronEngine(sizes.large, training, seed=1, device=device)
        for step in range(warmup + sizes.timed_steps):
            if step == warmup:
                _synchronise()
                began = time.monotonic()
            chosen = data.rows_of(plan.groups_of(step))
            lengths = row_lengths(data.row_tokens[chosen], training)
            rows = [data.row(int(index), length) for index, length in zip(chosen, lengths, strict=True)]
            engine.step(rows, normaliser=float(data.row_weights[chosen].sum()), learning_rate=1e-5)
            if step >= warmup:
                tokens += float(data.row_tokens[chosen].sum())
                total_flops += float(flops[chosen].sum())
        _synchronise()
        seconds = time.monotonic() - began
        peak = torch.cuda.max_memory_allocated() / GIB if cuda else 0.0
    # torch's own allocations: without reserve and fragmentation
    planned = training_memory(sizes.large, training, GPUS["h100"], Assumptions(fragmentation=0.0, reserve_gib=0.0), 0)
    return {
        "tokens_per_s": tokens / seconds,
        "tflops": total_flops / seconds / 1e12,
        "peak_memory_gib": peak,
        "planned_memory_gib": planned.total / GIB,
    }


def attention(sizes: Sizes) -> dict[str, Any]:
    """Compare attention by block masks with TreeAttention: outputs and, on a GPU, gradients, for rows of three lengths.

    Returns ``difference``, the largest difference in BF16 relative to the largest value; ``compiled``, the number of
    compilations of the kernel; ``compile_s``, the seconds of all comparisons; ``ms``, of a forward and backward pass
    over the longest row; ``causal_ms``, of a causal pass over as many tokens.
    """
    from types import SimpleNamespace

    import torch

    from megatron_dagger.training.flex_attention import BLOCK, TreeFlexAttention, block_mask
    from megatron_dagger.training.tree_attention import TreeAttention, tree_params

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    longest, difference, began = sizes.attention_tokens, 0.0, time.monotonic()
    for length in (longest // 2, longest // 2 + BLOCK, longest):
        episodes = labelled_episodes.make(12, seed=5, vocab_size=64, longest=max(256, length // 2), branches=0.3)
        row = packing.pack(episodes, length).row(0)
        params = tree_params(row, device)
        params.block_mask = block_mask(row, device)
        torch.manual_seed(1)
        inputs = [torch.randn(length, 1, heads, 128, device=device) for heads in (8, 2, 2)]

        def run_pass(kind: Any, inputs: list[Any] = inputs, params: Any = params) -> list[Any]:
            leaves = [x.bfloat16().requires_grad_(cuda) for x in inputs]
            out = kind(SimpleNamespace(kv_channels=128), 1, None, "self")(*leaves, packed_seq_params=params)
            if cuda:
                out.float().square().sum().backward()
            return [out.detach(), *(x.grad for x in leaves if cuda)]

        pairs = zip(run_pass(TreeAttention), run_pass(TreeFlexAttention), strict=True)
        difference = max(difference, *(float((a - b).abs().max() / a.abs().max()) for a, b in pairs))

    def causal() -> None:
        q, k, v = (x.bfloat16().permute(1, 2, 0, 3).requires_grad_(cuda) for x in inputs)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        if cuda:
            out.float().square().sum().backward()

    result = {"difference": difference, "compiled": _graphs(), "compile_s": time.monotonic() - began}
    times = 10 if cuda else 1
    if cuda:
        causal()  # a warm-up: PyTorch chooses the kernel
    return result | {
        "ms": _milliseconds(lambda: run_pass(TreeFlexAttention), times),
        "causal_ms": _milliseconds(causal, times),
    }


def ranks(folder: Path) -> dict[str, Any]:
    """Let a rank on each GPU add up by NCCL (on the CPU two, by gloo), started as a training starts them."""
    import torch

    from megatron_dagger.config import ParallelConfig, to_dict
    from megatron_dagger.driver.doctor.ranks import PROGRAM
    from megatron_dagger.training.ranks.launch import launch

    parallel = ParallelConfig(world_size=torch.cuda.device_count() or 2)
    launch([PROGRAM, json.dumps(to_dict(parallel)), str(folder)], parallel, folder / "ranks", 120.0)
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text())
    return {"ranks": parallel.world_size, "gib_per_s": answer["gib_per_s"]}


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _milliseconds(call: Any, times: int) -> float:
    _synchronise()
    began = time.monotonic()
    for _ in range(times):
        call()
    _synchronise()
    return (time.monotonic() - began) / times * 1e3


def _synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run(folder: Path, name: str, sizes: Sizes) -> dict[str, Any]:
    kind, _, rest = name.partition("-")
    if kind == "attention":
        return attention(sizes)
    if kind == "bridge":
        from tools.check import gpu_weights

        return gpu_weights.check(folder, sizes.large)
    if kind == "serve":
        from tools.check import gpu_serve

        return gpu_serve.check(folder, VARIANTS[rest], sizes)
    if kind == "ranks":
        return ranks(folder)
    if kind == "speed":
        return speed(VARIANTS[rest], sizes)
    return curve(folder, name, REFERENCES[name] if kind == "reference" else VARIANTS[rest], sizes)


def main() -> int:
    folder, *names = sys.argv[1:]
    sizes = build(Sizes, json.loads((Path(folder) / "settings.json").read_text()))
    for name in names:
        began = time.monotonic()
        try:
            result: dict[str, Any] = run(Path(folder), name, sizes)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:500]}
            traceback.print_exc()
        result["seconds"] = time.monotonic() - began
        atomic.write_json(Path(folder) / f"{name}.json", result)
        if not _clean_up():
            return POISONED
    return 0


def _clean_up() -> bool:
    """Free what a check has left on the GPU; return False if CUDA no longer works."""
    import torch

    gc.collect()
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        FP8GlobalStateManager.reset()  # the scales of freed modules
    except ImportError:
        return True
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
