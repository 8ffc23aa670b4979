"""Checks training on one CUDA GPU: losses of every precision against the fp32 CPU path, speed and memory.

Attention: the compiled block mask's output and gradients against attention run by run, over the same row.
Losses: a small model is trained for some hundred steps, on the CPU in fp32 and on the GPU in fp32, BF16,
the FP8 recipes and the options of these, from the same seed on the same episodes, labels sharing their
prefix; the curves are compared step by step. Speed: a model of Qwen3's shape is trained in BF16 and FP8;
tokens per second, FP8's over BF16's, the share of the GPU's peak (model FLOPs, nothing recomputed counted
twice), and peak memory, against the planner's figure.
Each training is the product's own worker in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np  # noqa: E402
import synthetic_episodes  # noqa: E402

from megatron_dagger.config import ModelConfig, OptimizerConfig, Packing, Precision, TrainingConfig  # noqa: E402
from megatron_dagger.planning import GPUS, Assumptions  # noqa: E402
from megatron_dagger.planning.memory import GIB, training_memory  # noqa: E402
from megatron_dagger.training import packing  # noqa: E402
from megatron_dagger.training.cost import row_flops  # noqa: E402
from megatron_dagger.training.episode_file import load_episodes, save_episodes  # noqa: E402
from megatron_dagger.training.job import TrainJob  # noqa: E402
from megatron_dagger.training.metrics import read  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Settings to train with; ``limit``: the largest mean difference of the loss, as a share of it."""

    precision: Precision
    limit: float  # for rounding to 24, 8 and 4 bits of mantissa
    packing: Packing = "shared_prefix"
    moe: bool = False
    speed: bool = False  # measured with the large model too
    training: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)

    def settings(self, training: TrainingConfig) -> TrainingConfig:
        optimizer = replace(training.optimizer, **self.optimizer)
        return replace(training, precision=self.precision, packing=self.packing, optimizer=optimizer, **self.training)


VARIANTS = {
    "fp32": Variant(precision="fp32", limit=1e-3),
    "bf16": Variant(precision="bf16", limit=0.02, speed=True),
    "bf16_separate": Variant(precision="bf16", limit=0.02, packing="separate"),  # Transformer Engine's attention
    "bf16_moments": Variant(precision="bf16", limit=0.02, optimizer={"moments": "bf16"}),
    "bf16_offload": Variant(precision="bf16", limit=0.02, optimizer={"cpu_offload_fraction": 1.0}),
    "bf16_recompute": Variant(precision="bf16", limit=0.02, training={"recompute": "full"}),
    "fp8_delayed": Variant(precision="fp8_delayed", limit=0.05, speed=True),
    "fp8_tensorwise": Variant(precision="fp8_tensorwise", limit=0.05, speed=True),
    "fp8_blockwise": Variant(precision="fp8_blockwise", limit=0.05, speed=True),
    "fp8_tensorwise_ends": Variant(precision="fp8_tensorwise", limit=0.05, training={"bf16_layers_at_ends": 1}),
    "fp8_tensorwise_gather": Variant(precision="fp8_tensorwise", limit=0.05, training={"fp8_param_gather": True}),
    "moe_bf16": Variant(precision="bf16", limit=0.02, moe=True),
    "moe_fp8_blockwise": Variant(precision="fp8_blockwise", limit=0.05, moe=True),
}
ATTENTION_LIMIT = 0.02  # of the largest value, in BF16
# Dense peak in TFLOP/s (NVIDIA's data sheets, without sparsity): BF16, FP8.
PEAKS = {"H100 PCIe": (756, 1513), "H100": (989, 1979), "H200": (989, 1979), "A100": (312, 312)}
SMALL = ModelConfig(
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=768,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=64,
    vocab_size=1024,
)
SMALL_MOE = replace(SMALL, family="qwen3_moe", num_moe_experts=8, moe_ffn_hidden_size=256)
LARGE = {
    "1.7b": ModelConfig(
        num_layers=28,
        hidden_size=2048,
        ffn_hidden_size=6144,
        num_attention_heads=16,
        num_query_groups=8,
        kv_channels=128,
        vocab_size=151936,
        max_position_embeddings=40960,
    ),
    "4b": ModelConfig(
        num_layers=36,
        hidden_size=2560,
        ffn_hidden_size=9728,
        num_attention_heads=32,
        num_query_groups=8,
        kv_channels=128,
        vocab_size=151936,
        max_position_embeddings=40960,
    ),
}
# What makes room for it in 80 GB, as the planner says.
ROOM: dict[str, dict[str, Any]] = {
    "1.7b": {},
    "4b": {"recompute": "full", "optimizer": OptimizerConfig(moments="bf16")},
}
SPEED_STEPS, WARMUP_STEPS = 25, 5


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one training gave: its losses, and its speed after the warm-up."""

    losses: np.ndarray
    tokens_per_s: float
    flops_per_s: float
    peak_memory_mib: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="steps of the loss curves (default 300)")
    parser.add_argument("--model", choices=list(LARGE), default="1.7b", help="for the speed (default 1.7b)")
    parser.add_argument("--sequence-length", type=int, default=16384, help="of the speed's rows (default 16384)")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated (default %(default)s)")
    parser.add_argument("--peak-tflops", type=float, help="the GPU's dense BF16 peak, if it is not known here")
    parser.add_argument("--deadline", type=float, default=1800.0, help="seconds for one training")
    arguments = parser.parse_args()
    names = arguments.variants.split(",")
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        parser.error(f"unknown variant {unknown[0]}; there are {', '.join(VARIANTS)}")
    device = _device(names)
    if isinstance(device, int):
        return device
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder:
        result = _check(Path(folder), arguments, names, device)
    print("RESULT " + json.dumps(result))
    return int(not result["ok"])


def _device(names: list[str]) -> str | int:
    """The GPU's name, or the exit status after saying what is missing."""
    import importlib.util

    import torch

    if not torch.cuda.is_available():
        print("gpu_check needs one CUDA GPU, and torch sees none here", file=sys.stderr)
        return 2
    missing = importlib.util.find_spec("transformer_engine") is None
    if missing and any(name != "fp32" for name in names):
        print(
            "gpu_check needs Transformer Engine for BF16 and FP8 (package transformer_engine)",
            file=sys.stderr,
        )
        return 2
    if any("fp8" in name for name in names) and torch.cuda.get_device_capability() < (8, 9):
        print(f"{torch.cuda.get_device_name()} has no FP8; choose --variants fp32,bf16", file=sys.stderr)
        return 2
    return str(torch.cuda.get_device_name())


