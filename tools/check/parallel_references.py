"""The references of tools.check.parallel: a single process's training, packings, and Transformers' model.

``python -m tools.check.parallel_references FOLDER`` trains, in a single process, the jobs that tools.check.parallel has
written to FOLDER. ``compare_with_transformers`` then compares log-probs, loss and gradients with Transformers' model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dagger.config import ModelConfig
from megatron_dagger.training.data import packing
from megatron_dagger.training.data.episode_file import load_episodes
from megatron_dagger.training.job import TrainJob
from megatron_dagger.types import LabelledEpisode

MODELS = {
    False: ModelConfig(num_layers=4, hidden_size=64, ffn_hidden_size=160, vocab_size=250),
    True: ModelConfig(
        family="qwen3_moe",
        num_layers=4,
        hidden_size=64,
        num_moe_experts=4,
        moe_ffn_hidden_size=48,
        moe_router_topk=2,
        vocab_size=250,
    ),
}
ROW_TOKENS = 256
DEADLINE_S = 300.0


def reference_name(name: str, moe: bool) -> str:
    return f"moe_{name}" if moe else name


def train_references(folder: Path) -> None:
    """In a single process: train the starting checkpoints and the references, and compare the packings."""
    from megatron_dagger.training import compat
    from megatron_dagger.training.trainer import train_round

    compat.quiet()
    episodes = load_episodes(folder / "episodes.npz")
    for moe in MODELS:
        if (folder / f"{reference_name('single', moe)}.json").exists():
            for name in ("start", "single", "next"):
                train_round(TrainJob.load(folder / f"{reference_name(name, moe)}.json"), lambda: episodes)
            _compare_packings(folder, episodes, moe)


def _compare_packings(folder: Path, episodes: Sequence[LabelledEpisode], moe: bool) -> None:
    """Compare loss and gradients of all episodes: one sample in each row, packed rows, and all in one row."""
    from megatron_dagger.training.engine import MegatronEngine
    from megatron_dagger.training.ranks.process_groups import process_groups

    name = reference_name("single", moe)
    job = TrainJob.load(folder / f"{name}.json")
    with process_groups(job.training.parallel, seed=1, timeout_s=DEADLINE_S, threads=1) as device:
        engine = MegatronEngine(job.model, job.training, seed=1, device=device)
        engine.load(folder / reference_name("start", moe) / "checkpoint", with_optimizer=False)
        single = packing.pack(episodes, ROW_TOKENS, packing="separate", one_sample_per_row=True)
        packed = packing.pack(episodes, ROW_TOKENS)
        loss, gradients = _gradients(engine, single)
        measured: dict[str, float] = {}
        for kind, data in {"packed": packed, "one_row": packing.pack(episodes, packed.tokens)}.items():
            packed_loss, packed_gradients = _gradients(engine, data)
            difference = _difference(packed_gradients, gradients)
            measured |= {f"{kind}_loss": abs(packed_loss - loss), f"{kind}_grad": difference}
        scores = engine.logprobs([single.row(index) for index in range(len(single.rows))])
        assert scores is not None
        weights = _canonical(engine, lambda parameter: parameter.detach())
    (folder / f"{reference_name('packed', moe)}.json").write_text(json.dumps(measured))
    np.savez(folder / name / "weights.npz", **weights)
    np.savez(folder / name / "gradients.npz", loss=np.array(loss), **gradients)
    np.savez(folder / name / "scores.npz", *scores)


def _difference(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """Return the largest difference between gradients, relative to the largest expected one."""
    largest = max(float(np.abs(value).max()) for value in expected.values())
    return max(float(np.abs(actual[name] - value).max()) for name, value in expected.items()) / largest


def _gradients(engine: Any, data: packing.PackedDataset) -> tuple[float, dict[str, Any]]:
    rows = [data.row(index) for index in range(len(data.rows))]
    loss = engine.forward_backward(rows, normaliser=float(data.row_weights.sum()))
    return loss, _canonical(engine, lambda parameter: parameter.main_grad)


def _canonical(engine: Any, value: Any) -> dict[str, Any]:
    from megatron_dagger.training import param_names
    from megatron_dagger.training.model import bare
    from megatron_dagger.weights import families

    return {
        canonical: tensor.float().cpu().numpy().copy()
        for name, parameter in param_names.global_parameters(bare(engine.chunks[0]))
        for canonical, tensor in families.to_canonical(name, value(parameter), engine.model_config)
    }


def compare_with_transformers(folder: Path, name: str) -> dict[str, float]:
    """Compare with Transformers' model on the same samples, in this process, which does not import Megatron."""
    import torch
    import transformers

    torch.set_num_threads(1)
    model = TrainJob.load(folder / f"{name}.json").model
    network = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**model.hf_config()))
    with np.load(folder / name / "weights.npz") as weights:
        state = {key: torch.from_numpy(value) for key, value in _stacked(weights).items()}
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    episodes = load_episodes(folder / "episodes.npz")
    data = packing.pack(episodes, ROW_TOKENS, packing="separate", one_sample_per_row=True)
    total, largest = torch.zeros(()), 0.0
    with np.load(folder / name / "scores.npz") as scores:
        for index, sample in enumerate(data.samples):
            tokens = torch.from_numpy(sample.trunk).long()
            logits = network(tokens[None, :-1]).logits[0].float()
            logprobs = logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
            actual = torch.from_numpy(scores[f"arr_{index}"][: sample.length])
            largest = max(largest, float((logprobs - actual).abs().max()))
            total = total - (logprobs * torch.from_numpy(sample.trunk_weights()[1:])).sum()
    loss = total / float(data.row_weights.sum())
    loss.backward()
    with np.load(folder / name / "gradients.npz") as gradients:
        expected = {name: p.grad.numpy() for name, p in network.named_parameters() if p.grad is not None}
        return {
            "hf_loss": abs(float(loss.detach()) - float(gradients["loss"])),
            "hf_logprob": largest,
            "hf_grad": _difference(_stacked(gradients), expected),
        }


def _stacked(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return canonical tensors with the experts as in Transformers 5: one tensor for a layer's, gate before up."""
    stacked = {name: value for name, value in tensors.items() if ".experts." not in name}
    for first in [name for name in tensors if ".experts.0.gate_proj." in name]:
        layer = first.removesuffix(".0.gate_proj.weight")
        count = sum(name.startswith(layer) and "gate_proj" in name for name in tensors)
        gate, up, down = (
            np.stack([tensors[f"{layer}.{i}.{part}_proj.weight"] for i in range(count)])
            for part in ("gate", "up", "down")
        )
        stacked |= {f"{layer}.gate_up_proj": np.concatenate([gate, up], 1), f"{layer}.down_proj": down}
    return stacked


if __name__ == "__main__":
    train_references(Path(sys.argv[1]))
