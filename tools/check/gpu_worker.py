"""The checks of ``gpu_check``, run in a process of their own: ``gpu_checks.py FOLDER NAME...``.

FOLDER/settings.json says how large they are. Each check writes FOLDER/NAME.json when it has ended, well or not:
an error is written too, and the next check begins. Where it has left CUDA unusable the process ends, and whoever
started it starts another for the rest. Without a GPU (CUDA_VISIBLE_DEVICES="") the same checks run on the CPU.
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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_dagger.config import build  # noqa: E402
from megatron_dagger.store import atomic  # noqa: E402
from megatron_dagger.training.data import packing  # noqa: E402
from megatron_dagger.training.data.batches import BatchPlan, row_lengths  # noqa: E402
from megatron_dagger.training.data.flops import row_flops  # noqa: E402
from megatron_dagger.training.job import TrainJob  # noqa: E402
from megatron_dagger.training.metrics import read  # noqa: E402
from tools.check.gpu_cases import REFERENCES, VARIANTS, Settings, Variant  # noqa: E402
from tools.support import labelled_episodes  # noqa: E402

POISONED = 3  # exit status: what is left must run in another process


def curve(folder: Path, name: str, variant: Variant, size: Settings) -> dict[str, Any]:
    """A round of the product's own trainer, up to the checkpoint, its digests and its canary; then the next round
    begins with that checkpoint. ``resumed``: the loss there."""
    import torch

    from megatron_dagger.training.trainer import train

    model = size.small_moe if variant.moe else size.small
    episodes = labelled_episodes.make(64, seed=3, vocab_size=model.vocab_size, longest=size.small_tokens)
    first = TrainJob(
        round_index=0,
        seed=11,
        model=model,
        training=variant.settings(size.small_training(), cuda=torch.cuda.is_available()),
        output_dir=str(folder / name / "0"),
    )
    manifest = train(first, lambda: episodes)
    assert manifest is not None
    again = replace(
        first,
        round_index=1,
        training=replace(first.training, max_steps=2),
        output_dir=str(folder / name / "1"),
        init_checkpoint=str(folder / name / "0" / manifest["checkpoint"]),
    )
    train(again, lambda: episodes)
    losses, resumed = ([line["loss"] for line in read(folder / name / part / "metrics.jsonl")] for part in "01")
    atomic.remove_tree(folder / name)
    return {"losses": losses, "resumed": resumed[0], "digests": len(manifest["digests"])}


def speed(variant: Variant, size: Settings) -> dict[str, Any]:
    """Steps of the large model; nothing is saved. MFU counts the FLOPs of tokens that are no padding, once."""
    import torch

    from megatron_dagger.planning import GPUS, Assumptions
    from megatron_dagger.planning.memory import GIB, training_memory
    from megatron_dagger.training.engine import MegatronEngine
    from megatron_dagger.training.ranks import process_groups as parallel

    warmup, cuda = 4, torch.cuda.is_available()
    training = variant.settings(size.large_training(), cuda=cuda)
    episodes = labelled_episodes.make(48, seed=4, vocab_size=size.large.vocab_size, longest=size.large_tokens)
    data = packing.pack(episodes, training.sequence_length, packing=training.packing)
    flops = row_flops(data, size.large)
    plan = BatchPlan(rows=len(data.rows), rows_per_step=2, epochs=1e6, max_steps=None, seed=1, round_index=0)
    tokens = done = 0.0
    with parallel.process_groups(training.parallel, seed=1, deadline_s=120.0, threads=1) as device:
        engine = MegatronEngine(size.large, training, seed=1, device=device)
        for step in range(warmup + size.timed_steps):
            if step == warmup:
                _synchronise()
                began = time.monotonic()
            chosen = plan.rows_of(step)
            lengths = row_lengths(data.row_tokens[chosen], training)
            rows = [data.row(int(index), length) for index, length in zip(chosen, lengths, strict=True)]
            engine.step(rows, normaliser=float(data.row_weights[chosen].sum()), learning_rate=1e-5)
            if step >= warmup:
                tokens, done = tokens + float(data.row_tokens[chosen].sum()), done + float(flops[chosen].sum())
        _synchronise()
        seconds = time.monotonic() - began
        peak = torch.cuda.max_memory_allocated() / GIB if cuda else 0.0
    # what torch allocates: nothing reserved, nothing lost between allocations
    planned = training_memory(size.large, training, GPUS["h100"], Assumptions(fragmentation=0.0, reserve_gib=0.0), 0)
    return {
        "tokens_per_s": tokens / seconds,
        "tflops": done / seconds / 1e12,
        "peak_memory_gib": peak,
        "planned_memory_gib": planned.total / GIB,
    }


def attention(size: Settings) -> dict[str, Any]:
    """Block masks against attention run by run over rows of several lengths, outputs and, on a GPU, gradients.

    ``difference``: the largest, of the largest value, in BF16. ``compiled``: how often the kernel was. ``ms``, of
    the longest row forward and backward; ``causal_ms``: a plain causal pass over as many tokens.
    """
    from types import SimpleNamespace

    import torch

    from megatron_dagger.training.flex_attention import BLOCK, TreeFlexAttention, block_mask
    from megatron_dagger.training.local_modules import TreeAttention, tree_params

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    most, difference, began = size.attention_tokens, 0.0, time.monotonic()
    for length in (most // 2, most // 2 + BLOCK, most):
        episodes = labelled_episodes.make(12, seed=5, vocab_size=64, longest=max(256, length // 2), branches=0.3)
        row = packing.pack(episodes, length).row(0)
        params = tree_params(row, device)
        params.block_mask = block_mask(row, device)
        torch.manual_seed(1)
        inputs = [torch.randn(length, 1, heads, 128, device=device) for heads in (8, 2, 2)]

        def both(kind: Any, inputs: list[Any] = inputs, params: Any = params) -> list[Any]:
            own = [x.bfloat16().requires_grad_(cuda) for x in inputs]
            out = kind(SimpleNamespace(kv_channels=128), 1, None, "self")(*own, packed_seq_params=params)
            if cuda:
                out.float().square().sum().backward()
            return [out.detach(), *(x.grad for x in own if cuda)]

        sides = zip(both(TreeAttention), both(TreeFlexAttention), strict=True)
        difference = max(difference, *(float((a - b).abs().max() / a.abs().max()) for a, b in sides))

    def causal() -> None:
        q, k, v = (x.bfloat16().permute(1, 2, 0, 3).requires_grad_(cuda) for x in inputs)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        if cuda:
            out.float().square().sum().backward()

    result = {"difference": difference, "compiled": _graphs(), "compile_s": time.monotonic() - began}
    times = 10 if cuda else 1
    if cuda:
        causal()  # once, to choose its kernel
    return result | {
        "ms": _milliseconds(lambda: both(TreeFlexAttention), times),
        "causal_ms": _milliseconds(causal, times),
    }


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


def run(folder: Path, name: str, size: Settings) -> dict[str, Any]:
    kind, _, rest = name.partition("-")
    if kind == "attention":
        return attention(size)
    if kind == "bridge":
        import gpu_bridge

        return gpu_bridge.check(folder, size.large)
    if kind == "speed":
        return speed(VARIANTS[rest], size)
    return curve(folder, name, REFERENCES[name] if kind == "reference" else VARIANTS[rest], size)


def main() -> int:
    folder, *names = sys.argv[1:]
    size = build(Settings, json.loads((Path(folder) / "settings.json").read_text()))
    for name in names:
        began = time.monotonic()
        try:
            result: dict[str, Any] = run(Path(folder), name, size)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:500]}
            traceback.print_exc()
        result["seconds"] = time.monotonic() - began
        atomic.write_json(Path(folder) / f"{name}.json", result)
        if not _tidy():
            return POISONED
    return 0


def _tidy() -> bool:
    """Leave nothing to the next check; False where CUDA does not work any more."""
    import torch

    gc.collect()
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        FP8GlobalStateManager.reset()  # the scales of modules that are gone
    except ImportError:
        return True
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
