"""Checks training on one CUDA GPU: losses of every precision against the fp32 CPU path, and speed.

Losses: a small model is trained for some hundred steps, on the CPU in fp32 and on the GPU in fp32,
BF16 and the FP8 recipes, from the same seed on the same episodes; the curves are compared step by step.
Speed: a model of Qwen3's shape is trained in BF16 and FP8; tokens per second, the share of the GPU's
peak (model FLOPs, nothing recomputed counted twice), and peak memory.
Each training is the product's own worker in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np  # noqa: E402
import synthetic_episodes  # noqa: E402

from megatron_dagger.config import ModelConfig, OptimizerConfig, TrainingConfig  # noqa: E402
from megatron_dagger.training import packing  # noqa: E402
from megatron_dagger.training.episode_file import save_episodes  # noqa: E402
from megatron_dagger.training.job import TrainJob  # noqa: E402
from megatron_dagger.training.metrics import read  # noqa: E402

# Largest mean difference of the loss, as a share of it: rounding to 24, 8 and 4 bits of mantissa.
LIMITS = {"fp32": 1e-3, "bf16": 0.02, "fp8_delayed": 0.05, "fp8_tensorwise": 0.05, "fp8_blockwise": 0.05}
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
LARGE = {
    "0.6b": ModelConfig(
        num_layers=28,
        hidden_size=1024,
        ffn_hidden_size=3072,
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
    parser.add_argument("--model", choices=list(LARGE), default="0.6b", help="for the speed (default 0.6b)")
    parser.add_argument("--sequence-length", type=int, default=16384, help="of the speed's rows (default 16384)")
    parser.add_argument("--precisions", default=",".join(LIMITS), help="comma-separated (default %(default)s)")
    parser.add_argument("--peak-tflops", type=float, help="the GPU's dense BF16 peak, if it is not known here")
    parser.add_argument("--deadline", type=float, default=1800.0, help="seconds for one training")
    arguments = parser.parse_args()
    precisions = arguments.precisions.split(",")
    unknown = [name for name in precisions if name not in LIMITS]
    if unknown:
        parser.error(f"unknown precision {unknown[0]}; there are {', '.join(LIMITS)}")
    device = _device(precisions)
    if isinstance(device, int):
        return device
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder:
        result = _check(Path(folder), arguments, precisions, device)
    print("RESULT " + json.dumps(result))
    return int(not result["ok"])


def _device(precisions: list[str]) -> str | int:
    """The GPU's name, or the exit status after saying what is missing."""
    import importlib.util

    import torch

    if not torch.cuda.is_available():
        print("gpu_check needs one CUDA GPU, and torch sees none here", file=sys.stderr)
        return 2
    missing = importlib.util.find_spec("transformer_engine") is None
    if missing and any(name != "fp32" for name in precisions):
        print(
            "gpu_check needs Transformer Engine for BF16 and FP8 (package transformer_engine)",
            file=sys.stderr,
        )
        return 2
    if any(name.startswith("fp8") for name in precisions) and torch.cuda.get_device_capability() < (8, 9):
        print(f"{torch.cuda.get_device_name()} has no FP8; choose --precisions fp32,bf16", file=sys.stderr)
        return 2
    return str(torch.cuda.get_device_name())


