"""Shows that a training step does not depend on the parallel layout or on packing.

Every layout trains the same steps in fp32, on from a checkpoint that one process or another layout saved
(weights and optimizer), and its losses and gradient norms are held against one process's; the last step
leaves all but one micro-batch without a label. Packed rows, and one row of everything, are held against
one sample a row, in loss and gradients, and that against Transformers' model with the same weights; all of
it for Qwen3 and for Qwen3-MoE.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

from megatron_dagger.config import ModelConfig, ParallelConfig, TrainingConfig  # noqa: E402
from megatron_dagger.training.data import packing  # noqa: E402
from megatron_dagger.training.data.episode_file import load_episodes, save_episodes  # noqa: E402
from megatron_dagger.training.job import TrainJob  # noqa: E402
from megatron_dagger.training.metrics import read  # noqa: E402
from megatron_dagger.training.ranks.launch import launch  # noqa: E402
from megatron_dagger.types import LabelledEpisode  # noqa: E402
from megatron_dagger.weights.checkpoints import open_checkpoint  # noqa: E402
from megatron_dagger.weights.verify.digest import canonical_digests  # noqa: E402
from tools.support import labelled_episodes  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout to compare with one process, of the dense model or of the one with experts (``moe``)."""

    world: int
    settings: dict[str, Any]
    moe: bool = False
    after: str | None = None  # goes on from where that layout saved, optimizer included


TP, SP, PP, VPP, EP = (
    "tensor_model_parallel_size",
    "sequence_parallel",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
)
LAYOUTS = {
    "tp2": Layout(world=2, settings={TP: 2}),
    "pp2": Layout(world=2, settings={PP: 2}),
    "dp2": Layout(world=2, settings={}),
    "tp2_sp": Layout(world=2, settings={TP: 2, SP: True}),
    "pp2_vpp2": Layout(world=2, settings={PP: 2, VPP: 2}),
    "tp2_sp_after_pp2_vpp2": Layout(world=2, settings={TP: 2, SP: True}, after="pp2_vpp2"),
    "moe_ep2": Layout(world=2, settings={EP: 2}, moe=True),
    "moe_pp2_vpp2": Layout(world=2, settings={PP: 2, VPP: 2}, moe=True),
    "moe_tp2_sp": Layout(world=2, settings={TP: 2, SP: True}, moe=True),
    "moe_tp2_sp_ep2": Layout(world=2, settings={TP: 2, SP: True, EP: 2}, moe=True),
    "moe_pp2_after_ep2": Layout(world=2, settings={PP: 2}, moe=True, after="moe_ep2"),
    "tp2_pp2": Layout(world=4, settings={TP: 2, PP: 2}),
    "tp2_sp_pp2_vpp2": Layout(world=4, settings={TP: 2, SP: True, PP: 2, VPP: 2}),
    "tp2_dp2": Layout(world=4, settings={TP: 2}),
    "pp2_dp2": Layout(world=4, settings={PP: 2}),
    "moe_ep2_dp2": Layout(world=4, settings={EP: 2}, moe=True),
    "moe_ep2_pp2": Layout(world=4, settings={EP: 2, PP: 2}, moe=True),
    "moe_tp2_sp_ep4": Layout(world=4, settings={TP: 2, SP: True, EP: 4}, moe=True),
}
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
ROW_TOKENS, ROWS_PER_STEP = 256, 4
LIMIT = 1e-5
GRADIENT_LIMIT = 1e-4  # of the largest gradient, and of its norm
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
    missing = [layout.after for name in names if (layout := LAYOUTS[name]).after and layout.after not in names]
    if missing:
        parser.error(f"a layout goes on after {missing[0]}, which must be among --layouts too")
    with tempfile.TemporaryDirectory(prefix="check_parallel-") as folder:
        result = _check(Path(folder), names, arguments.steps, tie=not arguments.untied)
    print(f"{'compared':<28}{'largest difference':>20}{'limit':>10}")
    failed = False
    for name, value in result.items():
        if name != "steps":
            limit = GRADIENT_LIMIT if "_grad" in name else LIMIT
            failed |= not value <= limit
            print(f"{name:<28}{value:>20.2e}{limit:>10.0e}{'' if value <= limit else '  TOO LARGE'}")
    print("RESULT " + json.dumps(result))
    return int(failed)


