"""Megatron distributed checkpoints (torch_dist): saved atomically, loaded in any parallel layout.

A checkpoint directory is written under a temporary name, synced and renamed; ``complete.json``, which describes it, is
written last. A directory without that file is half-written and is ignored. Tensors are Megatron's own sharded state:
global names, and optimizer state in the fully reshardable form.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state

from megatron_dagger.config import ModelConfig, build, to_dict
from megatron_dagger.store import atomic
from megatron_dagger.training import compat
from megatron_dagger.training.model import bare
from megatron_dagger.training.optimizer import each_optimizer
from megatron_dagger.weights.checkpoints import MARKER

logger = logging.getLogger(__name__)

FINAL = "checkpoint"
_IN_ROUND = "checkpoint-step-"


class CheckpointError(ValueError):
    """A checkpoint is missing, half-written, or of another model."""


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """The content of ``complete.json``: the model, and where in the round the checkpoint was taken.

    ``step`` is the number of finished steps; ``fingerprint`` identifies the job and its data.
    """

    step: int
    round_index: int
    seed: int
    weight_version: int
    fingerprint: str
    model: ModelConfig
    megatron_core: str


def save(directory: Path, chunks: list[Any], optimizer: Any, state: CheckpointState) -> None:
    """Write a checkpoint to ``directory``, replacing an older one. Called on all ranks together."""
    temporary = directory.parent / _shared_name(directory)
    if torch.distributed.get_rank() == 0:
        temporary.mkdir(parents=True)
    torch.distributed.barrier()
    sharded = _model_state(chunks)
    sharded["optimizer"] = optimizer.sharded_state_dict(dict(sharded), metadata=_metadata())
    compat.save_sharded(sharded, temporary)
    if torch.distributed.get_rank() == 0:
        atomic.sync_tree(temporary)
        atomic.remove_tree(directory)
        atomic.publish_directory(temporary, directory)
        atomic.write_json(directory / MARKER, to_dict(state))
    torch.distributed.barrier()


def load(directory: Path, chunks: list[Any], optimizer: Any | None, *, exact: bool = False) -> dict[str, Any]:
    """Load the model, and the optimizer if there is one, from ``directory``. Called on all ranks together.

    ``exact`` also loads Transformer Engine's FP8 scales, which only a training of the same precision has. Returns the
    chunks' saved states by Megatron's names for them (``model0``, ...).
    """
    if optimizer is not None:
        _allocate_states(optimizer)
    sharded = _model_state(chunks, with_fp8_scales=exact)
    if optimizer is not None:
        sharded["optimizer"] = optimizer.sharded_state_dict(dict(sharded), is_loading=True, metadata=_metadata())
    loaded = compat.load_sharded(sharded, directory)
    for index, chunk in enumerate(chunks):
        bare(chunk).load_state_dict(loaded[f"model{index}"], strict=False)
    states = {f"model{index}": loaded[f"model{index}"] for index in range(len(chunks))}
    if optimizer is None:
        return states
    optimizer.load_state_dict(loaded["optimizer"])
    for inner in each_optimizer(optimizer):
        for values in inner.optimizer.state.values():
            if torch.is_tensor(values.get("step")):
                values["step"] = values["step"].clone()  # Megatron gives all parameters the same tensor
    return states


def read_state(directory: Path) -> CheckpointState:
    """Return a checkpoint's ``complete.json``. Raises CheckpointError if the checkpoint is missing or half-written."""
    marker = directory / MARKER
    if not marker.is_file():
        problem = "is half-written (it has no complete.json)" if directory.is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint {directory} {problem}; train the previous round again, or name another one")
    return build(CheckpointState, atomic.read_json(marker))


def check_model(directory: Path, model: ModelConfig) -> None:
    """Raise CheckpointError unless the checkpoint is of ``model``."""
    saved = read_state(directory).model
    if names := model.differing_from(saved):
        value, configured = to_dict(saved)[names[0]], to_dict(model)[names[0]]
        raise CheckpointError(f"checkpoint {directory} has model.{names[0]}={value}, the settings say {configured}")


def find_resumable(output_dir: Path, fingerprint: str) -> tuple[Path, CheckpointState] | None:
    """Return the newest complete checkpoint of the job with ``fingerprint`` in ``output_dir``, or None."""
    candidates = []
    for directory in [output_dir / FINAL, *output_dir.glob(_IN_ROUND + "*")]:
        try:
            state = read_state(directory)
        except CheckpointError:
            if directory.exists():
                logger.warning("ignoring half-written checkpoint %s", directory)
            continue
        if state.fingerprint == fingerprint:
            candidates.append((state.step, directory, state))
        else:
            logger.warning("ignoring checkpoint %s: it belongs to other settings or other data", directory)
    if not candidates:
        return None
    _, directory, state = max(candidates, key=lambda item: item[0])
    return directory, state


def step_directory(output_dir: Path, step: int) -> Path:
    """Return the directory for the checkpoint after ``step`` steps of a round."""
    return output_dir / f"{_IN_ROUND}{step:06d}"


def remove_others(output_dir: Path, keep: Path) -> None:
    """Remove in-round checkpoints other than ``keep``, and leftovers of killed saves."""
    if torch.distributed.get_rank() == 0:
        leftovers = output_dir.glob(f"{atomic.TEMPORARY_PREFIX}checkpoint*")
        for directory in [*output_dir.glob(_IN_ROUND + "*"), *leftovers]:
            if directory != keep:
                atomic.remove_tree(directory)


def _shared_name(directory: Path) -> str:
    """Return a temporary name, the same on all ranks."""
    names = [atomic.temporary_name(directory.name)]
    torch.distributed.broadcast_object_list(names, src=0)
    return names[0]


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _model_state(chunks: list[Any], *, with_fp8_scales: bool = True) -> dict[str, Any]:
    """Return every chunk's sharded state, with or without Transformer Engine's FP8 scales."""
    state = {}
    for index, chunk in enumerate(chunks):
        values = bare(chunk).sharded_state_dict(metadata=_metadata())
        if not with_fp8_scales:
            values = {key: value for key, value in values.items() if not key.endswith("_extra_state")}
        state[f"model{index}"] = values
    return state


def _allocate_states(optimizer: Any) -> None:
    """Create the state of torch's AdamW, which creates it in the first step only; Megatron needs it before loading."""
    for inner in each_optimizer(optimizer):
        if not isinstance(inner.optimizer, torch.optim.AdamW):
            continue
        for group in inner.optimizer.param_groups:
            for parameter in group["params"]:
                if not inner.optimizer.state.get(parameter):
                    inner.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