def _check(folder: Path, arguments: argparse.Namespace, precisions: list[str], device: str) -> dict[str, Any]:
    episodes = synthetic_episodes.make(64, seed=3, vocab_size=SMALL.vocab_size, longest=512)
    save_episodes(folder / "small.npz", episodes)
    curves = TrainingConfig(
        sequence_length=512,
        global_batch_tokens=4096,
        epochs=1e6,
        max_steps=arguments.steps,
        checkpoint_interval=10**9,
        threads_per_process=os.cpu_count() or 1,
        deadline_s=arguments.deadline,
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=20),
    )
    reference = _train(folder, "small", SMALL, curves, "fp32", gpu=False)
    model, length = LARGE[arguments.model], arguments.sequence_length
    save_episodes(
        folder / "large.npz",
        synthetic_episodes.make(48, seed=4, vocab_size=model.vocab_size, longest=length),
    )
    speed = TrainingConfig(
        sequence_length=length,
        global_batch_tokens=4 * length,
        epochs=1e6,
        max_steps=SPEED_STEPS,
        checkpoint_interval=10**9,
        deadline_s=arguments.deadline,
    )
    print(f"{device}; fp32 on the CPU: loss {reference.losses[0]:.4f} to {reference.losses[-1]:.4f}")
    print(
        f"{'precision':<16}{'last loss':>10}{'difference':>12}{'limit':>8}"
        f"{'tokens/s':>11}{'TFLOP/s':>9}{'of peak':>9}{'GiB':>7}"
    )
    results: dict[str, Any] = {}
    for name in precisions:
        curve = _train(folder, "small", SMALL, curves, name, gpu=True)
        difference = float(np.abs(curve.losses - reference.losses).mean() / reference.losses.mean())
        entry: dict[str, Any] = {"last_loss": float(curve.losses[-1]), "loss_difference": difference}
        line = f"{name:<16}{curve.losses[-1]:>10.4f}{difference:>12.2e}{LIMITS[name]:>8.0e}"
        if name != "fp32":
            fast = _train(folder, "large", model, speed, name, gpu=True)
            peak = _peak(device, name, arguments.peak_tflops)
            share = fast.flops_per_s / (peak * 1e12) if peak else None
            entry |= {
                "tokens_per_s": fast.tokens_per_s,
                "tflops": fast.flops_per_s / 1e12,
                "peak_share": share,
                "peak_memory_mib": fast.peak_memory_mib,
            }
            shown = f"{share:.1%}" if share is not None else "unknown"
            line += f"{fast.tokens_per_s:>11.0f}{fast.flops_per_s / 1e12:>9.0f}{shown:>9}"
            line += f"{fast.peak_memory_mib / 1024:>7.1f}"
        print(line, flush=True)
        results[name] = entry
    learned = bool(reference.losses[-10:].mean() < 0.7 * reference.losses[:10].mean())
    close = all(results[name]["loss_difference"] <= LIMITS[name] for name in results)
    return {
        "device": device,
        "steps": arguments.steps,
        "model": arguments.model,
        "sequence_length": length,
        "precisions": results,
        "ok": learned and close,
    }


def _train(
    folder: Path, data: str, model: ModelConfig, training: TrainingConfig, precision: str, *, gpu: bool
) -> Outcome:
    """Train in a process of its own; without ``gpu`` the process sees none and takes the CPU path."""
    name = f"{data}-{precision}-{'gpu' if gpu else 'cpu'}"
    settings = TrainingConfig(**{**vars(training), "precision": precision})
    job = TrainJob(round_index=0, seed=11, model=model, training=settings, output_dir=str(folder / name))
    job.save(folder / f"{name}.json")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    if not gpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    command = ["megatron_dagger.training", str(folder / f"{data}.npz"), str(folder / f"{name}.json")]
    finished = subprocess.run(
        [sys.executable, "-m", *command],
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
    seconds = sum(line["step_s"] for line in timed)
    tokens, labels = (sum(line[key] for line in timed) for key in ("tokens", "label_tokens"))
    return Outcome(
        losses=np.array([line["loss"] for line in lines]),
        tokens_per_s=tokens / seconds,
        flops_per_s=_model_flops(folder / f"{data}.npz", model, settings, tokens, labels) / seconds,
        peak_memory_mib=manifest["peak_memory_mib"],
    )


def _model_flops(episodes: Path, model: ModelConfig, training: TrainingConfig, tokens: int, labels: int) -> float:
    """FLOPs of forward and backward: 6 a weight and token; causal attention within each sample.

    The output layer counts for label tokens only, for which alone it is computed.
    """
    from megatron_dagger.training.episode_file import load_episodes

    width = model.num_attention_heads * model.kv_channels
    qkv = model.hidden_size * (width + 2 * model.num_query_groups * model.kv_channels)
    layer = qkv + width * model.hidden_size + 3 * model.hidden_size * model.ffn_hidden_size
    data = packing.pack(load_episodes(episodes), training.sequence_length, packing="separate")
    squares = sum(sample.length**2 for sample in data.samples) / data.tokens  # keys a token, times 2
    attention = 6.0 * squares * width  # two products of half a square, 2 FLOPs each, times 3
    head = 6.0 * labels * model.hidden_size * model.vocab_size
    return model.num_layers * tokens * (6.0 * layer + attention) + head


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
