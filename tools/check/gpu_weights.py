"""The bridge within a host between two processes on one GPU (CUDA IPC), for ``gpu_checks``; shared memory without one.

``gpu_bridge.py OFFERS.json``, started by ``check``, is the trainer's side.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from megatron_dagger.config import ModelConfig, build, to_dict  # noqa: E402
from megatron_dagger.weights.blocks import Block  # noqa: E402
from megatron_dagger.weights.families import lookup  # noqa: E402
from megatron_dagger.weights.layouts import SourceLayout, TargetLayout, padded_vocab_size  # noqa: E402
from megatron_dagger.weights.transports import TransferSpec, WeightSource  # noqa: E402
from megatron_dagger.weights.transports.open import open_transport, send_weights  # noqa: E402
from megatron_dagger.weights.verify.digest import Shares, digest_shares  # noqa: E402
from megatron_dagger.weights.verify.digest_pool import DigestPool  # noqa: E402

_DEADLINE_S = 60.0
_TRANSFERS = 3


def check(folder: Path, model: ModelConfig) -> dict[str, Any]:
    """Transfers of all weights: the first is compared, the fastest of the others is timed against a copy in memory.

    Then the digests of what has arrived, against those of the same bytes on the host, and the time they take.
    """
    device = _device()
    source = SourceLayout(padded_vocab_size=padded_vocab_size(model, 1))
    agreements = [
        _agreement(model, WeightSource(kind="host", address=str(place), source=source, deadline_s=_DEADLINE_S))
        for place in _places(folder)
    ]
    path = folder / "offers.json"
    path.write_text(json.dumps({"model": to_dict(model), "offers": [to_dict(each.offer) for each in agreements]}))
    tensors, table = _tensors(model, device), lookup(model).vllm(model)
    (shard, _), *_ = TargetLayout().holders(experts=False)
    parameters = {name: torch.zeros(p.shape(shard), dtype=torch.bfloat16, device=device) for name, p in table.items()}
    copies = agreements[0].plan.by_target[0]
    process = subprocess.Popen([sys.executable, __file__, str(path)])
    try:
        seconds = [_receive(agreement, parameters, device) for agreement in agreements]
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
    assert status == 0 and not wrong, f"the sender ended with {status}; these arrived otherwise: {wrong[:3]}"

    def copy_all() -> None:
        for copy in copies:
            into = parameters[copy.target_parameter][copy.target.slices]
            into.copy_(tensors[copy.source_tensor][copy.source.slices])

    size = sum(copy.source.elements for copy in copies) * 2
    once = [_timed(copy_all, device) for _ in range(_TRANSFERS)]
    blocks = {name: parameter.blocks(shard) for name, parameter in table.items()}
    return {
        "gb": size / 1e9,
        "gb_per_s": size / min(seconds[1:]) / 1e9,
        "copy_gb_per_s": size / min(once[1:]) / 1e9,
        "digests_gb_per_s": size / _digests_s(model, blocks, parameters, device) / 1e9,
        "first_s": seconds[0],
    }


def _receive(agreement: TransferSpec, parameters: dict[str, torch.Tensor], device: torch.device) -> float:
    with open_transport(agreement, 0, device) as transport:
        began = time.monotonic()  # the sender is there
        for copy, block in transport.receive(agreement.plan.by_target[0]):
            parameters[copy.target_parameter][copy.target.slices].copy_(block)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.monotonic() - began


def _digests_s(
    model: ModelConfig, blocks: dict[str, list[Block]], parameters: dict[str, torch.Tensor], device: torch.device
) -> float:
    """The seconds that the digests take, once they are found to be those of the same bytes on the host."""
    found: list[Shares] = []

    def digest_all() -> None:
        with DigestPool(model) as digests:
            for name, of_parameter in blocks.items():
                digests.add(of_parameter, parameters[name])
            found.append(digests.finish())

    seconds = [_timed(digest_all, device) for _ in range(_TRANSFERS)]
    expected: Shares = {}
    for name, of_parameter in blocks.items():
        expected |= digest_shares(of_parameter, parameters[name].cpu(), model)
    assert all(shares == expected for shares in found), "digests differ from those of the same bytes on the host"
    return min(seconds[1:])


def _timed(call: Callable[[], None], device: torch.device) -> float:
    began = time.monotonic()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic() - began


def _agreement(model: ModelConfig, offer: WeightSource) -> TransferSpec:
    return TransferSpec(model=model, target=TargetLayout(), dtype="bfloat16", offer=offer)


def _places(folder: Path) -> list[Path]:
    """A directory for each transfer's sockets, so that none is taken for another's."""
    places = [folder / f"bridge-{number}" for number in range(_TRANSFERS)]
    for place in places:
        place.mkdir(exist_ok=True)
    return places


def _tensors(model: ModelConfig, device: torch.device) -> dict[str, torch.Tensor]:
    """The trainer's, of one rank; the same values in both processes."""
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
    for offer in settings["offers"]:
        send_weights(_agreement(model, build(WeightSource, offer)), 0, tensors, _device())


if __name__ == "__main__":
    main()