def _check(folder: Path, arguments: argparse.Namespace, names: list[str], device: str) -> dict[str, Any]:
    model, length = LARGE[arguments.model], arguments.sequence_length
    for name, episodes in {
        "small": synthetic_episodes.make(64, seed=3, vocab_size=SMALL.vocab_size, longest=512),
        "large": synthetic_episodes.make(48, seed=4, vocab_size=model.vocab_size, longest=length),
    }.items():
        save_episodes(folder / f"{name}.npz", episodes)
    common: dict[str, Any] = {"epochs": 1e6, "checkpoint_interval": 10**9, "deadline_s": arguments.deadline}
    curves = TrainingConfig(
        sequence_length=512,
        global_batch_tokens=4096,
        max_steps=arguments.steps,
        threads_per_process=os.cpu_count() or 1,
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=20),
        **common,
    )
    room = ROOM[arguments.model]
    speed = TrainingConfig(
        sequence_length=length, global_batch_tokens=4 * length, max_steps=SPEED_STEPS, **common, **room
    )
    attention = _attention_difference()
    print(f"{device}; attention by block mask differs by {attention:.2e} (limit {ATTENTION_LIMIT:.0e})")
    print(
        f"{'variant':<22}{'last loss':>10}{'difference':>12}{'limit':>8}"
        f"{'tokens/s':>11}{'TFLOP/s':>9}{'of peak':>9}{'GiB':>7}{'planned':>9}"
    )
    references: dict[str, Outcome] = {}
    results: dict[str, Any] = {}
    for name in names:
        variant = VARIANTS[name]
        small, on_cpu = (SMALL_MOE if variant.moe else SMALL), f"small-cpu-{variant.packing}-{variant.moe}"
        if on_cpu not in references:
            plain = replace(VARIANTS["fp32"], packing=variant.packing)
            references[on_cpu] = _train(folder, on_cpu, small, plain, curves, gpu=False)
        reference = references[on_cpu]
        curve = _train(folder, f"small-{name}", small, variant, curves, gpu=True)
        difference = float(np.abs(curve.losses - reference.losses).mean() / reference.losses.mean())
        entry: dict[str, Any] = {"last_loss": float(curve.losses[-1]), "loss_difference": difference}
        line = f"{name:<22}{curve.losses[-1]:>10.4f}{difference:>12.2e}{variant.limit:>8.0e}"
        if variant.speed:
            fast = _train(folder, f"large-{name}", model, variant, speed, gpu=True)
            peak = _peak(device, variant.precision, arguments.peak_tflops)
            entry |= {
                "tokens_per_s": fast.tokens_per_s,
                "tflops": fast.flops_per_s / 1e12,
                "peak_share": fast.flops_per_s / (peak * 1e12) if peak else None,
                "peak_memory_gib": fast.peak_memory_mib / 1024,
                "planned_memory_gib": _planned_gib(model, variant.settings(speed)),
            }
            shown = f"{entry['peak_share']:.1%}" if peak else "unknown"
            line += f"{fast.tokens_per_s:>11.0f}{entry['tflops']:>9.0f}{shown:>9}"
            line += f"{entry['peak_memory_gib']:>7.1f}{entry['planned_memory_gib']:>9.1f}"
        print(line, flush=True)
        results[name] = entry
    learned = all(r.losses[-10:].mean() < 0.7 * r.losses[:10].mean() for r in references.values())
    close = all(results[name]["loss_difference"] <= VARIANTS[name].limit for name in results)
    return {
        "device": device,
        "steps": arguments.steps,
        "model": arguments.model,
        "sequence_length": length,
        "attention_difference": attention,
        "variants": results,
        "fp8_over_bf16": _over_bf16(results),
        "ok": bool(learned and close and attention <= ATTENTION_LIMIT),
    }


