"""Shows that a training step does not depend on the parallel layout or on packing.

Every layout trains the same steps from the same checkpoint (weights and optimizer) in fp32 and its
losses are held against one process's. Packed rows are held against one sample a row, in loss and
gradients, and both against Hugging Face's Qwen3ForCausalLM with the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import synthetic_episodes  # noqa: E402

from megatron_dagger.config import ModelConfig, ParallelConfig, TrainingConfig  # noqa: E402
from megatron_dagger.training import packing  # noqa: E402
from megatron_dagger.training.episode_file import load_episodes, save_episodes  # noqa: E402
from megatron_dagger.training.job import TrainJob  # noqa: E402
from megatron_dagger.training.launch import launch  # noqa: E402

LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {},
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2_vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "tp2_pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
}
WORLD = {name: 4 if name == "tp2_pp2" else 2 for name in LAYOUTS}
LIMIT = 1e-5
GRADIENT_LIMIT = 1e-4  # of the largest gradient
DEADLINE_S = 300.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps to compare (default 5)")
    parser.add_argument(
        "--layouts", default=",".join(LAYOUTS), help="comma-separated, of %(default)s (the default: all)"
    )
    parser.add_argument("--untied", action="store_true", help="a model with an output layer of its own")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        _worker(arguments.worker)
        return 0
    names = arguments.layouts.split(",")
    unknown = [name for name in names if name not in LAYOUTS]
    if unknown:
        parser.error(f"unknown layout {unknown[0]}; there are {', '.join(LAYOUTS)}")
    with tempfile.TemporaryDirectory(prefix="check_parallel-") as folder:
        result = _check(Path(folder), names, arguments.steps, tie=not arguments.untied)
    limits = {"packed_grad": GRADIENT_LIMIT, "hf_grad": GRADIENT_LIMIT}
    print(f"{'compared':<14}{'largest difference':>20}{'limit':>10}")
    failed = False
    for name, value in result.items():
        if name != "steps":
            limit = limits.get(name, LIMIT)
            failed |= not value <= limit
            print(f"{name:<14}{value:>20.2e}{limit:>10.0e}{'' if value <= limit else '  TOO LARGE'}")
    print("RESULT " + json.dumps(result))
    return int(failed)


def _check(folder: Path, names: list[str], steps: int, *, tie: bool) -> dict[str, Any]:
    model = ModelConfig(num_layers=4, hidden_size=64, ffn_hidden_size=160, vocab_size=250, tie_embeddings=tie)
    episodes = synthetic_episodes.make(20, seed=1, vocab_size=model.vocab_size, longest=250, branches=0.3)
    save_episodes(folder / "episodes.npz", episodes)
    _job(folder, "start", model, 2, {}, world=1)
    _job(folder, "single", model, steps, {}, world=1, start=folder / "start")
    subprocess.run([sys.executable, __file__, "--worker", str(folder)], check=True, timeout=DEADLINE_S)
    result: dict[str, Any] = {"steps": steps}
    for world in sorted({WORLD[name] for name in names}):
        group = [name for name in names if WORLD[name] == world]
        jobs = [_job(folder, name, model, steps, LAYOUTS[name], world=world, start=folder / "start") for name in group]
        launch(
            ["megatron_dagger.training", str(folder / "episodes.npz"), *map(str, jobs)],
            ParallelConfig(world_size=world),
            folder / f"logs{world}",
            DEADLINE_S,
            env={"PYTHONPATH": str(ROOT)},
        )
    for name in names:
        ours, reference = _losses(folder / name), _losses(folder / "single")
        assert len(ours) == len(reference) == steps, f"{name}: {len(ours)} of {steps} steps"
        result[name] = float(np.abs(np.array(ours) - np.array(reference)).max())
    measured = json.loads((folder / "packed.json").read_text())
    return {**result, **measured, **_against_hugging_face(folder, model)}


def _job(
    folder: Path,
    name: str,
    model: ModelConfig,
    steps: int,
    layout: dict[str, Any],
    *,
    world: int,
    start: Path | None = None,
) -> Path:
    training = TrainingConfig(
        parallel=ParallelConfig(world_size=world, **layout),
        sequence_length=256,
        packing="shared_prefix",
        global_batch_tokens=1024,
        epochs=50,
        max_steps=steps,
        deadline_s=DEADLINE_S,
    )
    job = TrainJob(
        round_index=0,
        seed=1,
        model=model,
        training=training,
        output_dir=str(folder / name),
        init_checkpoint=str(start / "checkpoint") if start else None,
    )
    path = folder / f"{name}.json"
    job.save(path)
    return path


def _losses(output_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def _worker(folder: Path) -> None:
    """One process: the starting checkpoint, the reference losses, packed against unpacked."""
    from megatron_dagger.training import compat, parallel
    from megatron_dagger.training.engine import Engine
    from megatron_dagger.training.trainer import train

    compat.quiet()
    episodes = load_episodes(folder / "episodes.npz")
    train(TrainJob.load(folder / "start.json"), episodes)
    job = TrainJob.load(folder / "single.json")
    train(job, episodes)
    with parallel.process_groups(job.training.parallel, seed=1, deadline_s=DEADLINE_S, threads=1) as device:
        engine = Engine(job.model, job.training, seed=1, device=device)
        engine.load(folder / "start" / "checkpoint", with_optimizer=False)
        size = job.training.sequence_length
        packed = packing.pack(episodes, size)
        single = packing.pack(episodes, size, packing="separate", one_sample_per_row=True)
        packed_loss, packed_gradients = _gradients(engine, packed)
        single_loss, single_gradients = _gradients(engine, single)
        scores = engine.logprobs([single.row(index) for index in range(len(single.rows))])
        assert scores is not None
        weights = _canonical(engine, lambda parameter: parameter.detach())
    largest = max(float(np.abs(value).max()) for value in single_gradients.values())
    difference = max(float(np.abs(packed_gradients[name] - value).max()) for name, value in single_gradients.items())
    measured = {"packed_loss": abs(packed_loss - single_loss), "packed_grad": difference / largest}
    (folder / "packed.json").write_text(json.dumps(measured))
    np.savez(folder / "weights.npz", **weights)
    np.savez(folder / "gradients.npz", loss=np.array(single_loss), **single_gradients)
    np.savez(folder / "scores.npz", *scores)


def _gradients(engine: Any, data: packing.PackedDataset) -> tuple[float, dict[str, Any]]:
    rows = [data.row(index) for index in range(len(data.rows))]
    loss = engine.forward_backward(rows, normaliser=float(data.row_weights.sum()))
    return loss, _canonical(engine, lambda parameter: parameter.main_grad)


def _canonical(engine: Any, value: Any) -> dict[str, Any]:
    from megatron_dagger.training import layout
    from megatron_dagger.training.model import bare
    from megatron_dagger.weights import families

    return {
        canonical: tensor.float().cpu().numpy().copy()
        for name, parameter in layout.global_parameters(bare(engine.chunks[0]))
        for canonical, tensor in families.to_canonical(name, value(parameter), engine.model_config)
    }


def _against_hugging_face(folder: Path, model: ModelConfig) -> dict[str, float]:
    """The same samples through Transformers' model, in this process: no Megatron, no shim."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.set_num_threads(1)
    network = Qwen3ForCausalLM(Qwen3Config(**model.hf_config()))
    with np.load(folder / "weights.npz") as weights:
        state = {name: torch.from_numpy(weights[name]) for name in weights.files}
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    episodes = load_episodes(folder / "episodes.npz")
    data = packing.pack(episodes, 256, packing="separate", one_sample_per_row=True)
    total, largest = torch.zeros(()), 0.0
    with np.load(folder / "scores.npz") as scores:
        for index, sample in enumerate(data.samples):
            tokens = torch.from_numpy(sample.trunk).long()
            logits = network(tokens[None, :-1]).logits[0].float()
            logprobs = logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
            ours = torch.from_numpy(scores[f"arr_{index}"][: sample.length])
            largest = max(largest, float((logprobs - ours).abs().max()))
            total = total - (logprobs * torch.from_numpy(sample.trunk_weights()[1:])).sum()
    loss = total / float(data.row_weights.sum())
    loss.backward()
    with np.load(folder / "gradients.npz") as gradients:
        named = {name: p.grad.numpy() for name, p in network.named_parameters() if p.grad is not None}
        scale = max(float(np.abs(value).max()) for value in named.values())
        difference = max(float(np.abs(gradients[name] - value).max()) for name, value in named.items())
        difference_of_loss = abs(float(loss.detach()) - float(gradients["loss"]))
    return {"hf_loss": difference_of_loss, "hf_logprob": largest, "hf_grad": difference / scale}


if __name__ == "__main__":
    sys.exit(main())