def _check(folder: Path, names: list[str], steps: int, *, tie: bool) -> dict[str, Any]:
    episodes = labelled_episodes.make(20, seed=1, vocab_size=250, longest=250, branches=0.3)
    save_episodes(folder / "episodes.npz", episodes)
    jobs = _Jobs(folder, steps, len(packing.pack(episodes, ROW_TOKENS).rows), tie=tie)
    kinds = sorted({LAYOUTS[name].moe for name in names})
    for moe in kinds:
        one = Layout(world=1, settings={}, moe=moe)
        jobs.write(_reference("start", moe), one, first_steps=2)
        jobs.write(_reference("single", moe), one, start=_reference("start", moe))
        jobs.write(_reference("next", moe), one, start=_reference("single", moe))
    command = [sys.executable, __file__, "--worker", str(folder)]
    subprocess.run(command, check=True, timeout=DEADLINE_S)
    result: dict[str, Any] = {"steps": steps}
    for world in sorted({LAYOUTS[name].world for name in names}):
        group = [name for name in LAYOUTS if name in names and LAYOUTS[name].world == world]
        for name in group:
            jobs.write(name, LAYOUTS[name], start=LAYOUTS[name].after or _reference("start", LAYOUTS[name].moe))
        launch(
            ["megatron_dagger.training", str(folder / "episodes.npz"), *(str(folder / f"{n}.json") for n in group)],
            ParallelConfig(world_size=world),
            folder / f"logs{world}",
            DEADLINE_S,
            env={"PYTHONPATH": str(ROOT)},
        )
    for name in names:
        reference = _reference("next" if LAYOUTS[name].after else "single", LAYOUTS[name].moe)
        (loss, norm), (single_loss, single_norm) = _curves(folder / name), _curves(folder / reference)
        assert len(loss) == len(single_loss) == steps, f"{name}: {len(loss)} of {steps} steps"
        _check_digests(folder / name)
        result[name] = float(np.abs(loss - single_loss).max())
        result[name + "_grad_norm"] = float(np.abs(norm / single_norm - 1).max())
    for moe in kinds:
        measured = json.loads((folder / f"{_reference('packed', moe)}.json").read_text())
        measured |= _against_hugging_face(folder, _reference("single", moe))
        result |= {_reference(name, moe): value for name, value in measured.items()}
    return result


def _check_digests(output_dir: Path) -> None:
    """What the ranks had in memory is what they saved, tensor by tensor."""
    tensors = open_checkpoint(output_dir / "checkpoint")
    saved = canonical_digests(tensors.canonical_tensors(), tensors.model)
    assert saved == json.loads((output_dir / "manifest.json").read_text())["digests"], output_dir.name


def _reference(name: str, moe: bool) -> str:
    return f"moe_{name}" if moe else name


@dataclass(frozen=True)
class _Jobs:
    folder: Path
    steps: int
    rows: int  # of the data
    tie: bool

    def write(self, name: str, layout: Layout, *, start: str | None = None, first_steps: int = 0) -> None:
        """The last of a job's steps has one row: the other micro-batches, and ranks, have no label at all."""
        rows = ROWS_PER_STEP * ((first_steps or self.steps) - 1) + 1
        training = TrainingConfig(
            parallel=ParallelConfig(world_size=layout.world, **layout.settings),
            sequence_length=ROW_TOKENS,
            packing="shared_prefix",
            global_batch_tokens=ROWS_PER_STEP * ROW_TOKENS,
            epochs=rows / self.rows,
            deadline_s=DEADLINE_S,
        )
        job = TrainJob(
            round_index=1 if start else 0,  # a later round goes on with the optimizer's state
            seed=1,
            model=replace(MODELS[layout.moe], tie_embeddings=self.tie),
            training=training,
            output_dir=str(self.folder / name),
            init_checkpoint=str(self.folder / start / "checkpoint") if start else None,
        )
        job.save(self.folder / f"{name}.json")