def _over_bf16(results: dict[str, Any]) -> dict[str, float]:
    """Each FP8 recipe's tokens per second over BF16's."""
    speeds = {name: entry["tokens_per_s"] for name, entry in results.items() if "tokens_per_s" in entry}
    bf16 = speeds.pop("bf16", None)
    return {name: value / bf16 for name, value in speeds.items()} if bf16 else {}


def _planned_gib(model: ModelConfig, training: TrainingConfig) -> float:
    """The planner's peak of what torch allocates: nothing reserved, nothing lost between allocations."""
    assumed = Assumptions(fragmentation=0.0, reserve_gib=0.0)
    return training_memory(model, training, GPUS["h100"], assumed, 0).total / GIB


def _attention_difference() -> float:
    """The largest difference of output and gradients, of the largest value, in BF16 on one packed row."""
    from types import SimpleNamespace

    import torch

    from megatron_dagger.training.flex_attention import TreeFlexAttention, block_mask
    from megatron_dagger.training.local_modules import TreeAttention, tree_params

    length, device = 4096, torch.device("cuda")
    episodes = synthetic_episodes.make(12, seed=5, vocab_size=64, longest=length // 2, branches=0.3)
    row = packing.pack(episodes, length).row(0)
    params = tree_params(row, device)
    params.block_mask = block_mask(row, device)
    torch.manual_seed(1)
    inputs = [torch.randn(length, 1, heads, 128, device=device) for heads in (8, 2, 2)]
    sides = []
    for kind in (TreeAttention, TreeFlexAttention):
        own = [x.bfloat16().requires_grad_() for x in inputs]
        out = kind(SimpleNamespace(kv_channels=128), 1, None, "self")(*own, packed_seq_params=params)
        out.float().square().sum().backward()
        sides.append([out.detach(), *(x.grad for x in own)])
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*sides, strict=True))


def _train(
    folder: Path, name: str, model: ModelConfig, variant: Variant, training: TrainingConfig, *, gpu: bool
) -> Outcome:
    """Train in a process of its own; without ``gpu`` the process sees none and takes the CPU path."""
    settings, data = variant.settings(training), folder / f"{name.partition('-')[0]}.npz"
    job = TrainJob(round_index=0, seed=11, model=model, training=settings, output_dir=str(folder / name))
    job.save(folder / f"{name}.json")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    if not gpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    finished = subprocess.run(
        [sys.executable, "-m", "megatron_dagger.training", str(data), str(folder / f"{name}.json")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=training.deadline_s,
    )
    if finished.returncode:
        raise SystemExit(f"training {name} failed:\n{finished.stdout[-6000:]}")
    lines = read(folder / name / "metrics.jsonl")
    manifest = json.loads((folder / name / "manifest.json").read_text())
    timed = lines[WARMUP_STEPS:]
    seconds, tokens = (sum(line[key] for line in timed) for key in ("step_s", "tokens"))
    packed = packing.pack(load_episodes(data), settings.sequence_length, packing=settings.packing)
    flops_per_token = float(row_flops(packed, model).sum()) / packed.tokens
    return Outcome(
        losses=np.array([line["loss"] for line in lines]),
        tokens_per_s=tokens / seconds,
        flops_per_s=flops_per_token * tokens / seconds,
        peak_memory_mib=manifest["peak_memory_mib"],
    )


def _peak(device: str, precision: str, given_tflops: float | None) -> float | None:
    """The GPU's dense peak in TFLOP/s for the precision; None if it is not known."""
    if given_tflops is not None:
        return given_tflops * (2 if precision.startswith("fp8") else 1)
    for part, (bf16, fp8) in PEAKS.items():
        if all(word in device for word in part.split()):
            return float(fp8 if precision.startswith("fp8") else bf16)
    return None


if __name__ == "__main__":
    sys.exit(main())
