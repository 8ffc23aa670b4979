"""The check ``bridge`` of tools.check.gpu: weights from one process to another through CUDA IPC (CPU: shared memory).

``check`` is the engine's end. It starts the trainer's end: ``python -m tools.check.gpu_weights SOURCES.json``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_dagger.config import ModelConfig, build, to_dict
from megatron_dagger.weights.blocks import Block
from megatron_dagger.weights.families import lookup
from megatron_dagger.weights.layouts import SourceLayout, TargetLayout, padded_vocab_size
from megatron_dagger.weights.transports import TransferSpec, WeightSource
from megatron_dagger.weights.transports.open import open_transport, send_weights
from megatron_dagger.weights.verify.digest import Shares, digest_shares
from megatron_dagger.weights.verify.digest_pool import DigestPool

ROOT = Path(__file__).resolve().parents[2]
_DEADLINE_S = 60.0
_TRANSFERS = 3


def check(folder: Path, model: ModelConfig) -> dict[str, Any]:
    """Transfer all weights several times, then digest them; return the rates in GB/s.

    The weights must arrive unchanged, and their digests must equal those of the same bytes on the host. The first
    transfer is a warm-up: the rate is that of the fastest one after it. A copy in memory is timed for comparison.
    """
    device = _device()
    source = SourceLayout(padded_vocab_size=padded_vocab_size(model, 1))
    specs = [
        _transfer_spec(
            model, WeightSource(kind="shared_memory", address=str(sockets), layout=source, deadline_s=_DEADLINE_S)
        )
        for sockets in _socket_folders(folder.resolve())
    ]
    path = folder.resolve() / "sources.json"
    path.write_text(json.dumps({"model": to_dict(model), "sources": [to_dict(spec.source) for spec in specs]}))
    tensors, table = _tensors(model, device), lookup(model).vllm(model)
    (shard, _), *_ = TargetLayout().holders(experts=False)
    parameters = {name: torch.zeros(p.shape(shard), dtype=torch.bfloat16, device=device) for name, p in table.items()}
    copies = specs[0].plan.by_target[0]
    process = subprocess.Popen([sys.executable, "-m", "tools.check.gpu_weights", str(path)], cwd=ROOT)
    try:
        seconds = [_receive(spec, parameters, device) for spec in specs]
        wrong = [
            copy.target_parameter
            for copy in copies
            if not torch.equal(
                parameters[copy.target_parameter][copy.target.slices], tensors[copy.source_tensor][copy.source.slices]
            )
        ]
        status = process.wait(_DEADLINE_S)
    finally:
        process.kill()
        process.wait()
    assert status == 0 and not wrong, f"the sender exited with {status}; wrong weights arrived for {wrong[:3]}"

    def copy_all() -> None:
        for copy in copies:
            into = parameters[copy.target_parameter][copy.target.slices]
            into.copy_(tensors[copy.source_tensor][copy.source.slices])

    size = sum(copy.source.elements for copy in copies) * 2
    copy_seconds = [_timed(copy_all, device) for _ in range(_TRANSFERS)]
    blocks = {name: parameter.blocks(shard) for name, parameter in table.items()}
    return {
        "gb": size / 1e9,
        "gb_per_s": size / min(seconds[1:]) / 1e9,
        "copy_gb_per_s": size / min(copy_seconds[1:]) / 1e9,
        "digests_gb_per_s": size / _digests_s(model, blocks, parameters, device) / 1e9,
        "first_s": seconds[0],
    }


def _receive(spec: TransferSpec, parameters: dict[str, torch.Tensor], device: torch.device) -> float:
    with open_transport(spec, 0, device) as transport:
        began = time.monotonic()  # the sender is connected
        for copy, block in transport.receive(spec.plan.by_target[0]):
            parameters[copy.target_parameter][copy.target.slices].copy_(block)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.monotonic() - began


def _digests_s(
    model: ModelConfig, blocks: dict[str, list[Block]], parameters: dict[str, torch.Tensor], device: torch.device
) -> float:
    """Return the seconds of the digests. Raises AssertionError if they differ from those of the bytes on the host."""
    results: list[Shares] = []

    def digest_all() -> None:
        with DigestPool(model) as digests:
            for name, parameter_blocks in blocks.items():
                digests.add(parameter_blocks, parameters[name])
            results.append(digests.finish())

    seconds = [_timed(digest_all, device) for _ in range(_TRANSFERS)]
    expected: Shares = {}
    for name, parameter_blocks in blocks.items():
        expected |= digest_shares(parameter_blocks, parameters[name].cpu(), model)
    assert all(shares == expected for shares in results), "digests differ from those of the same bytes on the host"
    return min(seconds[1:])


def _timed(call: Callable[[], None], device: torch.device) -> float:
    began = time.monotonic()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic() - began


def _transfer_spec(model: ModelConfig, source: WeightSource) -> TransferSpec:
    return TransferSpec(model=model, target=TargetLayout(), dtype="bfloat16", source=source)


def _socket_folders(folder: Path) -> list[Path]:
    """Create a directory for the sockets of each transfer; return them."""
    folders = [folder / f"bridge-{number}" for number in range(_TRANSFERS)]
    for sockets in folders:
        sockets.mkdir(exist_ok=True)
    return folders


def _tensors(model: ModelConfig, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the tensors of a single trainer rank, with the same values in both processes."""
    generator = torch.Generator(device).manual_seed(1)
    return {
        name: torch.randn(layout.shape, generator=generator, device=device, dtype=torch.bfloat16)
        for name, layout in lookup(model).megatron(model).items()
    }


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    model = build(ModelConfig, settings["model"])
    tensors = _tensors(model, _device())
    for source in settings["sources"]:
        send_weights(_transfer_spec(model, build(WeightSource, source)), 0, tensors, _device())


if __name__ == "__main__":
    main()