def _curves(output_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """The loss and the gradient's norm of each step."""
    lines = read(output_dir / "metrics.jsonl")
    return np.array([line["loss"] for line in lines]), np.array([line["grad_norm"] for line in lines])


def _worker(folder: Path) -> None:
    """One process: the starting checkpoints, the reference losses, packed against unpacked."""
    from megatron_dagger.training import compat
    from megatron_dagger.training.trainer import train

    compat.quiet()
    episodes = load_episodes(folder / "episodes.npz")
    for moe in MODELS:
        if (folder / f"{_reference('single', moe)}.json").exists():
            for name in ("start", "single", "next"):
                train(TrainJob.load(folder / f"{_reference(name, moe)}.json"), lambda: episodes)
            _compare_packings(folder, episodes, moe)


def _compare_packings(folder: Path, episodes: Sequence[LabelledEpisode], moe: bool) -> None:
    """Loss and gradient of all episodes: a sample a row, in packed rows, and in one row, so one micro-batch."""
    from megatron_dagger.training.engine import MegatronEngine
    from megatron_dagger.training.ranks import process_groups as parallel

    name = _reference("single", moe)
    job = TrainJob.load(folder / f"{name}.json")
    with parallel.process_groups(job.training.parallel, seed=1, deadline_s=DEADLINE_S, threads=1) as device:
        engine = MegatronEngine(job.model, job.training, seed=1, device=device)
        engine.load(folder / _reference("start", moe) / "checkpoint", with_optimizer=False)
        single = packing.pack(episodes, ROW_TOKENS, packing="separate", one_sample_per_row=True)
        packed = packing.pack(episodes, ROW_TOKENS)
        loss, gradients = _gradients(engine, single)
        measured: dict[str, float] = {}
        for kind, data in {"packed": packed, "one_row": packing.pack(episodes, packed.tokens)}.items():
            its_loss, its_gradients = _gradients(engine, data)
            measured |= {f"{kind}_loss": abs(its_loss - loss), f"{kind}_grad": _difference(its_gradients, gradients)}
        scores = engine.logprobs([single.row(index) for index in range(len(single.rows))])
        assert scores is not None
        weights = _canonical(engine, lambda parameter: parameter.detach())
    (folder / f"{_reference('packed', moe)}.json").write_text(json.dumps(measured))
    np.savez(folder / name / "weights.npz", **weights)
    np.savez(folder / name / "gradients.npz", loss=np.array(loss), **gradients)
    np.savez(folder / name / "scores.npz", *scores)


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """The largest difference between gradients, as a share of the largest of ``theirs``."""
    largest = max(float(np.abs(value).max()) for value in theirs.values())
    return max(float(np.abs(ours[name] - value).max()) for name, value in theirs.items()) / largest


def _gradients(engine: Any, data: packing.PackedDataset) -> tuple[float, dict[str, Any]]:
    rows = [data.row(index) for index in range(len(data.rows))]
    loss = engine.forward_backward(rows, normaliser=float(data.row_weights.sum()))
    return loss, _canonical(engine, lambda parameter: parameter.main_grad)


def _canonical(engine: Any, value: Any) -> dict[str, Any]:
    from megatron_dagger.training import param_names as layout
    from megatron_dagger.training.model import bare
    from megatron_dagger.weights import families

    return {
        canonical: tensor.float().cpu().numpy().copy()
        for name, parameter in layout.global_parameters(bare(engine.chunks[0]))
        for canonical, tensor in families.to_canonical(name, value(parameter), engine.model_config)
    }


def _against_hugging_face(folder: Path, name: str) -> dict[str, float]:
    """The same samples through Transformers' model, in this process: no Megatron, no shim."""
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
            ours = torch.from_numpy(scores[f"arr_{index}"][: sample.length])
            largest = max(largest, float((logprobs - ours).abs().max()))
            total = total - (logprobs * torch.from_numpy(sample.trunk_weights()[1:])).sum()
    loss = total / float(data.row_weights.sum())
    loss.backward()
    with np.load(folder / name / "gradients.npz") as gradients:
        theirs = {name: p.grad.numpy() for name, p in network.named_parameters() if p.grad is not None}
        return {
            "hf_loss": abs(float(loss.detach()) - float(gradients["loss"])),
            "hf_logprob": largest,
            "hf_grad": _difference(_stacked(gradients), theirs),
        }


def _stacked(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Canonical tensors, the experts as Transformers 5 has them: a layer's in one tensor, up after gate."""
    found = {name: value for name, value in tensors.items() if ".experts." not in name}
    for first in [name for name in tensors if ".experts.0.gate_proj." in name]:
        layer = first.removesuffix(".0.gate_proj.weight")
        count = sum(name.startswith(layer) and "gate_proj" in name for name in tensors)
        gate, up, down = (
            np.stack([tensors[f"{layer}.{i}.{part}_proj.weight"] for i in range(count)])
            for part in ("gate", "up", "down")
        )
        found |= {f"{layer}.gate_up_proj": np.concatenate([gate, up], 1), f"{layer}.down_proj": down}
    return found


if __name__ == "__main__":
    sys.exit(main())
